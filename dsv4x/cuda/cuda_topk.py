"""Selection of a row's largest logits in CUDA C++, for archs with clusters: ``topk.cu`` has how."""

from __future__ import annotations

import ctypes
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
THREADS = 512
TOPK = nvrtc.Function(Path(__file__).with_name("topk.cu"), "topk")

# Of an H100 (benchmarks/results/selection-h100.json, k 1024, narrow buffers): rows -> us at costs.SELECTION_WIDTHS.
_TOPK_US = {
    1: (5.1, 8.7, 10.0, 17.2),
    4: (5.2, 8.9, 10.1, 17.5),
    16: (5.5, 9.1, 13.6, 25.0),
    64: (5.7, 9.4, 44.6, 80.8),
    256: (8.2, 14.6, 42.8, 256.1),
}

_PARAMS = struct.Struct("<8q4q13i4x")
_LENGTHS64, _STARTS64, _BASES64, _REQUESTS64, _ALIGNED = 1, 2, 4, 8, 16
# Of shared memory: what the kernel keeps beside a slice's keys, and the keys that a thread loads at once.
_SHARED = 30 * 1024
_LOAD = 16 * THREADS


class Shape(NamedTuple):
    """How rows are spread over blocks.

    Attributes:
        cluster: blocks of a cluster.
        solo_columns: the longest row that one block has to itself, where there are clusters.
        blocks: of the grid.
        resident: loads of a thread whose keys stay in shared memory.
    """

    cluster: int
    solo_columns: int
    blocks: int
    resident: int


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    """(multiprocessors, shared memory that a block may have so that two fit)."""
    found = torch.cuda.get_device_properties(device)
    optin: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    each = min(optin, found.shared_memory_per_multiprocessor // 2 - 1024)
    return found.multi_processor_count, each


@functools.lru_cache(4096)
def shape(device: int, rows: int, width: int) -> Shape:
    """The spread of ``rows`` rows of at most ``width`` columns, which are all that the host knows."""
    multiprocessors, memory = _limits(device)
    resident = (memory - _SHARED) // _LOAD
    solo = 8192 if rows <= 32 else 16384 if rows < 128 else 40960
    cluster = 8 if rows <= 16 else 4
    if width <= solo:
        return Shape(1, solo, min(rows, 2 * multiprocessors), 0 if width <= 8192 else resident)
    launch = nvrtc.Launch(cluster, THREADS, cluster, _SHARED + resident * _LOAD)
    most = TOPK.most_clusters(device, launch)
    return Shape(cluster, solo, min(rows, most) * cluster, resident)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pack_arguments(spread: Shape, call: SelectionCall) -> ctypes.Array[ctypes.c_char]:
    """The kernel's struct of a call."""
    logits, lengths, k, method, starts, space, out, local = call
    rows, width = logits.shape
    bases, requests, table = space.get("bases"), space.get("requests"), space.get("block_table")
    address, stride = logits.data_ptr(), logits.stride(0)
    flags = 0
    for tensor, flag in ((lengths, _LENGTHS64), (starts, _STARTS64), (bases, _BASES64), (requests, _REQUESTS64)):
        if tensor is not None and tensor.dtype is torch.int64:
            flags |= flag
    if starts is None and not (width | stride) % 4 and not address % 16:
        flags |= _ALIGNED
    page_size = space.get("page_size", 1)
    num_requests, table_width = (0, 0) if table is None else table.shape
    arguments = ctypes.create_string_buffer(_PARAMS.size)
    _PARAMS.pack_into(
        arguments, 0,
        address, _address(lengths), _address(starts), _address(bases), _address(requests), _address(table),
        out.data_ptr(), _address(local),
        stride, 0 if table is None else table.stride(0), out.stride(0), 0 if local is None else local.stride(0),
        rows, width, k, method.value, flags, spread.solo_columns, spread.resident,
        space.get("next_n", 1), num_requests, table_width, page_size,
        page_size.bit_length() - 1 if page_size & (page_size - 1) == 0 else -1, space.get("pages", 0),
    )  # fmt: skip
    return arguments


def topk_transform(call: SelectionCall) -> None:
    """One launch."""
    device = call.logits.get_device()
    spread = shape(device, *call.logits.shape)
    arguments = pack_arguments(spread, call)
    launch = nvrtc.Launch(spread.blocks, THREADS, spread.cluster, _SHARED + spread.resident * _LOAD)
    TOPK(device, launch, torch.cuda.current_stream(device).cuda_stream, arguments)


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
