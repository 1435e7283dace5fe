"""``python -m dsv4x info | demo | layout``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import BackendUnavailable, KernelNotSupported, __version__, layouts, platform
from .common import drawing
from .common.core.model import MAX_HEADS
from .common.dispatch.registry import kernel_names
from .demo import report
from .demo import server as demo

_ABOUT = "What dsv4x finds on this machine, a checked demo, and its cache layouts drawn."


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


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argument's type: a whole number from ``low`` to ``high``."""
    need = f"need a whole number {f'from {low} to {high}' if high is not None else f'>= {low}'}"

    def parse(said: str) -> int:
        try:
            value = int(said)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {said!r}, {need}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"got {value}, {need}")
        return value

    return parse


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dsv4x", description=_ABOUT)
    parser.add_argument("--version", action="version", version=f"dsv4x {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="platform, vendor libraries, and each kernel with its reasons")
    info.add_argument("--json", action="store_true", help="as one JSON object, with every refusal")
    info.add_argument("--all", action="store_true", help="every refusal of every kernel, op by op")
    info.add_argument("--self-test", action="store_true", help="also run one checked step; exit 1 when it fails")
    show = commands.add_parser("demo", help="a DSv4-shaped layer over a text, served from paged caches and checked")
    show.add_argument("--text", type=Path, help="text whose bytes are the tokens (default: dsv4x's README)")
    show.add_argument(
        "--tokens", type=_whole(1), help="use at most this many tokens (default 4096 on a GPU, 768 on a CPU)"
    )
    show.add_argument("--heads", type=_whole(1, MAX_HEADS), help="query heads (default 64 on a GPU, 8 on a CPU)")
    show.add_argument("--topk", type=_whole(1), default=512, help="compressed entries a C4 query reads (default 512)")
    show.add_argument(
        "--kernel", choices=kernel_names(), help="run this attention kernel or fail (default: the chosen)"
    )
    draw = commands.add_parser("layout", help="the byte map of a cache layout's page, as a table and as an SVG")
    draw.add_argument("name", nargs="?", help="a layout, such as DSV4 or 'DSv3.2'; without one, their names")
    draw.add_argument("--page-size", type=int, default=64, help="entries a page (default 64)")
    draw.add_argument("--svg", type=Path, help="also draw it here")
    draw.add_argument("--docs", type=Path, help="write layouts.md and layouts/*.svg of every layout under this folder")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "layout":
            return show_layout(arguments, draw)
        if arguments.command == "demo":
            if platform.failure is not None:
                raise platform.failure
            return demo.main(arguments)
    except BrokenPipeError:
        raise
    except (BackendUnavailable, KernelNotSupported, OSError) as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 1
    facts = report.collect(arguments.self_test)
    print(json.dumps(facts, indent=2) if arguments.json else report.text(facts, arguments.all))
    return int(report.failed(facts))


def command() -> int:
    """:func:`main`, quiet where whoever reads its output has read enough."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(command())
