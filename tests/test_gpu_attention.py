"""Both vendors' paths on a real GPU against the oracle, within FlashMLA's own test tolerances, over random problems."""

import random

import pytest
import torch
from layer_kinds import paths_of
from tolerances import check_decode, check_prefill

import dsv4x
from dsv4x import PagedCache, layouts, platform, reference
from dsv4x.common.step.attention import PATHS
from dsv4x.common.step.chunk import chunk_of

pytestmark = pytest.mark.gpu

KERNELS = ["triton", "flash_mla", "gluon"]
TOKENS = [1, 2, 17, 128, 1000, 4097, 20000]
HEADS = [8, 16, 20, 32, 64, 100, 128]
PAGE_SIZES = [2, 61, 64, 256]


def random_pool(entries, page_size, generator):
    """A cache whose unreferenced entries are NaN in every byte, and the slots that hold values."""
    pages = -(-entries // page_size) + 2
    stride = layouts.DSV4.page_stride(page_size) * generator.choice([1, 2])
    data = torch.full((pages, stride), 0xFF, dtype=torch.uint8, device="cuda")
    cache = PagedCache(data, layouts.DSV4, page_size)
    slots = torch.randperm(cache.capacity, device="cuda")[:entries]
    k = (torch.randn(entries, 512, device="cuda") / 10).clamp(-1, 1).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, cache, slots)
    return cache, slots


def random_rows(tokens, width, values, device="cuda"):
    """Index rows with holes, all-hole rows and empty spans, and garbage past each span."""
    indices = values[torch.randint(0, len(values), (tokens, width), device=device)].int()
    indices[torch.rand(tokens, width, device=device) < 0.1] = -1
    indices[torch.rand(tokens, device=device) < 0.05] = -1
    lens = torch.randint(0, width + 1, (tokens,), device=device, dtype=torch.int32)
    lens[torch.rand(tokens, device=device) < 0.1] = 0
    lens[torch.rand(tokens, device=device) < 0.3] = width
    past = torch.arange(width, device=device) >= lens[:, None]
    return torch.where(past & (indices % 2 == 0), 2**31 - 1, indices), lens


def random_sink(heads):
    sink = torch.randn(heads, device="cuda")
    chance = torch.randn(heads, device="cuda")
    sink[chance > 0.8] = torch.inf
    sink[chance < -0.8] = -torch.inf
    return sink


def random_q(tokens, heads):
    return torch.randn(tokens, heads, 512, device="cuda").clamp(-1, 1).bfloat16()


@pytest.mark.large
@pytest.mark.parametrize("seed", range(24))
def test_decode_agrees_with_the_oracle(seed):
    torch.manual_seed(seed)
    choose = random.Random(seed)
    tokens, heads = TOKENS[seed % len(TOKENS)], choose.choice(HEADS if seed % len(TOKENS) < 6 else [8, 64])
    swa, swa_slots = random_pool(3000, choose.choice(PAGE_SIZES), choose)
    q, sink = random_q(tokens, heads), choose.choice([None, random_sink(heads)])
    arguments = [swa, *random_rows(tokens, choose.choice([64, 100, 128]), swa_slots)]
    if seed % 3:
        extra, extra_slots = random_pool(9000, choose.choice(PAGE_SIZES), choose)
        arguments += [extra, *random_rows(tokens, choose.choice([1, 96, 512, 1024]), extra_slots)]
    else:
        arguments += [None, None, None]
    expected, expected_lse = reference.sparse_mla_decode(q, *arguments, sink)
    for kernel in KERNELS:
        out = torch.full((tokens, heads, 512), torch.nan, dtype=torch.bfloat16, device="cuda")
        out, lse = dsv4x.sparse_mla_decode(q, *arguments, sink, out=choose.choice([None, out]), kernel=kernel)
        check_decode(out, lse, expected, expected_lse)


