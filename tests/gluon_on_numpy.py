"""Runs the bodies of the Gluon kernels for AMD GPUs on numpy, since Gluon has no interpreter.

What a kernel computes does not depend on layouts, so they are ignored. What it depends on is done as the hardware does
it: integers wrap at their width, bf16 rounds to nearest even, products are of bf16 and add up in float32, and a load
that is not masked faults outside its tensor. Programs run one after the other, and a program's waves as one: whether
barriers stand where they must is not seen.
"""

from __future__ import annotations

import itertools
import types
from typing import Any

import numpy as np
import torch
import triton
from triton.experimental.gluon import language as gluon_language


class DType:
    """A Gluon type and what stands for its values: float32 for bf16, codes for FP8."""

    def __init__(self, name: str, stored: Any, held: Any = None):
        self.name, self.stored, self.held = name, np.dtype(stored), np.dtype(held or stored)


_PLAIN = {
    name: DType(name, name) for name in ("uint8", "uint16", "uint32", "int32", "int64", "float16", "float32")
}  # fmt: skip
BF16 = DType("bfloat16", "uint16", "float32")
BOOL = DType("int1", "bool")
_FP8 = {"float8e4nv": torch.float8_e4m3fn, "float8e4b8": torch.float8_e4m3fnuz}
_TYPES = {**_PLAIN, "bfloat16": BF16, **{name: DType(name, "uint8") for name in _FP8}}


def _rounded(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(values, np.float32)).bfloat16().float().numpy()


