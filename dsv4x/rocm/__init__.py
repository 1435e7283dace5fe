"""AMD: the portable Triton kernels as gfx942 and gfx950 run them, and AITER, where ROCm is the backend."""

from ..common.registry import refuse
from ..common.vendor import VendorLibrary
from . import aiter_indexer

AITER = VendorLibrary(
    "aiter",
    ("amd-aiter",),
    wrong={"aiter": "PyPI's aiter, an asyncio package that has nothing to do with AMD"},
    attributes=("ops",),
    hint="AMD ships amd-aiter as wheels and source, PyPI does not have it; see docs/dependencies.md",
)

LIBRARIES = (AITER,)


def register_kernels() -> None:
    """The portable kernels are registered already; AITER's sparse attention cannot keep the ops' promise."""
    for op in ("sparse_mla_decode", "sparse_mla_prefill"):
        refuse(op, "aiter", f"AITER's sparse attention kernels return no lse, and {op} does")
    aiter_indexer.register_kernels(AITER)