@pytest.mark.large
@pytest.mark.parametrize("seed", range(21))
def test_prefill_agrees_with_the_oracle(seed):
    torch.manual_seed(100 + seed)
    choose = random.Random(seed)
    tokens, heads = TOKENS[seed % len(TOKENS)], choose.choice(HEADS if seed % len(TOKENS) < 6 else [8, 64])
    q, sink = random_q(tokens, heads) / 10, choose.choice([None, random_sink(heads)])
    kv = (torch.randn(5000, 512, device="cuda") / 10).bfloat16()
    rows = torch.randperm(5000, device="cuda")[:4000]
    unreferenced = torch.ones(5000, dtype=torch.bool, device="cuda")
    unreferenced[rows] = False
    kv[unreferenced] = torch.nan
    indices, lens = random_rows(tokens, choose.choice([1, 100, 128, 640, 1152]), rows)
    expected, expected_lse = reference.sparse_mla_prefill(q, kv, indices, lens, sink)
    for kernel in KERNELS:
        out, lse = dsv4x.sparse_mla_prefill(q, kv, indices, lens, sink, kernel=kernel)
        check_prefill(out, lse, expected, expected_lse)


@pytest.mark.parametrize("kernel", KERNELS)
def test_hostile_indices_read_nothing(kernel):
    """INT_MIN, -2, one past the end and 2**31-1 inside the span are no entries, on FlashMLA too."""
    torch.manual_seed(1)
    choose = random.Random(1)
    swa, slots = random_pool(500, 61, choose)
    extra, extra_slots = random_pool(500, 2, choose)
    hostile = [-(2**31), -2, 2**31 - 1]
    scopes = []
    for cache, values in ((swa, slots), (extra, extra_slots)):
        indices, lens = random_rows(200, 128, values)
        bad = torch.tensor([*hostile, cache.capacity], dtype=torch.int32, device="cuda")
        where = torch.rand(200, 128, device="cuda") < 0.3
        indices = torch.where(where, bad[torch.randint(0, 4, (200, 128), device="cuda")], indices)
        scopes += [cache, indices, lens]
    q = random_q(200, 64)
    expected = reference.sparse_mla_decode(q, *scopes)
    check_decode(*dsv4x.sparse_mla_decode(q, *scopes, kernel=kernel), *expected)
    kv = torch.randn(300, 512, device="cuda").bfloat16() / 10
    rows, lens = random_rows(200, 128, torch.arange(300, device="cuda"))
    rows = torch.where(torch.rand(200, 128, device="cuda") < 0.3, 300, rows)
    expected = reference.sparse_mla_prefill(q / 10, kv, rows, lens)
    check_prefill(*dsv4x.sparse_mla_prefill(q / 10, kv, rows, lens, kernel=kernel), *expected)
    torch.cuda.synchronize()


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_slots_past_four_gib(kernel):
    """Byte offsets pass 2**32: the last page is written, read back and attended to."""
    pages = 4 * 2**30 // layouts.DSV4.page_stride(64) + 5
    cache = PagedCache.zeros(pages, layouts.DSV4, 64, "cuda")
    assert cache.data.numel() > 2**32
    slots = torch.tensor([0, cache.capacity - 1, cache.capacity // 2, cache.capacity - 64], device="cuda")
    k = (torch.randn(4, 512, device="cuda") / 10).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, cache, slots, kernel=kernel)
    small = PagedCache.zeros(1, layouts.DSV4, 64, "cuda")
    dsv4x.quantize_and_insert_k_cache(k, small, torch.arange(4, device="cuda"), kernel=kernel)
    read = dsv4x.dequantize_k_cache_paged(cache, slots, kernel=kernel)
    assert torch.equal(read, dsv4x.dequantize_k_cache_paged(small, torch.arange(4, device="cuda"), kernel=kernel))
    # A piece at a time: torch counts bytes as 64-bit numbers, eight times the memory.
    assert sum(int(piece.count_nonzero()) for piece in cache.data.split(4096)) == int(small.data.count_nonzero())
    q = random_q(3, 64)
    indices = slots.int().expand(3, 4)
    lens = torch.tensor([1, 2, 4], dtype=torch.int32, device="cuda")
    expected = reference.sparse_mla_decode(q, cache, indices, lens)
    for attention in KERNELS:
        check_decode(*dsv4x.sparse_mla_decode(q, cache, indices, lens, kernel=attention), *expected)


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_one_page_past_two_gib(kernel):
    """A flat pool is one page: offsets inside a page pass 2**31 too."""
    page_size = 2**31 // 576 + 100
    cache = PagedCache.zeros(1, layouts.DSV4, page_size, "cuda")
    slots = torch.tensor([0, page_size - 1, page_size // 2], device="cuda")
    k = (torch.randn(3, 512, device="cuda") / 10).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, cache, slots, kernel=kernel)
    small = PagedCache.zeros(1, layouts.DSV4, 3, "cuda")
    dsv4x.quantize_and_insert_k_cache(k, small, torch.arange(3, device="cuda"), kernel="reference")
    want = dsv4x.dequantize_k_cache_paged(small, torch.arange(3, device="cuda"), kernel="reference")
    assert torch.equal(dsv4x.dequantize_k_cache_paged(cache, slots, kernel=kernel), want)
    q, indices = random_q(2, 64), slots.int().expand(2, 3)
    expected = reference.sparse_mla_decode(q, small, torch.arange(3, device="cuda").expand(2, 3), None)
    check_decode(*dsv4x.sparse_mla_decode(q, cache, indices, None, kernel="triton"), *expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_captured_step_follows_its_lengths(kernel):
    """Replays must not use splits scheduled from the lengths at capture."""
    torch.manual_seed(2)
    choose = random.Random(2)
    swa, slots = random_pool(2000, 64, choose)
    extra, extra_slots = random_pool(2000, 64, choose)
    q = random_q(16, 64)
    scopes = [swa, *random_rows(16, 128, slots), extra, *random_rows(16, 512, extra_slots)]
    schedule = {}
    dsv4x.sparse_mla_decode(q, *scopes, kernel=kernel, schedule=schedule)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = dsv4x.sparse_mla_decode(q, *scopes, kernel=kernel, schedule=schedule)
    for _ in range(4):
        q.copy_(random_q(16, 64))
        for at, values, width in ((1, slots, 128), (4, extra_slots, 512)):
            indices, lens = random_rows(16, width, values)
            scopes[at].copy_(indices)
            scopes[at + 1].copy_(lens)
        graph.replay()
        check_decode(out, lse, *reference.sparse_mla_decode(q, *scopes))


def test_a_graph_that_builds_its_metadata_schedules_its_layers_once():
    torch.manual_seed(5)
    choose = random.Random(5)
    swa, extra = (PagedCache.zeros(60, layouts.DSV4, 64, "cuda") for _ in range(2))
    for cache in (swa, extra):
        k = (torch.randn(cache.capacity, 512, device="cuda") / 10).bfloat16()
        dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(cache.capacity, device="cuda"))
    tables = [torch.randint(0, cache.pages, (4, 12), device="cuda").int() for cache in (swa, extra)]
    starts, lengths = torch.arange(5).int(), torch.tensor([700, 64, 3, 300]).int()
    starts_there, lengths_there = starts.cuda(), lengths.cuda()
    layers = [(random_q(4, 64), torch.randint(-1, 170, (4, 512), device="cuda").int()) for _ in range(3)]

    def build(lengths):
        return dsv4x.AttentionMetadata.build(
            starts_there, lengths_there, *tables, compress_ratio=4, swa_page_size=64, swa_pages=swa.pages,
            extra_page_size=64, extra_pages=extra.pages, query_start_loc_cpu=starts, seq_lens_cpu=lengths,
        )  # fmt: skip

    def run(meta, kernel):
        return [
            dsv4x.sparse_mla_attention(q, swa, extra, meta, topk, path="direct", kernel=kernel) for q, topk in layers
        ]

    run(build(lengths), "flash_mla")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        meta = build(lengths)
        results = run(meta, "flash_mla")
    # What it says of itself, and one scheduler.
    assert len(meta.kept["schedule", 0][1]) == 2
    for _ in range(3):
        lengths = torch.tensor([choose.randint(1, 700) for _ in range(4)]).int()
        lengths_there.copy_(lengths)
        graph.replay()
        for got, want in zip(results, run(build(lengths), "reference")):
            check_decode(*got, *want)


def test_a_shared_schedule_changes_nothing():
    torch.manual_seed(3)
    choose = random.Random(3)
    swa, slots = random_pool(2000, 64, choose)
    q, scopes, schedule = random_q(300, 64), [swa, *random_rows(300, 128, slots)], {}
    fresh = dsv4x.sparse_mla_decode(q, *scopes, kernel="flash_mla")
    for _ in range(3):
        shared = dsv4x.sparse_mla_decode(q, *scopes, kernel="flash_mla", schedule=schedule)
        assert all(map(torch.equal, shared, fresh))
    assert len(schedule) == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_batch_is_split_where_the_scheduler_ends(kernel):
    """One token more than the scheduler's shared memory holds, and one more than the split itself."""
    from dsv4x.cuda import flash_mla

    limit = flash_mla.scheduler_limit(platform.limits("cuda").shared_memory)
    split = flash_mla.max_batch(64, platform.limits("cuda").shared_memory)
    assert split <= limit
    choose = random.Random(4)
    swa, slots = random_pool(2000, 64, choose)
    for tokens in (split, split + 1, limit + 1):
        q, scopes = random_q(tokens, 64), [swa, *random_rows(tokens, 64, slots)]
        expected = reference.sparse_mla_decode(q, *scopes)
        check_decode(*dsv4x.sparse_mla_decode(q, *scopes, kernel=kernel), *expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fifty_repeats_are_bitwise_equal(kernel):
    torch.manual_seed(5)
    swa, slots = random_pool(2000, 61, random.Random(5))
    q, scopes = random_q(40, 64), [swa, *random_rows(40, 128, slots)]
    first = dsv4x.sparse_mla_decode(q, *scopes, kernel=kernel)
    for _ in range(50):
        again = dsv4x.sparse_mla_decode(q, *scopes, kernel=kernel)
        assert all(map(torch.equal, first, again))


def test_the_chosen_kernel_is_flash_mla_here():
    problem = dsv4x.Problem("sparse_mla_decode", "cuda", platform.arch, tokens=4096, heads=64, width=128)
    assert dsv4x.explain(problem).chosen == "flash_mla", str(dsv4x.explain(problem))


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_current_device_need_not_be_the_tensors(kernel):
    """A caller whose current device is 0 hands over tensors of device 1."""
    torch.manual_seed(6)
    choose = random.Random(6)
    with torch.cuda.device(1):
        swa, slots = random_pool(300, 61, choose)
        q, scopes = random_q(20, 64), [swa, *random_rows(20, 100, slots)]
        expected = reference.sparse_mla_decode(q, *scopes)
        kv = torch.randn(50, 512, device="cuda").bfloat16() / 10
        rows, lens = random_rows(20, 100, torch.arange(50, device="cuda"))
        expected_prefill = reference.sparse_mla_prefill(q / 10, kv, rows, lens)
    assert torch.cuda.current_device() == 0
    assert q.device.index == 1
    check_decode(*dsv4x.sparse_mla_decode(q, *scopes, kernel=kernel), *expected)
    check_prefill(*dsv4x.sparse_mla_prefill(q / 10, kv, rows, lens, kernel=kernel), *expected_prefill)
    k = dsv4x.dequantize_k_cache_paged(swa, slots)
    dsv4x.quantize_and_insert_k_cache(k, swa, slots)
    assert torch.equal(dsv4x.dequantize_k_cache_paged(swa, slots), k)


def long_step(tokens, prefix, requests, ratio=4, topk=512, heads=64):
    """A chunk behind a long prefix, both spread over ``requests``, over pools in which every entry is live."""
    torch.manual_seed(7)
    queries, length = tokens // requests, (prefix + tokens) // requests
    starts = torch.arange(requests + 1, dtype=torch.int32) * queries
    lengths = torch.full((requests,), length, dtype=torch.int32)
    small, _ = random_pool(16384 - 128, 64, random.Random(7))
    k = (torch.randn(small.capacity, 512, device="cuda") / 10).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, small, torch.arange(small.capacity, device="cuda"))
    caches, tables = [], []
    for entries in (length, length // ratio):
        pages = -(-entries // 64)
        data = small.page_bytes.repeat(-(-requests * pages // small.pages), 1)[: requests * pages]
        stride = layouts.DSV4.page_stride(64)
        caches.append(PagedCache(torch.nn.functional.pad(data, (0, stride - data.shape[1])), layouts.DSV4, 64))
        tables.append(torch.randperm(requests * pages, device="cuda").int().view(requests, pages))
    meta = dsv4x.AttentionMetadata.build(
        starts.cuda(), lengths.cuda(), *tables, compress_ratio=ratio, swa_page_size=64,
        swa_pages=caches[0].pages, extra_page_size=64, extra_pages=caches[1].pages,
        query_start_loc_cpu=starts, seq_lens_cpu=lengths,
    )  # fmt: skip
    chosen = None
    if ratio == 4:
        chosen = (torch.rand(queries * requests, topk, device="cuda") * meta.visible[:, None]).int()
    q = random_q(queries * requests, heads)
    return q, *caches, meta, chosen, torch.randn(heads, device="cuda")


@pytest.mark.parametrize(("ratio", "path"), [(r, p) for r in (4, 128) for p in (*paths_of(r), None)])
def test_a_long_chunk_stays_within_its_cap(path, ratio):
    """Eight requests behind a million tokens: the workspace is filled more than once, with the same answers."""
    arguments = long_step(8192, 1 << 20, 8, ratio)
    meta = arguments[3]
    roomy = dsv4x.SparsePrefillChunkCache(1 << 30).rebuild(meta)
    # Bits are one kernel's, and prediction may pick another for a part than for the whole.
    want, want_lse = dsv4x.sparse_mla_attention(*arguments, path="gathered", kernel="flash_mla", chunk=roomy)
    assert len(roomy.groups) == 1
    chunk = chunk_of(meta)
    assert chunk.workspace_bytes <= 256 << 20
    assert len(chunk.groups) == (2 if ratio == 4 else 1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = dsv4x.sparse_mla_attention(*arguments, path=path, kernel=path and "flash_mla")
    peak = torch.cuda.max_memory_allocated() - before
    # The op's own results, and what FlashMLA returns for a part before it is copied into them.
    results = out.numel() * 2 * 2 + lse.numel() * 4 * 2
    # In place, FlashMLA's float32 partial outputs take the memory, bounded apart.
    cap = (256 << 20) if path != "direct" else (1 << 30)
    assert peak - results <= cap + (32 << 20), f"{peak >> 20} MiB, of them {results >> 20} results"
    if path in ("gathered", "referenced"):
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
    else:
        check_prefill(out, lse, want, want_lse)


def test_a_thousand_calls_leave_memory_where_it_was():
    arguments = long_step(1024, 1 << 15, 3)
    for path in PATHS:
        dsv4x.sparse_mla_attention(*arguments, path=path)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for i in range(1000):
        dsv4x.sparse_mla_attention(*arguments, path=(*PATHS, None)[i % 4])
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.large
@pytest.mark.parametrize("ratio", [4, 128])
def test_32768_tokens_in_one_call(ratio):
    q, swa, extra, meta, chosen, sink = long_step(32768, 1 << 17, 1, ratio)
    out, lse = dsv4x.sparse_mla_attention(q, swa, extra, meta, chosen, sink)
    direct, direct_lse = dsv4x.sparse_mla_attention(q, swa, extra, meta, chosen, sink, path="direct")
    check_prefill(out, lse, direct, direct_lse)


@pytest.mark.parametrize(
    ("path", "kernel", "tokens", "launches"),
    [("gathered", "flash_mla", 16, 2), ("direct", "gluon", 512, 1), ("direct", "triton", 512, 1)],
)
def test_how_many_launches_a_c4_layer_is(path, kernel, tokens, launches):
    """The direct one where rows are not split: these kernels make slots of top-k themselves."""
    arguments = long_step(tokens, 0, 1)
    run = lambda: dsv4x.sparse_mla_attention(*arguments, path=path, kernel=kernel)  # noqa: E731
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # Without conftest's poison.
    kernels = [name for name in on_device if "FillFunctor" not in name]
    assert len(kernels) == launches, kernels
