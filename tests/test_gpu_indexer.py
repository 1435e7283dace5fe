"""The indexer on a real GPU: DeepGEMM's and Triton's logits against the oracle, past every limit, captured, bounded."""

import pytest
import torch

import dsv4x
from dsv4x import PagedCache, layouts
from dsv4x.common.dispatch import registry

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "deep_gemm"])
def kernel(request):
    if request.param == "deep_gemm":
        if dsv4x.platform.backend != "cuda":
            pytest.skip(f"backend is {dsv4x.platform.backend}")
        from dsv4x.cuda.deep_gemm import ARCHS, DEEP_GEMM

        if dsv4x.platform.arch not in ARCHS or DEEP_GEMM.reason:
            pytest.skip(DEEP_GEMM.reason or f"arch is {dsv4x.platform.arch}")
    return request.param


def pool(pages, page_size=64, stride=None):
    """A pool of random entries, written without the quantizer: codes of values around 1, scales around 1."""
    stride = stride or page_size * 132
    data = torch.zeros(pages, stride, dtype=torch.uint8, device="cuda")
    for start in range(0, pages, 4096):
        part = data[start : start + 4096]
        values = torch.randn(len(part), page_size * 128, device="cuda").to(torch.float8_e4m3fn)
        part[:, : page_size * 128] = values.view(torch.uint8)
        scales = torch.rand(len(part), page_size, device="cuda") + 0.5
        part[:, page_size * 128 : page_size * 132] = scales.view(torch.uint8)
    return PagedCache(data, layouts.INDEXER_FP8, page_size)


