"""DeepGEMM's schedule of paged logits: where in the batch each SM begins, for any number of rows.

DeepGEMM keeps one prefix sum a request in shared memory, so its kernel has a largest batch, and another compilation for
every 32 requests. Here each SM's program finds its own place: first which block of requests it begins in, from the
blocks' sums, then where inside that block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.logits_calls import PagedRows
from .launch import Launcher

BLOCK_ROWS = 1024
_BLOCK_SUMS = 1024


@triton.jit
def _segments(lens_ptr, row, rows, lens_stride, split):
    """int64: the segments of ``split`` entries that each request has; 0 for a negative length and past the last."""
    length = tl.load(lens_ptr + row.to(tl.int64) * lens_stride, mask=row < rows, other=0).to(tl.int64)
    return (tl.maximum(length, 0) + split - 1) // split


@triton.jit(do_not_specialize=("lens_ptr", "rows", "lens_stride"))
def segment_sums_kernel(lens_ptr, sums_ptr, rows, lens_stride, split, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(_segments(lens_ptr, row, rows, lens_stride, split)))


@triton.jit(do_not_specialize=("lens_ptr", "rows", "blocks", "lens_stride", "atoms"))
def schedule_kernel(
    lens_ptr, sums_ptr, out_ptr, rows, blocks, num_sms, lens_stride, split, atoms,
    ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Program i writes row i: the atom and the segment in it where SM i begins; row ``num_sms`` is the end."""
    sm = tl.program_id(0)
    request = tl.arange(0, BLOCK)
    skipped = tl.zeros((), tl.int32)
    before = tl.zeros((), tl.int64)
    total = tl.zeros((), tl.int64)
    if ONE_BLOCK:
        total += tl.sum(_segments(lens_ptr, request, rows, lens_stride, split))
    else:
        for first in tl.range(0, blocks, SUMS):
            block = first + tl.arange(0, SUMS)
            total += tl.sum(tl.load(sums_ptr + block, mask=block < blocks, other=0))
    work = total * atoms
    share = work // num_sms
    rest = work - share * num_sms
    # The SMs with one segment more come last, so that with little work the first ones have none and begin at row 0.
    mark = sm * share + tl.maximum(sm - (num_sms - rest), 0)
    if not ONE_BLOCK:
        seen = tl.zeros((), tl.int64)
        for first in tl.range(0, blocks, SUMS):
            block = first + tl.arange(0, SUMS)
            sums = tl.load(sums_ptr + block, mask=block < blocks, other=0)
            passed = (block < blocks) & ((seen + tl.cumsum(sums, 0)) * atoms <= mark)
            skipped += tl.sum(passed.to(tl.int32))
            before += tl.sum(tl.where(passed, sums, 0))
            seen += tl.sum(sums)
    row = skipped * BLOCK + request
    segments = _segments(lens_ptr, row, rows, lens_stride, split)
    passed = (row < rows) & ((before + tl.cumsum(segments, 0)) * atoms <= mark)
    before += tl.sum(tl.where(passed, segments, 0))
    at = skipped * BLOCK + tl.sum(passed.to(tl.int32))
    mine = tl.maximum(tl.sum(tl.where(row == at, segments, 0)), 1)
    offset = mark - before * atoms
    atom = at.to(tl.int64) * atoms + offset // mine
    segment = offset % mine
    # Without any work every SM's beginning is the end, and that has to be a request there is: DeepGEMM's kernel reads
    # the length of the one it begins at before it compares the two.
    last = sm == num_sms
    atom = tl.where(total == 0, 0, tl.where(last, tl.cast(rows, tl.int64) * atoms, atom))
    tl.store(out_ptr + sm * 2, atom.to(tl.int32))
    tl.store(out_ptr + sm * 2 + 1, tl.where((total == 0) | last, 0, segment).to(tl.int32))


