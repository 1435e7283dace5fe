"""Which kernel runs, why the others do not, and that an explicit choice is never swapped for another."""

import dataclasses
import types

import pytest
import torch

import dsv4x
from dsv4x.common.core.errors import BackendUnavailable, KernelNotSupported
from dsv4x.common.core.layouts import DSV4, CacheSpec, PagedCache
from dsv4x.common.core.vendor import VendorLibrary
from dsv4x.common.dispatch import registry
from dsv4x.common.dispatch.registry import KERNEL_NAMES, Kernel, Problem, explain, select
from dsv4x.cuda import flash_mla

V4 = CacheSpec("DSv4", 64, 4, 37440)
DECODE = Problem("sparse_mla_decode", "cuda", "sm_90", tokens=4, heads=64, width=128, caches=(V4,), interpreter=False)
PREFILL = Problem("sparse_mla_prefill", "cuda", "sm_90", tokens=4, heads=64, width=128, rows=50, interpreter=False)
ON_CPU = {"device": "cpu", "arch": "cpu", "interpreter": False}


def problem(base=DECODE, **changes):
    return dataclasses.replace(base, **changes)


@pytest.fixture
def empty_registry(monkeypatch):
    """An op of its own, so that nothing registered here outlives the test."""
    monkeypatch.setattr(registry, "_kernels", {})
    monkeypatch.setattr(registry, "_refused", {})
    select.cache_clear()
    yield
    select.cache_clear()


def kernel(name, predicted=1.0, op="op", **fields):
    return Kernel(op, name, lambda: name, lambda p: predicted, devices=("cuda", "cpu"), **fields)


def broken_library():
    library = VendorLibrary("no_such_module_dsv4x", ("nothing",), hint="pip install nothing")
    assert library.reason
    return library


@pytest.mark.parametrize("op", ["sparse_mla_decode", "sparse_mla_prefill", "dequantize_k_cache_paged", "window_slots"])
def test_explain_lists_every_kernel_and_the_chosen_one_has_no_reasons(op):
    explanation = explain(Problem(op, **ON_CPU, heads=8, tokens=2, width=64))
    assert set(explanation.reasons) == set(KERNEL_NAMES)
    assert explanation.chosen == "reference"
    assert explanation.reasons["reference"] == []
    assert all(explanation.reasons[name] for name in KERNEL_NAMES if name != "reference")
    assert set(explanation.predicted_us) == {name for name in KERNEL_NAMES if not explanation.reasons[name]}
    text = str(explanation)
    for name in KERNEL_NAMES:
        assert name in text
        assert all(reason in text for reason in explanation.reasons[name])


def test_absent_kernels_say_which_backend_this_is():
    reasons = explain(problem(**ON_CPU)).reasons
    for name in {"flash_mla", "aiter"} - set(registry._kernels["sparse_mla_decode"]):
        assert dsv4x.platform.backend in reasons[name][0]
        assert dsv4x.platform.reason in reasons[name][0] or (("sparse_mla_decode", name) in registry._refused)


def test_triton_on_a_cpu_says_what_it_would_take():
    reasons = explain(problem(**ON_CPU)).reasons["triton"]
    assert len(reasons) == 1
    assert "cpu" in reasons[0]
    assert "TRITON_INTERPRET=1" in reasons[0]
    assert explain(problem(**{**ON_CPU, "interpreter": True})).reasons["triton"] == []


def test_the_interpreter_is_never_chosen_over_the_reference():
    explanation = explain(problem(**{**ON_CPU, "interpreter": True}, tokens=4096, heads=128))
    assert explanation.chosen == "reference"


def test_every_reason_is_listed_at_once():
    bad = problem(caches=(V4, CacheSpec("DSv3.2", 64, 4, 41984)), capturing=True, device="xpu", arch="xe")
    record = dataclasses.replace(registry._kernels[bad.op]["reference"], layouts=("DSv4",), max_heads=32)
    reasons = record.not_supported_reasons(bad)
    assert len(reasons) == 4
    assert any("xpu" in r and "cuda or cpu" in r for r in reasons)
    assert any("DSv3.2" in r and "DSv4" in r for r in reasons)
    assert any("captured" in r for r in reasons)
    assert any("64 heads" in r and "32" in r for r in reasons)


