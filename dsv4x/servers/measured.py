"""Which pieces of a server's attention dsv4x runs: those that were measured ahead of the server's own, in one run.

A table is a JSON file of one arch, made by ``benchmarks/servers_*.py``: where it was measured, and a row a shape. What
was not measured is left to the server, so that installing dsv4x makes nothing slower.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

REACH = 2
"""How far past its largest measured value a table still speaks, as a factor."""


class Row(NamedTuple):
    """One shape, measured both ways in turns.

    Attributes:
        piece: ``"decode"`` (by slot rows: decode, verify, drafts) or ``"extend"``.
        ratio: the layers' compress ratio; 0 without compressed entries.
        heads: query heads that count.
        captured: whether in a graph's replay, or eagerly.
        tokens: query tokens of the step.
        context: raw tokens before them, of the longest request.
        ours_us, server_us: microseconds of a layer's call.
    """

    piece: str
    ratio: int
    heads: int
    captured: bool
    tokens: int
    context: int
    ours_us: float
    server_us: float

    @property
    def ahead(self) -> bool:
        return self.ours_us <= self.server_us


class Verdict(NamedTuple):
    """Who runs a piece, and why."""

    ours: bool
    why: str


@dataclass(frozen=True)
class Table:
    """What was measured on one arch.

    Attributes:
        arch: as ``dsv4x.platform`` names it.
        origin: the card, versions and command, as the benchmark wrote them; empty where nothing was measured.
        rows: the shapes.
    """

    arch: str
    origin: dict[str, Any]
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, folder: Path, arch: str) -> Table:
        """The table of an arch in a server's folder; one without rows where there is no such file."""
        file = folder / f"measured_{arch}.json"
        if not file.is_file():
            return cls(arch, {}, ())
        found = json.loads(file.read_text())
        rows = tuple(Row(**row) for row in found.pop("rows"))
        return cls(arch, found, rows)

    def verdict(
        self, piece: str, ratio: int, heads: int, tokens: int, *, captured: bool, context: int | None = None
    ) -> Verdict:
        """Who runs a piece: dsv4x where it is ahead at every measured shape next to this one.

        Next to a value are the nearest measured ones on either side. ``context`` None stands for any, as in a graph
        that is captured once for all lengths.
        """
        where = f"{piece}, ratio {ratio}, {heads} heads, {'captured' if captured else 'eager'}"
        rows = [row for row in self.rows if (row.piece, row.ratio, row.captured) == (piece, ratio, captured)]
        if not rows:
            return Verdict(False, f"{where}: not measured on {self.arch}")
        for name, value in (("heads", heads), ("tokens", tokens), ("context", context)):
            if value is None:
                continue
            near = _neighbours([getattr(row, name) for row in rows], value)
            if not near:
                return Verdict(False, f"{where}: not measured at {name} {value}")
            rows = [row for row in rows if getattr(row, name) in near]
        worst = max(rows, key=lambda row: row.ours_us / row.server_us)
        shape = f"{worst.tokens} tokens behind {worst.context}"
        took = f"{worst.ours_us:.0f} us, the server's {worst.server_us:.0f} at {shape}"
        return Verdict(worst.ahead, f"{where}: {took}")

    def __str__(self) -> str:
        if not self.rows:
            return f"nothing was measured on {self.arch}: the server's own attention runs everywhere"
        told = ", ".join(f"{name} {value}" for name, value in self.origin.items())
        head = "piece   ratio heads mode      tokens  context   dsv4x us  server us  ratio  runs"
        lines = [
            f"{row.piece:<7} {row.ratio:>5} {row.heads:>5} {'captured' if row.captured else 'eager':<8} "
            f"{row.tokens:>7} {row.context:>8} {row.ours_us:>10.1f} {row.server_us:>10.1f} "
            f"{row.ours_us / row.server_us:>6.2f}  {'dsv4x' if row.ahead else 'server'}"
            for row in self.rows
        ]
        return "\n".join([f"measured on {self.arch}: {told}", head, *lines])


def _neighbours(measured: Sequence[int], value: int) -> set[int]:
    """The nearest measured values on either side; none past :data:`REACH` times the largest."""
    below = [seen for seen in measured if seen <= value]
    above = [seen for seen in measured if seen >= value]
    if not above and value > REACH * max(measured):
        return set()
    return {*([max(below)] if below else []), *([min(above)] if above else [])}
