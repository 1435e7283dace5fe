"""Metadata built once a step, and the attention entry point servers call once a layer."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from . import checks, indices, reference
from .compaction import gather_referenced_rows
from .layouts import PagedCache
from .prefill_chunk import SparsePrefillChunkCache
from .registry import Kernel, Problem, call_on, select
from .routing import PATHS, choose_step, path_problems, step_kernel
from .sparse_mla import attend, check_cache, check_heads, check_rest, scale_of

HEAD_DIM = 512
"""DeepSeek-V4's values of K, all of which are V."""

COMPRESS_RATIOS = (1, 4, 128)

MAX_SLOT_ROW_BYTES = 32 << 20
"""C128's slot rows are kept for the step up to this size, and made for a block of tokens at a time above it."""

_SLOT_ROW_ALIGNMENT = 64
"""Width of the C128 slot rows: what every decode kernel takes as it is."""


@dataclass(eq=False)
class AttentionMetadata:
    """What one step's layers of one compress ratio share. Make it with :meth:`build`.

    It owns what it builds and is valid for one step: once a block table or a length changes, build another. Layers of
    one kind share it freely on one stream; the tensors given to :meth:`build` must stay as they are until then.

    Attributes:
        compress_ratio: 1 (window only), 4 (C4, indexer top-k) or 128 (C128, every compressed entry).
        window_size, topk: raw tokens a query sees; compressed entries a C4 query reads at most.
        num_tokens: T, query tokens, padding included.
        query_start_loc, seq_lens: int32 ``[R+1]``, ``[R]``.
        swa_block_table, extra_block_table: int32 ``[R, m]``.
        swa_page_size, swa_pages, extra_page_size, extra_pages: of the caches the layers will bring.
        request, position: int32 ``[T]``, each token's request and position, -1 for padding.
        visible: int32 ``[T]``, compressed entries a token may see.
        swa_indices, swa_lens: int32 ``[T, window_size]`` slots and ``[T]`` spans.
        extra_indices: int32 ``[T, any]`` slots of every visible entry (C128 only, and only up to 32 MiB of them).
        extra_lens: int32 ``[T]`` spans of the extra rows, or None for window-only layers.
        host_starts, host_query_lens, host_seq_lens: the lengths again, on the host.
    """

    compress_ratio: int
    window_size: int
    topk: int
    num_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    swa_block_table: torch.Tensor
    extra_block_table: torch.Tensor | None
    swa_page_size: int
    swa_pages: int
    extra_page_size: int
    extra_pages: int
    request: torch.Tensor
    position: torch.Tensor
    visible: torch.Tensor
    swa_indices: torch.Tensor
    swa_lens: torch.Tensor
    extra_indices: torch.Tensor | None
    extra_lens: torch.Tensor | None
    host_starts: list[int]
    host_query_lens: list[int]
    host_seq_lens: list[int]
    _captured: bool = False
    _schedule: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        swa_block_table: torch.Tensor,
        extra_block_table: torch.Tensor | None = None,
        *,
        compress_ratio: int,
        swa_page_size: int,
        swa_pages: int,
        extra_page_size: int | None = None,
        extra_pages: int | None = None,
        topk: int = 512,
        window_size: int = 128,
        num_tokens: int | None = None,
        query_start_loc_cpu: torch.Tensor | None = None,
        seq_lens_cpu: torch.Tensor | None = None,
    ) -> AttentionMetadata:
        """Build the metadata of one step and one layer kind.

        A batch may mix prefill chunks with or without a prefix, single-token decode, several-token verify and requests
        without queries; request i's queries are the last ``query_start_loc[i+1] - query_start_loc[i]`` of its
        ``seq_lens[i]`` tokens.

        Args:
            query_start_loc: int32 ``[R+1]``, from 0, not decreasing.
            seq_lens: int32 ``[R]``, raw tokens of each request, its queries included.
            swa_block_table: int32 ``[R, m]``, page numbers of the window's cache; what stands past a request's last
                page is never used and may be garbage, and so may pages wholly before every query's window.
            extra_block_table: int32 ``[R, m']``, the same for the compressed cache; None for compress_ratio 1.
            compress_ratio: 1, 4 or 128.
            swa_page_size, swa_pages, extra_page_size, extra_pages: entries a page and pages of the caches the layers
                will bring; page numbers outside the pool are no entries.
            topk: compressed entries a C4 query reads at most (512 or 1024).
            window_size: raw tokens a query sees, its own included.
            num_tokens: T when q is padded past ``query_start_loc[-1]``; padding gets out = 0, lse = +inf.
            query_start_loc_cpu, seq_lens_cpu: host copies. Without them the lengths are copied from the device, which
                waits for it once.

        Raises:
            TypeError, ValueError: an argument's type, dtype, shape, device or value; under ``DSV4X_CHECK=1`` also a
                page a query needs that is outside the pool, with the query's token.
        """
        checks.tensor("seq_lens", seq_lens, (None,), torch.int32)
        requests, device = seq_lens.shape[0], seq_lens.device
        checks.tensor("query_start_loc", query_start_loc, (requests + 1,), torch.int32, device)
        checks.tensor("swa_block_table", swa_block_table, (requests, None), torch.int32, device)
        if compress_ratio not in COMPRESS_RATIOS:
            raise ValueError(f"compress_ratio: got {compress_ratio}, need one of {COMPRESS_RATIOS}")
        indices.check_pool(swa_page_size, swa_pages, "swa_")
        checks.integer("topk", topk, 0)
        checks.integer("window_size", window_size, 1)
        if compress_ratio > 1:
            checks.tensor("extra_block_table", extra_block_table, (requests, None), torch.int32, device)
            indices.check_pool(extra_page_size, extra_pages, "extra_")
        elif extra_block_table is not None:
            raise ValueError("extra_block_table: given, need None for compress_ratio 1")
        starts = _host("query_start_loc", query_start_loc, query_start_loc_cpu)
        lengths = _host("seq_lens", seq_lens, seq_lens_cpu)
        query_lens = [b - a for a, b in itertools.pairwise(starts)]
        _check_lengths(starts, query_lens, lengths)
        served = [length for queries, length in zip(query_lens, lengths) if queries]
        _check_table("swa_block_table", swa_block_table, served, swa_page_size, 1)
        if num_tokens is None:
            num_tokens = starts[-1]
        checks.integer("num_tokens", num_tokens, starts[-1])

        request, position = reference.token_positions(query_start_loc, seq_lens, num_tokens)
        request, visible = request.int(), ((position + 1) // compress_ratio).int()
        swa_indices, swa_lens = indices.window_slots(
            query_start_loc, seq_lens, swa_block_table, swa_page_size, swa_pages, window_size, num_tokens
        )
        extra_lens = None
        if extra_block_table is not None:
            assert extra_page_size is not None
            _check_table("extra_block_table", extra_block_table, served, extra_page_size, compress_ratio)
            extra_lens = visible.clamp_max(topk) if compress_ratio == 4 else visible
        meta = cls(
            compress_ratio, window_size, topk if compress_ratio == 4 else 0, num_tokens,
            query_start_loc, seq_lens, swa_block_table, extra_block_table,
            swa_page_size, swa_pages, extra_page_size or 0, extra_pages or 0,
            request, position.int(), visible, swa_indices, swa_lens, None, extra_lens, starts, query_lens, lengths,
            device.type == "cuda" and torch.cuda.is_current_stream_capturing(),
        )  # fmt: skip
        if compress_ratio == 128 and 4 * num_tokens * meta.slot_row_width <= MAX_SLOT_ROW_BYTES:
            meta.extra_indices = meta.slot_rows(slice(0, num_tokens))
        if checks.check_values_enabled():
            checks.no_holes("swa_indices", swa_indices, swa_lens, "swa_block_table")
            if compress_ratio == 128:
                for block in meta.direct_blocks:
                    checks.no_holes("extra_indices", meta.slot_rows(block), visible[block], "extra_block_table")
        return meta

    @functools.cached_property
    def slot_row_width(self) -> int:
        """Width of a C128 slot row: the entries of the longest request, rounded up."""
        entries = max(self.host_seq_lens, default=0) // self.compress_ratio
        return max(1, -(-entries // _SLOT_ROW_ALIGNMENT)) * _SLOT_ROW_ALIGNMENT

    def slot_rows(self, tokens: slice) -> torch.Tensor:
        """int32 ``[tokens, slot_row_width]``: the slots of every entry some tokens may see, -1 behind them."""
        assert self.extra_block_table is not None
        count = tokens.stop - tokens.start
        every = torch.arange(self.slot_row_width, dtype=torch.int32, device=self.seq_lens.device)
        return indices.local_to_slots(
            every.expand(count, self.slot_row_width), self.request[tokens], self.visible[tokens],
            self.extra_block_table, self.extra_page_size, self.extra_pages,
        )  # fmt: skip

    @functools.cached_property
    def direct_blocks(self) -> list[slice]:
        """The tokens in blocks whose index rows the direct path makes at once: one, but for long C128 chunks."""
        step = max(1, self.num_tokens)
        if self.compress_ratio == 128 and self.extra_indices is None:
            step = max(1, MAX_SLOT_ROW_BYTES // (4 * self.slot_row_width))
        return [slice(t, min(t + step, self.num_tokens)) for t in range(0, self.num_tokens, step)] or [slice(0, 0)]

    @functools.cached_property
    def compressed_counts(self) -> list[int]:
        """Compressed entries of each request with queries, 0 for the others; on the host."""
        if self.compress_ratio == 1:
            return [0] * len(self.host_seq_lens)
        return [s // self.compress_ratio if q else 0 for q, s in zip(self.host_query_lens, self.host_seq_lens)]

    @functools.cached_property
    def gather_counts(self) -> list[int]:
        """Raw tokens some query of each request may see; on the host."""
        return [min(s, q + self.window_size - 1) if q else 0 for q, s in zip(self.host_query_lens, self.host_seq_lens)]

    def mean_entries(self, extra_width: int) -> int:
        """Window and extra entries a token reads on average, at most ``extra_width`` of the latter; on the host."""
        total = 0
        for queries, length in zip(self.host_query_lens, self.host_seq_lens):
            total += _capped_sum(length - queries, length, 1, self.window_size)
            if self.compress_ratio > 1:
                total += _capped_sum(length - queries, length, self.compress_ratio, extra_width)
        return -(-total // max(1, self.num_tokens))

    @functools.cached_property
    def compressed(self) -> torch.Tensor:
        """int32 ``[R]``: :attr:`compressed_counts` on the device."""
        if self.compress_ratio == 1:
            return torch.zeros_like(self.seq_lens)
        return torch.where(self.query_start_loc.diff() > 0, self.seq_lens // self.compress_ratio, 0)

    @functools.cached_property
    def gathered(self) -> torch.Tensor:
        """int32 ``[R]``: :attr:`gather_counts` on the device."""
        query_lens = self.query_start_loc.diff()
        gathered = torch.minimum(self.seq_lens, query_lens + (self.window_size - 1))
        return torch.where(query_lens > 0, gathered, 0)

    @functools.cached_property
    def chunk(self) -> SparsePrefillChunkCache:
        """The gathered path's plan under the default cap, for callers that bring none."""
        return SparsePrefillChunkCache().rebuild(self)


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
        chunk = meta.chunk
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
    index = Problem.on(index_op, q.device, tokens=problem.tokens, width=problem.width)
    gathering = [
        Problem.on(op, q.device, tokens=problem.rows, caches=problems["direct"].caches)
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
            trusted_indices=True, schedule=meta._schedule.setdefault(block.start, {"captured": meta._captured}),
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


def _host(name: str, value: torch.Tensor, copy: torch.Tensor | None) -> list[int]:
    if copy is None:
        return value.tolist()
    checks.tensor(f"{name}_cpu", copy, tuple(value.shape), checks.INDEX_DTYPES, torch.device("cpu"))
    return copy.tolist()


def _check_lengths(starts: list[int], query_lens: list[int], seq_lens: list[int]) -> None:
    if starts[0] != 0:
        raise ValueError(f"query_start_loc: begins with {starts[0]}, need 0")
    for i, (queries, length) in enumerate(zip(query_lens, seq_lens)):
        if queries < 0:
            raise ValueError(f"query_start_loc: falls from {starts[i]} to {starts[i + 1]} at request {i}, need no fall")
        if queries > length:
            raise ValueError(f"seq_lens: {length} at request {i}, need >= its {queries} query tokens")


def _check_table(name: str, table: torch.Tensor, seq_lens: list[int], page_size: int, ratio: int) -> None:
    needed = max((-(-(length // ratio) // page_size) for length in seq_lens), default=0)
    if table.shape[1] < needed:
        raise ValueError(f"{name}: {table.shape[1]} pages a request, need >= {needed} for {max(seq_lens)} tokens")


def _capped_sum(first: int, end: int, ratio: int, cap: int) -> int:
    """Sum of min((p + 1) // ratio, cap) over positions p in ``[first, end)``, to within one a position."""
    full = min(max(cap * ratio, first), end)
    return (full * (full + 1) - first * (first + 1)) // (2 * ratio) + (end - full) * cap
