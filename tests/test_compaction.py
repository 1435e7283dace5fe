"""Compaction of what indices point at, against its definition in plain Python."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import dsv4x
from dsv4x import PagedCache, layouts
from dsv4x.common.core.layouts import CacheLayout
from dsv4x.common.dispatch import registry
from dsv4x.common.ops import compaction

I32, I64 = torch.int32, torch.int64
HOSTILE = [-(2**31), -2, -1, 2**31 - 1]
HOSTILE_64 = [2**31, 2**40, -(2**40), 2**63 - 1, -(2**63)]
PAGE_SIZES = [1, 2, 61, 64]
FNUZ = layouts.DSV4.with_flavour("e4m3fnuz")
NEITHER = [HealthCheck.function_scoped_fixture]


def pages_of(indices, **arguments):
    """Page grain, by the names both grains share in these tests."""
    got = dsv4x.gather_referenced_cache_blocks(indices=indices, **arguments)
    return SimpleNamespace(buffer=got.cache, indices=got.indices, count=got.count, listed=got.pages)


def rows_of(indices, **arguments):
    """Row grain, likewise."""
    got = dsv4x.gather_referenced_rows(indices=indices, **arguments)
    return SimpleNamespace(buffer=got.rows, indices=got.indices, count=got.count, listed=got.slots)


GRAINS = [pages_of, rows_of]


def defined(rows, lens, slots, unit_slots, capacity):
    """(units listed, indices remapped, count) as the docstrings say, index by index."""
    spans = [min(max(length, 0), len(row)) for row, length in zip(rows, lens or [len(row) for row in rows])]
    seen = [[slot for slot in row[:span] if 0 <= slot < slots] for row, span in zip(rows, spans)]
    units = sorted({slot // unit_slots for row in seen for slot in row})
    place = {unit: i for i, unit in enumerate(units[:capacity])}
    remapped = []
    for row, span in zip(rows, spans):
        points = [at < span and 0 <= slot < slots and slot // unit_slots in place for at, slot in enumerate(row)]
        remapped.append(
            [place[s // unit_slots] * unit_slots + s % unit_slots if p else -1 for s, p in zip(row, points)]
        )
    listed = units[:capacity]
    return listed + [-1] * ((len(units) if capacity is None else capacity) - len(listed)), remapped, len(units)


def bits(value):
    return value.cpu().contiguous().view(torch.uint8)


def check(grain, cache, rows, lens=None, *, capacity=None, dtype=I32, width=None, kernel="reference", **more):
    """Run a grain over ``rows`` and compare everything with the definition; returns the result and the units."""
    device = cache.device
    width = len(rows[0]) if width is None else width
    indices = torch.tensor(rows, dtype=dtype).reshape(len(rows), width).to(device)
    spans = None if lens is None else torch.tensor(lens, dtype=dtype).to(device)
    before = cache.data.clone()
    got = grain(indices, lens=spans, cache=cache, capacity=capacity, kernel=kernel, **more)
    assert torch.equal(cache.data, before)
    unit_slots = cache.page_size if grain is pages_of else 1
    if capacity is None and more.get("out") is not None:
        capacity = len(more["out"].data if grain is pages_of else more["out"])
    listed, remapped, count = defined(rows, lens, cache.capacity, unit_slots, capacity)
    assert got.count.dtype == got.indices.dtype == I32
    assert got.count.shape == (1,)
    assert got.count.tolist() == [count]
    assert got.listed.tolist() == listed
    assert got.indices.shape == indices.shape
    assert got.indices.tolist() == remapped
    assert torch.equal(indices.cpu(), torch.tensor(rows, dtype=dtype).reshape(indices.shape))
    units = [unit for unit in listed if unit >= 0]
    assert_gathered(grain, cache, got.buffer, units, kernel, more.get("k_scale", 1.0))
    return got, units


def assert_gathered(grain, cache, buffer, units, kernel, k_scale=1.0):
    """The buffer holds the units' bytes, or what ``dequantize_k_cache_paged`` reads there."""
    if grain is pages_of:
        assert (buffer.layout, buffer.page_size) == (cache.layout, cache.page_size)
        size = cache.page_size * cache.layout.entry_bytes
        for i, page in enumerate(units):
            assert torch.equal(buffer.data[i].flatten()[:size], cache.data[page].flatten()[:size])
    else:
        slots = torch.tensor(units, dtype=I64, device=cache.device)
        want = dsv4x.dequantize_k_cache_paged(cache, slots, k_scale=k_scale, kernel=kernel)
        assert torch.equal(bits(buffer[: len(units)]), bits(want))


