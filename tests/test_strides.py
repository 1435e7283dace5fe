"""Strides: an empty tensor has no wrong one, pages stand as close as their layout says, nothing is written twice."""

import numpy as np
import pytest
import torch

import dsv4x
from dsv4x import PagedCache, layouts
from dsv4x.common.core import checks

BF16, F32, I32, U8 = torch.bfloat16, torch.float32, torch.int32, torch.uint8
T, H = 3, 2


def bare(layout, pages, page_size=1, device="cpu"):
    """Pages back to back, without a byte between them."""
    data = torch.zeros(pages, page_size, layout.entry_bytes, dtype=U8, device=device)
    return PagedCache(data, layout, page_size)


@pytest.mark.parametrize("layout", [member.value for member in layouts.MLAKVCacheLayout], ids=lambda one: one.name)
@pytest.mark.parametrize("page_size", [1, 2, 3])
def test_small_pages_may_stand_back_to_back(layout, page_size):
    stride = layout.page_stride(page_size)
    data = torch.zeros(40, stride, dtype=U8)
    cache = PagedCache(data, layout, page_size)
    assert cache.page_stride == stride
    assert cache.capacity == 40 * page_size


def test_the_servers_view_of_pages_of_one_entry_is_taken_as_it_is():
    for shape in ((40, 1, 132), (40, 1, 1, 132), (40, 132)):
        data = torch.zeros(shape, dtype=U8)
        assert PagedCache(data, layouts.INDEXER_FP8, 1).page_bytes.data_ptr() == data.data_ptr()
    # A dimension of one has no stride to be wrong.
    odd = torch.zeros(40, 132, dtype=U8).as_strided((40, 1, 1, 132), (132, 7, 3, 1))
    assert PagedCache(odd, layouts.INDEXER_FP8, 1).page_stride == 132


@pytest.mark.parametrize(("layout", "size", "stride", "needs"), [
    (layouts.INDEXER_FP8, 1, 134, 4), (layouts.INDEXER_FP8, 2, 268, 8), (layouts.INDEXER_FP8, 64, 8456, 16),
    (layouts.INDEXER_FP4, 1, 70, 4), (layouts.DSV4, 1, 1160, 16),
])  # fmt: skip
def test_a_page_stride_keeps_the_alignment_its_layout_has(layout, size, stride, needs):
    with pytest.raises(ValueError, match=rf"data: stride\(0\) is {stride} bytes, need a multiple of {needs} >= "):
        PagedCache(torch.zeros(4, stride, dtype=U8), layout, size)


@pytest.mark.parametrize("layout", [layouts.INDEXER_FP8, layouts.INDEXER_FP4], ids=lambda one: one.name)
def test_pages_of_one_entry_hold_and_give_what_larger_ones_do(layout, kernel_device, rng):
    kernel, device = kernel_device
    k = torch.randn(40, 128, generator=rng).bfloat16().to(device)
    order = torch.randperm(40, generator=rng).to(device)
    caches = bare(layout, 40, device=device), PagedCache.zeros(3, layout, 16, device)
    for cache in caches:
        dsv4x.quantize_and_insert_k_cache(k, cache, order, kernel=kernel)
    found, expected = (dsv4x.gather_indexer_k(cache, order, kernel=kernel) for cache in caches)
    assert all(torch.equal(a.view(U8), b.view(U8)) for a, b in zip(found, expected))
    rows = [dsv4x.dequantize_k_cache_paged(cache, order, kernel=kernel) for cache in caches]
    assert torch.equal(*rows)
    slots = order[:6].int().view(2, 3)
    compact = dsv4x.gather_referenced_cache_blocks(caches[0], slots, kernel=kernel)
    again = dsv4x.dequantize_k_cache_paged(compact.cache, compact.indices.flatten(), kernel=kernel)
    assert torch.equal(again, rows[0][:6])
    if layout is layouts.INDEXER_FP8:
        q = torch.randn(1, 1, 32, 128, generator=rng).to(torch.float8_e4m3fn).to(device)
        weights = torch.randn(1, 32, generator=rng).to(device)
        lens = torch.tensor([[40]], dtype=I32, device=device)
        tables = [torch.arange(n, dtype=I32, device=device)[None] for n in (40, 3)]
        logits = [
            dsv4x.paged_mqa_logits(q, cache, weights, lens, table, 40, kernel=kernel)
            for cache, table in zip(caches, tables)
        ]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


