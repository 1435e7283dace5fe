"""The indexer's step against the definition: mixed batches, shared plans, refills."""

import copy
import dataclasses

import pytest
import torch
from test_indexer import FNUZ, filled, random_q

import dsv4x
from dsv4x import ExtraPages, StepMetadata, TopkMethod, layouts
from dsv4x.common.core.logits_calls import PagedLogitsCall
from dsv4x.common.dispatch import registry
from dsv4x.common.step import indexer as step_indexer

PAGE, PAGES, RATIO, K = 16, 40, 4, 24
HEADS = 32

# (query tokens, raw tokens) of each request, padding, the next_n of a uniform batch
BATCHES = {
    "decode": ([(1, 700), (1, 4), (1, 0), (1, 33)], 0, 1),
    "verify": ([(2, 700), (2, 5), (2, 90)], 0, 2),
    "verify of three": ([(3, 700), (3, 5), (3, 90)], 0, 3),
    "verify of eight": ([(8, 300), (8, 9)], 0, 8),
    "mixed": ([(1, 700), (2, 41), (40, 300), (20, 20), (0, 50), (1, 300), (30, 200)], 0, None),
    "padded": ([(1, 700), (30, 400), (1, 9)], 3, None),
}


class Case:
    """A step, its index cache and one layer's queries."""

    def __init__(self, batch, rng, device="cpu", layout=layouts.INDEXER_FP8, host=True, columns=13):
        requests, padding, _ = BATCHES[batch]
        queries, lengths = zip(*requests)
        self.tokens = sum(queries) + padding
        self.starts = torch.tensor([0, *queries]).cumsum(0).int()
        self.lens = torch.tensor(lengths).int()
        self.cache = filled(PAGES, layout, PAGE, rng, device)
        table = torch.randint(0, PAGES, (len(requests), columns), generator=rng).int()
        self.table, self.swa_table = table.to(device), torch.zeros(len(requests), 50, dtype=torch.int32, device=device)
        self.device, self.layout, self.rng = device, layout, rng
        given = {"query_start_loc_cpu": self.starts, "seq_lens_cpu": self.lens} if host else {}
        self.step = StepMetadata.build(
            self.starts.to(device), self.lens.to(device), self.swa_table,
            {RATIO: ExtraPages(self.table, PAGE, PAGES, topk=K)}, swa_page_size=16, swa_pages=1,
            num_tokens=self.tokens, max_seq_len=max(800, RATIO * PAGE * columns), **given,
        )  # fmt: skip
        self.q, self.q_scale = random_q((self.tokens, HEADS), layout, rng, device)
        self.weights = torch.randn(self.tokens, HEADS, generator=rng).to(device)

    def run(self, **options):
        given = {"q_scale": self.q_scale, **options}
        return dsv4x.sparse_attn_indexer(self.q, self.cache, self.weights, self.step[RATIO], **given)

    def update(self, lens):
        self.lens = lens.int()
        self.step.update(self.starts.to(self.device), self.lens.to(self.device), self.swa_table, {RATIO: self.table})

    def want(self, method=TopkMethod.LOCAL):
        """Token by token: the request's entries, scored and selected from by the oracle."""
        out = torch.full((self.tokens, K), -1, dtype=torch.int32)
        for request, (first, end) in enumerate(zip(self.starts.tolist(), self.starts[1:].tolist())):
            for token in range(first, end):
                visible = max(int(self.lens[request]) - (end - 1 - token), 0) // RATIO
                row = slice(token, token + 1)
                logits = dsv4x.paged_mqa_logits(
                    self.q[row, None], self.cache, self.weights[row], torch.tensor([[visible]], device=self.device),
                    self.table[request : request + 1], 200, kernel="reference",
                    q_scale=None if self.q_scale is None else self.q_scale[row, None],
                )  # fmt: skip
                space = {"block_table": self.table[request : request + 1], "page_size": PAGE, "pages": PAGES}
                out[row] = dsv4x.topk_transform(
                    logits, torch.tensor([visible], device=self.device), K, method, kernel="reference",
                    **(space if method is TopkMethod.PAGED else {}),
                ).cpu()  # fmt: skip
        return out


