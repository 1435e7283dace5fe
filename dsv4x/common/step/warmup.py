"""Compiling ahead what a server's steps will launch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..core import checks
from ..core.errors import BackendUnavailable, KernelNotSupported
from ..core.layouts import PagedCache
from ..core.model import INDEX_DIM, VALUE_DIM, WINDOW, LayerKind
from ..core.platform import platform
from ..core.spaces import TopkMethod
from ..dispatch import registry
from ..dispatch.problem import AttentionProblem
from ..kernels.limits import least_part
from ..ops import indexer
from ..ops.cache import quantize_and_insert_k_cache
from ..ops.sparse_mla import sparse_mla_decode, sparse_mla_prefill
from .attention import explain_step, sparse_mla_attention
from .indexer import sparse_attn_indexer
from .metadata import AttentionMetadata, ExtraPages, StepMetadata

# A kernel predicted to take up to this many times the fastest one's time may be the fastest for another batch.
_CLOSE = 2.0

# A batch on either side of every bound in a table of launch shapes, and of one split and several.
_TOKENS = (1, 2, 8, 33, 130, 1024)

_SPLITTING = ("triton", "gluon")
"""The kernels that split a row's entries and reduce them."""

_LSE_CHANGES_NOTHING = (*_SPLITTING, "reference")
"""The kernels that make an lse whether or not it is wanted. A vendor may have others for calls without: AITER's OPUS is
built by hipcc at its first, which takes minutes."""

# Requests on either side of what one program of a schedule takes at once, with few warps' worth and with many.
_REQUESTS = (1, 257, 1025)


