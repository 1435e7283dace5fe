"""A layer's whole prefill step on every path, the path the router picks, and what servers run today, in one run.

Microseconds of eager calls: the best of several medians of ``triton.testing.do_bench``. DSv4 pages of 64, sink on.
``direct``, ``gathered`` and ``referenced`` are dsv4x's paths, ``chosen`` is what it picks by itself, ``predicted_*`` is
what the pick rests on; ``peer_direct`` and ``peer_gathered`` are a server's steps (benchmarks/steps.py), ``kernel``
is ``flash_mla_sparse_fwd`` alone on rows gathered before. ``regret`` is chosen over the best of dsv4x's paths,
``against_peers`` over the best of the peers'. Up to 256 tokens, where eager calls wait for the host, ``*_gpu`` is that
step replayed from a graph.

Usage: python benchmarks/prefill.py --out benchmarks/results/prefill-<gpu>.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from steps import Step
from timing import compare_us, device_us, write

import dsv4x
from dsv4x.common.step.attention import paths_of

TOKENS = (16, 64, 256, 1024, 4096, 8192, 16384, 32768)
PREFIXES = (0, 8192, 131072, 1048576)
SHAPES = ((64, 512), (128, 1024))
RATIOS = (4, 1, 128)
REQUESTS = (1, 8)
GRAPHED, LONG = 256, 16384

COLUMNS = {
    "ratio": 5, "requests": 9, "heads": 6, "prefix": 8, "tokens": 7, "direct": 9, "gathered": 9, "referenced": 11,
    "peer_direct": 12, "peer_gathered": 14, "kernel": 8, "chosen": 9, "path": 11, "regret": 8, "against_peers": 14,
}  # fmt: skip


def measure(tokens: int, prefix: int, heads: int, topk: int, ratio: int, requests: int) -> dict:
    step = Step(tokens, prefix, heads, topk, ratio, requests)
    paths = paths_of(step.meta.kind)
    runs = {
        **{path: lambda path=path: step.run(path) for path in paths},
        "peer_direct": step.peer_direct,
        "peer_gathered": step.peer_gathered,
        "kernel": step.kernel_alone(),
        "chosen": lambda: step.run(),
    }
    if tokens > GRAPHED:
        us = compare_us(runs, 4 if tokens < LONG else 2)
    else:
        # Many short turns: of a host that is slow by bursts, one of them meets a quiet moment.
        us = compare_us(runs, 12, 1, 5)
        us |= {f"{name}_gpu": device_us(run, 2, 8) for name, run in runs.items() if name not in ("kernel", "chosen")}
    explained = dsv4x.explain_step(step.q, step.swa, step.extra, step.meta, step.topk, chunk=step.chunk)
    return {
        "tokens": tokens, "prefix": prefix, "heads": heads, "topk": topk, "ratio": ratio, "requests": requests, **us,
        **{f"predicted_{path}": value for path, value in explained.predicted_us.items()},
        "path": explained.chosen,
        "path_kernel": explained.kernels[explained.chosen],
        "regret": us["chosen"] / min(us[path] for path in paths),
        "against_peers": us["chosen"] / min(us["peer_direct"], us["peer_gathered"]),
    }  # fmt: skip


def _shown(value: float | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS)
    parser.add_argument("--requests", type=int, nargs="+", default=REQUESTS)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    began, rows = time.monotonic(), []
    print("times in us, a dash where a layer kind has no such path")
    print("".join(f"{column:>{width}}" for column, width in COLUMNS.items()))
    for ratio in arguments.ratios:
        for requests in arguments.requests:
            for heads, topk in SHAPES:
                for prefix in PREFIXES:
                    for tokens in arguments.tokens:
                        if time.monotonic() - began > arguments.seconds:
                            continue
                        row = measure(tokens, prefix, heads, topk, ratio, requests)
                        rows.append(row)
                        print(
                            "".join(f"{_shown(row.get(name)):>{width}}" for name, width in COLUMNS.items()), flush=True
                        )
    write(arguments.out, 0, unit="us", rows=rows)


if __name__ == "__main__":
    main()
