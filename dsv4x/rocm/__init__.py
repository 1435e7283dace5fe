"""AMD: AITER's kernels and Gluon ones beside the portable Triton ones, where ROCm is the backend."""

from . import aiter, aiter_indexer, gluon
from .aiter import AITER

KERNELS = ("aiter", "gluon")
"""The names of its kernels."""

LIBRARIES = (AITER,)


def register_kernels() -> None:
    """Add all their kernels to the ops they serve; no library is imported."""
    aiter.register_kernels()
    aiter_indexer.register_kernels(AITER)
    gluon.register_kernels()


__all__ = ["AITER", "KERNELS", "LIBRARIES", "register_kernels"]
