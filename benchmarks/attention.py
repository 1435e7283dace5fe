"""What dsv4x's attention costs beside FlashMLA called bare, on one GPU in one run.

Every row holds the best of four medians of ``triton.testing.do_bench`` (microseconds) over the same inputs: window 128
in a pool of 16 384 entries, top-k random in a pool of 65 536, page 64, DSv4 fp8, sink on.

- ``bare``: FlashMLA's own call on ready arguments, its scheduler object already filled.
- ``flash_mla``: ``dsv4x.sparse_mla_decode`` / ``_prefill`` with kernel="flash_mla", indices untrusted, scheduler fresh.
- ``served``: the same as AttentionMetadata serves it: trusted indices and a shared schedule.
- ``triton``: kernel="triton".

Usage: python benchmarks/attention.py --out benchmarks/results/attention-<gpu>.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata
from timing import compare_us, write

import dsv4x
from dsv4x import PagedCache, layouts

WINDOW, PAGE_SIZE, SWA_ENTRIES, EXTRA_ENTRIES = 128, 64, 16384, 65536
SHAPES = ((64, 512), (128, 1024))
TOKENS = (1, 8, 32, 64, 128, 512, 1024, 4096)


def pool(entries: int) -> PagedCache:
    cache = PagedCache.zeros(entries // PAGE_SIZE, layouts.DSV4, PAGE_SIZE, "cuda")
    k = (torch.randn(entries, 512, device="cuda") / 10).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(entries, device="cuda"))
    return cache


def decode_row(heads: int, topk: int, tokens: int) -> dict[str, float]:
    swa, extra = pool(SWA_ENTRIES), pool(EXTRA_ENTRIES)
    q = torch.randn(tokens, heads, 512, device="cuda").clamp(-1, 1).bfloat16()
    sink = torch.randn(heads, device="cuda")
    rows = [torch.randint(0, n, (tokens, w), device="cuda", dtype=torch.int32)
            for n, w in ((SWA_ENTRIES, WINDOW), (EXTRA_ENTRIES, topk))]  # fmt: skip
    lens = [torch.full((tokens,), w, dtype=torch.int32, device="cuda") for w in (WINDOW, topk)]
    meta = get_mla_metadata()[0]
    arguments = (swa, rows[0], lens[0], extra, rows[1], lens[1], sink)
    schedule: dict = {}

    def bare():
        flash_mla_with_kvcache(
            q[:, None], swa.servers_view, None, None, 512, meta, None, 512**-0.5, False, True, rows[0][:, None],
            sink, extra.servers_view, rows[1][:, None], lens[0], lens[1], use_legacy=True,
        )  # fmt: skip

    return compare_us({
        "bare": bare,
        "flash_mla": lambda: dsv4x.sparse_mla_decode(q, *arguments, kernel="flash_mla"),
        "served": lambda: dsv4x.sparse_mla_decode(
            q, *arguments, kernel="flash_mla", trusted_indices=True, schedule=schedule
        ),
        "triton": lambda: dsv4x.sparse_mla_decode(q, *arguments, kernel="triton"),
    })  # fmt: skip


def prefill_row(heads: int, topk: int, tokens: int) -> dict[str, float]:
    kv = (torch.randn(EXTRA_ENTRIES, 512, device="cuda") / 10).bfloat16()
    q = (torch.randn(tokens, heads, 512, device="cuda") / 10).bfloat16()
    sink = torch.randn(heads, device="cuda")
    width = dsv4x.combined_topk_width(topk, WINDOW)
    rows = torch.randint(0, EXTRA_ENTRIES, (tokens, width), device="cuda", dtype=torch.int32)
    lens = torch.full((tokens,), width, dtype=torch.int32, device="cuda")
    arguments = (q, kv, rows, lens, sink)

    def bare():
        flash_mla_sparse_fwd(q, kv[:, None], rows[:, None], 512**-0.5, 512, sink, lens, use_legacy=True)

    return compare_us({
        "bare": bare,
        "flash_mla": lambda: dsv4x.sparse_mla_prefill(*arguments, kernel="flash_mla"),
        "served": lambda: dsv4x.sparse_mla_prefill(*arguments, kernel="flash_mla", trusted_indices=True),
        "triton": lambda: dsv4x.sparse_mla_prefill(*arguments, kernel="triton"),
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    print(f"{'op':<8}{'H,K':>9}{'T':>6}" + "".join(f"{name:>11}" for name in ("bare", "flash_mla", "served", "triton")))
    for op, measure in (("decode", decode_row), ("prefill", prefill_row)):
        for heads, topk in SHAPES:
            for tokens in TOKENS:
                row = measure(heads, topk, tokens)
                rows.append({"op": op, "heads": heads, "topk": topk, "tokens": tokens, **row})
                print(
                    f"{op:<8}{f'{heads},{topk}':>9}{tokens:>6}" + "".join(f"{value:>11.1f}" for value in row.values())
                )
    write(arguments.out, unit="us", rows=rows)


if __name__ == "__main__":
    main()
