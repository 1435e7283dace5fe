"""A captured decode step of DeepSeek-V4, dsv4x beside the chain that servers run, a layer kind at a time and whole.

R requests of one token each behind ``context`` tokens; everything is as wide as a limit of a million tokens: logits of
262 144 columns, block tables, C128 rows of 8192 slots. Both arms read the same caches, index queries and rows.

- ``dsv4x``: ``StepMetadata.update`` in the graph, then a layer's ``sparse_attn_indexer`` and ``sparse_mla_attention``,
  kernels as prediction picks them.
- ``chain``: DeepGEMM's ``fp8_paged_mqa_logits`` bare, SGLang 0.5.23's v2 selection to slots, FlashMLA bare. Once a
  graph DeepGEMM's schedule, SGLang's plan and a schedule of FlashMLA for each kind. q is padded to 64 or 128 heads
  before the clock, and what a server's own metadata takes is left out: rows, lengths and slots are there. Neither
arm is given a buffer for its result: this FlashMLA takes none.

``window``, ``c4``, ``c128`` and ``indexer`` (logits and selection alone) are microseconds a layer: the difference of
graphs of ten layers and of two. ``model`` is a graph of 2 window, 21 C4 and 20 C128 layers with all that is made once.
The L2 is flushed before each layer, as the weights that a model reads between two of them do; the flushes' own time, of
graphs of flushes in the same turns, is taken off both arms.
Medians of replays; the arms take turns. Outputs and selections of both are compared before the clock starts.
``width`` is dsv4x's indexer where nothing is wider than the context, and at the limit.
``host`` has the host's microseconds of an eager indexer step, queued behind GPU work so that nothing waits.

``shared/peers/prepare.py`` lays SGLang's kernels out; they compile with nvcc on first use.

Usage: python benchmarks/decode_step.py --peers FOLDER --out benchmarks/results/decode-step-<gpu>.json
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from flash_mla import get_mla_metadata
from indexer import fp8, random_cache
from step import LIMIT, PAGE, Decode, host_us
from timing import Run, write

import dsv4x
from dsv4x import ExtraPages, TopkMethod

SHAPES = ((64, 512), (8, 512), (16, 1024), (128, 1024))
# The order covers the grid coarsely first.
POINTS = [
    *((r, 32768) for r in (1, 64, 256)),
    *((r, 4096) for r in (1, 64, 256)),
    *((r, 131072) for r in (1, 64, 256)),
    *((r, c) for c in (32768, 4096, 131072) for r in (8, 32, 128)),
]
MODEL = {"window": 2, "c4": 21, "c128": 20}
RATIOS = {"window": 1, "c4": 4, "c128": 128}
MORE, FEWER = 10, 2
FLUSHED = 96 << 20
INDEX_HEADS, ENTRIES = 64, LIMIT // 4
HOST_POINTS = ((1, 4096), (64, 4096), (256, 4096))


def replays(graphs: dict[Any, torch.cuda.CUDAGraph], count: int) -> dict[Any, float]:
    """The median microseconds of each graph's replays, all in turns."""
    times: dict[Any, list[float]] = {name: [] for name in graphs}
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for turn in range(count):
        for name in list(graphs)[:: 1 if turn % 2 else -1]:
            began.record()
            graphs[name].replay()
            ended.record()
            torch.cuda.synchronize()
            times[name].append(1e3 * began.elapsed_time(ended))
    return {name: statistics.median(found[2:]) for name, found in times.items()}


