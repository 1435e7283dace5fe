"""Which layout becomes which, and the sentence a kernel refuses a convertible cache with."""

import itertools

import pytest
import torch

import dsv4x
from dsv4x import PagedCache, layouts
from dsv4x.common.core import conversions
from dsv4x.common.core.layouts import CacheSpec
from dsv4x.common.dispatch import registry
from dsv4x.common.dispatch.problem import CacheProblem
from dsv4x.common.dispatch.registry import Kernel

NAMED = [member.value for member in layouts.MLAKVCacheLayout]
NAMED += [layout.with_flavour("e4m3fnuz") for layout in NAMED if layout.value_encoding == "e4m3fn"]


def refusal(reads, given):
    kernel = Kernel("op", "flash_mla", lambda: None, lambda p: 1.0, layouts=reads)
    reasons = kernel.not_supported_reasons(CacheProblem("op", caches=(CacheSpec(given, 64, 4, 1 << 16),)))
    assert len(reasons) == 1
    return reasons[0]


@pytest.mark.parametrize("conversion", conversions.EXACT, ids=lambda c: f"{c.source.name} to {c.target.name}")
@pytest.mark.parametrize("k_scale", [1.0, 0.31])
def test_an_exact_conversion_exists_and_reads_back_the_same_values(conversion, k_scale):
    """Random bytes, so every code: an entry here that rounded would show."""
    assert conversion.function in dsv4x.__all__
    assert conversion.function in registry.ops()
    assert conversions.exact_from(conversion.source) == [conversion]
    src = PagedCache.zeros(3, conversion.source, 5)
    src.data.copy_(torch.randint(0, 256, src.data.shape, generator=torch.Generator().manual_seed(4)))
    out = getattr(dsv4x, conversion.function)(src, k_scale)
    assert out.layout == conversion.target
    slots = torch.arange(src.capacity)
    read, want = (
        dsv4x.dequantize_k_cache_paged(out, slots),
        dsv4x.dequantize_k_cache_paged(src, slots, k_scale=k_scale),
    )
    assert torch.equal(read.isnan(), want.isnan())
    assert torch.equal(read.nan_to_num(9.0), want.nan_to_num(9.0))


def test_a_flavour_is_kept_and_nothing_else_is_exact():
    flavours = {(c.source.name, c.target.name) for c in conversions.EXACT}
    assert flavours == {("trtllm-native", "DSv3.2"), ("trtllm-native fnuz", "DSv3.2 fnuz")}
    for layout in NAMED:
        assert bool(conversions.exact_from(layout)) == layout.name.startswith("trtllm-native")


def test_a_kernel_of_block_scaled_pages_names_both_layouts_and_the_converter():
    assert refusal(("DSv3.2",), "trtllm-native") == (
        "cache layout is trtllm-native, need DSv3.2: dsv4x.requantize_fp8_to_block_scale converts it to DSv3.2"
    )


@pytest.mark.parametrize(
    ("reads", "given", "advice"),
    [
        (("DSv3.2 fnuz",), "trtllm-native fnuz", "requantize_fp8_to_block_scale converts it to DSv3.2 fnuz"),
        (("DSv4", "bf16 576", "DSv3.2"), "trtllm-native", "requantize_fp8_to_block_scale converts it to DSv3.2"),
        # Another flavour is another encoding: no code can be copied.
        (("DSv3.2",), "trtllm-native fnuz", "convert_cache converts it to DSv3.2, rounding through bf16"),
        (("trtllm-native",), "DSv3.2", "convert_cache converts it to trtllm-native, rounding through bf16"),
        (("DSv4",), "uniform fp8", "convert_cache converts it to DSv4, rounding through bf16"),
        # What bf16 pages hold is what reading the cache gives: nothing is rounded that was not.
        (("DSv4", "bf16 512"), "uniform fp8", "convert_cache converts it to bf16 512"),
        (("DSv3.2", "DSv4.1 fp8"), "DSv4", "convert_cache converts it to DSv4.1 fp8, rounding through bf16"),
    ],
)
def test_what_would_help_is_the_end_of_the_sentence(reads, given, advice):
    assert refusal(reads, given) == f"cache layout is {given}, need {' or '.join(reads)}: dsv4x.{advice}"


@pytest.mark.parametrize(
    ("reads", "given"),
    [(("DSv3.2",), "DSv4"), (("DSv4",), "trtllm-native"), (("DSv4",), "indexer fp8"), (("DSv4",), "mine")],
)
def test_no_converter_is_named_where_none_fits(reads, given):
    assert refusal(reads, given) == f"cache layout is {given}, need {' or '.join(reads)}"


@pytest.mark.parametrize(
    ("src", "dst"),
    [(a, b) for a, b in itertools.permutations(NAMED, 2) if a.head_dim == b.head_dim],
    ids=lambda layout: layout.name,
)
def test_the_advice_is_true(src, dst):
    """convert_cache takes the pair, and to bf16 it changes no value that is read."""
    advice = conversions.advice(src.name, (dst.name,))
    k = torch.randn(6, src.head_dim, generator=torch.Generator().manual_seed(2)).bfloat16()
    a, b, slots = PagedCache.zeros(2, src, 3), PagedCache.zeros(2, dst, 3), torch.arange(6)
    dsv4x.quantize_and_insert_k_cache(k, a, slots)
    dsv4x.convert_cache(a, b)
    same = torch.equal(dsv4x.dequantize_k_cache_paged(a, slots), dsv4x.dequantize_k_cache_paged(b, slots))
    if "rounding" not in advice:
        assert same
    assert ("rounding" in advice) == (dst.value_encoding != "bf16" and "requantize" not in advice)
