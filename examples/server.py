"""A small paged server of a model with a window layer, a C4 layer and a C128 layer.

Run it: ``python examples/server.py``, on a CPU or a GPU. It serves four requests in mixed batches, compares every step
with float64 attention that knows no pages, and prints the worst error; it exits with 1 where that is too large.

What is whose:

- The model's: weights, norms, RoPE, the compressor. Here weights are random, norms and RoPE are left out, and a
  compressed entry is the plain mean of its group's projections. DeepSeek-V4 pools by learned gates.
- The server's, in this file: pages and their numbers, block tables, which entries a step writes and where, the
  compressor's state between steps, batches, sharing of prefixes, drafts, the capture.
- dsv4x's: a step's metadata, quantized inserts, the indexer, attention.

``Server.decode`` is captured into a graph on a GPU and replayed at other lengths. On a CPU it runs eagerly.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import dsv4x
from dsv4x import CacheLayout, ExtraPages, PagedCache, StepMetadata, layouts, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEATS, BOUND = 4, 1024  # requests at a time, raw tokens of the longest
BLOCK = 256  # raw tokens a page stands for: 256 raw entries, 64 of C4, 2 of C128
MIXED_ROWS, DECODE_ROWS = 192, 8  # query tokens a step at most, padding included
RATIOS = (1, 4, 128)  # one layer each
VOCABULARY, HIDDEN, HEADS, DIM, WINDOW = 512, 64, 8, 512, 128
INDEX_HEADS, INDEX_DIM, TOPK = 32, 128, 64
FLAVOUR = "e4m3fnuz" if dsv4x.platform.limits(DEVICE).fp8 == "e4m3fnuz" else "e4m3fn"  # gfx942 has its own
INDEX_LAYOUT = layouts.INDEXER_FP8.with_flavour(FLAVOUR)
MAX_ERROR = {"out": 4e-3, "lse": 1e-4, "selection": 1e-2}  # relative; rounding to bf16 costs out about 2e-3
# Of one layer in a step, for the oracle: q, k, parts, index_q, index_weights, topk, out, lse; a row a query token.
Seen = tuple[Tensor | None, ...]


class Layer:
    """The model's weights of one layer."""

    def __init__(self, ratio: int, rng: torch.Generator):
        def weight(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns, generator=rng) * rows**-0.5).to(DEVICE)

        self.ratio = ratio
        self.q, self.k, self.o = weight(HIDDEN, HEADS * DIM), weight(HIDDEN, DIM), weight(HEADS * DIM, HIDDEN)
        self.sink = weight(1, HEADS)[0]
        # What is pooled: a compressed entry, and with it the indexer's key.
        self.compress = weight(HIDDEN, DIM + (INDEX_DIM if ratio == 4 else 0))
        self.index_q, self.index_weights = weight(HIDDEN, INDEX_HEADS * INDEX_DIM), weight(HIDDEN, INDEX_HEADS)


