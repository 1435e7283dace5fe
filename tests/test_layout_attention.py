"""Attention over every layout a cache may have, and DeepSeek-V3.2's shapes: q of 576, of which V is the first 512."""

import dataclasses

import pytest
import slow
import torch
from tolerances import check_close, check_decode, check_prefill

import dsv4x
from dsv4x import MLAKVCacheLayout, PagedCache, Problem, layouts, reference
from dsv4x.common.core.layouts import (
    BF16_512,
    BF16_576,
    DSV4,
    DSV32,
    DSV41_FP4,
    DSV41_FP8,
    DSV41_FP8_SOA,
    TRTLLM_NATIVE,
    UNIFORM_FP8,
)

V32_SCALE = 192**-0.5
K_SCALE = {TRTLLM_NATIVE.name: 0.02, UNIFORM_FP8.name: 0.015625}
FNUZ = [x.with_flavour("e4m3fnuz") for x in (DSV4, DSV32, TRTLLM_NATIVE)]
MAIN = [m.value for m in MLAKVCacheLayout if not m.value.name.startswith("indexer")] + FNUZ
PAIRS = [
    (DSV4.with_flavour("e4m3fnuz"), DSV4),
    (DSV41_FP8, DSV41_FP4),
    (UNIFORM_FP8, UNIFORM_FP8),
    (BF16_512, DSV4),
    (TRTLLM_NATIVE, DSV32),
]
BY_FLASH_MLA = [DSV4, DSV32, BF16_512, BF16_576]

_interpreter, _gpu = pytest.mark.interpreter, pytest.mark.gpu
WHERE = [
    pytest.param("reference", "cpu", id="reference-cpu"),
    pytest.param("triton", "cpu", id="triton-cpu", marks=_interpreter),
    pytest.param("reference", "cuda", id="reference-cuda", marks=_gpu),
    pytest.param("triton", "cuda", id="triton-cuda", marks=_gpu),
]


@pytest.fixture
def case(make_cache, index_rows, rng):
    """Arguments of sparse_mla_decode over the given layouts, on the CPU."""

    def make(layout, extra_layout=None, tokens=3, heads=5, width=40, page_size=61, spread=2):
        made = {
            "q": 3 * torch.randn(tokens, heads, layout.head_dim, generator=rng).bfloat16(),
            "attn_sink": torch.randn(heads, generator=rng),
            "softmax_scale": V32_SCALE if layout.head_dim == 576 else 512**-0.5,
        }
        for scope, its_layout, size in (("swa", layout, page_size), ("extra", extra_layout, 2)):
            if its_layout is not None:
                k_scale = K_SCALE.get(its_layout.name.removesuffix(" fnuz"), 1.0)
                cache, slots = make_cache(max(2, 64 // size), size, 30, its_layout, spread=spread, k_scale=k_scale)
                made[f"{scope}_cache"], made[f"{scope}_indices"] = cache, index_rows(slots, tokens, width)
                made[f"{scope}_lens"] = torch.randint(0, width + 1, (tokens,), dtype=torch.int32, generator=rng)
                made[f"{scope}_k_scale"] = k_scale
        return made

    return make


@pytest.fixture
def run(on_device):
    def check(made, kernel, device, **keywords):
        out, lse = dsv4x.sparse_mla_decode(**on_device(made, device), kernel=kernel, **keywords)
        assert out.shape == (*made["q"].shape[:2], 512)
        check_decode(out, lse, *reference.sparse_mla_decode(**made, dtype=torch.float64))

    return check


@pytest.mark.parametrize(("kernel", "device"), WHERE)
@pytest.mark.parametrize("layout", MAIN, ids=lambda layout: layout.name)
def test_every_layout_is_attended_to_in_place(layout, kernel, device, case, run):
    run(case(layout), kernel, device)
    run(case(layout, heads=20, page_size=1), kernel, device)


@pytest.mark.parametrize(("kernel", "device"), WHERE)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}+{pair[1].name}")
def test_each_scope_has_its_own_layout(pair, kernel, device, case, run):
    run(case(*pair), kernel, device)


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [True, False])
@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("layout", BY_FLASH_MLA, ids=lambda layout: layout.name)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 128, 64), (7, 5, 40), (300, 64, 2048)])
def test_flash_mla_reads_it_in_place(tokens, heads, width, layout, trusted, lens, case, run):
    made = case(layout, tokens=tokens, heads=heads, width=width, page_size=64, spread=1 if layout.nope_dim == 0 else 2)
    if not lens:
        made["swa_lens"] = None
    run(made, "flash_mla", "cuda", trusted_indices=trusted)


