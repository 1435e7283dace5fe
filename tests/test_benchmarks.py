"""The scripts that only a GPU machine runs: what they name exists, and what they call takes what they give."""

import ast
import functools
import importlib.util
import inspect
import pathlib
import re
import sys
import types

import pytest
import triton

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "benchmarks").glob("*.py")), ROOT / "tests" / "sanitize.py", ROOT / "tests" / "delays.py"]
FOLDERS = (ROOT / "benchmarks", ROOT / "tests")
VENDORS = {"deep_gemm", "flash_mla", "sglang"}
LIBRARIES = {"steps", "timing"}
"""Benchmarks' scripts that others import, and nobody runs."""


class Names:
    """What a script's imports bind: objects of dsv4x, and what its neighbours define."""

    def __init__(self, tree):
        self.bound, self.wrong = {}, []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self._bind_module(alias)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                self._bind_members(node)
        # Names are resolved without scopes, so none that is imported may be assigned as well.
        stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        stored |= {argument.arg for argument in ast.walk(tree) if isinstance(argument, ast.arg)}
        self.wrong += [f"{name} is imported and assigned" for name in stored & self.bound.keys()]

    def _bind_module(self, alias):
        if alias.name.split(".")[0] == "dsv4x":
            importlib.import_module(alias.name)
            self.bound[alias.asname or "dsv4x"] = sys.modules[alias.name if alias.asname else "dsv4x"]

    def _bind_members(self, node):
        if node.module.split(".")[0] == "dsv4x":
            module = importlib.import_module(node.module)
            for alias in node.names:
                try:
                    self.bound[alias.asname or alias.name] = _member(module, alias.name)
                except (AttributeError, ImportError):
                    self.wrong.append(f"{node.lineno}: {node.module} has no {alias.name}")
        for folder in FOLDERS:
            path = folder / f"{node.module}.py"
            if path.exists():
                there = _defined(path)
                missing = [alias.name for alias in node.names if alias.name not in there]
                self.wrong += [f"{node.lineno}: {path.name} has no {name}" for name in missing]

    def resolve(self, node):
        """The object that an expression names, as far as modules, classes and their members go; None for any other.

        Raises AttributeError where a module or class has no such member.
        """
        if isinstance(node, ast.Name):
            return self.bound.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            if isinstance(owner, (types.ModuleType, type)):
                return _member(owner, node.attr)
        return None


def _member(owner, name):
    if not hasattr(owner, name) and isinstance(owner, types.ModuleType) and hasattr(owner, "__path__"):
        return importlib.import_module(f"{owner.__name__}.{name}")
    if isinstance(owner, type) and name in getattr(owner, "__annotations__", {}):
        return None
    return getattr(owner, name)


@functools.cache
def _defined(path):
    """Names that a module binds at its top."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


def _misfit(function, call):
    """Why a call cannot be of ``function``; empty where it can, as far as the call itself shows."""
    signature = inspect.signature(function)
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    whole = not starred and all(keyword.arg is not None for keyword in call.keywords)
    given = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
    try:
        (signature.bind if whole else signature.bind_partial)(*([] if starred else given), **keywords)
    except TypeError as error:
        return str(error)
    return ""


def _mislaunched(kernel, call):
    """Why ``kernel[grid](...)`` does not give every parameter once; options of the launch are Triton's."""
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return ""
    names = kernel.arg_names[: len(call.args)] + [keyword.arg for keyword in call.keywords if keyword.arg is not None]
    missing, twice = set(kernel.arg_names) - set(names), {name for name in names if names.count(name) > 1}
    return f"lacks {sorted(missing)}, gives twice {sorted(twice)}" if missing or twice else ""


def _problems(tree):
    names = Names(tree)
    found = list(names.wrong)
    for node in ast.walk(tree):
        try:
            if isinstance(node, ast.Attribute):
                names.resolve(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = names.resolve(node.func.value)
                if isinstance(kernel, triton.JITFunction) and (why := _mislaunched(kernel, node)):
                    found.append(f"{node.lineno}: {why}")
            elif isinstance(node, ast.Call):
                function = names.resolve(node.func)
                why = "" if function is None else _misfit(function, node)
                if why:
                    found.append(f"{node.lineno}: {ast.unparse(node.func)}: {why}")
        except (AttributeError, ImportError) as error:
            found.append(f"{node.lineno}: {error}")
    return found


def _imports(script):
    """Names of the packages that a script imports at its top, and that its neighbours then import at theirs."""
    seen, waiting = set(), [script]
    while waiting:
        for node in ast.parse(waiting.pop().read_text()).body:
            if isinstance(node, ast.ImportFrom):
                named = {node.module}
            else:
                named = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            neighbours = [folder / f"{name}.py" for name in named - seen for folder in FOLDERS]
            waiting += [path for path in neighbours if path.exists()]
            seen |= named
    return {name.split(".")[0] for name in seen}


def _imported(script, monkeypatch):
    monkeypatch.setattr(sys, "path", [*map(str, FOLDERS), *sys.path])
    spec = importlib.util.spec_from_file_location(f"imported_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_script_names_exists_and_takes_what_it_is_given(script):
    assert not _problems(ast.parse(script.read_text()))


@pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if not _imports(script) & VENDORS], ids=lambda script: script.stem
)
def test_a_script_that_needs_no_vendor_imports(script, monkeypatch):
    module = _imported(script, monkeypatch)
    assert script.stem in LIBRARIES or callable(module.main)


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ("from dsv4x.common.ops import absentee", "1: dsv4x.common.ops has no absentee"),
        ("from dsv4x.common.step import attention\nattention.absentee('x')", "2: .*absentee"),
        ("import dsv4x\ndsv4x.AttentionMetadata.build(*a, absentee=1)", "2: .*'absentee'"),
        ("import dsv4x\ndsv4x.sparse_mla_prefill(q, kv)", "2: .*'indices'"),
        ("from dsv4x.common.kernels import prefill\nprefill.prefill_kernel[1](q, HAS_SINK=1)", "2: lacks .*'kv_ptr'"),
        ("from timing import absentee", "1: timing.py has no absentee"),
    ],
)
def test_what_is_wrong_is_found(written, wrong):
    problems = _problems(ast.parse(written))
    assert problems
    assert all(re.match(wrong, problem) for problem in problems)


def test_kernels_compile_with_the_constants_the_scripts_give_them(monkeypatch):
    """A constant that a script lacks would pass for a shape that does not compile."""
    gfx, shapes = (
        _imported(ROOT / "benchmarks" / f"{name}.py", monkeypatch) for name in ("gfx_configs", "prefill_configs")
    )
    for pair in (gfx.PAIRS[0], gfx.PAIRS[3]):
        assert gfx.cycles_of("gfx942", pair, 16, gfx.config.decode_config("gfx942", 16, pair)) < float("inf")
    in_use = [config for _, config in shapes.prefill_config.prefill_configs("gfx950", 512)][:1]
    monkeypatch.setattr(shapes, "candidates", lambda *_: in_use)
    rows = shapes.compiled_rows("gfx950")
    assert [(row["head_dim"], row["chosen_up_to_heads"], row["spills"]) for row in rows] == [(512, 16, 0), (576, 16, 0)]
