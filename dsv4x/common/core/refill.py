"""What a step's metadata and its gather plan are filled from and into, as records for the kernels that fill them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .calls import Local


class KindRows(NamedTuple):
    """What one kind of layers with compressed entries is filled with.

    Attributes:
        block_table: int32 ``[R, m]`` page numbers of the compressed cache.
        page_size, pages: of that cache; a page number outside the pool is no page.
        compress_ratio: raw tokens a compressed entry stands for.
        most: entries a row's span is clamped to.
        visible: int32 ``[T]``, written: compressed entries a token may see.
        lens: int32 ``[T]``, written: ``min(visible, most)``.
        rows: int32 ``[T, width]``, written: slots of the first ``lens`` entries, then -1 up to the next multiple of 64;
            what stands past that is left as it is, or becomes -1 in a fresh step. None where an indexer selects, or
            rows are made later.
    """

    block_table: torch.Tensor
    page_size: int
    pages: int
    compress_ratio: int
    most: int
    visible: torch.Tensor
    lens: torch.Tensor
    rows: torch.Tensor | None


class StepCall(NamedTuple):
    """Everything that a step's metadata is filled from and into.

    Attributes:
        query_start_loc: int32 ``[R+1]``, from 0, not decreasing.
        seq_lens: int32 ``[R]``, raw tokens of each request, its queries included.
        max_seq_len: the bound a length is clamped to.
        swa_block_table: int32 ``[R, m]`` page numbers of the window's cache; None where its rows are not made here.
        swa_page_size, swa_pages: of that cache.
        request, position: int32 ``[T]``, written: each token's request and position, -1 for none.
        swa_indices: int32 ``[T, window_size]``, written: slots of each token's window, oldest first, -1 padded; None
            where its rows are not made here.
        swa_lens: int32 ``[T]``, written: spans of these rows.
        clamped: int32 ``[1]``: the number of requests with queries and a length past ``max_seq_len`` is added.
        fresh: whether nothing was filled before: that number replaces what ``clamped`` held, and rows are written to
            their end.
        kinds: of the layers with compressed entries.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int
    swa_block_table: torch.Tensor | None
    swa_page_size: int
    swa_pages: int
    request: torch.Tensor
    position: torch.Tensor
    swa_indices: torch.Tensor | None
    swa_lens: torch.Tensor | None
    clamped: torch.Tensor
    fresh: bool
    kinds: tuple[KindRows, ...]


class CombineCall(NamedTuple):
    """One call of ``combine_topk_swa_indices``, checked; arguments as of the op.

    Attributes:
        topk_lens: int32 ``[T]`` scan spans of the top-k rows, clamped to their width; None scans all of them.
        compressed_lens: int32 ``[R]``, compressed entries of each request that the workspace holds; None where it holds
            every one.
    """

    topk_indices: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    gather_lens: torch.Tensor
    compressed_base: torch.Tensor
    swa_base: torch.Tensor
    window_size: int
    compress_ratio: int
    topk: int
    row_slots: torch.Tensor | None
    positions: tuple[torch.Tensor, torch.Tensor] | None
    out_indices: torch.Tensor
    out_lens: torch.Tensor
    topk_lens: torch.Tensor | None = None
    compressed_lens: torch.Tensor | None = None


class PackCall(NamedTuple):
    """Rows of a selection, as slots packed to the front of their rows.

    Attributes:
        indices: int32 ``[T, K]``, local entries, or slots where ``local`` is None; -1 anywhere for none.
        spans: int32 ``[T]`` scan spans, clamped to ``[0, K]``; None scans all of a row.
        local: what makes slots of local entries.
        capacity: slots of the cache; a slot at or past it is no entry.
        page_size: of the cache.
        out: int32 ``[T, >= K]``, written: slots in the order of their row, then -1.
        lens: int32 ``[T]``, written: how many slots a row has, or the span it was scanned for.
        counted: which of the two.
    """

    indices: torch.Tensor
    spans: torch.Tensor | None
    local: Local | None
    capacity: int
    page_size: int
    out: torch.Tensor
    lens: torch.Tensor
    counted: bool = True


class GatherKind(NamedTuple):
    """The gathered rows of one kind, for a run of requests.

    Attributes:
        first, end: the run of requests; the others gather nothing.
        compress_ratio: raw tokens a compressed entry stands for; 0 where there are none.
        block_table: int32 ``[R, m]`` page numbers of the compressed cache; the window's where there is none.
        page_size, pages: of that cache.
        compressed_rows: workspace rows kept for compressed entries; what does not fit is not gathered.
        requests: int32 ``[5, R]``, rows of one stride for all kinds, written: first row and number of compressed
            entries, first row and number of raw tokens, and length of each request.
        slots: int32 ``[S]``, written: the slot of each workspace row, -1 where nothing is gathered: of the compressed
            cache below ``compressed_rows``, of the window's from there on.
    """

    first: int
    end: int
    compress_ratio: int
    block_table: torch.Tensor
    page_size: int
    pages: int
    compressed_rows: int
    requests: torch.Tensor
    slots: torch.Tensor


class GatherCall(NamedTuple):
    """Everything that the gather plans of a step's kinds are filled from and into.

    Attributes:
        query_start_loc, seq_lens, max_seq_len, swa_block_table, swa_page_size, swa_pages: as in :class:`StepCall`.
        window_size: raw tokens a query sees, its own included.
        kinds: the kinds planned together.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int
    swa_block_table: torch.Tensor
    swa_page_size: int
    swa_pages: int
    window_size: int
    kinds: tuple[GatherKind, ...]
