"""AITER's sparse attention on gfx942 and gfx950: four of its entry points behind the two attention ops.

Read from ROCm/aiter: releases 0.1.17 to 0.1.20.post1, e4048607a5 of 2026-08-22, and main afterwards
(``pa_decode_sparse`` at 021039d38e, ``sparse_mla_fwd`` at 013f408ebe). They take index lists as one flat list and where
each row begins in it, an attention sink, and bf16 q. docs/formats.md has what each of them asks for.

No AMD GPU was used. The calls are checked on a CPU against AITER's signatures and a double that computes from the
arguments it is given (``tests/test_aiter.py``); what the kernels compute has not been seen.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..common.core import layouts
from ..common.core.ambient import without_autocast
from ..common.core.calls import (
    AttentionCall,
    Call,
    DecodeCall,
    PrefillCall,
    Result,
    deliver,
    in_parts,
    queries,
    sinks,
)
from ..common.core.errors import KernelNotSupported
from ..common.core.layouts import PagedCache
from ..common.core.model import VALUE_DIM
from ..common.core.platform import platform
from ..common.core.vendor import VendorLibrary, aligned, is_aligned, parameters
from ..common.dispatch.problem import AttentionProblem
from ..common.dispatch.registry import Kernel, cached, find, register
from ..common.kernels.scratch import tensor_bytes
from ..common.ops import indices
from ..common.ops.sparse_mla import problem_of

AITER = VendorLibrary(
    "aiter",
    ("amd-aiter>=0.1.17",),
    wrong={"aiter": "PyPI's aiter, an asyncio package that has nothing to do with AMD"},
    attributes=("ops",),
    hint="AMD attaches amd-aiter's wheels to the releases of ROCm/aiter; see docs/dependencies.md",
)

# AITER has kernels for gfx1250 too; each entry point says what keeps dsv4x from them.
ARCHS = ("gfx942", "gfx950", "gfx1250")
BF16_512, BF16_576 = layouts.BF16_512.name, layouts.BF16_576.name
# One scale for the whole tensor, in the FP8 flavour that is the arch's own.
_SCALAR = (layouts.UNIFORM_FP8, layouts.TRTLLM_NATIVE)
_FP8_SCALAR = {
    "gfx942": tuple(layout.with_flavour("e4m3fnuz").name for layout in _SCALAR),
    "gfx950": tuple(layout.name for layout in _SCALAR),
}
LAYOUTS = (
    layouts.DSV4.name,
    layouts.DSV32.name,
    BF16_512,
    BF16_576,
    *_FP8_SCALAR["gfx950"],
    *_FP8_SCALAR["gfx942"],
)
MAX_HEADS = 128

# vLLM's threshold: below it, it found OPUS slower than Triton.
OPUS_MIN_TOKENS = 1024
# mla_gluon launches 256 workgroups of 16 heads; with more tokens than half of them it cannot split a row.
MLA_GLUON_UNSPLIT_TOKENS = 129
# Its kernel for exactly 64 or 128 heads assumes three full tiles of 64 entries in every row.
_MLA_GLUON_HEADS = 96
_MLA_GLUON_GROUP = 48

# In base 2 it stays finite, so that a row without entries is a division by one and not 0 / 0; and -inf, which the
# Triton kernel subtracts from itself, does not arise.
SINK_BOUND = 1e30

# Buffer loads and stores have a 32-bit byte offset; AITER guards its caches against that, and neither q nor out.
_MAX_BYTES = 2**31 - 1
_MAX_INDICES = 1 << 26
_SPLITS = 2
_MAX_PARTIAL_BYTES = 1 << 28


class Source(NamedTuple):
    """What one index list points into: a call's scope, or the rows of a prefill.

    Attributes:
        pool: a paged cache, or bf16 rows ``[S, D]``.
        indices: int32 or int64 ``[T, w]``, index space *slot* or *workspace row*; one outside the pool is no entry.
        lens: int ``[T]`` scan spans or None.
        k_scale: the tensor scale of a pool that stores none.
    """

    pool: PagedCache | torch.Tensor
    indices: torch.Tensor
    lens: torch.Tensor | None
    k_scale: float = 1.0

    @property
    def capacity(self) -> int:
        return self.pool.capacity if isinstance(self.pool, PagedCache) else self.pool.shape[0]

    def ragged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 entries, all within the pool, and int32 ``[T + 1]`` where each row begins."""
        if self.indices.is_cuda and self.indices.numel():
            from .cdna.ragged import MOST_ROWS, ragged_rows

            if self.indices.shape[0] <= MOST_ROWS:
                return ragged_rows(self.indices, self.lens, self.capacity)
        capacity = max(1, self.indices.numel())
        values, indptr, _ = indices.dense_to_ragged(self.indices, self.lens, capacity=capacity, upper=self.capacity)
        return values, indptr

    def pages(self) -> torch.Tensor:
        """``[pages, page_size, entry]``, bytes or bf16, at least one page, any page stride; rows as they are."""
        if not isinstance(self.pool, PagedCache):
            return self.rows()
        view = self.pool.servers_view.squeeze(2)
        if not self.pool.pages:
            view = view.new_zeros(1, *view.shape[1:])
        return view if self.pool.layout.nope_dim else view.view(torch.bfloat16)

    def rows(self) -> torch.Tensor:
        """bf16 ``[S, D]``, at least one, each on 16 bytes; pages stand back to back."""
        rows = self.pool
        if isinstance(rows, PagedCache):
            rows = rows.page_bytes.view(torch.bfloat16).view(-1, rows.layout.head_dim)
        return aligned(rows) if rows.shape[0] else rows.new_zeros(1, rows.shape[1])

    def scale(self) -> torch.Tensor | None:
        """float32 ``[1]`` for a pool whose values need it."""
        if not (isinstance(self.pool, PagedCache) and self.pool.layout.needs_k_scale):
            return None
        return torch.full((1,), self.k_scale, dtype=torch.float32, device=self.pool.device)


