"""What a step costs around its attention kernel, tables of kernel times to interpolate, and the rate of logits."""

from __future__ import annotations

import bisect
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.layouts import INDEXER_FP8
from .problem import AttentionProblem, LogitsProblem, SelectionProblem
from .registry import HIDDEN_HOST_US

_BY_KIND = ("direct", "gathered")
# A guess: rows narrower than the narrowest measured ones take at least this share of their time. Nothing was measured
# there, and the line through the two narrowest widths may cross zero.
_NARROWEST = 0.5
_TABLES: dict[str, Path] = {}

TRITON_LOGITS_RATES = {"paged_mqa_logits": (8.0, 3.8e6, 650e6, 4e6), "mqa_logits": (8.0, 3.8e6, 880e6, 4e6)}
"""Microseconds a call, and bytes of K, FLOP and bytes of logits a microsecond, of Triton's kernels on an H200."""


@dataclass(frozen=True)
class StepCosts:
    """Microseconds of a step beside its attention kernel. The defaults are guesses, for archs that were not measured.

    Attributes:
        gather, remap, combine: ``(a launch, one row or index element more)``.
        listing: ``(the launches, one reference more)`` of finding and remapping what top-k points at.
        direct_host, gathered_host: the host's time of an eager step, ``(with a pass over top-k, without)``. Measured
            values leave out the host's time of the kernel's call as an op, which is predicted by itself. They may be
            negative: a step skips that op's checks. The guesses include the call.
        referenced_host: the same of a block of the referenced path.
    """

    gather: tuple[float, float] = (8.0, 8e-4)
    remap: tuple[float, float] = (6.0, 5e-6)
    combine: tuple[float, float] = (10.0, 5e-6)
    listing: tuple[float, float] = (60.0, 2e-4)
    direct_host: tuple[float, float] = (70.0, 60.0)
    gathered_host: tuple[float, float] = (90.0, 75.0)
    referenced_host: float = 230.0

    def direct_us(self, kernel_us: float, host_us: float, problem: AttentionProblem, remapped: bool) -> float:
        """A step that reads pages in place. ``remapped``: top-k is made slots in a launch before the kernel."""
        remap = self.remap[0] + self.remap[1] * problem.tokens * problem.extra_width if remapped else 0.0
        return max(_host(problem, self.direct_host[0 if remapped else 1], host_us), remap + kernel_us)

    def gathered_us(self, kernel_us: float, host_us: float, problem: AttentionProblem, indexed: bool) -> float:
        """A step that gathers ``problem.rows`` rows. ``indexed``: the same launch combines top-k to index rows."""
        gather = self.gather[0] + self.gather[1] * problem.rows
        combine = self.combine[1] * problem.tokens * problem.width if indexed else 0.0
        return max(_host(problem, self.gathered_host[0 if indexed else 1], host_us), gather + combine + kernel_us)

    def referenced_us(
        self,
        kernel_us: float,
        host_us: float,
        problem: AttentionProblem,
        blocks: int,
        references: int,
        distinct: float,
        windows: int,
    ) -> float:
        """A step of ``blocks`` calls of ``problem``, each listing ``references`` and gathering ``distinct`` rows."""
        listing = self.listing[0] + self.listing[1] * references
        gather = self.gather[0] + self.gather[1] * distinct
        combine = self.combine[0] + self.combine[1] * problem.tokens * problem.width
        block = listing + gather + combine + kernel_us
        host = _host(problem, blocks * (self.referenced_host + host_us), 0.0)
        return max(host, self.gather[0] + self.gather[1] * windows + blocks * block)


def _host(problem: AttentionProblem, step_us: float, kernel_us: float) -> float:
    return 0.0 if problem.capturing else step_us + kernel_us - HIDDEN_HOST_US


def add_table(arch: str, path: Path) -> None:
    """Say where the measured table of an arch is. Vendors' packages call it when they are imported."""
    _TABLES[arch] = path
    step_costs.cache_clear()
    table_of.cache_clear()


