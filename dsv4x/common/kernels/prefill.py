"""Prefill attention over gathered bf16 workspace rows: one program a token and a block of heads."""

import torch
import triton
import triton.language as tl

from ..core.calls import PrefillCall, Result, output
from ..core.platform import platform
from .launch import Launcher
from .order import dies, token_and_block
from .portability import to_bf16
from .prefill_shapes import prefill_config
from .softmax import LOG2E, apply_sink, attend_block, finish, load_q


@triton.jit
def _rows(index_row, start, span, rows, BLOCK_K: tl.constexpr):
    """The workspace rows of a step's entries, -1 for every one that is none."""
    offset = start + tl.arange(0, BLOCK_K)
    row = tl.load(index_row + offset, mask=offset < span, other=-1)
    return tl.where((row >= 0) & (row < rows), row, -1)


@triton.jit(do_not_specialize=("heads", "rows", "width"))
def prefill_kernel(
    q_ptr, kv_ptr, indices_ptr, lens_ptr, sink_ptr, out_ptr, lse_ptr,
    heads, rows, width, scale, q_stride_t, q_stride_h, kv_stride, indices_stride, out_stride_t, out_stride_h,
    HAS_LENS: tl.constexpr, HAS_SINK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    VALUE_DIM: tl.constexpr, TAIL: tl.constexpr, PREFETCH: tl.constexpr, DIES: tl.constexpr,
):  # fmt: skip
    # Blocks of heads of one token run side by side, so that the others find the rows in L2.
    head_blocks = (heads + BLOCK_H - 1) // BLOCK_H
    if DIES > 1:
        tokens = tl.num_programs(0) // head_blocks
        token, head_block = token_and_block(tl.program_id(0), tokens, head_blocks, DIES)
        token = token.to(tl.int64)
        head = head_block.to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    else:
        token = (tl.program_id(0) // head_blocks).to(tl.int64)
        head = (tl.program_id(0) % head_blocks).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_mask = head < heads
    column = tl.arange(0, VALUE_DIM)
    q, q_tail = load_q(q_ptr + token * q_stride_t + head * q_stride_h, head_mask, VALUE_DIM, TAIL)
    span = width
    if HAS_LENS:
        span = tl.minimum(tl.maximum(tl.load(lens_ptr + token), 0), width).to(tl.int32)
    index_row = indices_ptr + token * indices_stride
    m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, VALUE_DIM), tl.float32)
    if PREFETCH:
        row = _rows(index_row, 0, span, rows, BLOCK_K)
    for start in range(0, span, BLOCK_K):
        if not PREFETCH:
            row = _rows(index_row, start, span, rows, BLOCK_K)
        valid = row >= 0
        # No row is read for an entry that is none, but its pointer should still lie in the workspace.
        kv_row = kv_ptr + tl.where(valid, row, 0).to(tl.int64)[:, None] * kv_stride
        k = tl.load(kv_row + column[None, :], mask=valid[:, None], other=0.0)
        k_tail = k
        if TAIL > 0:
            k_tail = tl.load(kv_row + VALUE_DIM + tl.arange(0, TAIL)[None, :], mask=valid[:, None], other=0.0)
        if PREFETCH:
            row = _rows(index_row, start + BLOCK_K, span, rows, BLOCK_K)
        m, l, acc = attend_block(q, q_tail, k, k_tail, valid, scale * LOG2E, m, l, acc, TAIL)
    out, lse = finish(m, l, acc)
    if HAS_SINK:
        out = apply_sink(out, lse, tl.load(sink_ptr + head, mask=head_mask, other=0.0))
    out_row = out_ptr + token * out_stride_t + head[:, None] * out_stride_h
    tl.store(out_row + column[None, :], to_bf16(out), mask=head_mask[:, None])
    tl.store(lse_ptr + token * heads + head, lse, mask=head_mask)


_launch = Launcher(prefill_kernel, floats=("scale",))


def sparse_mla_prefill(call: PrefillCall) -> Result:
    """Launch over the heads that count."""
    q, out, heads, attn_sink = call.q, output(call), call.heads, call.attn_sink
    kv, indices, lens = call.kv, call.indices, call.lens
    tokens, _, head_dim = q.shape
    value_dim = out.shape[2]
    arch = platform.limits(q.device).arch
    config = prefill_config(arch, heads, head_dim)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    _launch(
        tokens * -(-heads // config.block_h),
        (q, kv, indices, lens if lens is not None else lse, attn_sink if attn_sink is not None else lse, out, lse),
        (
            heads, kv.shape[0], indices.shape[1], call.softmax_scale,
            q.stride(0), q.stride(1), kv.stride(0), indices.stride(0), out.stride(0), out.stride(1),
        ),
        (
            lens is not None, attn_sink is not None, config.block_h, config.block_k, value_dim, head_dim - value_dim,
            config.prefetch, dies(arch),
        ),
        **config.options,
    )  # fmt: skip
    return out, lse
