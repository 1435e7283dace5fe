"""A step as servers run it: all kinds from one build, refilled in place, from lengths that the device alone knows."""

import copy
import dataclasses
import pickle
from functools import partial

import pytest
import torch
from tolerances import check_decode, check_prefill

import dsv4x
from dsv4x import ExtraPages, LayerKind, PagedCache, StepMetadata, layouts
from dsv4x.common.dispatch import registry
from dsv4x.common.step import attention

int32 = partial(torch.tensor, dtype=torch.int32)
WINDOW, PAGE = 16, 4


class Server:
    """Caches full of entries, block tables as wide as the longest context, and steps over them."""

    def __init__(self, ratios, rng, requests=4, limit=600, device="cpu", heads=3):
        self.requests, self.limit, self.device, self.heads, self.rng = requests, limit, device, heads, rng
        self.swa, self.swa_table = self._pool(limit)
        self.extra = {ratio: self._pool(max(1, limit // ratio)) for ratio in ratios if ratio}

    def _pool(self, entries):
        columns = -(-entries // PAGE)
        pages = self.requests * columns + 1
        cache = PagedCache.zeros(pages, layouts.DSV4, PAGE)
        k = (torch.randn(cache.capacity, 512, generator=self.rng) / 10).bfloat16()
        dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(cache.capacity), kernel="reference")
        table = torch.randperm(pages - 1, generator=self.rng).int().view(self.requests, columns) + 1
        return PagedCache(cache.data.to(self.device), cache.layout, PAGE), table.to(self.device)

    def lengths(self, queries, lengths):
        starts = int32([0, *torch.tensor(queries).cumsum(0).tolist()])
        return starts.to(self.device), int32(lengths).to(self.device)

    def build(self, queries, lengths, selects=None, **options):
        extra = {
            ratio: ExtraPages(table, PAGE, cache.pages, (selects or {}).get(ratio))
            for ratio, (cache, table) in self.extra.items()
        }
        given = {"swa_page_size": PAGE, "swa_pages": self.swa.pages, "window_size": WINDOW, **options}
        return StepMetadata.build(*self.lengths(queries, lengths), self.swa_table, extra, **given)

    def update(self, step, queries, lengths, **options):
        tables = {ratio: table for ratio, (_, table) in self.extra.items()}
        return step.update(*self.lengths(queries, lengths), self.swa_table, tables, **options)

    def layer(self, tokens, topk):
        q = (3 * torch.randn(tokens, self.heads, 512, generator=self.rng)).bfloat16().to(self.device)
        sink = torch.randn(self.heads, generator=self.rng).to(self.device)
        rows = torch.randint(-2, self.limit // 4, (tokens, topk), generator=self.rng, dtype=torch.int32)
        # An indexer selects no entry twice.
        for row in rows:
            seen = set()
            for column, entry in enumerate(row.tolist()):
                row[column] = -1 if entry in seen else entry
                seen.add(entry)
        return q, sink, rows.to(self.device)

    def expected(self, ratio, queries, lengths, layer, selects):
        """float32 attention of every token by the oracle, its slots made here from positions."""
        q, sink, topk = layer
        rows = {"swa": [], "extra": []}
        for r, (count, length) in enumerate(zip(queries, lengths)):
            for p in range(length - count, length):
                window = range(max(0, p - WINDOW + 1), p + 1) if p >= 0 else ()
                rows["swa"].append(self._slots(self.swa_table[r], window))
                visible = max(0, p + 1) // ratio if ratio in self.extra else 0
                chosen = range(visible)
                if selects:
                    chosen = [e for e in topk[len(rows["swa"]) - 1].tolist() if 0 <= e < visible]
                rows["extra"].append(self._slots(self.extra[ratio][1][r], chosen) if ratio in self.extra else [])
        for row in rows.values():
            row += [[]] * (len(q) - len(row))
        padded = [self._padded(row) for row in rows.values()]
        extra = (self.extra[ratio][0], padded[1], None) if ratio in self.extra else (None, None, None)
        values, lse = dsv4x.reference.sparse_mla_decode(q, self.swa, padded[0], None, *extra, sink, dtype=torch.float64)
        return values.float().cpu(), lse.float().cpu()

    def _slots(self, table, positions):
        return [int(table[x // PAGE]) * PAGE + x % PAGE for x in positions]

    def _padded(self, rows):
        width = max(1, *map(len, rows))
        return int32([row + [-1] * (width - len(row)) for row in rows]).to(self.device)

    def run(self, step, ratio, layer, **options):
        q, sink, topk = layer
        meta = step[ratio]
        cache = self.extra[ratio][0] if ratio in self.extra else None
        given = {"topk_indices": topk} if meta.selects and "topk_slots" not in options else {}
        return dsv4x.sparse_mla_attention(q, self.swa, cache, meta, attn_sink=sink, **given | options)


SELECTS = {2: True, 4: True, 128: False, 1: False}
QUERIES, LENGTHS = [3, 0, 1, 2], [300, 50, 9, 130]


def check(got, want, path="direct"):
    (check_decode if path == "direct" else check_prefill)(*got, *want)


def paths(meta):
    return attention.paths_of(meta.kind)


@pytest.fixture
def server(kernel_device, rng):
    kernel, device = kernel_device
    made = Server((2, 4, 128), rng, device=device)
    made.kernel = kernel
    return made


def test_all_kinds_of_a_step_come_from_one_build(server):
    step = server.build(QUERIES, LENGTHS, SELECTS, num_tokens=8)
    layer = server.layer(8, 20)
    for ratio in (1, 2, 4, 128):
        want = server.expected(ratio, QUERIES, LENGTHS, layer, SELECTS[ratio])
        for path in paths(step[ratio]):
            check(server.run(step, ratio, layer, path=path, kernel=server.kernel), want, path)
    with pytest.raises(KeyError, match=r"compress_ratio 3: the step was built for \[1, 2, 4, 128\]"):
        step[3]


def test_a_step_is_refilled_in_place_for_other_lengths_and_tables(server):
    step = server.build([1, 1, 1, 1], [1, 1, 1, 1], SELECTS, max_seq_len=server.limit, num_tokens=8)
    kept = [meta.visible.data_ptr() for meta in step.kinds.values()] + [step.swa_indices.data_ptr()]
    for queries, lengths in ((QUERIES, LENGTHS), ([1, 1, 1, 1], [600, 2, 77, 128]), ([0, 2, 0, 4], [0, 2, 0, 599])):
        server.swa_table = server.swa_table.flip(1).contiguous()
        assert server.update(step, queries, lengths) is step
        layer = server.layer(8, 20)
        for ratio in (1, 2, 4, 128):
            want = server.expected(ratio, queries, lengths, layer, SELECTS[ratio])
            check(server.run(step, ratio, layer, path="direct", kernel=server.kernel), want)
    assert kept == [meta.visible.data_ptr() for meta in step.kinds.values()] + [step.swa_indices.data_ptr()]
    assert step.clamped.item() == 0


def test_with_a_bound_every_path_follows_the_devices_lengths(server):
    """Nothing on the host says how long the requests are, and nothing waits for the device."""
    step = server.build(QUERIES, LENGTHS, SELECTS, max_seq_len=server.limit, num_tokens=8)
    assert step.host is None
    layer = server.layer(8, 20)
    for ratio in (1, 2, 4, 128):
        want = server.expected(ratio, QUERIES, LENGTHS, layer, SELECTS[ratio])
        for path in paths(step[ratio]):
            check(server.run(step, ratio, layer, path=path, kernel=server.kernel), want, path)


@pytest.mark.parametrize("bound", [[300, 50, 9, 130], [301, 600, 20, 131], [600, 600, 600, 600]])
def test_host_lengths_may_be_bounds(bound, server):
    starts, _ = server.lengths(QUERIES, LENGTHS)
    step = server.build(
        QUERIES, LENGTHS, SELECTS, query_start_loc_cpu=starts.cpu(), seq_lens_cpu=torch.tensor(bound), num_tokens=8
    )
    layer = server.layer(8, 20)
    for ratio in (1, 2, 4, 128):
        want = server.expected(ratio, QUERIES, LENGTHS, layer, SELECTS[ratio])
        for path in paths(step[ratio]):
            check(server.run(step, ratio, layer, path=path, kernel=server.kernel), want, path)
            chunk = dsv4x.SparsePrefillChunkCache(600 * 1024 + 40_000).rebuild(step[ratio])
            if chunk.fits and path == "gathered":
                check(server.run(step, ratio, layer, path=path, kernel=server.kernel, chunk=chunk), want, path)


def test_lengths_past_the_bound_are_clamped_and_counted(server, monkeypatch):
    long = [300, 50, 9, 250]
    step = server.build(QUERIES, long, SELECTS, max_seq_len=200, num_tokens=6)
    assert step.clamped.item() == 2
    layer = server.layer(6, 20)
    for ratio in (1, 4, 128):
        want = server.expected(ratio, QUERIES, [200, 50, 9, 200], layer, SELECTS[ratio])
        for path in paths(step[ratio]):
            check(server.run(step, ratio, layer, path=path, kernel=server.kernel), want, path)
    server.update(step, QUERIES, long)
    assert step.clamped.item() == 4
    monkeypatch.setenv("DSV4X_CHECK", "1")
    with pytest.raises(ValueError, match="max_seq_len: got 200, need >= 300, the length of request 0 on the device"):
        server.update(step, QUERIES, long)


def test_requests_without_a_length_may_own_rows(server):
    queries, lengths = [2, 1, 2, 1], [0, 5, 0, 40]
    step = server.build(queries, lengths, SELECTS, max_seq_len=server.limit, num_tokens=7)
    layer = server.layer(7, 20)
    for ratio in (1, 4, 128):
        want = server.expected(ratio, queries, lengths, layer, SELECTS[ratio])
        for path in paths(step[ratio]):
            out, lse = server.run(step, ratio, layer, path=path, kernel=server.kernel)
            check((out, lse), want, path)
            empty = [0, 1, 3, 4, 6]
            assert not out[empty].any()
            assert (lse[empty] == float("inf")).all()


@pytest.mark.parametrize("lens", [False, True])
def test_window_rows_and_slots_that_the_server_has_serve_every_path(lens, server):
    """Window slots newest first with holes anywhere, no block table of the window; top-k as slots."""
    made = server.build(QUERIES, LENGTHS, SELECTS, num_tokens=6)
    layer = server.layer(6, 20)
    rows = made.swa_indices.flip(1)
    rows = torch.cat([rows[:, :0], torch.full_like(rows[:, :3], -1), rows], 1)
    spans = torch.full((6,), rows.shape[1], dtype=torch.int32, device=rows.device) if lens else None
    server.swa_table, table = None, server.swa_table
    step = server.build(QUERIES, LENGTHS, SELECTS, num_tokens=6, swa_indices=rows, swa_lens=spans)
    server.swa_table = table
    for ratio in (1, 4, 128):
        want = server.expected(ratio, QUERIES, LENGTHS, layer, SELECTS[ratio])
        for path in paths(step[ratio]):
            check(server.run(step, ratio, layer, path=path, kernel=server.kernel), want, path)
    cache, extra_table = server.extra[4]
    meta = made[4]
    slots = dsv4x.local_to_slots(layer[2], meta.request, meta.visible, extra_table, PAGE, cache.pages)
    want = server.expected(4, QUERIES, LENGTHS, layer, True)
    for case in (made, step):
        for given in ({}, {"topk_indices": layer[2]}):
            for path in attention.PATHS:
                got = server.run(case, 4, layer, path=path, kernel=server.kernel, topk_slots=slots, **given)
                check(got, want, path)


@pytest.mark.parametrize("path", attention.PATHS)
def test_heads_past_the_ranks_own_hold_anything_and_stay_untouched(path, server):
    step = server.build(QUERIES, LENGTHS, SELECTS, num_tokens=6)
    layer = server.layer(6, 20)
    q, sink, topk = layer
    padded = torch.full((6, 8, 512), float("nan"), dtype=torch.bfloat16, device=q.device)
    padded[:, :3] = q
    out = torch.full_like(padded, 7.0)
    wide = torch.full((8,), float("nan"), device=q.device)
    wide[:3] = sink
    got, lse = server.run(step, 4, (padded, wide, topk), path=path, kernel=server.kernel, heads=3, out=out)
    assert got is out
    assert lse.shape == (6, 3)
    assert (out[:, 3:] == 7).all()
    check((got[:, :3], lse), server.expected(4, QUERIES, LENGTHS, layer, True), path)
    got, lse = server.run(step, 4, (padded, wide, topk), path=path, kernel=server.kernel, heads=3)
    check((got, lse), server.expected(4, QUERIES, LENGTHS, layer, True), path)


def test_a_compressed_cache_as_long_as_the_sequence(kernel_device, rng):
    """V4.1: ratio 1 with an extra table, beside layers of a window alone."""
    kernel, device = kernel_device
    server = Server((1, 2), rng, device=device)
    for selects in (True, False):
        step = server.build(QUERIES, LENGTHS, {1: selects, 2: True}, num_tokens=6)
        assert step[1].kind == LayerKind(1, selects)
        assert step.window.kind == LayerKind(1, False)
        layer = server.layer(6, 20)
        want = server.expected(1, QUERIES, LENGTHS, layer, selects)
        for path in paths(step[1]):
            check(server.run(step, 1, layer, path=path, kernel=kernel), want, path)
        q, sink, _ = layer
        alone = dsv4x.sparse_mla_attention(q, server.swa, None, step.window, attn_sink=sink, kernel=kernel)
        check(alone, server.expected(0, QUERIES, LENGTHS, layer, False))


@pytest.mark.parametrize("ratio", [1, 2, 8])
def test_a_kind_that_its_ratio_does_not_say_has_to_be_said(ratio, rng):
    server = Server((ratio,), rng)
    with pytest.raises(ValueError, match=f"selects: got None, need True or False for compress_ratio {ratio}"):
        server.build(QUERIES, LENGTHS)
    with pytest.raises(ValueError, match="topk: got 8, need None for compress_ratio"):
        StepMetadata.build(
            *server.lengths(QUERIES, LENGTHS), server.swa_table,
            {ratio: ExtraPages(server.extra[ratio][1], PAGE, 9, False, topk=8)}, swa_page_size=PAGE, swa_pages=9,
        )  # fmt: skip


def test_copies_of_used_metadata_work_and_stay_apart(rng):
    server = Server((4, 128), rng)
    step = server.build(QUERIES, LENGTHS, num_tokens=6)
    layer = server.layer(6, 20)
    want = {ratio: server.run(step, ratio, layer, path="gathered" if ratio == 4 else None) for ratio in (1, 4, 128)}
    for made in (copy.copy(step), copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        for ratio in (1, 4, 128):
            got = server.run(made, ratio, layer, path="gathered" if ratio == 4 else None)
            assert all(map(torch.equal, got, want[ratio]))
    deep = copy.deepcopy(step)
    server.update(step, [1, 1, 1, 1], [1, 1, 1, 1])
    assert not torch.equal(deep.position, step.position)
    assert copy.deepcopy(step[4]).step is not step
    step.seq_lens.add_(0)
    with pytest.raises(ValueError, match="meta: a length or a block table changed in place"):
        server.run(copy.deepcopy(step), 4, layer)


def test_a_refill_of_other_shapes_is_an_error_and_changes_nothing(rng):
    server = Server((4,), rng)
    step = server.build(QUERIES, LENGTHS, num_tokens=6, max_seq_len=600)
    before = step.position.clone()
    starts, lens = server.lengths(QUERIES, LENGTHS)
    table = server.extra[4][1]
    for arguments, message in (
        ((starts[:-1], lens, server.swa_table, {4: table}), "query_start_loc: shape is"),
        ((starts, lens[:-1], server.swa_table, {4: table}), "seq_lens: shape is"),
        ((starts, lens, server.swa_table[:, 1:], {4: table}), "swa_block_table: stride|swa_block_table: shape is"),
        ((starts, lens, None, {4: table}), "swa_block_table: got NoneType"),
        ((starts, lens, server.swa_table, {}), r"extra: tables of ratios \[\], need \[4\] as it was built"),
        ((starts, lens, server.swa_table, {4: table, 128: table}), r"extra: tables of ratios \[4, 128\], need \[4\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            step.update(*arguments)
    with pytest.raises(ValueError, match="swa_indices: given, need None as it was built"):
        step.update(starts, lens, server.swa_table, {4: table}, swa_indices=step.swa_indices)
    assert torch.equal(step.position, before)


def test_the_gather_plans_of_a_steps_kinds_are_made_together(rng, replaced):
    record, planned = registry.find("plan_gather", "reference"), []

    def plan(call):
        planned.append(len(call.kinds))
        record.run(call)

    replaced(dataclasses.replace(record, run=plan))
    server = Server((4, 128), rng)
    step, layer = server.build(QUERIES, LENGTHS, num_tokens=6), server.layer(6, 20)
    for ratio in (128, 4, 128):
        want = server.expected(ratio, QUERIES, LENGTHS, layer, ratio == 4)
        check(server.run(step, ratio, layer, path="gathered"), want, "gathered")
    assert planned == [2]
    server.update(step, QUERIES, LENGTHS)
    server.run(step, 4, layer, path="gathered", chunk=dsv4x.SparsePrefillChunkCache().rebuild(step[4]))
    assert planned == [2, 1]


def test_layers_share_a_schedule_only_with_the_lengths_it_was_made_of(rng, replaced):
    record, calls = registry.find("sparse_mla_decode", "reference"), []

    def attend(call):
        calls.append(call)
        return record.run(call)

    replaced(dataclasses.replace(record, run=attend))
    server = Server((4, 128), rng)
    step, layer = server.build(QUERIES, LENGTHS, num_tokens=6), server.layer(6, 20)
    spans, others = int32([20, 3, 0, 7, 20, 1]), int32([5, 20, 20, 0, 2, 9])
    for lens in (None, None, spans, spans, others, None):
        server.run(step, 4, layer, path="direct", kernel="reference", topk_lens=lens)
    server.run(step, 128, layer, path="direct", kernel="reference")
    whole, again, first, second, other, last, every = (call.schedule for call in calls)
    assert whole is again
    assert first is second
    assert len({id(schedule) for schedule in (whole, first, other, every)}) == 4
    assert last is not other
    # What a selection packs differs from layer to layer, so its counts are no lengths of a schedule.
    given = [None if call.extra.lens is None else call.extra.lens.tolist() for call in calls[:6]]
    assert given == [None, None, spans.tolist(), spans.tolist(), others.tolist(), None]


def test_what_the_host_says_has_to_fit_together(rng):
    server = Server((4,), rng)
    starts, lens = server.lengths(QUERIES, LENGTHS)
    with pytest.raises(ValueError, match="seq_lens_cpu: 300 at request 0, need <= max_seq_len, which is 299"):
        server.build(QUERIES, LENGTHS, max_seq_len=299, query_start_loc_cpu=starts, seq_lens_cpu=lens)
    with pytest.raises(ValueError, match="query_start_loc_cpu: got None beside seq_lens_cpu"):
        server.build(QUERIES, LENGTHS, max_seq_len=600, seq_lens_cpu=lens)
    with pytest.raises(ValueError, match="num_tokens: got None, need q's rows"):
        server.build(QUERIES, LENGTHS, max_seq_len=600)
    with pytest.raises(ValueError, match="seq_lens: 2 at request 0, need 0 or >= its 3 query tokens"):
        server.build(QUERIES, [2, 50, 9, 130])


def test_host_copies_unlike_the_device_are_an_error_under_checks(rng, monkeypatch):
    server = Server((4, 128), rng)
    monkeypatch.setenv("DSV4X_CHECK", "1")
    starts, lens = server.lengths(QUERIES, LENGTHS)
    server.build(QUERIES, LENGTHS, num_tokens=6, query_start_loc_cpu=starts, seq_lens_cpu=lens + 1)
    with pytest.raises(ValueError, match="seq_lens_cpu: got 299, need >= 300, the length of request 0 on the device"):
        server.build(
            QUERIES, LENGTHS, num_tokens=6, query_start_loc_cpu=starts, seq_lens_cpu=lens - int32([1, 0, 0, 0])
        )
    other, _ = server.lengths([2, 1, 1, 2], LENGTHS)
    with pytest.raises(ValueError, match="query_start_loc_cpu: 2 at 1, need 3 as on the device"):
        server.build(QUERIES, LENGTHS, num_tokens=6, query_start_loc_cpu=other, seq_lens_cpu=lens)
    server.extra[4][1][3, 2] = 10**6
    with pytest.raises(ValueError, match="extra_block_table: page 1000000 of request 3 at 2, need 0 to"):
        server.build(QUERIES, LENGTHS, num_tokens=6)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [None, "triton", "gluon", "flash_mla"])
@pytest.mark.parametrize("ratio", [1, 2, 4, 128])
def test_a_graph_captured_at_length_one_replays_at_any_length(ratio, kernel, rng):
    """The bound is a million tokens; rows past the last request, and requests of length 0 that own rows."""
    limit = 1 << 20
    server = Server((), rng, requests=6, limit=64, device="cuda", heads=8)
    server.limit = 40_000
    for cover in {1, ratio}:
        # Small pools, whose pages the requests share: tables must be as wide as the limit.
        cache, _ = server._pool(4000)
        columns = -(-limit // cover // PAGE)
        table = torch.randint(1, cache.pages, (6, columns), generator=rng, dtype=torch.int32).cuda()
        if cover == 1:
            server.swa, server.swa_table = cache, table
        if cover == ratio and ratio > 1:
            server.extra = {ratio: (cache, table)}
    queries, lengths = [1] * 6, [1] * 6
    starts, lens = server.lengths(queries, lengths)
    layer = server.layer(8, 512)
    options = {"path": "direct", "kernel": kernel}
    tables = {ratio: table for ratio, (_, table) in server.extra.items()}

    def build():
        extra = {r: ExtraPages(tables[r], PAGE, server.extra[r][0].pages, SELECTS[r]) for r in tables}
        return StepMetadata.build(
            starts, lens, server.swa_table, extra, swa_page_size=PAGE, swa_pages=server.swa.pages, window_size=WINDOW,
            max_seq_len=limit, num_tokens=8,
        )  # fmt: skip

    step = build()
    server.run(step, ratio, layer, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.update(starts, lens, server.swa_table, tables)
        first = server.run(step, ratio, layer, **options)
        second = server.run(step, ratio, layer, **options)
    for queries, lengths in (
        ([1] * 6, [1] * 6),
        ([1] * 6, [40_000, 127, 128, 5, 3000, 129]),
        ([2, 0, 1, 3, 0, 1], [600, 7, 0, 40_000, 1, 255]),
        ([1, 1, 1, 1, 0, 0], [0, 700, 0, 33, 0, 0]),
    ):
        new_starts, new_lens = server.lengths(queries, lengths)
        starts.copy_(new_starts)
        lens.copy_(new_lens)
        graph.replay()
        want = server.expected(ratio, queries, lengths, layer, SELECTS[ratio] and ratio in server.extra)
        for got in (first, second):
            check(got, want)
        assert step.clamped.item() == 0


@pytest.mark.gpu
def test_a_refill_waits_for_nothing_and_is_one_launch(rng):
    server = Server((4, 128), rng, device="cuda")
    step = server.build(QUERIES, LENGTHS, max_seq_len=600, num_tokens=6)
    given = [*server.lengths(QUERIES, LENGTHS), server.swa_table, {4: server.extra[4][1], 128: server.extra[128][1]}]
    extra = {ratio: ExtraPages(table, PAGE, cache.pages) for ratio, (cache, table) in server.extra.items()}
    step.update(*given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step.update(*given)
            StepMetadata.build(*given[:3], extra, swa_page_size=PAGE, swa_pages=9, num_tokens=6, max_seq_len=600)
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    launched = [event.name for event in profile.events() if "step_kernel" in event.name]
    assert len(launched) == 2, launched
