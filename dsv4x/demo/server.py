"""``python -m dsv4x demo``: the DSv4-shaped layer over a text, served in mixed batches from paged caches and checked.

:class:`PagedServer` is what a server does around dsv4x in one layer, at its smallest: block tables, slots, inserts,
the indexer of a C4 layer, metadata, one attention call a step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import (
    AttentionMetadata,
    CacheLayout,
    PagedCache,
    explain,
    gather_indexer_k,
    indexer_context_lens,
    indexer_topk,
    layouts,
    paged_indexer_topk,
    platform,
    quantize_and_insert_k_cache,
    topk_method,
)
from ..common.core.model import LayerKind
from ..common.dispatch.problem import Problem
from ..common.step.attention import explain_step, paths_of, sparse_mla_attention
from .layer import Layer, Sequence

MAX_ERROR = 4e-3
"""Of the dense layer over the stored entries, relative: twice what rounding weights and output to bf16 costs."""
MAX_FP8_ERROR = 3e-2
"""Of the dense layer over exact entries, relative: e4m3 keeps 3 bits behind the leading one."""
MAX_NEXT_N = 4
"""Queries a request up to which the demo's server takes a step for decode or verification."""
MAX_LSE_ERROR = 1e-4
"""Of lse, relative, over the stored entries."""


def readme() -> str:
    """dsv4x's README: from the checkout, or from the installed distribution, whose description it is."""
    path = Path(__file__).resolve().parents[2] / "README.md"
    return path.read_text() if path.exists() else importlib.metadata.metadata("dsv4x")["Description"]


