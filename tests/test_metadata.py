"""AttentionMetadata and the entry point: mixed batches against loops over tokens, and one path against the other."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import slow
import torch
from layer_kinds import paths_of
from tolerances import check_decode, check_prefill

import dsv4x
from dsv4x.common.core.layouts import DSV4, PagedCache
from dsv4x.common.dispatch import registry
from dsv4x.common.step import metadata, plan
from dsv4x.common.step.attention import PATHS
from dsv4x.common.step.chunk import chunk_of

GARBAGE = [-1, -2, -(2**31), 2**31 - 1, 1_000_000_007]
int32 = partial(torch.tensor, dtype=torch.int32)

# (query tokens, sequence length) a request.
BATCHES = {
    "prefill": [(9, 9), (5, 5)],
    "prefill with a prefix": [(6, 70), (3, 17)],
    "decode": [(1, 1), (1, 40), (1, 3)],
    "verify": [(3, 33), (4, 4)],
    "mixed": [(5, 5), (0, 12), (4, 50), (1, 30), (0, 0), (3, 19)],
    "shorter than one compressed entry": [(2, 2), (1, 3)],
}


@dataclasses.dataclass
class Step:
    """One step of a server: caches, block tables and the metadata's arguments."""

    requests: list
    ratio: int
    window: int
    swa: PagedCache
    extra: PagedCache | None
    swa_table: list
    extra_table: list | None
    padding: int
    topk: int

    @property
    def starts(self):
        return [0, *np.cumsum([q for q, _ in self.requests]).tolist()]

    @property
    def tokens(self):
        return self.starts[-1] + self.padding

    def owners(self):
        """(request, position) of each token, None for padding."""
        owned = [(r, seq - q + j) for r, (q, seq) in enumerate(self.requests) for j in range(q)]
        return owned + [None] * self.padding

    def build(self, device="cpu", **changes):
        arguments = {
            "query_start_loc": int32(self.starts), "seq_lens": int32([s for _, s in self.requests]),
            "swa_block_table": int32(self.swa_table), "compress_ratio": self.ratio,
            "swa_page_size": self.swa.page_size, "swa_pages": self.swa.pages,
            "topk": self.topk if self.ratio == 4 else None, "window_size": self.window, "num_tokens": self.tokens,
        }  # fmt: skip
        if self.extra is not None:
            arguments |= {
                "extra_block_table": int32(self.extra_table), "extra_page_size": self.extra.page_size,
                "extra_pages": self.extra.pages,
            }  # fmt: skip
        arguments |= changes
        on = {
            k: v.to(device) if isinstance(v, torch.Tensor) and not k.endswith("_cpu") else v
            for k, v in arguments.items()
        }
        return dsv4x.AttentionMetadata.build(**on)

    def window_slots(self, owner):
        r, p = owner
        return [slot(self.swa_table, r, x, self.swa) for x in range(max(0, p - self.window + 1), p + 1)]

    def visible(self, owner):
        return 0 if owner is None else (owner[1] + 1) // self.ratio

    def expected(self, q, topk_indices=None, sink=None):
        """float64 attention of every token, read from the caches slot by slot."""
        entries, compressed = slow.Entries(self.swa), self.extra and slow.Entries(self.extra)
        rows = []
        for t, owner in enumerate(self.owners()):
            chosen = []
            if owner is not None:
                chosen = [entries[s] for s in self.window_slots(owner) if s >= 0]
                if topk_indices is not None:
                    local = [e for e in topk_indices[t].tolist() if 0 <= e < self.visible(owner)]
                else:
                    local = range(self.visible(owner)) if self.extra is not None else ()
                slots = [slot(self.extra_table, owner[0], e, self.extra) for e in local]
                chosen += [compressed[s] for s in slots if s >= 0]
            rows.append(np.array(chosen).reshape(-1, 512))
        return slow.attend(q, rows, sink)


def slot(table, request, local, cache):
    column, offset = divmod(local, cache.page_size)
    page = table[request][column]
    return page * cache.page_size + offset if 0 <= page < cache.pages else -1


