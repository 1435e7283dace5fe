"""What the adapter uses of vLLM, asserted, and the one lookup a platform has for its attention class.

Read in the wheels of vLLM 0.30.0 to 0.33.0. ``nvidia/flashmla.py`` is the same in all four, byte by byte.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from ..activation import Mismatch, expect_attributes, expect_instance_attributes, expect_parameters, reason_of
from .server import SERVER

LOOKUPS = {
    "cuda": ("nvidia", "_select_dsv4_attn_cls"),
    "rocm": ("amd", "DeepseekV4ROCMAiterMLAAttention"),
    "cpu": ("cpu", "DeepseekV4CPUAttention"),
}
"""Platform -> folder of its model, and the name by which its decoder layer finds the attention class."""

CUDA_CLASS = "DeepseekV4FlashMLAAttention"
"""The class that is replaced on CUDA; FlashInfer's have other caches and results."""

_WINDOW_FIELDS = (
    "block_table", "slot_mapping", "block_size", "query_start_loc", "query_start_loc_cpu", "is_valid_token",
    "token_to_req_indices", "decode_swa_indices", "decode_swa_lens", "prefill_swa_indices", "prefill_swa_lens",
    "prefill_left_visible", "num_decodes", "num_prefills", "num_decode_tokens", "num_prefill_tokens",
    "prefill_seq_lens", "prefill_seq_lens_cpu", "flashinfer_sparse_index_cache",
)  # fmt: skip
_MAIN_FIELDS = (
    "block_table", "block_size", "topk_tokens", "max_seq_len", "c128a_global_decode_topk_indices",
    "c128a_decode_topk_lens",
)  # fmt: skip
_LAYER_ATTRIBUTES = (
    "prefix", "compress_ratio", "n_local_heads", "padded_heads", "window_size", "max_image_tokens", "scale",
    "attn_sink", "max_num_batched_tokens", "max_model_len", "kv_cache_dtype", "swa_cache_layer", "kv_cache",
    "topk_indices_buffer",
)  # fmt: skip

_FORWARD_MQA = ("self", "q", "kv", "positions", "output")
_FORWARD_DECODE = ("self", "q", "kv_cache", "swa_metadata", "attn_metadata", "swa_only", "output")
_FORWARD_PREFILL = (
    "self", "q", "positions", "compressed_k_cache", "swa_k_cache", "output", "attn_metadata", "swa_metadata",
)  # fmt: skip


def platform_of(current: Any) -> str:
    """``"cuda"``, ``"rocm"`` or ``"cpu"``.

    Raises:
        Mismatch: another platform of vLLM's.
    """
    for name in LOOKUPS:
        if getattr(current, f"is_{name}")():
            return name
    raise Mismatch(f"vLLM's platform is {type(current).__name__}, need CUDA, ROCm or CPU")


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


def check_shared() -> None:
    """Check what every platform's layers are handed.

    Raises:
        Mismatch: a field, a function or a signature is another.
    """
    context = importlib.import_module("vllm.forward_context")
    window = importlib.import_module("vllm.v1.attention.backends.mla.sparse_swa")
    main = importlib.import_module("vllm.models.deepseek_v4.sparse_mla")
    workspace = importlib.import_module("vllm.v1.worker.workspace")
    expect_parameters(context, "get_forward_context", ())
    expect_attributes(context.ForwardContext, ("attn_metadata",))
    expect_attributes(window.DeepseekSparseSWAMetadata, _WINDOW_FIELDS)
    expect_attributes(main.DeepseekV4FlashMLAMetadata, _MAIN_FIELDS)
    expect_parameters(workspace, "current_workspace_manager", ())
    expect_parameters(workspace.WorkspaceManager, "get_simultaneous", ("self", "*shapes_and_dtypes"))


def check_class(theirs: type) -> None:
    """Check what the subclass overrides.

    Raises:
        Mismatch: a signature is another.
    """
    expect_parameters(theirs, "forward_mqa", _FORWARD_MQA)
    expect_parameters(theirs, "bind_kv_cache", ("self", "kv_cache"))
    expect_parameters(theirs, "get_padded_num_q_heads", ("num_heads",))


def check_cuda_class(theirs: type) -> None:
    """Check what the subclass of the FlashMLA class overrides, and calls where a half of a batch is vLLM's.

    Raises:
        Mismatch: a signature is another.
    """
    check_class(theirs)
    expect_parameters(theirs, "_forward_decode", _FORWARD_DECODE)
    expect_parameters(theirs, "_forward_prefill", _FORWARD_PREFILL)


def check_layer(layer: Any) -> None:
    """Check a layer that was made.

    Raises:
        Mismatch: it lacks what the adapter reads, or its cache is of another layout.
    """
    expect_instance_attributes(layer, _LAYER_ATTRIBUTES)
    expect_instance_attributes(layer.swa_cache_layer, ("prefix", "kv_cache"))
    if layer.kv_cache_dtype != "fp8_ds_mla":
        raise Mismatch(f"the KV cache is {layer.kv_cache_dtype}, need fp8_ds_mla")
    if layer.compress_ratio not in (1, 4, 128):
        raise Mismatch(f"{layer.prefix} has compress ratio {layer.compress_ratio}, need 1, 4 or 128")


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
    from .attention import Attention

    return type(f"Dsv4x{theirs.__name__}", (Attention, theirs), {})
