"""Selection against its definition in plain Python: ties, NaN, -inf, hostile lengths, every index space."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsv4x
from dsv4x import TopkMethod, topk_transform
from dsv4x.common.core.logits_calls import SelectionCall
from dsv4x.common.kernels import topk as kernels

NEITHER = [HealthCheck.function_scoped_fixture]
HOSTILE = [-(2**31), -1, 2**31 - 1]
INF = math.inf


@pytest.fixture(params=["small", "large"])
def sizes(request, kernel_device, monkeypatch):
    """The kernel's own sizes, or small ones, with which short rows take every way a long one can.

    On a GPU a block has an element for every thread at least.
    """
    if request.param == "small":
        room = 64 if kernel_device[1] == "cpu" else 512
        made = kernels._Sizes(small=room, large=2 * room, sample=2 * room, block=2 * room, part=room)
        monkeypatch.setattr(kernels, "_SIZES", made)


def defined_local(row, length, k, start=0):
    """The k best of a row's entries: by value, then by index; in index order."""
    start = min(max(start, 0), len(row))
    entries = row[start : start + max(length, 0)]
    keys = [(-INF if math.isnan(v) else v + 0.0, -i) for i, v in enumerate(entries)]
    return sorted(-i for _, i in sorted(keys, reverse=True)[:k])


def padded(rows, k):
    return [row + [-1] * (k - len(row)) for row in rows]


def values_of(kind, rows, width, rng):
    x = torch.randn(rows, width, generator=rng)
    return {
        "normal": x,
        "rounded": (2 * x).round() / 2,
        "equal": torch.full_like(x, 3.0),
        "zeros": torch.where(x > 0, 0.0, -0.0),
        "all -inf": torch.full_like(x, -INF),
        "mostly -inf": torch.where(x > 1.5, x, -INF),
        "nan": torch.where(x > 0, x, torch.nan),
        "negative nan": torch.where(x > 0, x, -torch.nan),
        "infinite": torch.where(x > 1, INF, x),
        "ascending": x.sort(dim=1).values,
        "one exponent": 1 + x.abs() / 1000,
        "tiny": x * 1e-42,
    }[kind]


KINDS = ["normal", "rounded", "equal", "zeros", "all -inf", "mostly -inf", "nan", "negative nan", "infinite",
         "ascending", "one exponent", "tiny"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, derandomize=True, deadline=None, suppress_health_check=NEITHER)
@given(width=st.integers(0, 700), k=st.integers(1, 150), seed=st.integers(0, 99), starts=st.booleans(), data=st.data())
def test_selection_follows_the_definition(kind, width, k, seed, starts, data, sizes, kernel_device):
    kernel, device = kernel_device
    rng = torch.Generator().manual_seed(seed)
    rows = data.draw(st.integers(0, 3))
    logits = values_of(kind, rows, width, rng)
    length = st.integers(0, width + 3) | st.sampled_from(HOSTILE)
    lens = data.draw(st.lists(length, min_size=rows, max_size=rows))
    first = data.draw(st.lists(length, min_size=rows, max_size=rows)) if starts else [0] * rows
    block = torch.full((rows, width + 2), torch.nan)
    block[:, :width] = logits
    got = topk_transform(
        block.to(device)[:, :width], torch.tensor(lens, dtype=torch.int64).to(device), k,
        row_starts=torch.tensor(first, dtype=torch.int64).to(device) if starts else None, kernel=kernel,
    )  # fmt: skip
    want = [defined_local(row, n, k, s) for row, n, s in zip(logits.tolist(), lens, first)]
    assert got.tolist() == padded(want, k)


@pytest.mark.parametrize("k", [512, 1024, 2048])
def test_more_than_a_thousand_equal_scores(k, kernel_device):
    kernel, device = kernel_device
    logits = torch.zeros(2, 6000)
    logits[0, 3000:3100] = 1.0
    logits[1, ::3] = -1.0
    got = topk_transform(logits.to(device), None, k, kernel=kernel).tolist()
    assert got == [defined_local(row, 6000, k) for row in logits.tolist()]


def test_the_same_whatever_the_rows_beside(kernel_device, rng):
    """Few rows are cut in parts and many are not: the selection is the same."""
    kernel, device = kernel_device
    logits = (4 * torch.randn(3, 40_000, generator=rng)).round().to(device)
    alone = [topk_transform(logits[i : i + 1], None, 600, kernel=kernel) for i in range(3)]
    assert torch.equal(torch.cat(alone), topk_transform(logits, None, 600, kernel=kernel))


