"""The logits ops' calls as records: what an op checked, handed to a kernel as one argument."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .layouts import PagedCache
from .spaces import TopkMethod


class PagedRows(NamedTuple):
    """Which entries the rows of paged logits score: all that a kernel plans a step's calls from.

    Attributes:
        context_lens: int32 or int64 ``[B, n]``, entries of each row; any value, to be clamped.
        block_table: int32 ``[R, m]`` page numbers; any value, and one outside the pool is no page.
        requests: int32 or int64 ``[B]``, each row's row of the block table, where n is 1; one outside ``[0, R)`` has no
            entries. None: row b of the lengths is request b, and R is B.
        page_size: entries a page.
        most: entries that a row has at most, whatever its length says.
        q_encoding, k_encoding: ``"e4m3fn"``, ``"e4m3fnuz"`` or ``"e2m1"``, of K also ``"mxfp8"``.
        unscored: a request whose rows have no more entries than this needs no logits.
    """

    context_lens: torch.Tensor
    block_table: torch.Tensor
    requests: torch.Tensor | None
    page_size: int
    most: int
    q_encoding: str
    k_encoding: str
    unscored: int = 0


_ENCODINGS = {torch.float8_e4m3fn: "e4m3fn", torch.float8_e4m3fnuz: "e4m3fnuz"}


def encoding_of(x: torch.Tensor) -> str:
    """The encoding of an operand's values: of fp8, or of packed e2m1."""
    return _ENCODINGS.get(x.dtype, "e2m1")


class PagedLogitsCall(NamedTuple):
    """One call of ``paged_mqa_logits``, whose arguments these are, checked.

    Attributes:
        q: e4m3fn or e4m3fnuz ``[B, n, H, 128]``, or packed e2m1, uint8 ``[B, n, H, 64]``; B, n > 0.
        q_scale: uint8 ue8m0 ``[B, n, H, 4]`` of an e2m1 q, or None.
        cache: the pages of K.
        weights: float32 ``[B * n, H]``.
        context_lens: int32 or int64 ``[B, n]``, entries of each row; any value, to be clamped.
        block_table: int32 ``[B, m]`` page numbers; any value, and one outside the pool is no page.
        max_context_len: columns of the result, > 0.
        schedule: int32 ``[num_sms + 1, 2]`` that vouches for the lengths, or None.
        requests: as in :class:`PagedRows`; B is then the number of rows, n is 1, and the block table ``[R, m]``.
        plan: what the kernel's own ``plan`` made of these rows, or None.
        unscored: as in :class:`PagedRows`; 0 with clean logits.
        out: float32 ``[B * n, max_context_len]``, rows contiguous, or None.
        clean_logits: whether columns outside a row's entries have to be -inf, and NaN too.
    """

    q: torch.Tensor
    q_scale: torch.Tensor | None
    cache: PagedCache
    weights: torch.Tensor
    context_lens: torch.Tensor
    block_table: torch.Tensor
    max_context_len: int
    schedule: torch.Tensor | None = None
    out: torch.Tensor | None = None
    clean_logits: bool = True
    requests: torch.Tensor | None = None
    plan: Any = None
    unscored: int = 0

    @property
    def rows(self) -> PagedRows:
        """What a plan of this call is made from."""
        most = min(self.max_context_len, self.block_table.shape[1] * self.cache.page_size)
        return PagedRows(
            self.context_lens, self.block_table, self.requests, self.cache.page_size, most, encoding_of(self.q),
            self.cache.layout.operand_encoding, self.unscored,
        )  # fmt: skip

    def part(self, requests: slice) -> PagedLogitsCall:
        """The same for some of the requests, without a schedule or plan, which are the whole batch's."""
        next_n = self.q.shape[1]
        rows = slice(requests.start * next_n, requests.stop * next_n)
        return self._replace(
            q=self.q[requests],
            q_scale=None if self.q_scale is None else self.q_scale[requests],
            weights=self.weights[rows],
            context_lens=self.context_lens[requests],
            block_table=self.block_table if self.requests is not None else self.block_table[requests],
            requests=None if self.requests is None else self.requests[requests],
            schedule=None,
            plan=None,
            out=None if self.out is None else self.out[rows],
        )


class FlatLogitsCall(NamedTuple):
    """One call of ``mqa_logits``, whose arguments these are, checked.

    Attributes:
        q: e4m3fn or e4m3fnuz ``[M, H, 128]``, or packed e2m1, uint8 ``[M, H, 64]``; M > 0.
        q_scale: uint8 ue8m0 ``[M, H, 4]`` of an e2m1 q, or None.
        k: e4m3fn or e4m3fnuz ``[N, 128]``, or packed e2m1, uint8 ``[N, 64]``; rows back to back, N > 0.
        k_scale: float32 ``[N]``, or of an e2m1 or MXFP8 K uint8 ue8m0 ``[N, 4]``.
        weights: float32 ``[M, H]``.
        ks, ke: int32 or int64 ``[M]``, where each row's entries begin and end; any value, to be clamped.
        max_seqlen_k: columns of the result, counted from each row's ks; None: one an entry.
        out: float32 ``[M, N]`` or ``[M, max_seqlen_k]``, rows contiguous, or None.
        clean_logits: as in :class:`PagedLogitsCall`.
    """

    q: torch.Tensor
    q_scale: torch.Tensor | None
    k: torch.Tensor
    k_scale: torch.Tensor
    weights: torch.Tensor
    ks: torch.Tensor
    ke: torch.Tensor
    max_seqlen_k: int | None = None
    out: torch.Tensor | None = None
    clean_logits: bool = True


class SelectionCall(NamedTuple):
    """One call of ``topk_transform``, whose arguments these are, checked.

    Attributes:
        logits: float32 ``[rows, N]``, rows contiguous; rows > 0.
        lengths: int32 or int64 ``[rows]``, entries of each row; any value, to be clamped. None for all columns.
        k: indices a row.
        method: the index space of ``out``.
        row_starts: int32 or int64 ``[rows]``, the column of each row's entry 0; any value, to be clamped. None for 0.
        space: what makes indices of that space of local ones, by the op's argument names; empty for LOCAL.
        out: int32 ``[rows, k]``, rows contiguous, -1 for none.
        out_local: int32 ``[rows, k]``, rows contiguous, for the same selection in the local space, or None.
    """

    logits: torch.Tensor
    lengths: torch.Tensor | None
    k: int
    method: TopkMethod
    row_starts: torch.Tensor | None
    space: dict[str, Any]
    out: torch.Tensor
    out_local: torch.Tensor | None = None
