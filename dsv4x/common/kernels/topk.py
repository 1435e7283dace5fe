"""Selection of a row's k largest values: candidates kept in index order, the k-th found among them digit by digit.

A value becomes an unsigned key of the same order. Of a long row a sample tells a key that some more than k values pass;
one pass over the row writes those down in their order, and everything after looks at them alone. Where the sample was
no guide (too few pass, or more than there is room for, as with many equal values) the digits are found in passes over
the whole row. Either way the result is the k largest, equal ones by the smaller index, in index order: nothing depends
on which thread comes first, so the same logits give the same indices everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.platform import platform
from ..core.spaces import TopkMethod
from .launch import Launcher
from .limits import least_part

_INT_MAX = tl.constexpr(2**31 - 1)


@triton.jit
def _keys(values):
    """float32 -> uint32 of the same order; NaN as -inf, -0 as 0."""
    values = tl.where(values == values, values, float("-inf"))
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -(2**31))).to(tl.uint32, bitcast=True)


@triton.jit
def _load_keys(logits_ptr, ids_ptr, at, length, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr):
    """(keys, whether there is a candidate) of the columns from ``at`` on."""
    column = at + tl.arange(0, BLOCK)
    there = column < length
    if HAS_IDS:
        there = tl.load(ids_ptr + column, mask=there, other=-1) >= 0
    return _keys(tl.load(logits_ptr + column, mask=there, other=float("-inf"))), there


@triton.jit
def _sampled_keys(logits_ptr, length, SAMPLE: tl.constexpr):
    """Keys of ``SAMPLE`` columns, evenly spread over the row; ``length >= SAMPLE``."""
    column = (tl.arange(0, SAMPLE).to(tl.int64) * length // SAMPLE).to(tl.int32)
    return _keys(tl.load(logits_ptr + column)), column >= 0


@triton.jit
def _narrow(counts, threshold, wanted):
    """One more digit of the ``wanted``-th largest key, by how many candidates have each; and its rank among those."""
    above = tl.sum(counts) - tl.cumsum(counts, 0)
    here = (above < wanted) & (above + counts >= wanted)
    digit = tl.sum(tl.where(here, tl.arange(0, 256), 0))
    return (threshold << 8) | digit.to(tl.uint32), wanted - tl.sum(tl.where(here, above, 0))


@triton.jit
def _count_digits(key, there, threshold, SHIFT: tl.constexpr):
    """How many candidates whose higher digits are ``threshold`` have each digit at ``SHIFT``."""
    if SHIFT < 24:
        there = there & ((key >> (SHIFT + 8)) == threshold)
    return tl.histogram(((key >> SHIFT) & 255).to(tl.int32), 256, mask=there)


@triton.jit
def _nth_key(key, there, wanted, DIGITS: tl.constexpr):
    """(leading ``DIGITS`` digits of the ``wanted``-th largest key, rank among the keys that share them) of a block."""
    threshold = tl.zeros((), tl.uint32)
    for place in tl.static_range(DIGITS):
        threshold, wanted = _narrow(_count_digits(key, there, threshold, 24 - 8 * place), threshold, wanted)
    return threshold, wanted


@triton.jit
def _nth_key_of_row(logits_ptr, ids_ptr, length, wanted, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr):
    """The same with all digits, in passes over a row."""
    threshold = tl.zeros((), tl.uint32)
    for place in tl.static_range(4):
        counts = tl.zeros((256,), tl.int32)
        for at in tl.range(0, length, BLOCK):
            key, there = _load_keys(logits_ptr, ids_ptr, at, length, HAS_IDS, BLOCK)
            counts += _count_digits(key, there, threshold, 24 - 8 * place)
        threshold, wanted = _narrow(counts, threshold, wanted)
    return threshold, wanted


@triton.jit
def _compact(logits_ptr, kept_ptr, length, least, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Write down, in order, the columns whose key is at least ``least``; returns how many there are."""
    count = tl.zeros((), tl.int32)
    for at in tl.range(0, length, BLOCK, num_stages=STAGES):
        column = at + tl.arange(0, BLOCK)
        key, there = _load_keys(logits_ptr, logits_ptr, at, length, False, BLOCK)
        kept = (there & (key >= least)).to(tl.int32)
        place = count + tl.cumsum(kept, 0) - kept
        tl.store(kept_ptr + place, column, mask=(kept == 1) & (place < CAPACITY))
        count += tl.sum(kept)
    return count


