"""The indexer beside DeepGEMM called bare and torch.topk, on one GPU in one run.

64 heads, pages of 64, every request of 16 384 entries. ``us`` is the best of four medians of
``triton.testing.do_bench``, which flushes the L2 and calls eagerly; ``graph_us`` the time of a call in a captured graph
of ten, as servers replay decode steps. "bare" is DeepGEMM's own call with its own schedule and nothing cleaned, or
torch.topk; dsv4x's call is given the same schedule.
"raw" leaves open what stands past a length, as bare does; "clean" is the contract of ``paged_mqa_logits``.

Usage: python benchmarks/indexer.py --out benchmarks/results/indexer-<gpu>.json
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from timing import Run, compare_us, write

import dsv4x
from dsv4x import PagedCache, layouts

HEADS, PAGE, ENTRIES = 64, 64, 16384
FLAT_ROWS = 2048
TOPK_SHAPE = (4096, 32768)
BARE = "bare"


def graph_us(run, calls: int = 10) -> float:
    """Microseconds of a call of ``run`` in a graph, host work left out."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    times = []
    for _ in range(5):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(1e3 * began.elapsed_time(ended) / calls)
    return sorted(times)[2]


def timed(shape: dict, runs: dict[str, Run]) -> list[dict]:
    """A row a run, those beside a bare one with its time over theirs."""
    us = compare_us(runs)
    rows = [{**shape, "kernel": name, "us": value, "graph_us": graph_us(runs[name])} for name, value in us.items()]
    for row in rows:
        if BARE in us and row["kernel"] != BARE:
            row["bare_over_us"] = us[BARE] / row["us"]
    return rows


def fp8(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn)


def random_cache(pages: int) -> PagedCache:
    """A pool of unit-normal codes and scales around 1, written in place of the quantizer for speed."""
    cache = PagedCache.zeros(pages, layouts.INDEXER_FP8, PAGE, "cuda")
    cache.data[:, : PAGE * 128] = fp8(pages, PAGE * 128).view(torch.uint8)
    cache.data[:, PAGE * 128 :] = (torch.rand(pages, PAGE, device="cuda") + 0.5).view(torch.uint8)
    return cache


class Paged:
    """One batch's arguments."""

    def __init__(self, cache: PagedCache, table: torch.Tensor, next_n: int):
        batch = len(table)
        self.cache, self.table, self.next_n = cache, table, next_n
        self.q, self.weights = fp8(batch, next_n, HEADS, 128), torch.randn(batch * next_n, HEADS, device="cuda")
        self.lens = torch.full((batch, next_n), ENTRIES, dtype=torch.int32, device="cuda")
        self.schedule = dsv4x.get_paged_mqa_logits_metadata(self.lens)

    def bare(self):
        import deep_gemm

        schedule = deep_gemm.get_paged_mqa_logits_metadata(self.lens, PAGE, deep_gemm.get_num_sms())
        arguments = (self.cache.servers_view, self.weights, self.lens, self.table, schedule, ENTRIES)
        if hasattr(deep_gemm, "fp8_paged_mqa_logits"):
            return lambda: deep_gemm.fp8_paged_mqa_logits(self.q, *arguments)
        return lambda: deep_gemm.fp8_fp4_paged_mqa_logits((self.q, None), *arguments)

    def run(self, kernel: str, clean: bool):
        return lambda: dsv4x.paged_mqa_logits(
            self.q, self.cache, self.weights, self.lens, self.table, ENTRIES, self.schedule, kernel=kernel,
            clean_logits=clean,
        )  # fmt: skip


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def kernels(op: str) -> list[str]:
    """The GPU kernels of ``op`` that are there."""
    found = [k for k in dsv4x.common.dispatch.registry.kernels(op) if k.name in ("deep_gemm", "triton")]
    return [k.name for k in found if k.library is None or k.library.reason is None]


