"""DSV4X_CHECK=1 looks at values on the device and names the first bad row; without it nothing is looked at."""

import pytest
import torch

import dsv4x
from dsv4x.common.core import checks
from dsv4x.common.core.layouts import DSV4, PagedCache

T, H, WIDTH, CAPACITY = 4, 2, 6, 128
NAN = float("nan")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setenv("DSV4X_CHECK", "1")


def arguments(op, device):
    def zeros(*shape, dtype=torch.int32):
        return torch.zeros(*shape, dtype=dtype, device=device)

    def cache():
        return PagedCache.zeros(2, DSV4, 64, device)

    q = zeros(T, H, 512, dtype=torch.bfloat16)
    if op is dsv4x.sparse_mla_decode:
        scope = {"cache": cache(), "indices": zeros(T, WIDTH), "lens": torch.full((T,), WIDTH, device=device)}
        return {"q": q, **{f"{name}_{k}": v.clone() if k != "cache" else v
                           for name in ("swa", "extra") for k, v in scope.items()}}  # fmt: skip
    if op is dsv4x.sparse_mla_prefill:
        kv = zeros(CAPACITY, 512, dtype=torch.bfloat16)
        return {"q": q, "kv": kv, "indices": zeros(T, WIDTH), "lens": torch.full((T,), WIDTH, device=device)}
    if op is dsv4x.quantize_and_insert_k_cache:
        return {"k": zeros(T, 512, dtype=torch.bfloat16), "cache": cache(), "slots": torch.arange(T, device=device)}
    if op in (BLOCKS, ROWS):
        return {"cache": cache(), "indices": zeros(T, WIDTH), "lens": torch.full((T,), WIDTH, device=device)}
    return {"cache": cache(), "slots": torch.arange(T, device=device)}


DECODE, PREFILL = dsv4x.sparse_mla_decode, dsv4x.sparse_mla_prefill
QUANTIZE, DEQUANTIZE = dsv4x.quantize_and_insert_k_cache, dsv4x.dequantize_k_cache_paged
BLOCKS, ROWS = dsv4x.gather_referenced_cache_blocks, dsv4x.gather_referenced_rows
# op, argument, (index, value) pairs to set, what the message says: the first of two bad rows.
BAD = [
    (DECODE, "q", [((2, 1, 511), NAN), ((3, 0, 0), NAN)], "q: NaN in row 2"),
    (DECODE, "swa_indices", [((1, 4), CAPACITY), ((2, 0), -9)],
     f"swa_indices: slot {CAPACITY} in row 1, column 4, need -1 or 0 to {CAPACITY - 1}"),
    (DECODE, "swa_indices", [((3, 5), -2)], "swa_indices: slot -2 in row 3, column 5"),
    (DECODE, "extra_indices", [((0, 2), 2**31 - 1)], f"extra_indices: slot {2**31 - 1} in row 0, column 2"),
    (DECODE, "swa_lens", [((2,), WIDTH + 1)], f"length {WIDTH + 1} in row 2, need 0 to {WIDTH}"),
    (DECODE, "extra_lens", [((1,), -1)], f"length -1 in row 1, need 0 to {WIDTH}"),
    (PREFILL, "q", [((0, 0, 0), NAN)], "q: NaN in row 0"),
    (PREFILL, "indices", [((1, 1), CAPACITY)],
     f"indices: workspace row {CAPACITY} in row 1, column 1, need -1 or 0 to {CAPACITY - 1}"),
    (PREFILL, "lens", [((3,), WIDTH + 5)], f"length {WIDTH + 5} in row 3, need 0 to {WIDTH}"),
    (QUANTIZE, "k", [((1, 500), NAN), ((3, 0), NAN)], "k: NaN in row 1"),
    (QUANTIZE, "slots", [((3,), CAPACITY)], f"slots: slot {CAPACITY} in row 3"),
    *[
        case
        for op in (BLOCKS, ROWS)
        for case in (
            (op, "indices", [((1, 4), CAPACITY), ((2, 0), -9)], f"indices: slot {CAPACITY} in row 1, column 4"),
            (op, "lens", [((2,), WIDTH + 1)], f"indices: length {WIDTH + 1} in row 2, need 0 to {WIDTH}"),
        )
    ],
    (DEQUANTIZE, "slots", [((1,), -2), ((2,), 10**12)], "slots: slot -2 in row 1"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "values", "says"), BAD)
def test_the_first_bad_row_is_named(op, name, values, says, device, checked):
    call = arguments(op, device)
    op(**call)
    for at, value in values:
        call[name][at] = value
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        op(**call)
    assert says in str(raised.value)


@pytest.mark.parametrize(("op", "name", "values", "says"), BAD)
@pytest.mark.parametrize("setting", [None, "0", ""])
def test_nothing_is_looked_at_unless_asked(op, name, values, says, setting, device, monkeypatch):
    if setting is not None:
        monkeypatch.setenv("DSV4X_CHECK", setting)
    call = arguments(op, device)
    for at, value in values:
        call[name][at] = value
    op(**call)


