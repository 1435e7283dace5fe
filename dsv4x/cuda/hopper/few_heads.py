"""Decode attention over DSv4 pages on Hopper for few heads: entries are the rows of the products, heads the columns.

64 rows of heads, as ``wgmma`` takes them, would be mostly padding here. A program of four warps takes one (token, block
of heads, split), and two programs share a multiprocessor: one computes while the other waits.

Codes go from memory to registers in the order in which a product takes its left operand: the contraction over an
entry's values may run in any order, if q's columns run in the same. They are decoded there, multiplied with q straight
from registers, and stored once for the second product, whose left operand is the stored block transposed. A tile's
words of the next block are loaded as soon as those of this one are decoded, and those of the block after are on their
way to L2: entries lie anywhere, and memory gives whole ones faster than tile by tile.

The products are ``mma.sync``: they read shared memory as loads do, so nothing has to be fenced, and their accumulators
leave more registers than those of ``wgmma``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mma_v2

from ...common.kernels.softmax import LOG2E
from .items import BLOCK_K, Output, Query, Requests, Scope, Work, finish, item_of, load_indices, of_request, to_slots

VALUES = gl.constexpr(512)
CODED = gl.constexpr(7)
"""Tiles of 64 e4m3 values, before the one of bf16."""

# Words of four codes, since a loop keeps every value narrower than a word in a register of its own. A lane holds four
# words of a tile of entry g and four of entry g + 8; four lanes share an entry.
CODES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 16],
    )
)
# Words of two bf16, and lines of 128 bytes: the same entries.
ROPE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
LINES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 4], [0, 8], [8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 16],
    )
)
ROW = gl.constexpr(gl.SliceLayout(1, CODES))
# A warp's 16 entries by 8 heads; of the second product 16 of a tile's values.
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
HEADS = gl.constexpr(gl.SliceLayout(0, PRODUCT))
# A lane holds all warps' maxima of its heads.
MAXIMA = gl.constexpr(gl.BlockedLayout([4, 2], [8, 4], [4, 1], [1, 0]))

# Triton 3.6 calls it otherwise.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# A word of four e4m3 codes and their scale, twice the same bf16 -> four bf16. By way of float16 and float32, all exact,
# which keeps NaN.
_DECODE = gl.constexpr("""{
.reg .b16 a, b, c, d;
.reg .b32 p, q;
.reg .f32 w, x, y, z;
mov.b32 {a, b}, $4;
cvt.rn.f16x2.e4m3x2 p, a;
cvt.rn.f16x2.e4m3x2 q, b;
mov.b32 {a, b}, p;
mov.b32 {c, d}, q;
cvt.f32.f16 w, a;
cvt.f32.f16 x, b;
cvt.f32.f16 y, c;
cvt.f32.f16 z, d;
cvt.rn.bf16x2.f32 p, x, w;
cvt.rn.bf16x2.f32 q, z, y;
mul.rn.bf16x2 p, p, $5;
mul.rn.bf16x2 q, q, $5;
mov.b32 {$0, $1}, p;
mov.b32 {$2, $3}, q;
}""")
_HALVES = gl.constexpr("mov.b32 {$0, $1}, $2;")
_PREFETCH = gl.constexpr("""{
.reg .pred p;
setp.ne.s32 p, $2, 0;
@p prefetch.global.L2 [$1];
mov.b32 $0, 0;
}""")


@gluon.jit
def _and(items, item):
    """A tuple with one item more."""
    items += (item,)
    return items


@gluon.jit
def _decode(words, scale):
    """bf16 ``[64, 64]`` of a tile's words ``[64, 16]`` and its scale of each entry."""
    scale, _ = gl.broadcast(scale[:, None], words)
    a, b, c, d = gl.inline_asm_elementwise(
        _DECODE, "=h,=h,=h,=h,r,r", [words, scale],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1,
    )  # fmt: skip
    tile = gl.join(gl.join(a, b), gl.join(c, d))
    return gl.reshape(gl.permute(tile, (0, 1, 3, 2)), [BLOCK_K, 64])


