"""Decode attention over DSv4 pages on gfx942 and gfx950, in Gluon.

A program takes one token, one block of heads and one split, as the Triton kernel's does, and its rules for splits are
the same. What differs is that every layout is said: bytes are gathered 16 a lane, decoded once and kept in LDS once,
and the next block's bytes are on their way in registers while this one is multiplied.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...common.core.calls import DecodeCall, Result, output
from ...common.core.platform import platform
from ...common.kernels.decode import Spans, clamped_span, reduce_partials, row_shares
from ...common.kernels.decode_shapes import expected_blocks, row_splits
from ...common.kernels.launch import Launcher
from ...common.kernels.order import dies, token_and_block
from ...common.kernels.scratch import partials
from ...common.kernels.softmax import LOG2E
from .codes import decode as decode_codes
from .products import NUM_WARPS, VALUE_DIM, attend, matrix_layout, sums, tile_layout
from .results import finish, load_q
from .shapes import batch_of, head_blocks, shape_of

ENTRY = gl.constexpr(576)
ROPE = gl.constexpr(448)

_clamped_span, _row_shares = gluon.jit(clamped_span.fn), gluon.jit(row_shares.fn)
_token_and_block = gluon.jit(token_and_block.fn)


class Scope(NamedTuple):
    """One cache and a token's index row into it."""

    cache_ptr: gl.tensor
    row_ptr: gl.tensor
    span: gl.tensor
    capacity: gl.tensor
    page_stride: gl.tensor


class Table(NamedTuple):
    """A request's row of the block table, its columns, and the pages in the pool."""

    row: gl.tensor
    columns: gl.tensor
    pages: gl.tensor


class Places(NamedTuple):
    """In LDS, for even and odd blocks: where entries' codes and scales stand in the cache; -1 for what is no entry."""

    codes: gl.shared_memory_descriptor
    scales: gl.shared_memory_descriptor


class Block(NamedTuple):
    """A block's bytes in registers, on their way maybe."""

    words: gl.tensor
    scales: gl.tensor
    rope: gl.tensor


