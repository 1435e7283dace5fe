"""FlashInfer's wiring on a CPU: a double of its launcher, behind doubles of its releases and behind the installed one.

What the launcher demands and computes was read from csrc/trtllm_fmha_kernel_launcher.cu, csrc/fmhaReduction.cu and
include/flashinfer/trtllm/fmha of flashinfer-python 0.6.15 to 0.7.2.post1, and the kernels there are from
flashinfer-cubin 0.6.13.
"""

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import math
import pathlib
import re
import types

import flashinfer_signature
import pytest
import torch
from calling import decode_call
from tolerances import check_close, check_decode

import dsv4x
from dsv4x import cuda, layouts, reference
from dsv4x.common.core.errors import BackendUnavailable, KernelNotSupported
from dsv4x.common.core.layouts import CacheSpec
from dsv4x.common.dispatch import registry
from dsv4x.common.dispatch.problem import Problem
from dsv4x.cuda import flashinfer

SCALE = 192**-0.5
INF = float("inf")
NATIVE, BF16 = layouts.TRTLLM_NATIVE, layouts.BF16_576
SUPPORTED = flashinfer_signature.RELEASES[flashinfer_signature.RELEASES.index("0.6.15") :]
INSTALLED = importlib.util.find_spec("flashinfer") is not None
SM_COUNT = 148


