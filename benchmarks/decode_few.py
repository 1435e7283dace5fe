"""Decode attention of 8 and 16 heads: the kernel for so few, the others, and FlashMLA bare, on one GPU in one run.

The layers, caches and clock of ``decode_choice.py``, all in graphs. ``gluon`` is Gluon's decode as the package runs it,
``gluon_wide`` its kernel for more heads, with the splits it takes. ``flash_mla`` is called bare: q is padded to 64
heads and its schedule is made before the clock. ``over`` is its time over ``gluon``'s, above 1 where dsv4x is ahead;
``splits`` those of ``gluon``'s rows, ``difference`` the largest between its output and FlashMLA's.

Usage: python benchmarks/decode_few.py --out benchmarks/results/decode-few-<gpu>.json   (about 30 s)
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from decode_choice import KINDS, LAYERS, SCALE, WINDOW, Kind, pool, slots
from flash_mla import flash_mla_with_kvcache, get_mla_metadata
from timing import captured, compare_us, write

import dsv4x
from dsv4x import PagedCache
from dsv4x.common.core.platform import platform
from dsv4x.common.kernels.decode_shapes import expected_blocks, num_splits
from dsv4x.cuda.hopper import splitting

HEADS = (16, 8)
TOKENS = (256, 128, 64, 32, 8, 1)
PADDED = 64


@contextlib.contextmanager
def wide() -> Iterator[None]:
    """Gluon's kernel for more heads, whatever the heads."""
    with mock.patch.object(splitting, "FEW_HEADS", 0):
        yield


def measure(pools: list[tuple[PagedCache, PagedCache]], kind: Kind, heads: int, tokens: int) -> dict[str, Any]:
    q = torch.randn(tokens, heads, 512, device="cuda").clamp(-1, 1).bfloat16()
    padded = torch.zeros(tokens, 1, PADDED, 512, dtype=torch.bfloat16, device="cuda")
    padded[:, 0, :heads] = q
    sink = torch.randn(PADDED, device="cuda")
    swa = slots(tokens, WINDOW, WINDOW, scattered=False)
    extra = slots(tokens, kind.entries, kind.columns, scattered=kind.ratio == 4) if kind.entries else (None, None)
    given = {"attn_sink": sink[:heads], "softmax_scale": SCALE, "trusted_indices": True, "return_lse": False}
    schedule = get_mla_metadata()[0]

    def layers(kernel: str) -> list[torch.Tensor]:
        return [
            dsv4x.sparse_mla_decode(
                q, own, *swa, other if kind.entries else None, *extra, kernel=kernel, entries=WINDOW + kind.entries,
                **given,
            )[0]
            for own, other in pools
        ]  # fmt: skip

    def bare() -> list[torch.Tensor]:
        rows = [None if indices is None else indices[:, None] for indices in (swa[0], extra[0])]
        return [
            flash_mla_with_kvcache(
                padded, own.servers_view, None, None, 512, schedule, None, SCALE, False, True, rows[0], sink,
                other.servers_view if kind.entries else None, rows[1], swa[1], extra[1], use_legacy=True,
            )[0][:, 0, :heads]
            for own, other in pools
        ]  # fmt: skip

    runs: dict[str, Callable[[], object]] = {"flash_mla": captured(bare)}
    runs |= {kernel: captured(functools.partial(layers, kernel)) for kernel in ("gluon", "triton")}
    differences = [float((a.float() - b.float()).abs().max()) for a, b in zip(layers("gluon"), bare())]
    with wide():
        runs["gluon_wide"] = captured(functools.partial(layers, "gluon"))
    us = {name: value / LAYERS for name, value in compare_us(runs, rounds=2, warmup=1, rep=4).items()}
    batch = splitting.batch_of(tokens, heads, platform.limits(q.device).multiprocessors, True)
    blocks = expected_blocks(WINDOW + kind.entries, (WINDOW, kind.columns), splitting.BLOCK_ENTRIES)
    return {
        "kind": kind.name, "ratio": kind.ratio, "entries": kind.entries, "heads": heads, "tokens": tokens,
        "splits": num_splits(batch, blocks), "difference": max(differences),
        "us": {name: round(value, 2) for name, value in us.items()},
        "over": round(us["flash_mla"] / us["gluon"], 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further point is begun")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pools, rows, began = [(pool(), pool()) for _ in range(LAYERS)], [], time.perf_counter()
    for kind in sorted(KINDS, key=lambda kind: kind.name != "k512"):
        for heads in HEADS:
            for tokens in TOKENS:
                if time.perf_counter() - began > arguments.budget:
                    print("left out:", kind, heads, tokens, flush=True)
                    continue
                row = measure(pools, kind, heads, tokens)
                rows.append(row)
                print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        write(arguments.out, indent=None, unit="us", layers=LAYERS, rows=rows)


if __name__ == "__main__":
    main()
