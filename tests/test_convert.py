"""Caches of one layout stored in another."""

import itertools

import pytest
import torch

import dsv4x
from dsv4x import PagedCache, layouts

ALL = [member.value for member in layouts.MLAKVCacheLayout]
ALL += [layouts.DSV4.with_flavour("e4m3fnuz"), layouts.TRTLLM_NATIVE.with_flavour("e4m3fnuz")]
PAIRS = [(a, b) for a, b in itertools.product(ALL, ALL) if a.head_dim == b.head_dim]


def pool(layout, page_size, pages, device="cpu"):
    """Garbage pages, not back to back."""
    stride = -(-(layout.page_stride(page_size) + 16) // 16) * 16
    data = torch.randint(0, 256, (pages, stride), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return PagedCache(data.to(device), layout, page_size)


@pytest.mark.parametrize("flavour", ["e4m3fn", "e4m3fnuz"])
@pytest.mark.parametrize("k_scale", [1.0, 0.31])
@pytest.mark.parametrize("pages", [None, [2, 0, -1, 5, 2]])
def test_native_pages_become_block_scaled_ones_exactly(pages, k_scale, flavour, kernel_device):
    """Every code, NaN included, and k_scale itself in each block scale."""
    kernel, device = kernel_device
    src = pool(layouts.TRTLLM_NATIVE.with_flavour(flavour), 5, 4, device)
    out = pool(layouts.DSV32.with_flavour(flavour), 5, 4, device)
    before = out.data.clone()
    which = None if pages is None else torch.tensor(pages, device=device)
    assert dsv4x.requantize_fp8_to_block_scale(src, k_scale, out, pages=which, kernel=kernel) is out
    done = range(4) if pages is None else [0, 2]
    native = src.page_bytes.view(4, 5, 576)
    for page in range(4):
        if page not in done:
            assert torch.equal(out.data[page], before[page])
            continue
        assert torch.equal(out.data[page, 5 * 656 :], before[page, 5 * 656 :])
        entries = out.page_bytes[page].view(5, 656)
        assert torch.equal(entries[:, :512], native[page, :, :512])
        scales = entries[:, 512:528].contiguous().view(torch.float32)
        assert torch.equal(scales, torch.full_like(scales, k_scale))
    slots = torch.tensor([page * 5 + i for page in done for i in range(5)], device=device)
    read = dsv4x.dequantize_k_cache_paged(out, slots)
    want = dsv4x.dequantize_k_cache_paged(src, slots, k_scale=k_scale)
    assert torch.equal(read.isnan(), want.isnan())
    assert torch.equal(read.nan_to_num(9.0), want.nan_to_num(9.0))


def test_without_out_a_cache_of_the_same_pages_is_made():
    src = pool(layouts.TRTLLM_NATIVE, 3, 2)
    out = dsv4x.requantize_fp8_to_block_scale(src, 1.0)
    assert (out.layout, out.pages, out.page_size) == (layouts.DSV32, 2, 3)
    assert dsv4x.requantize_fp8_to_block_scale(pool(layouts.TRTLLM_NATIVE, 3, 0), 1.0).pages == 0


@pytest.mark.parametrize(("src", "dst"), PAIRS, ids=[f"{a.name} to {b.name}" for a, b in PAIRS])
def test_any_layout_is_stored_as_any_other(src, dst, kernel_device):
    """The result is the source's bf16 rows, quantized once more by the target's rule."""
    kernel, device = kernel_device
    a, b, c = pool(src, 3, 4, device), pool(dst, 4, 4, device), pool(dst, 4, 4, device)
    k = torch.randn(12, src.head_dim, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    every = torch.arange(12, device=device)
    dsv4x.quantize_and_insert_k_cache(k, a, every, kernel="reference")
    rows = dsv4x.dequantize_k_cache_paged(a, every, kernel="reference")
    slots = torch.tensor([7, -1, 0, 11, 12, 100], device=device)
    dsv4x.convert_cache(a, b, slots, kernel=kernel)
    kept = torch.tensor([7, 0, 11], device=device)
    dsv4x.quantize_and_insert_k_cache(rows[kept], c, kept, kernel="reference")
    assert torch.equal(b.data, c.data)
    dsv4x.convert_cache(a, b, kernel=kernel)
    dsv4x.quantize_and_insert_k_cache(rows, c, every, kernel="reference")
    assert torch.equal(b.data, c.data)


def test_conversion_holds_a_bounded_number_of_rows(monkeypatch):
    from dsv4x.common.ops import cache

    monkeypatch.setattr(cache, "CONVERT_ROWS", 5)
    a, b = pool(layouts.DSV4, 3, 4), pool(layouts.BF16_512, 3, 4)
    a.data.zero_()
    dsv4x.convert_cache(a, b)
    assert not b.page_bytes.any()


def test_checked_conversion_names_the_slot_and_writes_nothing(monkeypatch):
    from dsv4x.common.ops import cache

    monkeypatch.setattr(cache, "CONVERT_ROWS", 2)
    a, b = pool(layouts.DSV4, 3, 4), pool(layouts.BF16_512, 2, 4)
    a.data.zero_()
    k = torch.ones(12, 512).bfloat16()
    k[5, 7] = torch.nan
    dsv4x.quantize_and_insert_k_cache(k, a, torch.arange(12))
    monkeypatch.setenv("DSV4X_CHECK", "1")
    before = b.data.clone()
    for slots, says in (
        ([1, -1, 0, 5], r"src: NaN in the entry of slot 5 \(slots, row 3\)"),
        ([1, 9], r"slots: slot 9 in row 1, column 0, need -1 or 0 to 7"),
        ([2**31, 1], r"slots: slot 2147483648 in row 0"),
    ):
        with pytest.raises(ValueError, match=says):
            dsv4x.convert_cache(a, b, torch.tensor(slots))
        assert torch.equal(b.data, before)
    dsv4x.convert_cache(a, b, torch.tensor([1, -1, 0]))
    assert torch.equal(b.data.view(torch.bfloat16)[0, :512], k[0])
    # What nobody stored may hold anything.
    dsv4x.convert_cache(a, pool(layouts.BF16_512, 3, 4))


requantize = dsv4x.requantize_fp8_to_block_scale


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: requantize(pool(layouts.DSV4, 2, 1), 1.0),
            "cache: layout is DSv4, need trtl",
        ),
        (
            lambda: requantize(pool(layouts.DSV41_FP4, 2, 1), 1.0),
            "cache: layout is DSv4.1 fp4",
        ),
        (lambda: requantize(pool(layouts.TRTLLM_NATIVE, 2, 1), 0.0), "k_scale: got 0.0"),
        (
            lambda: requantize(pool(layouts.TRTLLM_NATIVE, 2, 2), 1.0, pool(layouts.DSV32, 2, 1)),
            "out: 1 pages of 2, need >= 2 pages of 2",
        ),
        (
            lambda: requantize(
                pool(layouts.TRTLLM_NATIVE.with_flavour("e4m3fnuz"), 2, 1), 1.0, pool(layouts.DSV32, 2, 1)
            ),
            "out: layout is DSv3.2, need DSv3.2 fnuz",
        ),
        (
            lambda: dsv4x.convert_cache(pool(layouts.DSV4, 2, 1), pool(layouts.DSV32, 2, 1)),
            "dst: head dim is 576 (DSv3.2), need 512",
        ),
        (
            lambda: dsv4x.convert_cache(pool(layouts.DSV4, 2, 2), pool(layouts.DSV4, 2, 1)),
            "dst: 2 slots, need >= 4",
        ),
        (
            lambda: dsv4x.convert_cache(pool(layouts.DSV4, 2, 1), pool(layouts.DSV4, 2, 1), torch.zeros(2)),
            "slots: dtype is float32, need int32 or int64",
        ),
        (
            lambda: dsv4x.convert_cache(pool(layouts.DSV4, 2, 1), pool(layouts.UNIFORM_FP8, 2, 1), src_k_scale=2.0),
            "src_k_scale: got 2.0, need 1: DSv4 has no scale",
        ),
        (
            lambda: dsv4x.convert_cache(pool(layouts.DSV4, 2, 0), pool(layouts.UNIFORM_FP8, 2, 1), dst_k_scale=0.0),
            "dst_k_scale: got 0.0, need a finite number > 0",
        ),
    ],
)
def test_what_cannot_be_converted_is_named(call, says):
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert says in str(raised.value)


def test_pages_outside_the_pool_are_reported_when_asked(monkeypatch):
    monkeypatch.setenv("DSV4X_CHECK", "1")
    with pytest.raises(ValueError, match="pages: page 2 in row 1"):
        dsv4x.requantize_fp8_to_block_scale(pool(layouts.TRTLLM_NATIVE, 2, 2), 1.0, pages=torch.tensor([0, 2]))
