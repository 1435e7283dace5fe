"""What a step costs before and around attention: its metadata, a layer call's host time, and rows that are wide.

- ``metadata``: StepMetadata for all three kinds of a decode step of R requests, C128 rows as wide as a limit of a
  million tokens: GPU time of an update in a graph, host time of an eager build and of an eager update.
- ``host``: microseconds of the host for a warm layer call of the step, beside FlashMLA's bare call of the same work,
  taken in turns; each is queued behind enough GPU work that no call waits. ``gluon alone`` is what the kernel's
  prepared call takes without the step: its allocations and launches.
- ``width``: a captured C128 layer whose rows are as wide as the limit and hold 40 entries, beside one whose rows are 64
  wide.

Usage: python benchmarks/step.py --out benchmarks/results/step-h100.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from flash_mla import flash_mla_with_kvcache, get_mla_metadata
from timing import captured, compare_us, write

import dsv4x
from dsv4x import ExtraPages, PagedCache, StepMetadata, layouts
from dsv4x.common.core.calls import DecodeCall
from dsv4x.common.dispatch import registry

LIMIT, PAGE = 1 << 20, 64
RATIOS = (1, 4, 128)


class Decode:
    """A decode step of R requests of ``context`` tokens, one token each, as a server holds it."""

    def __init__(self, requests: int, context: int, heads: int = 64, topk: int = 512, limit: int = LIMIT):
        self.requests, self.limit = requests, limit
        generator = torch.Generator("cuda").manual_seed(requests)
        self.starts = torch.arange(requests + 1, dtype=torch.int32, device="cuda")
        self.lens = torch.full((requests,), context, dtype=torch.int32, device="cuda")
        self.swa, self.swa_table = self._pool(1, context, generator)
        self.extra = {ratio: self._pool(ratio, context, generator) for ratio in (4, 128)}
        self.q = torch.randn(requests, heads, 512, device="cuda", generator=generator).bfloat16()
        self.sink = torch.randn(heads, device="cuda", generator=generator)
        self.out = torch.empty_like(self.q)
        every = torch.arange(topk, dtype=torch.int32, device="cuda").expand(requests, topk)
        chosen = torch.rand(requests, topk, device="cuda", generator=generator) * (context // 4)
        self.topk = (chosen.int() if context // 4 > topk else torch.where(every < context // 4, every, -1)).contiguous()

    def _pool(self, ratio: int, context: int, generator: torch.Generator) -> tuple[PagedCache, torch.Tensor]:
        used = -(-(context // ratio) // PAGE)
        pages = self.requests * used + 1
        small = PagedCache.zeros(64, layouts.DSV4, PAGE, "cuda")
        k = (torch.randn(small.capacity, 512, device="cuda", generator=generator) / 10).bfloat16()
        dsv4x.quantize_and_insert_k_cache(k, small, torch.arange(small.capacity, device="cuda"))
        cache = PagedCache(small.data.repeat(-(-pages // 64), 1)[:pages].contiguous(), layouts.DSV4, PAGE)
        table = torch.zeros(self.requests, -(-self.limit // ratio // PAGE), dtype=torch.int32, device="cuda")
        order = torch.randperm(pages - 1, generator=generator, device="cuda").int() + 1
        table[:, :used] = order[: self.requests * used].view(self.requests, used)
        return cache, table

    @property
    def given(self) -> tuple[object, ...]:
        return self.starts, self.lens, self.swa_table

    def build(self, ratios: tuple[int, ...] = (4, 128), **options: object) -> StepMetadata:
        extra = {ratio: ExtraPages(self.extra[ratio][1], PAGE, self.extra[ratio][0].pages) for ratio in ratios}
        return StepMetadata.build(
            *self.given, extra, swa_page_size=PAGE, swa_pages=self.swa.pages, num_tokens=self.requests,
            max_seq_len=self.limit, **options,
        )  # fmt: skip

    def update(self, step: StepMetadata) -> None:
        step.update(*self.given, {ratio: self.extra[ratio][1] for ratio in step.kinds})

    def layer(self, step: StepMetadata, ratio: int, **options: object) -> object:
        cache = self.extra[ratio][0] if ratio > 1 else None
        topk = {"topk_indices": self.topk, "topk_lens": step[4].extra_lens} if ratio == 4 else {}
        return dsv4x.sparse_mla_attention(
            self.q, self.swa, cache, step[ratio], attn_sink=self.sink, out=self.out, return_lse=False, **topk, **options
        )

    def flash_mla(
        self, step: StepMetadata, ratio: int, schedule: object = None, slots: torch.Tensor | None = None
    ) -> Callable[[], object]:
        """A bare call over rows that are slots already, its schedule made, or shared with other calls."""
        meta, extra = step[ratio], {}
        schedule = get_mla_metadata()[0] if schedule is None else schedule
        if ratio > 1:
            rows = meta.extra_indices if slots is None else slots
            if ratio == 4 and slots is None:
                rows = dsv4x.local_to_slots(
                    self.topk, meta.request, meta.visible, meta.extra_block_table, PAGE, meta.extra_pages
                )
            extra = {
                "extra_k_cache": self.extra[ratio][0].servers_view, "extra_indices_in_kvcache": rows[:, None],
                "extra_topk_length": meta.extra_lens.clamp_max(rows.shape[1]),
            }  # fmt: skip
        q, view, indices = self.q[:, None], self.swa.servers_view, meta.swa_indices[:, None]
        return lambda: flash_mla_with_kvcache(
            q, view, None, None, 512, schedule, None, 512**-0.5, False, True, indices, self.sink,
            topk_length=meta.swa_lens, use_legacy=True, **extra,
        )  # fmt: skip


def alone(case: Decode, ratio: int) -> Callable[[], object]:
    """The Gluon kernel's prepared call of a layer of the step, by itself."""
    record, seen = registry.find("sparse_mla_decode", "gluon"), []

    def prepare(call: DecodeCall) -> Callable[[DecodeCall], object]:
        seen.append(call)
        return record.prepare(call)

    with registry.replaced(dataclasses.replace(record, prepare=prepare)):
        case.layer(case.build(), ratio, path="direct", kernel="gluon")
    return functools.partial(record.prepare(seen[0]), seen[0])


