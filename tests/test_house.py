"""Imports run one way, ``common`` knows no vendor, and no function of the host takes a long list of arguments."""

import ast
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "dsv4x"

VENDORS = ("flash_mla", "deep_gemm", "flashinfer", "aiter")

_SPELLS_A_VENDOR = re.compile(rf"{'|'.join(VENDORS)}|dsv4x[./](cuda|rocm)\b", re.IGNORECASE)

MOST_PARAMETERS = 8

ROOMS = (
    ("dsv4x.common.core", "core"),
    ("dsv4x.common.dispatch", "dispatch"),
    ("dsv4x.common.kernels", "kernels"),
    ("dsv4x.common.ops", "ops"),
    ("dsv4x.common.step", "step"),
    ("dsv4x.common.reference", "reference"),
    ("dsv4x.common.portable", "portable"),
    ("dsv4x.common.drawing", "drawing"),
    ("dsv4x.common", "common"),
    ("dsv4x.cuda", "cuda"),
    ("dsv4x.rocm", "rocm"),
    ("dsv4x.demo", "demo"),
    ("dsv4x.servers", "servers"),
    ("dsv4x.__main__", "main"),
    ("dsv4x", "root"),
)

_COMMON = {"core", "dispatch", "kernels", "ops", "step"}
_BESIDE = {"reference", "portable", "drawing"}
_ANY = {room for _, room in ROOMS}

MAY_IMPORT = {
    "core": {"core"},
    "kernels": {"core", "kernels"},
    "dispatch": {"core", "dispatch"},
    "ops": {"core", "kernels", "dispatch", "ops"},
    "step": _COMMON,
    "common": {"common"},
    **dict.fromkeys(_BESIDE, _COMMON | _BESIDE),
    "cuda": _COMMON | {"cuda"},
    "rocm": _COMMON | {"rocm"},
    "root": _ANY - {"demo", "servers", "main"},
    "demo": _ANY - {"servers", "main"},
    "servers": _ANY - _BESIDE - {"demo", "main"},
    "main": _ANY,
}


class Arrow(NamedTuple):
    """One module's import of another of the package, or of a package outside."""

    importer: str
    imported: str
    line: int

    def __str__(self):
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules_of(package):
    """Module name -> file, of the folder ``package``, which is called dsv4x whatever its path."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = ["dsv4x", *file.relative_to(package).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def arrows_of(package):
    """Every import of every module, wherever it stands: in functions and under TYPE_CHECKING too."""
    modules = modules_of(package)
    made = []
    for name, file in modules.items():
        home = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text())):
            made += [Arrow(name, module, node.lineno) for module in _imported(node, home, modules)]
    return made


def _imported(node, home, modules):
    if isinstance(node, ast.Import):
        return [_nearest(alias.name, modules) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = _absolute("." * node.level + (node.module or ""), home)
        return [_nearest(f"{base}.{alias.name}", modules) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")) and node.args:
        argument = node.args[0]
        # Of an f-string, what stands before its first field.
        while isinstance(argument, ast.JoinedStr) and argument.values:
            argument = argument.values[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return [_nearest(_absolute(argument.value.rstrip("."), home), modules)]
    return []


def _absolute(name, home):
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
    parts = home.split(".")
    return ".".join([*parts[: len(parts) - level + 1], *filter(None, [name[level:]])])


def _nearest(name, modules):
    """The module a dotted name leads to: of a name inside a module, the module. Others stay as they are."""
    while name.startswith("dsv4x.") and name not in modules:
        name = name.rpartition(".")[0]
    return name


def room_of(module):
    return next((room for prefix, room in ROOMS if module == prefix or module.startswith(f"{prefix}.")), None)


def forbidden_arrows(package):
    return [
        str(arrow)
        for arrow in arrows_of(package)
        if room_of(arrow.imported) is not None and room_of(arrow.imported) not in MAY_IMPORT[room_of(arrow.importer)]
    ]


def circles(package):
    """A circle of imports among modules, as their names, or None."""
    graph = {}
    for importer, imported, _ in arrows_of(package):
        graph.setdefault(importer, set()).add(imported)
    done, trail = set(), []

    def walk(module):
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return None
        trail.append(module)
        found = next(filter(None, map(walk, sorted(graph.get(module, ())))), None)
        trail.pop()
        done.add(module)
        return found

    return next(filter(None, map(walk, sorted(graph))), None)


def vendors_named(package):
    """Where ``common`` imports a vendor's package, names one in code, or spells a path into a vendor's folder."""
    found = [str(a) for a in arrows_of(package) if a.importer.startswith("dsv4x.common") and _of_vendor(a.imported)]
    for name, file in modules_of(package).items():
        if name.startswith("dsv4x.common"):
            tree = ast.parse(file.read_text())
            prose = _docstrings(tree)
            for node in ast.walk(tree):
                found += [f"{name}:{node.lineno} names {word}" for word in _words(node, prose)]
    return found


def _of_vendor(module):
    return any(vendor in module.split(".") for vendor in VENDORS) or room_of(module) in ("cuda", "rocm")


def _words(node, prose):
    """Vendors' names in an identifier or a string of one node; of strings also paths into their folders."""
    words = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")]
    words = [word for word in words if isinstance(word, str) and any(vendor in word.lower() for vendor in VENDORS)]
    if isinstance(node, ast.Constant) and id(node) not in prose and _SPELLS_A_VENDOR.search(str(node.value)):
        words.append(repr(node.value))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and ast.unparse(node.right) in ("'cuda'", "'rocm'"):
        words.append(ast.unparse(node))
    return words


