"""Kernels as records: what each needs, why it refuses, and which one is chosen.

An op asks :func:`select` with a :class:`Problem`. Every kernel registered for the op answers
``not_supported_reasons``; among those with none, the one with the lowest predicted time runs. A kernel asked for by
name runs or raises: it never falls back. One that is ``by_name_only`` is never chosen by prediction.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core import conversions
from ..core.errors import BackendUnavailable, KernelNotSupported
from ..core.layouts import CacheSpec
from ..core.platform import platform
from ..core.vendor import VendorLibrary

# Triton reads it once too, when a kernel is defined.
_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"

KERNEL_NAMES = ("flash_mla", "deep_gemm", "gluon", "triton", "aiter", "flashinfer", "reference")


@dataclass(frozen=True)
class Problem:
    """One call of one op, as far as choosing its kernel goes.

    Attributes:
        op: the op's name, such as ``"sparse_mla_decode"``.
        device: ``"cuda"`` (also on ROCm torch) or ``"cpu"``.
        arch: ``"sm_90"``, ``"gfx942"``, ... or ``"cpu"``.
        tokens: query tokens, or rows for cache and index ops.
        heads: query heads on this rank; 0 where the op has none.
        head_dim: values per head.
        width: width of the (window) index rows.
        extra_width: width of the extra index rows; 0 without an extra cache.
        entries: entries a token reads on average, as far as prediction goes; 0 where it is the whole width.
        rows: workspace rows (``sparse_mla_prefill``).
        caches: the caches read or written, the window's first.
        lse: whether the attention ops have to return the lse.
        next_n: query rows a request (``paged_mqa_logits``).
        options: what else decides, as the op names it, such as ``"stable"``.
        split_k: the splits of each row's entries that the caller fixed; 0 where the kernel decides.
        interpreter: whether Triton runs in its interpreter (``TRITON_INTERPRET=1``).
        capturing: whether the current stream is being captured into a graph.
    """

    op: str
    device: str = "cuda"
    arch: str = ""
    tokens: int = 1
    heads: int = 0
    head_dim: int = 512
    width: int = 0
    extra_width: int = 0
    entries: int = 0
    rows: int = 0
    caches: tuple[CacheSpec, ...] = ()
    lse: bool = True
    next_n: int = 1
    options: tuple[str, ...] = ()
    split_k: int = 0
    interpreter: bool = _INTERPRETER
    capturing: bool = False

    @classmethod
    def on(cls, op: str, device: torch.device, **fields: Any) -> Problem:
        """A problem on ``device`` and its current stream."""
        if device.type != "cuda":
            return cls(op, device.type, "cpu", **fields)
        capturing = torch.cuda.is_current_stream_capturing()
        return cls(op, device.type, platform.limits(device).arch, capturing=capturing, **fields)

    @property
    def attention_flops(self) -> float:
        return 4.0 * self.tokens * self.heads * self.head_dim * (self.entries or self.width + self.extra_width)


HIDDEN_HOST_US = 30.0
"""Microseconds of an eager call's host time that are taken not to show, because the GPU is still at work from before:
on a layer's other kernels, or on the flush of ``triton.testing.do_bench``, which hides twice that on an H200."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of one op, with its declared limits.

    Attributes:
        op, name: what it computes and what it is called by.
        run: called with the op's checked arguments; of the attention ops with one call (``core.calls``).
        predicted_us: predicted microseconds of the GPU for a problem.
        library: the vendor library it needs, or None.
        devices: torch device types it accepts.
        archs: archs it runs on; empty for any.
        layouts: cache layouts it reads; empty for any.
        max_heads: most heads it takes; 0 where the op has none.
        capture_safe: may run inside CUDA / HIP graph capture.
        fixed_splits: whether ``run`` keeps to ``split_k``; a row's result then depends on nothing else in the batch.
        remaps: whether ``run`` takes a call's ``local`` and makes slots of the extra indices by itself.
        by_name_only: why it runs only when asked for by name, such as results less exact than the others'; empty where
            prediction may choose it.
        scratch_bytes: at most how many bytes an attention op's ``run`` allocates beside its results.
        host_us: predicted microseconds of the host for an eager call of the op; 0 where nothing was measured.
        further_reasons: limits the fields above cannot say.
        note: how it would run a problem, where that is a choice :func:`explain` should show; empty for none.
    """

    op: str
    name: str
    run: Callable[..., Any]
    predicted_us: Callable[[Problem], float]
    library: VendorLibrary | None = None
    devices: tuple[str, ...] = ("cuda",)
    archs: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    max_heads: int = 0
    capture_safe: bool = True
    fixed_splits: bool = False
    remaps: bool = False
    by_name_only: str = ""
    scratch_bytes: Callable[[Problem], int] = lambda problem: 0
    host_us: Callable[[Problem], float] = lambda problem: 0.0
    further_reasons: Callable[[Problem], Iterable[str]] = lambda problem: ()
    note: Callable[[Problem], str] = lambda problem: ""

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Every reason this kernel cannot run ``problem``, each naming what was seen and what is needed."""
        reasons = []
        if problem.device not in self.devices:
            reasons.append(f"device is {problem.device}, need {' or '.join(self.devices)}")
        elif self.archs and problem.arch not in self.archs:
            reasons.append(f"arch is {problem.arch}, need {' or '.join(self.archs)}")
        for cache in problem.caches:
            if self.layouts and cache.layout not in self.layouts:
                advice = conversions.advice(cache.layout, self.layouts)
                reasons.append(
                    f"cache layout is {cache.layout}, need {' or '.join(self.layouts)}{f': {advice}' if advice else ''}"
                )
        if self.max_heads and problem.heads > self.max_heads:
            reasons.append(f"{problem.heads} heads, need <= {self.max_heads}")
        if problem.capturing and not self.capture_safe:
            reasons.append("a graph is being captured, and it synchronizes with the host")
        if problem.split_k and not self.fixed_splits:
            reasons.append(f"split_k is {problem.split_k}, need None: it splits rows as the whole batch suggests")
        reasons.extend(self.further_reasons(problem))
        # Asked last: it may import the library, which the cheaper reasons can make pointless.
        if self.library is not None and not reasons and self.library.reason:
            reasons.append(self.library.reason)
        return reasons

    def call_us(self, problem: Problem) -> float:
        """What ranks the supported kernels: the GPU's time, or of an eager call what of the host's shows if longer."""
        us = self.predicted_us(problem)
        return us if problem.capturing else max(us, self.host_us(problem) - HIDDEN_HOST_US)

    def launch(self, device: torch.device, *args: Any, **kwargs: Any) -> Any:
        """Call ``run`` with ``device`` current."""
        return call_on(device, self.run, *args, **kwargs)


