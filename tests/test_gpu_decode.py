"""Decode kernels on a real GPU: hostile rows, strides, huge pages, repeats, a row's independence of its batch."""

import pytest
import torch
from tolerances import check_decode

import dsv4x
from dsv4x import PagedCache, layouts, platform, reference
from dsv4x.common.dispatch import registry

pytestmark = pytest.mark.gpu

HOSTILE = [-1, -2, -(2**31), 2**31 - 1]


@pytest.fixture(params=["gluon", "triton"])
def kernel(request):
    """A kernel that runs here, by name."""
    if request.param == "gluon":
        problem = dsv4x.Problem("sparse_mla_decode", "cuda", platform.arch, heads=64, width=128)
        reasons = registry.refusals(problem, "gluon")
        if reasons:
            pytest.skip("; ".join(reasons))
    return request.param


def pool(page_size, pages=80):
    """A cache of which every second entry is NaN in every byte, and the slots of the others."""
    data = torch.full((pages, 2 * layouts.DSV4.page_stride(page_size)), 0xFF, dtype=torch.uint8, device="cuda")
    cache = PagedCache(data, layouts.DSV4, page_size)
    slots = torch.randperm(cache.capacity, device="cuda")[: cache.capacity // 2]
    k = (torch.randn(len(slots), 512, device="cuda") / 10).clamp(-1, 1).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, cache, slots)
    return cache, slots


def fill(cache):
    """Make every slot an entry."""
    k = (torch.randn(cache.capacity, 512, device="cuda") / 10).clamp(-1, 1).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(cache.capacity, device="cuda"))


def rows(tokens, width, cache, slots, dtype):
    """Index rows a fifth of which is no entry, spans of every awkward length, and garbage past them."""
    wrong = [*HOSTILE, cache.capacity] + ([2**31, 2**40, -(2**63)] if dtype == torch.int64 else [])
    wrong = torch.tensor(wrong, dtype=dtype, device="cuda")
    indices = slots[torch.randint(0, len(slots), (tokens, width), device="cuda")].to(dtype)
    holes = torch.rand(tokens, width, device="cuda") < 0.2
    indices = torch.where(holes, wrong[torch.randint(0, len(wrong), (tokens, width), device="cuda")], indices)
    indices[3] = -1
    indices[4, : width // 2] = -2
    lens = torch.randint(0, width + 1, (tokens,), device="cuda", dtype=dtype)
    special = [width, 0, width + 100, width, width, -5, 1, 63, 64, 65, 127, 128, 129][:tokens]
    lens[: len(special)] = torch.tensor(special, dtype=dtype, device="cuda")
    past = torch.arange(width, device="cuda") >= lens[:, None]
    return torch.where(past, torch.iinfo(torch.int32).max, indices), lens


def case(tokens=61, heads=64, width=100, extra_width=300, dtype=torch.int32, extra_dtype=torch.int32):
    torch.manual_seed(heads + width)
    q = torch.randn(tokens, heads, 512, device="cuda").clamp(-1, 1).bfloat16()
    scopes = []
    for page_size, columns, kind in ((61, width, dtype), (64, extra_width, extra_dtype)):
        if columns:
            cache, slots = pool(page_size)
            scopes += [cache, *rows(tokens, columns, cache, slots, kind)]
    sink = torch.randn(heads, device="cuda")
    sink[0], sink[-1] = torch.inf, -torch.inf
    return [q, *(scopes if extra_width else [*scopes, None, None, None]), sink]


@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int32), (torch.int64, torch.int32)])
@pytest.mark.parametrize("heads", [1, 8, 12, 16, 20, 64, 65, 128])
@pytest.mark.parametrize(("width", "extra_width"), [(1, 0), (128, 0), (100, 300), (128, 1024)])
def test_hostile_rows(width, extra_width, heads, dtypes, kernel):
    arguments = case(61, heads, width, extra_width, *dtypes)
    expected = reference.sparse_mla_decode(*arguments, dtype=torch.float64)
    out = torch.full((61, heads, 512), torch.nan, dtype=torch.bfloat16, device="cuda")
    check_decode(*dsv4x.sparse_mla_decode(*arguments, out=out, kernel=kernel), *expected)
    for split_k in (1, 2, 7, 18):
        check_decode(*dsv4x.sparse_mla_decode(*arguments, kernel=kernel, split_k=split_k), *expected)
    arguments[-1] = None
    expected = reference.sparse_mla_decode(*arguments, dtype=torch.float64)
    check_decode(*dsv4x.sparse_mla_decode(*arguments, kernel=kernel), *expected)


@pytest.mark.parametrize("heads", [7, 16, 20])
def test_without_lengths_and_with_strides(heads, kernel):
    arguments = case(9, heads, 64, 192)
    own = slice(2, 2 + heads)
    arguments[3] = arguments[6] = None
    for at in (2, 5):
        arguments[at] = torch.where(arguments[at] >= 4000, -1, arguments[at])
    wide = torch.zeros(9, 24, 576, dtype=torch.bfloat16, device="cuda")
    wide[:, own, 1:513] = arguments[0]
    arguments[0] = wide[:, own, 1:513]
    out = torch.full((9, 24, 520), torch.nan, dtype=torch.bfloat16, device="cuda")
    expected = reference.sparse_mla_decode(*arguments, dtype=torch.float64)
    check_decode(*dsv4x.sparse_mla_decode(*arguments, out=out[:, own, 3:515], kernel=kernel), *expected)
    out[:, own, 3:515] = torch.nan
    assert out.isnan().all(), "written outside out"


