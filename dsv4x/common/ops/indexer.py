"""The indexer: scores of every compressed entry, and the best of them as index lists for attention.

A logit is ``k_scale * sum over heads of w * max(q . k, 0)`` over 128 values. :func:`paged_mqa_logits` reads the
indexer's paged K cache in place, :func:`mqa_logits` flat K rows; :func:`paged_indexer_topk` and :func:`indexer_topk` go
from queries to selected entries within a budget of bytes for the logits, which are never all held where they do not
fit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..core import checks, layouts
from ..core.layouts import PagedCache
from ..core.logits_calls import FlatLogitsCall, PagedLogitsCall, encoding_of
from ..core.model import INDEX_DIM
from ..core.platform import platform
from ..core.spaces import INT32_MAX, TopkMethod
from ..dispatch.problem import CacheProblem, LogitsProblem, ScheduleProblem, SelectionProblem
from ..dispatch.registry import Kernel, find, select
from .topk import Selection, check_space, launch_topk, put_in_space

HEADS = (32, 64)
"""Index heads the kernels take."""

LOGITS_BYTES = 1 << 29
"""The default budget of :func:`paged_indexer_topk` and :func:`indexer_topk`: 256 rows of 262 144 entries, which are a
million tokens', and their selections in one piece."""

SPLIT_PAGES = 4
"""Pages in one segment of a schedule: DeepGEMM's warpgroups, each of which takes a page."""

_MAX_WIDTH = 2**31 - 2**14
_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
# A guess at what still fills a device: where a budget holds fewer rows, the context is cut rather than the rows.
_MIN_ROWS = 64
# Of each selected entry of a stretch: two buffers of two selections of float32 values and int32 ids, and the gathering
# of values by int64 ids.
_MERGED_BYTES = 2 * 2 * 8 + 4 + 8
# Columns past which the Triton selection lists a row's candidates, and past which k it goes through rows instead.
_LISTED_COLUMNS, _MOST_LISTED_K = 4096, 2048
# Vendor kernels round a row of logits up to this.
_ROW_ALIGNMENT = 256


def indexer_context_lens(seq_lens: torch.Tensor, next_n: int, compress_ratio: int) -> torch.Tensor:
    """Entries that each of a request's last ``next_n`` tokens may see: ``max(L - next_n + 1 + j, 0) // ratio``.

    Args:
        seq_lens: int32 or int64 ``[B]``, raw tokens of each request, its queries included.
        next_n: query tokens a request.
        compress_ratio: raw tokens an entry.

    Returns:
        int32 ``[B, next_n]``, non-decreasing along a row.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or value.
    """
    checks.tensor("seq_lens", seq_lens, (None,), checks.INDEX_DTYPES)
    checks.integer("next_n", next_n, 1)
    checks.integer("compress_ratio", compress_ratio, 1, INT32_MAX)
    visible = seq_lens[:, None] + torch.arange(1 - next_n, 1, dtype=seq_lens.dtype, device=seq_lens.device)
    return torch.div(visible.clamp_min(0), compress_ratio, rounding_mode="floor").int()


