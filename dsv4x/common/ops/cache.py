"""Store (quantize and insert), dequantize and move K entries of paged caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..core import checks, layouts
from ..core.layouts import PagedCache
from ..dispatch.problem import CacheProblem
from ..dispatch.registry import select

CONVERT_ROWS = 1 << 16
"""Rows :func:`convert_cache` holds as bf16 at once: 64 MiB of 512 values each."""


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
    cache = checks.cache("cache", cache, checks.tensor("k", k, (None, None), torch.bfloat16).device)
    checks.tensor("k", k, (None, cache.layout.head_dim), torch.bfloat16)
    checks.tensor("slots", slots, (k.shape[0],), checks.INDEX_DTYPES, k.device)
    if checks.check_values_enabled():
        checks.index_values("slots", slots, None, cache.capacity, "slot")
        checks.finite_rows("k", k)
    k_scale = checks.k_scale("k_scale", k_scale, cache)
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
    device = checks.tensor("slots", slots, (None,), checks.INDEX_DTYPES).device
    cache = checks.cache("cache", cache, device)
    if out is not None:
        checks.tensor("out", out, (slots.shape[0], cache.layout.head_dim), torch.bfloat16, device)
        checks.rows_apart("out", out)
    if checks.check_values_enabled():
        checks.index_values("slots", slots, None, cache.capacity, "slot")
    k_scale = checks.k_scale("k_scale", k_scale, cache)
    record = select(_problem("dequantize_k_cache_paged", cache, slots), kernel)
    if out is None:
        out = torch.zeros(slots.shape[0], cache.layout.head_dim, dtype=torch.bfloat16, device=device)
    if slots.shape[0]:
        record.launch(device, cache, slots, out, k_scale)
    return out


def copy_entries(
    src: PagedCache, src_slots: torch.Tensor, dst: PagedCache, dst_slots: torch.Tensor, *, kernel: str | None = None
) -> PagedCache:
    """Copy entries from slot to slot, bytes as they are: values, scales and an entry's own padding, nothing else.

    For accepted speculative tokens, defragmentation and transfer. All rows are copied at once, in no order. So no two
    rows may write one slot, and no row may write bytes that another reads: what such slots hold afterwards is not
    defined, and may be parts of several entries. A row that copies a slot onto itself changes nothing. Moves that
    follow one another, such as 3 to 2 and 2 to 1, go through another pool in two calls.

    Args:
        src, dst: caches of the same layout on one device, any page sizes; one pool may be both.
        src_slots: int32 or int64 ``[N]``, index space *slot* of ``src``.
        dst_slots: int32 or int64 ``[N]``, index space *slot* of ``dst``. A row of which either slot is -1, or outside
            its cache, is no entry and is skipped.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        ``dst``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or layout; under ``DSV4X_CHECK=1`` also a slot
            outside its cache, a slot that two rows write, or one that is read while another row writes it, with the
            row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    check_copy(src, src_slots, dst, dst_slots)
    if checks.check_values_enabled():
        checks.index_values("src_slots", src_slots, None, src.capacity, "slot")
        checks.index_values("dst_slots", dst_slots, None, dst.capacity, "slot")
        _check_copies(src, src_slots, dst, dst_slots)
    rows, device = src_slots.shape[0], src_slots.device
    record = select(CacheProblem.on("copy_entries", device, tokens=rows, caches=(src.spec, dst.spec)), kernel)
    if rows:
        record.launch(device, src, src_slots, dst, dst_slots)
    return dst


def check_copy(src: PagedCache, src_slots: torch.Tensor, dst: PagedCache, dst_slots: torch.Tensor) -> None:
    """Check what :func:`copy_entries` is given, but for values on the device."""
    device = checks.tensor("src_slots", src_slots, (None,), checks.INDEX_DTYPES).device
    checks.cache("src", src, device)
    checks.cache("dst", dst, device)
    if dst.layout != src.layout:
        raise ValueError(f"dst: layout is {dst.layout.name}, need {src.layout.name} as of src")
    checks.tensor("dst_slots", dst_slots, (src_slots.shape[0],), checks.INDEX_DTYPES, device)


