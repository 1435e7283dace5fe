"""Chunk invariance: however a sequence is chunked, paged and routed, the dense layer's output comes out."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from layer_kinds import paths_of

from dsv4x import platform
from dsv4x.demo import layer as layer_module
from dsv4x.demo import server as demo
from dsv4x.demo.layer import Layer, as_stored

CPU = ("cpu", "reference")
INTERPRETER = pytest.param(("cpu", "triton"), marks=pytest.mark.interpreter)
GPU = [pytest.param(("cuda", kernel), marks=pytest.mark.gpu) for kernel in ("reference", "triton", "flash_mla")]
RATIOS = (1, 4, 128)


def tokens(length, device, seed=0):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).to(device)


def served(layer, sequences, steps, **options):
    """Every sequence's out and lse, whole, from a server stepped through ``steps``."""
    step_options = {name: options.pop(name) for name in ("path", "kernel", "padding") if name in options}
    server = demo.PagedServer(layer, sequences, **options)
    pieces = [server.step(step, **step_options)[:2] for step in steps]
    return [[torch.cat([piece[part][i] for piece in pieces]) for part in range(2)] for i in range(len(sequences))]


def assert_dense(layer, sequences, results):
    for sequence, (out, lse) in zip(sequences, results):
        expected, expected_lse = layer.dense(sequence, stored=True, dtype=torch.float64)
        assert demo.relative_error(out, expected) <= demo.MAX_ERROR
        torch.testing.assert_close(lse.double(), expected_lse, rtol=8.01 / 65536, atol=1e-5)
        exact, _ = layer.dense(sequence, stored=False, dtype=torch.float64)
        assert demo.relative_error(out, exact) <= demo.MAX_FP8_ERROR


@pytest.mark.parametrize(("ratio", "path"), [(r, p) for r in RATIOS for p in paths_of(r)])
@pytest.mark.parametrize("page_sizes", [(1, 2), (61, 64), (256, 2)])
@pytest.mark.parametrize("where", [CPU, *GPU])
def test_any_chunking_gives_the_dense_layer(where, page_sizes, path, ratio):
    device, kernel = where
    layer = Layer(ratio, 4, topk=24, device=device, seed=ratio)
    lengths = (300, 131, 1, 64)
    sequences = [layer.sequence(tokens(n, device, n)) for n in lengths]
    swa, extra = page_sizes
    for seed in range(2):
        results = served(
            layer, sequences, demo.mixed_schedule(list(lengths), seed),
            path=path, kernel=kernel, padding=seed, swa_page_size=swa, extra_page_size=extra, seed=seed,
        )  # fmt: skip
        assert_dense(layer, sequences, results)


@pytest.mark.parametrize(("ratio", "path"), [(r, p) for r in RATIOS for p in paths_of(r)])
@pytest.mark.parametrize("where", [INTERPRETER])
def test_the_triton_kernels_give_the_dense_layer(where, path, ratio):
    device, kernel = where
    layer = Layer(ratio, 2, topk=24, device=device, seed=ratio)
    sequences = [layer.sequence(tokens(n, device, n)) for n in (140, 9)]
    results = served(layer, sequences, [[130, 8], [1, 0], [0, 1], [9, 0]], path=path, kernel=kernel, padding=1)
    assert_dense(layer, sequences, results)


@pytest.mark.parametrize("page_size", [2, 64])
@pytest.mark.parametrize("where", [CPU, INTERPRETER, *GPU[:2]])
def test_the_servers_indexer_selects_what_the_oracle_does(where, page_size):
    """From pages and from gathered rows, mixed chunks and few queries, ties included."""
    device, kernel = where
    layer = Layer(4, 1, topk=16, device=device)
    sequences = [layer.sequence(tokens(n, device, n)) for n in (150, 90)]
    server = demo.PagedServer(layer, sequences, extra_page_size=page_size)
    done = [0, 0]
    for step in ([100, 60], [1, 1], [3, 3], [0, 2], [40, 0], [6, 5]):
        _, _, report = server.step(step, kernel=kernel, padding=1)
        want = [s.topk[at : at + n].int() for s, at, n in zip(sequences, done, step)]
        assert torch.equal(report.topk[: sum(step)], torch.cat(want))
        done = [at + n for at, n in zip(done, step)]


