"""What an AMD kernel executes in one iteration of each loop that holds matrix products, read from its assembly.

The body of a loop is the shortest way through all its blocks with products and back. So what a wave skips when no lane
wants it counts as run, and a branch around the products does not.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import compiling

MFMA_CYCLES = {"16x16": 16, "32x32": 32}
"""Cycles a SIMD's matrix unit takes for a bf16 product of the largest K an arch has, by the ISA's manuals."""
ISSUE_CYCLES = 4
"""Cycles between two instructions of one wave, which is all that a SIMD has where registers leave room for one."""
LDS_BYTES_A_CYCLE = 128
"""That a compute unit's LDS reads or writes."""
_LDS_BYTES = {"u8": 1, "u16": 2, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16}
_LANES = 64


@dataclass(frozen=True)
class Loop:
    """One iteration of a loop, as one wave executes it.

    Attributes:
        names: how often each instruction is executed.
    """

    names: Counter[str] = field(default_factory=Counter)

    @property
    def instructions(self) -> int:
        return self.names.total()

    def count(self, pattern: str) -> int:
        """How many instructions' names match from their beginning."""
        return sum(number for name, number in self.names.items() if re.match(pattern, name))

    @property
    def narrow_reads(self) -> int:
        """Reads of LDS of one or two bytes a lane."""
        return self.count(r"ds_read_u(8|16)")

    @property
    def wide_multiplies(self) -> int:
        """Integer products of 32 bits, which take four times as long as other instructions."""
        return self.count(r"v_mul_(lo|hi)_[ui]32|v_mad_[ui]64")

    @property
    def lds_bytes(self) -> int:
        """Bytes of LDS that a wave reads and writes."""
        total = 0
        for name, number in self.names.items():
            if match := re.match(r"ds_(?:read|write)(2)?(?:st64)?_(u8|u16|b8|b16|b32|b64|b96|b128)", name):
                total += number * _LANES * _LDS_BYTES[match.group(2)] * (2 if match.group(1) else 1)
        return total

    @property
    def products(self) -> dict[str, int]:
        """Matrix instructions by kind: ``{"16x16x16_bf16": 64}``."""
        found: Counter[str] = Counter()
        for name, number in self.names.items():
            if match := re.match(r"v_mfma_(?:scale_)?f32_(\w+)", name):
                found[match.group(1)] += number
        return dict(sorted(found.items()))

    @property
    def issue_cycles(self) -> int:
        return ISSUE_CYCLES * self.instructions

    @property
    def lds_cycles(self) -> int:
        """Of a compute unit's LDS, for one of its four SIMDs' waves; what lanes share counts for each."""
        return self.lds_bytes // LDS_BYTES_A_CYCLE * 4

    @property
    def matrix_cycles(self) -> int:
        return sum(MFMA_CYCLES[kind[:5]] * number for kind, number in self.products.items())


@dataclass(frozen=True)
class _Block:
    names: list[str]
    next: list[int]


def _blocks(assembly: str) -> list[_Block]:
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label.group(1)] = len(code)
        elif found := re.match(r"\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)", line):
            code.append((found.group(1), found.group(2).strip()))
    jumps = [number for number, (name, _) in enumerate(code) if re.match(r"s_(c?branch|endpgm|setpc)", name)]
    starts = sorted({0, *(at for at in labels.values() if at < len(code)), *(at + 1 for at in jumps)} - {len(code)})
    index = {start: number for number, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(code)]):
        name, operands = code[end - 1]
        follows = [index[end]] if end in index else []
        target = labels.get(operands.split()[-1]) if operands else None
        there = [index[target]] if name.startswith(("s_branch", "s_cbranch")) and target in index else []
        if name.startswith(("s_branch", "s_endpgm", "s_setpc")):
            follows = []
        elif name == "s_cbranch_execz":
            there = []
        blocks.append(_Block([each for each, _ in code[start:end]], follows + there))
    return blocks


def _way(blocks: list[_Block], begin: int, end: int) -> list[int] | None:
    """Blocks of the shortest way from behind ``begin`` up to and with ``end``."""
    heap = [(len(blocks[at].names), at, (at,)) for at in blocks[begin].next]
    heapq.heapify(heap)
    seen = set()
    while heap:
        length, at, way = heapq.heappop(heap)
        if at == end:
            return list(way)
        if at not in seen:
            seen.add(at)
            for to in blocks[at].next:
                heapq.heappush(heap, (length + len(blocks[to].names), to, (*way, to)))
    return None


def loops(assembly: str) -> list[Loop]:
    """The loops with matrix products, in the order of the code."""
    blocks = _blocks(assembly)
    left = [at for at, block in enumerate(blocks) if any(name.startswith("v_mfma") for name in block.names)]
    found = []
    while left:
        first = left.pop(0)
        if _way(blocks, first, first) is None:
            continue
        around = [first, *(at for at in left if _way(blocks, first, at) and _way(blocks, at, first))]
        left = [at for at in left if at not in around]
        ways = (_way(blocks, begin, end) for begin, end in zip(around, [*around[1:], first]))
        found.append(_loop(blocks, (at for way in ways for at in way or ())))
    return found


def _loop(blocks: list[_Block], way: Iterable[int]) -> Loop:
    names: Counter[str] = Counter()
    for at in way:
        names.update(blocks[at].names)
    return Loop(names)


