"""What to store and where to convert, from kernels' records alone."""

import contextlib
import dataclasses
import itertools
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4x
from dsv4x import KernelNotSupported, PagedCache, layouts, plan_cache, reference
from dsv4x.common.core.vendor import VendorLibrary
from dsv4x.common.dispatch import registry
from dsv4x.common.dispatch.registry import Kernel
from dsv4x.cuda import flash_mla

NAMED = [member.value for member in layouts.MLAKVCacheLayout]
FNUZ = [layout.with_flavour("e4m3fnuz") for layout in NAMED if layout.value_encoding == "e4m3fn"]
MAIN = [layout for layout in NAMED + FNUZ if layout.head_dim in (512, 576)]
REAL = [record for op in ("sparse_mla_decode", "sparse_mla_prefill") for record in registry.kernels(op)]
NATIVE, BLOCKS = layouts.TRTLLM_NATIVE, layouts.DSV32
NATIVE_TO_BLOCKS = {NATIVE.with_flavour(f): BLOCKS.with_flavour(f) for f in layouts.FLAVOURS}
DECODE, PREFILL, REQUANTIZE = "sparse_mla_decode", "sparse_mla_prefill", "requantize_fp8_to_block_scale"


def kernel(op, name, *reads, **fields):
    return Kernel(op, name, lambda: None, lambda p: 1.0, layouts=tuple(layout.name for layout in reads), **fields)


@contextlib.contextmanager
def only(*records, dropped=()):
    """The attention ops with these kernels alone; the cache ops with their own, but for the dropped."""
    with registry.replaced(*records, empty=(DECODE, PREFILL, *dropped)):
        yield


TABLE = (
    kernel(DECODE, "triton", *MAIN, devices=("cuda", "cpu")),
    kernel(PREFILL, "triton", devices=("cuda", "cpu")),
    kernel(
        DECODE,
        "flash_mla",
        *(layouts.DSV4, layouts.DSV32, layouts.BF16_512, layouts.BF16_576),
        archs=("sm_90", "sm_100"),
        max_heads=128,
        further_reasons=lambda p: [
            f"page stride is {c.page_stride}, need a multiple of 576"
            for c in p.caches
            if c.layout == "DSv4" and p.arch == "sm_100" and c.page_stride % 576
        ],
    ),
    kernel(PREFILL, "flash_mla", archs=("sm_90", "sm_100"), max_heads=128),
    kernel(DECODE, "flashinfer", layouts.TRTLLM_NATIVE, layouts.BF16_576, archs=("sm_100",)),
)


@pytest.fixture
def servers_kernels():
    """A kernel of every layout, one of block-scaled and bf16 pages, one of trtllm-native pages, on sm_100."""
    with only(*TABLE):
        yield


pytestmark = pytest.mark.usefixtures("servers_kernels")


def refusal(*names, **arguments):
    with pytest.raises(KernelNotSupported) as raised:
        plan_cache(*names, **{"arch": "sm_100", **arguments})
    return raised.value


def what(plan):
    return plan.layout, plan.prefill_op, plan.prefill_layout, plan.converter


# The three ways.


@pytest.mark.parametrize("head_dim", [512, 576])
def test_pages_both_kernels_read_are_stored_and_nothing_is_converted(head_dim):
    plan = plan_cache("flash_mla", "triton", head_dim=head_dim, arch="sm_90")
    stored = {512: layouts.DSV4, 576: BLOCKS}[head_dim]
    assert what(plan) == (stored, DECODE, stored, None)
    assert (plan.prefill, plan.decode, plan.entry_bytes) == ("flash_mla", "triton", {512: 584, 576: 656}[head_dim])
    assert plan.needs_k_scale is False
    assert str(plan) == (
        f"Store {stored.name} pages: {stored.entry_bytes} B an entry. Decode kernel triton reads them in place. "
        "Prefill kernel flash_mla reads them in place (sparse_mla_decode)."
    )


def test_pages_prefill_cannot_read_are_converted_once_for_it():
    plan = plan_cache("flash_mla", "flashinfer", head_dim=576, arch="sm_100")
    assert what(plan) == (NATIVE, DECODE, BLOCKS, "dsv4x.requantize_fp8_to_block_scale")
    assert (plan.entry_bytes, plan.needs_k_scale) == (576, True)
    assert str(plan) == (
        "Store trtllm-native pages: 576 B an entry and one k_scale for the whole tensor. "
        "Decode kernel flashinfer reads them in place. Prefill kernel flash_mla reads DSv3.2 pages that "
        "dsv4x.requantize_fp8_to_block_scale makes of them, each once (sparse_mla_decode)."
    )


