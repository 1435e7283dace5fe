"""AITER's wiring on a CPU: doubles of its entry points that compute from the arguments they are given.

What they demand, compute and leave undone was read from ROCm/aiter at the commits in aiter_signature.py.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import sys
import types

import aiter_signature
import pytest
import torch
from calling import decode_call, prefill_call
from layer_kinds import paths_of
from tolerances import check_close, check_decode, check_prefill

import dsv4x
from dsv4x import layouts, reference, rocm
from dsv4x.common.core.errors import BackendUnavailable, KernelNotSupported
from dsv4x.common.core.layouts import CacheSpec, PagedCache
from dsv4x.common.dispatch import registry
from dsv4x.common.dispatch.problem import Problem
from dsv4x.common.dispatch.registry import Kernel
from dsv4x.common.ops.sparse_mla import problem_of
from dsv4x.rocm import aiter

INF, NAN = float("inf"), float("nan")
LOG2E = math.log2(math.e)
SCALE = 0.05
DSV4, DSV32, BF16, BF16_576 = layouts.DSV4, layouts.DSV32, layouts.BF16_512, layouts.BF16_576
UNIFORM, NATIVE = layouts.UNIFORM_FP8, layouts.TRTLLM_NATIVE
UNIFORM_FNUZ, NATIVE_FNUZ = (layout.with_flavour("e4m3fnuz") for layout in (UNIFORM, NATIVE))
OLD, RELEASED, LATER = "0.1.19.post2", "0.1.20.post1", "main since"
WITH_PAGES = [build for build in aiter_signature.NAMES if aiter_signature.NAMES.index(build) >= 4]
INSTALLED = importlib.util.find_spec("aiter") is not None and rocm.AITER.distribution[0] == "amd-aiter"


class Aiter:
    """AITER of one build on one arch: it takes nothing that the real one would not, and answers as the real one."""

    path = "/site/aiter"

    def __init__(self, arch, build):
        self.arch, self.build, self.calls, self.reason = arch, build, [], None
        self.since = aiter_signature.NAMES.index(build)
        self.modules = {}
        for name, module in aiter_signature.MODULES.items():
            signature = aiter_signature.signature(name, build)
            if signature is not None:
                function = self._bound(name, signature)
                self.modules[module] = types.SimpleNamespace(
                    **{name: function}, SUPPORTED_ARCHS=("gfx942", "gfx950"), FP8_SCALAR_ARCHS=("gfx942", "gfx950")
                )

    def load(self):
        if self.reason:
            raise BackendUnavailable(self.reason)
        return types.SimpleNamespace(ops=None)

    def _bound(self, name, signature):
        def function(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self.calls.append((name, tuple(bound.arguments["q"].shape)))
            return getattr(self, f"_{name}")(types.SimpleNamespace(**bound.arguments))

        function.__signature__ = signature
        return function

    @staticmethod
    def _is_ragged(entries, indptr, tokens, capacity, *, holes):
        assert entries.dtype == indptr.dtype == torch.int32
        assert entries.dim() == indptr.dim() == 1
        assert entries.is_contiguous()
        assert indptr.is_contiguous()
        assert len(indptr) == tokens + 1
        assert int(indptr[0]) == 0
        assert bool((indptr.diff() >= 0).all())
        assert int(indptr[-1]) <= len(entries), "reads past the list"
        used = entries[: int(indptr[-1])]
        assert bool((used >= (-1 if holes else 0)).all()), "an illegal access"
        assert bool((used < capacity).all()), "an illegal access"

    @staticmethod
    def _is_sink(sink, heads, *, needed=True):
        if sink is None:
            assert not needed
            return
        assert sink.dtype == torch.float32
        assert sink.shape == (heads,)
        assert sink.is_contiguous()

    @staticmethod
    def _is_q(q, dims):
        assert q.dtype == torch.bfloat16
        assert q.dim() == 3
        assert q.shape[0] > 0
        assert q.data_ptr() % 16 == 0
        assert all(stride > 0 and stride % 8 == 0 for stride in q.stride()[:-1])
        assert q.shape[2] in dims
        assert q.stride(2) == 1

    def _cache(self, pool, head_dim, k_scale=None):
        """The pool as a dsv4x cache: its format told as AITER tells it, by dtype and width."""
        assert pool.shape[0] > 0
        assert pool.stride(-1) == 1
        assert pool.data_ptr() % 16 == 0
        assert pool.shape[0] == 1 or pool.stride(0) * pool.element_size() % 16 == 0
        if pool.dim() == 2:
            assert pool.dtype == torch.bfloat16
            assert pool.shape[1] == head_dim
            layout, page_size = (BF16 if head_dim == 512 else BF16_576), 1
            data = pool.contiguous().view(torch.uint8)
            assert k_scale is None
            return PagedCache(data, layout, page_size)
        _, page_size, width = pool.shape
        assert pool.stride(1) == width or page_size == 1, "a page is one run"
        if pool.dtype == torch.bfloat16:
            assert width == head_dim
            layout, pool = (BF16 if width == 512 else BF16_576), pool.view(torch.uint8)
            assert k_scale is None
        elif width in (512, 576):
            assert pool.dtype == torch.uint8
            assert width == head_dim
            assert k_scale.dtype == torch.float32
            assert k_scale.shape == (1,)
            layout = (UNIFORM if width == 512 else NATIVE) if self.arch == "gfx950" else None
            layout = layout or (UNIFORM_FNUZ if width == 512 else NATIVE_FNUZ)
        else:
            assert pool.dtype == torch.uint8
            assert k_scale is None
            layout = {584: DSV4, 656: DSV32}[width]
            assert layout.head_dim == head_dim
            assert self.arch == "gfx950"
        return PagedCache(pool, layout, page_size)

    @staticmethod
    def _rows(cache, entries, indptr, k_scale=1.0):
        """float64 ``[T, width, D]`` and bool ``[T, width]`` by the reference, from one flat list."""
        indices, lens = reference_dense(entries, indptr)
        rows = torch.zeros(*indices.shape, cache.layout.head_dim, dtype=torch.bfloat16)
        valid = (torch.arange(indices.shape[1]) < lens[:, None]) & (indices >= 0)
        rows[valid] = reference.dequantize_slots(cache, indices[valid], k_scale=k_scale)
        return rows.double(), valid

    @staticmethod
    def _write(values, out, like):
        if out is None:
            out = torch.empty_like(like[..., :512], dtype=torch.bfloat16)
        assert out.data_ptr() % 16 == 0
        assert all(stride % 8 == 0 for stride in out.stride()[:-1])
        return out.copy_(values)

    def _pa_decode_sparse(self, a):
        assert a.kv_scales is None
        assert a.block_h is None
        assert a.USE_EXP2 is None
        self._is_q(a.q, (512,))
        tokens, heads, _ = a.q.shape
        extra = (getattr(a, name, None) for name in ("extra_cache", "extra_indices", "extra_indptr"))
        extra_cache, extra_indices, extra_indptr = extra
        out = getattr(a, "out", None)
        assert out is None or (out.shape == a.q.shape and out.dtype == a.q.dtype)
        cache = self._cache(a.unified_kv, 512)
        self._is_ragged(a.kv_indices, a.kv_indptr, tokens, cache.capacity, holes=a.has_invalid)
        self._is_sink(a.attn_sink, heads)
        rows, valid = self._rows(cache, a.kv_indices, a.kv_indptr)
        if not (self.arch == "gfx950" and self.since >= 4):
            assert self.arch != "gfx1250"
            assert a.unified_kv.dim() == 2
            assert extra_cache is None
            assert not a.skip_reduce
            # It scales q before it multiplies, and rounds it.
            q = (a.q.float() * a.softmax_scale * LOG2E).bfloat16()
            values, _ = reference.attend(q, rows, valid, a.attn_sink, 1 / LOG2E, torch.float64)
            # A sink of -inf is subtracted from itself, and what is not above 0 becomes 0.
            values[:, a.attn_sink == -INF] = 0
            values[~valid.any(1)] = NAN
            return self._write(values, out, a.q)
        if extra_cache is not None:
            assert a.unified_kv.dim() == extra_cache.dim() == 3
            other = self._cache(extra_cache, 512)
            self._is_ragged(extra_indices, extra_indptr, tokens, other.capacity, holes=a.has_invalid)
            more, more_valid = self._rows(other, extra_indices, extra_indptr)
            rows, valid = torch.cat([rows, more], 1), torch.cat([valid, more_valid], 1)
        if a.skip_reduce and a.kv_splits and a.kv_splits > 1:
            assert out is None
            return self._partials(a, rows, valid)
        return self._write(self._divided(a.q, rows, valid, a.attn_sink, a.softmax_scale), out, a.q)

    @staticmethod
    def _divided(q, rows, valid, sink, scale):
        """What a row without entries gives when nothing is added to its sum but the sink."""
        values, _ = reference.attend(q, rows, valid, sink, scale, torch.float64)
        alone = torch.zeros(q.shape[1]) if sink is not None else torch.full((q.shape[1],), NAN)
        if sink is not None:
            alone[sink == -INF] = NAN
        values[~valid.any(1)] = alone.double()[:, None]
        return values

    def _partials(self, a, rows, valid):
        tokens, heads, _ = a.q.shape
        logits = torch.einsum("thd,tnd->thn", a.q.double(), rows) * a.softmax_scale * LOG2E
        split = torch.arange(rows.shape[1]) % a.kv_splits
        acc = torch.full((tokens, a.kv_splits, heads, 512), NAN)
        maxima, sums = torch.full((2, tokens, a.kv_splits, heads), -INF)
        for s in range(a.kv_splits):
            mine = valid & (split == s)
            masked = logits.masked_fill(~mine[:, None], -INF)
            top = masked.amax(-1) if rows.shape[1] else torch.full((tokens, heads), -INF).double()
            weights = torch.exp2(masked - top.clamp_min(-1e30)[..., None])
            maxima[:, s], sums[:, s] = top, weights.sum(-1)
            written = mine.any(1) | (self.since < aiter_signature.NAMES.index(LATER))
            acc[written, s] = torch.einsum("thn,tnd->thd", weights, rows)[written].float()
        return acc, maxima, sums

    def _sparse_mla_fwd(self, a):
        assert (a.kv_splits, a.skip_reduce, a.dot_precision) == (None, False, "bf16")
        assert a.q_scale is a.inv_rope_positions is a.inv_rope_cos_sin_cache is a.out_mxfp8 is None
        assert a.kv_lora_rank == 512
        self._is_q(a.q, (512 + a.qk_rope_head_dim,))
        tokens, heads, head_dim = a.q.shape
        cache = self._cache(a.kv_buffer, head_dim, a.kv_scale)
        self._is_ragged(a.kv_indices, a.kv_indptr, tokens, cache.capacity, holes=a.has_invalid)
        self._is_sink(a.attn_sink, heads, needed=False)
        if a.out is not None:
            assert a.out.shape == (tokens, heads, 512)
            assert a.out.dtype == torch.bfloat16
            assert a.out.stride(2) == 1
        scalar = cache.layout.needs_k_scale
        paged = cache.layout == DSV4
        rows, valid = self._rows(cache, a.kv_indices, a.kv_indptr, float(a.kv_scale) if scalar else 1.0)
        extra = (a.extra_kv, a.extra_indptr, a.extra_indices)
        assert all(x is None for x in extra) or all(x is not None for x in extra)
        if a.extra_kv is not None:
            assert a.kv_buffer.dim() == a.extra_kv.dim() == 3
            other = self._cache(a.extra_kv, head_dim, a.extra_kv_scale)
            assert other.layout.needs_k_scale == scalar
            assert scalar or {cache.layout, other.layout} <= {DSV4, BF16}
            paged |= not scalar
            self._is_ragged(a.extra_indices, a.extra_indptr, tokens, other.capacity, holes=a.has_invalid)
            more, more_valid = self._rows(
                other, a.extra_indices, a.extra_indptr, float(a.extra_kv_scale) if scalar else 1.0
            )
            rows, valid = torch.cat([rows, more], 1), torch.cat([valid, more_valid], 1)
        if paged:
            assert self.arch == "gfx950"
            assert not a.return_lse, "not supported for dsv4 / two-loop caches"
        values = self._divided(a.q, rows, valid, a.attn_sink, a.softmax_scale)
        lse = None
        if a.return_lse:
            _, lse = reference.attend(a.q, rows, valid, None, a.softmax_scale, torch.float64)
            lse = torch.where(valid.any(1)[:, None], lse, -INF)
            if a.attn_sink is not None:
                lse = torch.logaddexp(lse, a.attn_sink.double())
            lse = lse.float()
        return self._write(values, a.out, a.q), lse

    def _prefix(self, a):
        self._is_q(a.q, (512,))
        tokens, heads, _ = a.q.shape
        assert a.unified_kv.dim() == 2
        cache = self._cache(a.unified_kv, 512)
        self._is_ragged(a.kv_indices_prefix, a.kv_indptr_prefix, tokens, cache.capacity, holes=False)
        self._is_sink(a.attn_sink, heads)
        return self._rows(cache, a.kv_indices_prefix, a.kv_indptr_prefix)

    def _pa_sparse_prefill_opus(self, a):
        assert self.arch == "gfx950"
        rows, valid = self._prefix(a)
        tokens = len(a.q)
        assert a.kv.dtype == a.q.dtype
        assert a.kv.shape[1] == 512
        assert a.kv.stride() == a.unified_kv.stride()
        self._is_ragged(a.kv_indices_extend, a.kv_indptr_extend, tokens, a.kv.shape[0], holes=False)
        more, more_valid = self._rows(self._cache(a.kv, 512), a.kv_indices_extend, a.kv_indptr_extend)
        out = torch.empty_like(a.q) if a.out is None else a.out
        assert out.shape == a.q.shape
        assert out.dtype == a.q.dtype
        assert out.stride() == a.q.stride(), "it writes by the strides of q"
        rows, valid = torch.cat([rows, more], 1), torch.cat([valid, more_valid], 1)
        return out.copy_(reference.attend(a.q, rows, valid, a.attn_sink, a.softmax_scale, torch.float64)[0])

    def _pa_prefill_sparse(self, a):
        assert (self.arch, self.since >= 4) == ("gfx950", True)
        assert a.kv is a.kv_indices_extend is a.kv_indptr_extend is None, "an extend KV source"
        rows, valid = self._prefix(a)
        tokens, heads, _ = a.q.shape
        if heads in (64, 128):
            assert tokens % 64 == 0
            assert bool((valid.sum(1) > 128).all()), "the kernel of 64 heads assumes three full tiles"
        assert heads <= 96
        assert 256 // (tokens * -(-heads // 16)) <= 1, "a split row counts its sink once a split"
        values, _ = reference.attend(a.q, rows, valid, a.attn_sink, a.softmax_scale, torch.float64)
        values[~valid.any(1)] = NAN
        return torch.empty_like(a.q, memory_format=torch.contiguous_format).copy_(values)


def reference_dense(entries, indptr):
    """Row after row, as it reads."""
    lens = indptr.diff()
    indices = torch.full((len(lens), max(1, int(lens.max()))), -1, dtype=torch.int32)
    for i, (start, count) in enumerate(zip(indptr.tolist(), lens.tolist())):
        indices[i, :count] = entries[start : start + count]
    return indices, lens


def forget():
    """What the wiring remembers of the build it has seen."""
    for cached in (aiter._imported,):
        cached.cache_clear()
    registry.clear_caches()


@pytest.fixture
def install(monkeypatch):
    def put(arch="gfx950", build=RELEASED, double=None):
        double = double or Aiter(arch, build)
        forget()
        for module in aiter_signature.MODULES.values():
            # None in sys.modules is what an import of a module that is not there finds.
            monkeypatch.setitem(sys.modules, module, double.modules.get(module))
        monkeypatch.setattr(aiter, "AITER", double)
        monkeypatch.setattr(aiter, "_arch", lambda device: arch)
        there = {"device": "cuda", "arch": arch}
        monkeypatch.setattr(aiter, "problem_of", lambda call: dataclasses.replace(problem_of(call), **there))
        return double

    yield put
    forget()


@pytest.fixture
def decode_case(make_cache, index_rows, rng):
    def make(
        layout=DSV4, extra=None, tokens=3, heads=8, width=20, extra_width=30, page_size=16, lens=True, sink=True,
        k_scale=1.0, extra_k_scale=1.0, spread=1,
    ):  # fmt: skip
        cache, slots = make_cache(5, page_size, 40, layout, k_scale=k_scale, spread=spread)
        case = {
            "q": torch.randn(tokens, heads, layout.head_dim, generator=rng).bfloat16(),
            "swa_cache": cache,
            "swa_indices": index_rows(slots, tokens, width),
            "swa_lens": torch.randint(0, width + 1, (tokens,), dtype=torch.int32, generator=rng) if lens else None,
            "extra_cache": None,
            "extra_indices": None,
            "extra_lens": None,
            "attn_sink": torch.randn(heads, generator=rng) if sink else None,
        }
        if extra is not None:
            other, slots = make_cache(9, 4, 30, extra, k_scale=extra_k_scale, spread=spread)
            case["extra_cache"], case["extra_indices"] = other, index_rows(slots, tokens, extra_width)
            if lens:
                case["extra_lens"] = torch.randint(0, extra_width + 1, (tokens,), dtype=torch.int32, generator=rng)
        return case

    return make


@pytest.fixture
def prefill_case(rng):
    def make(tokens=3, heads=8, rows=50, width=40, head_dim=512, lens=True, sink=True):
        kv = torch.full((rows + 7, head_dim), NAN, dtype=torch.bfloat16)
        live = torch.randperm(rows + 7, generator=rng)[:rows]
        kv[live] = (torch.randn(rows, head_dim, generator=rng) / 10).bfloat16()
        indices = live[torch.randint(0, max(rows, 1), (tokens, width), generator=rng)].int() if rows else None
        indices = torch.full((tokens, width), -1, dtype=torch.int32) if indices is None else indices
        indices[torch.rand(tokens, width, generator=rng) < 0.2] = -1
        return {
            "q": torch.randn(tokens, heads, head_dim, generator=rng).bfloat16(),
            "kv": kv,
            "indices": indices,
            "lens": torch.randint(0, width + 1, (tokens,), dtype=torch.int32, generator=rng) if lens else None,
            "attn_sink": torch.randn(heads, generator=rng) if sink else None,
        }

    return make


def scaled_first(q):
    """q as AITER's Triton kernel has it: times the scale in bf16, here undone in float64."""
    return (q.float() * SCALE * LOG2E).bfloat16().double() / (SCALE * LOG2E)


