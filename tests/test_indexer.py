"""The indexer's logits and schedule against their definitions in NumPy and plain Python, and the bounded selection."""

import numpy as np
import pytest
import slow
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsv4x
from dsv4x import PagedCache, TopkMethod, layouts
from dsv4x.common.kernels import schedule as schedule_kernels
from dsv4x.common.ops import indexer

FNUZ = layouts.INDEXER_FP8.with_flavour("e4m3fnuz")
LAYOUTS = [layouts.INDEXER_FP8, FNUZ, layouts.INDEXER_MXFP8, layouts.INDEXER_FP4]
HOSTILE = [-(2**31), -2, -1, 2**31 - 1]
NEITHER = [HealthCheck.function_scoped_fixture]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3FNUZ = np.array(
    [
        np.nan if c == 0x80 else (slow.e4m3fn(c) / 2 if c & 0x7F != 0x7F else (-1) ** (c >> 7) * 240.0)
        for c in range(256)
    ]
)


def fp8_values(codes, dtype):
    return (slow.E4M3FN if dtype == torch.float8_e4m3fn else E4M3FNUZ)[codes.cpu().view(torch.uint8).numpy()]


def fp4_values(codes, scales):
    codes, scales = codes.cpu().numpy(), slow.UE8M0[scales.cpu().numpy()]
    values = E2M1[np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], 128)]
    return values * np.repeat(scales, 32, axis=-1)


def logit_rows(q, k, k_scale, weights):
    """float64 ``q [H, 128]``, ``k [N, 128]``, ``k_scale [N]``, ``weights [H]`` -> ``[2, N]``.

    The logits, where NaN becomes -inf, and the sums of the magnitudes that they are made of.
    """
    products = k @ q.T
    products = np.where(products > 0, products, 0)
    with np.errstate(invalid="ignore"):
        logits = (products @ weights) * k_scale
    return np.stack([np.where(np.isnan(logits), -np.inf, logits), abs(k) @ abs(q.T) @ abs(weights) * abs(k_scale)])


class Entries:
    """K and its scale by slot, from the bytes of a page as the format says."""

    def __init__(self, cache):
        self.cache, self.bytes = cache, cache.page_bytes.cpu()

    def __getitem__(self, slot):
        page, at = divmod(slot, self.cache.page_size)
        layout, raw = self.cache.layout, self.bytes[page]
        size, base = layout.nope_bytes, self.cache.page_size * layout.nope_bytes
        codes, scale = raw[at * size :][:size], raw[base + at * 4 :][:4]
        if layout.value_encoding == "e2m1":
            return fp4_values(codes, scale), 1.0
        dtype = torch.float8_e4m3fn if layout.value_encoding == "e4m3fn" else torch.float8_e4m3fnuz
        if layout.scale_encoding == "ue8m0":
            return fp8_values(codes, dtype) * np.repeat(slow.UE8M0[scale.numpy()], 32), 1.0
        return fp8_values(codes, dtype), float(scale.clone().view(torch.float32))


def q_values(q, q_scale):
    return fp4_values(q, q_scale) if q.dtype == torch.uint8 else fp8_values(q, q.dtype)


