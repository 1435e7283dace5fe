"""trtllm-native entries to FlashMLA's block-scaled ones: codes are copied, only RoPE is decoded."""

import torch
import triton
import triton.language as tl

from ..core.layouts import PagedCache
from .encodings import e4m3fn_to_f32, e4m3fnuz_to_f32
from .portability import to_bf16

ENTRIES = 8


@triton.jit(do_not_specialize=("pages",))
def requantize_kernel(
    src_ptr, dst_ptr, pages_ptr, k_scale, page_size, pages, src_stride, dst_stride,
    NOPE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, SRC_PITCH: tl.constexpr, DST_PITCH: tl.constexpr,
    SCALES: tl.constexpr, BLOCK_N: tl.constexpr, HAS_PAGES: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    page = tl.program_id(0).to(tl.int64)
    if HAS_PAGES:
        page = tl.load(pages_ptr + page).to(tl.int64)
    entry = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = entry < tl.where((page >= 0) & (page < pages), page_size, 0)
    src = src_ptr + page * src_stride + entry.to(tl.int64) * SRC_PITCH
    dst = dst_ptr + page * dst_stride + entry.to(tl.int64) * DST_PITCH
    column = tl.arange(0, NOPE_DIM)
    codes = tl.load(src[:, None] + column[None, :], mask=inside[:, None], other=0)
    tl.store(dst[:, None] + column[None, :], codes, mask=inside[:, None])
    block = tl.arange(0, SCALES)
    scale_ptr = (dst + NOPE_DIM).to(tl.pointer_type(tl.float32))
    tl.store(scale_ptr[:, None] + block[None, :], tl.zeros((BLOCK_N, SCALES), tl.float32) + k_scale, inside[:, None])
    rope = tl.arange(0, ROPE_DIM)
    codes = tl.load(src[:, None] + NOPE_DIM + rope[None, :], mask=inside[:, None], other=0)
    values = e4m3fnuz_to_f32(codes) if FNUZ else e4m3fn_to_f32(codes)
    rope_ptr = (dst + NOPE_DIM + 4 * SCALES).to(tl.pointer_type(tl.bfloat16))
    tl.store(rope_ptr[:, None] + rope[None, :], to_bf16(values * k_scale), mask=inside[:, None])


def requantize_fp8_to_block_scale(src: PagedCache, dst: PagedCache, pages: torch.Tensor | None, k_scale: float) -> None:
    """Launch over the listed pages, or all; a page number outside the pool is skipped."""
    count = src.pages if pages is None else pages.shape[0]
    requantize_kernel[(count, triton.cdiv(src.page_size, ENTRIES))](
        src.data, dst.data, pages if pages is not None else src.data, k_scale, src.page_size, src.pages,
        src.page_stride, dst.page_stride,
        NOPE_DIM=dst.layout.nope_dim, ROPE_DIM=dst.layout.rope_dim,
        SRC_PITCH=src.layout.entry_bytes, DST_PITCH=dst.layout.entry_bytes, SCALES=dst.layout.num_scales,
        BLOCK_N=ENTRIES, HAS_PAGES=pages is not None, FNUZ=src.layout.value_encoding == "e4m3fnuz", num_warps=4,
    )  # fmt: skip
