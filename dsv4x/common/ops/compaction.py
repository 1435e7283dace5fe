"""What a step's indices point at, once each, in a compact buffer, and the indices remapped to it.

Page grain keeps the layout: :func:`gather_referenced_cache_blocks`. Row grain dequantizes to bf16:
:func:`gather_referenced_rows`. Both list the referenced pages or slots in ascending order, so the same references
give the same buffer, and with a capacity no shape depends on a value on the device: a graph can capture them.

On a GPU each unit (page or slot) of the pool has one bit. The indices set bits, a prefix sum over the bits' counts
ranks them, and a second look at the indices turns each into its unit's rank. Sorting the indices instead would take
tens of bytes a reference, and a long prefill has far more references than distinct rows. The bits are bounded by a
constant, not by the pool: a pool of more units than :data:`PASS_UNITS` is gone through in several passes over the same
scratch. :func:`compaction_scratch_bytes` is the number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core import checks
from ..core.layouts import ALIGNMENT, PagedCache
from ..dispatch.problem import CacheProblem
from ..dispatch.registry import select
from ..kernels.limits import PASS_UNITS, WORD_BITS
from .cache import dequantize_k_cache_paged


@dataclass(frozen=True, eq=False)
class CompactedCache:
    """The result of :func:`gather_referenced_cache_blocks`.

    Attributes:
        cache: the referenced pages, of the source's layout and page size.
        indices: int32, the given indices' shape, index space *slot* of ``cache``, -1 for none.
        count: int32 ``[1]`` on the device: pages referenced; above the capacity, that many were asked for.
        pages: int32 ``[capacity]``, the source page of each compact page, ascending, then -1.
    """

    cache: PagedCache
    indices: torch.Tensor
    count: torch.Tensor
    pages: torch.Tensor


@dataclass(frozen=True, eq=False)
class CompactedRows:
    """The result of :func:`gather_referenced_rows`.

    Attributes:
        rows: bf16 ``[>= capacity, head_dim]``, the referenced entries first.
        indices: int32, the given indices' shape, index space *workspace row*, -1 for none.
        count: int32 ``[1]`` on the device: slots referenced; above the capacity, that many were asked for.
        slots: int32 (int64 of a pool past 2**31 slots) ``[capacity]``, the slot of each row, ascending, then -1.
    """

    rows: torch.Tensor
    indices: torch.Tensor
    count: torch.Tensor
    slots: torch.Tensor


def compaction_scratch_bytes(units: int) -> int:
    """Bytes of scratch a compaction takes on a GPU beside its results: a quarter byte a unit, at most 16 MiB.

    Args:
        units: ``cache.pages`` for :func:`gather_referenced_cache_blocks`, ``cache.capacity`` for
            :func:`gather_referenced_rows`.

    The results are the buffer, 4 bytes an index and 4 (8 past 2**31 slots) a unit of capacity. Without a capacity,
    another 4 (8) bytes an index, or a unit if those are fewer, are held until the exact size is known.
    """
    checks.integer("units", units, 0)
    return -(-min(units, PASS_UNITS) // WORD_BITS) * 8


def gather_referenced_cache_blocks(
    cache: PagedCache,
    indices: torch.Tensor,
    lens: torch.Tensor | None = None,
    *,
    capacity: int | None = None,
    out: PagedCache | None = None,
    remapped: torch.Tensor | None = None,
    kernel: str | None = None,
) -> CompactedCache:
    """Copy every page that an index points at, once, bytes as they are, and remap the indices to the copies.

    Pages keep their order. An index that is negative, past the cache or past its row's span points at nothing and
    becomes -1. Where more pages are referenced than the capacity, the first ``capacity`` are copied, indices of the
    others become -1, and ``count`` tells.

    Args:
        cache: the paged cache, any layout.
        indices: int32 or int64 ``[T, K]``, index space *slot* of ``cache``, -1 anywhere for none; rows contiguous, any
            row stride.
        lens: int32 or int64 ``[T]`` scan spans, clamped to ``[0, K]``; None means the whole width.
        capacity: pages there is room for; ``capacity * page_size`` at most 2**31. None is the pages of ``out``, and
            without one what is referenced, which synchronizes once and cannot be captured in a graph.
        out: a cache of the same layout and page size with at least ``capacity`` pages that shares no bytes with
            ``cache``; what is not copied to keeps its bytes. None allocates, and leaves pages past ``count`` unwritten.
        remapped: int32 ``[T, K]``, rows contiguous, other memory than ``indices``; None allocates.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        :class:`CompactedCache`; its ``cache`` is ``out`` where one was given. Padding behind a page's entries is not
        copied.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device, layout or value; no capacity while a
            graph is being captured; under ``DSV4X_CHECK=1`` also a slot outside the cache or a length past its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    device = cache.device if isinstance(cache, PagedCache) else torch.device("cpu")
    cache = checks.cache("cache", cache, device)
    room = None
    if out is not None:
        room = checks.cache("out", out, device).pages
        if (out.layout, out.page_size) != (cache.layout, cache.page_size):
            raise ValueError(
                f"out: pages of {out.page_size} {out.layout.name} entries, "
                f"need {cache.page_size} {cache.layout.name} entries"
            )
    pages, indices, count = _list_referenced(cache, indices, lens, cache.page_size, capacity, room, remapped, kernel)
    if out is None:
        stride = -(-cache.layout.page_stride(cache.page_size) // ALIGNMENT) * ALIGNMENT
        data = torch.empty(pages.shape[0], stride, dtype=torch.uint8, device=device)
        out = PagedCache(data, cache.layout, cache.page_size)
    problem = CacheProblem.on("copy_pages", device, tokens=pages.shape[0], caches=(cache.spec, out.spec))
    record = select(problem, kernel)
    if pages.shape[0]:
        record.launch(device, cache, pages, out)
    return CompactedCache(out, indices, count, pages)


def gather_referenced_rows(
    cache: PagedCache,
    indices: torch.Tensor,
    lens: torch.Tensor | None = None,
    *,
    capacity: int | None = None,
    out: torch.Tensor | None = None,
    remapped: torch.Tensor | None = None,
    k_scale: float = 1.0,
    kernel: str | None = None,
) -> CompactedRows:
    """Read every entry that an index points at, once, as bf16, and remap the indices to the rows.

    Rows are in the order of their slots, each what :func:`dsv4x.dequantize_k_cache_paged` gives for it. What points at
    nothing, and what is past the capacity, is as in :func:`gather_referenced_cache_blocks`.

    Args:
        cache: the paged cache, any layout.
        indices: int32 or int64 ``[T, K]``, index space *slot* of ``cache``, -1 anywhere for none; rows contiguous, any
            row stride.
        lens: int32 or int64 ``[T]`` scan spans, clamped to ``[0, K]``; None means the whole width.
        capacity: rows there is room for, at most 2**31 - 1. None is the rows of ``out``, and without one what is
            referenced, which synchronizes once and cannot be captured in a graph.
        out: bf16 ``[>= capacity, head_dim]``, rows contiguous, any row stride that keeps them apart; rows that nothing
            is read to keep their values. None allocates, and leaves rows past ``count`` unwritten.
        remapped: int32 ``[T, K]``, rows contiguous, other memory than ``indices``; None allocates.
        k_scale: the whole tensor's scale, finite and > 0; other than 1 only where the layout stores no scales.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        :class:`CompactedRows`; ``rows`` is ``out`` where one was given.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or value; no capacity while a graph is
            being captured; under ``DSV4X_CHECK=1`` also a slot outside the cache or a length past its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    device = cache.device if isinstance(cache, PagedCache) else torch.device("cpu")
    cache = checks.cache("cache", cache, device)
    checks.k_scale("k_scale", k_scale, cache)
    room = None
    if out is not None:
        checks.tensor("out", out, (None, cache.layout.head_dim), torch.bfloat16, device)
        room = checks.rows_apart("out", out).shape[0]
    slots, indices, count = _list_referenced(cache, indices, lens, 1, capacity, room, remapped, kernel)
    if out is None:
        out = torch.empty(slots.shape[0], cache.layout.head_dim, dtype=torch.bfloat16, device=device)
    dequantize_k_cache_paged(cache, slots, out[: slots.shape[0]], k_scale=k_scale, kernel=kernel)
    return CompactedRows(out, indices, count, slots)


def _list_referenced(
    cache: PagedCache,
    indices: torch.Tensor,
    lens: torch.Tensor | None,
    unit_slots: int,
    capacity: int | None,
    room: int | None,
    remapped: torch.Tensor | None,
    kernel: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(units listed ``[capacity]``, indices remapped, count ``[1]``) of a unit of ``unit_slots`` slots.

    ``room`` is how many units the caller's buffer holds, None without one.
    """
    device = cache.device
    checks.tensor("indices", indices, (None, None), checks.INDEX_DTYPES, device)
    if lens is not None:
        checks.tensor("lens", lens, (indices.shape[0],), checks.INDEX_DTYPES, device)
    # Remapped indices are int32, and a row's number is less than a size that is int32 too.
    most = min(2**31 // unit_slots, 2**31 - 1)
    if capacity is not None:
        checks.integer("capacity", capacity, 0, most)
        if room is not None and room < capacity:
            raise ValueError(f"out: room for {room}, need >= capacity, which is {capacity}")
    elif room is not None:
        capacity = checks.integer("capacity", room, 0, most)
    if remapped is None:
        remapped = torch.empty(indices.shape, dtype=torch.int32, device=device)
    else:
        checks.tensor("remapped", remapped, tuple(indices.shape), torch.int32, device)
        # Every pass over the indices reads all of them again.
        if checks.rows_apart("remapped", remapped).numel() and remapped.data_ptr() == indices.data_ptr():
            raise ValueError("remapped: the memory of indices, need other memory")
    if checks.check_values_enabled():
        checks.index_values("indices", indices, lens, cache.capacity, "slot")
    units = cache.capacity // unit_slots
    problem = CacheProblem.on(
        "list_referenced", device, tokens=indices.shape[0], width=indices.shape[1], caches=(cache.spec,)
    )
    exact = capacity is None
    if exact and problem.capturing:
        raise ValueError("capacity: got None while a graph is being captured, need an int (or out, whose size it is)")
    bound = min(indices.numel(), units, most) if capacity is None else capacity
    record = select(problem, kernel)
    listed = torch.full((bound,), -1, dtype=torch.int32 if units < 2**31 else torch.int64, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    remapped.fill_(-1)
    if indices.numel() and units:
        record.launch(device, indices, lens, cache.capacity, unit_slots, listed, remapped, count)
    if exact:
        listed = listed[: checks.integer("capacity", int(count), 0, most)].clone()
    return listed, remapped, count