def _check_copies(src: PagedCache, src_slots: torch.Tensor, dst: PagedCache, dst_slots: torch.Tensor) -> None:
    """Report the first slot that two rows write, else the first row that reads bytes which another one writes.

    Slots are -1 or within their caches. Bytes are told by their addresses: two caches may be views of one pool.
    """
    rows = ((src_slots >= 0) & (dst_slots >= 0)).nonzero()[:, 0]
    reads, writes = src_slots[rows].long(), dst_slots[rows].long()
    ordered, order = writes.sort(stable=True)
    again = (ordered.diff() == 0).nonzero()
    if again.numel():
        at = int(again[0])
        pair = " and ".join(str(int(row)) for row in rows[order[at : at + 2]])
        raise ValueError(f"dst_slots: slot {int(ordered[at])} in rows {pair}, need it once")
    read_from, read_to = _extents(src, reads)
    write_from, write_to = _extents(dst, writes)
    moved = (read_from != write_from).any(1)
    if not moved.any():
        return
    # Slots that differ share no bytes, so what is written is in one order by where it begins and by where it ends.
    begins, ends = (extent[moved].flatten().sort().values for extent in (write_from, write_to))
    before = torch.searchsorted(begins, read_to.contiguous()) - 1
    bad = ((before >= 0) & (ends[before.clamp_min(0)] > read_from)).any(1)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"src_slots: slot {int(reads[at])} in row {int(rows[at])} is written too, "
            "need slots that are read apart from those written"
        )


