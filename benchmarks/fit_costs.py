"""Measure what the cost model needs on this GPU and write its table: kernel times, gather and index rates, host floors.

Medians of ``triton.testing.do_bench`` of graphs, in microseconds. ``decode`` and ``prefill`` are FlashMLA's kernels
called bare, over index rows of the width given, drawn from pools of the rows given; ``prefill_gluon`` is Gluon's.
``gather``, ``remap`` and ``combine`` are straight lines through two sizes. ``remap`` packs top-k's slots. ``listing``
does that too, then finds and remaps the references, as the referenced path does before it gathers their rows. ``host``
is what the host takes for eager calls of one token, the best of many, as a busy host takes up to twice that:
``kernels`` of the attention ops, and of the paths what they take beside their kernel's call as an op, less than nothing
where an op's checks take longer.

Usage: python benchmarks/fit_costs.py --out dsv4x/cuda/costs_sm_90.json
With --host-only, the file's other entries stay as they are.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from time import perf_counter

import torch
from flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata
from steps import PAGE_SIZE, WINDOW, Step, pool
from timing import Run, device_us, write

import dsv4x
from dsv4x import Local
from dsv4x.common.core.refill import PackCall
from dsv4x.common.dispatch import registry
from dsv4x.common.step.attention import PATHS, paths_of
from dsv4x.common.step.direct import local_of

TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
WIDTHS = (128, 640, 1152, 4224)
ROWS = (4096, 65536, 262144)
TOPK = 512
HEADS = {"decode": (64, 128), "prefill": (64, 128), "prefill_gluon": (16, 64, 128)}
HOST_TURNS, HOST_CALLS = 800, 6


def kernel_times() -> dict:
    table: dict = {"tokens": TOKENS, "width": WIDTHS, "rows": ROWS, **{op: {} for op in HEADS}}
    caches = {rows: pool(rows // PAGE_SIZE) for rows in (16384, *ROWS)}
    for op, measured in HEADS.items():
        for heads in measured:
            table[op][str(heads)] = [[[round(time(op, heads, rows, width, tokens, caches), 2) for tokens in TOKENS]
                                      for width in WIDTHS] for rows in ROWS]  # fmt: skip
            print(op, heads, table[op][str(heads)][1], flush=True)
    return table


def time(op: str, heads: int, rows: int, width: int, tokens: int, caches: dict) -> float:
    q = torch.randn(tokens, heads, 512, device="cuda", dtype=torch.bfloat16) / 10
    sink = torch.randn(heads, device="cuda")

    def drawn(n: int, w: int):
        index = torch.randint(0, n, (tokens, w), device="cuda", dtype=torch.int32)
        return index, torch.full((tokens,), w, dtype=torch.int32, device="cuda")

    if op != "decode":
        kv = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16) / 10
        index, lens = drawn(rows, width)
        if op == "prefill_gluon":
            return device_us(
                lambda: dsv4x.sparse_mla_prefill(q, kv, index, lens, sink, kernel="gluon", trusted_indices=True)
            )
        return device_us(
            lambda: flash_mla_sparse_fwd(q, kv[:, None], index[:, None], 512**-0.5, 512, sink, lens, use_legacy=True)
        )
    scheduler, view = get_mla_metadata()[0], caches[16384].servers_view
    index, lens = drawn(16384, WINDOW)
    extra = {}
    if width > WINDOW:
        extra_index, extra_lens = drawn(rows, width - WINDOW)
        extra = {
            "extra_k_cache": caches[rows].servers_view,
            "extra_indices_in_kvcache": extra_index[:, None],
            "extra_topk_length": extra_lens,
        }
    return device_us(
        lambda: flash_mla_with_kvcache(
            q[:, None], view, None, None, 512, scheduler, None, 512**-0.5, False, True, index[:, None], sink,
            topk_length=lens, use_legacy=True, **extra,
        )
    )  # fmt: skip


def line(run, sizes: tuple[int, int]) -> list[float]:
    """``[at zero, a unit]`` of the straight line through two sizes."""
    low, high = (device_us(run(size)) for size in sizes)
    slope = (high - low) / (sizes[1] - sizes[0])
    return [max(0.0, low - slope * sizes[0]), slope]


def gather(rows: int):
    extra, swa = pool(max(1, rows // PAGE_SIZE)), pool(4)
    slots = torch.randperm(rows, device="cuda").int()
    out = torch.empty(rows, 512, dtype=torch.bfloat16, device="cuda")
    record = registry.find("gather_workspace", "triton")
    return lambda: record.run(extra, swa, slots, rows, out, 1.0, 1.0)


def remap(elements: int):
    step = Step(elements // 512, 1 << 17, 64, 512, 4, 1)
    return packing(step.topk, step.topk_lens, local_of(step.meta), torch.empty_like(step.topk), step.extra.capacity)


def combine(elements: int):
    step = Step(elements // 640, 1 << 17, 64, 512, 4, 1)
    return step.index_rows


def listing(references: int):
    """Nearly every reference to another row, of a pool of 1M-token prefixes; nothing is gathered."""
    tokens, entries = references // TOPK, 1 << 20
    pages = torch.arange(entries // PAGE_SIZE, dtype=torch.int32, device="cuda")
    topk = torch.randint(0, entries, (tokens, TOPK), device="cuda", dtype=torch.int32)
    lens = torch.full((tokens,), TOPK, dtype=torch.int32, device="cuda")
    local = Local(torch.zeros_like(lens), torch.full_like(lens, entries), pages[None], len(pages))
    slots = torch.empty_like(topk)
    pack = packing(topk, lens, local, slots, entries)
    record = registry.find("list_referenced", "triton")

    def run() -> None:
        pack()
        listed = torch.full((references,), -1, dtype=torch.int32, device="cuda")
        compact, count = torch.full_like(slots, -1), torch.zeros(1, dtype=torch.int32, device="cuda")
        record.run(slots, lens, entries, 1, listed, compact, count)

    return run


def packing(topk: torch.Tensor, lens: torch.Tensor, local: Local, slots: torch.Tensor, capacity: int) -> Run:
    """What makes packed slots of local entries, as the step does for kernels that take slots."""
    record, spans = registry.find("pack_slots", "triton"), torch.empty_like(lens)
    call = PackCall(topk, lens, local, capacity, PAGE_SIZE, slots, spans)
    return lambda: record.run(call)


def host() -> dict:
    """What the host takes, in turns: the quiet moments of a busy one are then the same for all."""
    step = Step(1, 1024, 64, 512, 1, 1)
    meta, schedule = step.meta, {}
    workspace, rows, lens = step.gathered()
    calls = {
        "sparse_mla_decode": lambda kernel: dsv4x.sparse_mla_decode(
            step.q, step.swa, meta.swa_indices, meta.swa_lens, attn_sink=step.sink, kernel=kernel,
            trusted_indices=True, schedule=schedule,
        ),
        "sparse_mla_prefill": lambda kernel: dsv4x.sparse_mla_prefill(
            step.q, workspace, rows, lens, step.sink, kernel=kernel, trusted_indices=True
        ),
    }  # fmt: skip
    runs: dict[tuple[str, str], Run] = {
        (op, name): functools.partial(call, name)
        for op, call in calls.items()
        for name in ("flash_mla", "gluon", "triton")
    }
    for ratio in (1, 4, 128):
        at = Step(1, 1024, 64, 512, ratio, 1)
        for path in paths_of(at.meta.kind):
            runs[path, str(ratio)] = functools.partial(
                dsv4x.sparse_mla_attention, at.q, at.swa, at.extra, at.meta, at.topk, at.sink, path=path,
                kernel="flash_mla", chunk=at.chunk, topk_lens=at.topk_lens,
            )  # fmt: skip
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(HOST_TURNS):
        for key, run in runs.items():
            torch.cuda.synchronize()
            began = perf_counter()
            for _ in range(HOST_CALLS):
                run()
            best[key] = min(best[key], 1e6 * (perf_counter() - began) / HOST_CALLS)
    kernels = {op: {name: round(us, 2) for (key, name), us in best.items() if key == op} for op in calls}
    found: dict = {"kernels": kernels}
    for path in PATHS:
        beside = best["sparse_mla_decode" if path == "direct" else "sparse_mla_prefill", "flash_mla"]
        found[path] = {ratio: round(us - beside, 2) for (key, ratio), us in best.items() if key == path}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table as JSON here")
    parser.add_argument("--host-only", action="store_true", help="measure only what the host takes")
    arguments = parser.parse_args()
    if arguments.host_only and not arguments.out:
        parser.error("--host-only: got no --out, need the file whose other entries stay")
    torch.manual_seed(0)
    if arguments.host_only:
        result = json.loads(arguments.out.read_text()) | {"host": host()}
        print(result["host"])
        write(arguments.out, None, **result)
        return
    result = {
        "unit": "us",
        **kernel_times(),
        "gather": line(gather, (16384, 262144)),
        "remap": line(remap, (512 * 1024, 512 * 16384)),
        "combine": line(combine, (640 * 1024, 640 * 16384)),
        "listing": line(listing, (512 * 64, 512 * 2048)),
        "host": host(),
    }
    for name in ("gather", "remap", "combine", "listing", "host"):
        print(name, result[name])
    write(arguments.out, None, **result)


if __name__ == "__main__":
    main()
