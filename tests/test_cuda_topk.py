"""The CUDA C++ selection: emulated on a CPU, compiled where NVRTC is, and its launches, host side and refusals."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import dsv4x
from dsv4x import Problem, TopkMethod
from dsv4x.common import reference
from dsv4x.common.core.logits_calls import SelectionCall
from dsv4x.common.dispatch import registry
from dsv4x.cuda import cuda_topk, nvrtc

THREADS = 64
COMPILER = shutil.which("c++") or shutil.which("g++")
INF = float("inf")


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    """The kernel on a CPU, with blocks of 64 threads: rows of 1024 columns are held by registers."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "topk.so"
    source = f'-DKERNEL_SOURCE="{cuda_topk.TOPK.path}"'
    header = Path(__file__).with_name("emulated.h")
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-DTHREADS={THREADS}", source]
    subprocess.run([COMPILER, *options, "-x", "c++", header, "-o", library], check=True)
    library = ctypes.CDLL(str(library))
    run, write_late = library.emulate, library.write_late
    run.restype = ctypes.c_bool

    def launch(spread, source, selected, outs, late=None):
        """``late``: the lengths that a kernel in front writes while this one waits for it."""
        size = 0 if late is None else late.numel() * late.element_size()
        addresses = [ctypes.c_void_p(0 if x is None else x.data_ptr()) for x in (source[1], late)]
        write_late(*addresses, ctypes.c_size_t(size))
        arguments = cuda_topk.pack_arguments(
            spread, SelectionCall(*source[:2], *selected[:2], source[2], selected[2], *outs)
        )
        shared_bytes = cuda_topk._SHARED + spread.resident * THREADS * 16
        assert run(arguments, spread.blocks, spread.cluster, shared_bytes), "threads wait for each other"

    return launch


def values_of(kind, rows, width):
    x = torch.randn(rows, width)
    return {
        "normal": x,
        "rounded": (2 * x).round() / 2,
        "equal": torch.full_like(x, 3.0),
        "zeros": torch.where(x > 0, 0.0, -0.0),
        "two values": (x > 0).float(),
        "all -inf": torch.full_like(x, -INF),
        "few finite": torch.where(x > 1.5, x, -INF),
        "nan": torch.where(x > 0, x, torch.nan),
        "all nan": torch.full_like(x, -torch.nan),
        "infinite": torch.where(x > 1, INF, x),
        "ascending": x.sort(dim=1).values,
        "a hundred": 100 + 3 * x,
        "denormal": x * 1e-42,
        "spread": torch.exp(20 * x),
        "next to each other": (0x3F800000 + torch.randint(0, 64, x.shape).int()).view(torch.float32),
    }[kind]


