"""What ``python -m dsv4x info`` finds out and shows: the platform, its libraries, and each kernel with its reasons."""

from __future__ import annotations

import contextlib
import functools
import os
import platform as machine
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch

from .. import Problem, __version__, cuda, platform, rocm
from ..common.core import checks
from ..common.core.vendor import TRITON
from ..common.dispatch.problem import fields_of
from ..common.dispatch.registry import explain, kernel_names, ops
from ..common.step.attention import PATHS
from . import server as demo
from .layer import Layer

SCHEMA = 1
"""Raised whenever a key of the JSON changes its meaning or goes."""

SCREEN = 40
"""Most lines shown unless all are asked for."""

_SETTINGS = ("DSV4X_BACKEND", "DSV4X_CHECK", "DSV4X_PROFILE", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")


def collect(self_test: bool) -> dict[str, Any]:
    """Everything ``info`` shows. Each probe is guarded, so that one failure hides no other.

    What a library prints while it is imported goes to stderr: stdout may be read as JSON.
    """
    with contextlib.redirect_stdout(sys.stderr):
        return _collect(self_test)


def _collect(self_test: bool) -> dict[str, Any]:
    device = torch.device("cpu" if platform.backend == "reference" else "cuda")
    limits = _guarded(lambda: vars(platform.limits()))
    libraries = (TRITON, *cuda.LIBRARIES, *rocm.LIBRARIES)
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "dsv4x": __version__,
        "torch": torch.__version__,
        "python": machine.python_version(),
        "system": machine.platform(),
        "backend": platform.backend,
        "reason": platform.reason,
        "vendor": platform.vendor,
        "problems": _problems(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "device": limits,
        "libraries": [{"module": library.module, **_guarded(library.describe)} for library in libraries],
        "kernels": {op: _guarded(functools.partial(_kernels, op, device, limits.get("arch", ""))) for op in ops()},
    }
    if self_test:
        facts["self_test"] = run_self_test(device)
    return facts


def _guarded(probe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``probe`` finds, or ``{"error": ...}``: a broken wheel may raise anything, and may even exit."""
    try:
        return probe()
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _problems() -> list[str]:
    """What is set so that dsv4x does not work."""
    found = [] if platform.failure is None else [f"{platform.failure}; import dsv4x fails"]
    try:
        checks.check_values_enabled()
    except ValueError as error:
        found.append(f"{error}; every op fails")
    return found


def _kernels(op: str, device: torch.device, arch: str) -> dict[str, Any]:
    """Kernel name -> its reasons for a problem of 128 tokens and 64 heads, and whether it is chosen."""
    sizes = {"heads": 64, "width": 128, "extra_width": 512, "rows": 65536}
    fields = {name: sizes[name] for name in fields_of(op) if name in sizes}
    explanation = explain(Problem(op, device.type, arch, tokens=128, **fields))
    return {
        name: {
            "reasons": explanation.reasons[name],
            "by_name_only": explanation.by_name_only.get(name),
            "chosen": name == explanation.chosen,
        }
        for name in kernel_names()
    }


def run_self_test(device: torch.device) -> dict[str, Any]:
    """One small C4 layer through every path, against the dense oracle."""
    try:
        layer = Layer(4, 8, topk=64, device=device)
        sequences = [layer.sequence(demo.tokens_of("dsv4x self test ", n, device)) for n in (200, 40)]
        outcomes = {path: demo.serve_and_check(layer, sequences, path=path) for path in PATHS}
    except Exception as error:
        return {"passed": False, "error": f"{type(error).__name__}: {error}"}
    return {
        "passed": all(outcome.passed for outcome in outcomes.values()),
        "relative_error": {path: outcome.error for path, outcome in outcomes.items()},
    }


def failed(facts: dict[str, Any]) -> bool:
    """Whether the machine, as it is set up, cannot run dsv4x."""
    return bool(facts["problems"]) or not facts.get("self_test", {"passed": True})["passed"]


def text(facts: dict[str, Any], everything: bool) -> str:
    """The report: of at most :data:`SCREEN` lines, or with every refusal of every kernel of every op."""
    asked = "" if platform.failure is None else "without DSV4X_BACKEND "
    head = [
        f"dsv4x {facts['dsv4x']}, torch {facts['torch']}, Python {facts['python']}, {facts['system']}",
        *(f"PROBLEM {problem}" for problem in facts["problems"]),
        f"backend {asked}{facts['backend']}: {facts['reason']}",
        "device  " + ", ".join(f"{key} {value}" for key, value in facts["device"].items()),
    ]
    if facts["settings"]:
        head.append("set     " + ", ".join(f"{name}={value}" for name, value in facts["settings"].items()))
    head += ["", "libraries", *_library_lines(facts["libraries"], everything)]
    tail = _self_test_lines(facts["self_test"]) if "self_test" in facts else []
    if everything:
        return "\n".join([*head, *_every_kernel(facts["kernels"]), *tail])
    body = _kernel_lines(facts["kernels"])
    room = SCREEN - len(head) - len(tail)
    if len(body) > room:
        body = [*body[: room - 1], f"  ... {len(body) - room + 1} lines more; --all shows every refusal"]
    return "\n".join([*head, *body, *tail])


def _library_lines(libraries: list[dict[str, Any]], everything: bool) -> list[str]:
    lines = []
    for library in libraries:
        found = f"{library.get('distribution') or '-'} {library.get('version') or ''}".strip()
        trouble = library.get("error") or library.get("reason")
        lines.append(f"  {library['module']:<10} {found:<28} {trouble or 'usable'}")
        # Where a wheel stands is worth a line when it is broken.
        if library.get("path") and (everything or trouble):
            lines.append(f"  {'':<10} {library['path']}")
    return lines


def _verdict(state: dict[str, Any]) -> str:
    if state["by_name_only"]:
        return f"only by name: {state['by_name_only']}"
    return "chosen" if state["chosen"] else "; ".join(state["reasons"]) or "supported"


def _every_kernel(kernels: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["", "kernels (128 tokens, 64 heads)"]
    for op, table in kernels.items():
        lines.append(f"  {op}")
        if "error" in table:
            lines.append(f"    {table['error']}")
            continue
        lines += [f"    {name:<10} {_verdict(state)}" for name, state in table.items()]
    return lines


def _kernel_lines(kernels: dict[str, dict[str, Any]]) -> list[str]:
    """The ops by the kernel that is chosen for them, then what was refused, one line a kernel and reason."""
    chosen: dict[str, list[str]] = {}
    others: dict[tuple[str, str], list[str]] = {}
    for op, table in kernels.items():
        if "error" in table:
            others.setdefault(("error", table["error"]), []).append(op)
            continue
        for name, state in table.items():
            if state["chosen"]:
                chosen.setdefault(name, []).append(op)
            elif state["reasons"] != [f"it has no {op}"]:
                others.setdefault((name, _verdict(state)), []).append(op)
    lines = ["", "chosen (128 tokens, 64 heads)"]
    for name, found in chosen.items():
        lines += textwrap.wrap(
            ", ".join(found), 116, initial_indent=f"  {name:<10} ", subsequent_indent=" " * 13, break_on_hyphens=False
        )
    lines += ["", "not chosen"]
    for (name, verdict), found in others.items():
        lines.append(f"  {name:<10} {verdict} ({', '.join(found) if len(found) < 3 else f'{len(found)} ops'})")
    return lines


def _self_test_lines(result: dict[str, Any]) -> list[str]:
    if "error" in result:
        return ["", f"self test: FAILED, {result['error']}"]
    errors = ", ".join(f"{path} {error:.1e}" for path, error in result["relative_error"].items())
    return ["", f"self test: {'passed' if result['passed'] else 'FAILED'}, relative errors: {errors}"]