def run_decode(case, out=None, lse=True, scaled=False, **scales):
    """The kernel's result, held against the oracle."""
    got, got_lse = aiter.decode(decode_call(**case, softmax_scale=SCALE, out=out, return_lse=lse, **scales))
    oracle = {**case, "q": scaled_first(case["q"]) if scaled else case["q"]}
    want, want_lse = reference.sparse_mla_decode(**oracle, softmax_scale=SCALE, dtype=torch.float64, **scales)
    return held(got, got_lse, want, want_lse, out, lse, check_decode)


def run_prefill(case, out=None, lse=True, scaled=False):
    got, got_lse = aiter.prefill(prefill_call(**case, softmax_scale=SCALE, out=out, return_lse=lse))
    oracle = {**case, "q": scaled_first(case["q"]) if scaled else case["q"]}
    want, want_lse = reference.sparse_mla_prefill(**oracle, softmax_scale=SCALE, dtype=torch.float64)
    return held(got, got_lse, want, want_lse, out, lse, check_prefill)


def held(got, got_lse, want, want_lse, out, lse, check):
    if lse:
        check(got, got_lse, want, want_lse)
        assert got_lse.dtype == torch.float32
        assert got_lse.is_contiguous()
    else:
        assert got_lse is None
        check_close("out", got, want, absolute=1e-3, relative=2.01 / 128, cosine=5e-6)
    assert got.dtype == torch.bfloat16
    assert got is out if out is not None else got.is_contiguous()
    return got, got_lse


