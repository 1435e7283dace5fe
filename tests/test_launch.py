"""Launches that are remembered: each is for what it was compiled for, and few are kept."""

import itertools

import pytest
import torch

import dsv4x
from dsv4x import reference

pytestmark = pytest.mark.gpu


def local_to_slots(local, requests, table):
    request = torch.arange(local.shape[0], dtype=torch.int32, device="cuda") % requests
    limits = torch.full_like(request, 1 << 20)
    return dsv4x.local_to_slots(local, request, limits, table, 16, 64), (request, limits)


@pytest.mark.parametrize("first", range(4))
def test_every_alignment_dtype_and_size(first):
    """A kernel compiled for wide loads, or for a width of 1 or of a multiple of 16, must not serve another call."""
    cases = list(itertools.product((0, 1, 4), (torch.int32, torch.int64), (1, 15, 16, 32), (1, 16, 17)))
    generator = torch.Generator("cuda").manual_seed(first)
    # Whatever comes first is compiled and remembered first.
    for offset, dtype, width, requests in cases[first::4] + cases:
        flat = torch.randint(-2, 800, (offset + 8 * width,), dtype=dtype, device="cuda", generator=generator)
        local = flat[offset:].view(8, width)
        table = torch.randint(-1, 66, (requests, 48), dtype=torch.int32, device="cuda", generator=generator)
        slots, (request, limits) = local_to_slots(local, requests, table)
        expected = torch.empty_like(slots)
        reference.local_to_slots(local, request, limits, table, 16, 64, expected)
        assert torch.equal(slots, expected), (offset, dtype, width, requests)


def test_few_are_kept():
    from dsv4x.common.kernels import indices, launch

    local = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    request, limits = torch.zeros(1, dtype=torch.int32, device="cuda"), torch.ones(1, dtype=torch.int32, device="cuda")
    table = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    for pages in range(1, launch._MOST + 100):
        assert int(dsv4x.local_to_slots(local, request, limits, table, 16, pages)) == 0
    assert len(indices._launch_local_to_slots._compiled) <= launch._MOST


def test_launch_hooks_are_called():
    """Profilers hang on Triton's launch hooks."""
    import triton

    calls = []

    def hook(metadata):
        calls.append(metadata.get()["name"])

    local = torch.zeros(2, 16, dtype=torch.int32, device="cuda")
    table = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    local_to_slots(local, 1, table)
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        local_to_slots(local, 1, table)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert calls == ["local_to_slots_kernel"]
