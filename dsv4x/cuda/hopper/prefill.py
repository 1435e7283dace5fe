"""Prefill attention on Hopper, in Gluon: what Triton's compiler cannot be told, told.

A program works through (token, block of 64 heads) items with three warpgroups. A producer gathers rows into shared
memory, two tiles of 64 entries, by asynchronous copies of 16 bytes a lane. Two consumers take turns: each computes
logits and weights of every other tile, and each holds half of V's columns, so both need all weights, which pass through
shared memory with the running maximum they refer to. While one consumer is in its softmax the other one's products keep
the tensor cores busy, and while both write an item's output the producer fetches the next one's q and first tile.

Triton gives both warpgroups of a 64-row tile the same logits to compute, and waits for each product in turn: half the
speed or less (benchmarks/results/prefill-kernels-h200.json).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...common.core.calls import PrefillCall, Result, output, queries
from ...common.core.platform import platform
from ...common.core.vendor import aligned
from ...common.kernels.launch import Launcher
from ...common.kernels.softmax import LN2, LOG2E

# Triton 3.9 renamed it.
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

BLOCK_H = gl.constexpr(64)
BLOCK_K = gl.constexpr(64)
VALUE_DIM = gl.constexpr(512)
HALF = gl.constexpr(256)
PRODUCERS = gl.constexpr(128)
NUM_WARPS = 4
"""Warps of the producer; each consumer has as many."""

# All a multiprocessor's registers but the producer's: half the output takes 128 of a consumer's, the logits 32.
_CONSUMER_REGISTERS = gl.constexpr(216)

GATHER = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _item(item, heads, width, lens_ptr, HAS_LENS: gl.constexpr):
    """``(token, first head, span)`` of a work item; a token's blocks of heads run side by side, to share rows in L2."""
    head_blocks = (heads + BLOCK_H - 1) // BLOCK_H
    token = (item // head_blocks).to(gl.int64)
    span = width
    if HAS_LENS:
        span = gl.minimum(gl.maximum(gl.load(lens_ptr + token), 0), width).to(gl.int32)
    return token, (item % head_blocks) * BLOCK_H, span


@gluon.jit
def _rows(index_row, start, width, span, rows, LAYOUT: gl.constexpr):
    """The workspace rows of a tile's entries, -1 for every one that is none.

    The load does not ask for the span, so that a program's first indices do not wait for its length.
    """
    offset = start + gl.arange(0, BLOCK_K, layout=LAYOUT)
    row = gl.load(index_row + offset, mask=offset < width, other=-1)
    return gl.where((row >= 0) & (row < rows) & (offset < span), row, -1)


@gluon.jit
def _gather(tile, base, row, stride, OFFSET: gl.constexpr, WIDTH: gl.constexpr):
    """Copy ``WIDTH`` values from ``OFFSET`` on of each row; row -1 is zeros and reads nothing."""
    pointers = base + gl.where(row >= 0, row, 0).to(gl.int64)[:, None] * stride
    pointers = pointers + OFFSET + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, GATHER))[None, :]
    _copy(tile, pointers, mask=gl.broadcast((row >= 0)[:, None], pointers)[0])


