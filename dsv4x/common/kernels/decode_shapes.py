"""Launch shapes of the decode kernel, a row an arch family: data, so that what runs is what was compiled in tests.

Shared memory bounds them: 64 KiB of LDS on gfx942, 160 KiB on gfx950, 99 KiB a block on sm_120, 227 KiB on sm_90
and sm_100. The gfx rows were chosen by compiling (benchmarks/gfx_configs.py, docs/gfx.md): no spills with
Triton 3.9, and at most 14 registers' with 3.6 where that is still the fewest cycles. None was timed on an AMD GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from ..core.layouts import CacheLayout
from .limits import MAX_SPLITS


@dataclass(frozen=True)
class AttentionConfig:
    """How programs cover heads and entries, and how Triton launches them.

    Attributes:
        block_h, block_k: heads of a program, entries of a step.
        num_warps, num_stages: Triton's.
        matrix_instr_nonkdim: an option of AMD's backend alone; 0 elsewhere.
        resident: programs that a multiprocessor runs at once, as registers and shared memory allow.
        fixed_pages: whether the code is for the caches' page sizes alone. It divides by them at every step, which takes
            tens of instructions where they are arguments. A server's are few.
    """

    block_h: int
    block_k: int
    num_warps: int
    num_stages: int
    matrix_instr_nonkdim: int = 0
    resident: int = 2
    fixed_pages: bool = False

    @property
    def options(self) -> dict[str, int]:
        """Launch options; ``matrix_instr_nonkdim`` exists on HIP only."""
        hip = {"matrix_instr_nonkdim": self.matrix_instr_nonkdim} if self.matrix_instr_nonkdim else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **hip}


_FEW_HEADS = 16
"""Up to this many heads one 16-row matrix tile holds them all."""


class _Shapes(NamedTuple):
    """Those of up to 16 heads, and of more."""

    few: AttentionConfig
    many: AttentionConfig


class _Row(NamedTuple):
    """An arch family's shapes, by what its entries take: of one scale to 64 values or none, finer scales, wide ones.

    Wide are those of more than 512 values. They cost registers and shared memory, and where Triton exchanges scales one
    by one, so do fine ones.
    """

    plain: _Shapes
    fine: _Shapes
    wide: _Shapes


def _gfx(block_h: int, block_k: int, resident: int = 1) -> AttentionConfig:
    return AttentionConfig(block_h, block_k, 4, 1, 16, resident, True)


_GFX950 = _Shapes(_gfx(16, 32), _gfx(64, 32))
_HOPPER = _Shapes(AttentionConfig(16, 32, 4, 2), AttentionConfig(64, 32, 8, 2))
_SMALL = _Shapes(AttentionConfig(16, 16, 4, 1), AttentionConfig(16, 16, 4, 1))
_CONFIGS = {
    "gfx942": _Row(
        plain=_Shapes(_gfx(16, 16, 2), _gfx(64, 32)),
        fine=_Shapes(_gfx(16, 16, 2), _gfx(64, 16)),
        wide=_Shapes(_gfx(16, 16), _gfx(64, 16)),
    ),
    "gfx950": _Row(_GFX950, _GFX950, _GFX950),
    "sm_9": _Row(_HOPPER, _HOPPER, _HOPPER),
    "sm_10": _Row(_HOPPER, _HOPPER, _HOPPER),
}
_OTHERS = _Row(_Shapes(AttentionConfig(16, 32, 4, 1), AttentionConfig(16, 32, 4, 1)), _SMALL, _SMALL)


def decode_config(arch: str, heads: int, layouts: tuple[CacheLayout, ...]) -> AttentionConfig:
    """The launch shape for ``heads`` query heads and entries of ``layouts``; unknown archs get the smallest."""
    row = next((row for prefix, row in _CONFIGS.items() if arch.startswith(prefix)), _OTHERS)
    shapes = row.plain
    if any(layout.head_dim > 512 for layout in layouts):
        shapes = row.wide
    elif any(layout.scale_tile < 64 for layout in layouts):
        shapes = row.fine
    return shapes.few if heads <= _FEW_HEADS else shapes.many


class SplitCosts(NamedTuple):
    """What splitting a row costs a kernel, in units of one of its blocks of entries.

    Attributes:
        program: starting and ending a program.
        reduce: launching the reduction in a captured graph.
        reduce_eager: the same in an eager call, which waits for the host to launch it.
        partial: partial outputs of one wave of programs that have all their heads.
        second: share of its blocks' time that every second wave takes, where it runs beside the one before.
    """

    program: float
    reduce: float
    reduce_eager: float
    partial: float
    second: float = 1.0

    def in_turn(self, waves: int) -> float:
        """Waves that one after another would take as long as these."""
        return waves - waves // 2 * (1.0 - self.second)


COSTS = SplitCosts(program=3.5, reduce=2.0, reduce_eager=2.0, partial=1.5)
"""Triton's, of an H200; a block of 64 entries takes 3.5 us there with cold caches."""
_SPLIT_BLOCKS = 1 / 20
"""Reducing one split."""
_MOST_WAVES = 4
"""Waves of programs that splitting makes at most, which bounds the partial outputs."""


