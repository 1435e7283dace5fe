"""The Gluon kernels' records: what they refuse, and when they are chosen over FlashMLA. No GPU."""

import dataclasses
import json

import measured
import pytest
import torch

import dsv4x
from dsv4x.common import portable
from dsv4x.common.core.layouts import CacheSpec
from dsv4x.common.dispatch import costs, registry
from dsv4x.common.dispatch.problem import Problem
from dsv4x.common.dispatch.registry import select
from dsv4x.common.kernels.decode_shapes import num_splits
from dsv4x.common.step.direct import Direct
from dsv4x.common.step.plan import Step, kernel_of
from dsv4x.cuda import flash_mla, gluon
from dsv4x.cuda.hopper import splitting


@pytest.fixture
def records(monkeypatch, replaced):
    """Both libraries' kernels registered, as if both were usable."""
    replaced(empty=True)
    for library in (gluon.GLUON, flash_mla.FLASH_MLA):
        monkeypatch.setitem(vars(library), "_loaded", (None, None, None))
    monkeypatch.setattr(flash_mla, "_prefill_reasons", lambda problem: [])
    monkeypatch.setattr(flash_mla, "_decode_reasons", lambda problem: [])
    shown = {"flash_mla": 35.0, "gluon": 15.0}
    each = {name: us + registry.HIDDEN_HOST_US for name, us in shown.items()}
    host = dict.fromkeys(("sparse_mla_decode", "sparse_mla_prefill"), each)
    monkeypatch.setitem(costs.table_of("sm_90")["host"], "kernels", host)
    gluon.register_kernels()
    flash_mla.register_kernels()
    return {record.name: record for record in registry.kernels("sparse_mla_prefill")}


def kernel_rows(op):
    """The rows of one committed run on an H200."""
    return json.loads((measured.RESULTS / f"{op}-kernels-h200.json").read_text())["rows"]


def problem(**fields):
    given = {"arch": "sm_90", "tokens": 4096, "heads": 64, "width": 640, "rows": 65536, "interpreter": False}
    return Problem("sparse_mla_prefill", "cuda", **{**given, **fields})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"arch": "sm_100"}, "arch is sm_100, need sm_90"),
        ({"arch": "gfx942"}, "arch is gfx942, need sm_90"),
        ({"head_dim": 576}, "head dim is 576, need 512: shared memory holds no more"),
        ({"interpreter": True}, "TRITON_INTERPRET=1, need it unset: Gluon has no interpreter"),
    ],
)
def test_what_it_refuses(records, fields, reason):
    assert records["gluon"].not_supported_reasons(problem(**fields)) == [reason]


def test_it_is_usable_with_the_triton_installed_here():
    assert gluon.GLUON.reason is None


@pytest.mark.parametrize("tokens", [1, 32, 512, 4096, 32768])
@pytest.mark.parametrize(
    ("heads", "width", "faster"),
    [(8, 640, "gluon"), (32, 640, "gluon"), (64, 640, "flash_mla"), (128, 1152, "flash_mla")],
)
def test_the_faster_one_on_an_h200_is_chosen(records, heads, width, faster, tokens):
    asked = problem(tokens=tokens, heads=heads, width=width, capturing=True)
    assert select(asked).name == faster
    assert select(asked).predicted_us(asked) < portable._triton_prefill_us(asked)


def test_an_eager_call_that_waits_for_the_host_gets_what_the_host_is_done_with_sooner(records):
    for tokens, eager, captured in ((1, "gluon", "flash_mla"), (4096, "flash_mla", "flash_mla")):
        asked = problem(tokens=tokens)
        assert select(asked).name == eager
        assert select(dataclasses.replace(asked, capturing=True)).name == captured
        assert registry.explain(asked).predicted_us["flash_mla"] >= 35
    record, decoding = registry.find("sparse_mla_decode", "flash_mla"), decode_problem(tokens=64)
    assert record.call_us(decoding) == max(35, record.predicted_us(decoding))
    # A captured call schedules itself.
    assert record.call_us(dataclasses.replace(decoding, capturing=True)) > record.predicted_us(decoding)


