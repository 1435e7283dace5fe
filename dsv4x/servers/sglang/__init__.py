"""SGLang runs DeepSeek-V4's attention on dsv4x: the entry point that SGLang calls, which imports nothing of its models.

``docs/servers/sglang.md`` says what is replaced and how to see it.
"""

from __future__ import annotations

from typing import Any

from .. import activation
from .server import SERVER

BACKEND = "dsv4"
"""SGLang's name of DeepSeek-V4's attention backend, which its model overrides force."""


def register() -> None:
    """Entry point of group ``sglang.srt.plugins``, called in every process before a model is built.

    Raises:
        Required: dsv4x stays out, and ``DSV4X_SERVERS=require``.
    """
    SERVER.register(_install)


def _install() -> None:
    """Wrap the backend's factory; what is heavy waits for its first call, in the process that runs the model."""
    from sglang.srt.layers.attention import attention_registry

    activation.expect_attributes(attention_registry, ("ATTENTION_BACKENDS", "_is_hip", "_is_npu"))
    backends = attention_registry.ATTENTION_BACKENDS
    if BACKEND not in backends:
        raise activation.Mismatch(f"SGLang has no attention backend {BACKEND!r}, only {', '.join(sorted(backends))}")
    theirs = backends[BACKEND]
    if getattr(theirs, "dsv4x", False):
        return
    activation.expect_parameters(attention_registry, "create_dsv4_backend", ("runner",))

    def create_dsv4_backend(runner: Any) -> Any:
        prepare_factories(attention_registry)
        return theirs(runner)

    create_dsv4_backend.dsv4x = True  # type: ignore[attr-defined]
    backends[BACKEND] = create_dsv4_backend


def prepare_factories(registry: Any) -> None:
    """Put dsv4x's classes where the registry and the draft factories look them up; only the first call does anything.

    Raises:
        Required: dsv4x stays out, and ``DSV4X_SERVERS=require``.
    """
    if _prepared:
        return
    _prepared.append(True)
    try:
        if registry._is_npu:
            raise activation.Mismatch("the device is an NPU, need CUDA or ROCm")
        if registry._is_hip:
            from . import rocm

            rocm.install()
        else:
            from . import cuda

            cuda.install()
    except Exception as error:
        SERVER.stay_out(activation.reason_of(error))


_prepared: list[bool] = []
