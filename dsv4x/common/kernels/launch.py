"""Launching again what was launched before, without the host work that Triton repeats for every call.

A layer's step takes a few microseconds on the GPU. Triton's own launch binds and specializes every argument, hashes
them and compares the kernel's globals, which took 19 us of an H200's host where a launch alone took 9.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton

# The interpreter compiles nothing; HIP specializes pointers by their storage's size too, and was not measured.
_BY_TRITON = triton.knobs.runtime.interpret or torch.version.hip is not None

PER_BATCH = (
    "rows", "extra_rows", "row_slots", "requests", "total", "steps", "blocks", "gathering", "topk",
    "table_stride", "table_columns", "capacity", "swa_capacity", "extra_capacity", "pages",
    "first", "units", "upper", "s_kv_swa",
    "next_n", "atoms", "groups", "chunks", "parts", "part", "columns", "max_context_len", "table_width", "entries",
    "most", "lens_stride", "lens_stride_n", "starts_stride", "ends_stride", "ends_stride_n", "selected_stride",
    "lens_ptr", "starts_ptr", "ends_ptr", "table_ptr", "ks_ptr", "ke_ptr", "bases_ptr", "requests_ptr", "kept_ptr",
    "selected_ptr",
)  # fmt: skip
"""Parameters whose values differ from batch to batch: Triton would compile anew for 1 and for multiples of 16.

Widths and the strides of index rows are not among them. A server's are multiples of 16, and knowing it vectorizes. The
pointers are those to what is read one number a row, or written where values decide: a batch cut into pieces begins at
any of its rows.
"""

jit = functools.partial(triton.jit, do_not_specialize=PER_BATCH)
"""``triton.jit`` for kernels, so that the batches of a server meet a few compilations and no more."""

_MOST = 1024
"""Launches remembered a kernel: lengths differ from step to step, and none may stay for good."""


class Launcher:
    """Launches a kernel whose parameters are pointers, then numbers, then constexprs.

    It remembers the compiled kernel under everything Triton could have specialized it for: the device, each pointer's
    dtype, every number by its value and every constexpr. A pointer that is not a multiple of 16 goes Triton's way.
    Profilers' launch hooks are called as ever. A number's type is not looked at, and 2 and 2.0 are one key: give a
    parameter ints or floats, never both.

    Args:
        kernel: a function under ``triton.jit``.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

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
                dtypes = tuple([tensor.dtype for tensor in tensors])
                key = (torch.cuda.current_device(), dtypes, numbers, constexprs, num_warps, *options.items())
                compiled = self._compiled.get(key)
                if compiled is not None:
                    grid = (programs, 1, 1) if isinstance(programs, int) else programs
                    compiled[grid](*addresses, *numbers, *constexprs)
                    return
                if len(self._compiled) >= _MOST:
                    self._compiled.clear()
                self._compiled[key] = self._launch(programs, tensors, numbers, constexprs, num_warps, options)
                return
        self._launch(programs, tensors, numbers, constexprs, num_warps, options)

    def _launch(
        self, programs: Any, tensors: Any, numbers: Any, constexprs: Any, num_warps: int, options: dict[str, int]
    ) -> Any:
        grid = (programs,) if isinstance(programs, int) else programs
        return self.kernel[grid](*tensors, *numbers, *constexprs, num_warps=num_warps, **options)
