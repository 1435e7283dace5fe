"""Which cache layout becomes which other, by which public function.

Functions are named, not imported: the registry says in its reasons what would help, and the ops that could do it import
the registry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import layouts
from .layouts import CacheLayout


@dataclass(frozen=True)
class Conversion:
    """A way from one layout to another that loses nothing: both read back as the same bf16 values.

    Attributes:
        source, target: the layouts, of one head dimension.
        function: the public function's name in ``dsv4x``, which is also its op's name in the registry.
    """

    source: CacheLayout
    target: CacheLayout
    function: str


EXACT = tuple(
    Conversion(
        layouts.TRTLLM_NATIVE.with_flavour(flavour),
        layouts.DSV32.with_flavour(flavour),
        "requantize_fp8_to_block_scale",
    )
    for flavour in layouts.FLAVOURS
)


def exact_from(source: CacheLayout) -> list[Conversion]:
    """The exact conversions of ``source``."""
    return [conversion for conversion in EXACT if conversion.source == source]


def advice(source: str, targets: Sequence[str]) -> str | None:
    """What would turn pages of ``source`` into pages of one of ``targets``, in words; None where nothing does.

    An exact converter is named first; else ``dsv4x.convert_cache``, to bf16 if that is among ``targets``, because bf16
    pages hold what reading ``source`` gives and every other target rounds it again.

    Args:
        source, targets: names of layouts. One that :func:`layouts.by_name` does not know has no advice.
    """
    for conversion in EXACT:
        if conversion.source.name == source and conversion.target.name in targets:
            return f"dsv4x.{conversion.function} converts it to {conversion.target.name}"
    seen = _known(source)
    fitting = [t for t in map(_known, targets) if t is not None and seen is not None and t.head_dim == seen.head_dim]
    if not fitting:
        return None
    target = min(fitting, key=lambda layout: layout.value_encoding != "bf16")
    rounding = "" if target.value_encoding == "bf16" else ", rounding through bf16"
    return f"dsv4x.convert_cache converts it to {target.name}{rounding}"


def _known(name: str) -> CacheLayout | None:
    try:
        return layouts.by_name(name)
    except ValueError:
        return None