def _extents(cache: PagedCache, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 ``[N, runs]``: the addresses at which each run of a slot's entry begins and ends."""
    page, entry = slots // cache.page_size, slots % cache.page_size
    runs = torch.tensor(cache.layout.entry_runs(cache.page_size), dtype=torch.int64, device=slots.device)
    base, size = runs.unbind(1)
    begins = cache.data.data_ptr() + (page * cache.page_stride)[:, None] + base + entry[:, None] * size
    return begins, begins + size


def requantize_fp8_to_block_scale(
    cache: PagedCache,
    k_scale: float,
    out: PagedCache | None = None,
    *,
    pages: torch.Tensor | None = None,
    kernel: str | None = None,
) -> PagedCache:
    """trtllm-native pages (576 B an entry) to DSv3.2 pages (656 B), which FlashMLA reads: nothing is rounded twice.

    The 512 leading codes are copied as they are and ``k_scale`` becomes each of their four block scales; the 64 RoPE
    codes are decoded, times ``k_scale``, to bf16.

    Args:
        cache: layout trtllm-native, either FP8 flavour.
        k_scale: the tensor scale the server stored the cache with (1.0 where it has none), finite and > 0. FlashMLA
            rounds a block scale to bf16 before it multiplies, so a scale that bf16 holds keeps its answer exact.
        out: layout DSv3.2 of the same flavour, page size and at least as many pages; None allocates a zeroed one.
        pages: int32 or int64 ``[P]`` page numbers to convert, the same in both caches; one outside the pool is
            skipped. None converts every page.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        ``out``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or value; under ``DSV4X_CHECK=1`` also a
            page outside the pool, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: the layouts are FlashMLA's V3.2 (``tests/quant.py``) and trtllm-gen's.
    """
    device = cache.device if isinstance(cache, PagedCache) else torch.device("cpu")
    cache = checks.cache("cache", cache, device)
    flavour = cache.layout.value_encoding
    native = layouts.TRTLLM_NATIVE.with_flavour(flavour) if flavour in layouts.FLAVOURS else layouts.TRTLLM_NATIVE
    if cache.layout != native:
        raise ValueError(f"cache: layout is {cache.layout.name}, need {layouts.TRTLLM_NATIVE.name}")
    k_scale = checks.k_scale("k_scale", k_scale, cache)
    needed = layouts.DSV32.with_flavour(native.value_encoding)
    if out is None:
        out = PagedCache.zeros(cache.pages, needed, cache.page_size, device)
    else:
        out = checks.cache("out", out, device)
        if out.layout.name != needed.name:
            raise ValueError(f"out: layout is {out.layout.name}, need {needed.name}")
        if out.page_size != cache.page_size or out.pages < cache.pages:
            raise ValueError(
                f"out: {out.pages} pages of {out.page_size}, need >= {cache.pages} pages of {cache.page_size}"
            )
    if pages is not None:
        checks.tensor("pages", pages, (None,), checks.INDEX_DTYPES, device)
        if checks.check_values_enabled():
            checks.index_values("pages", pages, None, cache.pages, "page")
    count = cache.pages if pages is None else pages.shape[0]
    problem = CacheProblem.on(
        "requantize_fp8_to_block_scale", device, tokens=count * cache.page_size, caches=(cache.spec, out.spec)
    )
    record = select(problem, kernel)
    if count:
        record.launch(device, cache, out, pages, k_scale)
    return out


def convert_cache(
    src: PagedCache,
    dst: PagedCache,
    slots: torch.Tensor | None = None,
    *,
    src_k_scale: float = 1.0,
    dst_k_scale: float = 1.0,
    kernel: str | None = None,
) -> PagedCache:
    """Store the entries of one cache in another, each at its own slot, from any layout to any of the same head dim.

    Values pass through bf16, a bounded number of rows at a time. Where that would round a value twice although it need
    not (trtllm-native to DSv3.2), :func:`requantize_fp8_to_block_scale` is the exact way.

    Args:
        src, dst: caches of the same head dimension, on one device, that share no bytes; any page sizes.
        slots: int32 or int64 ``[N]``, index space *slot*, the same in both; -1, and any slot outside either cache, is
            skipped. None converts every slot of ``src``, which ``dst`` must have room for.
        src_k_scale, dst_k_scale: whole-tensor scales, where a layout stores none.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        ``dst``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or value; under ``DSV4X_CHECK=1`` also,
            of the slots given, one outside either cache or whose entry holds a NaN, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    device = src.device if isinstance(src, PagedCache) else torch.device("cpu")
    src, dst = checks.cache("src", src, device), checks.cache("dst", dst, device)
    if src.layout.head_dim != dst.layout.head_dim:
        raise ValueError(f"dst: head dim is {dst.layout.head_dim} ({dst.layout.name}), need {src.layout.head_dim}")
    src_k_scale = checks.k_scale("src_k_scale", src_k_scale, src)
    dst_k_scale = checks.k_scale("dst_k_scale", dst_k_scale, dst)
    if slots is None:
        if dst.capacity < src.capacity:
            raise ValueError(f"dst: {dst.capacity} slots, need >= {src.capacity}")
        count = src.capacity
    else:
        checks.tensor("slots", slots, (None,), checks.INDEX_DTYPES, device)
        count = slots.shape[0]
    read = select(CacheProblem.on("dequantize_k_cache_paged", device, tokens=count, caches=(src.spec,)), kernel)
    write = select(CacheProblem.on("quantize_and_insert_k_cache", device, tokens=count, caches=(dst.spec,)), kernel)

    def parts() -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for start in range(0, count, CONVERT_ROWS):
            end = min(start + CONVERT_ROWS, count)
            part = torch.arange(start, end, dtype=torch.int64, device=device) if slots is None else slots[start:end]
            # A slot src does not have must not reach dst, which may be larger.
            part = torch.where(part < src.capacity, part, -1)
            rows = torch.zeros(part.shape[0], src.layout.head_dim, dtype=torch.bfloat16, device=device)
            read.launch(device, src, part, rows, src_k_scale)
            yield start, part, rows

    if slots is not None and checks.check_values_enabled():
        checks.index_values("slots", slots, None, min(src.capacity, dst.capacity), "slot")
        for start, part, rows in parts():
            bad = rows.isnan().any(1)
            if bad.any():
                row = int(bad.nonzero()[0])
                raise ValueError(f"src: NaN in the entry of slot {int(part[row])} (slots, row {start + row})")
    for _, part, rows in parts():
        write.launch(device, rows, dst, part, dst_k_scale)
    return dst


def _problem(op: str, cache: PagedCache, slots: torch.Tensor) -> CacheProblem:
    return CacheProblem.on(op, slots.device, tokens=slots.shape[0], caches=(cache.spec,))