@triton.jit(
    do_not_specialize=("lens_ptr", "rows", "next_n", "part", "most", "unscored", "lens_stride", "lens_stride_n")
)
def limit_lens_kernel(
    lens_ptr, out_ptr, rows, next_n, part, most, unscored, lens_stride, lens_stride_n, BLOCK: tl.constexpr
):  # fmt: skip
    """Each request's largest length within ``[0, most]``, ``part`` times; 0 for one of ``unscored`` or less."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    length = tl.zeros((BLOCK,), tl.int64)
    for j in tl.range(0, next_n):
        at = row * lens_stride + j * lens_stride_n
        length = tl.maximum(length, tl.load(lens_ptr + at, mask=row < rows, other=0).to(tl.int64))
    length = tl.where(length > unscored, tl.minimum(length, most), 0).to(tl.int32)
    for j in tl.range(0, part):
        tl.store(out_ptr + row * part + j, length, mask=row < rows)


@triton.jit(
    do_not_specialize=(
        "lens_ptr", "requests_ptr", "table_ptr", "groups", "part", "most", "unscored", "requests", "lens_stride",
        "lens_stride_n", "requests_stride", "table_stride", "columns", "page_size",
    )
)  # fmt: skip
def spread_rows_kernel(
    lens_ptr, requests_ptr, table_ptr, out_lens_ptr, out_table_ptr,
    groups, part, most, unscored, requests, lens_stride, lens_stride_n, requests_stride, table_stride, columns,
    page_size,
    HAS_REQUESTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: the length of ``part`` rows of a request, ``part`` times, and the pages that it reaches."""
    group = tl.program_id(0).to(tl.int64)
    row = group // groups
    first = group % groups * part
    length = tl.zeros((), tl.int64)
    for j in tl.range(0, part):
        length = tl.maximum(length, tl.load(lens_ptr + row * lens_stride + (first + j) * lens_stride_n).to(tl.int64))
    request = row
    if HAS_REQUESTS:
        request = tl.load(requests_ptr + row * requests_stride).to(tl.int64)
    known = (request >= 0) & (request < requests)
    length = tl.where(known & (length > unscored), tl.minimum(length, most), 0).to(tl.int32)
    for j in tl.range(0, part):
        tl.store(out_lens_ptr + group * part + j, length)
    table = table_ptr + tl.where(known, request, 0) * table_stride
    reached = tl.minimum(tl.cdiv(length, page_size), columns)
    for at in tl.range(0, reached, BLOCK):
        column = at + tl.arange(0, BLOCK)
        page = tl.load(table + column, mask=column < reached, other=0)
        tl.store(out_table_ptr + group * columns + column, page, mask=column < reached)


_launch_sums, _launch_schedule = Launcher(segment_sums_kernel), Launcher(schedule_kernel)
_launch_limit, _launch_spread = Launcher(limit_lens_kernel), Launcher(spread_rows_kernel)
_SPREAD_BLOCK = 1024


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor, split: int, atoms: int, num_sms: int, out: torch.Tensor
) -> None:
    """Launch over the last column of ``context_lens [B, n]``, B > 0."""
    rows, next_n = context_lens.shape
    lens = context_lens[:, next_n - 1]
    blocks = -(-rows // BLOCK_ROWS)
    block = BLOCK_ROWS if rows > 256 else 256
    sums = out
    if blocks > 1:
        sums = torch.empty(blocks, dtype=torch.int64, device=out.device)
        _launch_sums(blocks, (lens, sums), (rows, lens.stride(0), split), (BLOCK_ROWS,), num_warps=4)
    _launch_schedule(
        num_sms + 1,
        (lens, sums, out),
        (rows, blocks, num_sms, lens.stride(0), split, atoms),
        (blocks == 1, block, _BLOCK_SUMS),
        num_warps=4,
    )


def limit_lens(rows: PagedRows, part: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """int32 ``[B, part]``: every column each request's largest length, within bounds and 0 if unscored; B > 0."""
    context_lens = rows.context_lens
    batch, next_n = context_lens.shape
    if out is None:
        out = torch.empty(batch, part, dtype=torch.int32, device=context_lens.device)
    _launch_limit(
        -(-batch // 256),
        (context_lens, out),
        (batch, next_n, part, rows.most, rows.unscored, context_lens.stride(0), context_lens.stride(1)),
        (256,),
        num_warps=4,
    )
    return out


def spread_rows(
    rows: PagedRows, part: int, earlier: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``part`` rows of a request as a request of its own, as kernels need it that know no others.

    Args:
        rows: B > 0 rows of lengths; n is a multiple of ``part``, and 1 with requests.
        part: rows of each new request.
        earlier: an earlier result of these shapes to be filled again.

    Returns:
        int32 lengths ``[B * n / part, part]``, in every column the largest within bounds, 0 if unscored, and int32
        block table ``[B * n / part, m]`` of the pages that they reach; the others are left open.
    """
    (batch, next_n), columns = rows.context_lens.shape, rows.block_table.shape[1]
    groups, device = next_n // part, rows.context_lens.device
    if earlier is None:
        lens = torch.empty(batch * groups, part, dtype=torch.int32, device=device)
        earlier = lens, torch.empty(batch * groups, columns, dtype=torch.int32, device=device)
    requests = rows.context_lens if rows.requests is None else rows.requests
    _launch_spread(
        batch * groups,
        (rows.context_lens, requests, rows.block_table, *earlier),
        (
            groups, part, rows.most, rows.unscored, rows.block_table.shape[0], rows.context_lens.stride(0),
            rows.context_lens.stride(1), requests.stride(0), rows.block_table.stride(0), columns, rows.page_size,
        ),
        (rows.requests is not None, _SPREAD_BLOCK),
        num_warps=4,
    )  # fmt: skip
    return earlier
