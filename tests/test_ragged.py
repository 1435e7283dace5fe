"""AITER's flat lists in two launches: what ``dense_to_ragged`` gives, and nothing left unwritten."""

import types

import pytest
import torch

import dsv4x


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 128), (7, 513), (600, 5), (5, 1200)])
def test_rows_are_what_dense_to_ragged_makes_of_them(tokens, width, given, dtype, device):
    from dsv4x.rocm.cdna.ragged import ragged_rows

    torch.manual_seed(width)
    indices = torch.randint(-3, 104, (tokens, width + 3), dtype=dtype, device=device)[:, 1 : width + 1]
    lens = torch.randint(-2, width + 5, (tokens,), dtype=dtype, device=device) if given else None
    values, indptr = ragged_rows(indices, lens, 100)
    want, begins, _ = dsv4x.dense_to_ragged(indices, lens, capacity=tokens * width, upper=100, kernel="reference")
    assert torch.equal(indptr, begins)
    assert torch.equal(values, want)


def test_rows_without_any_entry(device):
    from dsv4x.rocm.cdna.ragged import ragged_rows

    values, indptr = ragged_rows(torch.full((4, 70), -1, dtype=torch.int32, device=device), None, 10)
    assert not indptr.any()
    assert (values == -1).all()


@pytest.mark.parametrize(("tokens", "width", "two"), [(1, 8, True), (2048, 1, True), (2049, 1, False), (3, 0, False)])
def test_aiters_rows_are_made_so_on_a_gpu_up_to_so_many(tokens, width, two, monkeypatch):
    from dsv4x.rocm import aiter
    from dsv4x.rocm.cdna import ragged

    monkeypatch.setattr(ragged, "ragged_rows", lambda *given: ("two launches", given))
    monkeypatch.setattr(aiter.indices, "dense_to_ragged", lambda *given, **more: ("the op", more, None))
    rows = types.SimpleNamespace(is_cuda=True, shape=(tokens, width), numel=lambda: tokens * width)
    made, given = aiter.Source(torch.empty(77, 512), rows, None).ragged()
    assert made == ("two launches" if two else "the op")
    assert given == ((rows, None, 77) if two else {"capacity": max(1, tokens * width), "upper": 77})
