"""Layouts as data, and which tensors a PagedCache takes."""

import dataclasses

import pytest
import torch

import dsv4x
from dsv4x import layouts
from dsv4x.common.core.layouts import DSV4, DSV32, PagedCache


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.uint8)


def test_dsv4_derives_the_published_numbers():
    assert (DSV4.head_dim, DSV4.data_bytes, DSV4.scale_bytes, DSV4.entry_bytes) == (512, 576, 8, 584)
    assert (DSV4.num_scales, DSV4.data_pitch, DSV4.scale_pitch, DSV4.rope_base) == (7, 576, 8, 448)
    assert DSV4.scale_base(64) == 64 * 576


@pytest.mark.parametrize(("page_size", "stride"), [(256, 149760), (128, 74880), (64, 37440), (2, 1728), (1, 1152)])
def test_dsv4_page_strides_are_multiples_of_576(page_size, stride):
    assert DSV4.page_stride(page_size) == stride


def test_dsv32_derives_the_published_numbers():
    assert (DSV32.head_dim, DSV32.data_bytes, DSV32.scale_bytes, DSV32.entry_bytes) == (576, 640, 16, 656)
    assert (DSV32.data_pitch, DSV32.scale_pitch, DSV32.rope_base) == (656, 656, 528)
    assert (DSV32.scale_base(64), DSV32.page_stride(64)) == (512, 64 * 656)


def test_one_scale_of_the_tensor_is_needed_where_fp8_is_stored_without_scales():
    needing = {member.name for member in dsv4x.MLAKVCacheLayout if member.value.needs_k_scale}
    assert needing == {"TRTLLM_NATIVE", "UNIFORM_FP8"}


def test_records_are_frozen_and_replaceable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DSV4.nope_dim = 1
    assert dataclasses.replace(DSV4, amax_floor=0.0) != DSV4


@pytest.mark.parametrize("page_size", [1, 2, 61, 64, 256])
def test_zeros_makes_pages_back_to_back(page_size):
    cache = PagedCache.zeros(3, DSV4, page_size)
    assert (cache.pages, cache.capacity, cache.page_stride) == (3, 3 * page_size, DSV4.page_stride(page_size))
    assert cache.page_bytes.shape == (3, page_size * 584)
    assert not cache.data.any()


@pytest.mark.parametrize("page_size", [1, 2, 64])
@pytest.mark.parametrize("with_one", [True, False])
def test_the_servers_view_is_addressed_by_its_page_stride(page_size, with_one):
    stride = 2 * DSV4.page_stride(page_size)
    block = zeros(3 * stride)
    shape, strides = ((3, page_size, 1, 584), (stride, 584, 584, 1))
    if not with_one:
        shape, strides = (3, page_size, 584), (stride, 584, 1)
    cache = PagedCache(block.as_strided(shape, strides), DSV4, page_size)
    assert (cache.pages, cache.page_stride) == (3, stride)
    cache.page_bytes[2, 7] = 9
    assert block.nonzero().tolist() == [[2 * stride + 7]]


def test_one_page_has_the_layouts_stride_whatever_torch_says():
    cache = PagedCache(zeros(1, 40000), DSV4, 64)
    assert cache.page_stride == 37440


def test_a_cache_without_pages_is_a_cache():
    assert PagedCache(zeros(0, 37440), DSV4, 64).capacity == 0


@pytest.mark.parametrize(
    ("data", "page_size", "error", "says"),
    [
        (None, 64, TypeError, ["data", "NoneType", "uint8"]),
        (torch.zeros(2, 37440), 64, TypeError, ["data", "float32", "uint8"]),
        (zeros(2, 37440), 0, ValueError, ["page_size", "0", "> 0"]),
        (zeros(2, 37440), -1, ValueError, ["page_size", "-1", "> 0"]),
        (zeros(2, 37440), 64.0, TypeError, ["page_size", "float", "int"]),
        (zeros(2, 37440), True, TypeError, ["page_size", "bool", "int"]),
        (zeros(2, 37424), 64, ValueError, ["data", "37424", "37440"]),
        (zeros(37440), 64, ValueError, ["data", "(37440,)", "37440", "584"]),
        (zeros(2, 64, 1, 576), 64, ValueError, ["data", "576", "584"]),
        (zeros(2, 63, 1, 584), 64, ValueError, ["data", "63", "64"]),
        (zeros(2, 64, 2, 584), 64, ValueError, ["data", "(2, 64, 2, 584)", "584"]),
        (zeros(37440, 2).t(), 64, ValueError, ["data", "stride(1)", "2", "1"]),
        # Contiguous [pages, 64, 1, 584] lacks the padding that makes a page stride a multiple of 576.
        (zeros(2, 64, 1, 584), 64, ValueError, ["data", "stride(0)", "37376", "37440"]),
        (zeros(2, 64, 1, 1168)[..., ::2], 64, ValueError, ["data", "strides", "584"]),
        (zeros(2, 64, 2, 584)[:, :, :1], 64, ValueError, ["data", "strides", "1168", "584"]),
        (zeros(2, 37448), 64, ValueError, ["data", "stride(0)", "37448", "16"]),
        (zeros(37448)[8:].view(1, 37440), 64, ValueError, ["data", "address", "16"]),
        # Pages that share bytes: a write to one changes another.
        (zeros(1, 37440).expand(3, 37440), 64, ValueError, ["data", "stride(0)", "0", "37440"]),
        (zeros(80000).as_strided((3, 37440), (16, 1)), 64, ValueError, ["data", "stride(0)", "16", "37440"]),
    ],
)
def test_a_tensor_that_holds_no_pages_is_named(data, page_size, error, says):
    with pytest.raises(error) as raised:
        PagedCache(data, DSV4, page_size)
    for word in says:
        assert word in str(raised.value), str(raised.value)


def test_the_layout_must_be_a_record():
    with pytest.raises(TypeError, match=r"layout: got str, need a CacheLayout"):
        PagedCache(zeros(2, 37440), "DSv4", 64)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"pages": 2.0}, TypeError, "pages: got float, need an int"),
        ({"pages": True}, TypeError, "pages: got bool, need an int"),
        ({"pages": -1}, ValueError, "pages: got -1, need >= 0"),
        ({"layout": "DSv4"}, TypeError, "layout: got str, need a CacheLayout"),
        ({"page_size": 64.0}, TypeError, "page_size: got float, need an int"),
        ({"page_size": None}, TypeError, "page_size: got NoneType, need an int"),
        ({"page_size": 0}, ValueError, "page_size: got 0, need > 0"),
    ],
)
def test_zeros_names_what_it_cannot_take(changes, error, says):
    with pytest.raises(error, match=says):
        PagedCache.zeros(**{"pages": 2, "layout": DSV4, "page_size": 64, **changes})


@pytest.mark.parametrize("name", [None, 5, ["DSv4"], {}])
def test_a_layouts_name_is_a_string(name):
    with pytest.raises(TypeError, match=f"name: got {type(name).__name__}, need a layout's name"):
        layouts.by_name(name)


def test_meta_tensors_have_no_address_to_check():
    assert dsv4x.PagedCache(zeros(2, 37440).to("meta"), DSV4, 64).capacity == 128
