"""The number formats, code by code, against definitions that use exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import slow
import torch
import triton
import triton.language as tl

from dsv4x import layouts
from dsv4x.common import encodings
from dsv4x.common.kernels.entries import e4m3fn_to_f32, f32_to_e4m3fn, ue8m0_to_f32
from dsv4x.common.kernels.portability import to_bf16

CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
ON_GPU_TOO = [
    pytest.param("cpu", marks=pytest.mark.interpreter),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def same(got, want):
    """Equal bit for bit, any NaN equal to any NaN."""
    got, want = got.cpu().double(), want.double()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    real = ~want.isnan()
    assert torch.equal(got.signbit() & real, want.signbit() & real), "a zero has the wrong sign"


def rounding_inputs():
    """Every bf16 value, and every e4m3fn code's value and midpoint with one float32 step to either side."""
    positive = torch.from_numpy(slow.E4M3FN[:0x7F]).float()
    marks = torch.cat([positive, (positive[1:] + positive[:-1]) / 2, torch.tensor([464.0, 480.0, 3e38, torch.inf])])
    near = [marks, *(torch.nextafter(marks, torch.tensor(x)) for x in (torch.inf, -torch.inf))]
    both = torch.cat(near)
    return torch.cat([BF16.float(), both, -both])


def nearest_code(value):
    """The e4m3fn code of a float: a search over all codes, ties to the even one, saturating."""
    if value != value:
        return 0x7F
    magnitude = abs(value)
    distance = np.abs(slow.E4M3FN[:0x7F] - min(magnitude, 448.0))
    best = np.flatnonzero(distance == distance.min())
    code = int(best[0]) if len(best) == 1 else int(next(c for c in best if c % 2 == 0))
    return code | (0x80 if np.signbit(value) else 0)


def exact_scale_byte(amax):
    """The least e with 448 * 2**e >= amax, in exact arithmetic, plus 127."""
    target, exponent = Fraction(float(amax)) / 448, -140
    while Fraction(2) ** exponent < target:
        exponent += 1
    return exponent + 127


@triton.jit
def decode_codes_kernel(codes_ptr, values_ptr, scales_ptr):
    at = tl.arange(0, 256)
    codes = tl.load(codes_ptr + at)
    tl.store(values_ptr + at, e4m3fn_to_f32(codes))
    tl.store(scales_ptr + at, ue8m0_to_f32(codes))


@triton.jit
def encode_kernel(values_ptr, codes_ptr, rounded_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + at, mask=at < n, other=0.0)
    tl.store(codes_ptr + at, f32_to_e4m3fn(values), mask=at < n)
    tl.store(rounded_ptr + at, to_bf16(values), mask=at < n)


def test_every_e4m3fn_code_decodes_to_its_definition():
    same(encodings.decode_e4m3fn(CODES), torch.from_numpy(slow.E4M3FN))
    same(CODES.view(torch.float8_e4m3fn).float(), torch.from_numpy(slow.E4M3FN))


def test_every_ue8m0_code_decodes_to_its_definition():
    same(encodings.decode_ue8m0(CODES), torch.from_numpy(slow.UE8M0))


def test_encoding_rounds_to_the_nearest_code_ties_to_even():
    values = rounding_inputs()
    got = encodings.encode_e4m3fn(values).int()
    want = torch.tensor([nearest_code(v) for v in values.tolist()])
    nan = values.isnan()
    assert bool(((got[nan] & 0x7F) == 0x7F).all())
    bad = (got != want) & ~nan
    assert not bad.any(), f"{values[bad][0]}: code {got[bad][0]}, need {want[bad][0]}"


def test_tile_scale_byte_is_the_exact_ceiling_for_every_positive_bf16():
    values = BF16[1:0x7F80].float()
    got = encodings.tile_scale_byte(values, 0)
    # The exact search is monotone in the input, so it only has to be made once a power of two apart.
    want, exponent = [], -140
    for value in values.tolist():
        while Fraction(2) ** exponent < Fraction(value) / 448:
            exponent += 1
        want.append(max(exponent + 127, 0))
    assert got.tolist() == want
    assert [layouts.ceil_scale_byte(v) for v in values.tolist()] == want


def test_tile_scale_byte_is_exact_one_float32_step_around_each_boundary():
    # A rounded log2 gets these wrong: 448 * 2**k needs byte k, the next float32 needs k + 1.
    edges = torch.tensor([448.0 * 2.0**k for k in range(-126, 119)])
    above, below = (torch.nextafter(edges, torch.tensor(x)) for x in (torch.inf, -torch.inf))
    for values in (edges, above, below):
        want = [exact_scale_byte(v) for v in values.tolist()]
        assert encodings.tile_scale_byte(values, 0).tolist() == want
        assert [layouts.ceil_scale_byte(v) for v in values.tolist()] == want


def test_tile_scale_byte_of_zero_is_the_floor_and_of_infinity_a_finite_scale():
    got = encodings.tile_scale_byte(torch.tensor([0.0, torch.inf]), 105)
    assert got[0] == 105
    assert got[1] <= 254


def test_scale_floors_are_exact():
    import dataclasses

    floor = float(np.float32(1e-4))
    assert layouts.DSV4.min_scale_byte == exact_scale_byte(floor)
    helper = dataclasses.replace(layouts.DSV4, amax_floor=0.0, scale_floor=1e-4)
    # The scale itself is floored and then rounded up: 448 times that is the amax with the same scale.
    assert helper.min_scale_byte == exact_scale_byte(448 * floor)
    assert dataclasses.replace(layouts.DSV4, amax_floor=0.0).min_scale_byte == 0


@pytest.mark.parametrize("device", ON_GPU_TOO)
def test_triton_decodes_every_code_like_the_definition(device):
    values, scales = (torch.empty(256, dtype=torch.float32, device=device) for _ in range(2))
    decode_codes_kernel[(1,)](CODES.to(device), values, scales)
    same(values, torch.from_numpy(slow.E4M3FN))
    same(scales, torch.from_numpy(slow.UE8M0))


@pytest.mark.parametrize("device", ON_GPU_TOO)
def test_triton_encodes_like_torch(device):
    values = rounding_inputs()
    codes = torch.empty(len(values), dtype=torch.uint8, device=device)
    rounded = torch.empty(len(values), dtype=torch.bfloat16, device=device)
    encode_kernel[(triton.cdiv(len(values), 4096),)](values.to(device), codes, rounded, len(values), BLOCK=4096)
    nan = values.isnan()
    codes = codes.cpu()
    assert bool(((codes[nan] & 0x7F) == 0x7F).all())
    assert torch.equal(codes[~nan], encodings.encode_e4m3fn(values)[~nan])
    same(rounded, values.bfloat16())
