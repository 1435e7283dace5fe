"""What a program reads and writes of its heads: q, and in the end the output, the lse, or both of a split."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...common.kernels.softmax import LN2, LOG2E
from .products import VALUE_DIM, in_order, matrix_layout, operand_layout


@gluon.jit
def load_q(q_ptr, stride_t, stride_h, token, head0, heads, BLOCK_H: gl.constexpr, OUT: gl.constexpr):
    """bf16 ``[BLOCK_H, 512]`` as the logits' product takes it; 0 past the heads."""
    OPERAND: gl.constexpr = operand_layout(OUT, 0)
    head = (head0 + gl.arange(0, BLOCK_H, gl.SliceLayout(1, OPERAND)))[:, None]
    offset = token * stride_t + head.to(gl.int64) * stride_h
    offset = offset + gl.arange(0, VALUE_DIM, gl.SliceLayout(0, OPERAND))[None, :]
    return gl.load(q_ptr + offset, mask=gl.broadcast(head < heads, offset)[0], other=0.0)


@gluon.jit
def _store(ptr, offset, values, mask):
    gl.store(ptr + offset, values, mask=gl.broadcast(mask, offset)[0])


@gluon.jit
def finish(
    m, l, acc, token, head0, heads, split, splits, most_splits, sink_ptr, out_ptr, lse_ptr, partial_ptr,
    partial_lse_ptr, out_stride_t, out_stride_h, HAS_SINK: gl.constexpr, SPLIT: gl.constexpr, CDNA4: gl.constexpr,
):  # fmt: skip
    """Write a row of one split out, with the sink and its lse without; of several, a partial result."""
    OUT: gl.constexpr = matrix_layout(CDNA4, acc.shape[0])
    HEADS: gl.constexpr = gl.SliceLayout(1, OUT)
    total = gl.convert_layout(gl.sum(l, 1), HEADS)
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("inf"), (m + gl.log2(total)) * LN2)
    head = head0 + gl.arange(0, acc.shape[0], HEADS)
    row = token * heads + head
    whole = head < heads
    if SPLIT:
        gl.store(partial_lse_ptr + row * most_splits + split, lse, mask=whole & (splits > 1))
        whole = whole & (splits == 1)
    gl.store(lse_ptr + row, lse, mask=whole)
    share = 1.0 / total
    if HAS_SINK:
        # A partial result is given no sink: one of -inf takes nothing.
        sink = gl.load(sink_ptr + head, mask=whole, other=float("-inf"))
        # An empty row's lse of +inf meets a sink of +inf as NaN; its output is zero whatever the sink.
        share *= gl.where(empty, 0.0, 1.0 / (1.0 + gl.exp2((sink - lse) * LOG2E)))
    out = in_order(acc * share[:, None], OUT, CDNA4)
    ORDER: gl.constexpr = out.type.layout
    head = (head0 + gl.arange(0, acc.shape[0], gl.SliceLayout(1, ORDER)))[:, None]
    column = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, ORDER))[None, :]
    whole = head < heads
    if SPLIT:
        row = ((token * heads + head) * most_splits + split) * VALUE_DIM
        _store(partial_ptr, row + column, out, whole & (splits > 1))
        whole = whole & (splits == 1)
    row = token * out_stride_t + head.to(gl.int64) * out_stride_h
    _store(out_ptr, row + column, out.to(gl.bfloat16), whole)
