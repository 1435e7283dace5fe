"""AITER's and FlashInfer's parts of the indexer, on doubles that take what their sources take and promise no more."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

import dsv4x
from dsv4x import PagedCache, TopkMethod, layouts, platform, reference
from dsv4x.common.core.logits_calls import FlatLogitsCall, PagedLogitsCall, SelectionCall
from dsv4x.cuda import flashinfer_topk
from dsv4x.rocm import aiter_indexer

GARBAGE = 4321.0
MXFP8 = layouts.INDEXER_MXFP8
FNUZ = layouts.INDEXER_FP8.with_flavour("e4m3fnuz")


def twiddled(value):
    """AITER's and FlashInfer's order of float32: a NaN above everything, -0 below 0."""
    if math.isnan(value):
        return (math.inf, 1)
    return (value, 0 if math.copysign(1, value) < 0 and value == 0 else 1)


def columns_of(row, start, end, k):
    ranked = sorted(range(start, end), key=lambda c: (twiddled(row[c]), -c), reverse=True)
    return sorted(ranked[:k])


def top_k_per_row_prefill(logits, rowStarts, rowEnds, indices, values, numRows, stride0, stride1, k=2048, stable=False):
    """aiter/ops/topk.py at e4048607a5: columns, ascending, -1 behind them."""
    assert stable
    assert stride1 == 1
    assert (stride0, numRows) == (logits.stride(0), len(logits))
    assert indices.is_contiguous()
    for value in (rowStarts, rowEnds, indices):
        assert value.dtype == torch.int32
    for row in range(numRows):
        start, end = int(rowStarts[row]), int(rowEnds[row])
        assert 0 <= start <= end <= logits.shape[1]
        found = columns_of(logits[row].tolist(), start, end, k)
        indices[row] = torch.tensor(found + [-1] * (k - len(found)))


def fp8_mqa_logits(Q, KV, kv_scales, weights, cu_starts, cu_ends, clean_logits=True):
    """aiter/ops/triton/attention/fp8_mqa_logits.py at e4048607a5: a column an entry, in rows of whole 256s."""
    assert not clean_logits
    for value in (Q, KV, kv_scales, weights, cu_starts, cu_ends):
        assert value.is_contiguous()
    values = reference.mqa_logits(Q, None, KV, kv_scales, weights, cu_starts, cu_ends)
    wide = torch.full((len(Q), -(-len(KV) // 256) * 256), GARBAGE)
    wide[:, : len(KV)] = values.masked_fill(values == -torch.inf, GARBAGE)
    return wide[:, : len(KV)]


def deepgemm_fp8_paged_mqa_logits(
    q_fp8, kv_cache, weights, out_logits, context_lens, kv_indices, max_model_len, Preshuffle=False, KVBlockSize=1,
    ChunkK=256, TotalCuCount=None, WavePerEU=2, VarCtxSchedule=None,
):  # fmt: skip
    """aiter/ops/triton/attention/pa_mqa_logits.py at e4048607a5: pages of one entry unless they are shuffled."""
    batch, next_n, _, _ = q_fp8.shape
    assert KVBlockSize == 1 == kv_cache.shape[1]
    assert not Preshuffle
    # Row j's bound is context_len - next_n + j, single entries apart, so more than one row would be cut short.
    assert next_n == 1
    assert kv_indices.is_contiguous()
    assert ((kv_indices >= 0) & (kv_indices < len(kv_cache))).all()
    assert context_lens.shape == (batch,)
    assert context_lens.is_contiguous()
    assert (context_lens <= kv_indices.shape[1]).all()
    layout = layouts.INDEXER_FP8 if q_fp8.dtype == torch.float8_e4m3fn else FNUZ
    cache = PagedCache(kv_cache, layout, 1)
    values = reference.paged_mqa_logits(q_fp8, None, cache, weights, context_lens[:, None], kv_indices, max_model_len)
    for row in range(batch):
        out_logits[row, : int(context_lens[row])] = values[row, : int(context_lens[row])]


@pytest.fixture
def aiter(monkeypatch):
    functions = {
        "paged_mqa_logits": deepgemm_fp8_paged_mqa_logits,
        "mqa_logits": fp8_mqa_logits,
        "topk_transform": top_k_per_row_prefill,
    }
    monkeypatch.setattr(aiter_indexer, "entry_point", functions.__getitem__)
    return functions


LIBRARY = SimpleNamespace(path="/site/aiter", reason=None)


def record(op):
    found = []
    original, aiter_indexer.register = aiter_indexer.register, found.append
    try:
        aiter_indexer.register_kernels(LIBRARY)
    finally:
        aiter_indexer.register = original
    return next(kernel for kernel in found if kernel.op == op)


def assert_same(got, want):
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("given_out", [False, True])
@pytest.mark.parametrize("layout", [layouts.INDEXER_FP8, FNUZ], ids=lambda layout: layout.name)
@pytest.mark.parametrize("next_n", [1, 3])
def test_paged_logits_keep_the_contract(aiter, rng, layout, next_n, given_out):
    cache = PagedCache.zeros(60, layout, 1)
    k = torch.randn(60, 128, generator=rng).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(60), kernel="reference")
    dtype = torch.float8_e4m3fn if layout is layouts.INDEXER_FP8 else torch.float8_e4m3fnuz
    q = torch.randn(4, next_n, 32, 128, generator=rng).to(dtype)
    weights = torch.randn(4 * next_n, 32, generator=rng)
    table = torch.randint(0, 60, (4, 45), generator=rng).int()[:, :40]
    table[0, 2], table[1, 1] = 60, -(2**31)
    lens = torch.randint(0, 40, (4, next_n), generator=rng)
    lens[2], lens[3, 0] = 0, 2**31 - 1
    out = torch.full((4 * next_n, 50), torch.nan) if given_out else None
    got = aiter_indexer.paged_mqa_logits(PagedLogitsCall(q, None, cache, weights, lens, table, 50, None, out, True))
    assert_same(got, reference.paged_mqa_logits(q, None, cache, weights, lens, table, 50))


@pytest.mark.interpreter
@pytest.mark.parametrize("given_out", [False, True])
def test_flat_logits_keep_the_contract(aiter, rng, given_out):
    q = torch.randn(6, 64, 128, generator=rng).to(torch.float8_e4m3fn)
    k, k_scale = torch.randn(70, 128, generator=rng).to(torch.float8_e4m3fn), torch.rand(70, generator=rng)
    weights = torch.randn(6, 64, generator=rng)
    ks = torch.tensor([0, -4, 30, 70, 2**31 - 1, 5], dtype=torch.int32)
    ke = torch.tensor([70, 2**31 - 1, 10, 70, 3, 6], dtype=torch.int32)
    out = torch.full((6, 70), torch.nan) if given_out else None
    got = aiter_indexer.mqa_logits(FlatLogitsCall(q, None, k, k_scale, weights, ks, ke, None, out, True))
    assert_same(got, reference.mqa_logits(q, None, k, k_scale, weights, ks, ke))


def top_k_ragged_transform(
    input, offsets, lengths, k, deterministic=False, tie_break=0, dsa_graph_safe=False, row_starts=None
):
    """flashinfer/topk.py of 0.6.15: local indices in no order, ties to the smallest index where told so."""
    assert deterministic
    assert dsa_graph_safe
    assert tie_break == 1
    out = torch.full((len(input), k), -1, dtype=torch.int32)
    for row in range(len(input)):
        start, length = int(row_starts[row]), int(lengths[row])
        assert 0 <= start <= start + length <= input.shape[1]
        found = [c - start + int(offsets[row]) for c in columns_of(input[row].tolist(), start, start + length, k)]
        out[row, : len(found)] = torch.tensor(found[::-1], dtype=torch.int32)
    return out


@pytest.fixture(params=["aiter", "flashinfer"])
def select(request, monkeypatch, aiter):
    """A vendor's selection, on its double."""
    if request.param == "aiter":
        return aiter_indexer.topk_transform
    library = SimpleNamespace(load=lambda: SimpleNamespace(top_k_ragged_transform=top_k_ragged_transform))
    monkeypatch.setattr(flashinfer_topk, "FLASHINFER", library)
    return flashinfer_topk.topk_transform


