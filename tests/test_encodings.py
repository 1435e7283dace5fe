"""The number formats, code by code, against definitions that use exact arithmetic."""

import bisect
import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import slow
import torch
import triton
import triton.language as tl

from dsv4x import layouts
from dsv4x.common.core import encodings
from dsv4x.common.kernels import encodings as triton_encodings
from dsv4x.common.kernels.encodings import (
    e2m1_to_f32,
    e4m3fn_to_f32,
    e4m3fnuz_to_f32,
    f32_to_e2m1,
    f32_to_e4m3fn,
    f32_to_e4m3fnuz,
    ue8m0_to_f32,
)
from dsv4x.common.kernels.portability import to_bf16

CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
NANS = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32)
NANS = torch.cat([NANS, NANS | -0x80000000]).view(torch.float32)
MAXIMA = [448.0, 240.0, 6.0]
ON_GPU_TOO = [
    pytest.param("cpu", marks=pytest.mark.interpreter),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
TORCH_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def magnitudes(bias, fraction_bits, codes):
    """The values of the first ``codes`` codes of a format with subnormals, as the formats' texts define them."""
    unit = 1 << fraction_bits
    values = []
    for code in range(codes):
        exponent, fraction = divmod(code, unit)
        significand = Fraction(fraction, unit) + (1 if exponent else 0)
        values.append(significand * Fraction(2) ** (max(exponent, 1) - bias))
    return values


@dataclasses.dataclass(frozen=True)
class Format:
    """A format's non-negative finite values by code, its NaN's code, and whether its zero has a sign."""

    name: str
    values: list
    sign_bit: int
    nan: int
    signed_zero: bool = True

    def decoded(self):
        """float64 of every code."""
        table = np.full(2 * self.sign_bit, np.nan)
        table[: len(self.values)] = [float(v) for v in self.values]
        negative = slice(self.sign_bit, self.sign_bit + len(self.values))
        table[negative] = -table[: len(self.values)]
        if not self.signed_zero:
            table[self.sign_bit] = np.nan
        return torch.from_numpy(table)

    def nearest(self, values):
        """int64 codes of float32 values: nearest, ties to the even code, saturating."""
        middles = [(a + b) / 2 for a, b in zip(self.values, self.values[1:])]
        exact = [float(m) for m in middles]
        assert [Fraction(m) for m in exact] == middles
        codes = []
        for value in values.tolist():
            if value != value:
                codes.append(self.nan)
                continue
            code = bisect.bisect_left(exact, abs(value))
            if code < len(exact) and exact[code] == abs(value):
                code += code % 2
            negative = math.copysign(1, value) < 0 and (code or self.signed_zero)
            codes.append(code | (self.sign_bit if negative else 0))
        return torch.tensor(codes)

    def inputs(self):
        """Every bf16 value, and each code's value and midpoint with one float32 step to either side, and NaNs."""
        positive = torch.tensor([float(v) for v in self.values])
        top = float(self.values[-1])
        past = torch.tensor([top * 1.03, top * 1.07, top * 2, 3e38, torch.inf])
        marks = torch.cat([positive, (positive[1:] + positive[:-1]) / 2, past])
        near = [marks, *(torch.nextafter(marks, torch.tensor(x)) for x in (torch.inf, -torch.inf))]
        both = torch.cat(near)
        # Zeros to a whole number of pairs, which e2m1 needs.
        return torch.cat([BF16.float(), both, -both, NANS, torch.zeros(len(NANS) % 2)])


E4M3FN = Format("e4m3fn", magnitudes(7, 3, 127), 0x80, 0x7F)
E4M3FNUZ = Format("e4m3fnuz", magnitudes(8, 3, 128), 0x80, 0x80, signed_zero=False)
E2M1 = Format("e2m1", magnitudes(1, 1, 8), 8, 0)
FORMATS = [pytest.param(f, id=f.name) for f in (E4M3FN, E4M3FNUZ, E2M1)]


def pack(codes):
    return codes[0::2] | (codes[1::2] << 4)


def unpack(packed):
    return torch.stack([packed & 15, packed >> 4], dim=1).flatten()


def encode(fmt, values):
    """uint8 codes, one to a byte."""
    if fmt is E2M1:
        return unpack(encodings.encode_e2m1(values))
    return {"e4m3fn": encodings.encode_e4m3fn, "e4m3fnuz": encodings.encode_e4m3fnuz}[fmt.name](values)


def decode(fmt, codes):
    """float32 of codes that stand one to a byte."""
    if fmt is E2M1:
        return encodings.decode_e2m1(pack(codes))
    return {"e4m3fn": encodings.decode_e4m3fn, "e4m3fnuz": encodings.decode_e4m3fnuz}[fmt.name](codes)


def same(got, want):
    """Equal bit for bit, any NaN equal to any NaN."""
    got, want = got.cpu().double(), want.cpu().double()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    real = ~want.isnan()
    assert torch.equal(got.signbit() & real, want.signbit() & real), "a zero has the wrong sign"


def same_codes(got, want, values):
    got, want, values = got.cpu().long(), want.cpu().long(), values.cpu()
    bad = got != want
    assert not bad.any(), f"{values[bad][0]}: code {got[bad][0]:#x}, need {want[bad][0]:#x}"


def exact_scale_bytes(values, max_value, floor=0):
    """For ascending floats: the least e with max_value * 2**e >= value, in exact arithmetic, plus 127."""
    exponent, result = -160, []
    for value in values:
        while Fraction(2) ** exponent * Fraction(max_value) < Fraction(value):
            exponent += 1
        result.append(max(exponent + 127, floor))
    return result


def scale_edges(max_value):
    """Each float32 ``max_value * 2**k`` with its two neighbours, and the ends of the subnormals, ascending."""
    edges = torch.tensor([max_value * 2.0**k for k in range(-151, 128) if max_value * 2.0**k < 2.0**128])
    ends = torch.tensor([0.0, 2.0**-149, 2.0**-148, 2.0**-127, 2.0**-126, torch.finfo(torch.float32).max])
    near = [torch.nextafter(edges, torch.tensor(x)) for x in (torch.inf, -torch.inf)]
    every = torch.cat([edges, ends, *near, torch.nextafter(ends, torch.tensor(0.0))])
    return every[every.isfinite()].sort().values


def scale_inputs():
    """float32 amax around every place where the e4m3 scale of an e2m1 tile changes, and every amax of bf16."""
    middles = [float(6 * (a + b) / 2) for a, b in zip(E4M3FN.values, E4M3FN.values[1:])]
    marks = torch.tensor([*middles, 6 * 2.0**-9, 6 * 448.0])
    near = [marks, *(torch.nextafter(marks, torch.tensor(x)) for x in (torch.inf, -torch.inf))]
    ends = torch.tensor([0.0, 2.0**-149, 3e38, torch.inf])
    return torch.cat([BF16[:0x8000].float(), *near, ends, NANS[: len(NANS) // 2]])


def exact_scale_codes(values):
    """The e4m3fn codes nearest to amax / 6 in [2**-9, 448], ties to even, in exact arithmetic."""
    middles = [6 * (a + b) / 2 for a, b in zip(E4M3FN.values, E4M3FN.values[1:])]
    codes = []
    for value in values.tolist():
        if not math.isfinite(value):
            codes.append(0x7F)
            continue
        code = bisect.bisect_left(middles, Fraction(value))
        if code < len(middles) and middles[code] == Fraction(value):
            code += code % 2
        codes.append(max(code, 1))
    return torch.tensor(codes)


@triton.jit
def decode_codes_kernel(codes_ptr, fn_ptr, fnuz_ptr, e2m1_ptr, scales_ptr):
    at = tl.arange(0, 256)
    codes = tl.load(codes_ptr + at)
    tl.store(fn_ptr + at, e4m3fn_to_f32(codes))
    tl.store(fnuz_ptr + at, e4m3fnuz_to_f32(codes))
    tl.store(e2m1_ptr + at, e2m1_to_f32(codes & 15))
    tl.store(scales_ptr + at, ue8m0_to_f32(codes))


@triton.jit
def encode_kernel(values_ptr, fn_ptr, fnuz_ptr, e2m1_ptr, rounded_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + at, mask=at < n, other=0.0)
    tl.store(fn_ptr + at, f32_to_e4m3fn(values), mask=at < n)
    tl.store(fnuz_ptr + at, f32_to_e4m3fnuz(values), mask=at < n)
    tl.store(e2m1_ptr + at, f32_to_e2m1(values), mask=at < n)
    tl.store(rounded_ptr + at, to_bf16(values), mask=at < n)


@triton.jit
def scale_kernel(
    amax_ptr, bytes_ptr, codes_ptr, n, floor, ADDEND: tl.constexpr, EXPONENT: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    amax = tl.load(amax_ptr + at, mask=at < n, other=0.0)
    tl.store(bytes_ptr + at, triton_encodings.scale_byte(amax, floor, ADDEND, EXPONENT), mask=at < n)
    tl.store(codes_ptr + at, triton_encodings.scale_e4m3(amax), mask=at < n)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_code_decodes_to_its_definition(fmt):
    want = fmt.decoded()
    same(decode(fmt, CODES[: len(want)]), want)


def test_torch_and_the_other_definitions_agree_with_these():
    same(E4M3FN.decoded(), torch.from_numpy(slow.E4M3FN))
    same(E4M3FN.decoded(), CODES.view(torch.float8_e4m3fn).float())
    same(E4M3FNUZ.decoded(), CODES.view(torch.float8_e4m3fnuz).float())
    same(torch.from_numpy(slow.UE8M0), CODES.view(torch.float8_e8m0fnu).float())
    assert [float(v) for v in E2M1.values] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (E4M3FN.values[-1], E4M3FNUZ.values[-1]) == (448, 240)
    assert {f.name: float(f.values[-1]) for f in (E4M3FN, E4M3FNUZ, E2M1)} == layouts.VALUE_MAX


def test_every_ue8m0_code_decodes_to_its_definition():
    same(encodings.decode_ue8m0(CODES), torch.from_numpy(slow.UE8M0))


def test_e2m1_stands_with_the_even_value_in_the_low_nibble():
    same(encodings.decode_e2m1(torch.tensor([[0x72], [0x8F]]).byte()), torch.tensor([[1.0, 6.0], [-6.0, -0.0]]))
    assert encodings.encode_e2m1(torch.tensor([[1.0, 6.0], [-6.0, -0.0]])).tolist() == [[0x72], [0x8F]]


@pytest.mark.parametrize("device", TORCH_DEVICES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_encoding_rounds_to_the_nearest_code_ties_to_even(fmt, device):
    values = fmt.inputs()
    same_codes(encode(fmt, values.to(device)), fmt.nearest(values), values)


@pytest.mark.parametrize("fmt", FORMATS)
def test_encoding_a_code_s_value_gives_the_code(fmt):
    want = fmt.decoded()
    real = ~want.isnan()
    codes = encode(fmt, want.nan_to_num(0.0).float())
    assert torch.equal(codes[real], CODES[: len(want)][real])


def test_any_shape_and_stride_is_taken():
    codes = torch.randint(0, 256, (3, 5, 8), dtype=torch.uint8).transpose(0, 1)[:, :, ::2]
    for codec in ("e4m3fn", "e4m3fnuz", "e2m1"):
        values = getattr(encodings, f"decode_{codec}")(codes)
        same(values, getattr(encodings, f"decode_{codec}")(codes.contiguous()))
        turned = values.transpose(0, 1).nan_to_num(1.0)
        encoder = getattr(encodings, f"encode_{codec}")
        assert torch.equal(encoder(turned), encoder(turned.contiguous()))
        assert encoder(values[:0]).shape == codes[:0].shape
    assert encodings.decode_e2m1(codes).shape == (5, 3, 8)
    assert encodings.tile_scale_byte(torch.tensor(1.0), 0).shape == ()
    assert encodings.encode_scale_e4m3(torch.ones(2, 0, 3)).shape == (2, 0, 3)


def test_an_odd_number_of_values_makes_no_e2m1_bytes():
    with pytest.raises(ValueError, match="last dimension is 3, need an even number"):
        encodings.encode_e2m1(torch.zeros(2, 3))


@pytest.mark.parametrize("max_value", MAXIMA)
def test_tile_scale_byte_is_the_exact_ceiling_for_every_positive_bf16(max_value):
    values = BF16[1:0x7F80].float()
    want = exact_scale_bytes(values.tolist(), max_value)
    assert encodings.tile_scale_byte(values, 0, max_value).tolist() == want
    assert [layouts.ceil_scale_byte(v, max_value) for v in values.tolist()] == want


@pytest.mark.parametrize("max_value", [*MAXIMA, 2.0, 57344.0])
def test_tile_scale_byte_is_exact_one_float32_step_around_each_boundary(max_value):
    # A rounded log2 gets these wrong: 448 * 2**k needs byte k, the next float32 needs k + 1.
    values = scale_edges(max_value)
    for floor in (0, 1, 105):
        want = exact_scale_bytes(values.tolist(), max_value, floor)
        assert encodings.tile_scale_byte(values, floor, max_value).tolist() == want


@pytest.mark.parametrize("max_value", MAXIMA)
def test_tile_scale_byte_of_zero_is_the_floor_of_infinity_finite_and_of_nan_nan(max_value):
    got = encodings.tile_scale_byte(torch.cat([torch.tensor([0.0, -0.0, torch.inf]), NANS]), 105, max_value)
    assert got.dtype == torch.int32
    assert got[:2].tolist() == [105, 105]
    assert 105 < got[2] <= 254
    assert got[3:].tolist() == [255] * len(NANS)


@pytest.mark.parametrize("max_value", [1.5, 0.0, -6.0, math.inf, math.nan])
def test_tile_scale_byte_refuses_a_maximum_it_is_not_exact_for(max_value):
    with pytest.raises(ValueError, match="max_value: got"):
        encodings.tile_scale_byte(torch.ones(1), 0, max_value)


def test_scale_floors_are_exact():
    floor = float(np.float32(1e-4))
    assert [layouts.DSV4.min_scale_byte] == exact_scale_bytes([floor], 448)
    helper = dataclasses.replace(layouts.DSV4, amax_floor=0.0, scale_floor=1e-4)
    # The scale itself is floored and then rounded up: 448 times that is the amax with the same scale.
    assert [helper.min_scale_byte] == exact_scale_bytes([448 * floor], 448)
    assert dataclasses.replace(layouts.DSV4, amax_floor=0.0).min_scale_byte == 0


@pytest.mark.parametrize("device", TORCH_DEVICES)
def test_the_e4m3_scale_is_the_nearest_to_a_sixth_of_amax(device):
    values = scale_inputs()
    got = encodings.encode_scale_e4m3(values.to(device))
    assert got.dtype == torch.uint8
    same_codes(got, exact_scale_codes(values), values)


def test_a_tile_of_zeros_comes_back_as_zeros():
    scale = encodings.decode_e4m3fn(encodings.encode_scale_e4m3(torch.zeros(1)))
    assert scale == 2.0**-9
    tile = encodings.encode_e2m1(torch.zeros(16) / scale)
    same(encodings.decode_e2m1(tile) * scale, torch.zeros(16))


def test_an_e2m1_value_times_its_scale_is_exact_in_bf16():
    values = E2M1.decoded()[:, None] * E4M3FN.decoded()[None, :]
    same(values.to(torch.bfloat16), values)


def test_converting_between_flavours_keeps_the_value():
    values = E4M3FN.decoded().float()
    same_codes(encodings.e4m3fn_to_e4m3fnuz(CODES), E4M3FNUZ.nearest(values), values)
    held = values.abs() <= 240
    same(encodings.decode_e4m3fnuz(encodings.e4m3fn_to_e4m3fnuz(CODES[held])), values[held] + 0.0)

    values = E4M3FNUZ.decoded().float()
    same_codes(encodings.e4m3fnuz_to_e4m3fn(CODES), E4M3FN.nearest(values), values)
    held = (values * 2.0**9).frac() == 0
    assert held.sum() == 256 - 16 - 1
    same(encodings.decode_e4m3fn(encodings.e4m3fnuz_to_e4m3fn(CODES[held])), values[held])


def test_bytes_taken_over_as_fnuz_are_half_the_value():
    codes = encodings.e4m3fn_bytes_as_e4m3fnuz(CODES)
    assert codes.dtype == torch.uint8
    # Adding zero makes -0 a 0, which is all e4m3fnuz has.
    same(encodings.decode_e4m3fnuz(codes) * 2, E4M3FN.decoded() + 0.0)
    assert CODES[codes != CODES].tolist() == [0x7F, 0x80, 0xFF]


@pytest.mark.parametrize("device", ON_GPU_TOO)
def test_triton_decodes_every_code_like_the_definition(device):
    fn, fnuz, e2m1, scales = (torch.empty(256, dtype=torch.float32, device=device) for _ in range(4))
    decode_codes_kernel[(1,)](CODES.to(device), fn, fnuz, e2m1, scales)
    same(fn, E4M3FN.decoded())
    same(fnuz, E4M3FNUZ.decoded())
    same(e2m1, E2M1.decoded().repeat(16))
    same(scales, torch.from_numpy(slow.UE8M0))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("device", ON_GPU_TOO)
def test_triton_encodes_like_torch(device):
    values = torch.cat([fmt.inputs() for fmt in (E4M3FN, E4M3FNUZ, E2M1)])
    codes = [torch.empty(len(values), dtype=torch.uint8, device=device) for _ in range(3)]
    rounded = torch.empty(len(values), dtype=torch.bfloat16, device=device)
    encode_kernel[(triton.cdiv(len(values), 4096),)](values.to(device), *codes, rounded, len(values), BLOCK=4096)
    for fmt, got in zip((E4M3FN, E4M3FNUZ, E2M1), codes):
        same_codes(got, encode(fmt, values), values)
    # The interpreter's to_bf16 cuts a NaN down to infinity where only the low half of its payload is set.
    kept = ~(values.isnan() & ((values.view(torch.int32) & 0x7F0000) == 0))
    same(rounded.cpu()[kept], values.bfloat16()[kept])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("device", ON_GPU_TOO)
@pytest.mark.parametrize("max_value", MAXIMA)
def test_triton_scales_tiles_like_torch(device, max_value):
    values = torch.cat([scale_edges(max_value), scale_inputs()])
    scale_bytes = torch.empty(len(values), dtype=torch.int32, device=device)
    codes = torch.empty(len(values), dtype=torch.uint8, device=device)
    addend, exponent = layouts.scale_carry(max_value)
    for floor in (0, 105):
        scale_kernel[(triton.cdiv(len(values), 4096),)](
            values.to(device), scale_bytes, codes, len(values), floor, ADDEND=addend, EXPONENT=exponent, BLOCK=4096
        )
        assert torch.equal(scale_bytes.cpu(), encodings.tile_scale_byte(values, floor, max_value))
        same_codes(codes, encodings.encode_scale_e4m3(values), values)