def sources_of(call: AttentionCall) -> tuple[Source, ...]:
    """One or two, the window's first."""
    if isinstance(call, PrefillCall):
        return (Source(call.kv, call.indices, call.lens),)
    return tuple(Source(*scope) for scope in (call.swa, call.extra) if scope is not None)


def finite_sink(call: AttentionCall) -> torch.Tensor:
    """The sink, or one without effect, within :data:`SINK_BOUND`."""
    sink = sinks(call)
    if sink is None:
        return torch.full((call.heads,), -SINK_BOUND, dtype=torch.float32, device=call.q.device)
    return sink.clamp(-SINK_BOUND, SINK_BOUND)


@without_autocast
def merge_partials(
    acc: torch.Tensor, maxima: torch.Tensor, sums: torch.Tensor, attn_sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``pa_decode_sparse`` would have reduced, and the lse it keeps to itself.

    Args:
        acc: float32 ``[T, splits, H, 512]``, each split's values before division; unwritten where its maximum is -inf.
        maxima, sums: float32 ``[T, splits, H]``: the largest logit, times log2(e), and the sum of
            2 ** (logit * log2(e) - maximum).
        attn_sink: float32 ``[H]`` or None.

    Returns:
        float32 ``[T, H, 512]`` and float32 ``[T, H]``; 0 and +inf for a row without entries.
    """
    log2e = math.log2(math.e)
    used = maxima > -math.inf
    top = maxima.amax(1)
    weights = torch.where(used, torch.exp2(maxima - top[:, None]), 0)
    total = (weights * torch.where(used, sums, 0)).sum(1)
    empty = total == 0
    below = total if attn_sink is None else total + torch.exp2(attn_sink * log2e - top)
    values = torch.einsum("tsh,tshd->thd", weights, torch.where(used[..., None], acc, 0))
    values = (values / below[..., None]).masked_fill(empty[..., None], 0)
    return values, ((top + total.log2()) / log2e).masked_fill(empty, math.inf)


def _run_decode_sparse(function: Callable[..., Any], call: AttentionCall) -> Result:
    """gfx950 reads pages, and hands out the splits an lse follows from; elsewhere Triton reads one pool of rows."""
    first, *others = sources_of(call)
    entries, indptr = first.ragged()
    # Rows hold no -1: tiles of nothing else would be counted with a maximum of 0.
    options: dict[str, Any] = {"has_invalid": False}
    if call.out is not None and not call.lse and "out" in parameters(function):
        options["out"] = call.out
    if _arch(call.q.device) != "gfx950":
        values = function(
            call.q, first.rows(), entries, indptr, finite_sink(call), call.softmax_scale, **options
        )  # fmt: skip
        # Its programs leave before they write anything for such a row.
        return deliver(call, values.masked_fill_((indptr.diff() == 0)[:, None, None], 0), None)
    for other in others:
        extra_entries, extra_indptr = other.ragged()
        options |= {"extra_cache": other.pages(), "extra_indices": extra_entries, "extra_indptr": extra_indptr}
    if call.lse:
        options |= {"kv_splits": _SPLITS, "skip_reduce": True}
    sink = finite_sink(call)
    result = function(call.q, first.pages(), entries, indptr, sink, call.softmax_scale, **options)
    if not call.lse:
        return deliver(call, result, None)
    acc, maxima, sums = result
    values, lse = merge_partials(acc, maxima, sums, sinks(call))
    return deliver(call, values.to(call.q.dtype), lse)


def _run_mla_fwd(function: Callable[..., Any], call: AttentionCall) -> Result:
    first, *others = sources_of(call)
    entries, indptr = first.ragged()
    filled = indptr.diff()
    options: dict[str, Any] = {"kv_scale": first.scale(), "out": call.out}
    for other in others:
        extra_entries, extra_indptr = other.ragged()
        filled = filled + extra_indptr.diff()
        options |= {
            "extra_kv": other.pages(),
            "extra_indptr": extra_indptr,
            "extra_indices": extra_entries,
            "extra_kv_scale": other.scale(),
        }
    values, lse = function(
        call.q,
        first.pages(),
        indptr,
        entries,
        call.softmax_scale,
        kv_lora_rank=VALUE_DIM,
        qk_rope_head_dim=call.q.shape[2] - VALUE_DIM,
        has_invalid=False,
        # Given one, it would count it in the lse.
        attn_sink=None if call.lse else finite_sink(call),
        return_lse=call.lse,
        **options,
    )
    if not call.lse:
        return deliver(call, values, None)
    empty = filled[:, None] == 0
    sink = sinks(call)
    if sink is not None:
        values = values * torch.sigmoid(lse - sink)[..., None]
    values = values.masked_fill(empty[..., None], 0)
    return deliver(call, values.to(call.q.dtype), lse.masked_fill(empty, math.inf))


def _run_opus(function: Callable[..., Any], call: AttentionCall) -> Result:
    (source,) = sources_of(call)
    entries, indptr = source.ragged()
    rows = source.rows()
    # The second source has no entries; it must have rows of the same stride all the same.
    none = torch.zeros_like(indptr)
    # It writes out by the strides of q.
    q, out = aligned(call.q.contiguous()), call.out
    if out is not None and not out.is_contiguous():
        out = None
    values = function(q, rows, entries, indptr, rows, none, none, finite_sink(call), call.softmax_scale, out)
    return deliver(call, values, None)


def _run_prefill_sparse(function: Callable[..., Any], call: AttentionCall) -> Result:
    """``mla_gluon`` in groups of heads and with enough tokens that neither of its two wrong answers is reached."""
    (source,) = sources_of(call)
    entries, indptr = source.ragged()
    empty = indptr.diff() == 0
    tokens, heads = call.q.shape[:2]
    q, sink, rows = aligned(call.q.contiguous()), finite_sink(call), source.rows()
    padding = max(0, MLA_GLUON_UNSPLIT_TOKENS - tokens)
    if padding:
        # A row that it splits counts its sink once a split.
        q = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, padding))
        indptr = torch.cat([indptr, indptr[-1:].expand(padding)])
    group = heads if heads <= _MLA_GLUON_HEADS and heads != 64 else _MLA_GLUON_GROUP
    parts = []
    for at in range(0, heads, group):
        mine = slice(at, at + group)
        values = function(q[:, mine], rows, entries, indptr, None, None, None, sink[mine], call.softmax_scale)
        parts.append(values[:tokens])
    values = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    # Its programs leave before they write anything for a row without entries.
    return deliver(call, values.masked_fill_(empty[:, None, None], 0), None)


@dataclass(frozen=True)
class EntryPoint:
    """One function of AITER.

    Attributes:
        module, name: where it is.
        arguments, keywords: how many it is given by position and which by name.
        run: builds its arguments and calls it.
        limits: why it cannot take a problem, told without importing AITER.
        build: why the installed build's cannot.
    """

    module: str
    name: str
    arguments: int
    keywords: tuple[str, ...]
    run: Callable[[Callable[..., Any], AttentionCall], Result]
    limits: Callable[[AttentionProblem], Iterable[str]]
    build: Callable[[AttentionProblem], Iterable[str]] = lambda problem: ()

    def function(self) -> Callable[..., Any]:
        """AITER's function, where :meth:`missing` has found nothing."""
        return getattr(importlib.import_module(self.module), self.name)

    def missing(self, problem: AttentionProblem) -> list[str]:
        """What keeps the installed build from this call."""
        module, reason = _imported(self.module)
        if module is None:
            return [reason]
        function = getattr(module, self.name, None)
        if function is None:
            return [f"{self.module} at {AITER.path} has none"]
        try:
            inspect.signature(function).bind(*range(self.arguments), **dict.fromkeys(self.keywords))
        except TypeError as error:
            return [f"at {AITER.path} takes other arguments than the builds dsv4x was written for: {error}"]
        return list(self.build(problem))


@functools.cache
def _imported(name: str) -> tuple[ModuleType | None, str]:
    """A module of AITER, or why it cannot be imported: they import kernels for every arch, which older tritons lack."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        return None, f"import {name} failed: {type(error).__name__}: {error}"


def _since_0_1_20() -> bool:
    """Whether the build has what came to ``pa_decode_sparse`` on 2026-08-07, after 64-bit rows came to OPUS and gfx950
    to ``pa_prefill_sparse``: their own signatures do not show it."""
    module, _ = _imported(DECODE_SPARSE.module)
    function = getattr(module, DECODE_SPARSE.name, None)
    return function is not None and "extra_cache" in parameters(function)


def _names(problem: AttentionProblem) -> list[str]:
    """The layouts of the pools, bf16 rows as if they were pages."""
    if problem.op == "sparse_mla_prefill":
        return [BF16_576 if problem.head_dim == 576 else BF16_512]
    return [cache.layout for cache in problem.caches]


def _need_layouts(problem: AttentionProblem, needed: Sequence[str]) -> list[str]:
    return [
        f"cache layout is {name}, need {' or '.join(needed)} on {problem.arch}"
        for name in dict.fromkeys(_names(problem))
        if name not in needed
    ]


def _need_512(problem: AttentionProblem) -> list[str]:
    return [f"head_dim is {problem.head_dim}, need {VALUE_DIM}"] if problem.head_dim != VALUE_DIM else []


def _need_no_lse(problem: AttentionProblem, where: str = "") -> list[str]:
    return [f"returns no lse{where}, need return_lse=False"] if problem.lse else []


def _need_gfx950(problem: AttentionProblem, otherwise: str) -> list[str]:
    return [f"arch is {problem.arch}, need gfx950: {otherwise}"] if problem.arch != "gfx950" else []


def _rows_bytes(problem: AttentionProblem) -> int:
    return problem.rows * problem.head_dim * 2


def _need_pages_of_two(problem: AttentionProblem) -> list[str]:
    return [
        f"page_size is {cache.page_size}, need a power of two: newer builds find an entry of a {cache.layout} page by "
        "a shift"
        for cache in problem.caches
        if problem.arch == "gfx950" and cache.layout == layouts.DSV4.name and cache.page_size & (cache.page_size - 1)
    ]


_NAN_BEHIND_ROWS = "there it reads slot 0 for what stands behind a row, and a NaN in it spoils the row"


def _decode_sparse_limits(problem: AttentionProblem) -> Iterable[str]:
    yield from _need_512(problem)
    if problem.arch == "gfx950":
        yield from _need_layouts(problem, (layouts.DSV4.name, BF16_512))
        yield from _need_pages_of_two(problem)
        return
    if problem.arch != "gfx942":
        yield f"arch is {problem.arch}, need gfx942 or gfx950: {_NAN_BEHIND_ROWS}"
        return
    yield from _need_layouts(problem, (BF16_512,))
    yield from _need_no_lse(problem, " on gfx942")
    if len(problem.caches) > 1:
        yield "an extra cache is given, need none on gfx942"
    elements = problem.rows * problem.head_dim
    for cache in problem.caches:
        elements = max(elements, cache.pages * cache.page_size * problem.head_dim)
        packed = layouts.BF16_512.page_stride(cache.page_size)
        if cache.layout == BF16_512 and cache.page_stride != packed:
            yield f"page stride is {cache.page_stride} bytes, need {packed}: it reads pages as one pool of rows"
    if elements >= 2**31:
        # Later ones do not, but nothing in a build tells that fix of 2026-08-11.
        yield f"pool has {elements} values, need < 2**31: builds before 0.1.20 wrap their offset there"


def _decode_sparse_build(problem: AttentionProblem) -> Iterable[str]:
    if problem.arch == "gfx950" and not _since_0_1_20():
        yield f"at {AITER.path} takes no extra_cache: it is older than 0.1.20 and reads no pages"


def _mla_fwd_limits(problem: AttentionProblem) -> Iterable[str]:
    scalar = _FP8_SCALAR.get(problem.arch, ())
    if not scalar:
        yield f"arch is {problem.arch}, need gfx942 or gfx950"
        return
    names = _names(problem)
    packed = (layouts.DSV4.name, layouts.DSV32.name) if problem.arch == "gfx950" else ()
    wrong = _need_layouts(problem, (*packed, BF16_512, BF16_576, *scalar))
    yield from wrong
    paged = layouts.DSV4.name in names
    if len(names) > 1 and not wrong and any(name not in scalar for name in names):
        paged = True
        if problem.arch != "gfx950" or any(name not in (layouts.DSV4.name, BF16_512) for name in names):
            pairs = f"{layouts.DSV4.name} or {BF16_512} for each, or " if problem.arch == "gfx950" else ""
            yield f"two caches of {' and '.join(names)}, need {pairs}{' or '.join(scalar)} for both"
    if paged:
        yield from _need_no_lse(problem, " for these caches")
    yield from _need_pages_of_two(problem)


def _mla_fwd_build(problem: AttentionProblem) -> Iterable[str]:
    module, _ = _imported(MLA_FWD.module)
    archs = getattr(module, "SUPPORTED_ARCHS", ())
    if problem.arch not in archs:
        yield f"at {AITER.path} was written for {' and '.join(archs) or 'another arch'}, need {problem.arch}"
    fp8 = getattr(module, "FP8_SCALAR_ARCHS", ("gfx950",))
    if problem.arch not in fp8 and any(name in _FP8_SCALAR.get(problem.arch, ()) for name in _names(problem)):
        yield f"at {AITER.path} reads fp8 on {' and '.join(fp8)}, need {problem.arch}"


def _opus_limits(problem: AttentionProblem) -> Iterable[str]:
    yield from _need_gfx950(problem, "its kernel is written for it")
    yield from _need_512(problem)
    yield from _need_no_lse(problem)


def _opus_build(problem: AttentionProblem) -> Iterable[str]:
    if _rows_bytes(problem) > _MAX_BYTES and not _since_0_1_20():
        yield f"workspace is {_rows_bytes(problem)} bytes, need < 2**31: builds before 0.1.20 have 32-bit offsets"


def _prefill_sparse_limits(problem: AttentionProblem) -> Iterable[str]:
    otherwise = "elsewhere it asks the truth of the whole sink, which raises"
    yield from _need_gfx950(problem, _NAN_BEHIND_ROWS if problem.arch == "gfx1250" else otherwise)
    yield from _need_512(problem)
    yield from _need_no_lse(problem)
    if _rows_bytes(problem) > _MAX_BYTES:
        yield (
            f"workspace is {_rows_bytes(problem)} bytes, need < 2**31: past that it reads row 0 for what stands behind "
            "a row, and a NaN in it spoils the row"
        )


def _prefill_sparse_build(problem: AttentionProblem) -> Iterable[str]:
    if not _since_0_1_20():
        yield f"at {AITER.path} is older than 0.1.20 and has no gfx950 kernel"


_TRITON = "aiter.ops.triton.attention"
DECODE_SPARSE = EntryPoint(
    f"{_TRITON}.pa_decode_sparse", "pa_decode_sparse", 6, ("has_invalid", "kv_splits", "skip_reduce"),
    _run_decode_sparse, _decode_sparse_limits, _decode_sparse_build,
)  # fmt: skip
MLA_FWD = EntryPoint(
    f"{_TRITON}.sparse_mla", "sparse_mla_fwd", 5,
    ("kv_scale", "kv_lora_rank", "qk_rope_head_dim", "has_invalid", "out", "return_lse", "attn_sink",
     "extra_kv", "extra_indptr", "extra_indices", "extra_kv_scale"),
    _run_mla_fwd, _mla_fwd_limits, _mla_fwd_build,
)  # fmt: skip
OPUS = EntryPoint(
    "aiter.ops.pa_sparse_prefill_opus", "pa_sparse_prefill_opus", 10, (), _run_opus, _opus_limits, _opus_build
)
PREFILL_SPARSE = EntryPoint(
    f"{_TRITON}.pa_prefill_sparse", "pa_prefill_sparse", 9, (),
    _run_prefill_sparse, _prefill_sparse_limits, _prefill_sparse_build,
)  # fmt: skip


def entry_points(problem: AttentionProblem) -> tuple[EntryPoint, ...]:
    """Those that serve the op, best first."""
    if problem.op == "sparse_mla_decode":
        return MLA_FWD, DECODE_SPARSE
    if problem.tokens >= OPUS_MIN_TOKENS:
        return OPUS, MLA_FWD, PREFILL_SPARSE, DECODE_SPARSE
    if problem.tokens >= MLA_GLUON_UNSPLIT_TOKENS:
        return MLA_FWD, PREFILL_SPARSE, DECODE_SPARSE, OPUS
    return MLA_FWD, DECODE_SPARSE, PREFILL_SPARSE, OPUS


def choose(problem: AttentionProblem) -> tuple[EntryPoint | None, list[str]]:
    """The entry point that takes a problem; or every one's reasons, each after its name."""
    told = [(entry, list(entry.limits(problem))) for entry in entry_points(problem)]
    # Asked of AITER only where it can matter, because asking imports it.
    if any(not reasons for _, reasons in told) and AITER.reason is None:
        told = [(entry, reasons or entry.missing(problem)) for entry, reasons in told]
    for entry, reasons in told:
        if not reasons:
            return entry, []
    return None, [f"{entry.name}: {reason}" for entry, reasons in told for reason in reasons]


def _reasons(problem: AttentionProblem) -> list[str]:
    named = all(cache.layout in LAYOUTS for cache in problem.caches)
    if problem.device != "cuda" or problem.arch not in ARCHS or not named:
        return []
    slots = [cache.pages * cache.page_size for cache in problem.caches]
    reasons = [f"cache has {count} slots, need < 2**31" for count in slots if count > 2**31 - 1]
    return reasons + choose(problem)[1]


@cached(1024)
def _chosen(problem: AttentionProblem) -> EntryPoint:
    entry, reasons = choose(problem)
    if entry is None:
        raise KernelNotSupported(f"kernel='aiter' cannot run {problem.op}: {'; '.join(reasons)}", {"aiter": reasons})
    return entry


def _span_bytes(tensor: torch.Tensor) -> int:
    return 2 * (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())))


