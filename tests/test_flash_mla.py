"""FlashMLA's wiring of V4.1's pages on a CPU: a double that computes, and takes nothing that the wheel would not.

What it demands was read from flash_mla_interface.py and from the messages in the library of sgl-flash-mla 1.0.0. No
SM100 ran it.
"""

import types

import pytest
import torch
from calling import decode_call
from tolerances import check_decode

import dsv4x
from dsv4x import PagedCache, layouts, reference
from dsv4x.common.core.errors import KernelNotSupported
from dsv4x.common.core.layouts import CacheSpec
from dsv4x.common.dispatch import registry
from dsv4x.common.dispatch.problem import Problem
from dsv4x.cuda import flash_mla

FP8, FP4 = layouts.DSV41_FP8, layouts.DSV41_FP4
PAGE = 64


class CurrentKernels:
    """``flash_mla_with_kvcache`` of the wheel without ``use_legacy``."""

    def __init__(self):
        self.calls = []

    def __call__(
        self, q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
        softmax_scale=None, causal=False, is_fp8_kvcache=None, indices=None, attn_sink=None, extra_k_cache=None,
        extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None, enable_batch_invariant=False,
        use_legacy=False, kv_format=None,
    ):  # fmt: skip
        assert not use_legacy, "its V4.1 kernels are the current ones"
        assert kv_format is None
        assert (block_table, cache_seqlens, num_splits, causal, is_fp8_kvcache) == (None, None, None, False, True)
        tokens, one, heads, head_dim = q.shape
        assert (one, head_dim, head_dim_v, q.dtype) == (1, 512, 512, torch.bfloat16)
        assert heads in (64, 128)
        assert q.data_ptr() % 16 == 0
        assert q.stride(3) == 1
        assert q.stride(0) % q.stride(1) == 0, "q.stride(0) must be divisible by q.stride(1)"
        formats = (k_cache.shape[-1], None if extra_k_cache is None else extra_k_cache.shape[-1])
        assert formats in {(528, None), (528, 528), (528, 288)}, "The fp4 KV cache is only supported as extra_kv"
        rows = self._rows(k_cache, indices, topk_length, FP8, tokens)
        if extra_k_cache is not None:
            layout = FP8 if formats[1] == 528 else FP4
            more = self._rows(extra_k_cache, extra_indices_in_kvcache, extra_topk_length, layout, tokens)
            rows = [torch.cat(both) for both in zip(rows, more)]
        if attn_sink is not None:
            assert (attn_sink.shape, attn_sink.dtype) == ((heads,), torch.float32)
            assert attn_sink.is_contiguous()
        self.calls.append((tokens, heads, formats))
        out = torch.zeros(tokens, 1, heads, 512, dtype=torch.bfloat16)
        lse = torch.full((tokens, heads, 1), float("inf"))
        for token, entries in enumerate(rows):
            if len(entries):
                logits = q[token, 0].double() @ entries.double().T * softmax_scale
                total = logits.logsumexp(1)
                lse[token, :, 0] = total.float()
                with_sink = total if attn_sink is None else torch.logaddexp(total, attn_sink.double())
                out[token, 0] = (torch.exp(logits - with_sink[:, None]) @ entries.double()).bfloat16()
        return out, lse

    @staticmethod
    def _rows(cache, indices, lens, layout, tokens):
        """The entries that each row reads."""
        pages, page_size, one, entry_bytes = cache.shape
        assert pages > 0
        assert one == 1
        assert cache.dtype == torch.uint8
        assert cache.data_ptr() % 16 == 0
        assert cache.stride(1) == entry_bytes, "The whole block must be contiguous"
        assert cache.stride(0) % entry_bytes == 0, "stride(0) must be a multiple"
        assert (indices.shape[:2], indices.dtype) == ((tokens, 1), torch.int32)
        assert indices.shape[2] % 64 == 0, "topk mod B_TOPK must be 0"
        assert indices.data_ptr() % 32 == 0
        assert 4 * indices.stride(0) % 32 == 0, "indices.stride(0) must be 32B aligned"
        assert ((indices >= -1) & (indices < pages * page_size)).all(), "out-of-bounds addresses"
        pool = PagedCache(cache.squeeze(2).flatten(1), layout, page_size)
        found = []
        for token in range(tokens):
            span = indices.shape[2]
            if lens is not None:
                assert (lens.shape, lens.dtype) == ((tokens,), torch.int32)
                span = int(lens[token].clamp(0, span))
            row = indices[token, 0, :span]
            found.append(dsv4x.dequantize_k_cache_paged(pool, row[row >= 0], kernel="reference"))
        return found