def test_pages_nothing_converts_for_prefill_are_gathered_as_rows():
    plan = plan_cache("flash_mla", "triton", stored=layouts.UNIFORM_FP8, arch="sm_100")
    assert what(plan) == (layouts.UNIFORM_FP8, PREFILL, None, "dsv4x.dequantize_k_cache_paged")
    assert plan.reasons == {}
    assert str(plan) == (
        "Store uniform fp8 pages: 512 B an entry and one k_scale for the whole tensor. "
        "Decode kernel triton reads them in place. Prefill kernel flash_mla reads bf16 rows that "
        "dsv4x.dequantize_k_cache_paged gathers from them (sparse_mla_prefill)."
    )


def test_a_converter_without_a_kernel_is_no_way():
    with only(*TABLE, dropped=(REQUANTIZE,)):
        registry.register(Kernel(REQUANTIZE, "triton", lambda: None, lambda p: 1.0, archs=("gfx942",)))
        plan = plan_cache("flash_mla", "flashinfer", stored=NATIVE, arch="sm_100")
        assert what(plan)[1:] == (PREFILL, None, "dsv4x.dequantize_k_cache_paged")
        with registry.replaced(empty=[PREFILL]):
            text = str(refusal("flash_mla", "flashinfer", stored=NATIVE))
    assert "from DSv3.2 pages: dsv4x.requantize_fp8_to_block_scale by triton: arch is sm_100, need gfx942" in text


# Which layout, of those that serve.


def test_the_better_way_comes_before_the_enums_order():
    plan = plan_cache("flash_mla", "triton", head_dim=576, arch="sm_100")
    assert plan.layout == BLOCKS
    assert plan.reasons["trtllm-native"] == [
        "prefill flash_mla would read DSv3.2 pages that dsv4x.requantize_fp8_to_block_scale makes of them, each once: "
        "DSv3.2 takes less work"
    ]
    with only(kernel(DECODE, "triton", layouts.UNIFORM_FP8, NATIVE), *TABLE[1:]):
        assert what(plan_cache("flash_mla", "triton", head_dim=576, arch="sm_100"))[0] == NATIVE
    read = (layouts.UNIFORM_FP8, layouts.DSV41_FP8)
    assert plan_cache("triton", "triton", stored=read[0], arch="gfx942").prefill_op == DECODE
    with only(kernel(DECODE, "triton", *read), kernel(DECODE, "aiter", read[1]), kernel(PREFILL, "aiter")):
        plan = plan_cache("aiter", "triton", arch="gfx942")
    assert plan.layout == layouts.DSV41_FP8
    assert "bf16 rows that dsv4x.dequantize_k_cache_paged" in plan.reasons["uniform fp8"][0]


def test_a_kernel_that_reads_all_gets_the_models_own():
    plan = plan_cache("triton", "triton", arch="gfx942")
    assert plan.layout == layouts.DSV4
    assert plan_cache("triton", "triton", head_dim=576, arch="gfx942").layout == BLOCKS
    # Of the two flavours OCP's is the record, gfx942's the variant.
    for other in ("uniform fp8", "DSv4 fnuz"):
        assert plan.reasons[other] == ["would serve as well, but DSv4 stands before it in MLAKVCacheLayout"]
    soa = (layouts.DSV41_FP8_SOA, layouts.DSV41_FP8)
    with only(kernel(DECODE, "triton", *soa)):
        plan = plan_cache("triton", "triton", arch="gfx942")
    assert plan.layout == layouts.DSV41_FP8
    assert set(plan.reasons) == {layout.name for layout in MAIN if layout.head_dim == 512} - {"DSv4.1 fp8"}


