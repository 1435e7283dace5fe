"""How the Hopper decode kernels split rows, and what they take, measured in graphs. Imports no Triton.

From ``benchmarks/results/decode-choice-h100.json``: heads 32 to 128, 1 to 256 tokens, rows of 128 to 1152 entries; of
up to 16 heads from ``decode-few-h200.json``, which has 1 to 256 tokens and such rows too, whole and in splits.
"""

from __future__ import annotations

from ...common.core.model import VALUE_DIM
from ...common.kernels.decode_shapes import Batch, SplitCosts, expected_blocks, num_splits

BLOCK_HEADS, BLOCK_ENTRIES = 64, 64

FEW_HEADS = 16
"""Up to this many heads the kernel runs whose products have heads as columns; all of a row's are one program's."""

# The reduction's launch overlaps the programs in a graph. Eagerly the host takes some 25 us for it and for the partial
# outputs, in which a program is through as many blocks as this.
COSTS = SplitCosts(program=2.5, reduce=0.75, reduce_eager=9.0, partial=3.0)
# Two programs of few heads share a multiprocessor, and take half as long again as one.
FEW_COSTS = SplitCosts(program=0.7, reduce=0.95, reduce_eager=10.0, partial=0.6, second=0.5)

# Microseconds: an item's start and end, a block, what each of the first twelve of an item takes more while caches are
# cold, and what a further wave of programs takes to read q and write full heads' outputs.
_ITEM, _BLOCK, _COLD, _COLD_BLOCKS, _WAVE = 5.3, 3.03, 0.85, 12, 4.5
# The reduction: a call, and a MB of partial outputs.
_REDUCE, _REDUCE_MB = 2.3, 0.7
# The same of up to 16 heads, of a program and a block with none and what all 16 add. Waves of more programs wait longer
# for memory; partial outputs are lost in that.
_FEW_ITEM, _FEW_BLOCK = (2.75, 1.5), (2.25, 0.46)
_FEW_CROWD, _FEW_WAVE, _FEW_REDUCE = 1.95, 1.5, 3.05


def few(heads: int) -> bool:
    """Whether the kernel for few heads runs."""
    return heads <= FEW_HEADS


def batch_of(tokens: int, heads: int, multiprocessors: int, captured: bool) -> Batch:
    """What a launch has to do; a wave of programs is one a multiprocessor."""
    if few(heads):
        return Batch(tokens, multiprocessors, heads / FEW_HEADS, captured, FEW_COSTS)
    head_blocks = -(-heads // BLOCK_HEADS)
    filled = heads / (head_blocks * BLOCK_HEADS)
    return Batch(tokens * head_blocks, multiprocessors, filled, captured, COSTS)


def predicted_us(batch: Batch, entries: int, widths: tuple[int, ...], split_k: int = 0) -> float:
    """Microseconds of a launch and its reduction over rows of ``entries``, or as long as they are wide."""
    blocks = expected_blocks(entries, widths, BLOCK_ENTRIES)
    splits = split_k or num_splits(batch, blocks)
    share, waves = -(-blocks // splits), -(-batch.programs * splits // batch.at_once)
    if batch.costs is FEW_COSTS:
        item, block = (none + all_heads * batch.filled for none, all_heads in (_FEW_ITEM, _FEW_BLOCK))
        us = item + block * share * batch.costs.in_turn(waves) + (waves - 1) * _FEW_WAVE
        us += _FEW_CROWD * min(1.0, batch.programs * splits / batch.at_once)
        return us + (_FEW_REDUCE if splits > 1 else 0.0)
    us = waves * (_ITEM + _BLOCK * share) + _COLD * min(share, _COLD_BLOCKS) + (waves - 1) * _WAVE * batch.filled
    if splits > 1:
        partial_mb = 4e-6 * VALUE_DIM * BLOCK_HEADS * batch.filled * batch.programs * splits
        us += _REDUCE + _REDUCE_MB * partial_mb
    return us