@pytest.fixture
def wheel(monkeypatch):
    """The wheel's V4.1 kernels, as far as a CPU can have them."""
    function = CurrentKernels()
    module = types.SimpleNamespace(
        flash_mla_with_kvcache=function, get_mla_metadata=lambda: (object(), None), has_legacy=lambda: True
    )
    library = types.SimpleNamespace(reason=None, path="/site/flash_mla", load=lambda: module)
    monkeypatch.setattr(flash_mla, "FLASH_MLA", library)
    # Of an SM100; a CPU has no shared memory for a scheduler.
    monkeypatch.setattr(flash_mla, "max_batch", lambda heads, shared_memory: 11622)
    return function


def case(heads, extra, tokens=5, width=192):
    generator = torch.Generator().manual_seed(heads + tokens)

    def pool(layout):
        cache = PagedCache.zeros(4, layout, PAGE)
        k = torch.randn(cache.capacity, 512, generator=generator).bfloat16()
        dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(cache.capacity), kernel="reference")
        return cache

    def rows(cache, columns):
        found = torch.randint(0, cache.capacity, (tokens, columns), generator=generator).int()
        found[:, 3::7] = -1
        return found, torch.randint(0, columns + 1, (tokens,), generator=generator).int()

    swa = pool(FP8)
    made = dict(zip(("swa_cache", "swa_indices", "swa_lens"), (swa, *rows(swa, 128))))
    if extra is not None:
        other = pool(extra)
        made |= dict(zip(("extra_cache", "extra_indices", "extra_lens"), (other, *rows(other, width))))
    q = torch.randn(tokens, heads, 512, generator=generator).bfloat16()
    return {**made, "q": q, "attn_sink": torch.randn(heads, generator=generator)}


def reason_of(caches, arch="sm_100", **fields):
    specs = tuple(CacheSpec(layout.name, PAGE, 4, layout.page_stride(PAGE)) for layout in caches)
    problem = Problem(
        "sparse_mla_decode", "cuda", arch, tokens=4, heads=64, width=128, extra_width=128 * (len(specs) > 1),
        caches=specs, interpreter=False, **fields,
    )  # fmt: skip
    with registry.replaced(empty=True):
        flash_mla.register_kernels()
        record = registry.find("sparse_mla_decode", "flash_mla")
        return record.not_supported_reasons(problem), record.predicted_us(problem)


@pytest.mark.parametrize("extra", [None, FP8, FP4], ids=lambda x: x and x.name)
@pytest.mark.parametrize("heads", [8, 64, 100])
def test_v41_pages_are_read_by_the_current_kernels(heads, extra, wheel):
    made = case(heads, extra, width=256)
    got = flash_mla.decode(decode_call(**made, trusted_indices=True))
    check_decode(*got, *reference.sparse_mla_decode(**made, softmax_scale=512**-0.5, dtype=torch.float64))
    assert wheel.calls == [(5, 64 if heads <= 64 else 128, (528, None if extra is None else extra.entry_bytes))]


