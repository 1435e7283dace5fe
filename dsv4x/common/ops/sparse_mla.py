"""The two attention ops: decode over paged caches in place, prefill over gathered bf16 rows."""

from __future__ import annotations

from typing import Any

import torch

from ..core import checks
from ..core.layouts import PagedCache
from ..core.model import HEAD_DIMS, MAX_HEADS, VALUE_DIM
from ..dispatch.registry import Kernel, Problem, call_on, select
from ..kernels.limits import MAX_SPLITS


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
    swa_k_scale: float = 1.0,
    extra_k_scale: float = 1.0,
    return_lse: bool = True,
    split_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One softmax over a token's window entries and its extra (compressed) entries, pages read in place.

    With s = q . k * softmax_scale over the valid entries: lse = logsumexp(s), natural log, sink excluded;
    out = softmax(s) @ v / (1 + exp(sink - lse)), v the first 512 values of k. A token without valid entries gets
    out = 0 and lse = +inf. An index below 0 or past its cache is no entry, wherever it stands in its row.

    DeepSeek-V3.2 has one cache: give it as ``swa_cache``, its top-k slots as ``swa_indices``, and q of 576.

    Args:
        q: bf16 ``[T, H, D]``, D 512 (V4) or 576 (V3.2), T >= 0, H in 1..128, any strides with the last 1.
        swa_cache: the window's :class:`~dsv4x.PagedCache`, any layout of head dim D; kernels differ in those they read.
        swa_indices: int32 (or int64) ``[T, any]``, index space *slot* of ``swa_cache``, -1 for none.
        swa_lens: int32 (or int64) ``[T]`` scan spans, clamped to the width; None means the whole width.
        extra_cache, extra_indices, extra_lens: the same for the compressed cache, whose layout may be another; all None
            without one.
        attn_sink: float32 ``[H]`` or None; -inf has no effect, +inf makes out 0.
        softmax_scale: finite and > 0; None means 512 ** -0.5, and is refused for D = 576, whose model scales by
            192 ** -0.5 times its YaRN factor.
        out: bf16 ``[T, H, 512]``, any strides with the last 1; None allocates a contiguous one.
        kernel: ``"flash_mla"``, ``"gluon"``, ``"flashinfer"``, ``"triton"``, ``"aiter"`` or ``"reference"``, which
            runs or raises; None picks.
        trusted_indices: the caller vouches that lengths lie in ``[0, width]`` and that every index within them is -1
            or in range, which spares kernels that would fault on others (FlashMLA) a pass over the indices.
        schedule: a dict that lives as long as these lengths do, in which a kernel keeps what depends on lengths and
            shapes alone; :class:`~dsv4x.AttentionMetadata` owns one. None: nothing is kept. While a graph is captured
            only one that belongs to that capture alone is used, which says so as ``{"captured": True}``.
        swa_k_scale, extra_k_scale: the tensor scale a cache was stored with, finite and > 0; other than 1 only where
            its layout stores no scales (trtllm-native, uniform fp8).
        return_lse: whether the lse is wanted. Not all of AITER's kernels make one.
        split_k: batch-invariant mode: into how many parts, 1 to 128, each row's entries are split, whatever else is in
            the batch; equal rows then give equal bits. None lets the kernel decide from the shapes. Partial outputs
            take ``T * H * split_k * 2`` KiB above 1; under None at most about 132 MiB on 132 multiprocessors.

    Returns:
        ``(out, lse)``: bf16 ``[T, H, 512]`` and float32 ``[T, H]``, or None for lse under ``return_lse=False``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or layout; under ``DSV4X_CHECK=1``
            also an index outside its cache, a length past its row, or a NaN in q, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: semantics of FlashMLA's ``flash_mla_with_kvcache`` (tests/ref.py) with two scopes.
    """
    check_values = checks.check_values_enabled()
    tokens = _check_q(q)
    if split_k is not None:
        checks.integer("split_k", split_k, 1, MAX_SPLITS)
    scopes: list[tuple[str, Any, Any, torch.Tensor | None]] = [("swa", swa_cache, swa_indices, swa_lens)]
    if extra_cache is not None or extra_indices is not None:
        scopes.append(("extra", extra_cache, extra_indices, extra_lens))
    elif extra_lens is not None:
        raise ValueError("extra_lens: given, need extra_cache and extra_indices with it")
    k_scales = {"swa": swa_k_scale, "extra": extra_k_scale}
    for scope, cache, indices, lens in scopes:
        cache = check_cache(f"{scope}_cache", cache, q.device, q.shape[2])
        k_scales[scope] = checks.k_scale(f"{scope}_k_scale", k_scales[scope], cache)
        checks.tensor(f"{scope}_indices", indices, (tokens, None), checks.INDEX_DTYPES, q.device)
        if lens is not None:
            checks.tensor(f"{scope}_lens", lens, (tokens,), checks.INDEX_DTYPES, q.device)
        if check_values:
            checks.index_values(f"{scope}_indices", indices, lens, cache.capacity, "slot")
    if check_values:
        checks.finite_rows("q", q, [lens for *_, lens in scopes])
    out = check_rest(q, attn_sink, out)
    problem = Problem.on(
        "sparse_mla_decode",
        q.device,
        tokens=tokens,
        heads=q.shape[1],
        head_dim=q.shape[2],
        width=swa_indices.shape[1],
        extra_width=extra_indices.shape[1] if extra_indices is not None else 0,
        caches=tuple(cache.spec for _, cache, _, _ in scopes),
        lse=return_lse,
        split_k=split_k or 0,
    )
    scale = scale_of(softmax_scale, q.shape[2])
    record = select(problem, kernel)
    if tokens == 0:
        return _empty(q, out, return_lse)
    return call_on(
        q.device,
        attend,
        record,
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
        swa_k_scale=k_scales["swa"],
        extra_k_scale=k_scales["extra"] if len(scopes) > 1 else 1.0,
        return_lse=return_lse,
        split_k=split_k,
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
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One softmax over a token's rows of a bf16 workspace; out, lse and sink as in :func:`sparse_mla_decode`.

    Args:
        q: bf16 ``[T, H, D]``, D 512 (V4) or 576 (V3.2), T >= 0, H in 1..128, any strides with the last 1.
        kv: bf16 ``[S, D]``, rows contiguous; a row nothing points at may hold anything.
        indices: int32 (or int64) ``[T, any]``, index space *workspace row*, -1 (or anything outside 0..S-1) for none.
        lens: int32 (or int64) ``[T]`` scan spans, clamped to the width; None means the whole width.
        attn_sink: float32 ``[H]`` or None.
        softmax_scale: finite and > 0; None means 512 ** -0.5, and is refused for D = 576, whose model scales by
            192 ** -0.5 times its YaRN factor.
        out: bf16 ``[T, H, 512]``, any strides with the last 1; None allocates a contiguous one.
        kernel: ``"flash_mla"``, ``"gluon"``, ``"triton"``, ``"aiter"`` or ``"reference"``, which runs or raises; None
            picks.
        trusted_indices: the caller vouches that lengths lie in ``[0, width]`` and no index past a span points at a NaN.
        return_lse: whether the lse is wanted. Not all of AITER's kernels make one.

    Returns:
        ``(out, lse)``: bf16 ``[T, H, 512]`` and float32 ``[T, H]``, or None for lse under ``return_lse=False``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device; under ``DSV4X_CHECK=1`` also a row
            outside the workspace, a length past its row, or a NaN in q, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: semantics of FlashMLA's ``flash_mla_sparse_fwd`` (tests/ref.py).
    """
    check_values = checks.check_values_enabled()
    tokens = _check_q(q)
    checks.tensor("kv", kv, (None, q.shape[2]), torch.bfloat16, q.device)
    checks.tensor("indices", indices, (tokens, None), checks.INDEX_DTYPES, q.device)
    if lens is not None:
        checks.tensor("lens", lens, (tokens,), checks.INDEX_DTYPES, q.device)
    if check_values:
        checks.index_values("indices", indices, lens, kv.shape[0], "workspace row")
        checks.finite_rows("q", q, [lens])
    out = check_rest(q, attn_sink, out)
    problem = Problem.on(
        "sparse_mla_prefill",
        q.device,
        tokens=tokens,
        heads=q.shape[1],
        head_dim=q.shape[2],
        width=indices.shape[1],
        rows=kv.shape[0],
        lse=return_lse,
    )
    scale = scale_of(softmax_scale, q.shape[2])
    record = select(problem, kernel)
    if tokens == 0:
        return _empty(q, out, return_lse)
    return call_on(
        q.device,
        attend,
        record,
        q,
        kv,
        indices,
        lens,
        attn_sink,
        scale,
        out,
        trusted_indices=trusted_indices,
        return_lse=return_lse,
    )


