"""NVIDIA: FlashMLA's kernels beside the portable ones, where CUDA is the backend."""

from ..common.vendor import VendorLibrary
from .flash_mla import FLASH_MLA, register_kernels

DEEP_GEMM = VendorLibrary(
    "deep_gemm",
    ("sgl-deep-gemm",),
    wrong={"deep-gemm": "PyPI's deep-gemm, an old source release with another API"},
    attributes=("get_paged_mqa_logits_metadata",),
    hint="pip install sgl-deep-gemm",
)

LIBRARIES = (FLASH_MLA, DEEP_GEMM)

__all__ = ["LIBRARIES", "register_kernels"]
