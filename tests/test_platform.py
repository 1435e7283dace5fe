"""What importing dsv4x decides, and that it touches no device. A backend is chosen once a process: subprocesses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsv4x
from dsv4x.common.core import platform as module
from dsv4x.common.core.errors import BackendUnavailable
from dsv4x.common.core.platform import Platform

ROOT = Path(dsv4x.__file__).parent.parent
OTHER = "rocm" if torch.version.cuda else "cuda"


def python(code, *path, **environment):
    """Run ``code`` with dsv4x importable and ``path`` before it; returns the finished process."""
    unset = ("DSV4X_BACKEND", "DSV4X_CHECK", "TRITON_INTERPRET")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), str(ROOT), env.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], env={**env, **environment}, capture_output=True, text=True, timeout=120
    )


def succeeds(code, *path, **environment):
    done = python(code, *path, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("asked", "wrapped"), [("1", True), ("0", False), ("", False)])
def test_kernels_are_wrapped_for_the_profiler_where_the_environment_asks(asked, wrapped):
    code = """
import dsv4x
from dsv4x.common.dispatch import registry
print(all(hasattr(record.run, "__wrapped__") for op in registry.ops() for record in registry.kernels(op)))
"""
    assert succeeds(code, DSV4X_PROFILE=asked).strip() == str(wrapped)


def test_importing_creates_no_context_imports_no_kernels_and_may_be_forked():
    succeeds(
        """
import os, sys, torch, dsv4x
assert not torch.cuda.is_initialized()
for name in ("flash_mla", "deep_gemm", "flashinfer", "aiter", "triton", "dsv4x.common.kernels.decode"):
    assert name not in sys.modules, name
child = os.fork()
if child == 0:
    code = 1
    try:
        assert not torch.cuda._is_in_bad_fork()
        cache = dsv4x.PagedCache.zeros(1, dsv4x.layouts.DSV4, 64)
        q = torch.ones(1, 1, 512, dtype=torch.bfloat16)
        rows = torch.zeros(1, 1, dtype=torch.int32)
        out, lse = dsv4x.sparse_mla_decode(q, cache, rows, None, kernel="reference")
        code = 0 if lse.item() == 0 else 2
    finally:
        os._exit(code)
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 0, status
"""
    )


@pytest.mark.gpu
def test_a_forked_child_can_use_the_gpu():
    succeeds(
        """
import os, torch, dsv4x
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    code = 1
    try:
        assert dsv4x.platform.arch not in ("", "cpu")
        assert torch.ones(1, device="cuda").item() == 1
        code = 0
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert not torch.cuda.is_initialized()
"""
    )


def test_the_reference_backend_can_be_forced_and_triton_then_says_why_not():
    # With Triton's interpreter asked for as well: a forced backend has no other.
    succeeds(
        """
import torch, dsv4x
assert dsv4x.platform.backend == "reference" and dsv4x.platform.forced and dsv4x.platform.vendor == "cpu"
assert "DSV4X_BACKEND=reference" in dsv4x.platform.reason
assert dsv4x.platform.arch == "cpu"
slots = torch.zeros(1, dtype=torch.int64)
cache = dsv4x.PagedCache.zeros(1, dsv4x.layouts.DSV4, 64)
dsv4x.dequantize_k_cache_paged(cache, slots)
try:
    dsv4x.dequantize_k_cache_paged(cache, slots, kernel="triton")
except dsv4x.KernelNotSupported as error:
    assert "DSV4X_BACKEND=reference" in str(error), error
else:
    raise SystemExit("triton ran")
assert not torch.cuda.is_initialized()
""",
        DSV4X_BACKEND="Reference ",
        TRITON_INTERPRET="1",
    )


def test_a_backend_this_torch_was_not_built_for_is_unavailable():
    done = python("import dsv4x", DSV4X_BACKEND=OTHER)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "BackendUnavailable" in last
    assert f"DSV4X_BACKEND={OTHER}" in last
    assert f"torch {torch.__version__} is" in last


def test_an_unknown_backend_is_named_with_those_there_are():
    done = python("import dsv4x", DSV4X_BACKEND="bogus")
    assert done.returncode != 0
    assert "BackendUnavailable: DSV4X_BACKEND: got 'bogus', need one of cuda, rocm, reference" in done.stderr


def test_broken_and_mistaken_vendor_packages_do_not_break_the_import(tmp_path):
    """Look-alikes and wheels that cannot load are all on the path; each keeps its own reason."""
    (tmp_path / "flash_mla").mkdir()
    (tmp_path / "flash_mla" / "__init__.py").write_text(
        "raise OSError('libcuda.so.1: cannot open shared object file: No such file or directory')\n"
    )
    for name, distribution, version in (
        ("aiter", "aiter", "0.13.20191203"),
        ("deep_gemm", "deep-gemm", "1.0.0"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('the wrong package was imported')\n")
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    succeeds(
        """
import dsv4x, dsv4x.cuda, dsv4x.rocm, sys
from dsv4x.cuda.flash_mla import FLASH_MLA

assert "flash_mla" not in sys.modules
assert "OSError: libcuda.so.1: cannot open shared object file" in FLASH_MLA.reason, FLASH_MLA.reason
try:
    FLASH_MLA.load()
