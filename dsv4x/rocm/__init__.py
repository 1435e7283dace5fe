"""AMD: AITER's kernels beside the portable Triton ones, as gfx942 and gfx950 run them, where ROCm is the backend."""

from . import aiter
from .aiter import AITER

LIBRARIES = (AITER,)


def register_kernels() -> None:
    """Add AITER's attention kernels to the ops they serve; AITER is not imported."""
    aiter.register_kernels()


__all__ = ["AITER", "LIBRARIES", "register_kernels"]
