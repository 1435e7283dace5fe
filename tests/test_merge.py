"""Merging attention states: against one pass over all entries, empty parts in both conventions, the sink once."""

import math

import pytest
import torch

import dsv4x
from dsv4x import layouts

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
INF, NAN = float("inf"), float("nan")


def one_pass(outs, lses, sink=None):
    """In float64, each head by itself: what the states' weights say, over those that have any."""
    states, tokens, heads, width = outs.shape
    out = torch.zeros(tokens, heads, width, dtype=F64)
    lse = torch.full((tokens, heads), INF, dtype=F64)
    for t in range(tokens):
        for h in range(heads):
            live = [s for s in range(states) if not math.isinf(float(lses[s, t, h]))]
            if not live:
                continue
            scores = lses[live, t, h].cpu().double()
            lse[t, h] = torch.logsumexp(scores, 0)
            weights = torch.softmax(scores, 0)
            out[t, h] = weights @ outs[live, t, h].cpu().double()
            if sink is not None:
                out[t, h] /= 1 + math.exp(min(float(sink[h]) - float(lse[t, h]), 700))
    return out, lse


def states(rng, device, shape, dtype=BF16, spread=3.0, empty=0.3):
    """Random states; of those without entries, half say +inf and half -inf, and their values are NaN."""
    count, tokens, heads, _ = shape
    outs = torch.randn(shape, generator=rng).to(dtype)
    lses = spread * torch.randn(count, tokens, heads, generator=rng)
    none = torch.rand(lses.shape, generator=rng) < empty
    sign = torch.where(torch.rand(lses.shape, generator=rng) < 0.5, INF, -INF)
    lses = torch.where(none, sign, lses)
    outs[none] = NAN
    return outs.to(device), lses.to(device)


def close(found, expected, dtype):
    """float32's rounding, or bf16's last bit; infinities where they are expected, and nothing else."""
    (out, lse), (want, want_lse) = found, expected
    assert out.dtype == dtype
    assert lse.dtype == F32
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=1e-6, atol=2e-6)
    rtol, atol = (2**-8, 1e-6) if dtype == BF16 else (2e-6, 2e-6)
    torch.testing.assert_close(out.cpu().double(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 2, 3, 512), (2, 3, 2, 512), (3, 1, 1, 64), (7, 2, 2, 200), (16, 1, 5, 512), (33, 2, 1, 1),
              (2, 1, 2, 1500)],
)  # fmt: skip
def test_one_pass_over_everything_gives_the_same(shape, sink, dtype, kernel_device, rng):
    kernel, device = kernel_device
    outs, lses = states(rng, device, shape, dtype)
    attn_sink = torch.randn(shape[2], generator=rng).to(device) if sink else None
    found = dsv4x.merge_attention_states(outs, lses, attn_sink, kernel=kernel)
    close(found, one_pass(outs, lses, attn_sink), dtype)


@pytest.mark.parametrize("offset", [-80.0, 0.0, 80.0, 3e4])
def test_large_and_far_apart_lses_neither_overflow_nor_lose_digits(offset, kernel_device, rng):
    kernel, device = kernel_device
    outs, lses = states(rng, device, (5, 2, 2, 64), F32, spread=20.0)
    lses += offset
    out, lse = dsv4x.merge_attention_states(outs, lses, kernel=kernel)
    want, want_lse = one_pass(outs, lses)
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=2e-7, atol=2e-6)
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("lse", [INF, -INF])
@pytest.mark.parametrize("sink", [None, 0.5, INF, -INF])
@pytest.mark.parametrize("junk", [NAN, INF, 7.0])
def test_states_without_entries_have_no_weight(lse, sink, junk, kernel_device):
    """Row 0 has no entries in any state, row 1 in one of them; values where none are may be anything."""
    kernel, device = kernel_device
    outs = torch.full((3, 2, 1, 8), junk, dtype=F32, device=device)
    lses = torch.full((3, 2, 1), lse, device=device)
    outs[1, 1], lses[1, 1] = torch.arange(8.0, device=device), 1.25
    attn_sink = None if sink is None else torch.full((1,), sink, device=device)
    out, merged = dsv4x.merge_attention_states(outs, lses, attn_sink, kernel=kernel)
    assert out[0].tolist() == [[0.0] * 8]
    assert merged.tolist() == [[INF], [1.25]]
    share = 1.0 if sink is None else 1 / (1 + math.exp(min(sink - 1.25, 700)))
    torch.testing.assert_close(out[1, 0].cpu(), torch.arange(8.0) * share, rtol=1e-6, atol=0)