class Launcher:
    """``trtllm_paged_attention_decode`` for q of 576: it takes nothing the real one would not, and answers right."""

    def __init__(self):
        self.calls = []

    def __call__(
        self, *, out, query, key_cache, value_cache, workspace_buffer, multi_ctas_kv_counter_buffer, block_tables,
        seq_lens, max_q_len, max_kv_len, bmm1_scale, bmm2_scale, batch_size, window_left, sparse_mla_top_k, sm_count,
        workspace_size, attention_sinks, lse, lse_stride_tokens, lse_stride_heads, lse_scale=1.0,
        out_scale_factor=None, o_sf_scale=-1, o_sf_vec_size=-1, o_sf_start_index=0, enable_pdl=False,
        cum_seq_lens_q=None, key_block_scales=None, value_block_scales=None, skip_softmax_threshold_scale_factor=None,
        uses_shared_paged_kv_idx=True, enable_block_sparse_attention=False, sparse_mla_top_k_lens=None,
        bf16q_fp8kv_transform_mode=0, use_fp16_softmax=None,
    ):  # fmt: skip
        absent = (out_scale_factor, cum_seq_lens_q, key_block_scales, value_block_scales,
                  skip_softmax_threshold_scale_factor, sparse_mla_top_k_lens)  # fmt: skip
        assert all(x is None for x in absent)
        assert not any((use_fp16_softmax, enable_block_sparse_attention, bf16q_fp8kv_transform_mode))
        assert (max_q_len, window_left, uses_shared_paged_kv_idx) == (1, -1, True)
        # The kernels there are for HQk576HV512 and StaticTokenSparse.
        assert (query.dtype, key_cache.dtype, out.dtype) in {
            (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16), (torch.bfloat16,) * 3
        }  # fmt: skip
        assert value_cache is key_cache
        tokens, heads, head_dim = query.shape
        assert tokens == batch_size
        assert 0 < tokens <= 65535, "the batch is the grid's third dimension"
        assert head_dim == key_cache.shape[-1] == 576
        # Q tiles of 8, 16, 32 and 64 there are, and 0.6.15 neither pads heads nor takes part of a tile.
        assert heads in (8, 16, 32, 64, 128)
        for tensor in (query, key_cache):
            assert tensor.data_ptr() % 16 == 0, "a tensor map begins on 16 bytes"
            assert tensor.is_contiguous()
        assert out.shape == (tokens, 1, heads, 512)
        assert out.is_contiguous(), "the launcher passes no strides of out"
        pages, one, page_size, _ = key_cache.shape
        assert pages > 0
        assert one == 1
        assert page_size & (page_size - 1) == 0
        assert block_tables.dtype == seq_lens.dtype == torch.int32
        assert block_tables.is_contiguous()
        assert block_tables.shape == (tokens, 1, sparse_mla_top_k)
        assert sparse_mla_top_k % 4 == 0
        assert 0 < max_kv_len <= sparse_mla_top_k
        assert seq_lens.shape == (tokens,)
        assert seq_lens.is_contiguous()
        self._scratch(workspace_buffer, workspace_size, multi_ctas_kv_counter_buffer, tokens, heads, sm_count)
        pool = key_cache.view(pages * page_size, 576).float()
        rows, spans = block_tables[:, 0], seq_lens.clamp(0, sparse_mla_top_k)
        assert bool((spans <= max_kv_len).all()), "kernels are planned for max_kv_len"
        read = torch.arange(sparse_mla_top_k) < spans[:, None]
        assert bool((rows[read] >= 0).all()), "a hole is read as an entry"
        assert bool((rows[read] < len(pool)).all()), "an illegal access"
        # A tile's remainder is loaded too, and 0 * NaN is NaN; only -1 loads zeros.
        assert bool((rows[~read] == -1).all())
        # A tensor comes times log2(e), a float is multiplied by it here.
        tensors = [isinstance(x, torch.Tensor) for x in (bmm1_scale, bmm2_scale)]
        assert all(tensors) or not any(tensors)
        if any(tensors):
            assert query.dtype == torch.float8_e4m3fn, "scales on the device are for the fp8 kernels"
            assert bmm1_scale.dtype == bmm2_scale.dtype == torch.float32
            assert bmm1_scale.numel() == bmm2_scale.numel() == 1
            bmm1_scale, bmm2_scale = bmm1_scale.item() / math.log2(math.e), bmm2_scale.item()
        self.calls.append((tokens, heads, query.dtype))
        gathered = pool[rows.clamp_min(0).long()]
        logits = torch.einsum("thd,tnd->thn", query.double(), gathered.double()) * bmm1_scale
        logits = logits.masked_fill(~read[:, None], -INF)
        sums = logits.logsumexp(-1)
        if attention_sinks is not None:
            sums = torch.logaddexp(sums, attention_sinks.double())
        weights = torch.exp(logits - sums[..., None])
        values = torch.einsum("thn,tnd->thd", weights, gathered[..., :512].nan_to_num(0).double()) * bmm2_scale
        poisoned = (gathered.isnan().any(-1) & read).any(1)
        values[poisoned] = torch.nan
        written = spans > 0
        out[written] = values[written, None].to(out.dtype)
        assert lse.dtype == torch.float32
        assert lse.shape == (tokens, heads)
        lse.as_strided((tokens, heads), (lse_stride_tokens, lse_stride_heads)).copy_(
            sums * math.log2(math.e) * lse_scale
        )

    @staticmethod
    def _scratch(workspace, workspace_size, counters, tokens, heads, sm_count):
        assert workspace.data_ptr() % 16 == 0
        assert workspace_size == workspace.numel() * workspace.element_size()
        left = workspace_size - (8 * heads * tokens * 256 + (1 << 20))
        assert left >= sm_count * 64 * (8 + 512 * 4), "scratch, which the launcher does not check"
        assert counters.numel() * counters.element_size() >= 4 * max(tokens * heads, sm_count)
        assert counters.is_contiguous()
        assert not counters.any()


