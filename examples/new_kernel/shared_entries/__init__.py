"""A kernel of ``sparse_mla_decode`` from outside dsv4x: plain torch, for a few tokens on a CPU.

Tokens of one request share most of what they see. This kernel reads an entry once, however many tokens point at it.

A package brings three things: a function that takes a checked call, a :class:`Kernel` record that says what it cannot
do and what it is predicted to cost, and an entry point (``pyproject.toml``) whose function registers the record.
Install it beside dsv4x: ``pip install --no-deps examples/new_kernel``. ``python -m shared_entries`` checks it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import dsv4x
from dsv4x.common.core.calls import DecodeCall, Result, Scope, deliver, queries, sinks
from dsv4x.common.dispatch.problem import AttentionProblem
from dsv4x.common.dispatch.registry import Kernel, register

MOST_TOKENS = 8


def decode(call: DecodeCall) -> Result:
    """Dense attention of all tokens over every entry that some token points at."""
    q, sink = queries(call).float(), sinks(call)
    parts = [_entries(scope) for scope in (call.swa, call.extra) if scope is not None]
    kv, times = torch.cat([kv for kv, _ in parts]), torch.cat([times for _, times in parts], 1)
    # The logarithm of 0 times is -inf, which is the mask.
    scores = torch.einsum("thd,nd->thn", q, kv) * call.softmax_scale + times.log()[:, None]
    lse = scores.logsumexp(-1)
    empty = lse.isneginf()
    out = torch.einsum("thn,nd->thd", scores.softmax(-1), kv[:, :512])
    if sink is not None:
        out *= torch.sigmoid(lse - sink)[..., None]
    # A token without entries: out = 0, lse = +inf.
    out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, torch.inf)
    # Into the caller's buffer, where there is one.
    return deliver(call, out.to(call.q.dtype), lse)


def _entries(scope: Scope) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[N, D]`` entries, each once, and ``[T, N]``: how often each token points at it."""
    indices, cache = scope.indices, scope.cache
    valid = (indices >= 0) & (indices < cache.capacity)
    if scope.lens is not None:
        valid &= torch.arange(indices.shape[1]) < scope.lens[:, None]
    slots, which = indices[valid].unique(return_inverse=True)
    times = torch.zeros(len(indices), len(slots))
    times.index_put_((valid.nonzero()[:, 0], which), torch.ones(()), accumulate=True)
    return dsv4x.dequantize_k_cache_paged(cache, slots, k_scale=scope.k_scale).float(), times


def reasons(problem: AttentionProblem) -> Iterator[str]:
    """What the record's fields do not say: each limit with the value seen and the value needed."""
    if problem.tokens > MOST_TOKENS:
        yield f"{problem.tokens} tokens, need <= {MOST_TOKENS}: it multiplies every token with every entry"


def predicted_us(problem: AttentionProblem) -> float:
    """State what you measured, in microseconds: the lowest prediction runs. Here it is a number for the example."""
    return 100.0


def register_kernels() -> None:
    """Called by dsv4x, once. ``register`` looks at every field of the record and says which one is wrong."""
    register(
        Kernel(
            "sparse_mla_decode",
            "shared_entries",
            decode,
            predicted_us,
            devices=("cpu",),
            further_reasons=reasons,
        )
    )
