"""Decode attention over DSv4 pages on Hopper, in Gluon: gathering, decoding and both matrix products at the same time.

A program works through (token, block of 64 heads, split) items in three roles that hand blocks of 64 entries on through
shared memory:

- the loader gathers entries, decodes them to bf16 and leaves them in one of two K tiles;
- the left half multiplies q with a K tile, takes the online softmax, and accumulates output columns 0 to 255;
- the right half accumulates columns 256 to 511 with the softmax weights the left half leaves behind.

So the decoding of one block, the softmax of another and the matrix products of both overlap, and each role has the
registers it needs. Programs stay for several items: the loader is at the next one while the halves still write.

Up to 16 heads :mod:`.few_heads` runs instead, with the same parameters.

How many splits a row has follows from its own length, which only the device knows. There are items for the most a row
can have; every role finds out for itself, from the same lengths, which of them a row does not have, and passes them by.
"""

from collections.abc import Callable

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...common.core.calls import DecodeCall, Result, output
from ...common.core.platform import capturing, platform
from ...common.kernels.decode import Spans, prepare_reduction
from ...common.kernels.decode_shapes import expected_blocks, row_splits
from ...common.kernels.launch import Launcher
from ...common.kernels.scratch import partials
from ...common.kernels.softmax import LOG2E
from . import splitting
from .few_heads import decode_few_heads_kernel
from .items import BLOCK_K, Output, Query, Requests, Scope, Work, finish, item_of, load_indices, of_request, to_slots

BLOCK_H = gl.constexpr(splitting.BLOCK_HEADS)
STAGES = gl.constexpr(2)
HALF = gl.constexpr(256)
CODES = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0]))

RIGHT_REGISTERS = 168
LOADER_REGISTERS = 120
"""A thread's; what they leave of the multiprocessor's is the left half's."""

# Four e4m3 codes and their scale -> four bf16. By way of float16 and float32, both exact, which keeps NaN; moving the
# bits with integer instructions takes longer, since those run at half the rate.
_DECODE = gl.constexpr("""{
.reg .b16 a, b, c, d;
.reg .b32 p, q;
.reg .f32 w, x, y, z;
mov.b32 {a, b}, $2;
cvt.rn.f16x2.e4m3x2 p, a;
cvt.rn.f16x2.e4m3x2 q, b;
mov.b32 {a, b}, p;
mov.b32 {c, d}, q;
cvt.f32.f16 w, a;
cvt.f32.f16 x, b;
cvt.f32.f16 y, c;
cvt.f32.f16 z, d;
mul.f32 w, w, $3;
mul.f32 x, x, $4;
mul.f32 y, y, $5;
mul.f32 z, z, $6;
cvt.rn.bf16x2.f32 $0, x, w;
cvt.rn.bf16x2.f32 $1, z, y;
}""")


@gluon.jit
def _load_slots(scope, table, token, span, block, LOCAL: gl.constexpr):
    """int32 slots of a block of a row; -1 for what is no entry.

    ``LOCAL``: the row holds local entries, of which the request has the scope's capacity, and its block table makes
    them slots.
    """
    index = load_indices(scope, token, span, block, gl.SliceLayout(1, CODES))
    if LOCAL:
        index = to_slots(index, scope.page_size, table)
    return index


@gluon.jit
def _beside(a, b):
    """``[N, 2 C]``: the columns of a, then those of b."""
    return gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])


@gluon.jit
def _decode_tile(codes, scales, TILE: gl.constexpr):
    """bf16 of a tile's uint8 ``[N, 64]`` and the 8 scale bytes of each entry."""
    code = (scales >> (8 * TILE)).to(gl.int32) & 0xFF
    bits = gl.where(code == 0, 0x00400000, code << 23)
    bits = gl.where(code == 255, 0x7FC00000, bits)
    scale, _ = gl.broadcast(bits.to(gl.float32, bitcast=True)[:, None], codes)
    return gl.inline_asm_elementwise(
        _DECODE, "=r,=r,r,r,r,r,r", [codes, scale], dtype=gl.bfloat16, is_pure=True, pack=4
    )


