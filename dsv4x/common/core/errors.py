"""The exceptions dsv4x raises beyond ``ValueError`` and ``TypeError``."""

from __future__ import annotations

from typing import Any


class BackendUnavailable(RuntimeError):
    """A requested backend or vendor library cannot be used here.

    ``__cause__`` holds the original exception when there was one.
    """


class KernelNotSupported(ValueError):
    """No kernel (or not the one asked for) can run the problem. ``reasons`` maps kernel name to its reasons."""

    def __init__(self, message: str, reasons: dict[str, list[str]]):
        super().__init__(message)
        self.reasons = reasons

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is made again from its args, which hold the message alone.
        return type(self), (*self.args, self.reasons), self.__dict__