@pytest.mark.parametrize("op", [DECODE, PREFILL, BLOCKS, ROWS])
def test_what_stands_past_a_span_is_not_looked_at(op, device, checked):
    call = arguments(op, device)
    for name in [n for n in call if n.endswith("indices")]:
        call[name][:, 3:] = 2**31 - 1
        call[name][:, 1] = -1
        call[name.replace("indices", "lens")][:] = 3
    op(**call)


@pytest.mark.parametrize("op", [DECODE, PREFILL, BLOCKS, ROWS])
@pytest.mark.parametrize("tokens", [0, T])
@pytest.mark.parametrize("lens", [False, True])
def test_empty_rows_have_nothing_bad(op, tokens, lens, device, checked):
    call = arguments(op, device)
    for name in call:
        if name.endswith("indices"):
            call[name] = call[name][:tokens, :0]
        elif name.endswith("lens"):
            call[name] = torch.zeros(tokens, dtype=torch.int32, device=device) if lens else None
        elif name == "q":
            call[name] = call[name][:tokens]
    op(**call)


def test_no_rows_have_nothing_bad(device, checked):
    for op in (QUANTIZE, DEQUANTIZE):
        call = arguments(op, device)
        op(**{name: value if name == "cache" else value[:0] for name, value in call.items()})


def test_minus_one_is_never_bad(device, checked):
    for op in (DECODE, PREFILL, QUANTIZE, DEQUANTIZE, BLOCKS, ROWS):
        call = arguments(op, device)
        for name in call:
            if name.endswith(("indices", "slots")):
                call[name].fill_(-1)
        op(**call)


@pytest.mark.parametrize("lens", [True, False])
def test_padding_may_hold_anything(lens, device, checked):
    """A row of q whose spans are all 0 is padding; without spans every row counts."""
    for op in (DECODE, PREFILL):
        call = arguments(op, device)
        call["q"][2] = NAN
        for name in [n for n in call if n.endswith("lens")]:
            call[name][2] = 0
        if lens:
            op(**call)
        else:
            call["extra_lens" if op is DECODE else "lens"] = None
            with pytest.raises(ValueError, match="q: NaN in row 2"):
                op(**call)


COMBINE = {"window_size": 4, "compress_ratio": 4, "topk": 5}


def combine(device, changes=(), **padding):
    """Two requests of 8 and 40 tokens, with queries at positions 7 and 38, 39; 2, 9 and 10 visible entries."""
    rows = torch.zeros(3 + padding.get("tokens", 0), 5, dtype=torch.int32, device=device)
    for at, value in changes:
        rows[at] = value
    vectors = [
        torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, 1, 3], [8, 40], [4, 5], [0, 2], [20, 24])
    ]
    return dsv4x.combine_topk_swa_indices(rows, *vectors, **COMBINE)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([((0, 1), 2), ((1, 0), 99)], "topk_indices: local entry 2 in row 0, column 1, need -1 or 0 to 1"),
        ([((2, 4), 10)], "topk_indices: local entry 10 in row 2, column 4, need -1 or 0 to 9"),
        ([((1, 3), -2)], "topk_indices: local entry -2 in row 1, column 3"),
    ],
)
def test_a_local_entry_its_request_has_not_is_named(changes, says, device, monkeypatch):
    combine(device, changes)
    monkeypatch.setenv("DSV4X_CHECK", "1")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        combine(device, changes)
    assert says in str(raised.value)


def test_local_entries_of_no_query_are_not_looked_at(device, checked):
    # Rows 3 and 4 are no request's.
    combine(device, [((0, slice(2, None)), -1), ((1, 2), -1), ((3,), 77), ((4,), -99)], tokens=2)


def build(device, table, extra_table=((0,), (1,)), ratio=4):
    """Request 0 has 20 tokens and 1 query, request 1 has 3 tokens and none."""
    args = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 1], [20, 3], table)]
    extra = torch.tensor(extra_table, dtype=torch.int32, device=device)
    return dsv4x.AttentionMetadata.build(
        *args, extra, compress_ratio=ratio, swa_page_size=4, swa_pages=6, extra_page_size=64, extra_pages=2,
        window_size=8,
    )  # fmt: skip


@pytest.mark.parametrize("page", [6, -1, 2**31 - 1])
def test_a_page_a_query_needs_outside_the_pool_is_named(page, device, monkeypatch):
    # Positions 12 to 19 are read: pages 3 and 4 of request 0. The others, and all of request 1's, may be anything.
    good = [[99, -5, 2**31 - 1, 0, 5, 77], [99] * 6]
    bad = [[*good[0][:4], page, 77], good[1]]
    build(device, bad)
    monkeypatch.setenv("DSV4X_CHECK", "1")
    build(device, good)
    with pytest.raises(ValueError, match="swa_block_table: token 0 needs a page that is outside the pool"):
        build(device, bad)


