"""SGLang's DSv4 attention backend on ROCm: its one attention function, with dsv4x underneath. No AMD GPU was used.

The registry and the drafts build SGLang's class themselves, so a function of the class is replaced, which serves every
subclass. Nothing was measured on AMD, so it takes over only under ``DSV4X_SGLANG=all``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention import deepseek_v4_backend_hip_radix as hip
from sglang.srt.layers.attention import hip_flash_mla
from sglang.srt.layers.attention.dsv4 import unified_kv_gate

from ...common.core import layouts
from ...common.core.layouts import PagedCache
from ...common.core.model import WINDOW
from ...common.core.platform import capturing
from ...common.step.metadata import ASSUMED_LEN
from .. import activation
from ..slot_rows import Rows, SlotRows
from .server import SERVER

_RATIOS = (0, 4, 128)
_KEYWORDS = frozenset(("save_kv_cache", "attn_sink", "q_rope", "k_rope", "inv_rope", "wo_a_quant_freqs"))


def check() -> None:
    """Check every signature and field of SGLang's that this module uses.

    Raises:
        Mismatch: one is not as in 0.5.23.
    """
    parameters = (
        "self q k v layer forward_batch compress_ratio save_kv_cache attn_sink q_rope k_rope inv_rope "
        "wo_a_quant_freqs **_"
    )
    activation.expect_parameters(hip.DeepseekV4HipRadixBackend, "_forward_attention", parameters.split())
    activation.expect_parameters(
        hip.DeepseekV4HipRadixBackend, "_opus_prefill_applies", ("self", "q", "forward_batch", "compress_ratio")
    )
    activation.expect_parameters(hip_flash_mla, "_apply_inverse_rope", ("out", "inv_rope"))
    activation.expect_parameters(hip_flash_mla, "resolve_hip_flashmla_backend", ("backend",))
    activation.expect_parameters(unified_kv_gate, "is_unified_kv_triton", ())
    activation.expect_attributes(hip.DSV4AttnMetadata, ("swa_page_indices", "swa_topk_lengths", "c128_page_indices"))
    activation.expect_attributes(hip.DSV4AttnMetadata, ("sparse_page_indices", "sparse_topk_lengths"))
    activation.expect_attributes(hip.DSV4AttnMetadata, ("c128_topk_lengths_clamp1",))


def install() -> None:
    """Replace the class's attention function.

    Raises:
        Mismatch: SGLang is not what was checked.
    """
    check()
    if SERVER.switch != "all":
        raise activation.Mismatch(f"nothing was measured on AMD; {SERVER.variable}=all takes dsv4x all the same")
    theirs = hip.DeepseekV4HipRadixBackend._forward_attention
    hip.DeepseekV4HipRadixBackend._forward_attention = replacement(theirs)
    SERVER.live(f"attention on ROCm ({SERVER.variable}=all)")


def refusal(backend: Any, compress_ratio: int, keywords: dict[str, Any]) -> str:
    """Why a call is left to SGLang; empty where dsv4x runs it."""
    pool, metadata = backend.token_to_kv_pool, backend.forward_metadata
    core = getattr(metadata, "core_attn_metadata", None)
    refused = {
        "unified KV pools": unified_kv_gate.is_unified_kv_triton(),
        f"ratio {compress_ratio}": compress_ratio not in _RATIOS,
        "metadata of another kind": not isinstance(core, hip.DSV4AttnMetadata),
        "a request window": pool.request_window is not None,
        "unknown arguments": not keywords.keys() <= _KEYWORDS,
        "an output quantized in the kernel": keywords.get("wo_a_quant_freqs") is not None,
        "a reference kernel was asked for": hip_flash_mla.resolve_hip_flashmla_backend() in ("torch", "comparison"),
        "HiSparse": getattr(backend, "hisparse_coordinator", None) is not None,
    }
    return ", ".join(reason for reason, holds in refused.items() if holds)


def replacement(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A ``_forward_attention`` that falls back to SGLang's for what dsv4x does not run."""

    def _forward_attention(
        self: Any, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, compress_ratio: int, **kwargs: Any
    ) -> Any:
        mode = forward_batch.forward_mode
        if (
            mode.is_idle()
            or refusal(self, compress_ratio, kwargs)
            or self._opus_prefill_applies(q, forward_batch, compress_ratio)
        ):
            return theirs(self, q, k, v, layer, forward_batch, compress_ratio, **kwargs)
        if kwargs.get("save_kv_cache", True):
            self.store_cache(layer.layer_id, k, forward_batch)
        out = attend(self, q, layer, forward_batch, compress_ratio, kwargs.get("attn_sink"))
        inv_rope = kwargs.get("inv_rope")
        if inv_rope is not None:
            hip_flash_mla._apply_inverse_rope(out, inv_rope)
        return out

    return _forward_attention


def attend(
    backend: Any, q: torch.Tensor, layer: Any, forward_batch: Any, compress_ratio: int, attn_sink: Any
) -> torch.Tensor:
    """Attention of one layer by the slot rows of SGLang's metadata, of q's shape."""
    core, pool, layer_id = backend.forward_metadata.core_attn_metadata, backend.token_to_kv_pool, layer.layer_id
    count, extra, extra_cache = min(q.shape[0], core.swa_page_indices.shape[0]), None, None
    clamped = forward_batch.forward_mode.is_draft_extend_v2()
    swa_cache = _paged(pool.get_swa_key_buffer_radix(layer_id), pool.swa_page_size)
    entries = WINDOW
    if compress_ratio == 4:
        extra = Rows.first(count, core.sparse_page_indices(4), core.sparse_topk_lengths(4), clamped)
    elif compress_ratio == 128:
        extra = Rows.first(count, core.c128_page_indices, core.c128_topk_lengths_clamp1, clamped)
    if extra is not None:
        extra_cache = _paged(pool.get_extra_key_buffer(layer_id), pool.get_extra_key_page_size(layer_id))
        # Rows of ratio 128 are as wide as the longest context; a request is taken to have so many tokens.
        entries += min(extra.indices.shape[1], ASSUMED_LEN // compress_ratio)
    shared = SlotRows(
        Rows.first(count, core.swa_page_indices, core.swa_topk_lengths, clamped), extra, entries=entries,
        trusted=True, captured=capturing(q.device),
    )  # fmt: skip
    heads = min(layer.tp_q_head_num, q.shape[1])
    return shared.attend(q, (swa_cache, extra_cache), attn_sink, backend.softmax_scale, heads)


def _paged(buffer: torch.Tensor, page_size: int) -> PagedCache:
    layout = layouts.DSV4
    if buffer.dtype == torch.float8_e4m3fnuz:
        layout = layout.with_flavour("e4m3fnuz")
    return PagedCache(buffer.view(torch.uint8), layout, page_size)