@triton.jit
def _emit(
    key, there, index, value_ptr, threshold, wanted, taken, equal_before, out_ptr, values_ptr,
    base, table_ptr, table_limit, page_size, pages, METHOD: tl.constexpr, HAS_VALUES: tl.constexpr,
):  # fmt: skip
    """Write a block's selected indices behind those of the blocks before; returns the counts up to here."""
    above = (there & (key > threshold)).to(tl.int32)
    equal = (there & (key == threshold)).to(tl.int32)
    # One scan counts both: a block has fewer than 2**16 columns.
    counted = tl.cumsum(above | (equal << 16), 0)
    equal_rank = equal_before + (counted >> 16) - equal
    kept = (above == 1) | ((equal == 1) & (equal_rank < wanted))
    place = taken + (counted & 0xFFFF) - above + tl.minimum(equal_rank, wanted)
    if METHOD == 1:
        moved = base + index
        index = tl.where((base >= 0) & (moved <= _INT_MAX), moved, -1).to(tl.int32)
    if METHOD == 2:
        held = kept & (index // page_size < table_limit)
        page = tl.load(table_ptr + index // page_size, mask=held, other=-1)
        in_pool = held & (page >= 0) & (page < pages)
        index = tl.where(in_pool, page * page_size + index % page_size, -1)
    tl.store(out_ptr + place, index, mask=kept)
    if HAS_VALUES:
        tl.store(values_ptr + place, tl.load(value_ptr, mask=kept), mask=kept)
    return taken + tl.sum(above), equal_before + tl.sum(equal)


@triton.jit(
    do_not_specialize=(
        "starts_ptr", "lens_ptr", "bases_ptr", "requests_ptr", "table_ptr", "kept_ptr", "selected_ptr", "columns",
        "parts", "part", "next_n", "requests", "table_width", "pages", "table_stride", "selected_stride",
    )
)  # fmt: skip
def topk_kernel(
    logits_ptr, ids_ptr, starts_ptr, lens_ptr, bases_ptr, requests_ptr, table_ptr, kept_ptr, selected_ptr, values_ptr,
    columns, k, parts, part, target, next_n, requests, table_width, page_size, pages,
    logits_stride, table_stride, selected_stride,
    METHOD: tl.constexpr, HAS_IDS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_LENS: tl.constexpr,
    HAS_REQUESTS: tl.constexpr, HAS_VALUES: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
    SAMPLE: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Program (row, part): the k largest of a row, or of ``part`` of its columns, written ``part`` after part.

    ``target``: how many candidates to aim for, between k and ``CAPACITY``. ``ALIGNED``: every part begins and ends on a
    multiple of 16, so that its loads may be wide.
    """
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    first = tl.zeros((), tl.int32)
    length = tl.zeros((), tl.int32) + columns
    if HAS_STARTS:
        first = tl.minimum(tl.maximum(tl.load(starts_ptr + row), 0), columns).to(tl.int32)
        length -= first
    if HAS_LENS:
        length = tl.minimum(tl.maximum(tl.load(lens_ptr + row), 0), length).to(tl.int32)
    # A part's columns count from the row's own first entry.
    skipped = program % parts * part
    length = tl.minimum(tl.maximum(length - skipped, 0), part)
    if ALIGNED:
        skipped, length = tl.multiple_of(skipped, 16), tl.multiple_of(length, 16)
    logits = logits_ptr + row * logits_stride + first + skipped
    ids = ids_ptr + row * logits_stride
    base = tl.zeros((), tl.int64)
    table = table_ptr
    table_limit = tl.zeros((), tl.int32)
    if METHOD == 1:
        base = tl.load(bases_ptr + row).to(tl.int64)
    if METHOD == 2:
        request = row // next_n
        if HAS_REQUESTS:
            request = tl.load(requests_ptr + row).to(tl.int64)
        known = (request >= 0) & (request < requests)
        table += tl.where(known, request, 0) * table_stride
        table_limit = tl.where(known, table_width, 0).to(tl.int32)
    out = selected_ptr + program.to(tl.int64) * selected_stride
    values_out = values_ptr + program.to(tl.int64) * selected_stride

    # Everything is above this where there is no more than k; -inf is above it too.
    threshold = tl.zeros((), tl.uint32)
    wanted = tl.zeros((), tl.int32)
    taken = tl.zeros((), tl.int32)
    equal_before = tl.zeros((), tl.int32)
    count = length
    if HAS_IDS:
        compact = length <= CAPACITY
    else:
        kept = kept_ptr + program.to(tl.int64) * CAPACITY
        compact = (length > k) & (length <= CAPACITY)
        if (length > CAPACITY) & (k < CAPACITY):
            sampled, there = _sampled_keys(logits, length, SAMPLE)
            aim = tl.zeros((), tl.int32) + target
            tries = tl.zeros((), tl.int32)
            while (tries < 2) & (compact == 0):
                rank = tl.maximum((aim.to(tl.int64) * SAMPLE // length).to(tl.int32), 1)
                least, _ = _nth_key(sampled, there, rank, 2)
                # Triton orders no thread's load behind another's store; the reads below are of all threads' writes.
                tl.debug_barrier()
                count = _compact(logits, kept, length, least << 16, CAPACITY, BLOCK, STAGES)
                tl.debug_barrier()
                compact = (count >= k) & (count <= CAPACITY)
                aim = tl.where(count < k, CAPACITY - (CAPACITY - k) // 4, k + (target - k) // 2)
                tries += 1
    if compact:
        candidate = tl.arange(0, CAPACITY)
        listed = candidate < count
        place = candidate
        chosen = candidate + skipped
        if HAS_IDS:
            chosen = tl.load(ids + candidate, mask=listed, other=-1)
            listed = chosen >= 0
        else:
            if length > CAPACITY:
                place = tl.load(kept + candidate, mask=listed, other=0)
                chosen = place + skipped
        keys = _keys(tl.load(logits + place, mask=listed, other=float("-inf")))
        if tl.sum(listed.to(tl.int32)) > k:
            threshold, wanted = _nth_key(keys, listed, wanted + k, 4)
        taken, equal_before = _emit(
            keys, listed, chosen, logits + place, threshold, wanted, taken, equal_before, out, values_out,
            base, table, table_limit, page_size, pages, METHOD, HAS_VALUES,
        )  # fmt: skip
    else:
        candidates = length
        if HAS_IDS:
            candidates = tl.zeros((), tl.int32)
            for at in tl.range(0, length, BLOCK):
                _, there = _load_keys(logits, ids, at, length, HAS_IDS, BLOCK)
                candidates += tl.sum(there.to(tl.int32))
        if candidates > k:
            threshold, wanted = _nth_key_of_row(logits, ids, length, wanted + k, HAS_IDS, BLOCK)
        for at in tl.range(0, length, BLOCK):
            column = at + tl.arange(0, BLOCK)
            key, there = _load_keys(logits, ids, at, length, HAS_IDS, BLOCK)
            index = column + skipped
            if HAS_IDS:
                index = tl.load(ids + column, mask=there, other=0)
            taken, equal_before = _emit(
                key, there, index, logits + column, threshold, wanted, taken, equal_before, out, values_out,
                base, table, table_limit, page_size, pages, METHOD, HAS_VALUES,
            )  # fmt: skip
    filled = taken + tl.minimum(equal_before, wanted)
    for at in tl.range(filled, k, 256):
        unused = at + tl.arange(0, 256)
        tl.store(out + unused, tl.full((256,), -1, tl.int32), mask=unused < k)


_launch_topk = Launcher(topk_kernel)

_BLOCK, _STAGES = 1024, 3
# Candidates held at once: for most k a block of them stays in registers. Past the last, rows are gone through whole.
_CAPACITIES, _SAMPLE = (2048, 4096, 8192, 16384), 1024


def _sample(capacity: int) -> int:
    """Columns looked at first: with few of them, and 8 warps, two programs' registers fit an SM of sm_90."""
    return min(max(capacity // 2, _SAMPLE), capacity)


def _capacity(k: int) -> tuple[int, int]:
    """(room for candidates, how many to aim for), at k above all rooms the largest, which is then not used."""
    room = next((c for c in _CAPACITIES if 2 * k <= c), _CAPACITIES[-1])
    return room, min(k + max(k // 2, room // 4), room - room // 4)


class _Rows(NamedTuple):
    """What is selected from: logits, and the ids, starts and lengths of rows that have them."""

    logits: torch.Tensor
    ids: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


def _launch(
    source: _Rows,
    k: int,
    parts: tuple[int, int],
    method: TopkMethod,
    space: dict[str, Any],
    out: torch.Tensor,
    values: torch.Tensor | None,
) -> None:
    """Select from each row's ``(parts, columns of one)``; ``out`` and ``values`` have a row for each."""
    (logits, ids, starts, lengths), (count, part) = source, parts
    rows, width = logits.shape
    some: torch.Tensor = logits
    table = space.get("block_table", some)
    bases, requests = space.get("bases"), space.get("requests")
    capacity, target = _capacity(k)
    # Where lengths are loaded no load is wide, and what widths are need not be compiled for.
    aligned = lengths is None and starts is None and width % 16 == 0 and part % 16 == 0
    # Triton takes the type of what a kernel never reads as well.
    kept = out
    if ids is None and part > capacity > k:
        kept = torch.empty(rows * count, capacity, dtype=torch.int32, device=logits.device)
    _launch_topk(
        rows * count,
        (
            logits, some if ids is None else ids, some if starts is None else starts,
            some if lengths is None else lengths, some if bases is None else bases,
            some if requests is None else requests, table, kept, out, some if values is None else values,
        ),
        (
            width, k, count, part, target, space.get("next_n", 1), table.shape[0], table.shape[1],
            space.get("page_size", 1), space.get("pages", 0), logits.stride(0), table.stride(0), out.stride(0),
        ),
        (
            method.value, ids is not None, starts is not None, lengths is not None, requests is not None,
            values is not None, _BLOCK, capacity, _sample(capacity), _STAGES, aligned,
        ),
        num_warps=8 if capacity == _CAPACITIES[0] else 16,
    )  # fmt: skip


def topk_transform(
    logits: torch.Tensor,
    lengths: torch.Tensor | None,
    k: int,
    method: TopkMethod,
    row_starts: torch.Tensor | None,
    space: dict[str, Any],
    out: torch.Tensor,
) -> None:
    """Launch over rows > 0; a few long ones are cut, and what each part selects is selected from once more."""
    rows, width = logits.shape
    source = _Rows(logits, starts=row_starts, lengths=lengths)
    parts = min(2 * platform.limits(logits.device).multiprocessors // rows, width // least_part(k))
    if parts < 2:
        _launch(source, k, (1, width), method, space, out, None)
        return
    part = -(-width // (16 * parts)) * 16
    ids = torch.empty(rows * parts, k, dtype=torch.int32, device=logits.device)
    values = torch.empty(rows * parts, k, dtype=torch.float32, device=logits.device)
    _launch(source, k, (parts, part), TopkMethod.LOCAL, {}, ids, values)
    topk_merge(values.view(rows, parts * k), ids.view(rows, parts * k), k, method, space, out, None)


def topk_merge(
    values: torch.Tensor,
    ids: torch.Tensor,
    k: int,
    method: TopkMethod,
    space: dict[str, Any],
    out: torch.Tensor,
    out_values: torch.Tensor | None,
) -> None:
    """Launch over ``values, ids [rows, w]``, ids ascending but for the -1 between them; rows > 0."""
    _launch(_Rows(values, ids), k, (1, values.shape[1]), method, space, out, out_values)
