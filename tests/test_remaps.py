"""Remaps between index spaces against plain Python, with holes, hostile values, and contents changed under a graph."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsv4x

INT32_END = 2**31
HOSTILE = [-(2**31), -2, -1, 0, 1, 2**31 - 1]
HOSTILE_64 = [*HOSTILE, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), -(2**40)]

int32 = partial(torch.tensor, dtype=torch.int32)
properties = settings(
    max_examples=30, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
dtypes = st.sampled_from([torch.int32, torch.int64])


def numbers(low, high, dtype):
    """Mostly from a small range, sometimes what no server should send."""
    hostile = st.sampled_from(HOSTILE if dtype == torch.int32 else HOSTILE_64)
    return st.integers(low, high) | st.integers(low, high) | hostile


def vector(draw, count, low, high, dtype):
    return draw(st.lists(numbers(low, high, dtype), min_size=count, max_size=count))


def matrix(draw, rows, columns, low, high, dtype):
    """Rows with holes and duplicates, some longer than a block where the size allows."""
    return [vector(draw, columns, low, high, dtype) for _ in range(rows)]


def tensor(values, dtype, device, shape=None):
    made = torch.tensor(values, dtype=dtype)
    return (made if shape is None else made.reshape(shape)).to(device)


def wider(rows):
    """The same rows as a view into a wider tensor that holds other numbers."""
    padded = torch.full((rows.shape[0], rows.shape[1] + 3), 7, dtype=rows.dtype, device=rows.device)
    padded[:, : rows.shape[1]] = rows
    return padded[:, : rows.shape[1]]


def span(length, width):
    return width if length is None else min(max(length, 0), width)


def fits(value):
    return value if 0 <= value < INT32_END else -1


@st.composite
def locals_of_requests(draw):
    dtype, tokens, columns, requests = (
        draw(dtypes),
        draw(st.integers(0, 4)),
        draw(st.integers(0, 5)),
        draw(st.integers(0, 3)),
    )
    return (
        dtype,
        matrix(draw, tokens, columns, -2, 12, dtype),
        vector(draw, tokens, -1, requests, dtype),
        vector(draw, tokens, 0, 12, dtype),
        vector(draw, requests, 0, 100, dtype),
        columns,
    )


@properties
@given(case=locals_of_requests(), strided=st.booleans())
def test_local_to_workspace_rows(case, strided, kernel_device):
    kernel, device = kernel_device
    dtype, local, request, limits, bases, columns = case
    rows = tensor(local, dtype, device, (len(local), columns))
    got = dsv4x.local_to_workspace_rows(
        wider(rows) if strided else rows,
        *(tensor(v, dtype, device) for v in (request, limits, bases)),
        kernel=kernel,
    )
    assert got.dtype == torch.int32
    want = [
        [fits(bases[r] + x) if 0 <= r < len(bases) and bases[r] >= 0 and 0 <= x < limit else -1 for x in row]
        for row, r, limit in zip(local, request, limits)
    ]
    assert got.tolist() == want


def test_no_base_is_added_to_a_hole(kernel_device):
    """A peer adds the request's base to -1 and reads the previous request's last row."""
    kernel, device = kernel_device
    ints = ([[-1, 2, -1, 5, 0]], [1], [5], [100, 1000])
    got = dsv4x.local_to_workspace_rows(*(int32(x).to(device) for x in ints), kernel=kernel)
    assert got.tolist() == [[-1, 1002, -1, -1, 1000]]


def test_rows_end_where_int32_does(kernel_device):
    kernel, device = kernel_device
    local = int32([[0, 1, 2, 3]]).to(device)
    bases = torch.tensor([2**31 - 3], device=device)
    one, limit = int32([0]).to(device), int32([4]).to(device)
    got = dsv4x.local_to_workspace_rows(local, one, limit, bases, kernel=kernel)
    assert got.tolist() == [[2**31 - 3, 2**31 - 2, 2**31 - 1, -1]]


@properties
@given(case=locals_of_requests(), page_size=st.sampled_from([1, 3]), table=st.data())
def test_local_to_slots_takes_whatever_stands_there(case, page_size, table, kernel_device):
    kernel, device = kernel_device
    dtype, local, request, limits, bases, columns = case
    pages, requests, table_columns = 7, len(bases), table.draw(st.integers(0, 4))
    rows = matrix(table.draw, requests, table_columns, -1, pages, torch.int32)
    got = dsv4x.local_to_slots(
        tensor(local, dtype, device, (len(local), columns)),
        tensor(request, dtype, device),
        tensor(limits, dtype, device),
        tensor(rows, torch.int32, device, (requests, table_columns)),
        page_size,
        pages,
        kernel=kernel,
    )

    def slot(r, x):
        page = rows[r][x // page_size] if x // page_size < table_columns else -1
        return page * page_size + x % page_size if 0 <= page < pages else -1

    want = [
        [slot(r, x) if 0 <= r < requests and 0 <= x < limit else -1 for x in row]
        for row, r, limit in zip(local, request, limits)
    ]
    assert got.tolist() == want


@st.composite
def slots_and_maps(draw):
    dtype, page_size, pages = draw(dtypes), draw(st.sampled_from([1, 2, 61])), draw(st.integers(0, 5))
    rows, columns = draw(st.none() | st.integers(0, 3)), draw(st.integers(0, 5))
    slots = matrix(draw, 1 if rows is None else rows, columns, -2, pages * page_size, dtype)
    return dtype, page_size, rows, columns, slots, vector(draw, pages, -1, pages, torch.int32)


@properties
@given(case=slots_and_maps())
def test_slots_to_compact_slots(case, kernel_device):
    kernel, device = kernel_device
    dtype, page_size, rows, columns, slots, page_map = case
    given_slots = tensor(slots, dtype, device, (columns,) if rows is None else (rows, columns))
    if rows is not None:
        given_slots = wider(given_slots)
    got = dsv4x.slots_to_compact_slots(given_slots, int32(page_map).to(device), page_size, kernel=kernel)
    assert got.dtype == torch.int32

    def compact(slot):
        page, offset = divmod(slot, page_size)
        kept = 0 <= page < len(page_map) and page_map[page] >= 0
        return fits(page_map[page] * page_size + offset) if kept else -1

    want = [[compact(slot) for slot in row] for row in slots]
    assert got.tolist() == (want[0] if rows is None else want)


def test_a_long_row_of_slots_is_compacted_to_its_end(kernel_device, rng):
    """Longer than a block, and its pool longer than int32 slots reach."""
    kernel, device = kernel_device
    page_map = torch.tensor([-1, 3, 2**25, 0], dtype=torch.int32)
    slots = torch.randint(-5, 4 * 64 + 5, (1300,), generator=rng)
    want = [
        page_map[s // 64].item() * 64 + s % 64 if 0 <= s < 256 and s // 64 in (1, 3) else -1 for s in slots.tolist()
    ]
    got = dsv4x.slots_to_compact_slots(slots.to(device), page_map.to(device), 64, kernel=kernel)
    assert got.tolist() == want
    many = torch.full((40_000_000,), -1, dtype=torch.int32)
    many[39_999_999] = 6
    far = torch.tensor([39_999_999 * 64 + 5, 40_000_000 * 64])
    assert dsv4x.slots_to_compact_slots(far.to(device), many.to(device), 64, kernel=kernel).tolist() == [389, -1]


@st.composite
def rows_with_holes(draw):
    dtype, tokens, columns = draw(dtypes), draw(st.integers(0, 5)), draw(st.integers(0, 6))
    lens = draw(st.none() | st.just(True))
    return (
        dtype,
        columns,
        matrix(draw, tokens, columns, -2, 9, dtype),
        lens and vector(draw, tokens, 0, columns, dtype),
        draw(st.sampled_from([None, 0, 1, 5, 2**31])),
    )


def entries_of(rows, lens, upper):
    upper = INT32_END if upper is None else upper
    lens = [None] * len(rows) if lens is None else lens
    return [[x for x in row[: span(length, len(row))] if 0 <= x < upper] for row, length in zip(rows, lens)]


@properties
@given(case=rows_with_holes(), spare=st.integers(-4, 2), strided=st.booleans())
def test_dense_to_ragged(case, spare, strided, kernel_device):
    kernel, device = kernel_device
    dtype, columns, rows, lens, upper = case
    want = entries_of(rows, lens, upper)
    flat = list(itertools.chain(*want))
    capacity = max(len(flat) + spare, 0)
    indices = tensor(rows, dtype, device, (len(rows), columns))
    values, indptr, count = dsv4x.dense_to_ragged(
        wider(indices) if strided else indices,
        None if lens is None else tensor(lens, dtype, device),
        capacity=capacity,
        upper=upper,
        kernel=kernel,
    )
    assert values.dtype == indptr.dtype == count.dtype == torch.int32
    assert values.tolist() == flat[:capacity] + [-1] * (capacity - len(flat))
    ends = itertools.accumulate([len(row) for row in want], initial=0)
    assert indptr.tolist() == [min(end, capacity) for end in ends]
    assert count.tolist() == [len(flat)]


def test_long_rows_become_ragged_in_order(kernel_device, rng):
    """Rows of more than two blocks: each block's entries follow those of the one before."""
    kernel, device = kernel_device
    rows = torch.randint(-40, 90, (3, 1100), dtype=torch.int32, generator=rng)
    lens = [1100, 700, 3000]
    want = entries_of(rows.tolist(), lens, 80)
    flat = list(itertools.chain(*want))
    for capacity in (len(flat), len(flat) - len(want[2]) // 2, len(want[0]) - 1):
        values, indptr, count = dsv4x.dense_to_ragged(
            rows.to(device), int32(lens).to(device), capacity=capacity, upper=80, kernel=kernel
        )
        assert values.tolist() == flat[:capacity]
        assert indptr.tolist() == [min(e, capacity) for e in itertools.accumulate(map(len, want), initial=0)]
        assert count.tolist() == [len(flat)]


@st.composite
def flat_lists(draw):
    dtype, total = draw(dtypes), draw(st.integers(0, 9))
    values = vector(draw, total, -2, 50, torch.int32)
    starts = vector(draw, draw(st.integers(1, 5)), -2, total + 2, dtype)
    return dtype, values, sorted(starts) if draw(st.booleans()) else starts, draw(st.integers(0, 5))


@properties
@given(case=flat_lists())
def test_ragged_to_dense(case, kernel_device):
    kernel, device = kernel_device
    dtype, values, indptr, width = case
    got, lens = dsv4x.ragged_to_dense(int32(values).to(device), tensor(indptr, dtype, device), width, kernel=kernel)
    assert got.dtype == lens.dtype == torch.int32
    rows = []
    for start, end in itertools.pairwise(indptr):
        rows.append([max(values[i], -1) for i in range(len(values)) if start <= i < end][:width])
    assert got.tolist() == [row + [-1] * (width - len(row)) for row in rows]
    assert lens.tolist() == [len(row) for row in rows]


def test_rows_survive_the_way_there_and_back(kernel_device, rng):
    kernel, device = kernel_device
    rows = torch.randint(0, 1000, (4, 700), dtype=torch.int32, generator=rng)
    lens = int32([700, 0, 513, 1])
    values, indptr, _ = dsv4x.dense_to_ragged(rows.to(device), lens.to(device), capacity=2000, kernel=kernel)
    back, spans = dsv4x.ragged_to_dense(values, indptr, 700, kernel=kernel)
    assert spans.tolist() == lens.tolist()
    for t, length in enumerate(lens.tolist()):
        assert back[t].tolist() == rows[t, :length].tolist() + [-1] * (700 - length)


@st.composite
def two_halves(draw):
    tokens, s_kv_swa = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 10, 2**31 - 3, 2**31 - 1]))
    halves = []
    for high in (min(s_kv_swa, 12), 12):
        dtype, columns = draw(dtypes), draw(st.integers(0, 5))
        lens = draw(st.none() | st.just(True)) and vector(draw, tokens, 0, columns, dtype)
        halves.append((dtype, columns, matrix(draw, tokens, columns, -2, high, dtype), lens))
    return tokens, s_kv_swa, halves