def paged(rows: list[dict]) -> None:
    for batch in (64, 256):
        cache = random_cache(batch * ENTRIES // PAGE)
        table = torch.randperm(cache.pages, device="cuda").view(batch, -1).int()
        for next_n in (1, 2, 4):
            problem = Paged(cache, table, next_n)
            shape = {"op": "paged", "requests": batch, "next_n": next_n, "entries": ENTRIES}
            runs = {}
            if "deep_gemm" in kernels("paged_mqa_logits") and next_n <= 2:
                runs[BARE] = problem.bare()
            for kernel in kernels("paged_mqa_logits"):
                for clean in (False, True):
                    runs[f"{kernel} {'clean' if clean else 'raw'}"] = problem.run(kernel, clean)
            found = timed(shape, runs)
            expected = runs[BARE]() if BARE in runs else None
            for row in found:
                if expected is not None and row["kernel"] != BARE:
                    row["difference"] = difference(runs[row["kernel"]](), expected)
            rows += found


def flat(rows: list[dict]) -> None:
    q, weights = fp8(FLAT_ROWS, HEADS, 128), torch.randn(FLAT_ROWS, HEADS, device="cuda")
    k, k_scale = fp8(ENTRIES, 128), torch.rand(ENTRIES, device="cuda") + 0.5
    ks = torch.zeros(FLAT_ROWS, dtype=torch.int32, device="cuda")
    ke = torch.full_like(ks, ENTRIES)
    shape = {"op": "flat", "rows": FLAT_ROWS, "entries": ENTRIES}
    runs = {}
    if "deep_gemm" in kernels("mqa_logits"):
        import deep_gemm

        if hasattr(deep_gemm, "fp8_mqa_logits"):
            runs[BARE] = lambda: deep_gemm.fp8_mqa_logits(q, (k, k_scale), weights, ks, ke)
        else:
            runs[BARE] = lambda: deep_gemm.fp8_fp4_mqa_logits((q, None), (k, k_scale), weights, ks, ke, ENTRIES)
    for kernel in kernels("mqa_logits"):
        for clean in (False, True):
            runs[f"{kernel} {'clean' if clean else 'raw'}"] = functools.partial(
                dsv4x.mqa_logits, q, k, k_scale, weights, ks, ke, kernel=kernel, clean_logits=clean
            )
    rows += timed(shape, runs)


def schedule(rows: list[dict]) -> None:
    for batch in (1, 64, 1024, 58112, 1_000_000):
        lens = torch.randint(0, 20000, (batch, 1), dtype=torch.int32, device="cuda")
        runs = {
            kernel: functools.partial(dsv4x.get_paged_mqa_logits_metadata, lens, kernel=kernel)
            for kernel in kernels("get_paged_mqa_logits_metadata")
            if kernel != "deep_gemm" or batch <= 58112
        }
        rows += timed({"op": "schedule", "requests": batch}, runs)


def selection(rows: list[dict]) -> None:
    spread = torch.randn(TOPK_SHAPE, device="cuda")
    ties = (4 * spread).round() / 4
    few = torch.randn(64, 262144, device="cuda")
    for name, logits, ks in (("normal", spread, (512, 1024, 2048)), ("ties", ties, (512,)), ("few rows", few, (512,))):
        for k in ks:
            shape = {"op": "topk", "rows": logits.shape[0], "entries": logits.shape[1], "k": k, "values": name}
            runs = {
                BARE: functools.partial(torch.topk, logits, k, sorted=False),
                "triton": functools.partial(dsv4x.topk_transform, logits, None, k),
            }
            rows += timed(shape, runs)


def bounded(rows: list[dict]) -> None:
    """8192 decode rows over a million tokens each, 262 144 entries, all of one shared prefix; 256 MiB."""
    batch, entries, k = 8192, 262144, 512
    cache = random_cache(entries // PAGE)
    table = torch.arange(cache.pages, dtype=torch.int32, device="cuda").expand(batch, -1)
    q, weights = fp8(batch, 1, HEADS, 128), torch.randn(batch, HEADS, device="cuda")
    lens = torch.randint(entries // 2, entries + 1, (batch, 1), dtype=torch.int32, device="cuda")
    out = torch.empty(batch, k, dtype=torch.int32, device="cuda")
    for kernel in kernels("paged_mqa_logits"):
        for budget in (1 << 28, 1 << 31):
            # Compiles every kernel, for a fraction of the rows.
            dsv4x.paged_indexer_topk(
                q[:256], cache, weights[:256], lens[:256], table[:256], entries, k, logits_bytes=budget, kernel=kernel
            )
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            dsv4x.paged_indexer_topk(
                q, cache, weights, lens, table, entries, k, logits_bytes=budget, out=out, kernel=kernel
            )
            ended.record()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            shape = {"op": "bounded", "rows": batch, "entries": entries, "k": k, "logits_bytes": budget}
            rows.append({**shape, "kernel": kernel, "us": 1e3 * began.elapsed_time(ended), "peak_bytes": peak})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict] = []
    for measure in (schedule, paged, flat, selection, bounded):
        begin = len(rows)
        measure(rows)
        torch.cuda.empty_cache()
        for row in rows[begin:]:
            shown = (f"{v:.3g}" if isinstance(v, float) else str(v) for key, v in row.items() if key != "us")
            print(f"{row['us']:>10.1f} us  {'  '.join(shown)}", flush=True)
    write(arguments.out, heads=HEADS, page_size=PAGE, rows=rows)


if __name__ == "__main__":
    main()
