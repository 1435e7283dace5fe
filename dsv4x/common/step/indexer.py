"""The indexer's step: from one layer's index queries to the entries that its tokens read, whatever the batch mixes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..core import checks, layouts
from ..core.layouts import PagedCache
from ..core.logits_calls import PagedLogitsCall, PagedRows, SelectionCall
from ..core.platform import capturing
from ..core.spaces import INT32_MAX, TopkMethod
from ..dispatch.problem import SelectionProblem
from ..dispatch.registry import Kernel, call_on, select
from ..ops import indexer
from ..ops.indices import local_to_slots
from ..ops.topk import Selection
from .attention import look
from .metadata import AttentionMetadata

MOST_PAGED_QUERIES = 16
"""Queries of a request up to which its K pages are read in place, once a row.

A longer chunk's K is gathered first, 132 bytes an entry, and read once for a tile of its rows. A guess: DeepGEMM takes
2048 rows over 16 384 flat entries in 489 us of an H200, and the bytes of as many paged rows alone take 900 from its L2.
"""

METHODS = (TopkMethod.LOCAL, TopkMethod.PAGED)
"""The index spaces that :func:`~dsv4x.sparse_mla_attention` takes a selection in."""


class _Run(NamedTuple):
    """Neighbouring requests of a batch whose rows are scored by one call.

    Attributes:
        requests, tokens: which.
        next_n: rows of every one of them; 0 for rows that name their requests.
        flat: slots of their gathered K, and where each row's entries begin and end in it; None reads pages in place.
        longest: the most entries that a row of flat K has.
    """

    requests: slice
    tokens: slice
    next_n: int
    flat: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    longest: int = 0


class _Layer(NamedTuple):
    """What one layer brings."""

    q: torch.Tensor
    q_scale: torch.Tensor | None
    cache: PagedCache
    weights: torch.Tensor
    out: torch.Tensor | None


class _Options(NamedTuple):
    """How a layer's selection is made, as :func:`sparse_attn_indexer` was told."""

    k: int | None
    method: TopkMethod
    next_n: int | None
    stable: bool
    logits_bytes: int
    kernel: str | None
    topk_kernel: str | None


class SharedPlan:
    """What one kernel's calls over the requests of a step share, filled again whenever the step is."""

    def __init__(self, record: Kernel, run: _Run, fixed: tuple[str, str, int]):
        self.record, self.run, self.fixed = record, run, fixed
        self.value: Any = None
        self._rows: PagedRows | None = None
        self._table: torch.Tensor | None = None

    def fill(self, meta: AttentionMetadata) -> None:
        assert self.record.plan is not None
        most = _most(meta)
        if self._rows is None or self._table is not meta.extra_block_table or most != self._rows.most:
            lens, table, requests = _rows_of(meta, self.run)
            self._rows = PagedRows(lens, table, requests, meta.extra_page_size, most, *self.fixed)
            self._table = meta.extra_block_table
        self.value = call_on(meta.seq_lens.device, self.record.plan, self._rows, self.value)


