"""Rows with holes as AITER's flat lists, in two launches where the op :func:`dsv4x.dense_to_ragged` takes eleven.

Every layer has its own rows, and a captured graph may find others at each replay, so nothing is kept. AITER would also
take rows of one width with -1 in them, which is what SGLang hands it. But on gfx950 builds up to e4048607a5 read slot 0
in their stead, and 0 times a NaN there is NaN; and out-of-range indices would have to be made -1, a launch too.
"""

import torch
import triton
import triton.language as tl

from ...common.kernels.indices import count_entries_kernel
from ...common.kernels.launch import Launcher

MOST_ROWS = 2048
"""Each row's program adds up the counts of all before it."""
_BLOCK = 512


@triton.jit(do_not_specialize=("lens_ptr", "upper", "tokens"))
def pack_rows_kernel(
    indices_ptr, lens_ptr, counts_ptr, indptr_ptr, values_ptr, tokens, width, upper, indices_stride,
    HAS_LENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's entries behind those of the rows before it; what it lacks to its width from the list's end on, as -1."""
    token = tl.program_id(0).to(tl.int64)
    span = width
    if HAS_LENS:
        span = tl.minimum(tl.maximum(tl.load(lens_ptr + token), 0), width).to(tl.int32)
    before = tl.zeros([BLOCK], tl.int64)
    for start in range(0, token, BLOCK):
        row = start + tl.arange(0, BLOCK)
        before += tl.load(counts_ptr + row, mask=row < token, other=0)
    first = tl.sum(before, 0)
    tl.store(indptr_ptr + token, first.to(tl.int32))
    hole = tl.cast(tokens, tl.int64) * width - 1 - (token * width - first)
    for start in range(0, width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        index = tl.load(indices_ptr + token * indices_stride + offset, mask=offset < span, other=-1)
        entry = (index >= 0) & (index < upper)
        lacking = (offset < width) & (entry == 0)
        entries = tl.cumsum(entry.to(tl.int32), 0)
        holes = tl.cumsum(lacking.to(tl.int32), 0)
        at = tl.where(entry, first + entries - 1, hole - (holes - 1))
        tl.store(values_ptr + at, tl.where(entry, index, -1).to(tl.int32), mask=offset < width)
        first += tl.sum(entry.to(tl.int32), 0)
        hole -= tl.sum(lacking.to(tl.int32), 0)
    if token == tokens - 1:
        tl.store(indptr_ptr + tokens, first.to(tl.int32))


_count, _pack = Launcher(count_entries_kernel), Launcher(pack_rows_kernel)


def ragged_rows(indices: torch.Tensor, lens: torch.Tensor | None, upper: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`dsv4x.dense_to_ragged` gives with room for everything, of at most :data:`MOST_ROWS` rows.

    Args:
        indices: int32 or int64 ``[T, w]``, T and w > 0, any index space; one outside ``[0, upper)`` is no entry.
        lens: int ``[T]`` spans, clamped to ``[0, w]``, or None.

    Returns:
        int32 ``[T * w]`` entries in order, -1 past the last, and int32 ``[T + 1]`` where each row begins.
    """
    tokens, width = indices.shape
    counts = torch.empty(tokens, dtype=torch.int64, device=indices.device)
    values = torch.empty(tokens * width, dtype=torch.int32, device=indices.device)
    indptr = torch.empty(tokens + 1, dtype=torch.int32, device=indices.device)
    spans, flags = counts if lens is None else lens, (lens is not None, _BLOCK)
    _count(tokens, (indices, spans, counts), (width, upper, indices.stride(0)), flags, 4)
    _pack(tokens, (indices, spans, counts, indptr, values), (tokens, width, upper, indices.stride(0)), flags, 4)
    return values, indptr
