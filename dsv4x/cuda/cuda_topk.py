"""Selection of a row's largest logits in CUDA C++, for archs with clusters: ``topk.cu`` has how."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import NamedTuple

import torch

from ..common.core.logits_calls import SelectionCall
from ..common.dispatch import costs
from ..common.dispatch.problem import SelectionProblem
from ..common.dispatch.registry import Kernel, register
from . import nvrtc

ARCHS = ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
K_MAX = 2048

# Of an H200 (benchmarks/results/selection-h200.json, k 1024, narrow buffers): rows -> us at costs.SELECTION_WIDTHS.
_TOPK_US = {
    1: (3.1, 8.1, 10.8, 11.6),
    4: (3.2, 8.4, 10.8, 11.6),
    16: (3.5, 8.8, 11.1, 14.4),
    64: (3.6, 9.1, 13.8, 21.0),
    256: (5.4, 13.3, 23.5, 51.1),
}

_PARAMS = struct.Struct("<8q4q10iIi")
_LENGTHS64, _STARTS64, _BASES64, _REQUESTS64 = 1, 2, 4, 8


class Build(NamedTuple):
    """What the source is compiled with.

    Attributes:
        threads: of a block.
        blocks: of a multiprocessor, at least.
        held: loads of four columns that a thread's registers hold.
        room: entries that are kept of a row longer than that; 0 where there is none.
        aligned: whether four columns can be loaded at once.
    """

    threads: int
    blocks: int
    held: int
    room: int
    aligned: bool = True

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's."""
        given = {"THREADS": self.threads, "BLOCKS": self.blocks, "HELD": self.held, "LONG": int(self.room > 0)}
        given["ALIGNED"] = int(self.aligned)
        return tuple(f"-D{name}={value}" for name, value in given.items()) + (
            (f"-DROOM={self.room}",) if self.room else ()
        )

    @property
    def shared_bytes(self) -> int:
        """Of a block, at most."""
        bins = 4096 if self.threads >= 1024 else 2048
        return 3 * 1024 + 4 * bins + 8 * self.room


SHORTEST = Build(512, 3, 1, 0)
SHORT = Build(512, 2, 4, 0)
FEW = Build(1024, 1, 2, 16384)
MANY = Build(512, 2, 3, 8192)
BUILDS = (SHORTEST, SHORT, FEW, MANY)


@functools.cache
def function(build: Build) -> nvrtc.Function:
    """The kernel, built so."""
    return nvrtc.Function(Path(__file__).with_name("topk.cu"), "topk", build.options)


def spread(multiprocessors: int, rows: int, width: int) -> tuple[Build, int]:
    """How rows of at most ``width`` columns, which is all that the host knows, are spread: over blocks a row too."""
    for build in (SHORTEST, SHORT):
        if width <= 4 * build.held * build.threads:
            return build, 1
    for blocks in (8, 4, 2):
        if rows * blocks <= multiprocessors - (0 if blocks == 2 else 12):
            return FEW, blocks
    return (FEW if rows <= multiprocessors else MANY), 1


@functools.lru_cache(4096)
def prepared(device: int, rows: int, width: int, aligned: bool) -> nvrtc.Prepared:
    """The launch for rows of at most ``width`` columns."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    build, blocks = spread(multiprocessors, rows, width)
    build = build._replace(aligned=aligned)
    launch = nvrtc.Launch(rows * blocks, build.threads, blocks, build.shared_bytes)
    return function(build).prepare(device, launch, _PARAMS)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.lru_cache(64)
def page_division(page_size: int) -> tuple[int, int]:
    """(factor, shift) so that ``column // page_size`` is ``2 * column * factor >> 32 + shift`` below 2^31."""
    shift = (page_size - 1).bit_length()
    return -(-(1 << 31 + shift) // page_size), shift


def is_aligned(call: SelectionCall) -> bool:
    """Whether every row's columns can be loaded four at a time."""
    logits = call.logits
    return call.row_starts is None and not (logits.shape[1] | logits.stride(0)) & 3 and not logits.data_ptr() & 15


def fields(call: SelectionCall) -> tuple[int, ...]:
    """The kernel's struct of a call."""
    logits, lengths, k, method, starts, space, out, local = call
    rows, width = logits.shape
    flags = _LENGTHS64 if lengths is not None and lengths.dtype is torch.int64 else 0
    if starts is not None:
        flags |= _STARTS64 if starts.dtype is torch.int64 else 0
    bases, requests, table = space.get("bases"), space.get("requests"), space.get("block_table")
    if bases is not None and bases.dtype is torch.int64:
        flags |= _BASES64
    if requests is not None and requests.dtype is torch.int64:
        flags |= _REQUESTS64
    page_size, num_requests, table_width, table_stride = 1, 0, 0, 0
    if table is not None:
        page_size, (num_requests, table_width), table_stride = space["page_size"], table.shape, table.stride(0)
    return (
        logits.data_ptr(), _address(lengths), _address(starts), _address(bases), _address(requests), _address(table),
        out.data_ptr(), _address(local),
        logits.stride(0), table_stride, out.stride(0), 0 if local is None else local.stride(0),
        rows, width, k, method.value, flags,
        space.get("next_n", 1), num_requests, table_width, page_size, space.get("pages", 0), *page_division(page_size),
    )  # fmt: skip


def topk_transform(call: SelectionCall) -> None:
    """One launch."""
    device = call.logits.get_device()
    launch = prepared(device, *call.logits.shape, is_aligned(call))
    launch(torch._C._cuda_getCurrentRawStream(device), *fields(call))


def _predicted_us(problem: SelectionProblem) -> float:
    """Infinite where it was never run, so that it is not picked there unasked."""
    return costs.selection_us(_TOPK_US, problem) if problem.arch == "sm_90" else float("inf")


def _reasons(problem: SelectionProblem) -> list[str]:
    reasons = [] if problem.k <= K_MAX else [f"k is {problem.k}, need <= {K_MAX}: a block's lists hold no more"]
    if problem.device == "cuda" and not reasons and (why := nvrtc.unavailable(problem.arch)):
        reasons.append(why)
    return reasons


def record() -> Kernel:
    """The selection kernel's record."""
    return Kernel(
        "topk_transform",
        "cuda",
        topk_transform,
        _predicted_us,
        archs=ARCHS,
        further_reasons=_reasons,
    )


def register_kernels() -> None:
    """Add the selection kernel."""
    register(record())
