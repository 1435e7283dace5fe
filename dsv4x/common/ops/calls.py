"""The attention ops' calls as records: what an op checked, handed to a kernel as one argument."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..core.layouts import PagedCache


class Scope(NamedTuple):
    """The entries of one cache that each token attends to.

    Attributes:
        cache: the pages.
        indices: int32 or int64 ``[T, any]``, index space *slot* of ``cache`` (or *local*, where the call says so); an
            index below 0 or past the cache is no entry.
        lens: int32 or int64 ``[T]`` scan spans, clamped to the width; None means the whole width.
        k_scale: the tensor scale the cache was stored with.
    """

    cache: PagedCache
    indices: torch.Tensor
    lens: torch.Tensor | None
    k_scale: float = 1.0


class Local(NamedTuple):
    """What makes slots of local entries.

    Attributes:
        request: int32 ``[T]``, each token's request; one outside ``[0, R)`` is none.
        visible: int32 ``[T]``, compressed entries a token may see; a local index at or past it is no entry.
        block_table: int32 ``[R, m]`` page numbers.
        pages: pages in the pool; a page number outside is no page.
    """

    request: torch.Tensor
    visible: torch.Tensor
    block_table: torch.Tensor
    pages: int


class DecodeCall(NamedTuple):
    """One call of ``sparse_mla_decode``, checked.

    Attributes:
        q: bf16 ``[T, >= heads, D]``; heads past ``heads`` may hold anything.
        swa, extra: the window's entries, and the compressed ones where there are any.
        attn_sink: float32 ``[heads]`` or None.
        softmax_scale: finite and > 0.
        out: bf16 ``[T, >= heads, 512]`` whose first ``heads`` are to be written and whose others must not be; None: the
            kernel allocates ``[T, heads, 512]``.
        heads: query heads that count.
        lse: whether the lse is wanted.
        local: what makes slots of the extra indices, which are then local entries; None where they are slots.
        split_k: parts each row's entries are split into; None lets the kernel decide.
        entries: entries a token reads on average, 0 where nobody knows; never the width of a row.
        trusted: whether lengths lie in ``[0, width]`` and every index within them is -1 or in range.
        schedule: where a kernel keeps what depends on lengths and shapes alone; None keeps nothing.
    """

    q: torch.Tensor
    swa: Scope
    extra: Scope | None
    attn_sink: torch.Tensor | None
    softmax_scale: float
    out: torch.Tensor | None
    heads: int
    lse: bool = True
    local: Local | None = None
    split_k: int | None = None
    entries: int = 0
    trusted: bool = False
    schedule: dict[Any, Any] | None = None


class PrefillCall(NamedTuple):
    """One call of ``sparse_mla_prefill``, checked.

    Attributes:
        q, attn_sink, softmax_scale, out, heads, lse, trusted: as in :class:`DecodeCall`.
        kv: bf16 ``[S, D]``.
        indices: int32 or int64 ``[T, any]``, index space *workspace row*; one outside ``[0, S)`` is no entry.
        lens: int32 or int64 ``[T]`` scan spans, clamped to the width; None means the whole width.
    """

    q: torch.Tensor
    kv: torch.Tensor
    indices: torch.Tensor
    lens: torch.Tensor | None
    attn_sink: torch.Tensor | None
    softmax_scale: float
    out: torch.Tensor | None
    heads: int
    lse: bool = True
    trusted: bool = False


Result = tuple[torch.Tensor, torch.Tensor | None]
"""``(out, lse)``: bf16 ``[T, heads (or as wide as the call's out), 512]``; float32 ``[T, heads]``, or None."""