@pytest.mark.parametrize("stable", [True, False])
def test_ragged_adds_a_base_a_row(stable, sizes, kernel_device, rng):
    kernel, device = kernel_device
    logits = torch.randn(4, 300, generator=rng)
    bases = torch.tensor([0, 1000, -1, 2**31 - 100]).to(device)
    got = topk_transform(
        logits.to(device), None, 20, TopkMethod.RAGGED, bases=bases, stable=stable, kernel=kernel
    ).tolist()
    local = [defined_local(row, 300, 20) for row in logits.tolist()]
    assert sorted(got[0]) == local[0]
    assert sorted(got[1]) == [1000 + i for i in local[1]]
    assert got[2] == [-1] * 20
    top = 2**31 - 100
    assert sorted(got[3]) == sorted(top + i if i < 100 else -1 for i in local[3])


@pytest.mark.parametrize("named", [False, True])
def test_paged_goes_through_the_rows_own_table(named, sizes, kernel_device, rng):
    kernel, device = kernel_device
    logits = torch.randn(6, 250, generator=rng)
    table = torch.randint(0, 9, (3, 12), generator=rng).int()
    table[0, 1], table[1, 0], table[2, 3] = 9, -5, 2**31 - 1
    owner = [2, 0, -1, 3, 1, 1] if named else [0, 0, 1, 1, 2, 2]
    got = topk_transform(
        logits.to(device), None, 40, TopkMethod.PAGED, block_table=table.to(device), page_size=16, pages=9,
        next_n=2, requests=torch.tensor(owner).to(device) if named else None, kernel=kernel,
    ).tolist()  # fmt: skip
    want = []
    for row, request in zip(logits.tolist(), owner):
        slots = []
        for i in defined_local(row, 250, 40):
            page = int(table[request, i // 16]) if 0 <= request < 3 and i // 16 < 12 else -1
            slots.append(page * 16 + i % 16 if 0 <= page < 9 else -1)
        want.append(slots)
    assert got == want


@pytest.mark.parametrize(
    ("rows", "width", "change", "wide", "programs"),
    [
        (2, 2048, {}, True, 2),
        (2, 8192, {}, True, 8),
        (2, 262_144, {}, True, 8),
        (8, 262_144, {}, True, 8),
        (9, 262_144, {}, True, 9),
        (40, 262_144, {}, True, 16),
        (2, 8192, {"starts": True}, False, 8),
        (2, 8190, {}, False, 8),
    ],
)
def test_programs_follow_the_rows_and_loads_the_alignment(rows, width, change, wide, programs, monkeypatch):
    """The interpreter takes any promise; a GPU would drop columns."""
    launches = []
    limits = SimpleNamespace(multiprocessors=8, arch="sm_90")
    monkeypatch.setattr(kernels, "platform", SimpleNamespace(limits=lambda device: limits))
    monkeypatch.setattr(kernels, "depends_early", lambda arch: False)
    monkeypatch.setattr(kernels, "_launch_topk", lambda *given, num_warps: launches.append(given))
    starts = torch.zeros(rows, dtype=torch.int32) if change else None
    out = torch.empty(rows, 8, dtype=torch.int32)
    kernels.topk_transform(SelectionCall(torch.empty(rows, width), None, 8, TopkMethod.LOCAL, starts, {}, out))
    ((grid, _, numbers, constexprs),) = launches
    names = dict(zip(kernels.topk_kernel.arg_names[-len(constexprs) :], constexprs))
    assert (grid, names["ALIGNED"], names["LISTS"]) == (programs, wide, width > 4096)
    assert numbers[3] == (max(1, 8 // rows) if width > 4096 else 1)


def hostile(kind, width, k, rng):
    """A row that a sample of it says nothing about, or whose keys are hard to tell apart."""
    x = torch.randn(width, generator=rng)
    at = torch.arange(width)
    return {
        "best at the sampled columns": torch.where(at % 16 < 4, x + 100, x),
        "best between them": torch.where(at % 16 >= 12, x + 100, x),
        "best in one place": torch.where((at > width // 2) & (at < width // 2 + k + 3), x + 100, x),
        "falling": -x.sort().values,
        "two values": (at % 3 == 0).float(),
        "k of the larger": (at < k).float(),
        "k + 1 of the larger": (at >= width - k - 1).float(),
        "neighbours": (1000 + at % 7).int().view(torch.float32),
        "one large": torch.where(at == width - 1, 3e38, x),
        "both ends of float32": torch.where(at % 2 == 0, 3e38, -3e38) * torch.rand(width, generator=rng),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["best at the sampled columns", "best between them", "best in one place", "falling", "two values",
     "k of the larger", "k + 1 of the larger", "neighbours", "one large", "both ends of float32"],
)  # fmt: skip
def test_rows_made_to_mislead(kind, sizes, kernel_device, rng):
    kernel, device = kernel_device
    for width, k in ((600, 20), (129, 32), (2500, 40)):
        row = hostile(kind, width, k, rng)
        got = topk_transform(row[None].to(device), None, k, kernel=kernel)
        assert got.tolist() == [defined_local(row.tolist(), width, k)]


@pytest.mark.parametrize("method", list(TopkMethod))
def test_local_entries_beside_the_selection(method, sizes, kernel_device, rng):
    """From the same selection, and where the space has no index too."""
    kernel, device = kernel_device
    logits = torch.randn(3, 700, generator=rng)
    lens = torch.tensor([700, 12, 300])
    table = torch.randint(-1, 9, (3, 40), generator=rng).int()
    given = {
        TopkMethod.LOCAL: {},
        TopkMethod.RAGGED: {"bases": torch.tensor([5, -1, 2**31 - 100]).to(device)},
        TopkMethod.PAGED: {"block_table": table.to(device), "page_size": 16, "pages": 9},
    }[method]
    local = torch.full((3, 20), -7, dtype=torch.int32, device=device)
    got = topk_transform(logits.to(device), lens.to(device), 20, method, **given, out_local=local, kernel=kernel)
    want = [defined_local(row, n, 20) for row, n in zip(logits.tolist(), lens.tolist())]
    assert local.tolist() == padded(want, 20)
    assert torch.equal(got, topk_transform(logits.to(device), lens.to(device), 20, method, **given, kernel=kernel))
    if method is TopkMethod.LOCAL:
        assert torch.equal(got, local)
    else:
        assert (got == -1).sum() > (local == -1).sum()


def test_each_entry_point_has_its_space():
    assert dsv4x.topk_method("sparse_mla_attention") is TopkMethod.LOCAL
    assert dsv4x.topk_method("sparse_mla_decode") is TopkMethod.PAGED
    assert dsv4x.topk_method("sparse_mla_prefill") is TopkMethod.RAGGED
    with pytest.raises(ValueError, match="op: got 'decode', need one of"):
        dsv4x.topk_method("decode")
    with pytest.raises(ValueError, match="need one of"):
        dsv4x.topk_method(["sparse_mla_decode"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3).bfloat16()}, TypeError, "logits: dtype is bfloat16, need float32"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, ValueError, r"lengths: shape is \(3,\), need \(2\)"),
        ({"k": 0}, ValueError, "k: got 0, need 1"),
        ({"method": "local"}, TypeError, "method: got str, need a dsv4x.TopkMethod"),
        ({"method": TopkMethod.RAGGED}, ValueError, "bases: got None"),
        ({"method": TopkMethod.PAGED}, ValueError, "block_table: got None"),
        (
            {"method": TopkMethod.PAGED, "block_table": torch.zeros(1, 1).int(), "page_size": 4, "pages": 1},
            ValueError,
            "block_table: 1 requests, need >= 2 for 2 rows",
        ),
        ({"out": torch.zeros(2, 2).int()}, ValueError, r"out: shape is \(2, 2\), need \(2, 1\)"),
        ({"out_local": torch.zeros(2, 1)}, TypeError, "out_local: dtype is float32, need int32"),
        ({"kernel": "aiter"}, dsv4x.KernelNotSupported, "cannot run topk_transform"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        topk_transform(**{"logits": torch.zeros(2, 3), "lengths": None, "k": 1, **change})


def test_a_length_past_its_row_is_named_when_asked_for(monkeypatch):
    monkeypatch.setenv("DSV4X_CHECK", "1")
    with pytest.raises(ValueError, match="lengths: 4 in row 1, need 0 to what is left of 3 columns"):
        topk_transform(torch.zeros(2, 3), torch.tensor([3, 4]), 1)
