"""Which kernel runs, why the others do not, and that an explicit choice is never swapped for another."""

import concurrent.futures
import copy
import dataclasses
import logging
import multiprocessing
import pickle
import types

import pytest
import torch
from measured import decode_problem, decode_rows

import dsv4x
from dsv4x import layouts
from dsv4x.common import portable
from dsv4x.common.core.errors import BackendUnavailable, KernelNotSupported
from dsv4x.common.core.layouts import DSV4, CacheSpec, PagedCache
from dsv4x.common.core.vendor import VendorLibrary
from dsv4x.common.dispatch import registry, trace
from dsv4x.common.dispatch.problem import AttentionProblem, CacheProblem, Problem, SelectionProblem, fields_of
from dsv4x.common.dispatch.registry import Kernel, explain, kernel_names, select
from dsv4x.cuda import flash_mla, gluon

V4 = CacheSpec("DSv4", 64, 4, 37440)
DECODE = Problem("sparse_mla_decode", "cuda", "sm_90", tokens=4, heads=64, width=128, caches=(V4,), interpreter=False)
PREFILL = Problem("sparse_mla_prefill", "cuda", "sm_90", tokens=4, heads=64, width=128, rows=50, interpreter=False)
ON_CPU = {"device": "cpu", "arch": "cpu", "interpreter": False}


def problem(base=DECODE, **changes):
    return dataclasses.replace(base, **changes)


@pytest.fixture
def empty_registry(replaced):
    """No kernels, and nothing registered here outlives the test."""
    replaced(empty=True)


def kernel(name, predicted=1.0, op="op", **fields):
    return Kernel(op, name, lambda: name, lambda p: predicted, devices=("cuda", "cpu"), **fields)


def broken_library():
    library = VendorLibrary("no_such_module_dsv4x", ("nothing",), hint="pip install nothing")
    assert library.reason
    return library


@pytest.mark.parametrize("op", ["sparse_mla_decode", "sparse_mla_prefill", "dequantize_k_cache_paged", "window_slots"])
def test_explain_lists_every_kernel_and_the_chosen_one_has_no_reasons(op):
    explanation = explain(Problem(op, **ON_CPU, tokens=2, width=64))
    assert set(explanation.reasons) == set(kernel_names())
    assert explanation.chosen == "reference"
    assert explanation.reasons["reference"] == []
    assert all(explanation.reasons[name] for name in kernel_names() if name != "reference")
    assert set(explanation.predicted_us) == {name for name in kernel_names() if not explanation.reasons[name]}
    text = str(explanation)
    for name in kernel_names():
        assert name in text
        assert all(reason in text for reason in explanation.reasons[name])


def test_absent_kernels_say_which_backend_this_is():
    reasons = explain(problem(**ON_CPU)).reasons
    for name in {"flash_mla", "aiter"} - {record.name for record in registry.kernels("sparse_mla_decode")}:
        assert reasons[name] == [f"not on backend {dsv4x.platform.backend} ({dsv4x.platform.reason})"]


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
    record = dataclasses.replace(registry.find(bad.op, "reference"), layouts=("DSv4",), max_heads=32)
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
    assert set(raised.value.reasons) == set(kernel_names())
    for name in kernel_names():
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
    for call in calls.values():
        call(kernel="reference")
        with pytest.raises(KernelNotSupported, match="aiter"):
            call(kernel="aiter")
        with pytest.raises(ValueError, match="kernel: got 'cutlass'"):
            call(kernel="cutlass")


def test_an_unknown_kernel_or_op_is_named():
    assert set(kernel_names()) >= {"flash_mla", "deep_gemm", "gluon", "triton", "aiter", "flashinfer", "reference"}
    with pytest.raises(ValueError, match=f"kernel: got 'cutlass', need one of {', '.join(kernel_names())} or None"):
        select(DECODE, "cutlass")
    with pytest.raises(TypeError, match="kernel: got list, need a kernel's name or None"):
        select(DECODE, ["triton"])
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


def test_a_kernel_of_another_package_is_known_by_its_name_everywhere(empty_registry):
    registry.register(kernel("reference"))
    registry.register(kernel("mine", 0.5))
    registry.register(kernel("triton", op="other"))
    assert kernel_names() == ("reference", "mine", "triton")
    assert select(Problem("op")).name == select(Problem("op"), "mine").name == "mine"
    assert explain(Problem("op")).reasons == {"reference": [], "mine": [], "triton": ["it has no op"]}
    with pytest.raises(KernelNotSupported, match="kernel='triton' cannot run op: it has no op"):
        select(Problem("op"), "triton")


