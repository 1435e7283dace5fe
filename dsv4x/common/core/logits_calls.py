"""The logits ops' calls as records: what an op checked, handed to a kernel as one argument."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .layouts import PagedCache


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

    def part(self, requests: slice) -> PagedLogitsCall:
        """The same for some of the requests, without a schedule, which is the whole batch's."""
        next_n = self.q.shape[1]
        rows = slice(requests.start * next_n, requests.stop * next_n)
        return self._replace(
            q=self.q[requests],
            q_scale=None if self.q_scale is None else self.q_scale[requests],
            weights=self.weights[rows],
            context_lens=self.context_lens[requests],
            block_table=self.block_table[requests],
            schedule=None,
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