def _docstrings(tree):
    """The ids of the strings that stand as statements of their own."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def long_signatures(package):
    """Functions of the host with more than eight parameters, self and cls not counted, that have no need of them."""
    modules = modules_of(package)
    public, names = _public(package)
    found = []
    for module, file in modules.items():
        if module == "dsv4x.common.ops.torch_library":
            continue
        tree = ast.parse(file.read_text())
        excused = {id(node) for node in tree.body if _is_public(node, module, public, names)}
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name in public.get(module, ()):
                excused |= {id(method) for method in node.body if not getattr(method, "name", "_").startswith("_")}
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and id(node) not in excused:
                count = _parameters(node)
                if count > MOST_PARAMETERS and not _is_kernel(node):
                    found.append(f"{module}:{node.lineno} {getattr(node, 'name', 'lambda')} has {count} parameters")
    return found


def _public(package):
    """Module -> its names in ``__all__``, and all these names."""
    tree = ast.parse((package / "__init__.py").read_text())
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    names = set(ast.literal_eval(lists[0])) if lists else set()
    modules = modules_of(package)
    public = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = _nearest(_absolute("." * node.level + (node.module or ""), "dsv4x"), modules)
            public.setdefault(module, set()).update({alias.name for alias in node.names} & names)
    return public, names


def _is_public(node, module, public, names):
    if not isinstance(node, ast.FunctionDef):
        return False
    # The oracle has the signatures of the ops that it defines.
    return node.name in (names if module == "dsv4x.common.reference" else public.get(module, ()))


def _is_kernel(node):
    return any(ast.unparse(each).split("(")[0].endswith(".jit") for each in getattr(node, "decorator_list", ()))


def _parameters(node):
    given = node.args
    names = [argument.arg for argument in given.posonlyargs + given.args + given.kwonlyargs]
    names += [argument.arg for argument in (given.vararg, given.kwarg) if argument is not None]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_imports_run_one_way():
    assert forbidden_arrows(PACKAGE) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(PACKAGE) is None


def test_common_names_no_vendor_in_code():
    assert vendors_named(PACKAGE) == []


def test_no_function_of_the_host_takes_more_than_eight_parameters_but_public_ops():
    assert long_signatures(PACKAGE) == []


def test_every_module_has_a_room_and_every_room_a_module():
    rooms = {room_of(module) for module in modules_of(PACKAGE)}
    assert rooms <= MAY_IMPORT.keys()
    assert rooms >= MAY_IMPORT.keys()
    assert len(arrows_of(PACKAGE)) > 200


@pytest.fixture
def house(tmp_path):
    """Writes a small package, file -> text, and returns its folder."""

    def write(**files):
        files = {"__init__": "", "common/__init__": "", "common/core/__init__": "", **files}
        for name, text in files.items():
            file = tmp_path / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("importer", "text", "imported"),
    [
        ("common/core/a", "from ..ops import b\n", "dsv4x.common.ops.b"),
        ("common/core/a", "from ..ops.b import name\n", "dsv4x.common.ops.b"),
        ("common/core/a", "from dsv4x.common.ops import b\n", "dsv4x.common.ops.b"),
        ("common/core/a", "import dsv4x.common.ops.b\n", "dsv4x.common.ops.b"),
        ("common/core/a", "def f():\n    from ..ops import b\n", "dsv4x.common.ops.b"),
        ("common/core/a", "if TYPE_CHECKING:\n    from ..ops import b\n", "dsv4x.common.ops.b"),
        ("common/core/a", "importlib.import_module('..ops.b', __package__)\n", "dsv4x.common.ops.b"),
        ("common/core/a", "importlib.import_module(f'dsv4x.common.ops.{x}')\n", "dsv4x.common.ops"),
        ("common/kernels/a", "from ..dispatch import b\n", "dsv4x.common.dispatch.b"),
        ("common/dispatch/a", "from ..kernels import b\n", "dsv4x.common.kernels.b"),
        ("common/ops/a", "from ..step import b\n", "dsv4x.common.step.b"),
        ("common/step/a", "from ..reference import b\n", "dsv4x.common.reference"),
        ("common/ops/a", "from ..portable import b\n", "dsv4x.common.portable"),
        ("common/step/a", "from .. import drawing\n", "dsv4x.common.drawing"),
        ("common/step/a", "from ... import name\n", "dsv4x"),
        ("common/portable", "from ..cuda import b\n", "dsv4x.cuda.b"),
        ("cuda/a", "from ..common.portable import b\n", "dsv4x.common.portable"),
        ("cuda/hopper/a", "from ...rocm import b\n", "dsv4x.rocm.b"),
        ("rocm/a", "from ..cuda import b\n", "dsv4x.cuda.b"),
        ("rocm/a", "from .. import platform\n", "dsv4x"),
        ("common/step/a", "from ...demo import b\n", "dsv4x.demo.b"),
        ("__init__", "from .servers import b\n", "dsv4x.servers.b"),
        ("demo/a", "from ..servers import b\n", "dsv4x.servers.b"),
        ("servers/a", "from ..common.portable import b\n", "dsv4x.common.portable"),
    ],
)
def test_an_arrow_against_the_rule_is_seen(importer, text, imported, house):
    beside = {f"common/{room}": "" for room in ("reference", "portable", "drawing")}
    rooms = ("common/dispatch", "common/kernels", "common/ops", "common/step", "cuda", "rocm", "demo", "servers")
    inside = {f"{room}/{file}": "" for room in rooms for file in ("__init__", "b")}
    package = house(**{"common/core/b": "", **beside, **inside, importer: text})
    name = "dsv4x" if importer == "__init__" else f"dsv4x.{importer.replace('/', '.')}"
    line = len(text.splitlines())
    assert forbidden_arrows(package) == [f"{name}:{line} imports {imported}"]


@pytest.mark.parametrize("length", [2, 3])
def test_a_circle_is_seen(length, house):
    names = [f"m{i}" for i in range(length)]
    last = {f"common/core/{names[-1]}": f"def late():\n    from . import {names[0]}\n"}
    package = house(**{f"common/core/{a}": f"from .{b} import x\n" for a, b in pairwise(names)}, **last)
    assert circles(package) == [f"dsv4x.common.core.{name}" for name in (*names, names[0])]


@pytest.mark.parametrize(
    "text",
    [
        "import flash_mla\n",
        "from vllm.third_party import deep_gemm\n",
        "library = find('deep_gemm')\n",
        "importlib.import_module('aiter.ops')\n",
        "if kernel == FLASHINFER:\n    pass\n",
        "def call_flash_mla(): pass\n",
        "run(aiter=True)\n",
        "names = 'dsv4x.cuda.hopper'\n",
        "path = folder / 'cuda' / 'costs.json'\n",
        "from ...cuda import gluon\n",
    ],
)
def test_a_vendor_in_common_is_seen(text, house):
    package = house(**{"common/core/a": text, "cuda/__init__": "", "cuda/gluon": ""})
    assert vendors_named(package)
    assert all(where.startswith("dsv4x.common.core.a:") for where in vendors_named(package))


def test_docstrings_may_name_vendors_and_so_may_their_own_rooms(house):
    text = '"""As FlashMLA\'s flash_mla does."""\ndef f(device):\n    "deep_gemm"\n    return device.type == "cuda"\n'
    package = house(**{"common/core/a": text, "cuda/__init__": "import flash_mla\n"})
    assert vendors_named(package) == []


