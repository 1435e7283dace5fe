"""A vendor library as dsv4x sees it: found or not, which distribution, and the real reason when it fails.

Libraries are imported on first use, not when dsv4x is: some compile, probe or create a context when imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .errors import BackendUnavailable


class VendorLibrary:
    """One importable library.

    Args:
        module: import name.
        distributions: the distributions that provide the right one, first found wins; ``name>=1.2.3`` for one that is
            not imported when older. A version without three numbers tells nothing, as of a clone without tags.
        wrong: distribution -> what it really is, for look-alikes that take the same import name.
        attributes: names the imported module must have; a look-alike or another API generation lacks them.
        hint: how to get it.
        before, after: import names of the copies that servers carry, which are looked for before or after ``module``. A
            copy counts only where its server, the first part of its name, is imported already.
        namespace: the torch namespace whose operators only one build may register in a process: a second one ends it.
            The build that is imported is then taken, and none is imported beside another's operators.
    """

    def __init__(
        self,
        module: str,
        distributions: tuple[str, ...],
        *,
        wrong: dict[str, str] | None = None,
        attributes: tuple[str, ...] = (),
        hint: str,
        before: tuple[str, ...] = (),
        after: tuple[str, ...] = (),
        namespace: str | None = None,
    ):
        least = [text.partition(">=") for text in distributions]
        self.oldest = {name: oldest for name, _, oldest in least if oldest}
        self.own, self.distributions, self.wrong, self.attributes, self.hint = (
            module,
            tuple(name for name, _, _ in least),
            wrong or {},
            attributes,
            hint,
        )
        self.before, self.after, self.namespace = before, after, namespace

    @functools.cached_property
    def module(self) -> str:
        """The import name of the build that is used: a server's copy, or the library's own."""
        names = [name for name in (*self.before, self.own, *self.after) if name == self.own or _server_of(name)]
        if len(names) == 1:
            return self.own
        imported = [name for name in names if name in sys.modules]
        if self.namespace is not None and imported:
            return imported[0]
        return next((name for name in names if _can_be_found(name)), self.own)

    @functools.cached_property
    def _loaded(self) -> tuple[ModuleType | None, str | None, BaseException | None]:
        if self.module != self.own:
            found = self._imported()
            if found[0] is not None or self.namespace is not None or not _can_be_found(self.own):
                return found
            # A server's copy that was not built for this machine: the library itself, as outside the server.
            self.__dict__["module"] = self.own
            for name in ("_search", "distribution"):
                self.__dict__.pop(name, None)
        return self._imported()

    def _imported(self) -> tuple[ModuleType | None, str | None, BaseException | None]:
        _, broken = self._search
        if broken is not None:
            return None, self._failed(broken), broken
        if not self._found:
            return None, f"{self.module} is not installed ({self.hint})", None
        distribution, version = self.distribution
        if distribution in self.wrong:
            return None, f"{self.module} here is {self.wrong[distribution]}; {self.hint}", None
        oldest = self.oldest.get(distribution or "")
        if oldest is not None and (0, 0, 0) < _release(version) < _release(oldest):
            return None, f"{distribution} {version} is too old, need {oldest} or later; {self.hint}", None
        if self.namespace is not None and self.module not in sys.modules and _registered(self.namespace):
            reason = f"another build registered torch.ops.{self.namespace}: importing {self.module} ends the process"
            return None, reason, None
        try:
            module = importlib.import_module(self.module)
        except (Exception, SystemExit) as error:  # a vendor wheel may fail in any way; the reason is kept, not hidden
            return None, self._failed(error), error
        lacking = [name for name in self.attributes if not hasattr(module, name)]
        if lacking:
            return None, f"{self.module} at {self.path} has no {', '.join(lacking)}; {self.hint}", None
        return module, None, None

    def _failed(self, error: BaseException) -> str:
        return f"import {self.module} failed: {type(error).__name__}: {str(error) or _origin(error)}"

    @functools.cached_property
    def _search(self) -> tuple[Any, BaseException | None]:
        """Where it is, or why that cannot be told: looking for a submodule imports the packages above it."""
        try:
            return importlib.util.find_spec(self.module), None
        except ModuleNotFoundError as error:
            return None, None if self.module.startswith(f"{error.name}.") else error
        except ValueError:  # a module without a spec, put in place by hand
            return None, None
        except Exception as error:
            return None, error

    @property
    def _spec(self) -> Any:
        return self._search[0]

    @property
    def _found(self) -> bool:
        return self._spec is not None

    @functools.cached_property
    def distribution(self) -> tuple[str | None, str | None]:
        """(distribution name, version) that provides the import name, or (None, None)."""
        if self.module != self.own:
            server = self.module.partition(".")[0]
            return server, _version_of(server)
        for name in (*self.distributions, *self.wrong):
            version = _version_of(name)
            if version is not None:
                return name, version
        return None, None

    @property
    def path(self) -> str | None:
        """Where the import system finds it, whether or not it imports."""
        if not self._found:
            return None
        return self._spec.origin or next(iter(self._spec.submodule_search_locations or []), None)

    @property
    def reason(self) -> str | None:
        """Why it cannot be used, or None. Imports the library on first use."""
        return self._loaded[1]

    def load(self) -> ModuleType:
        """The module. Raises BackendUnavailable, from the original exception, when it cannot be used."""
        module, reason, error = self._loaded
        if module is None:
            raise BackendUnavailable(reason or "") from error
        return module

    def describe(self) -> dict[str, Any]:
        """What ``python -m dsv4x info`` shows."""
        name, version = self.distribution
        return {
            "module": self.module,
            "distribution": name,
            "version": version,
            "path": self.path,
            "usable": self.reason is None,
            "reason": self.reason,
        }


def _server_of(name: str) -> str | None:
    """The server whose copy this import name is, where that server is imported."""
    server = name.partition(".")[0]
    return server if server in sys.modules else None


def _can_be_found(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except Exception:
        return False


def _registered(namespace: str) -> bool:
    """Whether torch knows operators of this namespace. Asking ``torch.ops`` would make one up."""
    return any(name.startswith(f"{namespace}::") for name in torch._C._dispatch_get_all_op_names())


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str | None) -> tuple[int, ...]:
    """The three numbers a version begins with, or zeros where it has no three."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version or "")
    return (0, 0, 0) if numbers is None else tuple(map(int, numbers.groups()))


