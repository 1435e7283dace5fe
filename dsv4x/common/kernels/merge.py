"""Merging attention states: outputs and lse's of parts of a row's entries, into those of all of them."""

import torch
import triton
import triton.language as tl

from .launch import Launcher
from .portability import to_bf16
from .softmax import LOG2E, apply_sink, finish

COLUMNS = 1024
"""Most values of a row that one program takes."""

AT_ONCE = 4
"""Most states whose values are loaded together: more would cost registers and no load waits for another."""


@triton.jit
def _scores(lses_ptr, state, states, state_stride):
    """The lse's of ``state``, -inf for those without entries and past the last state."""
    lse = tl.load(lses_ptr + state.to(tl.int64) * state_stride, mask=state < states, other=float("-inf"))
    # Both infinities say that there was no entry: dsv4x's and FlashMLA's +inf, and the usual -inf.
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit(do_not_specialize=("heads", "states", "lses_stride", "lses_stride_t"))
def merge_kernel(
    outs_ptr, last_ptr, lses_ptr, sink_ptr, out_ptr, lse_ptr, heads, states,
    outs_stride, outs_stride_t, outs_stride_h, lses_stride, lses_stride_t, out_stride_t, out_stride_h,
    HAS_SINK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (token and head, columns). The last state stands by itself, so that two tensors need no copy."""
    token = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    lses_ptr += token * lses_stride_t + head
    top = float("-inf")
    for start in range(0, states, BLOCK_S):
        score = _scores(lses_ptr, start + tl.arange(0, BLOCK_S), states, lses_stride)
        top = tl.maximum(top, tl.max(score, axis=0))
    top = tl.where(top == float("-inf"), 0.0, top)

    place = token * outs_stride_t + head * outs_stride_h + column
    # The last state outside the loop: Triton 3.6 cannot compile a choice between two pointers for AMD.
    last_score = _scores(lses_ptr, states - 1 + tl.arange(0, 1), states, lses_stride)
    total = tl.exp2((last_score - top) * LOG2E)
    # A state without entries is not read: its values may be anything.
    last_used = (last_score != float("-inf"))[:, None] & (column < WIDTH)[None, :]
    acc = tl.load(last_ptr + place[None, :], mask=last_used, other=0.0).to(tl.float32) * total[:, None]
    for start in range(0, states - 1, BLOCK_S):
        state = start + tl.arange(0, BLOCK_S)
        score = _scores(lses_ptr, state, states - 1, lses_stride)
        weight = tl.exp2((score - top) * LOG2E)
        used = (score != float("-inf"))[:, None] & (column < WIDTH)[None, :]
        base = outs_ptr + state.to(tl.int64) * outs_stride
        values = tl.load(base[:, None] + place[None, :], mask=used, other=0.0).to(tl.float32)
        acc += tl.sum(values * weight[:, None], axis=0)[None, :]
        total += tl.sum(weight, axis=0)
    # Weights are relative to the largest lse, which is added back.
    out, lse = finish(tl.zeros((1,), tl.float32), total, acc)
    lse += top
    if HAS_SINK:
        out = apply_sink(out, lse, tl.load(sink_ptr + head))
    if out_ptr.dtype.element_ty == tl.bfloat16:
        out = to_bf16(out)
    row = out_ptr + token * out_stride_t + head * out_stride_h + column
    tl.store(row[None, :], out, mask=(column < WIDTH)[None, :])
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + token * heads + head + tl.arange(0, 1), lse)


_launch = Launcher(merge_kernel)


def merge_shape(states: int, width: int) -> tuple[int, int, int]:
    """(values, states and warps of a program)."""
    block_v = min(triton.next_power_of_2(width), COLUMNS)
    return block_v, min(triton.next_power_of_2(states), AT_ONCE), 2 if block_v > 256 else 1


def merge_attention_states(
    outs: torch.Tensor,
    last: torch.Tensor,
    lses: torch.Tensor,
    attn_sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Launch over states ``outs [>= N - 1, T, H, V]`` and ``last [T, H, V]``, lse's ``[N, T, H]``; no size is 0."""
    states, tokens, heads = lses.shape
    width = out.shape[2]
    block_v, block_s, warps = merge_shape(states, width)
    _launch(
        (tokens * heads, -(-width // block_v), 1),
        (outs, last, lses, attn_sink if attn_sink is not None else lse, out, lse),
        (
            heads, states, outs.stride(0), outs.stride(1), outs.stride(2), lses.stride(0), lses.stride(1),
            out.stride(0), out.stride(1),
        ),
        (attn_sink is not None, width, block_v, block_s),
        warps,
    )  # fmt: skip
