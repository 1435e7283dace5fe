"""Keeping torch's ambient modes from what is computed: autocast, grad mode, inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Run = TypeVar("Run", bound=Callable[..., Any])


def without_autocast(run: Run) -> Run:
    """``run`` with autocast off for the device of its first argument, a tensor: products keep their own dtype."""

    @functools.wraps(run)
    def call(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return run(first, *args, **kwargs)

    return call  # type: ignore[return-value]


def without_grad(run: Run) -> Run:
    """``run`` outside autograd, as kernels are: a sink that is a parameter gives results without a graph."""

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return run(*args, **kwargs)

    return call  # type: ignore[return-value]


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that torch lets be written in any mode.

    One made under ``torch.inference_mode`` may not be written outside it, and torch says so with the first write that
    it notices, which need not be the first.
    """
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