@pytest.mark.parametrize("method", list(TopkMethod))
@pytest.mark.parametrize("starts", [False, True])
def test_selection_keeps_the_contract(select, rng, method, starts):
    logits = (2 * torch.randn(6, 90, generator=rng)).round()
    logits[0, ::4], logits[1, ::3], logits[2] = torch.nan, -0.0, -torch.inf
    lens = torch.tensor([90, 80, 50, 3, -7, 2**31 - 1])
    first = torch.tensor([0, 20, 89, -5, 4, 60]) if starts else None
    space = {}
    if method is TopkMethod.RAGGED:
        space = {"bases": torch.tensor([0, 100, -1, 7, 7, 2**31 - 20])}
    if method is TopkMethod.PAGED:
        table = torch.randint(-1, 9, (3, 10), generator=rng).int()
        space = {"block_table": table, "page_size": 8, "pages": 8, "next_n": 2, "requests": None}
    got, want = (torch.empty(6, 30, dtype=torch.int32) for _ in range(2))
    select(SelectionCall(logits, lens, 30, method, first, space, got))
    reference.topk_transform(logits, lens, 30, method, first, space, want)
    assert torch.equal(got, want)


def flydsl_fp8_mqa_logits(
    Q, KV, kv_scales, weights, cu_starts, cu_ends, clean_logits=True, stream=None, variant=None
):  # fmt: skip
    """aiter/ops/flydsl/kernels/mqa_logits/fp8_mqa_logits.py at e4048607a5."""
    assert stream is variant is None
    assert Q.dtype == KV.dtype == torch.float8_e4m3fnuz, "an OCP NaN would be read as 480"
    return fp8_mqa_logits(Q, KV, kv_scales, weights, cu_starts, cu_ends, clean_logits)


