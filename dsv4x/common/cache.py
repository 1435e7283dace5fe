"""Store (quantize and insert) and dequantize K entries of a paged cache."""

from __future__ import annotations

import torch

from . import checks
from .layouts import PagedCache
from .registry import Problem, select


def quantize_and_insert_k_cache(
    k: torch.Tensor, cache: PagedCache, slots: torch.Tensor, *, k_scale: float = 1.0, kernel: str | None = None
) -> None:
    """Quantize each row of ``k`` and write it at its slot. No other byte of the cache changes.

    What is written follows from the layout. A power-of-two scale is 2**ceil(log2(max(amax, floor) / m)), the ceiling
    exact and m the encoding's maximum; an e4m3 scale (DSv4.1 fp4) is amax / 6 to nearest; without a stored scale
    values are divided by ``k_scale``. Values round to nearest even and saturate at +-m of the scale. NaN stays NaN and
    does not decide its tile's scale; in e2m1, which has none, it makes its tile's scale NaN. If a slot occurs twice,
    which row lands there is not defined.

    Args:
        k: bf16 ``[T, head_dim]`` of the layout (512 for DSv4), rows contiguous.
        cache: the paged cache, written in place.
        slots: int64 (or int32) ``[T]``, index space *slot*; -1, and any slot outside the cache, is skipped.
        k_scale: the whole tensor's scale, finite and > 0; other than 1 only where the layout stores no scales.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device; under ``DSV4X_CHECK=1`` also
            a slot outside the cache or a NaN, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: the byte layout and the scale rule are FlashMLA's ``tests/quant.py``, with the model's amax floor.
    """
    cache = checks.cache("cache", cache, k.device if isinstance(k, torch.Tensor) else torch.device("cpu"))
    checks.tensor("k", k, (None, cache.layout.head_dim), torch.bfloat16)
    checks.tensor("slots", slots, (k.shape[0],), checks.INDEX_DTYPES, k.device)
    if checks.check_values_enabled():
        checks.index_values("slots", slots, None, cache.capacity, "slot")
        checks.finite_rows("k", k)
    _check_scale(k_scale, cache)
    record = select(_problem("quantize_and_insert_k_cache", cache, slots), kernel)
    if slots.shape[0]:
        record.launch(k.device, k, cache, slots, k_scale)


def dequantize_k_cache_paged(
    cache: PagedCache,
    slots: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    k_scale: float = 1.0,
    kernel: str | None = None,
) -> torch.Tensor:
    """Read entries back as bf16, bit for bit what value times scale rounds to.

    Args:
        cache: the paged cache.
        slots: int32 or int64 ``[N]``, index space *slot*; -1, and any slot outside the cache, is no entry.
        out: bf16 ``[N, head_dim]``, rows contiguous, any row stride; None allocates.
        k_scale: the whole tensor's scale, finite and > 0; other than 1 only where the layout stores no scales.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        bf16 ``[N, head_dim]``. A row without an entry is left alone in a given ``out`` and zero otherwise.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device; under ``DSV4X_CHECK=1`` also
            a slot outside the cache, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: FlashMLA's ``tests/quant.py``.
    """
    device = slots.device if isinstance(slots, torch.Tensor) else torch.device("cpu")
    cache = checks.cache("cache", cache, device)
    checks.tensor("slots", slots, (None,), checks.INDEX_DTYPES)
    if out is not None:
        checks.tensor("out", out, (slots.shape[0], cache.layout.head_dim), torch.bfloat16, device)
    if checks.check_values_enabled():
        checks.index_values("slots", slots, None, cache.capacity, "slot")
    _check_scale(k_scale, cache)
    record = select(_problem("dequantize_k_cache_paged", cache, slots), kernel)
    if out is None:
        out = torch.zeros(slots.shape[0], cache.layout.head_dim, dtype=torch.bfloat16, device=device)
    if slots.shape[0]:
        record.launch(device, cache, slots, out, k_scale)
    return out


def _problem(op: str, cache: PagedCache, slots: torch.Tensor) -> Problem:
    return Problem.on(op, slots.device, tokens=slots.shape[0], caches=(cache.spec,))


def _check_scale(k_scale: object, cache: PagedCache) -> None:
    if not isinstance(k_scale, (int, float)):
        raise TypeError(f"k_scale: got {type(k_scale).__name__}, need a float")
    if not 0 < k_scale < float("inf"):
        raise ValueError(f"k_scale: got {k_scale}, need a finite number > 0")
    if k_scale != 1 and (cache.layout.scale_encoding != "none" or not cache.layout.nope_dim):
        raise ValueError(f"k_scale: got {k_scale}, need 1: {cache.layout.name} has no scale of the whole tensor")
