"""FP8 codes and their ue8m0 scales to bf16, four codes a register.

gfx942 converts fnuz codes and gfx950 OCP ones. An OCP code is twice what it is as fnuz, but for -0 and NaN. A fnuz code
is shifted into float16.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...common.kernels.encodings import ue8m0_to_f32

_ue8m0_to_f32 = gluon.jit(ue8m0_to_f32.fn)

# Triton 3.6 has none.
_SCALES_AS_IT_CONVERTS = gl.constexpr(hasattr(gl.amd.cdna4, "scaled_upcast"))


@gluon.jit
def _spread(first, second, third, fourth, LAYOUT: gl.constexpr):
    """``[N, M]`` each -> ``[N, 4 M]``, one after the other."""
    values = gl.join(gl.join(first, third), gl.join(second, fourth))
    return gl.convert_layout(values.reshape([first.shape[0], 4 * first.shape[1]]), LAYOUT, assert_trivial=True)


@gluon.jit
def _bytes(words, LAYOUT: gl.constexpr):
    return _spread(
        (words & 0xFF).to(gl.uint8), ((words >> 8) & 0xFF).to(gl.uint8),
        ((words >> 16) & 0xFF).to(gl.uint8), (words >> 24).to(gl.uint8), LAYOUT,
    )  # fmt: skip


@gluon.jit
def _halves(words, LAYOUT: gl.constexpr):
    """fnuz codes as float16, 2**-7 of their values: the 7 low bits are a float16's, subnormals included."""
    even = ((words & 0x007F007F) << 7) | ((words & 0x00800080) << 8)
    odd = ((words >> 1) & 0x3F803F80) | (words & 0x80008000)
    bits = _spread(even.to(gl.uint16), odd.to(gl.uint16), (even >> 16).to(gl.uint16), (odd >> 16).to(gl.uint16), LAYOUT)
    return bits.to(gl.float16, bitcast=True)


@gluon.jit
def _wide(scales, LAYOUT: gl.constexpr):
    """``[N, M]`` scales, one for each of ``[N, 512]`` values."""
    count: gl.constexpr = scales.shape[0]
    each: gl.constexpr = 512 // scales.shape[1]
    wide = gl.expand_dims(scales, 2).broadcast_to([count, scales.shape[1], each]).reshape([count, 512])
    return gl.convert_layout(wide, LAYOUT, assert_trivial=True)


@gluon.jit
def _either(a, b):
    return a | b


@gluon.jit
def _poisoned(scale, nan, LAYOUT: gl.constexpr):
    """``scale`` with NaN for the 16 codes that stand together where one is NaN: its whole row is NaN then anyway.

    ``nan [N, 128]`` is not 0 for words with one.
    """
    found = gl.reduce(nan.reshape([nan.shape[0], nan.shape[1] // 4, 4]), 2, _either)
    return gl.where(_wide(found != 0, LAYOUT), float("nan"), scale)


@gluon.jit
def decode(words, scales, LAYOUT: gl.constexpr, FNUZ: gl.constexpr, CDNA4: gl.constexpr):
    """bf16 ``[N, 512]``, exact, of codes ``words [N, 128]`` and ``scales [N, 8]``."""
    if CDNA4 and not FNUZ and _SCALES_AS_IT_CONVERTS:
        codes = _bytes(words, LAYOUT).to(gl.float8e4nv, bitcast=True)
        return gl.amd.cdna4.scaled_upcast(codes, _wide(scales, LAYOUT), gl.bfloat16)
    else:
        rest = words & 0x7F7F7F7F
        # The sign bits' places in codes that are more than a sign.
        more = (rest + 0x7F7F7F7F) & 0x80808080
        if FNUZ:
            scale = _wide(_ue8m0_to_f32(scales), LAYOUT)
        else:
            bits = gl.where(scales == 255, 0x7FC00000, (scales.to(gl.uint32) + 1) << 23)
            scale = _wide(bits.to(gl.float32, bitcast=True), LAYOUT)
        if CDNA4 and FNUZ:
            values = _halves(words, LAYOUT).to(gl.float32) * 128.0
            scale = _poisoned(scale, words & 0x80808080 & ~more, LAYOUT)
        elif CDNA4:
            values = _bytes(words, LAYOUT).to(gl.float8e4nv, bitcast=True).to(gl.float32)
            scale = _wide(_ue8m0_to_f32(scales), LAYOUT)
        elif FNUZ:
            values = _bytes(words, LAYOUT).to(gl.float8e4b8, bitcast=True).to(gl.float32)
        else:
            # Scales past 2**126 do not come of bf16 values.
            values = _bytes(rest | (words & more), LAYOUT).to(gl.float8e4b8, bitcast=True).to(gl.float32)
            scale = _poisoned(scale, (rest + 0x01010101) & 0x80808080, LAYOUT)
        values = values * scale
        # Of at most 8 significant bits: the upper half is exact.
        return (values.to(gl.uint32, bitcast=True) >> 16).to(gl.uint16).to(gl.bfloat16, bitcast=True)
