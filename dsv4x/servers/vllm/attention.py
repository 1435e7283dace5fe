"""DeepSeek-V4's ``forward_mqa`` on dsv4x, before each of vLLM's attention classes.

Decode rows are vLLM's own: persistent buffers that its builders refill before a graph's replay, so that nothing of the
host's lengths is needed. Prefill rows take dsv4x's step, built once a step from the lengths of the host, which vLLM
keeps exact for prefill alone. Whatever is not dsv4x's goes to vLLM's class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import (
    CacheSpec,
    ExtraPages,
    Local,
    PagedCache,
    SparsePrefillChunkCache,
    StepMetadata,
    combined_topk_width,
    layouts,
    local_to_slots,
    platform,
    scratch_bytes,
    sparse_mla_attention,
    sparse_mla_decode,
    warmup,
)
from ...common.core.errors import BackendUnavailable, KernelNotSupported
from ...common.core.platform import capturing
from ...common.dispatch.problem import AttentionProblem
from ...common.step.metadata import ASSUMED_LEN
from ..activation import Mismatch, explaining, reason_of
from ..measured import Table, Verdict
from .contract import check_layer, platform_of
from .server import SERVER

PREFILL_BYTES = 256 << 20
"""What gathered rows of a prefill chunk may take; vLLM's own grow with the longest context."""

_ROW_BYTES = 1024

_WARM: set[tuple[Any, ...]] = set()
_EXPLAINED: set[str] = set()
_LAYERS: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""The layers that live, by vLLM's names."""


class Batch(NamedTuple):
    """What a layer is handed in one step.

    Attributes:
        window, main: vLLM's metadata of the layer's window and of its compressed cache, or None for the latter.
        every: layer name -> metadata, of the whole model.
        swa, extra: the layer's caches.
    """

    window: Any
    main: Any
    every: dict[str, Any]
    swa: PagedCache
    extra: PagedCache | None


class Attention:
    """Before one of vLLM's attention classes: its attention, and no more of it."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        from vllm.platforms import current_platform

        super().__init__(*args, **keywords)
        layer: Any = self
        layer._dsv4x_caches = {}
        layer._dsv4x_platform = platform_of(current_platform)
        try:
            check_layer(layer)
        except Mismatch as mismatch:
            layer._dsv4x_out = str(mismatch)
            SERVER.stay_out(f"layer {layer.prefix}: {reason_of(mismatch)}")
            return
        layer._dsv4x_out = ""
        _LAYERS[layer.prefix] = layer
        layer._dsv4x_table = Table.of(Path(__file__).parent, _arch())
        _say(layer)

    @classmethod
    def get_padded_num_q_heads(cls, num_heads: int) -> int:
        """Heads as they are where every batch is dsv4x's; where vLLM may run one, its kernels need theirs."""
        theirs: int = super().get_padded_num_q_heads(num_heads)  # type: ignore[misc]
        return num_heads if SERVER.switch == "all" and _arch() == "sm_90" and num_heads in (8, 16, 32) else theirs

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        super().bind_kv_cache(kv_cache)  # type: ignore[misc]
        layer: Any = self
        if _takes_part(layer) and layer.swa_cache_layer.kv_cache.numel():
            _warm_up(layer)

    def forward_mqa(self, q: torch.Tensor, kv: Any, positions: torch.Tensor, output: torch.Tensor) -> None:
        from vllm.forward_context import get_forward_context

        layer: Any = self
        every = get_forward_context().attn_metadata
        if every is None:
            _theirs(layer, q, kv, positions, output)
            if _takes_part(layer):
                _reserve(layer, q)
            return
        if not _takes_part(layer) or _not_ours(layer, every):
            _theirs(layer, q, kv, positions, output)
            return
        batch = _batch_of(layer, every)
        window = batch.window
        decodes, prefills = window.num_decode_tokens, window.num_prefill_tokens
        ours = [_verdict(layer, piece, tokens).ours for piece, tokens in _halves(decodes, prefills)]
        if not all(ours) and (layer._dsv4x_platform != "cuda" or not any(ours)):
            _theirs(layer, q, kv, positions, output)
            return
        if not capturing(q.device):
            _warm_up(layer)
        for (piece, _), mine in zip(_halves(decodes, prefills), ours):
            rows = slice(0, decodes) if piece == "decode" else slice(decodes, decodes + prefills)
            if mine:
                run = _decode if piece == "decode" else _prefill
                run(layer, q[rows], positions[rows], batch, output[rows])
            else:
                _theirs_half(layer, piece, q, positions, batch, output)
        if layer._dsv4x_platform == "rocm" and layer._wo_a_fp8_weight is None:
            # vLLM's projection there takes rows that are rotated back.
            from vllm.v1.attention.ops.rocm_aiter_mla_sparse import rocm_inverse_rope_rows_

            heads = output[:, : layer.n_local_heads]
            rocm_inverse_rope_rows_(heads, positions, layer.rotary_emb.cos_sin_cache, layer.rope_head_dim)


