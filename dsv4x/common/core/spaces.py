"""Index spaces: what an index counts, how large it may be, and which request and position a query token is of."""

from __future__ import annotations

import enum

import torch

from . import checks

INT32_MAX = 2**31 - 1


class TopkMethod(enum.Enum):
    """The index space of a selection."""

    LOCAL = 0
    """An entry's number inside its request's compressed sequence."""
    RAGGED = 1
    """A row of a workspace in which requests follow one another: local + the row's base."""
    PAGED = 2
    """A slot: page * page_size + offset, the page from the request's block table."""


def check_pool(page_size: object, pages: object, prefix: str = "") -> None:
    """Check the size of a pool whose slots are int32; ``prefix`` stands before its arguments' names."""
    page_size = checks.integer(f"{prefix}page_size", page_size, 1)
    pages = checks.integer(f"{prefix}pages", pages, 0)
    if page_size * pages > INT32_MAX + 1:
        raise ValueError(f"{prefix}pages: {pages} of {page_size} entries, need <= 2**31 entries: slots are int32")


def token_positions(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Request and position of each of ``tokens`` query tokens, int64 ``[T]``; (-1, -1) past the last request's.

    Token 0 is the one at ``query_start_loc[0]``.
    """
    starts = query_start_loc.long() - query_start_loc[0].long()
    token = torch.arange(tokens, dtype=torch.int64, device=starts.device)
    request = torch.searchsorted(starts[1:].contiguous(), token, right=True)
    live = request < seq_lens.numel()
    at = request.clamp_max(max(seq_lens.numel() - 1, 0))
    if seq_lens.numel() == 0:
        return torch.full_like(token, -1), torch.full_like(token, -1)
    position = seq_lens.long()[at] - starts[at + 1] + token
    live &= position >= 0
    return torch.where(live, request, -1), torch.where(live, position, -1)