PRODUCTS = (
    "decode_kernel", "prefill_kernel", "decode_cdna_kernel", "prefill_cdna_kernel",
    "paged_mqa_logits_kernel", "scheduled_mqa_logits_kernel", "mqa_logits_kernel",
)  # fmt: skip
"""The kernels with matrix products."""


def product_cases(arch: str) -> list[tuple[compiling.Case, bool]]:
    """(case, far) of every compilation with matrix products, caches and workspaces below 2 GiB and not."""
    found = [case for case in compiling.cases(arch) if case.name.split("[")[0] in PRODUCTS]
    return [(case, far) for case in found for far in (False, True)]


@dataclass(frozen=True)
class Static:
    """What a compilation says of a kernel's speed.

    Attributes:
        vgpr, lds, spills: vector registers of a lane, accumulators among them; bytes of LDS; registers spilled.
        waves: waves a SIMD holds, as registers and LDS allow.
        loops: its loops with matrix products.
        issue, matrix, exchange: cycles a compute unit takes for 64 entries and 64 heads, loop by loop: to issue the
            instructions of its waves, one wave after the other, to multiply, and to read and write LDS. Logits: for 64
            entries and the case's heads.
    """

    vgpr: int
    lds: int
    spills: int
    waves: int
    loops: list[Loop]
    issue: list[int]
    matrix: list[int]
    exchange: list[int]

    @property
    def bound(self) -> list[int]:
        """The largest of the three, loop by loop."""
        return list(map(max, self.issue, self.matrix, self.exchange))

    @property
    def cells(self) -> list[str]:
        """The columns of docs/gfx.md from the registers on."""
        kinds = sorted({kind for loop in self.loops for kind in loop.products})
        numbers = (
            [loop.instructions for loop in self.loops],
            [loop.narrow_reads for loop in self.loops],
            [loop.wide_multiplies for loop in self.loops],
            self.issue,
            self.matrix,
            self.exchange,
        )
        fixed = (self.vgpr, self.lds, self.spills, self.waves)
        return [*map(str, fixed), ", ".join(kinds), *(" / ".join(map(str, each)) for each in numbers)]


def measure(case: compiling.Case, arch: str, far: bool) -> Static:
    """Compile and count."""
    compiled = compiling.compile_case(case, arch, far)
    report, assembly = compiling.amd_report(compiled), compiled.asm["amdgcn"]
    found, warps = loops(assembly), case.options["num_warps"]
    occupancy = re.search(r"Occupancy:\s+(\d+)", assembly)
    assert occupancy is not None, "no occupancy in the assembly"
    waves = min(int(occupancy.group(1)), compiling.SHARED_LIMIT[arch] // max(1, report["lds"]) * warps // 4)
    constants = case.constants
    if "BLOCK_H" in constants:
        times = 64 / constants["BLOCK_K"] * 64 / constants["BLOCK_H"] * warps / 4
    else:
        times = 64 / constants["BLOCK"] * warps / 4
    issue, matrix, exchange = ([round(times * each) for each in cycles] for cycles in (
        [loop.issue_cycles for loop in found],
        [loop.matrix_cycles for loop in found],
        [loop.lds_cycles for loop in found],
    ))  # fmt: skip
    return Static(report["vgpr"], report["lds"], report["spills"], waves, found, issue, matrix, exchange)


HEAD = (
    "arch", "kernel", "2 GiB", "VGPR", "LDS", "spills", "waves", "MFMA", "instructions", "narrow reads",
    "wide products", "issue", "multiply", "LDS cycles",
)  # fmt: skip


def row(arch: str, case: compiling.Case, far: bool) -> str:
    """A row of docs/gfx.md."""
    cells = (arch, case.name, "above" if far else "below", *measure(case, arch, far).cells)
    return "| " + " | ".join(cells) + " |"


GPUS = {"gfx942": (304, 2100), "gfx950": (256, 2400)}
"""Compute units of an MI300X and an MI355X, and their peak clock in MHz."""
WORK = ((64, 128, 512), (128, 128, 1024))
"""Heads, entries of the window and compressed entries of 4096 tokens."""
_DECODE = "[H=64,DSv4+DSv4,split=False,local=True]"
PREDICTED = (
    ("decode", f"decode_kernel{_DECODE}", f"decode_cdna_kernel{_DECODE}"),
    ("prefill", "prefill_kernel[H<=128,D=512]", "prefill_cdna_kernel[H=64,given=True]"),
)
"""An op's name and its kernels' cases, Triton's and Gluon's."""


def predicted_us(arch: str, static: Static, heads: int, window: int, extra: int) -> float:
    """A bound from below of 4096 tokens on a whole GPU: nothing is waited for."""
    units, mhz = GPUS[arch]
    bound = static.bound if len(static.bound) == 2 else static.bound * 2
    return 4096 * heads / 64 * (window * bound[0] + extra * bound[1]) / 64 / units / mhz


def predictions() -> list[str]:
    """The rows of docs/gfx.md's first table: microseconds below / above 2 GiB, a column an arch and a kernel."""
    measured = {
        (arch, case.name, far): measure(case, arch, far)
        for arch in GPUS
        for case, far in product_cases(arch)
        if any(case.name in names for _, *names in PREDICTED)
    }
    found = []
    for op, *names in PREDICTED:
        for work in WORK:
            cells = [
                " / ".join(f"{predicted_us(arch, measured[arch, name, far], *work):.0f}" for far in (False, True))
                for arch in GPUS
                for name in names
            ]
            found.append(f"| {op}, {work[0]} heads, {sum(work[1:])} entries | " + " | ".join(cells) + " |")
    return found
