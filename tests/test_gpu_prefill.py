"""Prefill kernels on a real GPU: hostile rows, odd strides, repeats, and a row's independence of its batch."""

import pytest
import torch
from tolerances import check_prefill

import dsv4x
from dsv4x import platform, reference
from dsv4x.common.dispatch import registry

pytestmark = pytest.mark.gpu

HOSTILE = [-1, -2, -(2**31), 2**31 - 1]


@pytest.fixture(params=["gluon", "triton"])
def kernel(request):
    """A kernel that runs here, by name."""
    if request.param == "gluon":
        problem = dsv4x.Problem("sparse_mla_prefill", "cuda", platform.arch, heads=64, width=128)
        reasons = registry.refusals(problem, "gluon")
        if reasons:
            pytest.skip("; ".join(reasons))
    return request.param


def case(tokens=61, heads=64, width=272, dtype=torch.int32, rows=5000, live=4000):
    """Arguments on the GPU: rows from ``live`` on are NaN and never referenced, a fifth of the indices is no entry."""
    torch.manual_seed(heads + width)
    kv = (torch.randn(rows, 512, device="cuda") / 10).bfloat16()
    kv[live:] = torch.nan
    q = (torch.randn(tokens, heads, 512, device="cuda") * 0.3).bfloat16()
    indices = torch.randint(0, live, (tokens, width), device="cuda", dtype=dtype)
    wrong = [*HOSTILE, rows] + ([2**31, 2**40, -(2**63)] if dtype == torch.int64 else [])
    wrong = torch.tensor(wrong, dtype=dtype, device="cuda")
    holes = torch.rand(tokens, width, device="cuda") < 0.2
    indices = torch.where(holes, wrong[torch.randint(0, len(wrong), (tokens, width), device="cuda")], indices)
    lens = torch.randint(0, width + 1, (tokens,), device="cuda", dtype=dtype)
    special = [width, 0, width + 100, -5, 1, 63, 64, 65, 127, 128, 129]
    lens[: len(special)] = torch.tensor(special, dtype=dtype, device="cuda")
    indices[20] = -1
    indices[21, : width // 2] = -2
    # Past a span anything may stand, rows of NaN too.
    past = torch.arange(width, device="cuda") >= lens[:, None]
    indices = torch.where(past, live, indices)
    sink = torch.randn(heads, device="cuda")
    sink[0], sink[-1] = torch.inf, -torch.inf
    return [q, kv, indices, lens, sink]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("heads", [1, 8, 20, 64, 65, 128])
@pytest.mark.parametrize("width", [1, 100, 272, 1152])
def test_hostile_rows(width, heads, dtype, kernel):
    arguments = case(heads=heads, width=width, dtype=dtype)
    expected = reference.sparse_mla_prefill(*arguments, dtype=torch.float64)
    out = torch.full((61, heads, 512), torch.nan, dtype=torch.bfloat16, device="cuda")
    check_prefill(*dsv4x.sparse_mla_prefill(*arguments, out=out, kernel=kernel), *expected)
    assert not out[1].any()
    bare = [*arguments[:2], arguments[2].clamp(0, 3999), None, None]
    check_prefill(*dsv4x.sparse_mla_prefill(*bare, kernel=kernel), *reference.sparse_mla_prefill(*bare))


def test_relative_error_over_many_entries(kernel):
    q, kv, indices, _, sink = case(tokens=300, heads=64, width=2048)
    indices = indices.clamp(0, 3999)
    got, _ = dsv4x.sparse_mla_prefill(q, kv, indices, None, sink, kernel=kernel)
    want, _ = reference.sparse_mla_prefill(q, kv, indices, None, sink, dtype=torch.float64)
    assert float((got.double() - want).norm() / want.norm()) < 4e-3


def test_no_rows_and_no_columns(kernel):
    q, kv, indices, lens, sink = case()
    for rows, columns in ((0, 272), (5000, 0), (0, 0)):
        got = dsv4x.sparse_mla_prefill(q, kv[:rows], indices[:, :columns], lens, sink, kernel=kernel)
        assert not got[0].any()
        assert (got[1] == torch.inf).all()


def test_strides_and_alignment_of_any_kind(kernel):
    q, kv, indices, lens, sink = case(heads=64)
    expected = reference.sparse_mla_prefill(q, kv, indices, lens, sink, dtype=torch.float64)

    def odd(tensor, pad, shift):
        """The same values at rows of ``pad`` more elements, ``shift`` elements off every alignment."""
        room = torch.full((*tensor.shape[:-1], tensor.shape[-1] + pad), 7, dtype=tensor.dtype, device="cuda")
        view = room[..., shift : shift + tensor.shape[-1]]
        return view.copy_(tensor)

    transposed = torch.empty(64, 61, 512, dtype=torch.bfloat16, device="cuda").transpose(0, 1)
    for pad, shift in ((16, 0), (16, 8), (3, 1)):
        out = odd(torch.zeros(61, 64, 512, dtype=torch.bfloat16, device="cuda"), pad, shift)
        arguments = (odd(q, pad, shift), odd(kv, pad, shift), odd(indices, pad, shift), lens, sink)
        check_prefill(*dsv4x.sparse_mla_prefill(*arguments, out=out, kernel=kernel), *expected)
    got = dsv4x.sparse_mla_prefill(transposed.copy_(q), kv, indices, lens, sink, out=transposed, kernel=kernel)
    check_prefill(*got, *expected)


def test_fifty_repeats_are_bitwise_equal(kernel):
    for heads in (64, 128):
        arguments = case(tokens=1500, heads=heads, width=640)
        first = dsv4x.sparse_mla_prefill(*arguments, kernel=kernel)
        for _ in range(50):
            assert all(map(torch.equal, first, dsv4x.sparse_mla_prefill(*arguments, kernel=kernel)))


def test_a_row_does_not_depend_on_its_batch(kernel):
    q, kv, indices, lens, sink = case(tokens=700)
    out, lse = dsv4x.sparse_mla_prefill(q, kv, indices, lens, sink, kernel=kernel)
    for part in (slice(0, 1), slice(20, 22), slice(333, 700)):
        some = dsv4x.sparse_mla_prefill(q[part], kv, indices[part], lens[part], sink, kernel=kernel)
        assert torch.equal(some[0], out[part])
        assert torch.equal(some[1], lse[part])


def test_captured_in_a_graph_it_reads_what_it_then_finds(kernel):
    q, kv, indices, lens, sink = case()
    dsv4x.sparse_mla_prefill(q, kv, indices, lens, sink, kernel=kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = dsv4x.sparse_mla_prefill(q, kv, indices, lens, sink, kernel=kernel)
    for seed in range(3):
        torch.manual_seed(seed)
        q.copy_(torch.randn_like(q) * 0.3)
        lens.copy_(lens.roll(1))
        past = torch.arange(indices.shape[1], device="cuda") >= lens[:, None]
        indices.copy_(torch.where(past, indices, indices.clamp(-1, 3999)))
        graph.replay()
        check_prefill(*got, *reference.sparse_mla_prefill(q, kv, indices, lens, sink, dtype=torch.float64))
