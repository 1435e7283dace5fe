"""KV cache layouts as data, and :class:`PagedCache`: bytes, a layout and a page size.

A page is a run of ``page_size`` entries. ``soa`` pages hold all data rows, then all scale rows;
``aos`` pages hold each entry's data and scales together. An entry is addressed by its *slot*,
``page * page_size + offset``; only the page stride, the page size and the layout locate its bytes.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from .ambient import writable

ValueEncoding = Literal["e4m3fn", "e4m3fnuz", "e2m1", "bf16"]
ScaleEncoding = Literal["ue8m0", "float32", "e4m3fn", "none"]

FLAVOURS = ("e4m3fn", "e4m3fnuz")
"""The two FP8 encodings: OCP's, and gfx942's own."""

VALUE_MAX = {"e4m3fn": 448.0, "e4m3fnuz": 240.0, "e2m1": 6.0}
_VALUE_BITS = {"e4m3fn": 8, "e4m3fnuz": 8, "e2m1": 4, "bf16": 16}
_SCALE_BYTES = {"ue8m0": 1, "float32": 4, "e4m3fn": 1, "none": 0}


@dataclass(frozen=True)
class CacheLayout:
    """One way of storing K entries. A new format is a new record; kernels take what it derives.

    Attributes:
        name: the field's name.
        nope_dim: leading values, stored as ``value_encoding`` with one scale per ``scale_tile`` values. Where a format
            encodes the RoPE values like the others, this is the whole head dimension.
        rope_dim: trailing values, stored as bf16 without a scale.
        arrangement: ``"soa"`` or ``"aos"``, see the module docstring.
        value_encoding: ``"e4m3fn"`` (OCP, max 448), ``"e4m3fnuz"`` (gfx942's, max 240) or ``"e2m1"`` (max 6, two to a
            byte, the even one in the low nibble). ``"bf16"`` where nope_dim is 0.
        scale_encoding: ``"ue8m0"`` (byte b means 2**(b-127); 255 is NaN), ``"float32"`` (a power of two), ``"e4m3fn"``,
            or ``"none"``: no scale is stored, one ``k_scale`` for the whole tensor is an argument of the ops.
        scale_tile: values sharing one scale.
        scale_pad: unused bytes after an entry's scales, written as zero.
        rope_after_scales: in ``aos`` entries, whether the RoPE values stand behind the scales.
        amax_floor: a tile's amax is raised to this before its scale is taken (the model's own floor).
        scale_floor: the scale is raised to this before it is rounded up (FlashMLA's test helper floors here).
        page_alignment: a page's stride is a multiple of this many bytes.
    """

    name: str
    nope_dim: int
    rope_dim: int
    arrangement: Literal["soa", "aos"]
    value_encoding: ValueEncoding
    scale_encoding: ScaleEncoding
    scale_tile: int
    scale_pad: int = 0
    rope_after_scales: bool = False
    amax_floor: float = 1e-4
    scale_floor: float = 0.0
    page_alignment: int = 1

    @functools.cached_property
    def head_dim(self) -> int:
        """Values an entry holds."""
        return self.nope_dim + self.rope_dim

    @functools.cached_property
    def num_scales(self) -> int:
        return 0 if self.scale_encoding == "none" else self.nope_dim // self.scale_tile

    @functools.cached_property
    def operand_encoding(self) -> str:
        """What the indexer multiplies: ``value_encoding``, or ``"mxfp8"``, which has its ue8m0 scales inside."""
        mx = self.value_encoding == "e4m3fn" and self.scale_encoding == "ue8m0"
        return "mxfp8" if mx else self.value_encoding

    @functools.cached_property
    def needs_k_scale(self) -> bool:
        """Whether encoded values are stored without scales, so that one ``k_scale`` of the tensor stands for them."""
        return self.scale_encoding == "none" and self.nope_dim > 0

    @functools.cached_property
    def scale_bytes(self) -> int:
        """Bytes of an entry's scales, padding included."""
        return self.num_scales * _SCALE_BYTES[self.scale_encoding] + self.scale_pad

    @functools.cached_property
    def nope_bytes(self) -> int:
        """Bytes of an entry's encoded values."""
        return self.nope_dim * _VALUE_BITS[self.value_encoding] // 8

    @functools.cached_property
    def data_bytes(self) -> int:
        """Bytes of an entry's values."""
        return self.nope_bytes + 2 * self.rope_dim

    @functools.cached_property
    def entry_bytes(self) -> int:
        return self.data_bytes + self.scale_bytes

    def page_stride(self, page_size: int) -> int:
        """Bytes from one page to the next when pages stand back to back."""
        return -(-page_size * self.entry_bytes // self.page_alignment) * self.page_alignment

    @functools.cached_property
    def data_pitch(self) -> int:
        """Bytes from one entry's values to the next entry's, inside a page."""
        return self.data_bytes if self.arrangement == "soa" else self.entry_bytes

    @functools.cached_property
    def scale_pitch(self) -> int:
        """Bytes from one entry's scales to the next entry's, inside a page."""
        return self.scale_bytes if self.arrangement == "soa" else self.entry_bytes

    def scale_base(self, page_size: int) -> int:
        """Offset of entry 0's scales inside its page."""
        if self.arrangement == "soa":
            return page_size * self.data_bytes
        return self.nope_bytes if self.rope_after_scales else self.data_bytes

    def entry_runs(self, page_size: int) -> tuple[tuple[int, int], ...]:
        """(offset of entry 0's, bytes) of each run that an entry is; entry i's is i times as many bytes further."""
        if self.arrangement == "aos":
            return ((0, self.entry_bytes),)
        runs = (0, self.data_bytes), (self.scale_base(page_size), self.scale_bytes)
        return tuple(run for run in runs if run[1])

    @functools.cached_property
    def rope_base(self) -> int:
        """Offset of the RoPE values from the entry's own start."""
        return self.nope_bytes + (self.scale_bytes if self.rope_after_scales else 0)

    @functools.cached_property
    def value_max(self) -> float:
        """The largest value the encoding holds."""
        return VALUE_MAX[self.value_encoding]

    @functools.cached_property
    def min_scale_byte(self) -> int:
        """The smallest power-of-two scale a writer emits, as a biased exponent.

        A tile's scale grows with its amax, so both floors are one lower bound on the result.
        """
        smallest = ceil_scale_byte(self.amax_floor, self.value_max)
        return max(smallest, _ceil_log2(self.scale_floor) + 127 if self.scale_floor else 0)

    def __hash__(self) -> int:
        # Every launch looks its layout up, and equal layouts have equal names.
        return hash(self.name)

    def with_flavour(self, flavour: str) -> CacheLayout:
        """The same layout with its FP8 values in ``flavour``: a gfx942 server mixes both, a cache has one.

        Raises ValueError for a layout without FP8 values, or for another flavour.
        """
        if flavour not in FLAVOURS:
            raise ValueError(f"flavour: got {flavour!r}, need 'e4m3fn' or 'e4m3fnuz'")
        if self.value_encoding not in FLAVOURS:
            raise ValueError(f"flavour: {self.name} holds {self.value_encoding}, need a layout of FP8 values")
        base = self.name.removesuffix(_FNUZ)
        if flavour == "e4m3fnuz":
            return dataclasses.replace(self, name=base + _FNUZ, value_encoding="e4m3fnuz")
        return dataclasses.replace(self, name=base, value_encoding="e4m3fn")


_FNUZ = " fnuz"


def scale_carry(value_max: float) -> tuple[int, int]:
    """(addend, exponent) such that ((bits(amax) + addend) >> 23) - exponent is the biased exponent of the scale.

    value_max is m * 2**e with 1 <= m < 2, so ceil(log2(amax / value_max)) only asks whether amax's significand is above
    m: the addend carries into the exponent exactly then.
    """
    bits = struct.unpack("<I", struct.pack("<f", value_max))[0]
    return 0x7FFFFF - (bits & 0x7FFFFF), (bits >> 23) - 127


def ceil_scale_byte(amax: float, value_max: float = 448.0) -> int:
    """ceil(log2(amax / value_max)) + 127, exact: read from float32(amax)'s bits, never from a rounded log2."""
    addend, exponent = scale_carry(value_max)
    bits = struct.unpack("<I", struct.pack("<f", amax))[0]
    return max(((bits + addend) >> 23) - exponent, 0)


def _ceil_log2(value: float) -> int:
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return ((bits + 0x7FFFFF) >> 23) - 127


DSV4 = CacheLayout("DSv4", 448, 64, "soa", "e4m3fn", "ue8m0", 64, scale_pad=1, page_alignment=576)
"""DeepSeek-V4 ``fp8_ds_mla`` (FlashMLA "MODEL1"): 448 e4m3 + 64 bf16 = 576 B, 7 ue8m0 + 1 pad = 8 B."""

DSV32 = CacheLayout("DSv3.2", 512, 64, "aos", "e4m3fn", "float32", 128, rope_after_scales=True)
"""DeepSeek-V3.2 ``fp8_ds_mla``: 512 e4m3 + 4 float32 scales + 64 bf16 = 656 B."""

TRTLLM_NATIVE = CacheLayout("trtllm-native", 576, 0, "aos", "e4m3fn", "none", 64)
"""trtllm-gen's V3.2 cache: 576 e4m3, RoPE included, one k_scale for the whole tensor."""

UNIFORM_FP8 = CacheLayout("uniform fp8", 512, 0, "aos", "e4m3fn", "none", 64)
"""trtllm-gen's V4 cache: 512 e4m3, RoPE included, one k_scale for the whole tensor."""

BF16_512 = CacheLayout("bf16 512", 0, 512, "aos", "bf16", "none", 64)
"""512 bf16: V4's sparse prefill workspaces and bf16 caches."""

BF16_576 = CacheLayout("bf16 576", 0, 576, "aos", "bf16", "none", 64)
"""576 bf16: V3.2's."""

DSV41_FP8 = CacheLayout("DSv4.1 fp8", 512, 0, "aos", "e4m3fn", "ue8m0", 32)
"""DeepSeek-V4.1: 512 e4m3, RoPE included, and 16 ue8m0, each entry's together: 528 B."""

DSV41_FP8_SOA = CacheLayout("DSv4.1 fp8 soa", 512, 0, "soa", "e4m3fn", "ue8m0", 32, page_alignment=512)
"""The same with all values of a page before all its scales, pages aligned to 512 B."""

DSV41_FP4 = CacheLayout("DSv4.1 fp4", 512, 0, "aos", "e2m1", "e4m3fn", 16)
"""DeepSeek-V4.1's extra cache: 512 e2m1 (256 B) and 32 e4m3 scales: 288 B."""

INDEXER_FP8 = CacheLayout("indexer fp8", 128, 0, "soa", "e4m3fn", "float32", 128)
"""The indexer's K: 128 e4m3 and one float32 scale: 132 B, values of a page before its scales."""

INDEXER_MXFP8 = CacheLayout("indexer mxfp8", 128, 0, "soa", "e4m3fn", "ue8m0", 32)
"""The indexer's K on SM100: 128 e4m3 and 4 ue8m0: 132 B, values of a page before its scales.

vLLM stores one scale a token there, as four equal bytes; DeepGEMM takes four of any kind, and so does the writer here.
"""

INDEXER_FP4 = CacheLayout("indexer fp4", 128, 0, "soa", "e2m1", "ue8m0", 32, amax_floor=6 * 2.0**-126)
"""The indexer's K: 128 e2m1 (64 B) and 4 ue8m0: 68 B, values of a page before its scales; DeepSeek's floor."""


class MLAKVCacheLayout(enum.Enum):
    """The named layouts."""

    DSV4 = DSV4
    DSV32 = DSV32
    TRTLLM_NATIVE = TRTLLM_NATIVE
    UNIFORM_FP8 = UNIFORM_FP8
    BF16_512 = BF16_512
    BF16_576 = BF16_576
    DSV41_FP8 = DSV41_FP8
    DSV41_FP8_SOA = DSV41_FP8_SOA
    DSV41_FP4 = DSV41_FP4
    INDEXER_FP8 = INDEXER_FP8
    INDEXER_MXFP8 = INDEXER_MXFP8
    INDEXER_FP4 = INDEXER_FP4


def by_name(name: str) -> CacheLayout:
    """The layout of a record's name, such as ``"DSv4"`` or ``"DSv4 fnuz"``, or of an enum member's, ``"DSV4"``.

    Raises TypeError for what is no string, and ValueError naming the layouts there are.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, need a layout's name")
    if name not in _OWN:
        raise ValueError(f"layout: got {name!r}, need one of {', '.join(m.value.name for m in MLAKVCacheLayout)}")
    return _OWN[name]


# Under all their names.
_OWN = {name: member.value for name, member in MLAKVCacheLayout.__members__.items()}
for _layout in list(_OWN.values()):
    _OWN[_layout.name] = _layout
    if _layout.value_encoding == "e4m3fn":
        _OWN[_layout.name + _FNUZ] = _layout.with_flavour("e4m3fnuz")
_of_caches: dict[str, CacheLayout] = {}


def described(name: str) -> CacheLayout:
    """The layout of a record's name: dsv4x's own, or else the latest of that name that a cache was made with.

    For what costs and shapes follow from. Bytes are read by a cache's own layout.

    Raises ValueError where no cache of that name was made either.
    """
    return _of_caches[name] if name in _of_caches else by_name(name)


class CacheSpec(NamedTuple):
    """A paged cache without its bytes, as far as choosing a kernel goes.

    Attributes:
        layout: the layout's name.
        page_size: entries per page.
        pages: pages in the pool.
        page_stride: bytes from one page to the next.
    """

    layout: str
    page_size: int
    pages: int
    page_stride: int


# Vector loads of 16 bytes need every page to start on one, where the layout's pages back to back do.
ALIGNMENT = 16


def _check_pages(layout: object, page_size: object) -> None:
    if not isinstance(layout, CacheLayout):
        raise TypeError(f"layout: got {type(layout).__name__}, need a CacheLayout such as dsv4x.layouts.DSV4")
    if not isinstance(page_size, int) or isinstance(page_size, bool):
        raise TypeError(f"page_size: got {type(page_size).__name__}, need an int")
    if page_size <= 0:
        raise ValueError(f"page_size: got {page_size}, need > 0")


@dataclass(frozen=True, eq=False)
class PagedCache:
    """A paged cache as the server holds it: bytes, how entries are laid out, and entries per page.

    Args:
        data: uint8, ``[pages, >= layout.page_stride(page_size)]``, or the servers' view
            ``[pages, page_size, 1, entry_bytes]`` (also without the 1) whose rows are *not* entries.
            ``stride(0)`` may exceed the page stride (layers packed into one block) and is honoured.
            The base address is a multiple of 16. So is ``stride(0)``, unless the layout's own page stride is not: pages
            of one indexer entry stand 132 bytes apart, and 4 is enough there.
        layout: a :class:`CacheLayout`.
        page_size: entries per page, > 0.

    Raises:
        TypeError: ``data`` is not a uint8 tensor, ``layout`` not a CacheLayout, ``page_size`` not an int.
        ValueError: shape, strides or alignment do not hold the layout's pages.
    """

    data: torch.Tensor
    layout: CacheLayout
    page_size: int

    def __post_init__(self) -> None:
        _check_pages(self.layout, self.page_size)
        if self.layout.name not in _OWN:
            _of_caches[self.layout.name] = self.layout
        data = self.data
        if not isinstance(data, torch.Tensor) or data.dtype != torch.uint8:
            seen = data.dtype if isinstance(data, torch.Tensor) else type(data).__name__
            raise TypeError(f"data: got {seen}, need a torch.uint8 tensor (view other 1-byte dtypes as uint8)")
        entry = self.layout.entry_bytes
        page_shapes = ((self.page_size, 1, entry), (self.page_size, entry))
        page_bytes = self.layout.page_stride(self.page_size)
        if data.dim() == 2:
            if data.shape[1] < page_bytes:
                raise ValueError(
                    f"data: rows of {data.shape[1]} bytes, need >= {page_bytes} "
                    f"({self.layout.name}, page_size {self.page_size})"
                )
            if data.stride(1) != 1 and data.numel():
                raise ValueError(f"data: stride(1) is {data.stride(1)}, need 1")
        elif tuple(data.shape[1:]) in page_shapes:
            if data.numel() and ((data.stride(1) != entry and self.page_size > 1) or data.stride(-1) != 1):
                raise ValueError(
                    f"data: strides {tuple(data.stride())}, need (any, {entry}, .., 1): a page is one run of bytes"
                )
        else:
            raise ValueError(
                f"data: shape {tuple(data.shape)}, need [pages, >= {page_bytes}] "
                f"or [pages, {self.page_size}, 1, {entry}]"
            )
        # torch normalizes the stride of a single page, so only several pages can be addressed wrongly.
        alignment = math.gcd(ALIGNMENT, page_bytes)
        if data.shape[0] > 1 and (data.stride(0) < page_bytes or data.stride(0) % alignment):
            raise ValueError(
                f"data: stride(0) is {data.stride(0)} bytes, need a multiple of {alignment} >= {page_bytes} "
                f"({self.layout.name}, page_size {self.page_size})"
            )
        # Fake and meta tensors (torch.compile) have no address to check.
        if type(data) is torch.Tensor and data.device.type != "meta" and data.data_ptr() % ALIGNMENT:
            raise ValueError(f"data: address {data.data_ptr():#x}, need a multiple of {ALIGNMENT}")

    @classmethod
    def zeros(
        cls, pages: int, layout: CacheLayout, page_size: int, device: torch.device | str | None = None
    ) -> PagedCache:
        """A cache of ``pages`` zeroed pages, back to back.

        Raises:
            TypeError: ``layout`` is not a CacheLayout, or ``pages`` or ``page_size`` not an int.
            ValueError: ``pages`` < 0 or ``page_size`` < 1.
        """
        _check_pages(layout, page_size)
        if not isinstance(pages, int) or isinstance(pages, bool):
            raise TypeError(f"pages: got {type(pages).__name__}, need an int")
        if pages < 0:
            raise ValueError(f"pages: got {pages}, need >= 0")
        stride = -(-layout.page_stride(page_size) // ALIGNMENT) * ALIGNMENT
        return cls(torch.zeros(pages, stride, dtype=torch.uint8, device=device), layout, page_size)

    @functools.cached_property
    def spec(self) -> CacheSpec:
        """What a kernel may ask of this cache without seeing its bytes."""
        return CacheSpec(self.layout.name, self.page_size, self.pages, self.page_stride)

    @functools.cached_property
    def pages(self) -> int:
        return self.data.shape[0]

    @functools.cached_property
    def capacity(self) -> int:
        """Slots: every valid slot is in ``[0, capacity)``."""
        return self.pages * self.page_size

    @functools.cached_property
    def page_stride(self) -> int:
        """Bytes from one page to the next."""
        return self.data.stride(0) if self.pages > 1 else self.layout.page_stride(self.page_size)

    @functools.cached_property
    def device(self) -> torch.device:
        return self.data.device

    @functools.cached_property
    def page_bytes(self) -> torch.Tensor:
        """uint8 ``[pages, page_size * entry_bytes]``: the bytes entries live in, as a view."""
        return writable(self.data).as_strided(
            (self.pages, self.page_size * self.layout.entry_bytes),
            (self.page_stride, 1),
            self.data.storage_offset(),
        )

    @functools.cached_property
    def servers_view(self) -> torch.Tensor:
        """uint8 ``[pages, page_size, 1, entry_bytes]``: the same bytes in the shape servers and FlashMLA use."""
        return self.page_bytes.unflatten(1, (self.page_size, 1, self.layout.entry_bytes))
