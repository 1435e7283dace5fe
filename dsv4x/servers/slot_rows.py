"""Attention over slot rows as a server made them, for layers that look alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..common.core import checks
from ..common.core.calls import DecodeCall, Result, Scope
from ..common.core.layouts import PagedCache
from ..common.core.model import VALUE_DIM
from ..common.dispatch import trace
from ..common.dispatch.registry import call_on, select
from ..common.ops.sparse_mla import check_cache, check_q, check_rest, problem_of, scale_of

_WHOLE_HEADS = "flash_mla"
"""The kernel that computes 64 or 128 heads whatever counts: a padded q is its own, and so is what it returns."""


class Rows(NamedTuple):
    """One cache's slot rows.

    Attributes:
        indices: int32 ``[T, any]``, index space *slot*, -1 for none.
        lens: int32 ``[T]`` scan spans.
    """

    indices: torch.Tensor
    lens: torch.Tensor

    @classmethod
    def first(cls, count: int, indices: torch.Tensor, lens: torch.Tensor, clamped: bool) -> Rows:
        """The first ``count`` rows; ``clamped`` puts lengths within 0 and the width, where they may lie outside."""
        indices, lens = indices[:count], lens[:count]
        return cls(indices, lens.clamp(0, indices.shape[1]) if clamped else lens)


MAX_PLANS = 512
"""Looks that are kept from step to step before all are forgotten; each holds a few KiB, and its lse on the device."""


class _Plan(NamedTuple):
    run: Callable[[DecodeCall], Result]
    heads: int
    allocates: bool


class SlotRows:
    """What the layers of one step share that read the same slot rows. It dies with the step.

    The first layer of a look is checked as :func:`dsv4x.sparse_mla_decode` checks and picks the kernel; others like it
    only launch, those of later steps too where they share ``plans``. Inside a captured graph it must be made there, and
    without ``plans``, since buffers and FlashMLA's schedule are the graph's.

    Args:
        swa: the window's rows.
        extra: the compressed cache's, or None.
        entries: entries a token reads on average, as far as prediction goes.
        trusted: as ``trusted_indices`` of :func:`dsv4x.sparse_mla_decode`.
        captured: whether a graph is being captured.
        kernel: the kernel's name; None picks.
        plans: what was worked out for eager calls, kept by the caller from step to step; None keeps it here.
    """

    def __init__(
        self,
        swa: Rows,
        extra: Rows | None,
        *,
        entries: int,
        trusted: bool,
        captured: bool,
        kernel: str | None = None,
        plans: dict[Any, Any] | None = None,
    ):
        self.swa, self.extra, self.entries, self.trusted, self.kernel = swa, extra, entries, trusted, kernel
        self.schedule: dict[Any, Any] = {"captured": captured}
        self._plans: dict[Any, _Plan] = {} if plans is None else plans
        self._rows = entries, trusted, kernel, *(_look(rows) for rows in (swa, extra))
        if len(self._plans) > MAX_PLANS:
            self._plans.clear()

    @property
    def tokens(self) -> int:
        return self.swa.indices.shape[0]

    def attend(
        self,
        q: torch.Tensor,
        caches: tuple[PagedCache, PagedCache | None],
        attn_sink: torch.Tensor | None,
        softmax_scale: float,
        heads: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """bf16 ``[T, q's heads, 512]``, of which the first ``heads`` are attention and the others anything.

        Rows of q that the server has none for are padding, whose result nobody reads: zeros.

        Args:
            q: bf16 ``[T, >= heads, 512]``, longer without ``out``; heads past ``heads`` may hold anything.
            caches: the layer's window cache and its compressed one.
            attn_sink: float32 ``[>= heads]`` or None.
            softmax_scale: finite and > 0.
            heads: query heads that count.
            out: where to write, of q's shape; None allocates.

        Raises:
            TypeError, ValueError, KernelNotSupported, BackendUnavailable: as :func:`dsv4x.sparse_mla_decode`.
        """
        if out is None and q.shape[0] > self.tokens:
            padded = torch.zeros_like(q)
            self.attend(q[: self.tokens], caches, attn_sink, softmax_scale, heads, padded[: self.tokens])
            return padded
        swa_cache, extra_cache = caches
        look = (
            q.shape, q.stride(), swa_cache.spec, None if extra_cache is None else extra_cache.spec,
            None if attn_sink is None else attn_sink.shape, softmax_scale, heads, None if out is None else out.stride(),
            self._rows,
        )  # fmt: skip
        plan = self._plans.get(look)
        extra = None
        if self.extra is not None:
            assert extra_cache is not None
            extra = Scope(extra_cache, *self.extra)
        made = out
        if made is None and (plan is None or plan.allocates):
            made = torch.empty_like(q, memory_format=torch.contiguous_format)
        call = DecodeCall(
            q, Scope(swa_cache, *self.swa), extra, attn_sink, softmax_scale, made,
            heads if plan is None else plan.heads, False, entries=self.entries, trusted=self.trusted,
            schedule=self.schedule,
        )  # fmt: skip
        if plan is None:
            plan = self._plans[look] = self._plan(call, given=out is not None)
            call = call._replace(heads=plan.heads, out=made if plan.allocates or out is not None else None)
        values, _ = call_on(q.device, plan.run, call)
        return values

    def _plan(self, call: DecodeCall, given: bool) -> _Plan:
        q, tokens = call.q, self.tokens
        checks.tensor("q", q, (tokens, None, VALUE_DIM), torch.bfloat16)
        check_q(q, call.heads)
        for name, scope in (("swa", call.swa), ("extra", call.extra)):
            if scope is not None:
                check_cache(f"{name}_cache", scope.cache, q.device, VALUE_DIM)
                checks.tensor(f"{name}_indices", scope.indices, (tokens, None), torch.int32, q.device)
                checks.tensor(f"{name}_lens", scope.lens, (tokens,), torch.int32, q.device)
        check_rest(q, call.attn_sink, call.out, call.heads)
        scale_of(call.softmax_scale, VALUE_DIM)
        record = select(problem_of(call), self.kernel)
        sinks = q.shape[1] if call.attn_sink is None else call.attn_sink.shape[0]
        whole = record.name == _WHOLE_HEADS and q.shape[1] in (64, 128) and sinks == q.shape[1]
        if whole:
            # What it makes of the other heads is as good as what a server's own call makes of them: nobody reads it.
            call = call._replace(heads=q.shape[1], out=call.out if given else None)
        run = record.run
        if record.prepare is not None:
            run = trace.ranged(f"{record.op}/{record.name}", record.prepare(call))
        return _Plan(run, call.heads, not whole)


def _look(rows: Rows | None) -> Any:
    """All that a plan looks at in a cache's rows."""
    if rows is None:
        return None
    return rows.indices.shape, rows.indices.stride(), rows.indices.dtype, rows.lens.dtype, rows.lens.stride()