@pytest.mark.parametrize("heads", [16, 64])
def test_pages_past_two_gib(heads, kernel):
    """Offsets inside one page pass 2**31."""
    page_size = 2**31 // 584 + 100
    data = torch.zeros(1, layouts.DSV4.page_stride(page_size), dtype=torch.uint8, device="cuda")
    cache = PagedCache(data, layouts.DSV4, page_size)
    slots = torch.tensor([0, page_size - 1, page_size - 70, 5], device="cuda")
    k = (torch.randn(4, 512, device="cuda") / 10).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, cache, slots)
    q = torch.randn(3, heads, 512, device="cuda").clamp(-1, 1).bfloat16()
    indices = slots.int().expand(3, 4)
    expected = reference.sparse_mla_decode(q, cache, indices, None, dtype=torch.float64)
    check_decode(*dsv4x.sparse_mla_decode(q, cache, indices, None, kernel=kernel), *expected)


@pytest.mark.parametrize("tokens", [1, 13, 40, 61])
@pytest.mark.parametrize("heads", [8, 64, 128])
def test_rows_as_wide_as_the_longest_context(heads, tokens, kernel):
    """A few entries, some, and as many as columns, side by side; every number of splits up to the launch's most."""
    q, swa, swa_rows, swa_lens, extra, _, _, sink = case(61, heads, 128, 300)
    extra_rows, extra_lens = rows(61, 8192, *pool(64), torch.int32)
    extra_rows[extra_rows >= extra.capacity] = -1
    extra_lens[: tokens - 1] = torch.randint(0, 130, (tokens - 1,), device="cuda", dtype=torch.int32)
    extra_lens[::7] = torch.arange(len(extra_lens[::7]), device="cuda", dtype=torch.int32) * 900
    extra_lens[tokens - 1] = 8192
    some = slice(0, tokens)
    arguments = [
        q[some], swa, swa_rows[some], swa_lens[some], extra, extra_rows[some], extra_lens[some], sink
    ]  # fmt: skip
    fill(extra)
    expected = reference.sparse_mla_decode(*arguments, dtype=torch.float64)
    check_decode(*dsv4x.sparse_mla_decode(*arguments, kernel=kernel), *expected)
    check_decode(*dsv4x.sparse_mla_decode(*arguments, kernel=kernel, split_k=128), *expected)


@pytest.mark.parametrize("heads", [8, 16, 64])
def test_a_graph_follows_the_lengths_it_is_replayed_with(heads, kernel):
    """Captured over rows of nothing; the splits, and what reduces them, are found anew at each replay."""
    q, swa, swa_rows, _, extra, _, _, sink = case(5, heads, 128, 300)
    fill(extra)
    swa_rows = torch.where((swa_rows >= 0) & (swa_rows < swa.capacity), swa_rows, -1)
    extra_rows = torch.randint(0, extra.capacity, (5, 8192), device="cuda", dtype=torch.int32)
    swa_lens, extra_lens = (torch.zeros(5, device="cuda", dtype=torch.int32) for _ in range(2))
    arguments = [q, swa, swa_rows, swa_lens, extra, extra_rows, extra_lens, sink]
    dsv4x.sparse_mla_decode(*arguments, kernel=kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = dsv4x.sparse_mla_decode(*arguments, kernel=kernel)
    for lens in ([0, 0, 0, 0, 0], [40, 1, 0, 64, 65], [8192, 40, 0, 4000, 200], [3, 3, 3, 3, 3], [8192] * 5):
        swa_lens.copy_(torch.tensor([min(length, 128) for length in lens]))
        extra_lens.copy_(torch.tensor(lens))
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        check_decode(out, lse, *reference.sparse_mla_decode(*arguments, dtype=torch.float64))


@pytest.mark.parametrize("heads", [8, 16, 64])
@pytest.mark.parametrize("tokens", [1, 30, 300])
def test_fifty_repeats_are_bitwise_equal(tokens, heads, kernel):
    q, swa, swa_rows, swa_lens, extra, extra_rows, extra_lens, sink = case(300, heads, 128, 512)
    some = slice(0, tokens)
    arguments = [
        q[some], swa, swa_rows[some], swa_lens[some], extra, extra_rows[some], extra_lens[some], sink
    ]  # fmt: skip
    first = dsv4x.sparse_mla_decode(*arguments, kernel=kernel)
    for _ in range(50):
        assert all(map(torch.equal, first, dsv4x.sparse_mla_decode(*arguments, kernel=kernel)))


@pytest.mark.parametrize("heads", [8, 16, 64])
@pytest.mark.parametrize("split_k", [1, 4])
def test_with_splits_fixed_a_row_does_not_depend_on_its_batch(split_k, heads, kernel):
    q, swa, swa_rows, swa_lens, extra, extra_rows, extra_lens, sink = case(300, heads, 128, 512)
    together = dsv4x.sparse_mla_decode(
        q, swa, swa_rows, swa_lens, extra, extra_rows, extra_lens, sink, kernel=kernel, split_k=split_k
    )
    for some in (slice(7, 8), slice(0, 20), slice(150, 300)):
        alone = dsv4x.sparse_mla_decode(
            q[some], swa, swa_rows[some], swa_lens[some], extra, extra_rows[some], extra_lens[some], sink,
            kernel=kernel, split_k=split_k,
        )  # fmt: skip
        assert all(torch.equal(a, b[some]) for a, b in zip(alone, together))
