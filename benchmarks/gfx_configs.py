"""Chooses the decode kernel's launch shapes for AMD GPUs by compiling, and writes what each compiles to.

No AMD GPU is needed or used: nothing here is a timing. A candidate must fit the arch's LDS, must not spill and must use
MFMA, with Triton 3.6 as with 3.9; among those the one with the least estimated issue time an entry and head is taken,
one for all layouts of a kind. The estimate counts the hottest loop, 16 cycles an MFMA and 4 another instruction,
side by side where two waves fit a SIMD and one after the other where one does. Of V4's layouts it is the variant that
makes slots of top-k itself.

Usage: python benchmarks/gfx_configs.py [--choose] --out docs/gfx.md
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import re
import sys
from collections import Counter
from pathlib import Path

import triton

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import compiling

from dsv4x.common.core.layouts import BF16_512, BF16_576, DSV4, DSV32, DSV41_FP4, DSV41_FP8, TRTLLM_NATIVE, CacheLayout
from dsv4x.common.kernels import decode
from dsv4x.common.kernels import decode_shapes as config
from dsv4x.common.kernels.entries import entry_format

ARCHS = ("gfx942", "gfx950")
HEADS = (16, 64)
PAIRS = (
    (DSV4.with_flavour("e4m3fnuz"), DSV4),
    (DSV41_FP8, DSV41_FP4),
    (BF16_512, BF16_512),
    (DSV32, TRTLLM_NATIVE),
    (BF16_576, BF16_576),
)
CANDIDATES = [
    config.AttentionConfig(block_h, block_k, warps, 1, 16)
    for block_h, block_k, warps in itertools.product((16, 32, 64), (16, 32), (4, 8))
]


def hottest_loop(assembly: str) -> Counter[str]:
    """Instructions of the longest loop, counted by kind: mfma, other."""
    lines = assembly.splitlines()
    labels: dict[str, int] = {}
    longest: Counter[str] = Counter()
    for number, line in enumerate(lines):
        if label := re.match(r"(\.LBB\d+_\d+):", line):
            labels[label.group(1)] = number
        jump = re.match(r"\s+s_c?branch\S*\s+(\.LBB\d+_\d+)", line)
        if jump and jump.group(1) in labels:
            body = lines[labels[jump.group(1)] : number]
            names = [m.group(1) for x in body if (m := re.match(r"\s+((?:v|s|ds|global|buffer|flat)_\w+)", x))]
            count = Counter("mfma" if name.startswith("v_mfma") else "other" for name in names)
            longest = max(longest, count, key=lambda c: c.total())
    return longest


def measure(arch: str, pair: tuple[CacheLayout, CacheLayout], heads: int, shape: config.AttentionConfig) -> dict:
    """What the kernel compiles to in one shape; empty where it does not compile."""
    swa, extra = pair
    constants = {
        "HAS_SWA_LENS": True, "HAS_EXTRA": True, "HAS_EXTRA_LENS": True, "HAS_SINK": True, "SPLIT": True,
        "EARLY": decode.depends_early(arch),
        "BLOCK_H": shape.block_h, "BLOCK_K": shape.block_k, "VALUE_DIM": 512, "TAIL": swa.head_dim - 512,
        "WIDE": False, "LOCAL": swa.head_dim == 512, "SWA": entry_format(swa, arch), "EXTRA": entry_format(extra, arch),
    }  # fmt: skip
    case = compiling.Case(decode.decode_kernel, constants, shape.options, compiling.ATTENTION_OUT)
    try:
        compiled = compiling.compile_case(case, arch)
    except (triton.CompilationError, RuntimeError, triton.runtime.errors.OutOfResources):
        return {}
    assembly = compiled.asm["amdgcn"]
    report = compiling.amd_report(compiled)
    occupancy = re.search(r"Occupancy:\s+(\d+)", assembly)
    assert occupancy is not None, "no occupancy in the assembly"
    waves = min(int(occupancy.group(1)), compiling.SHARED_LIMIT[arch] // max(1, report["lds"]) * shape.num_warps // 4)
    loop = hottest_loop(assembly)
    matrix, other = 16 * loop["mfma"], 4 * loop["other"]
    cycles = (max(matrix, other) if waves > 1 else matrix + other) * shape.num_warps / 4
    report |= {"waves": waves, "cycles": cycles / (shape.block_k * min(shape.block_h, heads))}
    return report


def usable(arch: str, report: dict) -> bool:
    return (
        bool(report) and not report["spills"] and report["mfma"] > 0 and report["lds"] <= compiling.SHARED_LIMIT[arch]
    )


def row(arch: str, pair: tuple[CacheLayout, CacheLayout], heads: int, shape: config.AttentionConfig) -> str:
    report = measure(arch, pair, heads, shape)
    fields = (
        arch, f"{pair[0].name} + {pair[1].name}", heads, shape.block_h, shape.block_k, shape.num_warps,
        report["vgpr"], report["agpr"], report["lds"], report["spills"], report["waves"],
        report["mfma"], f"{report['cycles']:.2f}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, fields)) + " |"


def other_products() -> list[tuple[str, str]]:
    """(arch, case) of the kernels with matrix products besides decode."""
    found = ((arch, case.name) for arch in ARCHS for case in compiling.cases(arch))
    return [(arch, name) for arch, name in found if name.startswith(("prefill", "paged_mqa_logits", "mqa_logits"))]


def other_row(arch: str, name: str) -> str:
    case = next(case for case in compiling.cases(arch) if case.name == name)
    report = compiling.amd_report(compiling.compile_case(case, arch))
    fields = (arch, name, case.options["num_warps"], *(report[k] for k in ("vgpr", "agpr", "lds", "spills", "mfma")))
    return "| " + " | ".join(map(str, fields)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="compile every candidate and print the best")
    parser.add_argument("--out", type=Path, help="write the table of the configurations in use here")
    arguments = parser.parse_args()
    jobs = [(arch, pair, heads) for arch in ARCHS for pair in PAIRS for heads in HEADS]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        if arguments.choose:
            for arch, pair, heads in jobs:
                shapes = [c for c in CANDIDATES if c.block_h <= heads]
                reports = pool.map(measure, *zip(*((arch, pair, heads, c) for c in shapes)))
                ranked = sorted(
                    ((r["cycles"], repr(c), r) for c, r in zip(shapes, reports) if usable(arch, r)), key=lambda x: x[:2]
                )
                print(arch, pair[0].name, "+", pair[1].name, heads, "heads", flush=True)
                for cycles, shape, report in ranked[:4]:
                    print(f"  {cycles:.2f} {shape} {report}", flush=True)
        head = (
            "arch", "layouts", "heads", "heads a program", "entries a step", "warps",
            "VGPR", "AGPR", "LDS", "spills", "waves a SIMD", "MFMA", "cycles",
        )  # fmt: skip
        table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        chosen = [(arch, pair, heads, config.decode_config(arch, heads, pair)) for arch, pair, heads in jobs]
        table += pool.map(row, *zip(*chosen))
        others = ["| arch | kernel | warps | VGPR | AGPR | LDS | spills | MFMA |", "|" + "---|" * 8]
        others += pool.map(other_row, *zip(*other_products()))
    if arguments.out:
        notes = (__doc__ or "").split("\n\n")[1]
        arguments.out.write_text(
            "# The decode kernel on AMD GPUs, as compiled\n\n"
            f"Written by `benchmarks/gfx_configs.py` with Triton {triton.__version__}; no AMD GPU was used.\n\n"
            f"{notes}\n\n"
            "VGPR counts AGPRs in; LDS is in bytes; cycles are the estimate, an entry and head.\n\n"
            + "\n".join(table)
            + "\n\nThe other kernels with matrix products, as tests/compiling.py compiles them: prefill by heads and\n"
            "head dim, logits by q's encoding, K's, rows a program (None where K is flat) and whether pages are read\n"
            "whole.\n\n" + "\n".join(others) + "\n"
        )
    else:
        print("\n".join([*table, *others]))


if __name__ == "__main__":
    main()