def _arch() -> str:
    return "cpu" if platform.backend == "reference" else platform.arch


def _takes_part(layer: Any) -> bool:
    """Whether any batch of the layer may be dsv4x's; else nothing is compiled or reserved for it."""
    return not layer._dsv4x_out and (bool(layer._dsv4x_table.rows) or SERVER.switch == "all")


def _halves(decodes: int, prefills: int) -> list[tuple[str, int]]:
    """The pieces of a batch and their tokens."""
    return [(piece, tokens) for piece, tokens in (("decode", decodes), ("extend", prefills)) if tokens]


def _not_ours(layer: Any, every: Any) -> str:
    """Why a batch is vLLM's, or nothing."""
    if not isinstance(every, dict):
        return "micro-batches side by side"
    window = every[layer.swa_cache_layer.prefix]
    if window.prefill_left_visible is not None:
        return "image spans widen the windows"
    if getattr(layer.swa_cache_layer, "bounded_replay", False):
        return "windows are replayed"
    if getattr(window, "cache_slot_mapping", None) is not None:
        return "prefill is spread over ranks"
    if window.num_prefill_tokens and capturing(layer.attn_sink.device):
        return "prefill is being captured"
    return ""


def _verdict(layer: Any, piece: str, tokens: int) -> Verdict:
    """Who runs a piece of a batch of so many tokens; remembered, as it is asked for in every layer."""
    device = layer.attn_sink.device
    key = (piece, tokens, capturing(device))
    kept = layer.__dict__.setdefault("_dsv4x_verdicts", {})
    if key not in kept:
        if SERVER.switch == "all":
            kept[key] = Verdict(True, f"{SERVER.variable}=all")
        else:
            ratio = 0 if layer.compress_ratio == 1 else layer.compress_ratio
            kept[key] = layer._dsv4x_table.verdict(piece, {ratio: 1}, layer.n_local_heads, tokens, captured=key[2])
        if explaining():
            SERVER.say(f"{kept[key].why}: {'dsv4x' if kept[key].ours else 'vLLM'} runs it", logging.INFO)
    return kept[key]


def _say(layer: Any) -> None:
    """One line of what is live, and the table where it was asked for."""
    table: Table = layer._dsv4x_table
    if SERVER.switch == "all":
        what = "all that dsv4x can run, as DSV4X_VLLM=all asks"
    elif table.rows:
        what = f"the pieces that were measured ahead on {table.arch}"
    else:
        what = f"nothing was measured on {table.arch}, so vLLM's own attention runs; DSV4X_VLLM=all takes dsv4x's"
    SERVER.live(f"attention by {type(layer).__name__}, {what}; indexer, cache writers and projections are vLLM's")
    if explaining() and str(table) not in _EXPLAINED:
        _EXPLAINED.add(str(table))
        print(explain(table), file=sys.stderr, flush=True)