def release_double(release, launcher):
    """A module ``flashinfer`` of a release: its signature, the checks of its Python side, then the launcher."""
    signature = flashinfer_signature.signature(release)

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        a = types.SimpleNamespace(**bound.arguments)
        assert a.backend == "trtllm-gen"
        assert a.query.dim() == 4
        assert a.kv_cache.dim() in (3, 4)
        assert (a.kv_lora_rank, a.qk_rope_head_dim) == (512, 64)
        assert a.kv_cache.shape[-2] in (32, 64)
        assert not 64 < a.query.shape[2] < 128
        assert a.block_tables.shape == (*a.query.shape[:2], a.sparse_mla_top_k)
        assert a.return_lse
        assert getattr(a, "return_lse_base", None) in (None, "basee", "base2")
        tensor = isinstance(a.bmm1_scale, torch.Tensor)
        tokens, _, heads, _ = a.query.shape
        out = torch.empty(tokens, 1, heads, 512, dtype=torch.bfloat16)
        lse = torch.empty(tokens, heads, dtype=torch.float32)
        launcher(
            out=out, query=a.query.flatten(0, 1), key_cache=a.kv_cache, value_cache=a.kv_cache,
            workspace_buffer=a.workspace_buffer,
            multi_ctas_kv_counter_buffer=torch.zeros(4 * max(tokens * heads, SM_COUNT), dtype=torch.uint8),
            block_tables=a.block_tables, seq_lens=a.seq_lens, max_q_len=1, max_kv_len=a.max_seq_len,
            bmm1_scale=a.bmm1_scale * math.log2(math.e) if tensor else a.bmm1_scale, bmm2_scale=a.bmm2_scale,
            batch_size=tokens, window_left=-1, sparse_mla_top_k=a.sparse_mla_top_k, sm_count=SM_COUNT,
            workspace_size=a.workspace_buffer.numel(), attention_sinks=a.sinks, lse=lse,
            lse_stride_tokens=lse.stride(0), lse_stride_heads=lse.stride(1),
            lse_scale=math.log(2) if getattr(a, "return_lse_base", None) == "basee" else 1.0,
        )  # fmt: skip
        return out, lse

    function.__signature__ = signature
    return types.SimpleNamespace(mla=types.SimpleNamespace(trtllm_batch_decode_with_kv_cache_mla=function))


def installed_module(monkeypatch, launcher):
    """The installed FlashInfer, only its compiled launcher and its questions to the GPU replaced."""
    module = importlib.import_module("flashinfer")
    source = pathlib.Path(module.__file__).parent / "data" / "csrc" / "trtllm_fmha_kernel_launcher.cu"
    declared = re.search(r"void trtllm_paged_attention_decode\((.*?)\)\s*\{", source.read_text(), re.DOTALL)[1]
    names = [part.split()[-1] for part in re.sub(r"<[^>]*>", "", declared).split(",")]

    def launch(*args):
        assert len(args) == len(names)
        launcher(**dict(zip(names, args)))

    core = importlib.import_module("flashinfer.mla._core")
    fmha = types.SimpleNamespace(trtllm_paged_attention_decode=launch)
    monkeypatch.setattr(core, "get_trtllm_gen_fmha_module", lambda: fmha)
    monkeypatch.setattr(core, "get_device_sm_count", lambda device: SM_COUNT)
    monkeypatch.setattr(core, "device_support_pdl", lambda device: True)
    monkeypatch.setattr(core, "get_compute_capability", lambda device: (10, 0))
    return module


class Library:
    """FLASHINFER as it would be with ``module`` installed, or not usable for ``reason``."""

    path = "/site/flashinfer"

    def __init__(self, module=None, reason=None):
        self.module, self.reason = module, reason

    def load(self):
        if self.reason:
            raise BackendUnavailable(self.reason)
        return self.module


@pytest.fixture
def launcher():
    return Launcher()


@pytest.fixture(
    params=[
        *SUPPORTED,
        pytest.param("installed", marks=pytest.mark.skipif(not INSTALLED, reason="flashinfer is not installed")),
    ]
)
def any_release(request, launcher, monkeypatch):
    if request.param == "installed":
        module = installed_module(monkeypatch, launcher)
    else:
        module = release_double(request.param, launcher)
    monkeypatch.setattr(flashinfer, "FLASHINFER", Library(module))
    return launcher


@pytest.fixture
def newest(launcher, monkeypatch):
    monkeypatch.setattr(flashinfer, "FLASHINFER", Library(release_double(SUPPORTED[-1], launcher)))
    return launcher


@pytest.fixture
def decode_case(make_cache, index_rows, rng):
    def make(tokens=3, heads=8, width=128, layout=NATIVE, page_size=64, lens=True, sink=True, k_scale=1.0, size=1.0):
        cache, slots = make_cache(3, page_size, 40, layout, k_scale=k_scale)
        indices = index_rows(slots, tokens, width)
        return {
            "q": size * torch.randn(tokens, heads, 576, generator=rng).bfloat16(),
            "swa_cache": cache,
            "swa_indices": indices,
            "swa_lens": torch.randint(0, width + 1, (tokens,), dtype=torch.int32, generator=rng) if lens else None,
            "extra_cache": None,
            "extra_indices": None,
            "extra_lens": None,
            "attn_sink": torch.randn(heads, generator=rng) if sink else None,
        }

    return make


