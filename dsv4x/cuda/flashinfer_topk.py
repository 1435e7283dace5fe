"""FlashInfer's selection of a row's largest logits, from 0.6.15 on, whose ties can be told to go to the smallest index.

Read from the Python side of the ``flashinfer-python`` wheels 0.6.15 to 0.7.2.post1; **nothing was run on a GPU**. It
keeps the order of float32, in which a NaN is the largest and -0 is below 0, and promises no order of the indices.
"""

from __future__ import annotations

import inspect

import torch

from ..common.core.logits_calls import SelectionCall
from ..common.dispatch.problem import SelectionProblem
from ..common.dispatch.registry import Kernel, register
from ..common.ops.topk import plain_order, put_in_space, row_ranges
from .flashinfer import FLASHINFER

FUNCTION = "top_k_ragged_transform"
_ARGUMENTS = ("input", "offsets", "lengths", "k", "deterministic", "tie_break", "dsa_graph_safe", "row_starts")
_SMALLEST_INDEX = 1

BY_NAME_ONLY = "its NaN, its -0 and its order of the indices take three more passes, and nobody has timed it for dsv4x"


def _reasons(problem: SelectionProblem) -> list[str]:
    """What the installed release lacks, told by its signature."""
    if problem.device != "cuda" or FLASHINFER.reason is not None:
        return []
    where = f"flashinfer at {FLASHINFER.path}"
    function = getattr(FLASHINFER.load(), FUNCTION, None)
    if function is None:
        return [f"{where} has no {FUNCTION}"]
    lacking = [name for name in _ARGUMENTS if name not in inspect.signature(function).parameters]
    return [f"{FUNCTION} of {where} has no {', '.join(lacking)}"] if lacking else []


def topk_transform(call: SelectionCall) -> None:
    """``top_k_ragged_transform`` for local indices, put in order and in the space asked for."""
    starts, lens = row_ranges(call.logits, call.lengths, call.row_starts)
    local = getattr(FLASHINFER.load(), FUNCTION)(
        plain_order(call.logits),
        torch.zeros_like(starts),
        lens,
        call.k,
        deterministic=True,
        tie_break=_SMALLEST_INDEX,
        dsa_graph_safe=True,
        row_starts=starts,
    )
    # No index is past its row's length, so this stands for none, behind all others.
    local = torch.where(local < 0, 2**31 - 1, local).sort(dim=1).values
    put_in_space(local, lens, call.method, call.space, call.out, call.out_local)


def register_kernels() -> None:
    """Add the selection kernel."""
    register(
        Kernel(
            "topk_transform",
            "flashinfer",
            topk_transform,
            lambda problem: float("inf"),
            library=FLASHINFER,
            by_name_only=BY_NAME_ONLY,
            further_reasons=_reasons,
        )
    )
