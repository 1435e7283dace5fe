"""Selection of a row's k largest values in one launch, whose work follows from the rows' lengths on the device.

A value becomes an integer key of the same order. A short row's keys stay in one program's registers, where the k-th is
searched for by counting the keys above seven pivots at a time. A long row is cut into parts, a program each. All look
at the same sample of the whole row, which tells a key that some more than k values pass, and write down the columns
that pass it, in their order. The part that is done last searches among these. Where the sample was no guide (too few
pass, or more than there is room for, as with many equal values) the last part goes through the row digit by digit.

The result is the k largest, equal ones by the smaller index, in index order. Nothing depends on which thread or part
comes first, on the width of the buffer, on the rows beside or on how many parts there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.logits_calls import SelectionCall
from ..core.platform import platform
from ..core.spaces import TopkMethod
from .decode import depends_early
from .launch import Launcher
from .portability import INTERPRETED

_INT_MAX = tl.constexpr(2**31 - 1)
_ABSENT = tl.constexpr(-(2**31))
"""The key of no value, below all others."""
_NEGATIVE_INFINITY = tl.constexpr(-(2**31) + 0x7FFFFF)
_INFINITY = tl.constexpr(0x7F800000)
# Parts of a row, and so the entries of a row's ``ends``.
_PARTS = tl.constexpr(64)
_BISECTIONS = tl.constexpr(6)
# A program's list: keys, columns, how many of them, and where the lists of the row's parts end.
_TAIL = tl.constexpr(2 * 64)


@triton.jit
def _keys(values):
    """float32 -> int32 of the same order; NaN as -inf, -0 as 0."""
    values = tl.where(values == values, values, float("-inf"))
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & _INT_MAX)


@triton.jit
def _values(keys):
    """The values of keys."""
    return (keys ^ ((keys >> 31) & _INT_MAX)).to(tl.float32, bitcast=True)


@triton.jit
def _load_keys(logits_ptr, ids_ptr, column, length, HAS_IDS: tl.constexpr, ALIGNED: tl.constexpr):
    """Keys of columns below ``length``; absent where an id is negative.

    ``ALIGNED``: four columns from a multiple of four on may be loaded together if one of them is below ``length``.
    """
    there = column < length
    if HAS_IDS:
        there = tl.load(ids_ptr + column, mask=there, other=-1) >= 0
    if ALIGNED:
        values = tl.load(logits_ptr + column, mask=column < (length + 3) // 4 * 4, other=0.0)
    else:
        values = tl.load(logits_ptr + column, mask=there, other=0.0)
    return tl.where(there, _keys(values), _ABSENT)


@triton.jit
def _low_high(low, high, other_low, other_high):
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def _add(a, b, c, d, other_a, other_b, other_c, other_d):
    return a + other_a, b + other_b, c + other_c, d + other_d


@triton.jit
def _least_and_most(low, high):
    # The interpreter calls a combination of tuples once an element.
    if INTERPRETED:
        return tl.min(low), tl.max(high)
    else:
        return tl.reduce((low, high), 0, _low_high)


@triton.jit
def _sums(a, b, c, d):
    if INTERPRETED:
        return tl.sum(a), tl.sum(b), tl.sum(c), tl.sum(d)
    else:
        return tl.reduce((a, b, c, d), 0, _add)


@triton.jit
def _scaled(key):
    """Keys of 24 bits, linear in the values between the least and the largest finite one; all 0 where none are.

    Order is kept but for values that are close together and become equal.
    """
    finite = (key > _NEGATIVE_INFINITY) & (key < _INFINITY)
    low, high = _least_and_most(tl.where(finite, key, _INT_MAX), tl.where(finite, key, _ABSENT))
    least = _values(low)
    scale = 16777215.0 / (_values(high) - least)
    usable = (low < high) & (scale > 0.0) & (scale < float("inf"))
    place = tl.minimum(tl.maximum((_values(key) - least) * scale, 0.0), 16777215.0)
    return tl.where(key == _ABSENT, -1, tl.where(usable, place, 0.0).to(tl.int32))


@triton.jit
def _counts_from(x, low, step):
    """How many of ``x`` are at least ``low + i * step``, for i from 1 to 7. Two counts share a word: x < 2**16 long."""
    a = (x >= low + step).to(tl.int32) | ((x >= low + 2 * step).to(tl.int32) << 16)
    b = (x >= low + 3 * step).to(tl.int32) | ((x >= low + 4 * step).to(tl.int32) << 16)
    c = (x >= low + 5 * step).to(tl.int32) | ((x >= low + 6 * step).to(tl.int32) << 16)
    d = (x >= low + 7 * step).to(tl.int32)
    a, b, c, d = _sums(a, b, c, d)
    return a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16, c & 0xFFFF, c >> 16, d


@triton.jit
def _narrow(pivot, count, wanted, low, high, at_low, at_high):
    """The bounds after it is known that ``count`` values are at least ``pivot``."""
    enough = count >= wanted
    low, at_low = tl.where(enough, pivot, low), tl.where(enough, count, at_low)
    lower = (count < wanted) & (pivot < high)
    return low, tl.where(lower, pivot, high), at_low, tl.where(lower, count, at_high)


@triton.jit
def _search(key, count, wanted, most):
    """(x, low, at_low, at_high): ``low`` is the largest of some bounds that at least ``wanted`` of x pass.

    ``x`` are the keys, or numbers that order them as well around the bound. ``at_low`` of them are at least ``low``: no
    more than ``most``, unless those equal to ``low`` are too many; then ``at_high`` are above it. ``count``: the
    keys that are not absent, at least ``wanted``.
    """
    x = _scaled(key)
    exact = tl.zeros((), tl.int32)
    low, high = tl.zeros((), tl.int32), tl.full((), 1 << 24, tl.int32)
    at_low, at_high = tl.zeros((), tl.int32) + count, tl.zeros((), tl.int32)
    while (at_low > most) & ((exact == 0) | (low != high - 1)):
        if low == high - 1:
            # What shares a number is told apart by its keys.
            x = tl.where(x == low, key, tl.where(x > low, _INT_MAX, _ABSENT))
            exact += 1
            low, high = tl.full((), _NEGATIVE_INFINITY, tl.int32), tl.full((), _INFINITY + 1, tl.int32)
        step = (((high - low).to(tl.uint32, bitcast=True) + 7) >> 3).to(tl.int32)
        c1, c2, c3, c4, c5, c6, c7 = _counts_from(x, low, step)
        first = low
        low, high, at_low, at_high = _narrow(first + step, c1, wanted, low, high, at_low, at_high)
        low, high, at_low, at_high = _narrow(first + 2 * step, c2, wanted, low, high, at_low, at_high)
        low, high, at_low, at_high = _narrow(first + 3 * step, c3, wanted, low, high, at_low, at_high)
        low, high, at_low, at_high = _narrow(first + 4 * step, c4, wanted, low, high, at_low, at_high)
        low, high, at_low, at_high = _narrow(first + 5 * step, c5, wanted, low, high, at_low, at_high)
        low, high, at_low, at_high = _narrow(first + 6 * step, c6, wanted, low, high, at_low, at_high)
        low, high, at_low, at_high = _narrow(first + 7 * step, c7, wanted, low, high, at_low, at_high)
    return x, low, at_low, at_high


@triton.jit
def _threshold(key, count, wanted):
    """(x, threshold, equals wanted): the ``wanted`` largest are above the threshold, or the first ones equal to it."""
    x = key
    threshold, equals = tl.full((), _ABSENT, tl.int32), tl.zeros((), tl.int32)
    if count > wanted:
        x, low, at_low, at_high = _search(key, count, wanted, wanted)
        whole = at_low == wanted
        threshold = tl.where(whole, low - 1, low)
        equals = tl.where(whole, 0, wanted - at_high)
    return x, threshold, equals


@triton.jit
def _sampled_least(logits_ptr, length, k, SAMPLE: tl.constexpr):
    """A key that some more than k of a row's values pass, by ``SAMPLE < length`` of them in groups of four.

    Of a sample of the values, n of the k largest are binomial; 4.3 deviations more than are expected leave one row in
    100 000 with fewer than k.
    """
    at = tl.arange(0, SAMPLE)
    column = ((at // 4).to(tl.int64) * length // (SAMPLE // 4)).to(tl.int32) // 4 * 4 + at % 4
    key = _keys(tl.load(logits_ptr + column))
    expected = (tl.zeros((), tl.float32) + k) * SAMPLE / length.to(tl.float32)
    rank = (expected + 9.3 + 4.3 * tl.sqrt(expected + 4.7)).to(tl.int32) + 1
    least = tl.full((), _NEGATIVE_INFINITY, tl.int32)
    if rank < SAMPLE:
        x, low, _, _ = _search(key, SAMPLE, rank, rank + rank // 8 + 2)
        least = tl.min(tl.where(x >= low, key, _INT_MAX))
    return least


@triton.jit
def _keep(key, column, least, list_ptr, count, ROOM: tl.constexpr):
    """Write down the keys of a block that are at least ``least``, and their columns, behind ``count`` others."""
    kept = (key >= least).to(tl.int32)
    ends = tl.cumsum(kept, 0)
    place = count + ends - kept
    fits = (kept == 1) & (place < ROOM)
    tl.store(list_ptr + place, key, mask=fits)
    tl.store(list_ptr + ROOM + place, column, mask=fits)
    return count + tl.max(ends)


@triton.jit
def _list_part(
    logits_ptr, list_ptr, length, first, last, k,
    ALIGNED: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """List, in order, the columns from ``first`` to ``last`` that may be among the row's k best; returns how many."""
    column = first + tl.arange(0, BLOCK)
    # On its way while the sample is looked at.
    ahead = _load_keys(logits_ptr, logits_ptr, column, last, False, ALIGNED)
    least = _sampled_least(logits_ptr, length, k, SAMPLE)
    count = _keep(ahead, column, least, list_ptr, tl.zeros((), tl.int32), ROOM)
    for at in tl.range(first + BLOCK, last, BLOCK, num_stages=STAGES):
        column = at + tl.arange(0, BLOCK)
        if ALIGNED:
            at = tl.multiple_of(at, 4)
            column = tl.max_contiguous(tl.multiple_of(column, 4), 4)
        key = _load_keys(logits_ptr, logits_ptr, column, last, False, ALIGNED)
        count = _keep(key, column, least, list_ptr, count, ROOM)
    return count


