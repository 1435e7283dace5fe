"""Shared fixtures: kernels and devices to run on, poisoned scratch memory, caches full of garbage."""

import contextlib
import dataclasses
import fcntl
import gc
import os
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
import torch

import dsv4x
from dsv4x import layouts, platform
from dsv4x.common.dispatch import registry

# pytest's importlib mode puts nothing on sys.path; the helper modules beside the tests are imported by name.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("tolerances", "slow")

POISON = {torch.uint8: 0xFF, torch.int32: 0x5A5A5A5A, torch.int64: 0x5A5A5A5A5A5A5A5A}

_LARGE_AT_ONCE = 3

_interpreter, _gpu = pytest.mark.interpreter, pytest.mark.gpu
PORTABLE = [
    pytest.param(("reference", "cpu"), id="reference-cpu"),
    pytest.param(("triton", "cpu"), id="triton-cpu", marks=_interpreter),
    pytest.param(("reference", "cuda"), id="reference-cuda", marks=_gpu),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=_gpu),
]
FLASH_MLA = pytest.param(("flash_mla", "cuda"), id="flash_mla-cuda", marks=_gpu)


def pytest_collection_modifyitems(items):
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("gpu"):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU"))
        elif item.get_closest_marker("interpreter") and not interpreting:
            item.add_marker(pytest.mark.skip(reason="TRITON_INTERPRET is not 1"))


def _poison(tensor):
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    return tensor.fill_(POISON[tensor.dtype]) if tensor.dtype in POISON else tensor


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """Whatever a kernel forgets to write shows as NaN or as a huge index, instead of as a lucky zero."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))
    empty_strided = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *a, **k: _poison(empty_strided(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(new_empty(*a, **k)))


@pytest.fixture(autouse=True, scope="session")
def launched_as_on_a_gpu():
    """The interpreter takes None for a pointer and anything for a number; a GPU's launch does not."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from dsv4x.common.kernels.launch import Launcher

    interpreted = Launcher.__call__

    def call(self, programs, tensors, numbers, constexprs, num_warps, **options):
        assert all(type(tensor) is torch.Tensor for tensor in tensors), [type(tensor) for tensor in tensors]
        assert all(type(number) in (int, float) for number in numbers), numbers
        return interpreted(self, programs, tensors, numbers, constexprs, num_warps, **options)

    Launcher.__call__ = call
    yield
    Launcher.__call__ = interpreted


@pytest.fixture(autouse=True)
def given_back(request):
    """A worker keeps no gigabytes of one test from the others' on its card.

    Tests marked ``large`` are held to a few at a time, whatever workers run them: each belongs to one of as many locks.
    """
    with contextlib.ExitStack() as stack:
        if request.node.get_closest_marker("large") and torch.cuda.is_available():
            number = zlib.crc32(request.node.nodeid.encode()) % _LARGE_AT_ONCE
            lock = stack.enter_context(open(Path(tempfile.gettempdir()) / f"dsv4x-large-{number}", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 1 << 30:
            gc.collect()
            torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Value checks are off unless a test turns them on."""
    monkeypatch.delenv("DSV4X_CHECK", raising=False)


@pytest.fixture
def replaced():
    """``registry.replaced``, entered by a call and undone when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda *records, **how: stack.enter_context(registry.replaced(*records, **how))


@pytest.fixture(params=PORTABLE)
def kernel_device(request):
    """(kernel, device) for ops every backend has."""
    return request.param


@pytest.fixture(params=[*PORTABLE, FLASH_MLA])
def attention_kernel_device(request):
    """(kernel, device) for the attention ops."""
    kernel, _ = request.param
    if kernel == "flash_mla":
        if dsv4x.platform.backend != "cuda":
            pytest.skip(f"backend is {dsv4x.platform.backend}: {dsv4x.platform.reason}")
        from dsv4x.cuda.flash_mla import ARCHS
        from dsv4x.cuda.flash_mla import FLASH_MLA as library

        if dsv4x.platform.arch not in ARCHS or library.reason:
            pytest.skip(library.reason or f"arch is {dsv4x.platform.arch}")
    return request.param


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(20260930)


@pytest.fixture
def make_cache(rng):
    """A cache of random bytes (so nearly every entry holds NaN codes) with live entries at random slots.

    ``spread`` is stride(0) in pages: more than one leaves other bytes between a cache's pages.
    """

    def make(pages, page_size, live, layout=layouts.DSV4, device="cpu", spread=1, k_scale=1.0):
        stride = -(-layout.page_stride(page_size) // 16) * 16
        block = torch.randint(0, 256, (pages, spread, stride), dtype=torch.uint8, generator=rng)
        cache = dsv4x.PagedCache(block[:, spread // 2], layout, page_size)
        slots = torch.randperm(cache.capacity, generator=rng)[:live]
        # Of the size FlashMLA's tolerances are meant for: the kernels round softmax weights to bf16.
        k = (
            torch.randn(live, layout.head_dim, generator=rng)
            / 10
            * 2.0 ** torch.randint(-2, 2, (live, 1), generator=rng)
        )
        dsv4x.quantize_and_insert_k_cache(k.bfloat16(), cache, slots, k_scale=k_scale, kernel="reference")
        return on_device(cache, device), slots

    return make


def on_device(value, device):
    """The same tensors and caches on ``device``, strides and the bytes between them kept."""
    if isinstance(value, dict):
        return {key: on_device(v, device) for key, v in value.items()}
    if isinstance(value, dsv4x.PagedCache):
        return dsv4x.PagedCache(on_device(value.data, device), value.layout, value.page_size)
    if not isinstance(value, torch.Tensor) or value.device.type == torch.device(device).type:
        return value
    raw = value.new_empty(0).set_(value.untyped_storage()).to(device)
    return raw.as_strided(value.shape, value.stride(), value.storage_offset())


@pytest.fixture(name="on_device")
def on_device_fixture():
    return on_device


@pytest.fixture(params=["gfx942", "gfx950"])
def on_gfx(request, monkeypatch):
    """An AMD GPU's launch shapes and its variants of the kernels, which the interpreter runs in its stead."""
    fp8 = "e4m3fnuz" if request.param == "gfx942" else "e4m3fn"
    limits = dataclasses.replace(platform.limits("cpu"), arch=request.param, multiprocessors=4, fp8=fp8)
    monkeypatch.setattr(type(platform), "limits", lambda self, device=None: limits)


@pytest.fixture
def index_rows(rng):
    """int32 ``[tokens, width]`` drawn from ``live`` slots, with -1 holes anywhere."""

    def rows(live, tokens, width, holes=0.2):
        picked = live[torch.randint(len(live), (tokens, width), generator=rng)].int()
        return picked.masked_fill(torch.rand(tokens, width, generator=rng) < holes, -1)

    return rows
