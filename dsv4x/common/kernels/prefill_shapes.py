"""Launch shapes of the Triton prefill kernel: data, a row an arch and a range of heads.

The sm_90 rows were measured on an H200, the others chosen by compiling for the arch, with Triton 3.6 and 3.9
(benchmarks/prefill_configs.py does both): no spill on gfx, shared memory within the arch's. None was timed on an AMD,
Blackwell or consumer GPU. On gfx a block of heads has as many rows as its four waves' 16-row MFMAs, or less: with more
waves than that they would compute the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefillConfig:
    """How the kernel covers heads and entries, and how Triton launches it.

    Attributes:
        block_h, block_k: heads of a program, entries of a step.
        num_warps, num_stages: Triton's.
        prefetch: load a step's indices one step ahead by hand, where Triton's pipeliner (more than one stage) does not.
        hip: options that only AMD's backend takes.
    """

    block_h: int
    block_k: int
    num_warps: int
    num_stages: int
    prefetch: bool = False
    hip: tuple[tuple[str, int], ...] = ()

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **dict(self.hip)}


_GFX942 = (("matrix_instr_nonkdim", 16), ("kpack", 2))
_GFX950 = (("matrix_instr_nonkdim", 16),)
_SMALLEST = ((128, PrefillConfig(16, 32, 4, 2)),)

# (arch prefix, head dim) -> (most heads, config), ascending. Of gfx942's LDS q takes all 64 KiB while it is loaded; two
# stages on gfx950 hold the next rows in registers, which V3.2's 64 values more do not fit into. On gfx942 V would then
# be read from LDS in 256 reads of two bytes a step.
_TABLE: dict[tuple[str, int], tuple[tuple[int, PrefillConfig], ...]] = {
    ("gfx942", 512): (
        (16, PrefillConfig(16, 32, 4, 1, hip=_GFX942)),
        (32, PrefillConfig(32, 32, 4, 1, prefetch=True, hip=_GFX942)),
        (128, PrefillConfig(64, 32, 4, 1, prefetch=True, hip=_GFX942)),
    ),
    ("gfx942", 576): (
        (16, PrefillConfig(16, 32, 4, 1, hip=_GFX942)),
        (32, PrefillConfig(32, 32, 4, 1, prefetch=True, hip=_GFX942)),
        (128, PrefillConfig(64, 32, 4, 1, prefetch=True, hip=_GFX942)),
    ),
    ("gfx950", 512): (
        (16, PrefillConfig(16, 32, 4, 2, hip=_GFX950)),
        (32, PrefillConfig(32, 32, 4, 2, hip=_GFX950)),
        (128, PrefillConfig(64, 32, 4, 2, hip=_GFX950)),
    ),
    ("gfx950", 576): (
        (16, PrefillConfig(16, 32, 4, 2, hip=_GFX950)),
        (128, PrefillConfig(32, 32, 4, 2, hip=_GFX950)),
    ),
    ("sm_9", 512): (
        (16, PrefillConfig(16, 32, 4, 2)),
        (32, PrefillConfig(32, 64, 8, 2)),
        (128, PrefillConfig(64, 64, 8, 2)),
    ),
    ("sm_9", 576): (
        (16, PrefillConfig(16, 32, 4, 2)),
        (32, PrefillConfig(32, 64, 8, 2)),
        (128, PrefillConfig(64, 64, 8, 2)),
    ),
    ("sm_10", 512): ((32, PrefillConfig(16, 32, 4, 2)), (128, PrefillConfig(64, 32, 8, 2))),
    ("sm_10", 576): ((32, PrefillConfig(16, 32, 4, 2)), (128, PrefillConfig(64, 32, 8, 2))),
}


def prefill_configs(arch: str, head_dim: int) -> tuple[tuple[int, PrefillConfig], ...]:
    """``(most heads, config)`` of an arch, ascending; unknown archs get the smallest."""
    for (prefix, dim), rows in _TABLE.items():
        if arch.startswith(prefix) and dim == head_dim:
            return rows
    return _SMALLEST


def prefill_config(arch: str, heads: int, head_dim: int) -> PrefillConfig:
    """The launch shape for ``heads`` query heads of ``head_dim`` on ``arch``."""
    return next(config for most, config in prefill_configs(arch, head_dim) if heads <= most)