def test_fp8_comes_before_bf16_even_where_prefill_converts_and_before_4_bits_even_where_they_are_fewer():
    plan = plan_cache("flash_mla", "flashinfer", head_dim=576, arch="sm_100")
    assert plan.reasons["bf16 576"] == ["holds bf16 values, stored only where no e4m3fn layout serves"]
    plan = plan_cache("triton", "triton", arch="gfx942")
    assert plan.reasons["DSv4.1 fp4"] == ["holds e2m1 values, stored only where no e4m3fn layout serves"]
    with only(kernel(DECODE, "triton", layouts.DSV41_FP4, layouts.BF16_512)):
        assert plan_cache("triton", "triton", arch="gfx942").layout == layouts.BF16_512
    with only(kernel(DECODE, "triton", layouts.DSV41_FP4)):
        assert plan_cache("triton", "triton", arch="gfx942").layout == layouts.DSV41_FP4
    assert plan_cache("triton", "triton", stored=layouts.DSV41_FP4, arch="gfx942").layout == layouts.DSV41_FP4


def test_layouts_decode_does_not_read_are_said_so():
    plan = plan_cache("triton", "flash_mla", arch="sm_90")
    assert plan.layout == layouts.DSV4
    assert plan.reasons["uniform fp8"] == ["decode flash_mla reads DSv4, DSv3.2, bf16 512, bf16 576 pages"]
    assert "DSv3.2" not in plan.reasons
    assert plan.layout.name not in plan.reasons


def test_the_plan_is_of_the_head_dimension_asked_for():
    assert plan_cache("triton", "triton", arch="gfx942").layout.head_dim == 512
    assert plan_cache("triton", "triton", arch="gfx942", stored=BLOCKS).layout == BLOCKS
    asked = []
    records = [
        kernel(op, "triton", *reads, further_reasons=lambda p: asked.append(p) or [])
        for op, reads in ((DECODE, [BLOCKS]), (PREFILL, []))
    ]
    with only(*records):
        plan_cache("triton", "triton", arch="sm_90", head_dim=576, heads=16, page_size=32)
    assert {(p.op, p.head_dim, p.heads, p.device, p.arch) for p in asked} == {(DECODE, 576, 16, "cuda", "sm_90")}
    assert [p.caches for p in asked] == [(layouts.CacheSpec("DSv3.2", 32, 1, 32 * 656),)] * 2


def test_with_512_values_kernels_are_asked_for_both_caches_of_a_layer():
    def reasons(p):
        return ["two caches"] if len(p.caches) == 2 and p.extra_width and p.caches[0].layout != "DSv4" else []

    def of_triton(*reads):
        return [kernel(DECODE, "triton", *reads, further_reasons=reasons)]

    with only(*of_triton(layouts.UNIFORM_FP8, layouts.DSV4)):
        assert plan_cache("triton", "triton", arch="sm_90").layout == layouts.DSV4
    with only(*of_triton(NATIVE)):
        assert plan_cache("triton", "triton", head_dim=576, arch="sm_90").layout == NATIVE
    # Both caches are of one layout, and are refused once.
    with only(*of_triton(layouts.DSV4)):
        error = refusal("triton", "triton", stored=layouts.UNIFORM_FP8)
    assert str(error).count("decode triton: cache layout is") == 1


# Flavours.


def test_a_flavour_is_kept_through_the_conversion():
    fnuz, blocks = NATIVE.with_flavour("e4m3fnuz"), BLOCKS.with_flavour("e4m3fnuz")
    with only(kernel(DECODE, "triton", fnuz), kernel(DECODE, "aiter", BLOCKS, blocks)):
        assert what(plan_cache("aiter", "triton", head_dim=576, arch="gfx942")) == (
            fnuz,
            DECODE,
            blocks,
            "dsv4x.requantize_fp8_to_block_scale",
        )
    with only(kernel(DECODE, "triton", fnuz), kernel(DECODE, "aiter", BLOCKS)):
        text = str(refusal("aiter", "triton", head_dim=576, arch="gfx942"))
    assert "prefill aiter from DSv3.2 fnuz pages: cache layout is DSv3.2 fnuz, need DSv3.2" in text


# What cannot be.