def test_a_step_waits_for_the_longer_of_host_and_gpu():
    asked = problem(tokens=8, extra_width=512)
    given = costs.StepCosts(direct_host=(20.0, 4.0), remap=(6.0, 0.0), gather=(8.0, 0.0), combine=(9.0, 0.0))
    host = 30.0 + registry.HIDDEN_HOST_US
    assert given.direct_us(10.0, host, asked, True) == 50
    assert given.direct_us(70.0, host, asked, True) == 76
    assert given.direct_us(10.0, host, dataclasses.replace(asked, capturing=True), True) == 16
    assert given.gathered_us(10.0, host, asked, True) == given.gathered_host[0] + 30
    assert given.gathered_us(100.0, 5.0, asked, False) == 108


def step_kernel(decoding, topk, kernel=None):
    """The direct path's kernel for a step whose attention call is ``decoding``, with top-k as local entries or none."""
    device = torch.device("cpu")
    step = Step(
        None, None, device, decoding.tokens, decoding.heads, decoding.caches, topk, topk > 0, False, True, False
    )
    return kernel_of(Direct(), step, decoding, kernel)


def test_a_kernel_that_spares_the_step_a_launch_may_be_slower_itself(records):
    decoding = decode_problem(tokens=128, capturing=False)
    flash, own = (registry.find("sparse_mla_decode", name) for name in ("flash_mla", "gluon"))
    assert flash.call_us(decoding) < own.call_us(decoding)
    assert step_kernel(decoding, 0)[0] is flash
    record, us = step_kernel(decoding, 512)
    assert record is own
    assert us < step_kernel(decoding, 512, "flash_mla")[1]
    for kernel, remapped in ((own, False), (flash, True)):
        given = kernel.predicted_us(decoding), kernel.host_us(decoding), decoding
        expected = costs.step_costs("sm_90").direct_us(*given, remapped)
        assert step_kernel(decoding, 512, kernel.name)[1] == expected
    with pytest.raises(dsv4x.KernelNotSupported, match="no kernel can run this problem"):
        step_kernel(decode_problem(layout="indexer fp8"), 512)


def test_a_step_picks_no_kernel_that_refuses_or_runs_by_name_only(records):
    decoding = decode_problem(tokens=128)
    own = dataclasses.replace(registry.find("sparse_mla_decode", "gluon"), predicted_us=lambda problem: 0.0)
    registry.register(dataclasses.replace(own, name="flashinfer", by_name_only="it rounds q"))
    registry.register(dataclasses.replace(own, name="aiter", archs=("gfx942",)))
    assert step_kernel(decoding, 0)[0].name in ("flash_mla", "gluon")
    assert step_kernel(decoding, 0, "flashinfer")[0].name == "flashinfer"
    with pytest.raises(dsv4x.KernelNotSupported, match="arch is sm_90, need gfx942"):
        step_kernel(decoding, 0, "aiter")


def test_without_flash_mla_it_is_chosen(records, replaced):
    replaced(without=[("sparse_mla_prefill", "flash_mla")])
    assert select(problem()).name == "gluon"


@pytest.mark.parametrize("row", kernel_rows("prefill"), ids=str)
def test_predictions_are_near_what_was_measured(records, row):
    predicted = records["gluon"].predicted_us(problem(**{key: row[key] for key in ("tokens", "width", "heads")}))
    assert predicted == pytest.approx(row["gluon"], rel=0.12)


def test_heads_past_128_take_their_blocks_time_and_a_pool_past_l2_takes_longer(records):
    predicted = records["gluon"].predicted_us
    assert predicted(problem(heads=512)) == pytest.approx(4 * predicted(problem(heads=128)), rel=0.05)
    assert predicted(problem(heads=130)) == pytest.approx(1.5 * predicted(problem(heads=128)), rel=0.05)
    assert predicted(problem(heads=65)) == predicted(problem(heads=128))
    assert predicted(problem(rows=262144)) > 1.04 * predicted(problem())


@pytest.fixture
def decode_record(records):
    return registry.find("sparse_mla_decode", "gluon")


