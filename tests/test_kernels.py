"""The kernels' declarations, read from their source, and the launcher, over a kernel that is none. No GPU."""

import ast
import pathlib
import types

import pytest
import torch

import dsv4x
from dsv4x.common.kernels import launch

ROOT = pathlib.Path(dsv4x.__file__).parent
SOURCES = sorted([*ROOT.glob("common/kernels/*.py"), *ROOT.glob("cuda/hopper/*.py")])


def kernels():
    """(id, function) of every function called ``*_kernel`` that is decorated."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                found.append(pytest.param(node, id=f"{path.stem}.{node.name}"))
    return found


@pytest.mark.parametrize("kernel", kernels())
def test_a_kernel_names_its_own_parameters_that_are_not_specialized(kernel):
    (decorator,) = kernel.decorator_list
    given = {}
    if isinstance(decorator, ast.Call):
        given = {keyword.arg: keyword.value for keyword in decorator.keywords}
        decorator = decorator.func
    assert ast.unparse(decorator) in ("triton.jit", "gluon.jit")
    assert set(given) <= {"do_not_specialize"}
    parameters = {argument.arg: argument.annotation for argument in kernel.args.args}
    # A list made elsewhere is no literal, and fails here.
    names = ast.literal_eval(given["do_not_specialize"]) if given else ()
    assert isinstance(names, tuple)
    assert len(set(names)) == len(names)
    assert set(names) <= set(parameters)
    assert all(parameters[name] is None for name in names), "a constexpr is always specialized"


def test_there_are_kernels_and_no_other_way_to_declare_one():
    assert len(kernels()) > 30
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            made_here = isinstance(node, ast.Attribute) and node.attr == "jit"
            assert not made_here or ast.unparse(node) in ("triton.jit", "gluon.jit"), path
            assert not (isinstance(node, ast.ImportFrom) and any(name.name == "jit" for name in node.names)), path


@pytest.mark.parametrize("kernel", kernels())
def test_a_launched_kernel_takes_pointers_then_numbers_then_constexprs(kernel):
    kinds = [
        2 if argument.annotation is not None else 0 if argument.arg.endswith("_ptr") else 1
        for argument in kernel.args.args
    ]
    assert kinds == sorted(kinds)


class Kernel:
    """Compiles anew for every launch that reaches it, and counts what its compilations are launched with."""

    __name__ = "kernel"
    arg_names = ("x_ptr", "count", "scale", "BLOCK")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.compiled.append((grid, arguments[1:], options))

            class Compiled:
                def __getitem__(_, grid):
                    return lambda *arguments: self.launched.append((grid, arguments[1:]))

            return Compiled()

        return launch


@pytest.fixture
def launched(monkeypatch):
    """(kernel, its launcher's call over one aligned tensor)"""
    monkeypatch.setattr(launch, "_BY_TRITON", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel, tensor = Kernel(), torch.zeros(16)
    launcher = launch.Launcher(kernel, floats=("scale",))
    return types.SimpleNamespace(
        kernel=kernel, launcher=launcher, call=lambda *numbers: launcher(3, (tensor,), numbers, (64,), 4)
    )


def test_a_launch_is_remembered(launched):
    launched.call(7, 0.5)
    assert launched.kernel.compiled == [((3,), (7, 0.5, 64), {"num_warps": 4})]
    launched.call(7, 0.5)
    assert launched.kernel.launched == [((3, 1, 1), (7, 0.5, 64))]
    launched.call(8, 0.5)
    assert len(launched.kernel.compiled) == 2


def test_the_oldest_is_dropped_and_the_others_stay(launched):
    for count in range(launch._MOST + 1):
        launched.call(count, 1.0)
    assert len(launched.launcher._compiled) == launch._MOST
    launched.call(1, 1.0)
    launched.call(launch._MOST, 1.0)
    assert len(launched.kernel.launched) == 2
    launched.call(0, 1.0)
    assert len(launched.kernel.compiled) == launch._MOST + 2


def test_an_int_for_a_float_is_compiled_as_a_float(launched):
    launched.call(2, 1)
    _, numbers, _ = launched.kernel.compiled[0]
    assert [type(number) for number in numbers] == [int, float, int]
    # What was compiled as a float takes either.
    launched.call(2, 1.0)
    assert len(launched.kernel.compiled) == 1


@pytest.mark.parametrize("wrong", [2.0, True, None, torch.tensor(2)])
def test_what_is_no_int_is_refused_by_name(wrong, launched):
    with pytest.raises(TypeError, match=r"kernel: count is .*, need an int"):
        launched.call(wrong, 1.0)
    assert not launched.kernel.compiled
    assert not launched.launcher._compiled


def test_on_hip_a_storage_past_2_gib_is_another_compilation(launched, monkeypatch):
    monkeypatch.setattr(launch, "_BY_SIZE", True)
    small = torch.zeros(16)
    big = torch.empty(2**31, dtype=torch.uint8, device="meta").view(torch.float32)
    run = launched.launcher.prepare(3, (7, 0.5), (64,), 4)
    for tensor, compiled, again in ((small, 1, 0), (small, 1, 1), (big, 2, 1), (big[:16], 2, 2), (small, 2, 3)):
        run((tensor,))
        assert (len(launched.kernel.compiled), len(launched.kernel.launched)) == (compiled, again)
