"""Prefill attention over gathered bf16 rows on gfx942 and gfx950, in Gluon: one program a token and a block of heads.

The next block's rows are on their way in registers while this one, in LDS, is multiplied.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...common.core.calls import PrefillCall, Result, output
from ...common.core.platform import platform
from ...common.core.vendor import aligned
from ...common.kernels.decode import clamped_span
from ...common.kernels.launch import Launcher
from ...common.kernels.order import dies, token_and_block
from ...common.kernels.softmax import LOG2E
from .products import NUM_WARPS, VALUE_DIM, attend, matrix_layout, sums, tile_layout
from .results import finish, load_q
from .shapes import head_blocks, shape_of

_clamped_span, _token_and_block = gluon.jit(clamped_span.fn), gluon.jit(token_and_block.fn)


@gluon.constexpr_function
def _gather_layout(BLOCK_K):
    """16 bytes a lane, a wave a row."""
    return gl.BlockedLayout([BLOCK_K // NUM_WARPS, 8], [1, 64], [NUM_WARPS, 1], [1, 0])


@gluon.constexpr_function
def _row_layout():
    return gl.BlockedLayout([1], [64], [NUM_WARPS], [0])


@gluon.jit
def _rows(index_row, block, span, rows, BLOCK_K: gl.constexpr):
    """Workspace rows of a block of entries; -1 for every one that is none."""
    offset = block * BLOCK_K + gl.arange(0, BLOCK_K, _row_layout())
    row = gl.amd.cdna3.buffer_load(index_row, offset, mask=offset < span, other=-1)
    return gl.where((row >= 0) & (row < rows), row, -1).to(gl.int32)


@gluon.jit
def _place(number, row, stride, places):
    """Leave where a block's rows begin in the workspace, -1 for none."""
    places.index(number & 1).store(gl.where(row >= 0, row.to(gl.int64) * stride, -1))


@gluon.jit
def _load_block(number, kv_ptr, places, BLOCK_K: gl.constexpr):
    """The rows of a block; 0 for what is none."""
    GATHER: gl.constexpr = _gather_layout(BLOCK_K)
    begin = gl.multiple_of(places.index(number & 1).load(gl.SliceLayout(1, GATHER)), 8)[:, None]
    offset = begin + gl.arange(0, VALUE_DIM, gl.SliceLayout(0, GATHER))[None, :]
    # Not by buffer loads: on gfx950 they took all registers and 170 instructions more to move them about.
    return gl.load(kv_ptr + offset, mask=gl.broadcast(begin >= 0, offset)[0], other=0.0)


@gluon.jit(do_not_specialize=("heads", "rows", "width", "indices_stride"))
def prefill_cdna_kernel(
    q_ptr, kv_ptr, indices_ptr, lens_ptr, sink_ptr, out_ptr, lse_ptr,
    heads, rows, width, scale, q_stride_t, q_stride_h, kv_stride, indices_stride, out_stride_t, out_stride_h,
    HAS_LENS: gl.constexpr, HAS_SINK: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_K: gl.constexpr,
    CDNA4: gl.constexpr, DIES: gl.constexpr,
):  # fmt: skip
    """``CDNA4``: the code is for gfx950."""
    OUT: gl.constexpr = matrix_layout(CDNA4, BLOCK_H)
    head_blocks = (heads + BLOCK_H - 1) // BLOCK_H
    tokens = gl.num_programs(0) // head_blocks
    token, head_block = _token_and_block(gl.program_id(0), tokens, head_blocks, DIES)
    token = token.to(gl.int64)
    head0 = head_block * BLOCK_H
    span = width
    if HAS_LENS:
        span = _clamped_span(gl.load(lens_ptr + token), width)
    index_row = indices_ptr + token * indices_stride
    q = load_q(q_ptr, q_stride_t, q_stride_h, token, head0, heads, BLOCK_H, OUT)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_K, VALUE_DIM], tile_layout(CDNA4, BLOCK_K))
    places = gl.allocate_shared_memory(gl.int64, [2, BLOCK_K], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    m = gl.full([BLOCK_H], float("-inf"), gl.float32, gl.SliceLayout(1, OUT))
    l = sums(BLOCK_H, BLOCK_K, OUT)
    acc = gl.zeros([BLOCK_H, VALUE_DIM], gl.float32, OUT)
    _place(0, _rows(index_row, 0, span, rows, BLOCK_K), kv_stride, places)
    k = _load_block(0, kv_ptr, places, BLOCK_K)
    _place(1, _rows(index_row, 1, span, rows, BLOCK_K), kv_stride, places)
    upcoming = _rows(index_row, 2, span, rows, BLOCK_K)
    for number in range(0, gl.cdiv(span, BLOCK_K)):
        k_smem.store(k)
        valid = places.index(number & 1).load(gl.SliceLayout(0, OUT)) >= 0
        k = _load_block(number + 1, kv_ptr, places, BLOCK_K)
        row = upcoming
        upcoming = _rows(index_row, number + 3, span, rows, BLOCK_K)
        m, l, acc = attend(q, k_smem, valid, scale * LOG2E, m, l, acc, CDNA4)
        _place(number + 2, row, kv_stride, places)
    finish(
        m, l, acc, token, head0, heads, 0, 1, 1, sink_ptr, out_ptr, lse_ptr, out_ptr, lse_ptr,
        out_stride_t, out_stride_h, HAS_SINK, False, CDNA4,
    )  # fmt: skip


_launch = Launcher(prefill_cdna_kernel, floats=("scale",))


def sparse_mla_prefill(call: PrefillCall) -> Result:
    """Launch over the heads that count, of 512 values."""
    q, out, heads, attn_sink, indices, lens = (
        call.q, output(call), call.heads, call.attn_sink, call.indices, call.lens
    )  # fmt: skip
    kv, arch = aligned(call.kv), platform.limits(q.device).arch
    shape = shape_of(arch, heads)
    tokens = q.shape[0]
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    _launch(
        tokens * head_blocks(shape, heads),
        (q, kv, indices, lens if lens is not None else lse, attn_sink if attn_sink is not None else lse, out, lse),
        (
            heads, kv.shape[0], indices.shape[1], call.softmax_scale,
            q.stride(0), q.stride(1), kv.stride(0), indices.stride(0), out.stride(0), out.stride(1),
        ),
        (
            lens is not None, attn_sink is not None, shape.block_h, shape.block_k, arch == "gfx950", dies(arch),
        ),
        NUM_WARPS,
        **shape.options,
    )  # fmt: skip
    return out, lse