class PagedServer:
    """Sequences of one layer in paged caches, advanced any number of tokens at a time.

    Block tables are a random permutation of the pool with garbage behind each sequence's last page.
    """

    def __init__(
        self,
        layer: Layer,
        sequences: list[Sequence],
        *,
        swa_page_size: int = 64,
        extra_page_size: int = 64,
        seed: int = 0,
    ):
        self.layer, self.sequences = layer, sequences
        self.device = sequences[0].q.device
        self.done = [0] * len(sequences)
        shuffle = random.Random(seed)
        self.swa, self.swa_table = self._pool([len(s.raw) for s in sequences], swa_page_size, shuffle)
        self.extra: PagedCache | None = None
        self.extra_table: torch.Tensor | None = None
        self.index: PagedCache | None = None
        if layer.compress_ratio > 1:
            self.extra, self.extra_table = self._pool([len(s.compressed) for s in sequences], extra_page_size, shuffle)
        if layer.compress_ratio == 4 and self.extra is not None:
            # The indexer's entries stand on pages of the same numbers.
            self.index = self._garbage(self.extra.pages, layer.index_layout, extra_page_size)

    def _pool(self, lengths: list[int], page_size: int, shuffle: random.Random) -> tuple[PagedCache, torch.Tensor]:
        needed = [-(-length // page_size) for length in lengths]
        pages = list(range(sum(needed) + 3))
        shuffle.shuffle(pages)
        cache = self._garbage(len(pages), layouts.DSV4, page_size)
        garbage = (-(2**31), -7, 10**6, 2**31 - 1)
        table = [[pages.pop() for _ in range(n)] for n in needed]
        width = max(needed) + 2
        rows = [row + [shuffle.choice(garbage) for _ in range(width - len(row))] for row in table]
        return cache, torch.tensor(rows, dtype=torch.int32, device=self.device)

    def _garbage(self, pages: int, layout: CacheLayout, page_size: int) -> PagedCache:
        cache = PagedCache.zeros(pages, layout, page_size, self.device)
        # Bytes nobody stored are NaN: an entry read by mistake cannot go unseen.
        cache.data.fill_(0xFF)
        return cache

    def step(
        self, queries: list[int], *, path: str | None = None, kernel: str | None = None, padding: int = 0
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], StepReport]:
        """Advance sequence i by ``queries[i]`` tokens (0 for none). Returns each one's out and lse, and a report."""
        ratio, layer = self.layer.compress_ratio, self.layer
        q = []
        for i, (sequence, count) in enumerate(zip(self.sequences, queries)):
            start, end = self.done[i], self.done[i] + count
            self._insert(self.swa, self.swa_table[i], sequence.raw, start, end)
            if self.extra is not None and self.extra_table is not None:
                self._insert(self.extra, self.extra_table[i], sequence.compressed, start // ratio, end // ratio)
                if self.index is not None and sequence.index_k is not None:
                    self._insert(self.index, self.extra_table[i], sequence.index_k, start // ratio, end // ratio)
            q.append(sequence.q[start:end])
            self.done[i] = end
        q.append(torch.full((padding, *q[0].shape[1:]), torch.nan, dtype=torch.bfloat16, device=self.device))
        indices = None
        if self.index is not None:
            unused = torch.full((padding, layer.topk), 2**31 - 1, dtype=torch.int32, device=self.device)
            indices = torch.cat([self._select(queries, kernel), unused])
        starts = torch.tensor([0, *queries], dtype=torch.int64, device="cpu").cumsum(0)
        meta = AttentionMetadata.build(
            starts.int().to(self.device),
            torch.tensor(self.done, dtype=torch.int32, device=self.device),
            self.swa_table,
            self.extra_table,
            compress_ratio=ratio,
            swa_page_size=self.swa.page_size,
            swa_pages=self.swa.pages,
            extra_page_size=self.extra.page_size if self.extra else None,
            extra_pages=self.extra.pages if self.extra else None,
            topk=layer.topk if self.index is not None else None,
            window_size=layer.window_size,
            num_tokens=int(starts[-1]) + padding,
        )
        batch = torch.cat(q)
        explanation = explain_step(batch, self.swa, self.extra, meta, indices, kernel, path=path)
        taken = path or explanation.chosen or "direct"
        ran = explanation.kernels.get(taken, kernel)
        began = _now(self.device)
        out, lse = sparse_mla_attention(
            batch, self.swa, self.extra, meta, indices, layer.attn_sink, path=taken, kernel=ran
        )
        assert lse is not None
        assert ran is not None
        seconds = _now(self.device) - began
        report = StepReport(taken, ran, explanation.problems[taken], seconds, batch, self, meta, indices)
        sizes = [*queries, padding]
        return list(out.split(sizes))[: len(queries)], list(lse.split(sizes))[: len(queries)], report

    def _select(self, queries: list[int], kernel: str | None) -> torch.Tensor:
        """int32 ``[sum of queries, topk]``: the entries each of the step's queries reads, local ones.

        Requests of as many queries each, and few, read the index pages in place; mixed chunks read gathered rows.
        """
        assert self.index is not None
        assert self.extra_table is not None
        ratio, topk = self.layer.compress_ratio, self.layer.topk
        method = topk_method("sparse_mla_attention")
        # The kernel asked for is attention's; these two have the indexer's kernels as well.
        name = kernel if kernel in ("triton", "reference") else None
        active = [i for i, count in enumerate(queries) if count]
        index_q, weights = [], []
        for i in active:
            sequence, end = self.sequences[i], self.done[i]
            assert sequence.index_q is not None
            assert sequence.index_weights is not None
            index_q.append(sequence.index_q[end - queries[i] : end])
            weights.append(sequence.index_weights[end - queries[i] : end])
        if not active:
            return torch.empty(0, topk, dtype=torch.int32, device=self.device)
        # torch concatenates FP8 as bytes only.
        q = torch.cat([part.view(torch.uint8) for part in index_q]).view(index_q[0].dtype)
        seq_lens = torch.tensor([self.done[i] for i in active], dtype=torch.int32, device=self.device)
        counts = {queries[i] for i in active}
        if len(counts) == 1 and max(counts) <= MAX_NEXT_N:
            next_n = counts.pop()
            lens = indexer_context_lens(seq_lens, next_n, ratio)
            return paged_indexer_topk(
                q.view(len(active), next_n, *q.shape[1:]), self.index, torch.cat(weights), lens,
                self.extra_table[active], max(self.done) // ratio, topk, method, kernel=name, topk_kernel=name,
            )  # fmt: skip
        slots, ks, ke, base = [], [], [], 0
        for i in active:
            entries, end = self.done[i] // ratio, self.done[i]
            position = torch.arange(end - queries[i], end, dtype=torch.int64, device=self.device)
            slots.append(self._slots(self.index, self.extra_table[i], 0, entries))
            ks.append(torch.full((queries[i],), base, dtype=torch.int64, device=self.device))
            ke.append(base + (position + 1) // ratio)
            base += entries
        k, k_scale = gather_indexer_k(self.index, torch.cat(slots))
        starts, ends = (torch.cat(x).int() for x in (ks, ke))
        return indexer_topk(
            q, k, k_scale, torch.cat(weights), starts, ends, topk, method, kernel=name, topk_kernel=name
        )

    def _insert(self, cache: PagedCache, table: torch.Tensor, entries: torch.Tensor, start: int, end: int) -> None:
        quantize_and_insert_k_cache(entries[start:end], cache, self._slots(cache, table, start, end))

    def _slots(self, cache: PagedCache, table: torch.Tensor, start: int, end: int) -> torch.Tensor:
        local = torch.arange(start, end, dtype=torch.int64, device=self.device)
        return table.long()[local // cache.page_size] * cache.page_size + local % cache.page_size


@dataclass(frozen=True)
class StepReport:
    """How a step ran: path, attention kernel and its problem, seconds in the call, and what it was made of."""

    path: str
    kernel: str
    problem: Problem
    seconds: float
    q: torch.Tensor
    server: PagedServer
    meta: AttentionMetadata
    topk: torch.Tensor | None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def mixed_schedule(lengths: list[int], seed: int = 0) -> Iterator[list[int]]:
    """Query counts a step until every sequence is done: prefill chunks, single tokens, 3-token verifies, nothing."""
    rng = random.Random(seed)
    left = list(lengths)
    while any(left):
        step = [min(n, rng.choice((0, 1, 1, 3, max(1, length // 3)))) for n, length in zip(left, lengths)]
        left = [n - s for n, s in zip(left, step)]
        yield step


def relative_error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return float((values.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def tokens_of(text: str, limit: int, device: torch.device) -> torch.Tensor:
    """UTF-8 bytes as tokens, the text repeated if it is shorter than one window."""
    data = text.encode() or b"\n"
    data = (data * (-(-256 // len(data))))[:limit]
    return torch.tensor(list(data), dtype=torch.long, device=device)


@dataclass(frozen=True)
class Outcome:
    """A served layer against the dense one.

    Attributes:
        error, lse_error: relative, over the entries as stored.
        fp8_error: relative, over exact entries.
        report: the largest step's.
        seconds: that step's attention call, repeated warm.
    """

    error: float
    lse_error: float
    fp8_error: float
    report: StepReport
    seconds: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= MAX_ERROR and self.lse_error <= MAX_LSE_ERROR and self.fp8_error <= MAX_FP8_ERROR


def serve_and_check(
    layer: Layer, sequences: list[Sequence], *, path: str | None = None, kernel: str | None = None, seed: int = 0
) -> Outcome:
    """Serve every sequence to its end in mixed batches and compare with :meth:`Layer.dense`."""
    server = PagedServer(layer, sequences, seed=seed)
    outs: list[list[torch.Tensor]] = [[] for _ in sequences]
    lses: list[list[torch.Tensor]] = [[] for _ in sequences]
    largest: StepReport | None = None
    for step in mixed_schedule([len(s.raw) for s in sequences], seed):
        pieces, lse_pieces, report = server.step(step, path=path, kernel=kernel, padding=2)
        for i in range(len(sequences)):
            outs[i].append(pieces[i])
            lses[i].append(lse_pieces[i])
        if largest is None or report.q.shape[0] >= largest.q.shape[0]:
            largest = report
    assert largest is not None
    stored = [layer.dense(s, stored=True) for s in sequences]
    served, expected = torch.cat([p for mine in outs for p in mine]), torch.cat([out for out, _ in stored])
    exact = torch.cat([layer.dense(s, stored=False)[0] for s in sequences])
    began = _now(server.device)
    sparse_mla_attention(
        largest.q, server.swa, server.extra, largest.meta, largest.topk, layer.attn_sink,
        path=largest.path, kernel=kernel,
    )  # fmt: skip
    seconds = _now(server.device) - began
    lse_error = relative_error(torch.cat([p for mine in lses for p in mine]), torch.cat([lse for _, lse in stored]))
    return Outcome(relative_error(served, expected), lse_error, relative_error(served, exact), largest, seconds)


def main(arguments: argparse.Namespace) -> int:
    """Run the demo; 1 when an error is above tolerance."""
    device = torch.device("cpu" if platform.backend == "reference" else "cuda")
    on_gpu = device.type == "cuda"
    heads = (64 if on_gpu else 8) if arguments.heads is None else arguments.heads
    text = readme() if arguments.text is None else arguments.text.read_text(errors="replace")
    limit = (4096 if on_gpu else 768) if arguments.tokens is None else arguments.tokens
    tokens = tokens_of(text, limit, device)
    parts = [tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :: 2], tokens[: len(tokens) // 7], tokens[:1]]
    print(f"dsv4x demo: backend {platform.backend} ({platform.reason}), arch {platform.arch}")
    source = arguments.text or "README.md"
    print(f"{source}: {len(tokens)} byte tokens, {heads} heads, {len(parts)} requests in mixed batches")
    print("relative errors; error and lse: of the dense layer over what the fp8 cache holds, fp8: over exact entries")
    print("ms: the attention call of the largest batch, warm\n")
    print(f"{'layer':<14}{'path':<12}{'kernel':<11}{'tokens':>7}{'error':>11}{'lse':>10}{'fp8':>10}{'ms':>9}")
    refusals: dict[str, list[str]] = {}
    failed = False
    for ratio, kind in ((1, "window (r=1)"), (4, "C4 (r=4)"), (128, "C128 (r=128)")):
        layer = Layer(ratio, heads, topk=arguments.topk, device=device, seed=ratio)
        sequences = [layer.sequence(part) for part in parts]
        for path in paths_of(LayerKind.of(ratio, None, ratio > 1)):
            outcome = serve_and_check(layer, sequences, path=path, kernel=arguments.kernel)
            explanation, ran = explain(outcome.report.problem), outcome.report.kernel
            failed |= not outcome.passed
            print(
                f"{kind:<14}{path:<12}{ran:<11}{outcome.report.q.shape[0]:>7}"
                f"{outcome.error:>11.2e}{outcome.lse_error:>10.2e}{outcome.fp8_error:>10.2e}"
                f"{outcome.seconds * 1e3:>9.2f}{'' if outcome.passed else '  ABOVE TOLERANCE'}"
            )
            for other, reasons in explanation.reasons.items():
                predicted = explanation.predicted_us.get(other)
                if other != ran:
                    slower = [f"supported, predicted {predicted:.0f} us"] if predicted is not None else []
                    refusals.setdefault(f"{other} for {explanation.problem.op}", reasons or slower)
    print("\nwhy the others did not run")
    for line, reasons in refusals.items():
        print(f"  {line}: {'; '.join(reasons)}")
    print(f"\n{'FAILED' if failed else 'ok'}: tolerances {MAX_ERROR:g}, {MAX_LSE_ERROR:g}, {MAX_FP8_ERROR:g}")
    return int(failed)