def odd_out(tokens, heads):
    around = torch.full((tokens, 2 * heads + 1, 600), 7.0, dtype=torch.bfloat16)
    out = around[:, 1 : 1 + heads, 40:552]
    out.fill_(NAN)
    return around, out


def only_inside(around, out):
    out.fill_(7)
    assert (around == 7).all(), "wrote outside out"


# Signatures.


@pytest.mark.skipif(not INSTALLED, reason="AMD's aiter is not installed")
@pytest.mark.parametrize("name", aiter_signature.MODULES)
def test_the_installed_signature_is_a_committed_one(name):
    module = importlib.import_module(aiter_signature.MODULES[name])
    if name == "pa_sparse_prefill_opus":
        # Its decorator hides the signature behind a torch op, whose schema has it.
        names = [argument.name for argument in torch.ops.aiter.pa_sparse_prefill_opus.default._schema.arguments]
        assert names == list(aiter_signature.signature(name, LATER).parameters)
        return
    known = [aiter_signature.signature(name, build) for build in aiter_signature.NAMES]
    assert aiter_signature.plain(getattr(module, name)) in known, importlib.metadata.version("amd-aiter")


def test_every_build_of_the_table_names_its_commit():
    for build, commit in aiter_signature.BUILDS.items():
        for name in aiter_signature.MODULES:
            if aiter_signature.signature(name, build) is not None:
                assert len(commit or aiter_signature.LATER[name]) == 40


