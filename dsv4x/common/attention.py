"""Metadata built once a step, and the attention entry point servers call once a layer."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from . import checks, indices, reference
from .cache import dequantize_k_cache_paged
from .layouts import PagedCache
from .registry import Problem, select
from .sparse_mla import check_cache, sparse_mla_decode, sparse_mla_prefill

HEAD_DIM = 512
"""DeepSeek-V4's values of K, all of which are V."""

COMPRESS_RATIOS = (1, 4, 128)
PATHS = ("direct", "gathered")

MAX_WORKSPACE_BYTES = 256 << 20
"""The gathered path is not chosen by itself when its workspace would be larger."""

_SLOT_ROW_ALIGNMENT = 64
"""Width of the C128 slot rows: what every decode kernel takes as it is."""


@dataclass(frozen=True)
class GatherPlan:
    """Where each request's entries stand in a bf16 workspace: all compressed entries, then all window entries.

    Attributes:
        slots: int32 ``[S]``, each workspace row's slot: of the extra cache before row C, of the window's from there on.
            A page that is not in its pool gives -1, and its row is never written.
        compressed_rows: C.
        compressed_base, swa_base: int32 ``[R]``, each request's first row of either kind.
        gather_lens: int32 ``[R]``, trailing raw tokens of each request that are gathered.
    """

    slots: torch.Tensor
    compressed_rows: int
    compressed_base: torch.Tensor
    swa_base: torch.Tensor
    gather_lens: torch.Tensor


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
        request: int32 ``[T]``, each token's request, -1 for padding.
        visible: int32 ``[T]``, compressed entries a token may see.
        swa_indices, swa_lens: int32 ``[T, window_size]`` slots and ``[T]`` spans.
        extra_indices: int32 ``[T, any]`` slots of every visible entry (C128 only).
        extra_lens: int32 ``[T]`` spans of the extra rows, or None for window-only layers.
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
    visible: torch.Tensor
    swa_indices: torch.Tensor
    swa_lens: torch.Tensor
    extra_indices: torch.Tensor | None
    extra_lens: torch.Tensor | None
    _host_query_lens: list[int]
    _host_seq_lens: list[int]
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
        checks.integer("swa_page_size", swa_page_size, 1)
        checks.integer("swa_pages", swa_pages, 0)
        checks.integer("topk", topk, 0)
        checks.integer("window_size", window_size, 1)
        if compress_ratio > 1:
            checks.tensor("extra_block_table", extra_block_table, (requests, None), torch.int32, device)
            checks.integer("extra_page_size", extra_page_size, 1)
            checks.integer("extra_pages", extra_pages, 0)
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
        extra_indices = extra_lens = None
        if extra_block_table is not None and extra_page_size is not None and extra_pages is not None:
            _check_table("extra_block_table", extra_block_table, served, extra_page_size, compress_ratio)
            if compress_ratio == 4:
                extra_lens = visible.clamp_max(topk)
            else:
                entries = max(lengths, default=0) // compress_ratio
                width = max(1, -(-entries // _SLOT_ROW_ALIGNMENT)) * _SLOT_ROW_ALIGNMENT
                every = torch.arange(width, dtype=torch.int32, device=device).expand(num_tokens, width)
                extra_indices = indices.local_to_slots(
                    every, request, visible, extra_block_table, extra_page_size, extra_pages
                )
                extra_lens = visible
        if checks.check_values_enabled():
            checks.no_holes("swa_indices", swa_indices, swa_lens, "swa_block_table")
            if extra_indices is not None and extra_lens is not None:
                checks.no_holes("extra_indices", extra_indices, extra_lens, "extra_block_table")
        return cls(
            compress_ratio, window_size, topk if compress_ratio == 4 else 0, num_tokens,
            query_start_loc, seq_lens, swa_block_table, extra_block_table,
            swa_page_size, swa_pages, extra_page_size or 0, extra_pages or 0,
            request, visible, swa_indices, swa_lens, extra_indices, extra_lens, query_lens, lengths,
        )  # fmt: skip

    @property
    def workspace_rows(self) -> int:
        """Rows the gathered path's workspace takes, 1024 bytes each."""
        return sum(self._compressed_counts) + sum(self._gather_counts)

    @functools.cached_property
    def _compressed_counts(self) -> list[int]:
        if self.compress_ratio == 1:
            return [0] * len(self._host_seq_lens)
        return [s // self.compress_ratio if q else 0 for q, s in zip(self._host_query_lens, self._host_seq_lens)]

    @functools.cached_property
    def _gather_counts(self) -> list[int]:
        return [
            min(s, q + self.window_size - 1) if q else 0 for q, s in zip(self._host_query_lens, self._host_seq_lens)
        ]

    @functools.cached_property
    def gather_plan(self) -> GatherPlan:
        """The gathered path's plan, built on first use and shared by the layers."""
        query_lens = self.query_start_loc.diff()
        compressed = torch.zeros_like(self.seq_lens)
        if self.compress_ratio > 1:
            compressed = torch.where(query_lens > 0, self.seq_lens // self.compress_ratio, 0)
        gathered = torch.minimum(self.seq_lens, query_lens + (self.window_size - 1))
        gathered = torch.where(query_lens > 0, gathered, 0)
        compressed_rows, swa_rows = sum(self._compressed_counts), sum(self._gather_counts)
        swa_slots = _ragged_slots(
            self.swa_block_table, self.seq_lens - gathered, gathered, swa_rows, self.swa_page_size, self.swa_pages
        )
        slots = swa_slots
        if self.extra_block_table is not None:
            first = torch.zeros_like(compressed)
            compressed_slots = _ragged_slots(
                self.extra_block_table, first, compressed, compressed_rows, self.extra_page_size, self.extra_pages
            )
            slots = torch.cat([compressed_slots, swa_slots])
        return GatherPlan(
            slots,
            compressed_rows,
            _exclusive_sum(compressed),
            _exclusive_sum(gathered) + compressed_rows,
            gathered,
        )

    @functools.cached_property
    def _shared_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Combined workspace rows of layers whose entries no indexer chooses."""
        width = max(self._host_seq_lens, default=0) // self.compress_ratio if self.compress_ratio > 1 else 0
        every = torch.arange(width, dtype=torch.int32, device=self.seq_lens.device)
        return self._combined_rows(every.expand(self.num_tokens, width))

    def _combined_rows(self, topk_indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plan = self.gather_plan
        topk = min(topk_indices.shape[1], self.topk) if self.compress_ratio == 4 else topk_indices.shape[1]
        return indices.combine_topk_swa_indices(
            topk_indices, self.query_start_loc, self.seq_lens, plan.gather_lens, plan.compressed_base, plan.swa_base,
            self.window_size, self.compress_ratio, topk, row_slots=plan.slots,
        )  # fmt: skip


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
    swa_k_scale: float = 1.0,
    extra_k_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
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
        path: ``"direct"`` reads fp8 pages in place; ``"gathered"`` dequantizes what the step reads into a bf16
            workspace (``meta.workspace_rows`` KiB) first; None picks the faster by prediction.
        kernel: the attention kernel, as in :func:`~dsv4x.sparse_mla_decode`; None picks.
        swa_k_scale, extra_k_scale: as in :func:`~dsv4x.sparse_mla_decode`.

    Returns:
        ``(out, lse)``: bf16 ``[T, H, 512]`` and float32 ``[T, H]``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device, layout or page size; under
            ``DSV4X_CHECK=1`` also a local entry its token may not see, or a NaN in q, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    checks.tensor("q", q, (meta.num_tokens, None, HEAD_DIM), torch.bfloat16, meta.seq_lens.device)
    _check_cache("swa_cache", swa_cache, q.device, meta.swa_page_size, meta.swa_pages)
    checks.k_scale("swa_k_scale", swa_k_scale, swa_cache)
    if meta.compress_ratio == 1:
        if extra_cache is not None:
            raise ValueError("extra_cache: given, need None for compress_ratio 1")
    else:
        extra_cache = _check_cache("extra_cache", extra_cache, q.device, meta.extra_page_size, meta.extra_pages)
        checks.k_scale("extra_k_scale", extra_k_scale, extra_cache)
    if meta.compress_ratio == 4:
        topk_indices = checks.tensor("topk_indices", topk_indices, (meta.num_tokens, None), torch.int32, q.device)
        if checks.check_values_enabled():
            spans = meta.visible.clamp_max(min(meta.topk, topk_indices.shape[1]))
            checks.index_values("topk_indices", topk_indices, spans, meta.visible, "local entry")
    elif topk_indices is not None:
        raise ValueError(f"topk_indices: given, need None for compress_ratio {meta.compress_ratio}")
    if path not in (*PATHS, None):
        raise ValueError(f"path: got {path!r}, need one of {PATHS} or None")
    if path is None:
        path = choose_path(q, swa_cache, extra_cache, meta, topk_indices, kernel)
    if path == "direct":
        extra_indices, extra_lens = meta.extra_indices, meta.extra_lens
        if topk_indices is not None and meta.extra_block_table is not None and extra_lens is not None:
            extra_indices = indices.local_to_slots(
                topk_indices, meta.request, meta.visible, meta.extra_block_table, meta.extra_page_size, meta.extra_pages
            )
            if topk_indices.shape[1] < meta.topk:
                extra_lens = extra_lens.clamp_max(topk_indices.shape[1])
        return sparse_mla_decode(
            q, swa_cache, meta.swa_indices, meta.swa_lens, extra_cache, extra_indices, extra_lens,
            attn_sink, softmax_scale, out, kernel, trusted_indices=True, schedule=meta._schedule,
            swa_k_scale=swa_k_scale, extra_k_scale=extra_k_scale,
        )  # fmt: skip
    plan = meta.gather_plan
    # Not filled: rows without a slot stay unwritten, and no index points at them.
    workspace = torch.empty(plan.slots.shape[0], HEAD_DIM, dtype=torch.bfloat16, device=q.device)
    compressed = plan.compressed_rows
    if extra_cache is not None:
        dequantize_k_cache_paged(extra_cache, plan.slots[:compressed], workspace[:compressed], k_scale=extra_k_scale)
    dequantize_k_cache_paged(swa_cache, plan.slots[compressed:], workspace[compressed:], k_scale=swa_k_scale)
    rows, lens = meta._shared_rows if topk_indices is None else meta._combined_rows(_causal(topk_indices, meta))
    return sparse_mla_prefill(q, workspace, rows, lens, attn_sink, softmax_scale, out, kernel, trusted_indices=True)


def choose_path(
    q: torch.Tensor,
    swa_cache: PagedCache,
    extra_cache: PagedCache | None,
    meta: AttentionMetadata,
    topk_indices: torch.Tensor | None = None,
    kernel: str | None = None,
) -> str:
    """``"direct"`` or ``"gathered"``, whichever is predicted to be faster and may run. Arguments as in the step."""
    direct, gathered = path_problems(q, swa_cache, extra_cache, meta, topk_indices)
    if gathered.capturing or meta.workspace_rows * HEAD_DIM * 2 > MAX_WORKSPACE_BYTES or not meta.workspace_rows:
        return "direct"
    # An estimate: the gather's and the remap's launches, and 1608 bytes a gathered row.
    gather_us = 50.0 + meta.workspace_rows * 1608 / 3e6
    faster = select(direct, kernel).predicted_us(direct) <= gather_us + select(gathered, kernel).predicted_us(gathered)
    return "direct" if faster else "gathered"


def path_problems(
    q: torch.Tensor,
    swa_cache: PagedCache,
    extra_cache: PagedCache | None,
    meta: AttentionMetadata,
    topk_indices: torch.Tensor | None = None,
) -> tuple[Problem, Problem]:
    """The attention problem of the direct and of the gathered path, for :func:`dsv4x.explain`."""
    tokens, heads = q.shape[:2]
    extra_width = 0
    if topk_indices is not None:
        extra_width = topk_indices.shape[1]
    elif meta.extra_indices is not None:
        extra_width = meta.extra_indices.shape[1]
    caches = tuple(cache.spec for cache in (swa_cache, extra_cache) if cache is not None)
    direct = Problem.on(
        "sparse_mla_decode", q.device, tokens=tokens, heads=heads,
        width=meta.swa_indices.shape[1], extra_width=extra_width, caches=caches,
    )  # fmt: skip
    gathered = Problem.on(
        "sparse_mla_prefill", q.device, tokens=tokens, heads=heads,
        width=indices.combined_topk_width(extra_width, meta.window_size), rows=meta.workspace_rows,
    )  # fmt: skip
    return direct, gathered


def _causal(topk_indices: torch.Tensor, meta: AttentionMetadata) -> torch.Tensor:
    """Drop entries a token may not see yet, as the direct path's remap does."""
    return torch.where(topk_indices < meta.visible[:, None], topk_indices, -1)


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


def _exclusive_sum(counts: torch.Tensor) -> torch.Tensor:
    return counts.cumsum(0, dtype=torch.int32) - counts


def _ragged_slots(
    block_table: torch.Tensor,
    first: torch.Tensor,
    counts: torch.Tensor,
    total: int,
    page_size: int,
    pages: int,
) -> torch.Tensor:
    """Slots of entries ``first[i] ... first[i] + counts[i] - 1`` of every request, int32 ``[total]``."""
    request = torch.repeat_interleave(counts.long(), output_size=total)
    row = torch.arange(total, dtype=torch.int32, device=counts.device)
    local = row - _exclusive_sum(counts)[request] + first[request]
    limits = (first + counts)[request]
    return indices.local_to_slots(local[:, None], request.int(), limits, block_table, page_size, pages)[:, 0]
