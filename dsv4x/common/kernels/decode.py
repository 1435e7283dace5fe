"""Decode attention over paged caches of any layout, read in place, split over K and reduced.

One program takes one token, one block of heads and one split. A row's blocks are those of its window span followed by
those of its extra span. How many splits share them follows from the row's own length, which only the device knows: the
launch is for the most a row can have, and programs of splits that a row does not have return at once. A row of one
split is written out where it is computed, and the reduction skips it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..core.calls import DecodeCall, Result, output
from ..core.platform import platform
from .decode_shapes import Batch, decode_config, expected_blocks, row_splits
from .entries import entry_format, load_entries, pinned
from .indices import slots_of
from .launch import Launcher
from .order import dies, token_and_block
from .portability import INTERPRETED, to_bf16
from .scratch import partials
from .softmax import LN2, LOG2E, apply_sink, attend_block, finish, load_q

REDUCTIONS = ((4, 1), (8, 2), (16, 2))
"""(splits whose partial outputs are loaded together, warps) of the reduction: the first that has room for all of them,
or the last, several times. Measured on an H200: a program for each head of a token has little to do, and the fewer
registers and warps it takes, the more of them wait for memory at once."""

PROGRAMS_AT_ONCE = 8
"""Programs of the reduction that a multiprocessor has at least before a program takes more than one head."""
_MOST_HEADS = 8


class Spans(NamedTuple):
    """What says how many entries each row holds.

    Attributes:
        swa_lens, extra_lens: int32 or int64 ``[T]`` scan spans; None means the whole width.
        swa_width, extra_width: columns of the index rows; 0 where there is no extra scope.
    """

    swa_lens: torch.Tensor | None
    swa_width: int
    extra_lens: torch.Tensor | None
    extra_width: int


@triton.jit
def clamped_span(length, width):
    """Entries of a row: its length within 0 and the width."""
    return tl.minimum(tl.maximum(length, 0), width).to(tl.int32)


@triton.jit
def row_shares(blocks, most, whole):
    """``(splits, share)``: the splits a row of ``blocks`` has, each of ``share`` blocks, the last of the rest.

    ``most`` and ``whole`` are those of :class:`.decode_shapes.Splits`. A row without blocks has one split too.
    """
    share = (blocks + most - 1) // most
    share = tl.maximum(tl.where(blocks <= whole, blocks, share), 1)
    return tl.maximum((blocks + share - 1) // share, 1), share


@triton.jit
def _load_slots(
    indices_ptr, offset, span, capacity, table_ptr, columns, page_size, pages, WIDE: tl.constexpr, LOCAL: tl.constexpr
):  # fmt: skip
    """Slots at ``offset`` of a row; -1 past its span and for every index that is no entry.

    ``LOCAL``: the row holds local entries, of which the request has ``capacity``, and its block table makes them slots.
    """
    slots = tl.load(indices_ptr + offset, mask=offset < span, other=-1)
    if LOCAL:
        slots = slots_of(slots, slots < capacity, table_ptr, columns, page_size, pages)
    else:
        slots = tl.where((slots >= 0) & (slots < capacity), slots, -1)
    if WIDE:
        return slots.to(tl.int64)
    else:
        # Dividing 32-bit slots is several times cheaper; only a pool of 2**31 slots needs more.
        return slots.to(tl.int32)


@triton.jit
def _attend_scope(
    q, q_tail, m, l, acc, scale, cache_ptr, indices_ptr, span, first, last, capacity, page_size, page_stride, k_scale,
    table_ptr, columns, pages,
    BLOCK_K: tl.constexpr, VALUE_DIM: tl.constexpr, TAIL: tl.constexpr, WIDE: tl.constexpr, LOCAL: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Fold blocks ``first`` to ``last`` of one scope into the running softmax."""
    column = tl.arange(0, BLOCK_K)
    slots = _load_slots(
        indices_ptr, first * BLOCK_K + column, span, capacity, table_ptr, columns, page_size, pages, WIDE, LOCAL
    )
    for block in range(first, last):
        upcoming = _load_slots(
            indices_ptr, (block + 1) * BLOCK_K + column, span, capacity, table_ptr, columns, page_size, pages,
            WIDE, LOCAL,
        )  # fmt: skip
        stand_in = tl.max(slots, axis=0)
        if stand_in >= 0:
            valid = slots >= 0
            # Without an entry, a neighbour's is read: its weight is zero, and the gathers need no masks.
            slots = tl.where(valid, slots, stand_in)
            if FORMAT.pin:
                slots = pinned(slots)
            k = load_entries(cache_ptr, slots, page_size, page_stride, k_scale, 0, VALUE_DIM, FORMAT)
            k_tail = k
            if TAIL > 0:
                k_tail = load_entries(cache_ptr, slots, page_size, page_stride, k_scale, VALUE_DIM, TAIL, FORMAT)
            m, l, acc = attend_block(q, q_tail, k, k_tail, valid, scale, m, l, acc, TAIL)
        slots = upcoming
    return m, l, acc


