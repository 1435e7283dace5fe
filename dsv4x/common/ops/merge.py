"""Merging partial attention: one row's entries were attended to in parts, on several ranks or in several calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core import checks
from ..dispatch.problem import MergeProblem
from ..dispatch.registry import select

STATE_DTYPES = (torch.bfloat16, torch.float32)


def merge_attention_states(
    outs: torch.Tensor | Sequence[torch.Tensor],
    lses: torch.Tensor | Sequence[torch.Tensor],
    attn_sink: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all of a row's entries, from N states that each hold what a part of them gave.

    With w = exp(lse of a state): lse = log(sum of w), out = sum of w * out / sum of w, in float32; a sink then scales
    out by 1 / (1 + exp(sink - lse)). Parts share no entry, and their own calls are made without the sink.

    A state whose lse is +inf (dsv4x, FlashMLA) or -inf (FlashInfer) had no entry. It has no weight, and its out is not
    looked at. A row of such states alone gets out = 0 and lse = +inf.

    Args:
        outs: bf16 or float32 ``[N, T, H, V]``, N, V >= 1, any strides with the last 1; or N tensors ``[T, H, V]`` of
            one dtype. Two tensors of the same strides are read where they are, more are copied together first.
        lses: float32 ``[N, T, H]``, natural log, sinks excluded, any strides with the last 1; or N tensors ``[T, H]``.
        attn_sink: float32 ``[H]`` or None; -inf has no effect, +inf makes out 0. Applied once, here.
        out: ``[T, H, V]`` of the states' dtype, any strides with the last 1; None allocates a contiguous one. It may be
            one of the states.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        ``(out, lse)``: ``[T, H, V]`` of the states' dtype and float32 ``[T, H]`` without the sink.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device; no state; under ``DSV4X_CHECK=1``
            also an lse that is NaN, with its state and token.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: ``merge_states`` of FlashInfer, with a sink and both conventions of an empty state.
    """
    first, last = _states(outs)
    states = first.shape[0] if isinstance(outs, torch.Tensor) else len(outs)
    tokens, heads, width = last.shape
    device = last.device
    lses = _lses(lses, (states, tokens, heads), device)
    if attn_sink is not None:
        checks.tensor("attn_sink", attn_sink, (heads,), torch.float32, device)
    if out is None:
        out = torch.empty(tokens, heads, width, dtype=last.dtype, device=device)
    else:
        checks.rows_apart("out", checks.tensor("out", out, (tokens, heads, width), last.dtype, device))
    if checks.check_values_enabled() and lses.isnan().any():
        state, token, _ = (int(x) for x in lses.isnan().nonzero()[0])
        raise ValueError(f"lses: NaN in state {state}, token {token}")
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=device)
    problem = MergeProblem.on("merge_attention_states", device, tokens=tokens, states=states, heads=heads)
    record = select(problem, kernel)
    if lse.numel():
        record.launch(device, first, last, lses, attn_sink, out, lse)
    return out, lse


def _states(outs: object) -> tuple[torch.Tensor, torch.Tensor]:
    """(``[>= N - 1, T, H, V]`` whose first N - 1 are the leading states, the last state) of the same inner strides."""
    if isinstance(outs, torch.Tensor):
        checks.tensor("outs", outs, (None, None, None, None), STATE_DTYPES)
        _sizes("outs", outs.shape[0], outs.shape[3])
        return outs, outs[-1]
    states = _sequence("outs", outs)
    _sizes("outs", len(states), 1)
    first = checks.tensor("outs[0]", states[0], (None, None, None), STATE_DTYPES)
    _sizes("outs[0]", 1, first.shape[2])
    for at, state in enumerate(states):
        checks.tensor(f"outs[{at}]", state, tuple(first.shape), first.dtype, first.device)
    if len(states) <= 2 and states[-1].stride() == first.stride():
        return first[None], states[-1]
    together = torch.stack(states)
    return together, together[-1]


def _sizes(name: str, states: int, width: int) -> None:
    if not states:
        raise ValueError(f"{name}: 0 states, need >= 1")
    if not width:
        raise ValueError(f"{name}: 0 values a head, need >= 1")


def _sequence(name: str, value: object) -> list[torch.Tensor]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: got {type(value).__name__}, need a tensor or a list of them")
    return list(value)


def _lses(lses: object, shape: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    if isinstance(lses, torch.Tensor):
        return checks.tensor("lses", lses, shape, torch.float32, device)
    states = _sequence("lses", lses)
    if len(states) != shape[0]:
        raise ValueError(f"lses: {len(states)} tensors, need {shape[0]} as outs has")
    for at, state in enumerate(states):
        checks.tensor(f"lses[{at}]", state, shape[1:], torch.float32, device)
    return torch.stack(states)