def max_tokens(heads: int, head_dim: int, width: int, lse: bool) -> int:
    """Tokens one call may take: q and out within 2 GiB, and what it allocates for indices and partials bounded."""
    limits = [_MAX_BYTES // (2 * heads * head_dim), _MAX_INDICES // max(1, width)]
    if lse:
        limits.append(_MAX_PARTIAL_BYTES // (4 * _SPLITS * heads * VALUE_DIM))
    return max(1, min(limits))


def _attend(call: Call) -> Result:
    """One entry point, with no more tokens a call than it takes, and q and out within its 32-bit offsets.

    Making rows ragged drops what is out of range, so ``trusted`` is of no use, and neither is ``schedule``. A first
    call of a shape compiles kernels, so make it before a graph is captured.
    """
    entry = _chosen(problem_of(call))
    function = entry.function()
    sources = sources_of(call)
    step = max_tokens(call.heads, call.q.shape[2], sum(source.indices.shape[1] for source in sources), call.lse)

    def run(part: Call, start: int = 0) -> Result:
        q, out = queries(part), part.out
        inside = out is not None and out.shape[1] == call.heads and _span_bytes(out) <= _MAX_BYTES and is_aligned(out)
        q = aligned(q if _span_bytes(q) <= _MAX_BYTES else q.contiguous())
        values, lse = entry.run(function, part._replace(q=q, out=out if inside else None))
        return deliver(part, values, lse)

    if call.q.shape[0] <= step:
        return run(call)
    return in_parts(call, step, run)


def _arch(device: torch.device) -> str:
    return platform.limits(device).arch


def decode(call: DecodeCall) -> Result:
    """``sparse_mla_fwd`` or ``pa_decode_sparse``."""
    return _attend(call)


def prefill(call: PrefillCall) -> Result:
    """One of the four over bf16 rows."""
    return _attend(call)


# A ranking, for want of any measurement: AITER's own kernels for gfx950 before Triton's, and behind it what takes a
# pass more (an lse of several heads) or is Triton too (gfx942).
_BEFORE, _BEHIND = 0.8, 1.2
# Thousands of cycles to issue the instructions of 64 entries, counted as in docs/gfx.md: pa_decode_sparse's programs of
# 16 heads on gfx950 (at e4048607a5), and Triton's of 16 and of 64.
_AITER_HEADS, _AITER_CYCLES = 16, 2.9
_TRITON_CYCLES = {16: 6.9, 64: 8.5}
# Microseconds of small launches: what makes rows ragged and bounds the sink, a call and a cache, and merges partials.
_ROWS_US, _CACHE_US, _MERGE_US = 2.5, 5.0, 45.0


def _decode_sparse_share(heads: int) -> float:
    """Of Triton's time on gfx950: each 16 heads decode the entries again, where Triton's 64 do so once."""
    program = 16 if heads <= 16 else 64
    programs = -(-heads // program)
    return _AITER_CYCLES * -(-heads // _AITER_HEADS) / (_TRITON_CYCLES[program] * programs)


def _predicted_us(problem: AttentionProblem) -> float:
    triton = find(problem.op, "triton")
    assert triton is not None, "registered first, wherever ROCm is the backend"
    us = triton.predicted_us(problem)
    if problem.op == "sparse_mla_prefill" or problem.arch != "gfx950":
        return us * (_BEFORE if problem.arch == "gfx950" and not problem.lse else _BEHIND)
    share = _decode_sparse_share(problem.heads)
    if _chosen(problem) is MLA_FWD:
        # Newer, with up to 64 heads a program, which nobody has counted.
        share = min(share, _BEFORE)
    elif problem.lse:
        us += _MERGE_US / share
    return us * share + _ROWS_US + _CACHE_US * len(problem.caches)


# pa_decode_sparse splits rows until about 2 * 16384 of them are in flight (heads of a workgroup times its workgroups),
# each with float32 values and two statistics. Read in its Python, not measured.
_AITER_PARTIAL_BYTES = 2 * 16384 * 4 * (VALUE_DIM + 2)


def _scratch(problem: AttentionProblem) -> int:
    """Ragged rows, q aligned and padded, values before they are masked or merged, and AITER's own partial outputs."""
    width = problem.width + problem.extra_width
    step = min(problem.tokens, max_tokens(problem.heads, problem.head_dim, width, problem.lse))
    tokens = max(step, MLA_GLUON_UNSPLIT_TOKENS)
    rows = tokens * problem.heads
    indices_bytes = tensor_bytes(step * width, 4) + 6 * tensor_bytes(tokens + 1, 8)
    values = tensor_bytes(rows * VALUE_DIM, 16) + tensor_bytes(rows * problem.head_dim, 6) + 8 * tensor_bytes(rows, 4)
    merged = 3 * tensor_bytes(rows * _SPLITS * VALUE_DIM, 4) if problem.lse else 0
    return indices_bytes + values + merged + _AITER_PARTIAL_BYTES


def register_kernels() -> None:
    """Add AITER to the two attention ops; it is not imported."""
    for op, run, names in (("sparse_mla_decode", decode, LAYOUTS), ("sparse_mla_prefill", prefill, ())):
        register(
            Kernel(
                op,
                "aiter",
                run,
                _predicted_us,
                library=AITER,
                archs=ARCHS,
                layouts=names,
                max_heads=MAX_HEADS,
                scratch_bytes=_scratch,
                further_reasons=_reasons,
            )
        )
