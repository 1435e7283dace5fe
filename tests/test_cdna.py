"""The Gluon kernels of gfx942 and gfx950, their bodies run on numpy against the oracle; and their records. No GPU."""

import dataclasses

import gluon_on_numpy
import numpy as np
import pytest
import torch
from tolerances import check_decode, check_prefill

import dsv4x
from dsv4x import PagedCache, layouts, platform, reference
from dsv4x.common.core.calls import DecodeCall, Local, PrefillCall, Scope
from dsv4x.common.core.layouts import CacheSpec
from dsv4x.common.dispatch import registry
from dsv4x.common.dispatch.problem import Problem
from dsv4x.common.kernels import decode as reducing
from dsv4x.common.kernels.scratch import partial_bytes
from dsv4x.rocm import gluon
from dsv4x.rocm.cdna import codes, decode, prefill, shapes

FNUZ = layouts.DSV4.with_flavour("e4m3fnuz")


@pytest.fixture(params=shapes.ARCHS)
def arch(request, monkeypatch):
    """An AMD GPU of four compute units, whose kernels run on numpy."""
    limits = dataclasses.replace(platform.limits("cpu"), arch=request.param, multiprocessors=4)
    monkeypatch.setattr(type(platform), "limits", lambda self, device=None: limits)
    monkeypatch.setattr(decode, "_launch", gluon_on_numpy.Launcher(decode.decode_cdna_kernel))
    monkeypatch.setattr(prefill, "_launch", gluon_on_numpy.Launcher(prefill.prefill_cdna_kernel))
    monkeypatch.setattr(reducing, "_launch_reduce", gluon_on_numpy.Launcher(reducing.reduce_kernel))
    return request.param


def call_of(swa, extra, heads, tokens, local=None, **fields):
    sink = torch.randn(heads)
    sink[0], sink[-1] = torch.inf, -torch.inf
    q = torch.randn(tokens, heads, 512).clamp(-1, 1).bfloat16()
    return DecodeCall(q, swa, extra, sink, 0.06, None, heads, local=local, **fields)


def expected(call):
    """The oracle's, of slots."""
    extra = call.extra
    if call.local is not None:
        request, visible, table, pages = call.local
        size, local = extra.cache.page_size, extra.indices.long()
        known = (request >= 0) & (request < table.shape[0])
        column = local // size
        held = known[:, None] & (local >= 0) & (local < visible[:, None]) & (column < table.shape[1])
        page = table[request.clamp(0, len(table) - 1)[:, None], column.clamp(0, table.shape[1] - 1)].long()
        held &= (page >= 0) & (page < pages)
        extra = extra._replace(indices=torch.where(held, page * size + local % size, -1))
    scopes = [*call.swa[:3], *((None,) * 3 if extra is None else extra[:3])]
    return reference.sparse_mla_decode(
        call.q[:, : call.heads], *scopes, call.attn_sink, call.softmax_scale, dtype=torch.float64
    )


def rows(live, tokens, width, capacity, dtype=torch.int32):
    """Index rows with holes and wrong indices, spans of every awkward length, garbage past them."""
    wrong = torch.tensor([-1, -2, -(2**31), 2**31 - 1, capacity])
    indices = live[torch.randint(len(live), (tokens, width))]
    indices = torch.where(torch.rand(tokens, width) < 0.2, wrong[torch.randint(5, (tokens, width))], indices)
    lens = torch.tensor(([width, 0, width + 9, 33, -4, 31] * tokens)[:tokens], dtype=dtype)
    return indices.to(dtype), lens


@pytest.mark.parametrize(
    ("heads", "pair", "width", "extra_width", "split_k"),
    [
        (64, (layouts.DSV4, layouts.DSV4), 40, 100, 1),
        (64, (layouts.DSV4, FNUZ), 128, 70, 3),
        (8, (FNUZ, FNUZ), 70, 130, 2),
        (16, (FNUZ, layouts.DSV4), 1, 65, 1),
        (65, (layouts.DSV4, layouts.DSV4), 33, 64, 4),
        (128, (layouts.DSV4, None), 100, 0, 1),
        (3, (layouts.DSV4, None), 260, 0, 5),
    ],
)
def test_decode_is_the_oracle(arch, make_cache, heads, pair, width, extra_width, split_k):
    torch.manual_seed(heads)
    tokens, scopes = 4, []
    for layout, columns, page_size, dtype in zip(pair, (width, extra_width), (61, 64), (torch.int64, torch.int32)):
        if layout is not None:
            cache, live = make_cache(5, page_size, 150, layout, spread=2)
            scopes.append(Scope(cache, *rows(live, tokens, columns, cache.capacity, dtype)))
    call = call_of(scopes[0], scopes[1] if extra_width else None, heads, tokens, split_k=split_k)
    check_decode(*decode.sparse_mla_decode(call), *expected(call))