@triton.jit
def _store_row(out, lse, head, head_mask, token, heads, sink_ptr, out_ptr, lse_ptr, out_stride_t, out_stride_h,
               HAS_SINK: tl.constexpr, VALUE_DIM: tl.constexpr):  # fmt: skip
    """Write what is no partial result: ``out [BLOCK_H, VALUE_DIM]`` with the sink, and lse without it."""
    if HAS_SINK:
        out = apply_sink(out, lse, tl.load(sink_ptr + head, mask=head_mask, other=0.0))
    rows = out_ptr + token * out_stride_t + head[:, None] * out_stride_h + tl.arange(0, VALUE_DIM)[None, :]
    tl.store(rows, to_bf16(out), mask=head_mask[:, None])
    tl.store(lse_ptr + token * heads + head, lse, mask=head_mask)


@triton.jit(
    do_not_specialize=(
        "requests", "table_columns", "table_stride", "table_pages", "heads", "most_splits", "whole_blocks",
    )
)  # fmt: skip
def decode_kernel(
    q_ptr, swa_ptr, swa_indices_ptr, swa_lens_ptr, extra_ptr, extra_indices_ptr, extra_lens_ptr, sink_ptr,
    request_ptr, visible_ptr, table_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    requests, table_columns, table_stride, table_pages, heads, most_splits, whole_blocks,
    scale, swa_k_scale, extra_k_scale,
    q_stride_t, q_stride_h, out_stride_t, out_stride_h,
    swa_width, swa_indices_stride, swa_capacity, swa_page_size, swa_page_stride,
    extra_width, extra_indices_stride, extra_capacity, extra_page_size, extra_page_stride,
    HAS_SWA_LENS: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_EXTRA_LENS: tl.constexpr, HAS_SINK: tl.constexpr,
    SPLIT: tl.constexpr, EARLY: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, VALUE_DIM: tl.constexpr,
    TAIL: tl.constexpr, WIDE: tl.constexpr, LOCAL: tl.constexpr, SWA: tl.constexpr, EXTRA: tl.constexpr,
    SWA_PAGE: tl.constexpr, EXTRA_PAGE: tl.constexpr, DIES: tl.constexpr,
):  # fmt: skip
    """``SWA_PAGE`` and ``EXTRA_PAGE``: the page sizes, where the code is for these alone, else 0."""
    token = tl.program_id(0)
    if DIES > 1:
        tokens = tl.num_programs(0)
        program = token + tl.program_id(1) * tokens
        token, head_block = token_and_block(program, tokens, tl.num_programs(1), DIES)
    token = token.to(tl.int64)
    split = tl.program_id(2)
    if SPLIT and EARLY:
        # Lets the reduction be launched once all programs run; it waits for what they write by itself.
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    swa_span = swa_width
    if HAS_SWA_LENS:
        swa_span = clamped_span(tl.load(swa_lens_ptr + token), swa_width)
    swa_blocks = tl.cdiv(swa_span, BLOCK_K)
    blocks = swa_blocks
    extra_span = extra_width
    if HAS_EXTRA:
        if HAS_EXTRA_LENS:
            extra_span = clamped_span(tl.load(extra_lens_ptr + token), extra_width)
        blocks += tl.cdiv(extra_span, BLOCK_K)
    # Not the constant 0 where rows are whole: with it ptxas takes 33 more instructions an iteration, and spills more.
    first = split * blocks
    last = tl.minimum(first + blocks, blocks)
    splits = 1
    if SPLIT:
        splits, share = row_shares(blocks, most_splits, whole_blocks)
        if split >= splits:
            return
        first = split * share
        last = tl.minimum(first + share, blocks)

    if DIES == 1:
        # Not asked for above, where it would be kept through all that.
        head_block = tl.program_id(1)
    head = head_block.to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_mask = head < heads
    q, q_tail = load_q(q_ptr + token * q_stride_t + head * q_stride_h, head_mask, VALUE_DIM, TAIL)
    m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, VALUE_DIM), tl.float32)
    m, l, acc = _attend_scope(
        q, q_tail, m, l, acc, scale * LOG2E, swa_ptr, swa_indices_ptr + token * swa_indices_stride, swa_span,
        first, tl.minimum(last, swa_blocks), swa_capacity, SWA_PAGE if SWA_PAGE > 0 else swa_page_size,
        swa_page_stride, swa_k_scale,
        table_ptr, table_columns, table_pages, BLOCK_K, VALUE_DIM, TAIL, WIDE, False, SWA,
    )  # fmt: skip
    if HAS_EXTRA:
        table = table_ptr
        extra_limit = extra_capacity
        if LOCAL:
            request = tl.load(request_ptr + token)
            known = (request >= 0) & (request < requests)
            table += tl.where(known, request, 0).to(tl.int64) * table_stride
            extra_limit = tl.where(known, tl.load(visible_ptr + token), 0)
        m, l, acc = _attend_scope(
            q, q_tail, m, l, acc, scale * LOG2E, extra_ptr, extra_indices_ptr + token * extra_indices_stride,
            extra_span, tl.maximum(first - swa_blocks, 0), last - swa_blocks,
            extra_limit, EXTRA_PAGE if EXTRA_PAGE > 0 else extra_page_size, extra_page_stride, extra_k_scale,
            table, table_columns, table_pages, BLOCK_K, VALUE_DIM, TAIL, WIDE, LOCAL, EXTRA,
        )  # fmt: skip

    out, lse = finish(m, l, acc)
    if splits > 1:
        row = (token * heads + head) * most_splits + split
        rows = partial_ptr + row[:, None] * VALUE_DIM + tl.arange(0, VALUE_DIM)[None, :]
        tl.store(rows, out, mask=head_mask[:, None])
        tl.store(partial_lse_ptr + row, lse, mask=head_mask)
    else:
        _store_row(
            out, lse, head, head_mask, token, heads, sink_ptr, out_ptr, lse_ptr, out_stride_t, out_stride_h,
            HAS_SINK, VALUE_DIM,
        )  # fmt: skip


