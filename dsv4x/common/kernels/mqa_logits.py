"""The indexer's logits: ``k_scale * sum over heads of w * max(q . k, 0)``, over pages and over flat rows.

A program holds the heads of one or more query rows and walks K tiles: K's entries are the rows of the matrix product
and heads its columns, so that the sum over heads stays inside a thread and its neighbours. FP8 of the arch's own
flavour is multiplied as it is, gfx942 takes OCP's K at half its values, and everything else is exact in bf16. A NaN
product counts as 0, as in DeepGEMM, whose maximum with 0 drops it; a logit that is NaN all the same becomes -inf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..core import encodings
from ..core.layouts import PagedCache
from ..core.logits_calls import FlatLogitsCall, PagedLogitsCall, PagedRows
from ..core.model import INDEX_DIM
from ..core.platform import platform
from .encodings import e2m1_to_f32, e4m3fn_to_f32, e4m3fnuz_to_f32, ue8m0_to_f32
from .launch import Launcher
from .portability import INTERPRETED, dot, to_bf16
from .schedule import get_paged_mqa_logits_metadata, limit_lens

DIM = tl.constexpr(INDEX_DIM)
_MINUS_INF = tl.constexpr(float("-inf"))


@dataclass(frozen=True)
class LogitsConfig:
    """K entries a step, query rows a program, how Triton launches it, and programs wanted for each SM."""

    block: int
    rows: int
    num_warps: int
    num_stages: int
    programs: int
    matrix_instr_nonkdim: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Launch options; ``matrix_instr_nonkdim`` exists on HIP only."""
        hip = {"matrix_instr_nonkdim": self.matrix_instr_nonkdim} if self.matrix_instr_nonkdim else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **hip}


@triton.jit
def _as_operand(codes, ENCODING: tl.constexpr, NATIVE: tl.constexpr):
    """What a matrix product takes: FP8 as loaded where ``NATIVE``, else bf16."""
    if NATIVE or ENCODING == "bf16":
        return codes
    elif ENCODING == "e4m3fnuz":
        return to_bf16(e4m3fnuz_to_f32(codes))
    else:
        return to_bf16(e4m3fn_to_f32(codes))


@triton.jit
def halved_e4m3fnuz(codes):
    """Words of four e4m3fn codes, uint32 ``[N, M]`` -> the e4m3fnuz codes of half their values, uint8 ``[N, 4 * M]``.

    The flavours' biases differ by one. So do 0x80, which is -0 in one and NaN in the other, and e4m3fn's NaNs, 0x7F and
    0xFF.
    """
    magnitude = codes & 0x7F7F7F7F
    # No sum reaches the next byte.
    nonzero = (magnitude + 0x7F7F7F7F) & 0x80808080
    nan = (magnitude + 0x01010101) & 0x80808080
    codes = magnitude | (codes & nonzero)
    codes = (codes & ~(nan | (nan - (nan >> 7)))) | nan
    pairs = tl.join(codes & 0x00FF00FF, (codes >> 8) & 0x00FF00FF)
    halves = tl.join((pairs & 0xFF).to(tl.uint8), (pairs >> 16).to(tl.uint8))
    return tl.reshape(tl.permute(halves, (0, 1, 3, 2)), (codes.shape[0], 4 * codes.shape[1]))


@triton.jit
def _typed(pointer, ENCODING: tl.constexpr, NATIVE: tl.constexpr):
    """A byte pointer as one to what is loaded: a tile cast after its load would leave its way to the product."""
    if NATIVE:
        if ENCODING == "e4m3fnuz":
            return pointer.to(tl.pointer_type(tl.float8e4b8))
        else:
            return pointer.to(tl.pointer_type(tl.float8e4nv))
    else:
        return pointer


