"""Where an entry's bytes stand, and reading whole entries as the attention kernels want them: bf16, a row each."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from ..core.layouts import CacheLayout
from .encodings import e2m1_to_f32, e4m3fn_to_f32, e4m3fnuz_to_f32, ue8m0_to_f32
from .portability import to_bf16


@dataclass(frozen=True, eq=False)
class EntryFormat:
    """A layout as kernels take it, one constexpr.

    Its derived numbers are fields, not properties, because Triton's cache of compiled kernels knows a constexpr by its
    ``repr`` alone. Equal only to itself, because every launch looks it up and :func:`entry_format` makes each once.

    Attributes:
        nope_dim, rope_dim, tile: as in :class:`~dsv4x.CacheLayout`.
        rope_base: offset of the RoPE values from the entry's values.
        data_bytes, scale_bytes: of one entry.
        scale_base: in ``aos`` entries, offset of the scales from the values.
        soa: whether all values of a page stand before all its scales.
        value_encoding, scale_encoding: their names. A field called ``value`` would be the constexpr's own (Triton 3.6).
        native: whether the arch's own conversion decodes the values.
        native_encode: whether it encodes them too.
        pin: whether what all threads need of an entry is pinned, see :func:`pinned`. On gfx alone, where it is what the
            compiled code wants; on sm_90 Triton shares it without being told.
    """

    nope_dim: int
    rope_dim: int
    tile: int
    rope_base: int
    data_bytes: int
    scale_bytes: int
    scale_base: int
    soa: bool
    value_encoding: str
    scale_encoding: str
    native: bool
    native_encode: bool
    pin: bool


@functools.lru_cache(maxsize=256)
def entry_format(layout: CacheLayout, arch: str) -> EntryFormat:
    """The record's numbers, for kernels compiled for ``arch``."""
    soa = layout.arrangement == "soa"
    native = native_fp8(layout, arch)
    return EntryFormat(
        layout.nope_dim,
        layout.rope_dim,
        layout.scale_tile,
        layout.rope_base,
        layout.data_bytes,
        layout.scale_bytes,
        0 if soa else layout.scale_base(1),
        soa,
        layout.value_encoding,
        layout.scale_encoding,
        native,
        # Measured on NVIDIA alone to saturate, infinities too, and to drop a NaN's sign. AMD's is a mode bit's matter.
        native and arch.startswith("sm_"),
        arch.startswith("gfx"),
    )


_NATIVE_ON_GFX = {"gfx942": "e4m3fnuz", "gfx950": "e4m3fn"}


def native_fp8(layout: CacheLayout, arch: str) -> bool:
    """Whether the arch's own conversion gives the layout's codes: measured on NVIDIA, by the ISA's manual on AMD."""
    if arch.startswith("sm_"):
        return layout.value_encoding == "e4m3fn" and int(arch.removeprefix("sm_")) >= 89
    return layout.value_encoding == _NATIVE_ON_GFX.get(arch)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def pinned(x):
    """Integers ``x [N]`` or ``[N, M]``, computed once.

    Triton computes again, in every layout of threads that wants it, what it takes for cheap: slots, the pages they are
    in, and, to exchange codes and not values between threads, whole decoded tiles. It does not look behind a reduction,
    and one over a single element is no instruction.
    """
    return tl.reduce(tl.expand_dims(x, 0), 0, _either)


@triton.jit
def locate(cache_ptr, slots, page_size, page_stride, FORMAT: tl.constexpr):
    """(values, scales) byte pointers of the entries at ``slots`` (int32 or int64, all in range)."""
    page = slots // page_size
    entry = (slots - page * page_size).to(tl.int64)
    base = cache_ptr + page.to(tl.int64) * page_stride
    if FORMAT.soa:
        scales = base + tl.cast(page_size, tl.int64) * FORMAT.data_bytes + entry * FORMAT.scale_bytes
        return base + entry * FORMAT.data_bytes, scales
    else:
        data = base + entry * (FORMAT.data_bytes + FORMAT.scale_bytes)
        return data, data + FORMAT.scale_base


@triton.jit
def decode_fp8(codes, FORMAT: tl.constexpr):
    """uint8 codes of the format's FP8 flavour -> float32, exact."""
    if FORMAT.native:
        if FORMAT.value_encoding == "e4m3fnuz":
            return codes.to(tl.float8e4b8, bitcast=True).to(tl.float32)
        else:
            return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif FORMAT.value_encoding == "e4m3fnuz":
        return e4m3fnuz_to_f32(codes)
    else:
        return e4m3fn_to_f32(codes)


