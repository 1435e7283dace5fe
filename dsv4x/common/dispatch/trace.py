"""What a server can see of dsv4x at work: choices in its log, and named ranges in torch's profiler.

Choices go to ``logging.getLogger("dsv4x")`` at INFO. ``DSV4X_PROFILE=1``, read once, names each kernel's calls
``dsv4x::<op>/<kernel>`` for torch.profiler; without it nothing is wrapped.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Hashable
from typing import Any

import torch

logger = logging.getLogger("dsv4x")
# A library's log is silent, without Python's warning of a missing handler, until its user configures logging.
logger.addHandler(logging.NullHandler())

PROFILING = os.environ.get("DSV4X_PROFILE", "") not in ("", "0")
"""Whether ranges are recorded. A test that sets it registers its kernels afterwards."""

_logged: set[Hashable] = set()
_NO_RANGE = contextlib.nullcontext()


def logged(key: Hashable, message: str) -> None:
    """Log ``message`` at INFO, once a key. Nothing is remembered while INFO is off."""
    if key not in _logged and logger.isEnabledFor(logging.INFO):
        _logged.add(key)
        logger.info(message)


def forget() -> None:
    """Let every key be logged again."""
    _logged.clear()


def range(name: str) -> contextlib.AbstractContextManager[Any]:
    """A profiler range ``dsv4x::<name>``, or nothing where ranges are not recorded."""
    return torch.profiler.record_function(f"dsv4x::{name}") if PROFILING else _NO_RANGE


def ranged(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` inside :func:`range`; ``run`` itself where ranges are not recorded, so that they cost nothing."""
    if not PROFILING:
        return run

    @functools.wraps(run)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with range(name):
            return run(*args, **kwargs)

    return inside