def test_a_nan_is_data_and_shows(kernel_device):
    kernel, device = kernel_device
    outs, lses = torch.ones(2, 1, 3, 4, device=device), torch.zeros(2, 1, 3, device=device)
    lses[0, 0, 0] = NAN
    outs[1, 0, 1, 2] = NAN
    out, lse = dsv4x.merge_attention_states(outs, lses, kernel=kernel)
    assert out.isnan().cpu().tolist() == [[[True] * 4, [False, False, True, False], [False] * 4]]
    assert lse.isnan().cpu().tolist() == [[True, False, False]]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_list_of_states_is_as_good_as_one_tensor(count, kernel_device, rng, monkeypatch):
    kernel, device = kernel_device
    outs, lses = states(rng, device, (count, 3, 2, 64))
    expected = dsv4x.merge_attention_states(outs, lses, kernel=kernel)
    pieces, parts = [piece.clone() for piece in outs], [part.clone() for part in lses]
    for given, given_lses in ((pieces, lses), (tuple(pieces), parts), (pieces, tuple(parts))):
        found = dsv4x.merge_attention_states(given, given_lses, kernel=kernel)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    # Two tensors of different strides are copied together.
    apart = torch.stack([pieces[-1], pieces[-1]], dim=2)[:, :, 0]
    found = dsv4x.merge_attention_states([*pieces[:-1], apart], lses, kernel=kernel)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    if count == 2:
        monkeypatch.setattr(torch, "stack", lambda *tensors: pytest.fail("two states were copied"))
        dsv4x.merge_attention_states(pieces, lses, kernel=kernel)


def test_any_strides_are_taken(kernel_device, rng):
    kernel, device = kernel_device
    outs, lses = states(rng, device, (3, 4, 2, 64))
    sink = torch.randn(2, generator=rng).to(device)
    expected = dsv4x.merge_attention_states(outs, lses, sink, kernel=kernel)
    turned = outs.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    wide = torch.full((3, 4, 2, 80), NAN, dtype=BF16, device=device)
    wide[..., 8:72] = outs
    padded = torch.full((3, 4, 5), NAN, device=device)
    padded[..., :2] = lses
    for given in (turned, wide[..., 8:72]):
        room = torch.full((2, 4, 70), 3.0, dtype=BF16, device=device)
        out = room.transpose(0, 1)[..., 3:67]
        found, lse = dsv4x.merge_attention_states(given, padded[..., :2], sink, out, kernel=kernel)
        assert found is out
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])
        assert (room[..., :3] == 3).all()
        assert (room[..., 67:] == 3).all()


def test_out_may_be_one_of_the_states(kernel_device, rng):
    kernel, device = kernel_device
    outs, lses = states(rng, device, (3, 4, 2, 1200), F32)
    expected = dsv4x.merge_attention_states(outs, lses, kernel=kernel)
    found = dsv4x.merge_attention_states(outs, lses, out=outs[1], kernel=kernel)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("shape", [(2, 0, 3, 8), (2, 3, 0, 8)])
def test_no_rows_are_merged_to_none(shape, kernel_device):
    kernel, device = kernel_device
    outs, lses = torch.zeros(shape, device=device), torch.zeros(shape[:3], device=device)
    out, lse = dsv4x.merge_attention_states(outs, lses, kernel=kernel)
    assert (out.shape, lse.shape) == (shape[1:], shape[1:3])


