"""CUDA C++ kernels of this package: compiled by NVRTC where they run, kept on disk, launched through the driver.

Both libraries are called by ctypes: the driver is there wherever a GPU is, and NVRTC comes with torch's CUDA wheels, of
the toolkit that torch was built for. No compiler on the machine, no header and no further package is needed.

A cubin is compiled once for each arch and kept beside Triton's, under a name that follows from the source, the options
and NVRTC's version. A module is loaded once for each device, into its primary context, which is torch's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import struct
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import torch

from ..common.core.errors import BackendUnavailable

_CLUSTER, _EARLY = 4, 6
_SHARED_BYTES, _LARGE_CLUSTERS = 8, 14
_RELAXED = 2
_INVALID_CONTEXT = 201
_LARGEST_PORTABLE = 8


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: its value is a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


def _sonames() -> list[str]:
    major = (torch.version.cuda or "13").split(".")[0]
    return [f"libnvrtc.so.{version}" for version in dict.fromkeys((major, "13", "12"))]


def _folders() -> list[Path]:
    """Where NVIDIA's wheels put their libraries, and where a toolkit has its own."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    found = [folder for root in roots for folder in sorted(root.glob("*/lib"))]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return found + [Path(home) / "lib64" for home in (*homes, "/usr/local/cuda")]


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC, of torch's CUDA where that can be had. Raises BackendUnavailable where none loads."""
    errors = []
    for soname in _sonames():
        for path in (soname, *(str(folder / soname) for folder in _folders() if (folder / soname).exists())):
            try:
                return ctypes.CDLL(path)
            except OSError as error:
                errors.append(str(error))
    raise BackendUnavailable(f"NVRTC: {errors[0]}; it comes with torch's CUDA wheels, or pip install nvidia-cuda-nvrtc")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.cuLaunchKernelEx  # noqa: B018 - drivers before CUDA 12 have none
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(f"the CUDA driver: {error}") from error
    return library


@functools.cache
def _archs() -> list[int]:
    """What NVRTC compiles for, such as 90."""
    count = ctypes.c_int()
    _nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    archs = (ctypes.c_int * count.value)()
    _nvrtc().nvrtcGetSupportedArchs(archs)
    return list(archs)


def unavailable(arch: str) -> str:
    """Why kernels can be neither compiled nor launched here for an arch such as ``"sm_90"``; empty where they can."""
    try:
        _driver()
        _nvrtc()
    except BackendUnavailable as error:
        return str(error)
    if int(arch.removeprefix("sm_")) not in _archs():
        return f"NVRTC {version()} does not compile for {arch}"
    return ""


