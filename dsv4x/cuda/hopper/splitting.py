"""How the Hopper decode kernels split rows, and what they take: measured on an H100 in graphs. Imports no Triton.

From ``benchmarks/results/decode-choice-h100.json``: heads 8 to 128, 1 to 256 tokens, rows of 128 to 1152 entries.
"""

from __future__ import annotations

from ...common.core.model import VALUE_DIM
from ...common.kernels.decode_shapes import Batch, SplitCosts, expected_blocks, num_splits

BLOCK_HEADS, BLOCK_ENTRIES = 64, 64

FEW_HEADS = 16
"""Up to this many heads the kernel runs whose products have heads as columns; all of a row's are one program's."""
_FEW_RESIDENT = 2

# The reduction's launch overlaps the programs in a graph. Eagerly the host takes some 25 us for it and for the partial
# outputs, in which a program is through as many blocks as this.
COSTS = SplitCosts(program=2.5, reduce=0.75, reduce_eager=9.0, partial=3.0)
FEW_COSTS = SplitCosts(program=2.0, reduce=1.0, reduce_eager=10.0, partial=1.5)

# Microseconds: an item's start and end, a block, what each of the first twelve of an item takes more while caches are
# cold, and what a further wave of programs takes to read q and write full heads' outputs.
_ITEM, _BLOCK, _COLD, _COLD_BLOCKS, _WAVE = 5.3, 3.03, 0.85, 12, 4.5
# The reduction: a call, and a MB of partial outputs.
_REDUCE, _REDUCE_MB = 2.3, 0.7


def few(heads: int) -> bool:
    """Whether the kernel for few heads runs."""
    return heads <= FEW_HEADS


def batch_of(tokens: int, heads: int, multiprocessors: int, captured: bool) -> Batch:
    """What a launch has to do; a multiprocessor holds one program, or two of few heads."""
    if few(heads):
        return Batch(tokens, _FEW_RESIDENT * multiprocessors, heads / FEW_HEADS, captured, FEW_COSTS)
    head_blocks = -(-heads // BLOCK_HEADS)
    filled = heads / (head_blocks * BLOCK_HEADS)
    return Batch(tokens * head_blocks, multiprocessors, filled, captured, COSTS)


def predicted_us(batch: Batch, entries: int, widths: tuple[int, ...], split_k: int = 0) -> float:
    """Microseconds of a launch and its reduction over rows of ``entries``, or as long as they are wide."""
    blocks = expected_blocks(entries, widths, BLOCK_ENTRIES)
    splits = split_k or num_splits(batch, blocks)
    share, waves = -(-blocks // splits), -(-batch.programs * splits // batch.at_once)
    us = waves * (_ITEM + _BLOCK * share) + _COLD * min(share, _COLD_BLOCKS) + (waves - 1) * _WAVE * batch.filled
    if splits > 1:
        partial_mb = 4e-6 * VALUE_DIM * BLOCK_HEADS * batch.filled * batch.programs * splits
        us += _REDUCE + _REDUCE_MB * partial_mb
    return us
