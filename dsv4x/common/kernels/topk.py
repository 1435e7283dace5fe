"""Selection of a row's k largest values: the k-th one found digit by digit, then everything above it in index order.

A value becomes an unsigned key of the same order. Four passes of 8-bit digits, a histogram each, narrow the key of the
k-th value; a last pass writes what is above it and the first of what equals it. Nothing depends on which thread comes
first, so the same logits give the same indices everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..platform import platform
from ..topk import TopkMethod

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
def topk_kernel(
    logits_ptr, ids_ptr, starts_ptr, lens_ptr, bases_ptr, requests_ptr, table_ptr, out_ptr, values_ptr,
    width, k, parts, part, next_n, requests, table_width, page_size, pages,
    logits_stride, table_stride, out_stride,
    METHOD: tl.constexpr, HAS_IDS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_LENS: tl.constexpr,
    HAS_REQUESTS: tl.constexpr, HAS_VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, part): the k largest of a row, or of ``part`` of its columns, written ``part`` after part."""
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    first = tl.zeros((), tl.int32)
    length = tl.zeros((), tl.int32) + width
    logits = logits_ptr + row * logits_stride
    if HAS_STARTS:
        first = tl.minimum(tl.maximum(tl.load(starts_ptr + row), 0), width).to(tl.int32)
        length -= first
    if HAS_LENS:
        length = tl.minimum(tl.maximum(tl.load(lens_ptr + row), 0), length).to(tl.int32)
    # A part's columns count from the row's own first entry.
    skipped = program % parts * part
    length = tl.minimum(tl.maximum(length - skipped, 0), part)
    logits += first + skipped
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
    out = out_ptr + program.to(tl.int64) * out_stride
    values_out = values_ptr + program.to(tl.int64) * out_stride

    digit = tl.arange(0, 256)
    candidates = tl.zeros((), tl.int32) + length
    if HAS_IDS:
        candidates = tl.zeros((), tl.int32)
        for at in tl.range(0, length, BLOCK):
            _, there = _load_keys(logits, ids, at, length, HAS_IDS, BLOCK)
            candidates += tl.sum(there.to(tl.int32))
    # Everything is above this where there is no more than k; -inf is above it too.
    threshold = tl.zeros((), tl.uint32)
    wanted = tl.zeros((), tl.int32)
    if candidates > k:
        wanted += k
        for place in tl.static_range(4):
            SHIFT: tl.constexpr = 24 - 8 * place
            counts = tl.zeros((256,), tl.int32)
            for at in tl.range(0, length, BLOCK):
                key, there = _load_keys(logits, ids, at, length, HAS_IDS, BLOCK)
                if place > 0:
                    there &= (key >> (SHIFT + 8)) == threshold
                counts += tl.histogram(((key >> SHIFT) & 255).to(tl.int32), 256, mask=there)
            above = tl.sum(counts) - tl.cumsum(counts, 0)
            here = (above < wanted) & (above + counts >= wanted)
            threshold = (threshold << 8) | tl.sum(tl.where(here, digit, 0)).to(tl.uint32)
            wanted -= tl.sum(tl.where(here, above, 0))
    taken = tl.zeros((), tl.int32)
    equal_before = tl.zeros((), tl.int32)
    for at in tl.range(0, length, BLOCK):
        column = at + tl.arange(0, BLOCK)
        key, there = _load_keys(logits, ids, at, length, HAS_IDS, BLOCK)
        above = (there & (key > threshold)).to(tl.int32)
        equal = (there & (key == threshold)).to(tl.int32)
        # One scan counts both: a block has fewer than 2**16 columns.
        counted = tl.cumsum(above | (equal << 16), 0)
        equal_rank = equal_before + (counted >> 16) - equal
        kept = (above == 1) | ((equal == 1) & (equal_rank < wanted))
        place = taken + (counted & 0xFFFF) - above + tl.minimum(equal_rank, wanted)
        index = column + skipped
        if HAS_IDS:
            index = tl.load(ids + column, mask=kept, other=0)
        if METHOD == 1:
            moved = base + index
            index = tl.where((base >= 0) & (moved <= _INT_MAX), moved, -1).to(tl.int32)
        if METHOD == 2:
            held = kept & (index // page_size < table_limit)
            page = tl.load(table + index // page_size, mask=held, other=-1)
            there_is = held & (page >= 0) & (page < pages)
            index = tl.where(there_is, page * page_size + index % page_size, -1)
        tl.store(out + place, index, mask=kept)
        if HAS_VALUES:
            tl.store(values_out + place, tl.load(logits + column, mask=kept), mask=kept)
        taken += tl.sum(above)
        equal_before += tl.sum(equal)
    filled = taken + tl.minimum(equal_before, wanted)
    for at in tl.range(filled, k, BLOCK):
        place = at + tl.arange(0, BLOCK)
        tl.store(out + place, tl.full((BLOCK,), -1, tl.int32), mask=place < k)


# Rows shorter than this are one program's; longer ones are shared where there are too few rows for the device.
_MIN_PART = 8192
_BLOCK, _WARPS = 4096, 8


def _launch(
    logits: torch.Tensor,
    ids: torch.Tensor | None,
    starts: torch.Tensor | None,
    lengths: torch.Tensor | None,
    k: int,
    parts: int,
    part: int,
    method: TopkMethod,
    space: dict[str, Any],
    out: torch.Tensor,
    values: torch.Tensor | None,
) -> None:
    rows, width = logits.shape
    some: torch.Tensor = logits
    table = space.get("block_table", some)
    requests = space.get("requests")
    topk_kernel[(rows * parts,)](
        logits, some if ids is None else ids, some if starts is None else starts, some if lengths is None else lengths,
        space.get("bases", some), some if requests is None else requests, table, out, some if values is None else values,
        width, k, parts, part, space.get("next_n", 1), table.shape[0], table.shape[1], space.get("page_size", 1),
        space.get("pages", 0), logits.stride(0), table.stride(0), out.stride(0),
        METHOD=method.value, HAS_IDS=ids is not None, HAS_STARTS=starts is not None, HAS_LENS=lengths is not None,
        HAS_REQUESTS=requests is not None, HAS_VALUES=values is not None, BLOCK=_BLOCK, num_warps=_WARPS,
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
    parts = min(2 * platform.limits(logits.device).multiprocessors // rows, width // max(_MIN_PART, 4 * k))
    if parts < 2:
        _launch(logits, None, row_starts, lengths, k, 1, width, method, space, out, None)
        return
    part = -(-width // parts)
    ids = torch.empty(rows * parts, k, dtype=torch.int32, device=logits.device)
    values = torch.empty(rows * parts, k, dtype=torch.float32, device=logits.device)
    _launch(logits, None, row_starts, lengths, k, parts, part, TopkMethod.LOCAL, {}, ids, values)
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
    _launch(values, ids, None, None, k, 1, values.shape[1], method, space, out, out_values)
