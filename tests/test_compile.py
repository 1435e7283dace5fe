"""Every Triton kernel compiles for every arch dsv4x names, without that GPU, and fits it."""

import dataclasses
import pathlib
import re

import census
import compiling
import pytest
import torch
import triton

from dsv4x import layouts
from dsv4x.common.kernels import cache, decode, decode_shapes
from dsv4x.common.kernels.entries import entry_format
from dsv4x.cuda.hopper import decode as decode_hopper
from dsv4x.cuda.hopper import few_heads
from dsv4x.cuda.hopper import prefill as prefill_hopper
from dsv4x.rocm.cdna import decode as decode_cdna
from dsv4x.rocm.cdna import prefill as prefill_cdna
from dsv4x.rocm.cdna import shapes

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "gfx.md"
MOST_SPILLS = 14 if triton.__version__.startswith("3.6.") else 0
"""Registers. Triton 3.6 takes more than 3.9 does, and other launch shapes would cost more than these."""
GLUON_SPILLS = 112 if triton.__version__.startswith("3.9.") else 224
"""Of the Gluon kernels for AMD GPUs, which take all registers; which of them spill, a test below says."""
PRODUCTS = ("decode", "prefill", "paged_mqa_logits", "scheduled_mqa_logits", "mqa_logits")
GFX = [arch for arch in compiling.TARGETS if arch.startswith("gfx")]
GLUON = (decode_cdna.decode_cdna_kernel, prefill_cdna.prefill_cdna_kernel)
CASES = [(arch, case) for arch in compiling.TARGETS for case in compiling.cases(arch)]


def test_every_launched_kernel_has_a_case():
    assert compiling.launchable_kernels() == {case.kernel.__name__ for _, case in CASES}


@pytest.mark.parametrize(("arch", "case"), CASES, ids=[f"{arch}-{case.name}" for arch, case in CASES])
def test_kernel_compiles_and_fits(arch, case):
    for far in (False, True) if arch in GFX and case.has_far else (False,):
        compiled = compiling.compile_case(case, arch, far)
        assert compiled.metadata.shared <= compiling.SHARED_LIMIT[arch]
        if arch in GFX:
            report = compiling.amd_report(compiled)
            assert report["spills"] <= (GLUON_SPILLS if case.kernel in GLUON else MOST_SPILLS)
            assert report["calls"] == 0
            assert (report["mfma"] > 0) == case.name.startswith(PRODUCTS)