def test_no_kernel_at_all_raises_with_every_kernels_reasons():
    bad = problem(device="xpu", arch="xe")
    assert explain(bad).chosen is None
    with pytest.raises(KernelNotSupported) as raised:
        select(bad)
    assert set(raised.value.reasons) == set(KERNEL_NAMES)
    for name in KERNEL_NAMES:
        assert name in str(raised.value)


def test_a_named_kernel_that_cannot_run_raises_instead_of_falling_back():
    assert select(problem(**ON_CPU)).name == "reference"
    with pytest.raises(
        KernelNotSupported, match=r"kernel='triton' cannot run sparse_mla_decode: .*need cuda"
    ) as raised:
        select(problem(**ON_CPU), "triton")
    assert list(raised.value.reasons) == ["triton"]
    with pytest.raises(KernelNotSupported, match=r"kernel='aiter' cannot run"):
        select(problem(**ON_CPU), "aiter")


def test_every_op_hands_its_kernel_argument_on():
    cache = PagedCache.zeros(1, DSV4, 64)
    q = torch.zeros(1, 1, 512, dtype=torch.bfloat16)
    slots = torch.zeros(1, dtype=torch.int32)
    rows = slots[:, None]
    calls = {
        "decode": lambda **k: dsv4x.sparse_mla_decode(q, cache, rows, None, **k),
        "prefill": lambda **k: dsv4x.sparse_mla_prefill(q, q[0], rows, None, **k),
        "quantize": lambda **k: dsv4x.quantize_and_insert_k_cache(q[0], cache, slots, **k),
        "dequantize": lambda **k: dsv4x.dequantize_k_cache_paged(cache, slots, **k),
        "combine": lambda **k: dsv4x.combine_topk_swa_indices(
            rows, torch.tensor([0, 1]), *[slots] * 4, window_size=1, compress_ratio=1, topk=1, **k
        ),
    }
    for name, call in calls.items():
        call(kernel="reference")
        with pytest.raises(KernelNotSupported, match="aiter"):
            call(kernel="aiter")
        with pytest.raises(ValueError, match="kernel: got 'cutlass'"):
            call(kernel="cutlass")
        assert name


def test_an_unknown_kernel_or_op_is_named():
    with pytest.raises(
        ValueError,
        match=r"kernel: got 'cutlass', need one of flash_mla, deep_gemm, gluon, triton, aiter, flashinfer, reference",
    ):
        select(DECODE, "cutlass")
    with pytest.raises(ValueError, match=r"op: got 'nothing'"):
        explain(Problem("nothing"))


def test_the_lowest_prediction_is_chosen(empty_registry):
    for record in (kernel("reference", 9.0), kernel("triton", 3.0), kernel("flash_mla", 5.0)):
        registry.register(record)
    assert select(Problem("op")).name == "triton"
    assert select(Problem("op"), "flash_mla").name == "flash_mla"
    text = str(explain(Problem("op")))
    assert "chosen, predicted 3 us" in text
    assert "slower, predicted 5 us" in text


def test_a_kernel_by_name_only_is_never_predicted(empty_registry):
    def unasked(problem):
        raise AssertionError("its prediction was asked")

    registry.register(kernel("reference", 9.0))
    record = kernel("flashinfer", by_name_only="it rounds q")
    registry.register(dataclasses.replace(record, predicted_us=unasked))
    assert select(Problem("op")).name == "reference"
    assert select(Problem("op"), "flashinfer").name == "flashinfer"
    explanation = explain(Problem("op"))
    assert explanation.reasons["flashinfer"] == []
    assert explanation.by_name_only == {"flashinfer": "it rounds q"}
    assert set(explanation.predicted_us) == {"reference"}
    assert "flashinfer only by name: it rounds q" in str(explanation)


def test_a_kernel_by_name_only_that_cannot_run_says_why_as_others_do(empty_registry):
    registry.register(kernel("flashinfer", archs=("sm_100",), by_name_only="it rounds q"))
    explanation = explain(Problem("op", arch="sm_90"))
    assert explanation.by_name_only == {}
    assert explanation.reasons["flashinfer"] == ["arch is sm_90, need sm_100"]
    with pytest.raises(KernelNotSupported, match="need sm_100"):
        select(Problem("op", arch="sm_90"), "flashinfer")