class Case(Decode):
    """A decode step with an index cache, for every shape of ``SHAPES``."""

    def __init__(self, requests: int, context: int, limit: int = LIMIT):
        super().__init__(requests, context, 128, 1024, limit)
        generator = torch.Generator("cuda").manual_seed(context)
        self.wide_q, self.wide_sink = self.q, self.sink
        cache, self.index_table = self.extra[4]
        self.index = random_cache(cache.pages)
        self.index_q = fp8(requests, INDEX_HEADS, 128)
        self.index_weights = torch.randn(requests, INDEX_HEADS, device="cuda", generator=generator)
        self.entries = torch.full((requests,), context // 4, dtype=torch.int32, device="cuda")
        self.passed = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")

    def take(self, heads: int, k: int, padded: bool) -> None:
        """Query heads, as they are or in a q of 64 or 128 whose others are zero, and entries to select."""
        whole = heads if not padded else max(64, heads)
        self.k = k
        self.q = torch.zeros(self.requests, whole, 512, dtype=torch.bfloat16, device="cuda")
        self.q[:, :heads] = self.wide_q[:, :heads]
        self.sink = torch.zeros(whole, device="cuda")
        self.sink[:heads] = self.wide_sink[:heads]
        self.slots = torch.empty(self.requests, k, dtype=torch.int32, device="cuda")

    def metadata(self) -> dsv4x.StepMetadata:
        extra = {
            ratio: ExtraPages(table, PAGE, cache.pages, topk=self.k if ratio == 4 else None)
            for ratio, (cache, table) in self.extra.items()
        }
        return dsv4x.StepMetadata.build(
            *self.given, extra, swa_page_size=PAGE, swa_pages=self.swa.pages, num_tokens=self.requests,
            max_seq_len=self.limit,
        )  # fmt: skip


class Ours:
    """dsv4x's arm, by the kernels that prediction picks in a graph."""

    def __init__(self, case: Case, heads: int, k: int):
        self.case, self.k = case, k
        case.take(heads, k, padded=False)
        self.step = case.metadata()
        self.q, self.sink, self.slots = case.q, case.sink, case.slots
        self.out: dict[int, torch.Tensor] = {}
        arch = dsv4x.platform.limits(self.q.device).arch
        shared = {"tokens": case.requests, "width": case.limit // 4}
        logits = dsv4x.Problem("paged_mqa_logits", "cuda", arch, heads=INDEX_HEADS, caches=(case.index.spec,), **shared)
        selection = dsv4x.Problem("topk_transform", "cuda", arch, k=k, method=TopkMethod.PAGED, **shared)
        self.kernels = {"logits": self._pick(logits), "selection": self._pick(selection)}
        for kind in RATIOS:
            arguments, options = self._layer(kind)
            explained = dsv4x.explain_step(
                *arguments, return_lse=False, path="direct", topk_slots=options.get("topk_slots")
            )
            self.kernels[kind] = self._pick(explained.problems["direct"])

    @staticmethod
    def _pick(problem: dsv4x.Problem) -> str:
        chosen = dsv4x.explain(problem, capturing=True).chosen
        assert chosen is not None
        return chosen

    def once(self, kinds: tuple[str, ...]) -> None:
        self.case.update(self.step)

    def indexer(self) -> None:
        case = self.case
        dsv4x.sparse_attn_indexer(
            case.index_q, case.index, case.index_weights, self.step[4], self.k, TopkMethod.PAGED, next_n=1,
            out=self.slots, kernel=self.kernels["logits"], topk_kernel=self.kernels["selection"],
        )  # fmt: skip

    def _layer(self, kind: str) -> tuple[tuple[object, ...], dict[str, torch.Tensor]]:
        ratio = RATIOS[kind]
        cache = None if ratio == 1 else self.case.extra[ratio][0]
        chosen = {"topk_slots": self.slots, "topk_lens": self.step[4].extra_lens} if ratio == 4 else {}
        return (self.q, self.case.swa, cache, self.step[ratio]), chosen

    def attention(self, kind: str) -> None:
        arguments, options = self._layer(kind)
        self.out[RATIOS[kind]], _ = dsv4x.sparse_mla_attention(
            *arguments, attn_sink=self.sink, return_lse=False, path="direct", kernel=self.kernels[kind], **options
        )


class Chain:
    """The kernels that servers call, bare."""

    def __init__(self, case: Case, heads: int, k: int):
        import deep_gemm
        from sglang.kernels.ops.attention.dsv4 import topk

        self.case, self.k, self.deep_gemm, self.topk = case, k, deep_gemm, topk
        case.take(heads, k, padded=True)
        self.step = case.metadata()
        self.slots, self.out = case.slots, {}
        self.plan = topk.plan_topk_v2(case.entries)
        self.schedules: dict[str, object] = {}
        # Of a fresh schedule each, so that a graph's first layer of a kind makes it.
        self.calls: dict[str, Callable[[], object]] = {}
        self.make = {
            kind: functools.partial(case.flash_mla, self.step, ratio, slots=self.slots if ratio == 4 else None)
            for kind, ratio in RATIOS.items()
        }
        self.q, self.sink = case.q, case.sink

    def once(self, kinds: tuple[str, ...]) -> None:
        self.case.q, self.case.sink = self.q, self.sink
        for kind in kinds:
            if kind != "indexer":
                self.calls[kind] = self.make[kind](schedule=get_mla_metadata()[0])
        if "c4" in kinds or "indexer" in kinds:
            self.schedule = self.deep_gemm.get_paged_mqa_logits_metadata(
                self.case.entries[:, None], PAGE, self.deep_gemm.get_num_sms()
            )
            self.topk.plan_topk_v2(self.case.entries, out=self.plan)

    def indexer(self) -> None:
        case = self.case
        logits = self.deep_gemm.fp8_paged_mqa_logits(
            case.index_q[:, None], case.index.servers_view, case.index_weights, case.entries[:, None],
            case.index_table, self.schedule, ENTRIES,
        )  # fmt: skip
        self.topk.topk_transform_paged_v2(logits, case.entries, case.index_table, self.slots, PAGE, self.plan)

    def attention(self, kind: str) -> None:
        self.out[RATIOS[kind]] = self.calls[kind]()[0][:, 0]


def flushes(case: Case, count: int) -> None:
    """The L2 flushed so many times."""
    for _ in range(count):
        case.passed.zero_()


def layers(arm: Ours | Chain, counts: dict[str, int]) -> None:
    """What is made once, and so many layers of each kind; ``indexer`` is a C4 layer's without its attention."""
    arm.once(tuple(counts))
    for kind, count in counts.items():
        for _ in range(count):
            flushes(arm.case, 1)
            if kind in ("c4", "indexer"):
                arm.indexer()
            if kind != "indexer":
                arm.attention(kind)


def layer_us(case: Case, arms: Mapping[str, Ours | Chain], kind: str, count: int) -> dict[str, float]:
    """Microseconds of one layer of this kind, of each arm, without the flush before it."""
    runs = {(name, n): functools.partial(layers, arm, {kind: n}) for name, arm in arms.items() for n in (FEWER, MORE)}
    runs |= {("flush", n): functools.partial(flushes, case, n) for n in (FEWER, MORE)}
    times = replays({key: graph_of(run) for key, run in runs.items()}, count)
    each = {name: (times[name, MORE] - times[name, FEWER]) / (MORE - FEWER) for name in (*arms, "flush")}
    return {name: each[name] - each["flush"] for name in arms}


def graph_of(run: Run) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def differences(ours: Ours, chain: Chain, heads: int) -> dict[str, float]:
    """The share of entries that only one of both selected, and the largest distance of outputs."""
    one, other = ours.slots.sort(1).values, chain.slots.sort(1).values
    found = {"selection": (one != other).float().mean().item()}
    for kind, ratio in RATIOS.items():
        got, want = ours.out[ratio][:, :heads].float(), chain.out[ratio][:, :heads].float()
        found[kind] = (got - want).abs().max().item()
    return found


def measure(case: Case, heads: int, k: int, peers: bool, count: int) -> dict[str, object]:
    arms: dict[str, Ours | Chain] = {"dsv4x": Ours(case, heads, k)}
    if peers:
        arms["chain"] = Chain(case, heads, k)
    for arm in arms.values():
        layers(arm, dict.fromkeys(RATIOS, 1))
    torch.cuda.synchronize()
    row: dict[str, object] = {}
    if peers:
        row["difference"] = differences(arms["dsv4x"], arms["chain"], heads)
        if max(row["difference"].values()) > 0.01:
            print("BAD", row["difference"], flush=True)
    row["kernels"] = arms["dsv4x"].kernels
    us = {kind: layer_us(case, arms, kind, count) for kind in ("window", "indexer", "c4", "c128")}
    graphs = {name: graph_of(functools.partial(layers, arm, MODEL)) for name, arm in arms.items()}
    graphs["flush"] = graph_of(functools.partial(flushes, case, sum(MODEL.values())))
    times = replays(graphs, max(5, count // 2))
    us["model"] = {name: times[name] - times["flush"] for name in arms}
    row["us"] = {kind: {name: round(value, 2) for name, value in times.items()} for kind, times in us.items()}
    if peers:
        # Above 1 dsv4x is ahead.
        row["chain_over_dsv4x"] = {kind: round(t["chain"] / t["dsv4x"], 3) for kind, t in us.items()}
    return row


def width(requests: int, context: int, count: int) -> dict[str, object]:
    """The indexer's microseconds a layer where everything is as wide as the context, and as the limit."""
    times = {}
    for name, limit in (("narrow", context), ("wide", LIMIT)):
        ours = Ours(Case(requests, context, limit), 64, 512)
        layers(ours, {"indexer": 1})
        times[name] = round(layer_us(ours.case, {"dsv4x": ours}, "indexer", count)["dsv4x"], 2)
    return {"requests": requests, "context": context, "us": times}


def host(case: Case, peers: bool) -> dict[str, float]:
    """Host microseconds of eager calls: the indexer's of a layer, the step's refill, both."""
    ours = Ours(case, 64, 512)
    layers(ours, {"c4": 1})

    def both() -> None:
        ours.once(())
        ours.indexer()

    def by_hand() -> None:
        lens = case.entries[:, None]
        dsv4x.paged_indexer_topk(
            case.index_q[:, None], case.index, case.index_weights, lens, case.index_table, ENTRIES, 512,
            TopkMethod.PAGED, schedule=dsv4x.get_paged_mqa_logits_metadata(lens), out=ours.slots,
        )  # fmt: skip

    logits = torch.empty(case.requests, ENTRIES, device="cuda")
    selection = functools.partial(
        dsv4x.topk_transform, logits, case.entries, 512, TopkMethod.PAGED, block_table=case.index_table,
        page_size=PAGE, pages=case.index.pages, out=ours.slots, kernel=ours.kernels["selection"],
    )  # fmt: skip
    runs: dict[str, Run] = {
        "sparse_attn_indexer": ours.indexer, "topk_transform alone": selection,
        "update": functools.partial(ours.once, ()), "update and indexer": both,
        "paged_indexer_topk with its schedule": by_hand,
    }  # fmt: skip
    if peers:
        chain = Chain(case, 64, 512)
        layers(chain, {"indexer": 1})
        runs["chain"] = chain.indexer

        def planned() -> None:
            chain.once(("indexer",))
            chain.indexer()

        runs["chain with schedule and plan"] = planned
    return host_us(runs, rounds=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="the folder of prepare.py; without it dsv4x is timed alone")
    parser.add_argument("--out", type=Path, help="write the rows as JSON here, whenever there is one more")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further point is begun")
    parser.add_argument("--replays", type=int, default=12)
    parser.add_argument("--host", action="store_true", help="the host's times alone")
    arguments = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(0)
    if arguments.peers is not None:
        sys.path.append(str(arguments.peers))
    peers = arguments.peers is not None
    save = functools.partial(write, arguments.out, indent=None, limit=LIMIT, replays=arguments.replays)
    rows: list[dict[str, object]] = []
    hosts: list[dict[str, object]] = []
    widths: list[dict[str, object]] = []
    for requests, context in HOST_POINTS if arguments.host else POINTS:
        if time.perf_counter() - began > arguments.budget:
            print(f"budget spent before {requests} x {context}", flush=True)
            break
        case = Case(requests, context)
        for heads, k in () if arguments.host else SHAPES:
            row = measure(case, heads, k, peers, arguments.replays)
            rows.append({"requests": requests, "context": context, "heads": heads, "k": k, **row})
            seconds = time.perf_counter() - began
            print(f"{seconds:6.1f} s {requests:>4} {context:>7} {heads:>4} {k:>5}  {row['us']}", flush=True)
            save(host=hosts, width=widths, rows=rows)
        if (requests, context) in HOST_POINTS:
            hosts.append({"requests": requests, "host_us": host(case, peers)})
            widths.append(width(requests, context, arguments.replays))
            print(hosts[-1], widths[-1], flush=True)
        del case
        torch.cuda.empty_cache()
    save(host=hosts, width=widths, rows=rows)


if __name__ == "__main__":
    main()
