"""Selection in captured graphs, dsv4x beside SGLang 0.5.23's v2 kernel with its plan made once, on one GPU in one run.

Every row has as many entries as its point says; the buffer is as wide as the entries, or as the longest context of a
model, 262 144. Both select slots of pages of 64. A graph holds ``CALLS`` calls, each over logits of its own where they
fit; a kernel's number is the median over replays of a call's share, in microseconds. All launch as programmatic
dependents of the call in front, so that the starts of such calls overlap, whichever kernel it is. Results are compared
with the reference as sets before anything is timed, and dsv4x's bit by bit.

``shared/peers/prepare.py`` lays SGLang's kernels out; they compile with nvcc on first use.

Usage: PYTHONPATH=. python benchmarks/selection.py --peers FOLDER --out benchmarks/results/selection-<gpu>.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from timing import Run, write

import dsv4x
from dsv4x import TopkMethod

ROWS = (1, 4, 16, 64, 256)
ENTRIES = (1024, 2048, 8192, 32768, 131072)
KS = (512, 1024, 2048)
LIMIT = 262_144
PAGE, CALLS = 64, 10
POOL = 8192


class Point(NamedTuple):
    k: int
    rows: int
    entries: int
    columns: int


def replay_us(calls: list[Run], replays: int) -> float:
    """Median microseconds of one of ``calls``, captured one behind the other."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(1e3 * began.elapsed_time(ended) / len(calls))
    return statistics.median(times[2:])


class Problem:
    """A point's tensors, and calls of either kernel over them."""

    def __init__(self, point: Point, buffer: torch.Tensor):
        k, rows, entries, columns = point
        # As many different logits as there is room for, so that a row is not always the same one.
        copies = max(1, min(CALLS, buffer.numel() // (rows * columns)))
        self.k = k
        self.logits = [
            buffer[at * rows * columns : (at + 1) * rows * columns].view(rows, columns) for at in range(copies)
        ]
        self.lens = torch.full((rows,), entries, dtype=torch.int32, device="cuda")
        self.table = torch.randint(0, POOL, (rows, -(-columns // PAGE)), device="cuda").int()
        self.out = torch.empty(rows, k, dtype=torch.int32, device="cuda")
        self.local = torch.empty_like(self.out)

    def ours(self, kernel: str) -> list[Run]:
        def run(logits: torch.Tensor) -> torch.Tensor:
            return dsv4x.topk_transform(
                logits, self.lens, self.k, TopkMethod.PAGED, block_table=self.table, page_size=PAGE, pages=POOL,
                out=self.out, kernel=kernel,
            )  # fmt: skip

        return [lambda at=at: run(self.logits[at % len(self.logits)]) for at in range(CALLS)]

    def sglang(self) -> list[Run]:
        from sglang.kernels.ops.attention.dsv4 import topk

        plan = topk.plan_topk_v2(self.lens)

        def run(logits: torch.Tensor) -> None:
            topk.topk_transform_paged_v2(logits, self.lens, self.table, self.out, PAGE, plan)

        return [lambda at=at: run(self.logits[at % len(self.logits)]) for at in range(CALLS)]


def wrong(problem: Problem, kernels: dict[str, list[Run]]) -> list[str]:
    """Kernels whose last call's selection is not the reference's."""
    problem.ours("reference")[-1]()
    want = problem.out.clone()
    found = []
    for name, calls in kernels.items():
        problem.out.fill_(-7)
        calls[-1]()
        same = torch.equal(problem.out.sort(1).values, want.sort(1).values)
        if not same or (name != "sglang_v2" and not torch.equal(problem.out, want)):
            found.append(name)
    return found


def points(ks: tuple[int, ...]) -> list[Point]:
    return [
        Point(k, rows, entries, columns)
        for rows in ROWS
        for entries in ENTRIES
        for columns in (entries, LIMIT)
        for k in ks
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="the folder of prepare.py; without it dsv4x is timed alone")
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--kernels", nargs="+", default=["cuda", "triton"], help="of dsv4x")
    parser.add_argument("--k", type=int, nargs="+", default=KS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.peers is not None:
        sys.path.append(str(arguments.peers))
    buffer = torch.randn(max(ROWS) * LIMIT, device="cuda")
    found = []
    for point in points(tuple(arguments.k)):
        problem = Problem(point, buffer)
        kernels = {name: problem.ours(name) for name in arguments.kernels}
        if arguments.peers is not None:
            kernels["sglang_v2"] = problem.sglang()
        row = {**point._asdict(), "wrong": wrong(problem, kernels)}
        for name, calls in kernels.items():
            row[name] = replay_us(calls, arguments.replays)
        if "sglang_v2" in row:
            row["ours_over_peer"] = row[arguments.kernels[0]] / row["sglang_v2"]
        print("  ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
        found.append(row)
        write(arguments.out, indent=None, page_size=PAGE, calls=CALLS, replays=arguments.replays, rows=found)


if __name__ == "__main__":
    main()