def test_registering_twice_is_a_mistake_and_registering_later_is_seen(empty_registry):
    registry.register(kernel("reference"))
    assert select(Problem("op")).name == "reference"
    registry.register(kernel("triton", 0.5))
    assert select(Problem("op")).name == "triton"
    with pytest.raises(ValueError, match="triton of op is registered already"):
        registry.register(kernel("triton"))


def test_a_refusal_is_said_in_the_backends_words(empty_registry):
    registry.register(kernel("reference"))
    registry.refuse("op", "aiter", "it returns no lse")
    assert explain(Problem("op")).reasons["aiter"] == ["it returns no lse"]
    with pytest.raises(KernelNotSupported, match="it returns no lse"):
        select(Problem("op"), "aiter")


def test_a_missing_library_is_unavailable_when_named_and_a_reason_otherwise(empty_registry):
    registry.register(kernel("reference", 9.0))
    registry.register(kernel("flash_mla", 1.0, library=broken_library()))
    assert select(Problem("op")).name == "reference"
    with pytest.raises(BackendUnavailable, match=r"kernel='flash_mla' of op: no_such_module_dsv4x is not installed"):
        select(Problem("op"), "flash_mla")


def test_a_library_is_not_imported_when_cheaper_reasons_refuse():
    class Explosive(VendorLibrary):
        @property
        def reason(self):
            raise AssertionError("the library was asked")

    record = kernel("flash_mla", library=Explosive("x", (), hint=""), archs=("sm_90",))
    assert record.not_supported_reasons(Problem("op", "cuda", "sm_70")) == ["arch is sm_70, need sm_90"]


def test_explain_counts_the_calls_own_problem():
    cache = PagedCache.zeros(3, DSV4, 61)
    assert cache.spec == CacheSpec("DSv4", 61, 3, DSV4.page_stride(61))
    on = Problem.on("sparse_mla_decode", torch.device("cpu"), tokens=2)
    assert (on.device, on.arch, on.tokens, on.capturing) == ("cpu", "cpu", 2, False)


# FlashMLA's limits, asked of records built as the CUDA backend builds them, with a library that is there.


def fake_module(parameters="", has_legacy=True):
    scope = {}
    exec(f"def flash_mla_with_kvcache(q{parameters}): pass", scope)
    return types.SimpleNamespace(
        flash_mla_with_kvcache=scope["flash_mla_with_kvcache"], has_legacy=lambda: has_legacy, flash_mla_sparse_fwd=None
    )


class FakeLibrary:
    path = "/site/flash_mla"

    def __init__(self, module, reason=None):
        self.module, self.reason = module, reason

    def load(self):
        if self.reason:
            raise BackendUnavailable(self.reason)
        return self.module


@pytest.fixture
def flash_reasons(empty_registry, monkeypatch):
    """Reasons of FlashMLA's kernel for a problem, whatever this machine is."""

    def ask(asked, module=None, reason=None):
        library = FakeLibrary(module or fake_module(", extra_k_cache, use_legacy"), reason)
        monkeypatch.setattr(flash_mla, "FLASH_MLA", library)
        registry._kernels.clear()
        flash_mla.register_kernels()
        return registry._kernels[asked.op]["flash_mla"].not_supported_reasons(asked)

    return ask


@pytest.mark.parametrize("base", [DECODE, PREFILL])
@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_103"])
@pytest.mark.parametrize("heads", [1, 8, 64, 100, 128])
def test_flash_mla_takes_hopper_and_blackwell_and_any_heads(base, arch, heads, flash_reasons):
    assert flash_reasons(problem(base, arch=arch, heads=heads)) == []


@pytest.mark.parametrize("base", [DECODE, PREFILL])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_120", "gfx942"])
def test_flash_mla_refuses_other_archs(base, arch, flash_reasons):
    reasons = flash_reasons(problem(base, arch=arch))
    assert reasons[0] == f"arch is {arch}, need sm_90 or sm_100 or sm_103"