@gluon.jit
def _varying(x: gl.constexpr):
    """``x``, new in every iteration to the compiler: it would keep 64 descriptors made from it, and spill."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.to_tensor(x)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _produce(
    items, q_ptr, kv_ptr, indices_ptr, lens_ptr, heads, rows, width, q_stride_t, q_stride_h, kv_stride, indices_stride,
    q, k, q_full, q_empty, k_full, k_empty, HAS_LENS: gl.constexpr,
):  # fmt: skip
    """Fill q once an item, then the two tiles by halves of columns, each as soon as its consumers are done with it.

    The barriers of a half are those of index ``2 * tile + half``.
    """
    ROWS: gl.constexpr = gl.SliceLayout(1, GATHER)
    phase = 1
    turn = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, first_head, span = _item(item, heads, width, lens_ptr, HAS_LENS)
        index_row = indices_ptr + token * indices_stride
        row = _rows(index_row, 0, width, span, rows, ROWS)
        head = first_head + gl.arange(0, BLOCK_H, layout=ROWS)
        mbarrier.wait(q_empty, turn)
        turn ^= 1
        _gather(q.index(0), q_ptr + token * q_stride_t, gl.where(head < heads, head, -1), q_stride_h, 0, VALUE_DIM)
        async_copy.mbarrier_arrive(q_full, increment_count=False)
        for start in range(0, span, 2 * BLOCK_K):
            for tile in gl.static_range(2):
                for i in gl.static_range(2):
                    mbarrier.wait(k_empty.index(2 * tile + (i ^ tile)), phase)
                    half = k.index(tile).slice((i ^ tile) * HALF, HALF, dim=1)
                    _gather(half, kv_ptr, row, kv_stride, (i ^ tile) * HALF, HALF)
                    async_copy.mbarrier_arrive(k_full.index(2 * tile + (i ^ tile)), increment_count=False)
                row = _rows(index_row, start + (tile + 1) * BLOCK_K, width, span, rows, ROWS)
            phase ^= 1
    async_copy.wait_group(0)


@gluon.jit
def _decay(m, m_new):
    """2 ** (m - m_new); while there is no entry both are -inf, whose difference would be NaN."""
    return gl.exp2(m - gl.where(m_new == float("-inf"), 0.0, m_new))


@gluon.jit
def _logits(q, k, k_full, phase, OWN: gl.constexpr):
    """Start q @ k of this consumer's tile, one half of the columns after the other as they arrive."""
    q_now, k_now = q.index(_varying(0)), k.index(_varying(OWN))
    logits = gl.zeros([BLOCK_H, BLOCK_K], gl.float32, LOGITS)
    for i in gl.static_range(2):
        mbarrier.wait(k_full.index(2 * OWN + (i ^ OWN)), phase)
        fence_async_shared()
        left = q_now.slice((i ^ OWN) * HALF, HALF, dim=1)
        right = k_now.slice((i ^ OWN) * HALF, HALF, dim=1).permute((1, 0))
        logits = warpgroup_mma(left, right, logits, use_acc=i > 0, is_async=True)
    return logits


@gluon.jit
def _fold(acc, m, m_shared, p, k, OWN: gl.constexpr):
    """Start acc + p @ v of a tile in this consumer's columns, acc rescaled to the tile's maximum, which is returned."""
    m_new = m_shared.load(gl.SliceLayout(1, ACC))
    acc = acc * _decay(m, m_new)[:, None]
    return warpgroup_mma(p, k.slice(OWN * HALF, HALF, dim=1), acc, is_async=True), m_new


