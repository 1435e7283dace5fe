"""A step's metadata in one launch, and its gather plan in two, from what the device holds.

Nothing here depends on a length that the host knows, so a captured graph refills what its replays read.
"""

import triton
import triton.language as tl

from .indices import INT32_END, slots_of
from .launch import Launcher

BLOCK_R = 256
"""Requests a program looks at together."""

TILE = 1024
"""Slots of a compressed row that one program makes."""

GATHER_TILE = 512
"""Workspace rows whose slots one program finds."""

NONE, SELECTS, ROWS = 0, 1, 2
"""What a kind is to the kernel: absent; without rows; with a row of every visible entry."""

_NONE, _ROWS = tl.constexpr(NONE), tl.constexpr(ROWS)


@triton.jit
def _ended(query_start_loc_ptr, requests, token, BLOCK_R: tl.constexpr):
    """How many requests end at or before a token: the number of its own, or ``requests`` past the last one's."""
    ended = 0
    for start in range(0, requests, BLOCK_R):
        request = start + tl.arange(0, BLOCK_R)
        end = tl.load(query_start_loc_ptr + 1 + request, mask=request < requests, other=INT32_END - 1)
        ended += tl.sum((end <= token).to(tl.int32), 0)
    return ended


@triton.jit
def _count_clamped(
    query_start_loc_ptr, seq_lens_ptr, clamped_ptr, requests, max_seq_len, fresh, BLOCK_R: tl.constexpr
):  # fmt: skip
    clamped = 0
    for start in range(0, requests, BLOCK_R):
        request = start + tl.arange(0, BLOCK_R)
        live = request < requests
        queries = tl.load(query_start_loc_ptr + 1 + request, mask=live, other=0) - tl.load(
            query_start_loc_ptr + request, mask=live, other=0
        )
        past = (queries > 0) & (tl.load(seq_lens_ptr + request, mask=live, other=0) > max_seq_len)
        clamped += tl.sum(past.to(tl.int32), 0)
    before = tl.where(fresh != 0, 0, tl.load(clamped_ptr))
    tl.store(clamped_ptr, before + clamped)