@triton.jit
def _load_q(
    q_ptr, weights_ptr, row, last, weights_stride,
    HEADS: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """(q ``[ROWS * HEADS, 128]``, weights ``[ROWS * HEADS]``) of the rows from ``row`` on; zeros from ``last`` on."""
    head = tl.arange(0, ROWS * HEADS)
    mask = row + head // HEADS < last
    value = row.to(tl.int64) * (HEADS * DIM) + head[:, None] * DIM + tl.arange(0, DIM)[None, :]
    q = tl.load(_typed(q_ptr, Q, NATIVE) + value, mask=mask[:, None], other=0.0)
    weight = weights_ptr + (row + head // HEADS).to(tl.int64) * weights_stride + head % HEADS
    return tl.trans(_as_operand(q, Q, NATIVE)), tl.load(weight, mask=mask, other=0.0)


@triton.jit
def _load_k(data_ptr, ue8m0_ptr, mask, Q: tl.constexpr, K: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    """The K tile as an operand, from byte pointers ``[BLOCK, 1]`` to each entry's values and to ue8m0 scales."""
    if K == "e2m1":
        codes = tl.load(data_ptr + tl.arange(0, DIM // 2)[None, :], mask=mask)
        scales = ue8m0_to_f32(tl.load(ue8m0_ptr + tl.arange(0, DIM // 32)[None, :], mask=mask))
        values = tl.reshape(e2m1_to_f32(tl.interleave(codes & 0xF, codes >> 4)), (BLOCK, DIM // 32, 32))
        return to_bf16(tl.reshape(values * scales[:, :, None], (BLOCK, DIM)))
    elif K == "mxfp8":
        codes = tl.load(data_ptr + tl.arange(0, DIM)[None, :], mask=mask)
        scales = ue8m0_to_f32(tl.load(ue8m0_ptr + tl.arange(0, DIM // 32)[None, :], mask=mask))
        values = tl.reshape(e4m3fn_to_f32(codes), (BLOCK, DIM // 32, 32))
        return to_bf16(tl.reshape(values * scales[:, :, None], (BLOCK, DIM)))
    elif NATIVE and K != Q:
        words = data_ptr.to(tl.pointer_type(tl.uint32)) + tl.arange(0, DIM // 4)[None, :]
        return halved_e4m3fnuz(tl.load(words, mask=mask)).to(tl.float8e4b8, bitcast=True)
    else:
        codes = tl.load(_typed(data_ptr, K, NATIVE) + tl.arange(0, DIM)[None, :], mask=mask)
        return _as_operand(codes, K, NATIVE)


@triton.jit
def _load_scale(pointer, mask, Q: tl.constexpr, K: tl.constexpr, NATIVE: tl.constexpr):
    """What a K tile's logits are multiplied by, ``[BLOCK, 1]``; ue8m0 scales are in the operand."""
    if K == "e2m1" or K == "mxfp8":
        return 1.0
    elif NATIVE and K != Q:
        return 2.0 * tl.load(pointer.to(tl.pointer_type(tl.float32)), mask=mask)
    else:
        return tl.load(pointer.to(tl.pointer_type(tl.float32)), mask=mask)


@triton.jit
def _logits(k, q, weights, HEADS: tl.constexpr, ROWS: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    """float32 ``[BLOCK, ROWS]``: sum over heads of w * max(q . k, 0)."""
    if NATIVE:
        products = tl.dot(k, q)
    else:
        products = dot(k, q, tl.zeros((BLOCK, ROWS * HEADS), tl.float32))
    weighted = tl.maximum(products, 0.0) * weights[None, :]
    if ROWS == 1:
        return tl.sum(weighted, axis=1)[:, None]
    else:
        return tl.sum(tl.reshape(weighted, (BLOCK, ROWS, HEADS)), axis=2)


@triton.jit
def _store_logits(out_ptr, values, mask):
    tl.store(out_ptr, tl.where(values == values, values, _MINUS_INF), mask=mask)


@triton.jit
def _row_lens(lens_ptr, request, first, next_n, most, lens_stride, lens_stride_n, ROWS: tl.constexpr):
    """(which of ``ROWS`` rows are the request's, their lengths within ``[0, most]``)."""
    row = first + tl.arange(0, ROWS)
    mine = row < next_n
    lens = tl.load(lens_ptr + request * lens_stride + row * lens_stride_n, mask=mine, other=0)
    return mine, tl.minimum(tl.maximum(lens, 0), most).to(tl.int32)


@triton.jit
def _table_row(table_ptr, requests_ptr, row, requests, requests_stride, table_stride, HAS_REQUESTS: tl.constexpr):
    """(block table of a row's request, whether there is such a request)."""
    request = row
    if HAS_REQUESTS:
        request = tl.load(requests_ptr + row * requests_stride).to(tl.int64)
    known = (request >= 0) & (request < requests)
    return table_ptr + tl.where(known, request, 0) * table_stride, known


@triton.jit
def _score_pages(
    begin, end, limit, lens, mine, q, weights, cache_ptr, table, out,
    page_size, pages, scale_base, page_stride,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    NATIVE: tl.constexpr, WHOLE_PAGES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The logits of ``ROWS`` query rows over entries ``[begin, end)``; tiles past ``end`` write up to ``limit``."""
    ENTRY: tl.constexpr = DIM // 2 if K == "e2m1" else DIM
    entry = tl.arange(0, BLOCK)
    for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
        column = at + entry
        if WHOLE_PAGES:
            # The tile is part of one page, and a page is read whole: no entry of it needs a mask.
            page = tl.load(table + at // page_size)
            there = (page >= 0) & (page < pages)
            base = cache_ptr + tl.where(there, page, 0).to(tl.int64) * page_stride
            inside = (at % page_size + entry)[:, None]
            data = base + inside * ENTRY
            found = column < tl.where(there, end, 0)
            scales = base + scale_base + inside * 4
            scale = _load_scale(scales, None, Q, K, NATIVE)
            k = _load_k(data, scales, None, Q, K, NATIVE, BLOCK)
        else:
            held = column < end
            page = tl.load(table + column // page_size, mask=held, other=-1)
            found = held & (page >= 0) & (page < pages)
            base = cache_ptr + tl.where(found, page, 0).to(tl.int64) * page_stride
            inside = (column % page_size)[:, None]
            data = base[:, None] + inside * ENTRY
            scales = base[:, None] + scale_base + inside * 4
            scale = _load_scale(scales, found[:, None], Q, K, NATIVE)
            k = _load_k(data, scales, found[:, None], Q, K, NATIVE, BLOCK)
        values = _logits(k, q, weights, HEADS, ROWS, NATIVE, BLOCK) * scale
        values = tl.where(found[:, None] & (column[:, None] < lens[None, :]), values, _MINUS_INF)
        _store_logits(out + column[:, None], values, mine[None, :] & (column < limit)[:, None])


@triton.jit(
    do_not_specialize=(
        "lens_ptr", "requests_ptr", "table_ptr", "next_n", "groups", "chunks", "max_context_len", "requests",
        "table_width", "pages", "requests_stride", "table_stride", "lens_stride", "lens_stride_n",
    )
)  # fmt: skip
def paged_mqa_logits_kernel(
    q_ptr, cache_ptr, weights_ptr, lens_ptr, requests_ptr, table_ptr, out_ptr,
    next_n, groups, chunks, chunk, max_context_len, requests, table_width, page_size, pages, scale_base,
    page_stride, requests_stride, table_stride, weights_stride, lens_stride, lens_stride_n, out_stride,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    NATIVE: tl.constexpr, WHOLE_PAGES: tl.constexpr, STAGES: tl.constexpr, HAS_REQUESTS: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """Program (request, chunk, group): ``ROWS`` query rows of a request against ``chunk`` of its entries.

    ``CLEAN``: columns behind a row's entries are written too.
    """
    program = tl.program_id(0)
    # Neighbours in time are the groups of a request's query rows, which read the same K.
    first = program % groups * ROWS
    chunk_at = program // groups % chunks
    request = (program // groups // chunks).to(tl.int64)
    # A table row that is too short ends the request there.
    most = tl.minimum(tl.cast(table_width, tl.int64) * page_size, max_context_len).to(tl.int32)
    mine, lens = _row_lens(lens_ptr, request, first, next_n, most, lens_stride, lens_stride_n, ROWS)
    table, known = _table_row(table_ptr, requests_ptr, request, requests, requests_stride, table_stride, HAS_REQUESTS)
    lens = tl.where(known, lens, 0)
    begin = chunk_at * chunk
    limit = tl.minimum(begin + chunk, max_context_len)
    end = tl.minimum(limit, tl.max(lens))
    first_row = request * next_n + first
    out = out_ptr + (first_row + tl.arange(0, ROWS))[None, :] * out_stride
    if end > begin:
        q, weights = _load_q(
            q_ptr, weights_ptr, first_row, (request + 1) * next_n, weights_stride, HEADS, ROWS, Q, NATIVE
        )
        _score_pages(
            begin, end, limit, lens, mine, q, weights, cache_ptr, table, out, page_size, pages, scale_base,
            page_stride, HEADS, ROWS, BLOCK, Q, K, NATIVE, WHOLE_PAGES, STAGES,
        )  # fmt: skip
    if CLEAN:
        # Tiles reach past the last length by less than a block; everything behind them is filled here.
        entry = tl.arange(0, BLOCK)
        filled = begin + tl.cdiv(tl.maximum(end - begin, 0), BLOCK) * BLOCK
        for at in tl.range(filled, limit, BLOCK):
            column = at + entry
            empty = tl.full((BLOCK, ROWS), _MINUS_INF, tl.float32)
            tl.store(out + column[:, None], empty, mask=mine[None, :] & (column < limit)[:, None])


@triton.jit(
    do_not_specialize=(
        "lens_ptr", "requests_ptr", "table_ptr", "longest_ptr", "schedule_ptr", "next_n", "groups", "max_context_len",
        "requests", "table_width", "pages", "requests_stride", "table_stride", "lens_stride", "lens_stride_n",
    )
)  # fmt: skip
def scheduled_mqa_logits_kernel(
    q_ptr, cache_ptr, weights_ptr, lens_ptr, requests_ptr, table_ptr, longest_ptr, schedule_ptr, out_ptr,
    next_n, groups, max_context_len, requests, table_width, page_size, pages, scale_base,
    page_stride, requests_stride, table_stride, weights_stride, lens_stride, lens_stride_n, out_stride,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    NATIVE: tl.constexpr, WHOLE_PAGES: tl.constexpr, STAGES: tl.constexpr, HAS_REQUESTS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Program i: what stands between rows i and i + 1 of a schedule of ``SPLIT`` entries a segment."""
    schedule = schedule_ptr + tl.program_id(0) * 2
    from_group = tl.load(schedule)
    from_segment = tl.load(schedule + 1)
    to_group = tl.load(schedule + 2)
    to_segment = tl.load(schedule + 3)
    most = tl.minimum(tl.cast(table_width, tl.int64) * page_size, max_context_len).to(tl.int32)
    for group in tl.range(from_group, to_group + (to_segment > 0).to(tl.int32)):
        request = (group // groups).to(tl.int64)
        first = group % groups * ROWS
        mine, lens = _row_lens(lens_ptr, request, first, next_n, most, lens_stride, lens_stride_n, ROWS)
        table, known = _table_row(
            table_ptr, requests_ptr, request, requests, requests_stride, table_stride, HAS_REQUESTS
        )
        lens = tl.where(known, lens, 0)
        # No longer than the schedule has it, which has no segments of a request that is not scored.
        longest = tl.minimum(tl.max(lens), tl.load(longest_ptr + request))
        begin = tl.where(group == from_group, from_segment * SPLIT, 0)
        end = tl.minimum(tl.where(group == to_group, to_segment * SPLIT, most), longest)
        if end > begin:
            first_row = request * next_n + first
            out = out_ptr + (first_row + tl.arange(0, ROWS))[None, :] * out_stride
            q, weights = _load_q(
                q_ptr, weights_ptr, first_row, (request + 1) * next_n, weights_stride, HEADS, ROWS, Q, NATIVE
            )
            _score_pages(
                begin, end, max_context_len, lens, mine, q, weights, cache_ptr, table, out, page_size, pages,
                scale_base, page_stride, HEADS, ROWS, BLOCK, Q, K, NATIVE, WHOLE_PAGES, STAGES,
            )  # fmt: skip


@triton.jit(do_not_specialize=("ks_ptr", "ke_ptr", "rows", "entries", "columns", "chunks"))
def mqa_logits_kernel(
    q_ptr, k_ptr, k_scale_ptr, weights_ptr, ks_ptr, ke_ptr, out_ptr,
    rows, entries, columns, chunks, chunk, weights_stride, k_stride, k_scale_stride, out_stride,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    NATIVE: tl.constexpr, RELATIVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (rows, chunk): ``ROWS`` query rows against ``chunk`` entries from their first one's tile on.

    ``RELATIVE``: a row's column 0 is entry ks, else entry 0.
    """
    program = tl.program_id(0)
    first = (program // chunks).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    mine = row < rows
    ks = tl.minimum(tl.maximum(tl.load(ks_ptr + row, mask=mine, other=0), 0), entries).to(tl.int32)
    ke = tl.minimum(tl.maximum(tl.load(ke_ptr + row, mask=mine, other=0), ks), entries).to(tl.int32)
    shift = ks
    if RELATIVE:
        ke = tl.minimum(ke.to(tl.int64), ks.to(tl.int64) + columns).to(tl.int32)
    else:
        shift = tl.zeros_like(ks)
    some = mine & (ke > ks)
    # Of no row at all the range is empty: entries to 0.
    low = tl.min(tl.where(some, ks, entries)) // BLOCK * BLOCK
    high = tl.max(tl.where(some, ke, 0))
    begin = low + program % chunks * chunk
    end = tl.minimum(begin + chunk, high)
    entry = tl.arange(0, BLOCK)
    out = out_ptr + row[None, :] * out_stride
    if end > begin:
        q, weights = _load_q(q_ptr, weights_ptr, first, rows, weights_stride, HEADS, ROWS, Q, NATIVE)
        for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
            column = at + entry
            held = column < entries
            data = k_ptr + column.to(tl.int64)[:, None] * k_stride
            scales = k_scale_ptr + column.to(tl.int64)[:, None] * k_scale_stride
            scale = _load_scale(scales, held[:, None], Q, K, NATIVE)
            k = _load_k(data, scales, held[:, None], Q, K, NATIVE, BLOCK)
            values = _logits(k, q, weights, HEADS, ROWS, NATIVE, BLOCK) * scale
            inside = (column[:, None] >= ks[None, :]) & (column[:, None] < ke[None, :])
            _store_logits(out + column[:, None] - shift[None, :], values, inside & mine[None, :])
    # What no entry of its row stands in, inside this chunk of columns.
    left = program % chunks * chunk
    limit = tl.minimum(left + chunk, columns)
    from_column = ks - shift
    to_column = ke - shift
    empty = tl.full((BLOCK, ROWS), _MINUS_INF, tl.float32)
    for at in tl.range(left, tl.minimum(limit, tl.max(tl.where(mine, from_column, 0))), BLOCK):
        column = (at + entry)[:, None]
        tl.store(out + column, empty, mask=(column < limit) & (column < from_column[None, :]) & mine[None, :])
    right = tl.maximum(left, tl.min(tl.where(mine, to_column, columns)) // BLOCK * BLOCK)
    for at in tl.range(right, limit, BLOCK):
        column = (at + entry)[:, None]
        past = (column >= to_column[None, :]) & (column >= left) & (column < limit)
        tl.store(out + column, empty, mask=past & mine[None, :])


@triton.jit(
    do_not_specialize=(
        "starts_ptr", "ends_ptr", "requests_ptr", "table_ptr", "blocks", "columns", "requests", "table_width", "pages",
        "starts_stride", "ends_stride", "ends_stride_n", "requests_stride", "table_stride", "next_n",
    )
)  # fmt: skip
def clean_logits_kernel(
    logits_ptr, starts_ptr, ends_ptr, requests_ptr, table_ptr, out_ptr,
    blocks, columns, requests, table_width, page_size, pages, logits_stride,
    starts_stride, ends_stride, ends_stride_n, requests_stride, table_stride, out_stride, next_n,
    BLOCK: tl.constexpr, HAS_STARTS: tl.constexpr, SHIFTED: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_REQUESTS: tl.constexpr, IN_PLACE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """-inf where a row has no entry, where a page is not in the pool, and for NaN; copied where not in place.

    Row i of the logits is row ``i % next_n`` of lengths ``i // next_n``.
    ``SHIFTED``: the source's column 0 is the row's start, the result's is entry 0.
    ``ALIGNED``: columns are a multiple of 16, so that stores may be wide.
    """
    if ALIGNED:
        columns = columns // 16 * 16
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    start = tl.zeros((), tl.int32)
    end = tl.load(ends_ptr + row // next_n * ends_stride + row % next_n * ends_stride_n)
    end = tl.minimum(end, columns).to(tl.int32)
    if HAS_STARTS:
        start = tl.maximum(tl.load(starts_ptr + row * starts_stride), 0).to(tl.int32)
    table = table_ptr
    if HAS_TABLE:
        table, known = _table_row(
            table_ptr, requests_ptr, row // next_n, requests, requests_stride, table_stride, HAS_REQUESTS
        )
        end = tl.where(known, end, 0)
    inside = (column >= start) & (column < end)
    if HAS_TABLE:
        inside = inside & (column // page_size < table_width)
        page = tl.load(table + column // page_size, mask=inside, other=-1)
        inside = inside & (page >= 0) & (page < pages)
    source = logits_ptr + row * logits_stride + column
    if SHIFTED:
        source -= start
    value = tl.load(source, mask=inside, other=_MINUS_INF)
    sound = inside & (value == value)
    written = column < columns
    if IN_PLACE:
        # Sound logits stay as they are, so that this pass writes next to nothing.
        written = written & (sound == 0)
    tl.store(out_ptr + row * out_stride + column, tl.where(sound, value, _MINUS_INF), mask=written)


@triton.jit(do_not_specialize=("ks_ptr", "ke_ptr", "rows", "entries", "most"))
def limit_ranges_kernel(ks_ptr, ke_ptr, out_ptr, rows, entries, most, BLOCK: tl.constexpr):
    """Ranges within ``[0, entries]`` of at most ``most``: starts, then ends."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    ks = tl.minimum(tl.maximum(tl.load(ks_ptr + row, mask=mask, other=0), 0), entries).to(tl.int64)
    ke = tl.minimum(tl.load(ke_ptr + row, mask=mask, other=0), entries).to(tl.int64)
    ke = tl.minimum(tl.maximum(ke, ks), ks + most)
    tl.store(out_ptr + row, ks.to(tl.int32), mask=mask)
    tl.store(out_ptr + tl.cast(rows, tl.int64) + row, ke.to(tl.int32), mask=mask)


@triton.jit(do_not_specialize=("rows", "capacity"))
def gather_indexer_k_kernel(
    cache_ptr, slots_ptr, k_ptr, scale_ptr, rows, capacity, page_size, page_stride, scale_base,
    ENTRY: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Values ``[rows, ENTRY]`` and the 4 bytes of scales of each slot; zeros where it is not in the cache."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    slot = tl.load(slots_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    valid = (slot >= 0) & (slot < capacity)
    slot = tl.where(valid, slot, 0)
    if not WIDE:
        # 64-bit division is for pools that need it.
        slot = slot.to(tl.int32)
    page = slot // page_size
    inside = (slot - page * page_size).to(tl.int64)
    base = cache_ptr + page.to(tl.int64) * page_stride
    byte = tl.arange(0, ENTRY)[None, :]
    values = tl.load((base + inside * ENTRY)[:, None] + byte, mask=valid[:, None], other=0)
    tl.store(k_ptr + row[:, None] * ENTRY + byte, values, mask=(row < rows)[:, None])
    scales = (base + scale_base + inside * 4).to(tl.pointer_type(tl.int32))
    tl.store(scale_ptr + row, tl.load(scales, mask=valid, other=0), mask=row < rows)


_CLEAN_BLOCK = 2048
_launch_paged, _launch_flat = Launcher(paged_mqa_logits_kernel), Launcher(mqa_logits_kernel)
_launch_scheduled = Launcher(scheduled_mqa_logits_kernel)
_launch_clean, _launch_limit = Launcher(clean_logits_kernel), Launcher(limit_ranges_kernel)
_launch_gather = Launcher(gather_indexer_k_kernel)
_GATHER_BLOCK = 32

_ENCODINGS = {torch.float8_e4m3fn: "e4m3fn", torch.float8_e4m3fnuz: "e4m3fnuz", torch.bfloat16: "bf16"}

_MIN_CHUNK, _MAX_CHUNK = 512, 8192

SPLIT = 256
"""Entries in a segment of :func:`scheduled_mqa_logits_kernel`'s schedule."""

# Of an H200 (benchmarks/results/indexer-h200.json): one row streams K and wants many loads under way; two are bound by
# their product's sums, and by how evenly programs end.
_HOPPER_PAGED = (LogitsConfig(64, 1, 4, 5, programs=4), LogitsConfig(64, 2, 4, 5, programs=8))
_HOPPER_FLAT = LogitsConfig(64, 2, 4, 3, programs=32)
_GFX = LogitsConfig(64, 1, 4, 2, programs=8, matrix_instr_nonkdim=16)
_SMALLEST = LogitsConfig(64, 1, 4, 2, programs=8)


def native(q: str, k: str, arch_fp8: str) -> bool:
    """Whether the arch multiplies q's and K's codes: both of its own flavour, or K of OCP's where its own is fnuz."""
    return not INTERPRETED.value and q == arch_fp8 and (k == q or (q, k) == ("e4m3fnuz", "e4m3fn"))


def logits_config(arch: str, native_fp8: bool, *, next_n: int | None) -> LogitsConfig:
    """The launch shape of paged logits with ``next_n`` rows a request, or of flat ones; unknown archs' is small."""
    if arch.startswith(("sm_9", "sm_10")) and native_fp8:
        return _HOPPER_FLAT if next_n is None else _HOPPER_PAGED[next_n > 1]
    return _GFX if arch.startswith("gfx") else _SMALLEST


def _chunk(rows: int, width: int, config: LogitsConfig, multiprocessors: int) -> int:
    """Entries a program covers: a power of two that gives every SM its programs, but never too few to begin for."""
    wanted = -(-rows * width // (config.programs * multiprocessors))
    return max(min(1 << max(wanted - 1, 0).bit_length(), _MAX_CHUNK), _MIN_CHUNK, config.block)


def empty_logits(rows: int, width: int, device: torch.device) -> torch.Tensor:
    """float32 ``[rows, width]`` of a row stride that kernels are compiled for once, whatever the width is."""
    return torch.empty_strided((rows, width), (-(-width // 16) * 16, 1), dtype=torch.float32, device=device)


def _decoded(q: torch.Tensor, q_scale: torch.Tensor | None) -> torch.Tensor:
    """q as the kernels take it: e2m1 with its scales is exact in bf16."""
    if q_scale is None:
        return q.contiguous()
    values = encodings.decode_e2m1(q).unflatten(-1, (4, 32)) * encodings.decode_ue8m0(q_scale)[..., None]
    return values.flatten(-2).bfloat16()


def _bytes(q: torch.Tensor) -> torch.Tensor:
    return q if q.dtype == torch.bfloat16 else q.view(torch.uint8)


class PagedPlan(NamedTuple):
    """A schedule of :func:`scheduled_mqa_logits_kernel` and the lengths that it was made from.

    Attributes:
        longest: int32 ``[B, 1]``, the largest of each request's lengths, within its bounds.
        schedule: int32 ``[programs + 1, 2]``, the group of rows and the segment where each program begins, and the end.
    """

    longest: torch.Tensor
    schedule: torch.Tensor


def plan_paged(rows: PagedRows, earlier: PagedPlan | None) -> PagedPlan:
    """The schedule that all layers of a step share, filled in place where there is an earlier one."""
    device = rows.context_lens.device
    limits = platform.limits(device)
    batch, next_n = rows.context_lens.shape
    config = logits_config(limits.arch, native(rows.q_encoding, rows.k_encoding, limits.fp8), next_n=next_n)
    if earlier is None:
        programs = config.programs * limits.multiprocessors
        longest = torch.empty(batch, 1, dtype=torch.int32, device=device)
        earlier = PagedPlan(longest, torch.empty(programs + 1, 2, dtype=torch.int32, device=device))
    limit_lens(rows, 1, earlier.longest)
    groups, programs = -(-next_n // config.rows), earlier.schedule.shape[0] - 1
    get_paged_mqa_logits_metadata(earlier.longest, SPLIT, groups, programs, earlier.schedule)
    return earlier


def paged_mqa_logits(call: PagedLogitsCall) -> torch.Tensor:
    """Launch over ``[B, n]`` query rows: by the call's plan, or in chunks of the columns where it has none.

    Columns behind a row's entries are written where they have to be clean, which no plan is for.
    """
    q, cache, weights, out, max_context_len = call.q, call.cache, call.weights, call.out, call.max_context_len
    context_lens, block_table, requests = call.context_lens, call.block_table, call.requests
    limits = platform.limits(q.device)
    batch, next_n, heads = q.shape[:3]
    if out is None:
        out = empty_logits(batch * next_n, max_context_len, q.device)
    q, layout = _decoded(q, call.q_scale), cache.layout
    q_encoding = _ENCODINGS[q.dtype]
    k_encoding = layout.operand_encoding
    is_native = native(q_encoding, k_encoding, limits.fp8)
    config = logits_config(limits.arch, is_native, next_n=next_n)
    groups = -(-next_n // config.rows)
    # Triton takes any tensor for one that it does not read.
    named = context_lens if requests is None else requests
    tensors = (_bytes(q), cache.data, weights, context_lens, named, block_table)
    numbers = (
        max_context_len, block_table.shape[0], block_table.shape[1], cache.page_size, cache.pages,
        layout.scale_base(cache.page_size), cache.page_stride, named.stride(0), block_table.stride(0),
        weights.stride(0), context_lens.stride(0), context_lens.stride(1), out.stride(0),
    )  # fmt: skip
    constexprs = (
        heads, config.rows, config.block, q_encoding, k_encoding, is_native,
        cache.page_size % config.block == 0, config.num_stages, requests is not None,
    )  # fmt: skip
    if call.plan is not None and not call.clean_logits:
        longest, schedule = call.plan
        _launch_scheduled(
            schedule.shape[0] - 1, (*tensors, longest, schedule, out), (next_n, groups, *numbers), (*constexprs, SPLIT),
            **config.options,
        )  # fmt: skip
        return out
    chunk = _chunk(batch * groups, max_context_len, config, limits.multiprocessors)
    chunks = -(-max_context_len // chunk)
    _launch_paged(
        batch * groups * chunks, (*tensors, out), (next_n, groups, chunks, chunk, *numbers),
        (*constexprs, call.clean_logits), **config.options,
    )  # fmt: skip
    return out


def mqa_logits(call: FlatLogitsCall) -> torch.Tensor:
    """Launch over ``[M]`` query rows; every column is written, clean."""
    q, k, k_scale, weights, out, max_seqlen_k = call.q, call.k, call.k_scale, call.weights, call.out, call.max_seqlen_k
    limits = platform.limits(q.device)
    rows, heads = q.shape[:2]
    width = k.shape[0] if max_seqlen_k is None else max_seqlen_k
    if out is None:
        out = empty_logits(rows, width, q.device)
    q = _decoded(q, call.q_scale)
    q_encoding, k_encoding = _ENCODINGS[q.dtype], "e2m1" if k.dtype == torch.uint8 else _ENCODINGS[k.dtype]
    if k_encoding == "e4m3fn" and k_scale.dtype == torch.uint8:
        k_encoding = "mxfp8"
    is_native = native(q_encoding, k_encoding, limits.fp8)
    config = logits_config(limits.arch, is_native, next_n=None)
    # Behind a dimension of its own, because a lone scale may have any stride, with which no view is made.
    scale_bytes = k_scale[..., None].view(torch.uint8)
    groups, span = -(-rows // config.rows), max(k.shape[0], width)
    chunk = _chunk(groups, span, config, limits.multiprocessors)
    chunks = -(-span // chunk)
    _launch_flat(
        groups * chunks,
        (_bytes(q), k.view(torch.uint8), scale_bytes, weights, call.ks, call.ke, out),
        (
            rows, k.shape[0], width, chunks, chunk, weights.stride(0), k.stride(0) * k.element_size(),
            k_scale.stride(0) * k_scale.element_size(), out.stride(0),
        ),
        (
            heads, config.rows, config.block, q_encoding, k_encoding, is_native, max_seqlen_k is not None,
            config.num_stages,
        ),
        **config.options,
    )  # fmt: skip
    return out


def clean_logits(
    logits: torch.Tensor,
    ends: torch.Tensor,
    out: torch.Tensor,
    width: int,
    *,
    starts: torch.Tensor | None = None,
    shifted: bool = False,
    pages: tuple[torch.Tensor, PagedCache] | None = None,
    requests: torch.Tensor | None = None,
) -> None:
    """Launch over a vendor's logits, which become ``out``, or themselves, clean.

    Args:
        logits: float32 or bf16 ``[B * n, >= width]``, columns contiguous.
        ends: ``[B, n]``, the column behind each row's last entry.
        out: float32 ``[B * n, >= width]``, rows contiguous; ``logits`` for in place.
        width: columns.
        starts: ``[B * n]``, the column of each row's first entry.
        shifted: whether the column 0 of ``logits`` is each row's start.
        pages: block table ``[R, m]`` and the cache, a page outside of which makes its columns -inf.
        requests: ``[B]``, the rows' requests; None where row b of ``ends`` is request b.
    """
    # Views would take longer to make than the kernel to run; the strides say the same.
    (batch, next_n), in_place = ends.shape, logits is out
    # Without pages there is no table, and Triton takes any tensor for one.
    table, blocks = ends if pages is None else pages[0], -(-width // _CLEAN_BLOCK)
    page_size, in_pool = (1, 0) if pages is None else (pages[1].page_size, pages[1].pages)
    named = ends if requests is None else requests
    _launch_clean(
        batch * next_n * blocks,
        (logits, ends if starts is None else starts, ends, named, table, out),
        (
            blocks, width, table.shape[0], table.shape[1], page_size, in_pool, logits.stride(0),
            0 if starts is None else starts.stride(0), ends.stride(0), ends.stride(1), named.stride(0),
            table.stride(0), out.stride(0), next_n,
        ),
        (
            _CLEAN_BLOCK, starts is not None, shifted, pages is not None, requests is not None, in_place,
            not in_place and width % 16 == 0,
        ),
        num_warps=8,
    )  # fmt: skip


def limit_ranges(ks: torch.Tensor, ke: torch.Tensor, entries: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 ``(ks, ke)`` with ``0 <= ks <= ke <= entries`` and ``ke <= ks + most``: what DeepGEMM may have."""
    out = torch.empty(2, ks.shape[0], dtype=torch.int32, device=ks.device)
    rows = ks.shape[0]
    _launch_limit(-(-rows // 1024), (ks, ke, out), (rows, entries, most), (1024,), num_warps=4)
    return out[0], out[1]


def gather_indexer_k(cache: PagedCache, slots: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor) -> None:
    """Launch over ``slots [N]``."""
    rows, layout = slots.shape[0], cache.layout
    _launch_gather(
        -(-rows // _GATHER_BLOCK),
        (cache.data, slots, k.view(torch.uint8), k_scale.flatten().view(torch.int32)),
        (rows, cache.capacity, cache.page_size, cache.page_stride, layout.scale_base(cache.page_size)),
        (layout.nope_bytes, _GATHER_BLOCK, cache.capacity > 2**31 - 1),
        num_warps=4,
    )