NINE = "a, b, c, d, e, f, g, h, i"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"def private({NINE}): pass\n", "private"),
        ("def private(a, b, c, d, *, e, f, g, h, **i): pass\n", "private"),
        (f"def outer():\n    def inner({NINE}): pass\n", "inner"),
        (f"run = lambda {NINE}: 0\n", "lambda"),
        (f"class Public:\n    def _private(self, {NINE}): pass\n", "_private"),
        (f"@cached\ndef op({NINE}, j): pass\ndef other({NINE}): pass\n", "other"),
    ],
)
def test_a_long_signature_is_seen(text, name, house):
    init = "from .common.core.a import Public, op\n__all__ = ['Public', 'op']\n"
    (found,) = long_signatures(house(**{"common/core/a": text, "__init__": init}))
    assert found.startswith("dsv4x.common.core.a:")
    assert found.endswith(f" {name} has 9 parameters")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("common/core/a", f"def op({NINE}): pass\n"),
        ("common/core/a", f"class Public:\n    def build(self, {NINE}): pass\n"),
        ("common/core/a", "class Any:\n    def method(self, a, b, c, d, e, f, g, h): pass\n"),
        ("common/core/a", f"@triton.jit\ndef kernel({NINE}): pass\n"),
        ("common/core/a", f"@gluon.jit(do_not_specialize=['a'])\ndef kernel({NINE}): pass\n"),
        ("common/reference", f"def op({NINE}): pass\n"),
    ],
)
def test_public_ops_their_oracle_and_kernels_may_take_more(file, text, house):
    init = "from .common.core.a import Public, op\n__all__ = ['Public', 'op']\n"
    assert long_signatures(house(**{"common/core/a": "", file: text, "__init__": init})) == []
