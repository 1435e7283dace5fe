"""Both matrix products of a block of entries and the online softmax between them, for four waves of one program.

K stands in LDS once, as ``[BLOCK_K, 512]``. The logits' product reads its rows. The output's product wants, of a
column, the values of successive entries side by side: gfx950 reads LDS transposed, gfx942 reads squares of 4 x 4 values
and turns them in registers. There the columns of a square take each other's places in the accumulator, which
:func:`in_order` puts right at the end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...common.core.model import VALUE_DIM as _VALUE_DIM

NUM_WARPS = 4
VALUE_DIM = gl.constexpr(_VALUE_DIM)


@gluon.constexpr_function
def matrix_layout(CDNA4, BLOCK_H):
    """Of the logits and of the output: two waves one below the other for 64 heads, else all side by side."""
    if BLOCK_H == 16:
        return gl.amd.AMDMFMALayout(4 if CDNA4 else 3, [16, 16, 32 if CDNA4 else 16], True, [1, NUM_WARPS])
    return gl.amd.AMDMFMALayout(4 if CDNA4 else 3, [32, 32, 16] if CDNA4 else [16, 16, 16], True, [2, NUM_WARPS // 2])


@gluon.constexpr_function
def operand_layout(parent, operand):
    return gl.DotOperandLayout(operand, parent, 8 if parent.version == 4 else 4)


@gluon.constexpr_function
def tile_layout(CDNA4, BLOCK_K):
    """K in LDS, padded so that a product's lanes read different banks."""
    return gl.PaddedSharedLayout.with_identity_for([[128 if CDNA4 else 512, 8]], [BLOCK_K, _VALUE_DIM], [1, 0])


@gluon.constexpr_function
def _waves(layout):
    return layout.warps_per_cta[1]


@gluon.constexpr_function
def _square_layout(operand, waves):
    """How lanes read squares: a layout of V's operand with the columns of :func:`in_order`, whole rows first."""
    tall = waves.bit_length() - 1
    low = [2, 3, 4, 5, *range(6, 6 + tall), 0, 1]

    def column(number):
        moved = sum(1 << low[bit] for bit in range(len(low)) if number >> bit & 1)
        return moved | number >> len(low) << len(low)

    def place(bases):
        return [[row, column(number)] for row, number in bases]

    registers = place(operand.reg_bases)
    registers.sort(key=lambda base: base[1] not in (1, 2))
    return gl.DistributedLinearLayout(
        registers, place(operand.lane_bases), place(operand.warp_bases), [], list(operand.shape)
    )


@gluon.jit
def _read_v(k_smem, OUT: gl.constexpr, CDNA4: gl.constexpr):
    OPERAND: gl.constexpr = operand_layout(OUT, 1)
    if CDNA4:
        return k_smem.load(OPERAND)
    else:
        BLOCK_K: gl.constexpr = k_smem.shape[0]
        WAVES: gl.constexpr = _waves(OUT)
        linear: gl.constexpr = gl.to_linear_layout(OPERAND, [BLOCK_K, VALUE_DIM])
        v = k_smem.load(_square_layout(linear, WAVES))
        v = v.reshape([BLOCK_K, VALUE_DIM // (64 * WAVES), WAVES, 16, 4]).permute([0, 1, 4, 2, 3])
        return gl.convert_layout(v.reshape([BLOCK_K, VALUE_DIM]), OPERAND)


@gluon.jit
def in_order(out, OUT: gl.constexpr, CDNA4: gl.constexpr):
    """The output's columns where they belong."""
    if CDNA4:
        return out
    else:
        WAVES: gl.constexpr = _waves(OUT)
        heads: gl.constexpr = out.shape[0]
        out = out.reshape([heads, VALUE_DIM // (64 * WAVES), 4, WAVES, 16]).permute([0, 1, 3, 4, 2])
        return out.reshape([heads, VALUE_DIM])


@gluon.jit
def attend(q, k_smem, valid, scale, m, l, acc, CDNA4: gl.constexpr):
    """Fold a block of entries into the running maximum ``m``, the weights' sums ``l`` and the output ``acc``.

    ``l [BLOCK_H, BLOCK_K / 4]`` has a sum for each four columns, which are one lane's: adding those up at the end
    spares every block an exchange between lanes and waves.
    """
    BLOCK_H: gl.constexpr = acc.shape[0]
    BLOCK_K: gl.constexpr = k_smem.shape[0]
    OUT: gl.constexpr = matrix_layout(CDNA4, BLOCK_H)
    k = k_smem.permute([1, 0]).load(operand_layout(OUT, 1))
    logits = gl.amd.cdna3.mfma(q, k, gl.zeros([BLOCK_H, BLOCK_K], gl.float32, OUT))
    logits = gl.where(valid[None, :], logits * scale, float("-inf"))
    highest = gl.maximum(m, gl.max(logits, 1))
    # While every entry was invalid the maximum is -inf, and -inf - -inf would be NaN.
    safe = gl.where(highest == float("-inf"), 0.0, highest)
    p = gl.exp2(logits - safe[:, None])
    alpha = gl.exp2(m - safe)
    four = gl.sum(p.reshape([BLOCK_H, BLOCK_K // 4, 4]), 2)
    l = l * gl.convert_layout(alpha, gl.SliceLayout(1, four.type.layout), assert_trivial=True)[:, None] + four
    acc = acc * alpha[:, None]
    v = _read_v(k_smem, OUT, CDNA4)
    p = gl.convert_layout(p.to(gl.bfloat16), operand_layout(OUT, 0))
    return highest, l, gl.amd.cdna3.mfma(p, v, acc)


@gluon.jit
def sums(BLOCK_H: gl.constexpr, BLOCK_K: gl.constexpr, OUT: gl.constexpr):
    """Where :func:`attend` begins to add up weights."""
    return gl.sum(gl.zeros([BLOCK_H, BLOCK_K], gl.float32, OUT).reshape([BLOCK_H, BLOCK_K // 4, 4]), 2)
