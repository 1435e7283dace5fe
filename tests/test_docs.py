"""The docs' examples run and are right, and what the docs name is there."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from measured import decode_rows
from tolerances import check_decode, check_prefill

import dsv4x

ROOT = Path(__file__).parent.parent
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md"])
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
int32 = partial(torch.tensor, dtype=torch.int32)


def example(name):
    """What the python blocks of a page leave behind, run one after another."""
    torch.manual_seed(20260930)
    made = {}
    for block in FENCE.findall((ROOT / name).read_text()):
        exec(compile(block, name, "exec"), made)
    return made


def padded(rows, device):
    width = max(1, *map(len, rows))
    return int32([row + [-1] * (width - len(row)) for row in rows], device=device)


def expected(q, pools, queries, lengths, ratio, selected):
    """float64 attention by the oracle, over slots made here from positions and block tables."""
    swa, extra = [], []

    def slots(pool, request, entries):
        table, page = pool[1], pool[0].page_size
        return [int(table[request, entry // page]) * page + entry % page for entry in entries]

    for request, (count, length) in enumerate(zip(queries, lengths)):
        for p in range(length - count, length):
            visible = max(0, p + 1) // ratio
            chosen = (
                range(visible) if selected is None else [e for e in selected[len(swa)].tolist() if 0 <= e < visible]
            )
            swa.append(slots(pools[0], request, range(max(0, p - 127), p + 1)))
            extra.append(slots(pools[1], request, chosen) if len(pools) > 1 else [])
    swa, extra = (padded(rows + [[]] * (len(q) - len(rows)), q.device) for rows in (swa, extra))
    scopes = (pools[0][0], swa, None, *((pools[1][0], extra, None) if len(pools) > 1 else ()))
    return dsv4x.reference.sparse_mla_decode(q, *scopes, dtype=torch.float64)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request, monkeypatch):
    """The device that the examples find."""
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return request.param


def test_the_graphs_example_is_right_at_every_length(where):
    made = example("docs/graphs.md")
    assert made["device"] == where
    pools = {name: (made[name], made[f"{name}_table"]) for name in ("swa", "c4", "c128")}
    for queries, lengths in (
        ([3, 0, 1, 1], [130, 0, 0, 1000]),
        ([1, 1, 1, 1], [700, 5, 4096, 129]),
        ([0, 4, 0, 2], [9, 4, 77, 2050]),
        ([2, 1, 2, 1], [0, 1, 2, 3]),
        ([3, 1, 1, 1], [2, 600, 1, 4]),
    ):
        made["serve"](queries, lengths)
        for ratio, kind in ((1, []), (4, [pools["c4"]]), (128, [pools["c128"]])):
            selected = made["topk_indices"] if ratio == 4 else None
            want = expected(made["q"], [pools["swa"], *kind], queries, lengths, ratio, selected)
            check_decode(made["out"][ratio], made["lse"][ratio], *want)
    made["serve"]([1, 1, 1, 1], [4097, 4096, 9, 9])
    assert made["step"].clamped.item() == 1


def test_the_readmes_example_is_right(where):
    made = example("README.md")
    assert made["device"] == where
    pools = {name: (made[name], made[f"{name}_table"]) for name in ("swa", "c4", "c128")}
    queries, lengths = made["query_start_loc"].diff().tolist(), made["seq_lens"].tolist()
    for ratio, kind in ((1, []), (4, [pools["c4"]]), (128, [pools["c128"]])):
        selected = made["topk_indices"] if ratio == 4 else None
        want = expected(made["q"], [pools["swa"], *kind], queries, lengths, ratio, selected)
        cache = kind[0][0] if kind else None
        taken = dsv4x.explain_step(made["q"], made["swa"], cache, made["step"][ratio], selected).chosen
        check = check_decode if taken == "direct" else check_prefill
        check(*made["results"][ratio], *want)


def sentences(text):
    """The sentences of a page's prose: paragraphs and lists, without code, tables and headings."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = []
    for block in re.split(r"\n\s*\n|\n(?=- )", text):
        prose = " ".join(line for line in block.splitlines() if not line.startswith(("|", "#", "![")))
        found += [each for each in re.split(r"(?<=[.!?:])[*_]*\s+", prose) if re.search(r"\w", each)]
    return found


@pytest.mark.parametrize("name", ["architecture", "graphs", "performance"])
def test_pages_are_read_once(name):
    text = (ROOT / f"docs/{name}.md").read_text()
    words = {sentence: len(sentence.split()) for sentence in sentences(text)}
    assert len(words) > 30
    assert sum(words.values()) / len(words) <= 20
    assert [sentence for sentence, count in words.items() if count > 35] == []


def test_sentences_are_told_apart():
    text = "# No words here\n\nOne of four words. **Two.** Three\nlines.\n\n- A list.\n- Of two.\n\n"
    text += "```\ncode. x\n```\n| a. b |\n"
    assert sentences(text) == ["One of four words.", "**Two.", "Three lines.", "- A list.", "- Of two."]


def test_the_map_is_short_and_has_no_figures():
    text = (ROOT / "docs/architecture.md").read_text()
    assert len(text.splitlines()) <= 150
    measured = r"\d[\d .]*(us|ms|%|[KMG]i?B|TB/s|TFLOP/s|times)(?![\w])"
    assert re.findall(measured, text) == []
    assert re.search(measured, "takes 2.7 us")