def test_the_index_flavour_changes_no_selection(monkeypatch):
    """gfx942's FP8 holds the same small integers."""
    text = tokens(200, "cpu")
    ocp = Layer(4, 1, topk=16)
    limits = dataclasses.replace(platform.limits("cpu"), fp8="e4m3fnuz")
    monkeypatch.setattr(layer_module, "platform", SimpleNamespace(limits=lambda device: limits))
    fnuz = Layer(4, 1, topk=16)
    assert fnuz.index_layout.value_encoding == "e4m3fnuz"
    assert fnuz.sequence(text).index_q.dtype == torch.float8_e4m3fnuz
    assert torch.equal(fnuz.sequence(text).topk, ocp.sequence(text).topk)
    results = served(fnuz, [fnuz.sequence(text)], [[150], [4], [46]], kernel="reference")
    assert_dense(fnuz, [fnuz.sequence(text)], results)


@pytest.mark.parametrize("ratio", RATIOS)
def test_chunkings_agree_token_by_token(ratio):
    layer = Layer(ratio, 3, topk=16, seed=1)
    sequence = layer.sequence(tokens(270, "cpu"))
    whole = served(layer, [sequence], [[270]])
    single = served(layer, [sequence], [[1]] * 270, swa_page_size=2, extra_page_size=61, seed=5)
    for a, b in zip(whole[0], single[0]):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.large
@pytest.mark.gpu
@pytest.mark.parametrize(("ratio", "path"), [(r, p) for r in RATIOS for p in (*paths_of(r), None)])
@pytest.mark.parametrize("kernel", ["triton", "flash_mla"])
@pytest.mark.parametrize("heads", [8, 64, 128])
def test_long_sequences_on_the_gpu(heads, kernel, path, ratio):
    layer = Layer(ratio, heads, topk=512, device="cuda", seed=ratio)
    lengths = [5000, 700, 129, 1]
    sequences = [layer.sequence(tokens(n, "cuda", n)) for n in lengths]
    outcome = demo.serve_and_check(layer, sequences, path=path, kernel=kernel, seed=heads)
    assert outcome.passed, outcome


def test_the_layer_depends_on_what_it_should():
    """The oracle itself: a far token reaches a C4 query only through its entry, the window only within 128."""
    layer = Layer(4, 2, topk=8, seed=3)
    changed = tokens(400, "cpu").clone()
    base = layer.sequence(changed)
    out, _ = layer.dense(base, stored=False)
    raw = base.raw.clone()
    raw[100] += 1
    moved, _ = layer.dense(type(base)(base.q, raw, base.compressed, base.topk), stored=False)
    differs = (moved != out).any(-1).any(-1)
    assert differs.nonzero().flatten().tolist() == list(range(100, 228))
    compressed = base.compressed.clone()
    entry = int(base.topk[300][0])
    compressed[entry] += 1
    moved, _ = layer.dense(type(base)(base.q, base.raw, compressed, base.topk), stored=False)
    differs = (moved != out).any(-1).any(-1)
    assert torch.equal(differs, (base.topk == entry).any(-1))


def test_stored_entries_are_within_fp8_of_exact_ones():
    entries = (torch.randn(500, 512) * torch.logspace(-6, 6, 500)[:, None]).bfloat16()
    stored = as_stored(entries)
    scale = entries[:, :448].float().view(500, 7, 64).abs().amax(-1).clamp_min(1e-4).repeat_interleave(64, 1)
    assert ((stored - entries)[:, :448].float().abs() <= scale * 2**-4).all()
    assert torch.equal(stored[:, 448:], entries[:, 448:])


def test_schedules_are_mixed_and_finish():
    steps = list(demo.mixed_schedule([400, 100, 1], 0))
    assert [sum(s[i] for s in steps) for i in range(3)] == [400, 100, 1]
    assert {0, 1, 3} <= {count for step in steps for count in step}
    assert any(min(step) < 2 and max(step) > 3 for step in steps)
