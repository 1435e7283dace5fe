"""Index remaps against definitions written out token by token from their docstrings."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsv4x
from dsv4x.common.ops import indices

PAGE_SIZES = [1, 2, 61, 64]
GARBAGE = [-1, -2, -(2**31), 2**31 - 1, 1_000_000_007]
int32 = partial(torch.tensor, dtype=torch.int32)


def queries(starts, seq_lens, tokens):
    """(request, position) of every query token; None for tokens of no request."""
    owners = [None] * tokens
    for r in range(len(seq_lens)):
        count = starts[r + 1] - starts[r]
        for j in range(count):
            owners[starts[r] - starts[0] + j] = (r, seq_lens[r] - count + j)
    return owners


def combined(
    topk_rows, starts, seq_lens, gather_lens, compressed_base, swa_base, window, ratio, topk, width, slots=None
):
    rows, lens = [], []
    for row, owner in zip(topk_rows, queries(starts, seq_lens, len(topk_rows))):
        packed = []
        if owner is not None:
            r, p = owner
            for local in row[:topk]:
                value = compressed_base[r] + local
                backed = slots is None or (0 <= value < len(slots) and slots[value] >= 0)
                if 0 <= local < (p + 1) // ratio and backed:
                    packed.append(value)
            gathered = range(seq_lens[r] - gather_lens[r], seq_lens[r])
            for x in range(p + 1 - min(p + 1, window), p + 1):
                packed.append(swa_base[r] + gathered.index(x) if x in gathered else -1)
        lens.append(len(packed))
        if slots is not None:
            packed = [row if 0 <= row < len(slots) and slots[row] >= 0 else -1 for row in packed]
        rows.append(packed + [-1] * (width - len(packed)))
    return rows, lens


def run_combined(case, kernel_device, index_dtype=torch.int32, out_width=None, out_lens=None, slots=None):
    kernel, device = kernel_device
    rows, starts, seq_lens, gather_lens, compressed_base, swa_base, window, ratio, topk = case
    columns = len(rows[0]) if rows else 3
    topk_indices = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), columns)
    vectors = [
        torch.tensor(v, dtype=index_dtype, device=device)
        for v in (starts, seq_lens, gather_lens, compressed_base, swa_base)
    ]
    width = -(-(topk + window) // 128) * 128
    out = None
    if out_width is not None:
        width = out_width
        out = torch.full((len(rows), width), 77, dtype=torch.int32, device=device)
    got, lens = dsv4x.combine_topk_swa_indices(
        topk_indices.to(device),
        *vectors,
        window,
        ratio,
        topk,
        out,
        out_lens,
        kernel=kernel,
        row_slots=None if slots is None else int32(slots).to(device),
    )
    assert got.dtype == lens.dtype == torch.int32
    assert out is None or got is out
    want_rows, want_lens = combined(*case, width, slots)
    assert got.cpu().tolist() == want_rows
    assert lens.cpu().tolist() == want_lens
    return got, lens


def bases(seq_lens, gather_lens, ratio):
    """Bases with gaps between requests, so that a base of the wrong request shows."""
    compressed, swa, row = [], [], 5
    for seq, gathered in zip(seq_lens, gather_lens):
        compressed.append(row)
        row += seq // ratio + 3
        swa.append(row)
        row += gathered + 7
    return compressed, swa


def make_case(rng, query_lens, seq_lens, *, columns, topk, window, ratio, padding=0, start=0, gather_lens=None):
    starts = [start]
    for q in query_lens:
        starts.append(starts[-1] + q)
    tokens = starts[-1] - start + padding
    if gather_lens is None:
        gather_lens = [min(s, q + window - 1) for q, s in zip(query_lens, seq_lens)]
    highest = max([s // ratio for s in seq_lens], default=0) + 3
    rows = torch.randint(-2, highest, (tokens, columns), generator=rng)
    rows[torch.rand(tokens, columns, generator=rng) < 0.1] = -1
    rows[torch.rand(tokens, columns, generator=rng) < 0.05] = 2**31 - 1
    rows[torch.rand(tokens, columns, generator=rng) < 0.05] = -(2**31)
    return (
        rows.tolist(),
        starts,
        list(seq_lens),
        gather_lens,
        *bases(seq_lens, gather_lens, ratio),
        window,
        ratio,
        topk,
    )


CASES = {
    "prefill with and without a prefix": {"query_lens": [7, 5], "seq_lens": [7, 40]},
    "decode and verify": {"query_lens": [1, 4, 1], "seq_lens": [30, 33, 1]},
    "requests without queries": {"query_lens": [0, 2, 0, 0, 3, 0], "seq_lens": [9, 20, 0, 7, 3, 11]},
    "padded tokens": {"query_lens": [2, 1], "seq_lens": [8, 5], "padding": 3},
    "only padding": {"query_lens": [0], "seq_lens": [12], "padding": 2},
    "no requests": {"query_lens": [], "seq_lens": [], "padding": 2},
    "a slice of a larger batch": {"query_lens": [3, 2], "seq_lens": [12, 30], "start": 17},
    "fewer columns than topk": {"query_lens": [3], "seq_lens": [60], "columns": 5, "topk": 20},
    "more columns than topk": {"query_lens": [3], "seq_lens": [60], "columns": 30, "topk": 4},
    "topk 0": {"query_lens": [3], "seq_lens": [60], "topk": 0},
    "no columns": {"query_lens": [3], "seq_lens": [60], "columns": 0},
    "window 0": {"query_lens": [3], "seq_lens": [60], "window": 0},
    "window of one": {"query_lens": [3, 1], "seq_lens": [60, 2], "window": 1},
    "every entry": {"query_lens": [4], "seq_lens": [600], "ratio": 128, "columns": 4, "topk": 4},
    "window only": {"query_lens": [4], "seq_lens": [30], "ratio": 1, "columns": 0, "topk": 0},
    "short gathers": {"query_lens": [4, 3, 2], "seq_lens": [30, 12, 9], "gather_lens": [6, 0, 9]},
    "a row longer than one block": {"query_lens": [2], "seq_lens": [3000], "columns": 640, "topk": 600, "window": 128},
}


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", CASES)
def test_combined_rows_follow_the_definition(name, index_dtype, kernel_device, rng):
    case = make_case(rng, **{"columns": 9, "topk": 9, "window": 16, "ratio": 4, **CASES[name]})
    run_combined(case, kernel_device, index_dtype)


def test_holes_get_no_base_and_cost_no_entry_behind_them(kernel_device):
    # One peer adds the request's base to -1 and reads the previous request's last row; others stop too early.
    case = ([[-1, 2, -1, 0, -1]], [0, 1], [20], [4], [1000], [2000], 4, 4, 5)
    got, lens = run_combined(case, kernel_device)
    assert got[0, :7].tolist() == [1002, 1000, 2000, 2001, 2002, 2003, -1]
    assert lens.tolist() == [6]


def test_a_base_that_leads_past_int32_makes_no_entry(kernel_device):
    kernel, device = kernel_device
    vectors = ([0, 1], [20], [4], [2**31 - 2], [-2])
    got, lens = dsv4x.combine_topk_swa_indices(
        int32([[0, 1, 2, 3, 4]]).to(device), *(torch.tensor(v, device=device) for v in vectors), 4, 4, 5, kernel=kernel
    )
    assert got[0, :7].tolist() == [2**31 - 2, 2**31 - 1, -1, -1, 0, 1, -1]
    assert lens.tolist() == [6]


@pytest.mark.parametrize("rows", [0, 1, 40, 400])
def test_rows_that_no_page_backs_are_no_entries(rows, kernel_device, rng):
    """A workspace row without a slot was never written; nor was any row past the workspace."""
    case = make_case(rng, [3, 2, 1], [30, 40, 7], columns=9, topk=9, window=16, ratio=4, padding=1)
    slots = torch.where(torch.rand(rows, generator=rng) < 0.3, -1, torch.arange(rows)).tolist()
    got, _ = run_combined(case, kernel_device, slots=slots)
    if rows == 400:
        assert (got >= 0).any()


@pytest.mark.parametrize("out_width", [128, 256, 640])
def test_a_wider_buffer_is_filled_to_its_end(out_width, kernel_device, rng):
    _, device = kernel_device
    case = make_case(rng, [3, 1], [30, 9], columns=6, topk=6, window=20, ratio=4)
    out_lens = torch.full((4,), 77, dtype=torch.int32, device=device)
    assert run_combined(case, kernel_device, out_width=out_width, out_lens=out_lens)[1] is out_lens


@pytest.mark.parametrize(("topk", "window", "width"), [(0, 0, 0), (0, 1, 128), (512, 128, 640), (1, 128, 256)])
def test_combined_width_is_the_next_multiple_of_128(topk, window, width):
    assert dsv4x.combined_topk_width(topk, window) == width


def test_no_tokens_is_no_work(kernel_device, rng):
    run_combined(make_case(rng, [0, 0], [3, 0], columns=3, topk=3, window=4, ratio=4), kernel_device)


RAGGED = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(0, 40)), min_size=0, max_size=4)


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=RAGGED,
    columns=st.integers(0, 12),
    topk=st.integers(0, 12),
    window=st.integers(0, 20),
    ratio=st.sampled_from([1, 2, 4, 128]),
    padding=st.integers(0, 2),
    start=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_combined_rows_follow_the_definition_on_ragged_batches(
    requests, columns, topk, window, ratio, padding, start, seed, kernel_device
):
    query_lens = [q for q, _, _ in requests]
    seq_lens = [q + prefix for q, prefix, _ in requests]
    gather_lens = [min(gathered, seq) for (_, _, gathered), seq in zip(requests, seq_lens)]
    case = make_case(
        torch.Generator().manual_seed(seed), query_lens, seq_lens,
        columns=columns, topk=topk, window=window, ratio=ratio, padding=padding, start=start, gather_lens=gather_lens,
    )  # fmt: skip
    run_combined(case, kernel_device)


def block_table(rng, entries, page_size, pages, columns):
    """Rows of distinct pages in random order; garbage past each request's own."""
    order = torch.randperm(pages, generator=rng).tolist()
    table = []
    for count in entries:
        own = [order.pop() for _ in range(-(-count // page_size))]
        tail = [GARBAGE[i % len(GARBAGE)] for i in range(columns - len(own))]
        table.append(own + tail)
    return table


def slot(table, r, local, page_size, pages):
    """-1 where the block table has no such page, or the pool does not."""
    column, offset = divmod(local, page_size)
    if not 0 <= column < len(table[r]):
        return -1
    page = table[r][column]
    return page * page_size + offset if 0 <= page < pages else -1


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_window_slots_follow_the_definition(page_size, index_dtype, kernel_device, rng):
    kernel, device = kernel_device
    query_lens, seq_lens, window, padding = [3, 0, 1, 4, 2], [3, 6, 70, 65, 200], 33, 2
    starts = [11]
    for q in query_lens:
        starts.append(starts[-1] + q)
    columns = -(-max(seq_lens) // page_size) + 3
    pages = sum(-(-s // page_size) for s in seq_lens)
    table = block_table(rng, seq_lens, page_size, pages, columns)
    # Pages wholly before the last request's window may be anything.
    first = (200 - 2 - window + 1) // page_size
    table[4][:first] = [GARBAGE[i % len(GARBAGE)] for i in range(first)]
    tokens = starts[-1] - starts[0] + padding
    got, lens = indices.window_slots(
        torch.tensor(starts, dtype=index_dtype, device=device),
        torch.tensor(seq_lens, dtype=index_dtype, device=device),
        int32(table).to(device), page_size, pages, window, tokens, kernel=kernel,
    )  # fmt: skip
    for t, owner in enumerate(queries(starts, seq_lens, tokens)):
        want = []
        if owner is not None:
            r, p = owner
            want = [slot(table, r, x, page_size, pages) for x in range(max(0, p - window + 1), p + 1)]
            assert -1 not in want
        assert int(lens[t]) == len(want)
        assert got[t].tolist() == want + [-1] * (window - len(want))


def test_window_pages_outside_the_pool_are_holes(kernel_device):
    kernel, device = kernel_device
    table = int32([[0, 7, -1, 2**31 - 1, 1]]).to(device)
    got, lens = indices.window_slots(
        int32([0, 1]).to(device), int32([10]).to(device), table, 2, 7, 12, 1, kernel=kernel
    )
    assert got.tolist() == [[0, 1, -1, -1, -1, -1, -1, -1, 2, 3, -1, -1]]
    assert lens.tolist() == [10]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_an_empty_block_table_has_no_slots(shape, kernel_device):
    kernel, device = kernel_device
    rows, _ = shape
    table = torch.zeros(shape, dtype=torch.int32, device=device)
    starts, seq_lens = torch.arange(rows + 1, dtype=torch.int32), torch.full((rows,), 4, dtype=torch.int32)
    got, lens = indices.window_slots(starts.to(device), seq_lens.to(device), table, 2, 5, 4, 3, kernel=kernel)
    assert (got == -1).all()
    assert lens.tolist() == ([4] * 3 if rows else [0] * 3)
    ones = torch.ones(2, dtype=torch.int32, device=device)
    local = torch.zeros(2, 3, dtype=torch.int32, device=device)
    assert (indices.local_to_slots(local, ones, ones, table, 2, 5, kernel=kernel) == -1).all()


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_local_to_slots_follows_the_definition(page_size, expanded, kernel_device, rng):
    kernel, device = kernel_device
    entries = [130, 0, 62, 1]
    columns = -(-max(entries) // page_size) + 2
    pages = sum(-(-n // page_size) for n in entries)
    table = block_table(rng, entries, page_size, pages, columns)
    request = [0, 0, 2, 1, 3, -1, -5, 4, 2**31 - 1]
    limits = [130, 17, 62, 0, 1, 100, 100, 100, 100]
    if expanded:
        local = torch.arange(140, dtype=torch.int32, device=device).expand(len(request), 140)
        assert local.stride(0) == 0
    else:
        local = torch.randint(-3, 200, (len(request), 600), dtype=torch.int32, generator=rng)
        local[:, 3], local[:, 590] = 2**31 - 1, -(2**31)
        local = local.to(device)
    got = indices.local_to_slots(
        local,
        int32(request).to(device),
        int32(limits).to(device),
        int32(table).to(device),
        page_size,
        pages,
        kernel=kernel,
    )
    for t, (r, limit) in enumerate(zip(request, limits)):
        owned = 0 <= r < len(entries)
        want = [slot(table, r, x, page_size, pages) if owned and 0 <= x < limit else -1 for x in local[t].tolist()]
        assert got[t].tolist() == want


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_locals_are_no_slots(shape, kernel_device):
    kernel, device = kernel_device
    local = torch.zeros(shape, dtype=torch.int32, device=device)
    request = torch.zeros(shape[0], dtype=torch.int32, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    assert indices.local_to_slots(local, request, request, table, 64, 1, kernel=kernel).shape == shape


@pytest.mark.interpreter
@pytest.mark.parametrize("multiple", [64, 128])
@pytest.mark.parametrize("width", [0, 1, 63, 64, 100])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_sanitized_rows_hold_only_minus_one_or_what_is_in_range(index_dtype, width, multiple, rng):
    from dsv4x.common.kernels.indices import sanitize_indices

    rows = torch.randint(-3, 12, (5, width), generator=rng).to(index_dtype)
    if width:
        rows[1, 0], rows[2, -1] = 2**31 - 1, -(2**31)
    lens = torch.tensor([0, 3, 1000, -4, width], dtype=index_dtype)
    for given_lens in (lens, None):
        got, got_lens = sanitize_indices(rows, given_lens, 9, multiple)
        assert got.dtype == got_lens.dtype == torch.int32
        assert got.shape == (5, max(1, -(-width // multiple)) * multiple)
        for t in range(5):
            span = width if given_lens is None else min(max(int(lens[t]), 0), width)
            want = [x if 0 <= x < 9 else -1 for x in rows[t, :span].tolist()]
            assert got[t].tolist() == want + [-1] * (got.shape[1] - span)
            assert got_lens[t] == span