def batch_of(batch, next_n, cache, width, heads=64):
    q = torch.randn(batch, next_n, heads, 128, device="cuda").to(torch.float8_e4m3fn)
    weights = torch.randn(batch * next_n, heads, device="cuda")
    lens = torch.randint(0, width + 1, (batch, 1), device="cuda") - torch.arange(next_n - 1, -1, -1, device="cuda")
    columns = -(-width // cache.page_size)
    table = torch.randint(0, cache.pages, (batch, columns), device="cuda", dtype=torch.int32)
    return q, weights, lens.clamp_min(0).int(), table


def check(got, want):
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    x, y = got[want > -torch.inf].double(), want[want > -torch.inf].double()
    assert 1 - 2 * (x * y).sum() / (x * x + y * y).sum() < 5e-6


@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("heads", [32, 64])
def test_logits_agree_with_the_oracle(kernel, heads, next_n):
    torch.manual_seed(next_n)
    cache = pool(500, stride=64 * 132 * 2)
    q, weights, lens, table = batch_of(9, next_n, cache, 3000, heads)
    table[0, 3], table[1, 0], table[2, 5] = 500, -(2**31), 2**31 - 1
    lens[3] = 0
    lens[4] = 2**31 - 1
    want = dsv4x.paged_mqa_logits(q, cache, weights, lens, table, 2990, kernel="reference")
    check(dsv4x.paged_mqa_logits(q, cache, weights, lens, table, 2990, kernel=kernel), want)
    out = torch.full_like(want, torch.nan)
    assert dsv4x.paged_mqa_logits(q, cache, weights, lens, table, 2990, out=out, kernel=kernel) is out
    check(out, want)
    lens = lens.clamp_max(2990)
    schedule = dsv4x.get_paged_mqa_logits_metadata(lens)
    check(dsv4x.paged_mqa_logits(q, cache, weights, lens, table, 2990, schedule, kernel=kernel), want)


@pytest.mark.parametrize("next_n", [4, 6])
@pytest.mark.parametrize("scheduled", [False, True])
def test_pairs_of_rows_have_the_bits_of_their_own_calls(kernel, scheduled, next_n):
    torch.manual_seed(8)
    cache, width = pool(700), 9000
    q, weights, lens, table = batch_of(37, next_n, cache, width)
    # Wider than the context, and pages past it are outside the pool.
    table = torch.cat([table, torch.full_like(table, 2**31 - 1)], 1)
    lens[::5] = 0

    def run(rows, clean):
        part = lens[:, rows].contiguous()
        schedule = dsv4x.get_paged_mqa_logits_metadata(part) if scheduled else None
        return dsv4x.paged_mqa_logits(
            q[:, rows].contiguous(), cache, weights.unflatten(0, (37, next_n))[:, rows].flatten(0, 1).contiguous(),
            part, table, width, schedule, kernel=kernel, clean_logits=clean,
        )  # fmt: skip

    pairs = [run(slice(at, at + 2), True).unflatten(0, (37, 2)) for at in range(0, next_n, 2)]
    want = torch.cat(pairs, 1).flatten(0, 1)
    assert torch.equal(run(slice(None), True), want)
    entries = want > -torch.inf
    assert torch.equal(run(slice(None), False)[entries], want[entries])


@pytest.mark.parametrize("relative", [None, 700, 5000])
def test_flat_logits_agree_with_the_oracle(kernel, relative):
    torch.manual_seed(1)
    rows, entries = 301, 3001
    q = torch.randn(rows, 64, 128, device="cuda").to(torch.float8_e4m3fn)
    k, k_scale = torch.randn(entries, 128, device="cuda").to(torch.float8_e4m3fn), torch.rand(entries, device="cuda")
    k_scale[17] = torch.nan
    weights = torch.randn(rows, 64, device="cuda")
    ks = torch.randint(-5, entries, (rows,), device="cuda").int()
    ke = torch.randint(0, entries + 5, (rows,), device="cuda").int()
    ks[5], ke[5] = 2**31 - 1, -(2**31)
    want = dsv4x.mqa_logits(q, k, k_scale, weights, ks, ke, relative, kernel="reference")
    check(dsv4x.mqa_logits(q, k, k_scale, weights, ks, ke, relative, kernel=kernel), want)


@pytest.mark.parametrize("batch", [58112, 58113, 200_000])
def test_batches_at_and_past_the_schedules_limit(kernel, batch):
    torch.manual_seed(2)
    cache = pool(1000)
    q, weights, lens, table = batch_of(batch, 1, cache, 300, 32)
    got = dsv4x.paged_mqa_logits(q, cache, weights, lens, table, 300, kernel=kernel)
    some = torch.randint(0, batch, (300,), device="cuda")
    check(
        got[some],
        dsv4x.paged_mqa_logits(q[some], cache, weights[some], lens[some], table[some], 300, kernel="reference"),
    )
    nothing = dsv4x.paged_mqa_logits(q, cache, weights, torch.zeros_like(lens), table, 300, kernel=kernel)
    assert (nothing == -torch.inf).all()


@pytest.mark.parametrize("batch", [1, 64, 4097, 58112])
def test_the_schedule_is_deep_gemms(batch):
    record = registry.find("get_paged_mqa_logits_metadata", "deep_gemm")
    if record is None or record.library.reason:
        pytest.skip("no DeepGEMM here")
    torch.manual_seed(3)
    for next_n in (1, 2, 4):
        lens = torch.randint(0, 9000, (batch, next_n), device="cuda").int()
        lens[torch.rand(batch, device="cuda") < 0.3] = 0
        lens[-1] = 7
        got = dsv4x.get_paged_mqa_logits_metadata(lens, kernel="triton")
        assert torch.equal(got, dsv4x.get_paged_mqa_logits_metadata(lens, kernel="deep_gemm"))
    with pytest.raises(dsv4x.KernelNotSupported, match="58113 requests, need <= "):
        dsv4x.get_paged_mqa_logits_metadata(torch.zeros(58113, 1, device="cuda").int(), kernel="deep_gemm")


def test_a_million_rows_are_scheduled():
    lens = torch.randint(0, 2000, (1_000_000, 1), device="cuda").int()
    got = dsv4x.get_paged_mqa_logits_metadata(lens, num_sms=132)
    want = dsv4x.get_paged_mqa_logits_metadata(lens.cpu(), num_sms=132, kernel="reference")
    assert torch.equal(got.cpu(), want)


def test_pages_past_two_gib(kernel):
    torch.manual_seed(4)
    cache = pool(300_000)
    assert cache.pages * cache.page_stride > 2**31
    q, weights, lens, table = batch_of(4, 2, cache, 500)
    table[:, ::2] = torch.randint(270_000, 300_000, table[:, ::2].shape, device="cuda").int()
    want = dsv4x.paged_mqa_logits(q, cache, weights, lens, table, 500, kernel="reference")
    check(dsv4x.paged_mqa_logits(q, cache, weights, lens, table, 500, kernel=kernel), want)


@pytest.mark.parametrize("next_n", [1, 4])
def test_a_captured_selection_follows_its_contents(kernel, next_n):
    torch.manual_seed(5)
    cache = pool(400)
    q, weights, lens, table = batch_of(16, next_n, cache, 3000)

    def run(budget=1 << 28):
        return dsv4x.paged_indexer_topk(
            q, cache, weights, lens, table, 3000, 512, logits_bytes=budget, kernel=kernel, topk_kernel="triton"
        )

    run()
    run(1 << 20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole, cut = run(), run(1 << 20)
    for length in (3000, 100):
        lens.copy_(torch.randint(0, length, lens.shape, device="cuda").sort(1).values)
        weights.normal_()
        graph.replay()
        want = run()
        assert torch.equal(whole, want)
        assert torch.equal(cut, want)


class Step:
    """A step of several layers' index queries over one cache, refilled and run as a server does."""

    def __init__(self, queries, limit, pages=400, **host):
        requests, self.tokens = len(queries), sum(queries)
        self.starts = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
        self.lens = torch.full((requests,), limit, dtype=torch.int32, device="cuda")
        self.cache, self.limit = pool(pages), limit
        columns = -(-limit // 4 // 64)
        self.table = torch.randint(0, pages, (requests, columns), device="cuda", dtype=torch.int32)
        self.swa_table = torch.zeros(requests, -(-limit // 64), dtype=torch.int32, device="cuda")
        extra = {4: dsv4x.ExtraPages(self.table, 64, pages, topk=512)}
        self.step = dsv4x.StepMetadata.build(
            self.starts, self.lens, self.swa_table, extra, swa_page_size=64, swa_pages=1, num_tokens=self.tokens,
            max_seq_len=limit, **host,
        )  # fmt: skip
        self.q = torch.randn(3, self.tokens, 64, 128, device="cuda").to(torch.float8_e4m3fn)
        self.weights = torch.randn(3, self.tokens, 64, device="cuda")

    def run(self, kernel, next_n):
        self.step.update(self.starts, self.lens, self.swa_table, {4: self.table})
        return [self.layer(i, kernel, next_n=next_n, topk_kernel="triton") for i in range(3)]

    def layer(self, i, kernel, **options):
        method = dsv4x.TopkMethod.PAGED
        return dsv4x.sparse_attn_indexer(
            self.q[i], self.cache, self.weights[i], self.step[4], 512, method, kernel=kernel, **options
        )

    def want(self, i, kernel, next_n):
        """The reference's selection from the kernel's own logits, made without any plan."""
        visible, width = self.step[4].visible, self.limit // 4
        if next_n is None:
            rows, named = (self.tokens, 1), {"requests": self.step[4].request}
            space = {"requests": self.step[4].request}
        else:
            rows, named, space = (-1, next_n), {}, {"next_n": next_n}
        logits = dsv4x.paged_mqa_logits(
            self.q[i].unflatten(0, rows), self.cache, self.weights[i], visible.view(rows), self.table, width,
            kernel=kernel, **named,
        )  # fmt: skip
        return dsv4x.topk_transform(
            logits, visible, 512, dsv4x.TopkMethod.PAGED, kernel="reference", block_table=self.table, page_size=64,
            pages=self.cache.pages, **space,
        )  # fmt: skip


@pytest.mark.parametrize("next_n", [None, 1, 2, 3, 4, 5, 8])
def test_a_captured_step_plans_for_the_lengths_it_finds(kernel, next_n):
    torch.manual_seed(8)
    step = Step([next_n or 2] * 9, 40_000)
    step.run(kernel, next_n)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step.run(kernel, next_n)
    # The last are past the bound, and clamped.
    for longest in (40_000, 3000, 8, 60_000):
        step.lens.copy_(torch.randint(0, longest, step.lens.shape, device="cuda").clamp_min(next_n or 2))
        step.lens[3] = 0
        step.weights.normal_()
        graph.replay()
        for i in range(3):
            assert torch.equal(got[i], step.want(i, kernel, next_n))
    assert all(map(torch.equal, got, step.run(kernel, next_n)))


def test_metadata_filled_outside_serves_a_graph_of_layers(kernel):
    torch.manual_seed(9)
    step = Step([1] * 20, 40_000)
    step.layer(0, kernel, next_n=1, topk_kernel="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [step.layer(i, kernel, next_n=1, topk_kernel="triton") for i in range(3)]
    for longest in (3000, 40_000):
        step.lens.copy_(torch.randint(1, longest, step.lens.shape, device="cuda"))
        step.step.update(step.starts, step.lens, step.swa_table, {4: step.table})
        graph.replay()
        for i in range(3):
            assert torch.equal(got[i], step.want(i, kernel, 1))


def test_chunks_and_decode_rows_in_one_call(kernel):
    torch.manual_seed(10)
    queries, lengths = [1, 1, 300, 40, 1, 17], [30_000, 100, 20_000, 40, 4000, 9000]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    step = Step(queries, 40_000, query_start_loc_cpu=starts, seq_lens_cpu=torch.full((6,), 40_000).int())
    step.lens.copy_(torch.tensor(lengths))
    update = (step.starts, step.lens, step.swa_table, {4: step.table})
    step.step.update(*update, query_start_loc_cpu=starts, seq_lens_cpu=torch.tensor(lengths).int())
    got, want = step.layer(0, kernel), step.want(0, kernel, None)
    assert torch.equal((got >= 0).sum(1), (want >= 0).sum(1))
    # Flat and paged logits are sums in other orders, which decides between neighbours of the k-th.
    common = [torch.isin(a[a >= 0], b[b >= 0]).float().mean().item() for a, b in zip(got, want) if (a >= 0).any()]
    assert min(common) > 0.98
    assert sum(common) / len(common) > 0.998


def test_a_million_tokens_times_8192_rows_run_in_256_mib(kernel):
    torch.manual_seed(6)
    rows, entries, budget = 8192, 262_144, 1 << 28
    cache = pool(entries // 64)
    q, weights, _, _ = batch_of(rows, 1, cache, 64)
    lens = torch.randint(1, entries + 1, (rows, 1), device="cuda").int()
    table = torch.arange(cache.pages, device="cuda").int().expand(rows, -1)
    out = torch.empty(rows, 512, dtype=torch.int32, device="cuda")
    arguments = (q, cache, weights, lens, table, entries, 512)
    # DeepGEMM's first call in a process keeps 32 MiB for its own matrix products.
    dsv4x.paged_mqa_logits(q[:1], cache, weights[:1], lens[:1], table[:1], entries, kernel=kernel)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dsv4x.paged_indexer_topk(*arguments, logits_bytes=budget, out=out, kernel=kernel)
    # Beside the logits: lengths, and what the selection keeps of a piece.
    assert torch.cuda.max_memory_allocated() - before <= budget + (8 << 20)
    some = torch.randint(0, rows, (3,), device="cuda")
    logits = dsv4x.paged_mqa_logits(q[some], cache, weights[some], lens[some], table[some], entries, kernel=kernel)
    assert torch.equal(out[some], dsv4x.topk_transform(logits, lens[some, 0], 512, kernel="reference"))


@pytest.mark.parametrize("k", [512, 2048])
def test_selection_of_many_long_rows(k):
    torch.manual_seed(7)
    logits = torch.randn(300, 32768, device="cuda")
    for values in (logits, (2 * logits).round(), torch.zeros_like(logits), logits.sort(1).values):
        got = dsv4x.topk_transform(values, None, k, kernel="triton")
        assert torch.equal(got, dsv4x.topk_transform(values, None, k, kernel="reference"))
