"""The gathered step's two passes before attention in one launch: rows gathered, index rows combined.

Neither waits for the other, and in a small step a launch takes the host longer than either takes the GPU.
"""

from typing import Any

import triton
import triton.language as tl

from ..core.refill import CombineCall
from .cache import gather_launch, gather_rows
from .indices import combine_launch, combine_row
from .launch import Launcher


@triton.jit(
    do_not_specialize=(
        "spans_ptr", "compressed_lens_ptr", "extra_rows", "rows", "extra_capacity", "swa_capacity", "requests", "topk",
        "row_slots", "gathering",
    )
)  # fmt: skip
def gather_combine_kernel(
    extra_ptr, swa_ptr, slots_ptr, out_ptr,
    topk_ptr, query_start_loc_ptr, seq_lens_ptr, gather_lens_ptr, compressed_base_ptr, swa_base_ptr, row_slots_ptr,
    request_ptr, position_ptr, spans_ptr, compressed_lens_ptr, out_indices_ptr, out_lens_ptr,
    extra_k_scale, swa_k_scale, extra_rows, rows,
    extra_capacity, extra_page_size, extra_page_stride, swa_capacity, swa_page_size, swa_page_stride, out_stride,
    requests, topk, window_size, compress_ratio, width, row_slots, topk_stride, indices_stride, gathering,
    EXTRA_BLOCK: tl.constexpr, EXTRA_TILES: tl.constexpr, EXTRA_ROPE: tl.constexpr, EXTRA_WIDE: tl.constexpr,
    EXTRA: tl.constexpr,
    SWA_BLOCK: tl.constexpr, SWA_TILES: tl.constexpr, SWA_ROPE: tl.constexpr, SWA_WIDE: tl.constexpr,
    SWA: tl.constexpr,
    HAS_ROW_SLOTS: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_SPANS: tl.constexpr,
    HAS_COMPRESSED_LENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first ``gathering`` programs gather, each of the others combines one token's row."""
    program = tl.program_id(0)
    if program < gathering:
        gather_rows(
            program, extra_ptr, swa_ptr, slots_ptr, out_ptr, extra_k_scale, swa_k_scale, extra_rows, rows,
            extra_capacity, extra_page_size, extra_page_stride, swa_capacity, swa_page_size, swa_page_stride,
            out_stride, EXTRA_BLOCK, EXTRA_TILES, EXTRA_ROPE, EXTRA_WIDE, EXTRA,
            SWA_BLOCK, SWA_TILES, SWA_ROPE, SWA_WIDE, SWA,
        )  # fmt: skip
    else:
        combine_row(
            program - gathering, topk_ptr, query_start_loc_ptr, seq_lens_ptr, gather_lens_ptr, compressed_base_ptr,
            swa_base_ptr, row_slots_ptr, request_ptr, position_ptr, spans_ptr, compressed_lens_ptr, out_indices_ptr,
            out_lens_ptr, requests, topk, window_size, compress_ratio, width, row_slots, topk_stride, indices_stride,
            HAS_ROW_SLOTS, HAS_POSITIONS, HAS_SPANS, HAS_COMPRESSED_LENS, BLOCK,
        )  # fmt: skip


_launch = Launcher(gather_combine_kernel, floats=("extra_k_scale", "swa_k_scale"))


def gather_and_combine(gather: tuple[Any, ...], combine: CombineCall) -> None:
    """Launch over the rows of both.

    Args:
        gather: the arguments of :func:`.cache.gather_workspace`, ``extra_cache`` not None.
        combine: what :func:`.indices.combine_topk_swa_indices` takes.
    """
    rows, tokens = gather_launch(*gather), combine_launch(combine)
    _launch(
        rows.programs + tokens.programs,
        (*rows.tensors, *tokens.tensors),
        (*rows.numbers, *tokens.numbers, rows.programs),
        (*rows.constexprs, *tokens.constexprs),
        rows.num_warps,
    )
