"""``python -m dsv4x info | demo | layout``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from . import BackendUnavailable, KernelNotSupported, Problem, __version__, cuda, layouts, platform, rocm
from .common import drawing
from .common.core.vendor import TRITON
from .common.dispatch.problem import fields_of
from .common.dispatch.registry import explain, kernel_names, ops
from .common.step.attention import PATHS
from .demo import server as demo
from .demo.layer import Layer


def collect(self_test: bool) -> dict[str, Any]:
    """Everything ``info`` shows, each probe guarded so that one failure hides no other."""
    facts: dict[str, Any] = {
        "dsv4x": __version__,
        "torch": torch.__version__,
        "backend": platform.backend,
        "reason": platform.reason,
        "vendor": platform.vendor,
    }
    device = torch.device("cpu" if platform.backend == "reference" else "cuda")
    try:
        limits = platform.limits()
        facts["device"] = vars(limits)
        arch = limits.arch
    except Exception as error:
        facts["device"] = {"error": f"{type(error).__name__}: {error}"}
        arch = ""
    facts["libraries"] = [library.describe() for library in (TRITON, *cuda.LIBRARIES, *rocm.LIBRARIES)]
    facts["kernels"] = {}
    for op in ops():
        sizes = {"heads": 64, "width": 128, "extra_width": 512, "rows": 65536}
        fields = {name: sizes[name] for name in fields_of(op) if name in sizes}
        problem = Problem(op, device.type, arch, tokens=128, **fields)
        explanation = explain(problem)
        facts["kernels"][op] = {
            name: {
                "reasons": explanation.reasons[name],
                "by_name_only": explanation.by_name_only.get(name),
                "chosen": name == explanation.chosen,
            }
            for name in kernel_names()
        }
    if self_test:
        facts["self_test"] = run_self_test(device)
    return facts


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


def print_info(facts: dict[str, Any]) -> None:
    print(f"dsv4x {facts['dsv4x']}, torch {facts['torch']}")
    print(f"backend {facts['backend']}: {facts['reason']}")
    print("device  " + ", ".join(f"{key} {value}" for key, value in facts["device"].items()))
    print("\nlibraries")
    for library in facts["libraries"]:
        found = f"{library['distribution'] or '-'} {library['version'] or ''}".strip()
        print(f"  {library['module']:<10} {found:<28} {library['reason'] or 'usable'}")
        if library["path"]:
            print(f"  {'':<10} {library['path']}")
    print("\nkernels (128 tokens, 64 heads)")
    for op, table in facts["kernels"].items():
        print(f"  {op}")
        for name, state in table.items():
            verdict = "chosen" if state["chosen"] else "; ".join(state["reasons"]) or "supported"
            if state["by_name_only"]:
                verdict = f"only by name: {state['by_name_only']}"
            print(f"    {name:<10} {verdict}")
    if "self_test" in facts:
        print(f"\nself test: {'passed' if facts['self_test']['passed'] else 'FAILED'} {facts['self_test']}")


def show_layout(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print one layout's byte map, draw it, or write the documentation of all."""
    if arguments.page_size < 1:
        parser.error(f"--page-size: got {arguments.page_size}, need > 0")
    if arguments.svg is not None and arguments.name is None:
        parser.error("--svg: given without a layout, need its name")
    if arguments.docs is not None:
        (arguments.docs / "layouts").mkdir(parents=True, exist_ok=True)
        (arguments.docs / "layouts.md").write_text(drawing.document(arguments.page_size))
        for member in layouts.MLAKVCacheLayout:
            picture = arguments.docs / "layouts" / f"{member.name.lower()}.svg"
            picture.write_text(drawing.svg(member.value, arguments.page_size))
        return 0
    if arguments.name is None:
        for member in layouts.MLAKVCacheLayout:
            print(f"{member.name:<15} {member.value.name}")
        return 0
    try:
        layout = layouts.by_name(arguments.name)
    except ValueError as error:
        parser.error(str(error))
    print(drawing.table(layout, arguments.page_size))
    if arguments.svg is not None:
        arguments.svg.write_text(drawing.svg(layout, arguments.page_size))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dsv4x", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="platform, vendor libraries, and each kernel with its reasons")
    info.add_argument("--json", action="store_true", help="as one JSON object")
    info.add_argument("--self-test", action="store_true", help="also run one checked step; exit 1 when it fails")
    show = commands.add_parser("demo", help="a DSv4-shaped layer over a text, served from paged caches and checked")
    show.add_argument("--text", type=Path, help="text whose bytes are the tokens (default: dsv4x's README)")
    show.add_argument("--tokens", type=int, help="use at most this many tokens (default 4096 on a GPU, 768 on a CPU)")
    show.add_argument("--heads", type=int, help="query heads (default 64 on a GPU, 8 on a CPU)")
    show.add_argument("--topk", type=int, default=512, help="compressed entries a C4 query reads (default 512)")
    show.add_argument(
        "--kernel", choices=kernel_names(), help="run this attention kernel or fail (default: the chosen)"
    )
    draw = commands.add_parser("layout", help="the byte map of a cache layout's page, as a table and as an SVG")
    draw.add_argument("name", nargs="?", help="a layout, such as DSV4 or 'DSv3.2'; without one, their names")
    draw.add_argument("--page-size", type=int, default=64, help="entries a page (default 64)")
    draw.add_argument("--svg", type=Path, help="also draw it here")
    draw.add_argument("--docs", type=Path, help="write layouts.md and layouts/*.svg of every layout under this folder")
    arguments = parser.parse_args(argv)
    if arguments.command == "demo":
        try:
            return demo.main(arguments)
        except (BackendUnavailable, KernelNotSupported, OSError) as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
    if arguments.command == "layout":
        return show_layout(arguments, draw)
    facts = collect(arguments.self_test)
    print(json.dumps(facts, indent=2)) if arguments.json else print_info(facts)
    return int(not facts.get("self_test", {"passed": True})["passed"])


if __name__ == "__main__":
    sys.exit(main())
