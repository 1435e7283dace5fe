"""Decode kernels' times in graphs, as committed, and the problems they are of."""

import json
from pathlib import Path

from dsv4x.common.core.layouts import CacheSpec
from dsv4x.common.dispatch.problem import Problem
from dsv4x.common.kernels.decode_shapes import expected_blocks, num_splits
from dsv4x.cuda.hopper import splitting

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
_MULTIPROCESSORS = 132


def decode_problem(row):
    spec, width = CacheSpec("DSv4", 64, 1024, 37440), {"window": 0, "c128": 8192}.get(row["kind"], row["entries"])
    return Problem(
        "sparse_mla_decode", "cuda", "sm_90", tokens=row["tokens"], heads=row["heads"], width=128, extra_width=width,
        entries=128 + row["entries"], lse=False, capturing=True, caches=(spec,) * (1 + bool(width)), interpreter=False,
    )  # fmt: skip


def decode_rows():
    """Those of more than 16 heads, and of fewer those whose rows were split as they are now."""
    many, few = (
        json.loads((RESULTS / name).read_text())["rows"] for name in ("decode-choice-h100.json", "decode-few-h200.json")
    )
    found = [row for row in many if row["captured"] and not splitting.few(row["heads"])]
    for row in few:
        asked = decode_problem(row)
        blocks = expected_blocks(asked.entries, (asked.width, asked.extra_width), splitting.BLOCK_ENTRIES)
        batch = splitting.batch_of(asked.tokens, asked.heads, _MULTIPROCESSORS, True)
        if num_splits(batch, blocks) == row["splits"]:
            found.append(row)
    return found