@pytest.mark.parametrize("arch", GFX)
def test_the_page_of_amds_kernels_is_what_they_compile_to(arch):
    """Every number of it, where Triton is the one it was written with."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {arch} |")]
    cases = census.product_cases(arch)
    if f"with Triton {triton.__version__}." in PAGE.read_text():
        assert rows == [census.row(arch, case, far) for case, far in cases]
    else:
        assert len(rows) == len(cases)


def test_the_pages_predictions_are_of_what_was_compiled():
    if f"with Triton {triton.__version__}." not in PAGE.read_text():
        pytest.skip("cycles are those of another Triton")
    assert "\n".join(census.predictions()) in PAGE.read_text()


@pytest.mark.parametrize("arch", GFX)
def test_what_amds_kernels_execute_a_step_stays_within_bounds(arch):
    """With any Triton: the LDS reads, the products and the instructions that the launch shapes were chosen for."""
    for case, far in census.product_cases(arch):
        static = census.measure(case, arch, far)
        kinds = {kind for loop in static.loops for kind in loop.products}
        assert kinds <= {"16x16x16_bf16", "16x16x32_bf16", "16x16x32_fp8_fp8", "16x16x128_f8f6f4"} or (
            arch == "gfx950" and case.kernel in GLUON and kinds == {"32x32x16_bf16"}
        ), case.name
        heads, entries = case.constants.get("BLOCK_H"), case.constants.get("BLOCK_K")
        for loop, issue in zip(static.loops, static.issue):
            if case.kernel is not decode.decode_kernel or arch == "gfx950":
                assert loop.narrow_reads <= 8, case.name
            else:
                # V of decoded entries is read transposed, every wave its quarter of it.
                assert loop.narrow_reads <= 8 * entries + 8, case.name
            if heads is not None:
                # Slots are divided by pages once, and not for every thread that wants them.
                assert loop.wide_multiplies <= 12, case.name
            if heads == 64:
                assert issue <= (26_000 if arch == "gfx942" else 20_000), case.name


@pytest.mark.parametrize("arch", GFX)
def test_as_many_programs_share_a_compute_unit_as_splits_count_on(arch):
    """No fewer: splits are for programs that all begin at once."""
    if f"with Triton {triton.__version__}." not in PAGE.read_text():
        pytest.skip("registers are those of another Triton")
    for case, far in census.product_cases(arch):
        if case.kernel is decode.decode_kernel:
            heads = 8 if case.name.startswith("decode_kernel[H=8,") else 64
            shape = decode_shapes.decode_config(arch, heads, case.layouts)
            assert shape.block_h == case.constants["BLOCK_H"]
            assert census.measure(case, arch, far).waves >= shape.resident, case.name


@pytest.mark.parametrize("arch", GFX)
def test_gluons_kernels_execute_what_they_were_written_for(arch):
    """Products of the shape with the most values an LDS read, V read by 8 bytes a lane at least, five barriers."""
    gfx950, newest = arch == "gfx950", triton.__version__.startswith("3.9.")
    for case, far in census.product_cases(arch):
        if case.kernel not in GLUON:
            continue
        static, many = census.measure(case, arch, far), case.constants["BLOCK_H"] == 64
        decodes, slow = case.kernel is GLUON[0], gfx950 and "fnuz" in case.name
        assert len(static.loops) == (2 if case.constants.get("HAS_EXTRA") else 1)
        shape = shapes.shape_of(arch, case.constants["BLOCK_H"])
        assert static.waves >= shape.resident
        for loop in static.loops:
            kind = "32x32x16_bf16" if many and gfx950 else "16x16x32_bf16" if gfx950 else "16x16x16_bf16"
            # Both products of a block; on gfx942 two of four waves compute the logits of 16 heads again.
            assert loop.products == {kind: 64 if many and gfx950 else 32 if gfx950 else 128 if many else 48}
            assert loop.narrow_reads == 0
            assert loop.count("ds_read_b64_tr_b16") == ((64 if many else 32) if gfx950 else 0)
            assert loop.wide_multiplies <= 3
            if newest:
                assert loop.names["s_barrier"] <= 4 + decodes
                assert loop.count("v_cvt_scalef32_pk_bf16_fp8") in ((64, 0) if gfx950 and decodes else (0,))
                assert loop.count("scratch_") <= (17 if slow else 3), case.name
        if newest:
            assert static.spills <= (GLUON_SPILLS if slow else 24), case.name
            assert not static.spills or gfx950, case.name
            if many and not slow:
                most = {
                    ("gfx942", True): 7143,
                    ("gfx942", False): 4400,
                    ("gfx950", True): 3250,
                    ("gfx950", False): 2300,
                }
                assert max(static.issue) <= most[arch, decodes], case.name
                assert max(static.bound) <= {"gfx942": 7143, "gfx950": 3420}[arch], case.name


@pytest.mark.parametrize("arch", GFX)
def test_gluons_predictions_are_of_what_was_compiled(arch):
    if f"with Triton {triton.__version__}." not in PAGE.read_text():
        pytest.skip("cycles are those of another Triton")
    for case in compiling.cdna_cases(arch):
        if case.name.endswith(("DSv4+DSv4,split=True,local=True]", "given=True]")):
            shape, static = shapes.shape_of(arch, case.constants["BLOCK_H"]), census.measure(case, arch, False)
            cycles = shape.decode_cycles if case.kernel is GLUON[0] else shape.prefill_cycles
            assert cycles == pytest.approx(static.bound[-1] * shape.block_h * shape.block_k / 64**2, rel=0.02)


def test_amds_triton_compiles_for_storages_below_2_gib():
    """What the launcher's keys and the compilations here count with."""
    backend = pytest.importorskip("triton.backends.amd.compiler").HIPBackend
    below, above = (torch.empty(size, dtype=torch.uint8, device="meta") for size in (2**31 - 1, 2**31))
    for tensor, attributes in ((below, ["tt.divisibility", "tt.pointer_range"]), (above, ["tt.divisibility"])):
        for view in (tensor, tensor[64:128]):
            key = backend.get_tensor_specialization(view, align=True)
            assert [name for name, _ in backend.parse_attr(key)] == attributes


