"""Reading cache entries as the attention kernels want them: whole, bf16, a row each."""

import triton
import triton.language as tl

from ..layouts import CacheLayout
from .encodings import e4m3fn_to_f32, ue8m0_to_f32
from .portability import to_bf16


@triton.jit
def entry_pointers(
    cache_ptr,
    slots,
    page_size,
    page_stride,
    NOPE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    SOA: tl.constexpr,
):
    """(values, RoPE values, scales) byte pointers of the entries at ``slots`` (int64, all in range)."""
    page = cache_ptr + (slots // page_size) * page_stride
    entry = slots % page_size
    DATA_BYTES: tl.constexpr = NOPE_DIM + 2 * ROPE_DIM
    if SOA:
        data = page + entry * DATA_BYTES
        return data, data + NOPE_DIM, page + tl.cast(page_size, tl.int64) * DATA_BYTES + entry * SCALE_BYTES
    else:
        data = page + entry * (DATA_BYTES + SCALE_BYTES)
        return data, data + NOPE_DIM + SCALE_BYTES, data + NOPE_DIM


@triton.jit
def load_entries(
    cache_ptr,
    slots,
    valid,
    page_size,
    page_stride,
    BLOCK_D: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    SCALE_TILE: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    SOA: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """bf16 ``[len(slots), BLOCK_D]``: the entries at ``slots``, zero where ``valid`` is false and past the head dim.

    Nothing is read for an entry that is not valid, whatever its slot.
    """
    safe = tl.where(valid, slots, 0).to(tl.int64)
    data, rope, scale = entry_pointers(cache_ptr, safe, page_size, page_stride, NOPE_DIM, ROPE_DIM, SCALE_BYTES, SOA)
    columns = tl.arange(0, BLOCK_D)
    nope_mask = valid[:, None] & (columns < NOPE_DIM)[None, :]
    codes = tl.load(data[:, None] + columns[None, :], mask=nope_mask, other=0)
    tile = (columns // SCALE_TILE)[None, :]
    if UE8M0:
        scales = ue8m0_to_f32(tl.load(scale[:, None] + tile, mask=nope_mask, other=127))
    else:
        scales = tl.load(scale.to(tl.pointer_type(tl.float32))[:, None] + tile, mask=nope_mask, other=1.0)
    nope = to_bf16(e4m3fn_to_f32(codes) * scales)
    rope_mask = valid[:, None] & ((columns >= NOPE_DIM) & (columns < NOPE_DIM + ROPE_DIM))[None, :]
    rope_ptr = rope.to(tl.pointer_type(tl.bfloat16))
    values = tl.load(rope_ptr[:, None] + (columns - NOPE_DIM)[None, :], mask=rope_mask, other=0.0)
    return tl.where((columns < NOPE_DIM)[None, :], nope, values)


def layout_constexprs(layout: CacheLayout) -> dict[str, int]:
    """The layout as the kernels take it. In ``aos`` entries the kernels read scales before RoPE values."""
    if layout.arrangement == "aos" and layout.rope_dim and not layout.rope_after_scales:
        raise ValueError(f"layout {layout.name}: the Triton kernels need the scales of an aos entry before its RoPE")
    return {
        "NOPE_DIM": layout.nope_dim,
        "ROPE_DIM": layout.rope_dim,
        "SCALE_TILE": layout.scale_tile,
        "SCALE_BYTES": layout.scale_bytes,
        "SOA": layout.arrangement == "soa",
        "UE8M0": layout.scale_encoding == "ue8m0",
    }
