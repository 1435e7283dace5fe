"""The Triton prefill kernel's table of shapes: every row computes the same attention, in Triton's interpreter."""

import dataclasses
import itertools

import pytest
import torch
from tolerances import check_prefill

import dsv4x
from dsv4x import reference

# The table is data and needs no triton, but its package imports it.
prefill_config = pytest.importorskip("dsv4x.common.kernels.prefill_shapes")

ARCHS = ["gfx942", "gfx950", "sm_90", "sm_100", "sm_120", "cpu"]
ROWS = {
    (head_dim, dataclasses.replace(config, hip=()))
    for arch in ARCHS
    for head_dim in (512, 576)
    for _, config in prefill_config.prefill_configs(arch, head_dim)
}


@pytest.mark.parametrize("head_dim", [512, 576])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_number_of_heads_has_a_row(arch, head_dim):
    limits = [most for most, _ in prefill_config.prefill_configs(arch, head_dim)]
    assert limits == sorted(set(limits))
    assert limits[-1] == 128
    chosen = [prefill_config.prefill_config(arch, heads, head_dim) for heads in range(1, 129)]
    assert all(a.block_h <= b.block_h for a, b in itertools.pairwise(chosen))


def test_options_of_hip_are_given_to_hip_only():
    for arch in ARCHS:
        options = prefill_config.prefill_config(arch, 64, 512).options
        assert ("matrix_instr_nonkdim" in options) == arch.startswith("gfx")
        assert ("kpack" in options) == (arch == "gfx942")


@pytest.mark.interpreter
@pytest.mark.parametrize(("head_dim", "config"), sorted(ROWS, key=str), ids=str)
def test_every_row_computes_attention(head_dim, config, monkeypatch, index_rows, rng):
    from dsv4x.common.kernels import prefill

    monkeypatch.setattr(prefill, "prefill_config", lambda arch, heads, head_dim: config)
    heads, width, live = config.block_h + 3, 2 * config.block_k + 5, 40
    kv = torch.full((50, head_dim), float("nan"), dtype=torch.bfloat16)
    slots = torch.randperm(50, generator=rng)[:live]
    kv[slots] = (torch.randn(live, head_dim, generator=rng) / 10).bfloat16()
    q = torch.randn(3, heads, head_dim, generator=rng).bfloat16()
    indices, lens = index_rows(slots, 3, width), torch.tensor([width, config.block_k, 0], dtype=torch.int32)
    sink = torch.randn(heads, generator=rng)
    got = dsv4x.sparse_mla_prefill(q, kv, indices, lens, sink, 0.05, kernel="triton")
    check_prefill(*got, *reference.sparse_mla_prefill(q, kv, indices, lens, sink, 0.05, torch.float64))