@pytest.mark.parametrize("build", aiter_signature.NAMES)
def test_what_is_passed_is_in_every_build_that_is_taken(build):
    taken = {aiter.DECODE_SPARSE: 0, aiter.MLA_FWD: 7, aiter.OPUS: 0, aiter.PREFILL_SPARSE: 1}
    for entry, first in taken.items():
        signature = aiter_signature.signature(entry.name, build)
        if aiter_signature.NAMES.index(build) < first:
            assert signature is None
        else:
            signature.bind(*range(entry.arguments), **dict.fromkeys(entry.keywords))
            assert entry.module == aiter_signature.MODULES[entry.name]


# Decode.


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("extra", [None, DSV4, BF16], ids=lambda x: x.name if x else "one")
@pytest.mark.parametrize("layout", [DSV4, BF16], ids=lambda x: x.name)
@pytest.mark.parametrize("build", WITH_PAGES)
def test_gfx950_reads_the_two_caches_in_place(build, layout, extra, sink, lse, install, decode_case):
    double = install("gfx950", build)
    run_decode(decode_case(layout, extra, sink=sink, spread=3), lse=lse)
    run_decode(decode_case(layout, extra, sink=sink, lens=False, heads=20, tokens=1), lse=lse)
    paged = lse and (extra is not None or layout is DSV4)
    name = "sparse_mla_fwd" if build == LATER and not paged else "pa_decode_sparse"
    assert double.calls == [(name, (3, 8, 512)), (name, (1, 20, 512))]


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("layout", [DSV32, BF16_576, UNIFORM, NATIVE], ids=lambda x: x.name)
def test_gfx950_reads_the_other_formats_with_the_newer_entry_point(layout, sink, lse, install, decode_case):
    double = install("gfx950", LATER)
    k_scale = 0.25 if layout.needs_k_scale else 1.0
    case = decode_case(layout, sink=sink, k_scale=k_scale, spread=2)
    run_decode(case, lse=lse, swa_k_scale=k_scale)
    around, out = odd_out(3, 8)
    run_decode(case, out, lse=lse, swa_k_scale=k_scale)
    only_inside(around, out)
    assert {name for name, _ in double.calls} == {"sparse_mla_fwd"}


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_two_uniform_caches_keep_each_its_scale(arch, lse, install, decode_case):
    install(arch, LATER)
    layout = UNIFORM if arch == "gfx950" else UNIFORM_FNUZ
    case = decode_case(layout, layout, k_scale=0.5, extra_k_scale=4.0)
    run_decode(case, lse=lse, swa_k_scale=0.5, extra_k_scale=4.0)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("build", aiter_signature.NAMES[:-1])
def test_gfx942_reads_one_bf16_cache_as_rows_and_rounds_scaled_q(build, sink, install, decode_case):
    double = install("gfx942", build)
    run_decode(decode_case(BF16, sink=sink), lse=False, scaled=True)
    assert double.calls == [("pa_decode_sparse", (3, 8, 512))]


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("layout", [BF16, BF16_576, UNIFORM_FNUZ, NATIVE_FNUZ], ids=lambda x: x.name)
def test_gfx942_reads_its_own_flavour_with_the_newer_entry_point(layout, lse, install, decode_case):
    double = install("gfx942", LATER)
    k_scale = 0.25 if layout.needs_k_scale else 1.0
    run_decode(decode_case(layout, k_scale=k_scale), lse=lse, swa_k_scale=k_scale)
    assert {name for name, _ in double.calls} == {"sparse_mla_fwd"}


ROUTES = [
    pytest.param("gfx950", RELEASED, DSV4, DSV4, False, id="pages"),
    pytest.param("gfx950", RELEASED, DSV4, DSV4, True, id="partials"),
    pytest.param("gfx950", LATER, DSV4, DSV4, False, id="later pages"),
    pytest.param("gfx950", LATER, DSV4, DSV4, True, id="later partials"),
    pytest.param("gfx950", LATER, DSV32, None, True, id="its own lse"),
    pytest.param("gfx950", LATER, UNIFORM, UNIFORM, True, id="its own lse of two"),
    pytest.param("gfx950", LATER, BF16_576, None, False, id="newer"),
    pytest.param("gfx942", RELEASED, BF16, None, False, id="rows"),
    pytest.param("gfx942", LATER, BF16, None, True, id="newer on gfx942"),
]


def with_padding(case, wide):
    """q and sink of ``wide`` heads, those past the case's own NaN."""
    more = (0, 0, 0, wide - case["q"].shape[1])
    q, sink = (torch.nn.functional.pad(case[x], y, value=NAN) for x, y in (("q", more), ("attn_sink", more[2:])))
    return {**case, "q": q, "attn_sink": sink}


def padded_as_alone(run, case, wide, **options):
    """A padded q gives what its own heads give, and leaves the others in out as they were."""
    heads = case["q"].shape[1]
    want, want_lse = run(**case, softmax_scale=SCALE, **options)
    around = torch.full((len(want), wide, 512), 7.0, dtype=torch.bfloat16)
    for out in (None, around):
        got, lse = run(**with_padding(case, wide), softmax_scale=SCALE, heads=heads, out=out, **options)
        assert torch.equal(got[:, :heads], want)
        assert lse is None or torch.equal(lse, want_lse)
    assert (around[:, heads:] == 7).all(), "wrote to heads that do not count"


@pytest.mark.parametrize("wide", [6, 64])
@pytest.mark.parametrize(("arch", "build", "layout", "extra", "lse"), ROUTES)
def test_only_the_heads_that_count_are_read_and_written(
    arch, build, layout, extra, lse, wide, install, decode_case, prefill_case
):  # fmt: skip
    install(arch, build)
    case = decode_case(layout, extra, heads=5)
    padded_as_alone(lambda **x: aiter.decode(decode_call(**x)), case, wide, return_lse=lse)


@pytest.mark.parametrize("offset", [1, 4, 8])
@pytest.mark.parametrize(("arch", "build", "layout", "extra", "lse"), ROUTES)
def test_what_is_off_its_alignment_is_copied(arch, build, layout, extra, lse, offset, install, decode_case):
    install(arch, build)
    for tokens in (1, 3):
        case = decode_case(layout, extra, tokens=tokens)
        q = torch.zeros(tokens, 9, layout.head_dim + 8 + offset, dtype=torch.bfloat16)[:, 1:, offset:][..., :-8]
        case["q"] = q.copy_(case["q"])
        out = torch.zeros(tokens, 9, 521 + offset, dtype=torch.bfloat16)[:, 1:, offset : 512 + offset]
        run_decode(case, out, lse=lse, scaled=(arch, build) == ("gfx942", RELEASED))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("arch", "build", "layout", "extra", "lse"), ROUTES)
def test_no_index_out_of_range_and_no_hole_is_handed_over(
    arch, build, layout, extra, lse, dtype, install, decode_case
):  # fmt: skip
    install(arch, build)
    case = decode_case(layout, extra, tokens=6)
    for scope in ("swa", "extra") if extra else ("swa",):
        capacity, rows = case[f"{scope}_cache"].capacity, case[f"{scope}_indices"].to(dtype)
        rows[:, 1], rows[:, 5], rows[:, 7], rows[:, 9] = capacity, -2, 2**31 - 1, -(2**31)
        if dtype == torch.int64:
            rows[:, 11], rows[:, 13] = 2**40, -(2**40)
        rows[1, 3:] = capacity + 12345
        case[f"{scope}_indices"] = rows
        case[f"{scope}_lens"] = torch.tensor([0, 3, 10, 20, 1128, -5], dtype=dtype)
    run_decode(case, lse=lse, scaled=(arch, build) == ("gfx942", RELEASED))


