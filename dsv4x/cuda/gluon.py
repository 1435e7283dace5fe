"""Gluon kernels. Gluon comes with Triton, but a kernel written in it is written for one arch."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..common.core.calls import DecodeCall, PrefillCall, Result
from ..common.core.model import VALUE_DIM
from ..common.core.vendor import VendorLibrary
from ..common.dispatch import costs
from ..common.dispatch.problem import AttentionProblem
from ..common.dispatch.registry import Kernel, register
from ..common.kernels.decode_shapes import most_splits
from ..common.kernels.scratch import multiprocessors, partial_bytes, tensor_bytes
from .hopper import splitting

GLUON = VendorLibrary(
    "triton.experimental.gluon.language.nvidia.hopper",
    ("triton",),
    attributes=("async_copy", "fence_async_shared", "mbarrier", "warpgroup_mma", "warpgroup_mma_wait"),
    hint="pip install 'triton>=3.6'",
)

_MULTIPROCESSORS = 132
# Prefill's table (costs_sm_90.json) has 16, 64 and 128 heads; up to 32 take nearly what 16 do.
_FEW_HEADS = 32


def prefill(call: PrefillCall) -> Result:
    """Gluon's prefill kernel. q and kv are copied where a stride is no multiple of 32 bytes, or the address of 16."""
    from .hopper.prefill import sparse_mla_prefill

    return sparse_mla_prefill(call)


def decode(call: DecodeCall) -> Result:
    """Gluon's decode kernel. It checks indices in the kernel, and schedules nothing."""
    from .hopper.decode import sparse_mla_decode

    return sparse_mla_decode(call)


def prepare_decode(call: DecodeCall) -> Callable[[DecodeCall], Result]:
    """:func:`decode` for calls that look like this one."""
    from .hopper.decode import prepare

    return prepare(call)


def _decode_reasons(problem: AttentionProblem) -> list[str]:
    reasons = [
        f"{cache.pages * cache.page_size} slots, need < {2**31}: it takes 32-bit slots"
        for cache in problem.caches
        if cache.pages * cache.page_size >= 2**31
    ]
    if problem.interpreter:
        reasons.append("TRITON_INTERPRET=1, need it unset: Gluon has no interpreter")
    return reasons


def _decode_scratch(problem: AttentionProblem) -> int:
    units = multiprocessors(problem.device, problem.arch)
    batch = splitting.batch_of(problem.tokens, problem.heads, units, problem.capturing)
    blocks = sum(-(-width // splitting.BLOCK_ENTRIES) for width in (problem.width, problem.extra_width))
    splits = problem.split_k or most_splits(batch.programs, blocks, batch.at_once)
    return partial_bytes(problem.tokens, problem.heads, splits)


def _prefill_scratch(problem: AttentionProblem) -> int:
    """A copy of q, which is made where q is off its alignment. One of such a workspace is not counted."""
    return tensor_bytes(problem.tokens * problem.heads * problem.head_dim, 2)


def _decode_us(problem: AttentionProblem) -> float:
    batch = splitting.batch_of(problem.tokens, problem.heads, _MULTIPROCESSORS, problem.capturing)
    return splitting.predicted_us(batch, problem.entries, (problem.width, problem.extra_width), problem.split_k)


def _reasons(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.head_dim != VALUE_DIM:
        reasons.append(f"head dim is {problem.head_dim}, need {VALUE_DIM}: shared memory holds no more")
    if problem.interpreter:
        reasons.append("TRITON_INTERPRET=1, need it unset: Gluon has no interpreter")
    return reasons


def _predicted_us(problem: AttentionProblem) -> float:
    table, width = costs.table_of(problem.arch), problem.entries_read
    assert table is not None
    blocks = -(-problem.heads // splitting.BLOCK_HEADS)
    heads = 16 if problem.heads <= _FEW_HEADS else min(blocks, 2) * splitting.BLOCK_HEADS
    tokens = problem.tokens * max(blocks, 2) // 2
    return costs.kernel_us(table, "prefill_gluon", heads, tokens, width, problem.rows)


def register_kernels() -> None:
    """Add the kernels of Hopper."""
    host_us = functools.partial(costs.kernel_host_us, kernel="gluon")
    register(
        Kernel(
            "sparse_mla_decode",
            "gluon",
            decode,
            _decode_us,
            library=GLUON,
            archs=("sm_90",),
            layouts=("DSv4",),
            fixed_splits=True,
            remaps=True,
            prepare=prepare_decode,
            scratch_bytes=_decode_scratch,
            host_us=host_us,
            further_reasons=_decode_reasons,
        )
    )
    register(
        Kernel(
            "sparse_mla_prefill",
            "gluon",
            prefill,
            _predicted_us,
            library=GLUON,
            archs=("sm_90",),
            scratch_bytes=_prefill_scratch,
            host_us=host_us,
            further_reasons=_reasons,
        )
    )
