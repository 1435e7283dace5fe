"""What the adapter uses of vLLM, asserted.

Read in the wheels of vLLM 0.30.0 to 0.33.0. ``nvidia/flashmla.py`` is the same in all four, byte by byte.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..activation import Mismatch, expect_attributes, expect_instance_attributes, expect_parameters

_WINDOW_FIELDS = (
    "block_table", "query_start_loc", "query_start_loc_cpu", "is_valid_token", "token_to_req_indices",
    "decode_swa_indices", "decode_swa_lens", "prefill_swa_indices", "prefill_swa_lens", "prefill_left_visible",
    "num_decodes", "num_decode_tokens", "num_prefill_tokens", "prefill_seq_lens", "prefill_seq_lens_cpu",
    "flashinfer_sparse_index_cache",
)  # fmt: skip
_MAIN_FIELDS = (
    "block_table", "topk_tokens", "c128a_global_decode_topk_indices", "c128a_decode_topk_lens",
)  # fmt: skip
_LAYER_ATTRIBUTES = (
    "prefix", "compress_ratio", "n_local_heads", "window_size", "scale", "attn_sink", "max_num_batched_tokens",
    "max_model_len", "kv_cache_dtype", "swa_cache_layer", "kv_cache", "topk_indices_buffer",
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
    for name in ("cuda", "rocm", "cpu"):
        if getattr(current, f"is_{name}")():
            return name
    raise Mismatch(f"vLLM's platform is {type(current).__name__}, need CUDA, ROCm or CPU")


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