def combined(swa_rows, swa_lens, extra_rows, extra_lens, s_kv_swa):
    packed = []
    for t, (swa, extra) in enumerate(zip(swa_rows, extra_rows)):
        swa = swa[: span(None if swa_lens is None else swa_lens[t], len(swa))]
        extra = extra[: span(None if extra_lens is None else extra_lens[t], len(extra))]
        row = [x if 0 <= x < s_kv_swa else -1 for x in swa]
        packed.append(row + [fits(x + s_kv_swa) if x >= 0 else -1 for x in extra])
    return packed


@properties
@given(case=two_halves(), strided=st.booleans())
def test_combine_swa_extra_indices(case, strided, kernel_device):
    kernel, device = kernel_device
    tokens, s_kv_swa, halves = case
    arguments, plain = [], []
    for dtype, columns, rows, lens in halves:
        indices = tensor(rows, dtype, device, (tokens, columns))
        arguments += [wider(indices) if strided else indices, None if lens is None else tensor(lens, dtype, device)]
        plain += [rows, lens]
    got, lens = dsv4x.combine_swa_extra_indices(*arguments, s_kv_swa, kernel=kernel)
    assert got.dtype == lens.dtype == torch.int32
    width = 128 if halves[0][1] + halves[1][1] else 0
    want = combined(*plain, s_kv_swa)
    assert got.tolist() == [row + [-1] * (width - len(row)) for row in want]
    assert lens.tolist() == [len(row) for row in want]


