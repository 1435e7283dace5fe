"""Storing, reading and moving K entries: one kernel each, its layout the record's constants.

A program takes a few rows, as tiles of values that share a scale, or as words where only bytes matter. Addresses are
int64, invalid slots are never touched.
Launchers count programs in plain Python: triton.cdiv costs the host microseconds.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.layouts import CacheLayout, PagedCache, scale_carry
from ..core.platform import platform
from .encodings import (
    e2m1_to_f32,
    e4m3fn_to_f32,
    f32_to_e2m1,
    f32_to_e4m3fn,
    f32_to_e4m3fnuz,
    scale_byte,
    scale_e4m3,
    ue8m0_to_f32,
)
from .entries import decode_fp8, entry_format, locate
from .launch import Launch, Launcher
from .portability import to_bf16

# (rows a program, warps): the best of a sweep on an H200 at 262 144 rows.
_DEQUANTIZE_SHAPE = (4, 2)
_QUANTIZE_SHAPE = (4, 1)
_QUANTIZE_SHAPES = {"DSv4": (16, 2), "DSv4.1 fp4": (8, 4)}

# Words a program copies, eight a thread; no sweep was run.
_COPY_BLOCK, COPY_WARPS = 512, 2
# Whole 8-byte words cover every named layout but the indexer's: its scales, and its pages of few entries.
COPY_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


def dequantize_shape(layout: CacheLayout) -> tuple[int, int]:
    """(rows a program, warps): as many values of short entries as of long ones."""
    rows, warps = _DEQUANTIZE_SHAPE
    return rows * max(1, 512 // layout.head_dim), warps


def quantize_shape(layout: CacheLayout) -> tuple[int, int]:
    """The same for the writer."""
    rows, warps = _QUANTIZE_SHAPES.get(layout.name, _QUANTIZE_SHAPE)
    return rows * max(1, 512 // layout.head_dim), warps


@triton.jit
def _locate_rows(
    cache_ptr, slots_ptr, row, rows, capacity, page_size, page_stride, WIDE: tl.constexpr, FORMAT: tl.constexpr
):
    """(validity, values pointer, scales pointer) of each row's entry."""
    slots = tl.load(slots_ptr + row, mask=row < rows, other=-1)
    valid = (slots >= 0) & (slots < capacity)
    slots = tl.where(valid, slots, 0)
    if not WIDE:
        # Dividing 32-bit slots is several times cheaper; only a pool of 2**31 slots needs more.
        slots = slots.to(tl.int32)
    data, scale = locate(cache_ptr, slots, page_size, page_stride, FORMAT)
    return valid, data, scale