@pytest.mark.parametrize("layout", [DSV32, TRTLLM_NATIVE, BF16_576], ids=lambda layout: layout.name)
def test_v32_reference_is_the_definition(layout, case):
    made = case(layout)
    rows = []
    for t in range(3):
        span = made["swa_indices"][t, : made["swa_lens"][t]]
        slots = span[span >= 0].long()
        entries = reference.dequantize_slots(made["swa_cache"], slots, torch.float64, made["swa_k_scale"])
        rows.append(entries.numpy())
    want = slow.attend(made["q"], rows, made["attn_sink"], V32_SCALE)
    got = reference.sparse_mla_decode(**made, dtype=torch.float64)
    for name, a, b in zip(("out", "lse"), got, want):
        check_close(name, a, b, absolute=1e-12, relative=1e-12)


@pytest.mark.parametrize(
    ("kernel", "device"), [*WHERE, pytest.param("flash_mla", "cuda", id="flash_mla-cuda", marks=_gpu)]
)
@pytest.mark.parametrize("lens", [True, False])
def test_v32_prefill_over_gathered_rows(lens, kernel, device, index_rows, rng, on_device):
    kv = torch.full((90, 576), float("nan"), dtype=torch.bfloat16)
    live = torch.randperm(90, generator=rng)[:60]
    kv[live] = (torch.randn(60, 576, generator=rng) / 10).bfloat16()
    made = {
        "q": 3 * torch.randn(9, 20, 576, generator=rng).bfloat16(),
        "kv": kv,
        "indices": index_rows(live, 9, 200),
        "lens": torch.randint(0, 201, (9,), dtype=torch.int32, generator=rng) if lens else None,
        "attn_sink": torch.randn(20, generator=rng),
        "softmax_scale": V32_SCALE,
    }
    out, lse = dsv4x.sparse_mla_prefill(**on_device(made, device), kernel=kernel)
    check_prefill(out, lse, *reference.sparse_mla_prefill(**made, dtype=torch.float64))


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_the_default_scale_is_v4s_alone(op, case):
    made = case(DSV32)
    scopes = {"decode": made["swa_cache"], "prefill": torch.zeros(3, 576).bfloat16()}
    run = {"decode": dsv4x.sparse_mla_decode, "prefill": dsv4x.sparse_mla_prefill}[op]
    with pytest.raises(ValueError, match="softmax_scale: got None, need the model's scale for q of 576"):
        run(made["q"], scopes[op], made["swa_indices"], None)


def test_a_cache_of_another_width_is_refused(case):
    made = case(DSV4)
    made["q"] = torch.zeros(3, 5, 576).bfloat16()
    with pytest.raises(ValueError, match=r"swa_cache: entries of 512 values \(DSv4\), need 576 as q has"):
        dsv4x.sparse_mla_decode(**{**made, "softmax_scale": 0.1})


@pytest.mark.parametrize("scope", ["swa", "extra"])
def test_a_tensor_scale_is_for_layouts_without_scales(scope, case):
    made = case(DSV4, DSV4)
    with pytest.raises(ValueError, match=rf"{scope}_k_scale: got 2.0, need 1: DSv4 has no scale"):
        dsv4x.sparse_mla_decode(**{**made, f"{scope}_k_scale": 2.0})


