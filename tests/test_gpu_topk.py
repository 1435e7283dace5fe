"""Selection on a real GPU at its own sizes: repeated, captured and replayed at other lengths, on two streams."""

import pytest
import torch

import dsv4x

pytestmark = pytest.mark.gpu


def expected(logits, lens, k):
    return dsv4x.topk_transform(logits, lens, k, kernel="reference")


@pytest.fixture(params=["triton", "cuda"])
def select(request):
    def run(logits, lens, k, **given):
        return dsv4x.topk_transform(logits, lens, k, kernel=request.param, **given)

    return run


def rows_of(kind, rows, width):
    x = torch.randn(rows, width, device="cuda")
    return {
        "normal": x,
        "rounded": (2 * x).round() / 2,
        "equal": torch.zeros_like(x),
        "nan": torch.where(x > 0, x, torch.nan),
        "tiny": x * 1e-42,
        "spread": torch.exp(20 * x),
        "ascending": x.sort(1).values,
        "infinite": torch.where(x > 1, torch.inf, x),
        "few finite": torch.where(x > 2.5, x, -torch.inf),
    }[kind]


@pytest.mark.parametrize("k", [1, 512, 1024, 2048])
@pytest.mark.parametrize(
    "kind", ["normal", "rounded", "equal", "nan", "tiny", "spread", "ascending", "infinite", "few finite"]
)
def test_every_way_through_the_kernel(kind, k, select):
    torch.manual_seed(0)
    for rows, width in ((3, 3000), (2, 4096), (2, 4097), (2, 8193), (1, 32769), (140, 20_000), (300, 9000)):
        logits = rows_of(kind, rows, width)
        for lens in (None, torch.randint(-2, width + 3, (rows,), device="cuda")):
            assert torch.equal(select(logits, lens, k), expected(logits, lens, k)), (rows, width)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193, 65_537])
def test_lengths_at_every_edge_in_buffers_of_any_width(length, select):
    torch.manual_seed(1)
    for width in (max(length, 4), 65_540, 65_541):
        if width >= length:
            logits = torch.full((2, width), torch.nan, device="cuda")
            logits[:, :length] = torch.randn(2, length, device="cuda")
            lens = torch.full((2,), length, device="cuda")
            assert torch.equal(select(logits, lens, 512), expected(logits, lens, 512))


def test_the_same_bits_fifty_times_and_at_any_place_in_a_batch(select):
    torch.manual_seed(2)
    logits = torch.randn(16, 131_072, device="cuda").mul(4).round()
    want = expected(logits, None, 1024)
    for turn in range(50):
        rows = slice(turn % 16, turn % 16 + 1 + turn % 3)
        assert torch.equal(select(logits[rows], None, 1024), want[rows])
        assert torch.equal(select(logits, None, 1024), want)


def test_a_graph_follows_its_lengths(select):
    torch.manual_seed(3)
    logits = torch.randn(8, 65_536, device="cuda")
    lens = torch.full((8,), 65_536, dtype=torch.int32, device="cuda")
    out, local = (torch.empty(8, 512, dtype=torch.int32, device="cuda") for _ in range(2))
    table = torch.randint(-1, 999, (8, 1024), device="cuda").int()
    paged = {"method": dsv4x.TopkMethod.PAGED, "block_table": table, "page_size": 64, "pages": 999}
    select(logits, lens, 512, **paged)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            select(logits, lens, 512, **paged, out=out, out_local=local)
    for most in (65_536, 600, 9000, 300, 65_536):
        lens.copy_(torch.randint(0, most + 1, (8,), device="cuda"))
        logits.normal_()
        graph.replay()
        assert torch.equal(local, expected(logits, lens, 512))
        assert torch.equal(out, dsv4x.topk_transform(logits, lens, 512, **paged, kernel="reference"))


def test_two_streams_and_two_graphs_side_by_side(select):
    torch.manual_seed(4)
    logits = [torch.randn(4, 131_072, device="cuda") for _ in range(2)]
    want = [expected(x, None, 512) for x in logits]
    streams = [torch.cuda.Stream() for _ in range(2)]
    graphs, outs = [], [torch.empty(4, 512, dtype=torch.int32, device="cuda") for _ in range(2)]
    for x, out in zip(logits, outs):
        select(x, None, 512)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            select(x, None, 512, out=out)
    torch.cuda.synchronize()
    for _ in range(200):
        for out in outs:
            out.fill_(-7)
        torch.cuda.synchronize()
        eager = [None, None]
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                graphs[i].replay()
                eager[i] = select(logits[i], None, 512)
        torch.cuda.synchronize()
        for got in (outs, eager):
            assert all(torch.equal(x, y) for x, y in zip(got, want))
