"""The examples run as their pages say, and each sees an answer that is wrong."""

import functools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsv4x

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXAMPLES = Path(__file__).parent.parent / "examples"
NEW_KERNEL = EXAMPLES / "new_kernel"
MOST_LINES = {"server": 350, "split_kv": 150, "new_layout": 100}

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def run(*arguments, device="cpu", path=(), **settings):
    """A Python of its own: its exit code, and what it printed."""
    environment = {**os.environ, **settings}
    environment.setdefault("OMP_NUM_THREADS", "1")
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, [*path, *inherited]))
    command = [sys.executable, *map(str, arguments)]
    # Not in the checkout: -m would find its dsv4x before the one that is tested.
    done = subprocess.run(
        command, env=environment, cwd=EXAMPLES, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr


def line_of(name, *arguments, device="cpu", **options):
    """The one line that an example prints where it is right."""
    code, out, err = run(*arguments, device=device, **options)
    assert code == 0, f"{out}\n{err}"
    lines = out.splitlines()
    assert len(lines) == 1, out
    assert lines[0].startswith(f"{name} on {device}: ")
    return lines[0]


def errors_of(line):
    return [float(number) for number in re.findall(r"\b\d\.\de[-+]\d\d\b", line)]


@devices
def test_the_server_serves_what_the_oracle_says(device):
    line = line_of("server", EXAMPLES / "server.py", device=device)
    assert "12 steps of 3 layers" in line
    out, lse, selection = errors_of(line)
    assert 0 < out <= 4e-3
    assert lse <= 1e-4
    assert selection <= 1e-2


@devices
def test_two_ranks_give_what_one_pass_gives(device):
    line = line_of("split_kv", EXAMPLES / "split_kv.py", device=device)
    assert "2 ranks" in line
    out, lse = errors_of(line)
    assert 0 < out <= 4e-3
    assert lse <= 1e-4


@devices
def test_a_layout_of_ones_own_is_attended_to_and_drawn(device, tmp_path):
    picture = tmp_path / "page.svg"
    line = line_of("new_layout", EXAMPLES / "new_layout.py", picture, device=device, TRITON_INTERPRET="0")
    assert f"by {'reference' if device == 'cpu' else 'reference, triton'}, the pick, " in line
    assert 0 < errors_of(line)[0] <= 4e-3
    assert picture.read_text().startswith("<svg")
    assert "DSv4 by 32: a page of 16 entries, 9472 B" in picture.read_text()


@pytest.mark.interpreter
def test_a_layout_of_ones_own_is_attended_to_by_triton():
    assert "by reference, triton, the pick, " in line_of("new_layout", EXAMPLES / "new_layout.py")


@pytest.fixture
def installed(tmp_path):
    """The folders that installing ``examples/new_kernel`` fills, made from its own metadata; pip would want a network
    for the build's requirements.
    """
    project = tomllib.loads((NEW_KERNEL / "pyproject.toml").read_text())["project"]
    folder = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = (f"[{group}]\n{_lines(points)}" for group, points in project["entry-points"].items())
    (folder / "entry_points.txt").write_text("\n".join(groups))
    return NEW_KERNEL, tmp_path


def _lines(points):
    return "".join(f"{name} = {value}\n" for name, value in points.items())


def test_a_kernel_of_another_package_is_chosen_where_it_can_run(installed):
    line = line_of("shared_entries", "-m", "shared_entries", path=installed)
    assert 0 < errors_of(line)[0] <= 4e-3


def test_info_names_it_and_says_why_it_cannot_run(installed):
    code, out, err = run("-m", "dsv4x", "info", "--json", path=installed)
    assert code == 0, err
    kernels = json.loads(out)["kernels"]
    assert kernels["sparse_mla_decode"]["shared_entries"]["reasons"][0].startswith("128 tokens, need <= 8")
    assert kernels["sparse_mla_prefill"]["shared_entries"]["reasons"] == ["it has no sparse_mla_prefill"]


def test_without_its_entry_point_it_is_not_known():
    code, out, err = run("-m", "shared_entries", path=[NEW_KERNEL])
    assert (code, out) == (1, "")
    assert "it has to be chosen for 4 tokens on a CPU" in err


def off(op, at=0):
    """``op`` whose result, or the first of them, is a little off."""

    @functools.wraps(op)
    def run(*arguments, **options):
        made = op(*arguments, **options)
        return (made[0] * 1.02, *made[1:]) if at == 0 else (made[0], made[1] * 1.02)

    return run


def reversed_rows(op):
    """``op`` that selects the worst entries."""
    return lambda q, cache, weights, *rest, **options: op(q, cache, -weights, *rest, **options)


def by_one_slot(op):
    """``op`` that writes one slot further."""
    return lambda k, cache, slots, **options: op(k, cache, torch.where(slots < 0, slots, slots + 1), **options)


@pytest.mark.parametrize(
    ("name", "op", "wrong", "message"),
    [
        ("server", "sparse_mla_attention", off, "step 1: error of out 2"),
        ("server", "sparse_mla_attention", functools.partial(off, at=1), "step 1: error of lse 2"),
        ("server", "sparse_attn_indexer", reversed_rows, "error of selection"),
        ("server", "quantize_and_insert_k_cache", by_one_slot, "step 1: error of out nan"),
        ("new_layout", "sparse_mla_decode", off, "out of reference: error 2"),
        ("new_layout", "quantize_and_insert_k_cache", by_one_slot, "storing in fp8: error"),
    ],
)
def test_an_example_sees_a_wrong_answer(name, op, wrong, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dsv4x, op, wrong(getattr(dsv4x, op)))
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert str(stopped.value).startswith(f"{name}: ")
    assert message in str(stopped.value)


@pytest.mark.parametrize("name", MOST_LINES)
def test_an_example_is_short_and_says_how_to_run_it(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= MOST_LINES[name]
    assert text.startswith('"""')
    assert f"``python examples/{name}.py" in text.split('"""')[1]