@gluon.jit
def _rope(words):
    """bf16 ``[64, 64]`` of words ``[64, 32]``."""
    even, odd = gl.inline_asm_elementwise(
        _HALVES, "=h,=h,r", [words], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
    )
    return gl.reshape(gl.join(even, odd), [BLOCK_K, 64])


@gluon.jit
def _scale(scales, TILE: gl.constexpr):
    """A tile's ue8m0 scale, one of an entry's 8 bytes, as twice the same bf16 in a word."""
    code = (scales >> (8 * TILE)).to(gl.int32) & 0xFF
    bits = gl.where(code == 0, 0x00400040, code * 0x00800080)
    return gl.where(code == 255, 0x7FC07FC0, bits)


@gluon.jit
def _in_order(column):
    """The column of q that meets position ``column`` of the contraction: of each 64, t 16 + i 4 + h 2 + c for position
    i 16 + h 8 + t 2 + c."""
    return (
        (column // 64) * 64
        + ((column // 2) % 4) * 16 + ((column // 16) % 4) * 4 + ((column // 8) % 2) * 2 + column % 2
    )  # fmt: skip


@gluon.jit
def _multiply(tile, k_smem, q_smem, logits, TILE: gl.constexpr):
    """Store a tile for the second product, and multiply it with q's columns from registers."""
    k_smem.store(tile)
    # In the order of q's columns, so that nothing moves between lanes.
    operand = gl.permute(gl.reshape(tile, [BLOCK_K, 4, 4, 2, 2]), (0, 2, 3, 1, 4))
    operand = gl.convert_layout(gl.reshape(operand, [BLOCK_K, 64]), gl.DotOperandLayout(0, PRODUCT, 2))
    q = q_smem.slice(64 * TILE, 64, dim=1).permute((1, 0)).load(gl.DotOperandLayout(1, PRODUCT, 2))
    return mma_v2(operand, q, logits)


@gluon.jit
def _load_block(block, item, swa, extra):
    """Indices of a block of an item; all -1 for a block past its last, which belongs to another program."""
    past = item.swa_blocks + gl.cdiv(item.extra_span, BLOCK_K)
    block = gl.where(block < item.last, block, past)
    # Of the scope that a block is not of, no index is loaded.
    extra_block = gl.where(block < item.swa_blocks, past, block) - item.swa_blocks
    own = load_indices(swa, item.token, item.swa_span, block, ROW)
    return gl.maximum(own, load_indices(extra, item.token, item.extra_span, extra_block, ROW))


@gluon.jit
def _slots(index, block, item, extra, table, LOCAL: gl.constexpr):
    """Slots of a block's indices; -1 for what is no entry."""
    if LOCAL:
        in_swa = block < item.swa_blocks
        index = gl.where(in_swa, index, to_slots(gl.where(in_swa, -1, index), extra.page_size, table))
    return index


@gluon.jit
def _addresses(slots, block, item, swa, extra, BIG_PAGES: gl.constexpr):
    """(addresses of the scales, of the codes, which entries there are) of a block."""
    in_swa = block < item.swa_blocks
    page_size = gl.where(in_swa, swa.page_size, extra.page_size)
    page_stride = gl.where(in_swa, gl.cast(swa.page_stride, gl.int64), gl.cast(extra.page_stride, gl.int64))
    # PagedCache holds pages to this alignment, and 16-byte loads need to be told.
    page_stride = gl.multiple_of(page_stride, 16)
    valid = slots >= 0
    safe = gl.where(valid, slots, 0)
    page = safe // page_size
    entry = safe - page * page_size
    scale_base = page_size * 576
    if BIG_PAGES:
        entry = entry.to(gl.int64)
        scale_base = page_size.to(gl.int64) * 576
    base = gl.where(in_swa, swa.cache_ptr, extra.cache_ptr) + page.to(gl.int64) * page_stride
    return base + (scale_base + entry * 8), base + entry * 576, valid


@gluon.jit
def _prefetch(data, valid):
    """Ask for entries to be brought to L2, 128 bytes a line. Their last byte stands for the lines past it."""
    byte = gl.minimum(gl.arange(0, 16, gl.SliceLayout(0, LINES)) * 64, 575)[None, :]
    address = gl.convert_layout(data, gl.SliceLayout(1, LINES)).to(gl.int64)[:, None] + byte
    valid = gl.convert_layout(valid.to(gl.int32), gl.SliceLayout(1, LINES))
    valid, _ = gl.broadcast(valid[:, None], address)
    gl.inline_asm_elementwise(_PREFETCH, "=r,l,r", [address, valid], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load_tile(data, valid, TILE: gl.constexpr):
    word = TILE * 16 + gl.arange(0, 16, gl.SliceLayout(0, CODES))[None, :]
    return gl.load(data.to(gl.pointer_type(gl.int32))[:, None] + word, mask=valid[:, None], other=0)


@gluon.jit
def _load_rope(data, valid):
    word = gl.arange(0, 32, gl.SliceLayout(0, ROPE))[None, :]
    data = gl.convert_layout(data + 448, gl.SliceLayout(1, ROPE)).to(gl.pointer_type(gl.int32))
    valid = gl.convert_layout(valid, gl.SliceLayout(1, ROPE))
    return gl.load(data[:, None] + word, mask=valid[:, None], other=0)


@gluon.jit
def _load_scales(scales_at, valid):
    return gl.load(scales_at.to(gl.pointer_type(gl.int64)), mask=valid, other=0)


@gluon.jit
def _load_q(q_smem, q, item, heads, BLOCK_H: gl.constexpr, FAR_HEADS: gl.constexpr):
    """Bring q to shared memory in the products' order, zeros for heads there are not."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    head = item.head0 + gl.arange(0, BLOCK_H, gl.SliceLayout(1, ROWS))
    if FAR_HEADS:
        head = head.to(gl.int64)
    column = _in_order(gl.arange(0, VALUES, gl.SliceLayout(0, ROWS)))
    rows = q.ptr + item.token * q.stride_t + head[:, None] * q.stride_h + column[None, :]
    q_smem.store(gl.load(rows, mask=(head < heads)[:, None], other=0.0))


@gluon.jit
def _softmax(logits, m, m_smem, BLOCK_H: gl.constexpr):
    """(weights, factor of what came before, maximum) with one block more; base 2."""
    # Each warp's maxima, then all of them, at the cost of one barrier.
    m_smem.store(gl.max(gl.reshape(logits, [4, 16, BLOCK_H]), axis=1))
    m_new = gl.maximum(m, gl.convert_layout(gl.max(m_smem.load(MAXIMA), axis=0), HEADS))
    # While every entry was invalid the maximum is -inf, and -inf - -inf would be NaN.
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    return gl.exp2(logits - m_safe[None, :]), gl.exp2(m - m_safe), m_new


@gluon.jit
def _store_partial(acc, weight, item, heads, out, BLOCK_H: gl.constexpr):
    head = item.head0 + gl.arange(0, BLOCK_H, HEADS)
    column = gl.arange(0, 64, gl.SliceLayout(1, PRODUCT))
    row = (item.token * heads + head) * out.most_splits + item.split
    rows = out.partial_ptr + row[None, :] * VALUES + column[:, None]
    for tile in gl.static_range(CODED + 1):
        gl.store(rows + 64 * tile, acc[tile] * weight[None, :], mask=(head < heads)[None, :])


@gluon.jit
def _store_whole(acc, weight, k_smem, item, heads, out, BLOCK_H: gl.constexpr, FAR_HEADS: gl.constexpr):
    """The entries' shared memory, done with, turns them into whole rows."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for tile in gl.static_range(CODED + 1):
        values = (acc[tile] * weight[None, :]).to(gl.bfloat16)
        k_smem[tile].slice(0, BLOCK_H, dim=0).store(gl.permute(values, (1, 0)))
    head = item.head0 + gl.arange(0, BLOCK_H, gl.SliceLayout(1, ROWS))
    if FAR_HEADS:
        head = head.to(gl.int64)
    column = gl.arange(0, 64, gl.SliceLayout(0, ROWS))
    rows = out.ptr + item.token * out.stride_t + head[:, None] * out.stride_h + column[None, :]
    for tile in gl.static_range(CODED + 1):
        gl.store(rows + 64 * tile, k_smem[tile].slice(0, BLOCK_H, dim=0).load(ROWS), mask=(head < heads)[:, None])


@gluon.jit
def _attend(
    item, swa, extra, table, q, out, sink_ptr, heads, scale, q_smem, k_smem, p_smem, m_smem,
    HAS_SINK: gl.constexpr, SPLIT: gl.constexpr, BIG_PAGES: gl.constexpr, FAR_HEADS: gl.constexpr,
    LOCAL: gl.constexpr, BLOCK_H: gl.constexpr,
):  # fmt: skip
    first = item.first
    # Slots come first: they are several loads behind one another.
    index, next_index = _load_block(first, item, swa, extra), _load_block(first + 1, item, swa, extra)
    slots = _slots(index, first, item, extra, table, LOCAL)
    next_slots = _slots(next_index, first + 1, item, extra, table, LOCAL)
    index = _load_block(first + 2, item, swa, extra)
    _load_q(q_smem, q, item, heads, BLOCK_H, FAR_HEADS)
    scales_at, data, valid = _addresses(slots, first, item, swa, extra, BIG_PAGES)
    scales = _load_scales(scales_at, valid)
    words = ()
    for tile in gl.static_range(CODED):
        words = _and(words, _load_tile(data, valid, tile))
    next_scales_at, next_data, next_valid = _addresses(next_slots, first + 1, item, swa, extra, BIG_PAGES)
    _prefetch(next_data, next_valid)
    slots = _slots(index, first + 2, item, extra, table, LOCAL)
    m = gl.full([BLOCK_H], float("-inf"), gl.float32, HEADS)
    # A lane's own share of the sums, added up at the end.
    l = gl.zeros([BLOCK_K, BLOCK_H], gl.float32, PRODUCT)
    zero = gl.zeros([64, BLOCK_H], gl.float32, PRODUCT)
    acc = ()
    for _ in gl.static_range(CODED + 1):
        acc = _and(acc, zero)
    # For q's sake. Triton puts one into the loop where there is none before.
    _barrier()
    for block in range(first, item.last):
        index = _load_block(block + 3, item, swa, extra)
        rope = _load_rope(data, valid)
        seen = gl.convert_layout(valid.to(gl.int32), gl.SliceLayout(1, PRODUCT)) != 0
        next_scales = _load_scales(next_scales_at, next_valid)
        data, valid = next_data, next_valid
        next_scales_at, next_data, next_valid = _addresses(slots, block + 2, item, swa, extra, BIG_PAGES)
        _prefetch(next_data, next_valid)
        logits = zero
        next_words = ()
        for tile in gl.static_range(CODED):
            logits = _multiply(_decode(words[tile], _scale(scales, tile)), k_smem[tile], q_smem, logits, tile)
            next_words = _and(next_words, _load_tile(data, valid, tile))
        words = next_words
        scales = next_scales
        logits = _multiply(_rope(rope), k_smem[CODED], q_smem, logits, CODED)
        slots = _slots(index, block + 3, item, extra, table, LOCAL)
        logits = gl.where(seen[:, None], logits * scale, float("-inf"))
        p, alpha, m = _softmax(logits, m, m_smem, BLOCK_H)
        l = l * alpha[None, :] + p
        p_smem.store(gl.permute(p.to(gl.bfloat16), (1, 0)))
        weights = p_smem.permute((1, 0)).load(gl.DotOperandLayout(1, PRODUCT, 2))
        products = ()
        for tile in gl.static_range(CODED + 1):
            values = k_smem[tile].permute((1, 0)).load(gl.DotOperandLayout(0, PRODUCT, 2))
            products = _and(products, mma_v2(values, weights, acc[tile] * alpha[None, :]))
        acc = products
    weight = finish(m, gl.sum(l, axis=0), item, heads, sink_ptr, out, BLOCK_H, HAS_SINK, SPLIT)
    if SPLIT:
        if item.split >= 0:
            _store_partial(acc, weight, item, heads, out, BLOCK_H)
        else:
            _store_whole(acc, weight, k_smem, item, heads, out, BLOCK_H, FAR_HEADS)
    else:
        # Triton 3.6 does not compile a branch that is never taken.
        _store_whole(acc, weight, k_smem, item, heads, out, BLOCK_H, FAR_HEADS)


# The parameters of the kernel for more heads, and the same of them specialized.
@gluon.jit(
    do_not_specialize=(
        "items", "rows", "heads", "head_blocks", "most_splits", "whole_blocks",
        "swa_width", "swa_indices_stride", "swa_capacity", "swa_page_size", "swa_page_stride",
        "extra_width", "extra_indices_stride", "extra_capacity", "extra_page_size", "extra_page_stride",
        "requests", "table_columns", "table_stride", "table_pages",
    )
)  # fmt: skip
def decode_few_heads_kernel(
    q_ptr, swa_ptr, swa_indices_ptr, swa_lens_ptr, extra_ptr, extra_indices_ptr, extra_lens_ptr, sink_ptr,
    request_ptr, visible_ptr, table_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    items, rows, heads, head_blocks, most_splits, whole_blocks, scale,
    q_stride_t, q_stride_h, out_stride_t, out_stride_h,
    swa_width, swa_indices_stride, swa_capacity, swa_page_size, swa_page_stride,
    extra_width, extra_indices_stride, extra_capacity, extra_page_size, extra_page_stride,
    requests, table_columns, table_stride, table_pages,
    HAS_SWA_LENS: gl.constexpr, HAS_EXTRA_LENS: gl.constexpr, HAS_SINK: gl.constexpr, SPLIT: gl.constexpr,
    BIG_PAGES: gl.constexpr, FAR_HEADS: gl.constexpr, LOCAL: gl.constexpr, BLOCK_H: gl.constexpr,
):  # fmt: skip
    """``BLOCK_H``: 8 or 16."""
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, VALUES], TILE)
    # A tile each: Triton 3.6 puts a barrier between stores to slices of one.
    k_smem = ()
    for _ in gl.static_range(CODED + 1):
        k_smem = _and(k_smem, gl.allocate_shared_memory(gl.bfloat16, [BLOCK_K, 64], TILE))
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, BLOCK_K], TILE)
    m_smem = gl.allocate_shared_memory(gl.float32, [4, BLOCK_H], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    swa = Scope(
        swa_ptr, swa_indices_ptr, swa_lens_ptr, swa_width,
        swa_indices_stride, swa_capacity, swa_page_size, swa_page_stride,
    )  # fmt: skip
    extra = Scope(
        extra_ptr, extra_indices_ptr, extra_lens_ptr, extra_width,
        extra_indices_stride, extra_capacity, extra_page_size, extra_page_stride,
    )  # fmt: skip
    local = Requests(request_ptr, visible_ptr, table_ptr, requests, table_columns, table_stride, table_pages)
    q = Query(q_ptr, q_stride_t, q_stride_h)
    out = Output(out_ptr, out_stride_t, out_stride_h, lse_ptr, partial_ptr, partial_lse_ptr, most_splits)
    work = Work(items, rows, head_blocks, most_splits, whole_blocks)
    row = gl.program_id(0)
    if SPLIT:
        # Lets the reduction be launched beside these programs; it waits for what they write by itself.
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
        row = row % rows
    # Before the item, whose spans are loaded too: neither waits for the other.
    extra, table = of_request(extra, local, (row // head_blocks).to(gl.int64), LOCAL)
    item = item_of(gl.program_id(0), work, swa, extra, HAS_SWA_LENS, HAS_EXTRA_LENS, SPLIT, BLOCK_H)
    if item.there:
        _attend(
            item, swa, extra, table, q, out, sink_ptr, heads, scale * LOG2E, q_smem, k_smem, p_smem, m_smem,
            HAS_SINK, SPLIT, BIG_PAGES, FAR_HEADS, LOCAL, BLOCK_H,
        )  # fmt: skip
