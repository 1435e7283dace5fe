"""The Gluon kernels on an MI300X or MI355X: what the tests of every decode and prefill kernel do not ask. It has times.

Run with those, where no one has yet: ``python -m pytest -s -m gpu -k "gluon or cdna"``.
"""

import pytest
import torch
import triton
from tolerances import check_decode, check_prefill

import dsv4x
from dsv4x import PagedCache, layouts, platform, reference
from dsv4x.rocm.cdna import shapes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(platform.arch not in shapes.ARCHS, reason=f"arch is {platform.arch}"),
]

FNUZ = layouts.DSV4.with_flavour("e4m3fnuz")


def filled(pages, page_size, layout=layouts.DSV4, stride=None):
    """A cache of which every slot is an entry; ``stride`` bytes from page to page."""
    size = layout.page_stride(page_size)
    stride = stride or size
    data = torch.zeros((pages - 1) * stride + size, dtype=torch.uint8, device="cuda")
    cache = PagedCache(data.as_strided((pages, size), (stride, 1)), layout, page_size)
    k = (torch.randn(cache.capacity, 512, device="cuda") / 10).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(cache.capacity, device="cuda"))
    return cache


def rows(tokens, width, end):
    """int32 ``[tokens, width]`` from -2 to 9 past the end, and lengths on either side of a block's."""
    lens = torch.tensor([width, 0, 1, 31, 32, 33, 63, 64, 65, width - 1], device="cuda", dtype=torch.int32)
    indices = torch.randint(-2, end + 9, (tokens, width), device="cuda", dtype=torch.int32)
    return indices, lens[torch.arange(tokens, device="cuda") % len(lens)]


@pytest.mark.parametrize("split_k", [None, 1, 5])
@pytest.mark.parametrize("heads", [8, 16, 17, 64, 128])
@pytest.mark.parametrize("pair", [(FNUZ, FNUZ), (FNUZ, layouts.DSV4), (layouts.DSV4, FNUZ)], ids=str)
def test_both_flavours_of_fp8(pair, heads, split_k):
    torch.manual_seed(heads)
    caches = [filled(40, 48, pair[0]), filled(60, 64, pair[1])]
    q = torch.randn(23, heads, 512, device="cuda").clamp(-1, 1).bfloat16()
    sink = torch.randn(heads, device="cuda")
    arguments = [q, caches[0], *rows(23, 130, 1920), caches[1], *rows(23, 520, 3840), sink]
    got = dsv4x.sparse_mla_decode(*arguments, kernel="gluon", split_k=split_k)
    check_decode(*got, *reference.sparse_mla_decode(*arguments, dtype=torch.float64))


@pytest.mark.parametrize("heads", [8, 64, 128])
def test_local_entries_are_what_their_slots_are(heads):
    torch.manual_seed(heads)
    swa, extra = filled(40, 64), filled(60, 64)
    q = torch.randn(33, heads, 512, device="cuda").clamp(-1, 1).bfloat16()
    table = torch.randint(-1, 62, (5, 12), device="cuda", dtype=torch.int32)
    request = torch.randint(-1, 6, (33,), device="cuda", dtype=torch.int32)
    visible = torch.randint(0, 800, (33,), device="cuda", dtype=torch.int32)
    indices, lens = rows(33, 520, 780)
    local = dsv4x.Local(request, visible, table, 60)
    known = (request >= 0) & (request < 5)
    held = known[:, None] & (indices >= 0) & (indices < visible[:, None]) & (indices < 12 * 64)
    page = table[request.clamp(0, 4).long()[:, None], (indices.clamp(0, 767) // 64).long()]
    held &= (page >= 0) & (page < 60)
    slots = torch.where(held, page * 64 + indices % 64, -1)
    scopes = [q, swa, *rows(33, 128, 2560), extra]
    want = reference.sparse_mla_decode(*scopes, slots, lens, None, dtype=torch.float64)
    for split_k in (None, 1, 4):
        got = dsv4x.sparse_mla_decode(*scopes, indices, lens, local=local, kernel="gluon", split_k=split_k)
        check_decode(*got, *want)
        assert all(
            map(torch.equal, got, dsv4x.sparse_mla_decode(*scopes, slots, lens, kernel="gluon", split_k=split_k))
        )


@pytest.mark.parametrize("heads", [8, 64])
@pytest.mark.parametrize("stride", [2**26, 2**27])
def test_pages_that_stand_below_and_past_2_gib(stride, heads):
    """30 pages: the last is at 1.9 GiB, or at 3.9."""
    cache = filled(30, 64, stride=stride)
    q = torch.randn(40, heads, 512, device="cuda").clamp(-1, 1).bfloat16()
    arguments = [q, cache, *rows(40, 300, 1920)]
    got = dsv4x.sparse_mla_decode(*arguments, kernel="gluon")
    check_decode(*got, *reference.sparse_mla_decode(*arguments, dtype=torch.float64))


def test_a_workspace_past_2_gib():
    kv = torch.zeros(2**21 + 2**18, 512, dtype=torch.bfloat16, device="cuda")
    kv[-5000:] = (torch.randn(5000, 512, device="cuda") / 10).bfloat16()
    indices = torch.randint(len(kv) - 5000, len(kv), (20, 200), device="cuda", dtype=torch.int32)
    q = (torch.randn(20, 64, 512, device="cuda") * 0.3).bfloat16()
    got = dsv4x.sparse_mla_prefill(q, kv, indices, None, kernel="gluon")
    check_prefill(*got, *reference.sparse_mla_prefill(q, kv, indices, None, dtype=torch.float64))


@pytest.mark.parametrize(("heads", "topk"), [(16, 512), (64, 512), (128, 1024)])
@pytest.mark.parametrize("tokens", [8, 64, 4096])
def test_times_beside_tritons(tokens, heads, topk, capsys):
    """Medians of both kernels' eager calls, L2 flushed, over DSv4 pages and over as many rows; both right."""
    torch.manual_seed(0)
    swa, extra = filled(256, 64), filled(1024, 64)
    q = torch.randn(tokens, heads, 512, device="cuda").clamp(-1, 1).bfloat16()
    index = [
        torch.randint(0, cache.capacity, (tokens, width), device="cuda", dtype=torch.int32)
        for cache, width in ((swa, 128), (extra, topk))
    ]
    kv = (torch.randn(65536, 512, device="cuda") / 10).bfloat16()
    decode = [q, swa, index[0], None, extra, index[1], None]
    prefill = [q, kv, torch.cat(index, 1), None]
    for name, arguments, check in (("decode", decode, check_decode), ("prefill", prefill, check_prefill)):
        op, oracle = getattr(dsv4x, f"sparse_mla_{name}"), getattr(reference, f"sparse_mla_{name}")
        us = {}
        for kernel in ("gluon", "triton"):
            got = op(*arguments, kernel=kernel)
            few = [x[:4] if isinstance(x, torch.Tensor) and len(x) == tokens else x for x in arguments]
            check(got[0][:4], got[1][:4], *oracle(*few, dtype=torch.float64))
            run = lambda kernel=kernel, op=op, arguments=arguments: op(*arguments, kernel=kernel)  # noqa: E731
            us[kernel] = 1e3 * triton.testing.do_bench(run, return_mode="median")
        with capsys.disabled():
            shape = f"{name}, {tokens} tokens, {heads} heads, {128 + topk} entries"
            print(f"\n{platform.arch} {shape}: gluon {us['gluon']:.1f} us, triton {us['triton']:.1f} us", end="")
