"""Every decode kernel's time beside its predicted one, and what choosing by prediction costs, on one GPU in one run.

A layer as servers run it: slot rows that are trusted, no lse, q of the rank's heads, the window and one of
``window`` (ratio 1), ``k512`` and ``k1024`` (ratio 4, random slots), ``c128`` (ratio 128: pages in a row, in rows as
wide as a context of a million tokens). Four layers with caches of their own share what a step's layers share; ``us``
is a layer's, the best of two medians with the L2 flushed before each four. ``regret`` is the picked kernel's time over
the best one's. Eager times are of unprepared calls, which the host bounds.

Usage: python benchmarks/decode_choice.py --out benchmarks/results/decode-choice-<gpu>.json   (about 90 s)
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import Run, captured, compare_us, write

import dsv4x
from dsv4x import PagedCache, layouts
from dsv4x.common.core.platform import platform
from dsv4x.common.dispatch.problem import AttentionProblem
from dsv4x.common.dispatch.registry import candidates, select

WINDOW, PAGE_SIZE, LIMIT_COLUMNS = 128, 64, 8192
LAYERS = 4
POOL = 65536
HEADS = (16, 64, 8, 128, 32)
TOKENS = (64, 1, 256, 8, 128, 32)
SCALE = 512**-0.5


class Kind(NamedTuple):
    """Compressed entries of a token, and columns of their rows; ratio 1 has none."""

    name: str
    ratio: int
    entries: int
    columns: int


KINDS = (
    Kind("c128", 128, 32, LIMIT_COLUMNS),
    Kind("k512", 4, 512, 512),
    Kind("window", 1, 0, 0),
    Kind("c128", 128, 256, LIMIT_COLUMNS),
    Kind("c128", 128, 1024, LIMIT_COLUMNS),
    Kind("k1024", 4, 1024, 1024),
)


def pool() -> PagedCache:
    cache = PagedCache.zeros(POOL // PAGE_SIZE, layouts.DSV4, PAGE_SIZE, "cuda")
    k = (torch.randn(POOL, 512, device="cuda") / 10).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(POOL, device="cuda"))
    return cache


def slots(tokens: int, entries: int, columns: int, scattered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of slots and their lengths: anywhere, or each token's in a row from a page's start on."""
    at = torch.randint(0, POOL, (tokens, columns), device="cuda", dtype=torch.int32)
    if not scattered:
        first = torch.randint(0, (POOL - entries) // PAGE_SIZE, (tokens, 1), device="cuda", dtype=torch.int32)
        at = first * PAGE_SIZE + torch.arange(columns, device="cuda", dtype=torch.int32)
        at[:, entries:] = -1
    return at, torch.full((tokens,), entries, dtype=torch.int32, device="cuda")


def measure(pools: list[tuple[PagedCache, PagedCache]], kind: Kind, heads: int, tokens: int) -> list[dict[str, Any]]:
    q = torch.randn(tokens, heads, 512, device="cuda").clamp(-1, 1).bfloat16()
    sink = torch.randn(heads, device="cuda")
    swa = slots(tokens, WINDOW, WINDOW, scattered=False)
    extra = slots(tokens, kind.entries, kind.columns, scattered=kind.ratio == 4) if kind.entries else None
    entries = WINDOW + kind.entries
    more = {} if extra is None else {"extra_indices": extra[0], "extra_lens": extra[1]}

    def layers(kernel: str) -> None:
        schedule = {"captured": torch.cuda.is_current_stream_capturing()}
        for own, other in pools:
            dsv4x.sparse_mla_decode(
                q, own, *swa, extra_cache=other if more else None, attn_sink=sink, softmax_scale=SCALE, kernel=kernel,
                trusted_indices=True, schedule=schedule, return_lse=False, entries=entries, **more,
            )  # fmt: skip

    rows = []
    for capturing in (True, False):
        caches = pools[0][: 2 if extra else 1]
        problem = AttentionProblem(
            "sparse_mla_decode", "cuda", platform.limits(q.device).arch, tokens=tokens, heads=heads, width=WINDOW,
            extra_width=kind.columns, entries=entries, lse=False, capturing=capturing,
            caches=tuple(cache.spec for cache in caches),
        )  # fmt: skip

        records = [record for record in candidates(problem) if record.name != "reference"]
        runs: dict[str, Run] = {record.name: functools.partial(layers, record.name) for record in records}
        if capturing:
            runs = {name: captured(run) for name, run in runs.items()}
        us = {name: value / LAYERS for name, value in compare_us(runs, rounds=2, warmup=1, rep=4).items()}
        picked = select(problem).name
        rows.append({
            "kind": kind.name, "ratio": kind.ratio, "entries": kind.entries, "heads": heads, "tokens": tokens,
            "captured": capturing, "us": {name: round(value, 2) for name, value in us.items()},
            "predicted": {record.name: round(record.call_us(problem), 2) for record in records},
            "picked": picked, "regret": round(us[picked] / min(us.values()), 3),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further point is begun")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pools, rows, began = [(pool(), pool()) for _ in range(LAYERS)], [], time.perf_counter()
    for heads in HEADS:
        for kind in KINDS:
            for tokens in TOKENS:
                if time.perf_counter() - began > arguments.budget:
                    print("left out:", heads, kind, tokens, flush=True)
                    continue
                for row in measure(pools, kind, heads, tokens):
                    rows.append(row)
                    print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        write(arguments.out, indent=None, unit="us", layers=LAYERS, rows=rows)


if __name__ == "__main__":
    main()