EMPTY = {
    "from numpy": lambda: torch.from_numpy(np.lib.stride_tricks.as_strided(np.zeros(1, np.int32), (0, 5), (0, 0))),
    "strides 0": lambda: torch.zeros(0, dtype=I32).as_strided((0, 5), (0, 0)),
    "transposed": lambda: torch.zeros(5, 0, dtype=I32).T,
}


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY)
def test_an_idle_ranks_block_table_is_taken(make):
    table, none = make(), torch.zeros(0, dtype=I32)
    starts, q = torch.zeros(1, dtype=I32), torch.zeros(0, H, 512, dtype=BF16)
    cache = PagedCache.zeros(2, layouts.DSV4, 64)
    meta = dsv4x.AttentionMetadata.build(
        starts, none, table, table, compress_ratio=4, swa_page_size=64, swa_pages=2, extra_page_size=64, extra_pages=2,
        topk=5,
    )  # fmt: skip
    out, lse = dsv4x.sparse_mla_attention(q, cache, cache, meta, table)
    assert (out.shape, lse.shape) == ((0, H, 512), (0, H))
    assert dsv4x.sparse_mla_decode(q, cache, table, none, cache, table, none)[0].shape == (0, H, 512)
    assert dsv4x.local_to_slots(table, none, none, table, 64, 2).shape == (0, 5)
    assert dsv4x.dense_to_ragged(table, none, capacity=0)[1].tolist() == [0]


def test_a_pool_without_pages_has_no_wrong_stride():
    for shape, stride in (((0, 37440), (0, 0)), ((0, 64, 1, 584), (0, 0, 0, 0))):
        cache = PagedCache(torch.zeros(0, dtype=U8).as_strided(shape, stride), layouts.DSV4, 64)
        assert cache.capacity == 0
        assert dsv4x.dequantize_k_cache_paged(cache, torch.zeros(2, dtype=I32)).count_nonzero() == 0


def expanded(*shape, dtype=BF16):
    """Of this shape, all its first dimension's rows in one place."""
    return torch.zeros(1, *shape[1:], dtype=dtype).expand(*shape)


def heads_over_one_another():
    return torch.zeros(T, 1, 512, dtype=BF16).expand(T, H, 512)


CACHE = PagedCache.zeros(2, layouts.DSV4, 64)
INDEX = PagedCache.zeros(2, layouts.INDEXER_FP8, 64)
ROWS = torch.zeros(T, 5, dtype=I32)
LENS = torch.zeros(T, dtype=I32)
Q = torch.zeros(T, H, 512, dtype=BF16)
INDEX_Q = torch.zeros(T, 32, 128).to(torch.float8_e4m3fn)
INDEX_K, SCALES, WEIGHTS = INDEX_Q[:, 0].contiguous(), torch.zeros(T), torch.zeros(T, 32)
COMBINE = [torch.tensor(x, dtype=I32) for x in ([0, 1, 3], [9, 20], [4, 4], [0, 0], [0, 0])]


def step(**options):
    meta = dsv4x.AttentionMetadata.build(
        COMBINE[0], COMBINE[1], torch.zeros(2, 1, dtype=I32), compress_ratio=1, swa_page_size=64, swa_pages=2
    )
    return dsv4x.sparse_mla_attention(Q, CACHE, None, meta, **options)


def flat(**options):
    return dsv4x.mqa_logits(INDEX_Q, INDEX_K, SCALES, WEIGHTS, LENS, LENS, **options)


def paged(op, *rest, **options):
    return op(INDEX_Q[:, None], INDEX, WEIGHTS, LENS[:, None], torch.zeros(T, 1, dtype=I32), 64, *rest, **options)


