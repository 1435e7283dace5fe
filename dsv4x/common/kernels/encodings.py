"""The number formats of :mod:`dsv4x.common.core.encodings` for Triton kernels, bit for bit the same.

FP8 and FP4 stand as bytes and are converted by integer and float16 arithmetic, because not every arch has the native
types and Triton's own casts differ in how they saturate. Everything here is inlined into the kernels that use it.
"""

import triton
import triton.language as tl


@triton.jit
def e4m3fn_to_f32(code):
    """uint8 -> float32, exact. The 7 low bits read as float16 are the value times 2**-8, subnormals included."""
    half = ((code & 0x80).to(tl.uint16) << 8) | ((code & 0x7F).to(tl.uint16) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e4m3fnuz_to_f32(code):
    """uint8 -> float32, exact. The 7 low bits read as float16 are the value times 2**-7, subnormals included."""
    half = ((code & 0x80).to(tl.uint16) << 8) | ((code & 0x7F).to(tl.uint16) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 128.0
    return tl.where(code == 0x80, float("nan"), value)


@triton.jit
def e2m1_to_f32(code):
    """uint8 in [0, 16) -> float32, exact. The 3 low bits read as float16 are the value times 2**-14."""
    half = ((code & 8).to(tl.uint16) << 12) | ((code & 7).to(tl.uint16) << 9)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def ue8m0_to_f32(code):
    """uint8 -> float32: 2**(code-127), byte 0 is 2**-127, byte 255 is NaN."""
    bits = code.to(tl.uint32) << 23
    bits = tl.where(code == 0, 0x00400000, bits)
    bits = tl.where(code == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _nearest_code(magnitude, FRACTION: tl.constexpr, BIAS: tl.constexpr):
    """uint32 bits of a float32 >= 0 -> uint32 code with FRACTION fraction bits, nearest even, as if it had no maximum.

    NaN and infinity give large codes.
    """
    DROPPED: tl.constexpr = 23 - FRACTION
    # Adding half of the last kept bit, plus one where that bit is set, rounds to nearest even.
    rounded = (magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)) >> DROPPED
    normal = rounded - ((127 - BIAS) << FRACTION)
    # This power of two has the subnormals' spacing as its last bit, so the float adder does the rounding.
    SPACER_EXPONENT: tl.constexpr = 24 - BIAS - FRACTION
    shifted = magnitude.to(tl.float32, bitcast=True) + 2.0**SPACER_EXPONENT
    subnormal = shifted.to(tl.uint32, bitcast=True) - ((127 + SPACER_EXPONENT) << 23)
    return tl.where(magnitude < ((128 - BIAS) << 23), subnormal, normal)


@triton.jit
def f32_to_e4m3fn(value):
    """float32 -> uint8: nearest even, saturating at +-448, NaN -> 0x7F."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = tl.minimum(_nearest_code(magnitude, 3, 7), 0x7E) | ((bits >> 24) & 0x80)
    return tl.where(magnitude > 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def f32_to_e4m3fnuz(value):
    """float32 -> uint8: nearest even, saturating at +-240, NaN -> 0x80, zero of either sign -> 0."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = tl.minimum(_nearest_code(magnitude, 3, 8), 0x7F)
    code = tl.where(code == 0, 0, code | ((bits >> 24) & 0x80))
    return tl.where(magnitude > 0x7F800000, 0x80, code).to(tl.uint8)


@triton.jit
def f32_to_e2m1(value):
    """float32 -> uint8 in [0, 16): nearest even, saturating at +-6, -0 keeps its sign, NaN -> 0."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = tl.minimum(_nearest_code(magnitude, 1, 1), 7) | ((bits >> 28) & 8)
    return tl.where(magnitude > 0x7F800000, 0, code).to(tl.uint8)


@triton.jit
def scale_byte(amax, min_scale_byte, ADDEND: tl.constexpr, EXPONENT: tl.constexpr):
    """float32 amax -> int32 biased exponent of the tile's power-of-two scale, at least ``min_scale_byte``.

    ``ADDEND, EXPONENT = layouts.scale_carry(max_value)``, max_value >= 2. At most 254; 255 for a NaN.
    """
    # Unsigned, so that no NaN's payload wraps.
    magnitude = amax.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    byte = tl.maximum(((magnitude + ADDEND) >> 23).to(tl.int32) - EXPONENT, min_scale_byte)
    return tl.where(magnitude > 0x7F800000, 255, byte)


@triton.jit
def scale_e4m3(amax):
    """float32 amax >= 0 of an e2m1 tile -> uint8 e4m3fn code of its scale: ``encodings.encode_scale_e4m3``.

    Divide the tile by the decoded scale with ``tl.div_rn``: Triton's ``/`` is approximate on NVIDIA.
    """
    code = f32_to_e4m3fn(tl.maximum(tl.div_rn(amax, 6.0), 0.001953125))
    return tl.where(amax < float("inf"), code, 0x7F).to(tl.uint8)