def decode_problem(layout="DSv4", extra="DSv4", pages=64, **fields):
    caches = tuple(CacheSpec(name, 64, pages, 37440) for name in (layout, extra))
    given = {"arch": "sm_90", "tokens": 64, "heads": 64, "width": 128, "extra_width": 512, "interpreter": False}
    return Problem("sparse_mla_decode", "cuda", caches=caches, **{**given, **fields})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"arch": "sm_100"}, "arch is sm_100, need sm_90"),
        ({"interpreter": True}, "TRITON_INTERPRET=1, need it unset: Gluon has no interpreter"),
        ({"extra": "DSv4.1 fp8"}, "cache layout is DSv4.1 fp8, need DSv4"),
        ({"layout": "DSv4 fnuz"}, "cache layout is DSv4 fnuz, need DSv4"),
    ],
)
def test_what_decode_refuses(decode_record, fields, reason):
    reasons = decode_record.not_supported_reasons(decode_problem(**fields))
    assert len(reasons) == 1
    assert reasons[0].startswith(reason)


def test_decode_takes_32_bit_slots(decode_record):
    assert decode_record.not_supported_reasons(decode_problem(pages=2**25 - 1)) == []
    says = f"{2**31} slots, need < {2**31}: it takes 32-bit slots"
    assert decode_record.not_supported_reasons(decode_problem(pages=2**25)) == [says, says]


def test_decode_keeps_the_splits_it_is_given(decode_record):
    assert decode_record.not_supported_reasons(decode_problem(split_k=3)) == []


def test_decode_predictions_are_near_what_was_measured(decode_record):
    ratios = {
        few: [
            decode_record.predicted_us(measured.decode_problem(row)) / row["us"]["gluon"]
            for row in measured.decode_rows()
            if (row["heads"] <= 16) == few
        ]
        for few in (False, True)
    }
    assert [len(found) for found in ratios.values()] == [108, 115]
    # The least are short rows of few tokens, which were measured whole and are split since.
    assert 0.7 < min(ratios[False]) < max(ratios[False]) < 1.2
    assert sum(ratio > 0.8 for ratio in ratios[False]) > 95
    assert 0.88 < min(ratios[True]) < max(ratios[True]) < 1.08


def test_few_heads_are_split_as_was_measured_to_be_best():
    """Two runs had other splits at some points, and both lists stand in the data."""
    rows = json.loads((measured.RESULTS / "decode-few-h200.json").read_text())["rows"]
    best = {}
    for row in rows:
        point = row["heads"], row["tokens"], row["kind"], row["entries"]
        best[point] = min(best.get(point, row["us"]["gluon"]), row["us"]["gluon"])
    now = [row for row in measured.decode_rows() if row["heads"] <= 16]
    points = {(row["heads"], row["tokens"], row["kind"], row["entries"]): row["us"]["gluon"] for row in now}
    assert points.keys() == best.keys()
    assert max(us / best[point] for point, us in points.items()) < 1.03


@pytest.mark.parametrize(("tokens", "splits"), [(1, 10), (8, 10), (32, 4), (64, 2), (128, 2), (256, 1)])
def test_programs_of_few_heads_are_one_a_multiprocessor_or_two(tokens, splits):
    """640 entries: two programs that share a multiprocessor are done before one of twice as many blocks."""
    batch = splitting.batch_of(tokens, 8, 132, True)
    assert num_splits(batch, 10) == splits


def test_gathers_bound_the_triton_kernel_at_few_heads(decode_record):
    rows = json.loads((measured.RESULTS / "decode-choice-h100.json").read_text())["rows"]
    rows = [
        row for row in rows if (row["kind"], row["heads"], row["tokens"], row["captured"]) == ("k512", 16, 256, True)
    ]
    assert len(rows) == 1
    problem = measured.decode_problem(rows[0])
    predicted = portable._triton_decode_us(problem)
    assert predicted == pytest.approx(rows[0]["us"]["triton"], rel=0.1)
    assert decode_record.predicted_us(problem) < predicted
