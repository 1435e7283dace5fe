"""The attention ops' calls as records: what an op checked, handed to a kernel as one argument.

They stand in ``core`` because the launchers in ``kernels`` take them, as do the vendors' wrappers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from .layouts import PagedCache
from .model import VALUE_DIM


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

    def part(self, rows: slice) -> Scope:
        """The same for some of the tokens."""
        return self._replace(indices=self.indices[rows], lens=None if self.lens is None else self.lens[rows])


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

    def part(self, rows: slice) -> Local:
        """The same for some of the tokens."""
        return self._replace(request=self.request[rows], visible=self.visible[rows])


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
        workspace: uint8 ``[bytes]``, contiguous, on 16 bytes: where a kernel that can keeps its partial outputs; None:
            it allocates them.
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
    workspace: torch.Tensor | None = None

    def part(self, rows: slice) -> DecodeCall:
        """The same for some of the tokens; the schedule, which depends on them, is left out."""
        return self._replace(
            q=self.q[rows],
            swa=self.swa.part(rows),
            extra=None if self.extra is None else self.extra.part(rows),
            out=None if self.out is None else self.out[rows],
            local=None if self.local is None else self.local.part(rows),
            schedule=None,
        )


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

    def part(self, rows: slice) -> PrefillCall:
        """The same for some of the tokens."""
        return self._replace(
            q=self.q[rows],
            indices=self.indices[rows],
            lens=None if self.lens is None else self.lens[rows],
            out=None if self.out is None else self.out[rows],
        )


AttentionCall = DecodeCall | PrefillCall
Call = TypeVar("Call", DecodeCall, PrefillCall)

Result = tuple[torch.Tensor, torch.Tensor | None]
"""``(out, lse)``: bf16 ``[T, heads (or as wide as the call's out), 512]``; float32 ``[T, heads]``, or None."""


def queries(call: AttentionCall) -> torch.Tensor:
    """bf16 ``[T, heads, D]``: the heads of q that count."""
    return call.q if call.q.shape[1] == call.heads else call.q[:, : call.heads]


def sinks(call: AttentionCall) -> torch.Tensor | None:
    """float32 ``[heads]``, the sinks of the heads that count, or None."""
    sink = call.attn_sink
    return sink if sink is None or sink.shape[0] == call.heads else sink[: call.heads]


def output(call: AttentionCall) -> torch.Tensor:
    """The call's own buffer, or a new one for the heads that count."""
    if call.out is not None:
        return call.out
    return torch.empty(call.q.shape[0], call.heads, VALUE_DIM, dtype=call.q.dtype, device=call.q.device)


def deliver(call: AttentionCall, values: torch.Tensor, lse: torch.Tensor | None) -> Result:
    """What a kernel made of ``heads`` heads or more, in the call's buffer or contiguous; lse is contiguous."""
    if values.shape[1] != call.heads:
        values = values[:, : call.heads]
    if lse is not None:
        lse = (lse if lse.shape[1] == call.heads else lse[:, : call.heads]).contiguous()
    if call.out is None:
        return values.contiguous(), lse
    into = call.out if call.out.shape[1] == call.heads else call.out[:, : call.heads]
    if values.data_ptr() != into.data_ptr():
        into.copy_(values)
    return call.out, lse


def in_parts(call: Call, step: int, run: Callable[[Call, int], Result]) -> Result:
    """``run(part, its first token)`` over at most ``step`` tokens at a time, into one output."""
    tokens = call.q.shape[0]
    call = call._replace(out=output(call))
    assert call.out is not None
    lse = torch.empty(tokens, call.heads, dtype=torch.float32, device=call.q.device) if call.lse else None
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        _, made = run(call.part(rows), start)
        if lse is not None and made is not None:
            lse[rows] = made
    return call.out, lse
