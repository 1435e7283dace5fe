"""What delays.py makes of the kernels' PTX, without a GPU: it assembles, sleeps where it should and lacks one wait."""

import pathlib
import re

import compiling
import delays
import pytest
import triton

WAITS = {"prefill": 2 + 3 + 2 * 6, "decode": 6 + 2 + 2}
"""By role, the producer's or left half's first."""


@pytest.fixture(scope="module", params=delays.KERNELS)
def kernel(request):
    """(name, a compilation) with all optional arguments."""
    wanted = f"{request.param}_hopper_kernel"
    case = [case for case in compiling.cases("sm_90") if case.kernel.__name__ == wanted][-1]
    return request.param, compiling.compile_case(case, "sm_90")


def test_sleeps_stand_in_front_of_what_hands_over(kernel):
    ptx = kernel[1].asm["ptx"]
    lines = delays.delayed(ptx).splitlines()
    assert "\n".join(lines).count("nanosleep.u32") == len(delays.sites(ptx))
    single = r"\s*(@!?%\w+\s+)?(bar\.sync|barrier\.sync|mbarrier\.arrive|cp\.async\.mbarrier\.arrive|wgmma\.fence)\b"
    alone = [number for number, line in enumerate(lines) if re.match(single, line)]
    assert len(alone) > 30
    assert all(lines[number - 1] == "\t}" for number in alone)
    # A fence and the products after it stay together, and so do the stores of a tile.
    assert not any("wgmma.mma_async" in line and lines[number - 1] == "\t}" for number, line in enumerate(lines))
    stores = [number for number, line in enumerate(lines) if re.match(r"\s*(st\.shared|stmatrix)\b", line)]
    assert 0 < sum(lines[number - 1] == "\t}" for number in stores) < len(stores)


def test_what_sleeps_assembles_and_keeps_its_products_asynchronous(kernel, tmp_path, monkeypatch, capfd):
    _, compiled = kernel
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    for number, slow in enumerate(delays.SCHEDULES[:2]):
        cubin = delays.assemble(compiled, delays.delayed(delays.without_waits(compiled.asm["ptx"], [number]), slow))
        assert cubin != compiled.asm["cubin"]
        (tmp_path / "kernel.cubin").write_bytes(cubin)
        assert compiling.stack_bytes(tmp_path / "kernel.cubin") <= 512
    log = capfd.readouterr().out
    assert log.count("Compiling entry function") == 2
    assert "serialized" not in log


def test_every_wait_of_the_source_is_found_and_removed_alone(kernel):
    name, compiled = kernel
    ptx = compiled.asm["ptx"]
    found = delays.waits(ptx)
    assert len(found) == ptx.count("mbarrier.try_wait") == WAITS[name]
    path = pathlib.Path(delays.KERNELS[name].__file__)
    lines = [number for number, line in enumerate(path.read_text().splitlines(), 1) if "mbarrier.wait(" in line]
    assert set(found) == {f"{path.name}:{number}" for number in lines}
    made = [delays.without_waits(ptx, [wait]) for wait in range(len(found))]
    assert len(set(made)) == len(found)
    for wait, text in enumerate(made):
        assert delays.waits(text) == found[:wait] + found[wait + 1 :]
        assert text.count("bra.uni waitLoop") == len(found) - 1
        assert [line for line in ptx.splitlines() if "wait" not in line and ".loc" not in line] == [
            line for line in text.splitlines() if "wait" not in line and ".loc" not in line
        ]