class Batch(NamedTuple):
    """What a launch has to do before anything is split.

    Attributes:
        programs: rows times their blocks of heads.
        at_once: programs that run at a time.
        filled: share of a program's heads that count.
        captured: whether a graph is being captured.
        costs: of the kernel.
    """

    programs: int
    at_once: int
    filled: float = 1.0
    captured: bool = False
    costs: SplitCosts = COSTS

    def blocks_taken(self, blocks: int, splits: int) -> float:
        """What rows of ``blocks`` take in ``splits`` each, in the unit of the costs."""
        waves, costs = -(-self.programs * splits // self.at_once), self.costs
        taken = costs.in_turn(waves) * -(-blocks // splits) + waves * costs.program
        if splits > 1:
            partial = costs.partial * self.filled * self.programs / self.at_once
            taken += (costs.reduce if self.captured else costs.reduce_eager) + splits * (_SPLIT_BLOCKS + partial)
        return taken


@functools.lru_cache(maxsize=4096)
def num_splits(batch: Batch, blocks: int) -> int:
    """Splits of ``blocks`` a row in which a batch finishes first."""
    best, fewest = 1, batch.blocks_taken(blocks, 1)
    for splits in range(2, min(blocks, MAX_SPLITS) + 1):
        if -(-batch.programs * splits // batch.at_once) > _MOST_WAVES:
            break
        # More splits than shares would leave programs without work.
        if (splits - 1) * -(-blocks // splits) < blocks:
            cost = batch.blocks_taken(blocks, splits)
            if cost < fewest:
                best, fewest = splits, cost
    return best


class Splits(NamedTuple):
    """How a launch splits rows whose lengths only the device knows.

    Attributes:
        most: splits a row can have; programs and partial outputs are for as many.
        whole: a row of at most this many blocks stays whole. A longer one is shared by ``most`` splits, as evenly as
            whole blocks allow, and has fewer where some would get none.
    """

    most: int
    whole: int


@functools.lru_cache(maxsize=4096)
def row_splits(batch: Batch, blocks: int, split_k: int | None = None) -> Splits:
    """Splits of rows of up to ``blocks``: ``split_k`` of every row where it is given, else what finishes first.

    A row as long as the bound is split as :func:`num_splits` says. Shorter ones stay whole up to where splitting pays.
    """
    if split_k is not None:
        return Splits(split_k, 0)
    most = num_splits(batch, blocks)
    whole = 0
    if most > 1:
        while whole + 1 < blocks and not _pays(batch, whole + 1, most):
            whole += 1
    return Splits(most, whole)


def _pays(batch: Batch, blocks: int, most: int) -> bool:
    """Whether rows of ``blocks`` are done earlier in the splits that :class:`Splits` gives them than whole."""
    splits = -(-blocks // -(-blocks // most))
    return batch.blocks_taken(blocks, splits) < batch.blocks_taken(blocks, 1)


def expected_blocks(entries: int, widths: tuple[int, ...], block: int) -> int:
    """Blocks a row holds: of ``entries`` where they are known, else of rows as long as they are wide.

    Args:
        entries: mean entries a token reads; 0 where nobody knows.
        widths: columns of each scope's index rows.
        block: entries a block holds.
    """
    most = sum(-(-width // block) for width in widths)
    if entries:
        # Each scope takes a block at least.
        return min(most, max(-(-entries // block), sum(width > 0 for width in widths)))
    return most


def most_splits(programs: int, blocks: int, at_once: int) -> int:
    """More splits than this :func:`num_splits` never gives ``programs`` rows of up to ``blocks``."""
    return max(1, min(blocks, MAX_SPLITS, _MOST_WAVES * at_once // max(programs, 1)))
