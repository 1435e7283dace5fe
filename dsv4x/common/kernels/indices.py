"""Index remaps: one program a row, every table read bounds-checked, -1 kept as -1 wherever it stands."""

import torch
import triton
import triton.language as tl


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
def _slots_of(local, valid, table_ptr, columns, page_size, pages):
    """Slots (int64) of entries ``local`` through one request's block-table row; -1 where there is none."""
    column = local // page_size
    valid = valid & (local >= 0) & (column < columns)
    page = tl.load(table_ptr + column, mask=valid, other=-1).to(tl.int64)
    valid = valid & (page >= 0) & (page < pages)
    return tl.where(valid, page * page_size + local % page_size, -1)


@triton.jit
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
    slots = _slots_of(local, offset < span, table, table_columns, page_size, pages)
    tl.store(out_ptr + token.to(tl.int64) * out_stride + offset, slots.to(tl.int32), mask=offset < window_size)
    tl.store(lens_ptr + token, span)


@triton.jit
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
        slots = _slots_of(local, local < limit, table, table_columns, page_size, pages)
        tl.store(out_ptr + token * out_stride + offset, slots.to(tl.int32), mask=offset < width)


@triton.jit
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
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
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
    span = tl.minimum(visible, topk)
    window = tl.minimum(position + 1, window_size)
    row = token.to(tl.int64)
    for start in range(0, width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        local = tl.load(topk_ptr + row * topk_stride + offset, mask=offset < span, other=-1).to(tl.int64)
        top = tl.where((local >= 0) & (local < visible), compressed_base + local, -1)
        raw = position - window + 1 + offset - span
        swa = tl.where(raw >= first_gathered, swa_base + raw - first_gathered, -1)
        value = tl.where(offset < span, top, tl.where(offset < span + window, swa, -1))
        if HAS_ROW_SLOTS:
            slot = tl.load(row_slots_ptr + value, mask=(value >= 0) & (value < rows), other=-1)
            value = tl.where(slot >= 0, value, -1)
        tl.store(out_ptr + row * out_stride + offset, value.to(tl.int32), mask=offset < width)
    tl.store(lens_ptr + token, span + window)


@triton.jit
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
    length = width
    if HAS_LENS:
        length = tl.minimum(tl.maximum(tl.load(lens_ptr + token), 0), width).to(tl.int32)
    for start in range(0, out_width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        index = tl.load(indices_ptr + token * indices_stride + offset, mask=offset < length, other=-1)
        index = tl.where((index >= 0) & (index < capacity), index, -1)
        tl.store(out_ptr + token * out_stride + offset, index.to(tl.int32), mask=offset < out_width)
    tl.store(out_lens_ptr + token, length)


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
    local_to_slots_kernel[(tokens,)](
        local,
        request,
        limits,
        block_table,
        out,
        width,
        block_table.shape[0],
        local.stride(0),
        block_table.stride(0),
        block_table.shape[1],
        page_size,
        pages,
        out.stride(0),
        BLOCK=512,
        num_warps=4,
    )


def combine_topk_swa_indices(
    topk_indices, query_start_loc, seq_lens, gather_lens, compressed_base, swa_base,
    window_size, compress_ratio, topk, row_slots, positions, out_indices, out_lens,
):  # fmt: skip
    """Launch over the rows of ``topk_indices``."""
    tokens, width = out_indices.shape
    request, position = positions if positions is not None else (out_lens, out_lens)
    combine_kernel[(tokens,)](
        topk_indices,
        query_start_loc,
        seq_lens,
        gather_lens,
        compressed_base,
        swa_base,
        row_slots if row_slots is not None else out_indices,
        request,
        position,
        out_indices,
        out_lens,
        seq_lens.shape[0],
        min(topk, topk_indices.shape[1]),
        window_size,
        compress_ratio,
        width,
        row_slots.shape[0] if row_slots is not None else 0,
        topk_indices.stride(0),
        out_indices.stride(0),
        HAS_ROW_SLOTS=row_slots is not None,
        HAS_POSITIONS=positions is not None,
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
    out_width = max(1, triton.cdiv(width, multiple)) * multiple
    out = torch.empty(tokens, out_width, dtype=torch.int32, device=indices.device)
    out_lens = torch.empty(tokens, dtype=torch.int32, device=indices.device)
    sanitize_kernel[(tokens,)](
        indices,
        lens if lens is not None else out_lens,
        out,
        out_lens,
        width,
        out_width,
        capacity,
        indices.stride(0),
        out.stride(0),
        HAS_LENS=lens is not None,
        BLOCK=512,
        num_warps=4,
    )
    return out, out_lens
