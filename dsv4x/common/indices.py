"""Index spaces and the remaps between them. -1 is no entry in every space and stays -1 through every remap.

- *local*: an entry's number inside its request's sequence (raw tokens) or compressed sequence.
- *slot*: page * page_size + offset, the page taken from the request's block table.
- *workspace row*: a row of a gathered bf16 workspace.

Lengths are scan spans: how far into a row a kernel looks, holes included.
"""

from __future__ import annotations

import torch

from . import checks, reference
from .registry import Problem, select

ROW_ALIGNMENT = 128
"""Widths of combined rows are multiples of this: FlashMLA's prefill kernel needs it on SM90."""


def combined_topk_width(topk: int, window_size: int) -> int:
    """Width of a row of :func:`combine_topk_swa_indices`: ``topk + window_size`` rounded up to 128."""
    checks.integer("topk", topk, 0)
    checks.integer("window_size", window_size, 0)
    return -(-(topk + window_size) // ROW_ALIGNMENT) * ROW_ALIGNMENT


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

    A query at position p sees ``span = min((p+1) // compress_ratio, topk, K)`` leading entries of its top-k row and
    the ``min(p+1, window_size)`` raw tokens up to its own. Holes keep their place. A local index that its query may
    not see (negative, or >= (p+1) // compress_ratio) becomes -1, as does a window token that was not gathered.

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
        row_slots: int32 ``[S]``, the slot each workspace row was gathered from; an index of a row whose slot is -1, and
            of a row past S, becomes -1. None: every row is there.
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

    Source: the op of this name in vLLM, with bases as arguments and holes kept.
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
        for name, value in zip(("positions[0]", "positions[1]"), positions):
            checks.tensor(name, value, (tokens,), torch.int32, device)
    checks.integer("compress_ratio", compress_ratio, 1)
    width = combined_topk_width(topk, window_size)
    if out_indices is None:
        out_indices = torch.empty(tokens, width, dtype=torch.int32, device=device)
    else:
        checks.tensor("out_indices", out_indices, (tokens, None), torch.int32, device)
        if out_indices.shape[1] < width or out_indices.shape[1] % ROW_ALIGNMENT:
            raise ValueError(
                f"out_indices: width is {out_indices.shape[1]}, need a multiple of {ROW_ALIGNMENT} >= {width}"
            )
    if out_lens is None:
        out_lens = torch.empty(tokens, dtype=torch.int32, device=device)
    else:
        checks.tensor("out_lens", out_lens, (tokens,), torch.int32, device)
    if checks.check_values_enabled():
        _, position = positions or reference.token_positions(query_start_loc, seq_lens, tokens)
        visible = (position + 1) // compress_ratio
        span = visible.clamp_max(min(topk, topk_indices.shape[1]))
        checks.index_values("topk_indices", topk_indices, span, visible, "local entry")
    record = select(Problem.on("combine_topk_swa_indices", device, tokens=tokens, width=width), kernel)
    if tokens:
        record.launch(
            device, topk_indices, query_start_loc, seq_lens, gather_lens, compressed_base, swa_base,
            window_size, compress_ratio, topk, row_slots, positions, out_indices, out_lens,
        )  # fmt: skip
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

    Args:
        query_start_loc: int ``[R+1]``.
        seq_lens: int ``[R]``, raw tokens of each request, its queries included.
        block_table: int32 ``[R, m]`` page numbers; what stands past a request's own pages is never used.
        page_size, pages: of the window's cache; a page number outside the pool gives -1.
        window_size: raw tokens a query sees, its own included.
        tokens: T; tokens past the last request's have span 0.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        int32 ``[T, window_size]`` slots, -1 padded, and int32 ``[T]`` spans.
    """
    device = seq_lens.device
    out_indices = torch.empty(tokens, window_size, dtype=torch.int32, device=device)
    out_lens = torch.empty(tokens, dtype=torch.int32, device=device)
    record = select(Problem.on("window_slots", device, tokens=tokens, width=window_size), kernel)
    if tokens:
        record.launch(device, query_start_loc, seq_lens, block_table, page_size, pages, out_indices, out_lens)
    return out_indices, out_lens


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
        local: int32 ``[T, K]``, index space *local*; may be an expanded view (row stride 0).
        request: int32 ``[T]``, each token's request, -1 for none.
        limits: int32 ``[T]``; a local index at or past it becomes -1.
        block_table: int32 ``[R, m]`` page numbers; what stands past a request's own pages is never used.
        page_size, pages: of the cache; a page number outside the pool gives -1.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        int32 ``[T, K]`` slots; -1 where ``local`` is -1, at or past its limit, or has no page.
    """
    out = torch.empty(local.shape, dtype=torch.int32, device=local.device)
    record = select(Problem.on("local_to_slots", local.device, tokens=local.shape[0], width=local.shape[1]), kernel)
    if out.numel():
        record.launch(local.device, local, request, limits, block_table, page_size, pages, out)
    return out
