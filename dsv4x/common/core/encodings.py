"""Bit-exact encode and decode of the cache's number formats, in torch.

============ ===== ===== ============================== ===========================================
format       bias  max   NaN                            source
============ ===== ===== ============================== ===========================================
e4m3fn       7     448   0x7F, 0xFF                     OCP FP8 (OFP8) 1.0
e4m3fnuz     8     240   0x80 only, so there is no -0   gfx942's FP8, AMD CDNA3 ISA
e2m1         1     6     none                           OCP MX 1.0; two codes to a byte
ue8m0        127   –     255                            OCP MX 1.0; byte b is 2**(b-127)
============ ===== ===== ============================== ===========================================

None has an infinity: encoders round to the nearest code, ties to the even one, and saturate.
``kernels/encodings.py`` holds the same functions for Triton kernels.
"""

from __future__ import annotations

import torch

from .layouts import VALUE_MAX, scale_carry

# The smallest positive e4m3fn value: the least scale of a DSv4.1 fp4 tile.
_E4M3FN_TINY = 2.0**-9


def decode_e4m3fn(codes: torch.Tensor) -> torch.Tensor:
    """uint8 e4m3fn codes, any shape -> float32 of the same shape."""
    return codes.view(torch.float8_e4m3fn).float()


def encode_e4m3fn(values: torch.Tensor) -> torch.Tensor:
    """float32, any shape -> uint8 codes: nearest even, saturating at +-448 (infinities too), NaN -> 0x7F.

    NVIDIA's conversion drops a NaN's sign, so everybody does: the bytes do not depend on who wrote them.
    """
    limit = VALUE_MAX["e4m3fn"]
    codes = values.float().clamp(-limit, limit).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.masked_fill(values.isnan(), 0x7F)


def decode_e4m3fnuz(codes: torch.Tensor) -> torch.Tensor:
    """uint8 e4m3fnuz codes, any shape -> float32 of the same shape."""
    return codes.view(torch.float8_e4m3fnuz).float()


def encode_e4m3fnuz(values: torch.Tensor) -> torch.Tensor:
    """float32, any shape -> uint8 codes: nearest even, saturating at +-240 (infinities too), NaN -> 0x80.

    What rounds to zero becomes 0x00 whatever its sign. torch's own cast makes NaN of what is too large.
    """
    limit = VALUE_MAX["e4m3fnuz"]
    return values.float().clamp(-limit, limit).to(torch.float8_e4m3fnuz).view(torch.uint8)


def decode_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """uint8 ``[..., n]``, two e2m1 codes to a byte, the even one in the low nibble -> float32 ``[..., 2n]``."""
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).to(torch.int32)
    # float16 has room for e2m1's exponent and fraction: the same number but for the difference of the biases.
    half = ((codes & 8) << 12) | ((codes & 7) << 9)
    return half.to(torch.int16).view(torch.float16).float() * 2.0**14


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """float32 ``[..., 2n]`` -> uint8 ``[..., n]``: nearest even, saturating at +-6 (infinities too), -0 keeps its sign.

    NaN has no code and becomes 0: a writer marks its tile by a NaN scale. (FlashMLA's helper gives 8 for a NaN with
    the sign bit; under a NaN scale nobody can tell.)

    Raises:
        ValueError: an odd number of values in the last dimension.
    """
    if values.shape[-1] % 2:
        raise ValueError(f"values: last dimension is {values.shape[-1]}, need an even number (two codes to a byte)")
    values = values.float()
    nan = values.isnan()
    magnitude = values.abs().masked_fill(nan, 0.0).clamp_max(VALUE_MAX["e2m1"])
    # Neighbouring values are 1/2 apart below 2, 1 apart up to 4, then 2: round() is to even in each.
    upper = torch.where(magnitude < 4, magnitude.round() + 2, (magnitude / 2).round() + 4)
    codes = torch.where(magnitude < 2, (magnitude * 2).round(), upper).to(torch.uint8)
    codes = codes | ((values.signbit() & ~nan).to(torch.uint8) << 3)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def decode_ue8m0(codes: torch.Tensor) -> torch.Tensor:
    """uint8 ue8m0 codes, any shape -> float32: byte 0 is 2**-127, byte 255 is NaN."""
    bits = codes.to(torch.int32) << 23
    bits = torch.where(codes == 0, 0x00400000, bits)
    bits = torch.where(codes == 255, 0x7FC00000, bits)
    return bits.to(torch.int32).view(torch.float32)


