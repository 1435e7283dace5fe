"""Warming up compiles what steps launch, stores nothing, and leaves nothing to compile later."""

import dataclasses
import random

import pytest
import torch
from layer_kinds import paths_of

import dsv4x
from dsv4x import PagedCache, layouts
from dsv4x.common.step import warmup as warmup_module


@pytest.mark.parametrize("layout", [layouts.DSV4, layouts.DSV32])
def test_the_caches_keep_their_bytes_and_a_cpu_compiles_nothing(layout):
    caches = [PagedCache.zeros(2, layout, 4) for _ in range(2)]
    for cache in caches:
        cache.data.random_(0, 256)
    before = [cache.data.clone() for cache in caches]
    assert dsv4x.warmup(*caches, heads=2, topk=4, window_size=8, softmax_scale=0.1) == 0
    assert all(torch.equal(a, cache.data) for a, cache in zip(before, caches))


@pytest.mark.parametrize("layout", [layouts.INDEXER_FP8, layouts.INDEXER_MXFP8, layouts.INDEXER_FP4])
def test_the_index_cache_keeps_its_bytes(layout):
    swa, index = PagedCache.zeros(2, layouts.DSV4, 4), PagedCache.zeros(3, layout, 64)
    index.data.random_(0, 256)
    before = index.data.clone()
    assert dsv4x.warmup(swa, heads=2, topk=4, compress_ratios=(), index_cache=index, index_heads=32, next_n=2) == 0
    assert torch.equal(before, index.data)


def test_vendors_are_called_without_an_lse_too(monkeypatch):
    """AITER builds OPUS at its first call, which a step that wants an lse never makes."""
    called = set()

    def record(*arguments, kernel=None, return_lse=True, **keywords):
        called.add((kernel, return_lse, arguments[0].shape[0] >= 1024))

    monkeypatch.setattr(warmup_module, "sparse_mla_attention", record)
    monkeypatch.setattr(warmup_module, "_kernels_of", lambda problem, size: ["aiter", "triton"])
    cache = PagedCache.zeros(2, layouts.DSV4, 4)
    dsv4x.warmup(cache, heads=2, topk=4, window_size=8, compress_ratios=(1,))
    assert {(lse, many) for kernel, lse, many in called if kernel == "aiter"} == {
        (lse, many) for lse in (False, True) for many in (False, True)
    }
    assert {lse for kernel, lse, _ in called if kernel == "triton"} == {True}


def test_bad_arguments_are_named():
    cache = PagedCache.zeros(2, layouts.DSV4, 4)
    with pytest.raises(TypeError, match="swa_cache: got NoneType"):
        dsv4x.warmup(None, heads=2)
    with pytest.raises(ValueError, match="heads: got 0"):
        dsv4x.warmup(cache, heads=0)
    with pytest.raises(ValueError, match="softmax_scale: got None"):
        dsv4x.warmup(PagedCache.zeros(2, layouts.DSV32, 4), heads=2, topk=4)
    with pytest.raises(ValueError, match=r"index_cache: layout is .*, need indexer fp8, indexer mxfp8 or indexer fp4"):
        dsv4x.warmup(cache, heads=2, index_cache=cache)
    with pytest.raises(TypeError, match="index_cache: got Tensor"):
        dsv4x.warmup(cache, heads=2, index_cache=cache.data)
    with pytest.raises(ValueError, match="index_heads: got 48, need 32 or 64"):
        dsv4x.warmup(cache, heads=2, index_heads=48)
    with pytest.raises(ValueError, match="next_n: got 0, need >= 1"):
        dsv4x.warmup(cache, heads=2, next_n=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [None, "triton"])