def test_a_mix_with_no_layout_in_common_lists_every_reason():
    with only(kernel(DECODE, "flashinfer", NATIVE), kernel(DECODE, "flash_mla", BLOCKS), kernel(PREFILL, "flash_mla")):
        error = refusal("flashinfer", "flash_mla", head_dim=576)
    backend = "it has no sparse_mla_prefill"
    advice = "dsv4x.convert_cache converts it to trtllm-native, rounding through bf16"
    assert str(error).split("\n") == [
        "no cache layout of head dim 576 serves prefill='flashinfer' and decode='flash_mla' on sm_100, pages of 64",
        "  prefill flashinfer reads trtllm-native pages",
        "  decode flash_mla reads DSv3.2 pages",
        f"  DSv3.2: prefill flashinfer in place: cache layout is DSv3.2, need trtllm-native: {advice}; "
        f"prefill flashinfer from bf16 rows: {backend}; "
        "prefill flashinfer from other pages: no exact converter makes them",
    ]
    assert set(error.reasons) == {"flashinfer", "flash_mla"}
    assert error.reasons["flash_mla"] == ["decode flash_mla reads DSv3.2 pages"]
    assert len(error.reasons["flashinfer"]) == 4


def test_a_stored_layout_decode_cannot_read_is_refused_with_what_would_convert_it():
    with only(kernel(DECODE, "flash_mla", BLOCKS), kernel(PREFILL, "flash_mla")):
        error = refusal("flash_mla", "flash_mla", stored=NATIVE)
    assert error.reasons["flash_mla"][-1] == (
        "decode flash_mla: cache layout is trtllm-native, need DSv3.2: "
        "dsv4x.requantize_fp8_to_block_scale converts it to DSv3.2"
    )


def test_a_kernel_of_another_head_dimension_is_said_to_be():
    text = str(refusal("flash_mla", "flashinfer"))
    assert "head dim 512" in text
    assert "decode flashinfer reads trtllm-native, bf16 576 pages" in text


def test_a_kernel_this_process_does_not_have_is_refused_by_its_absence():
    with only(*TABLE):
        registry.refuse(DECODE, "aiter", "it returns no lse")
        assert "decode aiter: it returns no lse" in str(refusal("triton", "aiter"))
        assert refusal("triton", "aiter").reasons["aiter"] == ["decode aiter: it returns no lse"]
        assert "prefill aiter in place: it returns no lse" in str(refusal("aiter", "triton"))


# The machine.


def test_the_plan_is_for_this_machine_unless_told_otherwise():
    here = dsv4x.platform.arch
    assert f"on {here}, pages of 64" in str(refusal("triton", "aiter", arch=None))
    assert plan_cache("triton", "triton", device="cpu").layout == layouts.DSV4
    error = refusal("flash_mla", "flash_mla", arch=None, device="cpu")
    assert any("device is cpu, need cuda" in reason for reason in error.reasons["flash_mla"])


def test_an_arch_without_its_kernel_is_the_reason():
    text = str(refusal("flash_mla", "flashinfer", head_dim=576, arch="sm_90"))
    assert "decode flashinfer: arch is sm_90, need sm_100" in text
    # Both its layouts are refused alike but for what prefill would do, which it can.
    assert "\n  trtllm-native, bf16 576: decode flashinfer: arch is sm_90" in text


def test_a_library_that_is_not_there_is_the_reason_and_the_only_one_when_all_else_fits():
    library = VendorLibrary("no_such_module_dsv4x", ("nothing",), hint="pip install nothing")
    missing = "decode flashinfer: no_such_module_dsv4x is not installed (pip install nothing)"
    record = dataclasses.replace(TABLE[-1], library=library)
    with only(*TABLE[:-1], record):
        assert refusal("flash_mla", "flashinfer", head_dim=576).reasons["flashinfer"][1:] == [missing]
        assert missing not in str(refusal("flash_mla", "flashinfer", head_dim=576, arch="sm_90"))


def test_a_page_stride_a_kernel_refuses_is_not_planned():
    assert plan_cache("flash_mla", "flash_mla", arch="sm_100").layout == layouts.DSV4
    with only(*(dataclasses.replace(r, further_reasons=stride_of_512) for r in TABLE if r.name == "flash_mla")):
        assert plan_cache("flash_mla", "flash_mla", arch="sm_100").layout == layouts.BF16_512
        assert plan_cache("flash_mla", "flash_mla", arch="sm_100", page_size=512).layout == layouts.DSV4


def stride_of_512(problem):
    return [f"page stride is {c.page_stride}, need a multiple of 512" for c in problem.caches if c.page_stride % 512]


def test_more_heads_than_a_kernel_takes_are_refused():
    assert "decode flash_mla: 129 heads, need <= 128" in str(refusal("triton", "flash_mla", heads=129))


