"""Store (quantize and insert) and dequantize K entries of a paged cache."""

from __future__ import annotations

import torch

from . import checks
from .layouts import PagedCache
from .registry import Problem, select


def quantize_and_insert_k_cache(
    k: torch.Tensor, cache: PagedCache, slots: torch.Tensor, *, kernel: str | None = None
) -> None:
    """Quantize each row of ``k`` and write it at its slot. No other byte of the cache changes.

    A tile's scale is 2**ceil(log2(max(amax, floor) / 448)), the ceiling exact; values round to nearest even and
    saturate at +-448 of the scale; NaN stays NaN and does not decide its tile's scale. If a slot occurs twice,
    which row lands there is not defined.

    Args:
        k: bf16 ``[T, head_dim]`` of the layout (512 for DSv4), rows contiguous.
        cache: the paged cache, written in place.
        slots: int64 (or int32) ``[T]``, index space *slot*; -1, and any slot outside the cache, is skipped.
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
    record = select(_problem("quantize_and_insert_k_cache", cache, slots), kernel)
    if slots.shape[0]:
        record.launch(k.device, k, cache, slots)


def dequantize_k_cache_paged(
    cache: PagedCache, slots: torch.Tensor, out: torch.Tensor | None = None, *, kernel: str | None = None
) -> torch.Tensor:
    """Read entries back as bf16, bit for bit what value times scale rounds to.

    Args:
        cache: the paged cache.
        slots: int32 or int64 ``[N]``, index space *slot*; -1, and any slot outside the cache, is no entry.
        out: bf16 ``[N, head_dim]``, rows contiguous, any row stride; None allocates.
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
    record = select(_problem("dequantize_k_cache_paged", cache, slots), kernel)
    if out is None:
        out = torch.zeros(slots.shape[0], cache.layout.head_dim, dtype=torch.bfloat16, device=device)
    if slots.shape[0]:
        record.launch(device, cache, slots, out)
    return out


def _problem(op: str, cache: PagedCache, slots: torch.Tensor) -> Problem:
    return Problem.on(op, slots.device, tokens=slots.shape[0], caches=(cache.spec,))
