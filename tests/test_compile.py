"""Every Triton kernel compiles for every arch dsv4x names, without that GPU, and fits it."""

import compiling
import pytest
import triton

PRODUCTS = ("decode", "prefill", "paged_mqa_logits", "mqa_logits")
CASES = [(arch, case) for arch in compiling.TARGETS for case in compiling.cases(arch)]


def test_every_launched_kernel_has_a_case():
    assert compiling.launchable_kernels() == {case.kernel.__name__ for _, case in CASES}


@pytest.mark.parametrize(("arch", "case"), CASES, ids=[f"{arch}-{case.name}" for arch, case in CASES])
def test_kernel_compiles_and_fits(arch, case):
    compiled = compiling.compile_case(case, arch)
    assert compiled.metadata.shared <= compiling.SHARED_LIMIT[arch]
    if arch.startswith("gfx"):
        report = compiling.amd_report(compiled)
        assert report["spills"] == 0
        assert (report["mfma"] > 0) == case.name.startswith(PRODUCTS)


def test_a_kernel_that_does_not_compile_fails(monkeypatch):
    @triton.jit
    def wrong_kernel(out_ptr, BLOCK: compiling.triton.language.constexpr):
        compiling.triton.language.store(out_ptr + compiling.triton.language.arange(0, BLOCK), undefined)  # noqa: F821

    with pytest.raises(triton.CompilationError):
        compiling.compile_case(compiling.Case(wrong_kernel, {"BLOCK": 16}), "gfx942")
