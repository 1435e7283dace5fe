"""Kernels as records: what each needs, why it refuses, and which one is chosen.

An op asks :func:`select` with a :class:`~dsv4x.common.dispatch.problem.Problem`. Every kernel registered for the op
answers ``not_supported_reasons``; among those with none, the one with the lowest predicted time runs. A kernel asked
for by name runs or raises: it never falls back. One that is ``by_name_only`` is never chosen by prediction.

Kernels of other packages: a function without arguments in the entry point group ``dsv4x.kernels``, called before the
first choice, calls :func:`register`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch

from ..core import conversions
from ..core.errors import BackendUnavailable, KernelNotSupported
from ..core.platform import platform
from ..core.vendor import VendorLibrary
from . import trace
from .problem import AttentionProblem, CacheProblem, Problem

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

ENTRY_POINTS = "dsv4x.kernels"
"""The entry point group of kernels in other packages."""

HIDDEN_HOST_US = 30.0
"""Microseconds of an eager call's host time that are assumed to hide behind work the GPU already has queued.

That work is a layer's other kernels. An assumption, not a measurement: in benchmarks the cache flush of
``triton.testing.do_bench`` hides twice as much on an H200.
"""


@dataclass(frozen=True)
class Kernel:
    """One kernel of one op, with its declared limits.

    Attributes:
        op, name: what it computes and what it is called by; identifiers.
        run: called with the op's checked arguments; of the attention ops with one call (``core.calls``).
        predicted_us: predicted microseconds of the GPU for a problem of the op's family, as the other functions are.
        library: the vendor library it needs, or None.
        devices: torch device types it accepts.
        archs: archs it runs on; empty for any.
        layouts: cache layouts it reads; empty for any.
        max_heads: most heads it takes; 0 where the op has none.
        capture_safe: may run inside CUDA / HIP graph capture.
        fixed_splits: whether ``run`` keeps to ``split_k``; a row's result then depends on nothing else in the batch.
        remaps: whether ``run`` takes a call's ``local`` and makes slots of the extra indices by itself.
        prepare: gives ``run`` for calls that look like the one it is given: same shapes, strides, dtypes, device,
            scales and caches' specs. It spares a step's further layers the host's work; None where there is nothing to
            spare.
        plan: makes what the calls of a step share, called with ``(rows, earlier)``: the rows' record, and an
            earlier result of the same shapes to fill again, or None. The calls get it as their ``plan``. None where
            they share nothing.
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
    predicted_us: Callable[[Any], float]
    library: VendorLibrary | None = None
    devices: tuple[str, ...] = ("cuda",)
    archs: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    max_heads: int = 0
    capture_safe: bool = True
    fixed_splits: bool = False
    remaps: bool = False
    by_name_only: str = ""
    prepare: Callable[[Any], Callable[[Any], Any]] | None = None
    plan: Callable[[Any, Any], Any] | None = None
    scratch_bytes: Callable[[Any], int] = lambda problem: 0
    host_us: Callable[[Any], float] = lambda problem: 0.0
    further_reasons: Callable[[Any], Iterable[str]] = lambda problem: ()
    note: Callable[[Any], str] = lambda problem: ""

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Every reason this kernel cannot run ``problem``, each naming what was seen and what is needed."""
        reasons = []
        if problem.device not in self.devices:
            reasons.append(f"device is {problem.device}, need {' or '.join(self.devices)}")
        elif self.archs and problem.arch not in self.archs:
            reasons.append(f"arch is {problem.arch}, need {' or '.join(self.archs)}")
        if isinstance(problem, CacheProblem):
            reasons += self._layout_reasons(problem)
        if isinstance(problem, AttentionProblem) and self.max_heads and problem.heads > self.max_heads:
            reasons.append(f"{problem.heads} heads, need <= {self.max_heads}")
        if problem.capturing and not self.capture_safe:
            reasons.append("a graph is being captured, and it synchronizes with the host")
        if isinstance(problem, AttentionProblem):
            if problem.split_k and not self.fixed_splits:
                reasons.append(f"split_k is {problem.split_k}, need None: it splits rows as the whole batch suggests")
            if problem.local and not self.remaps:
                reasons.append("extra indices are local entries, need slots: it does not remap them")
        reasons.extend(self.further_reasons(problem))
        # Asked last: it may import the library, which the cheaper reasons can make pointless.
        if self.library is not None and not reasons and self.library.reason:
            reasons.append(self.library.reason)
        return reasons

    def _layout_reasons(self, problem: CacheProblem) -> list[str]:
        reasons = []
        for cache in problem.caches:
            if self.layouts and cache.layout not in self.layouts:
                advice = conversions.advice(cache.layout, self.layouts)
                reasons.append(
                    f"cache layout is {cache.layout}, need {' or '.join(self.layouts)}{f': {advice}' if advice else ''}"
                )
        return reasons

    def call_us(self, problem: Problem) -> float:
        """What ranks the supported kernels.

        In a captured graph that is the GPU's time: a replay runs no host code. In an eager call it is the larger of the
        GPU's time and the host's time less ``HIDDEN_HOST_US``. A kernel without a measured host time counts with its
        GPU's alone.
        """
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
# An op of None stands for every op.
_refused: dict[tuple[str | None, str], str] = {}
_caches: list[Callable[[], None]] = []
# Groups whose entry points are not loaded yet.
_unloaded = [ENTRY_POINTS]


def cached(maxsize: int) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """``functools.lru_cache`` for what follows from the registered kernels: emptied whenever they change."""

    def wrap(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        remembering = functools.lru_cache(maxsize)(function)
        _caches.append(remembering.cache_clear)
        return remembering  # type: ignore[return-value]

    return wrap


def clear_caches() -> None:
    """Forget every choice. Needed where something else than the registered kernels has changed, such as a library."""
    for clear in _caches:
        clear()


def register(kernel: Kernel) -> None:
    """Add a kernel to its op, which may be one that dsv4x does not have.

    Raises:
        TypeError, ValueError: not a :class:`Kernel`, or a field's type or value; its op has a kernel of this name.
    """
    _check(kernel)
    table = _kernels.setdefault(kernel.op, {})
    if kernel.name in table:
        raise ValueError(f"kernel {kernel.name} of {kernel.op} is registered already")
    run = trace.ranged(f"{kernel.op}/{kernel.name}", kernel.run)
    table[kernel.name] = kernel if run is kernel.run else dataclasses.replace(kernel, run=run)
    clear_caches()


def _check(kernel: Kernel) -> None:
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel: got {type(kernel).__name__}, need a Kernel")
    for name in ("op", "name"):
        value = getattr(kernel, name)
        if not isinstance(value, str):
            raise TypeError(f"{name}: got {type(value).__name__}, need a str")
        if not value.isidentifier():
            raise ValueError(f"{name}: got {value!r}, need an identifier")
    where = f"of kernel {kernel.name} of {kernel.op}"
    for name in ("run", "predicted_us", "host_us", "further_reasons", "note"):
        if not callable(getattr(kernel, name)):
            raise TypeError(f"{name} {where}: got {type(getattr(kernel, name)).__name__}, need a callable")
    for name in ("devices", "archs", "layouts"):
        value = getattr(kernel, name)
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            raise TypeError(f"{name} {where}: got {value!r}, need a tuple of str")
    for name in ("capture_safe", "fixed_splits", "remaps"):
        if not isinstance(getattr(kernel, name), bool):
            raise TypeError(f"{name} {where}: got {type(getattr(kernel, name)).__name__}, need a bool")
    if not isinstance(kernel.max_heads, int) or kernel.max_heads < 0:
        raise ValueError(f"max_heads {where}: got {kernel.max_heads!r}, need an int >= 0")
    if not isinstance(kernel.by_name_only, str):
        raise TypeError(f"by_name_only {where}: got {type(kernel.by_name_only).__name__}, need a str, the reason")


def refuse(op: str | None, name: str, reason: str | None = None) -> None:
    """Say why there is no kernel of this name for ``op``, or with None for any; its name is then known.

    ``reason`` None says that the backend has none.
    """
    _refused[op, name] = reason or f"not on backend {platform.backend} ({platform.reason})"
    clear_caches()


@contextlib.contextmanager
def replaced(
    *records: Kernel, without: Iterable[tuple[str, str]] = (), empty: Iterable[str] | bool = False
) -> Iterator[None]:
    """Other kernels while the context lasts, for tests and benchmarks.

    Whatever is registered or refused inside is undone at its end, and choices are forgotten at both ends.

    Args:
        records: take the place of the kernels of their op and name, or are added.
        without: ``(op, name)`` of kernels to take out.
        empty: ops to leave without kernels but for ``records``; True for all ops, which also takes all refusals out.
    """
    load_entry_points()
    kept, refused = {op: dict(table) for op, table in _kernels.items()}, dict(_refused)
    try:
        if empty is True:
            _kernels.clear()
            _refused.clear()
        for op in () if isinstance(empty, bool) else empty:
            _kernels[op].clear()
        for op, name in (*without, *((r.op, r.name) for r in records if r.name in _kernels.get(r.op, {}))):
            del _kernels[op][name]
        clear_caches()
        for record in records:
            register(record)
        yield
    finally:
        _kernels.clear()
        _kernels.update(kept)
        _refused.clear()
        _refused.update(refused)
        clear_caches()


def load_entry_points() -> None:
    """Let the packages of group ``dsv4x.kernels`` register their kernels; only the first call does anything.

    One that fails is refused for every op under its entry point's name, with what it raised as the reason.
    """
    while _unloaded:
        # Taken out first, because what is loaded may ask the registry.
        for point in importlib.metadata.entry_points(group=_unloaded.pop()):
            try:
                point.load()()
            except Exception as error:  # another package may fail in any way; the reason is kept and shown
                refuse(None, point.name, f"entry point {point.value} failed: {type(error).__name__}: {error}")


def kernels(op: str) -> list[Kernel]:
    """The kernels registered for ``op``, in order of registration."""
    load_entry_points()
    if op not in _kernels:
        raise ValueError(f"op: got {op!r}, need one of {', '.join(sorted(_kernels))}")
    return list(_kernels[op].values())


def ops() -> list[str]:
    """The ops that have kernels."""
    load_entry_points()
    return sorted(_kernels)


def kernel_names() -> tuple[str, ...]:
    """Every name that a kernel may be asked for by: registered for some op, or refused with a reason."""
    load_entry_points()
    registered = (name for table in _kernels.values() for name in table)
    return tuple(dict.fromkeys((*registered, *(name for _, name in _refused))))


def find(op: str, name: str) -> Kernel | None:
    """The kernel of this name registered for ``op``, or None; :func:`absent` says why."""
    load_entry_points()
    return _kernels.get(op, {}).get(name)


def absent(op: str, name: str) -> str:
    """Why no kernel of this name is registered for ``op``."""
    if (op, name) in _refused:
        return _refused[op, name]
    if any(name in table for table in _kernels.values()):
        return f"it has no {op}"
    return _refused.get((None, name)) or f"it has no {op}"


def refusals(problem: Problem, name: str) -> list[str]:
    """Every reason why the kernel of this name cannot run ``problem``, its absence included; empty when it can."""
    record = find(problem.op, name)
    return [absent(problem.op, name)] if record is None else record.not_supported_reasons(problem)


def candidates(problem: Problem) -> list[Kernel]:
    """The kernels that can run ``problem`` and that prediction may choose among."""
    return [k for k in kernels(problem.op) if not k.by_name_only and not k.not_supported_reasons(problem)]


def select(problem: Problem, kernel: str | None = None) -> Kernel:
    """The kernel that runs ``problem``: the named one, or the supported one with the lowest predicted time.

    Unnamed, it is never one that is ``by_name_only``. A kernel's first choice for an op is logged, with its reason.

    Raises:
        TypeError, ValueError: ``kernel`` is no kernel's name.
        KernelNotSupported: the named kernel (or every kernel) refuses; the message lists all reasons.
        BackendUnavailable: the named kernel's library cannot be used; the original exception is the cause.
    """
    if kernel is not None and not isinstance(kernel, str):
        raise TypeError(f"kernel: got {type(kernel).__name__}, need a kernel's name or None")
    return _select(problem, kernel)


@cached(4096)
def _select(problem: Problem, kernel: str | None) -> Kernel:
    if kernel is not None:
        record, why = _named(problem, kernel), "asked for by name"
    else:
        explanation = explain(problem)
        if explanation.chosen is None:
            raise KernelNotSupported(f"no kernel can run this problem\n{explanation}", explanation.reasons)
        record, why = _kernels[problem.op][explanation.chosen], explanation.why
    where = f"{problem.op} on {problem.arch or problem.device}{' in a graph' if problem.capturing else ''}"
    trace.logged((problem.op, record.name, problem.capturing, problem.arch), f"{where}: {record.name}, {why}")
    return record


def _named(problem: Problem, kernel: str) -> Kernel:
    if kernel not in kernel_names():
        raise ValueError(f"kernel: got {kernel!r}, need one of {', '.join(kernel_names())} or None")
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

    @property
    def why(self) -> str:
        """Why the chosen kernel is, in one phrase."""
        if self.chosen is None:
            return "every kernel refuses"
        others = [f"{name} {us:.0f} us" for name, us in self.predicted_us.items() if name != self.chosen]
        if not others:
            return "the only kernel to choose from"
        return f"predicted {self.predicted_us[self.chosen]:.0f} us ({', '.join(others)})"

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


def explain(problem: Problem, capturing: bool | None = None) -> Explanation:
    """Every kernel of ``problem.op``: the one that would run, and why each of the others would not.

    Args:
        problem: such as ``dsv4x.Problem("sparse_mla_decode", "cuda", "sm_90", tokens=64, heads=64, width=128)``.
        capturing: whether to ask for a call inside a captured graph; None asks as the problem says.

    Raises:
        TypeError: ``problem`` is no problem.
        ValueError: the op has no kernels.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem: got {type(problem).__name__}, need a dsv4x.Problem")
    if capturing is not None:
        problem = dataclasses.replace(problem, capturing=capturing)
    reasons = {k.name: k.not_supported_reasons(problem) for k in kernels(problem.op)}
    for name in kernel_names():
        reasons.setdefault(name, [absent(problem.op, name)])
    supported = [k for k in kernels(problem.op) if not reasons[k.name]]
    predicted = {k.name: k.call_us(problem) for k in supported if not k.by_name_only}
    by_name = {k.name: k.by_name_only for k in supported if k.by_name_only}
    notes = {k.name: note for k in supported if (note := k.note(problem))}
    chosen = min(predicted, key=predicted.__getitem__, default=None)
    return Explanation(problem, chosen, reasons, predicted, by_name, notes)