@pytest.mark.interpreter
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("installed", [True, False])
def test_flat_logits_of_gfx942_are_flydsls_where_it_is_installed(aiter, rng, arch, installed, monkeypatch):
    called = []

    def counted(*args, **kwargs):
        called.append(arch)
        return flydsl_fp8_mqa_logits(*args, **kwargs)

    limits = dataclasses.replace(platform.limits("cpu"), arch=arch)
    monkeypatch.setattr(type(platform), "limits", lambda self, device=None: limits)
    monkeypatch.setattr(aiter_indexer, "flydsl_logits", lambda: counted if installed else None)
    q = torch.randn(3, 64, 128, generator=rng).to(torch.float8_e4m3fnuz)
    k, k_scale = torch.randn(70, 128, generator=rng).to(torch.float8_e4m3fnuz), torch.rand(70, generator=rng)
    weights, ks = torch.randn(3, 64, generator=rng), torch.tensor([0, -4, 30], dtype=torch.int32)
    ke = torch.tensor([70, 2**31 - 1, 10], dtype=torch.int32)
    got = aiter_indexer.mqa_logits(FlatLogitsCall(q, None, k, k_scale, weights, ks, ke, None, None, True))
    assert_same(got, reference.mqa_logits(q, None, k, k_scale, weights, ks, ke))
    assert called == (["gfx942"] if installed and arch == "gfx942" else [])


@pytest.mark.parametrize(
    ("module", "there"),
    [
        (SimpleNamespace(flydsl_fp8_mqa_logits=flydsl_fp8_mqa_logits), True),
        (SimpleNamespace(), False),
        (SimpleNamespace(flydsl_fp8_mqa_logits=lambda Q, KV: None), False),
        (None, False),
    ],
)
def test_flydsl_is_taken_by_its_signature(module, there, monkeypatch):
    def imported(name):
        assert name == "aiter.ops.flydsl"
        if module is None:
            raise ImportError("Unsupported `flydsl` version: expected >=`0.2.4`, got `0.1.0`.")
        return module

    monkeypatch.setattr(aiter_indexer.importlib, "import_module", imported)
    assert (aiter_indexer.flydsl_logits.__wrapped__() is not None) == there


