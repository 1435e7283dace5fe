"""Attention over a server's own slot rows, against the oracle."""

import pytest
import torch

import dsv4x
from dsv4x import layouts
from dsv4x.common.dispatch import registry
from dsv4x.servers.slot_rows import Rows, SlotRows

TOKENS, HEADS = 5, 4


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.interpreter)])
def kernel(request):
    return request.param


@pytest.fixture
def case(make_cache, index_rows, rng):
    swa, swa_live = make_cache(3, 16, 30)
    extra, extra_live = make_cache(4, 8, 20)

    def rows(live, width):
        return Rows(index_rows(live, TOKENS, width), torch.tensor([0, 1, width, 3, width // 2], dtype=torch.int32))

    q = torch.full((TOKENS, 2 * HEADS, 512), float("nan")).bfloat16()
    q[:, :HEADS] = torch.randn(TOKENS, HEADS, 512, generator=rng).bfloat16()
    sink = torch.randn(2 * HEADS, generator=rng)
    return q, (swa, extra), (rows(swa_live, 64), rows(extra_live, 128)), sink


def shared(rows, compressed=True, **options):
    given = {"entries": 64, "trusted": True, "captured": False, **options}
    return SlotRows(rows[0], rows[1] if compressed else None, **given)


def wanted(q, caches, rows, sink, compressed=True):
    scopes = caches[0], *rows[0], *((caches[1], *rows[1]) if compressed else ())
    return dsv4x.reference.sparse_mla_decode(q[:, :HEADS], *scopes, attn_sink=sink[:HEADS])[0]


@pytest.mark.parametrize("compressed", [True, False])
def test_padded_heads_are_not_read_and_the_first_are_attention(compressed, case, kernel):
    q, caches, rows, sink = case
    made = shared(rows, compressed, kernel=kernel)
    for _ in range(2):
        out = made.attend(q, caches, sink, 512**-0.5, HEADS)
        assert out.shape == q.shape
        torch.testing.assert_close(out[:, :HEADS].float(), wanted(q, caches, rows, sink, compressed), atol=2e-2, rtol=0)


def test_it_writes_where_it_is_told(case):
    q, caches, rows, sink = case
    out = torch.full((TOKENS + 2, *q.shape[1:]), 7.0).bfloat16()
    made = shared(rows).attend(q, caches, sink, 512**-0.5, HEADS, out[:TOKENS])
    assert made.data_ptr() == out.data_ptr()
    assert out[TOKENS:].eq(7).all()
    assert out[:TOKENS, HEADS:].eq(7).all()
    torch.testing.assert_close(out[:TOKENS, :HEADS].float(), wanted(q, caches, rows, sink), atol=2e-2, rtol=0)


def test_rows_of_q_that_the_server_has_none_for_are_zeros(case, kernel):
    q, caches, rows, sink = case
    held = [Rows.first(3, *each, clamped=False) for each in rows]
    out = shared(held, kernel=kernel).attend(q, caches, sink, 512**-0.5, HEADS)
    assert out.shape == q.shape
    torch.testing.assert_close(out[:3, :HEADS].float(), wanted(q[:3], caches, held, sink), atol=2e-2, rtol=0)
    assert not out[3:].any()


def test_lengths_outside_a_row_are_put_within_it_where_they_may_be():
    indices, lens = torch.zeros(3, 8, dtype=torch.int32), torch.tensor([-2, 9, 4], dtype=torch.int32)
    assert Rows.first(3, indices, lens, clamped=True).lens.tolist() == [0, 8, 4]
    assert Rows.first(2, indices, lens, clamped=False).lens.tolist() == [-2, 9]


def test_plans_serve_later_steps_and_other_rows(case, make_cache, index_rows):
    q, caches, rows, sink = case
    plans = {}
    shared(rows, plans=plans).attend(q, caches, sink, 512**-0.5, HEADS)
    assert len(plans) == 1
    other = (Rows(rows[0].indices.flip(0).contiguous(), rows[0].lens.flip(0)), rows[1])
    out = shared(other, plans=plans).attend(q, caches, sink, 512**-0.5, HEADS)
    assert len(plans) == 1
    torch.testing.assert_close(out[:, :HEADS].float(), wanted(q, caches, other, sink), atol=2e-2, rtol=0)


@pytest.mark.parametrize("changed", ["width", "entries", "heads", "kernel"])
def test_what_a_plan_looks_at_makes_another(changed, case):
    q, caches, rows, sink = case
    plans = {}
    shared(rows, plans=plans).attend(q, caches, sink, 512**-0.5, HEADS)
    options = {"entries": 32} if changed == "entries" else {"kernel": "reference"} if changed == "kernel" else {}
    if changed == "width":
        rows = Rows(rows[0].indices[:, :32].contiguous(), rows[0].lens.clamp_max(32)), rows[1]
    shared(rows, plans=plans, **options).attend(q, caches, sink, 512**-0.5, HEADS - (changed == "heads"))
    assert len(plans) == 2


def test_plans_are_forgotten_before_they_are_too_many(case, monkeypatch):
    monkeypatch.setattr("dsv4x.servers.slot_rows.MAX_PLANS", 2)
    q, caches, rows, sink = case
    plans = {}
    for entries in range(1, 5):
        shared(rows, plans=plans, entries=entries).attend(q, caches, sink, 512**-0.5, HEADS)
    assert len(plans) <= 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, rows, sink: (q.float(), rows, sink), TypeError, "q: "),
        (lambda q, rows, sink: (q[:, :, :256], rows, sink), ValueError, "q: "),
        (lambda q, rows, sink: (q[:3], rows, sink), ValueError, "q: "),
        (
            lambda q, rows, sink: (q, (rows[0]._replace(indices=rows[0].indices.long()), rows[1]), sink),
            TypeError,
            "swa",
        ),
        (lambda q, rows, sink: (q, (rows[0], rows[1]._replace(lens=rows[1].lens[:2])), sink), ValueError, "extra_lens"),
        (lambda q, rows, sink: (q, rows, sink[:2]), ValueError, "attn_sink: 2 heads, need >= 4"),
    ],
)
def test_bad_input_is_an_error_before_any_launch(change, error, message, case):
    q, caches, rows, sink = case
    q, rows, sink = change(q, rows, sink)
    with pytest.raises(error, match=message):
        shared(rows).attend(q, caches, sink, 512**-0.5, HEADS)


@pytest.fixture
def whole_heads(replaced):
    """A kernel that stands for FlashMLA: it makes every head of a padded q and notes what it was called with."""
    calls = []

    def run(call):
        calls.append((call.heads, call.out))
        return torch.full((call.q.shape[0], call.heads, 512), 3.0).bfloat16(), None

    replaced(
        registry.Kernel("sparse_mla_decode", "flash_mla", run, lambda problem: 0.0, devices=("cpu",)),
        empty=("sparse_mla_decode",),
    )
    return calls


def test_flash_mla_gets_a_padded_q_whole_and_its_result_is_not_copied(whole_heads):
    cache = dsv4x.PagedCache.zeros(1, layouts.DSV4, 64)
    rows = Rows(torch.zeros(2, 64, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
    made = SlotRows(rows, None, entries=64, trusted=True, captured=False)
    q = torch.zeros(2, 64, 512).bfloat16()
    for _ in range(2):
        out = made.attend(q, (cache, None), torch.zeros(64), 512**-0.5, 16)
        assert out.shape == q.shape
        assert out.eq(3).all()
    assert whole_heads == [(64, None), (64, None)]
