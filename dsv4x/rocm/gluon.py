"""Gluon kernels of gfx942 and gfx950: asked for by name, until somebody has run them on such a GPU."""

from __future__ import annotations

from ..common.core.calls import DecodeCall, PrefillCall, Result
from ..common.core.model import VALUE_DIM
from ..common.core.vendor import VendorLibrary
from ..common.dispatch.problem import AttentionProblem
from ..common.dispatch.registry import Kernel, register
from ..common.kernels.decode_shapes import most_splits
from ..common.kernels.scratch import multiprocessors, partial_bytes, tensor_bytes
from .cdna.shapes import ARCHS, batch_of, decode_us, prefill_us, shape_of

GLUON = VendorLibrary(
    "triton.experimental.gluon.language.amd.cdna3",
    ("triton",),
    attributes=("buffer_load", "mfma"),
    hint="pip install 'triton>=3.6'",
)

BY_NAME_ONLY = "it never ran on an AMD GPU: compiled, and its body computed on a CPU; docs/gfx.md says how to try it"
"""What would end this: its GPU tests passing on both archs, and times beside Triton's."""


def prefill(call: PrefillCall) -> Result:
    """Gluon's prefill kernel. A workspace whose rows are off 16 bytes is copied."""
    from .cdna.prefill import sparse_mla_prefill

    return sparse_mla_prefill(call)


def decode(call: DecodeCall) -> Result:
    """Gluon's decode kernel. It checks indices in the kernel, and schedules nothing."""
    from .cdna.decode import sparse_mla_decode

    return sparse_mla_decode(call)


def _reasons(problem: AttentionProblem) -> list[str]:
    reasons = [
        f"{cache.pages * cache.page_size} slots, need < {2**31}: it takes 32-bit slots"
        for cache in problem.caches
        if cache.pages * cache.page_size >= 2**31
    ]
    if problem.head_dim != VALUE_DIM:
        reasons.append(f"head dim is {problem.head_dim}, need {VALUE_DIM}: registers hold no more")
    if problem.interpreter:
        reasons.append("TRITON_INTERPRET=1, need it unset: Gluon has no interpreter")
    return reasons


def _decode_scratch(problem: AttentionProblem) -> int:
    shape = shape_of(problem.arch, problem.heads)
    units = multiprocessors(problem.device, problem.arch)
    batch = batch_of(shape, problem.tokens, problem.heads, units)
    blocks = sum(-(-width // shape.block_k) for width in (problem.width, problem.extra_width))
    splits = problem.split_k or most_splits(batch.programs, blocks, batch.at_once)
    return partial_bytes(problem.tokens, problem.heads, splits)


def _prefill_scratch(problem: AttentionProblem) -> int:
    """The lse that is made whether wanted or not. A copy of such a workspace is not counted."""
    return tensor_bytes(problem.tokens * problem.heads, 4)


def _decode_us(problem: AttentionProblem) -> float:
    shape = shape_of(problem.arch, problem.heads)
    batch = batch_of(shape, problem.tokens, problem.heads, shape.compute_units)
    return decode_us(shape, batch, problem.entries, (problem.width, problem.extra_width), problem.split_k)


def _prefill_us(problem: AttentionProblem) -> float:
    shape = shape_of(problem.arch, problem.heads)
    return prefill_us(shape, problem.tokens, problem.heads, problem.entries_read)


def _decode_note(problem: AttentionProblem) -> str:
    return f"at least {_decode_us(problem):.0f} us by its code"


def _prefill_note(problem: AttentionProblem) -> str:
    return f"at least {_prefill_us(problem):.0f} us by its code"


def register_kernels() -> None:
    """Add both kernels."""
    register(
        Kernel(
            "sparse_mla_decode",
            "gluon",
            decode,
            _decode_us,
            library=GLUON,
            archs=ARCHS,
            layouts=("DSv4", "DSv4 fnuz"),
            fixed_splits=True,
            remaps=True,
            by_name_only=BY_NAME_ONLY,
            scratch_bytes=_decode_scratch,
            further_reasons=_reasons,
            note=_decode_note,
        )
    )
    register(
        Kernel(
            "sparse_mla_prefill",
            "gluon",
            prefill,
            _prefill_us,
            library=GLUON,
            archs=ARCHS,
            by_name_only=BY_NAME_ONLY,
            scratch_bytes=_prefill_scratch,
            further_reasons=_reasons,
            note=_prefill_note,
        )
    )
