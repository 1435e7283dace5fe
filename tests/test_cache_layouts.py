"""Every named layout through the cache ops: where each byte stands, what it says, and that nothing else changes."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import dsv4x
from dsv4x import PagedCache, layouts
from dsv4x.common import drawing
from dsv4x.common.core import encodings
from dsv4x.common.dispatch import registry
from dsv4x.common.step.attention import PATHS

LAYOUTS = [member.value for member in layouts.MLAKVCacheLayout]
LAYOUTS += [layout.with_flavour("e4m3fnuz") for layout in LAYOUTS if layout.value_encoding == "e4m3fn"]
IDS = [layout.name for layout in LAYOUTS]

# name -> (head dim, entry bytes, and of entry i in a page of P: data offset, scale offset, RoPE offset), as published.
PUBLISHED = {
    "DSv4": (512, 584, lambda i, P: i * 576, lambda i, P: P * 576 + i * 8, lambda i, P: i * 576 + 448),
    "DSv3.2": (576, 656, lambda i, P: i * 656, lambda i, P: i * 656 + 512, lambda i, P: i * 656 + 528),
    "trtllm-native": (576, 576, lambda i, P: i * 576, None, None),
    "uniform fp8": (512, 512, lambda i, P: i * 512, None, None),
    "bf16 512": (512, 1024, None, None, lambda i, P: i * 1024),
    "bf16 576": (576, 1152, None, None, lambda i, P: i * 1152),
    "DSv4.1 fp8": (512, 528, lambda i, P: i * 528, lambda i, P: i * 528 + 512, None),
    "DSv4.1 fp8 soa": (512, 528, lambda i, P: i * 512, lambda i, P: P * 512 + i * 16, None),
    "DSv4.1 fp4": (512, 288, lambda i, P: i * 288, lambda i, P: i * 288 + 256, None),
    "indexer fp8": (128, 132, lambda i, P: i * 128, lambda i, P: P * 128 + i * 4, None),
    "indexer mxfp8": (128, 132, lambda i, P: i * 128, lambda i, P: P * 128 + i * 4, None),
    "indexer fp4": (128, 68, lambda i, P: i * 64, lambda i, P: P * 64 + i * 4, None),
}
SCALE_OF = {
    "ue8m0": (1, lambda raw: np.ldexp(1.0, raw.astype(np.int64) - 127)),
    "float32": (4, lambda raw: raw.view(np.float32).astype(np.float64)),
    "e4m3fn": (1, lambda raw: encodings.decode_e4m3fn(torch.from_numpy(raw)).double().numpy()),
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def entry_of(layout, page, i, page_size, k_scale=1.0):
    """float64 values of entry i, read off the page's bytes by the published offsets."""
    head_dim, _, data, scale, rope = PUBLISHED[layout.name.removesuffix(" fnuz")]
    rope_dim = {True: head_dim, False: 64}[data is None] if rope else 0
    count, values = head_dim - rope_dim, np.zeros(head_dim)
    if rope:
        raw = page[rope(i, page_size) :][: 2 * rope_dim].copy().view(np.uint16).astype(np.uint32) << 16
        values[count:] = raw.view(np.float32)
    if data:
        codes = page[data(i, page_size) :]
        if layout.value_encoding == "e2m1":
            packed = codes[: count // 2]
            values[:count] = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], axis=1).reshape(-1)
        else:
            decode = getattr(encodings, f"decode_{layout.value_encoding}")
            values[:count] = decode(torch.from_numpy(codes[:count].copy())).numpy()
        if scale:
            size, read = SCALE_OF[layout.scale_encoding]
            tiles = count // layout.scale_tile
            scales = read(page[scale(i, page_size) :][: size * tiles].copy())
            values[:count] *= scales.repeat(layout.scale_tile)
        else:
            values[:count] *= np.float32(k_scale)
    return values