def warmup(
    swa_cache: PagedCache,
    extra_cache: PagedCache | None = None,
    *,
    heads: int,
    topk: int = 512,
    window_size: int = 128,
    compress_ratios: Sequence[int | LayerKind] = (1, 4, 128),
    softmax_scale: float | None = None,
    index_cache: PagedCache | None = None,
    index_heads: int = 64,
    next_n: int = 1,
    kernel: str | None = None,
    capturing: bool | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> int:
    """Compile every Triton kernel that attention over caches like these launches, whatever the batches will be.

    With ``index_cache`` the indexer's too: what inserts into that cache and gathers from it, the schedule of its paged
    logits, :func:`~dsv4x.sparse_attn_indexer`, and :func:`~dsv4x.paged_indexer_topk` and :func:`~dsv4x.indexer_topk` in
    every index space, in one piece and cut, with int32 lengths, by each kernel that prediction may choose. A vendor's
    kernels are called as well, so that what their libraries compile for such calls is there.

    Nothing is tuned, here or later: launch shapes come from tables. The caches are read and nothing is stored in them.
    Kernels that Triton has on disk from an earlier process are loaded, and count too.

    Args:
        swa_cache, extra_cache: the server's caches of one layer, or small ones of the same layouts, page sizes and page
            strides. On ROCm small ones will not do for storages of 2 GiB or more: Triton compiles other code for those.
            Without ``extra_cache`` only compress ratio 1. Entries of 576 values (V3.2) have no steps: the two attention
            ops are run over ``swa_cache`` instead.
        heads: query heads on this rank.
        topk, window_size: as in :meth:`AttentionMetadata.build`.
        compress_ratios: the layer kinds that will be served, each a :class:`~dsv4x.LayerKind`, or a ratio that says it.
        softmax_scale: needed for entries of 576 values, as in :func:`~dsv4x.sparse_mla_decode`.
        index_cache: the indexer's K cache of a C4 layer, or a small one like it, in layout ``INDEXER_FP8`` (either
            flavour), ``INDEXER_MXFP8`` or ``INDEXER_FP4``; an fp4 one is met by fp8 queries and by e2m1 ones. None
            leaves the indexer out.
        index_heads: the indexer's query heads, 32 or 64.
        next_n: query tokens a request of a decode step.
        kernel: the attention kernel that will be asked for by name; None compiles for those that prediction picks.
        capturing: True compiles what prediction picks while a graph is captured, False what it picks for eager calls,
            None both. Nothing is captured here.
        progress: called as ``progress(done, stages, what)`` before each stage and after the last.

    Returns:
        How many kernels were compiled or loaded; 0 where nothing is, as on a CPU.

    Raises:
        TypeError, ValueError: an argument's type or value.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run the steps.
    """
    device = swa_cache.device if isinstance(swa_cache, PagedCache) else torch.device("cpu")
    swa_cache = checks.cache("swa_cache", swa_cache, device)
    checks.integer("heads", heads, 1)
    if extra_cache is not None:
        checks.cache("extra_cache", extra_cache, device)
    if index_cache is not None:
        indexer.check_cache("index_cache", index_cache, device)
    if checks.integer("index_heads", index_heads, 1) not in indexer.HEADS:
        raise ValueError(f"index_heads: got {index_heads}, need {' or '.join(map(str, indexer.HEADS))}")
    checks.integer("next_n", next_n, 1)
    kinds = [_kind_of(kind, extra_cache is not None) for kind in compress_ratios]
    kinds = [kind for kind in kinds if kind == LayerKind(1, False) or extra_cache is not None]
    before = _compiled()
    for cache in (swa_cache, extra_cache, index_cache):
        if cache is not None:
            k = torch.zeros(2, cache.layout.head_dim, dtype=torch.bfloat16, device=device)
            quantize_and_insert_k_cache(k, cache, torch.full((2,), -1, dtype=torch.int64, device=device))
    decode = AttentionProblem.on("sparse_mla_decode", device, heads=heads)
    ours = [record for record in registry.kernels(decode.op) if record.name in _SPLITTING]
    ours = [record for record in ours if kernel in (None, record.name) and not record.not_supported_reasons(decode)]
    if ours:
        _run_reductions(device, heads)
    for record in ours:
        if swa_cache.layout.head_dim == VALUE_DIM:
            run_split_window(swa_cache, heads, record.name)
    stages = len(_TOKENS) + (index_cache is not None)
    for done, tokens in enumerate(_TOKENS):
        _report(progress, done, stages, f"attention, {tokens} tokens")
        if swa_cache.layout.head_dim != VALUE_DIM:
            _run_ops(swa_cache, tokens, heads, topk, softmax_scale, kernel)
        else:
            size = _Size(tokens, heads, topk, window_size, kernel, capturing)
            _run_steps((swa_cache, extra_cache), kinds, size)
    if index_cache is not None:
        _report(progress, stages - 1, stages, "indexer")
        slots = index_cache if extra_cache is None else extra_cache
        _run_index(index_cache, slots, index_heads, next_n, topk)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    _report(progress, stages, stages, "done")
    return len(_compiled() - before)


class _Size(NamedTuple):
    """What steps are run with: their tokens, heads and widths, and the kernels that are wanted."""

    tokens: int
    heads: int
    topk: int
    window_size: int
    kernel: str | None
    capturing: bool | None


def _kind_of(kind: int | LayerKind, compressed: bool) -> LayerKind:
    if isinstance(kind, LayerKind):
        return kind
    checks.integer("compress_ratios", kind, 1)
    return LayerKind(1, False) if kind == 1 or not compressed else LayerKind.of(kind, None, True)


def _report(progress: Callable[[int, int, str], None] | None, done: int, stages: int, what: str) -> None:
    if progress is not None:
        progress(done, stages, what)


def _run_reductions(device: torch.device, heads: int) -> None:
    """Every shape of the reduction of splits: how many a batch has follows from its tokens and widths."""
    from ..kernels.decode import PROGRAMS_AT_ONCE, REDUCTIONS, Spans, reduce_partials

    # One, whose programs take a head each, and so many that they take several.
    many = 2 * PROGRAMS_AT_ONCE * platform.limits(device).multiprocessors // heads + 1
    for tokens in (1, many):
        out = torch.empty(tokens, heads, VALUE_DIM, dtype=torch.bfloat16, device=device)
        lse = torch.empty(tokens, heads, dtype=torch.float32, device=device)
        sink = torch.zeros(heads, dtype=torch.float32, device=device)
        spans = Spans(torch.zeros(tokens, dtype=torch.int32, device=device), 1, None, 0)
        for splits, _ in REDUCTIONS:
            partial = torch.zeros(tokens, heads, splits, VALUE_DIM, dtype=torch.float32, device=device)
            partial_lse = partial[..., 0].contiguous()
            for given in (None, sink):
                registry.call_on(device, reduce_partials, partial, partial_lse, given, out, lse, spans, 0, 64)


def run_split_window(cache: PagedCache, heads: int, kernel: str) -> None:
    """A window row without entries in two splits, which few tokens get in a graph and not in an eager call."""
    record, device = registry.find("sparse_mla_decode", kernel), cache.device
    if record is None or not record.fixed_splits:
        return
    q = torch.zeros(1, heads, VALUE_DIM, dtype=torch.bfloat16, device=device)
    none = torch.full((1, WINDOW), -1, dtype=torch.int32, device=device)
    lens = torch.zeros(1, dtype=torch.int32, device=device)
    for sink in (None, torch.zeros(heads, dtype=torch.float32, device=device)):
        sparse_mla_decode(q, cache, none, lens, attn_sink=sink, kernel=kernel, split_k=2)


def _run_steps(caches: tuple[PagedCache, PagedCache | None], kinds: Sequence[LayerKind], size: _Size) -> None:
    """Every path of every kind, over block tables of -1: there are no entries, and all that reads them is launched.

    The kinds share a step, as a server's do, and each has one alone as well.
    """
    swa_cache, extra_cache = caches
    device = swa_cache.device
    largest = max((kind.compress_ratio for kind in kinds), default=1)
    # Long enough that few tokens are split over their compressed entries.
    length = max(size.tokens, 4 * size.topk, 1024 * largest if largest > 4 else 0)
    lengths = torch.tensor([length, 1], dtype=torch.int32, device="cpu")
    starts = torch.tensor([0, size.tokens, size.tokens + 1], dtype=torch.int32, device="cpu")

    def table(cache: PagedCache, ratio: int) -> torch.Tensor:
        columns = -(-length // ratio // cache.page_size) + 1
        return torch.full((2, columns), -1, dtype=torch.int32, device=device)

    extra = {
        kind.compress_ratio: ExtraPages(
            table(extra_cache, kind.compress_ratio), extra_cache.page_size, extra_cache.pages, kind.selects
        )
        for kind in kinds
        if extra_cache is not None and (kind.compress_ratio > 1 or kind.selects)
    }

    def build(chosen: dict[int, ExtraPages]) -> StepMetadata:
        return StepMetadata.build(
            starts.to(device),
            lengths.to(device),
            table(swa_cache, 1),
            chosen,
            swa_page_size=swa_cache.page_size,
            swa_pages=swa_cache.pages,
            window_size=size.window_size,
            query_start_loc_cpu=starts,
            seq_lens_cpu=lengths,
        )

    for chosen in [{}, *({ratio: pages} for ratio, pages in extra.items())]:
        build(chosen)
    step = build(extra)
    for kind in kinds:
        meta = step.window if kind == LayerKind(1, False) else step[kind.compress_ratio]
        _run_paths(meta, swa_cache, extra_cache if meta.compressed else None, size)


def _run_paths(meta: AttentionMetadata, swa_cache: PagedCache, extra_cache: PagedCache | None, size: _Size) -> None:
    device, tokens = swa_cache.device, meta.num_tokens
    q = torch.zeros(tokens, size.heads, VALUE_DIM, dtype=torch.bfloat16, device=device)
    topk = torch.full((tokens, size.topk), -1, dtype=torch.int32, device=device) if meta.selects else None
    if meta.compressed and not meta.selects:
        # Longer rows of every entry are made by the layers.
        meta.slot_rows(slice(0, tokens))
    arguments = (q, swa_cache, extra_cache, meta, topk)
    for lse in (True, False):
        explanation = explain_step(*arguments, size.kernel, return_lse=lse)
        for path, problem in explanation.problems.items():
            for name in _kernels_of(problem, size):
                if lse or name not in _LSE_CHANGES_NOTHING:
                    for sink in (None, torch.zeros(size.heads, dtype=torch.float32, device=device)):
                        sparse_mla_attention(*arguments, sink, path=path, kernel=name, return_lse=lse)
        if lse and not explanation.kernels:
            sparse_mla_attention(*arguments, kernel=size.kernel)


def _kernels_of(problem: AttentionProblem, size: _Size) -> list[str]:
    """The kernel asked for, or those that prediction may pick for batches like this one, eager and captured."""
    if size.kernel is not None:
        return [size.kernel]
    modes = (False, True) if size.capturing is None else (size.capturing,)
    names: dict[str, None] = {}
    for mode in modes if problem.device == "cuda" else (False,):
        predicted = registry.explain(dataclasses.replace(problem, capturing=mode)).predicted_us
        fastest = min(predicted.values())
        names |= dict.fromkeys(name for name, us in predicted.items() if us <= _CLOSE * fastest)
    return list(names)


def _run_ops(
    cache: PagedCache, tokens: int, heads: int, topk: int, softmax_scale: float | None, kernel: str | None
) -> None:
    device, head_dim = cache.device, cache.layout.head_dim
    q = torch.zeros(tokens, heads, head_dim, dtype=torch.bfloat16, device=device)
    none = torch.full((tokens, topk), -1, dtype=torch.int32, device=device)
    lens = torch.full((tokens,), topk, dtype=torch.int32, device=device)
    workspace = torch.zeros(64, head_dim, dtype=torch.bfloat16, device=device)
    for spans in (None, lens):
        sparse_mla_decode(q, cache, none, spans, softmax_scale=softmax_scale, kernel=kernel)
        sparse_mla_prefill(q, workspace, none, spans, softmax_scale=softmax_scale, kernel=kernel)


def _run_index(cache: PagedCache, slot_cache: PagedCache, heads: int, next_n: int, topk: int) -> None:
    """The indexer's calls over lengths of 0, block tables of -1 and K of zeros: nothing is read, all is launched.

    How many rows a batch or a piece of it has is no part of what is compiled for, but where all entries are chosen:
    torch gives one row of them another stride than two.
    """
    device, page_size = cache.device, cache.page_size
    for requests in _REQUESTS:
        lens = torch.zeros(requests, next_n, dtype=torch.int32, device=device)
        indexer.get_paged_mqa_logits_metadata(lens, page_size)
    # Wide enough to be cut by a budget of its own logits' bytes, into pages and beside their selections.
    cut = max(64 * topk, 16384, 8 * page_size)
    # All entries chosen; one program a row, with and without a width that is a multiple of 16; several a row, so many
    # that what they choose together is such a multiple, and one more.
    wide, parts = topk // 16 * 16 + 16, 16 // math.gcd(topk, 16)
    widths = {wide, wide + 1, max(parts, 2) * least_part(topk), (parts + 1) * least_part(topk)}
    slots = torch.full((max(cut, *widths),), -1, dtype=torch.int32, device=device)
    indexer.gather_indexer_k(cache, slots[:2].long())
    k, k_scale = indexer.gather_indexer_k(cache, slots)
    shapes = [(topk, 1), (topk, 2), *((width, 1) for width in widths)]
    for width, rows, most_bytes in [*((*shape, indexer.LOGITS_BYTES) for shape in shapes), (cut, 1, 4 * cut)]:
        for method in TopkMethod:
            size = _IndexSize(heads, topk, method, width, rows, most_bytes)
            _run_paged(cache, slot_cache, next_n, size)
            _run_flat(cache, slot_cache, (k[:width], k_scale[:width]), size)
    for requests in _REQUESTS:
        for rows in {1, next_n}:
            _run_step_index(cache, heads, (requests, rows), topk)


def _run_step_index(cache: PagedCache, heads: int, rows: tuple[int, int], topk: int) -> None:
    """A step's indexer over requests of no entries, their rows together and one by one."""
    (requests, next_n), device = rows, cache.device
    # Wider than what is selected, without which there are no logits.
    columns = -(-2 * topk // cache.page_size)
    table = torch.full((requests, columns), -1, dtype=torch.int32, device=device)
    step = StepMetadata.build(
        torch.arange(requests + 1, dtype=torch.int32, device=device) * next_n,
        torch.zeros(requests, dtype=torch.int32, device=device),
        table,
        {4: ExtraPages(table, cache.page_size, cache.pages, True, topk)},
        swa_page_size=cache.page_size,
        swa_pages=cache.pages,
        num_tokens=requests * next_n,
        max_seq_len=4 * columns * cache.page_size,
    )
    weights = torch.zeros(requests * next_n, heads, dtype=torch.float32, device=device)
    for q, q_scale in _index_queries(cache, requests * next_n, heads):
        for together in (None, next_n):

            def run(
                kernel: str | None, topk_kernel: str | None, q: Any = q, q_scale: Any = q_scale, n: Any = together
            ) -> None:
                sparse_attn_indexer(
                    q, cache, weights, step[4], next_n=n, q_scale=q_scale, kernel=kernel, topk_kernel=topk_kernel
                )

            _run_each(("paged_mqa_logits", "topk_transform"), run)


class _IndexSize(NamedTuple):
    """What a selection is run with: index heads, entries to select and their space, entries and rows of queries.

    ``rows`` are requests where K is paged; ``logits_bytes`` is the budget of one query row a request.
    """

    heads: int
    topk: int
    method: TopkMethod
    width: int
    rows: int
    logits_bytes: int


def _run_paged(cache: PagedCache, slot_cache: PagedCache, next_n: int, size: _IndexSize) -> None:
    device, requests = cache.device, size.rows
    table = torch.full((requests, -(-size.width // cache.page_size)), -1, dtype=torch.int32, device=device)
    lens = torch.zeros(requests, next_n, dtype=torch.int32, device=device)
    weights = torch.zeros(requests * next_n, size.heads, dtype=torch.float32, device=device)
    for q, q_scale in _index_queries(cache, requests, next_n, size.heads):

        def run(kernel: str | None, topk_kernel: str | None, q: Any = q, q_scale: Any = q_scale) -> None:
            indexer.paged_indexer_topk(
                q, cache, weights, lens, table, size.width, size.topk, size.method, q_scale=q_scale,
                bases=lens.view(-1), slot_table=table, slot_page_size=slot_cache.page_size,
                slot_pages=slot_cache.pages, logits_bytes=size.logits_bytes * next_n, kernel=kernel,
                topk_kernel=topk_kernel,
            )  # fmt: skip

        _run_each(("paged_mqa_logits", "topk_transform"), run)


def _run_flat(
    cache: PagedCache, slot_cache: PagedCache, keys: tuple[torch.Tensor, torch.Tensor], size: _IndexSize
) -> None:
    k, k_scale = keys
    device, rows = k.device, size.rows
    none = torch.zeros(rows, dtype=torch.int32, device=device)
    table = torch.full((1, 1), -1, dtype=torch.int32, device=device)
    weights = torch.zeros(rows, size.heads, dtype=torch.float32, device=device)
    for q, q_scale in _index_queries(cache, rows, size.heads):

        def run(kernel: str | None, topk_kernel: str | None, q: Any = q, q_scale: Any = q_scale) -> None:
            indexer.indexer_topk(
                q, k, k_scale, weights, none, none, size.topk, size.method, q_scale=q_scale, requests=none,
                slot_table=table, slot_page_size=slot_cache.page_size, slot_pages=slot_cache.pages,
                logits_bytes=size.logits_bytes, kernel=kernel, topk_kernel=topk_kernel,
            )  # fmt: skip

        _run_each(("mqa_logits", "topk_transform"), run)


def _index_queries(cache: PagedCache, *shape: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Zeros in every encoding, ``shape [.., H]``, that queries of a cache's entries may have, with their scales."""
    device, encoding = cache.device, cache.layout.value_encoding
    fp8 = platform.limits(device).fp8 if encoding == "e2m1" else encoding
    flavour = torch.float8_e4m3fnuz if fp8 == "e4m3fnuz" else torch.float8_e4m3fn
    yield torch.zeros(*shape, INDEX_DIM, dtype=torch.uint8, device=device).view(flavour), None
    if encoding == "e2m1":
        codes, scales = (torch.zeros(*shape, size, dtype=torch.uint8, device=device) for size in (64, 4))
        yield codes, scales


def _run_each(ops: tuple[str, ...], run: Callable[..., None]) -> None:
    """``run`` with the names of each choice of the ops' kernels that can; without names where only references can."""
    names = [
        [record.name for record in registry.kernels(op) if record.name != "reference" and not record.by_name_only]
        for op in ops
    ]
    ran = False
    for chosen in itertools.product(*names):
        with contextlib.suppress(KernelNotSupported, BackendUnavailable):
            run(*chosen)
            ran = True
    if not ran:
        run(*[None] * len(ops))


def _compiled() -> set[tuple[str, str]]:
    """(kernel, what it was compiled for) of the compiled kernels that this process holds of dsv4x's."""
    triton = sys.modules.get("triton")
    if triton is None:
        return set()
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("dsv4x.")]
    functions = {id(f): f for m in modules for f in vars(m).values() if isinstance(f, triton.runtime.JITFunction)}
    return {
        (function.__name__, str(key))
        for function in functions.values()
        for kept in function.device_caches.values()
        for key in kept[0]
    }
