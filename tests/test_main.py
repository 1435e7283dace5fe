"""The command line: what it shows, and its exit status."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsv4x
from dsv4x.__main__ import main
from dsv4x.common.dispatch import registry
from dsv4x.demo import report
from dsv4x.demo import server as demo

ROOT = Path(dsv4x.__file__).parent.parent
OTHER = "rocm" if torch.version.cuda else "cuda"


def command(*arguments, **environment):
    """``python -m dsv4x`` in a process of its own, which is where a backend is chosen."""
    kept = {k: v for k, v in os.environ.items() if k not in ("DSV4X_BACKEND", "DSV4X_CHECK", "TRITON_INTERPRET")}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "dsv4x", *arguments],
        env={**kept, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one window of text is enough here. " * 8)
    return path


def test_info_as_json_holds_every_fact(capsys):
    assert main(["info", "--json", "--self-test"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["schema"] == 1
    assert facts["problems"] == []
    assert facts["backend"] in ("cuda", "rocm", "reference")
    assert facts["reason"]
    modules = {library["module"] for library in facts["libraries"]}
    assert modules == {"triton", "flash_mla", "deep_gemm", "flashinfer", "aiter"}
    for library in facts["libraries"]:
        assert library["usable"] == (library["reason"] is None)
    decode = facts["kernels"]["sparse_mla_decode"]
    assert set(decode) == {"flash_mla", "deep_gemm", "gluon", "cuda", "triton", "aiter", "flashinfer", "reference"}
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
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    shown = command("info", PYTHONPATH=paths).stdout
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


def test_info_fits_a_screen_and_all_shows_every_refusal(capsys):
    assert main(["info"]) == 0
    short = capsys.readouterr().out
    assert short.count("\n") <= report.SCREEN
    for op in registry.ops():
        assert op in short
    assert main(["info", "--all"]) == 0
    long = capsys.readouterr().out
    assert long.count("\n") > len(registry.ops()) * 6
    assert len([line for line in long.splitlines() if line.startswith("    reference ")]) == len(registry.ops())


def test_a_report_of_many_reasons_is_cut_and_says_so(monkeypatch):
    facts = report.collect(False)
    table = facts["kernels"]["window_slots"]
    for i in range(60):
        table[f"kernel{i}"] = {"reasons": [f"reason {i}"], "by_name_only": None, "chosen": False}
    lines = report.text(facts, everything=False).splitlines()
    assert len(lines) == report.SCREEN
    assert "lines more; --all shows every refusal" in lines[-1]
    assert "reason 59" in report.text(facts, everything=True)


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("cudda", "DSV4X_BACKEND: got 'cudda', need one of cuda, rocm, reference"),
        (OTHER, f"DSV4X_BACKEND={OTHER}, but"),
    ],
)
def test_a_backend_that_cannot_be_is_reported_and_fails_the_command(backend, says):
    done = command("info", DSV4X_BACKEND=backend)
    assert done.returncode == 1
    assert f"PROBLEM {says}" in done.stdout
    assert "import dsv4x fails" in done.stdout
    assert "libraries" in done.stdout
    facts = json.loads(command("info", "--json", DSV4X_BACKEND=backend).stdout)
    assert says in facts["problems"][0]
    demo_done = command("demo", DSV4X_BACKEND=backend)
    assert demo_done.returncode == 1
    assert demo_done.stderr.startswith(f"demo: {says}")
    for either in (done, demo_done):
        assert "Traceback" not in either.stdout + either.stderr
    assert command("layout", "DSV4", DSV4X_BACKEND=backend).returncode == 0
    assert command("--help", DSV4X_BACKEND=backend).returncode == 0


@pytest.mark.parametrize("code", ["import dsv4x", "import runpy; runpy.run_module('dsv4x')"])
def test_an_import_with_such_a_backend_still_fails(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DSV4X_BACKEND": "cudda"}
    done = subprocess.run(
        [sys.executable, "-c", code, "-m", "dsv4x"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "BackendUnavailable: DSV4X_BACKEND: got 'cudda'" in done.stderr


def test_another_command_that_imports_dsv4x_fails_with_such_a_backend(tmp_path):
    server = tmp_path / "server"
    server.mkdir()
    (server / "__init__.py").write_text("import dsv4x\n")
    (server / "__main__.py").write_text("print('serving')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "DSV4X_BACKEND": "cudda"}
    done = subprocess.run(
        [sys.executable, "-m", "server", "dsv4x"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "BackendUnavailable" in done.stderr
    assert "serving" not in done.stdout


def test_a_check_setting_that_says_nothing_is_reported(monkeypatch, capsys):
    monkeypatch.setenv("DSV4X_CHECK", "maybe")
    assert main(["info"]) == 1
    assert "PROBLEM DSV4X_CHECK: got 'maybe'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys; print('loading'); sys.exit('no license')", "SystemExit: no license"),
        ("raise RuntimeError('no driver')", "RuntimeError: no driver"),
    ],
)
def test_json_stays_json_when_a_wheel_is_broken(code, says, tmp_path):
    (tmp_path / "triton.py").write_text(code + "\n")
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = command("info", "--json", PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    facts = json.loads(done.stdout)
    assert says in facts["libraries"][0]["reason"]


def test_a_probe_that_raises_hides_no_other(monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("out of order")

    monkeypatch.setattr(report.TRITON.__class__, "describe", broken)
    monkeypatch.setattr(report, "explain", broken)
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "triton     -                            RuntimeError: out of order" in shown
    assert f"error      RuntimeError: out of order ({len(registry.ops())} ops)" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tokens", "0"], "argument --tokens: got 0, need a whole number >= 1"),
        (["--tokens", "-5"], "argument --tokens: got -5, need a whole number >= 1"),
        (["--tokens", "many"], "argument --tokens: got 'many', need a whole number >= 1"),
        (["--heads", "0"], "argument --heads: got 0, need a whole number from 1 to 128"),
        (["--heads", "200"], "argument --heads: got 200, need a whole number from 1 to 128"),
        (["--topk", "0"], "argument --topk: got 0, need a whole number >= 1"),
    ],
)
def test_the_demo_refuses_sizes_it_has_not(arguments, says, capsys):
    with pytest.raises(SystemExit) as left:
        main(["demo", *arguments])
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"dsv4x {dsv4x.__version__}\n"


@pytest.mark.parametrize("arguments", [["info", "--all"], ["layout", "DSV4"]])
def test_a_reader_that_leaves_early_sees_no_traceback(arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv4x", *arguments], env=environment, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    os.close(read)
    assert process.communicate(timeout=120)[1] == ""


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys):
    assert main(["layout", "DSV4", "--svg", str(tmp_path / "none" / "page.svg")]) == 1
    assert capsys.readouterr().err.startswith("layout: ")
