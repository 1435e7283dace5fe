"""The entry point that servers call once a layer, and what it would do, explained."""

from __future__ import annotations

from typing import Any

import torch

from ..core import checks
from ..core.layouts import PagedCache
from ..core.model import VALUE_DIM, LayerKind
from ..core.platform import capturing
from ..dispatch import trace
from ..dispatch.registry import call_on
from ..ops.sparse_mla import check_cache, check_q, check_rest, check_workspace, scale_of
from .chunk import SparsePrefillChunkCache, chunk_of
from .direct import Direct
from .gathered import Gathered
from .metadata import AttentionMetadata
from .plan import Layer, Path, Step, StepExplanation, StepPlan, explain_paths, plan_step
from .referenced import Referenced

_PATHS: tuple[Path, ...] = (Direct(), Gathered(), Referenced())

PATHS = tuple(path.name for path in _PATHS)
"""The names of the paths."""


def paths_of(kind: LayerKind) -> tuple[str, ...]:
    """The names of the paths that layers of a kind have."""
    return tuple(path.name for path in _PATHS if path.has(kind))


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
    topk_slots: torch.Tensor | None = None,
    topk_lens: torch.Tensor | None = None,
    heads: int | None = None,
    workspace: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer over one step's batch; the entries of the step are in the caches already.

    Args:
        q: bf16 ``[T, H, 512]``, T = ``meta.num_tokens``, request after request.
        swa_cache: the layer's window cache, any layout of 512 values, of the page size and at least the pages ``meta``
            was built for.
        extra_cache: the layer's compressed cache; None for layers with a window alone.
        meta: the step's :class:`AttentionMetadata` for this layer's kind.
        topk_indices: int32 ``[T, any]``, index space *local* (compressed entries of the token's own request), -1
            anywhere for none; of layers whose indexer selects. An entry the token may not see yet, or that does not
            exist, is no entry. Never wider than the metadata's ``topk``, where that was given.
        attn_sink, softmax_scale, out: as in :func:`~dsv4x.sparse_mla_decode`.
        path: ``"direct"`` reads fp8 pages in place; ``"gathered"`` dequantizes the windows and every compressed entry
            of the requests into a bf16 workspace first; ``"referenced"`` (layers that select) the windows and the
            entries that top-k points at; None picks the fastest by prediction (:func:`~dsv4x.explain_step`).
        kernel: the attention kernel, as in :func:`~dsv4x.sparse_mla_decode`; None picks.
        chunk: the gathered path's plan, cap and workspace, rebuilt for ``meta``; None takes ``meta``'s own, with a cap
            of 256 MiB.
        swa_k_scale, extra_k_scale: as in :func:`~dsv4x.sparse_mla_decode`.
        return_lse: whether the lse is wanted; a server whose sink is in the kernel seldom needs it.
        topk_slots: int32 ``[T, any]``, the same selection in index space *slot* of ``extra_cache``, beside
            ``topk_indices`` or in their place; the caller vouches that a token may see them. Paths that read pages by
            slot take these.
        topk_lens: int32 ``[T]`` scan spans of the selection's rows, clamped to their width; where rows are packed to
            the front, ``meta.extra_lens`` says how far. Layers that are given one tensor find the same in it. None
            scans the whole width.
        heads: the leading heads of a padded q that count, as in :func:`~dsv4x.sparse_mla_decode`.
        workspace: what the direct path's partial outputs are kept in, as in :func:`~dsv4x.sparse_mla_decode`; the
            gathered rows' is the chunk's.

    Returns:
        ``(out, lse)``: bf16 ``[T, H, 512]`` and float32 ``[T, H]``, or None for lse under ``return_lse=False``. H is
        ``heads`` where that is given, but for an ``out`` of the caller's, which comes back as it is.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device, layout or page size; a ``chunk`` built
            for something else; lengths or tables that changed in place since ``meta`` was filled; a path that is
            gathered for, where its rows pass the cap; under ``DSV4X_CHECK=1`` also a local entry its token may not see,
            or a NaN in q, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    given = (
        q, swa_cache, extra_cache, topk_indices, topk_slots, topk_lens, attn_sink, softmax_scale, out, swa_k_scale,
        extra_k_scale, heads, return_lse, workspace,
    )  # fmt: skip
    plan, chunk = _plan_of(given, meta, chunk, path, kernel)
    if checks.check_values_enabled():
        _check_values(q, meta, topk_indices, topk_lens)
    heads = q.shape[1] if heads is None else heads
    # Kernels are compiled and remembered for floats, which ints equal.
    layer = Layer(
        q, swa_cache, extra_cache, topk_indices, topk_slots, topk_lens, attn_sink, scale_of(softmax_scale, VALUE_DIM),
        out, float(swa_k_scale), float(extra_k_scale), heads, return_lse, workspace,
    )  # fmt: skip
    if not meta.num_tokens:
        lse = torch.empty(0, heads, dtype=torch.float32, device=q.device) if return_lse else None
        return torch.empty(0, heads, VALUE_DIM, dtype=q.dtype, device=q.device) if out is None else out, lse
    return call_on(q.device, plan.path.run, plan, layer, meta, chunk)


def explain_step(
    q: torch.Tensor,
    swa_cache: PagedCache,
    extra_cache: PagedCache | None,
    meta: AttentionMetadata,
    topk_indices: torch.Tensor | None = None,
    kernel: str | None = None,
    chunk: SparsePrefillChunkCache | None = None,
    return_lse: bool = True,
    *,
    path: str | None = None,
    topk_slots: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    heads: int | None = None,
) -> StepExplanation:
    """The path :func:`~dsv4x.sparse_mla_attention` takes for these arguments, which are its own, and the times it
    predicts for each. Runs nothing.

    Raises:
        TypeError, ValueError: as :func:`~dsv4x.sparse_mla_attention`; also where ``kernel`` is no kernel's name.
    """
    layer = Layer(
        q, swa_cache, extra_cache, topk_indices, topk_slots, None, None, VALUE_DIM**-0.5, out, 1.0, 1.0,
        q.shape[1] if heads is None else heads, return_lse,
    )  # fmt: skip
    chunk = chunk_of(meta) if chunk is None else chunk
    return explain_paths(Step.of(layer, meta, chunk), _named(path), kernel)


def _named(path: str | None) -> tuple[Path, ...]:
    """The path of this name, or every one."""
    if not isinstance(path, (str, type(None))) or path not in (*PATHS, None):
        raise ValueError(f"path: got {path!r}, need one of {PATHS} or None")
    return tuple(option for option in _PATHS if path in (None, option.name))


def _plan_of(
    given: tuple[Any, ...],
    meta: AttentionMetadata,
    chunk: SparsePrefillChunkCache | None,
    path: str | None,
    kernel: str | None,
) -> tuple[StepPlan, SparsePrefillChunkCache]:
    """What was checked and decided for one layer holds for every other that looks the same: sixty a step do."""
    if not isinstance(meta, AttentionMetadata):
        raise TypeError(f"meta: got {type(meta).__name__}, need a dsv4x.AttentionMetadata")
    if chunk is None:
        meta.check_current()
        chunk = chunk_of(meta)
    elif isinstance(chunk, SparsePrefillChunkCache):
        chunk.check(meta)
    else:
        raise TypeError(f"chunk: got {type(chunk).__name__}, need a dsv4x.SparsePrefillChunkCache or None")
    key = (
        "plan", tuple(map(look, given)), look(path), look(kernel), chunk.limits, capturing(meta.seq_lens.device),
    )  # fmt: skip
    plan = meta.kept.get(key)
    if plan is None:
        layer = _checked(given, meta)
        step = Step.of(layer, meta, chunk)
        plan = meta.kept[key] = plan_step(step, _named(path), kernel)
        trace.logged(
            ("step", meta.kind, plan.path.name, plan.attend.name, key[-1]),
            f"attention of ratio {meta.compress_ratio}: {plan.path.name} path, {plan.attend.name} kernel"
            f"{' (captured)' if key[-1] else ''}",
        )
    elif meta.selects:
        rows = given[3] if given[3] is not None else given[4]
        chunk.reserve(rows.shape[1])
    return plan, chunk


def look(value: Any) -> Any:
    """All that the checks and the plan look at in an argument."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.device
    if isinstance(value, PagedCache):
        return value.spec, value.device
    return value if type(value) in _PLAIN else type(value)


_PLAIN = frozenset((bool, int, float, str))


def _checked(given: tuple[Any, ...], meta: AttentionMetadata) -> Layer:
    """The layer of these arguments, every one of which was looked at."""
    (
        q, swa_cache, extra_cache, topk_indices, topk_slots, topk_lens, attn_sink, softmax_scale, out, swa_k_scale,
        extra_k_scale, heads, return_lse, workspace,
    ) = given  # fmt: skip
    device, tokens = meta.seq_lens.device, meta.num_tokens
    checks.tensor("q", q, (tokens, None, VALUE_DIM), torch.bfloat16, device)
    counted = check_q(q, heads)
    swa_cache = _check_cache("swa_cache", swa_cache, device, meta.swa_page_size, meta.swa_pages)
    checks.k_scale("swa_k_scale", swa_k_scale, swa_cache)
    if meta.compressed:
        extra_cache = _check_cache("extra_cache", extra_cache, device, meta.extra_page_size, meta.extra_pages)
        checks.k_scale("extra_k_scale", extra_k_scale, extra_cache)
    elif extra_cache is not None:
        raise ValueError(f"extra_cache: given, need None for compress_ratio {meta.compress_ratio}")
    elif extra_k_scale != 1:
        raise ValueError(f"extra_k_scale: got {extra_k_scale}, need 1 without an extra_cache")
    rows = (("topk_indices", topk_indices), ("topk_slots", topk_slots))
    if meta.selects:
        if topk_indices is None and topk_slots is None:
            checks.tensor("topk_indices", None, (tokens, None), torch.int32, device)
        for name, value in rows:
            if value is not None:
                checks.tensor(name, value, (tokens, None), torch.int32, device)
                if meta.topk is not None and value.shape[1] > meta.topk:
                    raise ValueError(f"{name}: width is {value.shape[1]}, need <= {meta.topk}, the metadata's topk")
        if topk_indices is not None and topk_slots is not None and topk_indices.shape[1] != topk_slots.shape[1]:
            raise ValueError(f"topk_slots: width is {topk_slots.shape[1]}, need {topk_indices.shape[1]}")
    for name, value in (*rows, ("topk_lens", topk_lens)):
        if not meta.selects and value is not None:
            raise ValueError(f"{name}: given, need None for compress_ratio {meta.compress_ratio}")
    if topk_lens is not None:
        checks.tensor("topk_lens", topk_lens, (tokens,), torch.int32, device)
    check_rest(q, attn_sink, out, heads)
    check_workspace(workspace, device)
    scale = scale_of(softmax_scale, VALUE_DIM)
    return Layer(
        q, swa_cache, extra_cache, topk_indices, topk_slots, topk_lens, attn_sink, scale, out, swa_k_scale,
        extra_k_scale, counted, return_lse,
    )  # fmt: skip


def _check_values(
    q: torch.Tensor, meta: AttentionMetadata, topk_indices: torch.Tensor | None, topk_lens: torch.Tensor | None
) -> None:
    if topk_indices is not None:
        assert meta.visible is not None
        # What padding brings may be anything.
        owned, width = meta.position >= 0, topk_indices.shape[1]
        spans = torch.where(owned, width if topk_lens is None else topk_lens.clamp_max(width), 0)
        checks.index_values("topk_indices", topk_indices, spans, meta.visible, "local entry")
        if topk_lens is not None:
            checks.nothing_past_span("topk_indices", topk_indices, torch.where(owned, topk_lens, width))
    checks.finite_rows("q", q, [meta.position + 1])


def _check_cache(name: str, value: object, device: torch.device, page_size: int, pages: int) -> PagedCache:
    cache = check_cache(name, value, device, VALUE_DIM)
    if cache.page_size != page_size:
        raise ValueError(f"{name}: page_size is {cache.page_size}, need {page_size} as in the metadata")
    if cache.pages < pages:
        raise ValueError(f"{name}: {cache.pages} pages, need >= {pages} as in the metadata")
    return cache
