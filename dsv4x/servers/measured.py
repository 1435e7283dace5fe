"""Which pieces of a server's attention dsv4x runs: those that were measured ahead of the server's own, in one run.

A table is a JSON file of one arch, made by ``benchmarks/servers_*.py``: where it was measured, and a row a shape. What
was not measured is left to the server, so that installing dsv4x makes nothing slower.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

REACH = {"heads": 1, "tokens": 2, "context": 2}
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
        ours_us, server_us: microseconds of a layer's call; eagerly ours has its share of what a step costs more beside
            its layers.
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
        self,
        piece: str,
        layers: Mapping[int, int],
        heads: int,
        tokens: int,
        *,
        captured: bool,
        context: int | None = None,
    ) -> Verdict:
        """Who runs a piece: dsv4x where it is ahead, or even, at every measured shape next to this one.

        Next to a value are the nearest measured ones on either side.

        Args:
            piece: as in :class:`Row`.
            layers: compress ratio -> layers of it that go the same way; their times are added up.
            heads, tokens: as in :class:`Row`.
            captured: as in :class:`Row`.
            context: as in :class:`Row`; None stands for any, as in a graph that is captured once for all lengths.
        """
        ratios = ", ".join(map(str, sorted(layers)))
        where = f"{piece}, ratio {ratios}, {heads} heads, {'captured' if captured else 'eager'}"
        rows = [row for row in self.rows if (row.piece, row.captured) == (piece, captured) and row.ratio in layers]
        if {row.ratio for row in rows} != set(layers):
            return Verdict(False, f"{where}: not measured on {self.arch}")
        for name, value in (("heads", heads), ("tokens", tokens), ("context", context)):
            if value is None:
                continue
            near = _neighbours([getattr(row, name) for row in rows], value, REACH[name])
            if not near:
                return Verdict(False, f"{where}: not measured at {name} {value}")
            rows = [row for row in rows if getattr(row, name) in near]
        shapes: dict[tuple[int, int, int], list[Row]] = {}
        for row in rows:
            shapes.setdefault((row.heads, row.tokens, row.context), []).append(row)
        totals = {
            shape: tuple(sum(layers[row.ratio] * us(row) for row in each) for us in (_ours_us, _server_us))
            for shape, each in shapes.items()
        }
        worst = max(totals, key=lambda shape: totals[shape][0] / totals[shape][1])
        ours, server = totals[worst]
        took = f"{ours:.0f} us, the server's {server:.0f} at {worst[1]} tokens behind {worst[2]} and {worst[0]} heads"
        return Verdict(ours <= server, f"{where}: {took}")

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


def _ours_us(row: Row) -> float:
    return row.ours_us


def _server_us(row: Row) -> float:
    return row.server_us


def _neighbours(measured: Sequence[int], value: int, reach: int) -> set[int]:
    """The nearest measured values on either side; none past ``reach`` times the largest."""
    below = [seen for seen in measured if seen <= value]
    above = [seen for seen in measured if seen >= value]
    if not above and value > reach * max(measured):
        return set()
    return {*([max(below)] if below else []), *([min(above)] if above else [])}