@pytest.mark.parametrize("out_width", [None, 768, 1024])
def test_wide_halves_are_packed_into_the_callers_buffers(out_width, kernel_device, rng):
    kernel, device = kernel_device
    swa = torch.randint(-2, 50, (3, 128), dtype=torch.int32, generator=rng)
    extra = torch.randint(-2, 900, (3, 600), dtype=torch.int32, generator=rng)
    lens = [0, 128, 77], [600, 1, 530]
    out = out_lens = None
    if out_width is not None:
        # Rows of a larger buffer, full of what an earlier step left.
        out = torch.full((3, out_width + 128), 77, dtype=torch.int32, device=device)[:, :out_width]
        out_lens = torch.full((3,), 77, dtype=torch.int32, device=device)
    got, got_lens = dsv4x.combine_swa_extra_indices(
        swa.to(device), int32(lens[0]).to(device), extra.to(device), int32(lens[1]).to(device), 40,
        out, out_lens, kernel=kernel,
    )  # fmt: skip
    assert out is None or (got is out and got_lens is out_lens)
    want = combined(swa.tolist(), lens[0], extra.tolist(), lens[1], 40)
    assert got.tolist() == [row + [-1] * ((out_width or 768) - len(row)) for row in want]
    assert got_lens.tolist() == [600, 129, 607]


