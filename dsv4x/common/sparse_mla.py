"""The two attention ops: decode over paged fp8 caches in place, prefill over gathered bf16 rows."""

from __future__ import annotations

from typing import Any

import torch

from . import checks, layouts
from .layouts import PagedCache
from .registry import Problem, select

HEAD_DIM = 512
MAX_HEADS = 128


def sparse_mla_decode(
    q: torch.Tensor,
    swa_cache: PagedCache,
    swa_indices: torch.Tensor,
    swa_lens: torch.Tensor | None,
    extra_cache: PagedCache | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_lens: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    out: torch.Tensor | None = None,
    kernel: str | None = None,
    *,
    trusted_indices: bool = False,
    schedule: dict[Any, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over a token's window entries and its extra (compressed) entries, fp8 pages read in place.

    With s = q . k * softmax_scale over the valid entries: lse = logsumexp(s), natural log, sink excluded;
    out = softmax(s) @ k / (1 + exp(sink - lse)). The value is all 512 values of K. A token without valid entries gets
    out = 0 and lse = +inf. An index below 0 or past its cache is no entry, wherever it stands in its row.

    Args:
        q: bf16 ``[T, H, 512]``, T >= 0, H in 1..128, any strides with the last 1.
        swa_cache: the window's :class:`~dsv4x.PagedCache`, layout DSv4.
        swa_indices: int32 (or int64) ``[T, any]``, index space *slot* of ``swa_cache``, -1 for none.
        swa_lens: int32 (or int64) ``[T]`` scan spans, clamped to the width; None means the whole width.
        extra_cache, extra_indices, extra_lens: the same for the compressed cache; all None without one.
        attn_sink: float32 ``[H]`` or None; -inf has no effect, +inf makes out 0.
        softmax_scale: finite and > 0; None means 512 ** -0.5.
        out: bf16 ``[T, H, 512]``, any strides with the last 1; None allocates a contiguous one.
        kernel: ``"flash_mla"``, ``"triton"``, ``"aiter"`` or ``"reference"``, which runs or raises; None picks.
        trusted_indices: the caller vouches that lengths lie in ``[0, width]`` and that every index within them is -1
            or in range, which spares kernels that would fault on others (FlashMLA) a pass over the indices.
        schedule: a dict that lives as long as these lengths do, in which a kernel keeps what depends on lengths and
            shapes alone; :class:`~dsv4x.AttentionMetadata` owns one. None: nothing is kept.

    Returns:
        ``(out, lse)``: bf16 ``[T, H, 512]`` and float32 ``[T, H]``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or layout; under ``DSV4X_CHECK=1``
            also an index outside its cache, a length past its row, or a NaN in q, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: semantics of FlashMLA's ``flash_mla_with_kvcache`` (tests/ref.py) with two scopes.
    """
    check_values = checks.check_values_enabled()
    tokens = _check_q(q)
    scopes: list[tuple[str, Any, Any, torch.Tensor | None]] = [("swa", swa_cache, swa_indices, swa_lens)]
    if extra_cache is not None or extra_indices is not None:
        scopes.append(("extra", extra_cache, extra_indices, extra_lens))
    elif extra_lens is not None:
        raise ValueError("extra_lens: given, need extra_cache and extra_indices with it")
    for scope, cache, indices, lens in scopes:
        cache = check_cache(f"{scope}_cache", cache, q.device)
        checks.tensor(f"{scope}_indices", indices, (tokens, None), checks.INDEX_DTYPES, q.device)
        if lens is not None:
            checks.tensor(f"{scope}_lens", lens, (tokens,), checks.INDEX_DTYPES, q.device)
        if check_values:
            checks.index_values(f"{scope}_indices", indices, lens, cache.capacity, "slot")
    if check_values:
        checks.finite_rows("q", q, [lens for *_, lens in scopes])
    out = _check_rest(q, attn_sink, out)
    problem = Problem.on(
        "sparse_mla_decode",
        q.device,
        tokens=tokens,
        heads=q.shape[1],
        width=swa_indices.shape[1],
        extra_width=extra_indices.shape[1] if extra_indices is not None else 0,
        caches=tuple(cache.spec for _, cache, _, _ in scopes),
    )
    scale = _scale(softmax_scale)
    record = select(problem, kernel)
    if tokens == 0:
        return _empty(q, out)
    return record.launch(
        q.device,
        q,
        swa_cache,
        swa_indices,
        swa_lens,
        extra_cache,
        extra_indices,
        extra_lens,
        attn_sink,
        scale,
        out,
        trusted_indices=trusted_indices,
        schedule=schedule,
    )


def sparse_mla_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lens: torch.Tensor | None,
    attn_sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    out: torch.Tensor | None = None,
    kernel: str | None = None,
    *,
    trusted_indices: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over a token's rows of a bf16 workspace; out, lse and sink as in :func:`sparse_mla_decode`.

    Args:
        q: bf16 ``[T, H, 512]``, T >= 0, H in 1..128, any strides with the last 1.
        kv: bf16 ``[S, 512]``, rows contiguous; a row nothing points at may hold anything.
        indices: int32 (or int64) ``[T, any]``, index space *workspace row*, -1 (or anything outside 0..S-1) for none.
        lens: int32 (or int64) ``[T]`` scan spans, clamped to the width; None means the whole width.
        attn_sink: float32 ``[H]`` or None.
        softmax_scale: finite and > 0; None means 512 ** -0.5.
        out: bf16 ``[T, H, 512]``, any strides with the last 1; None allocates a contiguous one.
        kernel: ``"flash_mla"``, ``"triton"``, ``"aiter"`` or ``"reference"``, which runs or raises; None picks.
        trusted_indices: the caller vouches that lengths lie in ``[0, width]`` and no index past a span points at a NaN.

    Returns:
        ``(out, lse)``: bf16 ``[T, H, 512]`` and float32 ``[T, H]``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device; under ``DSV4X_CHECK=1`` also a row
            outside the workspace, a length past its row, or a NaN in q, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: semantics of FlashMLA's ``flash_mla_sparse_fwd`` (tests/ref.py).
    """
    check_values = checks.check_values_enabled()
    tokens = _check_q(q)
    checks.tensor("kv", kv, (None, HEAD_DIM), torch.bfloat16, q.device)
    checks.tensor("indices", indices, (tokens, None), checks.INDEX_DTYPES, q.device)
    if lens is not None:
        checks.tensor("lens", lens, (tokens,), checks.INDEX_DTYPES, q.device)
    if check_values:
        checks.index_values("indices", indices, lens, kv.shape[0], "workspace row")
        checks.finite_rows("q", q, [lens])
    out = _check_rest(q, attn_sink, out)
    problem = Problem.on(
        "sparse_mla_prefill",
        q.device,
        tokens=tokens,
        heads=q.shape[1],
        width=indices.shape[1],
        rows=kv.shape[0],
    )
    scale = _scale(softmax_scale)
    record = select(problem, kernel)
    if tokens == 0:
        return _empty(q, out)
    return record.launch(
        q.device,
        q,
        kv,
        indices,
        lens,
        attn_sink,
        scale,
        out,
        trusted_indices=trusted_indices,
    )


def check_cache(name: str, value: object, device: torch.device) -> PagedCache:
    """A cache that attention reads: on ``device``, of a layout that has kernels."""
    cache = checks.cache(name, value, device)
    if cache.layout.name != layouts.DSV4.name:
        raise ValueError(f"{name}: layout is {cache.layout.name}, need {layouts.DSV4.name}")
    return cache


def _check_q(q: torch.Tensor) -> int:
    checks.tensor("q", q, (None, None, HEAD_DIM), torch.bfloat16)
    if not 1 <= q.shape[1] <= MAX_HEADS:
        raise ValueError(f"q: {q.shape[1]} heads, need 1 to {MAX_HEADS}")
    return q.shape[0]


def _check_rest(q: torch.Tensor, attn_sink: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor | None:
    if attn_sink is not None:
        checks.tensor("attn_sink", attn_sink, (q.shape[1],), torch.float32, q.device)
    if out is not None:
        checks.tensor("out", out, tuple(q.shape), torch.bfloat16, q.device)
    return out


def _scale(softmax_scale: object) -> float:
    if softmax_scale is None:
        return HEAD_DIM**-0.5
    if not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale: got {type(softmax_scale).__name__}, need a float or None")
    # FlashMLA takes the maximum before it scales, which only a positive scale allows.
    if not 0 < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale: got {softmax_scale}, need a finite number > 0")
    return float(softmax_scale)


def _empty(q: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.empty(0, q.shape[1], dtype=torch.float32, device=q.device)
    return torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out, lse