def test_a_c128_page_outside_the_pool_is_named(device, monkeypatch):
    def c128(page):
        arguments = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 2], [129], [[0] * 3], [[page]])]
        return dsv4x.AttentionMetadata.build(
            *arguments, compress_ratio=128, swa_page_size=64, swa_pages=1, extra_page_size=2, extra_pages=2
        )

    monkeypatch.setenv("DSV4X_CHECK", "1")
    c128(1)
    with pytest.raises(ValueError, match="extra_block_table: page 2 of request 0 at 0, need 0 to 1"):
        c128(2)


def test_a_local_entry_a_token_may_not_see_is_named_by_the_entry_point(monkeypatch):
    """Position 19 sees entries 0 to 4; what padding brings may be anything."""
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [20], [[0, 1, 2]], [[0]])]
    meta = dsv4x.AttentionMetadata.build(
        *ints, compress_ratio=4, swa_page_size=8, swa_pages=3, extra_page_size=8, extra_pages=1, topk=8, num_tokens=2
    )
    caches = [PagedCache.zeros(pages, DSV4, 8) for pages in (3, 1)]
    q = torch.zeros(2, 4, 512, dtype=torch.bfloat16)

    def attend(entry):
        topk = torch.tensor([[4, -1, entry, 0, 1, -1, -1, -1], [99] * 8], dtype=torch.int32)
        return dsv4x.sparse_mla_attention(q, *caches, meta, topk)

    attend(5)
    monkeypatch.setenv("DSV4X_CHECK", "1")
    attend(3)
    with pytest.raises(ValueError, match="topk_indices: local entry 5 in row 0, column 2, need -1 or 0 to 4"):
        attend(5)


@pytest.mark.parametrize("setting", ["1", "true", "TRUE", "yes", "On", " 1 "])
def test_every_way_of_saying_yes_turns_checks_on(setting, monkeypatch):
    monkeypatch.setenv("DSV4X_CHECK", setting)
    call = arguments(DEQUANTIZE, "cpu")
    call["slots"][1] = -2
    with pytest.raises(ValueError, match="slots: slot -2 in row 1"):
        DEQUANTIZE(**call)


@pytest.mark.parametrize("setting", ["0", "false", "No", "OFF", ""])
def test_every_way_of_saying_no_leaves_them_off(setting, monkeypatch):
    monkeypatch.setenv("DSV4X_CHECK", setting)
    call = arguments(DEQUANTIZE, "cpu")
    call["slots"][1] = -2
    DEQUANTIZE(**call)


@pytest.mark.parametrize("setting", ["2", "y", "enabled", "1,1"])
def test_any_other_setting_is_refused_by_its_name(setting, monkeypatch):
    monkeypatch.setenv("DSV4X_CHECK", setting)
    with pytest.raises(ValueError, match=f"DSV4X_CHECK: got '{setting}', need one of 1, true, yes, on, or 0, false"):
        DEQUANTIZE(**arguments(DEQUANTIZE, "cpu"))


def test_pages_in_pool_names_the_first_that_is_not(device):
    table = torch.tensor([[0, 5, 99], [1, -1, 2], [9, 9, 9]], dtype=torch.int32, device=device)

    def check(counts):
        checks.pages_in_pool("extra_block_table", table, torch.tensor(counts, device=device), 6)

    check([2, 1, 0])
    with pytest.raises(ValueError, match="extra_block_table: page -1 of request 1 at 1, need 0 to 5"):
        check([2, 3, 1])
    with pytest.raises(ValueError, match="extra_block_table: page 99 of request 0 at 2, need 0 to 5"):
        check([3, 3, 0])
    with pytest.raises(ValueError, match="extra_block_table: 3 pages, need >= 4 for request 1"):
        check([2, 4, 0])


def test_nothing_past_span_names_the_first_entry_that_nobody_reads(device):
    rows = torch.tensor([[3, -1, -1], [0, 1, -1], [-1, -1, 7]], dtype=torch.int32, device=device)
    checks.nothing_past_span("topk_indices", rows, torch.tensor([1, 2, 3], device=device))
    with pytest.raises(ValueError, match="topk_indices: entry 1 in row 1, column 1, need -1 past its 1"):
        checks.nothing_past_span("topk_indices", rows, torch.tensor([1, 1, 0], device=device))


def test_same_as_device_names_the_first_length_that_differs(device):
    lengths = torch.tensor([4, 9], dtype=torch.int32, device=device)
    checks.same_as_device("seq_lens_cpu", torch.tensor([4, 9]), lengths)
    with pytest.raises(ValueError, match="seq_lens_cpu: 8 at 1, need 9 as on the device"):
        checks.same_as_device("seq_lens_cpu", torch.tensor([4, 8]), lengths)