def test_local_entries_padded_heads_and_strides(arch, make_cache):
    torch.manual_seed(1)
    swa, live = make_cache(3, 64, 100)
    extra, _ = make_cache(6, 64, 384)
    indices = torch.randint(-3, 290, (4, 96), dtype=torch.int32)
    table = torch.tensor([[3, 6, 5, 1], [2, -1, 9, 4]], dtype=torch.int32)
    local = Local(torch.tensor([0, 1, 7, 1]), torch.tensor([260, 200, 90, 30], dtype=torch.int32), table, 6)
    local = local._replace(request=local.request.int())
    call = call_of(Scope(swa, *rows(live, 4, 64, swa.capacity)), Scope(extra, indices, None), 20, 4, local)
    q = torch.full((4, 24, 520), torch.nan, dtype=torch.bfloat16)
    q[:, :20, 1:513] = call.q
    out = torch.full((30, 4, 512), torch.nan, dtype=torch.bfloat16).transpose(0, 1)
    call = call._replace(q=q[:, :, 1:513], out=out)
    got, lse = decode.sparse_mla_decode(call)
    assert got is out
    assert out[:, 20:].isnan().all()
    check_decode(out[:, :20], lse, *expected(call))


def test_caches_past_2_gib(arch):
    """Of zeros no one touches: pages stand 1 GiB apart."""
    data = torch.zeros(2 * 2**30 + layouts.DSV4.page_stride(64), dtype=torch.uint8)
    cache = PagedCache(data.as_strided((3, layouts.DSV4.page_stride(64)), (2**30, 1)), layouts.DSV4, 64)
    slots = torch.tensor([5, 70, 190])
    dsv4x.quantize_and_insert_k_cache(torch.randn(3, 512).bfloat16() / 10, cache, slots, kernel="reference")
    call = call_of(Scope(cache, torch.tensor([[190, -1, 5], [70, 192, 190]]), None), None, 16, 2)
    check_decode(*decode.sparse_mla_decode(call), *expected(call))


