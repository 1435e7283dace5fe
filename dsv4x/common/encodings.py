"""Bit-exact encode and decode of the cache's number formats, in torch.

e4m3fn is OCP FP8 (bias 7, max 448, no infinity, NaN is 0x7F / 0xFF); ue8m0 is OCP MX's scale
(byte b is 2**(b-127), 255 is NaN).
"""

from __future__ import annotations

import torch

from .layouts import E4M3FN_MAX


def decode_e4m3fn(codes: torch.Tensor) -> torch.Tensor:
    """uint8 e4m3fn codes, any shape -> float32 of the same shape."""
    return codes.view(torch.float8_e4m3fn).float()


def encode_e4m3fn(values: torch.Tensor) -> torch.Tensor:
    """float32, any shape -> uint8 codes: nearest even, saturating at +-448 (infinities too), NaN kept as NaN."""
    return values.float().clamp(-E4M3FN_MAX, E4M3FN_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def decode_ue8m0(codes: torch.Tensor) -> torch.Tensor:
    """uint8 ue8m0 codes, any shape -> float32: byte 0 is 2**-127, byte 255 is NaN."""
    bits = codes.to(torch.int32) << 23
    bits = torch.where(codes == 0, 0x00400000, bits)
    bits = torch.where(codes == 255, 0x7FC00000, bits)
    return bits.to(torch.int32).view(torch.float32)


def tile_scale_byte(amax: torch.Tensor, min_scale_byte: int) -> torch.Tensor:
    """float32 amax of tiles, any shape -> int32 biased exponents of 2**ceil(log2(amax / 448)), floored.

    448 is 1.75 * 2**8: adding 2**21 - 1 to the bits carries into the exponent exactly when the significand is
    above 1.75, so the ceiling is exact. Not above 254 for any finite or infinite amax.
    """
    return (((amax.float().view(torch.int32) + 0x1FFFFF) >> 23) - 8).clamp_min(min_scale_byte)
