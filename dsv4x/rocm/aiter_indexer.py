"""AITER's indexer logits and its selection on gfx942 and gfx950.

Read at ROCm/aiter e4048607a5; **no AMD GPU was used**: calls are checked against its signatures and on doubles.
``deepgemm_fp8_paged_mqa_logits`` reads pages of one entry, or pages whose values are shuffled, which is another layout;
it takes one length a request, from which it counts its rows' own down by single entries, and 32-bit offsets.
``fp8_mqa_logits`` gives a column an entry; on gfx942 FlyDSL's of the same arguments, where ``flydsl`` is installed, is
written for its fp8 MFMA and takes its place. ``top_k_per_row_prefill(stable=True)`` is in index order and takes the
smallest index of equal values, but keeps the order of float32, in which a NaN is the largest and -0 is below 0.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..common.core import layouts
from ..common.core.logits_calls import FlatLogitsCall, PagedLogitsCall, SelectionCall
from ..common.core.platform import platform
from ..common.core.vendor import TRITON, VendorLibrary
from ..common.dispatch.costs import TRITON_LOGITS_RATES, logits_us
from ..common.dispatch.problem import LogitsProblem, SelectionProblem
from ..common.dispatch.registry import Kernel, register
from ..common.ops.topk import plain_order, put_in_space, row_ranges

ARCHS = ("gfx942", "gfx950")
FLAVOURS = {"gfx942": "e4m3fnuz", "gfx950": "e4m3fn"}

# (module, function, the arguments it is called with), by op.
ENTRY_POINTS = {
    "paged_mqa_logits": (
        "aiter.ops.triton.attention.pa_mqa_logits",
        "deepgemm_fp8_paged_mqa_logits",
        ("q_fp8", "kv_cache", "weights", "out_logits", "context_lens", "kv_indices", "max_model_len", "KVBlockSize"),
    ),
    "mqa_logits": (
        "aiter.ops.triton.attention.fp8_mqa_logits",
        "fp8_mqa_logits",
        ("Q", "KV", "kv_scales", "weights", "cu_starts", "cu_ends", "clean_logits"),
    ),
    "topk_transform": (
        "aiter.ops.topk",
        "top_k_per_row_prefill",
        ("logits", "rowStarts", "rowEnds", "indices", "values", "numRows", "stride0", "stride1", "k", "stable"),
    ),
}

_FLYDSL = ("aiter.ops.flydsl", "flydsl_fp8_mqa_logits")
"""Of gfx942, called as ``fp8_mqa_logits`` is."""

# A guess: AITER's kernels were tuned on these GPUs, dsv4x's were not.
_SHARE_OF_TRITON = 0.9
_TOPK_US = 25.0


@functools.cache
def entry_point(op: str) -> Callable[..., Any]:
    """AITER's function for ``op``; importing its module may compile."""
    module, name, _ = ENTRY_POINTS[op]
    return getattr(importlib.import_module(module), name)


@functools.cache
def flydsl_logits() -> Callable[..., Any] | None:
    """FlyDSL's flat logits, where the installed build has them and they take what ``fp8_mqa_logits`` does."""
    module, name = _FLYDSL
    try:
        function = getattr(importlib.import_module(module), name)
        taken = inspect.signature(function).parameters
    except Exception:  # it is optional, and a version of flydsl that AITER does not know fails when imported
        return None
    return function if set(ENTRY_POINTS["mqa_logits"][2]) <= set(taken) else None


def _release_reasons(library: VendorLibrary, op: str) -> list[str]:
    """What the installed release lacks, told by its signature; triton's part is asked with it."""
    if library.reason is not None:
        return []
    module, name, arguments = ENTRY_POINTS[op]
    try:
        parameters = inspect.signature(entry_point(op)).parameters
    except Exception as error:  # AITER compiles and probes when imported, which may fail in any way
        return [f"import of {name} from {module} failed: {type(error).__name__}: {error}"]
    lacking = [argument for argument in arguments if argument not in parameters]
    return [f"{name} of aiter at {library.path} has no {', '.join(lacking)}"] if lacking else []


def _flavour_reasons(problem: LogitsProblem, encodings: dict[str, str]) -> list[str]:
    need = FLAVOURS.get(problem.arch)
    found = " and ".join(f"{name} {encoding}" for name, encoding in encodings.items())
    if need is None or set(encodings.values()) == {need}:
        return []
    return [f"{found}, need {need} for both on {problem.arch}"]


def _paged_reasons(library: VendorLibrary, problem: LogitsProblem) -> list[str]:
    reasons = ["rows name their requests, need a block table row for each"] if problem.ragged else []
    for cache in problem.caches:
        encoding = layouts.by_name(cache.layout).operand_encoding
        reasons += _flavour_reasons(problem, {"q": problem.q_encoding, "K": encoding})
        if cache.page_size != 1:
            reasons.append(f"page_size is {cache.page_size}, need 1: it reads larger pages shuffled only")
        if cache.pages * cache.page_stride > 2**31 - 1:
            reasons.append(f"cache spans {cache.pages * cache.page_stride} bytes, need < 2**31: its offsets are 32-bit")
    if not reasons and problem.device == "cuda" and problem.arch in ARCHS:
        reasons += _release_reasons(library, "paged_mqa_logits") or _triton_missing()
    return reasons