@pytest.mark.parametrize("sink", [None, -INF, 0.0, 30.0, INF])
@pytest.mark.parametrize(("arch", "build", "layout", "extra", "lse"), ROUTES)
def test_rows_without_entries_and_sinks_at_their_limits(
    arch, build, layout, extra, lse, sink, install, decode_case
):  # fmt: skip
    install(arch, build)
    case = decode_case(layout, extra, tokens=4, lens=False)
    for scope in ("swa", "extra") if extra else ("swa",):
        case[f"{scope}_indices"][1] = -1
        case[f"{scope}_indices"][3] = case[f"{scope}_cache"].capacity
    case["attn_sink"] = None if sink is None else torch.full((8,), sink)
    scaled = (arch, build) == ("gfx942", RELEASED)
    out, got = run_decode(case, lse=lse, scaled=scaled)
    assert (out[[1, 3]] == 0).all()
    if lse:
        assert (got[[1, 3]] == INF).all()
    if extra:
        # Entries in one scope alone.
        case["swa_indices"][0], case["extra_indices"][2] = -1, -1
        run_decode(case, lse=lse)
    for scope in ("swa", "extra") if extra else ("swa",):
        case[f"{scope}_indices"].fill_(-1)
    assert (run_decode(case, lse=lse, scaled=scaled)[0] == 0).all()


@pytest.mark.parametrize(("arch", "build", "layout", "extra", "lse"), ROUTES)
def test_empty_caches_and_empty_rows_of_indices(arch, build, layout, extra, lse, install, decode_case):
    install(arch, build)
    case = decode_case(layout, extra, lens=False)
    for scope in ("swa", "extra") if extra else ("swa",):
        cache = case[f"{scope}_cache"]
        case[f"{scope}_cache"] = PagedCache(cache.data[:0], cache.layout, cache.page_size)
    out, _ = run_decode(case, lse=lse)
    assert (out == 0).all()
    for scope in ("swa", "extra") if extra else ("swa",):
        case[f"{scope}_indices"] = case[f"{scope}_indices"][:, :0]
    assert (run_decode(case, lse=lse)[0] == 0).all()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 5, 9])
