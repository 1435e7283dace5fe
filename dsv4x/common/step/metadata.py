"""Metadata built once a step: what the layers of one compress ratio share."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core import checks
from ..core.spaces import check_pool, token_positions
from ..ops import indices

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
    captured: bool = False
    kept: dict[Any, Any] = field(default_factory=dict)

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
        check_pool(swa_page_size, swa_pages, "swa_")
        checks.integer("topk", topk, 0)
        checks.integer("window_size", window_size, 1)
        if compress_ratio > 1:
            checks.tensor("extra_block_table", extra_block_table, (requests, None), torch.int32, device)
            check_pool(extra_page_size, extra_pages, "extra_")
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

        request, position = token_positions(query_start_loc, seq_lens, num_tokens)
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