@pytest.mark.parametrize("base", [DECODE, PREFILL])
def test_flash_mla_refuses_a_cpu(base, flash_reasons):
    reasons = flash_reasons(problem(base, **ON_CPU))
    assert reasons == ["device is cpu, need cuda"]


def test_flash_mla_needs_aligned_pages_on_sm_100_only(flash_reasons):
    odd = CacheSpec("DSv4", 64, 4, 37440 + 16)
    assert flash_reasons(problem(caches=(V4, odd))) == []
    assert flash_reasons(problem(caches=(V4, odd), arch="sm_100")) == [
        "page stride is 37456, need a multiple of 576 on SM100"
    ]


def test_flash_mla_lists_all_its_reasons(flash_reasons):
    native, pool = CacheSpec("trtllm-native", 64, 4, 36864), CacheSpec("DSv4", 1 << 16, 1 << 15, 584)
    reasons = flash_reasons(problem(arch="sm_100", heads=200, caches=(native, pool)))
    assert any("cache layout is trtllm-native" in r for r in reasons)
    assert any("trtllm-native and DSv4" in r for r in reasons)
    assert "200 heads, need <= 128" in reasons
    assert any(str(1 << 31) in r and "2**31" in r for r in reasons)
    assert any("584" in r and "576" in r for r in reasons)
    assert len(reasons) == 5


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (fake_module(", block_table"), "no extra_k_cache: it predates DeepSeek-V4"),
        (fake_module(", extra_k_cache, use_legacy", has_legacy=False), "without its legacy kernels"),
        (fake_module(", extra_k_cache, enable_batch_invariant"), "dropped DSv4 pages"),
    ],
)
def test_a_wheel_that_lacks_v4_is_told_apart(module, says, flash_reasons):
    reasons = flash_reasons(DECODE, module)
    assert len(reasons) == 1
    assert says in reasons[0]
    assert "/site/flash_mla" in reasons[0]
    # Where it could not run anyway, what the wheel lacks is beside the point.
    assert not any(says in r for r in flash_reasons(problem(arch="sm_120"), module))


def test_the_wheel_before_use_legacy_is_fine(flash_reasons):
    assert flash_reasons(DECODE, fake_module(", extra_k_cache")) == []


def test_flash_mla_that_does_not_import_is_the_only_reason(flash_reasons):
    assert flash_reasons(DECODE, reason="import flash_mla failed: OSError: libcuda") == [
        "import flash_mla failed: OSError: libcuda"
    ]


def test_the_schedulers_limit_is_51_less_than_the_quoted_one():
    # 227 KB, what SM90 and SM100 really offer; 11 673 assumes 228.
    assert flash_mla.scheduler_limit(232448) == 11622
    assert flash_mla.scheduler_limit(233472) == 11673
    for batch in (1, 7, 11622):
        needed = 4 * (5 * batch + 1)
        assert flash_mla.scheduler_limit(needed) == batch
        assert flash_mla.scheduler_limit(needed - 4) == batch - 1


def test_a_batch_is_bounded_by_the_scheduler_and_by_its_partial_outputs():
    assert flash_mla.max_batch(8, 232448) == 11622
    assert flash_mla.max_batch(64, 232448) == (1 << 28) // (64 * 512)
    assert flash_mla.max_batch(128, 232448) == (1 << 28) // (128 * 512)
    assert flash_mla.max_batch(128, 232448) * 128 * 512 * 4 <= 1 << 30


@pytest.mark.parametrize("base", [DECODE, PREFILL])
def test_padded_heads_count_in_the_prediction(base, flash_reasons):
    flash_reasons(base)
    record = registry._kernels[base.op]["flash_mla"]
    big = problem(base, tokens=4096)
    problems = [dataclasses.replace(big, heads=h) for h in (1, 64, 65, 128)]
    paddings = [flash_mla.padding_us(each) for each in problems]
    assert [us > 0 for us in paddings] == [base is PREFILL, False] * 2
    times = [record.predicted_us(each) - us for each, us in zip(problems, paddings)]
    assert times[0] == pytest.approx(times[1])
    assert times[2] == pytest.approx(times[3])
    assert times[2] > times[1]