@pytest.mark.interpreter
@pytest.mark.parametrize("extra", [None, FP4], ids=lambda x: x and x.name)
def test_v41_rows_of_any_width_and_hostile_slots(extra, wheel):
    made = case(20, extra, width=70)
    made["swa_indices"] = made["swa_indices"][:, :100]
    made["swa_indices"][:, 5], made["swa_indices"][:, 9] = 10**6, -7
    got = flash_mla.decode(decode_call(**made))
    check_decode(*got, *reference.sparse_mla_decode(**made, softmax_scale=512**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("arch", ["sm_100", "sm_103", "sm_107"])
@pytest.mark.parametrize("caches", [(FP8,), (FP8, FP8), (FP8, FP4)])
def test_they_are_for_sm100_and_by_name_only(arch, caches, wheel):
    reasons, us = reason_of(caches, arch)
    assert reasons == []
    # Never run here: nothing picks them unasked.
    assert us == float("inf")


@pytest.mark.parametrize(
    ("caches", "arch", "says"),
    [
        ((FP4,), "sm_100", "caches of DSv4.1 fp4, need DSv4.1 fp8, alone or with an extra cache of"),
        ((FP4, FP8), "sm_100", "caches of DSv4.1 fp4 and DSv4.1 fp8, need DSv4.1 fp8, alone or with"),
        ((FP8, layouts.DSV4), "sm_100", "caches of DSv4.1 fp8 and DSv4, need DSv4.1 fp8, alone or with"),
        ((FP8,), "sm_90", "arch is sm_90, need SM100 for V4.1's pages"),
        ((FP8,), "sm_120", "arch is sm_120, need"),
    ],
)
def test_what_they_lack_is_said(caches, arch, says, wheel):
    assert any(reason.startswith(says) for reason in reason_of(caches, arch)[0])


def test_older_builds_have_no_kernels_for_v41(wheel, monkeypatch):
    older = types.SimpleNamespace(flash_mla_with_kvcache=lambda q, extra_k_cache: None)
    library = types.SimpleNamespace(reason=None, path="/site/flash_mla", load=lambda: older)
    monkeypatch.setattr(flash_mla, "FLASH_MLA", library)
    assert reason_of((FP8,))[0] == ["flash_mla at /site/flash_mla predates 2026.09.30, whose kernels read V4.1's pages"]


def test_pages_that_are_no_multiple_of_entries_are_refused(wheel):
    spec = CacheSpec(FP8.name, PAGE, 4, 34048)
    problem = Problem(
        "sparse_mla_decode", "cuda", "sm_100", tokens=4, heads=64, width=128, caches=(spec,), interpreter=False
    )
    with registry.replaced(empty=True):
        flash_mla.register_kernels()
        with pytest.raises(KernelNotSupported, match="page stride is 34048, need a multiple of 528 on SM100"):
            registry.select(problem, "flash_mla")


def test_upstreams_release_reads_v41_although_it_dropped_v4(wheel, monkeypatch):
    upstream = types.SimpleNamespace(flash_mla_with_kvcache=lambda q, extra_k_cache, enable_batch_invariant: None)
    library = types.SimpleNamespace(reason=None, path="/site/flash_mla", load=lambda: upstream)
    monkeypatch.setattr(flash_mla, "FLASH_MLA", library)
    assert reason_of((FP8, FP4))[0] == []
    assert "dropped DSv4 pages" in reason_of((layouts.DSV4,))[0][0]
    assert flash_mla._options(upstream.flash_mla_with_kvcache, FP8.name) == {}


@pytest.mark.parametrize("extra", [False, True])
def test_scratch_counts_v41s_wider_rows(extra):
    def scratch(*caches):
        specs = tuple(CacheSpec(layout.name, PAGE, 4, layout.page_stride(PAGE)) for layout in caches)
        problem = Problem(
            "sparse_mla_decode", "cuda", "sm_100", tokens=64, heads=64, width=64, extra_width=64 * extra, caches=specs
        )
        return flash_mla._decode_scratch(problem)

    count = 1 + extra
    more = scratch(*(FP8,) * count) - scratch(*(layouts.DSV4,) * count)
    assert more == count * 64 * 64 * 4


def test_a_server_of_v4_is_not_touched(wheel, monkeypatch):
    made = case(64, None)
    legacy = {}

    def function(q, use_legacy, enable_batch_invariant=False, extra_k_cache=None, **more):
        legacy.update(use_legacy=use_legacy)
        return torch.zeros(*q.shape), torch.zeros(len(q), q.shape[2], 1)

    module = types.SimpleNamespace(flash_mla_with_kvcache=function, get_mla_metadata=lambda: (object(), None))
    monkeypatch.setattr(flash_mla.FLASH_MLA, "load", lambda: module)
    v4 = PagedCache.zeros(4, layouts.DSV4, PAGE)
    call = decode_call(**{**made, "swa_cache": v4}, trusted_indices=True)
    flash_mla.decode(call)
    assert legacy == {"use_legacy": True}
