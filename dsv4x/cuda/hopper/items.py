"""What the decode kernels of Hopper share: their parameters as records, a launch's items, a row's slots and its end."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...common.kernels.decode import clamped_span, row_shares
from ...common.kernels.softmax import LN2, LOG2E
from .splitting import BLOCK_ENTRIES

BLOCK_K = gl.constexpr(BLOCK_ENTRIES)

# The same rules as the reduction's, compiled for Gluon.
_clamped_span, _row_shares = gluon.jit(clamped_span.fn), gluon.jit(row_shares.fn)


class Scope(NamedTuple):
    """One cache and the index rows into it, as the kernel's parameters name them."""

    cache_ptr: gl.tensor
    indices_ptr: gl.tensor
    lens_ptr: gl.tensor
    width: gl.tensor
    indices_stride: gl.tensor
    capacity: gl.tensor
    page_size: gl.tensor
    page_stride: gl.tensor


class Requests(NamedTuple):
    """What makes slots of local entries, for all tokens."""

    request_ptr: gl.tensor
    visible_ptr: gl.tensor
    table_ptr: gl.tensor
    requests: gl.tensor
    columns: gl.tensor
    table_stride: gl.tensor
    pages: gl.tensor


class Table(NamedTuple):
    """A request's row of the block table, its columns, and the pages in the pool."""

    row: gl.tensor
    columns: gl.tensor
    pages: gl.tensor


class Query(NamedTuple):
    ptr: gl.tensor
    stride_t: gl.tensor
    stride_h: gl.tensor


class Output(NamedTuple):
    """The output's rows, and where partial ones of a row of several splits go."""

    ptr: gl.tensor
    stride_t: gl.tensor
    stride_h: gl.tensor
    lse_ptr: gl.tensor
    partial_ptr: gl.tensor
    partial_lse_ptr: gl.tensor
    most_splits: gl.tensor


class Work(NamedTuple):
    """The launch's items: ``rows`` (token, block of heads) for the first split, then as many for the second."""

    items: gl.tensor
    rows: gl.tensor
    head_blocks: gl.tensor
    most_splits: gl.tensor
    whole_blocks: gl.tensor


class Item(NamedTuple):
    """One item: which token, heads and blocks, of how many entries.

    ``there`` is false where the row has fewer splits; ``split`` is -1 where the item is the whole row.
    """

    there: gl.tensor
    token: gl.tensor
    head0: gl.tensor
    split: gl.tensor
    first: gl.tensor
    last: gl.tensor
    swa_blocks: gl.tensor
    swa_span: gl.tensor
    extra_span: gl.tensor


@gluon.jit
def item_of(
    number, work, swa, extra,
    HAS_SWA_LENS: gl.constexpr, HAS_EXTRA_LENS: gl.constexpr, SPLIT: gl.constexpr, BLOCK_H: gl.constexpr,
):  # fmt: skip
    """Item ``number`` of the launch.

    At least one block, so that every role passes its barriers equally often; past the spans it holds no entries.
    """
    row = number
    if SPLIT:
        row = number % work.rows
    token = (row // work.head_blocks).to(gl.int64)
    head0 = (row % work.head_blocks) * BLOCK_H
    swa_span = swa.width
    if HAS_SWA_LENS:
        swa_span = _clamped_span(gl.load(swa.lens_ptr + token), swa_span)
    extra_span = extra.width
    if HAS_EXTRA_LENS:
        extra_span = _clamped_span(gl.load(extra.lens_ptr + token), extra_span)
    swa_blocks = gl.cdiv(swa_span, BLOCK_K)
    blocks = swa_blocks + gl.cdiv(extra_span, BLOCK_K)
    there = gl.to_tensor(True)
    split = gl.to_tensor(-1)
    first = gl.to_tensor(0)
    last = blocks
    if SPLIT:
        split = number // work.rows
        splits, share = _row_shares(blocks, work.most_splits, work.whole_blocks)
        first = split * share
        last = gl.minimum(first + share, blocks)
        there = split < splits
        split = gl.where(splits > 1, split, -1)
    last = gl.maximum(last, first + 1)
    return Item(there, token, head0, split, first, last, swa_blocks, swa_span, extra_span)


@gluon.jit
def load_indices(scope, token, span, block, ROW: gl.constexpr):
    """int32 indices of a block of a row, in layout ``ROW``; -1 past the span and for what the scope does not hold."""
    offset = block * BLOCK_K + gl.arange(0, BLOCK_K, ROW)
    index = gl.load(scope.indices_ptr + token * scope.indices_stride + offset, mask=offset < span, other=-1)
    return gl.where((index >= 0) & (index < scope.capacity), index, -1).to(gl.int32)


@gluon.jit
def to_slots(index, page_size, table):
    """Slots of local entries, by a request's row of the block table; -1 for what is no entry."""
    column = index // page_size
    held = (index >= 0) & (column < table.columns)
    page = gl.load(table.row + column, mask=held, other=-1)
    held = held & (page >= 0) & (page < table.pages)
    # Slots are 32-bit: the record takes no larger pool.
    return gl.where(held, page * page_size + (index - column * page_size), -1)


@gluon.jit
def of_request(extra, local, token, LOCAL: gl.constexpr):
    """The extra scope of a token, and its request's :class:`Table`."""
    table = Table(local.table_ptr, local.columns, local.pages)
    if LOCAL:
        request = gl.load(local.request_ptr + token)
        known = (request >= 0) & (request < local.requests)
        visible = gl.where(known, gl.load(local.visible_ptr + token), 0)
        row = local.table_ptr + gl.where(known, request, 0).to(gl.int64) * local.table_stride
        extra = Scope(
            extra.cache_ptr, extra.indices_ptr, extra.lens_ptr, extra.width, extra.indices_stride, visible,
            extra.page_size, extra.page_stride,
        )  # fmt: skip
        table = Table(row, local.columns, local.pages)
    return extra, table


@gluon.jit
def finish(m, l, item, heads, sink_ptr, out, BLOCK_H: gl.constexpr, HAS_SINK: gl.constexpr, SPLIT: gl.constexpr):
    """Store an item's lse; returns what each head's values are multiplied with. ``m`` is of base 2."""
    empty = l == 0.0
    lse = gl.where(empty, float("inf"), (m + gl.log2(gl.where(empty, 1.0, l))) * LN2)
    weight = 1.0 / gl.where(empty, 1.0, l)
    head = item.head0 + gl.arange(0, BLOCK_H, l.type.layout)
    row = item.token * heads + head
    present = head < heads
    whole = present
    if SPLIT:
        whole = present & (item.split < 0)
        partial = out.partial_lse_ptr + row * out.most_splits + item.split
        gl.store(partial, lse, mask=present & (item.split >= 0))
    gl.store(out.lse_ptr + row, lse, mask=whole)
    if HAS_SINK:
        # A partial result is given no sink: one of -inf takes nothing.
        sink = gl.load(sink_ptr + head, mask=whole, other=float("-inf"))
        # An empty row's lse of +inf meets a sink of +inf as NaN; its output is zero whatever the sink.
        weight *= gl.where(empty, 0.0, 1.0 / (1.0 + gl.exp2((sink - lse) * LOG2E)))
    return weight