def test_a_name_refused_for_every_op_is_known_and_gives_way_to_closer_reasons(empty_registry):
    registry.register(kernel("reference"))
    registry.refuse(None, "aiter")
    registry.refuse(None, "gluon", "no Gluon here")
    registry.refuse("op", "gluon", "it returns no lse")
    reasons = explain(Problem("op")).reasons
    assert reasons["aiter"] == [f"not on backend {dsv4x.platform.backend} ({dsv4x.platform.reason})"]
    assert reasons["gluon"] == ["it returns no lse"]
    assert registry.absent("other", "gluon") == "no Gluon here"


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"name": "my kernel"}, ValueError, "name: got 'my kernel', need an identifier"),
        ({"op": ""}, ValueError, "op: got '', need an identifier"),
        ({"name": None}, TypeError, "name: got NoneType, need a str"),
        ({"run": None}, TypeError, "run of kernel mine of op: got NoneType, need a callable"),
        ({"predicted_us": 3.0}, TypeError, "predicted_us of kernel mine of op: got float, need a callable"),
        ({"archs": "sm_90"}, TypeError, "archs of kernel mine of op: got 'sm_90', need a tuple of str"),
        ({"layouts": (layouts.DSV4,)}, TypeError, "layouts of kernel mine of op: got .*, need a tuple of str"),
        ({"remaps": 1}, TypeError, "remaps of kernel mine of op: got int, need a bool"),
        ({"max_heads": -1}, ValueError, "max_heads of kernel mine of op: got -1, need an int >= 0"),
        ({"by_name_only": True}, TypeError, "by_name_only of kernel mine of op: got bool, need a str"),
    ],
)
def test_a_record_that_makes_no_sense_is_not_registered(fields, error, says, empty_registry):
    with pytest.raises(error, match=says):
        registry.register(dataclasses.replace(kernel("mine"), **fields))
    assert registry.ops() == []


def test_what_is_no_record_is_not_registered():
    with pytest.raises(TypeError, match="kernel: got str, need a Kernel"):
        registry.register("triton")


def test_replaced_kernels_come_back(empty_registry):
    registry.register(kernel("reference", 9.0))
    registry.register(kernel("triton", 3.0))
    registry.refuse("op", "aiter", "it returns no lse")
    with registry.replaced(kernel("triton", 10.0), kernel("mine", 11.0)):
        assert select(Problem("op")).name == "reference"
        with registry.replaced(without=[("op", "reference")]):
            assert select(Problem("op")).name == "triton"
            registry.register(kernel("more", 1.0))
            registry.refuse(None, "gluon")
            assert select(Problem("op")).name == "more"
        assert kernel_names() == ("reference", "triton", "mine", "aiter")
        with registry.replaced(empty=True):
            assert kernel_names() == ()
        with registry.replaced(kernel("triton"), empty=["op"]):
            assert kernel_names() == ("triton", "aiter")
    assert select(Problem("op")).name == "triton"
    with pytest.raises(RuntimeError, match="inside"), registry.replaced(empty=True):
        raise RuntimeError("inside")
    assert kernel_names() == ("reference", "triton", "aiter")


def test_a_cached_choice_is_forgotten_when_the_kernels_change(empty_registry):
    @registry.cached(8)
    def names(op):
        return [record.name for record in registry.kernels(op)]

    registry.register(kernel("reference"))
    assert names("op") == ["reference"]
    registry.register(kernel("triton"))
    assert names("op") == ["reference", "triton"]
    with registry.replaced(without=[("op", "triton")]):
        assert names("op") == ["reference"]
    assert names("op") == ["reference", "triton"]


class EntryPoint:
    """One entry point of an installed package."""

    name, value = "mine", "mine.kernels:register"

    def __init__(self, function):
        self.function = function

    def load(self):
        return self.function


@pytest.fixture
def installed(empty_registry, monkeypatch):
    """Packages with these entry points, not loaded yet."""

    def put(*functions):
        monkeypatch.setattr(registry, "_unloaded", [registry.ENTRY_POINTS])
        points = {registry.ENTRY_POINTS: [EntryPoint(function) for function in functions]}
        monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: points[group])

    return put