def gathered_tokens(query_lens, seq_lens, window):
    """(request, position) of every gathered token, and each request's first row."""
    rows, starts = [], [0]
    for r, (queries, length) in enumerate(zip(query_lens, seq_lens)):
        if queries > 0:
            rows += [(r, p) for p in range(max(0, length - queries - (window - 1)), length)]
        starts.append(len(rows))
    return rows, starts


@properties
@given(
    dtype=dtypes,
    requests=st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 30)), max_size=6),
    window=st.sampled_from([1, 2, 8, 128]),
    begin=st.integers(0, 9),
    spare=st.integers(-9, 3),
)
def test_build_swa_token_ids(dtype, requests, window, begin, spare, kernel_device):
    kernel, device = kernel_device
    query_lens = [queries for queries, _ in requests]
    seq_lens = [max(queries, 0) + prefix for queries, prefix in requests]
    want, starts = gathered_tokens(query_lens, seq_lens, window)
    total = max(len(want) + spare, 0)
    token_ids, request, got_starts = dsv4x.build_swa_token_ids(
        tensor(list(itertools.accumulate(query_lens, initial=begin)), dtype, device),
        tensor(seq_lens, dtype, device),
        window,
        total,
        kernel=kernel,
    )
    assert token_ids.dtype == request.dtype == got_starts.dtype == torch.int32
    want = (want + [(-1, -1)] * 3)[:total]
    assert request.tolist() == [r for r, _ in want]
    assert token_ids.tolist() == [p for _, p in want]
    assert got_starts.tolist() == starts