KINDS = (
    "normal", "rounded", "equal", "zeros", "two values", "all -inf", "few finite", "nan", "all nan", "infinite",
    "ascending", "a hundred", "denormal", "spread", "next to each other",
)  # fmt: skip
# Clusters, the longest row of one block, clusters of the grid, resident loads.
SPREADS = [(1, 0, 1, 0), (1, 0, 3, 5), (4, 256, 3, 0), (4, 1024, 1, 2), (8, 300, 1, 5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", SPREADS)
def test_emulated_selection_is_the_references(kind, spread, emulate, rng):
    cluster, solo, clusters, resident = spread
    torch.manual_seed(hash((kind, spread)) % 2**31)
    rows = 3
    for width, k, pad in ((300, 100, 0), (2311, 512, 3)) if solo else ((1024, 1, 0), (4100, 2048, 4)):
        logits = torch.full((rows, width + pad), torch.nan)[:, :width]
        logits[:] = values_of(kind, rows, width)
        spread = cuda_topk.Shape(cluster, solo, cluster * clusters, resident)
        for lens in (None, torch.randint(-2, width + 3, (rows,)), torch.tensor([k, k + 1, width]).int()):
            want, got = (torch.full((rows, k), -7, dtype=torch.int32) for _ in range(2))
            reference.topk_transform(logits, lens, k, TopkMethod.LOCAL, None, {}, want)
            emulate(spread, (logits, lens, None), (k, TopkMethod.LOCAL, {}), (got, None))
            assert torch.equal(got, want), (width, k)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
def test_emulated_spaces_starts_and_hostile_numbers(wide, spread, emulate, rng):
    cluster, solo, clusters, resident = spread
    spread = cuda_topk.Shape(cluster, solo, cluster * clusters, resident)
    torch.manual_seed(1)
    rows, width, k = 7, 1500, 130
    logits = torch.randn(rows, width)
    extreme = torch.tensor([-(2**31), -1, 0, 3, 700, 1501, 2**31 - 1]).to(wide)
    lens = extreme[torch.randperm(rows)]
    starts = extreme[torch.randperm(rows)]
    bases = extreme[torch.randperm(rows)]
    requests = torch.tensor([0, 1, 2, -1, 3, 2**31 - 1, 1]).to(wide)
    for page_size in (1, 3, 64):
        table = torch.randint(-1, 60, (3, width // page_size - 2)).int()
        paged = {"block_table": table, "page_size": page_size, "pages": 50, "next_n": 3}
        for method, space in (
            (TopkMethod.LOCAL, {}),
            (TopkMethod.RAGGED, {"bases": bases}),
            (TopkMethod.PAGED, {**paged, "requests": requests}),
            (TopkMethod.PAGED, {**paged, "requests": None}),
        ):
            for lengths, first in ((lens, None), (None, starts), (lens, starts)):
                want, got, want_local, got_local = (torch.full((rows, k), -7, dtype=torch.int32) for _ in range(4))
                reference.topk_transform(logits, lengths, k, method, first, space, want, want_local)
                emulate(spread, (logits, lengths, first), (k, method, space), (got, got_local))
                assert torch.equal(got_local, want_local)
                assert torch.equal(got, want)


@pytest.mark.parametrize("spread", SPREADS)
def test_emulated_lengths_written_by_the_kernel_in_front(spread, emulate, rng):
    cluster, solo, clusters, resident = spread
    spread = cuda_topk.Shape(cluster, solo, cluster * clusters, resident)
    torch.manual_seed(2)
    logits, k = torch.randn(1, 2500), 100
    table = torch.randint(0, 50, (1, 40)).int()
    paged = {"block_table": table, "page_size": 64, "pages": 50, "next_n": 1, "requests": None}
    for guess in (-1, 0, 99, 100, 260, 2500, 9999):
        for length in (0, 50, 101, 255, 257, 2499):
            lens, late = torch.tensor([guess]).int(), torch.tensor([length]).int()
            want, got = (torch.full((1, k), -7, dtype=torch.int32) for _ in range(2))
            reference.topk_transform(logits, late, k, TopkMethod.PAGED, None, paged, want)
            emulate(spread, (logits, lens, None), (k, TopkMethod.PAGED, paged), (got, None), late)
            assert torch.equal(got, want), (guess, length)


def test_the_host_knows_the_kernels_threads():
    source = cuda_topk.TOPK.path.read_text()
    assert int(re.search(r"define THREADS (\d+)", source)[1]) == cuda_topk.THREADS


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_103a", "sm_120a"])
def test_it_compiles_within_its_registers(arch):
    try:
        nvrtc.version()
    except dsv4x.BackendUnavailable as error:
        pytest.skip(str(error))
    log = nvrtc.compile_source(
        cuda_topk.TOPK.path.read_text(), "topk.cu", (*cuda_topk.TOPK.options_for(arch), "--ptxas-options=-v")
    ).log
    assert int(re.search(r"Used (\d+) registers", log)[1]) <= 65536 // (2 * cuda_topk.THREADS)
    assert int(re.search(r"(\d+) bytes spill stores", log)[1]) <= 192, log


def test_a_source_that_does_not_compile_says_why():
    try:
        nvrtc.version()
    except dsv4x.BackendUnavailable as error:
        pytest.skip(str(error))
    with pytest.raises(RuntimeError, match="no_such_name"):
        nvrtc.compile_source("__global__ void f() { no_such_name(); }", "broken.cu", ("--gpu-architecture=sm_90",))


def test_cubins_come_from_disk_the_second_time(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    made = []

    def compile_source(source, name, options):
        made.append(options)
        return nvrtc.Compiled(source.encode(), "")

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    for source, options in (("a", ("x",)), ("a", ("x",)), ("b", ("x",)), ("a", ("y",))):
        assert nvrtc.cached_cubin(source, "topk.cu", options) == source.encode()
    assert made == [("x",), ("x",), ("y",)]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".cubin"]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("no folder")
    assert nvrtc.cached_cubin("c", "topk.cu", ("x",)) == b"c"


def refusals(monkeypatch, missing="", **change):
    monkeypatch.setattr(nvrtc, "unavailable", lambda arch: missing)
    record = cuda_topk.record()
    return record.not_supported_reasons(
        Problem("topk_transform", "cuda", **{"arch": "sm_90", "tokens": 4, "width": 4096, "k": 512, **change})
    )


def test_what_it_refuses(monkeypatch):
    assert refusals(monkeypatch) == []
    assert "k is 2049, need <= 2048" in refusals(monkeypatch, k=2049)[0]
    assert "arch is sm_80" in refusals(monkeypatch, arch="sm_80")[0]
    assert refusals(monkeypatch, missing="no NVRTC") == ["no NVRTC"]


@pytest.mark.parametrize(
    ("rows", "width", "k", "ahead"),
    [
        (1, 2048, 512, True),
        (16, 262_144, 1024, True),
        (64, 8192, 512, True),
        (64, 131_072, 512, False),
        (300, 262_144, 512, False),
    ],
)
def test_it_is_picked_where_it_was_measured_ahead(rows, width, k, ahead):
    problem = Problem("topk_transform", "cuda", "sm_90", tokens=rows, width=width, k=k)
    assert (cuda_topk.record().call_us(problem) < registry.find("topk_transform", "triton").call_us(problem)) is ahead


def test_it_is_not_picked_unasked_where_it_was_never_run():
    problem = Problem("topk_transform", "cuda", "sm_100", tokens=1, width=2048, k=512)
    assert cuda_topk.record().call_us(problem) == INF