def test_another_packages_kernels_are_loaded_before_the_first_choice_and_once(installed):
    calls = []

    def theirs():
        calls.append(kernel_names())
        registry.register(kernel("mine"))

    installed(theirs)
    assert select(Problem("op")).name == "mine"
    assert select(Problem("op"), "mine").name == "mine"
    assert calls == [()]


def test_a_package_that_fails_is_a_reason_and_no_error(installed):
    def theirs():
        raise OSError("libmine.so: not found")

    installed(theirs, lambda: registry.register(kernel("reference")))
    explanation = explain(Problem("op"))
    assert explanation.chosen == "reference"
    (reason,) = explanation.reasons["mine"]
    assert reason == "entry point mine.kernels:register failed: OSError: libmine.so: not found"


def test_the_vendors_kernels_are_known_by_name_where_their_backend_is_not(empty_registry):
    for vendor in (dsv4x.cuda, dsv4x.rocm):
        with registry.replaced(kernel("triton", op="sparse_mla_decode")):
            vendor.register_kernels()
            assert set(kernel_names()) - {"triton"} == set(vendor.KERNELS)


# The log and the profiler.


@pytest.fixture
def log(caplog):
    trace.forget()
    with caplog.at_level(logging.INFO, logger="dsv4x"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "dsv4x"]
    trace.forget()


def test_a_first_choice_is_logged_once_with_its_reason(empty_registry, log):
    registry.register(kernel("reference", 9.0))
    select(Problem("op", arch="sm_90"))
    registry.register(kernel("triton", 3.0))
    for tokens in (1, 2, 3):
        select(Problem("op", arch="sm_90", tokens=tokens))
    select(Problem("op", arch="sm_90", capturing=True))
    select(Problem("op"), "reference")
    assert log() == [
        "op on sm_90: reference, the only kernel to choose from",
        "op on sm_90: triton, predicted 3 us (reference 9 us)",
        "op on sm_90 in a graph: triton, predicted 3 us (reference 9 us)",
        "op on cuda: reference, asked for by name",
    ]


def test_nothing_is_remembered_as_logged_while_info_is_off(empty_registry, caplog):
    trace.forget()
    with caplog.at_level(logging.WARNING, logger="dsv4x"):
        trace.logged("key", "unheard")
    with caplog.at_level(logging.INFO, logger="dsv4x"):
        trace.logged("key", "heard")
        trace.logged("key", "heard")
    trace.forget()
    assert [record.getMessage() for record in caplog.records] == ["heard"]


def test_the_packages_logger_is_silent_by_default():
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("dsv4x").handlers)


def test_profiled_kernels_have_ranges_and_others_are_not_wrapped(monkeypatch, empty_registry):
    record = kernel("triton")
    registry.register(record)
    assert registry.find("op", "triton") is record
    monkeypatch.setattr(trace, "PROFILING", True)
    with registry.replaced(record), torch.profiler.profile() as profile:
        assert registry.find("op", "triton").run() == "triton"
        with trace.range("path/direct"):
            pass
    assert {"dsv4x::op/triton", "dsv4x::path/direct"} <= {event.key for event in profile.key_averages()}


def test_without_profiling_a_range_is_nothing(monkeypatch):
    monkeypatch.setattr(trace, "PROFILING", False)
    with torch.profiler.profile() as profile, trace.range("path/direct"):
        torch.zeros(1)
    assert "dsv4x::path/direct" not in {event.key for event in profile.key_averages()}


# Problems.


def test_an_ops_name_decides_the_family_of_its_problem():
    assert type(Problem("sparse_mla_decode", heads=8)) is AttentionProblem
    assert type(Problem(op="topk_transform", k=5)) is SelectionProblem
    assert type(Problem("nothing")) is Problem
    assert Problem("copy_pages", "cpu", "cpu", 3, caches=(V4,)) == CacheProblem(
        "copy_pages", "cpu", "cpu", 3, caches=(V4,)
    )
    on = Problem.on("topk_merge", torch.device("cpu"), tokens=2, k=7)
    assert (type(on), on.device, on.arch, on.tokens, on.k) == (SelectionProblem, "cpu", "cpu", 2, 7)


@pytest.mark.parametrize("op", ["nothing", *registry.ops()])
def test_a_problem_of_every_op_survives_a_copy_and_a_pickle(op):
    asked = Problem(op, "cuda", "sm_90", tokens=3)
    for made in (pickle.loads(pickle.dumps(asked)), copy.copy(asked), copy.deepcopy(asked), dataclasses.replace(asked)):
        assert made == asked
        assert type(made) is type(asked)
        assert hash(made) == hash(asked)


