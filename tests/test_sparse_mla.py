"""The two attention ops: the reference against float64 loops, every kernel against the float64 reference."""

import dataclasses

import numpy as np
import pytest
import slow
import torch
from calling import decode_call
from tolerances import check_close, check_decode, check_prefill

import dsv4x
from dsv4x import platform, reference
from dsv4x.common.core.layouts import DSV4, PagedCache
from dsv4x.common.dispatch import registry

INF = float("inf")


@pytest.fixture
def decode_case(make_cache, index_rows, rng):
    """Arguments of sparse_mla_decode on the CPU, over caches in which all but the live entries is garbage."""

    def make(
        tokens=4, heads=16, width=40, extra_width=None, page_size=64, extra_page_size=2, lens=True, sink=True, live=30
    ):
        case = {"q": 3 * torch.randn(tokens, heads, 512, generator=rng).bfloat16()}
        scopes = [("swa", width, page_size)]
        if extra_width is not None:
            scopes.append(("extra", extra_width, extra_page_size))
        for scope, columns, size in scopes:
            pages = max(2, -(-2 * live // size))
            cache, slots = make_cache(pages, size, min(live, pages * size), spread=2)
            case[f"{scope}_cache"] = cache
            case[f"{scope}_indices"] = index_rows(slots, tokens, columns)
            spans = torch.randint(0, columns + 1, (tokens,), dtype=torch.int32, generator=rng) if lens else None
            case[f"{scope}_lens"] = spans
        if sink:
            case["attn_sink"] = torch.randn(heads, generator=rng)
        return case

    return make


@pytest.fixture
def prefill_case(index_rows, rng):
    def make(tokens=4, heads=16, width=40, rows=50, live=30, lens=True, sink=True):
        kv = torch.full((rows, 512), float("nan"), dtype=torch.bfloat16)
        slots = torch.randperm(rows, generator=rng)[:live]
        kv[slots] = (torch.randn(live, 512, generator=rng) / 10).bfloat16()
        return {
            "q": 3 * torch.randn(tokens, heads, 512, generator=rng).bfloat16(),
            "kv": kv,
            "indices": index_rows(slots, tokens, width),
            "lens": torch.randint(0, width + 1, (tokens,), dtype=torch.int32, generator=rng) if lens else None,
            "attn_sink": torch.randn(heads, generator=rng) if sink else None,
        }

    return make


@pytest.fixture
def decode(attention_kernel_device, on_device):
    """Run a case by the kernel and on the device under test, and check it; returns what it returned."""
    kernel, device = attention_kernel_device

    def run(case, **keywords):
        out, lse = dsv4x.sparse_mla_decode(**on_device(case, device), kernel=kernel, **keywords)
        check_result(out, lse, case)
        check_decode(out, lse, *reference.sparse_mla_decode(**case, dtype=torch.float64))
        return out, lse

    return run


@pytest.fixture
def prefill(attention_kernel_device, on_device):
    kernel, device = attention_kernel_device

    def run(case, **keywords):
        out, lse = dsv4x.sparse_mla_prefill(**on_device(case, device), kernel=kernel, **keywords)
        check_result(out, lse, case)
        check_prefill(out, lse, *reference.sparse_mla_prefill(**case, dtype=torch.float64))
        return out, lse

    return run


def check_result(out, lse, case):
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert out.shape == case["q"].shape
    assert lse.shape == case["q"].shape[:2]
    assert lse.is_contiguous()


def hostile(capacity, dtype):
    values = [-2, -(2**31), capacity, 2**31 - 1]
    if dtype == torch.int64:
        values += [2**31, 2**32, 2**40, -(2**40), 2**63 - 1, -(2**63)]
    return values


def make_hostile(indices, capacity, dtype):
    """Every other column an index that is no entry, wherever in the row."""
    values = torch.tensor(hostile(capacity, dtype), dtype=dtype)
    indices = indices.to(dtype)
    columns = indices[:, ::2].shape[1]
    indices[:, ::2] = values.repeat(-(-columns // len(values)))[:columns]
    return indices


# The reference against definitions that share no code with it.


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("extra_width", [None, 25])
def test_decode_reference_is_the_definition(extra_width, lens, sink, decode_case):
    case = decode_case(tokens=5, heads=3, extra_width=extra_width, lens=lens, sink=sink)
    case["swa_indices"] = make_hostile(case["swa_indices"], case["swa_cache"].capacity, torch.int64)
    case["swa_indices"][4] = -1
    if extra_width:
        case["extra_indices"][4] = -1
    if sink:
        case["attn_sink"][1:] = torch.tensor([INF, -INF])
    scopes = [
        (case[f"{s}_cache"], case[f"{s}_indices"], case[f"{s}_lens"]) for s in ("swa", "extra") if f"{s}_cache" in case
    ]
    want = slow.decode(case["q"], scopes, case.get("attn_sink"))
    got = reference.sparse_mla_decode(**case, dtype=torch.float64)
    for name, a, b in zip(("out", "lse"), got, want):
        check_close(name, a, b, absolute=1e-12, relative=1e-12)
    assert not got[0][4].any()
    assert (got[1][4] == INF).all()


@pytest.mark.parametrize("scale", [None, 0.11])
@pytest.mark.parametrize("lens", [False, True])
def test_prefill_reference_is_the_definition(lens, scale, prefill_case):
    case = prefill_case(tokens=5, heads=3, lens=lens)
    case["indices"] = make_hostile(case["indices"], 50, torch.int64)
    case["indices"][2] = -1
    kv = case["kv"].double().numpy()
    rows = []
    for t in range(5):
        span = int(case["lens"][t]) if lens else 40
        rows.append(kv[[i for i in case["indices"][t, :span].tolist() if 0 <= i < 50]].reshape(-1, 512))
    want = slow.attend(case["q"], rows, case["attn_sink"], scale or 512**-0.5)
    got = reference.sparse_mla_prefill(**case, softmax_scale=scale, dtype=torch.float64)
    for name, a, b in zip(("out", "lse"), got, want):
        check_close(name, a, b, absolute=1e-12, relative=1e-12)


def test_entries_that_are_not_valid_may_hold_anything(rng):
    q, kv = torch.randn(2, 3, 8, generator=rng), torch.randn(2, 5, 8, generator=rng)
    valid = torch.tensor([[True, False, True, False, False], [False] * 5])
    dirty = torch.where(valid[..., None], kv, torch.tensor([float("nan"), INF] * 4))
    for clean, got in zip(reference.attend(q, kv, valid, None, 0.5), reference.attend(q, dirty, valid, None, 0.5)):
        assert torch.equal(clean, got)


def test_reference_in_chunks_is_the_reference(decode_case, monkeypatch):
    case = decode_case(tokens=5, heads=2, extra_width=9)
    whole = reference.sparse_mla_decode(**case)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 2 * 49 * 512)
    for a, b in zip(whole, reference.sparse_mla_decode(**case)):
        torch.testing.assert_close(a, b)


# Every kernel against the float64 reference.


@pytest.mark.parametrize("heads", [1, 5, 16, 20])
@pytest.mark.parametrize(("width", "extra_width"), [(1, None), (33, None), (100, None), (20, 100), (64, 1)])
def test_decode_matches(width, extra_width, heads, decode, decode_case):
    decode(decode_case(heads=heads, width=width, extra_width=extra_width))


@pytest.mark.parametrize(("heads", "tokens"), [(64, 1), (100, 1), (128, 2)])
def test_decode_matches_with_many_heads(heads, tokens, decode, decode_case):
    decode(decode_case(heads=heads, tokens=tokens, width=35, extra_width=10))


@pytest.mark.parametrize(("page_size", "extra_page_size"), [(1, 64), (2, 2), (61, 1), (64, 256), (256, 61)])
def test_the_two_caches_have_their_own_page_sizes(page_size, extra_page_size, decode, decode_case):
    decode(decode_case(tokens=2, page_size=page_size, extra_page_size=extra_page_size, extra_width=20))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_hostile_indices_are_no_entries(index_dtype, decode, decode_case):
    case = decode_case(tokens=2, extra_width=30, lens=False)
    for scope in ("swa", "extra"):
        case[f"{scope}_indices"] = make_hostile(case[f"{scope}_indices"], case[f"{scope}_cache"].capacity, index_dtype)
    decode(case)


def test_spans_are_clamped_and_may_be_absent_in_either_scope(decode, decode_case):
    case = decode_case(tokens=6, extra_width=30)
    case["swa_lens"] = torch.tensor([0, 40, 41, -1, -(2**31), 2**31 - 1], dtype=torch.int32)
    case["extra_lens"] = None
    decode(case)
    case["swa_lens"], case["extra_lens"] = None, torch.tensor([31, 30, 0, 2**31 - 1, -5, 7], dtype=torch.int32)
    decode(case)


def test_int64_spans_are_clamped_before_they_are_narrowed(decode, decode_case):
    case = decode_case(tokens=4, extra_width=8)
    case["swa_lens"] = torch.tensor([2**31, 2**32, 2**40 + 3, -(2**33) + 4])
    case["extra_lens"] = torch.tensor([2**33, -(2**40), 2**32 + 1, 2**63 - 1])
    decode(case)


def test_int64_prefill_spans_are_clamped_before_they_are_narrowed(prefill, prefill_case):
    case = prefill_case(tokens=4)
    case["lens"] = torch.tensor([2**31, 2**32, 2**40 + 3, -(2**33) + 4])
    prefill(case)


def test_garbage_past_a_span_is_not_read(decode, decode_case):
    case = decode_case(tokens=3, extra_width=30)
    for scope, width in (("swa", 40), ("extra", 30)):
        cache, lens = case[f"{scope}_cache"], case[f"{scope}_lens"]
        past = torch.arange(width) >= lens[:, None]
        # In range, and NaN for all but a few of them: the whole pool is garbage.
        case[f"{scope}_indices"][past] = torch.arange(int(past.sum()), dtype=torch.int32) % cache.capacity
    decode(case)


def test_no_entries_is_zero_and_plus_infinity(decode, decode_case):
    case = decode_case(tokens=5, extra_width=40, lens=False)
    case["swa_lens"] = torch.tensor([0, 40, 0, 40, 40], dtype=torch.int32)
    case["extra_lens"] = torch.tensor([0, 0, 40, 40, 40], dtype=torch.int32)
    case["swa_indices"][3] = case["extra_indices"][3] = -1
    case["swa_indices"][4] = -1
    out, lse = decode(case)
    for empty in (0, 3):
        assert not out[empty].any()
        assert (lse[empty] == INF).all()
    for partly in (1, 2, 4):
        assert lse[partly].isfinite().all()


@pytest.mark.parametrize("sinks", [[INF, -INF, 0.0, 80.0, -80.0], [INF] * 5, [-INF] * 5, None])
def test_sinks_scale_out_and_leave_lse(sinks, decode, decode_case):
    case = decode_case(tokens=3, heads=5, lens=False, sink=False)
    case["swa_indices"][1] = -1
    plain = reference.sparse_mla_decode(**case)
    case["attn_sink"] = None if sinks is None else torch.tensor(sinks)
    out, lse = decode(case)
    assert torch.equal(lse.cpu().isinf(), plain[1].isinf())
    for head, sink in enumerate(sinks or []):
        if sink == INF:
            assert not out[:, head].any()


@pytest.mark.parametrize("absent", ["None", "no columns", "no pages"])
def test_an_extra_scope_without_entries_changes_nothing(absent, decode, decode_case):
    case = decode_case(tokens=3, extra_width=9)
    if absent == "no columns":
        case["extra_indices"] = case["extra_indices"][:, :0].contiguous()
    elif absent == "no pages":
        case["extra_cache"] = PagedCache.zeros(0, DSV4, 64)
    else:
        case["extra_cache"] = case["extra_indices"] = case["extra_lens"] = None
    got = decode(case)
    alone = decode({key: value for key, value in case.items() if not key.startswith("extra")})
    for a, b in zip(got, alone):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_a_window_without_columns_leaves_the_extra_scope(decode, decode_case):
    case = decode_case(tokens=3, extra_width=30)
    case["swa_indices"] = case["swa_indices"][:, :0].contiguous()
    decode(case)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_rows_may_be_strided(dtype, decode, decode_case):
    case = decode_case(tokens=3, extra_width=30)
    for scope in ("swa", "extra"):
        wide = torch.full((3, 97), 2**31 - 1, dtype=dtype)
        view = wide[:, 5 : 5 + case[f"{scope}_indices"].shape[1]]
        view.copy_(case[f"{scope}_indices"])
        case[f"{scope}_indices"] = view
        case[f"{scope}_lens"] = case[f"{scope}_lens"].to(dtype)
    decode(case)


@pytest.mark.parametrize("heads", [5, 20, 64])
def test_q_and_out_may_be_slices_of_wider_tensors(heads, decode, decode_case, attention_kernel_device):
    _, device = attention_kernel_device
    case = decode_case(tokens=2, heads=heads)
    wide = torch.full((2, 2 * heads, 600), float("nan"), dtype=torch.bfloat16)
    wide[:, heads:, 40:552] = case["q"]
    case["q"] = wide[:, heads:, 40:552]
    around = torch.full((2, 3 * heads, 640), 7.0, dtype=torch.bfloat16, device=device)
    out = around[:, heads : 2 * heads, 64:576]
    out.fill_(float("nan"))
    assert decode(case, out=out)[0] is out
    around[:, heads : 2 * heads, 64:576] = 7
    assert (around == 7).all(), "wrote outside out"


def test_out_may_have_its_tokens_inside_its_heads(decode, decode_case, attention_kernel_device):
    """[H, T, D] storage, as a server that keeps heads first would give it."""
    _, device = attention_kernel_device
    case = decode_case(tokens=3, heads=5)
    out = torch.full((5, 3, 512), float("nan"), dtype=torch.bfloat16, device=device).transpose(0, 1)
    decode(case, out=out)


def padded(case, heads_in, garbage):
    """The case with q and sink padded by heads that hold anything."""
    tokens, heads, head_dim = case["q"].shape
    q = torch.full((tokens, heads_in, head_dim), garbage, dtype=torch.bfloat16)
    q[:, :heads] = case["q"]
    sink = torch.full((heads_in,), garbage)
    sink[:heads] = case["attn_sink"]
    return {**case, "q": q, "attn_sink": sink}


@pytest.mark.parametrize("garbage", [float("nan"), INF])
@pytest.mark.parametrize(("heads", "wide", "wide_out"), [(5, 64, 64), (16, 17, 16), (20, 128, 40), (64, 128, 65)])
def test_only_the_heads_that_count_are_read_and_written(
    heads, wide, wide_out, garbage, attention_kernel_device, decode_case, prefill_case, on_device
):
    kernel, device = attention_kernel_device
    for op, oracle, case, check in (
        (dsv4x.sparse_mla_decode, reference.sparse_mla_decode,
         decode_case(tokens=3, heads=heads, width=20, extra_width=30), check_decode),
        (dsv4x.sparse_mla_prefill, reference.sparse_mla_prefill, prefill_case(tokens=3, heads=heads), check_prefill),
    ):  # fmt: skip
        want = oracle(**case, dtype=torch.float64)
        there = on_device(padded(case, wide, garbage), device)
        out, lse = op(**there, kernel=kernel, heads=heads)
        assert out.shape == (3, heads, 512)
        assert out.is_contiguous()
        check(out, lse, *want)
        marks = torch.arange(3 * wide_out * 512, dtype=torch.int16, device=device).view(3, wide_out, 512)
        buffer = marks.clone().view(torch.bfloat16)
        got, lse = op(**there, kernel=kernel, heads=heads, out=buffer)
        assert got is buffer
        check(got[:, :heads], lse, *want)
        assert torch.equal(got[:, heads:].view(torch.int16), marks[:, heads:]), "wrote to heads that do not count"
        # A sink of just the heads that count goes with a padded q.
        got, _ = op(**{**there, "attn_sink": there["attn_sink"][:heads]}, kernel=kernel, heads=heads)
        assert torch.equal(got, out)


def test_padded_heads_may_be_nan_under_value_checks(decode_case, monkeypatch):
    monkeypatch.setenv("DSV4X_CHECK", "1")
    case = decode_case(tokens=2, heads=3)
    dsv4x.sparse_mla_decode(**padded(case, 8, float("nan")), kernel="reference", heads=3)
    with pytest.raises(ValueError, match="q: NaN in row 0"):
        dsv4x.sparse_mla_decode(**{**padded(case, 8, float("nan")), "swa_lens": None}, kernel="reference", heads=4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heads": 0}, ValueError, "heads: got 0, need 1 to 16"),
        ({"heads": 17}, ValueError, "heads: got 17, need 1 to 16"),
        ({"heads": 4.0}, TypeError, "heads: got float, need an int"),
        ({"heads": 4, "attn_sink": torch.zeros(3)}, ValueError, "attn_sink: 3 heads, need >= 4"),
        ({"heads": 4, "out": torch.zeros(4, 3, 512).bfloat16()}, ValueError, "out: 3 heads, need >= 4"),
        ({"heads": 4, "out": torch.zeros(3, 4, 512).bfloat16()}, ValueError, r"out: shape is \(3, 4, 512\), need"),
        ({"attn_sink": torch.zeros(17)}, ValueError, r"attn_sink: shape is \(17,\), need \(16\)"),
        ({"out": torch.zeros(4, 17, 512).bfloat16()}, ValueError, r"out: shape is \(4, 17, 512\), need \(4, 16, 512\)"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changes, error, message, decode_case, prefill_case):
    for op, case in ((dsv4x.sparse_mla_decode, decode_case()), (dsv4x.sparse_mla_prefill, prefill_case())):
        with pytest.raises(error, match=message):
            op(**{**case, **changes}, kernel="reference")


def far_apart(like, device):
    """``like [1, H, D]`` with its heads 2**30 values apart, in the middle of memory of which only the rows are used."""
    _, heads, head_dim = like.shape
    stride, span = 2**30 + 16, (heads - 1) * (2**30 + 16) + head_dim
    flat = torch.empty(0, dtype=like.dtype, device=device)
    flat.set_(torch.UntypedStorage(2 * flat.element_size() * span, device=device), 0, (2 * span,), (1,))
    return flat.as_strided(like.shape, (head_dim, stride, 1), span).copy_(like)


@pytest.mark.parametrize(
    ("kernel", "device"),
    [
        pytest.param("triton", "cpu", marks=pytest.mark.interpreter),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
        pytest.param("gluon", "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("split_k", [1, 2])
def test_heads_stored_before_tokens_lie_past_two_gi_values(split_k, kernel, device, decode_case, on_device):
    """[H, T, D] storage at T = 32 768 and 128 heads: a head's number times its stride passes 2**31."""
    case = decode_case(tokens=1, heads=3, extra_width=20)
    if kernel == "gluon" and platform.arch != "sm_90":
        pytest.skip(f"arch is {platform.arch}")
    q, out = (far_apart(case["q"], device) for _ in range(2))
    there = {**on_device(case, device), "q": q, "out": out}
    got = dsv4x.sparse_mla_decode(**there, kernel=kernel, split_k=split_k)
    check_decode(*got, *reference.sparse_mla_decode(**case, dtype=torch.float64))


def test_out_is_allocated_contiguous(decode, decode_case):
    case = decode_case(tokens=3, heads=5)
    case["q"] = case["q"].transpose(0, 1).contiguous().transpose(0, 1)
    assert decode(case)[0].is_contiguous()


@pytest.mark.parametrize("given", [False, True])
def test_no_tokens_give_empty_results(given, attention_kernel_device, decode_case, prefill_case, on_device):
    kernel, device = attention_kernel_device
    for op, case in (
        (dsv4x.sparse_mla_decode, decode_case(tokens=0, extra_width=9)),
        (dsv4x.sparse_mla_prefill, prefill_case(tokens=0)),
    ):
        case = on_device(case, device)
        out = torch.empty(0, 16, 512, dtype=torch.bfloat16, device=device) if given else None
        got, lse = op(**case, out=out, kernel=kernel)
        assert got.shape == (0, 16, 512)
        assert lse.shape == (0, 16)
        assert not given or got is out


@pytest.mark.parametrize("tokens", [0, 3])
def test_the_lse_may_be_left_out(tokens, attention_kernel_device, decode_case, prefill_case, on_device):
    kernel, device = attention_kernel_device
    for op, case in (
        (dsv4x.sparse_mla_decode, decode_case(tokens=tokens, extra_width=9)),
        (dsv4x.sparse_mla_prefill, prefill_case(tokens=tokens)),
    ):
        case = on_device(case, device)
        out = torch.empty_like(case["q"])
        got, none = op(**case, out=out, kernel=kernel, return_lse=False)
        assert none is None
        assert got is out
        want, lse = op(**case, kernel=kernel)
        assert torch.equal(got, want)
        assert lse.shape == (tokens, 16)


def test_arguments_are_left_as_they_were(attention_kernel_device, decode_case, on_device):
    kernel, device = attention_kernel_device
    case = on_device(decode_case(tokens=2, extra_width=30), device)
    case["swa_indices"][0, 0] = -7
    case["swa_lens"][1] = 99
    tensors = {k: v.data if isinstance(v, PagedCache) else v for k, v in case.items() if v is not None}
    before = {k: v.clone() for k, v in tensors.items()}
    dsv4x.sparse_mla_decode(**case, kernel=kernel)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("scale", [1, 0.3, 1e-6])
def test_softmax_scale_is_taken_as_given(scale, decode, decode_case, prefill, prefill_case):
    decode({**decode_case(tokens=2, heads=3), "softmax_scale": scale})
    prefill({**prefill_case(tokens=2, heads=3), "softmax_scale": scale})


def test_far_apart_logits_do_not_overflow(decode, decode_case):
    case = decode_case(tokens=3, heads=4)
    case["q"] = case["q"] * 64
    decode(case)


@pytest.mark.parametrize("splits", [*range(1, 6), 8, 9, 16, 17, 40])
@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)
])  # fmt: skip
def test_any_number_of_splits_gives_the_same_answer(splits, device, decode_case, on_device):
    """Rows shorter than the splits leave some of them empty; row 3 leaves all of them empty."""
    from dsv4x.common.kernels.decode import sparse_mla_decode

    case = decode_case(tokens=5, heads=5, width=100, extra_width=70)
    case["swa_lens"] = torch.tensor([100, 3, 0, 0, 64], dtype=torch.int32)
    case["extra_lens"] = torch.tensor([70, 0, 33, 0, 1], dtype=torch.int32)
    case["attn_sink"][0] = INF
    out = torch.empty(5, 8, 512, dtype=torch.bfloat16, device=device)[:, 2:7]
    there = on_device(case, device)
    got, lse = sparse_mla_decode(decode_call(**there, out=out, split_k=splits))
    assert got is out
    check_decode(out, lse, *reference.sparse_mla_decode(**case, dtype=torch.float64))


@pytest.fixture
def of_132_multiprocessors(monkeypatch):
    """A device that few tokens leave idle, so that long rows are split."""
    limits = dataclasses.replace(platform.limits("cpu"), multiprocessors=132)
    monkeypatch.setattr(type(platform), "limits", lambda self, device=None: limits)


def wide(case, lens, extra_lens, columns=2304):
    """The case with extra rows as wide as a long context, whose garbage past a row's span no kernel may read."""
    case["swa_lens"], case["extra_lens"] = (torch.tensor(spans, dtype=torch.int32) for spans in (lens, extra_lens))
    for scope in ("swa", "extra"):
        indices, spans = case[f"{scope}_indices"], case[f"{scope}_lens"]
        past = torch.arange(indices.shape[1]) >= spans[:, None]
        case[f"{scope}_indices"] = torch.where(past, 2**31 - 1, indices)
    rows = torch.full((len(lens), columns), 2**31 - 1, dtype=torch.int32)
    rows[:, : case["extra_indices"].shape[1]] = case["extra_indices"]
    return case | {"extra_indices": rows}


@pytest.mark.interpreter
@pytest.mark.parametrize("heads", [1, 5, 20])
@pytest.mark.parametrize("sink", [False, True])
def test_a_row_has_the_splits_of_its_own_length(heads, sink, of_132_multiprocessors, decode_case, monkeypatch):
    """Rows of no entry, of a block, of as many as stay whole, one more, and of them all, in one launch."""
    from dsv4x.common.kernels import decode

    lens, extra_lens = [0, 3, 64, 96, 100, 0, -1, 2**31 - 1], [0, 0, 32, 64, 200, 600, 1, 2**31 - 1]
    case = wide(
        decode_case(tokens=8, heads=heads, width=100, extra_width=600, sink=sink), lens, extra_lens, columns=700
    )
    case["extra_indices"][7, 600:] = -1
    case["extra_indices"][4, :130] = -1
    reduced = []
    reduce = decode.reduce_partials
    monkeypatch.setattr(decode, "reduce_partials", lambda *given: (reduced.append(given), reduce(*given)))
    out, lse = dsv4x.sparse_mla_decode(**case, kernel="triton")
    check_decode(out, lse, *reference.sparse_mla_decode(**case, dtype=torch.float64))
    (partial, partial_lse, *_, whole, block) = reduced[0]
    # What says that a partial result was written: fresh memory is NaN.
    written = (~partial_lse.isnan()).sum(-1)[:, 0].tolist()
    blocks = [-(-min(max(a, 0), 100) // block) - -min(max(b, 0), 700) // block for a, b in zip(lens, extra_lens)]
    most = partial.shape[2]
    assert most > 4
    assert written == [0 if n <= whole else -(-n // -(-n // most)) for n in blocks]
    assert {0, most} < set(written)


@pytest.mark.interpreter
@pytest.mark.parametrize("split_k", [1, 2, 7, 40])
def test_with_splits_fixed_a_row_does_not_depend_on_how_wide_rows_are(split_k, decode_case):
    lens, extra_lens = [40, 0, 17], [60, 33, 0]
    case = decode_case(tokens=3, heads=5, width=40, extra_width=60)
    broad = wide(dict(case), lens, extra_lens)
    narrow = broad | {"extra_indices": broad["extra_indices"][:, :60].contiguous()}
    results = [dsv4x.sparse_mla_decode(**given, kernel="triton", split_k=split_k) for given in (narrow, broad)]
    assert all(map(torch.equal, *results))
    check_decode(*results[0], *reference.sparse_mla_decode(**narrow, dtype=torch.float64))


@pytest.mark.interpreter
@pytest.mark.parametrize("entries", [0, 1, 100, 10**6])
def test_a_wrong_count_of_entries_costs_time_alone(entries, of_132_multiprocessors, decode_case):
    case = wide(decode_case(tokens=3, heads=5, width=100, extra_width=600), [100, 0, 7], [600, 300, 0])
    out, lse = dsv4x.sparse_mla_decode(**case, kernel="triton", entries=entries)
    check_decode(out, lse, *reference.sparse_mla_decode(**case, dtype=torch.float64))


@pytest.mark.interpreter
@pytest.mark.parametrize("multiprocessors", [1, 2, 4])
@pytest.mark.parametrize("heads", [3, 21])
def test_the_reduction_may_take_several_heads_a_program(multiprocessors, heads, decode_case, monkeypatch):
    """Fewer multiprocessors, more heads a program: a number that divides them or not."""
    limits = dataclasses.replace(platform.limits("cpu"), multiprocessors=multiprocessors)
    monkeypatch.setattr(type(platform), "limits", lambda self, device=None: limits)
    case = decode_case(tokens=5, heads=heads, width=100, extra_width=70)
    case["swa_lens"][0], case["extra_lens"][0] = 3, 0
    out, lse = dsv4x.sparse_mla_decode(**case, kernel="triton", split_k=3)
    check_decode(out, lse, *reference.sparse_mla_decode(**case, dtype=torch.float64))


@pytest.mark.interpreter
@pytest.mark.parametrize("split_k", [1, 3])
def test_with_splits_fixed_a_row_does_not_depend_on_its_batch(split_k, decode_case):
    case = decode_case(tokens=5, heads=5, width=70, extra_width=50)
    together = dsv4x.sparse_mla_decode(**case, kernel="triton", split_k=split_k)
    per_token = ("q", "swa_indices", "swa_lens", "extra_indices", "extra_lens")
    for row in range(5):
        alone = {name: value[row : row + 1] if name in per_token else value for name, value in case.items()}
        got = dsv4x.sparse_mla_decode(**alone, kernel="triton", split_k=split_k)
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(got, together))


@pytest.fixture
def local_case(decode_case, rng):
    """A decode case whose extra indices are local entries, over block tables with garbage pages; and what it means.

    There are tokens of no request, entries that are not visible or past the table, and -1 anywhere.
    """
    tokens, width, page_size = 9, 70, 4
    case = decode_case(tokens=tokens, heads=3, width=20, extra_width=width, extra_page_size=page_size)
    cache, live = case["extra_cache"], case["extra_indices"].unique()
    table = torch.randint(-2, cache.pages + 3, (4, 25), dtype=torch.int32, generator=rng)
    table[2, 3], table[1, 0] = 2**31 - 1, -(2**31)
    request = torch.randint(-1, 6, (tokens,), dtype=torch.int32, generator=rng)
    visible = torch.randint(-3, 110, (tokens,), dtype=torch.int32, generator=rng)
    every = torch.arange(120, dtype=torch.int32).expand(tokens, 120)
    slots = torch.empty(tokens, 120, dtype=torch.int32)
    pages = cache.pages - 1
    reference.local_to_slots(every, request, visible, table, page_size, pages, slots)
    local = torch.randint(0, 120, (tokens, width), generator=rng)
    # The others are NaN, which no index may reach.
    dead = ~torch.isin(slots.gather(1, local), torch.cat([live, torch.tensor([-1])]))
    local = torch.where(dead, -1, local).int()
    local[::2, 5:9] = torch.tensor([-2, -(2**31), 2**31 - 1, 120], dtype=torch.int32)
    meant = case | {"extra_indices": torch.empty_like(local)}
    reference.local_to_slots(local, request, visible, table, page_size, pages, meant["extra_indices"])
    assert (meant["extra_indices"] >= 0).sum() > 50
    given = case | {"extra_indices": local, "local": dsv4x.Local(request, visible, table, pages)}
    return given, reference.sparse_mla_decode(**meant, dtype=torch.float64)


def there(case, device, on_device):
    """``on_device`` for a case with ``local``."""
    local = case["local"]
    tables = on_device(dict(zip("abc", local)), device).values()
    return on_device({**case, "local": None}, device) | {"local": dsv4x.Local(*tables, local.pages)}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_local_entries_are_served_by_every_kernel(dtype, attention_kernel_device, local_case, on_device):
    kernel, device = attention_kernel_device
    case, want = local_case
    case["extra_indices"] = case["extra_indices"].to(dtype)
    got = dsv4x.sparse_mla_decode(**there(case, device, on_device), kernel=kernel)
    check_decode(*got, *on_device(dict(enumerate(want)), device).values())


@pytest.mark.interpreter
def test_local_entries_are_made_slots_of_on_amds_gpus(on_gfx, local_case, on_device):
    case, want = local_case
    result = registry.find("sparse_mla_decode", "triton").run(
        decode_call(**there(case, "cpu", on_device), split_k=None)
    )
    check_decode(*result, *want)


@pytest.mark.parametrize("split_k", [None, 3])
@pytest.mark.parametrize(
    ("kernel", "device"),
    [
        pytest.param("triton", "cpu", marks=pytest.mark.interpreter),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
        pytest.param("gluon", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_local_entries_are_made_slots_of_in_the_kernel(kernel, device, split_k, local_case, on_device):
    record = registry.find("sparse_mla_decode", kernel)
    if record is None or record.not_supported_reasons(dsv4x.Problem("sparse_mla_decode", device, platform.arch)):
        pytest.skip(f"no {kernel} kernel here")
    assert record.remaps
    case, want = local_case
    result = record.run(decode_call(**there(case, device, on_device), split_k=split_k))
    check_decode(*result, *on_device(dict(enumerate(want)), device).values())


def test_local_that_does_not_fit_is_refused(local_case):
    case, _ = local_case
    request, visible, table, pages = case["local"]
    wrong = [
        ("local: got tuple, need a dsv4x.Local", TypeError, (request, visible, table, pages)),
        (r"local.request: shape is \(8,\), need \(9\)", ValueError, dsv4x.Local(request[1:], visible, table, pages)),
        ("local.visible: dtype is int64, need int32", TypeError, dsv4x.Local(request, visible.long(), table, pages)),
        (r"local.block_table: shape is \(25,\), need", ValueError, dsv4x.Local(request, visible, table[0], pages)),
        (f"local.pages: got {pages + 2}, need 0 to {pages + 1}", ValueError,
         dsv4x.Local(request, visible, table, pages + 2)),
        ("local.pages: got float, need an int", TypeError, dsv4x.Local(request, visible, table, 2.0)),
    ]  # fmt: skip
    for message, error, local in wrong:
        with pytest.raises(error, match=message):
            dsv4x.sparse_mla_decode(**{**case, "local": local}, kernel="reference")
    alone = {key: value for key, value in case.items() if not key.startswith("extra")}
    with pytest.raises(ValueError, match="local: given, need extra_cache and extra_indices with it"):
        dsv4x.sparse_mla_decode(**alone, kernel="reference")


def test_value_checks_name_a_local_entry_its_token_may_not_see(local_case, monkeypatch):
    monkeypatch.setenv("DSV4X_CHECK", "1")
    case, _ = local_case
    case["extra_lens"] = case["swa_lens"] = None
    rows, visible = case["extra_indices"].fill_(-1), case["local"].visible.clamp_(0, 50)
    rows[4, 7] = visible[4] - 1
    dsv4x.sparse_mla_decode(**case, kernel="reference")
    rows[4, 7] = visible[4]
    with pytest.raises(ValueError, match=f"extra_indices: local entry {visible[4]} in row 4, column 7, need -1 or 0"):
        dsv4x.sparse_mla_decode(**case, kernel="reference")


WITH_WORKSPACE = pytest.mark.parametrize(
    ("kernel", "device"),
    [
        pytest.param("triton", "cpu", marks=pytest.mark.interpreter),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
        pytest.param("gluon", "cuda", marks=pytest.mark.gpu),
    ],
)


def decode_problem(case, device, **fields):
    """What :func:`dsv4x.sparse_mla_decode` asks for a case."""
    q = case["q"]
    return dsv4x.Problem.on(
        "sparse_mla_decode", q.to(device).device, tokens=q.shape[0], heads=q.shape[1],
        width=case["swa_indices"].shape[1], extra_width=case["extra_indices"].shape[1],
        caches=(case["swa_cache"].spec, case["extra_cache"].spec), **fields,
    )  # fmt: skip


@WITH_WORKSPACE
@pytest.mark.parametrize("split_k", [None, 1, 3])
def test_partial_outputs_are_kept_in_the_callers_workspace(split_k, kernel, device, decode_case, on_device):
    if kernel == "gluon" and platform.arch != "sm_90":
        pytest.skip(f"arch is {platform.arch}")
    case = decode_case(tokens=3, heads=5, width=100, extra_width=300)
    need = dsv4x.scratch_bytes(decode_problem(case, device, split_k=split_k or 0), kernel)
    buffer = torch.full((need + 64,), 255, dtype=torch.uint8, device=device)
    there = on_device(case, device)
    got = dsv4x.sparse_mla_decode(**there, kernel=kernel, split_k=split_k, workspace=buffer[:need])
    check_decode(*got, *reference.sparse_mla_decode(**case, dtype=torch.float64))
    assert (buffer[need:] == 255).all(), "wrote past the workspace"
    if split_k == 3:
        assert (buffer[:need] != 255).any(), "did not use it"
        with pytest.raises(ValueError, match=f"workspace: 512 bytes, need >= {need} for 3 splits of 3 tokens"):
            dsv4x.sparse_mla_decode(**there, kernel=kernel, split_k=3, workspace=buffer[:512])
    if split_k == 1:
        assert need == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["flash_mla", "gluon", "triton", "reference"])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 64), (3, 5), (200, 64), (64, 128)])
def test_a_call_allocates_no_more_than_its_scratch(tokens, heads, kernel, decode_case, prefill_case, on_device):
    case, rows = decode_case(tokens=tokens, heads=heads, width=100, extra_width=300), prefill_case(tokens, heads)
    given = dsv4x.Problem.on(
        "sparse_mla_prefill", torch.device("cuda"), tokens=tokens, heads=heads, width=40, rows=len(rows["kv"])
    )
    for op, arguments, problem in (
        (dsv4x.sparse_mla_decode, case, decode_problem(case, "cuda")), (dsv4x.sparse_mla_prefill, rows, given),
    ):  # fmt: skip
        record = registry.find(problem.op, kernel)
        if record is None or record.not_supported_reasons(problem):
            pytest.skip(f"no {kernel} kernel here")
        there = on_device(arguments, "cuda")
        out = torch.empty(tokens, heads, 512, dtype=torch.bfloat16, device="cuda")
        op(**there, kernel=kernel, out=out)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, lse = op(**there, kernel=kernel, out=out)
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - before - (-(-4 * lse.numel() // 512) * 512)
        assert taken <= dsv4x.scratch_bytes(problem, kernel)


def test_splits_are_never_more_than_their_bound():
    from dsv4x.common.kernels.decode_shapes import Batch, most_splits, num_splits

    for at_once in (2, 132, 264, 608):
        for programs in (1, 2, 3, 17, 64, 131, 132, 133, 500, 4096):
            for blocks in (0, 1, 2, 3, 10, 33, 128, 600):
                splits = {num_splits(Batch(programs, at_once), fewer) for fewer in range(blocks + 1)}
                assert max(splits) <= most_splits(programs, blocks, at_once)


def test_scratch_is_asked_of_the_attention_ops_alone():
    with pytest.raises(ValueError, match="problem: of copy_pages, need sparse_mla_decode or sparse_mla_prefill"):
        dsv4x.scratch_bytes(dsv4x.Problem("copy_pages", "cpu", "cpu"))


@pytest.mark.parametrize(
    ("workspace", "error", "message"),
    [
        (torch.zeros(64), TypeError, "workspace: dtype is float32, need uint8"),
        (torch.zeros(8, 8, dtype=torch.uint8), ValueError, r"workspace: shape is \(8, 8\), need \(any\)"),
        (torch.zeros(64, dtype=torch.uint8)[::2], ValueError, r"workspace: stride\(0\) is 2, need 1"),
        (torch.zeros(64, dtype=torch.uint8)[1:], ValueError, "workspace: address .*, need a multiple of 16"),
        (4096, TypeError, "workspace: got int, need a uint8 tensor"),
    ],
)
def test_a_workspace_that_is_none_is_refused(workspace, error, message, decode_case):
    with pytest.raises(error, match=message):
        dsv4x.sparse_mla_decode(**decode_case(), kernel="reference", workspace=workspace)


def test_kernels_that_split_as_they_like_refuse_fixed_splits(decode_case):
    with pytest.raises(dsv4x.KernelNotSupported, match="split_k is 2, need None: it splits rows as the whole batch"):
        dsv4x.sparse_mla_decode(**decode_case(), kernel="reference", split_k=2)


def test_only_compiled_reductions_are_launched_early():
    import triton

    from dsv4x.common.kernels.decode import depends_early

    assert depends_early("sm_90") != triton.knobs.runtime.interpret
    assert not any(depends_early(arch) for arch in ("gfx942", "sm_86", "sm_100", "sm_120"))


def test_splits_fill_the_device_and_stop_where_reducing_costs_more():
    from dsv4x.common.kernels.decode_shapes import Batch, num_splits

    assert num_splits(Batch(1, 132), 3) == 1
    assert num_splits(Batch(1, 132), 4) == 4
    assert num_splits(Batch(4, 132), 20) == 20
    assert num_splits(Batch(4, 132), 66) == 22
    assert num_splits(Batch(1, 132), 10) == 10
    assert num_splits(Batch(32, 132), 10) == 4
    assert num_splits(Batch(64, 132), 10) == 2
    assert num_splits(Batch(128, 132), 10) == 1
    assert num_splits(Batch(10_000, 132), 200) == 1
    assert num_splits(Batch(1, 132), 0) == 1
    assert num_splits(Batch(1, 1), 1) == 1


@pytest.mark.parametrize("blocks", [1, 7, 18, 130, 2000])
def test_every_split_has_work_and_partials_are_bounded(blocks):
    from dsv4x.common.kernels.decode_shapes import Batch, num_splits

    for programs in range(1, 700):
        splits = num_splits(Batch(programs, 132), blocks)
        assert 1 <= splits <= max(1, blocks)
        if splits > 1:
            assert (splits - 1) * -(-blocks // splits) < blocks
            assert programs * splits <= 4 * 132


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("bound", [1, 3, 4, 10, 18, 130])
def test_rows_of_any_length_gain_by_the_splits_they_get(bound, captured):
    """As long as the bound, a row has the splits of that length; shorter, it stays whole or is done earlier."""
    from dsv4x.common.kernels import decode_shapes
    from dsv4x.cuda.hopper.splitting import batch_of

    assert decode_shapes.row_splits(batch_of(1, 64, 132, captured), bound, split_k=5) == (5, 0)
    for programs in range(1, 300, 7):
        batch = batch_of(programs, 64, 132, captured)
        most, whole = decode_shapes.row_splits(batch, bound)
        assert most == decode_shapes.num_splits(batch, bound)
        assert whole < bound
        for blocks in range(1, bound + 1):
            splits = 1 if blocks <= whole else -(-blocks // -(-blocks // most))
            assert 1 <= splits <= most
            if most > 1:
                whole_us = batch.blocks_taken(blocks, 1)
                taken = batch.blocks_taken(blocks, splits)
                # Further on, a last share of few blocks may cost what a whole row does.
                assert taken <= whole_us + 2


def test_short_rows_stay_whole_however_wide_they_are():
    from dsv4x.common.kernels.decode_shapes import Batch, row_splits

    # 128 + 8192 columns: one token uses the whole GPU, and its row of three blocks stays whole.
    assert row_splits(Batch(1, 132), 130).most >= 33
    assert [row_splits(Batch(tokens, 132), 130).whole >= 3 for tokens in (1, 4, 32, 64)] == [True] * 4
    for tokens in (1, 4, 8, 16, 32, 64):
        most, whole = row_splits(Batch(tokens, 132), 130)
        narrow = row_splits(Batch(tokens, 132), 10)
        assert whole < 10
        assert -(-10 // -(-10 // most)) == narrow.most


def test_hopper_splits_short_rows_in_graphs_and_spares_eager_calls_the_second_launch():
    """As measured on an H100: a window and 32 compressed entries, of one token, take 11 us in splits and 16 whole."""
    from dsv4x.common.kernels.decode_shapes import num_splits, row_splits
    from dsv4x.cuda.hopper.splitting import batch_of

    def splits(tokens, heads, blocks, captured):
        return num_splits(batch_of(tokens, heads, 132, captured), blocks)

    assert [splits(1, heads, 3, True) for heads in (8, 16, 64, 128)] == [3] * 4
    assert [splits(1, heads, 3, False) for heads in (8, 16, 64, 128)] == [1] * 4
    assert splits(1, 64, 10, True) > 4
    assert splits(1, 64, 10, False) == 1
    assert splits(1, 64, 18, False) > 4
    # Of few heads partial outputs cost less.
    assert splits(32, 16, 3, True) == 3
    assert splits(32, 64, 3, True) == 1
    # A hint of long rows leaves short ones their splits.
    most, whole = row_splits(batch_of(1, 64, 132, True), 6)
    assert most >= 3
    assert whole < 3


def test_blocks_follow_stated_entries_and_else_the_width():
    from dsv4x.common.kernels.decode_shapes import expected_blocks

    assert expected_blocks(0, (128, 8192), 64) == 130
    assert expected_blocks(40, (128, 8192), 64) == 2
    assert expected_blocks(168, (128, 8192), 64) == 3
    assert expected_blocks(40, (128, 0), 64) == 1
    assert expected_blocks(10**6, (128, 8192), 64) == 130
    assert expected_blocks(5, (0, 0), 64) == 0


@pytest.mark.large
@pytest.mark.parametrize("gib", [3, 5])
def test_pages_past_2_and_4_gib_are_attended_to(gib, attention_kernel_device, on_device, rng):
    kernel, device = attention_kernel_device
    stride = (gib << 30) // 576 * 576
    total = stride + DSV4.page_stride(64)
    if device == "cpu":
        raw = torch.from_numpy(np.zeros(total, np.uint8))
    else:
        raw = torch.zeros(total, dtype=torch.uint8, device=device)
    far = PagedCache(raw.as_strided((2, DSV4.page_stride(64)), (stride, 1)), DSV4, 64)
    near = PagedCache.zeros(2, DSV4, 64)
    slots = torch.randperm(128, generator=rng)[:40]
    k = (torch.randn(40, 512, generator=rng) / 10).bfloat16()
    for cache in (far, near):
        place = cache.device
        dsv4x.quantize_and_insert_k_cache(k.to(place), cache, slots.to(place), kernel="reference")
    case = {
        "q": torch.randn(1, 4, 512, generator=rng).bfloat16(),
        "swa_indices": slots.int()[None],
        "swa_lens": None,
    }
    if kernel == "flash_mla":  # its own strides are 32-bit: refused by name, and not chosen
        with pytest.raises(dsv4x.KernelNotSupported, match=f"page stride is {stride} bytes, need < 2"):
            dsv4x.sparse_mla_decode(**on_device(case, device), swa_cache=far, kernel=kernel)
        kernel = None
    out, lse = dsv4x.sparse_mla_decode(**on_device(case, device), swa_cache=far, kernel=kernel)
    check_decode(out, lse, *reference.sparse_mla_decode(**case, swa_cache=near, dtype=torch.float64))


# Prefill.


@pytest.mark.parametrize("heads", [1, 5, 16, 20])
@pytest.mark.parametrize("width", [1, 33, 100, 128])
def test_prefill_matches(width, heads, prefill, prefill_case):
    prefill(prefill_case(heads=heads, width=width))


@pytest.mark.parametrize("heads", [64, 100, 128])
def test_prefill_matches_with_many_heads(heads, prefill, prefill_case):
    prefill(prefill_case(tokens=1, heads=heads))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lens", [False, True])
def test_hostile_rows_are_no_entries(lens, index_dtype, prefill, prefill_case):
    case = prefill_case(tokens=3, lens=lens, sink=False)
    case["indices"] = make_hostile(case["indices"], 50, index_dtype)
    prefill(case)


def test_prefill_spans_are_clamped(prefill, prefill_case):
    case = prefill_case(tokens=6)
    case["lens"] = torch.tensor([0, 40, 41, -1, -(2**31), 2**31 - 1], dtype=torch.int32)
    prefill(case)


def test_nan_rows_past_a_span_do_not_poison(prefill, prefill_case):
    case = prefill_case(tokens=3)
    past = torch.arange(40) >= case["lens"][:, None]
    nan_rows = case["kv"].isnan().any(1).nonzero().flatten().int()
    case["indices"][past] = nan_rows[torch.arange(int(past.sum())) % len(nan_rows)]
    prefill(case)


def test_prefill_without_entries_is_zero_and_plus_infinity(prefill, prefill_case):
    case = prefill_case(tokens=3, heads=4, lens=False)
    case["indices"][1] = -1
    case["attn_sink"][:2] = torch.tensor([INF, -INF])
    out, lse = prefill(case)
    assert not out[1].any()
    assert (lse[1] == INF).all()
    assert not out[:, 0].any()


def test_an_empty_workspace_or_row_has_no_entries(prefill, prefill_case):
    case = prefill_case(tokens=2)
    prefill({**case, "indices": case["indices"][:, :0].contiguous()})
    prefill({**case, "kv": case["kv"][:0]})


def test_prefill_takes_strided_tensors(prefill, prefill_case, attention_kernel_device):
    _, device = attention_kernel_device
    case = prefill_case(tokens=2, heads=5)
    wide = torch.full((2, 11, 512), float("nan"), dtype=torch.bfloat16)
    wide[:, 3:8] = case["q"]
    case["q"] = wide[:, 3:8]
    kv = torch.full((50, 640), float("nan"), dtype=torch.bfloat16)
    kv[:, 64:576] = case["kv"]
    case["kv"] = kv[:, 64:576]
    around = torch.full((2, 15, 512), 7.0, dtype=torch.bfloat16, device=device)
    out = around[:, 5:10].fill_(float("nan"))
    assert prefill(case, out=out)[0] is out
    assert (around[:, :5] == 7).all()
    assert (around[:, 10:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_in_an_entry_that_is_read_shows(dtype, decode_case):
    """The oracle must not hide what a kernel would propagate."""
    case = decode_case(tokens=1, heads=2, lens=False, sink=False)
    case["swa_cache"].data.fill_(0xFF)
    assert reference.sparse_mla_decode(**case, dtype=dtype)[0].isnan().any()