except dsv4x.BackendUnavailable as error:
    assert type(error.__cause__) is OSError, error.__cause__
    assert str(error) == FLASH_MLA.reason
else:
    raise SystemExit("it loaded")
told = FLASH_MLA.describe()
assert told["usable"] is False and told["path"].endswith("flash_mla/__init__.py"), told

assert "asyncio" in dsv4x.rocm.AITER.reason and "amd-aiter" in dsv4x.rocm.AITER.reason, dsv4x.rocm.AITER.reason
assert dsv4x.rocm.AITER.describe()["distribution"] == "aiter"
assert dsv4x.rocm.AITER.describe()["version"] == "0.13.20191203"
assert "another API" in dsv4x.cuda.DEEP_GEMM.reason and "sgl-deep-gemm" in dsv4x.cuda.DEEP_GEMM.reason
assert "aiter" not in sys.modules and "deep_gemm" not in sys.modules
assert dsv4x.sparse_mla_decode
""",
        tmp_path,
    )


def test_a_cpu_build_explains_itself():
    if torch.version.cuda or torch.version.hip:
        pytest.skip("torch is built for a GPU")
    assert module.detect() == Platform("reference", f"torch {torch.__version__} is a CPU build", False)
    limits = dsv4x.platform.limits()
    assert (limits.arch, limits.shared_memory, limits.fp8) == ("cpu", 0, "none")


@pytest.fixture
def built_for(monkeypatch):
    """Pretend that torch is a build for a vendor, with or without a driver."""
    for name in ("DSV4X_BACKEND", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def pretend(vendor, driver=True):
        monkeypatch.setattr(torch.version, "cuda", "13.0" if vendor == "cuda" else None)
        monkeypatch.setattr(torch.version, "hip", "7.2" if vendor == "rocm" else None)
        if driver:
            monkeypatch.setattr(module.ctypes, "CDLL", lambda name: None)
            monkeypatch.setattr(module.Path, "exists", lambda self: True)
        else:

            def missing(name):
                raise OSError(f"{name}: cannot open shared object file")

            monkeypatch.setattr(module.ctypes, "CDLL", missing)
            monkeypatch.setattr(module.Path, "exists", lambda self: False)

    return pretend


@pytest.mark.parametrize(("vendor", "name"), [("cuda", "nvidia"), ("rocm", "amd")])
def test_the_torch_build_decides(vendor, name, built_for, monkeypatch):
    built_for(vendor)
    found = module.detect()
    assert (found.backend, found.vendor, found.forced) == (vendor, name, False)
    monkeypatch.setenv("DSV4X_BACKEND", vendor.upper())
    assert module.detect().forced
    monkeypatch.setenv("DSV4X_BACKEND", "reference")
    assert module.detect().backend == "reference"


@pytest.mark.parametrize(("vendor", "says"), [("cuda", "libcuda.so.1: cannot open"), ("rocm", "/dev/kfd")])
def test_a_build_without_its_driver_falls_back_unless_it_was_asked_for(vendor, says, built_for, monkeypatch):
    built_for(vendor, driver=False)
    found = module.detect()
    assert found.backend == "reference"
    assert says in found.reason
    monkeypatch.setenv("DSV4X_BACKEND", vendor)
    with pytest.raises(BackendUnavailable, match=says):
        module.detect()


@pytest.mark.parametrize("vendor", ["cuda", None])
def test_another_build_than_rocms_on_amds_driver_says_what_to_install(vendor, built_for, monkeypatch, caplog):
    built_for(vendor, driver=False)
    assert "ROCm" not in module._chosen().reason
    assert not caplog.records
    monkeypatch.setattr(module.Path, "exists", lambda self: str(self) == "/dev/kfd")
    found = module._chosen()
    assert found.backend == "reference"
    assert "an AMD driver is there (/dev/kfd): install ROCm's torch first" in found.reason
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("dsv4x", "WARNING")
    assert found.reason in record.message
    # What was asked for is no surprise, and a machine with both vendors' drivers runs on the build's.
    monkeypatch.setenv("DSV4X_BACKEND", "reference")
    assert "AMD" not in module._chosen().reason
    built_for("cuda")
    monkeypatch.delenv("DSV4X_BACKEND")
    assert module._chosen().backend == "cuda"
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("vendor", "variable"),
    [("cuda", "CUDA_VISIBLE_DEVICES"), ("rocm", "HIP_VISIBLE_DEVICES"), ("rocm", "ROCR_VISIBLE_DEVICES")],
)
@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_devices_are_a_reason(vendor, variable, value, built_for, monkeypatch):
    built_for(vendor)
    monkeypatch.setenv(variable, value)
    found = module.detect()
    assert found.backend == "reference"
    assert f"{variable}={value!r} hides every GPU" in found.reason


@pytest.mark.gpu
def test_the_devices_own_limits_are_asked():
    limits = dsv4x.platform.limits("cuda")
    properties = torch.cuda.get_device_properties(0)
    assert limits.name == properties.name
    assert limits.multiprocessors == properties.multi_processor_count
    assert limits.shared_memory >= 48 * 1024
    assert dsv4x.platform.limits(0) == limits
    if limits.arch in ("sm_90", "sm_100"):
        assert limits.shared_memory == 232448