def _flat_reasons(library: VendorLibrary, problem: LogitsProblem) -> list[str]:
    reasons = _flavour_reasons(problem, {"q": problem.q_encoding, "K": problem.k_encoding})
    if problem.relative:
        reasons.append("max_seqlen_k is given, need None: it writes a column an entry")
    if not reasons and problem.device == "cuda" and problem.arch in ARCHS:
        reasons += _release_reasons(library, "mqa_logits") or _triton_missing()
    return reasons


def _topk_reasons(library: VendorLibrary, problem: SelectionProblem) -> list[str]:
    if problem.tokens * problem.width > 2**31 - 1:
        return [f"{problem.tokens} x {problem.width} logits, need < 2**31: its offsets are 32-bit"]
    if problem.device == "cuda" and problem.arch in ARCHS:
        return _release_reasons(library, "topk_transform")
    return []


def _triton_missing() -> list[str]:
    return [f"its ranges and logits are put within bounds by triton: {TRITON.reason}"] if TRITON.reason else []


def paged_mqa_logits(call: PagedLogitsCall) -> torch.Tensor:
    """``deepgemm_fp8_paged_mqa_logits``, one of a request's rows at a time, so that each has its own length."""
    from ..common.kernels import mqa_logits as kernels

    q, cache, out, block_table, max_context_len = call.q, call.cache, call.out, call.block_table, call.max_context_len
    batch, next_n = q.shape[:2]
    if out is None:
        out = torch.empty(batch * next_n, max_context_len, dtype=torch.float32, device=q.device)
    most = min(max_context_len, block_table.shape[1] * cache.page_size)
    lens = call.context_lens.clamp(0, most).int()
    # It reads the page a table names, whatever that is, and takes the table's width for its row stride.
    table = block_table.clamp(0, cache.pages - 1).contiguous()
    rows, row_weights = out.unflatten(0, (batch, next_n)), call.weights.unflatten(0, (batch, next_n))
    for row in range(next_n):
        entry_point("paged_mqa_logits")(
            q_fp8=q[:, row : row + 1].contiguous(),
            kv_cache=cache.servers_view,
            weights=row_weights[:, row].contiguous(),
            out_logits=rows[:, row],
            context_lens=lens[:, row].contiguous(),
            kv_indices=table,
            max_model_len=max_context_len,
            KVBlockSize=cache.page_size,
        )
    if call.clean_logits:
        kernels.clean_logits(out, lens, out, max_context_len, pages=(block_table, cache))
    return out


def mqa_logits(call: FlatLogitsCall) -> torch.Tensor:
    """``fp8_mqa_logits`` or FlyDSL's, ranges put within bounds first."""
    from ..common.kernels import mqa_logits as kernels

    k, out = call.k, call.out
    function = flydsl_logits() if platform.limits(k.device).arch == "gfx942" else None
    starts, ends = kernels.limit_ranges(call.ks, call.ke, k.shape[0], k.shape[0])
    logits = (function or entry_point("mqa_logits"))(
        Q=call.q.contiguous(),
        KV=k.contiguous(),
        kv_scales=call.k_scale.contiguous(),
        weights=call.weights.contiguous(),
        cu_starts=starts,
        cu_ends=ends,
        clean_logits=False,
    )
    if out is None and not call.clean_logits:
        return logits
    out = logits if out is None else out
    kernels.clean_logits(logits, ends[:, None], out, k.shape[0], starts=starts)
    return out


def topk_transform(call: SelectionCall) -> None:
    """``top_k_per_row_prefill`` for columns, which become local indices and those of the space asked for."""
    rows = call.logits.shape[0]
    starts, lens = row_ranges(call.logits, call.lengths, call.row_starts)
    values = plain_order(call.logits)
    columns = torch.empty(rows, call.k, dtype=torch.int32, device=values.device)
    entry_point("topk_transform")(
        logits=values,
        rowStarts=starts,
        rowEnds=starts + lens,
        indices=columns,
        values=None,
        numRows=rows,
        stride0=values.stride(0),
        stride1=values.stride(1),
        k=call.k,
        stable=True,
    )
    local = torch.where(columns >= 0, columns - starts[:, None], -1)
    put_in_space(local, lens, call.method, call.space, call.out, call.out_local)


def _logits_us(problem: LogitsProblem) -> float:
    return _SHARE_OF_TRITON * logits_us(problem, *TRITON_LOGITS_RATES[problem.op])


def register_kernels(library: VendorLibrary) -> None:
    """Add AITER's kernels of the indexer; ``library`` is AITER."""
    for op, run, reasons, predicted in (
        ("paged_mqa_logits", paged_mqa_logits, _paged_reasons, _logits_us),
        ("mqa_logits", mqa_logits, _flat_reasons, _logits_us),
        ("topk_transform", topk_transform, _topk_reasons, lambda problem: _TOPK_US),
    ):
        register(
            Kernel(
                op,
                "aiter",
                run,
                predicted,
                library=library,
                archs=ARCHS,
                further_reasons=functools.partial(reasons, library),
            )
        )