@pytest.mark.parametrize("method", [TopkMethod.LOCAL, TopkMethod.PAGED])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch_is_its_tokens_one_by_one(batch, method, kernel_device, rng):
    kernel, device = kernel_device
    case = Case(batch, rng, device)
    kernels = {"kernel": kernel, "topk_kernel": kernel}
    want = case.want(method)
    assert torch.equal(case.run(method=method, **kernels).cpu(), want)
    next_n = BATCHES[batch][2]
    unknown = Case(batch, rng, device, host=False)
    for name in ("q", "q_scale", "weights", "cache"):
        setattr(unknown, name, getattr(case, name))
    unknown.table.copy_(case.table)
    unknown.update(unknown.lens)
    for given in (None, next_n):
        assert torch.equal(unknown.run(method=method, next_n=given, **kernels).cpu(), want)


@pytest.mark.parametrize("layout", [layouts.INDEXER_FP4, FNUZ, layouts.INDEXER_MXFP8], ids=lambda layout: layout.name)
def test_other_encodings(layout, kernel_device, rng):
    kernel, device = kernel_device
    case = Case("mixed", rng, device, layout)
    assert torch.equal(case.run(kernel=kernel, topk_kernel=kernel).cpu(), case.want())


def test_plans_are_made_for_what_is_multiplied():
    """A plan and the call that it serves take their launch shapes from the same encodings."""
    cache = dsv4x.PagedCache.zeros(2, layouts.INDEXER_MXFP8, 64)
    q = torch.zeros(1, 1, 64, 128, dtype=torch.float8_e4m3fn)
    lens, table = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    call = PagedLogitsCall(q, None, cache, torch.zeros(1, 64), lens, table, 128)
    assert call.rows.k_encoding == "mxfp8"


def test_out_and_cut_batches_are_the_same_rows(kernel_device, rng):
    kernel, device = kernel_device
    case = Case("mixed", rng, device)
    want = case.want()
    out = torch.full((case.tokens, K + 5), 7, dtype=torch.int32, device=device)[:, :K]
    got = case.run(out=out, logits_bytes=60_000, kernel=kernel, topk_kernel=kernel)
    assert got is out
    assert torch.equal(got.cpu(), want)


def counted(monkeypatch, calls):
    """The reference, with a plan that says what it was made from and is checked where it is used."""
    record = registry.find("paged_mqa_logits", "reference")

    def plan(rows, earlier):
        calls.append(earlier)
        made = {} if earlier is None else earlier
        made["lens"] = rows.context_lens.clone()
        return made

    def run(call):
        # The oracle's own calls have none.
        assert call.plan is None or torch.equal(call.plan["lens"], call.context_lens)
        return record.run(call._replace(plan=None))

    return registry.replaced(dataclasses.replace(record, plan=plan, run=run), without=[("paged_mqa_logits", "triton")])


@pytest.mark.parametrize("next_n", [None, 1])
def test_layers_share_a_plan_that_every_update_fills_in_place(next_n, rng, monkeypatch):
    calls = []
    with counted(monkeypatch, calls):
        case = Case("decode", rng, host=False)
        for _ in range(3):
            case.run(next_n=next_n, kernel="reference")
        assert calls == [None]
        for lens in ([3, 799, 64, 0], [8, 8, 8, 8]):
            case.update(torch.tensor(lens))
            for _ in range(2):
                assert torch.equal(case.run(next_n=next_n, kernel="reference"), case.want())
        assert len(calls) == 3
        assert calls[1] is calls[2]
        assert calls[1] is not None


def test_pieces_of_a_batch_have_plans_of_their_own(rng, monkeypatch):
    calls = []
    with counted(monkeypatch, calls):
        case = Case("decode", rng, host=False)
        whole = case.run(next_n=1, kernel="reference")
        assert len(calls) == 1
        budget = 2 * 4 * 256
        assert torch.equal(case.run(next_n=1, kernel="reference", logits_bytes=budget), whole)
        assert len(calls) == 3
        case.update(torch.tensor([799, 3, 64, 70]))
        assert len(calls) == 6
        assert torch.equal(case.run(next_n=1, kernel="reference", logits_bytes=budget), case.want())


def test_a_copied_step_plans_for_itself(rng, monkeypatch):
    calls = []
    with counted(monkeypatch, calls):
        case = Case("decode", rng, host=False)
        case.run(next_n=1, kernel="reference")
        case.step = copy.deepcopy(case.step)
        case.run(next_n=1, kernel="reference")
    assert calls == [None, None]


@pytest.mark.parametrize(("captured", "plans"), [(False, 2), (True, 1)])
def test_a_graph_shares_what_it_fills_itself(captured, plans, rng, monkeypatch):
    calls = []
    with counted(monkeypatch, calls):
        case = Case("decode", rng, host=False)
        monkeypatch.setattr(step_indexer, "capturing", lambda device: True)
        case.step.captured = captured
        for _ in range(2):
            case.run(next_n=1, kernel="reference")
        assert calls == [None] * plans
        assert bool(case.step[RATIO].plans) == captured


