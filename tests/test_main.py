"""The command line: what it shows, and its exit status."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from dsv4x.__main__ import main
from dsv4x.common.dispatch import registry
from dsv4x.demo import server as demo


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one window of text is enough here. " * 8)
    return path


def test_info_as_json_holds_every_fact(capsys):
    assert main(["info", "--json", "--self-test"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backend"] in ("cuda", "rocm", "reference")
    assert facts["reason"]
    modules = {library["module"] for library in facts["libraries"]}
    assert modules == {"triton", "flash_mla", "deep_gemm", "flashinfer", "aiter"}
    for library in facts["libraries"]:
        assert library["usable"] == (library["reason"] is None)
    decode = facts["kernels"]["sparse_mla_decode"]
    assert set(decode) == {"flash_mla", "deep_gemm", "gluon", "triton", "aiter", "flashinfer", "reference"}
    assert sum(kernel["chosen"] for kernel in decode.values()) == 1
    assert all(kernel["chosen"] or kernel["reasons"] or name != "flash_mla" for name, kernel in decode.items())
    assert facts["self_test"]["passed"] is True


def test_info_shows_why_a_kernel_runs_only_by_name(capsys, replaced):
    record = registry.find("window_slots", "reference")
    replaced(dataclasses.replace(record, name="flashinfer", by_name_only="it rounds"))
    assert main(["info"]) == 0
    assert "flashinfer only by name: it rounds" in capsys.readouterr().out


def test_a_failing_self_test_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(demo, "MAX_ERROR", 1e-9)
    assert main(["info", "--self-test"]) == 1
    assert "self test: FAILED" in capsys.readouterr().out


def test_a_self_test_that_raises_fails_the_command_with_the_reason(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(demo, "serve_and_check", broken)
    assert main(["info", "--self-test"]) == 1
    assert "RuntimeError: no such luck" in capsys.readouterr().out


def test_info_shows_a_broken_vendor_wheels_own_error(tmp_path):
    package = tmp_path / "flash_mla"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    shown = subprocess.run(
        [sys.executable, "-m", "dsv4x", "info"],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "import flash_mla failed: OSError: libcuda.so.1: cannot open shared object file" in shown
    assert str(package) in shown


def test_the_demo_shows_each_layer_kind_and_passes(text, capsys):
    assert main(["demo", "--text", str(text), "--tokens", "260", "--heads", "2", "--topk", "16"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "window (r=1)",
        "C4 (r=4)",
        "C128 (r=128)",
        "direct",
        "gathered",
        "why the others did not run",
        "ok:",
    ):
        assert words in shown


def test_the_demo_fails_above_tolerance(text, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MAX_ERROR", 1e-9)
    assert main(["demo", "--text", str(text), "--tokens", "130", "--heads", "1", "--topk", "8"]) == 1
    assert "ABOVE TOLERANCE" in capsys.readouterr().out


def test_the_demo_runs_the_kernel_asked_for_or_says_why_not(text, capsys):
    assert main(["demo", "--text", str(text), "--tokens", "130", "--heads", "1", "--kernel", "aiter"]) == 1
    assert "demo: kernel='aiter' cannot run sparse_mla_decode: not on backend" in capsys.readouterr().err


def test_a_text_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["demo", "--text", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in capsys.readouterr().err


def test_layout_prints_and_draws(tmp_path, capsys):
    drawn = tmp_path / "page.svg"
    assert main(["layout", "DSV4", "--page-size", "2", "--svg", str(drawn)]) == 0
    assert "page of 2: 1168 B used, 1728 B stride" in capsys.readouterr().out
    assert drawn.read_text().startswith("<svg")
    assert main(["layout"]) == 0
    assert "DSV41_FP4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["DSV5"], "layout: got 'DSV5', need one of"),
        (["DSV4", "--page-size", "0"], "need > 0"),
        (["--docs", "nowhere", "--page-size", "0"], "need > 0"),
        (["--svg", "nowhere.svg"], "--svg: given without a layout"),
    ],
)
def test_what_layout_cannot_draw_is_named(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["layout", *arguments])
    assert left.value.code == 2
    assert says in capsys.readouterr().err
