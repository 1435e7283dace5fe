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
from ..common.kernels.decode_shapes import expected_blocks, most_splits, num_splits
from ..common.kernels.scratch import multiprocessors, partial_bytes, tensor_bytes

GLUON = VendorLibrary(
    "triton.experimental.gluon.language.nvidia.hopper",
    ("triton",),
    attributes=("async_copy", "fence_async_shared", "mbarrier", "warpgroup_mma", "warpgroup_mma_wait"),
    hint="pip install 'triton>=3.6'",
)

_BLOCK_H = 64
_MULTIPROCESSORS = 132
# Prefill's table (costs_sm_90.json) has 16, 64 and 128 heads; up to 32 take nearly what 16 do.
_FEW_HEADS = 32

# Decode's, fitted to an H200 (benchmarks/results/decode-kernels-h200.json), in microseconds: an item's start and end, a
# block of 64 entries, what each of the first twelve of an item takes more while caches are cold, and the reduction of
# splits: a call, and a MB.
_ITEM, _BLOCK, _COLD, _COLD_BLOCKS = 12.1, 2.6, 1.37, 12
_REDUCE, _REDUCE_MB = 1.6, 0.15
_DECODE_BLOCK = 64


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
    programs = problem.tokens * -(-problem.heads // _BLOCK_H)
    blocks = sum(-(-width // _DECODE_BLOCK) for width in (problem.width, problem.extra_width))
    splits = problem.split_k or most_splits(programs, blocks, multiprocessors(problem.device, problem.arch))
    return partial_bytes(problem.tokens, problem.heads, splits)


def _prefill_scratch(problem: AttentionProblem) -> int:
    """A copy of q, which is made where q is off its alignment. One of such a workspace is not counted."""
    return tensor_bytes(problem.tokens * problem.heads * problem.head_dim, 2)


def _decode_us(problem: AttentionProblem) -> float:
    programs = problem.tokens * -(-problem.heads // _BLOCK_H)
    # Rows have the splits of their own length, whatever their width.
    blocks = expected_blocks(problem.entries, (problem.width, problem.extra_width), _DECODE_BLOCK)
    splits = problem.split_k or num_splits(programs, blocks, _MULTIPROCESSORS)
    share = -(-blocks // splits)
    waves = -(-programs * splits // _MULTIPROCESSORS)
    partial_mb = 4e-6 * VALUE_DIM * problem.tokens * problem.heads * splits
    reduce = _REDUCE + _REDUCE_MB * partial_mb if splits > 1 else 0.0
    return _COLD * min(share, _COLD_BLOCKS) + waves * (_ITEM + _BLOCK * share) + reduce


def _reasons(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.head_dim != VALUE_DIM:
        reasons.append(f"head dim is {problem.head_dim}, need {VALUE_DIM}: shared memory holds no more")
    if problem.interpreter:
        reasons.append("TRITON_INTERPRET=1, need it unset: Gluon has no interpreter")
    return reasons


def _predicted_us(problem: AttentionProblem) -> float:
    table, width = costs.table_of(problem.arch), problem.entries or problem.width
    assert table is not None
    blocks = -(-problem.heads // _BLOCK_H)
    heads = 16 if problem.heads <= _FEW_HEADS else min(blocks, 2) * _BLOCK_H
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
