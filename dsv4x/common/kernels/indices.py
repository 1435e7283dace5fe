"""Index remaps: one program a row, every table read bounds-checked, -1 kept as -1 wherever it stands."""

import torch
import triton
import triton.language as tl

from ..core.refill import CombineCall
from .launch import Launch, Launcher

# The first number that is no int32: rows and slots are computed in int64 and must stay below it.
INT32_END = tl.constexpr(2**31)


@triton.jit
def _position_of(query_start_loc_ptr, seq_lens_ptr, requests, token):
    """(request, position, seq_len) of a query token; position -1 when no request owns it.

    Token 0 is the one at ``query_start_loc[0]``, so a slice of a larger batch's offsets works as it is.
    """
    token += tl.load(query_start_loc_ptr).to(tl.int32)
    low = 0
    high = requests
    while low < high:
        middle = (low + high) // 2
        after = tl.load(query_start_loc_ptr + middle + 1) <= token
        low = tl.where(after, middle + 1, low)
        high = tl.where(after, high, middle)
    owned = low < requests
    seq_len = tl.load(seq_lens_ptr + low, mask=owned, other=0).to(tl.int32)
    end = tl.load(query_start_loc_ptr + low + 1, mask=owned, other=0).to(tl.int32)
    position = tl.where(owned, seq_len - end + token, -1)
    return low, tl.maximum(position, -1), seq_len


@triton.jit
def slots_of(local, valid, table_ptr, columns, page_size, pages):
    """Slots (int64) of entries ``local`` through one request's block-table row; -1 where there is none."""
    column = local // page_size
    valid = valid & (local >= 0) & (column < columns)
    page = tl.load(table_ptr + column, mask=valid, other=-1).to(tl.int64)
    valid = valid & (page >= 0) & (page < pages)
    return tl.where(valid, page * page_size + local % page_size, -1)