def call_on(device: torch.device, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``run`` with ``device`` current, which Triton and the vendor libraries expect and callers may forget."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(*args, **kwargs)
    return run(*args, **kwargs)


_kernels: dict[str, dict[str, Kernel]] = {}
_refused: dict[tuple[str, str], str] = {}


def register(kernel: Kernel) -> None:
    """Add a kernel to its op. A second one of the same op and name is a mistake."""
    table = _kernels.setdefault(kernel.op, {})
    if kernel.name in table:
        raise ValueError(f"kernel {kernel.name} of {kernel.op} is registered already")
    table[kernel.name] = kernel
    select.cache_clear()


def refuse(op: str, name: str, reason: str) -> None:
    """Say why the backend has no kernel of this name for ``op``, where that is worth more than its absence."""
    _refused[op, name] = reason


def kernels(op: str) -> list[Kernel]:
    """The kernels registered for ``op``, in order of registration."""
    if op not in _kernels:
        raise ValueError(f"op: got {op!r}, need one of {', '.join(sorted(_kernels))}")
    return list(_kernels[op].values())


def ops() -> list[str]:
    """The ops that have kernels."""
    return sorted(_kernels)


def find(op: str, name: str) -> Kernel | None:
    """The kernel of this name registered for ``op``, or None; :func:`absent` says why."""
    return _kernels[op].get(name)


def absent(op: str, name: str) -> str:
    """Why no kernel of this name is registered for ``op``."""
    if any(name in table for table in _kernels.values()):
        return _refused.get((op, name), f"it has no {op}")
    return _refused.get((op, name), f"not on backend {platform.backend} ({platform.reason})")


def refusals(problem: Problem, name: str) -> list[str]:
    """Every reason why the kernel of this name cannot run ``problem``, its absence included; empty when it can."""
    record = find(problem.op, name)
    return [absent(problem.op, name)] if record is None else record.not_supported_reasons(problem)


def candidates(problem: Problem) -> list[Kernel]:
    """The kernels that can run ``problem`` and that prediction may choose among."""
    return [k for k in kernels(problem.op) if not k.by_name_only and not k.not_supported_reasons(problem)]


@functools.lru_cache(maxsize=4096)
def select(problem: Problem, kernel: str | None = None) -> Kernel:
    """The kernel that runs ``problem``: the named one, or the supported one with the lowest predicted time.

    Unnamed, it is never one that is ``by_name_only``.

    Raises:
        ValueError: ``kernel`` is no kernel's name.
        KernelNotSupported: the named kernel (or every kernel) refuses; the message lists all reasons.
        BackendUnavailable: the named kernel's library cannot be used; the original exception is the cause.
    """
    if kernel is not None:
        if kernel not in KERNEL_NAMES:
            raise ValueError(f"kernel: got {kernel!r}, need one of {', '.join(KERNEL_NAMES)} or None")
        record = find(problem.op, kernel)
        reasons = refusals(problem, kernel)
        if record is not None and not reasons:
            return record
        if record is not None and record.library is not None and reasons == [record.library.reason]:
            try:
                record.library.load()
            except BackendUnavailable as error:
                raise BackendUnavailable(f"kernel={kernel!r} of {problem.op}: {error}") from error.__cause__
        raise KernelNotSupported(f"kernel={kernel!r} cannot run {problem.op}: {'; '.join(reasons)}", {kernel: reasons})
    explanation = explain(problem)
    if explanation.chosen is None:
        raise KernelNotSupported(f"no kernel can run this problem\n{explanation}", explanation.reasons)
    return _kernels[problem.op][explanation.chosen]


@dataclass(frozen=True)
class Explanation:
    """Which kernel runs a problem and why the others do not.

    Attributes:
        problem: what was asked.
        chosen: the kernel's name, or None when every one refuses.
        reasons: kernel name -> its reasons; empty for the supported.
        predicted_us: kernel name -> predicted microseconds, for the supported that prediction may choose.
        by_name_only: kernel name -> why it has to be asked for by name, for the supported that it may not choose.
        notes: kernel name -> how it would run the problem, for the supported that have a choice there.
    """

    problem: Problem
    chosen: str | None
    reasons: dict[str, list[str]]
    predicted_us: dict[str, float]
    by_name_only: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.problem.op} on {self.problem.arch or self.problem.device}"]
        for name, reasons in self.reasons.items():
            if reasons:
                state = "refused: " + "; ".join(reasons)
            elif name in self.by_name_only:
                state = f"only by name: {self.by_name_only[name]}"
            else:
                state = f"{'chosen' if name == self.chosen else 'slower'}, predicted {self.predicted_us[name]:.0f} us"
            if self.notes.get(name):
                state += f"; {self.notes[name]}"
            lines.append(f"  {name:<10} {state}")
        return "\n".join(lines)


def explain(problem: Problem) -> Explanation:
    """Every kernel of ``problem.op``: the one that would run, and why each of the others would not.

    Raises ValueError when the op has no kernels.
    """
    reasons = {k.name: k.not_supported_reasons(problem) for k in kernels(problem.op)}
    for name in KERNEL_NAMES:
        reasons.setdefault(name, [absent(problem.op, name)])
    supported = [k for k in kernels(problem.op) if not reasons[k.name]]
    predicted = {k.name: k.call_us(problem) for k in supported if not k.by_name_only}
    by_name = {k.name: k.by_name_only for k in supported if k.by_name_only}
    notes = {k.name: note for k in supported if (note := k.note(problem))}
    chosen = min(predicted, key=predicted.__getitem__, default=None)
    return Explanation(problem, chosen, reasons, predicted, by_name, notes)