def version() -> str:
    """NVRTC's, such as ``"13.0"``."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


class Compiled(NamedTuple):
    """A cubin, and what the compiler said."""

    cubin: bytes
    log: str


def compile_source(source: str, name: str, options: tuple[str, ...]) -> Compiled:
    """Compile CUDA C++ to a cubin. ``options`` are NVRTC's, the arch among them.

    Raises BackendUnavailable where there is no NVRTC, RuntimeError with its log where it refuses the source.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    failed = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    if failed:
        raise RuntimeError(f"nvrtcCreateProgram: error {failed}")
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
        log = _bytes(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise RuntimeError(f"NVRTC {version()} cannot compile {name} with {' '.join(options)}:\n{log}")
        return Compiled(_bytes(program, "CUBIN"), log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    failed = getattr(_nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    if failed:
        raise RuntimeError(f"nvrtcGet{what}Size: error {failed}")
    held = ctypes.create_string_buffer(size.value)
    failed = getattr(_nvrtc(), f"nvrtcGet{what}")(program, held)
    if failed:
        raise RuntimeError(f"nvrtcGet{what}: error {failed}")
    return held.raw


def cache_folder() -> Path:
    """Triton's folder, whose place its users set by ``TRITON_CACHE_DIR`` or ``TRITON_HOME``."""
    given = os.environ.get("TRITON_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"


def cached_cubin(source: str, name: str, options: tuple[str, ...]) -> bytes:
    """:func:`compile_source`'s cubin, from disk where it was compiled before.

    It is written under another name and then renamed, so that no process reads half of one. Where nothing can be
    written, each process compiles for itself.
    """
    key = hashlib.sha256("\0".join((source, name, version(), *options)).encode()).hexdigest()
    path = cache_folder() / f"dsv4x-{key}" / f"{name}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    cubin = compile_source(source, name, options).cubin
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, written = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(cubin)
        os.replace(written, path)
    except OSError:
        pass
    return cubin


def _check(failed: int, what: str) -> None:
    if failed:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(failed, ctypes.byref(text))
        raise RuntimeError(f"{what}: {(text.value or b'error').decode()} ({failed})")


class Launch(NamedTuple):
    """What is launched besides the arguments.

    Attributes:
        blocks, threads: of the grid and of a block, in one dimension.
        cluster: blocks of a cluster; 1 launches without.
        shared_bytes: dynamic shared memory of a block.
    """

    blocks: int
    threads: int
    cluster: int
    shared_bytes: int


class Function:
    """One kernel of one source file, whose only parameter is a struct.

    Its launches wait in the kernel, by ``griddepcontrol.wait``, for what is in front of them in the stream: they are
    programmatic dependents of it.

    Args:
        path: of the source file.
        name: of its ``extern "C"`` function.
        options: NVRTC's, without the arch.
    """

    def __init__(self, path: Path, name: str, options: tuple[str, ...] = ()):
        self.path = path
        self.name = name
        self.options = ("--std=c++17", *options)
        self._functions: dict[int, ctypes.c_void_p] = {}
        self._shared_bytes: dict[int, int] = {}
        self._lock = threading.Lock()

    def options_for(self, arch: str) -> tuple[str, ...]:
        """NVRTC's options for an arch such as ``"sm_90"``."""
        return (f"--gpu-architecture={arch}", *self.options)

    def _function(self, device: int) -> ctypes.c_void_p:
        """The function on the current device, compiled and loaded; with the lock held."""
        if device not in self._functions:
            driver = _driver()
            major, minor = torch.cuda.get_device_capability(device)
            cubin = cached_cubin(self.path.read_text(), self.path.name, self.options_for(f"sm_{major}{minor}"))
            self.bind_context(device)
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            # A module may be loaded while a stream is captured; it is no part of the graph.
            mode = ctypes.c_int(_RELAXED)
            _check(driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")
            try:
                _check(driver.cuModuleLoadData(ctypes.byref(module), cubin), f"cuModuleLoadData of {self.path.name}")
            finally:
                driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
            _check(
                driver.cuModuleGetFunction(ctypes.byref(function), module, self.name.encode()), "cuModuleGetFunction"
            )
            self._functions[device] = function
        return self._functions[device]

    @staticmethod
    def bind_context(device: int) -> None:
        """Make the device's primary context current where this thread has none yet."""
        driver = _driver()
        context = ctypes.c_void_p()
        _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        if not context.value:
            _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
            _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")

    def attribute(self, device: int, which: int) -> int:
        """One of the driver's ``CU_FUNC_ATTRIBUTE_*`` on the current device."""
        value = ctypes.c_int()
        with self._lock:
            function = self._function(device)
        _check(_driver().cuFuncGetAttribute(ctypes.byref(value), which, function), "cuFuncGetAttribute")
        return value.value

    def _config(self, device: int, launch: Launch) -> _Config:
        """The driver's form of ``launch``; with the lock held."""
        function = self._function(device)
        driver = _driver()
        # Of all launches of the function, not of one.
        if launch.shared_bytes > self._shared_bytes.get(device, 0):
            _check(driver.cuFuncSetAttribute(function, _SHARED_BYTES, launch.shared_bytes), "shared memory")
            self._shared_bytes[device] = launch.shared_bytes
        if launch.cluster > _LARGEST_PORTABLE:
            _check(driver.cuFuncSetAttribute(function, _LARGE_CLUSTERS, 1), "large clusters")
        attributes = (_Attribute * 2)()
        attributes[0].id, attributes[0].value[0] = _EARLY, 1
        attributes[1].id, attributes[1].value[:3] = _CLUSTER, (launch.cluster, 1, 1)
        return _Config(
            (launch.blocks, 1, 1), (launch.threads, 1, 1), launch.shared_bytes, None, attributes,
            2 if launch.cluster > 1 else 1,
        )  # fmt: skip

    def prepare(self, device: int, launch: Launch, arguments: struct.Struct) -> Prepared:
        """``launch`` on a device, which is the current one, of a struct that is packed by ``arguments``."""
        with self._lock:
            return Prepared(self.name, self._function(device), self._config(device, launch), arguments)


class Prepared:
    """A launch that is made many times: what does not change between them is made once.

    It is called on its device, with the stream and the values of the kernel's struct.
    """

    def __init__(self, name: str, function: ctypes.c_void_p, config: _Config, arguments: struct.Struct):
        self._name = name
        self._function = function
        self._config = config
        self._pack = arguments.pack_into
        self._arguments = ctypes.create_string_buffer(arguments.size)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))
        self._launch = _driver().cuLaunchKernelEx
        self._config_pointer = ctypes.byref(config)
        self._lock = threading.Lock()

    def __call__(self, stream: int, *values: int) -> None:
        """Launch. The values are read before this returns."""
        with self._lock:
            self._pack(self._arguments, 0, *values)
            self._config.stream = stream
            failed = self._launch(self._config_pointer, self._function, self._pointers, None)
            if failed == _INVALID_CONTEXT:
                Function.bind_context(torch.cuda.current_device())
                failed = self._launch(self._config_pointer, self._function, self._pointers, None)
        if failed:
            _check(failed, f"launch of {self._name}")