@functools.cache
def step_costs(arch: str) -> StepCosts:
    """The costs of an arch, measured (benchmarks/fit_costs.py) or guessed."""
    table = table_of(arch)
    if table is None:
        return StepCosts()
    host = table["host"]
    by_kind = {f"{path}_host": (host[path]["4"], max(host[path]["1"], host[path]["128"])) for path in _BY_KIND}
    lines = {name: (table[name][0], table[name][1]) for name in ("gather", "remap", "combine", "listing")}
    return StepCosts(**lines, **by_kind, referenced_host=host["referenced"]["4"])


SELECTION_WIDTHS = (2048, 8192, 32768, 131072)
"""Columns at which selections were measured."""


@functools.cache
def table_of(arch: str) -> dict[str, Any] | None:
    """The measured table of an arch, or None."""
    return json.loads(_TABLES[arch].read_text()) if arch in _TABLES else None


def kernel_host_us(problem: AttentionProblem, kernel: str) -> float:
    """The host's microseconds of an eager call of an attention op by a kernel; 0 where it was not measured."""
    table = table_of(problem.arch)
    return 0.0 if table is None else table["host"]["kernels"].get(problem.op, {}).get(kernel, 0.0)


def kernel_us(table: dict[str, Any], op: str, heads: int, tokens: int, width: int, rows: int) -> float:
    """A kernel's time, interpolated: log-log in tokens and rows, linear in width.

    Past the last tokens it grows in proportion; past the ends of the widths the end pieces go on; rows are clamped.
    """
    grid, widths = table[op][str(heads)], table["width"]
    row = min(max(rows, table["rows"][0]), table["rows"][-1])

    def at_width(j: int) -> float:
        return _log_line(table["rows"], lambda i: _at_tokens(table["tokens"], grid[i][j], tokens), row)

    return max(_line(widths, at_width, width), _NARROWEST * at_width(0))


def logits_us(problem: LogitsProblem, call: float, k_rate: float, flop_rate: float, logits_rate: float) -> float:
    """Predicted microseconds of logits: a call, and the slowest of reading K, multiplying, and writing logits."""
    rows = problem.tokens * problem.next_n
    read = (problem.tokens if problem.op == "paged_mqa_logits" else 1) * problem.width * INDEXER_FP8.entry_bytes
    flops = 2.0 * rows * problem.heads * problem.head_dim * problem.width
    return call + max(read / k_rate, flops / flop_rate, 4.0 * rows * problem.width / logits_rate)


def selection_us(grid: Mapping[int, Sequence[float]], problem: SelectionProblem) -> float:
    """Predicted microseconds of a selection from rows as long as the buffer is wide, log-log in rows and columns.

    Past the most rows, and past the widest, it grows in proportion.

    Args:
        grid: rows -> microseconds at ``SELECTION_WIDTHS``.
        problem: of ``topk_transform``.
    """
    rows, widths = list(grid), SELECTION_WIDTHS

    def at_rows(i: int) -> float:
        return _at_tokens(widths, grid[rows[i]], max(problem.width, 1))

    return _at_tokens(rows, [at_rows(i) for i in range(len(rows))], max(problem.tokens, 1))


def _at_tokens(tokens: Sequence[int], us: Sequence[float], at: int) -> float:
    if at >= tokens[-1]:
        return us[-1] * at / tokens[-1]
    return _log_line(tokens, us.__getitem__, max(at, tokens[0]))


def _log_line(xs: Sequence[float], y: Callable[[int], float], at: float) -> float:
    return 2.0 ** _line(xs, lambda i: math.log2(y(i)), at, math.log2)


def _line(
    xs: Sequence[float], y: Callable[[int], float], at: float, scale: Callable[[float], float] = lambda x: x
) -> float:
    """Piecewise linear through the points ``(scale(xs[i]), y(i))``, the end pieces continued. Calls ``y`` twice."""
    right = min(max(bisect.bisect_left(xs, at), 1), len(xs) - 1)
    x0, x1, y0, y1 = scale(xs[right - 1]), scale(xs[right]), y(right - 1), y(right)
    return y0 + (y1 - y0) * (scale(at) - x0) / (x1 - x0)