@gluon.constexpr_function
def _gather_layout(BLOCK_K, width):
    """``width`` successive elements a lane, 32 lanes a row: 16 bytes of codes."""
    return gl.BlockedLayout([BLOCK_K // 8, width], [2, 32], [NUM_WARPS, 1], [1, 0])


@gluon.constexpr_function
def _scales_layout(BLOCK_K):
    """Each lane the scales of its own codes."""
    parent = gl.BlockedLayout([BLOCK_K // 8, 1, 16], [2, 8, 4], [NUM_WARPS, 1, 1], [2, 1, 0])
    return gl.SliceLayout(2, parent)


@gluon.constexpr_function
def _rope_layout(BLOCK_K):
    return gl.BlockedLayout([BLOCK_K // 32, 8], [8, 8], [NUM_WARPS, 1], [1, 0])


@gluon.constexpr_function
def _row_layout():
    return gl.BlockedLayout([1], [64], [NUM_WARPS], [0])


@gluon.jit
def _indices(scope, block, BLOCK_K: gl.constexpr):
    """A block of a row's indices; -1 for what is no entry."""
    offset = block * BLOCK_K + gl.arange(0, BLOCK_K, _row_layout())
    index = gl.amd.cdna3.buffer_load(scope.row_ptr, offset, mask=offset < scope.span, other=-1)
    return gl.where((index >= 0) & (index < scope.capacity), index, -1).to(gl.int32)


@gluon.jit
def _pages(index, table, PAGE: gl.constexpr, LOCAL: gl.constexpr):
    """The pages that hold entries ``index``, slots or local; -1 for none."""
    page = gl.where(index >= 0, (index.to(gl.uint32) // PAGE).to(gl.int32), -1)
    if LOCAL:
        held = (page >= 0) & (page < table.columns)
        page = gl.amd.cdna3.buffer_load(table.row, page, mask=held, other=-1)
        page = gl.where((page >= 0) & (page < table.pages), page, -1)
    return page


@gluon.jit
def _place(number, index, page, page_stride, places, PAGE: gl.constexpr, FAR: gl.constexpr):
    """Leave where the entries stand."""
    entry = (index.to(gl.uint32) % PAGE).to(gl.int32)
    base = page * page_stride
    if FAR:
        entry = entry.to(gl.int64)
        base = page.to(gl.int64) * page_stride
    places.codes.index(number & 1).store(gl.where(page >= 0, base + entry * ENTRY, -1))
    places.scales.index(number & 1).store(gl.where(page >= 0, base + PAGE * ENTRY + entry * 8, -1))


@gluon.jit
def _gather(ptr, place, column, UNIT: gl.constexpr, FAR: gl.constexpr):
    """Elements of ``UNIT`` bytes at ``column`` of the rows at ``place`` bytes; 0 where that is nowhere."""
    there = (place >= 0)[:, None]
    offset = (place // UNIT)[:, None] + column[None, :]
    if FAR:
        return gl.load(ptr + offset, mask=gl.broadcast(there, offset)[0], other=0)
    else:
        # A masked lane's offset is one past the buffer, where the hardware reads 0.
        return gl.amd.cdna3.buffer_load(ptr, offset, mask=there)


@gluon.jit
def _load_block(number, cache_ptr, places, BLOCK_K: gl.constexpr, FAR: gl.constexpr):
    CODES: gl.constexpr = _gather_layout(BLOCK_K, 4)
    SCALES: gl.constexpr = _scales_layout(BLOCK_K)
    TAIL: gl.constexpr = _rope_layout(BLOCK_K)
    codes, scales = places.codes.index(number & 1), places.scales.index(number & 1)
    place = gl.multiple_of(codes.load(gl.SliceLayout(1, CODES)), 16)
    column = gl.arange(0, VALUE_DIM // 4, gl.SliceLayout(0, CODES))
    words = _gather(cache_ptr.to(gl.pointer_type(gl.uint32)), place, column, 4, FAR)
    column = gl.arange(0, 8, gl.SliceLayout(0, SCALES))
    scale = _gather(cache_ptr, scales.load(gl.SliceLayout(1, SCALES)), column, 1, FAR)
    place = gl.multiple_of(codes.load(gl.SliceLayout(1, TAIL)), 16)
    column = ROPE // 2 + gl.arange(0, 64, gl.SliceLayout(0, TAIL))
    rope = _gather(cache_ptr.to(gl.pointer_type(gl.bfloat16)), place, column, 2, FAR)
    return Block(words, scale, rope)


@gluon.jit
def _attend_scope(
    q, m, l, acc, scale, k_smem, places, scope, table, first, last,
    BLOCK_K: gl.constexpr, PAGE: gl.constexpr, LOCAL: gl.constexpr, FNUZ: gl.constexpr, FAR: gl.constexpr,
    CDNA4: gl.constexpr,
):  # fmt: skip
    """Fold blocks ``first`` to ``last`` of one scope into the running softmax."""
    OUT: gl.constexpr = matrix_layout(CDNA4, acc.shape[0])
    if first < last:
        index = _indices(scope, first, BLOCK_K)
        _place(first, index, _pages(index, table, PAGE, LOCAL), scope.page_stride, places, PAGE, FAR)
        block = _load_block(first, scope.cache_ptr, places, BLOCK_K, FAR)
        index = _indices(scope, first + 1, BLOCK_K)
        _place(first + 1, index, _pages(index, table, PAGE, LOCAL), scope.page_stride, places, PAGE, FAR)
        index = _indices(scope, first + 2, BLOCK_K)
        for number in range(first, last):
            k_smem.store(decode_codes(block.words, block.scales, _gather_layout(BLOCK_K, 16), FNUZ, CDNA4))
            k_smem.slice(ROPE, 64, dim=1).store(block.rope)
            valid = places.codes.index(number & 1).load(gl.SliceLayout(0, OUT)) >= 0
            block = _load_block(number + 1, scope.cache_ptr, places, BLOCK_K, FAR)
            page = _pages(index, table, PAGE, LOCAL)
            upcoming = _indices(scope, number + 3, BLOCK_K)
            m, l, acc = attend(q, k_smem, valid, scale, m, l, acc, CDNA4)
            _place(number + 2, index, page, scope.page_stride, places, PAGE, FAR)
            index = upcoming
    return m, l, acc


@gluon.jit(
    do_not_specialize=(
        "requests", "table_columns", "table_stride", "table_pages", "heads", "most_splits", "whole_blocks",
        "swa_width", "swa_indices_stride", "swa_capacity", "extra_width", "extra_indices_stride", "extra_capacity",
    )
)  # fmt: skip
def decode_cdna_kernel(
    q_ptr, swa_ptr, swa_indices_ptr, swa_lens_ptr, extra_ptr, extra_indices_ptr, extra_lens_ptr, sink_ptr,
    request_ptr, visible_ptr, table_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    requests, table_columns, table_stride, table_pages, heads, most_splits, whole_blocks, scale,
    q_stride_t, q_stride_h, out_stride_t, out_stride_h,
    swa_width, swa_indices_stride, swa_capacity, swa_page_stride,
    extra_width, extra_indices_stride, extra_capacity, extra_page_stride,
    HAS_SWA_LENS: gl.constexpr, HAS_EXTRA: gl.constexpr, HAS_EXTRA_LENS: gl.constexpr, HAS_SINK: gl.constexpr,
    SPLIT: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_K: gl.constexpr, LOCAL: gl.constexpr,
    SWA_PAGE: gl.constexpr, EXTRA_PAGE: gl.constexpr, SWA_FNUZ: gl.constexpr, EXTRA_FNUZ: gl.constexpr,
    FAR: gl.constexpr, CDNA4: gl.constexpr, DIES: gl.constexpr,
):  # fmt: skip
    """``FAR``: a cache takes 2 GiB or more, so that offsets in it have 64 bits. ``CDNA4``: the code is for gfx950."""
    OUT: gl.constexpr = matrix_layout(CDNA4, BLOCK_H)
    tokens = gl.num_programs(0)
    program = gl.program_id(0) + gl.program_id(1) * tokens
    token, head_block = _token_and_block(program, tokens, gl.num_programs(1), DIES)
    token = token.to(gl.int64)
    split = gl.program_id(2)
    swa_span = swa_width
    if HAS_SWA_LENS:
        swa_span = _clamped_span(gl.load(swa_lens_ptr + token), swa_width)
    extra_span = extra_width
    if HAS_EXTRA_LENS:
        extra_span = _clamped_span(gl.load(extra_lens_ptr + token), extra_width)
    swa_blocks = gl.cdiv(swa_span, BLOCK_K)
    blocks = swa_blocks
    if HAS_EXTRA:
        blocks += gl.cdiv(extra_span, BLOCK_K)
    splits = gl.to_tensor(1)
    first = gl.to_tensor(0)
    last = blocks
    if SPLIT:
        splits, share = _row_shares(blocks, most_splits, whole_blocks)
        first = split * share
        last = gl.minimum(first + share, blocks)
    if split < splits:
        q = load_q(q_ptr, q_stride_t, q_stride_h, token, head_block * BLOCK_H, heads, BLOCK_H, OUT)
        k_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_K, VALUE_DIM], tile_layout(CDNA4, BLOCK_K))
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        offset: gl.constexpr = gl.int64 if FAR else gl.int32
        places = Places(
            gl.allocate_shared_memory(offset, [2, BLOCK_K], FLAT), gl.allocate_shared_memory(offset, [2, BLOCK_K], FLAT)
        )
        m = gl.full([BLOCK_H], float("-inf"), gl.float32, gl.SliceLayout(1, OUT))
        l = sums(BLOCK_H, BLOCK_K, OUT)
        acc = gl.zeros([BLOCK_H, VALUE_DIM], gl.float32, OUT)
        table = Table(table_ptr, table_columns, table_pages)
        swa = Scope(swa_ptr, swa_indices_ptr + token * swa_indices_stride, swa_span, swa_capacity, swa_page_stride)
        m, l, acc = _attend_scope(
            q, m, l, acc, scale * LOG2E, k_smem, places, swa, table, first, gl.minimum(last, swa_blocks),
            BLOCK_K, SWA_PAGE, False, SWA_FNUZ, FAR, CDNA4,
        )  # fmt: skip
        if HAS_EXTRA:
            limit = extra_capacity
            if LOCAL:
                request = gl.load(request_ptr + token)
                known = (request >= 0) & (request < requests)
                row = table_ptr + gl.where(known, request, 0).to(gl.int64) * table_stride
                table = Table(row, table_columns, table_pages)
                limit = gl.where(known, gl.load(visible_ptr + token), 0)
            extra = Scope(
                extra_ptr, extra_indices_ptr + token * extra_indices_stride, extra_span, limit, extra_page_stride
            )
            m, l, acc = _attend_scope(
                q, m, l, acc, scale * LOG2E, k_smem, places, extra, table,
                gl.maximum(first - swa_blocks, 0), last - swa_blocks,
                BLOCK_K, EXTRA_PAGE, LOCAL, EXTRA_FNUZ, FAR, CDNA4,
            )  # fmt: skip
        finish(
            m, l, acc, token, head_block * BLOCK_H, heads, split, splits, most_splits, sink_ptr, out_ptr, lse_ptr,
            partial_ptr, partial_lse_ptr, out_stride_t, out_stride_h, HAS_SINK, SPLIT, CDNA4,
        )  # fmt: skip


_launch = Launcher(decode_cdna_kernel, floats=("scale",))


def sparse_mla_decode(call: DecodeCall) -> Result:
    """Launch over the heads that count and DSv4 pages of either FP8 flavour; extra indices may be local entries."""
    q, out, heads, attn_sink = call.q, output(call), call.heads, call.attn_sink
    swa, extra = call.swa, call.extra or call.swa._replace(lens=None)
    tokens, limits = q.shape[0], platform.limits(q.device)
    shape = shape_of(limits.arch, heads)
    spans = Spans(swa.lens, swa.indices.shape[1], extra.lens, 0 if call.extra is None else extra.indices.shape[1])
    blocks = expected_blocks(call.entries, (spans.swa_width, spans.extra_width), shape.block_k)
    splits, whole = row_splits(batch_of(shape, tokens, heads, limits.multiprocessors), blocks, call.split_k)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    partial, partial_lse = partials(call, splits) if splits > 1 else (lse, lse)
    request, visible, table, pages = call.local or (lse, lse, extra.indices, 0)
    caches = (swa.cache, extra.cache)
    _launch(
        (tokens, head_blocks(shape, heads), splits),
        (
            q, swa.cache.data, swa.indices, lse if swa.lens is None else swa.lens,
            extra.cache.data, extra.indices, lse if extra.lens is None else extra.lens,
            lse if attn_sink is None else attn_sink, request, visible, table, out, lse, partial, partial_lse,
        ),
        (
            *table.shape, table.stride(0), pages, heads, splits, whole, call.softmax_scale,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1),
            swa.indices.shape[1], swa.indices.stride(0), swa.cache.capacity, swa.cache.page_stride,
            spans.extra_width, extra.indices.stride(0), extra.cache.capacity, extra.cache.page_stride,
        ),
        (
            swa.lens is not None, call.extra is not None, extra.lens is not None, attn_sink is not None, splits > 1,
            shape.block_h, shape.block_k, call.local is not None, *(cache.page_size for cache in caches),
            *(cache.layout.value_encoding == "e4m3fnuz" for cache in caches),
            any(cache.pages * cache.page_stride >= 2**31 for cache in caches), limits.arch == "gfx950",
            dies(limits.arch),
        ),
        NUM_WARPS,
        **shape.options,
    )  # fmt: skip
    if splits > 1:
        reduce_partials(partial, partial_lse, attn_sink, out, lse, spans, whole, shape.block_k)
    return out, lse
