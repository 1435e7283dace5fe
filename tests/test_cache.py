"""Storing and reading entries: golden bytes, every byte that must not change, and the hard values."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import slow
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsv4x
from dsv4x.common.core.layouts import DSV4, DSV32, PagedCache

GOLDEN = Path(__file__).parent / "golden"
FILES = {"dsv4_page2": DSV4, "dsv4_page61": DSV4, "dsv4_page64": DSV4, "dsv32_page64": DSV32}
PAGE_SIZES = [1, 2, 61, 64, 256]
LAYOUTS = pytest.mark.parametrize("layout", [DSV4, DSV32], ids=lambda layout: layout.name)


def flash_mla_helper(layout):
    """The layout as FlashMLA's test helper writes it: it floors the scale, not the amax."""
    return dataclasses.replace(layout, amax_floor=0.0, scale_floor=1e-4)


def golden(name, device="cpu"):
    """(k bf16 [N, D], cache bytes [pages, stride], dequantized bf16 [N, D], page_size)."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        page_size, data = int(file["page_size"]), torch.from_numpy(file["cache_bytes"])
        k, dequantized = (
            torch.from_numpy(file[key].astype(np.int32)).to(torch.int16).view(torch.bfloat16).flatten(0, 2)
            for key in ("k_bf16", "dequant_bf16")
        )
    return k.to(device), data.flatten(1).to(device), dequantized.to(device), page_size


def bits(tensor):
    return tensor.cpu().contiguous().view(torch.int16)


def assert_same_values(got, want):
    """bf16 bit for bit, any NaN equal to any NaN."""
    nan = want.isnan().cpu()
    assert torch.equal(got.isnan().cpu(), nan)
    assert torch.equal(bits(got)[~nan], bits(want)[~nan])


def whole_storage(tensor):
    return torch.from_numpy(slow.raw_bytes(tensor))


def owned_bytes(cache, slots):
    """Bool mask over a DSv4 cache's whole allocation: the bytes of the entries at ``slots``."""
    owned = torch.zeros(len(slow.raw_bytes(cache.data)), dtype=torch.bool)
    for slot in slots:
        page, i = divmod(int(slot), cache.page_size)
        start = cache.data.storage_offset() + page * cache.data.stride(0)
        owned[start + i * 576 :][:576] = True
        owned[start + cache.page_size * 576 + i * 8 :][:8] = True
    return owned


@pytest.mark.parametrize("name", FILES)
def test_golden_bytes_dequantize_bit_for_bit(name, kernel_device):
    kernel, device = kernel_device
    _, data, dequantized, page_size = golden(name, device)
    cache = PagedCache(data, FILES[name], page_size)
    slots = torch.arange(cache.capacity, device=device)
    assert torch.equal(bits(dsv4x.dequantize_k_cache_paged(cache, slots, kernel=kernel)), bits(dequantized))


@pytest.mark.parametrize("name", FILES)
def test_golden_inputs_quantize_byte_for_byte(name, kernel_device):
    kernel, device = kernel_device
    k, data, _, page_size = golden(name, device)
    cache = PagedCache(torch.zeros_like(data), flash_mla_helper(FILES[name]), page_size)
    dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(cache.capacity, device=device), kernel=kernel)
    assert torch.equal(cache.data.cpu(), data.cpu())


@pytest.mark.parametrize("name", FILES)
def test_the_models_floor_differs_only_on_tiles_below_0_0448(name, kernel_device):
    kernel, device = kernel_device
    layout = FILES[name]
    k, data, _, page_size = golden(name, device)
    cache = PagedCache(torch.zeros_like(data), layout, page_size)
    slots = torch.arange(cache.capacity, device=device)
    dsv4x.quantize_and_insert_k_cache(k, cache, slots, kernel=kernel)
    tiles = k[:, : layout.nope_dim].float().abs().unflatten(1, (layout.num_scales, layout.scale_tile)).amax(2).cpu()
    got, want = (x.cpu() for x in (cache.page_bytes, PagedCache(data, layout, page_size).page_bytes))
    small = 0
    for slot in range(cache.capacity):
        page, i = divmod(slot, page_size)
        for tile in range(layout.num_scales):
            codes = i * layout.data_pitch + tile * layout.scale_tile
            width = layout.scale_bytes // layout.num_scales
            scale = layout.scale_base(page_size) + i * layout.scale_pitch + tile * width
            differs = not (
                torch.equal(got[page, codes:][: layout.scale_tile], want[page, codes:][: layout.scale_tile])
                and torch.equal(got[page, scale:][:width], want[page, scale:][:width])
            )
            small += differs
            assert not (differs and tiles[slot, tile] >= 0.0448), (slot, tile)
    assert small, "the zero and the tiny row should show the other floor"