@pytest.mark.parametrize(
    ("names", "arguments", "error", "says"),
    [
        (
            ("cutlass", "triton"),
            {},
            ValueError,
            "prefill: got 'cutlass', need one of NAMES",
        ),
        (
            ("triton", "cutlass"),
            {},
            ValueError,
            "decode: got 'cutlass', need one of NAMES",
        ),
        (("triton", None), {}, ValueError, "decode: got None"),
        (("triton", "triton"), {"head_dim": 300}, ValueError, "head_dim: got 300, need 512 or 576"),
        (("triton", "triton"), {"head_dim": 128}, ValueError, "head_dim: got 128, need 512 or 576"),
        (
            ("triton", "triton"),
            {"stored": layouts.INDEXER_FP8},
            ValueError,
            "stored: head dim is 128 (indexer fp8), need 512 or 576",
        ),
        (
            ("triton", "triton"),
            {"head_dim": 512, "stored": BLOCKS},
            ValueError,
            "stored: head dim is 576 (DSv3.2), need 512",
        ),
        (("triton", "triton"), {"stored": "DSv4"}, TypeError, "stored: got str, need a CacheLayout"),
        (("triton", "triton"), {"page_size": 0}, ValueError, "page_size: got 0, need >= 1"),
        (("triton", "triton"), {"page_size": 64.0}, TypeError, "page_size: got float, need an int"),
        (("triton", "triton"), {"heads": 0}, ValueError, "heads: got 0, need >= 1"),
        (
            ("triton", "triton"),
            {"arch": "sm_90", "device": "cpu"},
            ValueError,
            "arch: got 'sm_90' beside device cpu, need one of the two",
        ),
    ],
)
def test_an_argument_that_says_nothing_is_named(names, arguments, error, says):
    with pytest.raises(error) as raised:
        plan_cache(*names, **arguments)
    assert says.replace("NAMES", ", ".join(registry.kernel_names())) in str(raised.value)
    assert not isinstance(raised.value, KernelNotSupported)


# What holds of every plan.


def rank(layout, op, converter):
    """The rule, said again: encoding, way, order."""
    encoding = {"bf16": 1, "e2m1": 2}.get(layout.value_encoding, 0)
    way = 2 if op == PREFILL else 1 if converter else 0
    position = [base.name for base in NAMED].index(layout.name.removesuffix(" fnuz"))
    return encoding, way, position, layout in FNUZ


def ways(prefill_reads, takes_rows, decode_reads, head_dim):
    """Every (layout, op, pages, converter) that a server could run, worst included."""
    for layout in decode_reads:
        if layout.head_dim != head_dim:
            continue
        if layout in prefill_reads:
            yield layout, DECODE, layout, None
        if layout in NATIVE_TO_BLOCKS and NATIVE_TO_BLOCKS[layout] in prefill_reads:
            yield layout, DECODE, NATIVE_TO_BLOCKS[layout], "dsv4x.requantize_fp8_to_block_scale"
        if takes_rows:
            yield layout, PREFILL, None, "dsv4x.dequantize_k_cache_paged"


@settings(max_examples=300, deadline=None)
@given(
    prefill_reads=st.sets(st.sampled_from(MAIN)),
    takes_rows=st.booleans(),
    decode_reads=st.sets(st.sampled_from(MAIN), min_size=1),
    head_dim=st.sampled_from([512, 576]),
    stored=st.none() | st.sampled_from(MAIN),
)
def test_a_plan_is_the_best_of_what_a_server_could_run(prefill_reads, takes_rows, decode_reads, head_dim, stored):
    head_dim = head_dim if stored is None else stored.head_dim
    possible = [way for way in ways(prefill_reads, takes_rows, decode_reads, head_dim) if stored in (None, way[0])]
    records = [kernel(DECODE, "flashinfer", *decode_reads)]
    records += [kernel(DECODE, "flash_mla", *prefill_reads)] * bool(prefill_reads)
    records += [kernel(PREFILL, "flash_mla")] * takes_rows
    with only(*records):
        if not possible:
            with pytest.raises(KernelNotSupported) as raised:
                plan_cache("flash_mla", "flashinfer", head_dim=head_dim, stored=stored, arch="sm_100")
            assert set(raised.value.reasons) == {"flash_mla", "flashinfer"}
            return
        plan = plan_cache("flash_mla", "flashinfer", head_dim=head_dim, stored=stored, arch="sm_100")
    assert what(plan) == min(possible, key=lambda way: rank(way[0], way[1], way[3]))
    others = {layout.name for layout in MAIN if layout.head_dim == head_dim and layout != plan.layout}
    assert set(plan.reasons) == (others if stored is None else set())
    assert all(reasons and all(reasons) for reasons in plan.reasons.values())