def as_rounded(q):
    codes, scale = flashinfer.quantize_query(q)
    return codes.float() * scale


def run(case, out=None, k_scale=1.0, **keywords):
    """The kernel's result, held against the oracle on q as the kernel sees it."""
    got, lse = flashinfer.decode(decode_call(**case, softmax_scale=SCALE, out=out, swa_k_scale=k_scale, **keywords))
    q = as_rounded(case["q"]) if case["swa_cache"].layout is NATIVE else case["q"]
    want = reference.sparse_mla_decode(
        **{**case, "q": q}, softmax_scale=SCALE, swa_k_scale=k_scale, dtype=torch.float64
    )
    check_decode(got, lse, *want)
    assert got.dtype == torch.bfloat16
    assert lse.is_contiguous()
    assert got is out if out is not None else got.is_contiguous()
    return got, lse


def odd_out(tokens, heads):
    around = torch.full((tokens, 2 * heads + 1, 600), 7.0, dtype=torch.bfloat16)
    out = around[:, 1 : 1 + heads, 40:552]
    out.fill_(float("nan"))
    return around, out


@pytest.mark.skipif(not INSTALLED, reason="flashinfer is not installed")
def test_the_installed_signature_is_the_committed_one():
    version = importlib.metadata.version("flashinfer-python")
    known = version if version in flashinfer_signature.RELEASES else flashinfer_signature.RELEASES[-1]
    function = importlib.import_module("flashinfer").mla.trtllm_batch_decode_with_kv_cache_mla
    assert flashinfer_signature.plain(function) == flashinfer_signature.signature(known)


@pytest.mark.parametrize("layout", [NATIVE, BF16], ids=lambda x: x.name)
def test_every_release_is_called_right(layout, any_release, decode_case):
    run(decode_case(layout=layout))
    run(decode_case(layout=layout, page_size=32, heads=20, width=100, lens=False, sink=False))
    dtype = torch.float8_e4m3fn if layout is NATIVE else torch.bfloat16
    assert any_release.calls == [(3, 8, dtype), (3, 32, dtype)]


@pytest.mark.parametrize("heads", [1, 7, 8, 16, 33, 64, 65, 128])
@pytest.mark.parametrize("layout", [NATIVE, BF16], ids=lambda x: x.name)
def test_heads_are_padded_to_those_there_are_kernels_for(layout, heads, newest, decode_case):
    run(decode_case(heads=heads, layout=layout))
    case = decode_case(heads=heads, layout=layout, sink=False)
    around, out = odd_out(3, heads)
    run(case, out)
    out.fill_(7)
    assert (around == 7).all(), "wrote outside out"


@pytest.mark.parametrize(("heads", "wide"), [(5, 8), (8, 64), (20, 33)])
@pytest.mark.parametrize("layout", [NATIVE, BF16], ids=lambda x: x.name)
def test_only_the_heads_that_count_are_read_and_written(layout, heads, wide, newest, decode_case):
    case = decode_case(heads=heads, layout=layout)
    want = run(case)
    more = (0, 0, 0, wide - heads)
    case["q"] = torch.nn.functional.pad(case["q"], more, value=math.nan)
    case["attn_sink"] = torch.nn.functional.pad(case["attn_sink"], more[2:], value=math.nan)
    around = torch.full((3, wide, 512), 7.0, dtype=torch.bfloat16)
    for out in (None, around):
        got, lse = flashinfer.decode(decode_call(**case, softmax_scale=SCALE, heads=heads, out=out))
        assert torch.equal(got[:, :heads], want[0])
        assert torch.equal(lse, want[1])
    assert (around[:, heads:] == 7).all(), "wrote to heads that do not count"


@pytest.mark.parametrize("width", [0, 1, 127, 128, 129, 300])
@pytest.mark.parametrize("lens", [False, True])
def test_any_width_is_served(width, lens, newest, decode_case):
    run(decode_case(width=width, lens=lens))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lens", [False, True])