def pool(pages, page_size, layout=layouts.DSV4, device="cpu", spread=2):
    """Garbage pages, NaN among them, other bytes between them."""
    stride = -(-layout.page_stride(page_size) // 16) * 16
    generator = torch.Generator().manual_seed(11)
    block = torch.randint(0, 256, (pages, spread, stride), dtype=torch.uint8, generator=generator)
    return PagedCache(block.to(device)[:, spread // 2], layout, page_size)


@st.composite
def problems(draw):
    """A pool's shape, index rows with holes, duplicates and hostile values, spans, and a capacity."""
    page_size, pages = draw(st.sampled_from(PAGE_SIZES)), draw(st.integers(0, 9))
    dtype = draw(st.sampled_from([I32, I64]))
    slots = page_size * pages
    near = st.integers(0, max(slots - 1, 0))
    few = st.sampled_from([0, page_size, slots - 1, slots // 2])
    bad = st.sampled_from([*HOSTILE, slots, slots + 1, *(HOSTILE_64 if dtype == I64 else [])])
    tokens, width = draw(st.integers(0, 5)), draw(st.integers(0, 12))
    row = st.lists(near | few | st.just(-1) | bad, min_size=width, max_size=width)
    rows = draw(st.lists(row, min_size=tokens, max_size=tokens))
    lens = draw(st.none() | st.lists(st.integers(-2, width + 3), min_size=tokens, max_size=tokens))
    return page_size, pages, dtype, width, rows, lens


@pytest.mark.parametrize("grain", GRAINS)
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=NEITHER)
@given(problem=problems(), room=st.sampled_from(["exact", "met", "one short", "0", "more", "half"]))
@example(problem=(64, 3, I32, 4, [[0, 64, 191, 0]], None), room="one short")
@example(problem=(1, 9, I32, 3, [[8, -1, 8], [2**31 - 1, 0, -(2**31)]], [3, 0]), room="met")
@example(problem=(61, 0, I64, 3, [[0, 1, 2**40]], None), room="more")
def test_both_grains_follow_the_definition(grain, problem, room, kernel_device):
    kernel, device = kernel_device
    page_size, pages, dtype, width, rows, lens = problem
    cache = pool(pages, page_size, device=device)
    _, _, count = defined(rows, lens, cache.capacity, page_size if grain is pages_of else 1, None)
    capacities = {"exact": None, "met": count, "one short": max(count - 1, 0), "0": 0, "more": count + 3}
    capacity = capacities.get(room, count // 2)
    check(grain, cache, rows, lens, capacity=capacity, dtype=dtype, width=width, kernel=kernel)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("layout", [*[m.value for m in layouts.MLAKVCacheLayout], FNUZ], ids=lambda layout: layout.name)
def test_every_layout_is_copied_byte_for_byte(layout, page_size, kernel_device):
    kernel, device = kernel_device
    cache = pool(5, page_size, layout, device)
    rows = [[cache.capacity - 1, -1, page_size], [page_size, 2 * page_size - 1, cache.capacity]]
    got, _ = check(pages_of, cache, rows, kernel=kernel)
    assert got.buffer.pages == 2
    k_scale = 0.5 if layout.needs_k_scale else 1.0
    check(rows_of, cache, rows, kernel=kernel, k_scale=k_scale)


@pytest.mark.parametrize("grain", GRAINS)
def test_nan_pages_are_copied_as_they_are(grain, kernel_device):
    kernel, device = kernel_device
    data = torch.full((3, layouts.DSV4.page_stride(2)), 0xFF, dtype=torch.uint8, device=device)
    got, _ = check(grain, PagedCache(data, layouts.DSV4, 2), [[5, 1]], kernel=kernel)
    assert grain is pages_of or got.buffer.isnan().all()


@pytest.mark.parametrize("grain", GRAINS)
def test_a_prefix_that_all_rows_share_is_gathered_once(grain, kernel_device):
    """Without deduplication the buffer would hold the prefix once a row."""
    kernel, device = kernel_device
    shared = list(range(40))
    rows = [[*shared, 100 + row] for row in range(20)]
    got, units = check(grain, pool(40, 4, device=device), rows, kernel=kernel)
    assert len(units) == (15 if grain is pages_of else 60)
    assert len(got.listed) == len(units)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
@pytest.mark.parametrize("capacity", [None, 0, 3])
@pytest.mark.parametrize("grain", GRAINS)
def test_no_indices_gather_nothing(grain, capacity, shape, kernel_device):
    kernel, device = kernel_device
    got, _ = check(grain, pool(2, 2, device=device), [[]] * shape[0], capacity=capacity, width=shape[1], kernel=kernel)
    assert got.indices.shape == shape


@pytest.mark.parametrize("dtype", [I32, I64])
@pytest.mark.parametrize("grain", GRAINS)
def test_strided_and_expanded_rows_are_read_and_written_in_place(grain, dtype, kernel_device):
    kernel, device = kernel_device
    cache = pool(6, 4, device=device)
    wide = torch.arange(40, dtype=dtype, device=device).reshape(2, 20) % 27
    target = torch.full((2, 9), 77, dtype=I32, device=device)
    unit_slots = cache.page_size if grain is pages_of else 1
    for indices in (wide[:, 3:8], wide[1:, 3:8].expand(2, 5)):
        got = grain(indices, cache=cache, capacity=30, remapped=target[:, 2:7], kernel=kernel)
        listed, remapped, count = defined(indices.tolist(), None, cache.capacity, unit_slots, 30)
        assert got.indices.data_ptr() == target[:, 2:7].data_ptr()
        assert (got.listed.tolist(), got.indices.tolist(), int(got.count)) == (listed, remapped, count)
        assert (target[:, :2] == 77).all()
        assert (target[:, 7:] == 77).all()


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("grain", GRAINS)
def test_a_given_buffer_is_written_where_something_is_gathered_and_nowhere_else(grain, count, capacity, kernel_device):
    """Four units of room, of which ``capacity`` may be used; the fifth to ninth reference must reach no memory."""
    kernel, device = kernel_device
    cache = pool(10, 2, device=device)
    rows = [[(9 - i) * 2 for i in range(count)]]
    if grain is pages_of:
        out = PagedCache(torch.full((6, 3456), 0xA5, dtype=torch.uint8, device=device)[1:5, 1728:], layouts.DSV4, 2)
        memory, untouched = out.data, 0xA5
    else:
        memory = torch.full((6, 600), 7.0, dtype=torch.bfloat16, device=device)
        out, untouched = memory[1:5, 40:552], 7.0
    whole = torch.empty(0, dtype=memory.dtype, device=device).set_(memory.untyped_storage())
    got, units = check(grain, cache, rows, capacity=capacity, out=out, width=count, kernel=kernel)
    assert got.buffer is out
    assert len(units) == min(count, 4 if capacity is None else capacity)
    written = out.page_bytes if grain is pages_of else out
    written[: len(units)] = untouched
    assert (whole == untouched).all()


@pytest.mark.parametrize("capacity", [0, 1, 3, 8])
@pytest.mark.parametrize("unit_slots", [1, 2])
def test_the_list_ends_at_the_capacity(unit_slots, capacity, kernel_device):
    kernel, device = kernel_device
    memory = torch.full((20,), 77, dtype=I32, device=device)
    listed = memory[4 : 4 + capacity].fill_(-1)
    indices = torch.tensor([[12, 3, -1, 0, 9, 15, 6]], dtype=I32, device=device)
    remapped, count = torch.full_like(indices, -1), torch.zeros(1, dtype=I32, device=device)
    registry.find("list_referenced", kernel).run(indices, None, 16, unit_slots, listed, remapped, count)
    wanted, *_ = defined(indices.tolist(), None, 16, unit_slots, capacity)
    assert memory.tolist() == [77] * 4 + wanted + [77] * (16 - capacity)


@pytest.mark.parametrize("grain", GRAINS)
def test_a_pool_larger_than_a_pass_takes_several(grain, kernel_device, monkeypatch):
    kernel, device = kernel_device
    if kernel == "triton":
        from dsv4x.common.kernels import compaction as kernels

        monkeypatch.setattr(kernels, "PASS_UNITS", 64)
    cache = pool(150, 1, device=device)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-5, 155, (4, 40), generator=generator).tolist()
    rows[0][:6] = [63, 64, 127, 128, 0, 149]
    for capacity in (None, 90, 30, 64):
        check(grain, cache, rows, [40, 33, 0, 40], capacity=capacity, kernel=kernel)


@pytest.mark.parametrize("kernel_device", [pytest.param(("triton", "cpu"), marks=pytest.mark.interpreter)])
def test_rows_longer_than_a_block_and_a_full_bitmap(kernel_device):
    """Every bit of many words, and indices of one row in several programs."""
    kernel, _ = kernel_device
    rows = [torch.randperm(4100, generator=torch.Generator().manual_seed(2)).tolist()[:1200], list(range(1200))]
    cache = pool(4100, 1, layouts.INDEXER_FP4, spread=1)
    check(pages_of, cache, rows, [1200, 1111], capacity=1500, kernel=kernel)


@pytest.mark.large
@pytest.mark.parametrize("grain", GRAINS)
def test_slots_past_2_to_the_31_are_their_own(grain, kernel_device):
    """Entries of two bytes. NumPy's zeros are not touched until written, so the pool takes no memory on a CPU."""
    kernel, device = kernel_device
    if grain is rows_of and (kernel, device) == ("triton", "cpu"):
        pytest.skip("the interpreter would take an hour over the bitmap")
    layout, page_size, pages = CacheLayout("one bf16", 0, 1, "aos", "bf16", "none", 64), 1 << 16, (1 << 15) + 2
    shape = (pages, 2 * page_size)
    data = torch.from_numpy(np.zeros(shape, np.uint8)) if device == "cpu" else torch.zeros(shape, dtype=torch.uint8)
    cache = PagedCache(data.to(device), layout, page_size)
    assert cache.capacity > 2**31
    slots = [2**31 + page_size + 5, 7, 2**31 - 1, 2**31]
    k = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.bfloat16, device=device)
    at = torch.tensor(slots, device=device)
    cache.data.view(torch.bfloat16)[at // page_size, at % page_size] = k[:, 0]
    indices = torch.tensor([[*slots, cache.capacity, 2**33 + 7]], device=device)
    got = grain(indices, cache=cache, capacity=6, kernel=kernel)
    unit_slots = cache.page_size if grain is pages_of else 1
    listed, remapped, count = defined(indices.tolist(), None, cache.capacity, unit_slots, 6)
    assert got.listed.dtype == (I32 if grain is pages_of else I64)
    assert (got.listed.tolist(), got.indices.tolist(), int(got.count)) == (listed, remapped, count)
    entries = got.buffer.data.view(torch.bfloat16).reshape(-1) if grain is pages_of else got.buffer[:, 0]
    assert entries[got.indices[0, :4].long()].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("units", "scratch"), [(0, 0), (1, 8), (32, 8), (33, 16), (4 << 20, 1 << 20), (2**33, 16 << 20)]
)
def test_scratch_is_a_quarter_byte_a_unit_up_to_a_constant(units, scratch):
    assert dsv4x.compaction_scratch_bytes(units) == scratch


@pytest.mark.interpreter
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("passes", [1, 3])
def test_nothing_is_allocated_beside_the_results_and_the_scratch_that_was_announced(grain, passes, monkeypatch):
    cache = pool(640, 2, layouts.INDEXER_FP4, spread=1)
    units = cache.pages if grain is pages_of else cache.capacity
    from dsv4x.common.kernels import compaction as kernels

    pass_units = -(-units // passes // 32) * 32
    for module in (compaction, kernels):
        monkeypatch.setattr(module, "PASS_UNITS", pass_units)
    taken = []
    for name in ("empty", "empty_like", "zeros", "full"):
        real = getattr(torch, name)

        def counted(*args, _real=real, **more):
            tensor = _real(*args, **more)
            taken.append(tensor.nbytes)
            return tensor

        monkeypatch.setattr(torch, name, counted)
    indices = torch.randint(-1, cache.capacity, (6, 50), dtype=I32)
    got = grain(indices, cache=cache, capacity=300, kernel="triton")
    buffer = got.buffer.data if grain is pages_of else got.buffer
    results = buffer.nbytes + got.indices.nbytes + got.listed.nbytes + got.count.nbytes
    assert sum(taken) == results + dsv4x.compaction_scratch_bytes(units)


LAYOUT_PAIRS = [(layouts.DSV4, layouts.DSV4), (layouts.DSV41_FP8_SOA, layouts.DSV41_FP4)]


@pytest.mark.parametrize("room", [0, 5])
@pytest.mark.parametrize("pair", LAYOUT_PAIRS, ids=lambda pair: pair[0].name)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_attention_over_the_copies_is_attention_over_the_pool(page_size, pair, room, kernel_device, make_cache, rng):
    """Bit for bit on the reference; the copies are gathered by either kernel."""
    kernel, device = kernel_device
    tokens, heads, width = 5, 3, 20
    q = (torch.randn(tokens, heads, 512, generator=rng) / 4).bfloat16().to(device)
    pool_scopes, copied_scopes = [], []
    for layout in pair:
        cache, live = make_cache(-(-200 // page_size), page_size, 60, layout, device)
        indices = live[torch.randint(60, (tokens, width), generator=rng)].int()
        indices[torch.rand(tokens, width, generator=rng) < 0.2] = -1
        indices[1, 3], indices[2, 0], indices[3] = 2**31 - 1, -(2**31), -1
        lens = torch.tensor([width, 7, width, 4, 0], dtype=I32).to(device)
        indices = indices.to(device)
        indices[1, 7:] = 2**31 - 1
        capacity = None
        if room:
            capacity = dsv4x.gather_referenced_cache_blocks(cache, indices, lens, kernel=kernel).cache.pages + room
        got = dsv4x.gather_referenced_cache_blocks(cache, indices, lens, capacity=capacity, kernel=kernel)
        assert got.cache.pages < cache.pages or page_size > 2
        pool_scopes += [cache, indices, lens]
        copied_scopes += [got.cache, got.indices, lens]
    sink = torch.randn(heads, generator=rng).to(device)
    out, lse = dsv4x.sparse_mla_decode(q, *copied_scopes, sink, kernel="reference")
    want, want_lse = dsv4x.sparse_mla_decode(q, *pool_scopes, sink, kernel="reference")
    assert out.isfinite().all()
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("room", [0, 5])
@pytest.mark.parametrize("layout", [layouts.DSV4, layouts.DSV32, layouts.UNIFORM_FP8], ids=lambda layout: layout.name)
def test_attention_over_the_rows_is_attention_over_the_pool(layout, room, kernel_device, make_cache, rng):
    kernel, device = kernel_device
    k_scale = 0.25 if layout.needs_k_scale else 1.0
    tokens, heads, width = 5, 3, 20
    q = (torch.randn(tokens, heads, layout.head_dim, generator=rng) / 4).bfloat16().to(device)
    cache, live = make_cache(7, 61, 60, layout, device, k_scale=k_scale)
    indices = live[torch.randint(60, (tokens, width), generator=rng)].int()
    indices[torch.rand(tokens, width, generator=rng) < 0.2] = -1
    indices[1, 7:], indices[3] = 2**31 - 1, -1
    indices, lens = indices.to(device), torch.tensor([width, 7, width, 4, 0], dtype=I32).to(device)
    count = int(dsv4x.gather_referenced_rows(cache, indices, lens, kernel=kernel, k_scale=k_scale).count)
    capacity = count + room if room else None
    got = dsv4x.gather_referenced_rows(cache, indices, lens, capacity=capacity, kernel=kernel, k_scale=k_scale)
    out, lse = dsv4x.sparse_mla_prefill(q, got.rows, got.indices, lens, None, 0.05, kernel="reference")
    want, want_lse = dsv4x.sparse_mla_decode(
        q, cache, indices, lens, softmax_scale=0.05, kernel="reference", swa_k_scale=k_scale
    )
    assert out.isfinite().all()
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("grain", GRAINS)
def test_a_captured_compaction_follows_its_inputs(grain):
    """Other pages, indices and spans in every replay, and in some of them more references than the capacity."""
    torch.manual_seed(5)
    cache, capacity = pool(300, 61, device="cuda"), 100
    unit_slots = cache.page_size if grain is pages_of else 1
    indices = torch.zeros(32, 640, dtype=I32, device="cuda")
    lens = torch.zeros(32, dtype=I32, device="cuda")
    grain(indices, lens=lens, cache=cache, capacity=capacity, kernel="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = grain(indices, lens=lens, cache=cache, capacity=capacity)
    for step, span in enumerate((3, 0, 640, 60, 5000)):
        cache.data.copy_(torch.randint(0, 256, cache.data.shape, dtype=torch.uint8, device="cuda"))
        first = 17 * step * unit_slots
        indices.copy_(torch.randint(first, first + max(1, span) * unit_slots, (32, 640), device="cuda"))
        indices[torch.rand(32, 640, device="cuda") < 0.1] = -1
        lens.copy_(torch.randint(-1, 700, (32,), device="cuda") * (span > 0))
        graph.replay()
        want = grain(indices, lens=lens, cache=cache, capacity=capacity, kernel="reference")
        assert int(got.count) == int(want.count)
        assert (int(want.count) > capacity) == (span > capacity)
        assert torch.equal(got.listed, want.listed)
        assert torch.equal(got.indices, want.indices)
        units = [unit for unit in want.listed.tolist() if unit >= 0]
        assert_gathered(grain, cache, got.buffer, units, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("grain", GRAINS)
def test_an_exact_size_cannot_be_captured(grain):
    cache, indices = pool(3, 2, device="cuda"), torch.zeros(2, 3, dtype=I32, device="cuda")
    says = "capacity: got None while a graph is being captured"
    with pytest.raises(ValueError, match=says), torch.cuda.graph(torch.cuda.CUDAGraph()):
        grain(indices, cache=cache)
    says = "a graph is being captured"
    with pytest.raises(dsv4x.KernelNotSupported, match=says), torch.cuda.graph(torch.cuda.CUDAGraph()):
        grain(indices, cache=cache, capacity=2, kernel="reference")


@pytest.mark.gpu
@pytest.mark.parametrize("grain", GRAINS)
def test_peak_memory_is_the_results_and_the_announced_scratch(grain):
    """Four million slots and a million references; the slack is the prefix sum's own and the allocator's rounding."""
    cache = PagedCache.zeros(1 << 16, CacheLayout("one bf16", 0, 1, "aos", "bf16", "none", 64), 64, "cuda")
    indices = torch.randint(0, 5000, (2000, 640), dtype=I32, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = grain(indices, cache=cache, capacity=5000, kernel="triton")
        peak = torch.cuda.max_memory_allocated() - before
    buffer = got.buffer.data if grain is pages_of else got.buffer
    results = buffer.nbytes + got.indices.nbytes + got.listed.nbytes + got.count.nbytes
    units = cache.pages if grain is pages_of else cache.capacity
    assert peak <= results + dsv4x.compaction_scratch_bytes(units) + (1 << 19)
