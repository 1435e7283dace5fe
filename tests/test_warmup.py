"""Warming up compiles what steps launch, stores nothing, and leaves nothing to compile later."""

import dataclasses
import random

import pytest
import torch

import dsv4x
from dsv4x import PagedCache, layouts
from dsv4x.common import warmup as warmup_module
from dsv4x.common.routing import paths_of


@pytest.mark.parametrize("layout", [layouts.DSV4, layouts.DSV32])
def test_the_caches_keep_their_bytes_and_a_cpu_compiles_nothing(layout):
    caches = [PagedCache.zeros(2, layout, 4) for _ in range(2)]
    for cache in caches:
        cache.data.random_(0, 256)
    before = [cache.data.clone() for cache in caches]
    assert dsv4x.warmup(*caches, heads=2, topk=4, window_size=8, softmax_scale=0.1) == 0
    assert all(torch.equal(a, cache.data) for a, cache in zip(before, caches))


def test_bad_arguments_are_named():
    cache = PagedCache.zeros(2, layouts.DSV4, 4)
    with pytest.raises(TypeError, match="swa_cache: got NoneType"):
        dsv4x.warmup(None, heads=2)
    with pytest.raises(ValueError, match="heads: got 0"):
        dsv4x.warmup(cache, heads=0)
    with pytest.raises(ValueError, match="softmax_scale: got None"):
        dsv4x.warmup(PagedCache.zeros(2, layouts.DSV32, 4), heads=2, topk=4)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [None, "triton"])
@pytest.mark.parametrize("heads", [8, 64])
def test_no_batch_compiles_anything_afterwards(heads, kernel):
    swa, extra = (PagedCache.zeros(pages, layouts.DSV4, 64, "cuda") for pages in (300, 80))
    dsv4x.warmup(swa, extra, heads=heads, topk=64, kernel=kernel)
    compiled = warmup_module._compiled()
    assert compiled > 0
    assert dsv4x.warmup(swa, extra, heads=heads, topk=64, kernel=kernel) == 0
    draw = random.Random(heads)
    for _ in range(24):
        requests = [(draw.choice((0, 1, 2, 3, 16, 37, 160)), draw.choice((0, 1, 15, 16, 400))) for _ in range(5)]
        requests = [(q, q + more) for q, more in requests[: draw.choice((1, 2, 5))]]
        starts = torch.tensor([0, *(q for q, _ in requests)]).cumsum(0).int()
        lengths = torch.tensor([length for _, length in requests], dtype=torch.int32)
        tokens = int(starts[-1])
        for ratio in (1, 4, 128):
            columns = draw.choice((9, 16, 17))
            more = {} if ratio == 1 else {
                "extra_block_table": torch.randint(0, 80, (len(requests), columns), dtype=torch.int32, device="cuda"),
                "extra_page_size": 64, "extra_pages": 80,
            }  # fmt: skip
            meta = dsv4x.AttentionMetadata.build(
                starts.cuda(), lengths.cuda(),
                torch.randint(0, 300, (len(requests), columns), dtype=torch.int32, device="cuda"),
                compress_ratio=ratio, swa_page_size=64, swa_pages=300, topk=64, **more,
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
    assert warmup_module._compiled() == compiled


def test_kernels_that_another_batch_may_get_are_warmed_up_too(monkeypatch):
    explanation = dsv4x.explain(dsv4x.Problem("sparse_mla_decode", "cpu", "cpu", heads=8, width=64))
    times = {"flash_mla": 20.0, "gluon": 39.0, "triton": 41.0}
    monkeypatch.setattr(
        warmup_module.registry, "explain", lambda problem: dataclasses.replace(explanation, predicted_us=times)
    )
    assert warmup_module._kernels_of(explanation.problem, None) == ["flash_mla", "gluon"]
    assert warmup_module._kernels_of(explanation.problem, "triton") == ["triton"]