def test_no_index_out_of_range_and_no_hole_is_handed_over(lens, dtype, newest, decode_case):
    case = decode_case(tokens=6)
    capacity = case["swa_cache"].capacity
    rows = case["swa_indices"] = case["swa_indices"].to(dtype)
    rows[:, 1], rows[:, 5], rows[:, 7], rows[:, 9] = capacity, -2, 2**31 - 1, -(2**31)
    if dtype == torch.int64:
        rows[:, 11], rows[:, 13] = 2**40, -(2**40)
    case["swa_lens"] = None
    if lens:
        case["swa_lens"] = torch.tensor([0, 3, 10, 128, 1128, -5], dtype=dtype)
        rows[1, 3:] = capacity + 12345
    run(case)


@pytest.mark.parametrize("sink", [None, -INF, 0.0, 30.0, INF])
@pytest.mark.parametrize("layout", [NATIVE, BF16], ids=lambda x: x.name)
def test_rows_without_entries_and_sinks_at_their_limits(layout, sink, newest, decode_case):
    case = decode_case(tokens=4, layout=layout, lens=False)
    case["swa_indices"][1] = -1
    case["swa_indices"][3] = case["swa_cache"].capacity
    case["attn_sink"] = None if sink is None else torch.full((8,), sink)
    out, lse = run(case)
    assert (out[[1, 3]] == 0).all()
    assert (lse[[1, 3]] == INF).all()


def test_a_call_of_empty_rows_alone(newest, decode_case):
    case = decode_case(lens=False)
    case["swa_indices"].fill_(-1)
    out, lse = run(case)
    assert (out == 0).all()
    assert (lse == INF).all()
    cache = case["swa_cache"]
    run({**case, "swa_cache": dsv4x.PagedCache(cache.data[:0], NATIVE, 64)})


# A power of two, so that the oracle's rounding of K to bf16 changes nothing.
@pytest.mark.parametrize("k_scale", [2.0**-4, 8.0])
def test_the_tensor_scale_is_in_the_logits_and_in_the_values(k_scale, newest, decode_case):
    run(decode_case(k_scale=k_scale), k_scale=k_scale)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 5, 9])