def attend(
    record: Kernel, *args: Any, return_lse: bool, split_k: int | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run an attention kernel; None for the lse where none is wanted, whatever the kernel made."""
    if record.lse_optional:
        options["return_lse"] = return_lse
    if split_k is not None:
        options["split_k"] = split_k
    out, lse = record.run(*args, **options)
    return out, lse if return_lse else None


def check_cache(name: str, value: object, device: torch.device, head_dim: int) -> PagedCache:
    """A cache that attention may read with q of ``head_dim`` values, on ``device``."""
    cache = checks.cache(name, value, device)
    if cache.layout.head_dim != head_dim:
        raise ValueError(
            f"{name}: entries of {cache.layout.head_dim} values ({cache.layout.name}), need {head_dim} as q has"
        )
    return cache


def _check_q(q: torch.Tensor) -> int:
    checks.tensor("q", q, (None, None, None), torch.bfloat16)
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"q: head dim is {q.shape[2]}, need {' or '.join(map(str, HEAD_DIMS))}")
    check_heads(q)
    return q.shape[0]


def check_heads(q: torch.Tensor) -> None:
    """Check how many heads q has."""
    if not 1 <= q.shape[1] <= MAX_HEADS:
        raise ValueError(f"q: {q.shape[1]} heads, need 1 to {MAX_HEADS}")


def check_rest(q: torch.Tensor, attn_sink: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor | None:
    """Check what stands beside q; returns ``out``."""
    if attn_sink is not None:
        checks.tensor("attn_sink", attn_sink, (q.shape[1],), torch.float32, q.device)
    if out is not None:
        checks.tensor("out", out, (*q.shape[:2], VALUE_DIM), torch.bfloat16, q.device)
        checks.rows_apart("out", out)
    return out


def scale_of(softmax_scale: object, head_dim: int) -> float:
    """The scale an argument means."""
    if softmax_scale is None:
        if head_dim != VALUE_DIM:
            raise ValueError(f"softmax_scale: got None, need the model's scale for q of {head_dim}")
        return VALUE_DIM**-0.5
    if not isinstance(softmax_scale, (int, float)) or isinstance(softmax_scale, bool):
        raise TypeError(f"softmax_scale: got {type(softmax_scale).__name__}, need a float or None")
    # FlashMLA takes the maximum before it scales, which only a positive scale allows.
    if not 0 < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale: got {softmax_scale}, need a finite number > 0")
    return float(softmax_scale)


def _empty(q: torch.Tensor, out: torch.Tensor | None, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    if out is None:
        out = torch.empty(0, q.shape[1], VALUE_DIM, dtype=q.dtype, device=q.device)
    return out, torch.empty(0, q.shape[1], dtype=torch.float32, device=q.device) if return_lse else None