def rows_of(plan, cache, slots, k_scale):
    """The bf16 values prefill multiplies when a server does what the plan says, on the reference."""
    if plan.converter is None:
        return dsv4x.dequantize_k_cache_paged(cache, slots, k_scale=k_scale, kernel="reference")
    convert = getattr(dsv4x, plan.converter.removeprefix("dsv4x."))
    if plan.prefill_layout is None:
        return convert(cache, slots, k_scale=k_scale, kernel="reference")
    pages = convert(cache, k_scale, kernel="reference")
    assert pages.layout == plan.prefill_layout
    return dsv4x.dequantize_k_cache_paged(pages, slots, kernel="reference")


@pytest.mark.parametrize(
    ("prefill", "decode"), list(itertools.product(["triton", "flash_mla", "flashinfer"], repeat=2))
)
@pytest.mark.parametrize("stored", MAIN, ids=lambda layout: layout.name)
def test_doing_what_a_plan_says_gives_the_stored_values(prefill, decode, stored):
    """Every pair of kernels and every layout, NaN codes included."""
    reads = {name: [x for x in MAIN if x.name in registry.find(DECODE, name).layouts] for name in (prefill, decode)}
    takes_rows = registry.find(PREFILL, prefill) is not None
    if not any(way[0] == stored for way in ways(reads[prefill], takes_rows, reads[decode], stored.head_dim)):
        assert set(refusal(prefill, decode, stored=stored).reasons) == {prefill, decode}
        return
    plan = plan_cache(prefill, decode, stored=stored, arch="sm_100")
    k_scale = 0.31 if plan.needs_k_scale else 1.0
    cache, slots = PagedCache.zeros(3, plan.layout, 4), torch.arange(12)
    cache.data.copy_(torch.randint(0, 256, cache.data.shape, generator=torch.Generator().manual_seed(7)))
    got, want = rows_of(plan, cache, slots, k_scale), reference.dequantize_slots(cache, slots, k_scale=k_scale)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(9.0), want.nan_to_num(9.0))


def test_the_portable_kernels_are_planned_by_their_own_records():
    with only(*(record for record in REAL if record.name in ("triton", "reference"))):
        for head_dim, own in ((512, layouts.DSV4), (576, BLOCKS)):
            plan = plan_cache("reference", "reference", head_dim=head_dim, device="cpu")
            assert what(plan) == (own, DECODE, own, None)
        assert plan_cache("triton", "reference", arch="gfx942", stored=layouts.DSV4).prefill_op == DECODE
        assert "prefill flash_mla: not on backend" in str(refusal("flash_mla", "triton"))


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_flash_mla_is_planned_by_its_own_records(arch, monkeypatch):
    """As on a machine with the wheel; which layouts it reads, and two caches of which, its own reasons say."""
    module = types.SimpleNamespace(flash_mla_with_kvcache=lambda extra_k_cache, use_legacy: 0, has_legacy=lambda: True)
    library = types.SimpleNamespace(reason=None, path="/site/flash_mla", load=lambda: module)
    monkeypatch.setattr(flash_mla, "FLASH_MLA", library)
    blocks = what(plan_cache("flash_mla", "flashinfer", stored=NATIVE, arch="sm_100"))
    with only(*(record for record in REAL if record.name != "flash_mla")):
        flash_mla.register_kernels()
        assert what(plan_cache("flash_mla", "triton", arch=arch)) == (layouts.DSV4, DECODE, layouts.DSV4, None)
        assert what(plan_cache("triton", "flash_mla", arch=arch)) == (layouts.DSV4, DECODE, layouts.DSV4, None)
        plan = plan_cache("flash_mla", "triton", stored=layouts.BF16_512, arch=arch)
        assert plan.prefill_op == PREFILL
        plan = plan_cache("flash_mla", "triton", stored=NATIVE, arch=arch)
        assert what(plan) == blocks
