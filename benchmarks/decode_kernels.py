"""Decode kernels over DSv4 pages beside FlashMLA called bare, on one GPU in one run; also prefill in place, T = 4096.

Every row holds the best of four medians of ``triton.testing.do_bench`` (microseconds; it flushes L2 before every call)
over the same inputs: window 128 in a pool of 16 384 entries, top-k random in a pool of 65 536, page 64, sink on.
Kernels are called by their launchers, as FlashMLA is called bare on ready arguments with its scheduler object filled.
``graph`` columns replay a captured call, so that a busy host does not count.

Usage: python benchmarks/decode_kernels.py --out benchmarks/results/decode-kernels-<gpu>.json   (about 40 s)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from flash_mla import flash_mla_with_kvcache, get_mla_metadata
from timing import captured, compare_us, write

import dsv4x
from dsv4x import PagedCache, layouts
from dsv4x.common.core.calls import DecodeCall, Scope
from dsv4x.common.kernels import decode
from dsv4x.cuda.hopper import decode as decode_hopper

WINDOW, PAGE_SIZE, SWA_ENTRIES, EXTRA_ENTRIES = 128, 64, 16384, 65536
SHAPES = ((64, 512), (128, 1024))
TOKENS = (1, 8, 32, 64, 128, 512, 4096)
GRAPHED = 128
SCALE = 512**-0.5


def pool(entries: int) -> PagedCache:
    cache = PagedCache.zeros(entries // PAGE_SIZE, layouts.DSV4, PAGE_SIZE, "cuda")
    k = (torch.randn(entries, 512, device="cuda") / 10).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(entries, device="cuda"))
    return cache


def measure(swa: PagedCache, extra: PagedCache, heads: int, topk: int, tokens: int) -> dict[str, float]:
    q = torch.randn(tokens, heads, 512, device="cuda").clamp(-1, 1).bfloat16()
    sink = torch.randn(heads, device="cuda")
    rows = [
        torch.randint(0, cache.capacity, (tokens, width), device="cuda", dtype=torch.int32)
        for cache, width in ((swa, WINDOW), (extra, topk))
    ]
    lens = [torch.full((tokens,), width, dtype=torch.int32, device="cuda") for width in (WINDOW, topk)]
    out = torch.empty_like(q)
    meta = get_mla_metadata()[0]
    scopes = (Scope(swa, rows[0], lens[0]), Scope(extra, rows[1], lens[1]))
    call = DecodeCall(q, *scopes, sink, SCALE, out, heads)

    def bare() -> object:
        return flash_mla_with_kvcache(
            q[:, None], swa.servers_view, None, None, 512, meta, None, SCALE, False, True, rows[0][:, None], sink,
            extra.servers_view, rows[1][:, None], lens[0], lens[1], use_legacy=True,
        )  # fmt: skip

    runs = {
        "flash_mla_bare": bare,
        "gluon": lambda: decode_hopper.sparse_mla_decode(call),
        "triton": lambda: decode.sparse_mla_decode(call),
    }
    if tokens <= GRAPHED:
        runs |= {f"{name}_graph": captured(run) for name, run in runs.items()}
    return {name: round(us, 1) for name, us in compare_us(runs).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    swa, extra = pool(SWA_ENTRIES), pool(EXTRA_ENTRIES)
    rows = []
    for heads, topk in SHAPES:
        for tokens in TOKENS:
            row = {"heads": heads, "topk": topk, "tokens": tokens, **measure(swa, extra, heads, topk, tokens)}
            rows.append(row)
            print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    write(arguments.out, unit="us", rows=rows)


if __name__ == "__main__":
    main()