def _rows_of(meta: AttentionMetadata, run: _Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(lengths ``[B, n]``, block table, requests) of a run, as :class:`PagedRows` has them."""
    assert meta.extra_block_table is not None
    assert meta.visible is not None
    lens = meta.visible[run.tokens]
    if run.next_n:
        return lens.view(-1, run.next_n), meta.extra_block_table[run.requests], None
    return lens[:, None], meta.extra_block_table, meta.request[run.tokens]


def _most(meta: AttentionMetadata) -> int:
    """Entries that a row has at most: by the bound of lengths, or by what the host knows where there is none."""
    table = meta.extra_block_table
    assert table is not None
    bound = meta.step.max_seq_len // meta.compress_ratio
    if meta.step.max_seq_len == INT32_MAX and meta.step.host is not None:
        bound = max(meta.compressed_bounds(), default=0)
    return min(bound, table.shape[1] * meta.extra_page_size)


def sparse_attn_indexer(
    q: torch.Tensor,
    cache: PagedCache,
    weights: torch.Tensor,
    meta: AttentionMetadata,
    k: int | None = None,
    method: TopkMethod = TopkMethod.LOCAL,
    *,
    next_n: int | None = None,
    q_scale: torch.Tensor | None = None,
    stable: bool = True,
    logits_bytes: int = indexer.LOGITS_BYTES,
    out: torch.Tensor | None = None,
    kernel: str | None = None,
    topk_kernel: str | None = None,
) -> torch.Tensor:
    """Each token's best compressed entries, for one layer of a step whose batch may mix prefill chunks and decode.

    Lengths, requests and block tables are the step's. What the kernels plan from them, such as DeepGEMM's schedule, is
    made by the first layer that needs it, and again in place by every ``update``; the other layers share it. A captured
    graph whose metadata is updated inside it plans once a replay.

    Neighbouring requests of up to 16 queries are read page by page in one call. A longer chunk's K is gathered to flat
    rows first, where the host knows which requests these are; no graph does.

    Args:
        q: e4m3fn or e4m3fnuz ``[T, H, 128]``, or packed e2m1, uint8 ``[T, H, 64]``; T = ``meta.num_tokens``, H is 32
            or 64.
        cache: the layer's index cache, as in :func:`~dsv4x.paged_mqa_logits`, of the page size and block table that
            ``meta`` has for its compressed cache. Its pages may be fewer; a page outside of them is no page.
        weights: float32 ``[T, H]``, q's scale (of an fp8 q) multiplied in.
        meta: the step's metadata of a kind that selects.
        k: indices a row; None is the metadata's ``topk``.
        method: LOCAL for the ``topk_indices`` of :func:`~dsv4x.sparse_mla_attention`, PAGED for its ``topk_slots``.
        next_n: the number of rows that every request owns, one after another; they are then scored together, which
            reads K fewer times. None asks what the host knows, and takes rows one by one where it knows nothing.
        q_scale: uint8 ue8m0 ``[T, H, 4]`` with an e2m1 q.
        stable: as in :func:`~dsv4x.topk_transform`.
        logits_bytes: as in :func:`~dsv4x.paged_indexer_topk`; a chunk's gathered K is within as much again.
        out: int32 ``[T, k]``, rows contiguous, or None.
        kernel, topk_kernel: the kernels of the logits and of the selection; None picks.

    Returns:
        int32 ``[T, k]``, as :func:`~dsv4x.topk_transform` gives it; rows of padding are -1.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device, layout or value; lengths or tables that
            changed in place since ``meta`` was filled; ``logits_bytes`` too small; under ``DSV4X_CHECK=1`` also a page
            outside the index cache, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: vLLM's op of this name, which a server calls once a layer.
    """
    if not isinstance(meta, AttentionMetadata):
        raise TypeError(f"meta: got {type(meta).__name__}, need a dsv4x.AttentionMetadata")
    meta.check_current()
    k = meta.topk if k is None else k
    layer = _Layer(q, q_scale, cache, weights, out)
    options = _Options(k, method, next_n, stable, logits_bytes, kernel, topk_kernel)
    calls = _calls_of(layer, meta, options)
    assert k is not None
    if out is None:
        out = torch.empty(meta.num_tokens, k, dtype=torch.int32, device=q.device)
        layer = layer._replace(out=out)
    for call in calls:
        call(layer)
    return out


def _calls_of(layer: _Layer, meta: AttentionMetadata, options: _Options) -> list[Callable[[_Layer], object]]:
    """What was checked and prepared for one layer holds for every other that looks the same."""
    unknown = meta.step.host is None
    key = (
        "indexer", *map(look, layer), *options, capturing(meta.seq_lens.device), checks.check_values_enabled(), unknown,
    )  # fmt: skip
    try:
        calls = meta.prepared.get(key)
    except TypeError:
        # An option that cannot be hashed is wrong, and is named.
        return _prepared(layer, meta, options)
    if calls is None:
        calls = meta.kept.get(key)
    if calls is None:
        calls = _prepared(layer, meta, options)
        # What the host knows may be other with the next step, and where lengths have no bound the widths too.
        bounded = options.next_n is not None and meta.step.max_seq_len < INT32_MAX
        lasting = (unknown or bounded) and not _is_foreign(meta)
        (meta.prepared if lasting else meta.kept)[key] = calls
    return calls


def _prepared(layer: _Layer, meta: AttentionMetadata, options: _Options) -> list[Callable[[_Layer], object]]:
    """The calls that make the selection of layers that look like this one, its arguments looked at."""
    runs = _checked_runs(layer, meta, options)
    assert options.k is not None
    selection = Selection(options.k, options.method, options.stable, options.topk_kernel)
    calls: list[Callable[[_Layer], object]] = []
    for run in runs:
        whole = functools.partial(_select, meta, run, selection, options, len(runs) == 1)
        calls.append(_fast(layer, meta, run, selection, options) or whole)
    return calls


def _checked_runs(layer: _Layer, meta: AttentionMetadata, options: _Options) -> list[_Run]:
    """The runs of a batch; raises for an argument that is wrong."""
    q, q_scale, cache, weights, out = layer
    k, method, next_n = options.k, options.method, options.next_n
    device, tokens = meta.seq_lens.device, meta.num_tokens
    if not meta.selects:
        raise ValueError(f"meta: of compress_ratio {meta.compress_ratio}, whose layers select nothing")
    indexer.check_q(q, q_scale, (tokens,))
    if q.device != device:
        raise ValueError(f"q: on {q.device}, need {device}")
    indexer.check_cache("cache", cache, device)
    if cache.page_size != meta.extra_page_size:
        raise ValueError(f"cache: page_size is {cache.page_size}, need {meta.extra_page_size} as in the metadata")
    checks.tensor("weights", weights, (tokens, q.shape[1]), torch.float32, device)
    if k is None:
        raise ValueError("k: got None, need the indices a row where the metadata has no topk")
    checks.integer("k", k, 1, INT32_MAX)
    if method not in METHODS:
        names = " or ".join(method.name for method in METHODS)
        raise ValueError(f"method: got {getattr(method, 'name', method)}, need {names}")
    if out is not None:
        checks.rows_apart("out", checks.tensor("out", out, (tokens, k), torch.int32, device))
    checks.integer("logits_bytes", options.logits_bytes, 1)
    requests = meta.seq_lens.shape[0]
    whole = _Run(slice(0, requests), slice(0, tokens), 0)
    if next_n is not None:
        checks.integer("next_n", next_n, 1)
        if tokens != requests * next_n:
            raise ValueError(f"next_n: got {next_n} for {requests} requests, need it to give {tokens} rows")
        whole = whole._replace(next_n=next_n)
    elif not capturing(device) and meta.step.host is not None:
        return _host_runs(meta, options.logits_bytes)
    return [whole] if tokens else []


def _host_runs(meta: AttentionMetadata, logits_bytes: int) -> list[_Run]:
    """Runs of what the host knows: of short requests, and of chunks whose gathered K keeps within the budget."""
    host = meta.step.host
    assert host is not None
    bounds = meta.compressed_bounds()
    entry_bytes = layouts.INDEXER_FP8.entry_bytes
    found: list[tuple[int, int, bool]] = []
    held = 0
    for request, (queries, entries) in enumerate(zip(host.query_lens, bounds)):
        flat = queries > MOST_PAGED_QUERIES and entries * entry_bytes <= logits_bytes
        held = held + entries * entry_bytes if flat and found and found[-1][2] else entries * entry_bytes
        if found and found[-1][2] == flat and not (flat and held > logits_bytes):
            found[-1] = (found[-1][0], request + 1, flat)
        else:
            found.append((request, request + 1, flat))
            held = entries * entry_bytes
    runs = []
    for first, end, flat in found:
        requests = slice(first, end)
        # Rows of padding belong to the last requests' call.
        stop = meta.num_tokens if end == len(bounds) else host.starts[end]
        tokens = slice(host.starts[first], stop)
        if tokens.start == tokens.stop:
            continue
        if flat:
            gathered = _gathered(meta, requests, tokens, bounds[requests])
            runs.append(_Run(requests, tokens, 0, gathered, max(bounds[requests])))
            continue
        lens = set(host.query_lens[requests])
        uniform = len(lens) == 1 and stop == host.starts[end]
        runs.append(_Run(requests, tokens, lens.pop() if uniform else 0))
    return runs


def _gathered(
    meta: AttentionMetadata, requests: slice, tokens: slice, bounds: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(slots int32 ``[N]``, starts and ends int32 ``[tokens]``) of the flat K of some requests."""
    assert meta.extra_block_table is not None
    assert meta.visible is not None
    device, count = meta.seq_lens.device, len(bounds)
    base = torch.tensor([0, *bounds], dtype=torch.int32, device="cpu").cumsum(0).int().to(device)
    entries = sum(bounds)
    every = torch.arange(entries, dtype=torch.int32, device=device)
    owner = torch.searchsorted(base[1:], every, right=True).int()
    local = every - base[owner]
    slots = local_to_slots(
        local[:, None], owner, local + 1, meta.extra_block_table[requests],
        meta.extra_page_size, meta.extra_pages,
    )[:, 0]  # fmt: skip
    row = (meta.request[tokens] - requests.start).clamp(0, count - 1)
    starts = base[row]
    return slots, starts, starts + torch.minimum(meta.visible[tokens], base[row + 1] - starts)


def _select(
    meta: AttentionMetadata, run: _Run, selection: Selection, options: _Options, alone: bool, layer: _Layer
) -> None:
    """One call's rows of the selection; a run that is alone is the whole batch, whose plan every step fills again."""
    q, q_scale, cache, weights, out = layer
    assert out is not None
    whole = run.tokens == slice(0, meta.num_tokens)
    if not whole:
        q, weights, out = q[run.tokens], weights[run.tokens], out[run.tokens]
        q_scale = None if q_scale is None else q_scale[run.tokens]
    if run.flat is not None:
        slots, starts, ends = run.flat
        rows, scales = indexer.gather_indexer_k(cache, slots)
        indexer.indexer_topk(
            q, rows, scales, weights, starts, ends, selection.k, selection.method, max_seqlen_k=run.longest,
            q_scale=q_scale, slot_table=meta.extra_block_table, slot_page_size=meta.extra_page_size,
            slot_pages=meta.extra_pages, requests=meta.request[run.tokens], stable=selection.stable,
            logits_bytes=options.logits_bytes, out=out, kernel=options.kernel, topk_kernel=selection.kernel,
        )  # fmt: skip
        return
    call = _call(layer._replace(q=q, q_scale=q_scale, weights=weights), meta, run)
    if checks.check_values_enabled():
        indexer.check_paged_values(call)
    space = {**_space_of(meta, run, selection.method, call), "bases": None}
    plans = functools.partial(_plan_of, meta, run, alone and whole)
    indexer.select_paged(call, selection, space, options.logits_bytes, out, options.kernel, plans)


def _call(layer: _Layer, meta: AttentionMetadata, run: _Run) -> PagedLogitsCall:
    """The logits of a run's rows, unclean."""
    lens, table, requests = _rows_of(meta, run)
    groups = (-1, run.next_n or 1)
    return PagedLogitsCall(
        layer.q.unflatten(0, groups), None if layer.q_scale is None else layer.q_scale.unflatten(0, groups),
        layer.cache, layer.weights, lens, table, _most(meta), clean_logits=False, requests=requests,
    )  # fmt: skip


def _space_of(meta: AttentionMetadata, run: _Run, method: TopkMethod, call: PagedLogitsCall) -> dict[str, Any]:
    """What makes slots of the compressed cache of local entries, as selections take it."""
    if method is TopkMethod.LOCAL:
        return {}
    return {
        "block_table": call.block_table, "page_size": meta.extra_page_size, "pages": meta.extra_pages,
        "next_n": run.next_n or 1, "requests": call.requests,
    }  # fmt: skip


def _fast(
    layer: _Layer, meta: AttentionMetadata, run: _Run, selection: Selection, options: _Options
) -> Callable[[_Layer], object] | None:
    """:func:`_select` of a whole batch in one piece, with nothing left to decide; None where that is not so.

    The host's time of a decode layer is this.
    """
    if run.flat is not None or run.tokens != slice(0, meta.num_tokens) or checks.check_values_enabled():
        return None
    call = _call(layer, meta, run)
    if not indexer.in_one_piece(call, selection.k, options.logits_bytes):
        return None
    record = indexer.logits_kernel(call, options.kernel)
    call, shared = call._replace(max_context_len=call.rows.most, unscored=selection.k), None
    if record.plan is not None:
        if _is_foreign(meta):
            return None
        shared = _shared_plan(meta, run, slice(0, call.q.shape[0]), record, call)
        call = call._replace(plan=shared.value)
    device, shape, lens = call.q.device, call.q.shape, call.context_lens
    most, requests = call.max_context_len, call.requests
    score = record.run if record.prepare is None else call_on(device, record.prepare, call)
    k, method, stable, kernel = selection
    rows_lens, space = lens.reshape(-1), _space_of(meta, run, method, call)
    problem = SelectionProblem.on(
        "topk_transform", device, tokens=len(rows_lens), width=most, k=k, method=method, stable=stable
    )
    choose = select(problem, kernel).run

    def run_layer(layer: _Layer, table: torch.Tensor) -> None:
        q, q_scale, cache, weights, out = layer
        scales = None if q_scale is None else q_scale.view(*shape[:3], -1)
        plan = None if shared is None else shared.value
        logits = score(PagedLogitsCall(
            q.view(shape), scales, cache, weights, lens, table, most, None, None, False, requests, plan, k,
        ))  # fmt: skip
        assert out is not None
        choose(SelectionCall(logits, rows_lens, k, method, None, space, out))

    def run_on(layer: _Layer) -> None:
        # An update may have brought another tensor of the same shape.
        table = meta.extra_block_table
        assert table is not None
        if space:
            space["block_table"] = table
        call_on(device, run_layer, layer, table)

    return run_on


def _plan_of(
    meta: AttentionMetadata, run: _Run, lasting: bool, piece: slice, record: Kernel, call: PagedLogitsCall
) -> Any:
    """The plan of a piece of a run, made by the first layer that needs it; a lasting one is filled with every step."""
    key, rows = _plan_key(run, piece, record, call), call.rows
    if not lasting:
        if key not in meta.kept:
            meta.kept[key] = _make(record, rows)
        return meta.kept[key]
    if _is_foreign(meta) and key not in meta.plans:
        return _make(record, rows)
    return _shared_plan(meta, run, piece, record, call).value


def _shared_plan(meta: AttentionMetadata, run: _Run, piece: slice, record: Kernel, call: PagedLogitsCall) -> SharedPlan:
    """The plan of a piece of the whole batch, which every refill of the step fills again."""
    key, rows = _plan_key(run, piece, record, call), call.rows
    shared = meta.plans.get(key)
    if shared is None:
        next_n = run.next_n or 1
        tokens = slice(piece.start * next_n, piece.stop * next_n)
        shared = meta.plans[key] = SharedPlan(record, _Run(piece, tokens, run.next_n), rows[-3:])
        shared.fill(meta)
    return shared


def _plan_key(run: _Run, piece: slice, record: Kernel, call: PagedLogitsCall) -> tuple[Any, ...]:
    tokens = run.tokens.start, run.next_n, piece.start, piece.stop
    return ("indexer plan", record.name, *tokens, *call.rows[-3:])


def _is_foreign(meta: AttentionMetadata) -> bool:
    """Whether a graph is being captured that does not fill the metadata: what is made inside it is no other graph's."""
    return capturing(meta.seq_lens.device) and not meta.step.captured


def _make(record: Kernel, rows: PagedRows) -> Any:
    assert record.plan is not None
    return call_on(rows.block_table.device, record.plan, rows, None)
