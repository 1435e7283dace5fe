"""The one place where each platform of vLLM's looks its attention class up, with dsv4x's subclass in it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from ..activation import expect_attributes, expect_parameters, reason_of
from .attention import Attention
from .contract import check_class, check_cuda_class, check_shared, platform_of
from .server import SERVER

LOOKUPS = {
    "cuda": ("nvidia", "_select_dsv4_attn_cls"),
    "rocm": ("amd", "DeepseekV4ROCMAiterMLAAttention"),
    "cpu": ("cpu", "DeepseekV4CPUAttention"),
}
"""Platform -> folder of its model, and the name by which its decoder layer finds the attention class."""

CUDA_CLASS = "DeepseekV4FlashMLAAttention"
"""The class that is replaced on CUDA; FlashInfer's have other caches and results."""


@functools.cache
def install() -> bool:
    """Put dsv4x's subclass where the platform's decoder layer looks its attention class up.

    Returns:
        Whether it stands there; where something does not fit, vLLM's own class stays and a line says why.

    Raises:
        Required: dsv4x stays out, and ``DSV4X_SERVERS=require``.
    """
    try:
        SERVER.check_version()
        from vllm.platforms import current_platform

        put_in_place(platform_of(current_platform))
    except Exception as error:
        SERVER.stay_out(reason_of(error))
        return False
    return True


def put_in_place(platform: str) -> None:
    """Replace the lookup of ``platform``, after everything that is used has been looked at.

    Raises:
        Mismatch: vLLM is not what the adapter was read against.
    """
    folder, name = LOOKUPS[platform]
    model = importlib.import_module(f"vllm.models.deepseek_v4.{folder}.model")
    expect_attributes(model, (name,))
    check_shared()
    if platform == "cuda":
        expect_parameters(model, name, ("vllm_config",))
        expect_attributes(model, (CUDA_CLASS,))
        check_cuda_class(getattr(model, CUDA_CLASS))
        setattr(model, name, selecting(getattr(model, name)))
        return
    theirs = getattr(model, name)
    check_class(theirs)
    if platform == "rocm":
        ops = importlib.import_module("vllm.v1.attention.ops.rocm_aiter_mla_sparse")
        # 0.30.0 has none: its projection rotates rows back by itself.
        expect_parameters(ops, "rocm_inverse_rope_rows_", ("o", "positions", "cos_sin_cache", "rope_head_dim"))
    setattr(model, name, subclass_of(theirs))


def selecting(select: Callable[[Any], type]) -> Callable[[Any], type]:
    """vLLM's choice of an attention class, with dsv4x's subclass in the FlashMLA class's place."""

    def _select_dsv4_attn_cls(vllm_config: Any) -> type:
        theirs = select(vllm_config)
        if theirs.__name__ != CUDA_CLASS:
            SERVER.stay_out(f"its attention class here is {theirs.__name__}, need {CUDA_CLASS}")
            return theirs
        return subclass_of(theirs)

    return _select_dsv4_attn_cls


@functools.cache
def subclass_of(theirs: type) -> type:
    """vLLM's class with dsv4x's attention before it."""
    return type(f"Dsv4x{theirs.__name__}", (Attention, theirs), {})
