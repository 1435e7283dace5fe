"""The docs' examples run and are right, and what the docs name is there."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from tolerances import check_decode, check_prefill

import dsv4x

ROOT = Path(__file__).parent.parent
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"])
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

    def slots(pool, entries):
        cache, table = pool
        return [int(table[request, e // cache.page_size]) * cache.page_size + e % cache.page_size for e in entries]

    for request, (count, length) in enumerate(zip(queries, lengths)):
        for p in range(length - count, length):
            visible = max(0, p + 1) // ratio
            chosen = (
                range(visible) if selected is None else [e for e in selected[len(swa)].tolist() if 0 <= e < visible]
            )
            swa.append(slots(pools[0], range(max(0, p - 127), p + 1)))
            extra.append(slots(pools[1], chosen) if len(pools) > 1 else [])
    swa, extra = (padded(rows + [[]] * (len(q) - len(rows)), q.device) for rows in (swa, extra))
    scopes = (pools[0][0], swa, None, *((pools[1][0], extra, None) if len(pools) > 1 else ()))
    return dsv4x.reference.sparse_mla_decode(q, *scopes, dtype=torch.float64)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_graphs_example_is_right_at_every_length(where, monkeypatch):
    if where == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
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


def test_the_readmes_example_is_right():
    made = example("README.md")
    pools = {name: (made[name], made[f"{name}_table"]) for name in ("swa", "c4", "c128")}
    queries, lengths = made["query_start_loc"].diff().tolist(), made["seq_lens"].tolist()
    for ratio, kind in ((1, []), (4, [pools["c4"]]), (128, [pools["c128"]])):
        selected = made["topk_indices"] if ratio == 4 else None
        want = expected(made["q"], [pools["swa"], *kind], queries, lengths, ratio, selected)
        cache = kind[0][0] if kind else None
        taken = dsv4x.explain_step(made["q"], made["swa"], cache, made["step"][ratio], selected).chosen
        check = check_decode if taken == "direct" else check_prefill
        check(*made["results"][ratio], *want)
