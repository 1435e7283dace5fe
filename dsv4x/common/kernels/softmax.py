"""The online-softmax step and its ending, shared by the attention kernels. Logits are in base 2."""

import triton
import triton.language as tl

from .portability import dot, to_bf16

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_q(q_row, head_mask, VALUE_DIM: tl.constexpr, TAIL: tl.constexpr):
    """``(q, q_tail)`` of the heads whose rows ``q_row [BLOCK_H]`` points at; without a tail ``q_tail`` is ``q``."""
    q = tl.load(q_row[:, None] + tl.arange(0, VALUE_DIM)[None, :], mask=head_mask[:, None], other=0.0)
    if TAIL > 0:
        tail = VALUE_DIM + tl.arange(0, TAIL)
        return q, tl.load(q_row[:, None] + tail[None, :], mask=head_mask[:, None], other=0.0)
    else:
        return q, q


@triton.jit
def attend_block(q, q_tail, k, k_tail, valid, scale, m, l, acc, TAIL: tl.constexpr):
    """Fold one block of entries ``k [BLOCK_K, D]`` into the running maximum, sum and output.

    With ``TAIL``, ``q_tail`` and ``k_tail [BLOCK_K, TAIL]`` are the values of K that are not part of V.
    """
    logits = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32))
    if TAIL > 0:
        logits = dot(q_tail, tl.trans(k_tail), logits)
    logits *= scale
    logits = tl.where(valid[None, :], logits, float("-inf"))
    m_new = tl.maximum(m, tl.max(logits, axis=1))
    # While every entry was invalid the maximum is -inf, and -inf - -inf would be NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(logits - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    l = l * alpha + tl.sum(p, axis=1)
    acc = dot(to_bf16(p), k, acc * alpha[:, None])
    return m_new, l, acc


@triton.jit
def finish(m, l, acc):
    """``(out, lse)`` without the sink, lse natural; a row without entries gives 0 and +inf."""
    empty = l == 0.0
    out = acc / tl.where(empty, 1.0, l)[:, None]
    lse = tl.where(empty, float("inf"), (m + tl.log2(tl.where(empty, 1.0, l))) * LN2)
    return out, lse


@triton.jit
def apply_sink(out, lse, sink):
    """Scale by the share of the softmax that the sink leaves: 1 / (1 + exp(sink - lse))."""
    # An empty row's lse of +inf meets a sink of +inf as NaN; its output is zero whatever the sink.
    share = tl.where(lse == float("inf"), 0.0, 1.0 / (1.0 + tl.exp2((sink - lse) * LOG2E)))
    return out * share[:, None]