@triton.jit
def _part_of(ends_ptr, place):
    """Which part's list a place in the row's joined lists is in, and where that list begins."""
    part = place * 0
    for halving in tl.static_range(_BISECTIONS):
        half = _PARTS >> (halving + 1)
        part += tl.where(tl.load(ends_ptr + part + (half - 1)) <= place, half, 0)
    return part, tl.load(ends_ptr + part - 1, mask=part > 0, other=0)


@triton.jit
def _listed(list_ptr, ends_ptr, place, count, parts, ROOM: tl.constexpr):
    """(keys, columns) at places of the joined lists of a row's parts, which begin at ``list_ptr``."""
    there = place < count
    listed = list_ptr + place
    if parts > 1:
        part, before = _part_of(ends_ptr, place)
        listed = list_ptr + part * (2 * ROOM + _TAIL) + (place - before)
    key = tl.load(listed, mask=there, other=_ABSENT)
    return key, tl.load(listed + ROOM, mask=there, other=0)


@triton.jit
def _emit(
    x, index, value_ptr, threshold, wanted, taken, equal_before, chosen_ptr, values_ptr, HAS_VALUES: tl.constexpr
):  # fmt: skip
    """Write a block's selected columns behind those of the blocks before; returns the counts up to here."""
    above = (x > threshold).to(tl.int32)
    equal = (x == threshold).to(tl.int32)
    # One scan counts both: a block has fewer than 2**15 columns.
    counted = tl.cumsum(above | (equal << 16), 0)
    equal_rank = equal_before + (counted >> 16) - equal
    kept = (above == 1) | ((equal == 1) & (equal_rank < wanted))
    place = taken + (counted & 0xFFFF) - above + tl.minimum(equal_rank, wanted)
    tl.store(chosen_ptr + place, index, mask=kept)
    if HAS_VALUES:
        tl.store(values_ptr + place, tl.load(value_ptr, mask=kept), mask=kept)
    # Both counts grow along the block, so the word does.
    total = tl.max(counted)
    return taken + (total & 0xFFFF), equal_before + (total >> 16)


