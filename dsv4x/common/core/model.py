"""The models' numbers, each written once, and their layer kinds."""

from __future__ import annotations

from dataclasses import dataclass

VALUE_DIM = 512
"""V is the first 512 values of K."""

HEAD_DIMS = (512, 576)
"""Values of K: DeepSeek-V4's, and V3.2's, whose 64 RoPE values are not part of V."""

MAX_HEADS = 128

INDEX_DIM = 128
"""Values of the indexer's q and K."""

WINDOW = 128
"""Raw tokens a query sees, its own included."""

TOPK = 512
"""Entries an indexer selects, where nothing says."""


@dataclass(frozen=True)
class LayerKind:
    """What the layers of one kind attend to beside their window.

    Attributes:
        compress_ratio: raw tokens that a compressed entry stands for. 1 is a window alone, or a compressed cache as
            long as the sequence (V4.1).
        selects: whether an indexer's top-k chooses among the compressed entries; without one every visible entry is
            attended to.
    """

    compress_ratio: int
    selects: bool

    @classmethod
    def of(cls, compress_ratio: int, selects: bool | None, compressed: bool) -> LayerKind:
        """The kind that arguments mean; ``selects`` None stands for what the ratio means in DeepSeek-V4.

        Raises ValueError where None could mean either, or where there is nothing to select from.
        """
        if not compressed:
            if compress_ratio != 1:
                raise ValueError(f"extra_block_table: got None, need a table for compress_ratio {compress_ratio}")
            if selects:
                raise ValueError("selects: got True, need an extra_block_table to select from")
            return cls(1, False)
        if selects is None:
            if compress_ratio not in (4, 128):
                raise ValueError(f"selects: got None, need True or False for compress_ratio {compress_ratio}")
            selects = compress_ratio == 4
        return cls(compress_ratio, selects)