def test_many_requests_find_their_rows(kernel_device, rng):
    """More rows than a block and more requests than a power of two, empty ones at both ends."""
    kernel, device = kernel_device
    query_lens = [0, *torch.randint(0, 4, (130,), generator=rng).tolist(), 0]
    seq_lens = [q + x for q, x in zip(query_lens, torch.randint(0, 30, (132,), generator=rng).tolist())]
    want, starts = gathered_tokens(query_lens, seq_lens, 16)
    loc = int32(list(itertools.accumulate(query_lens, initial=0))).to(device)
    token_ids, request, got_starts = dsv4x.build_swa_token_ids(
        loc, int32(seq_lens).to(device), 16, len(want), kernel=kernel
    )
    assert len(want) > 1024
    assert list(zip(request.tolist(), token_ids.tolist())) == want
    assert got_starts.tolist() == starts


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_garbage_lengths_stay_inside(dtype, kernel_device):
    """Every pair of hostile values as one request's lengths, a good request in front: it at least is right."""
    kernel, device = kernel_device
    hostile = HOSTILE if dtype == torch.int32 else HOSTILE_64
    for after, length in itertools.product(hostile, hostile):
        token_ids, request, starts = dsv4x.build_swa_token_ids(
            tensor([0, 2, after], dtype, device), tensor([5, length], dtype, device), 3, 20, kernel=kernel
        )
        assert token_ids[:4].tolist() == [1, 2, 3, 4]
        assert request[:4].tolist() == [0] * 4
        assert starts[:2].tolist() == [0, 4]
        assert 4 <= int(starts[2]) < INT32_END
        rest = max(min(int(starts[2]), 20) - 4, 0)
        assert request[4:].tolist() == [1] * rest + [-1] * (16 - rest)
        assert all(0 <= p < max(length, 0) for p in token_ids[4 : 4 + rest].tolist())


def test_token_ids_lead_to_the_slots_a_window_reads(kernel_device, rng):
    """The recipe of the docstring: gathered rows cover every window, and combine finds them there."""
    kernel, device = kernel_device
    query_lens, seq_lens, window, page_size = [3, 0, 1], [9, 6, 70], 8, 4
    loc = int32(list(itertools.accumulate(query_lens, initial=0))).to(device)
    lengths = int32(seq_lens).to(device)
    table = torch.randperm(3 * 18, generator=rng).int().reshape(3, 18).to(device)
    total = gathered_tokens(query_lens, seq_lens, window)[1][-1]
    token_ids, request, starts = dsv4x.build_swa_token_ids(loc, lengths, window, total + 2, kernel=kernel)
    slots = dsv4x.local_to_slots(token_ids[:, None], request, token_ids + 1, table, page_size, 54, kernel=kernel)[:, 0]
    zero = torch.zeros_like(lengths)
    rows, lens = dsv4x.combine_topk_swa_indices(
        torch.zeros(4, 0, dtype=torch.int32, device=device), loc, lengths, starts.diff(), zero, starts[:-1],
        window, 1, 0, row_slots=slots, kernel=kernel,
    )  # fmt: skip
    want, want_lens = dsv4x.window_slots(loc, lengths, table, page_size, 54, window, 4, kernel=kernel)
    assert lens.tolist() == want_lens.tolist()
    for t, length in enumerate(lens.tolist()):
        assert slots[rows[t, :length].long()].tolist() == want[t, :length].tolist()


