"""Launching again what was launched before, without the host work that Triton repeats for every call.

A layer's step takes a few microseconds on the GPU. Triton's own launch binds and specializes every argument, hashes
them and compares the kernel's globals, which took 19 us of an H200's host where a launch alone took 9.

Triton compiles anew for a number of 1 and for multiples of 16, and for pointers that are multiples of 16. Each kernel
names the parameters that differ from batch to batch in its own ``do_not_specialize``, so that the batches of a server
meet a few compilations and no more. Widths and the strides of index rows are not among them. A server's are multiples
of 16, and knowing it vectorizes. Pointers are among them where one number a row is read, or where values decide what is
written: a batch cut into pieces begins at any of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import triton

# The interpreter compiles nothing.
_BY_TRITON = triton.knobs.runtime.interpret

_BY_SIZE = torch.version.hip is not None
"""Whether Triton compiles for a pointer's storage of less than 2 GiB too, as it does on HIP: 32-bit offsets then."""

_MOST = 1024
"""Launches remembered a kernel, the latest: lengths differ from step to step, and none may stay for good."""


class Launch(NamedTuple):
    """What :class:`Launcher` takes for a grid of one dimension.

    Attributes:
        programs: how many.
        tensors, numbers, constexprs: the kernel's arguments, in its parameters' order.
        num_warps: of a program.
    """

    programs: int
    tensors: tuple[torch.Tensor, ...]
    numbers: tuple[float, ...]
    constexprs: tuple[Hashable, ...]
    num_warps: int


class Launcher:
    """Launches a kernel whose parameters are pointers, then numbers, then constexprs.

    It remembers the compiled kernel under everything Triton could have specialized it for: the device, each pointer's
    dtype and on HIP whether its storage is below 2 GiB, every number by its value and every constexpr. A pointer that
    is not a multiple of 16 goes Triton's way. Profilers' launch hooks are called as ever.

    Keys do not tell 2 from 2.0. They need not: a parameter in ``floats`` is compiled as a float whatever it is given,
    and every other one takes ints alone.

    Args:
        kernel: a function under ``triton.jit``.
        floats: its parameters that are float numbers.
    """

    def __init__(self, kernel: Any, floats: tuple[str, ...] = ()):
        self.kernel = kernel
        self.floats = floats
        self._compiled: dict[Hashable, Any] = {}

    @staticmethod
    def _sizes(tensors: tuple[torch.Tensor, ...]) -> tuple[bool, ...]:
        """Which storages Triton's HIP backend takes for 32-bit offsets."""
        return tuple([t.untyped_storage().nbytes() < 2**31 for t in tensors]) if _BY_SIZE else ()

    def prepare(
        self,
        programs: int | tuple[int, int, int],
        numbers: tuple[float, ...],
        constexprs: tuple[Hashable, ...],
        num_warps: int,
        **options: int,
    ) -> Callable[[tuple[torch.Tensor, ...]], None]:
        """The launch of which only the tensors are missing: those of every call are of one device and the same dtypes.

        Such a call spares the host the look-up of the compiled kernel. On HIP it is looked up again where a tensor has
        passed 2 GiB, or no longer does.
        """
        grid = (programs, 1, 1) if isinstance(programs, int) else programs
        parts = (numbers, constexprs)
        tail = (*numbers, *constexprs)
        known: list[Any] = []

        def launch(tensors: tuple[torch.Tensor, ...]) -> None:
            if known:
                addresses = [tensor.data_ptr() for tensor in tensors]
                bits = 0
                for address in addresses:
                    bits |= address
                if bits % 16 == 0 and (not _BY_SIZE or known[1] == self._sizes(tensors)):
                    known[0](*addresses, *tail)
                    return
            self(programs, tensors, numbers, constexprs, num_warps, **options)
            compiled = None if _BY_TRITON else self._compiled.get(self._key(tensors, parts, num_warps, options))
            if compiled is not None:
                known[:] = [compiled[grid], self._sizes(tensors)]

        return launch

    def _key(
        self,
        tensors: tuple[torch.Tensor, ...],
        tail: tuple[tuple[float, ...], tuple[Hashable, ...]],
        num_warps: int,
        options: dict[str, int],
    ) -> Hashable:
        sizes = self._sizes(tensors)
        return (
            torch.cuda.current_device(),
            tuple([t.dtype for t in tensors]),
            sizes,
            *tail,
            num_warps,
            *options.items(),
        )

    def __call__(
        self,
        programs: int | tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        numbers: tuple[float, ...],
        constexprs: tuple[Hashable, ...],
        num_warps: int,
        **options: int,
    ) -> None:
        """Launch ``programs`` programs on the current device and stream; ``options`` are Triton's further ones."""
        if not _BY_TRITON:
            addresses = [tensor.data_ptr() for tensor in tensors]
            bits = 0
            for address in addresses:
                bits |= address
            if bits % 16 == 0:
                key = self._key(tensors, (numbers, constexprs), num_warps, options)
                compiled = self._compiled.get(key)
                if compiled is not None:
                    grid = (programs, 1, 1) if isinstance(programs, int) else programs
                    compiled[grid](*addresses, *numbers, *constexprs)
                    return
                if len(self._compiled) >= _MOST:
                    del self._compiled[next(iter(self._compiled))]
                self._compiled[key] = self._launch(programs, tensors, numbers, constexprs, num_warps, options)
                return
        self._launch(programs, tensors, numbers, constexprs, num_warps, options)

    def _launch(
        self, programs: Any, tensors: Any, numbers: Any, constexprs: Any, num_warps: int, options: dict[str, int]
    ) -> Any:
        grid = (programs,) if isinstance(programs, int) else programs
        numbers = self._typed(len(tensors), numbers)
        return self.kernel[grid](*tensors, *numbers, *constexprs, num_warps=num_warps, **options)

    def _typed(self, first: int, numbers: tuple[float, ...]) -> list[float]:
        """Floats where the kernel has floats; ``numbers`` are its parameters from position ``first`` on."""
        typed: list[float] = []
        for name, number in zip(self.kernel.arg_names[first:], numbers):
            if name in self.floats:
                number = float(number)
            elif type(number) is not int:
                raise TypeError(f"{self.kernel.__name__}: {name} is {number!r}, need an int")
            typed.append(number)
        return typed
