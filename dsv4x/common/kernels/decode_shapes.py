"""Launch shapes of the decode kernel, a row an arch family: data, so that what runs is what was compiled in tests.

Shared memory bounds them: 64 KiB of LDS on gfx942, 160 KiB on gfx950, 99 KiB a block on sm_120, 227 KiB on sm_90
and sm_100. The gfx rows were chosen by compiling (benchmarks/gfx_configs.py, docs/gfx.md): no spills with
Triton 3.6 and 3.9. None was timed on an AMD GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from ..core.layouts import CacheLayout
from .limits import MAX_SPLITS


@dataclass(frozen=True)
class AttentionConfig:
    """Heads and entries one program step covers, and how Triton launches it."""

    block_h: int
    block_k: int
    num_warps: int
    num_stages: int
    matrix_instr_nonkdim: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Launch options; ``matrix_instr_nonkdim`` exists on HIP only."""
        hip = {"matrix_instr_nonkdim": self.matrix_instr_nonkdim} if self.matrix_instr_nonkdim else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **hip}


_FEW_HEADS = 16
"""Up to this many heads one 16-row matrix tile holds them all."""


class _Row(NamedTuple):
    """An arch family's shapes, by heads and by how much its entries take to decode."""

    few: AttentionConfig
    many: AttentionConfig
    heavy_few: AttentionConfig
    heavy_many: AttentionConfig


_SMALL = AttentionConfig(16, 16, 4, 1)
_HOPPER_FEW, _HOPPER_MANY = AttentionConfig(16, 32, 4, 2), AttentionConfig(64, 32, 8, 2)
_HOPPER = _Row(_HOPPER_FEW, _HOPPER_MANY, _HOPPER_FEW, _HOPPER_MANY)

_CONFIGS = {
    "gfx942": _Row(
        AttentionConfig(16, 16, 4, 1, 16),
        AttentionConfig(64, 16, 4, 1, 16),
        AttentionConfig(16, 16, 4, 1, 16),
        AttentionConfig(32, 16, 4, 1, 16),
    ),
    "gfx950": _Row(
        AttentionConfig(16, 32, 4, 1, 16),
        AttentionConfig(64, 16, 4, 1, 16),
        AttentionConfig(16, 16, 4, 1, 16),
        AttentionConfig(32, 16, 4, 1, 16),
    ),
    "sm_9": _HOPPER,
    "sm_10": _HOPPER,
}
_OTHERS = _Row(AttentionConfig(16, 32, 4, 1), AttentionConfig(16, 32, 4, 1), _SMALL, _SMALL)


def decode_config(arch: str, heads: int, layouts: tuple[CacheLayout, ...]) -> AttentionConfig:
    """The launch shape for ``heads`` query heads and entries of ``layouts``; unknown archs get the smallest.

    Scales finer than one to 64 values, or more than 512 values, are heavy: they cost registers and shared memory.
    """
    row = next((row for prefix, row in _CONFIGS.items() if arch.startswith(prefix)), _OTHERS)
    heavy = any(layout.scale_tile < 64 or layout.head_dim > 512 for layout in layouts)
    if heads <= _FEW_HEADS:
        return row.heavy_few if heavy else row.few
    return row.heavy_many if heavy else row.many


# In blocks of entries: what a program costs beside its blocks; what reducing costs, each split to reduce, and a wave's
# worth of partial outputs. Measured on an H200, where a block of 64 entries takes 3.5 us while caches are cold. In a
# graph, reducing starts at half a block, and rows of two and three blocks would be split for 1.5 and 4 us of 17 and 20;
# an eager call waits up to 24 us for the host to launch a second kernel, so only longer ones are.
_PROGRAM_BLOCKS, _REDUCE_BLOCKS, _SPLIT_BLOCKS, _PARTIAL_BLOCKS = 3.5, 2.0, 1 / 20, 1.5
_MOST_WAVES = 4


@functools.lru_cache(maxsize=4096)
def num_splits(programs: int, blocks: int, at_once: int) -> int:
    """Splits of ``blocks`` over which ``programs`` finish first, ``at_once`` programs running at a time.

    Splitting is for few programs: with it there are at most four waves of them, which bounds the partial outputs.
    """
    best, fewest = 1, float(-(-programs // at_once) * (blocks + _PROGRAM_BLOCKS))
    for splits in range(2, min(blocks, MAX_SPLITS) + 1):
        share = -(-blocks // splits)
        waves = -(-programs * splits // at_once)
        if waves > _MOST_WAVES:
            break
        # More splits than shares would leave programs without work.
        if (splits - 1) * share < blocks:
            partials = _REDUCE_BLOCKS + splits * (_SPLIT_BLOCKS + _PARTIAL_BLOCKS * programs / at_once)
            cost = waves * (share + _PROGRAM_BLOCKS) + partials
            if cost < fewest:
                best, fewest = splits, cost
    return best


def most_splits(programs: int, blocks: int, at_once: int) -> int:
    """More splits than this :func:`num_splits` never gives ``programs`` rows of up to ``blocks``."""
    return max(1, min(blocks, MAX_SPLITS, _MOST_WAVES * at_once // max(programs, 1)))
