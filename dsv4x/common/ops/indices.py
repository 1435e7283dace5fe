"""Index spaces and the remaps between them. -1 is no entry in every space and stays -1 through every remap.

- *local*: an entry's number inside its request's sequence (raw tokens) or compressed sequence.
- *slot*: page * page_size + offset, the page taken from the request's block table.
- *workspace row*: a row of a gathered bf16 workspace.
- *ragged*: any of these as one flat list and an indptr; what is no entry is absent.

Lengths are scan spans: how far into a row a kernel looks, holes included. Results are int32: what does not fit is -1.
"""

from __future__ import annotations

import torch

from ..core import checks
from ..core.refill import CombineCall
from ..core.spaces import INT32_MAX, check_pool, token_positions
from ..dispatch.problem import IndexProblem
from ..dispatch.registry import select

ROW_ALIGNMENT = 128
"""Widths of combined rows are multiples of this: FlashMLA's prefill kernel needs it on SM90."""


def combined_topk_width(topk: int, window_size: int) -> int:
    """Width of a row of :func:`combine_topk_swa_indices`: ``topk + window_size`` rounded up to 128."""
    checks.integer("topk", topk, 0)
    checks.integer("window_size", window_size, 0)
    return -(-(topk + window_size) // ROW_ALIGNMENT) * ROW_ALIGNMENT


def _combined_buffers(
    out_indices: torch.Tensor | None, out_lens: torch.Tensor | None, tokens: int, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The buffers a caller gave for combined rows, checked, or new ones."""
    if out_indices is None:
        out_indices = torch.empty(tokens, width, dtype=torch.int32, device=device)
    else:
        checks.tensor("out_indices", out_indices, (tokens, None), torch.int32, device)
        if out_indices.shape[1] < width or out_indices.shape[1] % ROW_ALIGNMENT:
            raise ValueError(
                f"out_indices: width is {out_indices.shape[1]}, need a multiple of {ROW_ALIGNMENT} >= {width}"
            )
        checks.rows_apart("out_indices", out_indices)
    if out_lens is None:
        out_lens = torch.empty(tokens, dtype=torch.int32, device=device)
    else:
        checks.tensor("out_lens", out_lens, (tokens,), torch.int32, device)
    return out_indices, out_lens


def combine_topk_swa_indices(
    topk_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    gather_lens: torch.Tensor,
    compressed_base: torch.Tensor,
    swa_base: torch.Tensor,
    window_size: int,
    compress_ratio: int,
    topk: int,
    out_indices: torch.Tensor | None = None,
    out_lens: torch.Tensor | None = None,
    *,
    row_slots: torch.Tensor | None = None,
    positions: tuple[torch.Tensor, torch.Tensor] | None = None,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One workspace index row a query token: ``[top-k rebased | window rebased | -1 ...]``, front-packed.

    A query at position p sees the first ``min(topk, K)`` entries of its top-k row and the ``min(p+1, window_size)`` raw
    tokens up to its own. A local index that its query may not see (negative, or >= (p+1) // compress_ratio) is no
    entry,
    and neither is one without a workspace row: they are left out, and what follows moves up. A window token that was
    not gathered keeps its place as -1.

    Args:
        topk_indices: int32 ``[T, K]``, index space *local* (compressed entries); K may be 0.
        query_start_loc: int32 ``[R+1]``, where each request's query tokens begin, row 0 being the token at its
            first value; T may run past its last.
        seq_lens: int32 ``[R]``, raw tokens of each request, its queries included.
        gather_lens: int32 ``[R]``, trailing raw tokens of each request that the workspace holds.
        compressed_base: int32 ``[R]``, workspace row of each request's compressed entry 0.
        swa_base: int32 ``[R]``, workspace row of each request's first gathered raw token.
        window_size, compress_ratio, topk: the layer's; ``topk=0`` for a layer with only a window.
        out_indices: int32 ``[T, >= combined_topk_width(topk, window_size)]``, a multiple of 128 wide, or None.
        out_lens: int32 ``[T]`` or None.
        row_slots: int32 ``[S]``, the slot each workspace row was gathered from; a row whose slot is -1, and a row past
            S, is not there. None: every row is there.
        positions: int32 ``([T], [T])``, each row's request and position (-1, -1 for none), which spares finding them
            and lets the rows be any part of a batch; ``query_start_loc`` is not looked at then.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        ``(indices, lens)``: int32 ``[T, width]`` workspace rows, -1 padded to the whole width, and int32 ``[T]`` spans.
        Tokens of no request have span 0.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device; under ``DSV4X_CHECK=1`` also a
            local index its query may not see, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: the op of this name in vLLM, with bases as arguments; there entries behind a leading -1 may be lost.
    """
    checks.tensor("topk_indices", topk_indices, (None, None), torch.int32)
    tokens, device = topk_indices.shape[0], topk_indices.device
    checks.tensor("seq_lens", seq_lens, (None,), checks.INDEX_DTYPES, device)
    requests = seq_lens.shape[0]
    checks.tensor("query_start_loc", query_start_loc, (requests + 1,), checks.INDEX_DTYPES, device)
    for name, value in (("gather_lens", gather_lens), ("compressed_base", compressed_base), ("swa_base", swa_base)):
        checks.tensor(name, value, (requests,), checks.INDEX_DTYPES, device)
    if row_slots is not None:
        checks.tensor("row_slots", row_slots, (None,), torch.int32, device)
    if positions is not None:
        if not isinstance(positions, (tuple, list)) or len(positions) != 2:
            raise TypeError(f"positions: got {type(positions).__name__}, need a pair of int32 tensors")
        for name, value in zip(("positions[0]", "positions[1]"), positions):
            checks.tensor(name, value, (tokens,), torch.int32, device)
    checks.integer("compress_ratio", compress_ratio, 1)
    width = combined_topk_width(topk, window_size)
    out_indices, out_lens = _combined_buffers(out_indices, out_lens, tokens, width, device)
    if checks.check_values_enabled():
        _, position = positions or token_positions(query_start_loc, seq_lens, tokens)
        visible = (position + 1) // compress_ratio
        rows = topk_indices[:, :topk]
        spans = torch.where(position >= 0, rows.shape[1], 0)
        checks.index_values("topk_indices", rows, spans, visible, "local entry")
    record = select(IndexProblem.on("combine_topk_swa_indices", device, tokens=tokens, width=width), kernel)
    if tokens:
        call = CombineCall(
            topk_indices, query_start_loc, seq_lens, gather_lens, compressed_base, swa_base,
            window_size, compress_ratio, topk, row_slots, positions, out_indices, out_lens,
        )  # fmt: skip
        record.launch(device, call)
    return out_indices, out_lens


def combine_swa_extra_indices(
    swa_indices: torch.Tensor,
    swa_lens: torch.Tensor | None,
    extra_indices: torch.Tensor,
    extra_lens: torch.Tensor | None,
    s_kv_swa: int,
    out_indices: torch.Tensor | None = None,
    out_lens: torch.Tensor | None = None,
    *,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row a token of a workspace ``[s_kv_swa window rows | extra rows]``: ``[window | extra shifted | -1 ...]``.

    Rows are front-packed by the spans: the window's span entries, then at once the extra's. Holes keep their place.

    Args:
        swa_indices: int32 or int64 ``[T, w]``, workspace rows of the window half; one outside ``[0, s_kv_swa)``
            becomes -1. w may be 0.
        swa_lens: int32 or int64 ``[T]`` spans, clamped to ``[0, w]``; None for w.
        extra_indices: int32 or int64 ``[T, e]``, rows of the extra half, counted from its own row 0; a negative one
            becomes -1 and is not shifted. e may be 0.
        extra_lens: the same for the extra rows.
        s_kv_swa: rows of the window half.
        out_indices: int32 ``[T, >= w + e]``, a multiple of 128 wide, or None.
        out_lens: int32 ``[T]`` or None.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        ``(indices, lens)``: int32 ``[T, w + e rounded up to 128]`` workspace rows, -1 padded to the whole width, and
        int32 ``[T]``, the sum of both spans. A row past 2**31 - 1 is -1.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device; under ``DSV4X_CHECK=1`` also a
            length or an index out of range, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: what FlashMLA's sparse prefill needs (one kv, one row of indices) where a server gathers two caches.
    """
    checks.tensor("swa_indices", swa_indices, (None, None), checks.INDEX_DTYPES)
    tokens, device = swa_indices.shape[0], swa_indices.device
    checks.tensor("extra_indices", extra_indices, (tokens, None), checks.INDEX_DTYPES, device)
    for name, lens in (("swa_lens", swa_lens), ("extra_lens", extra_lens)):
        if lens is not None:
            checks.tensor(name, lens, (tokens,), checks.INDEX_DTYPES, device)
    checks.integer("s_kv_swa", s_kv_swa, 0, INT32_MAX)
    width = combined_topk_width(extra_indices.shape[1], swa_indices.shape[1])
    out_indices, out_lens = _combined_buffers(out_indices, out_lens, tokens, width, device)
    if checks.check_values_enabled():
        checks.index_values("swa_indices", swa_indices, swa_lens, s_kv_swa, "workspace row")
        checks.index_values("extra_indices", extra_indices, extra_lens, INT32_MAX + 1 - s_kv_swa, "workspace row")
    record = select(IndexProblem.on("combine_swa_extra_indices", device, tokens=tokens, width=width), kernel)
    if tokens:
        record.launch(device, swa_indices, swa_lens, extra_indices, extra_lens, s_kv_swa, out_indices, out_lens)
    return out_indices, out_lens


def window_slots(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    page_size: int,
    pages: int,
    window_size: int,
    tokens: int,
    *,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of each query token's window: positions ``max(0, p - window_size + 1) ... p``, oldest first.

    Positions follow from the lengths. A server that has them otherwise (context parallel) passes
    ``(positions - window_size + 1).clamp_min(0)[:, None] + arange(window_size)`` to :func:`local_to_slots`, with
    ``positions + 1`` as limits.

    Args:
        query_start_loc: int32 or int64 ``[R+1]``, where each request's query tokens begin, row 0 being the token at
            its first value.
        seq_lens: int32 or int64 ``[R]``, raw tokens of each request, its queries included.
        block_table: int32 ``[R, m]`` page numbers; what stands past a request's own pages is never used.
        page_size, pages: of the window's cache; a page number outside the pool gives -1.
        window_size: raw tokens a query sees, its own included.
        tokens: T; tokens past the last request's have span 0.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        int32 ``[T, window_size]`` slots, -1 padded, and int32 ``[T]`` spans.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or range.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    checks.tensor("seq_lens", seq_lens, (None,), checks.INDEX_DTYPES)
    requests, device = seq_lens.shape[0], seq_lens.device
    checks.tensor("query_start_loc", query_start_loc, (requests + 1,), checks.INDEX_DTYPES, device)
    checks.tensor("block_table", block_table, (requests, None), torch.int32, device)
    check_pool(page_size, pages)
    checks.integer("window_size", window_size, 1, INT32_MAX)
    checks.integer("tokens", tokens, 0)
    out_indices = torch.empty(tokens, window_size, dtype=torch.int32, device=device)
    out_lens = torch.empty(tokens, dtype=torch.int32, device=device)
    record = select(IndexProblem.on("window_slots", device, tokens=tokens, width=window_size), kernel)
    if tokens:
        record.launch(device, query_start_loc, seq_lens, block_table, page_size, pages, out_indices, out_lens)
    return out_indices, out_lens


def build_swa_token_ids(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    window_size: int,
    total: int,
    *,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The raw tokens whose entries each request's windows read, request after request.

    Of a request of length L with q > 0 queries: positions ``max(0, L - q - (window_size - 1)) ... L - 1``, which is
    what its queries' windows cover together. Of a request without queries: nothing.

    Args:
        query_start_loc: int32 or int64 ``[R+1]``, where each request's query tokens begin.
        seq_lens: int32 or int64 ``[R]``, raw tokens of each request, its queries included.
        window_size: raw tokens a query sees, its own included.
        total: rows of the result, from the host's lengths or a capacity: rows past the last request's are -1, and
            what does not fit is dropped from the end.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        ``(token_ids, request, starts)``: int32 ``[total]``, index space *local* (raw tokens); int32 ``[total]``, the
        request of each; int32 ``[R+1]``, each request's first row. ``starts`` is not clamped to ``total``:
        ``starts[R] > total`` says that rows were dropped, ``starts[:-1]`` and ``starts.diff()`` are the ``swa_base``
        and ``gather_lens`` of :func:`combine_topk_swa_indices`. The rows' slots are
        ``local_to_slots(token_ids[:, None], request, token_ids + 1, ...)``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or range; under ``DSV4X_CHECK=1`` also
            a ``total`` that drops rows.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: the op of this name in SGLang, which goes on to slots through its own tables, reads the total back from
    the device, and gathers window_size - 1 tokens of a request without queries too.
    """
    checks.tensor("seq_lens", seq_lens, (None,), checks.INDEX_DTYPES)
    requests, device = seq_lens.shape[0], seq_lens.device
    checks.tensor("query_start_loc", query_start_loc, (requests + 1,), checks.INDEX_DTYPES, device)
    checks.integer("window_size", window_size, 1, INT32_MAX)
    checks.integer("total", total, 0, INT32_MAX)
    # Clamped, so that no garbage in 64 bits wraps below.
    queries, lengths = query_start_loc.long().diff().clamp_max(INT32_MAX), seq_lens.long().clamp(0, INT32_MAX)
    first = torch.where(queries > 0, (lengths - queries - (window_size - 1)).clamp_min(0), lengths)
    starts = torch.zeros(requests + 1, dtype=torch.int32, device=device)
    starts[1:] = (lengths - first).cumsum(0).clamp_max(INT32_MAX)
    if checks.check_values_enabled() and int(starts[-1]) > total:
        raise ValueError(f"total: got {total}, need >= {int(starts[-1])} for these lengths")
    token_ids = torch.empty(total, dtype=torch.int32, device=device)
    request = torch.empty(total, dtype=torch.int32, device=device)
    record = select(IndexProblem.on("build_swa_token_ids", device, tokens=total), kernel)
    if total:
        record.launch(device, first, starts, token_ids, request)
    return token_ids, request, starts


def local_to_slots(
    local: torch.Tensor,
    request: torch.Tensor,
    limits: torch.Tensor,
    block_table: torch.Tensor,
    page_size: int,
    pages: int,
    *,
    kernel: str | None = None,
) -> torch.Tensor:
    """Entries of each token's own request, as slots through the block table.

    Args:
        local: int32 or int64 ``[T, K]``, index space *local*; may be an expanded view (row stride 0).
        request: int32 or int64 ``[T]``, each token's request; one outside ``[0, R)`` is none.
        limits: int32 or int64 ``[T]``; a local index at or past it becomes -1.
        block_table: int32 ``[R, m]`` page numbers; what stands past a request's own pages is never used.
        page_size, pages: of the cache; a page number outside the pool gives -1.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        int32 ``[T, K]`` slots; -1 where ``local`` is negative, at or past its limit, or has no page.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or range.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    tokens, device = check_local_to_slots(local, request, limits, block_table, page_size, pages)
    out = torch.empty(local.shape, dtype=torch.int32, device=device)
    record = select(IndexProblem.on("local_to_slots", device, tokens=tokens, width=local.shape[1]), kernel)
    if out.numel():
        record.launch(device, local, request, limits, block_table, page_size, pages, out)
    return out


def check_local_to_slots(
    local: torch.Tensor,
    request: torch.Tensor,
    limits: torch.Tensor,
    block_table: torch.Tensor,
    page_size: int,
    pages: int,
) -> tuple[int, torch.device]:
    """Check what :func:`local_to_slots` is given; returns its tokens and their device."""
    tokens, device = _check_locals(local, request, limits)
    checks.tensor("block_table", block_table, (None, None), torch.int32, device)
    check_pool(page_size, pages)
    return tokens, device


def _check_locals(local: torch.Tensor, request: torch.Tensor, limits: torch.Tensor) -> tuple[int, torch.device]:
    checks.tensor("local", local, (None, None), checks.INDEX_DTYPES)
    checks.tensor("request", request, (local.shape[0],), checks.INDEX_DTYPES, local.device)
    checks.tensor("limits", limits, (local.shape[0],), checks.INDEX_DTYPES, local.device)
    return local.shape[0], local.device


def local_to_workspace_rows(
    local: torch.Tensor,
    request: torch.Tensor,
    limits: torch.Tensor,
    bases: torch.Tensor,
    *,
    kernel: str | None = None,
) -> torch.Tensor:
    """Entries of each token's own request, as rows of a workspace in which requests follow one another.

    Args:
        local: int32 or int64 ``[T, K]``, index space *local*; may be an expanded view (row stride 0).
        request: int32 or int64 ``[T]``, each token's request; one outside ``[0, R)`` is none.
        limits: int32 or int64 ``[T]``; a local index at or past it becomes -1.
        bases: int32 or int64 ``[R]``, workspace row of each request's entry 0; negative where it has no rows.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        int32 ``[T, K]`` workspace rows ``bases[request] + local``; -1 where ``local`` is negative or at or past its
        limit, where the token has no request, and past 2**31 - 1. No base is ever added to -1.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    tokens, device = _check_locals(local, request, limits)
    checks.tensor("bases", bases, (None,), checks.INDEX_DTYPES, device)
    out = torch.empty(local.shape, dtype=torch.int32, device=device)
    record = select(IndexProblem.on("local_to_workspace_rows", device, tokens=tokens, width=local.shape[1]), kernel)
    if out.numel():
        record.launch(device, local, request, limits, bases, out)
    return out


def slots_to_compact_slots(
    slots: torch.Tensor, page_map: torch.Tensor, page_size: int, *, kernel: str | None = None
) -> torch.Tensor:
    """Slots of a pool, as slots of a smaller pool that kept some of its pages.

    Args:
        slots: int32 or int64 ``[N]`` or ``[T, K]``, index space *slot*.
        page_map: int32 ``[pages]``, the compact pool's page of each page, negative where it was not kept.
        page_size: entries a page, of both pools.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        int32 slots of the compact pool, of the shape of ``slots``; -1 where the slot is outside the pool, where its
        page was not kept, and past 2**31 - 1.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or range; under ``DSV4X_CHECK=1`` also
            a slot that is neither -1 nor in the pool, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    dims = slots.dim() if isinstance(slots, torch.Tensor) else 1
    checks.tensor("slots", slots, (None, None) if dims == 2 else (None,), checks.INDEX_DTYPES)
    device = slots.device
    checks.tensor("page_map", page_map, (None,), torch.int32, device)
    checks.integer("page_size", page_size, 1, INT32_MAX)
    if checks.check_values_enabled():
        checks.index_values("slots", slots, None, page_map.shape[0] * page_size, "slot")
    out = torch.empty(slots.shape, dtype=torch.int32, device=device)
    rows, out_rows = (slots, out) if dims == 2 else (slots[None], out[None])
    record = select(
        IndexProblem.on("slots_to_compact_slots", device, tokens=rows.shape[0], width=rows.shape[1]),
        kernel,
    )
    if out.numel():
        record.launch(device, rows, page_map, page_size, out_rows)
    return out


def dense_to_ragged(
    indices: torch.Tensor,
    lens: torch.Tensor | None,
    *,
    capacity: int,
    upper: int | None = None,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense rows with holes as one flat list without them, and where each row begins in it.

    Its shapes depend on no value and nothing waits for the device, so a graph can capture it.

    Args:
        indices: int32 or int64 ``[T, K]``, any index space; an index outside ``[0, upper)`` is no entry.
        lens: int32 or int64 ``[T]`` spans, clamped to ``[0, K]``; None for K.
        capacity: entries of the result; what does not fit is dropped from the end.
        upper: entries the index space has, at most 2**31; None for 2**31.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        ``(values, indptr, count)``: int32 ``[capacity]`` entries in order, -1 past the last; int32 ``[T+1]``, row t
        being ``values[indptr[t]:indptr[t+1]]``, never past ``capacity``; int32 ``[1]``, how many entries the rows
        have: more than ``capacity`` where some were dropped.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or range; under ``DSV4X_CHECK=1`` also
            a length or an index out of range, with its row, and a ``capacity`` that drops entries.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: the ``kv_indices`` and ``kv_indptr`` of AITER's sparse attention, which trusts indptr: so it is clamped.
    """
    checks.tensor("indices", indices, (None, None), checks.INDEX_DTYPES)
    tokens, device = indices.shape[0], indices.device
    if lens is not None:
        checks.tensor("lens", lens, (tokens,), checks.INDEX_DTYPES, device)
    checks.integer("capacity", capacity, 0, INT32_MAX)
    upper = INT32_MAX + 1 if upper is None else checks.integer("upper", upper, 0, INT32_MAX + 1)
    if checks.check_values_enabled():
        checks.index_values("indices", indices, lens, upper, "index")
    values = torch.full((capacity,), -1, dtype=torch.int32, device=device)
    indptr = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    record = select(IndexProblem.on("dense_to_ragged", device, tokens=tokens, width=indices.shape[1]), kernel)
    if indices.numel():
        record.launch(device, indices, lens, upper, values, indptr, count)
    if checks.check_values_enabled() and int(count) > capacity:
        raise ValueError(f"capacity: got {capacity}, need >= {int(count)} for these rows")
    return values, indptr, count


def ragged_to_dense(
    values: torch.Tensor, indptr: torch.Tensor, width: int, *, kernel: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A flat list and where each row begins in it, as dense rows.

    Args:
        values: int32 ``[N]``, any index space; a negative one becomes -1 and keeps its place.
        indptr: int32 or int64 ``[T+1]``; row t is ``values[max(indptr[t], 0):min(indptr[t+1], N)]``, empty where that
            does not ascend, so no indptr reads past the list.
        width: of the result; longer rows are cut.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        int32 ``[T, width]`` indices, -1 padded, and int32 ``[T]`` spans.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or range; under ``DSV4X_CHECK=1`` also
            an indptr that falls or leaves ``[0, N]``, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    checks.tensor("values", values, (None,), torch.int32)
    device = values.device
    checks.tensor("indptr", indptr, (None,), checks.INDEX_DTYPES, device)
    if not indptr.shape[0]:
        raise ValueError("indptr: shape is (0,), need at least its leading 0")
    checks.integer("width", width, 0, INT32_MAX)
    tokens = indptr.shape[0] - 1
    if checks.check_values_enabled():
        checks.ascending("indptr", indptr, values.shape[0])
    indices = torch.empty(tokens, width, dtype=torch.int32, device=device)
    lens = torch.empty(tokens, dtype=torch.int32, device=device)
    record = select(IndexProblem.on("ragged_to_dense", device, tokens=tokens, width=width), kernel)
    if tokens:
        record.launch(device, values, indptr, indices, lens)
    return indices, lens