def check_q(q: torch.Tensor, q_scale: torch.Tensor | None, leading: tuple[int | None, ...]) -> None:
    if isinstance(q, torch.Tensor) and q.dtype == torch.uint8:
        checks.tensor("q", q, (*leading, None, INDEX_DIM // 2), torch.uint8)
        if q_scale is None:
            raise ValueError("q_scale: got None, need uint8 ue8m0 scales for a packed e2m1 q")
        checks.tensor("q_scale", q_scale, (*q.shape[:-1], INDEX_DIM // 32), torch.uint8, q.device)
    else:
        checks.tensor("q", q, (*leading, None, INDEX_DIM), _FP8)
        if q_scale is not None:
            raise ValueError("q_scale: given, need None: an fp8 q has its scale in the weights")
    if q.shape[-2] not in HEADS:
        raise ValueError(f"q: {q.shape[-2]} heads, need {' or '.join(map(str, HEADS))}")


def _check_out(out: torch.Tensor | None, rows: int, width: int, device: torch.device) -> None:
    if out is not None:
        checks.rows_apart("out", checks.tensor("out", out, (rows, width), torch.float32, device))


def check_cache(name: str, cache: object, device: torch.device) -> PagedCache:
    """A cache of the indexer's K, in either encoding, or an error that names the argument."""
    cache = checks.cache(name, cache, device)
    base = cache.layout.with_flavour("e4m3fn") if cache.layout.value_encoding in layouts.FLAVOURS else cache.layout
    if base != layouts.INDEXER_FP8 and cache.layout not in (layouts.INDEXER_MXFP8, layouts.INDEXER_FP4):
        names = f"{layouts.INDEXER_FP8.name}, {layouts.INDEXER_MXFP8.name} or {layouts.INDEXER_FP4.name}"
        raise ValueError(f"{name}: layout is {cache.layout.name}, need {names}")
    return cache


def paged_mqa_logits(
    q: torch.Tensor,
    cache: PagedCache,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    schedule: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    kernel: str | None = None,
    *,
    q_scale: torch.Tensor | None = None,
    requests: torch.Tensor | None = None,
    clean_logits: bool = True,
) -> torch.Tensor:
    """The logits of each query row over its request's entries, pages read in place.

    Column e of row b * n + j is entry e of request b, for e < context_lens[b, j]; the other columns are -inf, as are
    entries whose page is outside the pool or past the block table, and logits that are NaN. A product q . k that is NaN
    counts as 0, which is what the maximum of DeepGEMM's kernel makes of it.

    Args:
        q: e4m3fn or e4m3fnuz ``[B, n, H, 128]``, or packed e2m1, uint8 ``[B, n, H, 64]``; B >= 0, n >= 1, H 32 or 64.
        cache: a :class:`~dsv4x.PagedCache` of layout ``INDEXER_FP8`` (either flavour), ``INDEXER_MXFP8`` or
            ``INDEXER_FP4``.
        weights: float32 ``[B * n, H]``, q's scale (of an fp8 q) multiplied in.
        context_lens: int32 or int64 ``[B, n]``, entries of each row, clamped to ``[0, max_context_len]``.
        block_table: int32 ``[B, m]`` page numbers; what stands past a request's own pages is never used.
        max_context_len: columns of the result.
        schedule: int32 ``[num_sms + 1, 2]`` of :func:`get_paged_mqa_logits_metadata`. It vouches for ``context_lens``:
            made from them, within ``[0, min(max_context_len, m * page_size)]``, and not decreasing along a request's
            rows. None: DeepGEMM's is made here, from lengths that are put within bounds first; other kernels have none.
        out: float32 ``[B * n, max_context_len]``, rows contiguous, or None. DeepGEMM allocates its own, so there one
            costs a copy.
        kernel: ``"deep_gemm"``, ``"aiter"``, ``"triton"`` or ``"reference"``; None picks.
        q_scale: uint8 ue8m0 ``[B, n, H, 4]``, one for 32 values, with an e2m1 q.
        requests: int32 or int64 ``[B]``, with n = 1: each row's row of the block table, which is then ``[R, m]``; one
            outside ``[0, R)`` has no entries. None: row b is request b.
        clean_logits: False leaves open what stands outside a row's entries, and NaN as they are, which spares a vendor
            kernel's result another pass and Triton's the columns. :func:`~dsv4x.topk_transform` needs neither.

    Returns:
        float32 ``[B * n, max_context_len]``, rows contiguous, with any row stride unless ``out`` is given.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device, layout or value; under
            ``DSV4X_CHECK=1`` also a length past its row or table, or a page outside the pool, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: ``fp8_paged_mqa_logits`` of DeepGEMM (tests/test_attention.py).
    """
    check_q(q, q_scale, (None, None))
    batch, next_n, heads = q.shape[:3]
    device = q.device
    checks.integer("n", next_n, 1)
    cache = check_cache("cache", cache, device)
    checks.tensor("weights", weights, (batch * next_n, heads), torch.float32, device)
    checks.tensor("context_lens", context_lens, (batch, next_n), checks.INDEX_DTYPES, device)
    _check_table(block_table, requests, (batch, next_n), device)
    checks.integer("max_context_len", max_context_len, 0, _MAX_WIDTH)
    _check_out(out, batch * next_n, max_context_len, device)
    if schedule is not None:
        checks.tensor("schedule", schedule, (None, 2), torch.int32, device)
    call = PagedLogitsCall(
        q, q_scale, cache, weights, context_lens, block_table, max_context_len, schedule, out, clean_logits, requests
    )
    if checks.check_values_enabled():
        check_paged_values(call)
    return _paged_logits(call, kernel, None)


def _check_table(
    block_table: torch.Tensor, requests: torch.Tensor | None, rows: tuple[int, int], device: torch.device
) -> None:
    """Check the block table of ``rows`` (B, n), and the requests that they name."""
    batch, next_n = rows
    checks.tensor("block_table", block_table, (batch if requests is None else None, None), torch.int32, device)
    if requests is not None:
        checks.tensor("requests", requests, (batch,), checks.INDEX_DTYPES, device)
        if next_n != 1:
            raise ValueError(f"requests: given with {next_n} rows in one, need q of one row each, [rows, 1, H, ..]")


Plans = Callable[[slice, Kernel, PagedLogitsCall], Any]
"""What a kernel's calls of a step share: of some of the batch's requests, the kernel, and one of the calls."""


def logits_kernel(call: PagedLogitsCall, kernel: str | None) -> Kernel:
    """The kernel that makes the logits of a call."""
    batch, next_n, heads = call.q.shape[:3]
    problem = LogitsProblem.on(
        "paged_mqa_logits",
        call.q.device,
        tokens=batch,
        next_n=next_n,
        ragged=call.requests is not None,
        heads=heads,
        head_dim=INDEX_DIM,
        width=call.max_context_len,
        caches=(call.cache.spec,),
        q_encoding=encoding_of(call.q),
        clean=call.clean_logits,
    )
    return select(problem, kernel)


def _paged_logits(
    call: PagedLogitsCall, kernel: str | None, plan: Callable[[Kernel, PagedLogitsCall], Any] | None
) -> torch.Tensor:
    """:func:`paged_mqa_logits` of checked arguments; of a stretch of context, lengths that end outside it."""
    record, out, width, device = logits_kernel(call, kernel), call.out, call.max_context_len, call.q.device
    batch, next_n = call.q.shape[:2]
    if batch == 0 or width == 0 or call.cache.pages == 0 or call.block_table.shape[1] == 0:
        if out is None:
            out = torch.empty(batch * next_n, width, dtype=torch.float32, device=device)
        return out.fill_(-torch.inf)
    if plan is not None and record.plan is not None:
        call = call._replace(plan=plan(record, call))
    return record.launch(device, call)


def check_paged_values(call: PagedLogitsCall) -> None:
    context_lens, block_table, _, page_size, most, *_ = call.rows
    if call.requests is not None:
        known = (call.requests >= 0) & (call.requests < len(block_table))
        block_table = block_table[torch.where(known, call.requests, 0).long()]
        context_lens = torch.where(known[:, None], context_lens, 0)
    bad = (context_lens < 0) | (context_lens > most)
    if bad.any():
        row, column = (int(x) for x in bad.nonzero()[0])
        raise ValueError(f"context_lens: {int(context_lens[row, column])} in row {row}, need 0 to {most}")
    used = (context_lens.long().amax(1) + page_size - 1) // page_size
    checks.index_values("block_table", block_table, used, call.cache.pages, "page")


def mqa_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    max_seqlen_k: int | None = None,
    out: torch.Tensor | None = None,
    kernel: str | None = None,
    *,
    q_scale: torch.Tensor | None = None,
    clean_logits: bool = True,
) -> torch.Tensor:
    """The logits of each query row over its own range of flat K rows.

    Row i scores entries ks[i] <= e < ke[i], in column e, or in column e - ks[i] where ``max_seqlen_k`` says how many
    columns there are; every other column is -inf. NaN as in :func:`paged_mqa_logits`.

    Args:
        q: e4m3fn or e4m3fnuz ``[M, H, 128]``, or packed e2m1, uint8 ``[M, H, 64]``; M >= 0, H 32 or 64.
        k: e4m3fn or e4m3fnuz ``[N, 128]``, or packed e2m1, uint8 ``[N, 64]``; rows contiguous, back to back.
        k_scale: float32 ``[N]``; of an e2m1 K, or an e4m3fn one in MXFP8, uint8 ue8m0 ``[N, 4]``.
        weights: float32 ``[M, H]``, q's scale (of an fp8 q) multiplied in.
        ks, ke: int32 or int64 ``[M]``, workspace rows where a row's entries begin and end, clamped to ``[0, N]``; a row
            with ke <= ks has none.
        max_seqlen_k: columns of the result, counted from each row's own ks; entries past them are left out. None: the
            result has N, one an entry.
        out: float32 ``[M, N]`` or ``[M, max_seqlen_k]``, rows contiguous, or None. A copy with DeepGEMM.
        kernel: ``"deep_gemm"``, ``"aiter"``, ``"triton"`` or ``"reference"``; None picks.
        q_scale: uint8 ue8m0 ``[M, H, 4]`` with an e2m1 q.
        clean_logits: as in :func:`paged_mqa_logits`.

    Returns:
        float32 ``[M, N]`` or ``[M, max_seqlen_k]``, rows contiguous, with any row stride unless ``out`` is given.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or value.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: ``fp8_mqa_logits`` of DeepGEMM (tests/test_attention.py).
    """
    check_q(q, q_scale, (None,))
    rows, heads, device = *q.shape[:2], q.device
    packed = isinstance(k, torch.Tensor) and k.dtype == torch.uint8
    checks.tensor("k", k, (None, INDEX_DIM // 2 if packed else INDEX_DIM), (*_FP8, torch.uint8), device)
    entries = k.shape[0]
    if entries > 1 and k.stride(0) != k.shape[1]:
        raise ValueError(f"k: stride(0) is {k.stride(0)}, need {k.shape[1]}")
    mx = isinstance(k_scale, torch.Tensor) and k_scale.dtype == torch.uint8 and k.dtype == torch.float8_e4m3fn
    if packed or mx:
        checks.tensor("k_scale", k_scale, (entries, INDEX_DIM // 32), torch.uint8, device)
        if entries > 1 and k_scale.stride(0) != k_scale.shape[1]:
            raise ValueError(f"k_scale: stride(0) is {k_scale.stride(0)}, need {k_scale.shape[1]}")
    else:
        checks.tensor("k_scale", k_scale, (entries,), torch.float32, device)
    checks.tensor("weights", weights, (rows, heads), torch.float32, device)
    for name, value in (("ks", ks), ("ke", ke)):
        checks.tensor(name, value, (rows,), checks.INDEX_DTYPES, device)
    if entries > _MAX_WIDTH:
        raise ValueError(f"k: {entries} rows, need <= {_MAX_WIDTH}")
    if max_seqlen_k is not None:
        checks.integer("max_seqlen_k", max_seqlen_k, 0, _MAX_WIDTH)
    width = entries if max_seqlen_k is None else max_seqlen_k
    _check_out(out, rows, width, device)
    problem = LogitsProblem.on(
        "mqa_logits",
        device,
        tokens=rows,
        heads=heads,
        head_dim=INDEX_DIM,
        width=width,
        rows=entries,
        q_encoding=encoding_of(q),
        k_encoding="mxfp8" if mx else encoding_of(k),
        relative=max_seqlen_k is not None,
        clean=clean_logits,
    )
    record = select(problem, kernel)
    if rows == 0 or width == 0 or entries == 0:
        if out is None:
            out = torch.empty(rows, width, dtype=torch.float32, device=device)
        return out.fill_(-torch.inf)
    return record.launch(
        device, FlatLogitsCall(q, q_scale, k, k_scale, weights, ks, ke, max_seqlen_k, out, clean_logits)
    )


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor,
    page_size: int = 64,
    num_sms: int | None = None,
    out: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """DeepGEMM's schedule of a batch's paged logits: where each SM begins. Made once a step, for all its layers.

    Segments of 4 pages are shared out in the order of the requests, of which the last row's length counts, each as
    often as it has pairs of rows. Row i is (pair of rows, segment) where SM i begins, row ``num_sms`` the end; without
    any entry all rows are (0, 0), which DeepGEMM's kernel takes for nothing to do.

    Args:
        context_lens: int32 or int64 ``[B, n]``, any B >= 0; a negative length is 0.
        page_size: entries a page.
        num_sms: SMs of the kernel it is for; None is the device's (DeepGEMM's ``get_num_sms()`` unless it was set).
        out: int32 ``[num_sms + 1, 2]``, contiguous, or None.
        kernel: ``"triton"`` (any batch), ``"deep_gemm"`` (as far as its shared memory reaches; compiles for every 32
            requests) or ``"reference"``; None picks.

    Returns:
        int32 ``[num_sms + 1, 2]``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: ``sm90_paged_mqa_logits_metadata`` of DeepGEMM; on SM90 the same table, bit for bit, where there is work.
    """
    checks.tensor("context_lens", context_lens, (None, None), checks.INDEX_DTYPES)
    batch, next_n = context_lens.shape
    device = context_lens.device
    checks.integer("n", next_n, 1)
    checks.integer("page_size", page_size, 1)
    if num_sms is None:
        num_sms = platform.limits(device).multiprocessors
    checks.integer("num_sms", num_sms, 1)
    # An atom's number is int32.
    if batch * next_n > 2**31 - 1:
        raise ValueError(f"context_lens: {batch} x {next_n} rows, need < 2**31")
    if out is None:
        out = torch.empty(num_sms + 1, 2, dtype=torch.int32, device=device)
    else:
        checks.tensor("out", out, (num_sms + 1, 2), torch.int32, device)
        if not out.is_contiguous():
            raise ValueError(f"out: stride(0) is {out.stride(0)}, need 2")
    problem = ScheduleProblem.on(
        "get_paged_mqa_logits_metadata", device, tokens=batch, next_n=next_n, page_size=page_size, num_sms=num_sms
    )
    record = select(problem, kernel)
    if batch == 0:
        return out.zero_()
    record.launch(device, context_lens, SPLIT_PAGES * page_size, -(-next_n // 2), num_sms, out)
    return out


def gather_indexer_k(
    cache: PagedCache,
    slots: torch.Tensor,
    k: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of the indexer's paged K cache as flat rows for :func:`mqa_logits`, codes as they are.

    Args:
        cache: a :class:`~dsv4x.PagedCache` of layout ``INDEXER_FP8`` (either flavour), ``INDEXER_MXFP8`` or
            ``INDEXER_FP4``.
        slots: int32 or int64 ``[N]``, index space *slot*; one that is negative or past the cache gives zeros.
        k: the cache's FP8 dtype ``[>= N, 128]``, or uint8 ``[>= N, 64]`` of an fp4 cache, contiguous, or None.
        k_scale: float32 ``[>= N]``, or uint8 ``[>= N, 4]`` of an fp4 or mxfp8 cache, contiguous, beginning on
            4 bytes, or None.
        kernel: ``"triton"`` or ``"reference"``; None picks.

    Returns:
        ``(k, k_scale)``, N rows of each.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or layout; under ``DSV4X_CHECK=1`` also
            a slot outside the cache.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    checks.tensor("slots", slots, (None,), checks.INDEX_DTYPES)
    device, rows = slots.device, slots.shape[0]
    cache = check_cache("cache", cache, device)
    encoding = cache.layout.value_encoding
    packed = encoding == "e2m1"
    dtype = torch.uint8 if packed else torch.float8_e4m3fn if encoding == "e4m3fn" else torch.float8_e4m3fnuz
    mx = cache.layout.scale_encoding == "ue8m0"
    scale_dtype, scale_tail = (torch.uint8, (4,)) if mx else (torch.float32, ())
    made = []
    for name, value, kind, tail in (
        ("k", k, dtype, (cache.layout.nope_bytes,)),
        ("k_scale", k_scale, scale_dtype, scale_tail),
    ):
        if value is None:
            value = torch.empty(rows, *tail, dtype=kind, device=device)
        checks.tensor(name, value, (None, *tail), kind, device)
        if value.shape[0] < rows or not value.is_contiguous():
            raise ValueError(f"{name}: {value.shape[0]} rows with stride {value.stride(0)}, need >= {rows} contiguous")
        if name == "k_scale" and value.data_ptr() % 4:
            raise ValueError(f"k_scale: begins at {value.data_ptr():#x}, need a multiple of 4")
        made.append(value[:rows])
    if checks.check_values_enabled():
        checks.index_values("slots", slots, None, cache.capacity, "slot")
    record = select(CacheProblem.on("gather_indexer_k", device, tokens=rows, caches=(cache.spec,)), kernel)
    if cache.pages == 0:
        for value in made:
            value.view(torch.uint8).zero_()
    elif rows:
        record.launch(device, cache, slots, *made)
    return made[0], made[1]


def paged_indexer_topk(
    q: torch.Tensor,
    cache: PagedCache,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    k: int,
    method: TopkMethod = TopkMethod.LOCAL,
    *,
    q_scale: torch.Tensor | None = None,
    schedule: torch.Tensor | None = None,
    requests: torch.Tensor | None = None,
    bases: torch.Tensor | None = None,
    slot_table: torch.Tensor | None = None,
    slot_page_size: int | None = None,
    slot_pages: int | None = None,
    stable: bool = True,
    logits_bytes: int = LOGITS_BYTES,
    out: torch.Tensor | None = None,
    kernel: str | None = None,
    topk_kernel: str | None = None,
) -> torch.Tensor:
    """Each query row's k best entries of its request's paged index cache.

    A batch may mix prefill chunks and decode rows: give every row by itself, with its request. A step's layers share
    one schedule in :func:`~dsv4x.sparse_attn_indexer`, which calls this.

    With ``max_context_len <= k`` every entry is selected and no logits are computed; nor are those of a request whose
    rows have no more than k entries, where a kernel plans its calls from the lengths. Otherwise rows, then the context,
    are cut so that logits stay within ``logits_bytes``; the selection of each stretch of context is merged with that of
    those before it. Where a row is cut changes nothing: an entry's logit does not depend on its neighbours.

    Args:
        q, cache, weights, context_lens, block_table, max_context_len, q_scale, schedule, requests: as in
            :func:`paged_mqa_logits`; the schedule serves the batch when it runs in one piece.
        k: indices a row, >= 1.
        method: the index space of the result, :func:`~dsv4x.topk_method` says which an attention entry point takes.
        bases: int32 or int64 ``[B * n]``, workspace row of each row's entry 0 (RAGGED).
        slot_table, slot_page_size, slot_pages: int32 ``[B, m]`` (``[R, m]`` with requests) block table, page size and
            pages of the cache that attention reads (PAGED); None takes those of the index cache.
        stable: as in :func:`~dsv4x.topk_transform`.
        logits_bytes: bytes of logits and of their selection that may be held at once; a few MiB of scratch come beside
            them where few rows are so long that several programs share one.
        out: int32 ``[B * n, k]``, rows contiguous, or None.
        kernel, topk_kernel: the kernels of the logits and of the selection; None picks.

    Returns:
        int32 ``[B * n, k]``, as :func:`~dsv4x.topk_transform` gives it.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device, layout or value; ``logits_bytes`` too
            small for one request's rows over one page's entries; under ``DSV4X_CHECK=1`` values as in
            :func:`paged_mqa_logits`.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    check_q(q, q_scale, (None, None))
    batch, next_n = q.shape[:2]
    device = q.device
    cache = check_cache("cache", cache, device)
    checks.tensor("weights", weights, (batch * next_n, q.shape[2]), torch.float32, device)
    checks.tensor("context_lens", context_lens, (batch, next_n), checks.INDEX_DTYPES, device)
    _check_table(block_table, requests, (batch, next_n), device)
    checks.integer("max_context_len", max_context_len, 0, _MAX_WIDTH)
    checks.integer("k", k, 1)
    if method is TopkMethod.PAGED:
        slot_table = block_table if slot_table is None else slot_table
        slot_page_size = cache.page_size if slot_page_size is None else slot_page_size
        slot_pages = cache.pages if slot_pages is None else slot_pages
    space: dict[str, Any] = {
        "bases": bases,
        "block_table": slot_table,
        "page_size": slot_page_size,
        "pages": slot_pages,
        "next_n": next_n,
        "requests": requests,
    }
    check_space(method, batch * next_n, device, space)
    if schedule is not None:
        checks.tensor("schedule", schedule, (None, 2), torch.int32, device)
    call = PagedLogitsCall(
        q, q_scale, cache, weights, context_lens, block_table, max_context_len, schedule, clean_logits=False,
        requests=requests,
    )  # fmt: skip
    if checks.check_values_enabled():
        check_paged_values(call)
    return select_paged(call, Selection(k, method, stable, topk_kernel), space, logits_bytes, out, kernel)


def select_paged(
    call: PagedLogitsCall,
    selection: Selection,
    space: dict[str, Any],
    logits_bytes: int,
    out: torch.Tensor | None,
    kernel: str | None,
    plans: Plans | None = None,
) -> torch.Tensor:
    """:func:`paged_indexer_topk` of checked arguments; ``plans`` gives what a step's layers share."""
    cache, most = call.cache, call.rows.most
    batch, next_n = call.q.shape[:2]

    def logits(requests: slice, first: int, width: int) -> torch.Tensor:
        part = call if requests == slice(0, batch) else call.part(requests)
        if width == most:
            plan = None if plans is None else functools.partial(plans, requests)
            return _paged_logits(part._replace(max_context_len=width, unscored=selection.k), kernel, plan)
        # Pages behind a stretch are no part of it, and a stretch begins with a page.
        pages = slice(first // cache.page_size, -(-(first + width) // cache.page_size))
        part = part._replace(
            context_lens=part.context_lens if first == 0 else part.context_lens.clamp_min(0) - first,
            block_table=part.block_table[:, pages],
            max_context_len=width,
            schedule=None,
        )
        return _paged_logits(part, kernel, None)

    batched = _Batch(batch, next_n, most, cache.page_size)
    return _bounded_topk(logits, call.context_lens.reshape(-1), batched, selection, space, logits_bytes, out)


def in_one_piece(call: PagedLogitsCall, k: int, logits_bytes: int) -> bool:
    """Whether one call of logits and one of selection make all rows of :func:`select_paged`."""
    most = call.rows.most
    batch, next_n = call.q.shape[:2]
    if batch == 0 or most <= k or call.cache.pages == 0:
        return False
    return _plan(batch, next_n, most, _step_of(call.cache.page_size), k, logits_bytes) == (batch, most)


def _step_of(page_size: int) -> int:
    """What a stretch of context is a multiple of: whole pages, and whole tiles of every kernel."""
    return max(page_size, _ROW_ALIGNMENT // page_size * page_size)


def indexer_topk(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    topk: int,
    method: TopkMethod = TopkMethod.LOCAL,
    *,
    max_seqlen_k: int | None = None,
    q_scale: torch.Tensor | None = None,
    bases: torch.Tensor | None = None,
    slot_table: torch.Tensor | None = None,
    slot_page_size: int | None = None,
    slot_pages: int | None = None,
    requests: torch.Tensor | None = None,
    stable: bool = True,
    logits_bytes: int = LOGITS_BYTES,
    out: torch.Tensor | None = None,
    kernel: str | None = None,
    topk_kernel: str | None = None,
) -> torch.Tensor:
    """Each query row's best entries of its own range of flat K rows; bounded and cut as :func:`paged_indexer_topk`.

    Args:
        q, k, k_scale, weights, ks, ke, q_scale: as in :func:`mqa_logits`.
        topk: indices a row, >= 1.
        method: LOCAL counts from each row's ks; RAGGED adds ``bases``, or ks without them; PAGED takes ``requests``.
        max_seqlen_k: at least the longest range; None for all of K's rows. Ranges are cut to it.
        bases: int32 or int64 ``[M]``, workspace row of each row's entry 0 (RAGGED).
        slot_table, slot_page_size, slot_pages: int32 ``[R, m]`` block table, page size and pages of the cache that
            attention reads (PAGED).
        requests: int32 or int64 ``[M]``, each row's request (PAGED); None for row i of request i.
        stable, logits_bytes, out, kernel, topk_kernel: as in :func:`paged_indexer_topk`.

    Returns:
        int32 ``[M, topk]``, as :func:`~dsv4x.topk_transform` gives it.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or value; ``logits_bytes`` too small.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    check_q(q, q_scale, (None,))
    rows, device = q.shape[0], q.device
    checks.tensor("k", k, (None, None), (*_FP8, torch.uint8), device)
    checks.tensor("weights", weights, (rows, q.shape[1]), torch.float32, device)
    for name, value in (("ks", ks), ("ke", ke)):
        checks.tensor(name, value, (rows,), checks.INDEX_DTYPES, device)
    checks.integer("topk", topk, 1)
    entries = k.shape[0]
    most = entries if max_seqlen_k is None else min(checks.integer("max_seqlen_k", max_seqlen_k, 0), entries)
    starts = ks.clamp(0, entries)
    lens = (ke.clamp(0, entries) - starts).clamp(0, most)
    if method is TopkMethod.RAGGED and bases is None:
        bases = starts
    space: dict[str, Any] = {
        "bases": bases,
        "block_table": slot_table,
        "page_size": slot_page_size,
        "pages": slot_pages,
        "next_n": 1,
        "requests": requests,
    }
    check_space(method, rows, device, space)

    def logits(part: slice, first: int, width: int) -> torch.Tensor:
        return mqa_logits(
            q[part],
            k,
            k_scale,
            weights[part],
            starts[part] if first == 0 else starts[part] + first,
            ke[part],
            width,
            kernel=kernel,
            q_scale=None if q_scale is None else q_scale[part],
            clean_logits=False,
        )

    selection = Selection(topk, method, stable, topk_kernel)
    return _bounded_topk(logits, lens, _Batch(rows, 1, most, 1), selection, space, logits_bytes, out)


class _Batch(NamedTuple):
    """What logits are made of: requests, their rows, the entries that each may have, and entries a page."""

    requests: int
    next_n: int
    width: int
    page_size: int


def _plan(rows: int, next_n: int, width: int, step: int, k: int, logits_bytes: int) -> tuple[int, int]:
    """(requests, columns) of a piece, so that its logits and selections stay within ``logits_bytes``."""

    def row_bytes(columns: int) -> int:
        aligned = -(-columns // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        return next_n * (4 * aligned + (0 if columns >= width else _MERGED_BYTES * k) + _candidate_bytes(columns, k))

    fitting = logits_bytes // row_bytes(width)
    if fitting >= min(rows, -(-_MIN_ROWS // next_n)):
        return min(rows, fitting), width
    requests = min(rows, max(1, _MIN_ROWS // next_n))
    while requests > 1 and row_bytes(step) * requests > logits_bytes:
        requests //= 2
    columns = width
    while columns > step and row_bytes(columns) * requests > logits_bytes:
        columns = -(-(columns // 2) // step) * step
    if row_bytes(columns) * requests > logits_bytes:
        need = row_bytes(columns) * requests
        raise ValueError(f"logits_bytes: got {logits_bytes}, need >= {need} for {next_n} rows of {columns} entries")
    return requests, columns


def _candidate_bytes(columns: int, k: int) -> int:
    """A bound on what the Triton selection keeps of a row: a list of keys and columns, and how many there are."""
    if columns <= _LISTED_COLUMNS or k > _MOST_LISTED_K:
        return 0
    return 4 * (2 * _LISTED_COLUMNS * (1 if 8 * k <= _LISTED_COLUMNS else 2) + 128)


def _bounded_topk(
    logits: Callable[[slice, int, int], torch.Tensor],
    lens: torch.Tensor,
    batch: _Batch,
    selection: Selection,
    space: dict[str, Any],
    logits_bytes: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """The selection of every row from logits made piece by piece; ``logits(requests, first column, columns)``.

    ``lens`` may be of any value: a selection clamps them to the columns that there are.
    """
    (requests, next_n, width, page_size), (k, method, *_) = batch, selection
    rows, device = requests * next_n, lens.device
    if out is None:
        out = torch.empty(rows, k, dtype=torch.int32, device=device)
    else:
        checks.rows_apart("out", checks.tensor("out", out, (rows, k), torch.int32, device))
    checks.integer("logits_bytes", logits_bytes, 1)
    if rows == 0:
        return out
    if width <= k:
        every = torch.arange(k, dtype=torch.int32, device=device).expand(out.shape)
        return put_in_space(every, lens.clamp(0, width), method, space, out)
    per_piece, columns = _plan(requests, next_n, width, _step_of(page_size), k, logits_bytes)
    for first in range(0, requests, per_piece):
        part = slice(first, min(first + per_piece, requests))
        span = slice(part.start * next_n, part.stop * next_n)
        here = _rows_of(space, method, span)
        if columns >= width:
            launch_topk(logits(part, 0, width), lens[span], None, selection, here, (out[span], None))
            continue
        bounded = lens[span].clamp(0, width)
        _merged_topk(functools.partial(logits, part), bounded, (width, columns), selection, here, out[span])
    return out


def _rows_of(space: dict[str, Any], method: TopkMethod, rows: slice) -> dict[str, Any]:
    """The part of ``space`` that belongs to ``rows``, as kernels take it."""
    if method is TopkMethod.LOCAL:
        return {}
    if method is TopkMethod.RAGGED:
        return {"bases": space["bases"][rows]}
    requests = space["requests"]
    if requests is not None:
        return {**space, "requests": requests[rows], "bases": None}
    next_n = space["next_n"]
    return {**space, "block_table": space["block_table"][rows.start // next_n : -(-rows.stop // next_n)], "bases": None}


def _merged_topk(
    logits: Callable[[int, int], torch.Tensor],
    lens: torch.Tensor,
    widths: tuple[int, int],
    selection: Selection,
    space: dict[str, Any],
    out: torch.Tensor,
) -> None:
    """A running selection over stretches of context: what is left of all before, beside what a stretch selects.

    ``logits(first column, columns)`` makes a stretch's; ``widths`` are the columns of a row and of a stretch.
    Both are in ascending order and one is before the other, so ties still go to the smallest index.
    """
    (width, columns), rows, device = widths, lens.shape[0], lens.device
    k, stretch = selection.k, selection._replace(method=TopkMethod.LOCAL)
    # Two, because a merge reads one while it writes the other.
    halves = [
        (
            torch.empty(rows, 2 * k, dtype=torch.float32, device=device),
            torch.full((rows, 2 * k), -1, dtype=torch.int32, device=device),
        )
        for _ in range(2)
    ]
    values, ids = halves[0]
    for step, first in enumerate(range(0, width, columns)):
        span = min(columns, width - first)
        scores = logits(first, span)
        fresh = ids[:, k:]
        launch_topk(scores, lens - first, None, stretch, {}, (fresh, None))
        values[:, k:] = scores.gather(1, fresh.clamp_min(0).long())
        del scores
        fresh += torch.where(fresh >= 0, first, 0)
        last = first + span >= width
        other = halves[(step + 1) % 2]
        topk_merge(
            values,
            ids,
            selection if last else stretch,
            space if last else {},
            out if last else other[1][:, :k],
            None if last else other[0][:, :k],
        )
        values, ids = other


def topk_merge(
    values: torch.Tensor,
    ids: torch.Tensor,
    selection: Selection,
    space: dict[str, Any],
    out: torch.Tensor,
    out_values: torch.Tensor | None,
) -> None:
    """The k best of candidates ``values, ids [rows, w]``, ids ascending but for -1, which is none.

    A vendor's kernel has no merge, and there prediction picks.
    """
    (k, method, _, kernel), (rows, width) = selection, values.shape
    problem = SelectionProblem.on("topk_merge", values.device, tokens=rows, width=width, k=k, method=method)
    record = select(problem, kernel if kernel is not None and find("topk_merge", kernel) else None)
    record.launch(values.device, values, ids, k, method, space, out, out_values)