def _origin(error: BaseException) -> str:
    """Where an exception without a message was raised; DeepGEMM's import asserts so when it finds no CUDA toolkit."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.line} ({frame.filename}:{frame.lineno})"


TRITON = VendorLibrary("triton", ("triton", "triton-rocm", "pytorch-triton-rocm"), hint="pip install triton")


def needs_triton(part: str) -> list[str]:
    """Why a wrapper of which ``part`` is Triton's cannot run, if it cannot."""
    return [f"{part} needs triton: {TRITON.reason}"] if TRITON.reason else []


@functools.cache
def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """The names of what a vendor's function takes, which tell its builds apart."""
    return frozenset(inspect.signature(function).parameters)


def is_aligned(tensor: torch.Tensor, base: int = 16, step: int = 16) -> bool:
    """Whether the address is a multiple of ``base`` bytes, and every stride but the last a positive one of ``step``.

    Vendors' kernels load and copy several values at a time, also where a dimension of size 1 makes torch indifferent to
    its stride. They hold strides in 32 bits.
    """
    size = tensor.element_size()
    if tensor.data_ptr() % base:
        return False
    *strides, last = tensor.stride()
    for stride in strides:
        if stride * size % step or not 0 < stride < 2**31:
            return False
    return last == 1 or tensor.shape[-1] <= 1


def aligned(tensor: torch.Tensor, base: int = 16, step: int = 16) -> torch.Tensor:
    """The tensor where :func:`is_aligned`, else a contiguous copy, whose rows are to be multiples of ``step`` bytes."""
    return tensor if is_aligned(tensor, base, step) else tensor.clone(memory_format=torch.contiguous_format)
