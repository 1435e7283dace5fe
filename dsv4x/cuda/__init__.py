"""NVIDIA: FlashMLA, DeepGEMM, FlashInfer, Gluon and CUDA C++ beside the portable kernels, where CUDA is the backend."""

from pathlib import Path

from ..common.dispatch import costs
from . import cuda_topk, deep_gemm, flash_mla, flashinfer, flashinfer_topk, gluon
from .deep_gemm import DEEP_GEMM

costs.add_table("sm_90", Path(__file__).parent / "costs_sm_90.json")

KERNELS = ("flash_mla", "deep_gemm", "flashinfer", "gluon", "cuda")
"""The names of its kernels."""

LIBRARIES = (flash_mla.FLASH_MLA, DEEP_GEMM, flashinfer.FLASHINFER)


def register_kernels() -> None:
    """Add all their kernels to the ops they serve; no library is imported."""
    flash_mla.register_kernels()
    deep_gemm.register_kernels()
    flashinfer.register_kernels()
    flashinfer_topk.register_kernels()
    cuda_topk.register_kernels()
    gluon.register_kernels()


__all__ = ["DEEP_GEMM", "KERNELS", "LIBRARIES", "register_kernels"]
