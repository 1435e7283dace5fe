"""Entries moved between slots: every byte of each, and no other, whatever the layout, the page sizes and the slots."""

import numpy as np
import pytest
import torch

import dsv4x
from dsv4x import CacheLayout, PagedCache, layouts

LAYOUTS = [member.value for member in layouts.MLAKVCacheLayout] + [layouts.DSV4.with_flavour("e4m3fnuz")]
LAYOUTS += [
    CacheLayout("odd soa", 30, 0, "soa", "e4m3fn", "ue8m0", 10),
    CacheLayout("bare soa", 64, 3, "soa", "e4m3fn", "none", 64),
    CacheLayout("odd aos", 0, 5, "aos", "bf16", "none", 64),
]
HOSTILE = {
    torch.int32: [-1, -2, -(2**31), 2**31 - 1],
    torch.int64: [-1, -2, 2**31, 2**32 + 1, 2**40, -(2**40), 2**63 - 1, -(2**63)],
}


def pool(layout, page_size, pages, device="cpu", seed=5):
    """Garbage pages, not back to back."""
    stride = -(-(layout.page_stride(page_size) + 16) // 16) * 16
    data = torch.randint(0, 256, (pages, stride), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return PagedCache(data.to(device), layout, page_size)


def places(cache, slot):
    """Offsets in the pool's bytes of a slot's own, one by one, from the record's pitches and bases."""
    layout, page, entry = cache.layout, slot // cache.page_size, slot % cache.page_size
    at = page * cache.data.stride(0) + entry * layout.data_pitch
    if layout.arrangement == "aos":
        return list(range(at, at + layout.entry_bytes))
    scale = page * cache.data.stride(0) + layout.scale_base(cache.page_size) + entry * layout.scale_pitch
    return [*range(at, at + layout.data_bytes), *range(scale, scale + layout.scale_bytes)]


def copied(src, src_slots, dst, dst_slots):
    """What the bytes of ``dst``'s pool have to be, by a loop over rows."""
    read, written = src.data.cpu().flatten().clone(), dst.data.cpu().flatten().clone()
    for a, b in zip(src_slots.tolist(), dst_slots.tolist()):
        if 0 <= a < src.capacity and 0 <= b < dst.capacity:
            written[places(dst, b)] = read[places(src, a)]
    return written


def rows_of(src, dst, dtypes):
    """Slots of both: each of ``dst`` once, hostile ones of either side among them; the order drawn."""
    random = torch.Generator().manual_seed(9)
    pairs = [(int(torch.randint(src.capacity, (), generator=random)), slot) for slot in range(0, dst.capacity, 2)]
    pairs += [(bad, 1) for bad in (*HOSTILE[dtypes[0]], src.capacity)]
    pairs += [(0, bad) for bad in (*HOSTILE[dtypes[1]], dst.capacity)] + [(-1, -1)]
    order = torch.randperm(len(pairs), generator=random).tolist()
    return (torch.tensor([pairs[i][side] for i in order], dtype=dtypes[side]) for side in (0, 1))


@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int32), (torch.int64, torch.int32)], ids=["int32", "mixed"])
@pytest.mark.parametrize("sizes", [(64, 64), (1, 61), (5, 2), (256, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_byte_of_an_entry_is_copied_and_no_other(layout, sizes, dtypes, kernel_device):
    kernel, device = kernel_device
    src, dst = (pool(layout, size, max(2, 9 // size), seed=at) for at, size in enumerate(sizes))
    src_slots, dst_slots = rows_of(src, dst, dtypes)
    want, before = copied(src, src_slots, dst, dst_slots), src.data.clone()
    src, dst = (PagedCache(cache.data.to(device), layout, cache.page_size) for cache in (src, dst))
    made = dsv4x.copy_entries(src, src_slots.to(device), dst, dst_slots.to(device), kernel=kernel)
    assert made is dst
    assert torch.equal(dst.data.cpu().flatten(), want)
    assert torch.equal(src.data.cpu(), before)


@pytest.mark.parametrize("layout", [layouts.DSV4, layouts.DSV32, layouts.INDEXER_FP8], ids=lambda layout: layout.name)
def test_within_one_pool_slots_that_stand_apart_move_and_one_onto_itself_stays(layout, kernel_device, monkeypatch):
    kernel, device = kernel_device
    cache = pool(layout, 16, 4)
    src_slots, dst_slots = torch.tensor([33, 5, 40, 7, -1]), torch.tensor([2, 50, 3, 7, 8])
    want = copied(cache, src_slots, cache, dst_slots)
    cache = PagedCache(cache.data.to(device), layout, 16)
    monkeypatch.setenv("DSV4X_CHECK", "1")
    dsv4x.copy_entries(cache, src_slots.to(device), cache, dst_slots.to(device), kernel=kernel)
    assert torch.equal(cache.data.cpu().flatten(), want)


def test_a_chain_of_moves_goes_through_another_pool(kernel_device):
    """As accepted tokens of a tree do: 5 to 2 while 2 goes to 1."""
    kernel, device = kernel_device
    cache, other = pool(layouts.DSV4, 16, 2, device), pool(layouts.DSV4, 3, 1, device)
    before, slots = cache.data.cpu().clone(), torch.tensor([2, 5, 9], device=device)
    between = torch.arange(3, device=device)
    dsv4x.copy_entries(cache, slots, other, between, kernel=kernel)
    dsv4x.copy_entries(other, between, cache, between + 1, kernel=kernel)
    old = PagedCache(before, layouts.DSV4, 16)
    assert torch.equal(cache.data.cpu().flatten(), copied(old, slots.cpu(), old, between.cpu() + 1))


def test_more_rows_than_a_program_takes(kernel_device):
    kernel, device = kernel_device
    src, dst = pool(layouts.INDEXER_FP4, 64, 9), pool(layouts.INDEXER_FP4, 16, 40, seed=6)
    random = torch.Generator().manual_seed(3)
    src_slots = torch.randperm(src.capacity, generator=random)[:500]
    dst_slots = torch.randperm(dst.capacity, generator=random)[:500].int()
    want = copied(src, src_slots, dst, dst_slots)
    src, dst = (PagedCache(cache.data.to(device), cache.layout, cache.page_size) for cache in (src, dst))
    dsv4x.copy_entries(src, src_slots.to(device), dst, dst_slots.to(device), kernel=kernel)
    assert torch.equal(dst.data.cpu().flatten(), want)


def test_nothing_is_copied_of_nothing(kernel_device):
    kernel, device = kernel_device
    none, one = (torch.zeros(count, dtype=torch.int64, device=device) for count in (0, 1))
    empty, cache = pool(layouts.DSV4, 16, 0, device), pool(layouts.DSV4, 16, 2, device)
    before = cache.data.clone()
    for arguments in ((cache, none, cache, none), (empty, one, cache, one), (cache, one, empty, one)):
        dsv4x.copy_entries(*arguments, kernel=kernel)
    assert torch.equal(cache.data, before)


@pytest.mark.parametrize("layout", [layouts.DSV4, layouts.DSV41_FP4, layouts.INDEXER_FP8], ids=lambda x: x.name)
def test_pages_lie_past_four_gib(layout, kernel_device):
    """NumPy's zeros are not touched until written, so the pool takes no memory on a CPU."""
    kernel, device = kernel_device
    size, stride = layout.page_stride(61), (1 << 32) + 16 * 61
    raw = np.zeros(stride + size, np.uint8)
    raw = torch.from_numpy(raw) if device == "cpu" else torch.zeros(len(raw), dtype=torch.uint8, device=device)
    far = PagedCache(raw.as_strided((2, size), (stride, 1)), layout, 61)
    near = pool(layout, 61, 2, device)
    slots = torch.tensor([0, 60, 61, 62, 121, 90], device=device)
    dsv4x.copy_entries(near, slots, far, slots, kernel=kernel)
    back = pool(layout, 61, 2, device, seed=8)
    dsv4x.copy_entries(far, slots, back, slots, kernel=kernel)
    want = dsv4x.copy_entries(near, slots, pool(layout, 61, 2, device, seed=8), slots, kernel="reference")
    assert torch.equal(back.data, want.data)
    at = 121 % 61 * layout.data_pitch
    assert torch.equal(raw[stride + at :][: layout.data_bytes], near.page_bytes[1, at:][: layout.data_bytes])


@pytest.mark.large
def test_slots_past_2_to_the_31_are_their_own(kernel_device):
    """Entries of two bytes."""
    kernel, device = kernel_device
    layout, page_size, pages = CacheLayout("one bf16", 0, 1, "aos", "bf16", "none", 64), 1 << 16, (1 << 15) + 2
    shape = (pages, 2 * page_size)
    data = torch.from_numpy(np.zeros(shape, np.uint8)) if device == "cpu" else torch.zeros(shape, dtype=torch.uint8)
    wide, small = PagedCache(data.to(device), layout, page_size), pool(layout, 8, 1, device)
    far = torch.tensor([2**31 + page_size + 5, 7, 2**31 - 1, 2**31, 2**33, -(2**31)], device=device)
    near = torch.arange(6, dtype=torch.int32, device=device)
    dsv4x.copy_entries(small, near, wide, far, kernel=kernel)
    values, kept = wide.data.view(torch.int16), small.page_bytes.view(torch.int16)[0]
    assert torch.equal(values[far[:4] // page_size, far[:4] % page_size], kept[:4])
    back = pool(layout, 8, 1, device, seed=6)
    dsv4x.copy_entries(wide, far, back, near, kernel=kernel)
    assert torch.equal(back.page_bytes.view(torch.int16)[0, :4], kept[:4])
    assert torch.equal(back.data[0, 8:], pool(layout, 8, 1, device, seed=6).data[0, 8:])


def _on_meta(cache):
    return PagedCache(cache.data.to("meta"), cache.layout, cache.page_size)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda c, s: (c, s, pool(layouts.DSV41_FP8, 4, 2), s), ValueError, "dst: layout is DSv4.1 fp8, need DSv4 as"),
        (
            lambda c, s: (c, s, pool(layouts.DSV4.with_flavour("e4m3fnuz"), 4, 2), s),
            ValueError,
            "dst: layout is DSv4 fnuz, need DSv4 as",
        ),
        (lambda c, s: (c.data, s, c, s), TypeError, "src: got Tensor, need a dsv4x.PagedCache"),
        (lambda c, s: (c, s, c.data, s), TypeError, "dst: got Tensor, need a dsv4x.PagedCache"),
        (lambda c, s: (c, s.float(), c, s), TypeError, "src_slots: dtype is float32, need int32 or int64"),
        (lambda c, s: (c, s, c, s.short()), TypeError, "dst_slots: dtype is int16, need int32 or int64"),
        (lambda c, s: (c, s, c, s[:2]), ValueError, r"dst_slots: shape is \(2,\), need \(3\)"),
        (lambda c, s: (c, s[None], c, s), ValueError, r"src_slots: shape is \(1, 3\), need \(any\)"),
        (lambda c, s: (c, s.repeat(2)[::2], c, s), ValueError, r"src_slots: stride\(0\) is 2, need 1"),
        (lambda c, s: (_on_meta(c), s, c, s), ValueError, "src: on meta, need cpu"),
        (lambda c, s: (c, s, _on_meta(c), s), ValueError, "dst: on meta, need cpu"),
        (lambda c, s: (c, s, c, s.to("meta")), ValueError, "dst_slots: on meta, need cpu"),
    ],
)
def test_what_cannot_be_copied_is_named(change, error, says):
    cache = pool(layouts.DSV4, 4, 2)
    before = cache.data.clone()
    with pytest.raises(error, match=says):
        dsv4x.copy_entries(*change(cache, torch.tensor([0, 1, 2])))
    assert torch.equal(cache.data, before)


def test_a_kernel_that_is_none_is_named():
    cache, slots = pool(layouts.DSV4, 4, 2), torch.tensor([0])
    with pytest.raises(ValueError, match="kernel: got 'gluon2', need one of"):
        dsv4x.copy_entries(cache, slots, cache, slots, kernel="gluon2")


@pytest.mark.parametrize(
    ("src_slots", "dst_slots", "says"),
    [
        ([0, 8, 1], [4, 5, 6], "src_slots: slot 8 in row 1, column 0, need -1 or 0 to 7"),
        ([0, -2, 1], [4, 5, 6], "src_slots: slot -2 in row 1"),
        ([0, 1, 2], [4, 5, 12], "dst_slots: slot 12 in row 2, column 0, need -1 or 0 to 11"),
        ([0, 1, -1, 2, 3], [4, 7, 7, 5, 7], "dst_slots: slot 7 in rows 1 and 4, need it once"),
    ],
)
@pytest.mark.parametrize("layout", [layouts.DSV4, layouts.DSV32], ids=lambda layout: layout.name)
def test_slots_are_checked_when_asked(layout, src_slots, dst_slots, says, monkeypatch):
    src, dst = pool(layout, 4, 2), pool(layout, 6, 2)
    monkeypatch.setenv("DSV4X_CHECK", "1")
    before = dst.data.clone()
    with pytest.raises(ValueError, match=says):
        dsv4x.copy_entries(src, torch.tensor(src_slots), dst, torch.tensor(dst_slots, dtype=torch.int32))
    assert torch.equal(dst.data, before)
    # A row that is no entry writes nothing twice.
    dsv4x.copy_entries(src, torch.tensor([0, -1, 1]), dst, torch.tensor([7, 7, -1]))
    assert not torch.equal(dst.data, before)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_slot_that_is_read_and_written_is_reported(layout, monkeypatch):
    cache = pool(layout, 4, 3)
    monkeypatch.setenv("DSV4X_CHECK", "1")
    before = cache.data.clone()
    for reads, writes, slot, row in (([2, 3], [1, 2], 2, 0), ([9, 0, 5, 6], [9, 11, 6, 5], 5, 2)):
        says = f"src_slots: slot {slot} in row {row} is written too, need slots that are read apart from those written"
        with pytest.raises(ValueError, match=says):
            dsv4x.copy_entries(cache, torch.tensor(reads), cache, torch.tensor(writes))
        assert torch.equal(cache.data, before)
    # Slot 7 is written as it is, so whoever reads it has one answer.
    dsv4x.copy_entries(cache, torch.tensor([7, 7]), cache, torch.tensor([8, 7]))


def test_pools_that_share_bytes_are_told_by_their_addresses(monkeypatch):
    """Pages of four entries and of two over the same bytes, and the same pages from another on."""
    monkeypatch.setenv("DSV4X_CHECK", "1")
    layout = layouts.DSV32
    raw = torch.zeros(4 * 4 * layout.entry_bytes, dtype=torch.uint8)
    fours = PagedCache(raw.view(4, -1), layout, 4)
    twos, later = PagedCache(raw.view(8, -1), layout, 2), PagedCache(raw.view(4, -1)[1:], layout, 4)
    one, five, nine = (torch.tensor([slot]) for slot in (1, 5, 9))
    dsv4x.copy_entries(fours, one, twos, five)
    dsv4x.copy_entries(fours, one, later, one)
    dsv4x.copy_entries(fours, five, twos, five)
    for dst, slots in ((twos, torch.tensor([5, 9])), (later, torch.tensor([1, 5]))):
        with pytest.raises(ValueError, match="src_slots: slot 5 in row 1 is written too"):
            dsv4x.copy_entries(fours, torch.cat([nine + 2, five]), dst, slots)
    # Entries that begin within one another: no row may write what it reads itself either.
    shifted = PagedCache(raw[16:][: 3 * 4 * layout.entry_bytes].view(3, -1), layout, 4)
    with pytest.raises(ValueError, match="src_slots: slot 5 in row 0 is written"):
        dsv4x.copy_entries(fours, five, shifted, five)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_captured_copy_follows_its_slots(layout):
    src, dst = pool(layout, 64, 20, "cuda"), pool(layout, 61, 20, "cuda", seed=6)
    src_slots, dst_slots = (torch.zeros(300, dtype=torch.int32, device="cuda") for _ in range(2))
    dsv4x.copy_entries(src, src_slots, dst, dst_slots - 1, kernel="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dsv4x.copy_entries(src, src_slots, dst, dst_slots)
    for step in range(3):
        torch.manual_seed(step)
        src_slots.copy_(torch.randint(-1, src.capacity + 9, (300,)))
        dst_slots.copy_(torch.randperm(dst.capacity + 9)[:300] - 4)
        want = PagedCache(dst.data.clone(), layout, 61)
        dsv4x.copy_entries(src, src_slots, want, dst_slots, kernel="reference")
        graph.replay()
        assert torch.equal(dst.data, want.data)


@pytest.mark.gpu
def test_devices_that_differ_are_named():
    cache, slots = pool(layouts.DSV4, 4, 2), torch.tensor([0])
    with pytest.raises(ValueError, match="dst: on cuda:0, need cpu"):
        dsv4x.copy_entries(cache, slots, pool(layouts.DSV4, 4, 2, "cuda"), slots)
