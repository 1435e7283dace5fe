"""Chooses the decode kernel's launch shapes for AMD GPUs by compiling, and writes what every product compiles to.

No AMD GPU was used for anything here, and nothing is a timing. A candidate must fit the arch's LDS, must not spill with
Triton 3.9 and must use MFMA. Among those the one with the least estimated issue time is taken, one for all layouts of a
kind, the slower of both kinds of pointers. Cycles are what a compute unit takes for 64 entries and 64 heads: 4 for an
instruction of each of its waves, which take turns, 16 or 32 of the matrix unit for a product, and one of LDS for 128
bytes. The largest of the three bounds a step from below. What a wave waits for is in none. Logits are for 64 entries
and 64 heads of one row.

Usage: python benchmarks/gfx_configs.py [--choose] --out docs/gfx.md
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import sys
from pathlib import Path

import triton

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import census
import compiling

from dsv4x.common.core.layouts import BF16_512, BF16_576, DSV4, DSV32, DSV41_FP4, DSV41_FP8, TRTLLM_NATIVE, CacheLayout
from dsv4x.common.kernels import decode, order
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


LEGEND = """`tests/test_compile.py` compiles all of it again and holds every number.

- **kernel**: decode by heads, both layouts, splits and local rows; prefill by heads and head dim; logits by q's
  encoding, K's, rows of a program (None where K is flat) and whether pages are read whole, or columns are relative.
  `cdna` kernels are the Gluon ones of `dsv4x/rocm/cdna/`, which run by name only (`kernel="gluon"`).
- **2 GiB**: whether the caches, or the workspace, are below or above. Triton's HIP backend compiles for that: below, it
  takes 32-bit offsets. All other tensors are below.
- **VGPR** counts accumulators in; **LDS** is in bytes; **waves** are those a SIMD holds.
- The others are of an iteration of a loop as one wave executes it, the window's / the compressed entries'. **Narrow
  reads** are LDS reads of one or two bytes, **wide products** 32-bit integer ones, which take four times as long."""

GLUON = """## Triton's kernels and Gluon's

Microseconds of 4096 tokens by these cycles, on all compute units of an MI300X (304 at 2.1 GHz) and an MI355X (256 at
2.4 GHz), caches below / above 2 GiB. They are bounds from below: neither memory nor any other wait is in them, and
nobody has measured how far above them a GPU is.

{table}

`kernel="gluon"` never ran on an AMD GPU, so nothing picks it by itself. Its bodies ran on numpy against the oracle
(`tests/test_cdna.py`), which does not see a barrier that is missing or an instruction that does something else. On an
MI300X or MI355X one command tries it, and prints times beside Triton's:

```bash
python tests/require_device.py rocm && python -m pytest -s -m gpu -k "gluon or cdna"
```

A Gluon kernel takes all the registers its waves can have. With Triton 3.9 it spills none on gfx942. On gfx950 it spills
up to 24, of which at most 3 are loaded again inside a loop; over fnuz pages, which gfx950 does not convert, up to 110.
With Triton 3.6 kernels of 64 heads spill 110 to 220, and take 1.4 to 1.8 times the instructions."""


def range_of(arch: str) -> range:
    """Numbers of the arch's cases, since kernels are not sent to other processes."""
    return range(len(census.product_cases(arch)))


def numbered_row(arch: str, number: int) -> str:
    return census.row(arch, *census.product_cases(arch)[number])


def cycles_of(arch: str, pair: tuple[CacheLayout, CacheLayout], heads: int, shape: config.AttentionConfig) -> float:
    """Estimated cycles of both scopes' loops an entry and head in use; infinite for a shape that cannot be taken."""
    swa, extra = pair
    constants = {
        "HAS_SWA_LENS": True, "HAS_EXTRA": True, "HAS_EXTRA_LENS": True, "HAS_SINK": True, "SPLIT": True,
        "EARLY": decode.depends_early(arch),
        "BLOCK_H": shape.block_h, "BLOCK_K": shape.block_k, "VALUE_DIM": 512, "TAIL": swa.head_dim - 512,
        "WIDE": False, "LOCAL": swa.head_dim == 512, "SWA": entry_format(swa, arch), "EXTRA": entry_format(extra, arch),
        "SWA_PAGE": 64, "EXTRA_PAGE": 64, "DIES": order.dies(arch),
    }  # fmt: skip
    case = compiling.Case(decode.decode_kernel, constants, shape.options, compiling.ATTENTION_OUT)
    worst = 0.0
    for far in (False, True):
        try:
            static = census.measure(case, arch, far)
        except (triton.CompilationError, RuntimeError, triton.runtime.errors.OutOfResources):
            return float("inf")
        if static.spills or static.lds > compiling.SHARED_LIMIT[arch] or not all(static.matrix):
            return float("inf")
        blocks = -(-heads // shape.block_h) * shape.block_h / 64
        worst = max(worst, sum(static.bound) * blocks)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="compile every candidate and print the best")
    parser.add_argument("--out", type=Path, help="write the table of the configurations in use here")
    arguments = parser.parse_args()
    jobs = [(arch, pair, heads) for arch in ARCHS for pair in PAIRS for heads in HEADS]
    products = [(arch, number) for arch in ARCHS for number in range_of(arch)]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        if arguments.choose:
            for arch, pair, heads in jobs:
                shapes = [c for c in CANDIDATES if c.block_h <= heads]
                found = pool.map(cycles_of, *zip(*((arch, pair, heads, c) for c in shapes)))
                ranked = sorted(zip(found, map(repr, shapes)))
                print(arch, pair[0].name, "+", pair[1].name, heads, "heads", flush=True)
                for cycles, shape in ranked[:4]:
                    print(f"  {cycles:.0f} {shape}", flush=True)
        table = ["| " + " | ".join(census.HEAD) + " |", "|" + "---|" * len(census.HEAD)]
        table += pool.map(numbered_row, *zip(*products))
    predicted = ["| | gfx942 Triton | gfx942 Gluon | gfx950 Triton | gfx950 Gluon |", "|" + "---|" * 5]
    gluon = GLUON.format(table="\n".join([*predicted, *census.predictions()]))
    if not arguments.out:
        print("\n".join([*table, "", gluon]))
        return
    notes = (__doc__ or "").split("\n\n")[1]
    arguments.out.write_text(
        "# The kernels with matrix products on AMD GPUs, as compiled\n\n"
        f"Written by `benchmarks/gfx_configs.py` with Triton {triton.__version__}.\n\n{notes}\n\n{LEGEND}\n\n"
        f"{gluon}\n\n## All of them\n\n" + "\n".join(table) + "\n"
    )


if __name__ == "__main__":
    main()
