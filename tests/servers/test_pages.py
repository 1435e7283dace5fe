"""What the servers' pages show is what their files say."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def results(name):
    return [row for row in json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["rows"] if "ratio" in row]


def cell(row, server="sglang"):
    theirs, ours = row["us"][server], row["us"]["dsv4x"]
    digits = 0 if theirs >= 100 else 1
    return f"{theirs:.{digits}f} / {ours:.{digits}f} ({ours / theirs:.2f})"


def test_the_tables_of_sglangs_page_are_its_files():
    page = (ROOT / "docs/servers/sglang.md").read_text()
    shown = re.findall(r"^\| (?:decode|verify|extend) \|.*\|$", page, re.MULTILINE)
    shapes = {}
    for row in results("servers-sglang-h100"):
        if row["captured"] or row["piece"] == "extend":
            key = (row["piece"], row["heads"], row["tokens"], row["context"])
            shapes.setdefault(key, {})[row["ratio"]] = cell(row)
    rows = [
        f"| {' | '.join(map(str, shape))} | {cells[0]} | {cells[4]} | {cells[128]} |" for shape, cells in shapes.items()
    ]
    assert sorted(shown) == sorted(rows)


def test_what_sglangs_page_counts():
    page = " ".join((ROOT / "docs/servers/sglang.md").read_text().split())
    rows = results("servers-sglang-h100")
    behind = [row for row in rows if row["of_sglang"] > 1]
    assert f"Of {len(rows)} calls dsv4x is behind in {len(behind)}. There" in page
    decode = [row["of_sglang"] for row in rows if row["piece"] != "extend" and not row["captured"]]
    ahead = [ratio for ratio in decode if ratio <= 1]
    assert f"{min(ahead):.2f} to {max(ahead):.2f} of SGLang's time in {len(ahead)} of {len(decode)} calls" in page
    errors = max(error for row in rows for error in row["error"].values())
    assert f"within {errors:.4f} of the float32 oracle" in page
    captured = [r["of_sglang"] for r in behind if r["captured"]]
    assert len(captured) == 2
    assert f"{max(captured):.2f} at one request, {min(captured):.2f} at 64." in page


def test_the_table_of_vllms_page_is_its_files():
    page = (ROOT / "docs/servers/vllm.md").read_text()
    shown = re.findall(r"^\| (?:decode|verify) \|.*\|$", page, re.MULTILINE)
    shapes, behind, every = {}, [], []
    for heads in (64, 16):
        rows = results(f"servers-vllm-h100-{heads}")
        every += rows
        for row in rows:
            if row["captured"]:
                shapes.setdefault((row["piece"], heads, row["tokens"], row["context"]), {})[row["ratio"]] = row
                behind += [row] * (row["of_vllm"] > 1)
    wanted = [
        f"| {' | '.join(map(str, shape))} | {' | '.join(cell(rows[ratio], 'vllm') for ratio in (0, 4, 128))} |"
        for shape, rows in shapes.items()
    ]
    assert sorted(shown) == sorted(wanted)
    assert (len(behind), 3 * len(shapes)) == (3, 54)
    assert "behind in three of 54" in page
    assert f"within {max(row['gap'] for row in every):.1e} of vLLM's" in page