@triton.jit(do_not_specialize=("table_ptr", "lens_ptr", "requests", "table_stride", "table_columns", "pages"))
def window_slots_kernel(
    query_start_loc_ptr,
    seq_lens_ptr,
    table_ptr,
    out_ptr,
    lens_ptr,
    requests,
    table_stride,
    table_columns,
    page_size,
    pages,
    window_size,
    out_stride,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    request, position, _ = _position_of(query_start_loc_ptr, seq_lens_ptr, requests, token)
    table = table_ptr + tl.where(position >= 0, request, 0).to(tl.int64) * table_stride
    span = tl.minimum(position + 1, window_size)
    offset = tl.arange(0, BLOCK)
    local = position - span + 1 + offset
    slots = slots_of(local, offset < span, table, table_columns, page_size, pages)
    tl.store(out_ptr + token.to(tl.int64) * out_stride + offset, slots.to(tl.int32), mask=offset < window_size)
    tl.store(lens_ptr + token, span)


@triton.jit(do_not_specialize=("table_ptr", "requests", "table_stride", "table_columns", "pages"))
def local_to_slots_kernel(
    local_ptr,
    request_ptr,
    limits_ptr,
    table_ptr,
    out_ptr,
    width,
    requests,
    local_stride,
    table_stride,
    table_columns,
    page_size,
    pages,
    out_stride,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    request = tl.load(request_ptr + token).to(tl.int64)
    owned = (request >= 0) & (request < requests)
    table = table_ptr + tl.where(owned, request, 0) * table_stride
    limit = tl.where(owned, tl.load(limits_ptr + token), 0)
    for start in range(0, width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        local = tl.load(local_ptr + token * local_stride + offset, mask=offset < width, other=-1)
        slots = slots_of(local, local < limit, table, table_columns, page_size, pages)
        tl.store(out_ptr + token * out_stride + offset, slots.to(tl.int32), mask=offset < width)


@triton.jit
def combine_row(
    token,
    topk_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    gather_lens_ptr,
    compressed_base_ptr,
    swa_base_ptr,
    row_slots_ptr,
    request_ptr,
    position_ptr,
    spans_ptr,
    compressed_lens_ptr,
    out_ptr,
    lens_ptr,
    requests,
    topk,
    window_size,
    compress_ratio,
    width,
    rows,
    topk_stride,
    out_stride,
    HAS_ROW_SLOTS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    HAS_COMPRESSED_LENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The index row and span of one query token."""
    if HAS_POSITIONS:
        request = tl.load(request_ptr + token)
        position = tl.load(position_ptr + token)
        seq_len = tl.load(seq_lens_ptr + request, mask=position >= 0, other=0).to(tl.int32)
    else:
        request, position, seq_len = _position_of(query_start_loc_ptr, seq_lens_ptr, requests, token)
    owned = position >= 0
    visible = (position + 1) // compress_ratio
    first_gathered = seq_len - tl.load(gather_lens_ptr + request, mask=owned, other=0).to(tl.int32)
    compressed_base = tl.load(compressed_base_ptr + request, mask=owned, other=0).to(tl.int64)
    swa_base = tl.load(swa_base_ptr + request, mask=owned, other=0).to(tl.int64)
    span = tl.cast(topk, tl.int32)
    if HAS_SPANS:
        span = tl.minimum(tl.maximum(tl.load(spans_ptr + token), 0), span)
    span = tl.where(visible > 0, span, 0)
    held = visible
    if HAS_COMPRESSED_LENS:
        held = tl.minimum(held, tl.load(compressed_lens_ptr + request, mask=owned, other=0))
    window = tl.minimum(position + 1, window_size)
    out = out_ptr + token.to(tl.int64) * out_stride
    topk_row = topk_ptr + token.to(tl.int64) * topk_stride
    packed = 0
    for start in range(0, span, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        local = tl.load(topk_row + offset, mask=offset < span, other=-1).to(tl.int64)
        value = compressed_base + local
        # A base in 64 bits may lead past what a row number can be.
        entry = (local >= 0) & (local < held) & (value >= 0) & (value < INT32_END)
        if HAS_ROW_SLOTS:
            entry = entry & (tl.load(row_slots_ptr + value, mask=entry & (value < rows), other=-1) >= 0)
        at = packed + tl.cumsum(entry.to(tl.int32), 0) - 1
        tl.store(out + at, value.to(tl.int32), mask=entry)
        packed += tl.sum(entry.to(tl.int32), 0)
    for start in range(0, width - packed, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        raw = position - window + 1 + offset
        value = swa_base + raw - first_gathered
        entry = (offset < window) & (raw >= first_gathered) & (value >= 0) & (value < INT32_END)
        if HAS_ROW_SLOTS:
            entry = entry & (tl.load(row_slots_ptr + value, mask=entry & (value < rows), other=-1) >= 0)
        tl.store(out + packed + offset, tl.where(entry, value, -1).to(tl.int32), mask=packed + offset < width)
    tl.store(lens_ptr + token, packed + window)


@triton.jit(do_not_specialize=("lens_ptr", "spans_ptr", "compressed_lens_ptr", "requests", "topk", "rows"))
def combine_kernel(
    topk_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    gather_lens_ptr,
    compressed_base_ptr,
    swa_base_ptr,
    row_slots_ptr,
    request_ptr,
    position_ptr,
    spans_ptr,
    compressed_lens_ptr,
    out_ptr,
    lens_ptr,
    requests,
    topk,
    window_size,
    compress_ratio,
    width,
    rows,
    topk_stride,
    out_stride,
    HAS_ROW_SLOTS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    HAS_COMPRESSED_LENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    combine_row(
        tl.program_id(0),
        topk_ptr,
        query_start_loc_ptr,
        seq_lens_ptr,
        gather_lens_ptr,
        compressed_base_ptr,
        swa_base_ptr,
        row_slots_ptr,
        request_ptr,
        position_ptr,
        spans_ptr,
        compressed_lens_ptr,
        out_ptr,
        lens_ptr,
        requests,
        topk,
        window_size,
        compress_ratio,
        width,
        rows,
        topk_stride,
        out_stride,
        HAS_ROW_SLOTS,
        HAS_POSITIONS,
        HAS_SPANS,
        HAS_COMPRESSED_LENS,
        BLOCK,
    )


@triton.jit
def _span(lens_ptr, token, width, HAS_LENS: tl.constexpr):
    """int32 scan span of a row: its length within ``[0, width]``, or the width."""
    span = tl.cast(width, tl.int32)
    if HAS_LENS:
        span = tl.minimum(tl.maximum(tl.load(lens_ptr + token), 0), width).to(tl.int32)
    return span


@triton.jit(do_not_specialize=("bases_ptr", "requests"))
def local_to_workspace_rows_kernel(
    local_ptr,
    request_ptr,
    limits_ptr,
    bases_ptr,
    out_ptr,
    width,
    requests,
    local_stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    request = tl.load(request_ptr + token).to(tl.int64)
    base = tl.load(bases_ptr + request, mask=(request >= 0) & (request < requests), other=-1).to(tl.int64)
    # Not base + local < INT32_END: with garbage in 64 bits the sum would wrap.
    limit = tl.minimum(tl.load(limits_ptr + token).to(tl.int64), INT32_END - tl.maximum(base, 0))
    limit = tl.where(base >= 0, limit, 0)
    for start in range(0, width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        local = tl.load(local_ptr + token * local_stride + offset, mask=offset < width, other=-1)
        row = tl.where((local >= 0) & (local < limit), base + local, -1)
        tl.store(out_ptr + token * out_stride + offset, row.to(tl.int32), mask=offset < width)


@triton.jit(do_not_specialize=("blocks", "pages"))
def slots_to_compact_slots_kernel(
    slots_ptr,
    page_map_ptr,
    out_ptr,
    width,
    blocks,
    pages,
    page_size,
    slots_stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offset = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + row * slots_stride + offset, mask=offset < width, other=-1).to(tl.int64)
    page = slot // page_size
    compact = tl.load(page_map_ptr + page, mask=(slot >= 0) & (page < pages), other=-1).to(tl.int64)
    compact_slot = compact * page_size + slot % page_size
    compact_slot = tl.where((compact >= 0) & (compact_slot < INT32_END), compact_slot, -1)
    tl.store(out_ptr + row * out_stride + offset, compact_slot.to(tl.int32), mask=offset < width)


@triton.jit(do_not_specialize=("lens_ptr", "upper"))
def count_entries_kernel(
    indices_ptr,
    lens_ptr,
    counts_ptr,
    width,
    upper,
    indices_stride,
    HAS_LENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    span = _span(lens_ptr, token, width, HAS_LENS)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        index = tl.load(indices_ptr + token * indices_stride + offset, mask=offset < span, other=-1)
        count += ((index >= 0) & (index < upper)).to(tl.int32)
    tl.store(counts_ptr + token, tl.sum(count, 0))


@triton.jit(do_not_specialize=("lens_ptr", "upper", "capacity"))
def dense_to_ragged_kernel(
    indices_ptr,
    lens_ptr,
    indptr_ptr,
    values_ptr,
    width,
    upper,
    capacity,
    indices_stride,
    HAS_LENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    span = _span(lens_ptr, token, width, HAS_LENS)
    first = tl.load(indptr_ptr + token).to(tl.int64)
    for start in range(0, width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        index = tl.load(indices_ptr + token * indices_stride + offset, mask=offset < span, other=-1)
        entry = (index >= 0) & (index < upper)
        rank = tl.cumsum(entry.to(tl.int32), 0)
        at = first + rank - 1
        tl.store(values_ptr + at, index.to(tl.int32), mask=entry & (at < capacity))
        first += tl.sum(entry.to(tl.int32), 0)


@triton.jit(do_not_specialize=("lens_ptr", "total"))
def ragged_to_dense_kernel(
    values_ptr,
    indptr_ptr,
    out_ptr,
    lens_ptr,
    total,
    width,
    out_stride,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first = tl.maximum(tl.load(indptr_ptr + token).to(tl.int64), 0)
    end = tl.minimum(tl.maximum(tl.load(indptr_ptr + token + 1).to(tl.int64), 0), total)
    span = tl.minimum(tl.maximum(end - first, 0), width)
    for start in range(0, width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        index = tl.load(values_ptr + first + offset, mask=offset < span, other=-1)
        tl.store(out_ptr + token * out_stride + offset, tl.maximum(index, -1), mask=offset < width)
    tl.store(lens_ptr + token, span.to(tl.int32))


@triton.jit(do_not_specialize=("lens_ptr", "s_kv_swa"))
def combine_swa_extra_kernel(
    swa_ptr,
    swa_lens_ptr,
    extra_ptr,
    extra_lens_ptr,
    out_ptr,
    lens_ptr,
    swa_width,
    extra_width,
    s_kv_swa,
    width,
    swa_stride,
    extra_stride,
    out_stride,
    HAS_SWA_LENS: tl.constexpr,
    HAS_EXTRA_LENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    swa_span = _span(swa_lens_ptr, token, swa_width, HAS_SWA_LENS)
    extra_span = _span(extra_lens_ptr, token, extra_width, HAS_EXTRA_LENS)
    base = tl.cast(s_kv_swa, tl.int64)
    for start in range(0, width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        swa = tl.load(swa_ptr + token * swa_stride + offset, mask=offset < swa_span, other=-1).to(tl.int64)
        column = offset - swa_span
        extra = tl.load(
            extra_ptr + token * extra_stride + column, mask=(column >= 0) & (column < extra_span), other=-1
        ).to(tl.int64)
        row = tl.where((swa >= 0) & (swa < base), swa, -1)
        # The bound is on the index: with garbage in 64 bits the sum would wrap.
        shifted = tl.where((extra >= 0) & (extra < INT32_END - base), extra + base, -1)
        row = tl.where(column < 0, row, shifted)
        tl.store(out_ptr + token * out_stride + offset, row.to(tl.int32), mask=offset < width)
    tl.store(lens_ptr + token, swa_span + extra_span)


@triton.jit(do_not_specialize=("starts_ptr", "requests", "total", "steps"))
def build_swa_token_ids_kernel(
    first_ptr,
    starts_ptr,
    token_ids_ptr,
    request_ptr,
    requests,
    total,
    steps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + requests
    for _ in range(steps):
        middle = (low + high) // 2
        after = tl.load(starts_ptr + middle + 1, mask=low < high, other=INT32_END - 1) <= row
        low = tl.where(after, middle + 1, low)
        high = tl.where(after, high, middle)
    owned = (low < requests) & (row < total)
    position = tl.load(first_ptr + low, mask=owned, other=0) + row - tl.load(starts_ptr + low, mask=owned, other=0)
    tl.store(token_ids_ptr + row, tl.where(owned, position, -1).to(tl.int32), mask=row < total)
    tl.store(request_ptr + row, tl.where(owned, low, -1), mask=row < total)


@triton.jit(do_not_specialize=("lens_ptr", "capacity"))
def sanitize_kernel(
    indices_ptr,
    lens_ptr,
    out_ptr,
    out_lens_ptr,
    width,
    out_width,
    capacity,
    indices_stride,
    out_stride,
    HAS_LENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    length = _span(lens_ptr, token, width, HAS_LENS)
    for start in range(0, out_width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        index = tl.load(indices_ptr + token * indices_stride + offset, mask=offset < length, other=-1)
        index = tl.where((index >= 0) & (index < capacity), index, -1)
        tl.store(out_ptr + token * out_stride + offset, index.to(tl.int32), mask=offset < out_width)
    tl.store(out_lens_ptr + token, length)


_launch_local_to_slots = Launcher(local_to_slots_kernel)
_launch_combine = Launcher(combine_kernel)
_launch_sanitize = Launcher(sanitize_kernel)


def window_slots(query_start_loc, seq_lens, block_table, page_size, pages, out_indices, out_lens):
    """Launch over the rows of ``out_indices``."""
    tokens, width = out_indices.shape
    window_slots_kernel[(tokens,)](
        query_start_loc,
        seq_lens,
        block_table,
        out_indices,
        out_lens,
        seq_lens.shape[0],
        block_table.stride(0),
        block_table.shape[1],
        page_size,
        pages,
        width,
        out_indices.stride(0),
        BLOCK=triton.next_power_of_2(width),
        num_warps=1,
    )


def local_to_slots(local, request, limits, block_table, page_size, pages, out):
    """Launch over the rows of ``local``."""
    tokens, width = local.shape
    requests, columns = block_table.shape
    _launch_local_to_slots(
        tokens,
        (local, request, limits, block_table, out),
        (width, requests, local.stride(0), block_table.stride(0), columns, page_size, pages, out.stride(0)),
        (512,),
        4,
    )


def combine_topk_swa_indices(call: CombineCall):
    """Launch over the rows of ``call.topk_indices``."""
    _launch_combine(*combine_launch(call))


def combine_launch(call: CombineCall) -> Launch:
    """How to run :func:`combine_kernel`."""
    tokens, width = call.out_indices.shape
    unused = call.out_lens
    request, position = call.positions if call.positions is not None else (unused, unused)
    return Launch(
        tokens,
        (
            call.topk_indices, call.query_start_loc, call.seq_lens, call.gather_lens, call.compressed_base,
            call.swa_base, unused if call.row_slots is None else call.row_slots, request, position,
            unused if call.topk_lens is None else call.topk_lens,
            unused if call.compressed_lens is None else call.compressed_lens, call.out_indices, call.out_lens,
        ),
        (
            call.seq_lens.shape[0], min(call.topk, call.topk_indices.shape[1]), call.window_size, call.compress_ratio,
            width, 0 if call.row_slots is None else call.row_slots.shape[0], call.topk_indices.stride(0),
            call.out_indices.stride(0),
        ),
        (
            call.row_slots is not None, call.positions is not None, call.topk_lens is not None,
            call.compressed_lens is not None, 512,
        ),
        4,
    )  # fmt: skip


def local_to_workspace_rows(local, request, limits, bases, out):
    """Launch over the rows of ``local``."""
    tokens, width = local.shape
    local_to_workspace_rows_kernel[(tokens,)](
        local,
        request,
        limits,
        bases,
        out,
        width,
        bases.shape[0],
        local.stride(0),
        out.stride(0),
        BLOCK=512,
        num_warps=4,
    )


def slots_to_compact_slots(slots, page_map, page_size, out):
    """Launch over blocks of the rows of ``slots``, of which there may be one long one."""
    tokens, width = slots.shape
    blocks = triton.cdiv(width, 512)
    slots_to_compact_slots_kernel[(tokens * blocks,)](
        slots,
        page_map,
        out,
        width,
        blocks,
        page_map.shape[0],
        page_size,
        slots.stride(0),
        out.stride(0),
        BLOCK=512,
        num_warps=4,
    )


def dense_to_ragged(indices, lens, upper, values, indptr, count):
    """Launch over the rows of ``indices`` twice: to count their entries, and to write them; ``values`` is full of -1.

    Between them, torch's prefix sum: like the launches, it waits for nothing and can be captured.
    """
    tokens, width = indices.shape
    counts = torch.empty(tokens, dtype=torch.int64, device=indices.device)
    rows = (indices, lens if lens is not None else counts)
    options = {"HAS_LENS": lens is not None, "BLOCK": 512, "num_warps": 4}
    count_entries_kernel[(tokens,)](*rows, counts, width, upper, indices.stride(0), **options)
    ends = counts.cumsum(0)
    indptr[1:] = ends.clamp_max(values.shape[0])
    count.copy_(ends[-1:].clamp_max(2**31 - 1))
    dense_to_ragged_kernel[(tokens,)](
        *rows, indptr, values, width, upper, values.shape[0], indices.stride(0), **options
    )


def ragged_to_dense(values, indptr, indices, lens):
    """Launch over the rows of ``indices``."""
    tokens, width = indices.shape
    ragged_to_dense_kernel[(tokens,)](
        values,
        indptr,
        indices,
        lens,
        values.shape[0],
        width,
        indices.stride(0),
        BLOCK=512,
        num_warps=4,
    )


def combine_swa_extra_indices(swa_indices, swa_lens, extra_indices, extra_lens, s_kv_swa, out_indices, out_lens):
    """Launch over the rows of ``out_indices``."""
    tokens, width = out_indices.shape
    combine_swa_extra_kernel[(tokens,)](
        swa_indices,
        swa_lens if swa_lens is not None else out_lens,
        extra_indices,
        extra_lens if extra_lens is not None else out_lens,
        out_indices,
        out_lens,
        swa_indices.shape[1],
        extra_indices.shape[1],
        s_kv_swa,
        width,
        swa_indices.stride(0),
        extra_indices.stride(0),
        out_indices.stride(0),
        HAS_SWA_LENS=swa_lens is not None,
        HAS_EXTRA_LENS=extra_lens is not None,
        BLOCK=512,
        num_warps=4,
    )


def build_swa_token_ids(first, starts, token_ids, request):
    """Launch over blocks of ``token_ids``; each row looks its request up in ``starts``."""
    total, requests = token_ids.shape[0], first.shape[0]
    build_swa_token_ids_kernel[(triton.cdiv(total, 512),)](
        first,
        starts,
        token_ids,
        request,
        requests,
        total,
        requests.bit_length(),
        BLOCK=512,
        num_warps=4,
    )


def sanitize_indices(
    indices: torch.Tensor, lens: torch.Tensor | None, capacity: int, multiple: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices as a kernel with limits wants them: int32, width a positive ``multiple``, in range or -1.

    Args:
        indices: int32 or int64 ``[T, w]``; anything outside ``[0, capacity)`` or past its row's length becomes -1.
        lens: int ``[T]`` or None; clamped to ``[0, w]``.

    Returns:
        int32 ``[T, ceil(w / multiple) * multiple]`` and int32 ``[T]``.
    """
    tokens, width = indices.shape
    out_width = max(1, -(-width // multiple)) * multiple
    out = torch.empty(tokens, out_width, dtype=torch.int32, device=indices.device)
    out_lens = torch.empty(tokens, dtype=torch.int32, device=indices.device)
    _launch_sanitize(
        tokens,
        (indices, lens if lens is not None else out_lens, out, out_lens),
        (width, out_width, capacity, indices.stride(0), out.stride(0)),
        (lens is not None, 512),
        4,
    )
    return out, out_lens