@pytest.mark.parametrize(("arch", "build", "layout", "extra", "lse"), ROUTES)
def test_long_batches_are_split(
    arch, build, layout, extra, lse, tokens, given, install, decode_case, monkeypatch
):  # fmt: skip
    double = install(arch, build)
    monkeypatch.setattr(aiter, "max_tokens", lambda heads, head_dim, width, lse: 4)
    around, out = odd_out(tokens, 5) if given else (None, None)
    case = decode_case(layout, extra, tokens=tokens, heads=5)
    run_decode(case, out, lse=lse, scaled=(arch, build) == ("gfx942", RELEASED))
    assert [shape[0] for _, shape in double.calls] == [4] * (tokens // 4) + [tokens % 4] * (tokens % 4 > 0)
    if given:
        only_inside(around, out)


@pytest.mark.parametrize(("arch", "build", "layout", "extra", "lse"), ROUTES)
def test_strided_q_and_buffers_past_two_gib(arch, build, layout, extra, lse, install, decode_case, monkeypatch):
    install(arch, build)
    case = decode_case(layout, extra)
    scaled = (arch, build) == ("gfx942", RELEASED)
    around = torch.full((8, 5, 700), NAN, dtype=torch.bfloat16)
    strided = around[:, 1:4, 3 : 3 + layout.head_dim].transpose(0, 1)
    strided.copy_(case["q"])
    buffer, out = odd_out(3, 8)
    run_decode({**case, "q": strided}, out, lse=lse, scaled=scaled)
    only_inside(buffer, out)
    # Spans stand in for sizes that no test has the memory for.
    monkeypatch.setattr(aiter, "_MAX_BYTES", 2 * 8 * 2 * layout.head_dim)
    run_decode({**case, "q": strided}, out, lse=lse, scaled=scaled)
    only_inside(buffer, out)
    run_decode({**case, "q": strided}, None, lse=lse, scaled=scaled)


def test_a_call_stays_within_two_gib():
    for heads in (1, 16, 64, 128):
        for head_dim in (512, 576):
            for width in (0, 128, 2048, 1 << 27):
                for lse in (False, True):
                    tokens = aiter.max_tokens(heads, head_dim, width, lse)
                    assert tokens >= 1
                    assert tokens * heads * head_dim * 2 < 2**31
                    assert tokens == 1 or tokens * width <= 1 << 26
                    assert not lse or tokens * heads * 512 * 4 * aiter._SPLITS <= 1 << 28
    assert aiter.max_tokens(128, 512, 640, False) == 16383


@pytest.mark.parametrize("sink", [None, -INF, 1.0, INF])
def test_merged_partials_are_the_attention_of_all(sink, rng):
    tokens, splits, heads = 5, 3, 4
    logits = torch.randn(tokens, heads, splits, 6, generator=rng) * 20
    logits[0] = logits[1, :, 0] = logits[2, 1, 1] = -INF
    values = torch.randn(tokens, splits, 6, 512, generator=rng)
    top = logits.amax(-1)
    weights = torch.exp(logits - top.clamp_min(-1e30)[..., None])
    acc = torch.einsum("thsn,tsnd->tshd", weights, values)
    acc[0], acc[1, 0] = NAN, NAN
    sums = weights.sum(-1)
    sums[0] = NAN
    sinks = None if sink is None else torch.full((heads,), sink)
    out, lse = aiter.merge_partials(acc, (top * LOG2E).transpose(1, 2), sums.transpose(1, 2), sinks)
    flat, every = logits.flatten(2).double(), values.flatten(1, 2).double()
    want_lse = flat.logsumexp(-1)
    want = torch.einsum("thn,tnd->thd", torch.exp(flat - want_lse[..., None]), every)
    if sink is not None:
        want = want / (1 + torch.exp(sink - want_lse))[..., None]
    want[0], want_lse[0] = 0, INF
    check_close("out", out, want, absolute=1e-5, relative=1e-4)
    check_close("lse", lse, want_lse, absolute=1e-5, relative=1e-5)


# Prefill.

BY_NAME = {
    entry.name: entry for entry in (aiter.DECODE_SPARSE, aiter.MLA_FWD, aiter.OPUS, aiter.PREFILL_SPARSE)
}  # fmt: skip
ON_GFX950 = ["pa_sparse_prefill_opus", "sparse_mla_fwd", "pa_prefill_sparse", "pa_decode_sparse"]


@pytest.fixture(params=ON_GFX950)
def only(request, install, monkeypatch):
    """gfx950 with one entry point for prefill."""
    double = install("gfx950", LATER)
    monkeypatch.setattr(aiter, "entry_points", lambda problem: (BY_NAME[request.param],))
    double.name = request.param
    return double


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("heads", [1, 16, 33, 64, 96, 97, 128])
def test_every_entry_point_attends_to_rows(heads, sink, only, prefill_case):
    case = prefill_case(tokens=4, heads=heads, sink=sink)
    run_prefill(case, lse=False)
    run_prefill(prefill_case(tokens=4, heads=heads, sink=sink, lens=False), lse=False)
    assert {name for name, _ in only.calls} == {only.name}
    around, out = odd_out(4, heads)
    run_prefill(case, out, lse=False)
    only_inside(around, out)


def test_a_padded_q_is_served_by_every_entry_point(only, prefill_case):
    case = prefill_case(tokens=3, heads=5)
    padded_as_alone(lambda **x: aiter.prefill(prefill_call(**x)), case, 64, return_lse=False)


def test_mla_gluon_is_called_where_it_is_right(install, monkeypatch, prefill_case):
    double = install("gfx950", RELEASED)
    monkeypatch.setattr(aiter, "entry_points", lambda problem: (aiter.PREFILL_SPARSE,))
    run_prefill(prefill_case(tokens=130, heads=16), lse=False)
    run_prefill(prefill_case(tokens=2, heads=64), lse=False)
    run_prefill(prefill_case(tokens=2, heads=128), lse=False)
    run_prefill(prefill_case(tokens=2, heads=96), lse=False)
    shapes = [(130, 16), (129, 48), (129, 16), (129, 48), (129, 48), (129, 32), (129, 96)]
    assert double.calls == [("pa_prefill_sparse", (*shape, 512)) for shape in shapes]


@pytest.mark.parametrize("sink", [None, -INF, 30.0, INF])
def test_prefill_rows_without_entries_and_sinks_at_their_limits(sink, only, prefill_case):
    case = prefill_case(tokens=5, lens=False)
    case["indices"][1], case["indices"][3] = -1, 2**31 - 1
    case["indices"][2, ::2], case["indices"][4, :7] = -(2**31), len(case["kv"])
    case["attn_sink"] = None if sink is None else torch.full((8,), sink)
    out, _ = run_prefill(case, lse=False)
    assert (out[[1, 3]] == 0).all()
    case["indices"].fill_(-1)
    assert (run_prefill(case, lse=False)[0] == 0).all()
    assert (run_prefill({**case, "kv": case["kv"][:0]}, lse=False)[0] == 0).all()
    assert (run_prefill({**case, "indices": case["indices"][:, :0]}, lse=False)[0] == 0).all()


@pytest.mark.parametrize("tokens", [1, 4, 5, 9])
def test_long_prefills_are_split(tokens, only, prefill_case, monkeypatch):
    monkeypatch.setattr(aiter, "max_tokens", lambda heads, head_dim, width, lse: 4)
    around, out = odd_out(tokens, 5)
    case = prefill_case(tokens=tokens, heads=5)
    run_prefill(case, out, lse=False)
    only_inside(around, out)
    run_prefill(case, lse=False)


def test_strided_and_unaligned_tensors_are_taken(only, prefill_case):
    case = prefill_case()
    around = torch.zeros(8, 5, 601, dtype=torch.bfloat16)
    strided = around[:, 1:4, 3:515].transpose(0, 1)
    strided.copy_(case["q"])
    wide = torch.zeros(len(case["kv"]), 523, dtype=torch.bfloat16)
    wide[:, 5:517] = case["kv"]
    flat = torch.zeros(case["q"].numel() + 1, dtype=torch.bfloat16)
    flat[1:] = case["q"].flatten()
    aligned = torch.zeros(8, 5, 608, dtype=torch.bfloat16)[:, 1:4, 8:520].transpose(0, 1)
    aligned.copy_(case["q"])
    for q in (strided, aligned, flat[1:].view(case["q"].shape)):
        run_prefill({**case, "q": q, "kv": wide[:, 5:517]}, torch.empty_like(case["q"]), lse=False)


@pytest.mark.parametrize(("build", "name"), [(RELEASED, "pa_decode_sparse"), (LATER, "sparse_mla_fwd")])
def test_prefill_gives_an_lse_where_an_entry_point_can(build, name, install, prefill_case):
    double = install("gfx950", build)
    run_prefill(prefill_case(tokens=5))
    case = prefill_case(tokens=1100, width=3)
    run_prefill(case)
    assert {called for called, _ in double.calls} == {name}


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_rows_of_576_need_the_newer_entry_point(arch, lse, install, prefill_case):
    double = install(arch, LATER)
    run_prefill(prefill_case(head_dim=576), lse=lse)
    assert double.calls == [("sparse_mla_fwd", (3, 8, 576))]


def test_gfx942_attends_to_rows_with_the_decode_kernel(install, prefill_case):
    double = install("gfx942", RELEASED)
    run_prefill(prefill_case(tokens=7), lse=False, scaled=True)
    assert double.calls == [("pa_decode_sparse", (7, 8, 512))]


@pytest.mark.parametrize(
    ("build", "tokens", "name"),
    [
        (RELEASED, 1023, "pa_prefill_sparse"),
        (RELEASED, 1024, "pa_sparse_prefill_opus"),
        (RELEASED, 129, "pa_prefill_sparse"),
        (RELEASED, 128, "pa_decode_sparse"),
        (LATER, 1024, "pa_sparse_prefill_opus"),
        (LATER, 1023, "sparse_mla_fwd"),
        (OLD, 128, "pa_sparse_prefill_opus"),
    ],
)
def test_the_number_of_tokens_decides_between_them(build, tokens, name, install):
    install("gfx950", build)
    entry, reasons = aiter.choose(problem(PREFILL, tokens=tokens, lse=False))
    assert (entry.name, reasons) == (name, [])


# What the records refuse.

V4 = CacheSpec("DSv4", 64, 4, 37440)
ROWS = CacheSpec("bf16 512", 64, 4, 65536)
DECODE = Problem(
    "sparse_mla_decode", "cuda", "gfx950", tokens=4, heads=64, width=128, caches=(V4,), lse=False, interpreter=False
)  # fmt: skip
PREFILL = Problem("sparse_mla_prefill", "cuda", "gfx950", tokens=4, heads=64, width=128, rows=50, interpreter=False)


def problem(base=DECODE, **changes):
    return dataclasses.replace(base, **changes)


@pytest.fixture
def own_registry(replaced):
    replaced(empty=True)
    for op in ("sparse_mla_decode", "sparse_mla_prefill"):
        registry.register(Kernel(op, "triton", lambda: None, lambda p: 100.0))
    aiter.register_kernels()


@pytest.fixture
def reasons(own_registry, install, replaced):
    """Reasons for a problem with a build installed, whatever this machine has."""

    def ask(asked, build=LATER, double=None):
        library = install(asked.arch, build, double)
        replaced(dataclasses.replace(registry.find(asked.op, "aiter"), library=library))
        return registry.find(asked.op, "aiter").not_supported_reasons(asked)

    return ask


@pytest.mark.parametrize("heads", [1, 16, 100, 128])
def test_what_is_taken(heads, reasons):
    for lse in (False, True):
        taken = problem(heads=heads, lse=lse, capturing=True)
        for build in WITH_PAGES:
            assert reasons(taken, build) == []
            assert reasons(problem(taken, caches=(V4, V4)), build) == []
            assert reasons(problem(taken, caches=(V4, ROWS)), build) == []
            assert reasons(problem(PREFILL, heads=heads, lse=lse), build) == []
        for arch in ("gfx942", "gfx950"):
            assert reasons(problem(taken, arch=arch, caches=(ROWS,))) == []
            assert reasons(problem(PREFILL, arch=arch, heads=heads, head_dim=576, lse=lse)) == []
    for build in aiter_signature.NAMES:
        assert reasons(problem(arch="gfx942", heads=heads, caches=(ROWS,)), build) == []
        assert reasons(problem(PREFILL, arch="gfx942", heads=heads, lse=False), build) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arch": "sm_90"}, ["arch is sm_90, need gfx942 or gfx950 or gfx1250"]),
        ({"device": "cpu", "arch": "cpu"}, ["device is cpu, need cuda"]),
        ({"heads": 129}, ["129 heads, need <= 128"]),
        ({"caches": (CacheSpec("DSv4 fnuz", 64, 4, 37440),)}, ["cache layout is DSv4 fnuz, need DSv4 or"]),
        ({"caches": (CacheSpec("DSv4", 64, 2**25, 37440),)}, [f"cache has {2**31} slots, need < 2**31"]),
        (
            {"arch": "gfx1250", "caches": (ROWS,)},
            ["sparse_mla_fwd: arch is gfx1250, need gfx942 or gfx950",
             "pa_decode_sparse: arch is gfx1250, need gfx942 or gfx950: there it reads slot 0"],
        ),
        (
            {"arch": "gfx942"},
            ["sparse_mla_fwd: cache layout is DSv4, need bf16 512 or bf16 576 or uniform fp8 fnuz",
             "pa_decode_sparse: cache layout is DSv4, need bf16 512 on gfx942"],
        ),
        (
            {"caches": (V4, CacheSpec("DSv4", 48, 4, 28800))},
            ["sparse_mla_fwd: page_size is 48, need a power of two: newer builds find an entry of a DSv4 page by",
             "pa_decode_sparse: page_size is 48, need a power of two: newer builds find an entry of a DSv4 page by"],
        ),
        (
            {"arch": "gfx950", "caches": (CacheSpec("uniform fp8 fnuz", 64, 4, 32768),)},
            ["sparse_mla_fwd: cache layout is uniform fp8 fnuz, need DSv4 or DSv3.2 or bf16 512",
             "pa_decode_sparse: cache layout is uniform fp8 fnuz, need DSv4 or bf16 512 on gfx950"],
        ),
        (
            {"head_dim": 576, "caches": (CacheSpec("DSv3.2", 64, 4, 41984),) * 2, "lse": True},
            ["sparse_mla_fwd: two caches of DSv3.2 and DSv3.2, need DSv4 or bf16 512 for each, or uniform fp8",
             "sparse_mla_fwd: returns no lse for these caches, need return_lse=False",
             "pa_decode_sparse: head_dim is 576, need 512",
             "pa_decode_sparse: cache layout is DSv3.2, need DSv4 or bf16 512 on gfx950"],
        ),
        (
            {"arch": "gfx942", "caches": (ROWS, ROWS), "lse": True},
            ["sparse_mla_fwd: two caches of bf16 512 and bf16 512, need uniform fp8 fnuz or trtllm-native fnuz for",
             "sparse_mla_fwd: returns no lse for these caches, need return_lse=False",
             "pa_decode_sparse: returns no lse on gfx942, need return_lse=False",
             "pa_decode_sparse: an extra cache is given, need none on gfx942"],
        ),
    ],
)  # fmt: skip
def test_each_limit_is_a_reason(changes, says, reasons):
    given = reasons(problem(**changes))
    assert len(given) == len(says), given
    for reason, begins in zip(given, says):
        assert reason.startswith(begins)


