"""Where an entry's bytes stand, and reading whole entries as the attention kernels want them: bf16, a row each."""

import triton
import triton.language as tl

from ..layouts import CacheLayout
from .encodings import e4m3fn_to_f32, ue8m0_to_f32
from .portability import to_bf16


@triton.jit
def locate(
    cache_ptr, slots, page_size, page_stride,
    DATA_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, SCALE_BASE: tl.constexpr, SOA: tl.constexpr,
):  # fmt: skip
    """(values, scales) byte pointers of the entries at ``slots`` (int32 or int64, all in range)."""
    page = slots // page_size
    entry = (slots - page * page_size).to(tl.int64)
    base = cache_ptr + page.to(tl.int64) * page_stride
    if SOA:
        return base + entry * DATA_BYTES, base + tl.cast(page_size, tl.int64) * DATA_BYTES + entry * SCALE_BYTES
    else:
        data = base + entry * (DATA_BYTES + SCALE_BYTES)
        return data, data + SCALE_BASE


@triton.jit
def load_entries(
    cache_ptr, slots, valid, page_size, page_stride,
    BLOCK_D: tl.constexpr, NOPE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, ROPE_BASE: tl.constexpr,
    TILE: tl.constexpr, DATA_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, SCALE_BASE: tl.constexpr,
    SOA: tl.constexpr,
):  # fmt: skip
    """bf16 ``[len(slots), BLOCK_D]`` of e4m3fn values under ue8m0 scales and bf16 RoPE values.

    Zero where ``valid`` is false and past the head dim. Nothing is read for an entry that is not valid, whatever its
    slot.
    """
    safe = tl.where(valid, slots, 0).to(tl.int64)
    data, scale = locate(cache_ptr, safe, page_size, page_stride, DATA_BYTES, SCALE_BYTES, SCALE_BASE, SOA)
    columns = tl.arange(0, BLOCK_D)
    nope_mask = valid[:, None] & (columns < NOPE_DIM)[None, :]
    codes = tl.load(data[:, None] + columns[None, :], mask=nope_mask, other=0)
    scales = ue8m0_to_f32(tl.load(scale[:, None] + (columns // TILE)[None, :], mask=nope_mask, other=127))
    nope = to_bf16(e4m3fn_to_f32(codes) * scales)
    rope_mask = valid[:, None] & ((columns >= NOPE_DIM) & (columns < NOPE_DIM + ROPE_DIM))[None, :]
    rope = (data + ROPE_BASE).to(tl.pointer_type(tl.bfloat16))
    values = tl.load(rope[:, None] + (columns - NOPE_DIM)[None, :], mask=rope_mask, other=0.0)
    return tl.where((columns < NOPE_DIM)[None, :], nope, values)


def layout_constexprs(layout: CacheLayout) -> dict[str, int]:
    """Where the record says an entry's bytes stand, as the kernels take it."""
    return {
        "NOPE_DIM": layout.nope_dim,
        "ROPE_DIM": layout.rope_dim,
        "ROPE_BASE": layout.rope_base,
        "TILE": layout.scale_tile,
        "DATA_BYTES": layout.data_bytes,
        "SCALE_BYTES": layout.scale_bytes,
        "SCALE_BASE": 0 if layout.arrangement == "soa" else layout.scale_base(1),
        "SOA": layout.arrangement == "soa",
    }