@LAYOUTS
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_triton_and_reference_write_the_same_bytes_and_read_the_same_values(page_size, layout, kernel_device, rng):
    kernel, device = kernel_device
    pages = max(3, -(-20 // page_size))
    ours, oracle = (PagedCache.zeros(pages, layout, page_size, d) for d in (device, "cpu"))
    slots = torch.randperm(oracle.capacity, generator=rng)[: min(20, oracle.capacity)]
    k = (torch.randn(len(slots), layout.head_dim, generator=rng) * 3).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k.to(device), ours, slots.to(device), kernel=kernel)
    dsv4x.quantize_and_insert_k_cache(k, oracle, slots, kernel="reference")
    assert torch.equal(ours.data.cpu(), oracle.data)
    got = dsv4x.dequantize_k_cache_paged(ours, slots.to(device), kernel=kernel)
    assert torch.equal(bits(got), bits(dsv4x.dequantize_k_cache_paged(oracle, slots, kernel="reference")))
    assert torch.equal(bits(got[:, layout.nope_dim :]), bits(k[:, layout.nope_dim :]))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_entries_lie_where_the_format_says(page_size, kernel_device, make_cache, on_device):
    kernel, device = kernel_device
    cache, slots = make_cache(3, page_size, min(12, 3 * page_size), spread=3)
    entries = slow.Entries(cache)
    got = dsv4x.dequantize_k_cache_paged(on_device(cache, device), slots.to(device), kernel=kernel)
    want = torch.from_numpy(np.array([entries[s] for s in slots]))
    assert torch.equal(got.cpu().double(), want)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("spread", [1, 3])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_write_touches_no_byte_but_its_entries(
    page_size, spread, index_dtype, kernel_device, make_cache, on_device, rng
):
    kernel, device = kernel_device
    pages = max(3, -(-8 // page_size))
    cache, _ = make_cache(pages, page_size, 0, spread=spread)
    cache = on_device(cache, device)
    slots = torch.randperm(cache.capacity, generator=rng)[:8].to(index_dtype)
    k = torch.randn(len(slots), 512, generator=rng).bfloat16()
    before = whole_storage(cache.data)
    dsv4x.quantize_and_insert_k_cache(k.to(device), cache, slots.to(device), kernel=kernel)
    after = whole_storage(cache.data)
    owned = owned_bytes(cache, slots)
    assert torch.equal(after[~owned], before[~owned])
    assert not torch.equal(after[owned], before[owned])
    entries = slow.Entries(cache)
    for row, slot in zip(k, slots):
        error = np.abs(entries[slot] - row.double().numpy())
        assert error.max() < 0.3, "garbage was left in an entry"


@pytest.mark.parametrize("page_size", [1, 2, 64])
def test_the_servers_strided_view_is_written_and_read_by_stride(page_size, kernel_device, rng):
    """Two layers share a block: stride(0) is two pages, and the second layer's bytes are the neighbour's."""
    kernel, device = kernel_device
    pages, stride = max(3, 6 // page_size), DSV4.page_stride(page_size)
    block = torch.randint(0, 256, (pages * 2 * stride,), dtype=torch.uint8, generator=rng).to(device)
    views = [
        block[layer * stride :].as_strided((pages, page_size, 1, 584), (2 * stride, 584, 584, 1), layer * stride)
        for layer in (0, 1)
    ]
    slots = torch.randperm(pages * page_size, generator=rng)[:6]
    k = torch.randn(6, 512, generator=rng).bfloat16()
    before = block.cpu()
    dsv4x.quantize_and_insert_k_cache(
        k.to(device), PagedCache(views[1], DSV4, page_size), slots.to(device), kernel=kernel
    )
    cache = PagedCache(views[1], DSV4, page_size)
    owned = owned_bytes(cache, slots)
    assert torch.equal(block.cpu()[~owned], before[~owned])
    plain = PagedCache.zeros(pages, DSV4, page_size)
    dsv4x.quantize_and_insert_k_cache(k, plain, slots, kernel="reference")
    want = dsv4x.dequantize_k_cache_paged(plain, slots, kernel="reference")
    got = dsv4x.dequantize_k_cache_paged(cache, slots.to(device), kernel=kernel)
    assert torch.equal(bits(got), bits(want))


def test_rows_wider_than_a_page_are_addressed_by_their_stride(kernel_device, rng):
    kernel, device = kernel_device
    wide = torch.randint(0, 256, (4, DSV4.page_stride(2) + 576 + 64), dtype=torch.uint8, generator=rng).to(device)
    cache = PagedCache(wide, DSV4, 2)
    slots = torch.tensor([7, 0, 5])
    k = torch.randn(3, 512, generator=rng).bfloat16()
    before = wide.cpu()
    dsv4x.quantize_and_insert_k_cache(k.to(device), cache, slots.to(device), kernel=kernel)
    owned = owned_bytes(cache, slots)
    assert torch.equal(wide.cpu().flatten()[~owned], before.flatten()[~owned])
    got = dsv4x.dequantize_k_cache_paged(cache, slots.to(device), kernel=kernel)
    entries = slow.Entries(cache)
    assert torch.equal(got.cpu().double(), torch.from_numpy(np.array([entries[s] for s in slots])))


HOSTILE = {
    torch.int32: [-1, -2, -(2**31), 2**31 - 1],
    torch.int64: [-1, -2, -(2**31), 2**31 - 1, 2**32, 2**40, -(2**40), 2**63 - 1, -(2**63)],
}


@pytest.mark.parametrize("index_dtype", HOSTILE)
def test_slots_outside_the_cache_are_skipped(index_dtype, kernel_device, make_cache, on_device, rng):
    kernel, device = kernel_device
    cache, _ = make_cache(2, 64, 0, spread=2)
    cache = on_device(cache, device)
    bad = [*HOSTILE[index_dtype], cache.capacity]
    slots = torch.tensor([*bad, 3, *bad, 100], dtype=index_dtype)
    k = torch.randn(len(slots), 512, generator=rng).bfloat16()
    before = whole_storage(cache.data)
    dsv4x.quantize_and_insert_k_cache(k.to(device), cache, slots.to(device), kernel=kernel)
    owned = owned_bytes(cache, [3, 100])
    assert torch.equal(whole_storage(cache.data)[~owned], before[~owned])

    live = torch.zeros(len(slots), dtype=torch.bool)
    live[[len(bad), -1]] = True
    allocated = dsv4x.dequantize_k_cache_paged(cache, slots.to(device), kernel=kernel).cpu()
    assert not allocated[~live].any()
    assert allocated[live].any(1).all()
    given = torch.full((len(slots), 600), 7.0, dtype=torch.bfloat16, device=device)
    out = given[:, 32:544]
    returned = dsv4x.dequantize_k_cache_paged(cache, slots.to(device), out, kernel=kernel)
    assert returned is out
    assert (out[~live] == 7).all()
    assert torch.equal(bits(out)[live], bits(allocated)[live])
    assert (given[:, :32] == 7).all()
    assert (given[:, 544:] == 7).all()


@pytest.mark.parametrize("pages", [0, 2])
def test_no_rows_is_no_work(pages, kernel_device):
    kernel, device = kernel_device
    cache = PagedCache.zeros(pages, DSV4, 64, device)
    slots = torch.zeros(0, dtype=torch.int64, device=device)
    dsv4x.quantize_and_insert_k_cache(slots.new_zeros(0, 512, dtype=torch.bfloat16), cache, slots, kernel=kernel)
    assert dsv4x.dequantize_k_cache_paged(cache, slots, kernel=kernel).shape == (0, 512)
    assert not cache.data.any()


def test_a_cache_without_pages_has_no_entries(kernel_device):
    kernel, device = kernel_device
    cache = PagedCache.zeros(0, DSV4, 64, device)
    slots = torch.tensor([0, -1, 5], device=device)
    dsv4x.quantize_and_insert_k_cache(
        torch.ones(3, 512, dtype=torch.bfloat16, device=device), cache, slots, kernel=kernel
    )
    assert not dsv4x.dequantize_k_cache_paged(cache, slots, kernel=kernel).any()


@LAYOUTS
def test_hard_values_survive(layout, kernel_device):
    kernel, device = kernel_device
    nan, inf = float("nan"), float("inf")
    k = torch.ones(6, layout.head_dim)
    k[0] = 0.0
    k[1] = -0.0
    k[2, 3] = nan
    k[2, layout.nope_dim + 1] = nan
    k[3, 5], k[3, 6], k[3, layout.nope_dim + 2] = inf, -inf, -inf
    k[4] = 1e-9
    k[5] = 3e38
    k = k.bfloat16()
    cache = PagedCache.zeros(2, layout, 4, device)
    slots = torch.tensor([7, 1, 2, 4, 0, 6], device=device)
    dsv4x.quantize_and_insert_k_cache(k.to(device), cache, slots, kernel=kernel)
    got = dsv4x.dequantize_k_cache_paged(cache, slots, kernel=kernel).cpu()

    rope = slice(layout.nope_dim, None)
    assert_same_values(got[:, rope], k[:, rope])
    assert torch.equal(bits(got[:2]), bits(k[:2])), "zeros keep their sign"
    # NaN stays in its own place and leaves its tile's other values as exact as without it.
    assert got[2].isnan().nonzero().flatten().tolist() == [3, layout.nope_dim + 1]
    assert (got[2, : layout.nope_dim].nan_to_num(1.0) == 1).all()
    # Infinity saturates at 448 of the largest scale; it is never NaN, and the sign stays.
    nope = got[3, : layout.nope_dim].float()
    assert not nope.isnan().any()
    assert nope[5] == -nope[6] > 1e35
    assert (nope[layout.scale_tile :] == 1).all(), "one tile's infinity reached another"
    # 1e-9 is quantized in the subnormal steps of the floor's scale, 2**-22.
    assert (got[4, : layout.nope_dim] == 2.0**-30).all()
    assert ((got[5].float() - 3e38).abs() / 3e38 < 1 / 15).all()


def test_rows_of_k_may_be_strided(kernel_device, rng):
    kernel, device = kernel_device
    wide = torch.randn(5, 700, generator=rng).bfloat16()
    k = wide[:, 100:612]
    caches = [PagedCache.zeros(1, DSV4, 64, d) for d in (device, "cpu")]
    slots = torch.arange(5)
    dsv4x.quantize_and_insert_k_cache(wide.to(device)[:, 100:612], caches[0], slots.to(device), kernel=kernel)
    dsv4x.quantize_and_insert_k_cache(k.contiguous(), caches[1], slots, kernel="reference")
    assert torch.equal(caches[0].data.cpu(), caches[1].data)


@pytest.mark.large
@pytest.mark.parametrize("gib", [3, 5])
def test_pages_past_2_and_4_gib_are_their_own(gib, kernel_device, rng):
    """32-bit byte offsets wrap here. NumPy's zeros are not touched until written, so this takes no memory on a CPU."""
    kernel, device = kernel_device
    stride = gib << 30
    total = stride + DSV4.page_stride(64)
    raw = (
        torch.from_numpy(np.zeros(total, np.uint8))
        if device == "cpu"
        else torch.zeros(total, dtype=torch.uint8, device=device)
    )
    cache = PagedCache(raw.as_strided((2, DSV4.page_stride(64)), (stride, 1)), DSV4, 64)
    k = torch.randn(2, 512, generator=rng).bfloat16()
    slots = torch.tensor([64 + 9, 9])
    dsv4x.quantize_and_insert_k_cache(k.to(device), cache, slots.to(device), kernel=kernel)
    small = PagedCache.zeros(2, DSV4, 64)
    dsv4x.quantize_and_insert_k_cache(k, small, slots, kernel="reference")
    for page in range(2):
        start = page * stride
        assert torch.equal(raw[start : start + DSV4.page_stride(64)].cpu(), small.data[page])
    got = dsv4x.dequantize_k_cache_paged(cache, slots.to(device), kernel=kernel)
    assert torch.equal(bits(got), bits(dsv4x.dequantize_k_cache_paged(small, slots, kernel="reference")))


# Zero, or from the least normal (Triton's interpreter takes subnormal bf16 for zero) to 2**127 (above, 448 times the
# scale no longer fits a float32).
BF16_BITS = (st.just(0) | st.integers(0x80, 0x7F00)).flatmap(lambda b: st.sampled_from([b, b | 0x8000]))


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pattern=st.lists(BF16_BITS, min_size=1, max_size=64),
    floor=st.sampled_from([DSV4, dataclasses.replace(DSV4, amax_floor=0.0), flash_mla_helper(DSV4)]),
)
def test_error_is_at_most_half_an_ulp_of_e4m3_at_the_tiles_scale(pattern, floor, kernel_device):
    kernel, device = kernel_device
    tile = torch.tensor(pattern, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).repeat(64)[:64]
    k = torch.zeros(1, 512, dtype=torch.bfloat16)
    k[0, 128:192] = tile
    cache = PagedCache.zeros(1, floor, 2, device)
    slots = torch.tensor([1], device=device)
    dsv4x.quantize_and_insert_k_cache(k.to(device), cache, slots, kernel=kernel)
    got = dsv4x.dequantize_k_cache_paged(cache, slots, kernel=kernel)[0, 128:192].cpu().double()
    scale_byte = int(cache.data[0, 2 * 576 + 8 + 2])
    scale, amax = slow.ue8m0(scale_byte), float(tile.double().abs().max())
    assert scale * 448 >= amax, "the largest value does not fit"
    assert scale_byte == floor.min_scale_byte or scale * 224 < amax, "the scale is twice what is needed"
    scaled = tile.double().abs() / scale
    ulp = torch.maximum(2.0 ** (torch.frexp(scaled)[1] - 4.0), torch.tensor(2.0**-9, dtype=torch.float64)) * scale
    # Below bf16's normal range the product itself is rounded once more.
    assert ((got - tile.double()).abs() <= ulp / 2 + 2.0**-134).all()
    assert not dsv4x.dequantize_k_cache_paged(cache, slots, kernel=kernel)[0, :128].any()
