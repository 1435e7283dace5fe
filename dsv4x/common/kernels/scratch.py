"""What kernels allocate beside their results: bounds of it, and where it goes. Imports no triton."""

from __future__ import annotations

import math

import torch

from ..core.calls import DecodeCall
from ..core.model import VALUE_DIM
from ..core.platform import platform

_BLOCK = 512
"""Bytes that torch's allocators round up to."""

_MOST_MULTIPROCESSORS = 304
"""An MI300X's, for archs that are not here to be asked."""


def tensor_bytes(elements: int, size: int) -> int:
    """Bytes that a tensor takes of the allocator."""
    return -(-elements * size // _BLOCK) * _BLOCK


def partial_bytes(tokens: int, heads: int, splits: int) -> int:
    """Bytes of the partial outputs and lses of ``splits`` splits a row; a row that is not split has none."""
    rows = tokens * heads * splits if splits > 1 else 0
    return tensor_bytes(rows * VALUE_DIM, 4) + tensor_bytes(rows, 4)


def multiprocessors(device: str, arch: str) -> int:
    """Of the current device where it is of this arch, else the most that any has."""
    limits = platform.limits("cpu" if device == "cpu" else None)
    return limits.multiprocessors if arch in (limits.arch, "") else _MOST_MULTIPROCESSORS


def partials(call: DecodeCall, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 ``[T, heads, splits, 512]`` and ``[T, heads, splits]``, of the call's workspace where it has one.

    Raises ValueError where the workspace is too small for them.
    """
    shape = (call.q.shape[0], call.heads, splits)
    if call.workspace is None:
        values = torch.empty(*shape, VALUE_DIM, dtype=torch.float32, device=call.q.device)
        return values, torch.empty(shape, dtype=torch.float32, device=call.q.device)
    need, seen = partial_bytes(*shape), call.workspace.shape[0]
    if seen < need:
        raise ValueError(f"workspace: {seen} bytes, need >= {need} for {splits} splits of {shape[0]} tokens")
    rows = math.prod(shape)
    end = 4 * rows * VALUE_DIM
    values = call.workspace[:end].view(torch.float32).view(*shape, VALUE_DIM)
    return values, call.workspace[end : end + 4 * rows].view(torch.float32).view(shape)