def test_positions_of_their_own_give_windows_too(kernel_device):
    """The recipe of window_slots' docstring, on positions that are no contiguous tail."""
    kernel, device = kernel_device
    positions, request = int32([5, 7, 9, 0]).to(device), int32([0, 0, 0, 1]).to(device)
    table = int32([[4, 0, 3, 1, 2], [5, 99, -1, 7, 8]]).to(device)
    first = (positions - 3 + 1).clamp_min(0)
    local = first[:, None] + torch.arange(3, dtype=torch.int32, device=device)
    got = dsv4x.local_to_slots(local, request, positions + 1, table, 2, 6, kernel=kernel)
    assert got.tolist() == [[1, 6, 7], [7, 2, 3], [3, 4, 5], [10, -1, -1]]


def contents(seed, device):
    """The tensors of each op's call, their shapes fixed and their values drawn from ``seed``."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        values = torch.randint(low, high, shape, dtype=torch.int32, generator=rng)
        values[torch.rand(shape, generator=rng) < 0.1] = -1
        return values.to(device)

    def ascending(count, step):
        return torch.randint(0, step, (count,), generator=rng).cumsum(0).int().to(device)

    return {
        "window_slots": (ascending(4, 4), draw(0, 90, 3).abs(), draw(0, 40, 3, 9)),
        "local_to_slots": (draw(-1, 300, 9, 600), draw(0, 3, 9), draw(0, 300, 9), draw(0, 40, 3, 9)),
        "local_to_workspace_rows": (draw(-1, 300, 9, 600), draw(0, 3, 9), draw(0, 300, 9), draw(0, 9999, 3)),
        "slots_to_compact_slots": (draw(0, 640, 9, 600).long(), draw(0, 20, 10)),
        "dense_to_ragged": (draw(0, 500, 9, 600), draw(0, 700, 9)),
        "ragged_to_dense": (draw(0, 500, 2000), ascending(10, 500)),
        "combine_swa_extra_indices": (draw(0, 60, 9, 128), draw(0, 140, 9), draw(0, 900, 9, 512), draw(0, 600, 9)),
        "build_swa_token_ids": (ascending(4, 9), draw(0, 90, 3).abs()),
    }


REST = {
    "window_slots": ((16, 30, 20, 14), {}),
    "local_to_slots": ((16, 30), {}),
    "local_to_workspace_rows": ((), {}),
    "slots_to_compact_slots": ((64,), {}),
    "dense_to_ragged": ((), {"capacity": 2500, "upper": 450}),
    "ragged_to_dense": ((300,), {}),
    "combine_swa_extra_indices": ((50,), {}),
    "build_swa_token_ids": ((20, 60), {}),
}


def results(name, tensors, kernel):
    more, options = REST[name]
    got = getattr(dsv4x, name)(*tensors, *more, **options, kernel=kernel)
    return got if isinstance(got, tuple) else (got,)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", REST)
def test_kernels_agree_on_what_the_graphs_are_given(name):
    for seed in range(3):
        tensors = contents(seed, "cpu")[name]
        for got, want in zip(results(name, tensors, "triton"), results(name, tensors, "reference"), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", REST)
def test_a_captured_remap_follows_its_contents(name):
    tensors = contents(0, "cuda")[name]
    results(name, tensors, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(name, tensors, "triton")
    for seed in range(1, 5):
        for tensor_, other in zip(tensors, contents(seed, "cuda")[name]):
            tensor_.copy_(other)
        graph.replay()
        for got, want in zip(captured, results(name, tensors, "reference"), strict=True):
            assert torch.equal(got, want)


CHECKED = [
    ("slots_to_compact_slots", lambda: (int32([0, 5, -2, 9]), int32([0, 1])), (4,), {}, "slots: slot -2 in row 2"),
    ("slots_to_compact_slots", lambda: (int32([[0, 8]]), int32([0, 1])), (4,), {},
     "slots: slot 8 in row 0, column 1, need -1 or 0 to 7"),
    ("dense_to_ragged", lambda: (int32([[0, 3], [4, 9]]), int32([2, 1])), (), {"capacity": 4, "upper": 4},
     "indices: index 4 in row 1, column 0, need -1 or 0 to 3"),
    ("dense_to_ragged", lambda: (int32([[0, 3]]), int32([3])), (), {"capacity": 4}, "length 3 in row 0, need 0 to 2"),
    ("dense_to_ragged", lambda: (int32([[0, 3, -1]]), None), (), {"capacity": 1}, "capacity: got 1, need >= 2"),
    ("ragged_to_dense", lambda: (int32([1, 2, 3]), int32([0, 2, 1, 3])), (2,), {}, "indptr: 1 at 2, need 2 to 3"),
    ("ragged_to_dense", lambda: (int32([1, 2, 3]), int32([0, 4])), (2,), {}, "indptr: 4 at 1, need 0 to 3"),
    ("ragged_to_dense", lambda: (int32([1, 2, 3]), int32([-1, 3])), (2,), {}, "indptr: -1 at 0, need 0 to 3"),
    ("combine_swa_extra_indices", lambda: (int32([[0, 5]]), None, int32([[7]]), None), (5,), {},
     "swa_indices: workspace row 5 in row 0, column 1, need -1 or 0 to 4"),
    ("combine_swa_extra_indices", lambda: (int32([[0]]), None, int32([[7], [-3]])[1:], None), (5,), {},
     "extra_indices: workspace row -3 in row 0, column 0"),
    ("combine_swa_extra_indices", lambda: (int32([[0]]), None, int32([[7]]), int32([2])), (5,), {},
     "extra_indices: length 2 in row 0, need 0 to 1"),
    ("build_swa_token_ids", lambda: (int32([0, 2]), int32([9])), (3, 3), {}, "total: got 3, need >= 4"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tensors", "more", "options", "says"), CHECKED)
def test_checked_values_are_named(name, tensors, more, options, says, monkeypatch):
    op = getattr(dsv4x, name)
    op(*tensors(), *more, **options)
    monkeypatch.setenv("DSV4X_CHECK", "1")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        op(*tensors(), *more, **options)
    assert says in str(raised.value)


def test_good_values_pass_the_checks(kernel_device, monkeypatch):
    kernel, device = kernel_device
    monkeypatch.setenv("DSV4X_CHECK", "1")

    def ints(*values):
        return [int32(v).to(device) for v in values]

    assert dsv4x.slots_to_compact_slots(*ints([7, -1], [-1, 0]), 4, kernel=kernel).tolist() == [3, -1]
    values, indptr, _ = dsv4x.dense_to_ragged(*ints([[3, 99], [-1, 0]], [1, 2]), capacity=2, upper=4, kernel=kernel)
    assert values.tolist() == [3, 0]
    assert dsv4x.ragged_to_dense(values, indptr, 1, kernel=kernel)[0].tolist() == [[3], [0]]
    rows, lens = dsv4x.combine_swa_extra_indices(*ints([[4, 99]], [1], [[0, -1]]), None, 5, kernel=kernel)
    assert rows[0, :3].tolist() == [4, 5, -1]
    assert lens.tolist() == [3]
    assert dsv4x.build_swa_token_ids(*ints([0, 2], [9]), 3, 4, kernel=kernel)[0].tolist() == [5, 6, 7, 8]