def test_ranks_that_share_the_entries_give_what_one_rank_gives(kernel_device, make_cache, index_rows, rng):
    """Slots dealt out to three ranks, of which one gets none; the sink is left to the merge."""
    kernel, device = kernel_device
    cache, live = make_cache(6, 16, 60, layouts.DSV4)
    rows = index_rows(live, 4, 24)
    rows[3] = -1
    q = torch.randn(4, 3, 512, generator=rng).bfloat16()
    sink = torch.randn(3, generator=rng)
    expected = dsv4x.reference.sparse_mla_decode(q, cache, rows, None, attn_sink=sink, dtype=F64)
    owner = torch.randint(0, 2, rows.shape, generator=rng)
    on = dsv4x.PagedCache(cache.data.to(device), cache.layout, cache.page_size)
    parts = [
        dsv4x.sparse_mla_decode(q.to(device), on, torch.where(owner == rank, rows, -1).to(device), None, kernel=kernel)
        for rank in range(3)
    ]
    assert parts[2][1].isposinf().all()
    outs, lses = zip(*parts)
    out, lse = dsv4x.merge_attention_states(outs, lses, sink.to(device), kernel=kernel)
    torch.testing.assert_close(lse.cpu().double(), expected[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.cpu().double(), expected[0], rtol=2e-2, atol=2e-3)


GOOD = {"outs": torch.zeros(2, 3, 4, 8), "lses": torch.zeros(2, 3, 4), "attn_sink": torch.zeros(4),
        "out": torch.zeros(3, 4, 8)}  # fmt: skip
PIECE = torch.zeros(3, 4, 8)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"outs": None}, TypeError, "outs: got NoneType, need a tensor or a list of them"),
        ({"outs": torch.zeros(2, 3, 4, 8).half()}, TypeError, "outs: dtype is float16, need bfloat16 or float32"),
        ({"outs": PIECE}, ValueError, r"outs: shape is \(3, 4, 8\), need \(any, any, any, any\)"),
        ({"outs": torch.zeros(0, 3, 4, 8)}, ValueError, "outs: 0 states, need >= 1"),
        ({"outs": torch.zeros(2, 3, 4, 0)}, ValueError, "outs: 0 values a head, need >= 1"),
        ({"outs": torch.zeros(2, 3, 4, 16)[..., ::2]}, ValueError, r"outs: stride\(3\) is 2, need 1"),
        ({"outs": []}, ValueError, "outs: 0 states, need >= 1"),
        ({"outs": [PIECE, 5]}, TypeError, r"outs\[1\]: got int, need a float32 tensor"),
        ({"outs": [PIECE, PIECE.bfloat16()]}, TypeError, r"outs\[1\]: dtype is bfloat16, need float32"),
        ({"outs": [PIECE, PIECE[:2]]}, ValueError, r"outs\[1\]: shape is \(2, 4, 8\), need \(3, 4, 8\)"),
        ({"outs": [PIECE, PIECE.to("meta")]}, ValueError, r"outs\[1\]: on meta, need cpu"),
        ({"lses": None}, TypeError, "lses: got NoneType, need a tensor or a list of them"),
        ({"lses": torch.zeros(2, 3, 4).double()}, TypeError, "lses: dtype is float64, need float32"),
        ({"lses": torch.zeros(3, 3, 4)}, ValueError, r"lses: shape is \(3, 3, 4\), need \(2, 3, 4\)"),
        ({"lses": torch.zeros(2, 3, 8)[..., ::2]}, ValueError, r"lses: stride\(2\) is 2, need 1"),
        ({"lses": [PIECE[..., 0]]}, ValueError, "lses: 1 tensors, need 2 as outs has"),
        ({"lses": [torch.zeros(3, 4), torch.zeros(3, 5)]}, ValueError, r"lses\[1\]: shape is \(3, 5\), need \(3, 4\)"),
        ({"attn_sink": torch.zeros(5)}, ValueError, r"attn_sink: shape is \(5,\), need \(4\)"),
        ({"attn_sink": torch.zeros(4).bfloat16()}, TypeError, "attn_sink: dtype is bfloat16, need float32"),
        ({"out": torch.zeros(3, 4, 8).bfloat16()}, TypeError, "out: dtype is bfloat16, need float32"),
        ({"out": torch.zeros(3, 4, 9)}, ValueError, r"out: shape is \(3, 4, 9\), need \(3, 4, 8\)"),
        ({"out": torch.zeros(3, 1, 8).expand(3, 4, 8)}, ValueError, "out: strides .* over one another"),
        ({"kernel": "cutlass"}, ValueError, "kernel: got 'cutlass'"),
    ],
)
def test_a_wrong_argument_is_named(changes, error, says):
    dsv4x.merge_attention_states(**GOOD)
    with pytest.raises(error, match=says):
        dsv4x.merge_attention_states(**{**GOOD, **changes})


def test_checks_name_the_first_nan(monkeypatch):
    lses = torch.zeros(2, 3, 4)
    lses[1, 2, 0] = NAN
    dsv4x.merge_attention_states(GOOD["outs"], lses)
    monkeypatch.setenv("DSV4X_CHECK", "1")
    with pytest.raises(ValueError, match="lses: NaN in state 1, token 2"):
        dsv4x.merge_attention_states(GOOD["outs"], lses)


@pytest.mark.gpu
def test_a_graph_captures_it(rng):
    outs, lses = states(rng, "cuda", (4, 8, 3, 512))
    sink = torch.randn(3, generator=rng).cuda()
    dsv4x.merge_attention_states(outs, lses, sink, kernel="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = dsv4x.merge_attention_states(outs, lses, sink)
    again, again_lses = states(rng, "cuda", (4, 8, 3, 512))
    outs.copy_(again)
    lses.copy_(again_lses)
    graph.replay()
    close(found, one_pass(outs, lses, sink), BF16)
