"""Metadata built once a step, and the attention entry point servers call once a layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..core import checks
from ..core.layouts import PagedCache
from ..dispatch.problem import CacheProblem, IndexProblem
from ..dispatch.registry import Kernel, call_on, select
from ..ops import indices
from ..ops.compaction import gather_referenced_rows
from ..ops.sparse_mla import attend, check_cache, check_heads, check_rest, scale_of
from .chunk import SparsePrefillChunkCache, chunk_of
from .metadata import AttentionMetadata
from .routes import PATHS, choose_step, path_problems, step_kernel

HEAD_DIM = 512
"""DeepSeek-V4's values of K, all of which are V."""


def sparse_mla_attention(
    q: torch.Tensor,
    swa_cache: PagedCache,
    extra_cache: PagedCache | None,
    meta: AttentionMetadata,
    topk_indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    out: torch.Tensor | None = None,
    *,
    path: str | None = None,
    kernel: str | None = None,
    chunk: SparsePrefillChunkCache | None = None,
    swa_k_scale: float = 1.0,
    extra_k_scale: float = 1.0,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer over one step's batch; the entries of the step are in the caches already.

    Args:
        q: bf16 ``[T, H, 512]``, T = ``meta.num_tokens``, request after request.
        swa_cache: the layer's window cache, any layout of 512 values, of the page size and at least the pages ``meta``
            was built for.
        extra_cache: the layer's compressed cache; None for compress_ratio 1.
        meta: the step's :class:`AttentionMetadata` for this layer's compress ratio.
        topk_indices: int32 ``[T, any]``, index space *local* (compressed entries of the token's own request), -1 for
            none; only for compress_ratio 4. An entry the token may not see yet, or that does not exist, is no entry.
        attn_sink, softmax_scale, out: as in :func:`~dsv4x.sparse_mla_decode`.
        path: ``"direct"`` reads fp8 pages in place; ``"gathered"`` dequantizes the windows and every compressed entry
            of the requests into a bf16 workspace first; ``"referenced"`` (compress_ratio 4) the windows and the entries
            that top-k points at; None picks the fastest by prediction (:func:`~dsv4x.explain_step`).
        kernel: the attention kernel, as in :func:`~dsv4x.sparse_mla_decode`; None picks.
        chunk: the gathered path's plan, cap and workspace, rebuilt for ``meta``; None takes ``meta``'s own, with a cap
            of 256 MiB.
        swa_k_scale, extra_k_scale: as in :func:`~dsv4x.sparse_mla_decode`.
        return_lse: whether the lse is wanted; a server whose sink is in the kernel seldom needs it.

    Returns:
        ``(out, lse)``: bf16 ``[T, H, 512]`` and float32 ``[T, H]``, or None for lse under ``return_lse=False``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device, layout or page size; a ``chunk`` built
            for something else; a path that is gathered for, where its rows pass the cap; under ``DSV4X_CHECK=1`` also a
            local entry its token may not see, or a NaN in q, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    if chunk is None:
        chunk = chunk_of(meta)
    chunk.check(meta)
    # Sixty layers a step look the same; what was checked and decided for one holds for every other.
    key: tuple[Any, ...] | None
    try:
        key = (
            q.dtype, q.shape, q.stride(), q.device, q.is_cuda and torch.cuda.is_current_stream_capturing(),
            swa_cache.spec, swa_cache.device, None if extra_cache is None else (extra_cache.spec, extra_cache.device),
            _look(topk_indices), _look(attn_sink), _look(out),
            softmax_scale, swa_k_scale, extra_k_scale, path, kernel, return_lse,
        )  # fmt: skip
        plan = chunk.plans.get(key)
    except (AttributeError, TypeError):
        # Something is no tensor, no cache or no number: the checks will say what.
        key = plan = None
    if plan is None:
        _check_arguments(q, swa_cache, extra_cache, meta, topk_indices, swa_k_scale, extra_k_scale)
        check_rest(q, attn_sink, out)
        scale_of(softmax_scale, HEAD_DIM)
        _check_path(path, meta, topk_indices, chunk)
        plan = _plan(q, swa_cache, extra_cache, meta, topk_indices, path, kernel, chunk, return_lse)
        if key is not None:
            chunk.plans[key] = plan
    if checks.check_values_enabled():
        if topk_indices is not None:
            spans = meta.visible.clamp_max(min(meta.topk, topk_indices.shape[1]))
            checks.index_values("topk_indices", topk_indices, spans, meta.visible, "local entry")
        checks.finite_rows("q", q, [meta.swa_lens])
    if not meta.num_tokens:
        return _Results(q, out, 0, return_lse).all()
    scale = scale_of(softmax_scale, HEAD_DIM)
    # Kernels are compiled and remembered for floats, which ints equal.
    k_scales = float(swa_k_scale), 1.0 if extra_cache is None else float(extra_k_scale)
    layer = _Layer(q, swa_cache, extra_cache, topk_indices, attn_sink, scale, *k_scales, return_lse)
    return call_on(q.device, _RUN[plan.path], plan, layer, meta, chunk, out)


def _look(value: torch.Tensor | None) -> tuple[Any, ...] | None:
    """All that the checks look at in a tensor."""
    return None if value is None else (value.dtype, value.shape, value.stride(), value.device)


def _check_arguments(
    q: torch.Tensor,
    swa_cache: PagedCache,
    extra_cache: PagedCache | None,
    meta: AttentionMetadata,
    topk_indices: torch.Tensor | None,
    swa_k_scale: float,
    extra_k_scale: float,
) -> None:
    checks.tensor("q", q, (meta.num_tokens, None, HEAD_DIM), torch.bfloat16, meta.seq_lens.device)
    check_heads(q)
    swa_cache = _check_cache("swa_cache", swa_cache, q.device, meta.swa_page_size, meta.swa_pages)
    checks.k_scale("swa_k_scale", swa_k_scale, swa_cache)
    if meta.compress_ratio == 1:
        if extra_cache is not None:
            raise ValueError("extra_cache: given, need None for compress_ratio 1")
    else:
        extra_cache = _check_cache("extra_cache", extra_cache, q.device, meta.extra_page_size, meta.extra_pages)
        checks.k_scale("extra_k_scale", extra_k_scale, extra_cache)
    if meta.compress_ratio == 4:
        checks.tensor("topk_indices", topk_indices, (meta.num_tokens, None), torch.int32, q.device)
    elif topk_indices is not None:
        raise ValueError(f"topk_indices: given, need None for compress_ratio {meta.compress_ratio}")


def _check_path(
    path: str | None, meta: AttentionMetadata, topk_indices: torch.Tensor | None, chunk: SparsePrefillChunkCache
) -> None:
    if path not in (*PATHS, None):
        raise ValueError(f"path: got {path!r}, need one of {PATHS} or None")
    if path == "gathered" and not chunk.fits:
        raise ValueError(f"path: gathered, but a request's rows alone pass the cap of {chunk.max_bytes} bytes")
    if path == "referenced":
        if topk_indices is None:
            raise ValueError(f"path: referenced, need compress_ratio 4, not {meta.compress_ratio}")
        if not chunk.referenced_block(topk_indices.shape[1]):
            raise ValueError(
                f"path: referenced, but the windows and one token's rows pass the cap of {chunk.max_bytes} bytes"
            )


class _Layer(NamedTuple):
    """What one layer brings to a step."""

    q: torch.Tensor
    swa_cache: PagedCache
    extra_cache: PagedCache | None
    topk_indices: torch.Tensor | None
    attn_sink: torch.Tensor | None
    scale: float
    swa_k_scale: float
    extra_k_scale: float
    return_lse: bool


class _Plan(NamedTuple):
    """What was decided for layers of one shape: the path, and the kernels of its attention, index and gather ops."""

    path: str
    attend: Kernel
    remap: Kernel
    gather: Kernel
    gather_and_combine: Kernel


def _plan(
    q: torch.Tensor,
    swa_cache: PagedCache,
    extra_cache: PagedCache | None,
    meta: AttentionMetadata,
    topk_indices: torch.Tensor | None,
    path: str | None,
    kernel: str | None,
    chunk: SparsePrefillChunkCache,
    return_lse: bool,
) -> _Plan:
    if path is None:
        path, kernel = choose_step(q, swa_cache, extra_cache, meta, topk_indices, kernel, chunk, return_lse)
    problems = path_problems(q, swa_cache, extra_cache, meta, topk_indices, chunk, return_lse)
    problem = problems[path]
    attend, _ = step_kernel(path, problem, meta, topk_indices, kernel)
    index_op = "combine_topk_swa_indices" if path == "gathered" else "local_to_slots"
    index = IndexProblem.on(index_op, q.device, tokens=problem.tokens, width=problem.width)
    gathering = [
        CacheProblem.on(op, q.device, tokens=problem.rows, caches=problems["direct"].caches)
        for op in ("gather_workspace", "gather_and_combine")
    ]
    return _Plan(path, attend, select(index), *map(select, gathering))


def _direct(
    plan: _Plan, layer: _Layer, meta: AttentionMetadata, chunk: SparsePrefillChunkCache, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    blocks = meta.direct_blocks
    results = _Results(layer.q, out, len(blocks), layer.return_lse)
    for block in blocks:
        q, topk_indices, extra_indices = layer.q, layer.topk_indices, meta.extra_indices
        swa_indices, swa_lens, extra_lens = meta.swa_indices, meta.swa_lens, meta.extra_lens
        if len(blocks) > 1:
            # Only C128 is cut, whose slot rows are then made a block at a time.
            assert extra_lens is not None
            q, swa_indices, swa_lens, extra_lens = q[block], swa_indices[block], swa_lens[block], extra_lens[block]
        options: dict[str, Any] = {}
        if topk_indices is not None and plan.attend.remaps:
            extra_indices = topk_indices
            options["local"] = (meta.request, meta.visible, meta.extra_block_table, meta.extra_pages)
        elif topk_indices is not None:
            width = topk_indices.shape[1]
            extra_indices = torch.empty(topk_indices.shape, dtype=torch.int32, device=q.device)
            plan.remap.run(
                topk_indices, meta.request, meta.visible, meta.extra_block_table,
                meta.extra_page_size, meta.extra_pages, extra_indices,
            )  # fmt: skip
            if width < meta.topk:
                assert extra_lens is not None
                extra_lens = extra_lens.clamp_max(width)
        elif extra_lens is not None and extra_indices is None:
            extra_indices = meta.slot_rows(block)
        results.add(block, *attend(
            plan.attend, q, layer.swa_cache, swa_indices, swa_lens, layer.extra_cache, extra_indices, extra_lens,
            layer.attn_sink, layer.scale, results.buffer(block),
            trusted_indices=True, schedule=meta.kept.setdefault(block.start, {"captured": meta.captured}),
            swa_k_scale=layer.swa_k_scale, extra_k_scale=layer.extra_k_scale, return_lse=layer.return_lse, **options,
        ))  # fmt: skip
    return results.all()


def _gathered(
    plan: _Plan, layer: _Layer, meta: AttentionMetadata, chunk: SparsePrefillChunkCache, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    results = _Results(layer.q, out, sum(len(group.blocks) for group in chunk.groups), layer.return_lse)
    for group in chunk.groups:
        # Not filled: rows without a slot stay unwritten, and no index points at them.
        workspace = chunk.workspace(group.rows)
        gather = (
            layer.extra_cache, layer.swa_cache, group.slots, group.compressed_rows, workspace,
            layer.extra_k_scale, layer.swa_k_scale,
        )  # fmt: skip
        together = layer.topk_indices is not None and group.rows > 0
        if group.rows and not together:
            plan.gather.run(*gather)
        for block in group.blocks:
            if together:
                combine = chunk.combining(group, block, layer.topk_indices)
                plan.gather_and_combine.run(gather, combine)
                rows, lens = combine[-2:]
                together = False
            else:
                rows, lens = chunk.index_rows(group, block, layer.topk_indices, plan.remap)
            q = layer.q if results.whole else layer.q[block]
            results.add(block, *attend(
                plan.attend, q, workspace, rows, lens, layer.attn_sink, layer.scale, results.buffer(block),
                trusted_indices=True, return_lse=layer.return_lse,
            ))  # fmt: skip
    return results.all()


def _referenced(
    plan: _Plan, layer: _Layer, meta: AttentionMetadata, chunk: SparsePrefillChunkCache, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    topk_indices, extra_lens = layer.topk_indices, meta.extra_lens
    assert topk_indices is not None
    assert extra_lens is not None
    assert layer.extra_cache is not None
    width = topk_indices.shape[1]
    window, blocks = chunk.window, chunk.referenced_blocks(width)
    if width < meta.topk:
        extra_lens = extra_lens.clamp_max(width)
    results = _Results(layer.q, out, len(blocks), layer.return_lse)
    capacity = chunk.referenced_rows(width)
    workspace = chunk.workspace(capacity + window.rows)
    if window.rows:
        plan.gather.run(None, layer.swa_cache, window.slots, 0, workspace[capacity:], 1.0, layer.swa_k_scale)
    for block in blocks:
        slots = torch.empty(topk_indices[block].shape, dtype=torch.int32, device=layer.q.device)
        plan.remap.run(
            topk_indices[block], meta.request[block], meta.visible[block], meta.extra_block_table,
            meta.extra_page_size, meta.extra_pages, slots,
        )  # fmt: skip
        compacted = gather_referenced_rows(
            layer.extra_cache, slots, extra_lens[block], out=workspace[:capacity], k_scale=layer.extra_k_scale
        )
        # The compressed half first, as on the gathered path, so that both give the same bits.
        rows, lens = indices.combine_swa_extra_indices(
            compacted.indices, extra_lens[block], window.indices[block], window.lens[block], capacity
        )
        results.add(block, *attend(
            plan.attend, layer.q[block], workspace, rows, lens, layer.attn_sink, layer.scale, results.buffer(block),
            trusted_indices=True, return_lse=layer.return_lse,
        ))  # fmt: skip
    return results.all()


_RUN = {"direct": _direct, "gathered": _gathered, "referenced": _referenced}


class _Results:
    """Output of a call made in ``parts``: one part's as it is, several (or none) in one buffer."""

    def __init__(self, q: torch.Tensor, out: torch.Tensor | None, parts: int, return_lse: bool):
        self.out, self.whole = out, parts == 1
        self.lse: torch.Tensor | None = None
        if not self.whole:
            self.out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
            if return_lse:
                self.lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)

    def buffer(self, block: slice) -> torch.Tensor | None:
        return self.out if self.whole or self.out is None else self.out[block]

    def add(self, block: slice, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        if self.whole:
            self.out, self.lse = out, lse
        elif lse is not None:
            assert self.lse is not None
            self.lse[block] = lse

    def all(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self.out is not None
        return self.out, self.lse


def _check_cache(name: str, value: object, device: torch.device, page_size: int, pages: int) -> PagedCache:
    cache = check_cache(name, value, device, HEAD_DIM)
    if cache.page_size != page_size:
        raise ValueError(f"{name}: page_size is {cache.page_size}, need {page_size} as in the metadata")
    if cache.pages < pages:
        raise ValueError(f"{name}: {cache.pages} pages, need >= {pages} as in the metadata")
    return cache
