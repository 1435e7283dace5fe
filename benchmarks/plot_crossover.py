"""Draw where one path overtakes another, measured and predicted, from a prefill benchmark's rows.

Usage: python benchmarks/plot_crossover.py benchmarks/results/prefill-<gpu>.json docs/crossover.svg
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 420, 300, 48
COLOURS = {"direct": "#c0392b", "gathered": "#2471a3", "referenced": "#1e8449"}
PANELS = ((64, 0), (64, 131072), (64, 1048576), (128, 0), (128, 131072), (128, 1048576))


def panel(rows: list[dict], heads: int, prefix: int, x0: int, y0: int) -> list[str]:
    chosen = [r for r in rows if (r["heads"], r["prefix"], r["ratio"], r["requests"]) == (heads, prefix, 4, 1)]
    chosen.sort(key=lambda r: r["tokens"])
    low, high = math.log10(10), math.log10(40000)
    first, last = math.log2(chosen[0]["tokens"]), math.log2(chosen[-1]["tokens"])

    def point(row: dict, us: float) -> str:
        x = x0 + MARGIN + (math.log2(row["tokens"]) - first) / (last - first) * (WIDTH - 2 * MARGIN)
        y = y0 + HEIGHT - MARGIN - (math.log10(us) - low) / (high - low) * (HEIGHT - 2 * MARGIN)
        return f"{x:.1f},{y:.1f}"

    drawn = [f'<text x="{x0 + MARGIN}" y="{y0 + 30}">H = {heads}, prefix {prefix >> 10}K tokens</text>']
    for row in chosen:
        x = point(row, 10).split(",")[0]
        label = f"{row['tokens'] // 1024}K" if row["tokens"] >= 1024 else row["tokens"]
        drawn.append(f'<text x="{x}" y="{y0 + HEIGHT - 28}" text-anchor="middle">{label}</text>')
    for us in (10, 100, 1000, 10000):
        y = point(chosen[0], us).split(",")[1]
        drawn.append(f'<line x1="{x0 + MARGIN}" x2="{x0 + WIDTH - MARGIN}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        drawn.append(f'<text x="{x0 + MARGIN - 4}" y="{y}" text-anchor="end">{us}</text>')
    for path, colour in COLOURS.items():
        measured = " ".join(point(r, r[path]) for r in chosen)
        predicted = " ".join(point(r, r[f"predicted_{path}"]) for r in chosen)
        drawn.append(f'<polyline points="{measured}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn.append(f'<polyline points="{predicted}" fill="none" stroke="{colour}" stroke-dasharray="4 3"/>')
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("svg", type=Path)
    arguments = parser.parse_args()
    rows = json.loads(arguments.rows.read_text())["rows"]
    drawn = []
    for i, (heads, prefix) in enumerate(PANELS):
        drawn += panel(rows, heads, prefix, i % 3 * WIDTH, i // 3 * HEIGHT)
    colours = "red: direct, blue: gathered, green: referenced"
    legend = f"us a C4 step over query tokens; {colours}; solid: measured, dashed: predicted"
    drawn.append(f'<text x="{MARGIN}" y="{2 * HEIGHT + 12}">{legend}</text>')
    size = f'width="{3 * WIDTH}" height="{2 * HEIGHT + 24}"'
    style = 'font-family="sans-serif" font-size="11"'
    body = "\n".join(drawn)
    arguments.svg.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n')


if __name__ == "__main__":
    main()