def test_two_gib_is_a_reason_with_the_number_seen(reasons):
    big = 2**21 + 1
    at = problem(PREFILL, rows=big, lse=False)
    seen = f"workspace is {big * 1024} bytes, need < 2**31"
    old = reasons(at, OLD)
    assert any(reason.startswith(f"pa_sparse_prefill_opus: {seen}: builds before 0.1.20") for reason in old)
    assert any(reason.startswith(f"pa_prefill_sparse: {seen}: past that it reads row 0") for reason in old)
    assert reasons(at, RELEASED) == []
    assert list(aiter.OPUS.missing(at)) == []
    assert next(iter(aiter.PREFILL_SPARSE.limits(at))).startswith(seen)
    assert not any("2**31" in reason for reason in reasons(problem(at, rows=2**21 - 1), OLD))

    rows = 2**22
    given = reasons(problem(PREFILL, arch="gfx942", rows=rows, lse=False), RELEASED)
    (pool,) = [reason for reason in given if "pool" in reason]
    assert pool.startswith(f"pa_decode_sparse: pool has {rows * 512} values, need < 2**31")
    assert reasons(problem(PREFILL, arch="gfx942", rows=rows - 1, lse=False), RELEASED) == []
    pages = CacheSpec("bf16 512", 64, rows // 64, 65536)
    given = reasons(problem(arch="gfx942", caches=(pages,)), RELEASED)
    assert any(f"pool has {rows * 512} values" in reason for reason in given)
    # The newer one widens its offsets, and so do pages on gfx950.
    assert reasons(problem(arch="gfx942", caches=(pages,)), LATER) == []
    assert reasons(problem(caches=(V4._replace(pages=2**20), V4)), RELEASED) == []


def test_pages_must_stand_back_to_back_where_they_are_rows(reasons):
    spread = problem(arch="gfx942", caches=(ROWS._replace(page_stride=65552),))
    assert any("page stride is 65552 bytes, need 65536" in reason for reason in reasons(spread, RELEASED))
    assert reasons(spread, LATER) == []


def test_what_a_build_lacks_is_told(reasons):
    given = reasons(DECODE, OLD)
    assert given[0].startswith("sparse_mla_fwd: import aiter.ops.triton.attention.sparse_mla failed")
    assert given[1:] == [
        "pa_decode_sparse: at /site/aiter takes no extra_cache: it is older than 0.1.20 and reads no pages"
    ]
    given = reasons(problem(PREFILL, lse=True), OLD)
    assert "pa_prefill_sparse: returns no lse, need return_lse=False" in given
    assert "pa_sparse_prefill_opus: returns no lse, need return_lse=False" in given
    assert any(reason.startswith("pa_decode_sparse: at /site/aiter takes no extra_cache") for reason in given)
    # gfx950 came to it with 0.1.20.
    double = Aiter("gfx950", OLD)
    del double.modules[aiter_signature.MODULES["pa_sparse_prefill_opus"]]
    given = reasons(problem(PREFILL, lse=False), double=double)
    assert "pa_prefill_sparse: at /site/aiter is older than 0.1.20 and has no gfx950 kernel" in given


def test_a_build_for_other_archs_says_so(reasons):
    double = Aiter("gfx942", LATER)
    module = double.modules[aiter_signature.MODULES["sparse_mla_fwd"]]
    del module.FP8_SCALAR_ARCHS
    fnuz = problem(arch="gfx942", caches=(CacheSpec("uniform fp8 fnuz", 64, 4, 32768),))
    assert reasons(fnuz, double=double)[0] == "sparse_mla_fwd: at /site/aiter reads fp8 on gfx950, need gfx942"
    assert reasons(problem(arch="gfx942", caches=(ROWS,), lse=True), double=double) == []
    module.SUPPORTED_ARCHS = ("gfx950",)
    given = reasons(problem(arch="gfx942", caches=(ROWS,), lse=True), double=double)
    assert given[0] == "sparse_mla_fwd: at /site/aiter was written for gfx950, need gfx942"


def test_a_function_that_moved_or_changed_is_told(reasons):
    double = Aiter("gfx950", RELEASED)
    name = aiter_signature.MODULES["pa_decode_sparse"]
    double.modules[name] = types.SimpleNamespace()
    assert f"pa_decode_sparse: {name} at /site/aiter has none" in reasons(DECODE, double=double)
    double = Aiter("gfx950", RELEASED)
    function = double.modules[name].pa_decode_sparse
    kept = [p for key, p in inspect.signature(function).parameters.items() if key != "skip_reduce"]
    function.__signature__ = inspect.Signature(kept)
    (reason,) = [r for r in reasons(DECODE, double=double) if r.startswith("pa_decode_sparse")]
    assert "takes other arguments" in reason
    assert "skip_reduce" in reason


def test_a_library_that_cannot_be_used_is_the_only_reason(reasons):
    broken = Aiter("gfx950", LATER)
    broken.reason = "import aiter failed: OSError: libamdhip64"
    broken.modules.clear()
    assert reasons(DECODE, double=broken) == [broken.reason]
    with pytest.raises(BackendUnavailable, match=r"kernel='aiter' of sparse_mla_decode: import aiter failed"):
        registry.select(DECODE, "aiter")
    # Where it could not run anyway, the library is beside the point.
    given = reasons(problem(arch="gfx942", caches=(V4,)), double=broken)
    assert given
    assert broken.reason not in given


@pytest.mark.parametrize(("heads", "released", "later"), [(8, 1, 1), (16, 1, 1), (32, 1, 1), (64, 0, 1), (128, 0, 1)])
def test_prediction_picks_it_on_gfx950_where_its_code_is_ahead(heads, released, later, reasons):
    """Released builds decode the entries again for each 16 heads."""
    for build, ahead in ((RELEASED, released), (LATER, later)):
        base = problem(heads=heads)
        assert reasons(base, build) == []
        assert registry.select(base).name == ("aiter" if ahead else "triton")
        assert registry.select(base, "aiter").name == "aiter"


@pytest.mark.parametrize(("triton_us", "picked"), [(50.0, "triton"), (400.0, "aiter")])
def test_prediction_counts_the_launches_around_it(triton_us, picked, reasons, replaced):
    """Fifteen of them make an lse of its partial outputs."""
    few = problem(heads=8, lse=True)
    replaced(dataclasses.replace(registry.find("sparse_mla_decode", "triton"), predicted_us=lambda problem: triton_us))
    assert reasons(few, RELEASED) == []
    assert registry.select(few).name == picked


def test_prediction_picks_it_for_prefill_on_gfx950_where_no_lse_is_asked_for(reasons):
    base = problem(PREFILL, lse=False)
    assert reasons(base, RELEASED) == []
    assert registry.select(base).name == "aiter"
    assert reasons(problem(base, lse=True), RELEASED) == []
    assert registry.select(problem(base, lse=True)).name == "triton"
    on_gfx942 = problem(arch="gfx942", caches=(ROWS,))
    assert reasons(on_gfx942, LATER) == []
    assert registry.select(on_gfx942).name == "triton"


def test_registering_imports_nothing(own_registry, replaced, monkeypatch):
    class Explosive:
        @property
        def reason(self):
            raise AssertionError("the library was asked")

    monkeypatch.setattr(aiter, "AITER", Explosive())
    replaced(empty=True)
    rocm.register_kernels()
    for op in ("sparse_mla_decode", "sparse_mla_prefill"):
        assert [record.name for record in registry.kernels(op)] == ["aiter", "gluon"]
    record = registry.find("sparse_mla_decode", "aiter")
    assert record.not_supported_reasons(problem(arch="gfx942"))
    assert "need gfx942 or gfx950" in record.not_supported_reasons(problem(arch="gfx90a"))[0]


# From the public functions down, on a machine that would have AITER.


@pytest.fixture
def served(replaced, install):
    def put(arch="gfx950", build=RELEASED):
        double = install(arch, build)
        ops = ("sparse_mla_decode", "sparse_mla_prefill")
        replaced(without=[(op, "aiter") for op in ops if registry.find(op, "aiter")])
        aiter.register_kernels()
        for op in ops:
            record = registry.find(op, "aiter")
            replaced(dataclasses.replace(record, devices=("cpu",), archs=(), library=None, predicted_us=lambda p: 0.0))
        forget()
        return double

    return put


@pytest.mark.parametrize("lse", [False, True])
def test_the_wiring_is_what_the_ops_run(lse, served, decode_case, prefill_case):
    double = served()
    case = decode_case(DSV4, DSV4)
    out, got = dsv4x.sparse_mla_decode(**case, softmax_scale=SCALE, kernel="aiter", return_lse=lse)
    want = reference.sparse_mla_decode(**case, softmax_scale=SCALE, dtype=torch.float64)
    held(out, got, *want, None, lse, check_decode)
    case = prefill_case(tokens=5)
    out, got = dsv4x.sparse_mla_prefill(**case, softmax_scale=SCALE, kernel="aiter", return_lse=lse)
    want = reference.sparse_mla_prefill(**case, softmax_scale=SCALE, dtype=torch.float64)
    held(out, got, *want, None, lse, check_prefill)
    assert [shape[0] for _, shape in double.calls] == [3, 5]
    empty = {**case, "q": case["q"][:0], "indices": case["indices"][:0], "lens": case["lens"][:0]}
    out, got = dsv4x.sparse_mla_prefill(**empty, softmax_scale=SCALE, kernel="aiter", return_lse=lse)
    assert out.shape == (0, 8, 512)
    assert (got is None) == (not lse)
    assert len(double.calls) == 2


def test_a_pool_that_no_entry_point_takes_is_refused_at_the_call(install, decode_case):
    install("gfx942", RELEASED)
    with pytest.raises(KernelNotSupported, match=r"kernel='aiter' cannot run sparse_mla_decode: .* on gfx942"):
        aiter.decode(decode_call(**decode_case(DSV4), softmax_scale=SCALE))


@pytest.mark.parametrize(("ratio", "path"), [(r, p) for r in (1, 4, 128) for p in paths_of(r)])
@pytest.mark.parametrize("build", [RELEASED, LATER])
def test_a_step_runs_it_on_every_path(build, ratio, path, served):
    from dsv4x.demo.layer import Layer
    from dsv4x.demo.server import serve_and_check, tokens_of

    double = served(build=build)
    layer = Layer(ratio, 4, topk=64, device=torch.device("cpu"))
    sequences = [layer.sequence(tokens_of("dsv4x over AITER ", n, torch.device("cpu"))) for n in (150, 30)]
    outcome = serve_and_check(layer, sequences, path=path, kernel="aiter")
    assert outcome.passed
    assert double.calls
