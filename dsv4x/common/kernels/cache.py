"""Storing and reading K entries: one layout a compilation, int64 addresses, invalid slots never touched."""

import torch
import triton
import triton.language as tl

from ..layouts import PagedCache
from .entries import entry_pointers, f32_to_e4m3fn, layout_constexprs, load_entries, ue8m0_to_f32

DEQUANTIZE_ROWS = 4


@triton.jit
def dequantize_kernel(
    cache_ptr,
    slots_ptr,
    out_ptr,
    rows,
    capacity,
    page_size,
    page_stride,
    out_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    SCALE_TILE: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    SOA: tl.constexpr,
    UE8M0: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    slots = tl.load(slots_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    valid = (slots >= 0) & (slots < capacity)
    values = load_entries(
        cache_ptr, slots, valid, page_size, page_stride,
        BLOCK_D, NOPE_DIM, ROPE_DIM, SCALE_TILE, SCALE_BYTES, SOA, UE8M0,
    )  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    out = out_ptr + row[:, None] * out_stride + columns[None, :]
    tl.store(out, values, mask=valid[:, None] & (columns < NOPE_DIM + ROPE_DIM)[None, :])


@triton.jit
def quantize_insert_kernel(
    k_ptr,
    cache_ptr,
    slots_ptr,
    capacity,
    page_size,
    page_stride,
    k_stride,
    MIN_SCALE_BYTE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    SCALE_TILE: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    SOA: tl.constexpr,
    UE8M0: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if (slot >= 0) & (slot < capacity):
        data, rope, scale = entry_pointers(
            cache_ptr, slot, page_size, page_stride, NOPE_DIM, ROPE_DIM, SCALE_BYTES, SOA
        )
        TILES: tl.constexpr = BLOCK_D // SCALE_TILE
        tile = tl.arange(0, TILES)
        columns = tile[:, None] * SCALE_TILE + tl.arange(0, SCALE_TILE)[None, :]
        k = k_ptr + row * k_stride
        values = tl.load(k + columns, mask=columns < NOPE_DIM, other=0.0).to(tl.float32)
        # A NaN is stored as NaN in its own place and must not decide its tile's scale.
        amax = tl.max(tl.where(values == values, tl.abs(values), 0.0), axis=1)
        # 448 is 1.75 * 2**8: the carry out of the significand is the exact ceiling of log2(amax / 448).
        scale_byte = ((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
        scale_byte = tl.maximum(scale_byte, MIN_SCALE_BYTE)
        inverse = ((254 - scale_byte) << 23).to(tl.float32, bitcast=True)
        tl.store(data + columns, f32_to_e4m3fn(values * inverse[:, None]), mask=columns < NOPE_DIM)
        if UE8M0:
            stored = tl.where(tile < NOPE_DIM // SCALE_TILE, scale_byte, 0).to(tl.uint8)
            tl.store(scale + tile, stored, mask=tile < SCALE_BYTES)
        else:
            stored = ue8m0_to_f32(scale_byte.to(tl.uint8))
            tl.store(scale.to(tl.pointer_type(tl.float32)) + tile, stored, mask=tile < NOPE_DIM // SCALE_TILE)
        column = tl.arange(0, ROPE_DIM)
        tl.store(rope.to(tl.pointer_type(tl.bfloat16)) + column, tl.load(k + NOPE_DIM + column))


def dequantize_k_cache_paged(cache: PagedCache, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Launch over ``slots [N]``; rows of ``out`` whose slot is invalid are left alone."""
    rows = slots.shape[0]
    dequantize_kernel[(triton.cdiv(rows, DEQUANTIZE_ROWS),)](
        cache.data,
        slots,
        out,
        rows,
        cache.capacity,
        cache.page_size,
        cache.page_stride,
        out.stride(0),
        BLOCK_N=DEQUANTIZE_ROWS,
        BLOCK_D=triton.next_power_of_2(cache.layout.head_dim),
        num_warps=4,
        **layout_constexprs(cache.layout),
    )


def quantize_and_insert_k_cache(k: torch.Tensor, cache: PagedCache, slots: torch.Tensor) -> None:
    """Launch over rows of ``k``; rows whose slot is invalid are skipped."""
    quantize_insert_kernel[(slots.shape[0],)](
        k,
        cache.data,
        slots,
        cache.capacity,
        cache.page_size,
        cache.page_stride,
        k.stride(0),
        MIN_SCALE_BYTE=cache.layout.min_scale_byte,
        BLOCK_D=triton.next_power_of_2(cache.layout.nope_dim),
        num_warps=4,
        **layout_constexprs(cache.layout),
    )