def test_the_hopper_kernel_keeps_its_registers_and_the_tensor_cores(tmp_path):
    cases = [case for arch, case in CASES if arch == "sm_90" and case.kernel is prefill_hopper.prefill_hopper_kernel]
    assert cases
    for case in cases:
        report = compiling.nvidia_report(compiling.compile_case(case, "sm_90"), tmp_path / "kernel.cubin")
        # Two consumers: the logits of a tile of 64 entries over 512 values, and two tiles' weights times half of V.
        assert report["wgmma"] == 2 * (512 // 16 + 2 * 64 // 16)
        # Spills stand where an item begins and ends, and take no more than Triton 3.9's do; 3.6's take less than half.
        assert report["stack"] <= 160, case.name


def test_hopper_decode_keeps_its_registers_and_the_tensor_cores(tmp_path):
    cases = [case for arch, case in CASES if arch == "sm_90" and case.kernel is decode_hopper.decode_hopper_kernel]
    assert cases
    for case in cases:
        compiled = compiling.compile_case(case, "sm_90")
        report = compiling.nvidia_report(compiled, tmp_path / "kernel.cubin")
        # Logits over 512 values of the first block and of the others; half of V for those, the last, the right half.
        assert report["wgmma"] == 2 * 512 // 16 + 3 * 64 // 16
        assert ("griddepcontrol.launch_dependents" in compiled.asm["ptx"]) == case.constants["SPLIT"]
        # Spills stand where an item begins and ends, and take no more than they do now.
        assert report["stack"] <= (384 if case.constants["FAR_HEADS"] else 256), case.name
        assert compiled.asm["ptx"].count("cvt.rn.f16x2.e4m3x2") > 0


def test_decode_of_few_heads_spills_nothing_and_waits_seldom(tmp_path):
    cases = [case for arch, case in CASES if case.kernel is few_heads.decode_few_heads_kernel]
    assert {case.constants["BLOCK_H"] for case in cases} == {8, 16}
    for case in cases:
        compiled = compiling.compile_case(case, "sm_90")
        ptx = compiled.asm["ptx"]
        assert compiling.nvidia_report(compiled, tmp_path / "kernel.cubin") == {"stack": 0, "wgmma": 0}, case.name
        # 64 entries of 16 rows a warp over 512 values, and 64 entries' weights times a warp's 128 values, 8 heads each.
        assert len(re.findall(r"mma\.sync\.aligned\.m16n8k16\S*\.bf16", ptx)) == case.constants["BLOCK_H"] // 8 * 64
        # A tile's words of a lane are two loads of 16 bytes, before the loop and in it; RoPE's four are in it alone.
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 2 * 7 * 2 + 4
        assert ptx.count("prefetch.global.L2") == 2 * 8
        # Two programs share a multiprocessor, whose shared memory is 227 KiB and 1 KiB for each.
        assert compiled.metadata.shared <= 227 * 1024 // 2 - 1024
        loop = ptx[ptx.index("mma.sync") : ptx.rindex("mma.sync")]
        # Maxima, and weights; the third stands at the loop's end.
        assert loop.count("bar.sync") == 2, case.name
        assert ("griddepcontrol.launch_dependents" in ptx) == case.constants["SPLIT"]


def test_the_reduction_waits_for_the_splits_wherever_it_is_launched_early():
    cases = [(arch, case) for arch, case in CASES if case.kernel is decode.reduce_kernel and arch.startswith("sm_")]
    assert {case.constants["EARLY"] for _, case in cases} == {True, False}
    for arch, case in cases:
        ptx = compiling.compile_case(case, arch).asm["ptx"]
        assert ("griddepcontrol.wait" in ptx) == case.constants["EARLY"] == (arch == "sm_90")
        if case.constants["EARLY"]:
            before, after = ptx.split("griddepcontrol.wait")
            # A row's two lengths, which no split writes.
            assert re.findall(r"ld\.global\S*", before) == ["ld.global.b32"] * 2
            assert "ld.global.v4.b32" in after
            assert "st.global" not in before


def test_the_splits_let_the_reduction_be_launched_before_they_end():
    for arch, case in CASES:
        if case.kernel is decode.decode_kernel and case.name.startswith("decode_kernel[H=8,DSv4+DSv4"):
            ptx = compiling.compile_case(case, arch).asm.get("ptx", "")
            early = case.constants["SPLIT"] and arch == "sm_90"
            assert ("griddepcontrol.launch_dependents" in ptx) == early
            assert "ld.global" not in ptx.split("griddepcontrol.launch_dependents")[0] or not early


@pytest.mark.parametrize("arch", [arch for arch in compiling.TARGETS if arch.startswith("sm_")])
def test_entries_are_moved_in_whole_vectors_without_spills(arch, tmp_path):
    for at, case in CASES:
        if at == arch and case.kernel is cache.copy_entries_kernel:
            compiled = compiling.compile_case(case, arch)
            assert compiling.nvidia_report(compiled, tmp_path / "kernel.cubin")["stack"] == 0, case.name
            aligned = case.constants["WORD"] is compiling.tl.int64
            assert ("st.global.v2.b64" in compiled.asm["ptx"]) == aligned, case.name


def test_selection_spills_only_where_it_holds_most_candidates(tmp_path):
    """Past k = 512 a program may hold twice as many, 16 a thread; spills there take no more than they do now."""
    for arch in ("sm_90", "gfx942"):
        case = next(c for at, c in CASES if at == arch and c.name == "topk_kernel[2,False,True]")
        more = dataclasses.replace(case, constants={**case.constants, "ROOM": 2 * case.constants["ROOM"]})
        compiled = compiling.compile_case(more, arch)
        if arch == "sm_90":
            assert compiling.nvidia_report(compiled, tmp_path / "kernel.cubin")["stack"] <= 128
        else:
            assert compiling.amd_report(compiled)["spills"] <= 64


@pytest.mark.parametrize(("arch", "flavour"), [("gfx942", "e4m3fnuz"), ("gfx950", "e4m3fn")])
def test_the_archs_own_fp8_is_converted_by_its_own_instruction(arch, flavour):
    for own in layouts.FLAVOURS:
        layout = layouts.DSV4.with_flavour(own)
        case = next(
            case
            for at, case in CASES
            if at == arch
            and case.kernel is decode.decode_kernel
            and case.constants["SWA"] is entry_format(layouts.DSV4.with_flavour("e4m3fnuz"), arch)
            and case.constants["EXTRA"] is entry_format(layout, arch)
        )
        report = compiling.amd_report(compiling.compile_case(case, arch))
        assert report["calls"] == 0
        assert (report["fp8"] > 0) == (flavour in (own, "e4m3fnuz"))


@pytest.mark.parametrize("arch", compiling.TARGETS)
def test_values_are_encoded_by_nvidias_conversion_or_by_ours(arch):
    writers = {}
    for at, case in CASES:
        if at == arch and case.name in ("quantize_insert_kernel[DSv4]", "quantize_insert_kernel[DSv4 fnuz]"):
            writers[case.name] = "fp_to_fp" in compiling.compile_case(case, arch).asm["ttir"]
    assert list(writers.values()) == [arch.startswith("sm_"), False]


def test_a_kernel_that_does_not_compile_fails(monkeypatch):
    @triton.jit
    def wrong_kernel(out_ptr, BLOCK: compiling.triton.language.constexpr):
        compiling.triton.language.store(out_ptr + compiling.triton.language.arange(0, BLOCK), undefined)  # noqa: F821

    with pytest.raises(triton.CompilationError):
        compiling.compile_case(compiling.Case(wrong_kernel, {"BLOCK": 16}), "gfx942")
