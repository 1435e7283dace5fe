"""Cache ops beside the device's own copy of as many bytes, on one GPU in one run.

262 144 rows; medians of ``triton.testing.do_bench``. ``of_copy`` is the copy's time over the op's: it reads half of
the op's bytes (an entry and its bf16 row) and writes as many, so both move the same number. "bare" moves the bytes of
a DSv4 insert (reads a row, writes an entry and its scales at its slot) and computes nothing: what the device gives for
these addresses.

Usage: python benchmarks/cache.py --out benchmarks/results/cache-<gpu>.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import triton
import triton.language as tl
from timing import median_us, write

import dsv4x
from dsv4x import MLAKVCacheLayout, PagedCache, layouts

ROWS = 262144
PAGE_SIZES = (2, 64, 256)


def copy_us(moved: int) -> float:
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda").random_(0, 256)
    target = torch.empty_like(source)
    return median_us(lambda: target.copy_(source), 30, 120)


@triton.jit
def bare_insert_kernel(k_ptr, cache_ptr, slots_ptr, page_size, page_stride, BLOCK_N: tl.constexpr):
    """DSv4's addresses in 32-bit words: 256 of a bf16 row read; 144 of an entry and 2 of its scales written."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots_ptr + row).to(tl.int32)
    page = slot // page_size
    entry = (slot - page * page_size).to(tl.int64)
    base = cache_ptr + page.to(tl.int64) * page_stride
    word = tl.arange(0, 256)
    values = tl.load(k_ptr + row[:, None].to(tl.int64) * 256 + word[None, :])
    tl.store((base + entry * 144)[:, None] + word[None, :], values, mask=(word < 144)[None, :])
    scales = (base + tl.cast(page_size, tl.int64) * 144 + entry * 2)[:, None] + tl.arange(0, 2)[None, :]
    tl.store(scales, tl.zeros((BLOCK_N, 2), tl.int32) + tl.max(values, axis=1)[:, None], eviction_policy="evict_last")


def bare_insert(k: torch.Tensor, cache: PagedCache, slots: torch.Tensor) -> None:
    words = cache.data.view(torch.int32)
    bare_insert_kernel[(ROWS // 4,)](
        k.view(torch.int32), words, slots, cache.page_size, words.stride(0), BLOCK_N=4, num_warps=1
    )


def measure(layout: layouts.CacheLayout, page_size: int) -> list[dict]:
    head_dim = layout.head_dim
    k = (torch.randn(ROWS, head_dim, device="cuda") / 10).bfloat16()
    out = torch.empty_like(k)
    cache = PagedCache.zeros(ROWS // page_size, layout, page_size, "cuda")
    copy = copy_us(ROWS * (layout.entry_bytes + 2 * head_dim))
    rows = []
    for order, slots in (
        ("sequential", torch.arange(ROWS, device="cuda")),
        ("random", torch.randperm(ROWS, device="cuda")),
    ):
        runs = {
            "insert": lambda slots=slots: dsv4x.quantize_and_insert_k_cache(k, cache, slots),
            "dequantize": lambda slots=slots: dsv4x.dequantize_k_cache_paged(cache, slots, out),
        }
        if layout is layouts.DSV4:
            runs["bare"] = lambda slots=slots: bare_insert(k, cache, slots)
        for op, run in runs.items():
            us = median_us(run, 30, 120)
            row = {"layout": layout.name, "page_size": page_size, "op": op, "slots": order, "us": us, "copy_us": copy}
            rows.append({**row, "of_copy": copy / us})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = [row for page_size in PAGE_SIZES for row in measure(layouts.DSV4, page_size)]
    rows += [row for m in MLAKVCacheLayout if m is not MLAKVCacheLayout.DSV4 for row in measure(m.value, 64)]
    print(f"{'layout':<18}{'page':>5} {'op':<12}{'slots':<12}{'us':>8}{'copy':>8}{'of copy':>9}")
    for row in rows:
        print(
            f"{row['layout']:<18}{row['page_size']:>5} {row['op']:<12}{row['slots']:<12}"
            f"{row['us']:>8.1f}{row['copy_us']:>8.1f}{row['of_copy']:>9.2f}"
        )
    write(arguments.out, rows_per_call=ROWS, rows=rows)


if __name__ == "__main__":
    main()
