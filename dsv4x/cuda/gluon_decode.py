"""The decode kernel written in Gluon. Gluon comes with Triton, but a kernel written in it is for one arch."""

from __future__ import annotations

from typing import Any

import torch

from ..common.registry import Kernel, Problem, register
from ..common.sparse_mla import VALUE_DIM
from ..common.vendor import VendorLibrary

GLUON = VendorLibrary(
    "triton.experimental.gluon.language.nvidia.hopper",
    ("triton",),
    attributes=("fence_async_shared", "mbarrier", "warpgroup_mma", "warpgroup_mma_wait"),
    hint="pip install 'triton>=3.6'",
)

# Microseconds on an H200 (benchmarks/results/decode-kernels-h200.json): a cold start of all multiprocessors, an item's
# start and end, a block of 64 entries, and the reduction of splits.
_COLD, _ITEM, _BLOCK, _REDUCE = 12.0, 15.7, 2.38, 4.0
_MULTIPROCESSORS = 132
_BLOCK_SIZE = 64


def decode(
    q: torch.Tensor,
    *args: Any,
    trusted_indices: bool = False,
    schedule: dict[Any, Any] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments as in :func:`dsv4x.sparse_mla_decode`; indices are checked in the kernel, nothing is scheduled."""
    from ..common.kernels.decode_hopper import sparse_mla_decode

    *inputs, out = args
    if out is None:
        out = torch.empty(*q.shape[:2], VALUE_DIM, dtype=q.dtype, device=q.device)
    return out, sparse_mla_decode(q, *inputs, out, **options)


def _reasons(problem: Problem) -> list[str]:
    reasons = [
        f"{cache.pages * cache.page_size} slots, need < {2**31}: it takes 32-bit slots"
        for cache in problem.caches
        if cache.pages * cache.page_size >= 2**31
    ]
    if problem.interpreter:
        reasons.append("TRITON_INTERPRET=1, need it unset: Gluon has no interpreter")
    return reasons


def _predicted_us(problem: Problem) -> float:
    from ..common.kernels.config import num_splits

    programs = problem.tokens * -(-problem.heads // _BLOCK_SIZE)
    widths = (problem.entries,) if problem.entries else (problem.width, problem.extra_width)
    blocks = sum(-(-width // _BLOCK_SIZE) for width in widths)
    splits = problem.split_k or num_splits(programs, blocks, _MULTIPROCESSORS)
    items = programs * splits
    item = _ITEM + _BLOCK * -(-blocks // splits)
    cold = _COLD * min(1.0, items / _MULTIPROCESSORS)
    return cold + item * -(-items // _MULTIPROCESSORS) + (_REDUCE if splits > 1 else 0.0)


def register_kernels() -> None:
    """Add Hopper's decode kernel."""
    register(
        Kernel(
            "sparse_mla_decode",
            "gluon",
            decode,
            _predicted_us,
            library=GLUON,
            archs=("sm_90",),
            layouts=("DSv4",),
            fixed_splits=True,
            further_reasons=_reasons,
        )
    )
