"""AMD: AITER's kernels beside the portable Triton ones, as gfx942 and gfx950 run them, where ROCm is the backend."""

from . import aiter, aiter_indexer
from .aiter import AITER

KERNELS = ("aiter",)
"""The names of its kernels."""

LIBRARIES = (AITER,)


def register_kernels() -> None:
    """Add AITER's kernels to the ops they serve; AITER is not imported."""
    aiter.register_kernels()
    aiter_indexer.register_kernels(AITER)


__all__ = ["AITER", "KERNELS", "LIBRARIES", "register_kernels"]
