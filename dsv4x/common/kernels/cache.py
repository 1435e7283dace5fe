"""Storing and reading K entries: one kernel each way, its layout the record's constants.

A program takes a few rows, as tiles of values that share a scale. Addresses are int64, invalid slots are never touched.
"""

import torch
import triton
import triton.language as tl

from ..layouts import CacheLayout, PagedCache, scale_carry
from ..platform import platform
from .encodings import (
    e2m1_to_f32,
    e4m3fn_to_f32,
    e4m3fnuz_to_f32,
    f32_to_e2m1,
    f32_to_e4m3fn,
    f32_to_e4m3fnuz,
    scale_byte,
    scale_e4m3,
    ue8m0_to_f32,
)
from .entries import layout_constexprs, locate
from .portability import to_bf16

# (rows a program, warps): the best of a sweep on an H200 at 262 144 DSv4 rows.
DEQUANTIZE_SHAPE = (4, 2)
QUANTIZE_SHAPE = (8, 1)


@triton.jit
def _locate_rows(
    cache_ptr, slots_ptr, row, rows, capacity, page_size, page_stride,
    DATA_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, SCALE_BASE: tl.constexpr, SOA: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """(validity, values pointer, scales pointer) of each row's entry."""
    slots = tl.load(slots_ptr + row, mask=row < rows, other=-1)
    valid = (slots >= 0) & (slots < capacity)
    slots = tl.where(valid, slots, 0)
    if not WIDE:
        # Dividing 32-bit slots is several times cheaper; only a pool of 2**31 slots needs more.
        slots = slots.to(tl.int32)
    data, scale = locate(cache_ptr, slots, page_size, page_stride, DATA_BYTES, SCALE_BYTES, SCALE_BASE, SOA)
    return valid, data, scale


@triton.jit
def dequantize_kernel(
    cache_ptr, slots_ptr, out_ptr, k_scale, rows, capacity, page_size, page_stride, out_stride,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    NOPE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, ROPE_BASE: tl.constexpr,
    DATA_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, SCALE_BASE: tl.constexpr,
    SOA: tl.constexpr, VALUE: tl.constexpr, SCALE: tl.constexpr, NATIVE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid, data, scale = _locate_rows(
        cache_ptr, slots_ptr, row, rows, capacity, page_size, page_stride,
        DATA_BYTES, SCALE_BYTES, SCALE_BASE, SOA, WIDE,
    )  # fmt: skip
    out = out_ptr + row.to(tl.int64) * out_stride
    if NOPE_DIM > 0:
        tile = tl.arange(0, TILES)
        present = valid[:, None] & (tile < NOPE_DIM // TILE)[None, :]
        if SCALE == "ue8m0":
            scales = ue8m0_to_f32(tl.load(scale[:, None] + tile[None, :], mask=present, other=127))
        elif SCALE == "e4m3fn":
            scales = e4m3fn_to_f32(tl.load(scale[:, None] + tile[None, :], mask=present, other=0))
        elif SCALE == "float32":
            scale_ptr = scale.to(tl.pointer_type(tl.float32))
            scales = tl.load(scale_ptr[:, None] + tile[None, :], mask=present, other=1.0)
        else:
            scales = tl.zeros((BLOCK_N, TILES), tl.float32) + k_scale
        if VALUE == "e2m1":
            byte = tile[:, None] * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
            codes = tl.load(data[:, None, None] + byte[None], mask=present[:, :, None], other=0)
            values = e2m1_to_f32(tl.interleave(codes & 0xF, codes >> 4))
        else:
            byte = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
            codes = tl.load(data[:, None, None] + byte[None], mask=present[:, :, None], other=0)
            if NATIVE:
                values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            elif VALUE == "e4m3fnuz":
                values = e4m3fnuz_to_f32(codes)
            else:
                values = e4m3fn_to_f32(codes)
        column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        tl.store(out[:, None, None] + column[None], to_bf16(values * scales[:, :, None]), mask=present[:, :, None])
    if ROPE_DIM > 0:
        column = tl.arange(0, ROPE_BLOCK)
        mask = valid[:, None] & (column < ROPE_DIM)[None, :]
        rope = (data + ROPE_BASE).to(tl.pointer_type(tl.bfloat16))
        tl.store(
            out[:, None] + NOPE_DIM + column[None, :], tl.load(rope[:, None] + column[None, :], mask=mask), mask=mask
        )


@triton.jit
def quantize_insert_kernel(
    k_ptr, cache_ptr, slots_ptr, k_scale, rows, capacity, page_size, page_stride, k_stride,
    MIN_SCALE_BYTE: tl.constexpr, CARRY: tl.constexpr, EXPONENT: tl.constexpr, UNIT_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    NOPE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, ROPE_BASE: tl.constexpr,
    DATA_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, SCALE_BASE: tl.constexpr,
    SOA: tl.constexpr, VALUE: tl.constexpr, SCALE: tl.constexpr, NATIVE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid, data, scale = _locate_rows(
        cache_ptr, slots_ptr, row, rows, capacity, page_size, page_stride,
        DATA_BYTES, SCALE_BYTES, SCALE_BASE, SOA, WIDE,
    )  # fmt: skip
    k = k_ptr + row.to(tl.int64) * k_stride
    if NOPE_DIM > 0:
        tile = tl.arange(0, TILES)
        COUNT: tl.constexpr = NOPE_DIM // TILE
        present = valid[:, None] & (tile < COUNT)[None, :]
        column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        values = tl.load(k[:, None, None] + column[None], mask=present[:, :, None], other=0.0).to(tl.float32)
        # A NaN must not decide its tile's scale: where its code can say NaN it keeps its own place.
        number = values == values
        amax = tl.max(tl.where(number, tl.abs(values), 0.0), axis=2)
        if (SCALE == "ue8m0") | (SCALE == "float32"):
            byte = scale_byte(amax, MIN_SCALE_BYTE, CARRY, EXPONENT)
            values *= ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, :, None]
            if VALUE == "e2m1":
                byte = tl.where(tl.min(number.to(tl.int32), axis=2) == 1, byte, 255)
            if SCALE == "ue8m0":
                stored = tl.where(tile[None, :] < COUNT, byte, 0).to(tl.uint8)
                in_scales = valid[:, None] & (tile < SCALE_BYTES)[None, :]
                tl.store(scale[:, None] + tile[None, :], stored, mask=in_scales)
            else:
                scale_ptr = scale.to(tl.pointer_type(tl.float32))
                tl.store(scale_ptr[:, None] + tile[None, :], ue8m0_to_f32(byte.to(tl.uint8)), mask=present)
        elif SCALE == "e4m3fn":
            code = scale_e4m3(amax)
            values = tl.div_rn(values, tl.broadcast_to(e4m3fn_to_f32(code)[:, :, None], (BLOCK_N, TILES, TILE)))
            code = tl.where(tl.min(number.to(tl.int32), axis=2) == 1, code, 0x7F)
            tl.store(scale[:, None] + tile[None, :], code, mask=present)
        elif not UNIT_SCALE:
            values = tl.div_rn(values, tl.zeros((BLOCK_N, TILES, TILE), tl.float32) + k_scale)
        if VALUE == "e2m1":
            low, high = tl.split(tl.reshape(f32_to_e2m1(values), (BLOCK_N, TILES, TILE // 2, 2)))
            byte = tile[:, None] * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
            tl.store(data[:, None, None] + byte[None], low | (high << 4), mask=present[:, :, None])
        else:
            if NATIVE:
                codes = values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            elif VALUE == "e4m3fnuz":
                codes = f32_to_e4m3fnuz(values)
            else:
                codes = f32_to_e4m3fn(values)
            tl.store(data[:, None, None] + column[None], codes, mask=present[:, :, None])
    if ROPE_DIM > 0:
        column = tl.arange(0, ROPE_BLOCK)
        mask = valid[:, None] & (column < ROPE_DIM)[None, :]
        rope = (data + ROPE_BASE).to(tl.pointer_type(tl.bfloat16))
        tl.store(
            rope[:, None] + column[None, :], tl.load(k[:, None] + NOPE_DIM + column[None, :], mask=mask), mask=mask
        )


def cache_constexprs(layout: CacheLayout) -> dict[str, object]:
    """What both kernels take from the record."""
    return {
        **layout_constexprs(layout),
        "TILES": triton.next_power_of_2(max(1, layout.nope_dim // layout.scale_tile)),
        "ROPE_BLOCK": triton.next_power_of_2(max(1, layout.rope_dim)),
        "VALUE": layout.value_encoding,
        "SCALE": layout.scale_encoding,
    }


def quantize_constexprs(layout: CacheLayout) -> dict[str, object]:
    """What only the writer takes from the record."""
    carry, exponent = scale_carry(layout.value_max) if layout.nope_dim else (0, 0)
    smallest = layout.min_scale_byte if layout.nope_dim else 0
    return {"MIN_SCALE_BYTE": smallest, "CARRY": carry, "EXPONENT": exponent}


def native_fp8(layout: CacheLayout, arch: str) -> bool:
    """Whether the arch's own conversion gives the layout's codes; measured on NVIDIA, elsewhere bytes are decoded."""
    return layout.value_encoding == "e4m3fn" and arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 89


def _shared(cache: PagedCache) -> dict[str, object]:
    return {
        "NATIVE": native_fp8(cache.layout, platform.limits(cache.device).arch),
        "WIDE": cache.capacity > 2**31 - 1,
        **cache_constexprs(cache.layout),
    }


def dequantize_k_cache_paged(cache: PagedCache, slots: torch.Tensor, out: torch.Tensor, k_scale: float) -> None:
    """Launch over ``slots [N]``; rows of ``out`` whose slot is invalid are left alone."""
    rows = slots.shape[0]
    block_n, num_warps = DEQUANTIZE_SHAPE
    dequantize_kernel[(triton.cdiv(rows, block_n),)](
        cache.data, slots, out, k_scale, rows, cache.capacity, cache.page_size, cache.page_stride, out.stride(0),
        BLOCK_N=block_n, num_warps=num_warps, **_shared(cache),
    )  # fmt: skip


def quantize_and_insert_k_cache(k: torch.Tensor, cache: PagedCache, slots: torch.Tensor, k_scale: float) -> None:
    """Launch over rows of ``k``; rows whose slot is invalid are skipped."""
    rows = slots.shape[0]
    block_n, num_warps = QUANTIZE_SHAPE
    quantize_insert_kernel[(triton.cdiv(rows, block_n),)](
        k, cache.data, slots, k_scale, rows, cache.capacity, cache.page_size, cache.page_stride, k.stride(0),
        UNIT_SCALE=k_scale == 1, BLOCK_N=block_n, num_warps=num_warps,
        **quantize_constexprs(cache.layout), **_shared(cache),
    )  # fmt: skip