@pytest.mark.parametrize("op", registry.ops())
def test_every_op_has_a_family_of_its_own_fields(op):
    assert type(Problem(op)) is not Problem


def test_a_field_the_family_lacks_is_named_with_those_it_has():
    with pytest.raises(
        TypeError, match=f"k: no field of a problem of mqa_logits, need one of {', '.join(fields_of('mqa_logits'))}"
    ):
        Problem("mqa_logits", k=5)
    with pytest.raises(
        TypeError, match="heads: no field of a problem of nothing, need one of op, device, arch, tokens, "
    ):
        Problem("nothing", heads=5)
    with pytest.raises(TypeError, match=r"width: no field of a problem of get_paged_mqa_logits_metadata, .*num_sms"):
        Problem.on("get_paged_mqa_logits_metadata", torch.device("cpu"), width=5)
    with pytest.raises(TypeError, match="op: got NoneType, need an op's name"):
        Problem(None)


def test_explain_asks_for_the_other_mode_and_for_a_problem():
    asked = Problem("sparse_mla_decode", **ON_CPU, heads=8, width=64)
    assert "captured" not in explain(asked).reasons["reference"]
    assert any("captured" in reason for reason in explain(asked, capturing=True).reasons["reference"])
    captured = dataclasses.replace(asked, capturing=True)
    assert explain(captured, capturing=False) == explain(asked)
    with pytest.raises(TypeError, match=r"problem: got str, need a dsv4x\.Problem"):
        explain("sparse_mla_decode")


def test_local_entries_are_refused_by_a_kernel_that_does_not_remap_them():
    asked = problem(local=True, extra_width=8)
    says = "extra indices are local entries, need slots: it does not remap them"
    assert kernel("mine").not_supported_reasons(asked) == [says]
    assert kernel("mine", remaps=True).not_supported_reasons(asked) == []
    assert kernel("mine").not_supported_reasons(problem(extra_width=8)) == []


# Errors.


def in_another_process(error):
    raise error


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_survive_a_copy_and_a_pickle(remake):
    error = KernelNotSupported("why", {"triton": ["no"]})
    error.request = 7
    made = remake(error)
    assert (type(made), str(made), made.reasons, made.request) == (KernelNotSupported, "why", {"triton": ["no"]}, 7)
    made = remake(BackendUnavailable("no driver"))
    assert (type(made), str(made)) == (BackendUnavailable, "no driver")


def test_errors_survive_a_pool_of_processes():
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        for error in (KernelNotSupported("why", {"triton": ["no"]}), BackendUnavailable("no driver")):
            with pytest.raises(type(error), match=str(error)) as raised:
                pool.submit(in_another_process, error).result()
            assert getattr(raised.value, "reasons", None) == getattr(error, "reasons", None)


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
def flash_reasons(replaced, monkeypatch):
    """Reasons of FlashMLA's kernel for a problem, whatever this machine is."""

    def ask(asked, module=None, reason=None):
        library = FakeLibrary(module or fake_module(", extra_k_cache, use_legacy"), reason)
        monkeypatch.setattr(flash_mla, "FLASH_MLA", library)
        replaced(empty=True)
        flash_mla.register_kernels()
        return registry.find(asked.op, "flash_mla").not_supported_reasons(asked)

    return ask


@pytest.mark.parametrize("base", [DECODE, PREFILL])
@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_103", "sm_107"])
@pytest.mark.parametrize("heads", [1, 8, 64, 100, 128])
def test_flash_mla_takes_hopper_and_blackwell_and_any_heads(base, arch, heads, flash_reasons):
    assert flash_reasons(problem(base, arch=arch, heads=heads)) == []


@pytest.mark.parametrize("base", [DECODE, PREFILL])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_120", "gfx942"])
def test_flash_mla_refuses_other_archs(base, arch, flash_reasons):
    reasons = flash_reasons(problem(base, arch=arch))
    assert reasons[0] == f"arch is {arch}, need sm_90 or sm_100 or sm_103 or sm_107"


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


@pytest.mark.parametrize("base", [DECODE, PREFILL])
def test_sm_107_needs_the_wheel_that_has_code_for_it(base, flash_reasons):
    (reason,) = flash_reasons(problem(base, arch="sm_107"), fake_module(", extra_k_cache, out"))
    assert "no code for sm_107" in reason