def problem(op, arch="gfx942", **fields):
    return dsv4x.Problem(op, "cuda", arch, **fields)


def paged_problem(arch="gfx942", layout=FNUZ, page_size=1, pages=10, q="e4m3fnuz"):
    caches = (layouts.CacheSpec(layout.name, page_size, pages, page_size * 144),)
    return problem("paged_mqa_logits", arch, heads=64, caches=caches, q_encoding=q)


def test_every_limit_gives_its_reason(aiter):
    paged = record("paged_mqa_logits").not_supported_reasons
    assert paged(paged_problem()) == []
    assert paged(paged_problem(page_size=64)) == ["page_size is 64, need 1: it reads larger pages shuffled only"]
    assert "its offsets are 32-bit" in paged(paged_problem(pages=2**24))[0]
    assert paged(paged_problem("gfx950")) == ["q e4m3fnuz and K e4m3fnuz, need e4m3fn for both on gfx950"]
    assert paged(paged_problem(layout=layouts.INDEXER_FP4))[0].startswith("q e4m3fnuz and K e2m1")
    ocp = {layout: paged(paged_problem("gfx950", layout, q="e4m3fn")) for layout in (layouts.INDEXER_FP8, MXFP8)}
    assert list(ocp.values()) == [[], ["q e4m3fn and K mxfp8, need e4m3fn for both on gfx950"]]
    assert "arch is gfx1250" in paged(paged_problem("gfx1250"))[0]
    flat = record("mqa_logits").not_supported_reasons
    fnuz = {"heads": 64, "q_encoding": "e4m3fnuz", "k_encoding": "e4m3fnuz"}
    assert flat(problem("mqa_logits", **fnuz)) == []
    assert "it writes a column an entry" in flat(problem("mqa_logits", **fnuz, relative=True))[0]
    topk = record("topk_transform").not_supported_reasons
    assert topk(problem("topk_transform", tokens=4096, width=32768)) == []
    assert "offsets are 32-bit" in topk(problem("topk_transform", tokens=65536, width=32768))[0]


@pytest.mark.parametrize("op", ["paged_mqa_logits", "mqa_logits", "topk_transform"])
def test_another_signature_is_refused_with_what_it_lacks(aiter, op):
    aiter[op] = lambda logits, k: None
    fnuz = {} if op == "topk_transform" else {"q_encoding": "e4m3fnuz", "k_encoding": "e4m3fnuz"}
    asked = paged_problem() if op == "paged_mqa_logits" else problem(op, **fnuz)
    reasons = record(op).not_supported_reasons(asked)
    assert "aiter at /site/aiter has no " in reasons[0]


def test_an_import_that_fails_is_the_reason(monkeypatch):
    def broken(op):
        raise RuntimeError("no gfx942 here")

    monkeypatch.setattr(aiter_indexer, "entry_point", broken)
    reasons = record("topk_transform").not_supported_reasons(problem("topk_transform"))
    assert reasons == ["import of top_k_per_row_prefill from aiter.ops.topk failed: RuntimeError: no gfx942 here"]


def test_a_flashinfer_without_the_argument_says_so(monkeypatch):
    def older(input, offsets, lengths, k):
        return None

    library = SimpleNamespace(path="/site/fi", reason=None, load=lambda: SimpleNamespace(top_k_ragged_transform=older))
    monkeypatch.setattr(flashinfer_topk, "FLASHINFER", library)
    reasons = flashinfer_topk._reasons(problem("topk_transform", "sm_100"))
    assert reasons == [
        "top_k_ragged_transform of flashinfer at /site/fi has no deterministic, tie_break, dsa_graph_safe, row_starts"
    ]
