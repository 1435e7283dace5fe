"""Launch shapes of the attention kernels, a row an arch family: data, so that what runs is what was compiled in tests.

Shared memory bounds them: 64 KiB of LDS on gfx942, 160 KiB on gfx950, 99 KiB a block on sm_120, 227 KiB on sm_90
and sm_100. The gfx rows were chosen by compiling (no spills); none was timed on an AMD GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from ..layouts import CacheLayout
from ..sparse_mla import MAX_SPLITS


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

_GFX = (AttentionConfig(16, 32, 4, 1, 16), AttentionConfig(16, 32, 4, 1, 16))
_HOPPER = (AttentionConfig(16, 32, 4, 2), AttentionConfig(64, 32, 8, 2))
_SMALL_SMEM = (AttentionConfig(16, 32, 4, 1), AttentionConfig(16, 32, 4, 1))

_CONFIGS = {"gfx": _GFX, "sm_9": _HOPPER, "sm_10": _HOPPER}


def attention_config(arch: str, heads: int) -> AttentionConfig:
    """The launch shape for ``heads`` query heads on ``arch``; unknown archs get the smallest."""
    few, many = next((c for prefix, c in _CONFIGS.items() if arch.startswith(prefix)), _SMALL_SMEM)
    return few if heads <= _FEW_HEADS else many


def decode_config(arch: str, heads: int, layouts: tuple[CacheLayout, ...]) -> AttentionConfig:
    """The same for entries decoded from ``layouts``.

    Scales finer than one to 64 values, or more than 512 values, cost registers and shared memory: 32 entries a step
    spill on gfx and pass sm_120's shared memory, 16 do not.
    """
    config = attention_config(arch, heads)
    heavy = any(layout.scale_tile < 64 or layout.head_dim > 512 for layout in layouts)
    if heavy and not arch.startswith(("sm_9", "sm_10")):
        return dataclasses.replace(config, block_k=16)
    return config


# In blocks of entries: what a program costs before its first, what reducing costs, and each split to reduce. From an
# H200, where a block of 64 takes 2.5 us and one program of one block 12 us.
_PROGRAM_BLOCKS, _REDUCE_BLOCKS, _SPLIT_BLOCKS = 2, 2.5, 1 / 16
_MOST_WAVES = 4


@functools.lru_cache(maxsize=4096)
def num_splits(programs: int, blocks: int, at_once: int) -> int:
    """Splits of ``blocks`` over which ``programs`` finish first, ``at_once`` programs running at a time.

    Splitting is for few programs: with it there are at most four waves of them, which bounds the partial outputs.
    """
    best, fewest = 1, -(-programs // at_once) * (blocks + _PROGRAM_BLOCKS)
    for splits in range(2, min(blocks, MAX_SPLITS) + 1):
        share = -(-blocks // splits)
        waves = -(-programs * splits // at_once)
        if waves > _MOST_WAVES:
            break
        # More splits than shares would leave programs without work.
        if (splits - 1) * share < blocks:
            cost = waves * (share + _PROGRAM_BLOCKS) + _REDUCE_BLOCKS + splits * _SPLIT_BLOCKS
            if cost < fewest:
                best, fewest = splits, cost
    return best