def tile_scale_byte(amax: torch.Tensor, min_scale_byte: int, max_value: float = 448.0) -> torch.Tensor:
    """float32 amax of tiles, any shape -> int32 biased exponents of 2**ceil(log2(amax / max_value)), floored.

    Exact: :func:`dsv4x.common.core.layouts.scale_carry` says how. The sign is ignored; not above 254 for any finite or
    infinite amax, and 255, which is ue8m0's NaN, for a NaN.

    Args:
        amax: the largest magnitude of each tile.
        min_scale_byte: >= 0, the least exponent to return.
        max_value: the largest value of the encoding (448, 240 or 6), or any float32 >= 2. Below 2 a subnormal amax
            could need an exponent its bits do not show.

    Raises:
        ValueError: max_value is below 2 or not finite.
    """
    if not 2 <= max_value < float("inf"):
        raise ValueError(f"max_value: got {max_value}, need a finite float32 >= 2")
    addend, exponent = scale_carry(max_value)
    amax = amax.float().abs()
    # A NaN with all its payload's bits set would wrap.
    bits = amax.masked_fill(amax.isnan(), 0.0).view(torch.int32)
    scale = (((bits + addend) >> 23) - exponent).clamp_min(min_scale_byte)
    return scale.masked_fill(amax.isnan(), 255)


def encode_scale_e4m3(amax: torch.Tensor) -> torch.Tensor:
    """float32 amax of e2m1 tiles, any shape -> uint8 e4m3fn codes of their scales: DeepSeek-V4.1's fp4 cache.

    scale = amax / 6, at least 2**-9 and at most 448, to the nearest e4m3fn, ties to even. A tile's values are then
    ``encode_e2m1(tile / decode_e4m3fn(scale))``: a true division, by the scale as rounded. The scale may round down,
    so the largest values may saturate at 6. A tile of zeros gets 2**-9 (code 1), never 0: zeros come back as zeros and
    nothing divides by zero. An amax that is infinite or NaN gets NaN (0x7F): the whole tile reads as NaN.

    Source: FlashMLA 2026.09.30 tests/quant.py (``V41_FP4Sparse``). ``fp4_act_quant`` of DeepSeek-V4.1-Flash's
    inference/kernel.py has the same scale for every finite amax, but takes an infinite one as 448.
    """
    amax = amax.float()
    # Divided by a number, a CUDA tensor is multiplied by 1/6, which rounds the float32 just below a tie up to it.
    ratio = amax / torch.full_like(amax, VALUE_MAX["e2m1"])
    return torch.where(amax.isfinite(), encode_e4m3fn(ratio.clamp_min(_E4M3FN_TINY)), 0x7F)


def e4m3fn_to_e4m3fnuz(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes, any shape -> the e4m3fnuz codes of the same values.

    What is above 240 saturates, NaN stays NaN, -0 becomes 0; everything else is exact.
    """
    return encode_e4m3fnuz(decode_e4m3fn(codes))


def e4m3fnuz_to_e4m3fn(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes, any shape -> the e4m3fn codes of the same values.

    Odd multiples of 2**-10 below 2**-6 go to the nearest even neighbour (-(2**-10) to -0), NaN stays NaN; everything
    else is exact.
    """
    return encode_e4m3fn(decode_e4m3fnuz(codes))


def e4m3fn_bytes_as_e4m3fnuz(codes: torch.Tensor) -> torch.Tensor:
    """uint8 e4m3fn codes, any shape -> the e4m3fnuz codes of exactly *half* their values: double the scale with them.

    The biases differ by one, so finite codes stay as they are. Only e4m3fn's -0 (e4m3fnuz's NaN) becomes 0, and its
    NaNs (+-240 in e4m3fnuz) become 0x80.
    """
    return torch.where((codes & 0x7F) == 0x7F, 0x80, torch.where(codes == 0x80, 0, codes))
