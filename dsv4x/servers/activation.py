"""Whether dsv4x serves a server's attention: the switches, the checks of the server, and the lines that say so.

Servers swallow what a plugin raises, so a failure that must be seen is a :class:`Required`, which is a ``SystemExit``.

Environment:

- ``DSV4X_SGLANG``, ``DSV4X_VLLM``: ``0`` leaves the server alone; ``all`` takes all that dsv4x can run, whatever was
  measured; unset or ``1``, the measured table decides.
- ``DSV4X_SERVERS=require``: where dsv4x would stay out, the server stops.
- ``DSV4X_SERVERS_EXPLAIN=1``: the table that decides is printed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


class Mismatch(Exception):
    """The server is not what this adapter was checked with: what was seen, and what is needed."""


class Required(SystemExit):
    """dsv4x stays out although ``DSV4X_SERVERS=require``; no server's ``except Exception`` catches it."""


@dataclass(eq=False)
class Server:
    """A server that loads dsv4x as a plugin.

    Attributes:
        name: as log lines call it.
        distribution: what its version is asked of.
        versions: the versions this adapter was checked with, as exact strings or prefixes that end in a dot.
        variable: the environment variable that switches it.
        logger: the logger that the server shows; a server may show its own names only.
        said: the lines that were logged once already.
    """

    name: str
    distribution: str
    versions: tuple[str, ...]
    variable: str
    logger: str = "dsv4x.servers"
    said: set[str] = field(default_factory=set)

    @property
    def switch(self) -> str:
        """``"off"``, ``"all"`` or ``"measured"``.

        Raises:
            Mismatch: the variable holds something else.
        """
        said = os.environ.get(self.variable, "").strip().lower()
        if said in ("", "1"):
            return "measured"
        if said not in ("0", "all"):
            raise Mismatch(f"{self.variable}={said!r}, need 0, 1 or all")
        return "off" if said == "0" else "all"

    @property
    def version(self) -> str | None:
        """The installed version, or None."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def check_version(self) -> None:
        """Raise :class:`Mismatch` unless the installed version is one that was checked."""
        version = self.version
        exact = version is not None and version.partition("+")[0]
        if not any(exact == known or (known.endswith(".") and str(exact).startswith(known)) for known in self.versions):
            raise Mismatch(
                f"{self.distribution} is {version or 'not installed'}, need {' or '.join(self.versions)}, "
                "which this adapter was checked with"
            )

    def register(self, install: Callable[[], None]) -> bool:
        """Run an entry point: ``install`` unless switched off, staying out where it or the version does not fit.

        Returns:
            Whether it was installed.

        Raises:
            Required: it stays out although it is required, or is switched off although it is required.
        """
        try:
            if self.switch == "off":
                self.stay_out(f"{self.variable}=0")
                return False
            self.check_version()
            install()
        except Exception as error:
            self.stay_out(reason_of(error))
            return False
        return True

    def stay_out(self, reason: str) -> None:
        """Say once that the server keeps its own path, and why; or stop it, where dsv4x is required.

        Raises:
            Required: ``DSV4X_SERVERS=require``.
        """
        message = f"dsv4x stays out of {self.name}, whose own attention runs: {reason}"
        if required():
            raise Required(f"DSV4X_SERVERS=require, but {message}")
        asked_for = reason == f"{self.variable}=0"
        self.say(message, logging.INFO if asked_for else logging.WARNING)

    def live(self, what: str) -> None:
        """Say once which path is live."""
        self.say(f"dsv4x is live in {self.name} {self.version}: {what}", logging.INFO)

    def explain(self, table: object) -> None:
        """Print once a process what decides who runs a piece, where that is asked for."""
        told = f"dsv4x in {self.name}, {self.variable} says {self.switch}; {table}"
        if explaining() and told not in self.said:
            self.said.add(told)
            print(told, flush=True)

    def say(self, message: str, level: int) -> None:
        """Log ``message`` once a process, to stderr where no handler would show a warning."""
        if message in self.said:
            return
        self.said.add(message)
        logger = logging.getLogger(self.logger)
        if _shown(logger) or level < logging.WARNING:
            logger.log(level, message)
        else:
            print(f"{logging.getLevelName(level)}: {message}", file=sys.stderr, flush=True)


def required() -> bool:
    """Whether the server is to stop where dsv4x would stay out.

    Raises:
        Required: ``DSV4X_SERVERS`` holds something that nobody knows, which may be a misspelt ``require``.
    """
    said = os.environ.get("DSV4X_SERVERS", "").strip().lower()
    if said not in ("", "require"):
        raise Required(f"DSV4X_SERVERS={said!r}, need require or nothing")
    return said == "require"


def explaining() -> bool:
    """Whether the table that decides is to be printed."""
    return os.environ.get("DSV4X_SERVERS_EXPLAIN", "") not in ("", "0")


def reason_of(error: BaseException) -> str:
    """What a log line says of an error: a mismatch's words, and of others their type too."""
    return str(error) if isinstance(error, Mismatch) else f"{type(error).__name__}: {error}"


def expect_parameters(owner: Any, name: str, parameters: Iterable[str]) -> None:
    """Check that ``owner.name`` takes exactly these parameters in order, ``self``, ``*`` and ``**`` included.

    Raises:
        Mismatch: it does not, or does not exist.
    """
    function = _attribute(owner, name)
    seen = []
    for parameter in inspect.signature(inspect.unwrap(function)).parameters.values():
        stars = "*" * ((parameter.kind == parameter.VAR_POSITIONAL) + 2 * (parameter.kind == parameter.VAR_KEYWORD))
        seen.append(stars + parameter.name)
    wanted = list(parameters)
    if seen != wanted:
        raise Mismatch(f"{_name_of(owner)}.{name} takes ({', '.join(seen)}), need ({', '.join(wanted)})")


def expect_attributes(owner: Any, names: Iterable[str]) -> None:
    """Check that ``owner`` has these attributes, or fields of a dataclass or an annotated class.

    Raises:
        Mismatch: it lacks some.
    """
    fields = {field.name for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
    annotated = {name for base in getattr(owner, "__mro__", ()) for name in getattr(base, "__annotations__", ())}
    lacking = [name for name in names if name not in fields | annotated and not hasattr(owner, name)]
    if lacking:
        raise Mismatch(f"{_name_of(owner)} has no {', '.join(lacking)}")


def expect_instance_attributes(instance: Any, names: Iterable[str]) -> None:
    """Check that an object has these attributes, which its ``__init__`` may have made.

    Raises:
        Mismatch: it lacks some.
    """
    lacking = [name for name in names if not hasattr(instance, name)]
    if lacking:
        raise Mismatch(f"a {_name_of(type(instance))} has no {', '.join(lacking)}")


def _attribute(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise Mismatch(f"{_name_of(owner)} has no {name}") from None


def _name_of(owner: Any) -> str:
    return (
        f"{owner.__module__}.{owner.__qualname__}"
        if isinstance(owner, type)
        else getattr(owner, "__name__", repr(owner))
    )


def _shown(logger: logging.Logger | None) -> bool:
    """Whether a handler other than a library's NullHandler would get what this logger logs."""
    while logger is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False
