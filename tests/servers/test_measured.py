"""The table that decides who runs a piece: dsv4x only where it was measured ahead next to what is asked."""

import json
from pathlib import Path

import pytest

from dsv4x.servers import measured
from dsv4x.servers.measured import Row, Table

FOLDERS = sorted({file.parent for file in Path(measured.__file__).parent.glob("*/measured_*.json")})


def row(ours, server=10.0, piece="decode", ratio=4, heads=64, captured=True, tokens=8, context=4096):
    return Row(piece, ratio, heads, captured, tokens, context, ours, server)


def verdict(rows, tokens=8, heads=64, layers=None, piece="decode", captured=True, context=None):
    table = Table("sm_90", {}, tuple(rows))
    return table.verdict(piece, layers or {4: 1}, heads, tokens, captured=captured, context=context)


@pytest.mark.parametrize(("ours", "ahead"), [(9.0, True), (10.0, True), (10.1, False)])
def test_ahead_or_even_is_ours(ours, ahead):
    found = verdict([row(ours)])
    assert found.ours is ahead
    assert f"{ours:.0f} us, the server's 10 at 8 tokens behind 4096" in found.why


@pytest.mark.parametrize(
    "asked", [{"piece": "extend"}, {"layers": {128: 1}}, {"captured": False}, {"layers": {4: 1, 128: 1}}]
)
def test_what_was_not_measured_is_the_servers(asked):
    found = verdict([row(1.0)], **asked)
    assert not found.ours
    assert "not measured on sm_90" in found.why


def test_without_a_table_everything_is_the_servers(tmp_path):
    table = Table.of(tmp_path, "sm_100")
    assert not table.verdict("decode", {4: 1}, 64, 8, captured=True).ours
    assert "nothing was measured on sm_100: the server's own attention runs everywhere" in str(table)


@pytest.mark.parametrize(
    ("tokens", "ours"), [(1, True), (8, True), (9, False), (63, False), (64, False), (65, False), (256, True)]
)
def test_both_neighbours_have_to_be_ahead(tokens, ours):
    rows = [row(1.0, tokens=8), row(11.0, tokens=64), row(1.0, tokens=256)]
    assert verdict(rows, tokens).ours is ours


@pytest.mark.parametrize(("tokens", "ours"), [(128, True), (129, False)])
def test_a_table_speaks_for_twice_its_largest_batch(tokens, ours):
    found = verdict([row(1.0, tokens=64)], tokens)
    assert found.ours is ours
    assert ours or "not measured at tokens 129" in found.why


@pytest.mark.parametrize(("heads", "ours"), [(8, True), (16, True), (32, False), (64, False), (128, False)])
def test_more_heads_than_measured_are_the_servers(heads, ours):
    rows = [row(1.0, heads=16), row(11.0, heads=64)]
    assert verdict(rows, heads=heads).ours is ours


def test_any_context_means_every_measured_one():
    rows = [row(1.0, context=4096), row(11.0, context=131072)]
    assert not verdict(rows).ours
    assert verdict(rows, context=4096).ours
    assert not verdict(rows, context=5000).ours


def test_layers_that_go_together_are_added_up():
    rows = [row(9.0, ratio=4), row(12.0, ratio=128)]
    assert verdict(rows, layers={4: 3, 128: 1}).ours
    assert not verdict(rows, layers={4: 1, 128: 1}).ours


def test_a_file_is_read_and_told(tmp_path):
    rows = [row(9.0)._asdict(), row(12.0, tokens=64)._asdict()]
    (tmp_path / "measured_sm_90.json").write_text(json.dumps({"device": "a card", "torch": "2", "rows": rows}))
    told = str(Table.of(tmp_path, "sm_90"))
    assert "measured on sm_90: device a card, torch 2" in told
    assert [line.split()[-1] for line in told.splitlines()[2:]] == ["dsv4x", "server"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_that_are_shipped_say_where_they_were_measured(folder):
    for file in folder.glob("measured_*.json"):
        table = Table.of(folder, file.stem.removeprefix("measured_"))
        assert {"device", "torch", "triton", "command", folder.name} <= table.origin.keys()
        assert len({row[:-2] for row in table.rows}) >= len(table.rows) // 2
        assert all(row.ours_us > 0 and row.server_us > 0 for row in table.rows)


def test_sglangs_table_is_of_its_result():
    folder = next(folder for folder in FOLDERS if folder.name == "sglang")
    result = Path(__file__).parents[2] / "benchmarks/results/servers-sglang-h100.json"
    found = json.loads(result.read_text())["rows"]
    captured = {
        (r["ratio"], r["heads"], r["tokens"], r["context"], round(r["us"]["dsv4x"], 2), round(r["us"]["sglang"], 2))
        for r in found if r.get("captured")
    }  # fmt: skip
    rows = Table.of(folder, "sm_90").rows
    assert captured == {(r.ratio, r.heads, r.tokens, r.context, r.ours_us, r.server_us) for r in rows if r.captured}
    eager = [r for r in found if "ratio" in r and not r["captured"]]
    assert len(eager) == sum(not r.captured for r in rows)
