"""The exceptions dsv4x raises beyond ``ValueError`` and ``TypeError``."""


class BackendUnavailable(RuntimeError):
    """A requested backend or vendor library cannot be used here.

    ``__cause__`` holds the original exception when there was one.
    """


class KernelNotSupported(ValueError):
    """No kernel (or not the one asked for) can run the problem. ``reasons`` maps kernel name to its reasons."""

    def __init__(self, message: str, reasons: dict[str, list[str]]):
        super().__init__(message)
        self.reasons = reasons