def test_nan_behind_no_index_stays_out_and_nan_in_an_entry_does_not(arch, make_cache):
    cache, live = make_cache(2, 64, 8)
    bad = next(slot for slot in range(128) if slot not in live.tolist())
    indices = torch.stack([live[:4], torch.tensor([*live[:3].tolist(), bad])]).int()
    # A code, the last code, and a RoPE value.
    for at, nan in ((3, [0x7F]), (447, [0xFF]), (450, [0xFF, 0x7F])):
        entry = cache.page_bytes[bad // 64, bad % 64 * 576 :][:576]
        entry.zero_()
        entry[at : at + len(nan)] = torch.tensor(nan, dtype=torch.uint8)
        out, lse = decode.sparse_mla_decode(call_of(Scope(cache, indices, None), None, 8, 2))
        assert not out[0].isnan().any()
        assert out[1].isnan().all()
        assert lse[1].isnan().all()


@pytest.mark.parametrize("gfx950", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("layout", [layouts.DSV4, FNUZ], ids=["ocp", "fnuz"])
def test_every_code_and_scale_is_exact(layout, gfx950, upcast, monkeypatch):
    """Triton 3.6 has no conversion that scales."""
    monkeypatch.setattr(codes, "_SCALES_AS_IT_CONVERTS", upcast)
    cache = PagedCache.zeros(4, layout, 64)
    values, scales = cache.page_bytes[:, : 64 * 576].unflatten(1, (64, 576)), cache.page_bytes[:, 64 * 576 :]
    values[:, :, :256] = torch.arange(256, dtype=torch.uint8)
    scales.unflatten(1, (64, 8))[:, :, :4] = torch.arange(256, dtype=torch.uint8).view(4, 64, 1)
    want = dsv4x.dequantize_k_cache_paged(cache, torch.arange(256), kernel="reference")[:, :256].float()
    raw = np.zeros((256, 512), np.uint8)
    raw[:, :256] = np.arange(256)
    scale = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 8, 1)
    words = gluon_on_numpy.Tensor(raw.view(np.uint32))
    got = gluon_on_numpy.body(codes.decode)(words, gluon_on_numpy.Tensor(scale), None, layout is FNUZ, gfx950)
    got = torch.from_numpy(got.values[:, :256].copy())
    # One NaN may take the 16 codes that stand together with it. Subnormal values are cut, as in the Triton kernel, and
    # scales past 2**120 do not come of bf16 values.
    counts = ~want.isnan().view(256, 16, 16).any(-1).repeat_interleave(16, 1)
    counts[:4] = counts[248:255] = False
    assert torch.equal(got[counts], want[counts])
    assert got[want.isnan()].isnan().all()


@pytest.mark.parametrize(("heads", "width", "rows_of_kv"), [(64, 70, 200), (8, 130, 200), (65, 33, 40), (20, 5, 0)])
def test_prefill_is_the_oracle(arch, heads, width, rows_of_kv):
    torch.manual_seed(heads)
    kv = torch.full((rows_of_kv, 520), torch.nan).bfloat16()
    kv[: rows_of_kv // 2, :512] = (torch.randn(rows_of_kv // 2, 512) / 10).bfloat16()
    indices, lens = rows(torch.arange(max(rows_of_kv // 2, 1)), 4, width, rows_of_kv)
    sink = torch.randn(heads)
    sink[0], sink[-1] = torch.inf, -torch.inf
    q = (torch.randn(heads, 4, 512) * 0.3).bfloat16().transpose(0, 1)
    call = PrefillCall(q, kv[:, :512], indices, lens, sink, 0.06, None, heads)
    want = reference.sparse_mla_prefill(*call[:6], dtype=torch.float64)
    check_prefill(*prefill.sparse_mla_prefill(call), *want)
    bare = call._replace(lens=None, attn_sink=None, indices=indices.long())
    want = reference.sparse_mla_prefill(*bare[:6], dtype=torch.float64)
    check_prefill(*prefill.sparse_mla_prefill(bare), *want)


def decode_problem(arch="gfx942", layout="DSv4", extra="DSv4 fnuz", pages=64, **fields):
    caches = tuple(CacheSpec(name, 64, pages, 37440) for name in (layout, extra))
    given = {"tokens": 64, "heads": 64, "width": 128, "extra_width": 512, "interpreter": False}
    return Problem("sparse_mla_decode", "cuda", arch, caches=caches, **{**given, **fields})


def prefill_problem(arch="gfx942", **fields):
    given = {"tokens": 4096, "heads": 64, "width": 640, "rows": 65536, "interpreter": False}
    return Problem("sparse_mla_prefill", "cuda", arch, **{**given, **fields})


@pytest.fixture
def records(replaced):
    replaced(empty=("sparse_mla_decode", "sparse_mla_prefill"))
    gluon.register_kernels()
    return {op: registry.find(op, "gluon") for op in ("sparse_mla_decode", "sparse_mla_prefill")}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (decode_problem("sm_90"), "arch is sm_90, need gfx942 or gfx950"),
        (decode_problem("gfx1250"), "arch is gfx1250, need gfx942 or gfx950"),
        (decode_problem(layout="DSv4.1 fp8"), "cache layout is DSv4.1 fp8, need DSv4 or DSv4 fnuz"),
        (decode_problem(interpreter=True), "TRITON_INTERPRET=1, need it unset: Gluon has no interpreter"),
        (decode_problem(pages=2**25), f"{2**31} slots, need < {2**31}: it takes 32-bit slots"),
        (prefill_problem("sm_90"), "arch is sm_90, need gfx942 or gfx950"),
        (prefill_problem(head_dim=576), "head dim is 576, need 512: registers hold no more"),
        (prefill_problem(interpreter=True), "TRITON_INTERPRET=1, need it unset: Gluon has no interpreter"),
    ],
    ids=str,
)
def test_what_they_refuse(records, asked, reason):
    assert all(each.startswith(reason) for each in records[asked.op].not_supported_reasons(asked))
    assert records[asked.op].not_supported_reasons(asked)


@pytest.mark.parametrize("arch", shapes.ARCHS)
@pytest.mark.parametrize("asked", [decode_problem, prefill_problem])
def test_they_run_by_name_only_and_say_why(records, asked, arch):
    problem = asked(arch)
    assert registry.select(problem, "gluon") is records[problem.op]
    explanation = registry.explain(problem)
    assert explanation.chosen is None
    assert "never ran on an AMD GPU" in explanation.by_name_only["gluon"]
    assert explanation.notes["gluon"].startswith("at least ")
    with pytest.raises(dsv4x.KernelNotSupported):
        registry.select(problem)


def test_predictions_follow_rows_and_heads(records):
    decode_us, prefill_us = (records[op].predicted_us for op in records)
    rows = {"tokens": 4096, "entries": 640}
    assert decode_us(decode_problem(**rows)) == pytest.approx(412, rel=0.06)
    assert decode_us(decode_problem("gfx950", **rows)) == pytest.approx(208, rel=0.02)
    assert decode_us(decode_problem(heads=128, **rows)) == pytest.approx(
        2 * decode_us(decode_problem(**rows)), rel=0.06
    )
    assert decode_us(decode_problem(heads=8, **rows)) < decode_us(decode_problem(**rows))
    assert prefill_us(prefill_problem()) == pytest.approx(274, rel=0.06)
    assert prefill_us(prefill_problem("gfx950")) == pytest.approx(220, rel=0.02)
    # Few rows are split, so that all compute units take part.
    one = decode_problem(tokens=1, entries=640)
    assert decode_us(one) < decode_us(dataclasses.replace(one, split_k=1)) / 2


@pytest.mark.parametrize("split_k", [0, 3])
def test_scratch_bounds_the_partial_outputs(records, arch, make_cache, monkeypatch, split_k):
    cache, live = make_cache(2, 64, 50)
    made = []
    monkeypatch.setattr(decode, "partials", lambda call, splits: made.append(splits) or reducing.partials(call, splits))
    call = call_of(Scope(cache, live.expand(2, 50).repeat(1, 20).int(), None), None, 8, 2, split_k=split_k or None)
    check_decode(*decode.sparse_mla_decode(call), *expected(call))
    problem = decode_problem(arch, tokens=2, heads=8, width=1000, extra_width=0, split_k=split_k)
    assert 0 < partial_bytes(2, 8, made[0]) <= records["sparse_mla_decode"].scratch_bytes(problem)