class Tensor:
    """Values of a type; a number is a tensor without dimensions."""

    __hash__ = None

    def __init__(self, values: Any, dtype: DType | None = None):
        self.values = np.asarray(values)
        self.dtype = dtype or (BOOL if self.values.dtype == bool else _PLAIN[self.values.dtype.name])

    shape = property(lambda self: list(self.values.shape))
    type = property(lambda self: types.SimpleNamespace(layout=None))

    def __index__(self) -> int:
        return int(self.values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def __getitem__(self, key: Any) -> Tensor:
        return Tensor(self.values[key], self.dtype)

    def to(self, dtype: DType, bitcast: bool = False) -> Tensor:
        if bitcast:
            bits = self.values.view(np.uint32) >> 16 if self.dtype is BF16 else self.values
            if dtype is BF16:
                return Tensor((bits.astype(np.uint32) << 16).view(np.float32), BF16)
            return Tensor(bits.view(dtype.stored), dtype)
        values = self.values
        if self.dtype.name in _FP8:
            values = torch.from_numpy(np.array(values)).view(_FP8[self.dtype.name]).float().numpy()
        return Tensor(_rounded(values) if dtype is BF16 else values.astype(dtype.held), dtype)

    def reshape(self, shape: list[int]) -> Tensor:
        return Tensor(self.values.reshape(shape), self.dtype)

    def permute(self, order: list[int]) -> Tensor:
        return Tensor(self.values.transpose(order), self.dtype)

    def broadcast_to(self, shape: list[int]) -> Tensor:
        return Tensor(np.broadcast_to(self.values, shape), self.dtype)

    def __invert__(self) -> Tensor:
        return Tensor(~self.values)


def _values(x: Any) -> Any:
    """A tensor's values, a Python number as it is: numpy gives it the other operand's type, as Triton does."""
    return x.values if isinstance(x, Tensor) else x


def _operator(name: str) -> Any:
    def apply(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return other + self
        with np.errstate(all="ignore"):
            return Tensor(getattr(np.asarray(self.values), name)(_values(other)))

    return apply


_OPERATORS = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod", "and", "or", "xor", "rshift",
    "lshift", "ge", "gt", "le", "lt", "eq", "ne",
)  # fmt: skip
for _name in _OPERATORS:
    setattr(Tensor, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """Elements at ``offset`` of a tensor's storage."""

    def __init__(self, memory: np.ndarray, dtype: DType, offset: Any = 0):
        self.memory, self.dtype, self.offset = memory, dtype, offset

    @classmethod
    def to_tensor(cls, tensor: torch.Tensor) -> Pointer:
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
        dtype = _TYPES[str(tensor.dtype).removeprefix("torch.")]
        return cls(storage[tensor.storage_offset() * tensor.element_size() :], dtype)

    def to(self, dtype: DType) -> Pointer:
        assert not np.any(self.offset), "a pointer is cast before it is moved"
        return Pointer(self.memory, dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.dtype, self.offset + np.asarray(_values(other)).astype(np.int64))

    def elements(self) -> np.ndarray:
        size = self.dtype.stored.itemsize
        return self.memory[: len(self.memory) // size * size].view(self.dtype.stored)

    def at(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Element numbers and which of them count; a wrong one faults."""
        offset = np.asarray(self.offset)
        there = np.broadcast_to(True if mask is None else _values(mask), offset.shape)
        wrong = there & ((offset < 0) | (offset >= len(self.elements())))
        assert not wrong.any(), f"element {offset[wrong][0]} of {len(self.elements())}"
        return np.where(there, offset, 0), there


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    offset, there = pointer.at(mask)
    found = np.zeros(offset.shape, pointer.dtype.stored)
    found[there] = pointer.elements()[offset[there]]
    if pointer.dtype is BF16:
        return Tensor((found.astype(np.uint32) << 16).view(np.float32), BF16)
    return Tensor(np.where(there, found, np.asarray(_values(other)).astype(found.dtype)), pointer.dtype)


def _store(pointer: Pointer, values: Tensor, mask: Any = None) -> None:
    offset, there = pointer.at(mask)
    kept = np.broadcast_to(values.values, offset.shape)
    if pointer.dtype is BF16:
        kept = (_rounded(kept).view(np.uint32) >> 16).astype(np.uint16)
    pointer.elements()[offset[there]] = kept[there].astype(pointer.dtype.stored)


class Shared:
    """A tensor in LDS, not initialized: NaN or a far number."""

    def __init__(self, values: np.ndarray, dtype: DType):
        self.values, self.dtype = values, dtype

    shape = property(lambda self: list(self.values.shape))

    def store(self, tensor: Tensor) -> None:
        assert tensor.dtype.name == self.dtype.name, f"{tensor.dtype.name} into {self.dtype.name}"
        self.values[...] = tensor.values

    def load(self, layout: Any) -> Tensor:
        return Tensor(self.values.copy(), self.dtype)

    def index(self, at: Any) -> Shared:
        return Shared(self.values[int(at)], self.dtype)

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(np.moveaxis(np.moveaxis(self.values, dim, 0)[start : start + length], 0, dim), self.dtype)

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.values.transpose(order), self.dtype)


def _allocate(dtype: DType, shape: list[int], layout: Any) -> Shared:
    return Shared(np.full(shape, np.nan if dtype.held.kind == "f" else 2**31 - 1, dtype.held), dtype)


def _where(condition: Any, a: Any, b: Any) -> Tensor:
    typed = next((x for x in (a, b) if isinstance(x, Tensor)), Tensor(np.float32(0)))
    return Tensor(np.where(_values(condition), _values(a), _values(b)).astype(typed.values.dtype), typed.dtype)


def _either(function: Any) -> Any:
    """Of two arguments, a Python number taking the other's type."""

    def apply(a: Any, b: Any) -> Tensor:
        a, b = (np.asarray(x) if isinstance(x, np.ndarray) else x for x in (_values(a), _values(b)))
        return Tensor(function(a, b))

    return apply


def _reduce(x: Tensor, axis: int, combine: Any) -> Tensor:
    first, *rest = (Tensor(part, x.dtype) for part in np.moveaxis(x.values, axis, 0))
    for part in rest:
        first = combine(first, part)
    return first


def _mfma(a: Tensor, b: Tensor, acc: Tensor) -> Tensor:
    assert a.dtype is b.dtype is BF16
    with np.errstate(all="ignore"):
        return Tensor(acc.values + a.values @ b.values)


def _upcast(codes: Tensor, scales: Tensor, dtype: DType) -> Tensor:
    with np.errstate(all="ignore"):
        scale = np.ldexp(np.float32(1), scales.values.astype(np.int32) - 127)
        return Tensor(codes.to(_PLAIN["float32"]).values * np.where(scales.values == 255, np.nan, scale)).to(dtype)


def _quiet(function: Any) -> Any:
    def apply(x: Tensor) -> Tensor:
        with np.errstate(all="ignore"):
            return Tensor(function(x.values))

    return apply


def _multiple_of(x: Tensor, number: int) -> Tensor:
    """What the compiler is told has to be so, of what is not -1."""
    assert not (x.values[x.values >= 0] % number).any(), f"no multiple of {number}"
    return x


def _language(program: tuple[int, ...], programs: tuple[int, ...]) -> types.SimpleNamespace:
    """What stands for ``gl`` and ``tl`` in one program."""
    vendor = types.SimpleNamespace(
        buffer_load=lambda ptr, offset, mask=None, other=0: _load(ptr + offset, mask, other),
        mfma=_mfma,
        scaled_upcast=_upcast,
    )  # fmt: skip
    return types.SimpleNamespace(
        **_TYPES,
        constexpr=gluon_language.constexpr,
        amd=types.SimpleNamespace(cdna3=vendor, cdna4=vendor),
        SliceLayout=lambda *a: None,
        to_linear_layout=lambda *a: None,
        SwizzledSharedLayout=lambda *a: None,
        pointer_type=lambda dtype: dtype,
        program_id=lambda axis: Tensor(np.int32(program[axis])),
        num_programs=lambda axis: Tensor(np.int32(programs[axis])),
        allocate_shared_memory=_allocate,
        to_tensor=lambda x: Tensor(np.int32(x)),
        arange=lambda start, end, layout=None: Tensor(np.arange(start, end, dtype=np.int32)),
        full=lambda shape, value, dtype, layout=None: Tensor(np.full(shape, value, dtype.held), dtype),
        zeros=lambda shape, dtype, layout=None: Tensor(np.zeros(shape, dtype.held), dtype),
        reshape=Tensor.reshape,
        load=_load,
        store=_store,
        where=_where,
        minimum=_either(np.minimum),
        maximum=_either(np.maximum),
        cdiv=lambda a, b: (a + (b - 1)) // b,
        exp2=_quiet(np.exp2),
        log2=_quiet(np.log2),
        max=lambda x, axis: Tensor(x.values.max(axis)),
        sum=lambda x, axis: Tensor(x.values.sum(axis, dtype=x.values.dtype)),
        reduce=_reduce,
        join=lambda a, b: Tensor(np.stack([a.values, b.values], -1), a.dtype),
        expand_dims=lambda x, axis: Tensor(np.expand_dims(x.values, axis), x.dtype),
        broadcast=lambda x, other: (x.broadcast_to(other.shape), other),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        multiple_of=_multiple_of,
    )  # fmt: skip


def _plain(value: Any, language: Any, made: dict[int, Any]) -> Any:
    """A global of a kernel's module as the kernel's body is to see it."""
    if isinstance(value, triton.JITFunction):
        if id(value) not in made:
            body = value.fn
            names: dict[str, Any] = {}
            made[id(value)] = types.FunctionType(body.__code__, names, body.__name__, body.__defaults__)
            names |= {key: _plain(each, language, made) for key, each in body.__globals__.items()}
        return made[id(value)]
    if isinstance(value, gluon_language.constexpr):
        return value.value
    if isinstance(value, types.ModuleType) and value.__name__ in (gluon_language.__name__, "triton.language"):
        return language
    if type(value).__name__ == "ConstexprFunction":
        return lambda *args: None if None in args else value.fn(*args)
    return value


def body(kernel: Any, program: tuple[int, ...] = (0, 0, 0), programs: tuple[int, ...] = (1, 1, 1)) -> Any:
    """The function under ``gluon.jit`` or ``triton.jit``, for one program, on tensors of this module."""
    return _plain(kernel, _language(program, programs), {})


def _number(number: float) -> Tensor:
    if isinstance(number, float):
        return Tensor(np.float32(number))
    return Tensor(np.asarray(number, np.int32 if -(2**31) <= number < 2**31 else np.int64))


class Launcher:
    """In place of :class:`dsv4x.common.kernels.launch.Launcher`, on CPU tensors."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def prepare(self, programs: Any, numbers: Any, constexprs: Any, num_warps: int, **options: int) -> Any:
        return lambda tensors: self(programs, tensors, numbers, constexprs, num_warps, **options)

    def __call__(
        self, programs: Any, tensors: Any, numbers: Any, constexprs: Any, num_warps: int, **options: int
    ) -> None:
        assert len(self.kernel.arg_names) == len(tensors) + len(numbers) + len(constexprs)
        grid = (programs, 1, 1) if isinstance(programs, int) else programs
        arguments = (*map(Pointer.to_tensor, tensors), *map(_number, numbers), *constexprs)
        for program in itertools.product(*map(range, grid)):
            body(self.kernel, program, grid)(*arguments)