@triton.jit
def _exact_bf16(x):
    """float32 of at most 8 significant bits -> bf16: its upper half, where rounding would cost instructions."""
    return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _load_scale_words(scale, TILES: tl.constexpr):
    """uint8 ``[N, TILES]`` codes at ``scale``, aligned to 4 bytes, read four at once."""
    words = scale.to(tl.pointer_type(tl.uint32))[:, None] + tl.arange(0, TILES // 4)[None, :]
    codes = tl.load(words)[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]
    return tl.reshape(codes & 0xFF, (scale.shape[0], TILES)).to(tl.uint8)


@triton.jit
def _load_scales(scale, FIRST: tl.constexpr, COUNT: tl.constexpr, FORMAT: tl.constexpr):
    """float32 ``[N, COUNT]`` scales of the values from ``FIRST`` on, each tile's read once."""
    TILES: tl.constexpr = COUNT // FORMAT.tile
    # An entry's scales may be fewer than its tiles, a power of two; the values there are replaced later.
    tile = tl.minimum(FIRST // FORMAT.tile + tl.arange(0, TILES), FORMAT.nope_dim // FORMAT.tile - 1)
    if FORMAT.pin and FORMAT.tile < 64 and FORMAT.scale_bytes % 4 == 0:
        # As bytes they are as many as the threads. Triton would then load each once and exchange them one by one.
        codes = _load_scale_words(scale + FIRST // FORMAT.tile, TILES)
        if FORMAT.scale_encoding == "ue8m0":
            scales = ue8m0_to_f32(codes)
        else:
            scales = e4m3fn_to_f32(codes)
    elif FORMAT.scale_encoding == "ue8m0":
        scales = ue8m0_to_f32(tl.load(scale[:, None] + tile[None, :]))
    elif FORMAT.scale_encoding == "e4m3fn":
        scales = e4m3fn_to_f32(tl.load(scale[:, None] + tile[None, :]))
    else:
        scales = tl.load(scale.to(tl.pointer_type(tl.float32))[:, None] + tile[None, :])
    wide = tl.broadcast_to(scales[:, :, None], (scale.shape[0], TILES, FORMAT.tile))
    return tl.reshape(wide, (scale.shape[0], COUNT))


@triton.jit
def _load_encoded(data, scale, column, k_scale, FIRST: tl.constexpr, COUNT: tl.constexpr, FORMAT: tl.constexpr):
    """bf16 ``[N, COUNT]`` of the encoded values from ``FIRST`` on, scales applied."""
    if FORMAT.value_encoding == "e2m1":
        byte = FIRST // 2 + tl.arange(0, COUNT // 2)
        codes = tl.load(data[:, None] + byte[None, :])
        values = e2m1_to_f32(tl.interleave(codes & 0xF, codes >> 4))
    else:
        values = decode_fp8(tl.load(data[:, None] + column[None, :]), FORMAT)
    if FORMAT.scale_encoding == "none":
        return to_bf16(values * k_scale)
    values *= _load_scales(scale, FIRST, COUNT, FORMAT)
    if FORMAT.scale_encoding == "float32":
        values = to_bf16(values)
        if FORMAT.pin:
            values = pinned(values.to(tl.uint16, bitcast=True)).to(tl.bfloat16, bitcast=True)
        return values
    else:
        return _exact_bf16(values)


@triton.jit
def load_entries(
    cache_ptr, slots, page_size, page_stride, k_scale, FIRST: tl.constexpr, COUNT: tl.constexpr, FORMAT: tl.constexpr
):
    """bf16 ``[len(slots), COUNT]``: values ``FIRST`` to ``FIRST + COUNT - 1`` of the entries at ``slots``, none of them
    out of range.
    """
    LAST: tl.constexpr = FIRST + COUNT
    NOPE: tl.constexpr = FORMAT.nope_dim
    data, scale = locate(cache_ptr, slots, page_size, page_stride, FORMAT)
    column = FIRST + tl.arange(0, COUNT)
    if LAST <= NOPE:
        return _load_encoded(data, scale, column, k_scale, FIRST, COUNT, FORMAT)
    else:
        rope = (data + FORMAT.rope_base).to(tl.pointer_type(tl.bfloat16))[:, None] + (column - NOPE)[None, :]
        if FIRST >= NOPE:
            return tl.load(rope)
        else:
            # The bytes behind the encoded values are the entry's own, so reading them as codes stays in bounds.
            nope = _load_encoded(data, scale, column, k_scale, FIRST, COUNT, FORMAT)
            encoded = (column < NOPE)[None, :]
            return tl.where(encoded, nope, tl.load(rope, mask=column[None, :] >= NOPE, other=0.0))