@pytest.mark.parametrize(
    ("caches", "says"),
    [
        ([TRTLLM_NATIVE], "cache layout is trtllm-native, need"),
        ([DSV32, DSV32], "two caches of DSv3.2 and DSv3.2, need DSv4 for both, or one cache"),
        ([BF16_512, DSV4], "two caches of bf16 512 and DSv4, need DSv4 for both, or one cache"),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(y.name for y in x),
)
def test_flash_mla_says_which_layouts_it_lacks(caches, says):
    problem = Problem("sparse_mla_decode", arch="sm_90", tokens=2, heads=64, width=64)
    specs = tuple(PagedCache.zeros(2, layout, 64).spec for layout in caches)
    assert any(says in reason for reason in flash_mla_record().not_supported_reasons(with_caches(problem, specs)))


def test_flash_mla_reads_bf16_pages_that_are_back_to_back():
    packed = PagedCache.zeros(2, BF16_576, 64).spec
    problem = Problem("sparse_mla_decode", arch="sm_90", tokens=2, heads=64, width=64)
    gaps = packed._replace(page_stride=packed.page_stride + 16)
    says = f"page stride is {packed.page_stride + 16}, need {packed.page_stride}: it reads bf16 pages as rows"
    assert says in flash_mla_record().not_supported_reasons(with_caches(problem, (gaps,)))
    assert says not in flash_mla_record().not_supported_reasons(with_caches(problem, (packed,)))


def flash_mla_record():
    """The record as registered, wherever the tests run."""
    from dsv4x.common.dispatch import registry
    from dsv4x.cuda import flash_mla

    with registry.replaced(empty=True):
        flash_mla.register_kernels()
        return registry.find("sparse_mla_decode", "flash_mla")


def with_caches(problem, specs):
    return dataclasses.replace(problem, caches=specs, head_dim=layouts.by_name(specs[0].layout).head_dim)


# One V3.2 request in a mixed server: stored as trtllm-native, prefilled by a kernel that reads DSv3.2 pages, decoded
# from the native pages.

MIXES = [
    pytest.param("reference", "reference", "cpu", id="reference"),
    pytest.param("triton", "triton", "cpu", id="triton-cpu", marks=_interpreter),
    pytest.param("flash_mla", "triton", "cuda", id="flash_mla+triton", marks=_gpu),
    pytest.param("flash_mla", "reference", "cuda", id="flash_mla+reference", marks=_gpu),
]


@pytest.mark.parametrize("how", ["converted pages", "gathered rows"])
@pytest.mark.parametrize(("prefill_kernel", "decode_kernel", "device"), MIXES)
def test_a_request_stored_native_is_prefilled_through_the_converter(prefill_kernel, decode_kernel, device, how, rng):
    big = device == "cuda"
    heads, prompt, steps, topk, page_size = (128, 700, 5, 256, 64) if big else (4, 19, 3, 8, 8)
    total = prompt + steps
    # FlashMLA rounds a block scale to bf16, so the server's tensor scale is one that bf16 holds.
    k_scale = float(torch.tensor(0.00371).bfloat16())
    k = (torch.randn(total, 576, generator=rng) / 10).bfloat16().to(device)
    q = torch.randn(total, heads, 576, generator=rng).bfloat16().to(device)
    chosen = torch.full((total, topk), -1, dtype=torch.int32)
    for t in range(total):
        picked = torch.randperm(t + 1, generator=rng)[:topk]
        chosen[t, : len(picked)] = picked.int()
    pages = -(-total // page_size)
    table = torch.randperm(pages + 2, generator=rng)[:pages]
    token = torch.arange(total)
    slot_of = (table[token // page_size] * page_size + token % page_size).to(device)
    slots = torch.where(chosen.to(device) >= 0, slot_of[chosen.to(device).clamp_min(0)], -1).int()

    native = PagedCache.zeros(pages + 2, TRTLLM_NATIVE, page_size, device)
    out = torch.empty(total, heads, 512, dtype=torch.bfloat16, device=device)
    lse = torch.empty(total, heads, device=device)
    for start, end in ((0, prompt // 2), (prompt // 2, prompt)):
        rows = slice(start, end)
        dsv4x.quantize_and_insert_k_cache(k[rows], native, slot_of[rows], k_scale=k_scale)
        if how == "converted pages":
            seen = table[: -(-end // page_size)].to(device)
            readable = dsv4x.requantize_fp8_to_block_scale(native, k_scale, pages=seen)
            result = dsv4x.sparse_mla_decode(
                q[rows], readable, slots[rows], None, softmax_scale=V32_SCALE, kernel=prefill_kernel
            )
        else:
            workspace = dsv4x.dequantize_k_cache_paged(native, slot_of[:end], k_scale=k_scale)
            result = dsv4x.sparse_mla_prefill(
                q[rows], workspace, chosen[rows].to(device), None, softmax_scale=V32_SCALE, kernel=prefill_kernel
            )
        out[rows], lse[rows] = result
    for t in range(prompt, total):
        rows = slice(t, t + 1)
        dsv4x.quantize_and_insert_k_cache(k[rows], native, slot_of[rows], k_scale=k_scale)
        out[rows], lse[rows] = dsv4x.sparse_mla_decode(
            q[rows], native, slots[rows], None, softmax_scale=V32_SCALE, kernel=decode_kernel, swa_k_scale=k_scale
        )

    stored = reference.dequantize_slots(native, slot_of, torch.float64, k_scale).cpu()
    assert float((stored - k.cpu().double()).norm() / k.cpu().double().norm()) < 0.04, "e4m3 has 3 fraction bits"
    rows = stored.bfloat16().to(device)
    expected = reference.sparse_mla_prefill(q, rows, chosen.to(device), None, None, V32_SCALE, torch.float64)
    check_decode(out, lse, *expected)


@_interpreter
@pytest.mark.parametrize("heads", [5, 72])
@pytest.mark.parametrize(
    "pair",
    [*PAIRS, (DSV41_FP8_SOA, BF16_512), (BF16_576, TRTLLM_NATIVE)],
    ids=lambda pair: f"{pair[0].name}+{pair[1].name}",
)
def test_what_amds_gpus_run_is_exact(pair, heads, on_gfx, case, run):
    """Tokens that are no multiple of the dies, several blocks of heads, pages of any size, rows split and whole."""
    run(case(*pair, tokens=11, heads=heads), "triton", "cpu", split_k=3 if heads == 5 else None)


@_interpreter
@pytest.mark.parametrize("heads", [5, 100])
@pytest.mark.parametrize("head_dim", [512, 576])
def test_prefill_on_amds_gpus_is_exact(head_dim, heads, on_gfx, rng):
    kv = (torch.randn(40, head_dim, generator=rng) / 10).bfloat16()
    q = torch.randn(11, heads, head_dim, generator=rng).bfloat16()
    indices = torch.randint(-1, 40, (11, 70), dtype=torch.int32, generator=rng)
    lens = torch.randint(0, 71, (11,), dtype=torch.int32, generator=rng)
    out, lse = dsv4x.sparse_mla_prefill(q, kv, indices, lens, softmax_scale=V32_SCALE, kernel="triton")
    want = reference.sparse_mla_prefill(q.double(), kv.double(), indices, lens, softmax_scale=V32_SCALE)
    check_prefill(out, lse, *want)


def test_a_layout_of_ones_own_is_weighed_like_any_other():
    mine = dataclasses.replace(DSV4, name="mine", scale_tile=32, scale_pad=2, arrangement="aos")
    cache = PagedCache.zeros(3, mine, 16)
    problem = Problem(
        "sparse_mla_decode", "cuda", "sm_120", tokens=4, heads=8, width=64, caches=(cache.spec,), interpreter=False
    )
    explained = dsv4x.explain(problem)
    assert explained.predicted_us["triton"] > 0
    assert dsv4x.scratch_bytes(problem) >= 0
    with pytest.raises(ValueError, match="layout: got 'nobody made it'"):
        layouts.described("nobody made it")