def test_what_the_docs_name_is_there():
    missing = []
    for page in DOCS:
        text = page.read_text()
        links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
        named = re.findall(r"`((?:docs|tests|benchmarks|dsv4x)/[\w./-]*\w/?)(?:::\w+)?`", text)
        missing += [f"{page.name}: {link}" for link in links if not (page.parent / link).exists()]
        missing += [f"{page.name}: {name}" for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_the_map_shows_every_module_and_nothing_else():
    rooms = re.search(r"^```\n(dsv4x/.*?)^```$", (ROOT / "docs/architecture.md").read_text(), re.M | re.S).group(1)
    words = set(re.findall(r"\w+", rooms))
    modules = {file.stem for file in (ROOT / "dsv4x").rglob("*.py") if "demo" not in file.parts} - {"__init__"}
    assert modules - words == set()
    folders = re.findall(r"^( *)(\w+)/", rooms, re.MULTILINE)
    at = [ROOT]
    for indent, folder in folders:
        at[len(indent) // 2 + 1 :] = [at[len(indent) // 2] / folder]
        assert at[-1].is_dir(), at[-1]
    for name in re.findall(r"[\w.]+\.(?:py|json)\b", rooms):
        assert list(ROOT.glob(f"*/**/{name}")), name


def measured(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["rows"]


def test_the_tables_of_performance_are_their_files():
    text = (ROOT / "docs/performance.md").read_text()
    shown = set(re.findall(r"^\| \d.* \|$", text, re.MULTILINE))
    rows = set()
    for row in measured("prefill-kernels-h200"):
        names = ("bare", "gluon", "triton", "flops_us", "gather_us")
        bare, gluon, triton, products, gathers = (row[name] for name in names)
        if row["tokens"] == 4096:
            rows.add(
                f"| {row['heads']}, {row['width']} | {bare:.0f} | {gluon:.0f} ({bare / gluon:.2f}) | {triton:.0f} "
                f"({bare / triton:.2f}) | {products:.0f} | {gathers:.0f} |"
            )
    by_tokens = {}
    for row in measured("decode-kernels-h200"):
        bare, gluon, triton = (row.get(f"{x}_graph", row[x]) for x in ("flash_mla_bare", "gluon", "triton"))
        digits = 1 if row["tokens"] < 4096 else 0
        by_tokens.setdefault(row["tokens"], []).append(
            f"{bare:.{digits}f} | {gluon:.{digits}f} ({bare / gluon:.2f}) | {triton:.0f}"
        )
    rows |= {f"| {tokens} | {' | '.join(cells)} |" for tokens, cells in by_tokens.items()}
    for row in measured("prefill-h200"):
        if row["ratio"] == 4 and row["requests"] == 1:
            times = [round(row[x]) for x in ("chosen", "peer_direct", "peer_gathered")]
            rows.add("| " + " | ".join(map(str, [row["tokens"], row["prefix"], row["heads"], *times])) + " |")
    rows |= step_rows(json.loads((ROOT / "benchmarks/results/step-h200.json").read_text()))
    rows |= selection_rows() | few_heads_rows()
    assert len(shown) == 14 + 6 + 6 + 4 + 16 + 6
    assert shown - rows == set()


def few_heads_rows():
    """The rows of decode's table of 8 and 16 heads, split as they are now; of two runs' the later one's."""
    at = {(row["tokens"], row["heads"], row["kind"]): row for row in decode_rows() if row["heads"] <= 16}
    rows = set()
    for tokens in (1, 8, 32, 64, 128, 256):
        cells = [str(tokens)]
        for heads, kind in ((16, "k512"), (8, "k512"), (16, "k1024")):
            row = at[tokens, heads, kind]
            flash, gluon, wide = (row["us"][name] for name in ("flash_mla", "gluon", "gluon_wide"))
            cells += [f"{flash:.1f}", f"{gluon:.1f} ({row['over']:.2f})", f"{wide:.1f}"]
        rows.add(f"| {' | '.join(cells)} |")
    return rows


def selection_rows():
    """The rows of the selection's table, of k 1024."""
    at = {}
    for row in measured("selection-h200"):
        if row["k"] == 1024:
            wide = row["columns"] > row["entries"]
            at[row["rows"], row["entries"], wide] = row["cuda"], row["sglang_v2"]
    return {
        f"| {rows} x {entries} | " + " | ".join(f"{us:.1f}" for us in (*narrow, *at[rows, entries, True])) + " |"
        for (rows, entries, wide), narrow in at.items()
        if not wide
    }


def step_rows(measured):
    """The rows of the tables of a step's metadata, of the host's time, and of wide rows."""
    rows = set()
    for row in measured["metadata"]:
        gpu, host = row["gpu_update_us"], row["host_us"]
        shape = f"{row['requests']} | {row['context']}"
        rows.add(f"| {shape} | {gpu:.1f} | {host['build']:.0f} | {host['update']:.0f} |")
    for row in measured["host"]:
        times = [row["host_us"][name] for name in ("flash_mla bare", "dsv4x gluon", "gluon alone", "dsv4x flash_mla")]
        rows.add(f"| {row['requests']} | {row['ratio']} | " + " | ".join(f"{us:.0f}" for us in times) + " |")
    for row in measured["width"]:
        times = [row["us"][f"{kernel} {width}"] for kernel in ("gluon", "triton") for width in ("narrow", "wide")]
        rows.add(f"| {row['requests']} | " + " | ".join(f"{us:.1f}" for us in times) + " |")
    return rows