@triton.jit
def _reduce_head(
    number, partial_ptr, partial_lse_ptr, sink_ptr, out_ptr, lse_ptr, token, heads, splits, most_splits,
    out_stride_t, out_stride_h, HAS_SINK: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One head of a token from its splits; with 0 nothing is written."""
    column = tl.arange(0, VALUE_DIM)
    head = number + tl.zeros((1,), tl.int64)
    row = (token * heads + head) * most_splits
    m = tl.full((1,), float("-inf"), tl.float32)
    l = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, VALUE_DIM), tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        present = split < splits
        rows = row[:, None] + split[None, :]
        lse = tl.load(partial_lse_ptr + rows, mask=present[None, :], other=float("inf"))
        parts = partial_ptr + tl.reshape(rows, (BLOCK_S, 1)) * VALUE_DIM + column[None, :]
        parts = tl.load(parts, mask=present[:, None], other=0.0)
        # A split without entries says +inf, which stands for a weight of zero.
        lse = tl.where(lse == float("inf"), float("-inf"), lse / LN2)
        m_new = tl.maximum(m, tl.max(lse, axis=1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - m_safe)
        weight = tl.exp2(lse - m_safe[:, None])
        acc = acc * alpha[:, None] + tl.sum(parts * tl.reshape(weight, (BLOCK_S, 1)), axis=0)[None, :]
        l = l * alpha + tl.sum(weight, axis=1)
        m = m_new
    out, lse = finish(m, l, acc)
    _store_row(
        out, lse, head, head < tl.where(splits > 0, heads, 0), token, heads, sink_ptr, out_ptr, lse_ptr, out_stride_t,
        out_stride_h, HAS_SINK, VALUE_DIM,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=(
        "swa_lens_ptr", "extra_lens_ptr", "heads", "each", "most_splits", "whole_blocks", "block_k", "swa_given",
        "swa_width", "extra_given", "extra_width",
    )
)  # fmt: skip
def reduce_kernel(
    partial_ptr, partial_lse_ptr, swa_lens_ptr, extra_lens_ptr, sink_ptr, out_ptr, lse_ptr,
    heads, each, most_splits, whole_blocks, block_k, swa_given, swa_width, extra_given, extra_width,
    out_stride_t, out_stride_h,
    HAS_SINK: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_S: tl.constexpr, EARLY: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    # A program takes ``each`` heads of a token, one after the other.
    groups = tl.cdiv(heads, each)
    token = (tl.program_id(0) // groups).to(tl.int64)
    first = (tl.program_id(0) % groups) * each
    swa_len = tl.load(swa_lens_ptr + token, mask=swa_given != 0, other=swa_width)
    extra_len = tl.load(extra_lens_ptr + token, mask=extra_given != 0, other=extra_width)
    swa_span, extra_span = clamped_span(swa_len, swa_width), clamped_span(extra_len, extra_width)
    splits, _ = row_shares(tl.cdiv(swa_span, block_k) + tl.cdiv(extra_span, block_k), most_splits, whole_blocks)
    if EARLY:
        # Launched while the kernel before still runs: its partial results are there once this returns. Lengths were
        # there before that kernel began. Every program waits: the kernel after this one counts on both being done.
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    # Rows of one split are there already.
    splits = tl.where(splits > 1, splits, 0)
    # With a program for each head there is neither a loop nor a branch around the loads, which cost 0.8 us of 14.
    if ONE:
        _reduce_head(
            first, partial_ptr, partial_lse_ptr, sink_ptr, out_ptr, lse_ptr, token, heads, splits, most_splits,
            out_stride_t, out_stride_h, HAS_SINK, VALUE_DIM, BLOCK_S,
        )  # fmt: skip
    else:
        for head in range(first, tl.where(splits > 0, tl.minimum(first + each, heads), first)):
            _reduce_head(
                head, partial_ptr, partial_lse_ptr, sink_ptr, out_ptr, lse_ptr, token, heads, splits, most_splits,
                out_stride_t, out_stride_h, HAS_SINK, VALUE_DIM, BLOCK_S,
            )  # fmt: skip


_launch = Launcher(decode_kernel, floats=("scale", "swa_k_scale", "extra_k_scale"))
_launch_reduce = Launcher(reduce_kernel)


def depends_early(arch: str) -> bool:
    """Whether a kernel is launched before the one it depends on is done: programmatic dependent launch, where measured.

    Archs after sm_90 have it too.
    """
    return arch.startswith("sm_9") and not INTERPRETED.value


def reduce_partials(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    attn_sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    spans: Spans,
    whole: int,
    block_k: int,
) -> None:
    """Combine float32 ``partial [T, H, most, V]``, ``partial_lse [T, H, most]`` into ``out [T, H, V]`` and lse.

    Rows of one split, which their kernel wrote out, are left as they are. Which splits a row has follows from ``spans``
    in blocks of ``block_k`` entries, as in :func:`row_shares`; what lies behind them is not read.
    """
    prepare_reduction(partial.shape[2], attn_sink, out, lse, spans, whole, block_k)(
        partial, partial_lse, attn_sink, out, lse, spans
    )


def prepare_reduction(
    most: int,
    attn_sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    spans: Spans,
    whole: int,
    block_k: int,
) -> Callable[..., None]:
    """:func:`reduce_partials` for ``most`` splits, as a function of its tensors, which look like those given here."""
    (tokens, heads), value_dim = lse.shape, out.shape[2]
    at_once, warps = next((shape for shape in REDUCTIONS if most <= shape[0]), REDUCTIONS[-1])
    limits = platform.limits(out.device)
    early = depends_early(limits.arch)
    # Enough programs to wait for memory at once, and few enough to be there before the splits are done.
    full = max(1, tokens * heads // (PROGRAMS_AT_ONCE * limits.multiprocessors))
    each = min(1 << full.bit_length() - 1, _MOST_HEADS, heads)
    launch = _launch_reduce.prepare(
        tokens * -(-heads // each),
        (
            heads, each, most, whole, block_k, int(spans.swa_lens is not None), spans.swa_width,
            int(spans.extra_lens is not None), spans.extra_width, out.stride(0), out.stride(1),
        ),
        (attn_sink is not None, value_dim, at_once, early, each == 1),
        warps,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip

    def reduce(
        partial: torch.Tensor,
        partial_lse: torch.Tensor,
        attn_sink: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
        spans: Spans,
    ) -> None:
        swa_lens, extra_lens = spans.swa_lens, spans.extra_lens
        # What is not given is not read: a stand-in of the dtype that the other has makes no further compilation.
        if swa_lens is None:
            swa_lens = lse.view(torch.int32) if extra_lens is None else extra_lens
        if extra_lens is None:
            extra_lens = swa_lens
        launch((partial, partial_lse, swa_lens, extra_lens, lse if attn_sink is None else attn_sink, out, lse))

    return reduce


def sparse_mla_decode(call: DecodeCall) -> Result:
    """Launch over the heads that count; entries of any layout, local ones too."""
    q, out, heads, attn_sink = call.q, output(call), call.heads, call.attn_sink
    swa, extra = call.swa, call.extra
    tokens, _, head_dim = q.shape
    value_dim = out.shape[2]
    limits = platform.limits(q.device)
    swa_cache, swa_indices, swa_lens, swa_k_scale = swa
    e_cache, e_indices, e_lens, e_k_scale = extra or swa._replace(lens=None, k_scale=1.0)
    spans = Spans(swa_lens, swa_indices.shape[1], e_lens, 0 if extra is None else e_indices.shape[1])
    config = decode_config(limits.arch, heads, (swa_cache.layout, e_cache.layout))
    head_blocks = -(-heads // config.block_h)
    blocks = expected_blocks(call.entries, (spans.swa_width, spans.extra_width), config.block_k)
    splits, whole = row_splits(
        Batch(tokens * head_blocks, config.resident * limits.multiprocessors), blocks, call.split_k
    )
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    if splits > 1:
        partial, partial_lse = partials(call, splits)
    else:
        partial = partial_lse = lse
    request, visible, table, pages = call.local or (lse, lse, e_indices, 0)
    _launch(
        (tokens, head_blocks, splits),
        (
            q, swa_cache.data, swa_indices, swa_lens if swa_lens is not None else lse,
            e_cache.data, e_indices, e_lens if e_lens is not None else lse,
            attn_sink if attn_sink is not None else lse, request, visible, table, out, lse, partial, partial_lse,
        ),
        (
            *table.shape, table.stride(0), pages, heads, splits, whole, call.softmax_scale, swa_k_scale, e_k_scale,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1), swa_indices.shape[1], swa_indices.stride(0),
            swa_cache.capacity, swa_cache.page_size, swa_cache.page_stride,
            e_indices.shape[1], e_indices.stride(0), e_cache.capacity, e_cache.page_size, e_cache.page_stride,
        ),
        (
            swa_lens is not None, extra is not None, e_lens is not None, attn_sink is not None, splits > 1,
            depends_early(limits.arch), config.block_h, config.block_k, value_dim, head_dim - value_dim,
            max(swa_cache.capacity, e_cache.capacity) > 2**31 - 1, call.local is not None,
            entry_format(swa_cache.layout, limits.arch), entry_format(e_cache.layout, limits.arch),
            *((swa_cache.page_size, e_cache.page_size) if config.fixed_pages else (0, 0)), dies(limits.arch),
        ),
        **config.options,
    )  # fmt: skip
    if splits > 1:
        reduce_partials(partial, partial_lse, attn_sink, out, lse, spans, whole, config.block_k)
    return out, lse
