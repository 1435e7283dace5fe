"""A layer's whole prefill step on every path, the path the router picks, and what servers run today, in one run.

Microseconds: the best of five medians of ``triton.testing.do_bench``, eager, DSv4 pages of 64, sink on, real FlashMLA.
``direct`` and ``gathered`` are dsv4x's paths, ``chosen`` is what it picks by itself, ``predicted_*`` is what the pick
rests on; ``peer_direct`` and ``peer_gathered`` are a server's steps (benchmarks/steps.py). ``regret`` is chosen over
the best of dsv4x's paths, ``against_peers`` over the best of the peers'.

Usage: python benchmarks/prefill.py --out benchmarks/results/prefill-<gpu>.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import triton
from steps import Step, median_us

import dsv4x
from dsv4x.common.attention import choose_path, path_problems
from dsv4x.common.costs import step_costs
from dsv4x.common.registry import select

TOKENS = (16, 64, 256, 1024, 4096, 8192, 16384, 32768)
PREFIXES = (0, 8192, 131072, 1048576)
SHAPES = ((64, 512), (128, 1024))
RATIOS = (4, 1, 128)
REQUESTS = (1, 8)


def measure(tokens: int, prefix: int, heads: int, topk: int, ratio: int, requests: int) -> dict:
    step = Step(tokens, prefix, heads, topk, ratio, requests)
    runs = {
        "direct": lambda: step.run("direct"),
        "gathered": lambda: step.run("gathered"),
        "peer_direct": step.peer_direct,
        "peer_gathered": step.peer_gathered,
        "chosen": lambda: step.run(),
    }
    # Long kernels throttle the clock by several percent, so all take turns at every place and each keeps its best.
    names = list(runs)
    rounds = [{name: median_us(runs[name], 3, 12) for name in names[at:] + names[:at]} for at in range(len(names))]
    us = {name: min(each[name] for each in rounds) for name in runs}
    return {
        "tokens": tokens, "prefix": prefix, "heads": heads, "topk": topk, "ratio": ratio, "requests": requests, **us,
        **predicted(step),
        "path": choose_path(step.q, step.swa, step.extra, step.meta, step.topk, chunk=step.chunk),
        "regret": us["chosen"] / min(us["direct"], us["gathered"]),
        "against_peers": us["chosen"] / min(us["peer_direct"], us["peer_gathered"]),
    }  # fmt: skip


def predicted(step: Step) -> dict[str, float]:
    problems = path_problems(step.q, step.swa, step.extra, step.meta, step.topk)
    costs, indexed = step_costs(problems[0].arch), step.topk is not None
    direct, gathered = (select(problem, None).predicted_us(problem) for problem in problems)
    return {
        "predicted_direct": costs.direct_us(direct, problems[0], indexed),
        "predicted_gathered": costs.gathered_us(gathered, problems[1], indexed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS)
    parser.add_argument("--requests", type=int, nargs="+", default=REQUESTS)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    began, rows = time.monotonic(), []
    print(
        "ratio requests heads prefix tokens |   direct gathered | peer: direct gathered |   chosen  path  regret  peers"
    )
    for ratio in arguments.ratios:
        for requests in arguments.requests:
            for heads, topk in SHAPES:
                for prefix in PREFIXES:
                    for tokens in TOKENS:
                        if time.monotonic() - began > arguments.seconds:
                            continue
                        row = measure(tokens, prefix, heads, topk, ratio, requests)
                        rows.append(row)
                        print(
                            f"{ratio:>5} {requests:>8} {heads:>5} {prefix:>7} {tokens:>6} | {row['direct']:>8.0f} "
                            f"{row['gathered']:>8.0f} | {row['peer_direct']:>8.0f} {row['peer_gathered']:>8.0f} | "
                            f"{row['chosen']:>8.0f} {row['path']:>8} {row['regret']:.2f} {row['against_peers']:.2f}",
                            flush=True,
                        )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        versions = {"torch": torch.__version__, "triton": triton.__version__, "dsv4x": dsv4x.__version__}
        result = {"device": torch.cuda.get_device_name(), "unit": "us", **versions, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=0) + "\n")


if __name__ == "__main__":
    main()