@pytest.fixture
def make_step(make_cache, rng):
    def pool(counts, first, page_size, spare=1):
        """A cache whose live entries are those the requests may read, and its table with garbage elsewhere."""
        needed = [-(-n // page_size) - f // page_size for n, f in zip(counts, first)]
        pages = sum(needed) + spare
        cache, _ = make_cache(pages, page_size, 0, spread=2)
        free = torch.randperm(pages, generator=rng).tolist()
        columns = max([-(-n // page_size) for n in counts], default=0) + 3
        table, slots = [], []
        for i, (count, start) in enumerate(zip(counts, first)):
            row = [GARBAGE[(i + c) % len(GARBAGE)] for c in range(columns)]
            for column in range(start // page_size, -(-count // page_size)):
                row[column] = free.pop()
            slots += [row[x // page_size] * page_size + x % page_size for x in range(start, count)]
            table.append(row)
        k = (torch.randn(len(slots), 512, generator=rng) / 10).bfloat16()
        dsv4x.quantize_and_insert_k_cache(k, cache, torch.tensor(slots, dtype=torch.int64), kernel="reference")
        return cache, table

    def make(requests, ratio=4, window=16, page_size=4, extra_page_size=2, padding=0, topk=7):
        # Only what some query's window reaches is live; pages wholly before are garbage in table and pool.
        first = [max(0, seq - q - window + 1) if q else seq for q, seq in requests]
        swa, swa_table = pool([seq for _, seq in requests], first, page_size)
        extra = extra_table = None
        if ratio > 1:
            counts = [seq // ratio if q else 0 for q, seq in requests]
            extra, extra_table = pool(counts, [0] * len(counts), extra_page_size)
        return Step(requests, ratio, window, swa, extra, swa_table, extra_table, padding, topk)

    return make


def choose_topk(step, columns, rng):
    """Top-k rows in random order with holes anywhere; some entries not visible yet, some indices no entries at all."""
    rows = torch.full((step.tokens, columns), -1, dtype=torch.int32)
    for t, owner in enumerate(step.owners()):
        count = 0 if owner is None else step.requests[owner[0]][1] // step.ratio
        order = torch.randperm(count, generator=rng)[:columns].int()
        rows[t, : len(order)] = order
    rows[torch.rand(rows.shape, generator=rng) < 0.2] = -1
    rows[torch.rand(rows.shape, generator=rng) < 0.05] = 2**31 - 1
    rows[torch.rand(rows.shape, generator=rng) < 0.05] = -(2**31)
    return rows


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("page_size", [1, 4, 61])
@pytest.mark.parametrize("name", BATCHES)
def test_window_and_visible_follow_the_definition(name, page_size, padding, make_step):
    step = make_step(BATCHES[name], page_size=page_size, padding=padding)
    meta = step.build()
    assert meta.num_tokens == step.tokens
    assert meta.swa_indices.shape == (step.tokens, 16)
    for t, owner in enumerate(step.owners()):
        want = [] if owner is None else step.window_slots(owner)
        assert -1 not in want
        assert meta.request[t] == (-1 if owner is None else owner[0])
        assert meta.visible[t] == step.visible(owner)
        assert meta.swa_lens[t] == len(want)
        assert meta.swa_indices[t].tolist() == want + [-1] * (16 - len(want))
        assert meta.extra_lens[t] == min(step.visible(owner), step.topk)
    assert meta.extra_indices is None, "C4's entries are each layer's own"


@pytest.mark.parametrize("extra_page_size", [1, 2, 64])
def test_c128_rows_are_every_visible_entry(extra_page_size, make_step):
    step = make_step(
        [(3, 700), (1, 127), (2, 129), (0, 256), (1, 384)], 128, extra_page_size=extra_page_size, padding=1
    )
    meta = step.build()
    for t, owner in enumerate(step.owners()):
        count = step.visible(owner)
        want = [slot(step.extra_table, owner[0], e, step.extra) for e in range(count)]
        assert -1 not in want
        assert meta.extra_lens[t] == meta.visible[t] == count
        row = meta.extra_indices[t].tolist()
        assert row == want + [-1] * (len(row) - count)


def test_rows_as_wide_as_the_bound_are_filled_to_their_ends(kernel_device, make_step, monkeypatch):
    """Once, by the build: a refill leaves alone what stands past the next multiple of 64."""
    kernel, device = kernel_device
    monkeypatch.setattr(metadata, "select", lambda problem: registry.select(problem, kernel))
    step = make_step([(3, 700), (2, 129)], 128, extra_page_size=2, padding=1)
    table = torch.full((2, 2000), -1, dtype=torch.int32, device=device)
    table[:, : len(step.extra_table[0])] = int32(step.extra_table)
    meta = step.build(device, max_seq_len=1 << 18, extra_block_table=table)
    assert meta.extra_indices.shape == (6, 2048)
    held = torch.arange(2048, device=device) < meta.extra_lens[:, None]
    assert ((meta.extra_indices >= 0) == held).all()
    assert (meta.extra_indices[~held] == -1).all()
    meta.extra_indices[:, 64:] = 7
    meta.update(meta.query_start_loc, meta.seq_lens, meta.swa_block_table, table)
    assert (meta.extra_indices[:, 64:] == (-1 if kernel == "reference" else 7)).all()


def test_window_only_layers_have_no_extra_rows(make_step):
    meta = make_step(BATCHES["mixed"], ratio=1).build()
    assert meta.extra_indices is meta.extra_lens is meta.extra_block_table is None


def test_host_copies_spare_the_device_and_change_nothing(make_step):
    step = make_step(BATCHES["mixed"])
    lens = torch.tensor([s for _, s in step.requests])
    with_copies = step.build(query_start_loc_cpu=int32(step.starts), seq_lens_cpu=lens)
    plain = step.build()
    assert chunk_of(with_copies).workspace_bytes == chunk_of(plain).workspace_bytes
    assert torch.equal(with_copies.swa_indices, plain.swa_indices)


@pytest.mark.parametrize("ratio", [1, 4, 128])
@pytest.mark.parametrize("requests", [[], [(0, 9), (0, 0)]])
def test_a_step_without_queries_is_empty_but_for_its_padding(requests, ratio, make_step):
    for padding in (0, 2):
        step = make_step(requests, ratio, padding=padding)
        meta = step.build() if requests else step.build(
            swa_block_table=torch.zeros(0, 3, dtype=torch.int32),
            **({"extra_block_table": torch.zeros(0, 3, dtype=torch.int32)} if ratio > 1 else {}),
        )  # fmt: skip
        assert meta.swa_lens.tolist() == [0] * padding
        assert (meta.swa_indices == -1).all()
        q = torch.randn(padding, 2, 512).bfloat16()
        topk = torch.zeros(padding, 4, dtype=torch.int32) if ratio == 4 else None
        # Index rows of padding count against the cap like any other.
        row = 4 * 128 + 4
        cases = [(path, 256 << 20) for path in (None, *paths_of(ratio))]
        for path, cap in [*cases, ("gathered", row), (None, row - 1)]:
            chunk = dsv4x.SparsePrefillChunkCache(cap).rebuild(meta)
            out, lse = dsv4x.sparse_mla_attention(q, step.swa, step.extra, meta, topk, path=path, chunk=chunk)
            assert not out.any()
            assert (lse == float("inf")).all()
        assert chunk.fits == (padding == 0)


def attention_case(step, rng, heads=3, columns=7):
    q = (3 * torch.randn(step.tokens, heads, 512, generator=rng)).bfloat16()
    topk = choose_topk(step, columns, rng) if step.ratio == 4 else None
    sink = torch.randn(heads, generator=rng)
    return q, topk, sink


@pytest.mark.parametrize(("ratio", "path"), [(r, p) for r in (1, 4) for p in paths_of(r)])
@pytest.mark.parametrize("name", BATCHES)
def test_attention_is_the_definition_on_every_path(name, ratio, path, kernel_device, make_step, on_device, rng):
    kernel, device = kernel_device
    step = make_step(BATCHES[name], ratio, padding=2)
    run_and_check(step, path, kernel, device, on_device, rng)


@pytest.mark.parametrize("path", ["direct", "gathered"])
def test_c128_attention_is_the_definition_on_either_path(path, kernel_device, make_step, on_device, rng):
    kernel, device = kernel_device
    step = make_step([(3, 3), (2, 385), (0, 200), (1, 128), (1, 127)], 128, padding=1)
    run_and_check(step, path, kernel, device, on_device, rng)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("columns", "topk"), [(0, 5), (0, 0), (3, 5), (5, 5), (12, None), (200, 200)])
def test_c4_reads_every_entry_of_its_rows_whatever_their_width(
    columns, topk, path, kernel_device, make_step, on_device, rng
):
    kernel, device = kernel_device
    requests = [(2, 40), (1, 90)] if columns < 100 else [(1, 800)]
    run_and_check(make_step(requests, topk=topk), path, kernel, device, on_device, rng, columns=columns)


@pytest.mark.parametrize("name", ["topk_indices", "topk_slots"])
def test_rows_wider_than_the_topk_they_were_planned_for_are_an_error(name, make_step, rng):
    step = make_step(BATCHES["mixed"], topk=5)
    q, topk, _ = attention_case(step, rng, columns=6)
    with pytest.raises(ValueError, match=f"{name}: width is 6, need <= 5, the metadata's topk"):
        dsv4x.sparse_mla_attention(q, step.swa, step.extra, step.build(), **{name: topk})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lens", [False, True])
def test_holes_in_front_of_a_row_cost_no_entry_behind_them(lens, path, kernel_device, make_step, on_device, rng):
    """While few entries are visible, too: a row of -1 and then all that the token may see."""
    kernel, device = kernel_device
    step = make_step([(3, 12), (1, 9)], topk=8)
    q, _, sink = attention_case(step, rng)
    topk = torch.full((4, 8), -1, dtype=torch.int32)
    topk[:, 5:] = torch.arange(3)
    want = step.expected(q, topk, sink)
    spans = torch.full((4,), 8, dtype=torch.int32, device=device) if lens else None
    got = dsv4x.sparse_mla_attention(
        q.to(device), on_device(step.swa, device), on_device(step.extra, device), step.build(device), topk.to(device),
        sink.to(device), path=path, kernel=kernel, topk_lens=spans,
    )  # fmt: skip
    (check_decode if path == "direct" else check_prefill)(*got, *want)


@pytest.mark.gpu
@pytest.mark.parametrize(("ratio", "path"), [(r, p) for r in (1, 4, 128) for p in paths_of(r)])
@pytest.mark.parametrize("kernel", ["flash_mla", None])
def test_attention_is_the_definition_with_the_models_window(kernel, ratio, path, make_step, on_device, rng):
    if kernel == "flash_mla" and "flash_mla" not in {
        k.name for k in dsv4x.common.dispatch.registry.kernels("sparse_mla_decode")
    }:
        pytest.skip("not on this backend")
    requests = [(7, 300), (0, 40), (1, 513), (3, 3), (2, 131)]
    step = make_step(requests, ratio, window=128, page_size=64, extra_page_size=64, padding=2, topk=64)
    run_and_check(step, path, kernel, "cuda", on_device, rng, columns=64)


def run_and_check(step, path, kernel, device, on_device, rng, caches=None, columns=7):
    caches = caches or step
    meta = step.build(device)
    q, topk, sink = attention_case(step, rng, columns=columns)
    want = step.expected(q, topk, sink)
    swa, extra = on_device(caches.swa, device), None if caches.extra is None else on_device(caches.extra, device)
    topk = None if topk is None else topk.to(device)
    out = torch.full((step.tokens, 5, 512), float("nan"), dtype=torch.bfloat16, device=device)[:, 1:4]
    got, lse = dsv4x.sparse_mla_attention(
        q.to(device), swa, extra, meta, topk, sink.to(device), out=out, path=path, kernel=kernel
    )
    assert got is out
    (check_decode if path == "direct" else check_prefill)(got, lse, *want)
    padded = slice(step.tokens - step.padding, None)
    assert not got[padded].any()
    assert (lse[padded] == float("inf")).all()
    return got, lse


def test_a_second_layer_shares_the_steps_plan(make_step, rng):
    """Same metadata, another layer's caches: nothing of the first layer's may be kept."""
    step = make_step(BATCHES["mixed"], 4)
    meta = step.build()
    other = dataclasses.replace(step, swa=other_layers(step.swa, rng), extra=other_layers(step.extra, rng))
    for path in PATHS:
        for layer in (step, other, step):
            q, topk, sink = attention_case(layer, rng)
            got = dsv4x.sparse_mla_attention(q, layer.swa, layer.extra, meta, topk, sink, path=path)
            (check_decode if path == "direct" else check_prefill)(*got, *layer.expected(q, topk, sink))


def test_what_was_decided_serves_calls_that_look_the_same_alone(make_step, rng):
    step = make_step(BATCHES["mixed"], 4)
    meta = step.build()
    q, topk, sink = attention_case(step, rng)
    good = {"q": q, "swa_cache": step.swa, "extra_cache": step.extra, "topk_indices": topk, "attn_sink": sink}

    def pages(cache):
        return PagedCache.zeros(cache.pages + 1, cache.layout, cache.page_size)

    changes = [
        {}, {"q": q[:, :2], "attn_sink": sink[:2]}, {"q": q.transpose(0, 1).contiguous().transpose(0, 1)},
        {"swa_cache": pages(step.swa)}, {"extra_cache": pages(step.extra)},
        {"topk_indices": topk[:, :5].clone()}, {"topk_indices": topk[:, :5]}, {"attn_sink": None},
        {"out": torch.empty_like(q)}, {"softmax_scale": 0.1}, {"return_lse": False}, {"kernel": "reference"},
        *({"path": path} for path in PATHS),
    ]  # fmt: skip
    for count, change in enumerate(changes, 1):
        for _ in range(2):
            dsv4x.sparse_mla_attention(**good | change, meta=meta)
            assert len([key for key in meta.kept if key[0] == "plan"]) == count, change


def other_layers(cache, rng):
    """A cache of the same pages in which every entry is live."""
    other = PagedCache.zeros(cache.pages, cache.layout, cache.page_size)
    k = (torch.randn(cache.capacity, 512, generator=rng) / 10).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, other, torch.arange(cache.capacity), kernel="reference")
    return other


@pytest.mark.parametrize(("ratio", "path"), [(r, p) for r in (1, 4, 128) for p in paths_of(r)])
def test_pages_outside_the_pool_are_no_entries_on_any_path(ratio, path, kernel_device, make_step, on_device, rng):
    kernel, device = kernel_device
    step = make_step([(3, 300), (1, 40)], ratio, window=16, page_size=4, extra_page_size=1)
    step.swa_table[0][(300 - 8) // 4] = step.swa.pages
    step.swa_table[1][8] = -1
    if step.extra_table is not None:
        step.extra_table[0][1] = 2**31 - 1
    run_and_check(step, path, kernel, device, on_device, rng)


@pytest.mark.parametrize("columns", [0, 3, 7])
@pytest.mark.parametrize("ratio", [1, 4, 128])
@pytest.mark.parametrize("name", BATCHES)
def test_what_the_entry_point_vouches_for_is_true(name, ratio, columns, make_step, rng, replaced):
    """Indices and lengths go to the ops as trusted: FlashMLA would read past a row, or fault, if they were not."""
    step = make_step(BATCHES[name], ratio, padding=2)
    seen = []

    def check(indices, lens, capacity):
        if lens is not None:
            assert bool(((lens >= 0) & (lens <= indices.shape[1])).all()), "a length past its row"
        assert bool(((indices >= -1) & (indices < capacity)).all())
        seen.append(indices.shape)

    def decode(call):
        assert call.trusted
        for scope in (call.swa, call.extra):
            if scope is not None:
                check(scope.indices, scope.lens, scope.cache.capacity)
        return call.q, call.q[..., 0]

    def prefill(call):
        assert call.trusted
        kv, rows = call.kv, call.indices
        check(rows, call.lens, len(kv))
        assert not kv[rows[rows >= 0].long()].isnan().any(), "an index points at a row that was never written"
        return call.q, call.q[..., 0]

    for op, run in (("sparse_mla_decode", decode), ("sparse_mla_prefill", prefill)):
        replaced(dataclasses.replace(registry.find(op, "reference"), run=run))
    q, topk, sink = attention_case(step, rng, columns=columns)
    for path in ("direct", "gathered"):
        arguments = (q, step.swa, step.extra, step.build(), topk, sink)
        dsv4x.sparse_mla_attention(*arguments, path=path, kernel="reference")
    assert len(seen) == 2 + (ratio > 1)


def test_unread_garbage_does_not_reach_the_gathered_workspace(make_step, rng):
    """Only rows some query may read are gathered: the pool around them is NaN."""
    step = make_step([(2, 60), (0, 33), (1, 9)], 4)
    meta = step.build()
    (plan,) = chunk_of(meta).groups
    assert len(plan.slots) == plan.rows == chunk_of(meta).workspace_rows
    extra, swa = plan.slots[: plan.compressed_rows], plan.slots[plan.compressed_rows :]
    assert len(swa) == (2 + 15) + 0 + 9
    assert len(extra) == 60 // 4 + 0 + 9 // 4
    for cache, slots in ((step.swa, swa), (step.extra, extra)):
        assert not dsv4x.dequantize_k_cache_paged(cache, slots).isnan().any()
    assert plan.gather_lens.tolist() == [17, 0, 9]


def test_the_path_is_chosen_by_prediction_and_bounded_by_the_workspace(make_step, rng, monkeypatch):
    step = make_step(BATCHES["prefill with a prefix"])
    meta = step.build()
    q, topk, _ = attention_case(step, rng)
    arguments = (q, step.swa, step.extra, meta, topk)
    problems = dsv4x.explain_step(*arguments).problems
    direct, gathered, referenced = (problems[path] for path in PATHS)
    assert (direct.op, direct.tokens, direct.heads, direct.width, direct.extra_width) == (
        "sparse_mla_decode", 9, 3, 16, 7,
    )  # fmt: skip
    assert (gathered.op, gathered.rows, gathered.width) == ("sparse_mla_prefill", chunk_of(meta).workspace_rows, 128)
    # 9 tokens of 7 references each, or every compressed entry if those are fewer.
    rows = min(63, sum(meta.compressed_bounds())) + sum(meta.window_bounds())
    assert (referenced.op, referenced.rows, referenced.tokens) == ("sparse_mla_prefill", rows, 9)

    times = {"sparse_mla_decode": 0.0, "sparse_mla_prefill": 0.0}
    record = registry.find("sparse_mla_prefill", "reference")
    monkeypatch.setattr(plan, "kernel_of", lambda path, step, problem, *_: (record, times[problem.op]))
    assert dsv4x.explain_step(*arguments).chosen == "direct"
    times["sparse_mla_decode"] = 1e9
    assert dsv4x.explain_step(*arguments).chosen == "gathered"
    largest = max(c + g for c, g in zip(meta.compressed_bounds(), meta.window_bounds()))
    for max_bytes, path in ((largest * 1024, "direct"), (largest * 1024 + 4096, "gathered")):
        chunk = dsv4x.SparsePrefillChunkCache(max_bytes).rebuild(meta)
        assert chunk.fits == (path == "gathered")
        assert dsv4x.explain_step(*arguments, chunk=chunk).chosen == path


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("ratio", [1, 4, 128])
@pytest.mark.parametrize("name", BATCHES)
def test_a_chunk_cut_to_its_cap_gives_the_same_answers(name, ratio, owned, make_step, rng):
    """By requests, then by query blocks; the least cap that still fits holds one token's index row at a time."""
    step = make_step(BATCHES[name], ratio, padding=2)
    meta = step.build()
    q, topk, sink = attention_case(step, rng)
    arguments = (q, step.swa, step.extra, meta, topk, sink)
    whole, whole_lse = dsv4x.sparse_mla_attention(*arguments, path="gathered")
    most = chunk_of(meta).workspace_bytes
    rows = max((c + g for c, g in zip(meta.compressed_bounds(), meta.window_bounds())), default=0)
    seen = set()
    for cap in sorted({most, most - 1, (most + rows * 1024) // 2, rows * 1024 + 2 * 4 * 128 + 4 + 8}, reverse=True):
        workspace = torch.full((max(rows, 1), 512), float("nan"), dtype=torch.bfloat16) if owned else None
        chunk = dsv4x.SparsePrefillChunkCache(cap, workspace).rebuild(meta)
        if not chunk.fits:
            continue
        assert chunk.workspace_bytes <= cap
        assert chunk.workspace_rows <= (rows if owned else sum(meta.compressed_bounds()) + sum(meta.window_bounds()))
        covered = [t for group in chunk.groups for block in group.blocks for t in range(block.start, block.stop)]
        assert covered == list(range(step.tokens))
        seen.add(sum(len(group.blocks) for group in chunk.groups))
        for _ in range(2):
            out, lse = dsv4x.sparse_mla_attention(*arguments, path="gathered", chunk=chunk)
            assert torch.equal(out, whole)
            assert torch.equal(lse, whole_lse)
    assert owned or len(seen) > 1, seen


@pytest.mark.parametrize("name", BATCHES)
def test_the_referenced_path_is_cut_to_its_cap_and_gives_the_gathered_paths_bits(name, make_step, rng):
    step = make_step(BATCHES[name], padding=2)
    meta = step.build()
    q, topk, sink = attention_case(step, rng)
    arguments = (q, step.swa, step.extra, meta, topk, sink)
    want, want_lse = dsv4x.sparse_mla_attention(*arguments, path="gathered")
    windows, blocks = sum(meta.window_bounds()), set()
    for cap in range(0, 1 << 18, 1 << 13):
        for room in (None, windows + 1, windows + 20):
            workspace = None if room is None else torch.full((room, 512), float("nan"), dtype=torch.bfloat16)
            chunk = dsv4x.SparsePrefillChunkCache(cap, workspace).rebuild(meta)
            block = chunk.referenced_block(topk.shape[1])
            if not block:
                assert "pass the cap" in dsv4x.explain_step(*arguments[:5], chunk=chunk).refused["referenced"]
                with pytest.raises(ValueError, match="path: referenced, but the windows and one token's rows pass"):
                    dsv4x.sparse_mla_attention(*arguments, path="referenced", chunk=chunk)
                continue
            if block in blocks:
                continue
            blocks.add(block)
            cut = chunk.referenced_blocks(topk.shape[1])
            assert [t for part in cut for t in range(part.start, part.stop)] == list(range(step.tokens))
            assert max(part.stop - part.start for part in cut) <= block
            rows = chunk.referenced_rows(topk.shape[1])
            assert (rows + windows) * 1024 <= cap
            assert room is None or rows + windows <= room
            out, lse = dsv4x.sparse_mla_attention(*arguments, path="referenced", chunk=chunk)
            assert torch.equal(out, want)
            assert torch.equal(lse, want_lse)
    assert len(blocks) > 1 or not sum(meta.compressed_bounds())


@pytest.mark.parametrize("ratio", [1, 128])
def test_only_c4_has_references(ratio, make_step, rng):
    step = make_step(BATCHES["mixed"], ratio)
    meta = step.build()
    q, _, _ = attention_case(step, rng)
    reason = f"no indexer selects in layers of compress_ratio {ratio}"
    with pytest.raises(ValueError, match=f"path: referenced, but {reason}"):
        dsv4x.sparse_mla_attention(q, step.swa, step.extra, meta, path="referenced")
    explanation = dsv4x.explain_step(q, step.swa, step.extra, meta)
    assert explanation.refused == {"referenced": f"no indexer selects in layers of compress_ratio {ratio}"}
    assert set(explanation.predicted_us) == set(explanation.kernels) == {"direct", "gathered"}
    assert f"{explanation.chosen:<10} chosen" in str(explanation)
    assert "referenced refused: no indexer" in str(explanation)


@pytest.mark.parametrize("ratio", [1, 4, 128])
def test_a_request_larger_than_the_cap_is_read_in_place(ratio, make_step, rng):
    step = make_step([(2, 300), (3, 40)], ratio)
    meta = step.build()
    q, topk, sink = attention_case(step, rng)
    chunk = dsv4x.SparsePrefillChunkCache(2000).rebuild(meta)
    assert not chunk.fits
    arguments = (q, step.swa, step.extra, meta, topk, sink)
    direct = dsv4x.sparse_mla_attention(*arguments, path="direct")
    assert all(map(torch.equal, dsv4x.sparse_mla_attention(*arguments, chunk=chunk), direct))
    with pytest.raises(ValueError, match="path: gathered, but a request's rows alone pass the cap of 2000 bytes"):
        dsv4x.sparse_mla_attention(*arguments, chunk=chunk, path="gathered")


def test_long_c128_rows_are_made_a_block_of_tokens_at_a_time(make_step, rng, monkeypatch):
    step = make_step([(3, 3), (5, 1385), (0, 200), (1, 128)], 128, padding=1)
    q, _, sink = attention_case(step, rng)
    whole = step.build()
    assert whole.extra_indices.shape == (10, 64)
    assert len(whole.direct_blocks) == 1
    monkeypatch.setattr(metadata, "MAX_SLOT_ROW_BYTES", 3 * 64 * 4)
    cut = step.build()
    assert cut.extra_indices is None
    assert [b.stop - b.start for b in cut.direct_blocks] == [3, 3, 3, 1]
    for _ in range(2):
        got, want = (
            dsv4x.sparse_mla_attention(q, step.swa, step.extra, meta, None, sink, path="direct")
            for meta in (cut, whole)
        )
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(("ratio", "path"), [(r, p) for r in (1, 4, 128) for p in (*paths_of(r), None)])
def test_a_step_without_the_lse_is_the_same_step(path, ratio, make_step, rng, monkeypatch):
    monkeypatch.setattr(metadata, "MAX_SLOT_ROW_BYTES", 3 * 64 * 4)
    for requests in (BATCHES["mixed"], [(0, 9)]):
        step = make_step(requests, ratio)
        meta = step.build()
        q, topk, sink = attention_case(step, rng)
        # Small enough that rows gathered come in several groups; one token's references need more.
        cap = max(s for _, s in requests) * 1024 + (400_000 if path == "referenced" else 8000)
        chunk = dsv4x.SparsePrefillChunkCache(cap).rebuild(meta)
        assert chunk.fits
        arguments = (q, step.swa, step.extra, meta, topk, sink)
        want, lse = dsv4x.sparse_mla_attention(*arguments, path=path, chunk=chunk)
        got, none = dsv4x.sparse_mla_attention(*arguments, path=path, chunk=chunk, return_lse=False)
        assert none is None
        assert torch.equal(got, want)
        assert lse.shape == q.shape[:2]


def test_a_chunk_is_for_the_metadata_it_was_built_for(make_step, rng):
    step = make_step(BATCHES["mixed"], 4)
    meta, other = step.build(), step.build()
    q, topk, sink = attention_case(step, rng)
    chunk = dsv4x.SparsePrefillChunkCache()

    def run():
        return dsv4x.sparse_mla_attention(q, step.swa, step.extra, meta, topk, sink, path="gathered", chunk=chunk)

    with pytest.raises(ValueError, match=r"chunk: built for nothing, need rebuild\(meta\)"):
        run()
    chunk.rebuild(other)
    with pytest.raises(ValueError, match=r"chunk: built for other metadata, need rebuild\(meta\)"):
        run()
    for read in ("fits", "workspace_rows", "workspace_bytes", "groups", "window"):
        with pytest.raises(ValueError, match=r"chunk: built for nothing, need rebuild\(meta\)"):
            getattr(dsv4x.SparsePrefillChunkCache(), read)
    for wrong, message in ((5, "chunk: got int"), (meta, "chunk: got AttentionMetadata")):
        with pytest.raises(TypeError, match=message):
            dsv4x.sparse_mla_attention(q, step.swa, step.extra, meta, topk, chunk=wrong)
    with pytest.raises(TypeError, match="meta: got NoneType"):
        dsv4x.sparse_mla_attention(q, step.swa, step.extra, None, topk)
    with pytest.raises((TypeError, ValueError), match="kernel: got"):
        dsv4x.sparse_mla_attention(q, step.swa, step.extra, meta, topk, kernel=["triton"])
    small = dsv4x.SparsePrefillChunkCache(workspace=torch.empty(3, 512, dtype=torch.bfloat16)).rebuild(meta)
    with pytest.raises(ValueError, match="pass the cap of 268435456 bytes, or the 3 rows of the workspace"):
        dsv4x.sparse_mla_attention(q, step.swa, step.extra, meta, topk, path="gathered", chunk=small)
    first = chunk.rebuild(meta)
    assert first is chunk
    want = run()
    for tensor in (meta.seq_lens, meta.query_start_loc, meta.swa_block_table, meta.extra_block_table):
        tensor.add_(0)
        with pytest.raises(ValueError, match="chunk: a length or a block table changed in place since rebuild"):
            run()
        with pytest.raises(ValueError, match=r"meta: a length .* changed in place since it was filled, need update"):
            chunk.rebuild(meta)
        meta.update(meta.query_start_loc, meta.seq_lens, meta.swa_block_table, meta.extra_block_table)
        chunk.rebuild(meta)
    assert all(map(torch.equal, run(), want))
    chunk.close()
    with pytest.raises(ValueError, match="chunk: built for nothing"):
        run()


@pytest.mark.parametrize(("ratio", "path"), [(r, p) for r in (1, 4, 128) for p in (*paths_of(r), None)])
def test_a_step_under_inference_mode_is_the_same_step(path, ratio, make_step, rng):
    """As servers run: the tensors made there have no version counter."""
    step = make_step(BATCHES["mixed"], ratio, padding=2)
    q, topk, sink = attention_case(step, rng)
    want = dsv4x.sparse_mla_attention(q, step.swa, step.extra, step.build(), topk, sink, path=path)
    with torch.inference_mode():
        meta = step.build()
        assert meta.seq_lens.is_inference()
        for _ in range(2):
            got = dsv4x.sparse_mla_attention(q, step.swa, step.extra, meta, topk, sink, path=path)
            assert all(map(torch.equal, got, want))


def test_a_rebuilt_chunk_forgets_the_one_before(make_step, rng):
    chunk = dsv4x.SparsePrefillChunkCache()
    for ratio in (128, 1, 4, 128):
        for requests in (BATCHES["mixed"], [(4, 700)], [(1, 5)]):
            step = make_step(requests, ratio)
            meta = step.build()
            q, topk, sink = attention_case(step, rng)
            got = dsv4x.sparse_mla_attention(
                q, step.swa, step.extra, meta, topk, sink, path="gathered", chunk=chunk.rebuild(meta)
            )
            check_prefill(*got, *step.expected(q, topk, sink))


@pytest.mark.parametrize(("op", "path"), [("sparse_mla_decode", "gathered"), ("sparse_mla_prefill", "direct")])
def test_a_path_whose_kernel_refuses_leaves_the_other(op, path, make_step, rng, replaced):
    step = make_step(BATCHES["mixed"])
    q, topk, _ = attention_case(step, rng)
    arguments = (q, step.swa, step.extra, step.build(), topk)
    for name in (op, "sparse_mla_prefill"):
        record = registry.find(name, "reference")
        replaced(dataclasses.replace(record, further_reasons=lambda problem: ["it is not in"]))
        if name == op:
            explanation = dsv4x.explain_step(*arguments, kernel="reference")
            assert (explanation.chosen, explanation.kernels[path]) == (path, "reference")
    if op == "sparse_mla_decode":
        with pytest.raises(dsv4x.KernelNotSupported, match="it is not in"):
            dsv4x.sparse_mla_attention(*arguments, kernel="reference")


@pytest.mark.parametrize(("ratio", "path"), [(r, p) for r in (1, 4, 128) for p in paths_of(r)])
def test_pages_past_the_metadatas_are_no_entries(ratio, path, kernel_device, make_step, on_device, rng):
    """The caches may have more: their bytes past the pool are another's."""
    kernel, device = kernel_device
    step = make_step([(3, 300), (1, 40)], ratio, extra_page_size=1)
    # Of each cache's last page, one position that is read.
    step.swa_table[1][39 // 4] = step.swa.pages - 1
    if step.extra is not None:
        step.extra_table[0][0] = step.extra.pages - 1
    smaller = {name: one_page_less(getattr(step, name)) for name in ("swa", "extra")}
    run_and_check(dataclasses.replace(step, **smaller), path, kernel, device, on_device, rng, step)


def one_page_less(cache):
    return cache and PagedCache(cache.data[:-1], cache.layout, cache.page_size)


def test_the_layouts_of_the_default_step_are_the_models():
    meta = dsv4x.AttentionMetadata.build(
        int32([0, 1]), int32([200]), int32([[0, 1, 2, 3]]), compress_ratio=1, swa_page_size=64, swa_pages=4
    )
    assert (meta.window_size, meta.swa_indices.shape, meta.swa_lens.tolist()) == (128, (1, 128), [128])
    cache = PagedCache.zeros(4, DSV4, 64)
    out, lse = dsv4x.sparse_mla_attention(torch.ones(1, 1, 512, dtype=torch.bfloat16), cache, None, meta)
    assert not out.any()
    assert lse.item() == pytest.approx(np.log(128))