@triton.jit
def _dequantize_rows(
    cache_ptr, slots_ptr, out_ptr, row, rows, k_scale, capacity, page_size, page_stride, out_stride,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, ROPE_BLOCK: tl.constexpr, WIDE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Write the entry of each of ``row``'s slots, as bf16, to the same row of the output."""
    valid, data, scale = _locate_rows(cache_ptr, slots_ptr, row, rows, capacity, page_size, page_stride, WIDE, FORMAT)
    out = out_ptr + row.to(tl.int64) * out_stride
    if FORMAT.nope_dim > 0:
        TILE: tl.constexpr = FORMAT.tile
        tile = tl.arange(0, TILES)
        present = valid[:, None] & (tile < FORMAT.nope_dim // TILE)[None, :]
        # Scales stay in L2: entries that share their sectors come later, and whole sectors move cheaper than parts.
        if FORMAT.scale_encoding == "ue8m0":
            codes = tl.load(scale[:, None] + tile[None, :], mask=present, other=127, eviction_policy="evict_last")
            scales = ue8m0_to_f32(codes)
        elif FORMAT.scale_encoding == "e4m3fn":
            codes = tl.load(scale[:, None] + tile[None, :], mask=present, other=0, eviction_policy="evict_last")
            scales = e4m3fn_to_f32(codes)
        elif FORMAT.scale_encoding == "float32":
            scale_ptr = scale.to(tl.pointer_type(tl.float32))
            scales = tl.load(scale_ptr[:, None] + tile[None, :], mask=present, other=1.0, eviction_policy="evict_last")
        else:
            scales = tl.zeros((BLOCK_N, TILES), tl.float32) + k_scale
        if FORMAT.value_encoding == "e2m1":
            byte = tile[:, None] * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
            codes = tl.load(data[:, None, None] + byte[None], mask=present[:, :, None], other=0)
            values = e2m1_to_f32(tl.interleave(codes & 0xF, codes >> 4))
        else:
            byte = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
            codes = tl.load(data[:, None, None] + byte[None], mask=present[:, :, None], other=0)
            values = decode_fp8(codes, FORMAT)
        column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        tl.store(out[:, None, None] + column[None], to_bf16(values * scales[:, :, None]), mask=present[:, :, None])
    if FORMAT.rope_dim > 0:
        column = tl.arange(0, ROPE_BLOCK)
        mask = valid[:, None] & (column < FORMAT.rope_dim)[None, :]
        rope = (data + FORMAT.rope_base).to(tl.pointer_type(tl.bfloat16))
        values = tl.load(rope[:, None] + column[None, :], mask=mask)
        tl.store(out[:, None] + FORMAT.nope_dim + column[None, :], values, mask=mask)


@triton.jit(do_not_specialize=("rows", "capacity"))
def dequantize_kernel(
    cache_ptr, slots_ptr, out_ptr, k_scale, rows, capacity, page_size, page_stride, out_stride,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, ROPE_BLOCK: tl.constexpr, WIDE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    _dequantize_rows(
        cache_ptr, slots_ptr, out_ptr, row, rows, k_scale, capacity, page_size, page_stride, out_stride,
        BLOCK_N, TILES, ROPE_BLOCK, WIDE, FORMAT,
    )  # fmt: skip


@triton.jit
def gather_rows(
    program, extra_ptr, swa_ptr, slots_ptr, out_ptr, extra_k_scale, swa_k_scale, extra_rows, rows,
    extra_capacity, extra_page_size, extra_page_stride, swa_capacity, swa_page_size, swa_page_stride, out_stride,
    EXTRA_BLOCK: tl.constexpr, EXTRA_TILES: tl.constexpr, EXTRA_ROPE: tl.constexpr, EXTRA_WIDE: tl.constexpr,
    EXTRA: tl.constexpr,
    SWA_BLOCK: tl.constexpr, SWA_TILES: tl.constexpr, SWA_ROPE: tl.constexpr, SWA_WIDE: tl.constexpr,
    SWA: tl.constexpr,
):  # fmt: skip
    """One program's rows: of the first ``extra_rows`` from one cache, of the others from another."""
    extra_programs = tl.cdiv(extra_rows, EXTRA_BLOCK)
    if program < extra_programs:
        row = program * EXTRA_BLOCK + tl.arange(0, EXTRA_BLOCK)
        _dequantize_rows(
            extra_ptr, slots_ptr, out_ptr, row, extra_rows, extra_k_scale,
            extra_capacity, extra_page_size, extra_page_stride, out_stride,
            EXTRA_BLOCK, EXTRA_TILES, EXTRA_ROPE, EXTRA_WIDE, EXTRA,
        )  # fmt: skip
    else:
        row = extra_rows + (program - extra_programs) * SWA_BLOCK + tl.arange(0, SWA_BLOCK)
        _dequantize_rows(
            swa_ptr, slots_ptr, out_ptr, row, rows, swa_k_scale,
            swa_capacity, swa_page_size, swa_page_stride, out_stride,
            SWA_BLOCK, SWA_TILES, SWA_ROPE, SWA_WIDE, SWA,
        )  # fmt: skip


@triton.jit(do_not_specialize=("extra_rows", "rows", "extra_capacity", "swa_capacity"))
def gather_kernel(
    extra_ptr, swa_ptr, slots_ptr, out_ptr, extra_k_scale, swa_k_scale, extra_rows, rows,
    extra_capacity, extra_page_size, extra_page_stride, swa_capacity, swa_page_size, swa_page_stride, out_stride,
    EXTRA_BLOCK: tl.constexpr, EXTRA_TILES: tl.constexpr, EXTRA_ROPE: tl.constexpr, EXTRA_WIDE: tl.constexpr,
    EXTRA: tl.constexpr,
    SWA_BLOCK: tl.constexpr, SWA_TILES: tl.constexpr, SWA_ROPE: tl.constexpr, SWA_WIDE: tl.constexpr,
    SWA: tl.constexpr,
):  # fmt: skip
    gather_rows(
        tl.program_id(0), extra_ptr, swa_ptr, slots_ptr, out_ptr, extra_k_scale, swa_k_scale, extra_rows, rows,
        extra_capacity, extra_page_size, extra_page_stride, swa_capacity, swa_page_size, swa_page_stride, out_stride,
        EXTRA_BLOCK, EXTRA_TILES, EXTRA_ROPE, EXTRA_WIDE, EXTRA, SWA_BLOCK, SWA_TILES, SWA_ROPE, SWA_WIDE, SWA,
    )  # fmt: skip


@triton.jit(do_not_specialize=("rows", "capacity"))
def quantize_insert_kernel(
    k_ptr, cache_ptr, slots_ptr, k_scale, rows, capacity, page_size, page_stride, k_stride,
    MIN_SCALE_BYTE: tl.constexpr, CARRY: tl.constexpr, EXPONENT: tl.constexpr, UNIT_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, ROPE_BLOCK: tl.constexpr, WIDE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid, data, scale = _locate_rows(cache_ptr, slots_ptr, row, rows, capacity, page_size, page_stride, WIDE, FORMAT)
    k = k_ptr + row.to(tl.int64) * k_stride
    if FORMAT.nope_dim > 0:
        TILE: tl.constexpr = FORMAT.tile
        tile = tl.arange(0, TILES)
        COUNT: tl.constexpr = FORMAT.nope_dim // TILE
        present = valid[:, None] & (tile < COUNT)[None, :]
        column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        values = tl.load(k[:, None, None] + column[None], mask=present[:, :, None], other=0.0).to(tl.float32)
        # A NaN must not decide its tile's scale: where its code can say NaN it keeps its own place.
        number = values == values
        amax = tl.max(tl.where(number, tl.abs(values), 0.0), axis=2)
        if (FORMAT.scale_encoding == "ue8m0") | (FORMAT.scale_encoding == "float32"):
            byte = scale_byte(amax, MIN_SCALE_BYTE, CARRY, EXPONENT)
            values *= ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, :, None]
            if FORMAT.value_encoding == "e2m1":
                byte = tl.where(tl.min(number.to(tl.int32), axis=2) == 1, byte, 255)
            if FORMAT.scale_encoding == "ue8m0":
                stored = tl.where(tile[None, :] < COUNT, byte, 0).to(tl.uint8)
                in_scales = valid[:, None] & (tile < FORMAT.scale_bytes)[None, :]
                tl.store(scale[:, None] + tile[None, :], stored, mask=in_scales, eviction_policy="evict_last")
            else:
                scale_ptr = scale.to(tl.pointer_type(tl.float32))
                stored = ue8m0_to_f32(byte.to(tl.uint8))
                tl.store(scale_ptr[:, None] + tile[None, :], stored, mask=present, eviction_policy="evict_last")
        elif FORMAT.scale_encoding == "e4m3fn":
            code = scale_e4m3(amax)
            values = tl.div_rn(values, tl.broadcast_to(e4m3fn_to_f32(code)[:, :, None], (BLOCK_N, TILES, TILE)))
            code = tl.where(tl.min(number.to(tl.int32), axis=2) == 1, code, 0x7F)
            tl.store(scale[:, None] + tile[None, :], code, mask=present, eviction_policy="evict_last")
        elif not UNIT_SCALE:
            values = tl.div_rn(values, tl.zeros((BLOCK_N, TILES, TILE), tl.float32) + k_scale)
        if FORMAT.value_encoding == "e2m1":
            low, high = tl.split(tl.reshape(f32_to_e2m1(values), (BLOCK_N, TILES, TILE // 2, 2)))
            byte = tile[:, None] * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
            tl.store(data[:, None, None] + byte[None], low | (high << 4), mask=present[:, :, None])
        else:
            if FORMAT.native_encode:
                codes = values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            elif FORMAT.value_encoding == "e4m3fnuz":
                codes = f32_to_e4m3fnuz(values)
            else:
                codes = f32_to_e4m3fn(values)
            tl.store(data[:, None, None] + column[None], codes, mask=present[:, :, None])
    if FORMAT.rope_dim > 0:
        column = tl.arange(0, ROPE_BLOCK)
        mask = valid[:, None] & (column < FORMAT.rope_dim)[None, :]
        rope = (data + FORMAT.rope_base).to(tl.pointer_type(tl.bfloat16))
        values = tl.load(k[:, None] + FORMAT.nope_dim + column[None, :], mask=mask)
        tl.store(rope[:, None] + column[None, :], values, mask=mask)


@triton.jit
def _copy_run(src, dst, valid, SIZE: tl.constexpr, BLOCK: tl.constexpr, WORD: tl.constexpr):
    """``SIZE`` bytes from each pointer of ``src`` to its one of ``dst``, as words."""
    word = tl.arange(0, BLOCK)
    mask = valid[:, None] & (word < SIZE // (WORD.primitive_bitwidth // 8))[None, :]
    source = src.to(tl.pointer_type(WORD))[:, None] + word[None, :]
    tl.store(dst.to(tl.pointer_type(WORD))[:, None] + word[None, :], tl.load(source, mask=mask), mask=mask)


@triton.jit(do_not_specialize=("rows", "src_capacity", "dst_capacity"))
def copy_entries_kernel(
    src_ptr, src_slots_ptr, dst_ptr, dst_slots_ptr, rows,
    src_capacity, src_page_size, src_page_stride, dst_capacity, dst_page_size, dst_page_stride,
    BLOCK_N: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr, SCALE_WORD: tl.constexpr, SCALE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    readable, src, src_scale = _locate_rows(
        src_ptr, src_slots_ptr, row, rows, src_capacity, src_page_size, src_page_stride, WIDE, FORMAT
    )
    writable, dst, dst_scale = _locate_rows(
        dst_ptr, dst_slots_ptr, row, rows, dst_capacity, dst_page_size, dst_page_stride, WIDE, FORMAT
    )
    valid = readable & writable
    if FORMAT.soa:
        _copy_run(src, dst, valid, FORMAT.data_bytes, BLOCK, WORD)
        if FORMAT.scale_bytes > 0:
            _copy_run(src_scale, dst_scale, valid, FORMAT.scale_bytes, SCALE_BLOCK, SCALE_WORD)
    else:
        _copy_run(src, dst, valid, FORMAT.data_bytes + FORMAT.scale_bytes, BLOCK, WORD)


@functools.lru_cache(maxsize=256)
def cache_constexprs(layout: CacheLayout, arch: str) -> dict[str, object]:
    """What both kernels take from the record."""
    return {
        "TILES": triton.next_power_of_2(max(1, layout.nope_dim // layout.scale_tile)),
        "ROPE_BLOCK": triton.next_power_of_2(max(1, layout.rope_dim)),
        "FORMAT": entry_format(layout, arch),
    }


def quantize_constexprs(layout: CacheLayout) -> dict[str, object]:
    """What only the writer takes from the record."""
    carry, exponent = scale_carry(layout.value_max) if layout.nope_dim else (0, 0)
    smallest = layout.min_scale_byte if layout.nope_dim else 0
    return {"MIN_SCALE_BYTE": smallest, "CARRY": carry, "EXPONENT": exponent}


_launch_dequantize = Launcher(dequantize_kernel, floats=("k_scale",))
_launch_gather = Launcher(gather_kernel, floats=("extra_k_scale", "swa_k_scale"))
_launch_quantize = Launcher(quantize_insert_kernel, floats=("k_scale",))
_launch_copy = Launcher(copy_entries_kernel)


class _Shape(NamedTuple):
    """How one of the kernels runs over caches of a layout."""

    rows: int
    warps: int
    constexprs: tuple[Any, ...]


@functools.lru_cache(maxsize=256)
def _reading(layout: CacheLayout, wide: bool, device: torch.device) -> _Shape:
    rows, warps = dequantize_shape(layout)
    shared = cache_constexprs(layout, platform.limits(device).arch)
    return _Shape(rows, warps, (rows, shared["TILES"], shared["ROPE_BLOCK"], wide, shared["FORMAT"]))


@functools.lru_cache(maxsize=256)
def _writing(layout: CacheLayout, wide: bool, unit_scale: bool, device: torch.device) -> _Shape:
    rows, warps = quantize_shape(layout)
    shared = cache_constexprs(layout, platform.limits(device).arch)
    own = (*quantize_constexprs(layout).values(), unit_scale)
    return _Shape(rows, warps, (*own, rows, shared["TILES"], shared["ROPE_BLOCK"], wide, shared["FORMAT"]))


def _wide(cache: PagedCache) -> bool:
    return cache.capacity > 2**31 - 1


def dequantize_k_cache_paged(cache: PagedCache, slots: torch.Tensor, out: torch.Tensor, k_scale: float) -> None:
    """Launch over ``slots [N]``; rows of ``out`` whose slot is invalid are left alone."""
    rows = slots.shape[0]
    read = _reading(cache.layout, _wide(cache), cache.device)
    _launch_dequantize(
        -(-rows // read.rows),
        (cache.data, slots, out),
        (k_scale, rows, cache.capacity, cache.page_size, cache.page_stride, out.stride(0)),
        read.constexprs,
        read.warps,
    )


def gather_workspace(
    extra_cache: PagedCache | None,
    swa_cache: PagedCache,
    slots: torch.Tensor,
    extra_rows: int,
    out: torch.Tensor,
    extra_k_scale: float,
    swa_k_scale: float,
) -> None:
    """Both caches' rows of one workspace in one launch.

    Args:
        extra_cache, swa_cache: of one head dim; None without compressed entries.
        slots: int32 ``[S]``, S > 0: before row ``extra_rows`` of ``extra_cache``, from there on of ``swa_cache``; -1,
            and any slot outside its cache, is no entry, and its row is left alone.
        extra_rows: in ``[0, S]``; 0 without ``extra_cache``.
        out: bf16 ``[S, head_dim]``, rows contiguous, any row stride.
        extra_k_scale, swa_k_scale: as ``k_scale`` of :func:`dsv4x.dequantize_k_cache_paged`.
    """
    if extra_cache is None:
        dequantize_k_cache_paged(swa_cache, slots, out, swa_k_scale)
        return
    _launch_gather(*gather_launch(extra_cache, swa_cache, slots, extra_rows, out, extra_k_scale, swa_k_scale))


def gather_launch(
    extra_cache: PagedCache,
    swa_cache: PagedCache,
    slots: torch.Tensor,
    extra_rows: int,
    out: torch.Tensor,
    extra_k_scale: float,
    swa_k_scale: float,
) -> Launch:
    """How to run :func:`gather_kernel`."""
    rows = slots.shape[0]
    extra = _reading(extra_cache.layout, _wide(extra_cache), extra_cache.device)
    swa = _reading(swa_cache.layout, _wide(swa_cache), swa_cache.device)
    return Launch(
        -(-extra_rows // extra.rows) + -(-(rows - extra_rows) // swa.rows),
        (extra_cache.data, swa_cache.data, slots, out),
        (
            extra_k_scale, swa_k_scale, extra_rows, rows,
            extra_cache.capacity, extra_cache.page_size, extra_cache.page_stride,
            swa_cache.capacity, swa_cache.page_size, swa_cache.page_stride, out.stride(0),
        ),
        (*extra.constexprs, *swa.constexprs),
        extra.warps,
    )  # fmt: skip


def quantize_and_insert_k_cache(k: torch.Tensor, cache: PagedCache, slots: torch.Tensor, k_scale: float) -> None:
    """Launch over rows of ``k``; rows whose slot is invalid are skipped."""
    rows = slots.shape[0]
    write = _writing(cache.layout, _wide(cache), k_scale == 1, cache.device)
    _launch_quantize(
        -(-rows // write.rows),
        (k, cache.data, slots),
        (k_scale, rows, cache.capacity, cache.page_size, cache.page_stride, k.stride(0)),
        write.constexprs,
        write.warps,
    )


@functools.lru_cache(maxsize=256)
def copy_constexprs(
    layout: CacheLayout, src: tuple[int, int], dst: tuple[int, int], wide: bool, arch: str
) -> dict[str, Any]:
    """What moving entries takes from the record and from both caches' (page size, page stride)."""
    words = []
    for at, (_, size) in enumerate(layout.entry_runs(1)):
        bases = (layout.entry_runs(page_size)[at][0] for page_size, _ in (src, dst))
        word = math.gcd(8, size, src[1], dst[1], *bases)
        words.append((COPY_WORDS[word], triton.next_power_of_2(size // word)))
    (word, block), (scale_word, scale_block) = words[0], words[-1]
    return {
        "BLOCK_N": max(1, _COPY_BLOCK // block), "WORD": word, "BLOCK": block, "SCALE_WORD": scale_word,
        "SCALE_BLOCK": scale_block, "WIDE": wide, "FORMAT": entry_format(layout, arch),
    }  # fmt: skip


def copy_entries(src: PagedCache, src_slots: torch.Tensor, dst: PagedCache, dst_slots: torch.Tensor) -> None:
    """Launch over rows of slots; a row with an invalid one is skipped."""
    rows = src_slots.shape[0]
    places = (src.page_size, src.page_stride), (dst.page_size, dst.page_stride)
    arch = platform.limits(src.device).arch
    constexprs = copy_constexprs(src.layout, *places, _wide(src) or _wide(dst), arch)
    _launch_copy(
        -(-rows // constexprs["BLOCK_N"]),
        (src.data, src_slots, dst.data, dst_slots),
        (rows, src.capacity, *places[0], dst.capacity, *places[1]),
        tuple(constexprs.values()),
        COPY_WARPS,
    )
