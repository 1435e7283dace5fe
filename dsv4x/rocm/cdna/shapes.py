"""How the kernels cover heads and entries, and what that takes by their code alone. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass

from ...common.kernels.decode_shapes import Batch, expected_blocks, num_splits

_FEW_HEADS = 16


@dataclass(frozen=True)
class Shape:
    """A program's part.

    Attributes:
        block_h, block_k: heads of a program, entries of a step.
        resident: programs a compute unit holds, as registers and LDS allow.
        decode_cycles, prefill_cycles: a step's, which its instructions, its products or LDS need at least: the
            compressed entries' of decode (docs/gfx.md, below 2 GiB). A program's four waves are on four SIMDs.
        compute_units, ghz: of the GPU, at its peak clock.
    """

    block_h: int
    block_k: int
    resident: int
    decode_cycles: int
    prefill_cycles: int
    compute_units: int
    ghz: float

    @property
    def options(self) -> dict[str, int]:
        """Triton's on HIP: registers for as many waves as are to be resident."""
        return {"waves_per_eu": self.resident}


_SHAPES = {
    "gfx942": (Shape(16, 32, 1, 2236, 1296, 304, 2.1), Shape(64, 32, 1, 3204, 2132, 304, 2.1)),
    "gfx950": (Shape(16, 64, 2, 1888, 1968, 256, 2.4), Shape(64, 64, 1, 3120, 3296, 256, 2.4)),
}
ARCHS = tuple(_SHAPES)


def shape_of(arch: str, heads: int) -> Shape:
    """The shape for ``heads`` query heads on one of ``ARCHS``."""
    few, many = _SHAPES[arch]
    return few if heads <= _FEW_HEADS else many


def head_blocks(shape: Shape, heads: int) -> int:
    """Programs that a token's heads take."""
    return -(-heads // shape.block_h)


def batch_of(shape: Shape, tokens: int, heads: int, compute_units: int) -> Batch:
    """What a launch of decode has to do before anything is split."""
    return Batch(tokens * head_blocks(shape, heads), shape.resident * compute_units)


def _us(shape: Shape, cycles: float, programs: int) -> float:
    """Of waves of programs, those of one compute unit taking turns."""
    return -(-programs // shape.compute_units) * cycles / shape.ghz / 1e3


def decode_us(shape: Shape, batch: Batch, entries: int, widths: tuple[int, ...], split_k: int) -> float:
    """A bound from below: what the steps' cycles take."""
    blocks = expected_blocks(entries, widths, shape.block_k)
    splits = split_k or num_splits(batch, blocks)
    return _us(shape, -(-blocks // splits) * shape.decode_cycles, batch.programs * splits)


def prefill_us(shape: Shape, tokens: int, heads: int, entries: int) -> float:
    """As :func:`decode_us`."""
    return _us(shape, -(-entries // shape.block_k) * shape.prefill_cycles, tokens * head_blocks(shape, heads))