@pytest.mark.parametrize("heads", [8, 64])
def test_no_batch_compiles_anything_afterwards(heads, kernel):
    swa, extra = (PagedCache.zeros(pages, layouts.DSV4, 64, "cuda") for pages in (300, 80))
    dsv4x.warmup(swa, extra, heads=heads, topk=64, kernel=kernel)
    compiled = warmup_module._compiled()
    assert compiled
    assert dsv4x.warmup(swa, extra, heads=heads, topk=64, kernel=kernel) == 0
    draw = random.Random(heads)
    for turn in range(24):
        # Now and then few tokens behind so long a prefix that its C128 entries are split.
        prefixes = (0, 1, 15, 16, 400) if turn % 4 else (70_000, 200_000)
        requests = [(draw.choice((0, 1, 2, 3, 16, 37, 160)), draw.choice(prefixes)) for _ in range(5)]
        requests = [(q, q + more) for q, more in requests[: draw.choice((1, 2, 5))]]
        starts = torch.tensor([0, *(q for q, _ in requests)]).cumsum(0).int()
        lengths = torch.tensor([length for _, length in requests], dtype=torch.int32)
        tokens = int(starts[-1])
        for ratio in (1, 4, 128):
            columns = draw.choice((9, 16, 17)) if turn % 4 else 3200
            more = {} if ratio == 1 else {
                "extra_block_table": torch.randint(0, 80, (len(requests), columns), dtype=torch.int32, device="cuda"),
                "extra_page_size": 64, "extra_pages": 80,
            }  # fmt: skip
            meta = dsv4x.AttentionMetadata.build(
                starts.cuda(), lengths.cuda(),
                torch.randint(0, 300, (len(requests), columns), dtype=torch.int32, device="cuda"),
                compress_ratio=ratio, swa_page_size=64, swa_pages=300, **more,
            )  # fmt: skip
            q = torch.randn(tokens, heads, 512, dtype=torch.bfloat16, device="cuda")
            topk = torch.randint(-1, 100, (tokens, 64), dtype=torch.int32, device="cuda") if ratio == 4 else None
            sink = draw.choice((None, torch.zeros(heads, device="cuda")))
            for path in (None, *paths_of(ratio)):
                dsv4x.sparse_mla_attention(
                    q, swa, extra if ratio > 1 else None, meta, topk, sink, path=path, kernel=kernel
                )
        k = torch.zeros(tokens, 512, dtype=torch.bfloat16, device="cuda")
        dsv4x.quantize_and_insert_k_cache(k, swa, torch.arange(tokens, device="cuda"))
    q = torch.randn(3, heads, 512, dtype=torch.bfloat16, device="cuda")
    rows = torch.randint(0, 64 * 300, (3, 1024), dtype=torch.int32, device="cuda")
    for split_k in (2, 4, 5, 8, 9, 16, 40):
        for sink in (None, torch.zeros(heads, device="cuda")):
            dsv4x.sparse_mla_decode(q, swa, rows, None, attn_sink=sink, kernel="triton", split_k=split_k)
    assert {name for name, _ in warmup_module._compiled() - compiled} <= {"decode_kernel"}