def explain(table: Table) -> str:
    """Who runs what, and why."""
    lines = ["dsv4x in vLLM"]
    who = "dsv4x (DSV4X_VLLM=all)" if SERVER.switch == "all" else "by the table below" if table.rows else "vLLM"
    for piece, runs, why in (
        ("attention of decode and verify rows", who, "vLLM's own rows, read in place"),
        ("attention of prefill rows", who, "dsv4x's step; its gather with it"),
        ("indexer and top-k", "vLLM", "not measured against dsv4x's in vLLM"),
        ("cache writers, inverse RoPE, projections", "vLLM", "not replaced"),
        ("image spans, micro-batches, replayed windows, captured prefill", "vLLM", "not supported by the adapter"),
    ):
        lines.append(f"  {piece}: {runs}, {why}")
    return "\n".join([*lines, str(table)])


def _theirs(layer: Any, q: torch.Tensor, kv: Any, positions: torch.Tensor, output: torch.Tensor) -> None:
    """vLLM's attention of the whole batch, with the heads its kernels need."""
    padded = super(Attention, layer).get_padded_num_q_heads(layer.n_local_heads)
    if q.shape[1] == padded:
        super(Attention, layer).forward_mqa(q, kv, positions, output)
        return
    more = (0, 0, 0, padded - q.shape[1])
    wide = torch.nn.functional.pad(output, more)
    # An instance's own attribute goes before the module's parameter, for as long as it is there.
    layer.__dict__["attn_sink"] = torch.nn.functional.pad(layer.attn_sink, (0, more[3]), value=-torch.inf)
    try:
        super(Attention, layer).forward_mqa(torch.nn.functional.pad(q, more), kv, positions, wide)
    finally:
        del layer.__dict__["attn_sink"]
    output.copy_(wide[:, : output.shape[1]])


def _theirs_half(
    layer: Any, piece: str, q: torch.Tensor, positions: torch.Tensor, batch: Batch, output: torch.Tensor
) -> None:
    """vLLM's attention of the decode or the prefill rows alone, on CUDA."""
    decodes, swa_only = batch.window.num_decode_tokens, layer.compress_ratio <= 1
    own = None if swa_only else layer.kv_cache
    if piece == "decode":
        layer._forward_decode(
            q=q[:decodes], kv_cache=own, swa_metadata=batch.window, attn_metadata=batch.main, swa_only=swa_only,
            output=output[:decodes],
        )  # fmt: skip
        return
    layer._forward_prefill(
        q=q[decodes:], positions=positions[decodes:], compressed_k_cache=own,
        swa_k_cache=layer.swa_cache_layer.kv_cache, output=output[decodes:], attn_metadata=batch.main,
        swa_metadata=batch.window,
    )  # fmt: skip


def _batch_of(layer: Any, every: dict[str, Any]) -> Batch:
    window = every[layer.swa_cache_layer.prefix]
    main = every[layer.prefix] if layer.compress_ratio > 1 else None
    return Batch(window, main, every, *_caches(layer))


def _caches(layer: Any) -> tuple[PagedCache, PagedCache | None]:
    """The layer's caches; vLLM binds them for profiling, for serving, and again after sleep."""
    swa = _paged(layer, "swa", layer.swa_cache_layer.kv_cache)
    return swa, None if layer.compress_ratio <= 1 else _paged(layer, "extra", layer.kv_cache)


def _paged(layer: Any, name: str, data: torch.Tensor) -> PagedCache:
    kept = layer._dsv4x_caches.get(name)
    if kept is None or kept.data is not data:
        layout = layouts.DSV4
        if name == "swa" and layer._dsv4x_platform == "rocm":
            from vllm.platforms import current_platform

            # Of gfx942 vLLM's C++ writer stores the window in e4m3fnuz and its Triton writer the rest in OCP's e4m3.
            layout = layout.with_flavour("e4m3fnuz") if current_platform.is_fp8_fnuz() else layout
        kept = layer._dsv4x_caches[name] = PagedCache(data, layout, data.shape[1])
    return kept


