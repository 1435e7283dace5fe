"""How close an attention kernel must be to the float64 reference: FlashMLA's own bounds for its two kernels."""

import torch

_ELEMENTS_AT_ONCE = 1 << 25


def check_decode(out, lse, ref_out, ref_lse):
    """Assert that a decode result matches the float64 reference's ``(ref_out, ref_lse)``."""
    check_close("out", out, ref_out, absolute=1e-3, relative=2.01 / 128, cosine=5e-6)
    check_close("lse", lse, ref_lse, absolute=1e-6, relative=8.01 / 65536)


def check_prefill(out, lse, ref_out, ref_lse):
    """Assert that a prefill result matches the float64 reference's ``(ref_out, ref_lse)``."""
    check_close("out", out, ref_out, absolute=8e-4, relative=3.01 / 128, cosine=7e-6)
    check_close("lse", lse, ref_lse, absolute=1e-6, relative=8.01 / 65536)


def check_close(name, got, want, *, absolute, relative, cosine=None):
    """Each element within ``absolute`` or ``relative``, infinities in the same places, no NaN, and one direction."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, reference {tuple(want.shape)}"
    product = norms = 0.0
    # Float64 copies of a long step's outputs, several of them, would fill a card that others' tests share.
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, got[0].numel() if len(got) else 1))
    for first in range(0, len(got), rows):
        part = slice(first, first + rows)
        part_product, part_norms = _check_part(name, first, got[part], want[part], absolute, relative)
        product, norms = product + part_product, norms + part_norms
    if cosine is not None:
        difference = 1 - 2 * product / norms if norms else 0.0
        assert difference <= cosine, f"{name}: cosine difference {difference:.3g}, need <= {cosine}"


def _check_part(name, first, got, want, absolute, relative):
    """Check the rows from ``first`` on; returns the sum of products, and that of both's squares."""
    got, want = got.detach().double(), want.detach().double().to(got.device)
    assert not want.isnan().any(), f"{name}: the reference holds {int(want.isnan().sum())} NaN"
    nan = got.isnan()
    assert not nan.any(), f"{name}: {int(nan.sum())} NaN, first at {_first(nan, first)}"
    infinite = (got != want) & (got.isinf() | want.isinf())
    assert not infinite.any(), (
        f"{name}: {got[infinite][0]} at {_first(infinite, first)}, reference {want[infinite][0]} "
        f"({int(infinite.sum())} such)"
    )
    got, want = (torch.where(want.isinf(), 0.0, x) for x in (got, want))
    error = (got - want).abs()
    bad = (error > absolute) & (error > relative * want.abs())
    assert not bad.any(), (
        f"{name}: {int(bad.sum())} of {bad.numel()} off, the worst by {float(error[bad].max()):.3g}; first at "
        f"{_first(bad, first)}: {float(got[bad][0]):.8g}, reference {float(want[bad][0]):.8g}"
    )
    return float((got * want).sum()), float((got * got + want * want).sum())


def _first(mask, first):
    row, *rest = (int(x) for x in mask.nonzero()[0])
    return (first + row, *rest)