def test_long_batches_are_split(tokens, given, newest, decode_case, monkeypatch):
    monkeypatch.setattr(flashinfer, "max_batch", lambda heads, width: 4)
    case = decode_case(tokens=tokens, heads=5)
    _, out = odd_out(tokens, 5) if given else (None, None)
    run(case, out)
    assert [call[0] for call in newest.calls] == [4] * (tokens // 4) + [tokens % 4] * (tokens % 4 > 0)


@pytest.mark.parametrize(("tokens", "heads"), [(1, 8), (300, 20), (10**6, 128)])
def test_scratch_holds_the_workspace_of_a_call(tokens, heads):
    spec = CacheSpec(NATIVE.name, 64, 100, NATIVE.page_stride(64))
    problem = dsv4x.Problem(
        "sparse_mla_decode", "cuda", "sm_100", tokens=tokens, heads=heads, head_dim=576, width=2048, caches=(spec,)
    )
    padded = next(h for h in flashinfer.HEADS if heads <= h)
    cut = min(tokens, flashinfer.max_batch(padded, 2048))
    bound = flashinfer._scratch(problem)
    assert flashinfer.workspace_bytes(cut, padded) < bound < flashinfer.workspace_bytes(cut, padded) + (6 << 30)


def test_a_call_stays_within_its_memory():
    for heads in flashinfer.HEADS:
        for width in (0, 128, 2048, 1 << 25):
            tokens = flashinfer.max_batch(heads, width)
            assert 1 <= tokens <= 65535
            assert tokens == 1 or tokens * max(width, 1) <= 1 << 24
            assert 8 * 256 * tokens * heads <= 1 << 28


@pytest.mark.parametrize("layout", [NATIVE, BF16], ids=lambda x: x.name)
def test_a_strided_q_off_its_alignment_is_served(layout, newest, decode_case):
    case = decode_case(layout=layout)
    for width, start in ((601, 3), (608, 8)):
        around = torch.zeros(3, 8, width, dtype=torch.bfloat16)
        around[..., start : start + 576] = case["q"]
        run({**case, "q": around[..., start : start + 576]})
    flat = torch.zeros(3 * 8 * 576 + 1, dtype=torch.bfloat16)
    flat[1:] = case["q"].flatten()
    run({**case, "q": flat[1:].view(3, 8, 576)})


def test_a_nan_in_q_stays_in_its_row(newest, decode_case):
    case = decode_case(lens=False, sink=False)
    clean, _ = flashinfer.decode(decode_call(**case, softmax_scale=SCALE))
    case["q"][1, 3, 100], case["q"][1, 4, 5] = float("nan"), INF
    out, lse = flashinfer.decode(decode_call(**case, softmax_scale=SCALE))
    assert out[1, 3:5].isnan().all()
    assert lse[1, 3:5].isnan().all()
    clean[1, 3:5] = out[1, 3:5] = 0
    assert torch.equal(out, clean)


@pytest.mark.parametrize("size", [2.0**-10, 1.0, 300.0, 2.0**12])
def test_q_of_any_size_is_rounded_as_e4m3_rounds(size, newest, decode_case):
    case = decode_case(size=size, lens=False, sink=False)
    rounded = as_rounded(case["q"])
    error, least = (rounded - case["q"]).abs(), case["q"].abs().amax() * 2.0**-13
    assert (error <= case["q"].abs().clamp_min(least) * 2.0**-4).all()
    assert (error > 0).any(), "three bits of fraction cannot hold bf16"
    if size <= 1:
        out, lse = flashinfer.decode(decode_call(**case, softmax_scale=SCALE))
        want_out, want_lse = reference.sparse_mla_decode(**case, softmax_scale=SCALE, dtype=torch.float64)
        check_close("out", out, want_out, absolute=0.05, relative=0.1, cosine=1e-3)
        check_close("lse", lse, want_lse, absolute=0.05, relative=0.02)


def test_a_tokens_rounding_does_not_depend_on_the_tokens_beside_it(rng):
    q = torch.randn(2, 8, 576, generator=rng).bfloat16()
    q = torch.where(q.abs() < 2.0**-6, 0.5, q)
    alone = as_rounded(q[:1])
    q[1] *= 100
    assert torch.equal(as_rounded(q)[:1], alone)


@pytest.mark.parametrize("value", [0.0, 2.0**-133, 448.0, 449.0, 3.0e38])
def test_the_scale_of_q_fits_its_largest_value(value):
    codes, scale = flashinfer.quantize_query(torch.tensor([[value, -value, 0.0]], dtype=torch.bfloat16))
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (1,)
    assert 2.0**-126 <= scale.item() < INF
    assert math.log2(scale.item()) % 1 == 0
    assert codes.float().isfinite().all()
    if value > 1:
        assert 224 <= codes.float().max() <= 448


def plain_compact(rows, lens, capacity, multiple):
    """Row after row, as it reads."""
    width = max(1, -(-rows.shape[1] // multiple)) * multiple
    result = torch.full((len(rows), width), -1, dtype=torch.int32)
    for i, row in enumerate(rows.tolist()):
        span = row if lens is None else row[: max(0, int(lens[i]))]
        kept = [x for x in span if 0 <= x < capacity]
        result[i, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return result, (result >= 0).sum(1, dtype=torch.int32)


@pytest.mark.parametrize("width", [0, 1, 7, 8, 9, 40])
@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_entries_move_to_the_front_in_their_order(width, lens, dtype, rng):
    rows = torch.randint(-20, 60, (30, width), dtype=dtype, generator=rng)
    rows[:4] = torch.arange(width) + 1
    spans = torch.randint(-3, width + 9, (30,), dtype=torch.int32, generator=rng) if lens else None
    got, counts = flashinfer.compact_indices(rows, spans, 50, 8)
    want, want_counts = plain_compact(rows, spans, 50, 8)
    assert got.dtype == counts.dtype == torch.int32
    assert torch.equal(got, want)
    assert torch.equal(counts, want_counts)
    assert got.is_contiguous()


# What the record refuses.

CACHE = CacheSpec("trtllm-native", 64, 4, 36864)
PROBLEM = Problem(
    "sparse_mla_decode", "cuda", "sm_100", tokens=4, heads=64, head_dim=576, width=2048, caches=(CACHE,),
    interpreter=False,
)  # fmt: skip


def problem(**changes):
    return dataclasses.replace(PROBLEM, **changes)


@pytest.fixture
def own_registry(replaced):
    replaced(empty=True)


@pytest.fixture
def reasons(own_registry, replaced, monkeypatch):
    """Reasons for a problem with a release (or another library) installed, whatever this machine has."""

    def ask(asked, release=SUPPORTED[-1], library=None):
        monkeypatch.setattr(flashinfer, "FLASHINFER", library or Library(release_double(release, Launcher())))
        replaced(empty=True)
        flashinfer.register_kernels()
        return registry.find("sparse_mla_decode", "flashinfer").not_supported_reasons(asked)

    return ask


@pytest.mark.parametrize("arch", ["sm_100", "sm_103"])
@pytest.mark.parametrize("heads", [1, 16, 100, 128])
def test_it_takes_blackwell_and_any_heads(arch, heads, reasons):
    assert reasons(problem(arch=arch, heads=heads)) == []
    assert reasons(problem(arch=arch, heads=heads, caches=(CacheSpec("bf16 576", 32, 4, 36864),), capturing=True)) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arch": "sm_90"}, "arch is sm_90, need sm_100 or sm_103"),
        ({"arch": "sm_120"}, "arch is sm_120, need sm_100 or sm_103"),
        ({"device": "cpu", "arch": "cpu"}, "device is cpu, need cuda"),
        ({"heads": 129}, "129 heads, need <= 128"),
        ({"head_dim": 512}, "head_dim is 512, need 576"),
        ({"extra_width": 64, "caches": (CACHE, CACHE)}, "an extra cache is given, need none"),
        ({"caches": (CacheSpec("DSv3.2", 64, 4, 41984),)}, "cache layout is DSv3.2, need trtllm-native or bf16 576"),
        ({"caches": (CacheSpec("trtllm-native fnuz", 64, 4, 36864),)}, "cache layout is trtllm-native fnuz"),
        ({"caches": (CacheSpec("trtllm-native", 16, 4, 9216),)}, "page_size is 16, need 32 or 64"),
        ({"caches": (CacheSpec("trtllm-native", 64, 4, 36880),)}, "page stride is 36880 bytes, need 36864"),
        ({"caches": (CacheSpec("bf16 576", 64, 4, 36864),)}, "page stride is 36864 bytes, need 73728"),
        ({"caches": (CacheSpec("trtllm-native", 64, 2**25, 36864),)}, f"cache has {2**31} slots, need < 2**31"),
    ],
)
def test_each_limit_is_a_reason(changes, says, reasons):
    given = reasons(problem(**changes))
    assert len(given) == 1
    assert given[0].startswith(says)


@pytest.mark.parametrize(
    ("release", "lacks"),
    [
        ("0.5.3", ["sparse_mla_top_k", "return_lse", "multi_ctas_kv_counter_buffer"]),
        ("0.6.6", ["return_lse", "multi_ctas_kv_counter_buffer"]),
        ("0.6.14", ["multi_ctas_kv_counter_buffer"]),
    ],
)
def test_what_an_older_release_lacks_is_read_from_its_signature(release, lacks, reasons):
    given = reasons(PROBLEM, release)
    assert len(given) == len(lacks)
    for reason, name in zip(given, lacks):
        assert f"flashinfer at /site/flashinfer has no {name}: " in reason
    # Where it could not run anyway, what the release lacks is beside the point.
    assert reasons(problem(arch="sm_90"), release) == ["arch is sm_90, need sm_100 or sm_103"]


@pytest.mark.parametrize("release", SUPPORTED)
def test_the_releases_of_the_extra_are_taken(release, reasons):
    assert reasons(PROBLEM, release) == []


def test_a_release_whose_function_moved_or_changed_is_told(reasons):
    gone = types.SimpleNamespace(mla=types.SimpleNamespace())
    assert reasons(PROBLEM, library=Library(gone)) == [
        "flashinfer at /site/flashinfer has no flashinfer.mla.trtllm_batch_decode_with_kv_cache_mla"
    ]
    module = release_double(SUPPORTED[-1], Launcher())
    function = module.mla.trtllm_batch_decode_with_kv_cache_mla
    kept = [p for name, p in inspect.signature(function).parameters.items() if name != "qk_nope_head_dim"]
    function.__signature__ = inspect.Signature(kept)
    (reason,) = reasons(PROBLEM, library=Library(module))
    assert "takes other arguments" in reason
    assert "qk_nope_head_dim" in reason


def test_a_library_that_cannot_be_used_is_the_only_reason(reasons):
    broken = Library(reason="import flashinfer failed: OSError: libcuda")
    assert reasons(PROBLEM, library=broken) == ["import flashinfer failed: OSError: libcuda"]
    with pytest.raises(BackendUnavailable, match=r"kernel='flashinfer' of sparse_mla_decode: import flashinfer failed"):
        registry.select(PROBLEM, "flashinfer")


def test_it_is_never_chosen_by_prediction_and_says_why(reasons):
    reasons(PROBLEM)
    explanation = registry.explain(PROBLEM)
    assert explanation.chosen is None
    assert explanation.reasons["flashinfer"] == []
    assert "rounds q" in explanation.by_name_only["flashinfer"]
    assert "only by name: it rounds q and the softmax weights to e4m3" in str(explanation)
    with pytest.raises(KernelNotSupported, match="only by name"):
        registry.select(PROBLEM)
    assert registry.select(PROBLEM, "flashinfer").name == "flashinfer"


def test_there_is_no_prefill_kernel_and_a_reason_for_it(reasons):
    reasons(PROBLEM)
    assert registry.find("sparse_mla_prefill", "flashinfer") is None
    assert "workspace" in registry.absent("sparse_mla_prefill", "flashinfer")


def test_registering_on_cuda_imports_neither_library(own_registry, monkeypatch):
    class Explosive(Library):
        @property
        def reason(self):
            raise AssertionError("the library was asked")

        @reason.setter
        def reason(self, value):
            pass

    monkeypatch.setattr(cuda.flash_mla, "FLASH_MLA", Explosive())
    monkeypatch.setattr(flashinfer, "FLASHINFER", Explosive())
    cuda.register_kernels()
    assert {record.name for record in registry.kernels("sparse_mla_decode")} == {"flash_mla", "gluon", "flashinfer"}
    refused = registry.find("sparse_mla_decode", "flashinfer").not_supported_reasons(problem(arch="sm_90"))
    assert refused == ["arch is sm_90, need sm_100 or sm_103"]


@pytest.mark.parametrize("layout", [NATIVE, BF16], ids=lambda x: x.name)
def test_the_wiring_is_what_the_op_runs(layout, newest, decode_case, replaced):
    """From the public op down, on a machine that would have FlashInfer."""
    k_scale = 0.25 if layout is NATIVE else 1.0
    case = decode_case(heads=20, width=70, layout=layout, k_scale=k_scale)
    replaced(empty=True)
    flashinfer.register_kernels()
    record = registry.find("sparse_mla_decode", "flashinfer")
    replaced(dataclasses.replace(record, devices=("cpu",), archs=()), empty=["sparse_mla_decode"])
    out, lse = dsv4x.sparse_mla_decode(**case, softmax_scale=SCALE, kernel="flashinfer", swa_k_scale=k_scale)
    q = as_rounded(case["q"]) if layout is NATIVE else case["q"]
    case["q"] = q
    want = reference.sparse_mla_decode(**case, softmax_scale=SCALE, swa_k_scale=k_scale, dtype=torch.float64)
    check_decode(out, lse, *want)
    assert [call[:2] for call in newest.calls] == [(3, 32)]
    spread = dsv4x.PagedCache(case["swa_cache"].data[::2], layout, 64)
    with pytest.raises(KernelNotSupported, match="pages must stand back to back"):
        dsv4x.sparse_mla_decode(
            **{**case, "q": q.bfloat16(), "swa_cache": spread}, softmax_scale=SCALE, kernel="flashinfer"
        )
