"""Which vendor, arch and limits this machine has.

The backend is decided when dsv4x is imported, from the torch build, the driver's presence and
``DSV4X_BACKEND``; nothing here creates a device context until limits are asked for. A ``DSV4X_BACKEND`` that cannot be
fails the import, but not of ``python -m dsv4x``, which has to say so itself.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import BackendUnavailable

BACKENDS = ("cuda", "rocm", "reference")


@dataclass(frozen=True)
class DeviceLimits:
    """What one device says of itself.

    Attributes:
        arch: ``sm_90``, ``gfx942``, ... or ``cpu``.
        name: the device's own name.
        multiprocessors: SMs or CUs.
        shared_memory: bytes of shared memory (LDS) one workgroup may opt in to.
        warp_size: lanes.
        memory: bytes of device memory.
        fp8: the arch's native FP8 flavour, ``e4m3fn``, ``e4m3fnuz`` or ``none`` (decoded from bytes).
    """

    arch: str
    name: str
    multiprocessors: int
    shared_memory: int
    warp_size: int
    memory: int
    fp8: str


@dataclass(frozen=True)
class Platform:
    """The backend chosen at import, and the devices behind it.

    Attributes:
        backend: ``cuda``, ``rocm`` or ``reference``.
        reason: why that one, in one line.
        forced: whether ``DSV4X_BACKEND`` asked for it.
        failure: why ``DSV4X_BACKEND`` cannot be met, under ``python -m dsv4x`` alone; the rest is then what there would
            be without it.
    """

    backend: str
    reason: str
    forced: bool
    failure: BackendUnavailable | None = None

    @property
    def vendor(self) -> str:
        """``nvidia``, ``amd`` or ``cpu``."""
        return {"cuda": "nvidia", "rocm": "amd", "reference": "cpu"}[self.backend]

    @property
    def arch(self) -> str:
        """The current device's arch. Asks the device: creates its context on first use."""
        return self.limits().arch

    def limits(self, device: torch.device | str | int | None = None) -> DeviceLimits:
        """Limits of ``device`` (default: the current one). Asks the device: creates its context on first use."""
        if device is None:
            device = "cpu" if self.backend == "reference" else "cuda"
        if not isinstance(device, torch.device):
            device = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
        if device.type != "cuda":
            return _limits(None)
        return _limits(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _limits(index: int | None) -> DeviceLimits:
    if index is None:
        return DeviceLimits("cpu", "cpu", os.cpu_count() or 1, 0, 1, 0, "none")
    p = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = p.gcnArchName.split(":")[0]
        shared = {"gfx942": 64, "gfx950": 160}.get(arch, 64) * 1024
        fp8 = {"gfx942": "e4m3fnuz", "gfx950": "e4m3fn"}.get(arch, "none")
    else:
        arch = f"sm_{p.major}{p.minor}"
        shared = p.shared_memory_per_block_optin  # type: ignore[attr-defined]
        fp8 = "e4m3fn" if (p.major, p.minor) >= (8, 9) else "none"
    return DeviceLimits(arch, p.name, p.multi_processor_count, shared, p.warp_size, p.total_memory, fp8)


def _driver_missing(vendor: str) -> str | None:
    """Why no driver is there, or None. Loading the library or looking at a device node creates no context."""
    if vendor == "cuda":
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides every GPU"
        try:
            ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        except OSError as error:
            return f"no NVIDIA driver ({error})"
        return None
    for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if os.environ.get(name) in ("", "-1"):
            return f"{name}={os.environ[name]!r} hides every GPU"
    if not (Path("/dev/kfd").exists() or Path("/dev/dxg").exists()):
        return "no AMD driver (neither /dev/kfd nor /dev/dxg exists)"
    return None


def _torch_build() -> tuple[str, str]:
    if torch.version.hip:
        return "rocm", f"torch {torch.__version__} is built for ROCm {torch.version.hip}"
    if torch.version.cuda:
        return "cuda", f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    return "reference", f"torch {torch.__version__} is a CPU build"


def _wrong_build(built_for: str) -> str:
    """What to do where a GPU of AMD's is there and torch is not built for it; nothing elsewhere.

    PyPI's torch is a CUDA build, which pip installs on such a machine without a word. /dev/dxg is any vendor's.
    """
    if built_for == "rocm" or not Path("/dev/kfd").exists():
        return ""
    return "; an AMD driver is there (/dev/kfd): install ROCm's torch first, see docs/dependencies.md"


def detect(requested: str | None = None) -> Platform:
    """Choose the backend. Raises BackendUnavailable when one is asked for that cannot be.

    ``requested`` None asks as ``DSV4X_BACKEND`` does, and empty for none.
    """
    built_for, build = _torch_build()
    missing = _driver_missing(built_for) if built_for != "reference" else None
    if requested is None:
        requested = os.environ.get("DSV4X_BACKEND", "").strip().lower()
    if requested:
        if requested not in BACKENDS:
            raise BackendUnavailable(f"DSV4X_BACKEND: got {requested!r}, need one of {', '.join(BACKENDS)}")
        if requested != "reference" and requested != built_for:
            raise BackendUnavailable(f"DSV4X_BACKEND={requested}, but {build}")
        if requested != "reference" and missing:
            raise BackendUnavailable(f"DSV4X_BACKEND={requested}, but {missing}")
        return Platform(requested, f"DSV4X_BACKEND={requested}; {build}", True)
    if missing:
        return Platform("reference", f"{build}, but {missing}{_wrong_build(built_for)}", False)
    if built_for == "reference":
        build += _wrong_build(built_for)
    return Platform(built_for, build, False)


def _is_command() -> bool:
    """Whether this is ``python -m dsv4x``, as the interpreter tells it while it looks for that module."""
    if sys.argv[:1] != ["-m"] or len(sys.orig_argv) < len(sys.argv):
        return False
    return sys.orig_argv[-len(sys.argv)].removeprefix("-m") in ("dsv4x", "dsv4x.__main__")


def _chosen() -> Platform:
    try:
        found = detect()
    except BackendUnavailable as error:
        if not _is_command():
            raise
        return dataclasses.replace(detect(""), failure=error)
    if found.backend == "reference" and not found.forced and _wrong_build(_torch_build()[0]):
        logging.getLogger("dsv4x").warning("the torch reference runs everything: %s", found.reason)
    return found


platform = _chosen()


def capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now is captured into a graph instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