def host_us(runs: dict[str, Callable[[], object]], rounds: int = 30, calls: int = 20) -> dict[str, float]:
    """The median of each's host time a call, all in turns; the GPU is kept busy, so that none waits for it."""
    busy = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            torch.cuda.synchronize()
            for _ in range(24):
                busy.fill_(0)
            began = time.perf_counter()
            for _ in range(calls):
                runs[name]()
            times[name].append((time.perf_counter() - began) / calls * 1e6)
    torch.cuda.synchronize()
    return {name: statistics.median(found) for name, found in times.items()}


def metadata() -> list[dict[str, object]]:
    rows = []
    for requests in (1, 64, 256):
        for context in (4096, 131072):
            case = Decode(requests, context if requests < 256 or context < 10**5 else 32768)
            step = case.build()
            gpu = compare_us({"update": captured(lambda case=case, step=step: case.update(step))})["update"]
            host = host_us({"build": case.build, "update": lambda case=case, step=step: case.update(step)})
            rows.append({"requests": requests, "context": int(case.lens[0]), "gpu_update_us": gpu, "host_us": host})
            print(rows[-1], flush=True)
    return rows


def host() -> list[dict[str, object]]:
    rows = []
    for requests in (1, 32):
        case = Decode(requests, 4096)
        step = case.build()
        for ratio in RATIOS:
            layer = functools.partial(case.layer, step, ratio)
            runs = {"flash_mla bare": case.flash_mla(step, ratio), "dsv4x": layer}
            for kernel in ("gluon", "flash_mla"):
                runs[f"dsv4x {kernel}"] = functools.partial(layer, path="direct", kernel=kernel)
            runs["gluon alone"] = alone(case, ratio)
            rows.append({"requests": requests, "ratio": ratio, "host_us": host_us(runs)})
            print(rows[-1], flush=True)
    return rows


def width() -> list[dict[str, object]]:
    rows = []
    for requests in (1, 8, 64, 256):
        runs = {}
        for name, limit in (("narrow", 64 * 128), ("wide", LIMIT)):
            case = Decode(requests, 40 * 128 + 5, limit=limit)
            step = case.build((128,))
            for kernel in ("gluon", "triton", "flash_mla"):

                def run(case=case, step=step, kernel=kernel):
                    for _ in range(8):
                        case.layer(step, 128, path="direct", kernel=kernel)

                runs[f"{kernel} {name}"] = captured(run)
        times = {name: us / 8 for name, us in compare_us(runs).items()}
        rows.append({"requests": requests, "entries": 40, "us": times})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    write(arguments.out, metadata=metadata(), host=host(), width=width())


if __name__ == "__main__":
    main()