@gluon.jit
def _consume(
    items, q, k, p, m_shared, l_shared, q_full, q_empty, k_full, k_empty, p_full, l_full, indices_ptr, lens_ptr,
    sink_ptr, out_ptr, lse_ptr, heads, rows, width, scale, indices_stride, out_stride_t, out_stride_h,
    HAS_LENS: gl.constexpr, HAS_SINK: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """Consumer ``OWN``: the logits of tiles OWN, OWN + 2, ..., and columns OWN * 256 to OWN * 256 + 255 of the output.

    No barrier guards p and m: a consumer writes them anew only after its tile was refilled, so after both were done.
    Nor l: it is written anew only after a tile of the other consumer, who has read it before that.
    """
    STATS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    phase = 0
    turn = 0
    exchange = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, first_head, span = _item(item, heads, width, lens_ptr, HAS_LENS)
        index_row = indices_ptr + token * indices_stride
        m = gl.full([BLOCK_H], float("-inf"), gl.float32, gl.SliceLayout(1, ACC))
        m_own = gl.full([BLOCK_H], float("-inf"), gl.float32, STATS)
        l = gl.zeros([BLOCK_H], gl.float32, STATS)
        acc = gl.zeros([BLOCK_H, HALF], gl.float32, ACC)
        mbarrier.wait(q_full, turn)
        turn ^= 1
        for start in range(0, span, 2 * BLOCK_K):
            logits = _logits(q, k, k_full, phase, OWN)
            valid = _rows(index_row, start + OWN * BLOCK_K, width, span, rows, gl.SliceLayout(0, LOGITS)) >= 0
            logits = warpgroup_mma_wait(0, deps=[logits])
            last = start + 2 * BLOCK_K >= span
            if last:
                mbarrier.arrive(q_empty, count=1)
            if OWN == 1:
                mbarrier.wait(k_full.index(1), phase)
                mbarrier.wait(p_full.index(0), phase)
                fence_async_shared()
                acc, m = _fold(acc, m, m_shared.index(0), p.index(0), k.index(0), OWN)
            logits = gl.where(valid[None, :], logits, float("-inf"))
            m_new = gl.maximum(gl.convert_layout(m, STATS), gl.max(logits, axis=1) * scale)
            weights = gl.exp2(logits * scale - gl.where(m_new == float("-inf"), 0.0, m_new)[:, None])
            l = l * _decay(m_own, m_new) + gl.sum(weights, axis=1)
            m_own = m_new
            m_shared.index(OWN).store(m_new)
            p.index(OWN).store(weights.to(gl.bfloat16))
            fence_async_shared()
            mbarrier.arrive(p_full.index(OWN), count=1)
            if OWN == 1:
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(k_empty.index(1), count=1)
            acc, m = _fold(acc, m, m_shared.index(OWN), p.index(OWN), k.index(OWN), OWN)
            acc = warpgroup_mma_wait(0, deps=[acc])
            if OWN == 0:
                mbarrier.arrive(k_empty.index(0), count=1)
                mbarrier.wait(k_full.index(2), phase)
                mbarrier.wait(p_full.index(1), phase)
                fence_async_shared()
                acc, m = _fold(acc, m, m_shared.index(1), p.index(1), k.index(1), OWN)
                acc = warpgroup_mma_wait(0, deps=[acc])
            if not last:
                mbarrier.arrive(k_empty.index(2 + OWN), count=1)
            phase ^= 1
        m_last = gl.convert_layout(m, STATS)
        if span > 0:
            l_shared.index(OWN).store(l * _decay(m_own, m_last))
            mbarrier.arrive(l_full.index(OWN), count=1)
            mbarrier.wait(l_full.index(1 - OWN), exchange)
            exchange ^= 1
            l = l_shared.index(0).load(STATS) + l_shared.index(1).load(STATS)
        else:
            mbarrier.arrive(q_empty, count=1)
        empty = l == 0.0
        share = 1.0 / gl.where(empty, 1.0, l)
        lse = gl.where(empty, float("inf"), (m_last + gl.log2(gl.where(empty, 1.0, l))) * LN2)
        head = first_head + gl.arange(0, BLOCK_H, layout=STATS)
        if OWN == 0:
            gl.store(lse_ptr + token * heads + head, lse, mask=head < heads)
        if HAS_SINK:
            sink = gl.load(sink_ptr + head, mask=head < heads, other=0.0)
            share *= gl.where(empty, 0.0, 1.0 / (1.0 + gl.exp2((sink - lse) * LOG2E)))
        out = gl.zeros([BLOCK_H, HALF], gl.bfloat16, GATHER)
        if span > 0:
            # Staged where this consumer was the last to read, whose barrier it has kept for that.
            staged = k.index(1).slice(OWN * HALF, HALF, dim=1)
            staged.store((acc * gl.convert_layout(share, gl.SliceLayout(1, ACC))[:, None]).to(gl.bfloat16))
            out = staged.load(GATHER)
            mbarrier.arrive(k_empty.index(2 + OWN), count=1)
        head = (first_head + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, GATHER))).to(gl.int64)
        column = OWN * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, GATHER))
        pointers = out_ptr + token * out_stride_t + head[:, None] * out_stride_h + column[None, :]
        gl.store(pointers, out, mask=gl.broadcast((head < heads)[:, None], pointers)[0])


