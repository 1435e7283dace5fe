"""Referenced units (pages or slots): marked in a bitmap, ranked by a prefix sum, listed, remapped; pages copied.

A pass covers the units from ``first`` on, as many as the bitmap has bits. ``ends`` holds, for each word of the bitmap,
how many units are marked up to its end; ``count`` holds how many the passes before marked.
"""

import math

import torch
import triton
import triton.language as tl

from .cache import COPY_WORDS
from .launch import Launcher
from .limits import PASS_UNITS, WORD_BITS

_BLOCK = 512
_WORDS = 64
_COPY_BYTES = 16384


@triton.jit
def _popcount(bits):
    """uint32 -> int32, by adding neighbours: Triton has no portable instruction for it."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits += bits >> 8
    return ((bits + (bits >> 16)) & 63).to(tl.int32)


@triton.jit
def _referenced(
    indices_ptr, lens_ptr, width, slots, unit_slots, first, units, indices_stride,
    HAS_LENS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(column, unit - first, slot inside the unit, whether it points into this pass) of this program's indices."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length = width
    if HAS_LENS:
        length = tl.minimum(tl.maximum(tl.load(lens_ptr + row), 0), width).to(tl.int32)
    index = tl.load(indices_ptr + row * indices_stride + column, mask=column < length, other=-1)
    valid = (index >= 0) & (index < slots)
    index = tl.where(valid, index, 0)
    if not WIDE:
        # As in the cache kernels: 64-bit division is for pools that need it.
        index = index.to(tl.int32)
    unit = index // unit_slots
    at = unit - first
    here = valid & (at >= 0) & (at < units)
    return column, tl.where(here, at, 0).to(tl.int32), index - unit * unit_slots, here


@triton.jit(do_not_specialize=("lens_ptr", "first", "units"))
def mark_kernel(
    indices_ptr, lens_ptr, words_ptr, width, slots, unit_slots, first, units, indices_stride,
    HAS_LENS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, at, _, here = _referenced(
        indices_ptr, lens_ptr, width, slots, unit_slots, first, units, indices_stride, HAS_LENS, WIDE, BLOCK
    )
    word = words_ptr + (at >> 5)
    bit = tl.full((BLOCK,), 1, tl.int32) << (at & 31)
    # Shared prefixes name the same units over and over; bits are only ever set, so an old word costs an atomic at most.
    unset = (tl.load(word, mask=here, other=0) & bit) == 0
    tl.atomic_or(word, bit, mask=here & unset, sem="relaxed")


@triton.jit(do_not_specialize=("ends_ptr",))
def popcount_kernel(words_ptr, ends_ptr, words, BLOCK: tl.constexpr):
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(words_ptr + word, mask=word < words, other=0).to(tl.uint32, bitcast=True)
    tl.store(ends_ptr + word, _popcount(bits), mask=word < words)


@triton.jit(do_not_specialize=("ends_ptr", "first", "capacity"))
def list_kernel(words_ptr, ends_ptr, count_ptr, listed_ptr, words, first, capacity, BLOCK: tl.constexpr):
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(words_ptr + word, mask=word < words, other=0).to(tl.uint32, bitcast=True)
    end = tl.load(ends_ptr + word, mask=word < words, other=0) + tl.load(count_ptr)
    bit = tl.arange(0, 32)
    from_here = bits[:, None] >> bit[None, :].to(tl.uint32)
    rank = end[:, None] - _popcount(from_here)
    unit = word.to(tl.int64)[:, None] * 32 + bit[None, :] + first
    listed = ((from_here & 1) == 1) & (rank < capacity)
    tl.store(listed_ptr + rank, unit.to(listed_ptr.dtype.element_ty), mask=listed)


@triton.jit(do_not_specialize=("lens_ptr", "ends_ptr", "first", "units", "capacity"))
def remap_kernel(
    indices_ptr, lens_ptr, words_ptr, ends_ptr, count_ptr, out_ptr,
    width, slots, unit_slots, first, units, capacity, indices_stride, out_stride,
    HAS_LENS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column, at, inside, here = _referenced(
        indices_ptr, lens_ptr, width, slots, unit_slots, first, units, indices_stride, HAS_LENS, WIDE, BLOCK
    )
    bits = tl.load(words_ptr + (at >> 5), mask=here, other=0).to(tl.uint32, bitcast=True)
    end = tl.load(ends_ptr + (at >> 5), mask=here, other=0) + tl.load(count_ptr)
    rank = end - _popcount(bits >> (at & 31).to(tl.uint32))
    index = (rank * unit_slots + inside).to(tl.int32)
    out = out_ptr + tl.program_id(0).to(tl.int64) * out_stride + column
    tl.store(out, index, mask=here & (rank < capacity))


@triton.jit
def copy_pages_kernel(
    cache_ptr, pages_ptr, out_ptr, page_words, page_stride, out_stride, WORD: tl.constexpr, BLOCK: tl.constexpr
):
    page = tl.load(pages_ptr + tl.program_id(0)).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # A limit instead of a second mask keeps the loads vectors, and the interpreter takes no scalar & tensor mask.
    mask = word < tl.where(page >= 0, page_words, 0)
    source = (cache_ptr + page * page_stride).to(tl.pointer_type(WORD))
    target = (out_ptr + tl.program_id(0).to(tl.int64) * out_stride).to(tl.pointer_type(WORD))
    tl.store(target + word, tl.load(source + word, mask=mask), mask=mask)


_launch_mark, _launch_popcount = Launcher(mark_kernel), Launcher(popcount_kernel)
_launch_list, _launch_remap = Launcher(list_kernel), Launcher(remap_kernel)
_launch_copy = Launcher(copy_pages_kernel)


def list_referenced(indices, lens, slots, unit_slots, listed, remapped, count):
    """Launch pass after pass; ``listed`` and ``remapped`` come filled with -1 and ``count`` with 0."""
    rows, width = indices.shape
    units = slots // unit_slots
    words = triton.cdiv(min(units, PASS_UNITS), WORD_BITS)
    bitmap = torch.empty(words, dtype=torch.int32, device=indices.device)
    ends = torch.empty_like(bitmap)
    over_indices, over_words = (rows, triton.cdiv(width, _BLOCK), 1), triton.cdiv(words, _WORDS)
    constexprs = (lens is not None, slots > 2**31 - 1, _BLOCK)
    lens = lens if lens is not None else count
    for first in range(0, units, PASS_UNITS):
        here = min(units - first, PASS_UNITS)
        place = (width, slots, unit_slots, first, here)
        bitmap.zero_()
        _launch_mark(over_indices, (indices, lens, bitmap), (*place, indices.stride(0)), constexprs, 4)
        _launch_popcount(over_words, (bitmap, ends), (words,), (_WORDS,), 4)
        ends.cumsum_(0)
        _launch_list(over_words, (bitmap, ends, count, listed), (words, first, listed.shape[0]), (_WORDS,), 4)
        _launch_remap(
            over_indices,
            (indices, lens, bitmap, ends, count, remapped),
            (*place, listed.shape[0], indices.stride(0), remapped.stride(0)),
            constexprs,
            4,
        )
        count += ends[-1:]


def copy_pages(cache, pages, out):
    """Launch over ``pages [P]``: page ``pages[i]`` of ``cache`` becomes page i of ``out``; -1 leaves it alone."""
    page_bytes = cache.page_bytes.shape[1]
    word_bytes = math.gcd(page_bytes, 8)
    page_words = page_bytes // word_bytes
    block = min(_COPY_BYTES // word_bytes, triton.next_power_of_2(page_words))
    _launch_copy(
        (pages.shape[0], triton.cdiv(page_words, block), 1),
        (cache.data, pages, out.data),
        (page_words, cache.page_stride, out.page_stride),
        (COPY_WORDS[word_bytes], block),
        4,
    )