def _kept(window: Any, name: Any, make: Any) -> Any:
    """What a step's layers share. vLLM drops this dict where it rewrites a step's lengths on the device."""
    kept = window.flashinfer_sparse_index_cache
    key = f"dsv4x {name}"
    if key not in kept:
        kept[key] = make()
    return kept[key]


def _decode(layer: Any, q: torch.Tensor, positions: torch.Tensor, batch: Batch, out: torch.Tensor) -> None:
    """Decode and verify rows: each is a query of its own, over the rows that vLLM's builders keep."""
    window, main, extra, ratio = batch.window, batch.main, batch.extra, layer.compress_ratio
    tokens, heads, captured = len(q), layer.n_local_heads, capturing(q.device)
    rows = lens = local = None
    entries = layer.window_size

    def visible(each: int) -> torch.Tensor:
        return torch.where(window.is_valid_token[:tokens], (positions + 1) // each, 0).int()

    if ratio == 4:
        assert extra is not None
        seen = _kept(window, ("visible", captured), lambda: visible(4))
        # Not how many vLLM's kernel finds: where a row has holes, its last entries stand past that.
        lens = _kept(window, ("lens", captured), lambda: seen.clamp_max(main.topk_tokens))
        rows = layer.topk_indices_buffer[:tokens]
        local = Local(window.token_to_req_indices[:tokens], seen, main.block_table, extra.pages)
        entries += rows.shape[1]
    elif ratio == 128:
        assert extra is not None
        width = layer.max_model_len // 128
        if main.c128a_global_decode_topk_indices is not None:
            rows, lens = main.c128a_global_decode_topk_indices.view(tokens, -1), main.c128a_decode_topk_lens
        else:  # vLLM's builder for CPUs makes none
            lens = _kept(window, ("lens of 128", captured), lambda: visible(128))
            every = torch.arange(max(width, 1), dtype=torch.int32, device=q.device).expand(tokens, -1)
            request, table = window.token_to_req_indices[:tokens], main.block_table
            rows = local_to_slots(every, request, lens, table, extra.page_size, extra.pages)
        entries += min(width, ASSUMED_LEN // 128)
    schedule = _kept(window, ("schedule", ratio, captured), lambda: {"captured": captured})
    sparse_mla_decode(
        q, batch.swa, window.decode_swa_indices.view(tokens, -1), window.decode_swa_lens, extra, rows, lens,
        layer.attn_sink, layer.scale, out, trusted_indices=local is None, schedule=schedule, return_lse=False,
        heads=heads, local=local, entries=entries,
    )  # fmt: skip


def _prefill(layer: Any, q: torch.Tensor, positions: torch.Tensor, batch: Batch, out: torch.Tensor) -> None:
    """Prefill rows, by the step of all layer kinds that share this window's metadata."""
    window, ratio = batch.window, layer.compress_ratio
    step = _kept(window, "step", lambda: _step(layer, batch, len(q)))
    first = window.num_decode_tokens
    topk = layer.topk_indices_buffer[first : first + len(q)] if ratio == 4 else None
    chunk = _kept(window, ("chunk", ratio), lambda: _chunk(layer, step[ratio], q.device))
    sparse_mla_attention(
        q, batch.swa, batch.extra, step[ratio], topk, layer.attn_sink, layer.scale, out, chunk=chunk,
        return_lse=False, heads=layer.n_local_heads,
    )  # fmt: skip


def _step(layer: Any, batch: Batch, tokens: int) -> StepMetadata:
    window, first = batch.window, batch.window.num_decodes
    extra = {}
    for sibling in (layer, *_LAYERS.values()):
        ratio = sibling.compress_ratio
        if ratio in extra or ratio == 1 or batch.every.get(sibling.swa_cache_layer.prefix) is not window:
            continue
        main, cache = batch.every[sibling.prefix], _caches(sibling)[1]
        assert cache is not None
        topk = main.topk_tokens if ratio == 4 else None
        extra[ratio] = ExtraPages(main.block_table[first:], cache.page_size, cache.pages, topk=topk)
    starts = window.query_start_loc_cpu[first:]
    return StepMetadata.build(
        window.query_start_loc[first:] - window.num_decode_tokens, window.prefill_seq_lens, window.block_table[first:],
        extra, swa_page_size=batch.swa.page_size, swa_pages=batch.swa.pages, window_size=layer.window_size,
        num_tokens=tokens, query_start_loc_cpu=starts - starts[0], seq_lens_cpu=window.prefill_seq_lens_cpu,
        swa_indices=window.prefill_swa_indices.view(tokens, -1), swa_lens=window.prefill_swa_lens,
    )  # fmt: skip


def _chunk(layer: Any, meta: Any, device: torch.device) -> SparsePrefillChunkCache:
    from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

    rows = None
    if is_workspace_manager_initialized():
        (rows,) = current_workspace_manager().get_simultaneous(((_gathered_rows(layer), 512), torch.bfloat16))
    return SparsePrefillChunkCache(PREFILL_BYTES, rows).rebuild(meta)


def _gathered_rows(layer: Any) -> int:
    """Rows kept for a chunk: the cap's, or what four of the longest requests have, which vLLM keeps."""
    longest = layer.max_model_len // 4 + layer.window_size + layer.max_num_batched_tokens
    return min(PREFILL_BYTES // _ROW_BYTES, 4 * longest)


def _reserve(layer: Any, q: torch.Tensor) -> None:
    """In vLLM's profile run: the rows of a chunk, and for a moment as much as any attention call allocates."""
    from vllm.v1.worker.workspace import current_workspace_manager

    current_workspace_manager().get_simultaneous(((_gathered_rows(layer), 512), torch.bfloat16))
    torch.empty(most_scratch(layer, q.device), dtype=torch.uint8, device=q.device)


def most_scratch(layer: Any, device: torch.device) -> int:
    """Bytes that one of the layer's attention calls allocates at most, beside its result."""
    width = {1: 0, 4: layer.topk_indices_buffer.shape[-1], 128: layer.max_model_len // 128}[layer.compress_ratio]
    cache = CacheSpec(layouts.DSV4.name, 64, 1 << 16, layouts.DSV4.page_stride(64))
    most, tokens = 0, 1
    while tokens < 2 * layer.max_num_batched_tokens:
        shared: dict[str, Any] = {
            "tokens": min(tokens, layer.max_num_batched_tokens), "heads": layer.n_local_heads, "lse": False,
        }  # fmt: skip
        decode = AttentionProblem.on(
            "sparse_mla_decode", device, width=layer.window_size, extra_width=width,
            caches=(cache,) * (1 + bool(width)), **shared,
        )  # fmt: skip
        prefill = AttentionProblem.on(
            "sparse_mla_prefill", device, width=combined_topk_width(width, layer.window_size),
            rows=_gathered_rows(layer), **shared,
        )  # fmt: skip
        for problem in (decode, prefill):
            for mode in (False, True):
                with contextlib.suppress(KernelNotSupported, BackendUnavailable):
                    most = max(most, scratch_bytes(dataclasses.replace(problem, capturing=mode)))
        tokens *= 2
    return most


def _warm_up(layer: Any) -> None:
    """Compile what steps over these caches launch, once for caches that look the same."""
    swa, extra = _caches(layer)
    key = (swa.spec, None if extra is None else extra.spec, layer.compress_ratio, layer.n_local_heads, swa.device)
    if key in _WARM or swa.device.type != "cuda":
        return
    _WARM.add(key)
    count = warmup(
        swa, extra, heads=layer.n_local_heads, topk=layer.topk_indices_buffer.shape[-1],
        window_size=layer.window_size, compress_ratios=(layer.compress_ratio,),
    )  # fmt: skip
    SERVER.say(f"dsv4x compiled or loaded {count} kernels for layers of ratio {layer.compress_ratio}", logging.INFO)