def test_vllms_copy_kept_the_pages_that_upstream_dropped(flash_reasons):
    assert flash_reasons(DECODE, fake_module(", extra_k_cache, out, enable_batch_invariant")) == []


def test_upstreams_newest_release_still_serves_bf16_rows_on_sm100(flash_reasons):
    module = fake_module(", extra_k_cache, enable_batch_invariant")
    rows = CacheSpec("bf16 512", 64, 4, 64 * 1024)
    for base in (PREFILL, problem(caches=(rows,))):
        assert flash_reasons(problem(base, arch="sm_100"), module) == []
        (reason,) = flash_reasons(base, module)
        assert reason.endswith("2026.09.30 release or later, which dropped SM90")
        (reason,) = flash_reasons(problem(base, arch="sm_100", head_dim=576), module)
        assert reason.endswith("dropped head_dim 576, need 512")
    (reason,) = flash_reasons(problem(arch="sm_100"), module)
    assert reason.endswith("dropped DSv4 pages")


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
    record = registry.find(base.op, "flash_mla")
    big = problem(base, tokens=4096)
    problems = [dataclasses.replace(big, heads=h) for h in (1, 64, 65, 128)]
    paddings = [flash_mla.padding_us(each) for each in problems]
    assert [us > 0 for us in paddings] == [True, False] * 2
    times = [record.predicted_us(each) - us for each, us in zip(problems, paddings)]
    assert times[0] == pytest.approx(times[1])
    assert times[2] == pytest.approx(times[3])
    assert times[2] > times[1]


@pytest.mark.parametrize("base", [DECODE, PREFILL])
def test_a_result_that_has_to_be_copied_into_its_place_costs_that(base, flash_reasons, monkeypatch):
    flash_reasons(base)
    record = registry.find(base.op, "flash_mla")

    def copying_us(function, heads):
        module = types.SimpleNamespace(flash_mla_with_kvcache=function, flash_mla_sparse_fwd=function)
        monkeypatch.setattr(flash_mla, "FLASH_MLA", types.SimpleNamespace(reason=None, load=lambda: module))
        asked = dataclasses.replace(problem(base, tokens=4096), heads=heads)
        return record.predicted_us(dataclasses.replace(asked, out=True)) - record.predicted_us(asked)

    # Read and written once, at no more than what an H200's memory moves.
    assert copying_us(lambda q: None, 128) > 4 * 4096 * 128 * 512 / 4.8e6
    assert copying_us(lambda q, out=None: None, 128) == 0
    # The copy that cuts padded heads off brings the rest to its place.
    assert copying_us(lambda q: None, 16) == 0


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_the_reference_comes_last_on_a_gpu_however_large_the_problem(arch):
    for large in (
        Problem("topk_transform", "cuda", arch, tokens=8192, width=1 << 20, k=2048, interpreter=False),
        Problem("paged_mqa_logits", "cuda", arch, tokens=4096, width=1 << 18, heads=64, interpreter=False),
        Problem("mqa_logits", "cuda", arch, tokens=65536, width=1 << 18, heads=64, rows=1 << 18, interpreter=False),
        Problem("sparse_mla_decode", "cuda", arch, tokens=65536, width=2048, heads=128, interpreter=False),
        Problem("sparse_mla_prefill", "cuda", arch, tokens=65536, width=2048, heads=128, interpreter=False),
    ):
        others = [kernel for kernel in registry.kernels(large.op) if kernel.name == "triton"]
        assert len(others) == 1
        assert others[0].predicted_us(large) < registry.find(large.op, "reference").predicted_us(large)


def test_picks_among_measured_decode_kernels_are_close_to_the_best():
    """Of rows in graphs: what choosing by prediction costs over choosing by the measurement."""
    times = {"triton": portable._triton_decode_us, "gluon": gluon._decode_us, "flash_mla": flash_mla._predicted_us}
    regrets = {}
    for row in decode_rows():
        predicted = {name: us(decode_problem(row)) for name, us in times.items()}
        picked = min(predicted, key=predicted.__getitem__)
        point = row["heads"], row["tokens"], row["kind"], row["entries"]
        regret = row["us"][picked] / min(row["us"][name] for name in times)
        regrets[point] = max(regret, regrets.get(point, 1.0))
    assert len(regrets) == 180
    assert max(regrets.values()) < 1.2
    assert max(regret for (_, tokens, _, _), regret in regrets.items() if tokens >= 64) <= 1.05
    assert {regret for (heads, *_), regret in regrets.items() if heads <= 16} == {1.0}