def test_long_chunks_are_gathered_and_short_ones_read_in_place(rng, monkeypatch):
    seen = []
    gather = dsv4x.gather_indexer_k
    monkeypatch.setattr(
        step_indexer.indexer, "gather_indexer_k", lambda cache, slots: seen.append(len(slots)) or gather(cache, slots)
    )
    Case("mixed", rng).run()
    # 300 and 20 tokens' entries side by side, and 200 behind the requests between.
    assert seen == [80, 50]
    seen.clear()
    Case("mixed", rng).run(logits_bytes=79 * 132)
    assert seen == [75, 5, 50]
    seen.clear()
    Case("mixed", rng, host=False).run()
    assert seen == []


@pytest.mark.interpreter
@pytest.mark.parametrize("next_n", [None, 1, 2])
def test_no_launch_but_the_selections_depends_on_the_width(next_n, rng, monkeypatch):
    from dsv4x.common.kernels.launch import Launcher

    launch, seen = Launcher.__call__, []

    def call(self, programs, *arguments, **options):
        seen.append((self.kernel.__name__, programs))
        launch(self, programs, *arguments, **options)

    monkeypatch.setattr(Launcher, "__call__", call)
    launches = []
    for columns in (8, 128):
        case = Case("verify" if next_n == 2 else "decode", rng, host=False, columns=columns)
        for _ in range(2):
            case.run(next_n=next_n, kernel="triton", topk_kernel="reference")
        case.update(case.lens)
        launches.append(list(seen))
        seen.clear()
    assert launches[0] == launches[1]
    names = [name for name, _ in launches[0]]
    assert names.count("scheduled_mqa_logits_kernel") == 2
    # One for the build's lengths and one for the update's.
    assert names.count("schedule_kernel") == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"meta": None}, TypeError, "meta: got NoneType, need a dsv4x.AttentionMetadata"),
        ({"q": torch.zeros(4, 1, HEADS, 128).to(torch.float8_e4m3fn)}, ValueError, r"q: shape is \(4, 1, 32, 128\)"),
        ({"weights": torch.zeros(3, HEADS)}, ValueError, r"weights: shape is \(3, 32\), need \(4, 32\)"),
        ({"cache": dsv4x.PagedCache.zeros(2, layouts.INDEXER_FP8, 64)}, ValueError, "cache: page_size is 64, need 16"),
        ({"cache": dsv4x.PagedCache.zeros(2, layouts.DSV4, 16)}, ValueError, "cache: layout is DSv4, need indexer"),
        ({"k": 0}, ValueError, "k: got 0, need 1 to"),
        ({"k": [3]}, TypeError, "k: got list, need an int"),
        ({"kernel": ["triton"]}, TypeError, "kernel: got list, need a kernel's name or None"),
        ({"method": {}, "k": 3}, ValueError, "method: got {}, need LOCAL or PAGED"),
        ({"method": TopkMethod.RAGGED, "k": 3}, ValueError, "method: got RAGGED, need LOCAL or PAGED"),
        ({"next_n": 2}, ValueError, "next_n: got 2 for 4 requests, need it to give 4 rows"),
        ({"next_n": 0}, ValueError, "next_n: got 0, need >= 1"),
        ({"logits_bytes": 0}, ValueError, "logits_bytes: got 0, need >= 1"),
        ({"logits_bytes": 99}, ValueError, "logits_bytes: got 99, need >= "),
        ({"out": torch.zeros(4, 3, dtype=torch.int32)}, ValueError, r"out: shape is \(4, 3\), need \(4, 24\)"),
        ({"kernel": "deep_gemm"}, dsv4x.KernelNotSupported, "cannot run paged_mqa_logits"),
    ],
)
def test_bad_input_is_named(change, error, message, rng):
    case = Case("decode", rng)
    arguments = {"q": case.q, "cache": case.cache, "weights": case.weights, "meta": case.step[RATIO], **change}
    with pytest.raises(error, match=message):
        dsv4x.sparse_attn_indexer(**arguments)


def test_a_kind_without_a_choice_and_stale_lengths_are_named(rng):
    case = Case("decode", rng)
    with pytest.raises(ValueError, match="meta: of compress_ratio 1, whose layers select nothing"):
        dsv4x.sparse_attn_indexer(case.q, case.cache, case.weights, case.step[1], 3)
    case.table.add_(0)
    with pytest.raises(ValueError, match="meta: a length or a block table changed in place"):
        case.run()


