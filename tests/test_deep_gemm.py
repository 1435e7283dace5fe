"""DeepGEMM's calls, both generations of its API, on doubles that keep its promises and no more."""

from types import SimpleNamespace

import pytest
import torch

import dsv4x
from dsv4x import PagedCache, layouts, reference
from dsv4x.common.core.logits_calls import FlatLogitsCall, PagedLogitsCall
from dsv4x.common.core.platform import DeviceLimits
from dsv4x.common.dispatch import registry
from dsv4x.cuda import deep_gemm

GARBAGE = 12345.0
SMS = 7
MACHINES = [
    ("0.1", "sm_90"), ("0.2", "sm_90"), ("0.1", "sm_100"), ("0.2", "sm_100"), ("0.2", "sm_107"), ("0.2", "sm_120"),
    ("0.2", "sm_121"),
]  # fmt: skip


class Double:
    """Scores a request's rows over its last row's length in whole segments, garbage behind, and checks what it gets."""

    def __init__(self, generation, arch):
        self.generation, self.arch, self.calls = generation, arch, []
        self.mx = generation == "0.2" and arch.startswith("sm_10")
        if generation == "0.1":

            def fp8_paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len,
                                     clean_logits=False, indices=None):  # fmt: skip
                assert not clean_logits
                return self.paged(q, None, kv_cache, weights, context_lens, block_table, schedule_meta,
                                  max_context_len, indices)  # fmt: skip

            def fp8_mqa_logits(q, kv, weights, ks, ke, clean_logits=False, max_seqlen_k=0):
                assert not clean_logits
                return self.flat(q, None, *kv, weights, ks, ke, max_seqlen_k)

            def fp8_fp4_paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, schedule_meta,
                                         max_context_len, clean_logits=False, logits_dtype=torch.float,
                                         indices=None):  # fmt: skip
                return self.paged(*q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len,
                                  indices)  # fmt: skip

            def fp8_fp4_mqa_logits(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits=False,
                                   max_seqlen_k=0, logits_dtype=torch.float):  # fmt: skip
                return self.flat(*q, *kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, max_seqlen_k)

            self.fp8_paged_mqa_logits, self.fp8_mqa_logits = fp8_paged_mqa_logits, fp8_mqa_logits
        else:

            def fp8_fp4_paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, schedule_meta,
                                         max_context_len, indices=None):  # fmt: skip
                return self.paged(*q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len,
                                  indices)  # fmt: skip

            def fp8_fp4_mqa_logits(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, max_seqlen_k,
                                   schedule_meta=None):  # fmt: skip
                assert max_seqlen_k > 0
                return self.flat(*q, *kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, max_seqlen_k)

            self.get_mqa_logits_metadata = None  # of 0.2.3 on

        self.fp8_fp4_paged_mqa_logits, self.fp8_fp4_mqa_logits = fp8_fp4_paged_mqa_logits, fp8_fp4_mqa_logits

    def take(self, q, q_sf, weights):
        """``check_mqa_logits_q_and_weights`` of 0.2.5, and what 0.2.3 asks instead; float32 weights for the oracle."""
        ten, is_fp4 = self.arch.startswith("sm_10"), q.dtype == torch.int8
        assert q_sf is not None or not is_fp4
        if self.generation == "0.2":
            assert (q_sf is not None) == (ten or (self.arch.startswith("sm_12") and is_fp4))
        else:
            assert q_sf is None or ten
        assert weights.dtype == (torch.bfloat16 if self.mx else torch.float32)
        assert weights.stride(1) == 1
        assert weights.stride(0) * weights.element_size() % 16 == 0
        return weights.float()

    def scaled(self, q, q_sf):
        """q and its scales as the oracle takes them; those of an fp8 q are 1 here."""
        if q_sf is None:
            return q, None
        assert q_sf.dtype == torch.int32
        assert q_sf.is_contiguous()
        if q.dtype == torch.int8:
            return q.view(torch.uint8), q_sf.unsqueeze(-1).view(torch.uint8)
        assert (q_sf.unsqueeze(-1).view(torch.uint8) == 127).all()
        return q, None

    def page_sizes(self):
        newest = self.generation == "0.2"
        return {"sm_9": (64,), "sm_10": (32, 64, 128) if newest else (32, 64),
                "sm_12": (32, 64, 128, 256) if newest else (64,)}[self.arch[:-1]]  # fmt: skip

    def get_num_sms(self):
        return SMS

    def get_paged_mqa_logits_metadata(self, context_lens, block_kv, num_sms, indices=None):
        assert context_lens.dim() == 2
        assert context_lens.is_contiguous()
        assert context_lens.dtype == torch.int32
        assert (indices is not None) == self.mx
        out = torch.empty(num_sms + 1, 2, dtype=torch.int32)
        reference.get_paged_mqa_logits_metadata(
            context_lens, 4 * block_kv, -(-context_lens.shape[1] // 2), num_sms, out
        )
        return out

    def paged(self, q, q_sf, kv, weights, lens, table, schedule, max_context_len, indices):
        batch, next_n = q.shape[:2]
        call = SimpleNamespace(q=q, weights=weights, table=table, lens=lens, schedule=schedule, indices=indices)
        self.calls.append(call)
        assert q.is_contiguous()
        assert weights.is_contiguous()
        assert weights.shape == (batch * next_n, q.shape[2])
        assert lens.is_contiguous()
        assert lens.dtype == torch.int32
        assert lens.shape == (batch, next_n)
        assert table.shape[0] == batch
        assert table.stride(1) == 1
        assert schedule.shape == (SMS + 1, 2)
        assert schedule.is_contiguous()
        weights = self.take(q, q_sf, weights)
        assert self.arch != "sm_90" or next_n <= 2
        assert (indices is not None) == self.mx
        _, page_size, one, entry = kv.shape
        assert page_size in self.page_sizes()
        assert torch.equal(schedule, self.get_paged_mqa_logits_metadata(lens, page_size, SMS, indices))
        assert one == 1
        fp8 = layouts.INDEXER_FP8 if q_sf is None else layouts.INDEXER_MXFP8
        layout = layouts.INDEXER_FP4 if q.dtype == torch.int8 else fp8
        assert entry == layout.entry_bytes
        assert q.dtype in (torch.float8_e4m3fn, torch.int8)
        cache = PagedCache(kv, layout, page_size)
        if q_sf is not None:
            assert q_sf.shape == q.shape[:3]
        q, q_sf = self.scaled(q, q_sf)
        lens = lens[:, -1:].expand(batch, next_n)
        if indices is not None:
            assert next_n == 1
            first = torch.cat([torch.ones(1, dtype=torch.bool), indices[1:] != indices[:-1]]).cumsum(0) - 1
            starts = torch.stack([(first == i).nonzero()[0, 0] for i in range(int(first.max()) + 1)])
            table = table[starts[first]]
        aligned = -(-max_context_len // 256) * 256
        # Segments beyond the length's are never written, and the last one is to its end.
        assert int(lens.max()) <= table.shape[1] * page_size
        values = reference.paged_mqa_logits(q, q_sf, cache, weights, lens, table, aligned)
        values[values == -torch.inf] = GARBAGE
        values[:, 0] = torch.where(lens.reshape(-1) > 0, values[:, 0], torch.nan)
        call.out = (values.bfloat16() if self.mx else values)[:, :max_context_len]
        return call.out

    def flat(self, q, q_sf, k, k_sf, weights, ks, ke, max_seqlen_k):
        self.calls.append(SimpleNamespace(q=q))
        assert (ks >= 0).all()
        assert (ks <= ke).all()
        assert (ke <= len(k)).all()
        assert max_seqlen_k == 0 or (ke - ks <= max_seqlen_k).all()
        for value in (q, k, k_sf, weights, ks, ke):
            assert value.is_contiguous()
        weights = self.take(q, q_sf, weights)
        assert k_sf.dtype == (torch.float32 if q_sf is None else torch.int32)
        assert k.dtype == q.dtype
        if q_sf is not None:
            k_sf = k_sf.unsqueeze(-1).view(torch.uint8)
        if k.dtype == torch.int8:
            k = k.view(torch.uint8)
        lost = k_sf.isnan() if q_sf is None else torch.zeros(len(k), dtype=torch.bool)
        k_sf = k_sf if q_sf is not None else k_sf.nan_to_num(1.0)
        q, q_sf = self.scaled(q, q_sf)
        values = reference.mqa_logits(q, q_sf, k, k_sf, weights, ks, ke, max_seqlen_k or None)
        values = values.masked_fill(values == -torch.inf, GARBAGE)
        for entry in lost.nonzero()[:, 0].tolist():
            for row in ((ks <= entry) & (entry < ke)).nonzero()[:, 0].tolist():
                values[row, entry - (int(ks[row]) if max_seqlen_k else 0)] = torch.nan
        return values.bfloat16() if self.mx else values


@pytest.fixture
def double(monkeypatch):
    """Install a generation's double as the library, and an arch as the CPU's."""

    def install(generation, arch="sm_90", shared_memory=232448):
        module = Double(generation, arch)
        monkeypatch.setitem(vars(deep_gemm.DEEP_GEMM), "_loaded", (module, None, None))
        limits = DeviceLimits(arch, "double", SMS, shared_memory, 32, 0, "e4m3fn")
        monkeypatch.setattr(deep_gemm, "platform", SimpleNamespace(limits=lambda device=None: limits))
        return module

    return install


def problem(rng, next_n, layout=layouts.INDEXER_FP8, page_size=64, columns=5, hostile=True):
    batch, heads = 4, 32
    cache = PagedCache.zeros(23, layout, page_size)
    k = torch.randn(cache.capacity, 128, generator=rng).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(cache.capacity), kernel="reference")
    buffer = torch.full((batch + 1, 9), 2**31 - 1, dtype=torch.int32)
    buffer[:batch, :columns] = torch.randperm(23, generator=rng)[: batch * columns].view(batch, columns)
    table = buffer[:batch, :columns]
    lens = torch.randint(0, columns * page_size - 20, (batch, next_n), generator=rng).int()
    lens[1] = 0
    if hostile:
        lens[2, 0], lens[3, -1] = -5, 2**31 - 1
        table[0, 1] = 23
    if layout is layouts.INDEXER_FP4:
        q = torch.randint(0, 256, (batch, next_n, heads, 64), generator=rng, dtype=torch.uint8)
        q_scale = torch.randint(120, 130, (batch, next_n, heads, 4), generator=rng, dtype=torch.uint8)
    else:
        q, q_scale = torch.randn(batch, next_n, heads, 128, generator=rng).to(torch.float8_e4m3fn), None
    weights = torch.randn(batch * next_n, heads, generator=rng)
    return q, q_scale, cache, weights, lens, table


def assert_same(got, want, mx=False):
    assert got.dtype == torch.float32
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    # One step of bf16: a sum in another order rounds to the neighbour.
    assert torch.allclose(got, want, rtol=2.0**-7 if mx else 1e-5, atol=1e-4)


def rounded(module, weights):
    """The weights as the library has them."""
    return weights.bfloat16().float() if module.mx else weights


@pytest.mark.interpreter
@pytest.mark.parametrize("next_n", [1, 2, 3])
@pytest.mark.parametrize("arch", ["sm_100", "sm_107"])
def test_mxfp8_pages_are_scored_on_sm100(double, rng, arch, next_n):
    module = double("0.2", arch)
    assert reasons(arch=arch, layout="indexer mxfp8")[0] == []
    q, _, cache, weights, *rest = problem(rng, next_n, layouts.INDEXER_MXFP8)
    got = deep_gemm.paged_mqa_logits(PagedLogitsCall(q, None, cache, weights, *rest, 280, None, None, True))
    assert_same(got, reference.paged_mqa_logits(q, None, cache, rounded(module, weights), *rest, 280), True)
    assert module.calls[0].q.dtype == torch.float8_e4m3fn


@pytest.mark.interpreter
@pytest.mark.parametrize("relative", [None, 50])
def test_mxfp8_rows_are_scored_on_sm100(double, rng, relative):
    module = double("0.2", "sm_100")
    assert reasons(op="mqa_logits", arch="sm_100", k="mxfp8")[0] == []
    q, k = (torch.randn(*shape, 128, generator=rng).to(torch.float8_e4m3fn) for shape in ((6, 32), (90,)))
    k_scale = torch.randint(120, 130, (90, 4), generator=rng, dtype=torch.uint8)
    weights = torch.randn(6, 32, generator=rng)
    ks, ke = torch.tensor([0, 3, 80, 90, 5, 0]).int(), torch.tensor([90, 50, 20, 90, 95, 1]).int()
    got = deep_gemm.mqa_logits(FlatLogitsCall(q, None, k, k_scale, weights, ks, ke, relative, None, True))
    assert_same(got, reference.mqa_logits(q, None, k, k_scale, rounded(module, weights), ks, ke, relative), True)


@pytest.mark.interpreter
@pytest.mark.parametrize("given_out", [False, True])
@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(("generation", "arch"), MACHINES)
def test_paged_logits_keep_the_contract(double, rng, generation, arch, next_n, given_out):
    module = double(generation, arch)
    layout = layouts.INDEXER_FP4 if module.mx else layouts.INDEXER_FP8
    q, q_scale, cache, weights, lens, table = problem(rng, next_n, layout)
    width = 280
    out = torch.full((len(q) * next_n, width), torch.nan) if given_out else None
    got = deep_gemm.paged_mqa_logits(PagedLogitsCall(q, q_scale, cache, weights, lens, table, width, None, out, True))
    # Where the double writes a NaN a length of 0 has none of its columns.
    want = reference.paged_mqa_logits(q, q_scale, cache, rounded(module, weights), lens, table, width)
    assert_same(got, want, module.mx)
    assert out is None or got is out
    (call,) = module.calls
    assert call.q.shape[0] * call.q.shape[1] == len(q) * next_n
    # A table of 9 columns to a row, and rows behind it: three rows of a request fit in its own.
    repeated = next_n not in (1, 3) if module.mx else arch == "sm_90" and next_n > 2
    assert (call.table.data_ptr() != table.data_ptr()) == repeated


@pytest.mark.interpreter
@pytest.mark.parametrize("next_n", [4, 6])
@pytest.mark.parametrize("generation", ["0.1", "0.2"])
def test_pairs_of_rows_are_requests_of_one_call(double, rng, generation, next_n):
    module = double(generation)
    q, q_scale, cache, weights, lens, table = problem(rng, next_n)
    width = 250
    got = deep_gemm.paged_mqa_logits(PagedLogitsCall(q, q_scale, cache, weights, lens, table, width, None, None, False))
    (call,) = module.calls
    # Raw logits are what DeepGEMM wrote, where it wrote it; q and the weights are read where they are.
    assert got is call.out
    assert (call.q.data_ptr(), call.weights.data_ptr()) == (q.data_ptr(), weights.data_ptr())
    assert call.q.shape == (len(q) * next_n // 2, 2, 32, 128)
    assert call.table.dtype == torch.int32
    reached = torch.arange(table.shape[1]) < -(-call.lens[:, :1] // 64)
    assert torch.equal(call.table[reached], table.repeat_interleave(next_n // 2, 0)[reached])
    most = lens.view(-1, 2).amax(1).clamp(0, width)
    assert torch.equal(call.lens[:, 1], most)
    assert len(most.unique()) > len(q)
    want = reference.paged_mqa_logits(q, q_scale, cache, weights, lens, table, width)
    entries = want > -torch.inf
    assert torch.allclose(got[entries], want[entries], rtol=1e-5, atol=1e-4)
    assert (got[~entries] == GARBAGE).any()
    clean = deep_gemm.paged_mqa_logits(
        PagedLogitsCall(q, q_scale, cache, weights, lens, table, width, None, None, True)
    )
    assert clean is module.calls[1].out
    assert_same(clean, want)


@pytest.mark.interpreter
def test_pairs_of_rows_with_strides(double, rng):
    double("0.1")
    q, q_scale, cache, weights, lens, table = problem(rng, 4)
    want = reference.paged_mqa_logits(q, q_scale, cache, weights, lens, table, 300)
    q, lens, weights = torch.cat([q, q], 1)[:, :4], lens.long().t().contiguous().t(), weights.t().contiguous().t()
    assert_same(
        deep_gemm.paged_mqa_logits(PagedLogitsCall(q, q_scale, cache, weights, lens, table, 300, None, None, True)),
        want,
    )


@pytest.mark.interpreter
@pytest.mark.parametrize(("generation", "arch"), [("0.1", "sm_100"), ("0.2", "sm_100"), ("0.2", "sm_120")])
def test_fp4_goes_to_the_newer_entry_point(double, rng, generation, arch):
    module = double(generation, arch)
    q, q_scale, cache, weights, *rest = problem(rng, 2, layouts.INDEXER_FP4)
    got = deep_gemm.paged_mqa_logits(PagedLogitsCall(q, q_scale, cache, weights, *rest, 300, None, None, True))
    assert_same(got, reference.paged_mqa_logits(q, q_scale, cache, rounded(module, weights), *rest, 300), module.mx)


@pytest.mark.interpreter
def test_a_given_schedule_takes_the_lengths_as_they_are(double, rng):
    module = double("0.1")
    q, q_scale, cache, weights, lens, table = problem(rng, 2, hostile=False)
    lens = lens.sort(1).values
    schedule = module.get_paged_mqa_logits_metadata(lens, 64, SMS)
    got = deep_gemm.paged_mqa_logits(
        PagedLogitsCall(q, q_scale, cache, weights, lens, table, 300, schedule, None, True)
    )
    assert_same(got, reference.paged_mqa_logits(q, q_scale, cache, weights, lens, table, 300))
    assert module.calls[0].lens.data_ptr() == lens.data_ptr()
    with pytest.raises(ValueError, match="schedule: shape"):
        deep_gemm.paged_mqa_logits(
            PagedLogitsCall(q, q_scale, cache, weights, lens, table, 300, schedule[:-1], None, True)
        )


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("next_n", [4, 6])
def test_a_given_schedule_serves_pairs_of_rows(double, rng, next_n, dtype):
    module = double("0.1")
    q, q_scale, cache, weights, lens, table = problem(rng, next_n, hostile=False)
    lens = lens.sort(1).values.to(dtype)
    for _ in range(2):
        schedule = dsv4x.get_paged_mqa_logits_metadata(lens, 64, SMS, kernel="reference")
        got = deep_gemm.paged_mqa_logits(
            PagedLogitsCall(q, q_scale, cache, weights, lens, table, 300, schedule, None, True)
        )
        assert_same(got, reference.paged_mqa_logits(q, q_scale, cache, weights, lens, table, 300))
        call = module.calls.pop()
        assert not module.calls
        assert call.schedule is schedule
        assert torch.equal(call.lens[:, 1], lens[:, -1].repeat_interleave(next_n // 2))
        lens = torch.zeros_like(lens)
    with pytest.raises(ValueError, match="schedule: shape"):
        deep_gemm.paged_mqa_logits(
            PagedLogitsCall(q, q_scale, cache, weights, lens, table, 300, schedule[:-1], None, True)
        )


@pytest.mark.interpreter
@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize(("generation", "arch"), MACHINES)
def test_rows_that_name_their_requests(double, rng, generation, arch, clean):
    module = double(generation, arch)
    layout = layouts.INDEXER_FP4 if module.mx else layouts.INDEXER_FP8
    q, q_scale, cache, weights, lens, table = problem(rng, 3, layout)
    shape = (12, 1)
    q, lens = q.reshape(*shape, *q.shape[2:]), lens.reshape(shape)
    q_scale = None if q_scale is None else q_scale.reshape(*shape, *q_scale.shape[2:])
    for dtype in (torch.int32, torch.int64):
        requests = torch.tensor([3, 3, 0, 1, 1, -1, 2, 2, 2, 4, 0, 3]).to(dtype)
        call = PagedLogitsCall(q, q_scale, cache, weights, lens, table, 280, None, None, clean, requests)
        got = deep_gemm.paged_mqa_logits(call)
        want = reference.paged_mqa_logits(
            q, q_scale, cache, rounded(module, weights), lens, table, 280, requests=requests
        )
        if clean:
            assert_same(got, want, module.mx)
        there = want > -torch.inf
        assert torch.allclose(got[there], want[there], rtol=2.0**-7 if module.mx else 1e-5, atol=1e-4)
        (made,) = module.calls
        module.calls.clear()
        assert (made.lens[[5, 9]] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("next_n", [1, 2, 3, 4])
@pytest.mark.parametrize(("generation", "arch"), MACHINES)
def test_a_plan_is_filled_again_in_place(double, rng, generation, arch, next_n):
    module = double(generation, arch)
    layout = layouts.INDEXER_FP4 if module.mx else layouts.INDEXER_FP8
    q, q_scale, cache, weights, lens, table = problem(rng, next_n, layout, hostile=False)
    call = PagedLogitsCall(q, q_scale, cache, weights, lens, table, 300, None, None, True)
    plan = deep_gemm.plan_paged(call.rows, None)
    buffers = [tensor.data_ptr() for tensor in plan if tensor is not None]
    for _ in range(2):
        again = deep_gemm.plan_paged(call.rows, plan)
        assert [tensor.data_ptr() for tensor in again if tensor is not None] == buffers
        got = deep_gemm.paged_mqa_logits(call._replace(plan=again))
        want = reference.paged_mqa_logits(q, q_scale, cache, rounded(module, weights), lens, table, 300)
        assert_same(got, want, module.mx)
        assert module.calls[-1].schedule is plan.schedule
        # The next step's, in the same tensors.
        lens.copy_(torch.randint(0, 300, lens.shape, generator=rng))
        table.copy_(table.roll(1, 0))


@pytest.mark.interpreter
def test_a_plan_leaves_out_what_needs_no_logits(double, rng):
    module = double("0.1")
    q, q_scale, cache, weights, lens, table = problem(rng, 4, hostile=False)
    lens[0] = torch.tensor([9, 12, 10, 30])
    call = PagedLogitsCall(q, q_scale, cache, weights, lens, table, 300, clean_logits=False, unscored=12)
    deep_gemm.paged_mqa_logits(call)
    assert module.calls[0].lens[:2].tolist() == [[0, 0], [30, 30]]


@pytest.mark.interpreter
def test_unclean_logits_are_right_where_there_are_entries(double, rng):
    double("0.1")
    q, q_scale, cache, weights, lens, table = problem(rng, 1, hostile=False)
    got = deep_gemm.paged_mqa_logits(PagedLogitsCall(q, q_scale, cache, weights, lens, table, 300, None, None, False))
    want = reference.paged_mqa_logits(q, q_scale, cache, weights, lens, table, 300)
    assert torch.allclose(got[want > -torch.inf], want[want > -torch.inf], rtol=1e-5, atol=1e-4)
    assert (got[want == -torch.inf] != -torch.inf).any()


@pytest.mark.interpreter
@pytest.mark.parametrize(("arch", "page_size"), [("sm_100", 128), ("sm_120", 32), ("sm_121", 128), ("sm_120", 256)])
def test_the_newest_build_takes_other_pages(double, rng, arch, page_size):
    module = double("0.2", arch)
    layout = layouts.INDEXER_FP4 if module.mx else layouts.INDEXER_FP8
    assert reasons(arch=arch, layout=layout.name, q=layout.value_encoding, page_size=page_size)[0] == []
    q, q_scale, cache, weights, *rest = problem(rng, 2, layout, page_size)
    got = deep_gemm.paged_mqa_logits(PagedLogitsCall(q, q_scale, cache, weights, *rest, 300, None, None, True))
    assert_same(got, reference.paged_mqa_logits(q, q_scale, cache, rounded(module, weights), *rest, 300), module.mx)


@pytest.mark.interpreter
def test_bf16_logits_of_sm100_are_widened(double, rng):
    module = double("0.2", "sm_100")
    q, q_scale, cache, weights, lens, table = problem(rng, 1, layouts.INDEXER_FP4, hostile=False)
    got = deep_gemm.paged_mqa_logits(PagedLogitsCall(q, q_scale, cache, weights, lens, table, 300, None, None, False))
    assert got.dtype == torch.float32
    assert module.calls[0].weights.dtype == torch.bfloat16
    want = reference.paged_mqa_logits(q, q_scale, cache, rounded(module, weights), lens, table, 300)
    entries = want > -torch.inf
    assert torch.allclose(got[entries], want[entries], rtol=2.0**-7, atol=1e-4)
    flat = deep_gemm.mqa_logits(FlatLogitsCall(
        q[:, 0], q_scale[:, 0], torch.zeros(70, 64, dtype=torch.uint8), torch.full((70, 4), 127, dtype=torch.uint8),
        weights, torch.zeros(len(q), dtype=torch.int32), torch.full((len(q),), 70, dtype=torch.int32), 70, None, False,
    ))  # fmt: skip
    assert flat.dtype == torch.float32


@pytest.mark.interpreter
@pytest.mark.parametrize("generation", ["0.1", "0.2"])
def test_batches_past_the_schedules_limit_are_split(double, rng, generation):
    module = double(generation, "sm_100", shared_memory=4 * (64 + 2 * 2))
    layout = layouts.INDEXER_FP4 if module.mx else layouts.INDEXER_FP8
    q, q_scale, cache, weights, *rest = problem(rng, 1, layout)
    got = deep_gemm.paged_mqa_logits(PagedLogitsCall(q, q_scale, cache, weights, *rest, 300, None, None, True))
    assert_same(got, reference.paged_mqa_logits(q, q_scale, cache, rounded(module, weights), *rest, 300), module.mx)
    assert [call.q.shape[0] for call in module.calls] == [2, 2]


@pytest.mark.interpreter
@pytest.mark.parametrize("relative", [None, 50, 400])
@pytest.mark.parametrize("fp4", [False, True])
@pytest.mark.parametrize("generation", ["0.1", "0.2"])
def test_flat_logits_keep_the_contract(double, rng, generation, fp4, relative):
    module = double(generation, "sm_100" if fp4 or generation == "0.1" else "sm_90")
    rows, entries = 9, 200
    if fp4:
        q = torch.randint(0, 256, (rows, 32, 64), generator=rng, dtype=torch.uint8)
        q_scale = torch.randint(120, 130, (rows, 32, 4), generator=rng, dtype=torch.uint8)
        k = torch.randint(0, 256, (entries, 64), generator=rng, dtype=torch.uint8)
        k_scale = torch.randint(120, 130, (entries, 4), generator=rng, dtype=torch.uint8)
    else:
        q, q_scale = torch.randn(rows, 32, 128, generator=rng).to(torch.float8_e4m3fn), None
        k = torch.randn(entries, 128, generator=rng).to(torch.float8_e4m3fn)
        k_scale = torch.rand(entries, generator=rng)
        k_scale[3] = torch.nan
    weights = torch.randn(rows, 32, generator=rng)
    ks = torch.tensor([0, -3, 150, 10, 199, 200, 2**31 - 1, 5, 0], dtype=torch.int32)
    ke = torch.tensor([200, 2**31 - 1, 20, 60, 200, 200, 5, -(2**31), 1], dtype=torch.int32)
    got = deep_gemm.mqa_logits(FlatLogitsCall(q, q_scale, k, k_scale, weights, ks, ke, relative, None, True))
    want = reference.mqa_logits(q, q_scale, k, k_scale, rounded(module, weights), ks, ke, relative)
    assert_same(got, want, module.mx)
    assert len(module.calls) == 1


def reasons(op="paged_mqa_logits", arch="sm_90", q="e4m3fn", k="e4m3fn", layout="indexer fp8", page_size=64, next_n=1):
    caches = (layouts.CacheSpec(layout, page_size, 10, page_size * 132),) if op == "paged_mqa_logits" else ()
    record = next(kernel for kernel in records() if kernel.op == op)
    problem = dsv4x.Problem(op, "cuda", arch, heads=32, head_dim=128, width=100, caches=caches, q_encoding=q,
                            k_encoding=k, next_n=next_n)  # fmt: skip
    return record.not_supported_reasons(problem), record.note(problem)


def schedule_reasons(page_size, tokens=1):
    op = "get_paged_mqa_logits_metadata"
    record = next(kernel for kernel in records() if kernel.op == op)
    return record.not_supported_reasons(dsv4x.Problem(op, "cuda", "sm_90", tokens=tokens, page_size=page_size))


def records():
    found = []
    original, deep_gemm.register = deep_gemm.register, found.append
    try:
        deep_gemm.register_kernels()
    finally:
        deep_gemm.register = original
    return found


def test_every_limit_gives_its_reason(double):
    double("0.1")
    assert reasons()[0] == []
    assert reasons(q="e2m1", layout="indexer fp4")[0] == ["q and K are e2m1, need e4m3fn on SM90"]
    assert reasons(q="e2m1")[0] == ["q is e2m1 and K e4m3fn, need e4m3fn for both or e2m1 for both"]
    assert reasons(page_size=32)[0] == ["page_size is 32, need 64"]
    assert reasons(arch="sm_100", page_size=128)[0] == ["page_size is 128, need 32 or 64"]
    assert reasons(arch="sm_121", page_size=32)[0] == ["page_size is 32, need 64"]
    assert "compiles for no sm_107" in reasons(arch="sm_107")[0][0]
    assert "arch is sm_80" in reasons(arch="sm_80")[0][0]
    assert reasons(layout="DSv4")[0]
    assert "q is e4m3fnuz" in reasons(op="mqa_logits", q="e4m3fnuz", k="e4m3fnuz")[0][0]
    assert "q is e4m3fn and K e2m1" in reasons(op="mqa_logits", k="e2m1")[0][0]
    assert reasons(op="mqa_logits")[0] == []


def test_the_schedules_limit_follows_from_the_shared_memory(double):
    double("0.1")
    assert deep_gemm.schedule_limit("sm_90", 232448) == 58112
    assert deep_gemm.schedule_limit("sm_100", 232448) < 29056
    assert schedule_reasons(64, tokens=58112) == []
    assert "58113 requests, need <= 58112" in schedule_reasons(64, tokens=58113)[0]
    assert "page_size is 16" in schedule_reasons(16)[0]


def test_next_n_is_a_note_of_the_explanation(double):
    double("0.1")
    assert reasons(next_n=1)[1] == ""
    assert reasons(next_n=2)[1] == "next_n 2 natively"
    assert reasons(next_n=5)[1].startswith("next_n 5 as 5 requests of 1, table rows repeated")
    assert reasons(next_n=6)[1].startswith("next_n 6 as 3 requests of 2, table rows repeated")
    double("0.2", "sm_100")
    assert "rounded to bf16" in reasons(arch="sm_100")[1]
    assert "rounded to bf16" in reasons(op="mqa_logits", arch="sm_100")[1]
    assert "single rows" in reasons(arch="sm_100", next_n=3)[1]
    double("0.1", "sm_100")
    assert reasons(arch="sm_100", next_n=7)[1] == "next_n 7 natively"


def times(next_n, tokens, clean=False, capturing=False):
    """What ranks DeepGEMM and Triton on SM90, microseconds."""
    asked = dsv4x.Problem(
        "paged_mqa_logits", "cuda", "sm_90", tokens=tokens, next_n=next_n, heads=64, head_dim=128, width=16384,
        clean=clean, interpreter=False, capturing=capturing,
    )  # fmt: skip
    ranked = (next(k for k in records() if k.op == asked.op), registry.find(asked.op, "triton"))
    return [record.call_us(asked) for record in ranked]


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("tokens", [64, 256])
def test_even_rows_are_predicted_as_pairs_that_share_a_call(tokens, clean):
    two, four = times(2, tokens, clean)[0], times(4, tokens, clean)
    assert 1.5 * two < four[0] <= 2.1 * two
    assert four[0] < four[1]
    assert times(4, tokens)[0] == times(2, 2 * tokens)[0] + 5


def test_odd_rows_are_predicted_as_single_ones_that_share_a_call():
    assert times(3, 64)[0] == times(1, 3 * 64)[0] + 5
    assert times(3, 64)[0] == times(3, 64, capturing=True)[0]
    # Whose K is read once each, and a pair's once.
    assert times(4, 64)[0] < times(3, 64)[0]


@pytest.mark.parametrize("op", ["paged_mqa_logits", "mqa_logits"])
def test_float32_scales_are_refused_where_the_library_asserts(double, op):
    double("0.2", "sm_100")
    (reason,) = reasons(op=op, arch="sm_100")[0]
    assert "float32 scales" in reason
    assert "ue8m0" in reason
    assert reasons(op=op, arch="sm_100", q="e2m1", k="e2m1", layout="indexer fp4")[0] == []
    assert reasons(op=op, arch="sm_90")[0] == reasons(op=op, arch="sm_120")[0] == []
    double("0.1", "sm_100")
    assert reasons(op=op, arch="sm_100")[0] == []


@pytest.mark.parametrize("op", ["paged_mqa_logits", "mqa_logits"])
@pytest.mark.parametrize(("generation", "arch"), [("0.1", "sm_100"), ("0.2", "sm_90"), ("0.2", "sm_120")])
def test_mxfp8_is_refused_where_the_library_takes_float32_scales(double, op, generation, arch):
    double(generation, arch)
    (reason,) = reasons(op=op, arch=arch, k="mxfp8", layout="indexer mxfp8")[0]
    assert "K is mxfp8" in reason
    assert "0.2.5" in reason


def test_a_build_without_the_entry_point_says_so(double):
    module = double("0.2")
    del module.fp8_fp4_paged_mqa_logits
    assert "has no fp8_paged_mqa_logits or fp8_fp4_paged_mqa_logits" in reasons()[0][0]