@gluon.jit(do_not_specialize=("items", "heads", "rows", "width"))
def prefill_hopper_kernel(
    q_ptr, kv_ptr, indices_ptr, lens_ptr, sink_ptr, out_ptr, lse_ptr,
    items, heads, rows, width, scale, q_stride_t, q_stride_h, kv_stride, indices_stride, out_stride_t, out_stride_h,
    HAS_LENS: gl.constexpr, HAS_SINK: gl.constexpr,
):  # fmt: skip
    scale_log2 = scale * LOG2E
    q = gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK_H, VALUE_DIM], TILE)
    k = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_K, VALUE_DIM], TILE)
    p = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_H, BLOCK_K], TILE)
    m = gl.allocate_shared_memory(gl.float32, [2, BLOCK_H], VECTOR)
    l = gl.allocate_shared_memory(gl.float32, [2, BLOCK_H], VECTOR)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    l_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=PRODUCERS)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(4):
        mbarrier.init(k_full.index(i), count=PRODUCERS)
        mbarrier.init(k_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(l_full.index(i), count=1)
    LEFT: gl.constexpr = 0
    RIGHT: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_produce, (
                items, q_ptr, kv_ptr, indices_ptr, lens_ptr, heads, rows, width, q_stride_t, q_stride_h, kv_stride,
                indices_stride, q, k, q_full, q_empty, k_full, k_empty, HAS_LENS,
            )),
            (_consume, (
                items, q, k, p, m, l, q_full, q_empty, k_full, k_empty, p_full, l_full, indices_ptr, lens_ptr, sink_ptr,
                out_ptr, lse_ptr, heads, rows, width, scale_log2, indices_stride, out_stride_t, out_stride_h,
                HAS_LENS, HAS_SINK, LEFT,
            )),
            (_consume, (
                items, q, k, p, m, l, q_full, q_empty, k_full, k_empty, p_full, l_full, indices_ptr, lens_ptr, sink_ptr,
                out_ptr, lse_ptr, heads, rows, width, scale_log2, indices_stride, out_stride_t, out_stride_h,
                HAS_LENS, HAS_SINK, RIGHT,
            )),
        ],
        [4, 4],
        [_CONSUMER_REGISTERS, _CONSUMER_REGISTERS],
    )  # fmt: skip


_launch = Launcher(prefill_hopper_kernel, floats=("scale",))


# Rows are copied 16 bytes a lane, which Triton has to know: of an address it knows that it is a multiple of 16 bytes,
# of a stride that it is one of 16 values.
_STEP = 32


def sparse_mla_prefill(call: PrefillCall) -> Result:
    """Launch over the heads that count, of 512 values."""
    out, heads, attn_sink, indices, lens = output(call), call.heads, call.attn_sink, call.indices, call.lens
    q, kv = aligned(queries(call), step=_STEP), aligned(call.kv, step=_STEP)
    tokens = q.shape[0]
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    items = tokens * -(-heads // BLOCK_H.value)
    _launch(
        min(items, platform.limits(q.device).multiprocessors),
        (q, kv, indices, lens if lens is not None else lse, attn_sink if attn_sink is not None else lse, out, lse),
        (
            items, heads, kv.shape[0], indices.shape[1], call.softmax_scale,
            q.stride(0), q.stride(1), kv.stride(0), indices.stride(0), out.stride(0), out.stride(1),
        ),
        (lens is not None, attn_sink is not None),
        NUM_WARPS,
    )  # fmt: skip
    return out, lse
