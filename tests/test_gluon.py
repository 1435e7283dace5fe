"""The Gluon kernels' records: what they refuse, and when they are chosen over FlashMLA. No GPU."""

import pytest

from dsv4x.common import registry
from dsv4x.common.registry import Problem, select
from dsv4x.cuda import flash_mla, gluon


@pytest.fixture
def records(monkeypatch):
    """Both libraries' kernels registered, as if both were usable."""
    monkeypatch.setattr(registry, "_kernels", {})
    for library in (gluon.GLUON, flash_mla.FLASH_MLA):
        monkeypatch.setitem(vars(library), "_loaded", (None, None, None))
    monkeypatch.setattr(flash_mla, "_prefill_reasons", lambda problem: [])
    select.cache_clear()
    gluon.register_kernels()
    flash_mla.register_kernels()
    yield registry._kernels["sparse_mla_prefill"]
    select.cache_clear()


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
    assert select(problem(tokens=tokens, heads=heads, width=width)).name == faster


def test_without_flash_mla_it_is_chosen(records):
    del registry._kernels["sparse_mla_prefill"]["flash_mla"]
    select.cache_clear()
    assert select(problem()).name == "gluon"


@pytest.mark.parametrize(("tokens", "width", "heads", "us"), [(1, 128, 64, 11), (1, 640, 64, 25), (4096, 640, 8, 704)])
def test_predictions_are_near_what_was_measured(records, tokens, width, heads, us):
    predicted = records["gluon"].predicted_us(problem(tokens=tokens, width=width, heads=heads))
    assert predicted == pytest.approx(us, rel=0.35)