@triton.jit
def _in_space(index, base, table_ptr, table_limit, page_size, pages, METHOD: tl.constexpr):
    """Local indices in the space of the method; -1 for -1 and where there is none."""
    if METHOD == 1:
        moved = base + index
        index = tl.where((index >= 0) & (base >= 0) & (moved <= _INT_MAX), moved, -1).to(tl.int32)
    if METHOD == 2:
        held = (index >= 0) & (index // page_size < table_limit)
        page = tl.load(table_ptr + index // page_size, mask=held, other=-1)
        in_pool = held & (page >= 0) & (page < pages)
        index = tl.where(in_pool, page * page_size + index % page_size, -1)
    return index


@triton.jit
def _write(
    chosen_ptr, chosen, filled, k, out_ptr, local_ptr, base, table_ptr, table_limit, page_size, pages,
    METHOD: tl.constexpr, HAS_LOCAL: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Put a row's ``filled`` columns, chosen ones or where 0 are the first, in the space of the method, then -1."""
    # All threads' choices are read here.
    tl.debug_barrier()
    for at in tl.range(0, k, AT_ONCE):
        place = at + tl.arange(0, AT_ONCE)
        index = tl.load(chosen_ptr + place, mask=place < chosen, other=-1)
        index = tl.where((place >= chosen) & (place < filled), place, index)
        if HAS_LOCAL:
            tl.store(local_ptr + place, index, mask=place < k)
        moved = _in_space(index, base, table_ptr, table_limit, page_size, pages, METHOD)
        tl.store(out_ptr + place, moved, mask=place < k)


@triton.jit
def _select_block(
    logits_ptr, ids_ptr, list_ptr, ends_ptr, count, k, parts, chosen_ptr, values_ptr,
    HAS_IDS: tl.constexpr, HAS_VALUES: tl.constexpr, ALIGNED: tl.constexpr, LISTED: tl.constexpr,
    ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Select among ``count <= BLOCK`` columns of a row, or entries of its ``parts`` lists; returns how many."""
    place = tl.arange(0, BLOCK)
    index = place
    if LISTED:
        key, index = _listed(list_ptr, ends_ptr, place, count, parts, ROOM)
    else:
        key = _load_keys(logits_ptr, ids_ptr, place, count, HAS_IDS, ALIGNED)
        if HAS_IDS:
            index = tl.load(ids_ptr + place, mask=place < count, other=-1)
            count = tl.sum((index >= 0).to(tl.int32))
    x, threshold, equals = _threshold(key, count, k)
    zero = tl.zeros((), tl.int32)
    taken, equal = _emit(
        x, index, logits_ptr + place, threshold, equals, zero, zero, chosen_ptr, values_ptr, HAS_VALUES
    )
    return taken + tl.minimum(equal, equals)


@triton.jit
def _digit_counts(key, threshold, SHIFT: tl.constexpr):
    """How many keys whose higher digits are ``threshold`` have each digit at ``SHIFT``."""
    there = key != _ABSENT
    unsigned = key.to(tl.uint32, bitcast=True) ^ 0x80000000
    if SHIFT < 24:
        there = there & ((unsigned >> (SHIFT + 8)) == threshold)
    return tl.histogram(((unsigned >> SHIFT) & 255).to(tl.int32), 256, mask=there)


@triton.jit
def _nth_key_of_row(logits_ptr, ids_ptr, length, wanted, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr):
    """(the ``wanted``-th largest key, its rank among its equals), a digit a pass over the row."""
    threshold = tl.zeros((), tl.uint32)
    for place in tl.static_range(4):
        counts = tl.zeros((256,), tl.int32)
        for at in tl.range(0, length, BLOCK):
            key = _load_keys(logits_ptr, ids_ptr, at + tl.arange(0, BLOCK), length, HAS_IDS, False)
            counts += _digit_counts(key, threshold, 24 - 8 * place)
        above = tl.sum(counts) - tl.cumsum(counts, 0)
        here = (above < wanted) & (above + counts >= wanted)
        digit = tl.sum(tl.where(here, tl.arange(0, 256), 0))
        threshold = (threshold << 8) | digit.to(tl.uint32)
        wanted -= tl.sum(tl.where(here, above, 0))
    return (threshold ^ 0x80000000).to(tl.int32, bitcast=True), wanted


@triton.jit
def _select_by_passes(
    logits_ptr, ids_ptr, length, k, chosen_ptr, values_ptr,
    HAS_IDS: tl.constexpr, HAS_VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Select from a row of any length, whatever its values; returns how many."""
    count = length
    if HAS_IDS:
        count = tl.zeros((), tl.int32)
        for at in tl.range(0, length, BLOCK):
            column = at + tl.arange(0, BLOCK)
            count += tl.sum((tl.load(ids_ptr + column, mask=column < length, other=-1) >= 0).to(tl.int32))
    threshold, wanted = tl.full((), _ABSENT, tl.int32), tl.zeros((), tl.int32)
    if count > k:
        threshold, wanted = _nth_key_of_row(logits_ptr, ids_ptr, length, wanted + k, HAS_IDS, BLOCK)
    taken, equal = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for at in tl.range(0, length, BLOCK):
        column = at + tl.arange(0, BLOCK)
        key = _load_keys(logits_ptr, ids_ptr, column, length, HAS_IDS, False)
        index = column
        if HAS_IDS:
            index = tl.load(ids_ptr + column, mask=column < length, other=-1)
        taken, equal = _emit(
            key, index, logits_ptr + column, threshold, wanted, taken, equal, chosen_ptr, values_ptr, HAS_VALUES
        )  # fmt: skip
    return taken + tl.minimum(equal, wanted)


@triton.jit
def _join_lists(list_ptr, ends_ptr, counter_ptr, count, part, parts, ROOM: tl.constexpr):
    """Leave a part's count. Returns how many all lists of the row hold, and to how many parts that is known.

    To the part that is done last, all ``parts`` are; to the others, none. The counter is 0 before and after.
    """
    known = parts
    if parts > 1:
        tl.store(list_ptr + part * (2 * ROOM + _TAIL) + 2 * ROOM, count)
        # The count and the list are all threads' writes, which the atomic of one thread publishes.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        known = tl.where(arrived == parts - 1, parts, 0)
        if known > 0:
            tl.debug_barrier()
            tl.store(counter_ptr, 0)
            each = tl.arange(0, _PARTS)
            counts = tl.load(list_ptr + each * (2 * ROOM + _TAIL) + 2 * ROOM, mask=each < parts, other=0)
            ends = tl.cumsum(counts, 0)
            tl.store(ends_ptr + each, ends)
            count = tl.max(ends)
    tl.debug_barrier()
    return count, known


@triton.jit(
    do_not_specialize=(
        "starts_ptr", "lens_ptr", "bases_ptr", "requests_ptr", "table_ptr", "selected_ptr", "local_ptr", "values_ptr",
        "rows", "columns", "k", "parts", "part_columns", "next_n", "requests", "table_width", "page_size", "pages",
        "logits_stride", "table_stride", "selected_stride", "local_stride",
    )
)  # fmt: skip
def topk_kernel(
    logits_ptr, ids_ptr, starts_ptr, lens_ptr, bases_ptr, requests_ptr, table_ptr, scratch_ptr, counters_ptr,
    selected_ptr, local_ptr, values_ptr,
    rows, columns, k, parts, part_columns, next_n, requests, table_width, page_size, pages,
    logits_stride, table_stride, selected_stride, local_stride,
    METHOD: tl.constexpr, HAS_IDS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_LENS: tl.constexpr,
    HAS_REQUESTS: tl.constexpr, HAS_LOCAL: tl.constexpr, HAS_VALUES: tl.constexpr, ALIGNED: tl.constexpr,
    LISTS: tl.constexpr, EARLY: tl.constexpr, SMALL: tl.constexpr, LARGE: tl.constexpr, ROOM: tl.constexpr,
    SAMPLE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (row, part), or a row after the other where ``parts`` is 1.

    ``parts``: programs a row at most; it uses one for ``part_columns`` of its own length, and the others return.
    ``LISTS``: whether rows longer than ``LARGE`` are selected from by lists, which hold ``ROOM`` at most.
    """
    if EARLY:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    program = tl.program_id(0)
    part = program % parts
    for which in range(program // parts, rows, tl.num_programs(0) // parts):
        row = tl.zeros((), tl.int64) + which
        first = tl.zeros((), tl.int32)
        length = tl.zeros((), tl.int32) + columns
        if HAS_STARTS:
            first = tl.minimum(tl.maximum(tl.load(starts_ptr + row), 0), columns).to(tl.int32)
            length -= first
        if HAS_LENS:
            length = tl.minimum(tl.maximum(tl.load(lens_ptr + row), 0), length).to(tl.int32)
        # Rows of few columns need one program, and so do those that are gone through whole.
        used = tl.full((), 1, tl.int32)
        if LISTS:
            used = tl.where(length > LARGE, tl.minimum(tl.cdiv(length, part_columns), parts), 1)
        if part < used:
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
            offset = row * logits_stride
            if ALIGNED:
                offset = tl.multiple_of(offset, 4)
            logits = logits_ptr + offset + first
            ids = ids_ptr + row * logits_stride
            out = selected_ptr + row * selected_stride
            local = local_ptr + row * local_stride
            values = values_ptr + row * selected_stride
            lists = scratch_ptr + (program - part).to(tl.int64) * (2 * ROOM + _TAIL)
            ends = lists + 2 * ROOM + _PARTS

            # Parts whose lists are known to this program: none of a short row; 0 candidates: it is not the last part.
            listed = tl.zeros((), tl.int32)
            candidates = length
            if LISTS:  # noqa: SIM102 - a constant, and a branch
                if length > LARGE:
                    share = tl.cdiv(tl.cdiv(length, used), 16) * 16
                    begin = tl.minimum(part * share, length)
                    # Another row's list may still be read.
                    tl.debug_barrier()
                    mine = lists + part * (2 * ROOM + _TAIL)
                    count = _list_part(
                        logits, mine, length, begin, tl.minimum(begin + share, length), k,
                        ALIGNED, SAMPLE, BLOCK, STAGES, ROOM,
                    )  # fmt: skip
                    candidates, listed = _join_lists(lists, ends, counters_ptr + row, count, part, used, ROOM)
            if (listed > 0) | (length <= LARGE) | (not LISTS):
                # Selected columns pass through the result, where nobody asks for them.
                chosen = out
                if HAS_LOCAL:
                    chosen = local
                filled = length
                whole = tl.zeros((), tl.int32)
                if not HAS_IDS:
                    whole = tl.where(length <= k, 1, 0)
                if whole == 0:
                    guided = (listed > 0) & (candidates >= k) & (candidates <= ROOM)
                    if (guided == 0) & ((listed > 0) | (length > LARGE)):
                        filled = _select_by_passes(
                            logits, ids, length, k, chosen, values, HAS_IDS, HAS_VALUES, BLOCK
                        )  # fmt: skip
                    elif listed > 0:
                        if LISTS:
                            if candidates <= SMALL:
                                filled = _select_block(
                                    logits, ids, lists, ends, candidates, k, listed, chosen, values,
                                    HAS_IDS, HAS_VALUES, ALIGNED, True, ROOM, SMALL,
                                )  # fmt: skip
                            else:
                                filled = _select_block(
                                    logits, ids, lists, ends, candidates, k, listed, chosen, values,
                                    HAS_IDS, HAS_VALUES, ALIGNED, True, ROOM, ROOM,
                                )  # fmt: skip
                    elif candidates <= SMALL:
                        filled = _select_block(
                            logits, ids, lists, ends, candidates, k, 0, chosen, values,
                            HAS_IDS, HAS_VALUES, ALIGNED, False, ROOM, SMALL,
                        )  # fmt: skip
                    else:
                        filled = _select_block(
                            logits, ids, lists, ends, candidates, k, 0, chosen, values,
                            HAS_IDS, HAS_VALUES, ALIGNED, False, ROOM, LARGE,
                        )  # fmt: skip
                _write(
                    chosen, tl.where(whole == 1, 0, filled), filled, k, out, local, base, table, table_limit, page_size,
                    pages, METHOD, HAS_LOCAL, SMALL,
                )  # fmt: skip


_launch_topk = Launcher(topk_kernel)


class _Sizes(NamedTuple):
    """Columns of blocks.

    Attributes:
        small, large: a row that a program holds in registers; of a long row's candidates it holds twice as many.
        sample: columns of a long row that are looked at first; at most ``large``.
        block: columns of a part gone through at a time.
        part: columns of a row for which it gets one more program.
        stages: blocks on their way at a time.
        threads: of a program.
    """

    small: int = 2048
    large: int = 4096
    sample: int = 4096
    block: int = 4096
    part: int = 4096
    stages: int = 3
    threads: int = 512


_SIZES = _Sizes()


def num_warps(arch: str) -> int:
    """Warps of a program: as many threads, and so columns a thread, on every arch."""
    return _SIZES.threads // (64 if arch.startswith("gfx9") else 32)


_PER_MULTIPROCESSOR = 1
"""Programs that a multiprocessor of sm_90 holds."""


class _Rows(NamedTuple):
    """What is selected from: logits, and the ids, starts and lengths of rows that have them."""

    logits: torch.Tensor
    ids: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


class _Target(NamedTuple):
    """Where selected indices go: in the space of the method, as local entries, and their values."""

    out: torch.Tensor
    local: torch.Tensor | None = None
    values: torch.Tensor | None = None


_COUNTERS = 1 << 16
_counters_of: dict[Any, torch.Tensor] = {}
_captured_of: dict[torch.device, int] = {}


def _counters(device: torch.device, rows: int) -> torch.Tensor:
    """int32 ``[>= rows]`` counters, zero whenever no launch that was given them runs.

    A stream's launches run one after the other and share theirs. Graphs may be replayed side by side, so each captured
    launch gets its own of what the device's first eager launch set aside, for good. Where that is used up, or was not
    there, a graph clears its own at each replay.
    """
    if device.type != "cuda":
        return torch.zeros(rows, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    if torch.cuda.is_current_stream_capturing():
        used, kept = _captured_of.get(device, 0), _counters_of.get(device)
        size = -(-rows // 8) * 8
        if kept is None or used + size > _COUNTERS:
            return torch.zeros(rows, dtype=torch.int32, device=device)
        _captured_of[device] = used + size
        return kept[used : used + size]
    if device not in _counters_of:
        _counters_of[device] = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()
    key = device, stream.cuda_stream
    if key not in _counters_of or _counters_of[key].shape[0] < rows:
        _counters_of[key] = torch.zeros(max(rows, 256), dtype=torch.int32, device=device)
    return _counters_of[key]


def _scratch(device: torch.device, programs: int, room: int) -> torch.Tensor:
    """Lists of as many programs as run at once."""
    return torch.empty(programs, 2 * room + _TAIL.value, dtype=torch.int32, device=device)


def _launch(source: _Rows, k: int, method: TopkMethod, space: dict[str, Any], target: _Target) -> None:
    (logits, ids, starts, lengths), (out, local, values) = source, target
    rows, width = logits.shape
    some: torch.Tensor = logits
    table = space.get("block_table", some)
    bases, requests = space.get("bases"), space.get("requests")
    sizes, limits = _SIZES, platform.limits(logits.device)
    programs = _PER_MULTIPROCESSOR * limits.multiprocessors
    # A list of twice k and more is what a sample finds; longer rows than any model's find more.
    room = sizes.large if 8 * k <= sizes.large else 2 * sizes.large
    lists = ids is None and width > sizes.large and 4 * k <= room
    # From the rows alone: the device knows their lengths.
    parts = max(1, min(_PARTS.value, programs // rows)) if lists else 1
    grid = rows * parts
    # What stands for them is specialized already: another tensor's alignment would be one more compilation.
    scratch = counters = logits
    if lists:
        grid = grid if parts > 1 else min(rows, 2 * programs)
        scratch = _scratch(logits.device, grid, room)
        if parts > 1:
            counters = _counters(logits.device, rows)
    aligned = ids is None and starts is None and width % 4 == 0 and logits.stride(0) % 4 == 0
    aligned = aligned and logits.data_ptr() % 16 == 0
    early = depends_early(limits.arch)
    _launch_topk(
        grid,
        (
            logits, some if ids is None else ids, some if starts is None else starts,
            some if lengths is None else lengths, some if bases is None else bases,
            some if requests is None else requests, table, scratch, counters, out, out if local is None else local,
            some if values is None else values,
        ),
        (
            rows, width, k, parts, sizes.part, space.get("next_n", 1), table.shape[0], table.shape[1],
            space.get("page_size", 1), space.get("pages", 0), logits.stride(0), table.stride(0), out.stride(0),
            0 if local is None else local.stride(0),
        ),
        (
            method.value, ids is not None, starts is not None, lengths is not None, requests is not None,
            local is not None, values is not None, aligned, lists, early, sizes.small, sizes.large, room,
            sizes.sample, sizes.block, sizes.stages,
        ),
        num_warps=num_warps(limits.arch),
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def topk_transform(call: SelectionCall) -> None:
    """One launch."""
    rows = _Rows(call.logits, starts=call.row_starts, lengths=call.lengths)
    _launch(rows, call.k, call.method, call.space, _Target(call.out, call.out_local))


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
    _launch(_Rows(values, ids), k, method, space, _Target(out, values=out_values))