def test_pages_outside_the_index_cache_are_named_when_asked_for(rng, monkeypatch):
    case = Case("decode", rng)
    case.cache = filled(PAGES - 39, layouts.INDEXER_FP8, PAGE, rng)
    monkeypatch.setenv("DSV4X_CHECK", "1")
    with pytest.raises(ValueError, match=r"block_table: page \d+ in row 0, column 0, need -1 or 0 to 0"):
        case.run()


@pytest.mark.parametrize("hostile", [-1, 3, 2**31 - 1, -(2**31)])
def test_rows_of_requests_that_are_not_there_have_no_entries(hostile, kernel_device, rng):
    kernel, device = kernel_device
    cache = filled(9, layouts.INDEXER_FP8, PAGE, rng, device)
    table = torch.randint(0, 9, (3, 4), generator=rng).int().to(device)
    q, _ = random_q((5, 1, HEADS), layouts.INDEXER_FP8, rng, device)
    weights = torch.randn(5, HEADS, generator=rng).to(device)
    lens = torch.tensor([[64], [10], [50], [2**31 - 1], [40]], device=device)
    for dtype in (torch.int32, torch.int64):
        requests = torch.tensor([2, 0, hostile, 1, 2], device=device).to(dtype)
        got = dsv4x.paged_mqa_logits(q, cache, weights, lens, table, 60, requests=requests, kernel=kernel)
        there = torch.where(torch.arange(5, device=device) == 2, 0, lens[:, 0])[:, None]
        rows = table[requests.long().clamp(0, 2)]
        want = dsv4x.paged_mqa_logits(q, cache, weights, there, rows, 60, kernel="reference")
        assert torch.equal(got == -torch.inf, want == -torch.inf)
        x, y = got[want > -torch.inf].double(), want[want > -torch.inf].double()
        assert 1 - 2 * (x * y).sum() / (x * x + y * y).sum() < 5e-6
    with pytest.raises(ValueError, match="requests: given with 2 rows in one, need q of one row each"):
        dsv4x.paged_mqa_logits(
            q[:4].view(2, 2, HEADS, 128), cache, weights[:4], lens[:4].view(2, 2), table, 60, requests=requests[:2]
        )


def test_requests_of_few_entries_are_not_scored(rng, kernel_device):
    kernel, device = kernel_device
    case = Case("verify of three", rng, device)
    # K of NaN where all entries are selected anyway, and of everything past the longest request's.
    want = case.want()
    short = case.table[1, :1].long()
    scored = case.cache.data.clone()
    case.cache.data[short] = 0x7F
    torch.testing.assert_close(case.run(kernel=kernel, topk_kernel=kernel).cpu()[3:6], want[3:6])
    case.cache.data.copy_(scored)


@pytest.mark.interpreter
@pytest.mark.parametrize("next_n", [1, 2, 3])
def test_a_plan_leaves_out_what_needs_no_logits(next_n, rng):
    from dsv4x.common.core.logits_calls import PagedRows
    from dsv4x.common.kernels import mqa_logits
    from dsv4x.common.kernels.schedule import limit_lens, spread_rows

    lens = torch.tensor([[0, 24, 20], [25, 3, 1], [-4, 2**31 - 1, 24], [24, 24, 24]])[:, :next_n].contiguous()
    table = torch.arange(40, dtype=torch.int32).view(4, 10)
    rows = PagedRows(lens, table, None, 16, 150, "e4m3fn", "e4m3fn", 24)
    longest = lens.amax(1)
    want = torch.where(longest > 24, longest.clamp(0, 150), 0)
    assert torch.equal(limit_lens(rows, 2), want.int()[:, None].expand(-1, 2))
    single = torch.where(lens > 24, lens.clamp(0, 150), 0).flatten()
    got, pages = spread_rows(rows, 1)
    assert torch.equal(got[:, 0], single.int())
    reached = torch.arange(10) < -(-single[:, None] // 16)
    assert torch.equal(pages[reached], table.repeat_interleave(next_n, 0)[reached])
    assert not torch.isin(pages[~reached], table).any()
    plan = mqa_logits.plan_paged(rows, None)
    assert torch.equal(plan.longest[:, 0], want.int())
    again = mqa_logits.plan_paged(rows._replace(context_lens=torch.zeros_like(lens)), plan)
    assert again is plan
    assert not plan.schedule.any()