def defined_paged(q, q_scale, cache, weights, lens, table, width):
    """``paged_mqa_logits``, column by column, and the magnitudes."""
    entries, values, weights = Entries(cache), q_values(q, q_scale), weights.cpu().double().numpy()
    batch, next_n = lens.shape
    out = np.full((2, batch * next_n, width), -np.inf)
    for row in range(batch * next_n):
        request, at = divmod(row, next_n)
        length = min(max(int(lens[request, at]), 0), width, table.shape[1] * cache.page_size)
        pages = [int(table[request, c // cache.page_size]) for c in range(length)]
        there = [c for c in range(length) if 0 <= pages[c] < cache.pages]
        found = [entries[pages[c] * cache.page_size + c % cache.page_size] for c in there]
        if found:
            k, scales = np.array([k for k, _ in found]), np.array([scale for _, scale in found])
            out[:, row, there] = logit_rows(values[request, at], k, scales, weights[row])
    return torch.from_numpy(out)


def check(got, defined):
    """Same infinities, the field's measure of difference below 5e-6, and each logit right for what it is a sum of.

    Hopper's tensor cores keep 13 fraction bits of a partial sum of fp8 products.
    """
    share = 2**-16 if got.is_cuda else 2**-20
    got, (want, magnitude) = got.detach().cpu().double(), defined.double()
    assert got.shape == want.shape
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    there = want > -torch.inf
    x, y = got[there], want[there]
    assert x.isfinite().all()
    norms = (x * x + y * y).sum()
    assert norms == 0 or 1 - 2 * (x * y).sum() / norms < 5e-6
    assert ((x - y).abs() <= share * magnitude[there]).all()


def filled(pages, layout, page_size, rng, device="cpu", spread=1):
    stride = -(-layout.page_stride(page_size) // 16) * 16
    block = torch.full((pages, spread, stride), 0xFF, dtype=torch.uint8)
    cache = PagedCache(block[:, spread // 2], layout, page_size)
    k = torch.randn(cache.capacity, 128, generator=rng)
    dsv4x.quantize_and_insert_k_cache(k.bfloat16(), cache, torch.arange(cache.capacity), kernel="reference")
    return PagedCache(block.to(device)[:, spread // 2], layout, page_size)


def random_q(shape, layout, rng, device="cpu"):
    if layout is layouts.INDEXER_FP4:
        q = torch.randint(0, 256, (*shape, 64), generator=rng, dtype=torch.uint8)
        return q.to(device), torch.randint(120, 130, (*shape, 4), generator=rng, dtype=torch.uint8).to(device)
    dtype = torch.float8_e4m3fnuz if layout is FNUZ else torch.float8_e4m3fn
    return torch.randn(*shape, 128, generator=rng).to(dtype).to(device), None


@st.composite
def paged_problems(draw):
    layout, page_size = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([1, 3, 16, 64, 128]))
    batch, next_n, heads = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.sampled_from(indexer.HEADS))
    columns = draw(st.integers(0, max(1, 150 // page_size)))
    width = draw(st.integers(0, columns * page_size + 10))
    length = st.integers(0, width + 2) | st.sampled_from([0, width, *HOSTILE])
    lens = [[draw(length) for _ in range(next_n)] for _ in range(batch)]
    page = st.integers(0, 6) | st.sampled_from([*HOSTILE, 7])
    table = [[draw(page) for _ in range(columns)] for _ in range(batch)]
    return layout, page_size, heads, next_n, columns, width, lens, table


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=NEITHER)
@given(problem=paged_problems(), seed=st.integers(0, 99))
def test_paged_logits_follow_the_definition(problem, seed, kernel_device):
    kernel, device = kernel_device
    layout, page_size, heads, next_n, columns, width, lens, table = problem
    rng = torch.Generator().manual_seed(seed)
    batch = len(lens)
    cache = filled(7, layout, page_size, rng, device, spread=2)
    q, q_scale = random_q((batch, next_n, heads), layout, rng, device)
    weights = torch.randn(batch * next_n, heads, generator=rng).to(device)
    dtype = torch.int64 if seed % 2 else torch.int32
    lens = torch.tensor(lens, dtype=dtype).reshape(batch, next_n).to(device)
    table = torch.tensor(table, dtype=torch.int32).reshape(batch, columns).to(device)
    out = torch.full((batch * next_n, width + 3), 7.0, device=device)
    got = dsv4x.paged_mqa_logits(
        q, cache, weights, lens, table, width, out=out[:, :width] if seed % 3 else None, kernel=kernel, q_scale=q_scale
    )
    check(got, defined_paged(q, q_scale, cache, weights, lens, table, width))
    assert (out[:, width:] == 7).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("next_n", [1, 2, 3])
def test_whole_tiles_and_several_chunks(layout, next_n, kernel_device, rng):
    kernel, device = kernel_device
    cache = filled(40, layout, 64, rng, device)
    q, q_scale = random_q((2, next_n, 64), layout, rng, device)
    weights = torch.randn(2 * next_n, 64, generator=rng).to(device)
    table = torch.randperm(40, generator=rng)[:40].view(2, 20).int().to(device)
    lens = torch.tensor([[1100 + j for j in range(next_n)], [64 * j + 63 for j in range(next_n)]]).to(device)
    got = dsv4x.paged_mqa_logits(q, cache, weights, lens, table, 1200, kernel=kernel, q_scale=q_scale)
    check(got, defined_paged(q, q_scale, cache, weights, lens, table, 1200))


def test_nan_products_count_as_zero_and_nan_logits_are_no_entries(kernel_device, rng):
    kernel, device = kernel_device
    cache = filled(2, layouts.INDEXER_FP8, 64, rng)
    cache.page_bytes[0, 5 * 128 + 3] = 0x7F
    cache.page_bytes[0, 64 * 128 :].view(torch.float32)[9] = torch.nan
    cache = PagedCache(cache.data.to(device), cache.layout, 64)
    q, _ = random_q((1, 2, 32), cache.layout, rng, device)
    weights = torch.randn(2, 32, generator=rng).to(device)
    weights[1, 4] = torch.inf
    lens, table = torch.tensor([[100, 100]]).to(device), torch.tensor([[0, 1]], dtype=torch.int32).to(device)
    got = dsv4x.paged_mqa_logits(q, cache, weights, lens, table, 100, kernel=kernel)
    assert got[0, 5] == 0
    assert got[0, 9] == -torch.inf
    assert not got.isnan().any()
    assert got[0].isfinite().sum() == 99


def defined_flat(q, q_scale, k, k_scale, weights, ks, ke, max_seqlen_k):
    packed, entries = k.dtype == torch.uint8, len(k)
    mx = k_scale.dtype == torch.uint8
    values = fp4_values(k, k_scale) if packed else fp8_values(k, k.dtype)
    if mx and not packed:
        values = values * np.repeat(slow.UE8M0[k_scale.cpu().numpy()], 32, axis=-1)
    scales = np.ones(entries) if mx else k_scale.cpu().double().numpy()
    q, weights = q_values(q, q_scale), weights.cpu().double().numpy()
    width = entries if max_seqlen_k is None else max_seqlen_k
    out = np.full((2, len(q), width), -np.inf)
    for row in range(len(q)):
        start, end = (min(max(int(x[row]), 0), entries) for x in (ks, ke))
        logits = logit_rows(q[row], values, scales, weights[row])
        for entry in range(start, end):
            column = entry if max_seqlen_k is None else entry - start
            if column < width:
                out[:, row, column] = logits[:, entry]
    return torch.from_numpy(out)


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=NEITHER)
@given(
    layout=st.sampled_from(LAYOUTS), rows=st.integers(0, 5), entries=st.integers(0, 140),
    heads=st.sampled_from(indexer.HEADS), relative=st.none() | st.integers(0, 150), seed=st.integers(0, 99),
    data=st.data(),
)  # fmt: skip
def test_flat_logits_follow_the_definition(layout, rows, entries, heads, relative, seed, data, kernel_device):
    kernel, device = kernel_device
    rng = torch.Generator().manual_seed(seed)
    bound = st.integers(0, entries) | st.sampled_from([*HOSTILE, entries + 1])
    dtype = torch.int64 if seed % 2 else torch.int32
    ks, ke = (
        torch.tensor(data.draw(st.lists(bound, min_size=rows, max_size=rows)), dtype=dtype).to(device) for _ in range(2)
    )
    q, q_scale = random_q((rows, heads), layout, rng, device)
    cache = filled(-(-entries // 4) + 1, layout, 4, rng, device)
    k, k_scale = dsv4x.gather_indexer_k(cache, torch.arange(entries, device=device), kernel=kernel)
    weights = torch.randn(rows, heads, generator=rng).to(device)
    got = dsv4x.mqa_logits(q, k, k_scale, weights, ks, ke, relative, kernel=kernel, q_scale=q_scale)
    check(got, defined_flat(q, q_scale, k, k_scale, weights, ks, ke, relative))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_gathered_k_is_the_pages_bytes(layout, kernel_device, rng):
    kernel, device = kernel_device
    cache = filled(5, layout, 16, rng, device, spread=3)
    slots = torch.tensor([79, 0, -1, 80, 17, -(2**31), 2**31 - 1], device=device)
    size, scales = layout.nope_bytes, 16 * layout.nope_bytes
    k, k_scale = dsv4x.gather_indexer_k(cache, slots, kernel=kernel)
    for row, slot in enumerate(slots.tolist()):
        page, at = divmod(slot, 16)
        if 0 <= slot < 80:
            assert torch.equal(k[row].view(torch.uint8), cache.page_bytes[page, at * size :][:size])
            want = cache.page_bytes[page, scales + 4 * at :][:4]
            assert torch.equal(k_scale[row : row + 1].flatten().view(torch.uint8), want)
        else:
            assert not k[row].view(torch.uint8).any()
            assert not k_scale[row].any()


@pytest.mark.interpreter
def test_logits_of_any_width_have_the_row_stride_kernels_are_compiled_for(rng):
    problem = good(rng)
    for width in (1, 15, 16, 17, 390):
        logits = dsv4x.paged_mqa_logits(**{**problem, "max_context_len": width}, kernel="triton")
        assert logits.shape == (12, width)
        assert logits.stride() == (-(-width // 16) * 16, 1)


def test_a_lone_entrys_buffers_may_have_any_stride(kernel_device, rng):
    kernel, device = kernel_device
    for layout in LAYOUTS:
        cache = filled(1, layout, 16, rng, device)
        slots = torch.tensor([3], device=device)
        wanted = dsv4x.gather_indexer_k(cache, slots, kernel="reference")
        given = [torch.zeros(1, 7 * row[0].numel(), dtype=row.dtype, device=device) for row in wanted]
        k, k_scale = (x[:, :1].squeeze(1) if row.dim() == 1 else x[:, : row.shape[1]] for x, row in zip(given, wanted))
        dsv4x.gather_indexer_k(cache, slots, k, k_scale, kernel=kernel)
        assert torch.equal(k.view(torch.uint8), wanted[0].view(torch.uint8))
        assert torch.equal(k_scale, wanted[1])
        q, q_scale = random_q((2, 32), layout, rng, device)
        weights = torch.randn(2, 32, generator=rng).to(device)
        ks, ke = torch.zeros(2, dtype=torch.int32, device=device), torch.ones(2, dtype=torch.int32, device=device)
        want = defined_flat(q, q_scale, *wanted, weights, ks, ke, None)
        check(dsv4x.mqa_logits(q, k, k_scale, weights, ks, ke, kernel=kernel, q_scale=q_scale), want)


def test_a_buffer_of_scales_that_is_not_aligned_is_named():
    cache, slots = PagedCache.zeros(1, layouts.INDEXER_FP4, 16), torch.arange(3)
    k_scale = torch.zeros(13, dtype=torch.uint8)[1:].view(3, 4)
    with pytest.raises(ValueError, match=r"k_scale: begins at 0x\w+, need a multiple of 4"):
        dsv4x.gather_indexer_k(cache, slots, None, k_scale)


@pytest.mark.interpreter
def test_ocp_codes_become_fnuz_codes_of_half_their_values():
    """What gfx942 multiplies for e4m3fn K: every code, among every kind of neighbours in its word."""
    from dsv4x.common.kernels import mqa_logits as kernels

    @triton.jit
    def halve(codes_ptr, out_ptr):
        at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
        out = tl.arange(0, 32)[:, None] * 128 + tl.arange(0, 128)[None, :]
        tl.store(out_ptr + out, halved(tl.load(codes_ptr + at)))

    halved = kernels.halved_e4m3fnuz
    halve.fn.__globals__["halved"] = halved
    codes = torch.cat([torch.arange(256), torch.randint(0, 256, (4096 - 256,))]).to(torch.uint8)
    codes[256:1280:4], codes[1281:2304:4], codes[2306:3328:4] = 0x80, 0x7F, 0xFF
    out = torch.empty_like(codes)
    halve[(1,)](codes.view(torch.uint32), out)
    want = fp8_values(codes, torch.float8_e4m3fn) / 2
    assert np.array_equal(fp8_values(out, torch.float8_e4m3fnuz), want, equal_nan=True)


def defined_schedule(lens, split, num_sms):
    """DeepGEMM's rule as its header reads, SM by SM, with a binary search's result by counting."""
    segments = [-(-max(row[-1], 0) // split) for row in lens]
    atoms = -(-len(lens[0]) // 2)
    ends, table = np.cumsum(segments).tolist(), []
    if not ends[-1]:
        return [[0, 0]] * (num_sms + 1)
    share, rest = divmod(ends[-1] * atoms, num_sms)
    for sm in range(num_sms):
        mark = sm * share + max(sm - (num_sms - rest), 0)
        at = sum(end * atoms <= mark for end in ends)
        offset = mark - (ends[at] - segments[at]) * atoms
        table.append([at * atoms + offset // segments[at], offset % segments[at]])
    return [*table, [len(lens) * atoms, 0]]


@pytest.mark.parametrize("next_n", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 31, 300])
@pytest.mark.parametrize("page_size", [64, 3])
def test_the_schedule_follows_deep_gemms_rule(batch, next_n, page_size, kernel_device, rng, monkeypatch):
    kernel, device = kernel_device
    # Small blocks, so that a few hundred requests take every path of a million.
    monkeypatch.setattr(schedule_kernels, "BLOCK_ROWS", 32)
    monkeypatch.setattr(schedule_kernels, "_BLOCK_SUMS", 4)
    for most, empty in ((3000, 0.3), (20, 0.9), (100_000, 0.0)):
        lens = torch.randint(0, most, (batch, next_n), generator=rng)
        lens[torch.rand(batch, generator=rng) < empty] = -3
        got = dsv4x.get_paged_mqa_logits_metadata(lens.to(device), page_size, 13, kernel=kernel)
        assert got.tolist() == defined_schedule(lens.tolist(), 4 * page_size, 13)


@pytest.mark.parametrize("batch", [0, 1, 70])
def test_a_batch_without_entries_has_an_empty_schedule(batch, kernel_device):
    kernel, device = kernel_device
    lens = torch.zeros(batch, 2, dtype=torch.int32, device=device)
    got = dsv4x.get_paged_mqa_logits_metadata(lens, 64, 5, kernel=kernel)
    assert got.tolist() == [[0, 0]] * 6


@pytest.mark.parametrize(("next_n", "ratio"), [(1, 4), (3, 4), (5, 1)])
def test_context_lens_follow_the_definition(next_n, ratio):
    seq = [0, 1, 3, 4, 5, 100, 2**31 - 1]
    want = [[max(length - next_n + 1 + j, 0) // ratio for j in range(next_n)] for length in seq]
    for dtype in (torch.int32, torch.int64):
        got = dsv4x.indexer_context_lens(torch.tensor(seq, dtype=dtype), next_n, ratio)
        assert got.dtype == torch.int32
        assert got.tolist() == want


def served(rng, device, next_n=2, layout=layouts.INDEXER_FP8, batch=6, columns=25):
    cache = filled(64, layout, 16, rng, device)
    table = torch.randint(0, 64, (batch, columns), generator=rng).int().to(device)
    lens = torch.randint(0, 16 * columns - 20, (batch, next_n), generator=rng)
    lens[1], lens[2, 0] = 0, 2**31 - 1
    q, q_scale = random_q((batch, next_n, 32), layout, rng, device)
    weights = torch.randn(batch * next_n, 32, generator=rng).to(device)
    return (q, cache, weights, lens.to(device), table, 16 * columns - 10), q_scale


def spaces(method, rows, device):
    if method is TopkMethod.RAGGED:
        return {"bases": torch.arange(rows, device=device) * 1000 - 1}
    if method is TopkMethod.PAGED:
        return {"slot_page_size": 8, "slot_pages": 50}
    return {}


@pytest.mark.parametrize("method", list(TopkMethod))
@pytest.mark.parametrize("layout", [layouts.INDEXER_FP8, layouts.INDEXER_FP4], ids=lambda layout: layout.name)
def test_bounded_selection_is_that_of_whole_logits(method, layout, kernel_device, rng):
    kernel, device = kernel_device
    arguments, q_scale = served(rng, device, layout=layout)
    kernels = {"kernel": kernel, "topk_kernel": kernel}
    more = {"q_scale": q_scale, **spaces(method, 12, device)}
    logits = dsv4x.paged_mqa_logits(*arguments, kernel="reference", q_scale=q_scale)
    lens = arguments[3].reshape(-1).clamp(0, 390)
    there = {"bases": more.get("bases")}
    if method is TopkMethod.PAGED:
        there = {"block_table": arguments[4], "page_size": 8, "pages": 50, "next_n": 2}
    want = dsv4x.topk_transform(logits, lens, 30, method, kernel="reference", **there)
    for budget in (1 << 28, 20_000, 8_000):
        got = dsv4x.paged_indexer_topk(*arguments, 30, method, logits_bytes=budget, **kernels, **more)
        assert torch.equal(got, want)


@pytest.mark.parametrize("method", list(TopkMethod))
def test_selections_of_stretches_are_merged(method, kernel_device, rng, monkeypatch):
    kernel, device = kernel_device
    arguments, _ = served(rng, device, batch=3, columns=100)
    more = spaces(method, 6, device)
    want = dsv4x.paged_indexer_topk(*arguments, 30, method, kernel="reference", topk_kernel="reference", **more)
    merges, merge = [], indexer.topk_merge
    monkeypatch.setattr(indexer, "topk_merge", lambda *given: merges.append(given) or merge(*given))
    # Less than a request's logits, more than those of a stretch of 256 entries and its selections.
    got = dsv4x.paged_indexer_topk(
        *arguments, 30, method, logits_bytes=5_000, kernel=kernel, topk_kernel=kernel, **more
    )
    assert torch.equal(got, want)
    assert len(merges) == 3 * -(-1590 // 256)


def test_bounded_flat_selection_is_that_of_whole_logits(kernel_device, rng):
    kernel, device = kernel_device
    cache = filled(20, layouts.INDEXER_FP8, 16, rng, device)
    k, k_scale = dsv4x.gather_indexer_k(cache, torch.arange(320, device=device))
    q, _ = random_q((9, 32), cache.layout, rng, device)
    weights = torch.randn(9, 32, generator=rng).to(device)
    ks = torch.tensor([0, 5, 100, 300, 7, 319, 0, -4, 9], dtype=torch.int32, device=device)
    ke = torch.tensor([320, 200, 101, 2**31 - 1, 3, 320, 0, 250, 310], dtype=torch.int32, device=device)
    logits = dsv4x.mqa_logits(q, k, k_scale, weights, ks, ke, kernel="reference")
    starts = ks.clamp(0, 320)
    lens = (ke.clamp(0, 320) - starts).clamp_min(0)
    want = dsv4x.topk_transform(logits, lens, 40, row_starts=starts, kernel="reference")
    for budget in (1 << 28, 30_000):
        kernels = {"logits_bytes": budget, "kernel": kernel, "topk_kernel": kernel}
        got = dsv4x.indexer_topk(q, k, k_scale, weights, ks, ke, 40, **kernels)
        assert torch.equal(got, want)
        rows = dsv4x.indexer_topk(q, k, k_scale, weights, ks, ke, 40, TopkMethod.RAGGED, **kernels)
        assert torch.equal(rows, torch.where(want >= 0, want + starts[:, None], -1))


@pytest.mark.parametrize("method", list(TopkMethod))
def test_a_short_context_needs_no_logits(method, kernel_device, rng, monkeypatch):
    kernel, device = kernel_device
    arguments, _ = served(rng, device)
    more = spaces(method, 12, device)
    want = dsv4x.paged_indexer_topk(*arguments, 389, method, kernel=kernel, topk_kernel=kernel, **more)
    monkeypatch.setattr(indexer, "_paged_logits", None)
    got = dsv4x.paged_indexer_topk(*arguments, 400, method, **more)
    assert got.shape == (12, 400)
    short = arguments[3].reshape(-1) <= 389
    assert torch.equal(got[short][:, :389], want[short])


@pytest.mark.parametrize("next_n", [1, 2, 4])
def test_pieces_stay_within_the_budget(next_n):
    for requests, width, budget in ((8192, 262144, 1 << 28), (3, 1 << 20, 1 << 22), (100, 5000, 1 << 20)):
        per_piece, columns = indexer._plan(requests, next_n, width, 256, 512, budget)
        merged = 0 if columns >= width else 44 * 512
        assert per_piece * next_n * (4 * -(-columns // 256) * 256 + merged) <= budget
        assert columns == width or columns % 256 == 0
    with pytest.raises(ValueError, match="logits_bytes: got 1000, need >= "):
        indexer._plan(1, next_n, 4096, 256, 512, 1000)


def test_the_default_budget_holds_256_rows_of_a_million_tokens():
    assert indexer._plan(256, 1, 1 << 18, 256, 1024, indexer.LOGITS_BYTES) == (256, 1 << 18)


def good(rng):
    arguments, _ = served(rng, "cpu")
    names = ("q", "cache", "weights", "context_lens", "block_table", "max_context_len")
    return dict(zip(names, arguments))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(6, 2, 32, 128)}, TypeError, "q: dtype is float32, need float8_e4m3fn or float8_e4m3fnuz"),
        ({"q": torch.zeros(6, 2, 16, 128).to(torch.float8_e4m3fn)}, ValueError, "q: 16 heads, need 32 or 64"),
        ({"q": torch.zeros(6, 2, 32, 64, dtype=torch.uint8)}, ValueError, "q_scale: got None"),
        ({"q_scale": torch.zeros(6, 2, 32, 4, dtype=torch.uint8)}, ValueError, "q_scale: given, need None"),
        ({"weights": torch.zeros(6, 32)}, ValueError, r"weights: shape is \(6, 32\), need \(12, 32\)"),
        ({"context_lens": torch.zeros(12, dtype=torch.int32)}, ValueError, r"context_lens: shape is \(12,\)"),
        ({"block_table": torch.zeros(6, 4)}, TypeError, "block_table: dtype is float32, need int32"),
        ({"max_context_len": -1}, ValueError, "max_context_len: got -1"),
        ({"schedule": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, "schedule: shape"),
        ({"out": torch.zeros(12, 300)}, ValueError, r"out: shape is \(12, 300\), need \(12, 390\)"),
        (
            {"cache": PagedCache.zeros(1, layouts.DSV4, 64)},
            ValueError,
            "cache: layout is DSv4, need indexer fp8, indexer mxfp8 or",
        ),
        ({"kernel": "deep_gemm"}, dsv4x.KernelNotSupported, "cannot run paged_mqa_logits"),
    ],
)
def test_bad_paged_input_is_named(change, error, message, rng):
    with pytest.raises(error, match=message):
        dsv4x.paged_mqa_logits(**{**good(rng), **change})


def test_bad_values_are_named_when_asked_for(rng, monkeypatch):
    monkeypatch.setenv("DSV4X_CHECK", "1")
    arguments = good(rng)
    with pytest.raises(ValueError, match="context_lens: 2147483647 in row 2, need 0 to 390"):
        dsv4x.paged_mqa_logits(**arguments)
    arguments["context_lens"] = arguments["context_lens"].clamp_max(380)
    arguments["block_table"][3, 0] = 64
    with pytest.raises(ValueError, match="block_table: page 64 in row 3, column 0, need -1 or 0 to 63"):
        dsv4x.paged_mqa_logits(**arguments)


@pytest.mark.parametrize("method", list(TopkMethod))
def test_stretches_of_good_values_pass_when_asked_for(method, rng, monkeypatch):
    arguments, _ = served(rng, "cpu", batch=3, columns=100)
    arguments[3].clamp_(max=1590)
    more = spaces(method, 6, "cpu")
    want = [dsv4x.paged_indexer_topk(*arguments, k, method, **more) for k in (30, 1600)]
    monkeypatch.setenv("DSV4X_CHECK", "1")
    got = [dsv4x.paged_indexer_topk(*arguments, k, method, logits_bytes=5_000, **more) for k in (30, 1600)]
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("k", [30, 400])
def test_bad_values_of_a_bounded_selection_are_named_when_asked_for(k, rng, monkeypatch):
    arguments, _ = served(rng, "cpu")
    monkeypatch.setenv("DSV4X_CHECK", "1")
    with pytest.raises(ValueError, match="context_lens: 2147483647 in row 2, need 0 to 390"):
        dsv4x.paged_indexer_topk(*arguments, k, logits_bytes=5_000)


def test_stretches_of_flat_k_pass_when_values_are_checked(rng, monkeypatch):
    q, _ = random_q((3, 32), layouts.INDEXER_FP8, rng, "cpu")
    k, k_scale = torch.randn(900, 128, generator=rng).to(torch.float8_e4m3fn), torch.rand(900, generator=rng)
    ks, ke = torch.tensor([0, 500, 7]), torch.tensor([900, 700, 7])
    arguments = (q, k, k_scale, torch.randn(3, 32, generator=rng), ks, ke, 20)
    want = dsv4x.indexer_topk(*arguments)
    monkeypatch.setenv("DSV4X_CHECK", "1")
    assert torch.equal(dsv4x.indexer_topk(*arguments, logits_bytes=8_000), want)


def test_bad_flat_input_is_named(rng):
    q, k = torch.zeros(2, 32, 128).to(torch.float8_e4m3fn), torch.zeros(4, 256).to(torch.float8_e4m3fn)
    rest = (torch.zeros(4), torch.zeros(2, 32), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"k: stride\(0\) is 256, need 128"):
        dsv4x.mqa_logits(q, k[:, :128], *rest)
    with pytest.raises(ValueError, match=r"k_scale: shape is \(4,\), need \(3\)"):
        dsv4x.mqa_logits(q, k.view(8, 128)[:3], *rest)
    with pytest.raises(ValueError, match="max_seqlen_k: got -1"):
        dsv4x.mqa_logits(q, k.view(8, 128)[:4], *rest, -1)


def test_explain_shows_the_choice_for_next_n():
    problem = dsv4x.Problem("paged_mqa_logits", "cpu", "cpu", tokens=2, next_n=2, heads=64, head_dim=128, width=100)
    text = str(dsv4x.explain(problem))
    assert "reference  chosen" in text
    assert "deep_gemm  refused" in text