@gluon.jit
def _load_scope(
    scope, table, token, span, slots, first, last, count, k_smem, bias_smem, k_full, k_empty,
    BIG_PAGES: gl.constexpr, LOCAL: gl.constexpr,
):  # fmt: skip
    """Gather and decode blocks ``first`` to ``last`` of a scope; returns how many blocks the loader has left so far.

    ``slots`` are those of block ``first``.
    """
    page_size = scope.page_size
    # PagedCache holds pages to this alignment, and 16-byte loads need to be told.
    page_stride = gl.multiple_of(gl.cast(scope.page_stride, gl.int64), 16)
    column = gl.arange(0, 64, gl.SliceLayout(0, CODES))[None, :]
    for block in range(first, last):
        valid = slots >= 0
        safe = gl.where(valid, slots, 0)
        page = safe // page_size
        entry = safe - page * page_size
        scale_base = gl.cast(page_size, gl.int32) * 576
        if BIG_PAGES:
            entry = entry.to(gl.int64)
            scale_base = gl.cast(page_size, gl.int64) * 576
        base = scope.cache_ptr + page.to(gl.int64) * page_stride
        data = base + entry * 576
        mask = valid[:, None]
        codes = data[:, None] + column
        # All of an entry's loads are under way before the first is waited for, and the next block's slots behind them.
        codes0 = gl.load(codes, mask=mask, other=0)
        codes1 = gl.load(codes + 64, mask=mask, other=0)
        codes2 = gl.load(codes + 128, mask=mask, other=0)
        codes3 = gl.load(codes + 192, mask=mask, other=0)
        codes4 = gl.load(codes + 256, mask=mask, other=0)
        codes5 = gl.load(codes + 320, mask=mask, other=0)
        codes6 = gl.load(codes + 384, mask=mask, other=0)
        rope = gl.load((data + 448).to(gl.pointer_type(gl.bfloat16))[:, None] + column, mask=mask, other=0.0)
        scales = gl.load((base + (scale_base + entry * 8)).to(gl.pointer_type(gl.int64)), mask=valid, other=0)
        slots = _load_slots(scope, table, token, span, block + 1, LOCAL)
        stage = count % STAGES
        if count >= STAGES:
            mbarrier.wait(k_empty.index(stage), (count // STAGES - 1) & 1)
        bias_smem.index(stage).store(gl.where(valid, 0.0, float("-inf")))
        left = _beside(
            _beside(_decode_tile(codes0, scales, 0), _decode_tile(codes1, scales, 1)),
            _beside(_decode_tile(codes2, scales, 2), _decode_tile(codes3, scales, 3)),
        )
        right = _beside(
            _beside(_decode_tile(codes4, scales, 4), _decode_tile(codes5, scales, 5)),
            _beside(_decode_tile(codes6, scales, 6), rope),
        )
        k_smem.index(stage).store(_beside(left, right))
        fence_async_shared()
        mbarrier.arrive(k_full.index(stage), count=1)
        count += 1
    return count


@gluon.jit
def _loader(
    work, swa, extra, local, k_smem, bias_smem, k_full, k_empty,
    HAS_SWA_LENS: gl.constexpr, HAS_EXTRA_LENS: gl.constexpr, SPLIT: gl.constexpr, BIG_PAGES: gl.constexpr,
    LOCAL: gl.constexpr,
):  # fmt: skip
    count = gl.to_tensor(0)
    for number in range(gl.program_id(0), work.items, gl.num_programs(0)):
        row = number
        if SPLIT:
            row = number % work.rows
        # Before the item, whose spans are loaded too: neither waits for the other.
        scope, table = of_request(extra, local, (row // work.head_blocks).to(gl.int64), LOCAL)
        item = item_of(number, work, swa, extra, HAS_SWA_LENS, HAS_EXTRA_LENS, SPLIT, BLOCK_H)
        if item.there:
            first_extra = gl.maximum(item.first - item.swa_blocks, 0)
            # Both scopes' first slots are on their way at once: each is several loads behind one another.
            slots = _load_slots(swa, table, item.token, item.swa_span, item.first, False)
            extra_slots = _load_slots(scope, table, item.token, item.extra_span, first_extra, LOCAL)
            count = _load_scope(
                swa, table, item.token, item.swa_span, slots, item.first, gl.minimum(item.last, item.swa_blocks), count,
                k_smem, bias_smem, k_full, k_empty, BIG_PAGES, False,
            )  # fmt: skip
            count = _load_scope(
                scope, table, item.token, item.extra_span, extra_slots, first_extra, item.last - item.swa_blocks, count,
                k_smem, bias_smem, k_full, k_empty, BIG_PAGES, LOCAL,
            )  # fmt: skip


@gluon.jit
def _load_q(q_smem, q, item, heads, FIRST: gl.constexpr, FAR_HEADS: gl.constexpr):
    """Bring one half of q's columns to shared memory, zeros for heads there are not."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    head = item.head0 + gl.arange(0, BLOCK_H, gl.SliceLayout(1, ROWS))
    if FAR_HEADS:
        head = head.to(gl.int64)
    column = FIRST + gl.arange(0, HALF, gl.SliceLayout(0, ROWS))
    rows = q.ptr + item.token * q.stride_t + head[:, None] * q.stride_h + column[None, :]
    q_smem.slice(FIRST, HALF, dim=1).store(gl.load(rows, mask=(head < heads)[:, None], other=0.0))
    fence_async_shared()


@gluon.jit
def _store_partial(acc, weight, item, heads, out, FIRST: gl.constexpr):
    ACC: gl.constexpr = acc.type.layout
    head = item.head0 + gl.arange(0, BLOCK_H, gl.SliceLayout(1, ACC))
    column = FIRST + gl.arange(0, HALF, gl.SliceLayout(0, ACC))
    row = (item.token * heads + head) * out.most_splits + item.split
    rows = out.partial_ptr + row[:, None] * (2 * HALF) + column[None, :]
    gl.store(rows, acc * weight[:, None], mask=(head < heads)[:, None])


@gluon.jit
def _store_whole(acc, weight, q_smem, item, heads, out, FIRST: gl.constexpr, FAR_HEADS: gl.constexpr):
    """q's own half of shared memory, done with, turns them into whole rows."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    half = q_smem.slice(FIRST, HALF, dim=1)
    half.store((acc * weight[:, None]).to(gl.bfloat16))
    head = item.head0 + gl.arange(0, BLOCK_H, gl.SliceLayout(1, ROWS))
    if FAR_HEADS:
        head = head.to(gl.int64)
    column = FIRST + gl.arange(0, HALF, gl.SliceLayout(0, ROWS))
    rows = out.ptr + item.token * out.stride_t + head[:, None] * out.stride_h + column[None, :]
    gl.store(rows, half.load(ROWS), mask=(head < heads)[:, None])


@gluon.jit
def _store_out(
    acc, weight, q_smem, item, heads, out, FIRST: gl.constexpr, SPLIT: gl.constexpr, FAR_HEADS: gl.constexpr
):  # fmt: skip
    """Write one half of the output's columns, as a partial result where the row has several splits."""
    if SPLIT:
        if item.split >= 0:
            _store_partial(acc, weight, item, heads, out, FIRST)
        else:
            _store_whole(acc, weight, q_smem, item, heads, out, FIRST, FAR_HEADS)
    else:
        # Triton 3.6 does not compile a branch that is never taken.
        _store_whole(acc, weight, q_smem, item, heads, out, FIRST, FAR_HEADS)


@gluon.jit
def _softmax(logits, bias, scale, m, l):
    """(weights, factor of what came before, maximum, sum) with one block more; base 2."""
    logits = logits * scale + bias[None, :]
    m_new = gl.maximum(m, gl.max(logits, axis=1))
    # While every entry was invalid the maximum is -inf, and -inf - -inf would be NaN.
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(logits - m_safe[:, None])
    alpha = gl.exp2(m - m_safe)
    return p.to(gl.bfloat16), alpha, m_new, l * alpha + gl.sum(p, axis=1)


@gluon.jit
def _hand_over(p, alpha, p_smem, alpha_smem, p_full, p_empty, message):
    """Leave a block's weights for both halves."""
    stage = message % STAGES
    if message >= STAGES:
        mbarrier.wait(p_empty.index(stage), (message // STAGES - 1) & 1)
    p_smem.index(stage).store(p)
    alpha_smem.index(stage).store(alpha)
    fence_async_shared()
    mbarrier.arrive(p_full.index(stage), count=1)


@gluon.jit
def _left(
    work, swa, extra, q, out, sink_ptr, heads, scale,
    q_smem, k_smem, bias_smem, p_smem, alpha_smem, q_full, k_full, k_empty, p_full, p_empty,
    HAS_SWA_LENS: gl.constexpr, HAS_EXTRA_LENS: gl.constexpr, HAS_SINK: gl.constexpr, SPLIT: gl.constexpr,
    FAR_HEADS: gl.constexpr,
):  # fmt: skip
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    HEADS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    zero = gl.zeros([BLOCK_H, BLOCK_K], gl.float32, LOGITS)
    count = gl.to_tensor(0)
    message = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    for number in range(gl.program_id(0), work.items, gl.num_programs(0)):
        item = item_of(number, work, swa, extra, HAS_SWA_LENS, HAS_EXTRA_LENS, SPLIT, BLOCK_H)
        if item.there:
            _load_q(q_smem, q, item, heads, 0, FAR_HEADS)
            m = gl.full([BLOCK_H], float("-inf"), gl.float32, HEADS)
            l = gl.zeros([BLOCK_H], gl.float32, HEADS)
            acc = gl.zeros([BLOCK_H, HALF], gl.float32, ACC)
            mbarrier.wait(q_full, turn & 1)
            turn += 1
            stage = count % STAGES
            mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
            logits = warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            logits = warpgroup_mma_wait(0, (logits,))
            bias = bias_smem.index(stage).load(gl.SliceLayout(0, LOGITS))
            p, alpha, m, l = _softmax(logits, bias, scale, m, l)
            _hand_over(p, alpha, p_smem, alpha_smem, p_full, p_empty, message)
            for _ in range(item.first + 1, item.last):
                before = count % STAGES
                count += 1
                stage = count % STAGES
                mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
                # Both products are under way before the softmax waits for the first: the second runs beside it.
                logits = warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
                acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
                v = k_smem.index(before).slice(0, HALF, dim=1)
                acc = warpgroup_mma(p_smem.index(message % STAGES), v, acc, is_async=True)
                logits = warpgroup_mma_wait(1, (logits,))
                bias = bias_smem.index(stage).load(gl.SliceLayout(0, LOGITS))
                p, alpha, m, l = _softmax(logits, bias, scale, m, l)
                message += 1
                _hand_over(p, alpha, p_smem, alpha_smem, p_full, p_empty, message)
                acc = warpgroup_mma_wait(0, (acc,))
                mbarrier.arrive(k_empty.index(before), count=1)
            stage = count % STAGES
            count += 1
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
            v = k_smem.index(stage).slice(0, HALF, dim=1)
            acc = warpgroup_mma(p_smem.index(message % STAGES), v, acc, is_async=True)
            weight = finish(m, l, item, heads, sink_ptr, out, BLOCK_H, HAS_SINK, SPLIT)
            acc = warpgroup_mma_wait(0, (acc,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            # The weights of the last message are those of the output.
            message += 1
            stage = message % STAGES
            if message >= STAGES:
                mbarrier.wait(p_empty.index(stage), (message // STAGES - 1) & 1)
            alpha_smem.index(stage).store(weight)
            mbarrier.arrive(p_full.index(stage), count=1)
            message += 1
            weight = gl.convert_layout(weight, gl.SliceLayout(1, ACC))
            _store_out(acc, weight, q_smem, item, heads, out, 0, SPLIT, FAR_HEADS)


@gluon.jit
def _right(
    work, swa, extra, q, out, heads, q_smem, k_smem, p_smem, alpha_smem, q_full, k_empty, p_full, p_empty,
    HAS_SWA_LENS: gl.constexpr, HAS_EXTRA_LENS: gl.constexpr, SPLIT: gl.constexpr, FAR_HEADS: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    count = gl.to_tensor(0)
    message = gl.to_tensor(0)
    for number in range(gl.program_id(0), work.items, gl.num_programs(0)):
        item = item_of(number, work, swa, extra, HAS_SWA_LENS, HAS_EXTRA_LENS, SPLIT, BLOCK_H)
        if item.there:
            _load_q(q_smem, q, item, heads, HALF, FAR_HEADS)
            mbarrier.arrive(q_full, count=1)
            acc = gl.zeros([BLOCK_H, HALF], gl.float32, ACC)
            for _ in range(item.first, item.last):
                stage = message % STAGES
                mbarrier.wait(p_full.index(stage), (message // STAGES) & 1)
                acc = acc * alpha_smem.index(stage).load(gl.SliceLayout(1, ACC))[:, None]
                v = k_smem.index(count % STAGES).slice(HALF, HALF, dim=1)
                acc = warpgroup_mma(p_smem.index(stage), v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, (acc,))
                mbarrier.arrive(p_empty.index(stage), count=1)
                mbarrier.arrive(k_empty.index(count % STAGES), count=1)
                count += 1
                message += 1
            stage = message % STAGES
            mbarrier.wait(p_full.index(stage), (message // STAGES) & 1)
            weight = alpha_smem.index(stage).load(gl.SliceLayout(1, ACC))
            mbarrier.arrive(p_empty.index(stage), count=1)
            message += 1
            _store_out(acc, weight, q_smem, item, heads, out, HALF, SPLIT, FAR_HEADS)


# Nothing but q's and out's strides needs its divisibility known, and every number specialized doubles the kernels.
@gluon.jit(
    do_not_specialize=(
        "items", "rows", "heads", "head_blocks", "most_splits", "whole_blocks",
        "swa_width", "swa_indices_stride", "swa_capacity", "swa_page_size", "swa_page_stride",
        "extra_width", "extra_indices_stride", "extra_capacity", "extra_page_size", "extra_page_stride",
        "requests", "table_columns", "table_stride", "table_pages",
    )
)  # fmt: skip
def decode_hopper_kernel(
    q_ptr, swa_ptr, swa_indices_ptr, swa_lens_ptr, extra_ptr, extra_indices_ptr, extra_lens_ptr, sink_ptr,
    request_ptr, visible_ptr, table_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    items, rows, heads, head_blocks, most_splits, whole_blocks, scale,
    q_stride_t, q_stride_h, out_stride_t, out_stride_h,
    swa_width, swa_indices_stride, swa_capacity, swa_page_size, swa_page_stride,
    extra_width, extra_indices_stride, extra_capacity, extra_page_size, extra_page_stride,
    requests, table_columns, table_stride, table_pages,
    HAS_SWA_LENS: gl.constexpr, HAS_EXTRA_LENS: gl.constexpr, HAS_SINK: gl.constexpr, SPLIT: gl.constexpr,
    BIG_PAGES: gl.constexpr, FAR_HEADS: gl.constexpr, LOCAL: gl.constexpr, RIGHT: gl.constexpr, LOADER: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, 2 * HALF], TILE)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_K, 2 * HALF], TILE)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_H, BLOCK_K], TILE)
    bias_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_K], FLAT)
    alpha_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_H], FLAT)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    p_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    p_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(p_full.index(stage), count=1)
        mbarrier.init(p_empty.index(stage), count=1)
    swa = Scope(
        swa_ptr, swa_indices_ptr, swa_lens_ptr, swa_width,
        swa_indices_stride, swa_capacity, swa_page_size, swa_page_stride,
    )  # fmt: skip
    extra = Scope(
        extra_ptr, extra_indices_ptr, extra_lens_ptr, extra_width,
        extra_indices_stride, extra_capacity, extra_page_size, extra_page_stride,
    )  # fmt: skip
    local = Requests(request_ptr, visible_ptr, table_ptr, requests, table_columns, table_stride, table_pages)
    q = Query(q_ptr, q_stride_t, q_stride_h)
    out = Output(out_ptr, out_stride_t, out_stride_h, lse_ptr, partial_ptr, partial_lse_ptr, most_splits)
    work = Work(items, rows, head_blocks, most_splits, whole_blocks)
    if SPLIT:
        # Lets the reduction be launched beside these programs; it waits for what they write by itself.
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    gl.warp_specialize(
        [
            (_left, (
                work, swa, extra, q, out, sink_ptr, heads, scale * LOG2E,
                q_smem, k_smem, bias_smem, p_smem, alpha_smem, q_full, k_full, k_empty, p_full, p_empty,
                HAS_SWA_LENS, HAS_EXTRA_LENS, HAS_SINK, SPLIT, FAR_HEADS,
            )),
            (_right, (
                work, swa, extra, q, out, heads, q_smem, k_smem, p_smem, alpha_smem, q_full, k_empty, p_full, p_empty,
                HAS_SWA_LENS, HAS_EXTRA_LENS, SPLIT, FAR_HEADS,
            )),
            (_loader, (
                work, swa, extra, local, k_smem, bias_smem, k_full, k_empty,
                HAS_SWA_LENS, HAS_EXTRA_LENS, SPLIT, BIG_PAGES, LOCAL,
            )),
        ],
        [4, 4],
        [RIGHT, LOADER],
    )  # fmt: skip


_launch = Launcher(decode_hopper_kernel, floats=("scale",))
_launch_few = Launcher(decode_few_heads_kernel, floats=("scale",))


def sparse_mla_decode(call: DecodeCall) -> Result:
    """Launch over the heads that count and DSv4 pages; extra indices may be local entries.

    How many splits there are at most follows from the shapes where ``split_k`` is None; how many a row has, from its
    own length. A number makes a row independent of its batch.
    """
    return prepare(call)(call)


def prepare(call: DecodeCall) -> Callable[[DecodeCall], Result]:
    """:func:`sparse_mla_decode` for calls that look like this one: the host works out once what follows from shapes."""
    q, out, heads = call.q, output(call), call.heads
    tokens, multiprocessors = q.shape[0], platform.limits(q.device).multiprocessors
    swa, extra = call.swa, call.extra or call.swa._replace(lens=None)
    extra_width = 0 if call.extra is None else extra.indices.shape[1]
    batch = splitting.batch_of(tokens, heads, multiprocessors, capturing(q.device))
    rows = batch.programs
    spans = Spans(swa.lens, swa.indices.shape[1], extra.lens, extra_width)
    blocks = expected_blocks(call.entries, (spans.swa_width, extra_width), BLOCK_K.value)
    splits, whole = row_splits(batch, blocks, call.split_k)
    table, pages = (extra.indices, 0) if call.local is None else (call.local.block_table, call.local.pages)
    launcher, programs = _launch, min(rows * splits, multiprocessors)
    own: tuple[int, ...] = (RIGHT_REGISTERS, LOADER_REGISTERS)
    if splitting.few(heads):
        launcher, programs, own = _launch_few, rows * splits, (8 if heads <= 8 else 16,)
    launch = launcher.prepare(
        programs,
        (
            rows * splits, rows, heads, rows // tokens, splits, whole, call.softmax_scale,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1),
            swa.indices.shape[1], swa.indices.stride(0), swa.cache.capacity, swa.cache.page_size,
            swa.cache.page_stride, extra_width, extra.indices.stride(0), extra.cache.capacity, extra.cache.page_size,
            extra.cache.page_stride, *table.shape, table.stride(0), pages,
        ),
        (
            swa.lens is not None, extra.lens is not None, call.attn_sink is not None, splits > 1,
            max(swa.cache.page_size, extra.cache.page_size) * 584 >= 2**31,
            # Heads stored before tokens: the registers of 64-bit offsets are spilled, so only these pay for them.
            (heads - 1) * max(q.stride(1), out.stride(1)) >= 2**31, call.local is not None, *own,
        ),
        4,
    )  # fmt: skip
    # Written by the kernel whether it is wanted or not.
    unwanted = None if call.lse else torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    reduce = None
    if splits > 1:
        shaped = torch.empty(tokens, heads, dtype=torch.float32, device=q.device) if unwanted is None else unwanted
        reduce = prepare_reduction(splits, call.attn_sink, out, shaped, spans, whole, BLOCK_K.value)

    def run(call: DecodeCall) -> Result:
        q, out, attn_sink, local = call.q, output(call), call.attn_sink, call.local
        swa_cache, swa_indices, swa_lens, _ = call.swa
        extra_cache, extra_indices, extra_lens, _ = call.extra or (swa_cache, swa_indices, None, 1.0)
        lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device) if unwanted is None else unwanted
        partial, partial_lse = (lse, lse) if reduce is None else partials(call, splits)
        request, visible, table, _ = local or (lse, lse, extra_indices, 0)
        launch((
            q, swa_cache.data, swa_indices, lse if swa_lens is None else swa_lens,
            extra_cache.data, extra_indices, lse if extra_lens is None else extra_lens,
            lse if attn_sink is None else attn_sink, request, visible, table, out, lse, partial, partial_lse,
        ))  # fmt: skip
        if reduce is not None:
            spans = Spans(swa_lens, swa_indices.shape[1], extra_lens, extra_width)
            reduce(partial, partial_lse, attn_sink, out, lse, spans)
        return out, lse

    return run
