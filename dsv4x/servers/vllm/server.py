"""vLLM, as this adapter knows it."""

from __future__ import annotations

import importlib.metadata

from ..activation import Server


class Vllm(Server):
    """vLLM, whose builds for CPUs are another distribution."""

    @property
    def version(self) -> str | None:
        for name in (self.distribution, f"{self.distribution}-cpu"):
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None


SERVER = Vllm("vLLM", "vllm", ("0.30.0", "0.31.0", "0.32.0", "0.33.0"), "DSV4X_VLLM", logger="vllm.dsv4x")