def pool(layout, page_size, pages=3, device="cpu"):
    """Garbage pages, two strides apart."""
    stride = -(-2 * layout.page_stride(page_size) // 16) * 16
    data = torch.randint(0, 256, (pages, stride), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    return PagedCache(data.to(device), layout, page_size)


def rows(layout, count, extreme=False):
    k = torch.randn(count, layout.head_dim, generator=torch.Generator().manual_seed(3))
    k *= torch.logspace(-3, 2, count)[:, None]
    if extreme:
        k[0] = 0
        k[1, ::3] = float("nan")
        k[1, 1] = -float("nan")
        k[2, 5], k[2, 40] = float("inf"), -float("inf")
        k[3] *= 1e-7
        k[4, ::2] = -0.0
        k[5] *= 1e30
    return k.bfloat16()


def test_every_named_layout_has_its_published_numbers():
    assert {name for name in IDS if not name.endswith("fnuz")} == set(PUBLISHED)
    for layout in LAYOUTS:
        head_dim, entry_bytes = PUBLISHED[layout.name.removesuffix(" fnuz")][:2]
        assert (layout.head_dim, layout.entry_bytes) == (head_dim, entry_bytes)
        assert layouts.by_name(layout.name) == layout
    assert layouts.DSV41_FP8_SOA.page_stride(2) == 1536
    assert layouts.by_name("DSV4") is layouts.DSV4


def test_unknown_layouts_and_flavours_are_named():
    with pytest.raises(ValueError, match=r"layout: got 'DSv5', need one of DSv4, DSv3\.2"):
        layouts.by_name("DSv5")
    with pytest.raises(ValueError, match="flavour: got 'e5m2'"):
        layouts.DSV4.with_flavour("e5m2")
    with pytest.raises(ValueError, match=r"flavour: DSv4\.1 fp4 holds e2m1, need a layout of FP8 values"):
        layouts.DSV41_FP4.with_flavour("e4m3fnuz")
    assert layouts.DSV4.with_flavour("e4m3fnuz").with_flavour("e4m3fn") == layouts.DSV4


@pytest.mark.parametrize("page_size", [1, 2, 61])
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_values_stand_where_published_within_half_an_ulp(layout, page_size, kernel_device):
    kernel, device = kernel_device
    cache = pool(layout, page_size, pages=-(-12 // page_size) + 1, device=device)
    slots = torch.randperm(cache.capacity, generator=torch.Generator().manual_seed(1))[:9]
    k, k_scale = rows(layout, 9), 0.37 if layout.scale_encoding == "none" and layout.nope_dim else 1.0
    k = k.clamp(-60, 60)
    dsv4x.quantize_and_insert_k_cache(k.to(device), cache, slots.to(device), k_scale=k_scale, kernel=kernel)
    read = dsv4x.dequantize_k_cache_paged(cache, slots.to(device), k_scale=k_scale, kernel=kernel).cpu()
    data = cache.page_bytes.cpu().numpy()
    for t, slot in enumerate(slots.tolist()):
        entry = entry_of(layout, data[slot // page_size], slot % page_size, page_size, k_scale)
        assert torch.equal(read[t], torch.from_numpy(entry).float().bfloat16())
        exact = k[t].double().numpy()
        nope = layout.nope_dim
        assert np.array_equal(entry[nope:], exact[nope:])
        if nope:
            tiles = np.abs(exact[:nope]).reshape(-1, layout.scale_tile).max(1).repeat(layout.scale_tile)
            # Half an ulp of the value, or of the smallest normal at a scale of up to twice amax / max.
            bits = {"e2m1": 2, "e4m3fn": 4, "e4m3fnuz": 4}[layout.value_encoding]
            floor = np.maximum(tiles, 1e-4) * 2 / layout.value_max * {2: 0.25, 4: 2.0**-10}[bits]
            if layout.scale_encoding == "none":
                floor = k_scale * 2.0**-10
            if layout.scale_encoding == "e4m3fn":  # the scale itself is rounded, and the largest may saturate
                floor = np.maximum(tiles / 6, 2.0**-9) * 0.5
            assert (np.abs(entry[:nope] - exact[:nope]) <= np.maximum(np.abs(exact[:nope]) * 2.0**-bits, floor)).all()


@pytest.mark.parametrize("page_size", [1, 2, 61, 64, 256])
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_kernels_write_and_read_the_references_bytes(layout, page_size, kernel_device):
    """Zeros, NaN of either sign, infinities, tiny and huge rows included; neighbours and page padding untouched."""
    kernel, device = kernel_device
    k, k_scale = rows(layout, 8, extreme=True), 2.5 if layout.scale_encoding == "none" and layout.nope_dim else 1.0
    want, got = pool(layout, page_size, pages=6), pool(layout, page_size, pages=6, device=device)
    before = want.data.clone()
    slots = torch.tensor([5, 0, -1, 3, 11, 2, want.capacity, 7])
    dsv4x.quantize_and_insert_k_cache(k, want, slots, k_scale=k_scale, kernel="reference")
    dsv4x.quantize_and_insert_k_cache(k.to(device), got, slots.to(device), k_scale=k_scale, kernel=kernel)
    assert torch.equal(got.data.cpu(), want.data)
    touched = want.data != before
    per_page = np.bincount([s // page_size for s in slots.tolist() if 0 <= s < want.capacity], minlength=6)
    assert (touched.sum(1).numpy() <= per_page * layout.entry_bytes).all()
    read = dsv4x.dequantize_k_cache_paged(got, slots.to(device), k_scale=k_scale, kernel=kernel).cpu()
    expected = dsv4x.dequantize_k_cache_paged(want, slots, k_scale=k_scale, kernel="reference")
    assert torch.equal(read.isnan(), expected.isnan())
    assert torch.equal(read.nan_to_num(7.0), expected.nan_to_num(7.0))
    stored = (slots >= 0) & (slots < want.capacity)
    lost = k.isnan() & stored[:, None]
    assert read[lost].isnan().all()


@pytest.mark.interpreter
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("flavour", layouts.FLAVOURS)
def test_the_kernel_of_an_amd_gpu_writes_the_references_bytes(flavour, arch, monkeypatch):
    """Where the arch decodes the flavour itself its own encoding is another matter: e4m3fn's, and a mode bit's."""
    from dsv4x.common.kernels import cache as kernels

    made = kernels.cache_constexprs
    monkeypatch.setattr(kernels, "cache_constexprs", lambda layout, _: made(layout, arch))
    kernels._writing.cache_clear()
    layout = layouts.DSV4.with_flavour(flavour)
    caches = pool(layout, 2, 6), pool(layout, 2, 6)
    try:
        for cache, kernel in zip(caches, ("triton", "reference")):
            dsv4x.quantize_and_insert_k_cache(rows(layout, 8, extreme=True), cache, torch.arange(8), kernel=kernel)
    finally:
        kernels._writing.cache_clear()
    assert torch.equal(caches[0].data, caches[1].data)


def test_both_flavours_live_side_by_side(kernel_device):
    """A gfx942 server's window cache is fnuz while its compressed cache is OCP: one process, one value."""
    kernel, device = kernel_device
    k = rows(layouts.DSV4, 6).to(device)
    slots = torch.arange(6, device=device)
    ocp, fnuz = (pool(layout, 2, device=device) for layout in (layouts.DSV4, layouts.DSV4.with_flavour("e4m3fnuz")))
    for cache in (ocp, fnuz):
        dsv4x.quantize_and_insert_k_cache(k, cache, slots, kernel=kernel)
    read = [dsv4x.dequantize_k_cache_paged(cache, slots, kernel=kernel).float() for cache in (ocp, fnuz)]
    torch.testing.assert_close(read[0], k.float(), rtol=2**-4, atol=1e-3)
    torch.testing.assert_close(read[1], k.float(), rtol=2**-4, atol=1e-3)
    assert not torch.equal(ocp.data, fnuz.data)


def test_attention_refuses_entries_of_another_width():
    q = torch.zeros(1, 1, 512, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"swa_cache: entries of 128 values \(indexer fp8\), need 512"):
        dsv4x.sparse_mla_decode(q, pool(layouts.INDEXER_FP8, 2), torch.zeros(1, 1, dtype=torch.int32), None)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_the_last_page_lies_past_four_gib(layout, kernel):
    k = rows(layout, 9, extreme=True).cuda()
    stride = (1 << 32) + 16 * 61
    raw = torch.zeros(stride + layout.page_stride(61), dtype=torch.uint8, device="cuda")
    far = PagedCache(raw.as_strided((2, layout.page_stride(61)), (stride, 1)), layout, 61)
    near = PagedCache.zeros(2, layout, 61, "cuda")
    slots = torch.tensor([0, 60, 61, 62, 63, 90, 119, 120, 121], device="cuda")
    dsv4x.quantize_and_insert_k_cache(k, far, slots, kernel=kernel)
    dsv4x.quantize_and_insert_k_cache(k, near, slots, kernel="reference")
    assert torch.equal(far.page_bytes, near.page_bytes)
    # A piece at a time: torch counts bytes as 64-bit numbers, eight times the memory.
    written = sum(int(piece.count_nonzero()) for piece in raw.split(1 << 28))
    assert written == int(near.data.count_nonzero()), "wrote outside its pages"
    got, want = (
        dsv4x.dequantize_k_cache_paged(cache, slots, kernel=by) for cache, by in ((far, kernel), (near, "reference"))
    )
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("k_scale", [0, -1.0, float("inf"), float("nan")])
def test_k_scale_must_be_a_scale(k_scale):
    cache = pool(layouts.TRTLLM_NATIVE, 2)
    with pytest.raises(ValueError, match=r"k_scale: got .*, need a finite number > 0"):
        dsv4x.dequantize_k_cache_paged(cache, torch.zeros(1, dtype=torch.int32), k_scale=k_scale)


def test_kernels_are_given_scales_as_floats(monkeypatch):
    """An int equals its float, so a launch remembered for one would serve the other, for which it was not compiled."""
    seen = []

    def numbers(value):
        if isinstance(value, (tuple, list)):
            return [x for item in value for x in numbers(item)]
        return [value] if isinstance(value, (int, float)) and value == 3 else []

    def spy(op, run):
        def call(*args, **kwargs):
            seen.append((op, numbers([args, list(kwargs.values())])))
            return run(*args, **kwargs)

        return call

    for op in registry.ops():
        record = registry.find(op, "reference")
        monkeypatch.setitem(vars(record), "run", spy(op, record.run))
    swa, extra, native = (pool(layout, 16) for layout in (*[layouts.UNIFORM_FP8] * 2, layouts.TRTLLM_NATIVE))
    slots = torch.zeros(2, 1, dtype=torch.int32)
    dsv4x.quantize_and_insert_k_cache(rows(layouts.UNIFORM_FP8, 2), swa, slots[:, 0].long(), k_scale=3)
    dsv4x.dequantize_k_cache_paged(swa, slots[:, 0], k_scale=3)
    dsv4x.requantize_fp8_to_block_scale(native, k_scale=3)
    dsv4x.gather_referenced_rows(swa, slots, k_scale=3)
    q = torch.zeros(2, 2, 512, dtype=torch.bfloat16)
    dsv4x.sparse_mla_decode(q, swa, slots, None, extra, slots, swa_k_scale=3, extra_k_scale=3)
    meta = dsv4x.AttentionMetadata.build(
        torch.tensor([0, 2], dtype=torch.int32), torch.tensor([9], dtype=torch.int32), slots[:1], slots[:1],
        compress_ratio=4, swa_page_size=16, swa_pages=2, extra_page_size=16, extra_pages=2,
    )  # fmt: skip
    for path in PATHS:
        dsv4x.sparse_mla_attention(q, swa, extra, meta, slots, path=path, swa_k_scale=3, extra_k_scale=3)
    scaled = [(op, found) for op, found in seen if found]
    assert {op for op, _ in scaled} >= {
        "quantize_and_insert_k_cache", "dequantize_k_cache_paged", "requantize_fp8_to_block_scale",
        "sparse_mla_decode", "gather_and_combine", "gather_workspace",
    }  # fmt: skip
    assert all(type(number) is float for _, found in scaled for number in found), scaled


@pytest.mark.parametrize("layout", [layouts.DSV4, layouts.BF16_512], ids=["DSv4", "bf16"])
def test_k_scale_is_refused_where_it_would_be_ignored(layout):
    with pytest.raises(ValueError, match=rf"k_scale: got 2.0, need 1: {layout.name} has no scale of the whole tensor"):
        dsv4x.quantize_and_insert_k_cache(rows(layout, 1), pool(layout, 2), torch.zeros(1).long(), k_scale=2.0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_the_byte_map_covers_each_entry_once(layout):
    page_size = 5
    count = np.zeros(layout.page_stride(page_size), dtype=int)
    for region in drawing.byte_map(layout, page_size):
        for i in range(page_size):
            count[region.offset + i * region.pitch :][: region.size] += 1
    used = page_size * layout.entry_bytes
    assert (count[:used] == 1).all()
    assert (count[used:] == 0).all()


def test_the_documents_drawings_are_the_records(pytestconfig):
    docs = pytestconfig.rootpath / "docs"
    assert (docs / "layouts.md").read_text() == drawing.document()
    for member in layouts.MLAKVCacheLayout:
        drawn = (docs / "layouts" / f"{member.name.lower()}.svg").read_text()
        assert drawn == drawing.svg(member.value, 64), member.name


@st.composite
def stored_rows(draw):
    """A layout, a page size, distinct slots with skipped ones among them, and rows of values from tiny to NaN."""
    layout = draw(st.sampled_from(LAYOUTS))
    page_size = draw(st.sampled_from([1, 2, 61, 64, 256]))
    capacity = 3 * page_size if page_size > 2 else 8 * page_size
    slots = draw(st.lists(st.integers(-1, capacity - 1), max_size=5, unique=True))
    special = [0.0, -0.0, 1e-5, 1e-4, 0.0448, 1.75, 448.0, 3e38, float("inf"), -float("inf"), float("nan")]
    kinds = draw(st.lists(st.sampled_from(special), min_size=len(slots), max_size=len(slots)))
    seed = draw(st.integers(0, 2**16))
    return layout, page_size, capacity // page_size, slots, kinds, seed


def nearest_and_half_ulp(layout, values):
    """``values [N, D]`` clipped to where they saturate, and half an ulp of the encoding at each one's scale."""
    nope = layout.nope_dim
    nearest, error = values.copy(), np.zeros_like(values)
    if nope:
        tiles = np.abs(values[:, :nope]).reshape(-1, nope // layout.scale_tile, layout.scale_tile).max(2)
        scales = np.vectorize(lambda amax: tile_scale(layout, amax), otypes=[float])(tiles)
        scales = scales.repeat(layout.scale_tile, axis=1)
        largest = layout.value_max * scales
        nearest[:, :nope] = np.clip(values[:, :nope], -largest, largest)
        bits, least = {"e2m1": (1, 0), "e4m3fn": (3, -6), "e4m3fnuz": (3, -7)}[layout.value_encoding]
        _, exponent = np.frexp(nearest[:, :nope] / scales)
        error[:, :nope] = np.ldexp(scales, np.maximum(exponent - 1, least) - bits - 1)
    return nearest, error


def tile_scale(layout, amax):
    """The scale by its definition, from float64 comparisons alone."""
    if layout.scale_encoding == "none":
        return 1.0
    if layout.scale_encoding == "e4m3fn":
        scales = encodings.decode_e4m3fn(torch.arange(127, dtype=torch.uint8)).double().tolist()
        wanted = max(amax / 6, 2.0**-9)
        return scales[min(range(1, 127), key=lambda code: (abs(scales[code] - wanted), code & 1))]
    exponent = -127
    while layout.value_max * 2.0**exponent < max(amax, layout.amax_floor):
        exponent += 1
    return 2.0**exponent


@given(stored_rows())
@example((layouts.INDEXER_FP8, 2, 2, [-1], [0.0], 0))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_stored_is_what_is_read_and_nothing_else(kernel_device, case):
    kernel, device = kernel_device
    layout, page_size, pages, slots, kinds, seed = case
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(len(slots), layout.head_dim, generator=generator) / 10
    for row, kind in enumerate(kinds):
        k[row, torch.randperm(layout.head_dim, generator=generator)[:7]] = kind
    k = k.bfloat16()
    cache = pool(layout, page_size, pages, device)
    before = cache.data.clone()
    where = torch.tensor(slots, dtype=torch.int64, device=device)
    dsv4x.quantize_and_insert_k_cache(k.to(device), cache, where, kernel=kernel)
    read = dsv4x.dequantize_k_cache_paged(cache, where, kernel=kernel).cpu()
    stored = torch.tensor([s >= 0 for s in slots], dtype=torch.bool)
    assert not read[~stored].any()
    assert read[stored][k[stored].isnan()].isnan().all()
    plain = stored & torch.tensor([abs(kind) < 1e30 for kind in kinds], dtype=torch.bool)
    values = k[plain].double().numpy()
    nearest, error = nearest_and_half_ulp(layout, values)
    assert (np.abs(read[plain].double().numpy() - nearest) <= error).all()
    entries = {s for s in slots if s >= 0}
    touched = (cache.data != before).cpu()
    for page in range(pages):
        mine = torch.zeros(touched.shape[1], dtype=torch.bool)
        for region in drawing.byte_map(layout, page_size):
            for slot in entries:
                if slot // page_size == page:
                    mine[region.offset + slot % page_size * region.pitch :][: region.size] = True
        assert not (touched[page] & ~mine).any()
