"""NVIDIA: FlashMLA's, FlashInfer's and Gluon kernels beside the portable ones, where CUDA is the backend."""

from ..common.vendor import VendorLibrary
from . import flash_mla, flashinfer, gluon

DEEP_GEMM = VendorLibrary(
    "deep_gemm",
    ("sgl-deep-gemm",),
    wrong={"deep-gemm": "PyPI's deep-gemm, an old source release with another API"},
    attributes=("get_paged_mqa_logits_metadata",),
    hint="pip install sgl-deep-gemm",
)

LIBRARIES = (flash_mla.FLASH_MLA, DEEP_GEMM, flashinfer.FLASHINFER)


def register_kernels() -> None:
    """Add all their kernels to the ops they serve; no library is imported."""
    flash_mla.register_kernels()
    flashinfer.register_kernels()
    gluon.register_kernels()


__all__ = ["LIBRARIES", "register_kernels"]