@triton.jit
def _fill_kind(
    token, tile, request, position, fresh, table_ptr, visible_ptr, lens_ptr, rows_ptr, ratio, most, table_stride,
    columns, page_size, pages, width, KIND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One token's share of a kind: its numbers by the first program, a tile of its row by each of the others."""
    visible = (position + 1) // ratio
    span = tl.minimum(visible, most)
    if tile == 0:
        tl.store(visible_ptr + token, visible)
        tl.store(lens_ptr + token, span)
    elif KIND == _ROWS:
        offset = (tile - 1) * TILE + tl.arange(0, TILE)
        written = tl.where(fresh != 0, width, tl.minimum((span + 63) // 64 * 64, width))
        if (tile - 1) * TILE < written:
            table = table_ptr + tl.maximum(request, 0).to(tl.int64) * table_stride
            slots = slots_of(offset, offset < span, table, columns, page_size, pages)
            tl.store(rows_ptr + token.to(tl.int64) * width + offset, slots.to(tl.int32), mask=offset < written)


@triton.jit(
    do_not_specialize=(
        "requests", "max_seq_len", "fresh", "swa_table_stride", "swa_columns", "swa_page_size", "swa_pages",
        "window_size",
        "a_ratio", "a_most", "a_table_stride", "a_columns", "a_page_size", "a_pages", "a_width",
        "b_ratio", "b_most", "b_table_stride", "b_columns", "b_page_size", "b_pages", "b_width",
    )
)  # fmt: skip
def step_kernel(
    query_start_loc_ptr, seq_lens_ptr, swa_table_ptr, request_ptr, position_ptr, swa_indices_ptr, swa_lens_ptr,
    clamped_ptr,
    a_table_ptr, a_visible_ptr, a_lens_ptr, a_rows_ptr, b_table_ptr, b_visible_ptr, b_lens_ptr, b_rows_ptr,
    requests, max_seq_len, fresh, swa_table_stride, swa_columns, swa_page_size, swa_pages, window_size,
    a_ratio, a_most, a_table_stride, a_columns, a_page_size, a_pages, a_width,
    b_ratio, b_most, b_table_stride, b_columns, b_page_size, b_pages, b_width,
    FIRST: tl.constexpr, WINDOW: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (t, 0) fills token t's numbers and window; program (t, j) tile j - 1 of its compressed rows."""
    token = tl.program_id(0)
    tile = tl.program_id(1)
    request = _ended(query_start_loc_ptr, requests, token, BLOCK_R)
    owned = request < requests
    length = tl.load(seq_lens_ptr + request, mask=owned, other=0)
    length = tl.minimum(tl.maximum(length, 0), max_seq_len)
    end = tl.load(query_start_loc_ptr + 1 + request, mask=owned, other=0)
    # A request shorter than its query rows gives the first of them no position.
    position = tl.maximum(tl.where(owned, length - end + token, -1), -1)
    request = tl.where(position >= 0, request, -1)
    if FIRST and tile == 0:
        tl.store(request_ptr + token, request)
        tl.store(position_ptr + token, position)
        if token == 0:
            _count_clamped(query_start_loc_ptr, seq_lens_ptr, clamped_ptr, requests, max_seq_len, fresh, BLOCK_R)
        if WINDOW:
            table = swa_table_ptr + tl.maximum(request, 0).to(tl.int64) * swa_table_stride
            span = tl.minimum(position + 1, window_size)
            offset = tl.arange(0, BLOCK_W)
            local = position - span + 1 + offset
            slots = slots_of(local, offset < span, table, swa_columns, swa_page_size, swa_pages)
            row = swa_indices_ptr + token.to(tl.int64) * window_size + offset
            tl.store(row, slots.to(tl.int32), mask=offset < window_size)
            tl.store(swa_lens_ptr + token, span)
    if A != _NONE:
        _fill_kind(
            token, tile, request, position, fresh, a_table_ptr, a_visible_ptr, a_lens_ptr, a_rows_ptr, a_ratio,
            a_most, a_table_stride, a_columns, a_page_size, a_pages, a_width, A, TILE,
        )  # fmt: skip
    if B != _NONE:
        _fill_kind(
            token, tile, request, position, fresh, b_table_ptr, b_visible_ptr, b_lens_ptr, b_rows_ptr, b_ratio,
            b_most, b_table_stride, b_columns, b_page_size, b_pages, b_width, B, TILE,
        )  # fmt: skip


@triton.jit
def _request_counts(
    query_start_loc_ptr, seq_lens_ptr, request, first, last, requests, max_seq_len, ratio, window_size
):  # fmt: skip
    """(length, compressed entries, raw tokens) that some requests gather; nothing outside ``[first, last)``."""
    live = request < requests
    starts = tl.load(query_start_loc_ptr + request, mask=live, other=0)
    queries = tl.load(query_start_loc_ptr + 1 + request, mask=live, other=0) - starts
    length = tl.load(seq_lens_ptr + request, mask=live, other=0)
    length = tl.minimum(tl.maximum(length, 0), max_seq_len)
    gathers = live & (queries > 0) & (request >= first) & (request < last)
    compressed = tl.where(gathers & (ratio > 0), length // tl.maximum(ratio, 1), 0)
    raw = tl.where(gathers, tl.minimum(length, queries + window_size - 1), 0)
    return length, compressed, raw


@triton.jit(
    do_not_specialize=(
        "requests", "pitch", "max_seq_len", "window_size", "a_first", "a_end", "a_ratio", "a_compressed_rows", "a_rows",
        "b_first", "b_end", "b_ratio", "b_compressed_rows", "b_rows",
    )
)  # fmt: skip
def gather_requests_kernel(
    query_start_loc_ptr, seq_lens_ptr, a_requests_ptr, b_requests_ptr, requests, pitch, max_seq_len, window_size,
    a_first, a_end, a_ratio, a_compressed_rows, a_rows, b_first, b_end, b_ratio, b_compressed_rows, b_rows,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program k lays out kind k's requests in its workspace."""
    other = tl.program_id(0) > 0
    out_ptr = a_requests_ptr
    if other:
        out_ptr = b_requests_ptr
    first = tl.where(other, b_first, a_first)
    last = tl.where(other, b_end, a_end)
    ratio = tl.where(other, b_ratio, a_ratio)
    compressed_rows = tl.where(other, b_compressed_rows, a_compressed_rows)
    rows = tl.where(other, b_rows, a_rows)
    compressed_base = tl.cast(0, tl.int64)
    swa_base = tl.cast(compressed_rows, tl.int64)
    for start in range(0, requests, BLOCK_R):
        request = start + tl.arange(0, BLOCK_R)
        length, compressed, raw = _request_counts(
            query_start_loc_ptr, seq_lens_ptr, request, first, last, requests, max_seq_len, ratio, window_size
        )
        # Lengths past what the host allowed for must not run into the next request's rows.
        ends = compressed_base + tl.cumsum(compressed.to(tl.int64), 0)
        begins = tl.minimum(ends - compressed, compressed_rows)
        swa_ends = swa_base + tl.cumsum(raw.to(tl.int64), 0)
        swa_begins = tl.minimum(swa_ends - raw, rows)
        row = out_ptr + request
        live = request < requests
        tl.store(row, begins.to(tl.int32), mask=live)
        tl.store(row + pitch, (tl.minimum(ends, compressed_rows) - begins).to(tl.int32), mask=live)
        tl.store(row + 2 * pitch, swa_begins.to(tl.int32), mask=live)
        tl.store(row + 3 * pitch, (tl.minimum(swa_ends, rows) - swa_begins).to(tl.int32), mask=live)
        tl.store(row + 4 * pitch, length, mask=live)
        compressed_base += tl.sum(compressed.to(tl.int64), 0)
        swa_base += tl.sum(raw.to(tl.int64), 0)


@triton.jit
def _slots_of_rows(
    program, requests_ptr, table_ptr, swa_table_ptr, slots_ptr, requests, pitch, steps, table_stride, columns,
    page_size,
    pages, compressed_rows, rows, swa_table_stride, swa_columns, swa_page_size, swa_pages, TILE: tl.constexpr,
):  # fmt: skip
    """The slots of a tile of workspace rows: of compressed entries, or of raw tokens."""
    row = program * TILE + tl.arange(0, TILE)
    compressed = row < compressed_rows
    # Rows of begins, and of counts behind them: of compressed entries, or two rows on of raw tokens.
    begins_ptr = requests_ptr + tl.where(compressed, 0, 2 * pitch)
    low = tl.zeros([TILE], tl.int32)
    high = low + requests
    for _ in range(steps):
        middle = (low + high) // 2
        begin = tl.load(begins_ptr + middle, mask=low < high, other=INT32_END - 1)
        after = (low < high) & (begin <= row)
        low = tl.where(after, middle + 1, low)
        high = tl.where(after, high, middle)
    request = low - 1
    owned = (request >= 0) & (row < rows)
    begin = tl.load(begins_ptr + request, mask=owned, other=0)
    count = tl.load(begins_ptr + pitch + request, mask=owned, other=0)
    local = row - begin
    owned = owned & (local < count)
    length = tl.load(requests_ptr + 4 * pitch + request, mask=owned, other=0)
    # The last raw tokens of a request are gathered, and its first compressed entries.
    raw = local + length - count
    far = tl.maximum(request, 0).to(tl.int64)
    slots = slots_of(local, owned & compressed, table_ptr + far * table_stride, columns, page_size, pages)
    swa_slots = slots_of(
        raw, owned & (row >= compressed_rows), swa_table_ptr + far * swa_table_stride, swa_columns, swa_page_size,
        swa_pages,
    )  # fmt: skip
    tl.store(slots_ptr + row, tl.where(compressed, slots, swa_slots).to(tl.int32), mask=row < rows)


@triton.jit(
    do_not_specialize=(
        "requests", "pitch", "steps", "a_programs", "swa_table_stride", "swa_columns", "swa_page_size", "swa_pages",
        "a_table_stride", "a_columns", "a_page_size", "a_pages", "a_compressed_rows", "a_rows", "b_table_stride",
        "b_columns", "b_page_size", "b_pages", "b_compressed_rows", "b_rows",
    )
)  # fmt: skip
def gather_slots_kernel(
    swa_table_ptr, a_requests_ptr, a_table_ptr, a_slots_ptr, b_requests_ptr, b_table_ptr, b_slots_ptr,
    requests, pitch, steps, a_programs, swa_table_stride, swa_columns, swa_page_size, swa_pages,
    a_table_stride, a_columns, a_page_size, a_pages, a_compressed_rows, a_rows,
    b_table_stride, b_columns, b_page_size, b_pages, b_compressed_rows, b_rows,
    TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < a_programs:
        _slots_of_rows(
            program, a_requests_ptr, a_table_ptr, swa_table_ptr, a_slots_ptr, requests, pitch, steps, a_table_stride,
            a_columns, a_page_size, a_pages, a_compressed_rows, a_rows, swa_table_stride, swa_columns, swa_page_size,
            swa_pages, TILE,
        )  # fmt: skip
    else:
        _slots_of_rows(
            program - a_programs, b_requests_ptr, b_table_ptr, swa_table_ptr, b_slots_ptr, requests, pitch, steps,
            b_table_stride, b_columns, b_page_size, b_pages, b_compressed_rows, b_rows, swa_table_stride, swa_columns,
            swa_page_size, swa_pages, TILE,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=(
        "width", "requests", "table_stride", "columns", "page_size", "pages", "capacity", "request_ptr",
        "limits_ptr", "spans_ptr", "lens_ptr",
    )
)  # fmt: skip
def pack_slots_kernel(
    indices_ptr, spans_ptr, request_ptr, limits_ptr, table_ptr, out_ptr, lens_ptr,
    width, requests, indices_stride, table_stride, columns, page_size, pages, capacity, out_width,
    HAS_SPANS: tl.constexpr, LOCAL: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    span = tl.cast(width, tl.int32)
    if HAS_SPANS:
        span = tl.minimum(tl.maximum(tl.load(spans_ptr + token), 0), span)
    table = table_ptr
    limit = tl.cast(capacity, tl.int64)
    if LOCAL:
        request = tl.load(request_ptr + token)
        known = (request >= 0) & (request < requests)
        table += tl.where(known, request, 0).to(tl.int64) * table_stride
        limit = tl.where(known, tl.load(limits_ptr + token), 0).to(tl.int64)
    out = out_ptr + token * out_width
    packed = 0
    for start in range(0, span, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        slots = tl.load(indices_ptr + token * indices_stride + offset, mask=offset < span, other=-1).to(tl.int64)
        slots = tl.where((slots >= 0) & (slots < limit), slots, -1)
        if LOCAL:
            slots = slots_of(slots, slots >= 0, table, columns, page_size, pages)
        entry = (slots >= 0).to(tl.int32)
        tl.store(out + packed + tl.cumsum(entry, 0) - 1, slots.to(tl.int32), mask=slots >= 0)
        packed += tl.sum(entry, 0)
    for start in range(packed, out_width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        tl.store(out + offset, tl.full([BLOCK], -1, tl.int32), mask=offset < out_width)
    tl.store(lens_ptr + token, packed if COUNTED else span)


_launch_step = Launcher(step_kernel)
_launch_requests, _launch_slots = Launcher(gather_requests_kernel), Launcher(gather_slots_kernel)
_launch_pack = Launcher(pack_slots_kernel)


def fill_step(call):
    """Fill a step's metadata: one launch for two kinds, and one more for each two further ones."""
    tokens, unused = call.request.shape[0], call.request
    if not tokens:
        if call.fresh:
            call.clamped.zero_()
        return
    table = call.swa_block_table
    window = (0, 0) if table is None else (table.stride(0), table.shape[1])
    width = 1 if call.swa_indices is None else call.swa_indices.shape[1]
    for first in range(0, max(len(call.kinds), 1), 2):
        pair = call.kinds[first : first + 2]
        tensors, numbers, flags, widest = [], [], [], 0
        for kind in pair:
            rows = kind.rows
            tensors += (kind.block_table, kind.visible, kind.lens, unused if rows is None else rows)
            numbers += (
                kind.compress_ratio, kind.most, kind.block_table.stride(0), kind.block_table.shape[1],
                kind.page_size, kind.pages, 0 if rows is None else rows.shape[1],
            )  # fmt: skip
            flags.append(SELECTS if rows is None else ROWS)
            widest = max(widest, numbers[-1])
        for _ in range(2 - len(pair)):
            tensors += (unused,) * 4
            numbers += (1, 0, 0, 0, 1, 0, 0)
            flags.append(NONE)
        _launch_step(
            (tokens, 1 + -(-widest // TILE), 1),
            (
                call.query_start_loc, call.seq_lens, unused if table is None else table, call.request, call.position,
                unused if call.swa_indices is None else call.swa_indices,
                unused if call.swa_lens is None else call.swa_lens, call.clamped, *tensors,
            ),
            (
                call.seq_lens.shape[0], call.max_seq_len, int(call.fresh), *window, call.swa_page_size, call.swa_pages,
                width, *numbers,
            ),
            (first == 0, call.swa_indices is not None, *flags, triton.next_power_of_2(width), BLOCK_R, TILE),
            4,
        )  # fmt: skip


def plan_gather(call):
    """Fill the gather plans of one or two kinds: where each request's rows are, then each row's slot."""
    a, b = call.kinds if len(call.kinds) == 2 else (call.kinds[0], call.kinds[0])
    requests = call.seq_lens.shape[0]
    layout = [
        number
        for kind in (a, b)
        for number in (kind.first, kind.end, kind.compress_ratio, kind.compressed_rows, kind.slots.shape[0])
    ]
    if requests:
        _launch_requests(
            len(call.kinds),
            (call.query_start_loc, call.seq_lens, a.requests, b.requests),
            (requests, a.requests.stride(0), call.max_seq_len, call.window_size, *layout),
            (BLOCK_R,),
            4,
        )
    programs = [-(-kind.slots.shape[0] // GATHER_TILE) for kind in call.kinds]
    if not sum(programs):
        return
    tables = [
        number
        for kind in (a, b)
        for number in (
            kind.block_table.stride(0), kind.block_table.shape[1], kind.page_size, kind.pages, kind.compressed_rows,
            kind.slots.shape[0],
        )
    ]  # fmt: skip
    _launch_slots(
        sum(programs),
        (call.swa_block_table, a.requests, a.block_table, a.slots, b.requests, b.block_table, b.slots),
        (
            requests, a.requests.stride(0), requests.bit_length(), programs[0], call.swa_block_table.stride(0),
            call.swa_block_table.shape[1], call.swa_page_size, call.swa_pages, *tables,
        ),
        (GATHER_TILE,),
        4,
    )  # fmt: skip


def pack_slots(call):
    """Launch over the rows of ``call.indices``."""
    indices, spans, local, capacity, page_size, out, lens, counted = call
    tokens, width = indices.shape
    request, visible, table, pages = (lens, lens, indices, 0) if local is None else local
    _launch_pack(
        tokens,
        (indices, lens if spans is None else spans, request, visible, table, out, lens),
        (
            width, table.shape[0], indices.stride(0), table.stride(0), table.shape[1], page_size, pages,
            0 if local is not None else capacity, out.shape[1],
        ),
        (spans is not None, local is not None, counted, 512),
        4,
    )  # fmt: skip
