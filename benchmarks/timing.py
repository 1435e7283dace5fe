"""Times of calls on a machine that is not ours alone, in microseconds, and results with where they come from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import triton

import dsv4x

_VENDORS = ("sgl-flash-mla", "sgl-deep-gemm", "flashinfer-python")

Run = Callable[[], object]


def median_us(run: Run, warmup: int = 10, rep: int = 40) -> float:
    """The median of ``triton.testing.do_bench``: eager calls, L2 flushed before each."""
    return 1e3 * triton.testing.do_bench(run, warmup=warmup, rep=rep, return_mode="median")


def compare_us(runs: dict[str, Run], rounds: int = 4, warmup: int = 3, rep: int = 12) -> dict[str, float]:
    """The best of ``rounds`` medians of each.

    All take turns at every place, forwards and backwards: a busy host slows eager calls by bursts, as does a compiler,
    and a long kernel lowers the clock of the next by several percent.
    """
    names = list(runs)
    for run in runs.values():
        run()
    torch.cuda.synchronize()
    best = dict.fromkeys(names, float("inf"))
    for turn in range(rounds):
        at = turn * len(names) // rounds
        order = names[at:] + names[:at]
        for name in reversed(order) if turn % 2 else order:
            best[name] = min(best[name], median_us(runs[name], warmup, rep))
    return best


def origin() -> dict[str, str]:
    """The machine, the versions and the command of a result."""
    found = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    found |= {"torch": torch.__version__, "triton": triton.__version__, "dsv4x": dsv4x.__version__}
    for name in _VENDORS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    script = Path(sys.argv[0])
    return found | {"command": " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])}


def write(out: Path | None, indent: int | None = 1, **result: object) -> None:
    """Write a result with its origin as JSON; nothing without ``out``."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(origin() | result, indent=indent) + "\n")


def device_us(run: Run, warmup: int = 5, rep: int = 20) -> float:
    """The median of what ``run`` takes on the GPU: replayed from a graph, so that no launch waits for the host."""
    return median_us(captured(run), warmup, rep)


def captured(run: Run) -> Run:
    """``run`` as a graph's replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        graph.replay()

    # The graph holds addresses and no tensors: what it reads lives as long as it does.
    replay.keeps = run
    return replay
