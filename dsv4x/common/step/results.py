"""The output of a layer that is attended to in one call or in several."""

from __future__ import annotations

import torch

from ..core.calls import Result
from ..core.model import VALUE_DIM
from .plan import Layer


class Results:
    """What ``parts`` calls give: one part's as it is, several (or none) in one buffer."""

    def __init__(self, layer: Layer, parts: int):
        self.out, self.whole = layer.out, parts == 1
        self.lse: torch.Tensor | None = None
        if not self.whole:
            tokens, device = layer.q.shape[0], layer.q.device
            if self.out is None:
                self.out = torch.empty(tokens, layer.heads, VALUE_DIM, dtype=torch.bfloat16, device=device)
            if layer.return_lse:
                self.lse = torch.empty(tokens, layer.heads, dtype=torch.float32, device=device)

    def buffer(self, block: slice) -> torch.Tensor | None:
        """Where a part is written to; None where its kernel may allocate."""
        return self.out if self.whole or self.out is None else self.out[block]

    def add(self, block: slice, part: Result) -> None:
        out, lse = part
        if self.whole:
            self.out, self.lse = out, lse
        elif lse is not None:
            assert self.lse is not None
            self.lse[block] = lse

    def all(self) -> Result:
        assert self.out is not None
        return self.out, self.lse