def index_step(draw, cache, queries, topk, next_n, kernel):
    """A random batch of each kind through all that a C4 layer's indexer calls, in small pieces or whole."""
    device, pages = cache.device, cache.pages
    budget = draw.choice((1 << 16, 1 << 20, 1 << 28))
    method = draw.choice(list(dsv4x.TopkMethod))

    def indices(*shape, high=pages):
        return torch.randint(0, high, shape, dtype=torch.int32, device=device)

    def slot_table(rows, columns):
        return {"slot_table": indices(rows, columns), "slot_page_size": 64, "slot_pages": pages}

    batch, width = draw.choice((0, 1, 2, 3, 16, 37, 300, 1100)), draw.choice((9, 64, 65, 1000, 1008, 4097, 33000))
    # Long contexts of many requests would only take long.
    batch = min(batch, 1 << 20 >> width.bit_length())
    q, q_scale, weights = queries(batch, next_n)
    table = indices(batch, max(1, -(-width // 64) + draw.choice((-1, 0, 3))))
    lens = indices(batch, next_n, high=min(width, 64 * table.shape[1]) + 1).sort(1).values
    schedule = dsv4x.get_paged_mqa_logits_metadata(lens) if draw.random() < 0.8 else None
    dsv4x.paged_indexer_topk(
        q, cache, weights.view(-1, weights.shape[-1]), lens, table, width, topk, method, q_scale=q_scale,
        bases=indices(batch * next_n), **draw.choice(({}, slot_table(batch, 7))), logits_bytes=budget, kernel=kernel,
        schedule=schedule,
    )  # fmt: skip

    starts, seq_lens = (torch.arange(n, dtype=torch.int32, device=device) for n in (batch + 1, batch))
    step = dsv4x.StepMetadata.build(
        starts * next_n, 4 * seq_lens % (4 * width), table, {4: dsv4x.ExtraPages(table, 64, pages, topk=topk)},
        swa_page_size=64, swa_pages=pages, num_tokens=batch * next_n, max_seq_len=4 * width,
    )  # fmt: skip
    q, q_scale, weights = queries(batch * next_n)
    for together in (None, next_n):
        dsv4x.sparse_attn_indexer(
            q, cache, weights, step[4], next_n=together, q_scale=q_scale, kernel=kernel, logits_bytes=1 << 28
        )

    rows, entries = draw.choice((0, 1, 2, 5, 64, 301)), draw.choice((0, 1, 50, 64, 65, 1000, 1008, 20000, 33001))
    slots = torch.randint(-1, cache.capacity, (entries,), device=device).to(draw.choice((torch.int32, torch.int64)))
    k, k_scale = dsv4x.gather_indexer_k(cache, slots)
    q, q_scale, weights = queries(rows)
    ks, ke = indices(2, rows, high=entries + 1).sort(0).values
    dsv4x.indexer_topk(
        q, k, k_scale, weights, ks, ke, topk, method, q_scale=q_scale, requests=indices(rows, high=3),
        bases=draw.choice((None, indices(rows))), **slot_table(3, 11), max_seqlen_k=draw.choice((None, 70, 1000)),
        logits_bytes=budget, kernel=kernel,
    )  # fmt: skip
    inserted = torch.zeros(rows, 128, dtype=torch.bfloat16, device=device)
    dsv4x.quantize_and_insert_k_cache(inserted, cache, torch.arange(rows, device=device))


def index_queries(encoding, heads, device):
    """Makes queries of a shape, their scales, and weights."""

    def make(*shape):
        weights = torch.rand(*shape, heads, device=device)
        if encoding == "e2m1":
            codes, scales = (torch.zeros(*shape, heads, n, dtype=torch.uint8, device=device) for n in (64, 4))
            return codes, scales, weights
        return torch.rand(*shape, heads, 128, device=device).to(torch.float8_e4m3fn), None, weights

    return make


@pytest.mark.gpu
@pytest.mark.parametrize("topk", [64, 72, 101])
@pytest.mark.parametrize(
    ("layout", "encoding", "heads", "next_n"),
    [
        (layouts.INDEXER_FP8, "e4m3fn", 64, 1),
        (layouts.INDEXER_FP8, "e4m3fn", 32, 3),
        (layouts.INDEXER_FP4, "e4m3fn", 64, 2),
        (layouts.INDEXER_FP4, "e2m1", 64, 1),
    ],
)
def test_no_batch_of_the_indexer_compiles_anything_afterwards(layout, encoding, heads, next_n, topk):
    # The servers' cache has more pages than the one that is warmed up over.
    swa, small = PagedCache.zeros(2, layouts.DSV4, 64, "cuda"), PagedCache.zeros(2, layout, 64, "cuda")
    options = {"heads": 8, "topk": topk, "compress_ratios": (), "index_heads": heads, "next_n": next_n}
    dsv4x.warmup(swa, index_cache=small, **options)
    compiled = warmup_module._compiled()
    assert compiled
    assert dsv4x.warmup(swa, index_cache=small, **options) == 0
    draw, queries = random.Random(topk), index_queries(encoding, heads, "cuda")
    cache = PagedCache.zeros(301, layout, 64, "cuda")
    for _ in range(40):
        index_step(draw, cache, queries, topk, next_n, draw.choice((None, "triton")))
    torch.cuda.synchronize()
    late = warmup_module._compiled() - compiled
    assert not late, "\n".join(key for _, key in sorted(late))


def test_kernels_that_another_batch_may_get_are_warmed_up_too(monkeypatch):
    explanation = dsv4x.explain(dsv4x.Problem("sparse_mla_decode", "cpu", "cpu", heads=8, width=64))
    times = {"flash_mla": 20.0, "gluon": 39.0, "triton": 41.0}
    monkeypatch.setattr(
        warmup_module.registry, "explain", lambda problem: dataclasses.replace(explanation, predicted_us=times)
    )
    size = warmup_module._Size(tokens=1, heads=8, topk=4, window_size=8, kernel=None, capturing=None)
    assert warmup_module._kernels_of(explanation.problem, size) == ["flash_mla", "gluon"]
    assert warmup_module._kernels_of(explanation.problem, size._replace(kernel="triton")) == ["triton"]


def test_warmup_takes_what_prediction_picks_for_either_mode_and_tells_how_far_it_is(monkeypatch):
    explanation = dsv4x.explain(dsv4x.Problem("sparse_mla_decode", "cpu", "cpu", heads=8, width=64))
    times = {False: {"flash_mla": 90.0, "gluon": 20.0}, True: {"flash_mla": 20.0, "gluon": 90.0}}

    def explain(problem):
        return dataclasses.replace(explanation, predicted_us=times[problem.capturing])

    monkeypatch.setattr(warmup_module.registry, "explain", explain)
    problem = dataclasses.replace(explanation.problem, device="cuda")
    for capturing, names in ((None, ["gluon", "flash_mla"]), (False, ["gluon"]), (True, ["flash_mla"])):
        size = warmup_module._Size(1, 8, 4, 8, None, capturing)
        assert warmup_module._kernels_of(problem, size) == names
    monkeypatch.undo()
    seen = []
    cache = PagedCache.zeros(2, layouts.DSV4, 4)
    dsv4x.warmup(cache, cache, heads=1, topk=4, window_size=4, progress=lambda *stage: seen.append(stage))
    assert [done for done, _, _ in seen] == list(range(len(seen)))
    assert {stages for _, stages, _ in seen} == {len(seen) - 1}
    assert seen[-1][2] == "done"