# What is written, and a call of the op with it.
WRITTEN = {
    "decode": ("out", heads_over_one_another, lambda **out: dsv4x.sparse_mla_decode(Q, CACHE, ROWS, None, **out)),
    "decode rows": ("out", lambda: expanded(T, H, 512),
                    lambda **out: dsv4x.sparse_mla_decode(Q, CACHE, ROWS, None, **out)),
    "prefill": ("out", heads_over_one_another, lambda **out: dsv4x.sparse_mla_prefill(Q, Q[:, 0], ROWS, None, **out)),
    "attention": ("out", heads_over_one_another, step),
    "dequantize": ("out", lambda: expanded(T, 512), lambda **out: dsv4x.dequantize_k_cache_paged(CACHE, LENS, **out)),
    "rows": ("out", lambda: expanded(T, 512),
             lambda **out: dsv4x.gather_referenced_rows(CACHE, ROWS, capacity=2, **out)),
    "blocks": ("remapped", lambda: expanded(T, 5, dtype=I32),
               lambda **out: dsv4x.gather_referenced_cache_blocks(CACHE, ROWS, capacity=2, **out)),
    "combine": ("out_indices", lambda: expanded(T, 128, dtype=I32),
                lambda **out: dsv4x.combine_topk_swa_indices(ROWS, *COMBINE, 16, 4, 5, **out)),
    "halves": ("out_indices", lambda: expanded(T, 128, dtype=I32),
               lambda **out: dsv4x.combine_swa_extra_indices(ROWS, None, ROWS, None, 9, **out)),
    "topk": ("out", lambda: expanded(T, 4, dtype=I32), lambda **out: dsv4x.topk_transform(WEIGHTS, None, 4, **out)),
    "flat logits": ("out", lambda: expanded(T, T, dtype=F32), flat),
    "paged logits": ("out", lambda: expanded(T, 64, dtype=F32), lambda **out: paged(dsv4x.paged_mqa_logits, **out)),
    "indexer": ("out", lambda: expanded(T, 4, dtype=I32), lambda **out: paged(dsv4x.paged_indexer_topk, 4, **out)),
    "flat indexer": ("out", lambda: expanded(T, 2, dtype=I32),
                     lambda **out: dsv4x.indexer_topk(
                         INDEX_Q, INDEX_K, SCALES, WEIGHTS, LENS, LENS, 2, **out)),
    "schedule": ("out", lambda: expanded(5, 2, dtype=I32),
                 lambda **out: dsv4x.get_paged_mqa_logits_metadata(LENS[:, None], 64, 4, **out)),
    "indexer rows": ("k", lambda: torch.zeros(1, 128, dtype=U8).view(torch.float8_e4m3fn).expand(T, 128),
                     lambda **out: dsv4x.gather_indexer_k(INDEX, LENS, **out)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_a_buffer_that_lies_over_itself_is_refused(case):
    name, make, call = WRITTEN[case]
    with pytest.raises(ValueError, match=rf"^{name}: .*stride"):
        call(**{name: make()})
    buffer = make().contiguous()
    call(**{name: buffer})


def test_any_strides_that_keep_rows_apart_are_taken(rng):
    """Heads before tokens, tokens and heads woven into one another, and rows with room between them."""
    cache = PagedCache.zeros(2, layouts.DSV4, 64)
    dsv4x.quantize_and_insert_k_cache(torch.randn(8, 512, generator=rng).bfloat16(), cache, torch.arange(8))
    q, rows = torch.randn(2, 3, 512, generator=rng).bfloat16(), torch.arange(8, dtype=I32).expand(2, 8)
    expected, _ = dsv4x.sparse_mla_decode(q, cache, rows, None)
    for strides in ((512, 1024, 1), (1536, 1024, 1), (4096, 520, 1)):
        out = torch.zeros(8192, dtype=BF16).as_strided((2, 3, 512), strides)
        assert torch.equal(dsv4x.sparse_mla_decode(q, cache, rows, None, out=out)[0], expected)
    for strides in ((512, 512, 1), (1024, 512, 1), (1536, 511, 1), (0, 512, 1)):
        with pytest.raises(ValueError, match=r"out: strides .* lay rows of \(2, 3, 512\) over one another"):
            dsv4x.sparse_mla_decode(
                q, cache, rows, None, out=torch.zeros(8192, dtype=BF16).as_strided((2, 3, 512), strides)
            )


def test_rows_apart_agrees_with_counting_places(rng):
    told = {True: 0, False: 0}
    for _ in range(400):
        shape = [int(x) for x in torch.randint(1, 4, (3,), generator=rng)] + [4]
        strides = [int(x) for x in torch.randint(0, 25, (3,), generator=rng)] + [1]
        value = torch.arange(200).as_strided(shape, strides)
        apart = value.unique().numel() == value.numel()
        told[apart] += 1
        if apart:
            assert checks.rows_apart("out", value) is value
        else:
            with pytest.raises(ValueError, match="out: stride"):
                checks.rows_apart("out", value)
    assert min(told.values()) > 40