class Pages:
    """The page numbers of one compress ratio and its block table. Every layer of that ratio has them in its own cache.

    A page stands for the same raw tokens at every ratio. So a full page ends where a pooling group ends, and requests
    that share full pages share no unfinished group.
    """

    def __init__(self, ratio: int):
        self.ratio, self.page_size, self.count = ratio, BLOCK // ratio, SEATS * BOUND // BLOCK
        self.free = list(range(self.count))
        self.users = [0] * self.count
        self.rows = [[-1] * (BOUND // BLOCK) for _ in range(SEATS)]
        self.table = torch.full((SEATS, BOUND // BLOCK), -1, dtype=torch.int32, device=DEVICE)

    def cache(self, layout: CacheLayout) -> PagedCache:
        cache = PagedCache.zeros(self.count, layout, self.page_size, DEVICE)
        cache.data.fill_(0xFF)  # NaN: an entry that nobody wrote cannot be read unseen
        return cache

    def reach(self, seat: int, begin: int, end: int) -> None:
        """Room for tokens ``begin`` to ``end`` of a request; raw pages wholly before their windows go back."""
        first = max(0, begin - WINDOW + 1) // BLOCK if self.ratio == 1 else 0
        self.release(seat, first)
        for column in range(first, -(-end // BLOCK)):
            if self.rows[seat][column] < 0:
                self.rows[seat][column] = self.free.pop()
                self.users[self.rows[seat][column]] = 1

    def share(self, source: int, seat: int, blocks: int) -> None:
        """Let a new request begin with another's first pages."""
        for column in range(blocks):
            page = self.rows[seat][column] = self.rows[source][column]
            if page >= 0:
                self.users[page] += 1

    def release(self, seat: int, columns: int) -> None:
        for column in range(columns):
            page, self.rows[seat][column] = self.rows[seat][column], -1
            if page >= 0:
                self.users[page] -= 1
                if not self.users[page]:
                    self.free.append(page)

    def slots(self, step: StepMetadata) -> Tensor:
        """int32 ``[rows]``: where each token of a step writes, -1 for padding and where it completes no entry."""
        position, ratio = step.position, self.ratio
        entry = torch.where((position + 1) % ratio == 0, position // ratio, -1)
        return dsv4x.local_to_slots(
            entry[:, None], step.request, entry + 1, self.table, self.page_size, self.count
        )[:, 0]  # fmt: skip


class Server:
    """Requests by seat: seat i is row i of the lengths and of the block tables, also while it has no queries."""

    def __init__(self, rng: torch.Generator):
        self.embedding = torch.randn(VOCABULARY, HIDDEN, generator=rng).to(DEVICE)
        self.layers = [Layer(ratio, rng) for ratio in RATIOS]
        self.pages = {ratio: Pages(ratio) for ratio in RATIOS}
        self.swa = [self.pages[1].cache(layouts.DSV4) for _ in self.layers]
        self.extra = {ratio: self.pages[ratio].cache(layouts.DSV4) for ratio in RATIOS[1:]}
        self.index = self.pages[4].cache(INDEX_LAYOUT)
        # The compressor's state: sums up to each token of a request, which go on through its chunks, and which tokens
        # behind a rejected draft write over. Padding has request -1, the last row.
        self.sums = {
            ratio: torch.zeros(SEATS + 1, BOUND + 1, width, dtype=torch.float64, device=DEVICE)
            for ratio, width in ((4, DIM + INDEX_DIM), (128, DIM))
        }
        self.done = [0] * SEATS  # tokens of each request that are in the caches
        self.starts = torch.zeros(SEATS + 1, dtype=torch.int32, device=DEVICE)
        self.lens = torch.zeros(SEATS, dtype=torch.int32, device=DEVICE)
        self.mixed, self.small = self.build(MIXED_ROWS), self.build(DECODE_ROWS)
        self.tokens = torch.zeros(MIXED_ROWS, dtype=torch.int64, device=DEVICE)
        self.decode()
        self.replay = self.decode
        if DEVICE == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.decode()
            self.replay = graph.replay

    def build(self, rows: int) -> StepMetadata:
        """Built once; every step refills it."""
        raw, *more = self.pages.values()
        extra = {p.ratio: ExtraPages(p.table, p.page_size, p.count, topk=TOPK if p.ratio == 4 else None) for p in more}
        return StepMetadata.build(
            self.starts, self.lens, raw.table, extra, swa_page_size=raw.page_size, swa_pages=raw.count,
            window_size=WINDOW, num_tokens=rows, max_seq_len=BOUND,
        )  # fmt: skip

    def refill(self, step: StepMetadata, **host: Tensor) -> None:
        raw, c4, c128 = (pages.table for pages in self.pages.values())
        step.update(self.starts, self.lens, raw, {4: c4, 128: c128}, **host)

    def decode(self) -> None:
        """A step whose lengths only the device knows: what the graph captures."""
        self.refill(self.small)
        # The path that captures take by prediction; named so that the eager call before compiles the same.
        self.decoded = self.forward(self.small, "direct")

    def step(self, batch: dict[int, list[int]]) -> tuple[dict[int, list[int]], list[Seen]]:
        """Advance seats by some tokens each. Returns the model's next token after each, and what the layers saw."""
        counts = [len(batch.get(seat, ())) for seat in range(SEATS)]
        for pages in self.pages.values():
            for seat in batch:
                pages.reach(seat, self.done[seat], self.done[seat] + counts[seat])
            pages.table.copy_(torch.tensor(pages.rows))
        self.done = [done + count for done, count in zip(self.done, counts)]
        starts, lens = torch.tensor([0, *counts]).cumsum(0), torch.tensor(self.done)
        self.starts.copy_(starts)
        self.lens.copy_(lens)
        tokens = torch.tensor([token for seat in sorted(batch) for token in batch[seat]])
        self.tokens[: len(tokens)] = tokens
        if len(tokens) <= DECODE_ROWS:
            self.replay()
            answers, seen = self.decoded
        else:
            # The host knows the lengths here, so prediction may gather a chunk's entries instead of reading in place.
            self.refill(self.mixed, query_start_loc_cpu=starts, seq_lens_cpu=lens)
            answers, seen = self.forward(self.mixed, None)
        each = answers[: len(tokens)].cpu().split(counts)
        return {seat: each[seat].tolist() for seat in batch}, seen

    def forward(self, step: StepMetadata, path: str | None) -> tuple[Tensor, list[Seen]]:
        """The model over one step's rows: nothing here asks the device for a value."""
        slots = {ratio: pages.slots(step) for ratio, pages in self.pages.items()}
        x, seen = self.embedding[self.tokens[: step.num_tokens]], []
        for layer, swa in zip(self.layers, self.swa):
            meta, ratio = step[layer.ratio], layer.ratio
            k, q = (x @ layer.k).bfloat16(), (x @ layer.q).view(-1, HEADS, DIM).bfloat16()
            dsv4x.quantize_and_insert_k_cache(k, swa, slots[1])
            parts = topk = index_q = weights = None
            if ratio > 1:
                parts = (x @ layer.compress).double()
                pooled = self.pool(ratio, parts, step).bfloat16()
                dsv4x.quantize_and_insert_k_cache(pooled[:, :DIM].contiguous(), self.extra[ratio], slots[ratio])
            if meta.selects:
                dsv4x.quantize_and_insert_k_cache(pooled[:, DIM:].contiguous(), self.index, slots[ratio])
                # q's scale is 1; another one would be multiplied into the weights.
                index_q = (x @ layer.index_q).view(-1, INDEX_HEADS, INDEX_DIM).to(getattr(torch, f"float8_{FLAVOUR}"))
                weights = x @ layer.index_weights
                topk = dsv4x.sparse_attn_indexer(index_q, self.index, weights, meta)
            out, lse = dsv4x.sparse_mla_attention(q, swa, self.extra.get(ratio), meta, topk, layer.sink, path=path)
            x = x + out.float().flatten(1) @ layer.o
            seen.append((q, k, parts, index_q, weights, topk, out, lse))
        return (x @ self.embedding.T).argmax(-1), seen

    def pool(self, ratio: int, parts: Tensor, step: StepMetadata) -> Tensor:
        """The mean of each token's last ``ratio`` parts: an entry where the token completes a group."""
        sums, request, after = self.sums[ratio], step.request, step.position + 1
        first = step.query_start_loc[request]
        before = (step.position - torch.arange(len(parts), device=DEVICE) + first).clamp_min(0)
        total = torch.cat([torch.zeros_like(parts[:1]), parts.cumsum(0)])
        sums[request, after] = sums[request, before] + total[1:] - total[first]
        return (sums[request, after] - sums[request, (after - ratio).clamp_min(0)]) / ratio

    def share(self, source: int, seat: int, blocks: int) -> None:
        """Begin a request with another's first pages. As a group begins behind them, the sums may be any."""
        for pages in self.pages.values():
            pages.share(source, seat, blocks)
        self.done[seat] = blocks * BLOCK

    def finish(self, seat: int) -> None:
        for pages in self.pages.values():
            pages.release(seat, BOUND // BLOCK)
        self.done[seat] = 0


class Oracle:
    """All that each request brought, without pages, and float64 attention over it as the caches store it."""

    def __init__(self, server: Server):
        self.server, self.steps, self.worst = server, 0, dict.fromkeys(MAX_ERROR, 0.0)
        self.k = [torch.zeros(SEATS, BOUND, DIM, dtype=torch.bfloat16, device=DEVICE) for _ in RATIOS]
        self.parts = {ratio: torch.zeros_like(sums[:SEATS, 1:]) for ratio, sums in server.sums.items()}

    def share(self, source: int, seat: int, tokens: int) -> None:
        for history in (*self.k, *self.parts.values()):
            history[seat, :tokens] = history[source, :tokens]

    def check(self, batch: dict[int, list[int]], seen: list[Seen]) -> None:
        self.steps += 1
        row = 0
        for seat in sorted(batch):
            rows = slice(row, row + len(batch[seat]))
            row = rows.stop
            for number, mine in enumerate(seen):
                self.check_layer(number, seat, tuple(None if value is None else value[rows] for value in mine))

    def check_layer(self, number: int, seat: int, seen: Seen) -> None:
        q, k, parts, *indexer, topk, out, lse = seen
        layer, end = self.server.layers[number], self.server.done[seat]
        begin, ratio = end - len(q), layer.ratio
        position = torch.arange(begin, end, device=DEVICE)
        self.k[number][seat, begin:end] = k
        first = max(0, begin - WINDOW + 1)
        behind = position[:, None] - torch.arange(first, end, device=DEVICE)
        kv, mask = stored(self.k[number][seat, first:end]), (behind >= 0) & (behind < WINDOW)
        if ratio > 1:
            self.parts[ratio][seat, begin:end] = parts
            groups = self.parts[ratio][seat, : end // ratio * ratio]
            entries = groups.view(-1, ratio, groups.shape[1]).mean(1).bfloat16()
            visible = (position + 1) // ratio
            extra = torch.arange(len(entries), device=DEVICE) < visible[:, None]
            if topk is not None and len(entries):
                extra = self.check_selection(topk, *indexer, entries[:, DIM:].contiguous(), visible)
            kv = torch.cat([kv, stored(entries[:, :DIM].contiguous())])
            mask = torch.cat([mask, extra], 1)
        logits = torch.einsum("thd,nd->thn", q.double(), kv) * DIM**-0.5
        logits = logits.masked_fill(~mask[:, None], -torch.inf)
        true_lse = logits.logsumexp(-1)
        true_out = torch.einsum("thn,nd->thd", logits.softmax(-1), kv) * torch.sigmoid(true_lse - layer.sink)[..., None]
        self.note("out", (out - true_out).norm() / true_out.norm())
        self.note("lse", (lse - true_lse).norm() / true_lse.norm())

    def check_selection(self, topk: Tensor, index_q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        """bool ``[rows, entries]``: the entries selected, whose scores have to be the best there are."""
        chosen = torch.zeros(len(visible), len(keys) + 1, dtype=torch.bool, device=DEVICE)
        chosen.scatter_(1, topk.long() % (len(keys) + 1), True)  # -1 is the column that is cut off
        chosen = chosen[:, :-1]
        k = reference.gather_indexer_k(*filled(keys, INDEX_LAYOUT))
        scores = reference.mqa_logits(index_q, None, *k, weights, torch.zeros_like(visible), visible)
        best = scores.topk(min(TOPK, len(keys))).values
        found = scores.masked_fill(~chosen, -torch.inf).topk(best.shape[1]).values
        off = torch.where(found == best, 0.0, (found - best).abs())
        self.note("selection", off.amax() / scores[scores.isfinite()].abs().amax())
        return chosen

    def note(self, name: str, error: Tensor) -> None:
        if not error <= MAX_ERROR[name]:  # NaN too
            sys.exit(f"server: step {self.steps}: error of {name} {error:.2e}, need <= {MAX_ERROR[name]:.0e}")
        self.worst[name] = max(self.worst[name], float(error))


def filled(entries: Tensor, layout: CacheLayout) -> tuple[PagedCache, Tensor]:
    """bf16 entries in a cache of one page, and their slots there."""
    cache = PagedCache.zeros(1, layout, max(1, len(entries)), DEVICE)
    slots = torch.arange(len(entries), device=DEVICE)
    reference.quantize_and_insert_k_cache(entries, cache, slots)
    return cache, slots


def stored(entries: Tensor) -> Tensor:
    """float64: bf16 entries as the caches give them back."""
    return reference.dequantize_slots(*filled(entries, layouts.DSV4)).double()


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    server = Server(rng)
    oracle = Oracle(server)

    def some(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=rng).tolist()

    def step(batch: dict[int, list[int]]) -> dict[int, list[int]]:
        answers, seen = server.step(batch)
        oracle.check(batch, seen)
        return answers

    a, b, c, text = 0, 1, 2, some(560)
    after = step({a: text[:150], b: some(40)})
    # Prefill in chunks, and b decodes beside them.
    for chunk in (text[150:340], text[340:530], text[530:]):
        after |= step({a: chunk, b: after[b][-1:]})
    # c has a's first 512 tokens too: it shares those two pages of every cache and brings the rest.
    server.share(a, c, 2)
    oracle.share(a, c, 2 * BLOCK)
    after = step({a: after[a][-1:], b: after[b][-1:], c: some(20)})
    for _ in range(3):
        after = step({seat: answers[-1:] for seat, answers in after.items()})
    # Verify: drafts behind the next token. A length that goes back rejects them, and their entries are written over.
    drafts = {a: after[a][-1:] + some(3), b: after[b][-1:], c: after[c][-1:] + some(1)}
    answers = step(drafts)
    for seat, tokens in drafts.items():
        kept = 1
        while kept < len(tokens) and tokens[kept] == answers[seat][kept - 1]:
            kept += 1
        server.done[seat] -= len(tokens) - kept
        after[seat] = answers[seat][:kept]
    after = step({seat: tokens[-1:] for seat, tokens in after.items()})
    # b is done, and another request takes its seat in the same step.
    server.finish(b)
    after = step({a: after[a][-1:], b: some(5), c: after[c][-1:]})
    step({seat: tokens[-1:] for seat, tokens in after.items()})
    for seat in (a, b, c):
        server.finish(seat)
    if any(len(pages.free) != pages.count for pages in server.pages.values()):
        sys.exit("server: pages are left behind")
    worst = ", ".join(f"{name} {error:.1e}" for name, error in oracle.worst.items())
    print(f"server on {DEVICE}: {oracle.steps} steps of 3 layers, worst relative errors: {worst}")


if __name__ == "__main__":
    main()
