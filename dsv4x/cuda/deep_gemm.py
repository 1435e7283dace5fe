"""DeepGEMM's indexer logits and their schedule on SM90, SM100 and SM120, both generations of its API.

Read from the ``sgl-deep-gemm`` wheels 0.1.5.post1, 0.2.3 and 0.2.5 (the headers it compiles, and the assertions in its
library) and measured on an H200 with the first. Told apart by signature: ``fp8_paged_mqa_logits`` and
``fp8_mqa_logits`` are older than ``fp8_fp4_*``, which take q as a pair; the newest have no ``clean_logits``, want
``max_seqlen_k``, and on SM100 a request number for every row, ue8m0 scales of q and K, and bf16 weights, and return
bf16 logits there. So fp8 K with one float32 scale a row is refused there by reason, and MXFP8 is taken: servers store
a row's scale as ue8m0 bytes.

What it leaves to its caller, and what is done here: it reads a request's length from its last row, so that every row
of a request is scored over the longest; it writes whole segments, so that columns past a length hold anything; it
trusts lengths, ranges and its schedule, and reads the length of the request an idle SM begins at, even past the last.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..common.core import layouts
from ..common.core.layouts import ALIGNMENT
from ..common.core.logits_calls import FlatLogitsCall, PagedLogitsCall, PagedRows
from ..common.core.platform import platform
from ..common.core.vendor import TRITON, VendorLibrary
from ..common.dispatch.costs import logits_us
from ..common.dispatch.problem import LogitsProblem, ScheduleProblem
from ..common.dispatch.registry import Kernel, register
from ..common.ops.indexer import SPLIT_PAGES

DEEP_GEMM = VendorLibrary(
    "deep_gemm",
    ("sgl-deep-gemm",),
    wrong={"deep-gemm": "PyPI's deep-gemm, an old source release with another API"},
    attributes=("get_paged_mqa_logits_metadata",),
    hint="pip install sgl-deep-gemm",
    # vLLM prefers an installed one to its own as well, so that both use one build.
    after=("vllm.third_party.deep_gemm",),
    namespace="deep_gemm",
)

ARCHS = ("sm_90", "sm_100", "sm_103", "sm_107", "sm_120", "sm_121")
LAYOUTS = (layouts.INDEXER_FP8.name, layouts.INDEXER_MXFP8.name, layouts.INDEXER_FP4.name)
# By arch family: what every build takes, and what its assertions add in later ones.
PAGE_SIZES = {"sm_9": (64,), "sm_10": (32, 64), "sm_12": (64,)}
_SINCE_0_2_3 = {"sm_10": (128,)}
_SINCE_0_2_5 = {"sm_12": (32, 128, 256)}
SM90_NEXT_N = 2

BY_NAME_ONLY = (
    "it compiles a kernel for every 32 requests and reads past its shared memory where no request has an entry; "
    "triton's table is the same"
)

# An H200's (benchmarks/results/indexer-h200.json): microseconds a call; bytes of K, FLOP and bytes of logits a
# microsecond.
_RATES = (8.0, 3.9e6, 1150e6, 4e6)
# A pass over logits that are still in the L2: microseconds a call as an eager step sees them, bytes a microsecond.
_PASS = (20.0, 5e6)
# Microseconds of repeating a block table's rows.
_TABLE_US = 5.0


def page_sizes(arch: str, device: str) -> tuple[int, ...]:
    """The page sizes DeepGEMM takes on ``arch``; of a build's own only where ``device`` could run it."""
    family = arch[:-1]
    sizes = PAGE_SIZES.get(family, ()) if arch in ARCHS else ()
    if not sizes or device != "cuda" or DEEP_GEMM.reason is not None:
        return sizes
    if hasattr(DEEP_GEMM.load(), "get_mqa_logits_metadata"):
        sizes += _SINCE_0_2_3.get(family, ())
    if _is_newest():
        sizes += _SINCE_0_2_5.get(family, ())
    return tuple(sorted(sizes))


def schedule_limit(arch: str, shared_memory: int) -> int:
    """The largest number of requests whose schedule fits ``shared_memory`` bytes in one of DeepGEMM's kernels.

    SM90 and SM120 hold a prefix sum of 4 bytes for each of the requests rounded up to 32; SM100 two words a request, or
    a row in its newest generation, and some for its warps.
    """
    words = shared_memory // 4
    return (words - 64) // 2 if arch.startswith("sm_10") else words // 32 * 32


def _function(name: str, packed: bool) -> Any:
    """The entry point called ``fp8_<name>`` in the older generation, or the one for both encodings."""
    module = DEEP_GEMM.load()
    older = None if packed else getattr(module, f"fp8_{name}", None)
    return older or getattr(module, f"fp8_fp4_{name}", None)


@functools.cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _wheel_reasons(problem: LogitsProblem, name: str) -> list[str]:
    """What the installed build lacks. Only asked where a GPU could run it."""
    if problem.device != "cuda" or problem.arch not in ARCHS or DEEP_GEMM.reason is not None:
        return []
    packed = problem.q_encoding == "e2m1"
    if _function(name, packed) is None:
        need = f"fp8_fp4_{name}" if packed else f"fp8_{name} or fp8_fp4_{name}"
        return [f"deep_gemm at {DEEP_GEMM.path} has no {need}"]
    if problem.arch == "sm_107" and not _is_newest():
        return [f"deep_gemm at {DEEP_GEMM.path} compiles for no sm_107, need sgl-deep-gemm 0.2.5"]
    mxfp8 = problem.k_encoding == "mxfp8" or any(c.layout == layouts.INDEXER_MXFP8.name for c in problem.caches)
    if not packed and mxfp8 != _is_mx(problem.arch):
        if mxfp8:
            return [
                f"K is mxfp8, and deep_gemm at {DEEP_GEMM.path} takes it on SM100 alone, from sgl-deep-gemm 0.2.5 on"
            ]
        return [
            f"q and K are e4m3fn with float32 scales, and deep_gemm at {DEEP_GEMM.path} takes ue8m0 scales only on "
            f"SM100, need {layouts.INDEXER_MXFP8.name} or {layouts.INDEXER_FP4.name}, or sgl-deep-gemm 0.2.3"
        ]
    return []


def _operand_reasons(problem: LogitsProblem, k: str) -> list[str]:
    """What its matrix products do not take."""
    q = problem.q_encoding
    if k == "mxfp8":
        k = "e4m3fn"
    if q != k or q == "e4m3fnuz":
        return [f"q is {q} and K {k}, need e4m3fn for both or e2m1 for both"]
    if q == "e2m1" and problem.arch == "sm_90":
        return ["q and K are e2m1, need e4m3fn on SM90"]
    return []


def _triton_missing() -> list[str]:
    return [f"its lengths and logits are put within bounds by triton: {TRITON.reason}"] if TRITON.reason else []


def _paged_reasons(problem: LogitsProblem) -> list[str]:
    reasons = []
    for cache in problem.caches:
        if cache.layout in LAYOUTS:
            reasons += _operand_reasons(problem, layouts.by_name(cache.layout).operand_encoding)
        sizes = page_sizes(problem.arch, problem.device)
        if sizes and cache.page_size not in sizes:
            reasons.append(f"page_size is {cache.page_size}, need {' or '.join(map(str, sizes))}")
        if cache.page_stride > 2**31 - 1:
            reasons.append(f"page stride is {cache.page_stride} bytes, need < 2**31")
    return reasons + (_wheel_reasons(problem, "paged_mqa_logits") or _triton_missing())


def _flat_reasons(problem: LogitsProblem) -> list[str]:
    reasons = _operand_reasons(problem, problem.k_encoding)
    return reasons + (_wheel_reasons(problem, "mqa_logits") or _triton_missing())


def _schedule_reasons(problem: ScheduleProblem) -> list[str]:
    reasons = []
    sizes = page_sizes(problem.arch, problem.device)
    if sizes and problem.page_size not in sizes:
        reasons.append(f"page_size is {problem.page_size}, need {' or '.join(map(str, sizes))}")
    if problem.device == "cuda" and sizes:
        limit = schedule_limit(problem.arch, platform.limits().shared_memory)
        if problem.tokens > limit:
            reasons.append(f"{problem.tokens} requests, need <= {limit}: its kernel's shared memory holds no more")
        if not reasons and DEEP_GEMM.reason is None and _is_mx(problem.arch):
            reasons.append(
                "this DeepGEMM schedules rows by their requests on SM100, which paged_mqa_logits does itself"
            )
    return reasons


def _is_newest() -> bool:
    """Whether the build is of 0.2.5's generation, which has no ``clean_logits``."""
    function = _function("paged_mqa_logits", packed=False)
    return function is not None and "clean_logits" not in _parameters(function)


def _is_mx(arch: str) -> bool:
    """Whether this is SM100 under a build of the newest generation, whose kernel there is another.

    It takes single rows and a request number for each, ue8m0 scales of q and K, and bf16 weights, and its logits are
    bf16 (``check_mqa_logits_q_and_weights`` of 0.2.5).
    """
    return arch.startswith("sm_10") and _is_newest()


def rows_at_once(arch: str, next_n: int) -> int:
    """The rows of a request that one of its kernels takes for a request: all, or on SM90 pairs of an even number."""
    if arch != "sm_90" or next_n <= SM90_NEXT_N:
        return next_n
    return 1 if next_n % SM90_NEXT_N else SM90_NEXT_N


def _note(problem: LogitsProblem) -> str:
    mx = DEEP_GEMM.reason is None and _is_mx(problem.arch)
    notes = ["weights and logits rounded to bf16: the kernel has no other on SM100"] if mx else []
    if problem.op == "paged_mqa_logits" and problem.next_n > 1:
        notes.append(_next_n_note(problem, mx))
    return "; ".join(notes)


def _next_n_note(problem: LogitsProblem, mx: bool) -> str:
    at_once = rows_at_once(problem.arch, problem.next_n)
    if at_once < problem.next_n:
        requests = f"{problem.next_n // at_once} requests of {at_once}"
        return f"next_n {problem.next_n} as {requests}, table rows repeated: SM90's kernel takes <= {SM90_NEXT_N}"
    if mx:
        return f"next_n {problem.next_n} as single rows that name their requests, over a view of the block table"
    return f"next_n {problem.next_n} natively"


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a tensor map takes it: contiguous, beginning on 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


_UNIT_SCALES = 0x7F7F7F7F
"""Four ue8m0 scales of 1: those of an fp8 q, whose scale is in the weights."""


def _pair(q: torch.Tensor, q_scale: torch.Tensor | None, function: Any) -> Any:
    """q as the generation takes it; DeepGEMM reads a row's four ue8m0 scales as one int32."""
    if q_scale is None and _is_mx(platform.limits(q.device).arch):
        return _aligned(q), torch.full(q.shape[:-1], _UNIT_SCALES, dtype=torch.int32, device=q.device)
    if q_scale is not None:
        return _aligned(q).view(torch.int8), _aligned(q_scale).view(torch.int32).squeeze(-1)
    return (_aligned(q), None) if "fp4" in function.__name__ else _aligned(q)


def _weights(weights: torch.Tensor, device: torch.device) -> torch.Tensor:
    return _aligned(weights.bfloat16() if _is_mx(platform.limits(device).arch) else weights)


def _widened(logits: torch.Tensor) -> torch.Tensor:
    """The logits in float32: themselves, or a copy of bf16 ones."""
    from ..common.kernels.mqa_logits import empty_logits

    if logits.dtype == torch.float32:
        return logits
    rows, width = logits.shape
    return empty_logits(rows, width, logits.device).copy_(logits)


def _options(function: Any) -> dict[str, Any]:
    return {"clean_logits": False} if "clean_logits" in _parameters(function) else {}


class PagedPlan(NamedTuple):
    """Requests as DeepGEMM takes them, and their schedule.

    Attributes:
        lens: int32 ``[A, r]``, within bounds; the last of a row counts.
        table: int32 ``[A, m]`` page numbers, of which those that lengths reach are there.
        schedule: int32, as DeepGEMM makes it for these.
        requests: int32 ``[A]``, the number of each row's request, where its kernel wants that; else None.
    """

    lens: torch.Tensor
    table: torch.Tensor
    schedule: torch.Tensor
    requests: torch.Tensor | None = None


def plan_paged(rows: PagedRows, earlier: PagedPlan | None = None) -> PagedPlan:
    """What the layers of a step share: lengths within bounds, block table rows where one is not enough, a schedule.

    SM90's kernel takes two rows of a request: each pair of an even number is a request of its own, and so is each row
    of an odd one. A row that names its request gets a row of the table everywhere.
    """
    from ..common.kernels.schedule import limit_lens, spread_rows

    arch, next_n = platform.limits(rows.block_table.device).arch, rows.context_lens.shape[1]
    if _is_mx(arch):
        return _plan_single(rows, earlier)
    at_once, made = rows_at_once(arch, next_n), (None, None, None, None) if earlier is None else earlier
    if rows.requests is None and at_once == next_n:
        lens, table = limit_lens(rows, next_n, made[0]), rows.block_table
    else:
        lens, table = spread_rows(rows, at_once, None if earlier is None else earlier[:2])
    return PagedPlan(lens, table, _schedule(lens, rows.page_size, None, made[2]))


def _plan_single(rows: PagedRows, earlier: PagedPlan | None) -> PagedPlan:
    """:func:`plan_paged` where the kernel takes single rows and a request number for each.

    Two neighbouring rows of one number share their entries, which are the second one's; so rows of a request have its
    largest length, and rows that name their requests a number each.
    """
    from ..common.kernels.schedule import limit_lens, spread_rows

    table, (batch, next_n) = rows.block_table, rows.context_lens.shape
    lens, spread, schedule, names = (None, None, None, None) if earlier is None else earlier
    if names is None:
        names = torch.arange(batch, dtype=torch.int32, device=table.device).repeat_interleave(next_n)
    if rows.requests is None and _has_row_view(table, next_n):
        lens = limit_lens(rows, next_n, lens).view(-1, 1)
        # Only the table row of a request's first row is read: row b * n of this view is row b of the table.
        table = table.as_strided((batch * next_n, table.shape[1]), (table.stride(0) // next_n, 1))
    else:
        if rows.requests is None:
            rows = rows._replace(context_lens=limit_lens(rows, next_n))
        lens, table = spread_rows(rows, 1, None if lens is None or spread is None else (lens, spread))
    return PagedPlan(lens, table, _schedule(lens, rows.page_size, names, schedule), names)


def _most_requests(arch: str, shared_memory: int, next_n: int) -> int | None:
    """The requests that one call may have; None for any number."""
    if arch == "sm_90":
        return None
    limit = schedule_limit(arch, shared_memory)
    return max(1, limit // next_n) if _is_mx(arch) else limit


def paged_mqa_logits(call: PagedLogitsCall) -> torch.Tensor:
    """``fp8_paged_mqa_logits`` or ``fp8_fp4_paged_mqa_logits``.

    Batches past its schedule's limit on SM100 and SM120 are split.
    """
    from ..common.kernels.mqa_logits import empty_logits

    batch, next_n = call.q.shape[:2]
    limits = platform.limits(call.q.device)
    step = _most_requests(limits.arch, limits.shared_memory, next_n)
    if step is None or step >= batch:
        return _deliver(_paged_batch(call), call)
    if call.schedule is not None:
        raise ValueError(f"schedule: given for {batch} requests, need None above {step}: the batch is split there")
    out = call.out
    if out is None:
        out = empty_logits(batch * next_n, call.max_context_len, call.q.device)
    whole = call._replace(out=out, clean_logits=True)
    for start in range(0, batch, step):
        part = whole.part(slice(start, start + step))
        _deliver(_paged_batch(part), part)
    return out


def _paged_batch(call: PagedLogitsCall) -> torch.Tensor:
    """The logits ``[B * n, >= max_context_len]``, unclean."""
    plan = call.plan
    if plan is None:
        plan = plan_paged(call.rows) if call.schedule is None else _vouched(call, call.schedule)
    return _score(call, plan)


def _vouched(call: PagedLogitsCall, schedule: torch.Tensor) -> PagedPlan:
    """The plan of a caller's schedule, which counts every pair of a request's rows by the last of its lengths."""
    arch, next_n = platform.limits(call.q.device).arch, call.q.shape[1]
    at_once = rows_at_once(arch, next_n)
    if _is_mx(arch) or call.requests is not None or (at_once == 1 < next_n):
        # Of a schedule that its kernel has another form of, or of other rows.
        return plan_paged(call.rows)
    _check_schedule(schedule, DEEP_GEMM.load().get_num_sms())
    if at_once == next_n:
        return PagedPlan(call.context_lens.int().contiguous(), call.block_table, schedule)
    from ..common.kernels.schedule import spread_rows

    lens = call.context_lens[:, -1:].expand(-1, next_n)
    return PagedPlan(*spread_rows(call.rows._replace(context_lens=lens), at_once), schedule)


def _score(call: PagedLogitsCall, plan: PagedPlan) -> torch.Tensor:
    """One call of DeepGEMM."""
    function = _function("paged_mqa_logits", packed=call.q_scale is not None)
    q, q_scale, more = call.q, call.q_scale, _options(function)
    if plan.lens.shape != call.context_lens.shape:
        q = q.reshape(*plan.lens.shape, *q.shape[2:])
        q_scale = None if q_scale is None else q_scale.reshape(*plan.lens.shape, *q_scale.shape[2:])
    if plan.requests is not None:
        more["indices"] = plan.requests
    return function(
        _pair(q, q_scale, function), call.cache.servers_view, _weights(call.weights, q.device), plan.lens, plan.table,
        plan.schedule, call.max_context_len, **more,
    )  # fmt: skip


def prepare_paged(call: PagedLogitsCall) -> Callable[[PagedLogitsCall], torch.Tensor]:
    """:func:`paged_mqa_logits` of planned calls that look like this one, with nothing left to look up."""
    q, plan, limits = call.q, call.plan, platform.limits(call.q.device)
    most = _most_requests(limits.arch, limits.shared_memory, q.shape[1])
    plain = call.q_scale is None and call.out is None and not call.clean_logits and not _is_mx(limits.arch)
    if plan is None or not plain or not (q.is_contiguous() and call.weights.is_contiguous()):
        return paged_mqa_logits
    if most is not None and len(q) > most:
        return paged_mqa_logits
    function = _function("paged_mqa_logits", packed=False)
    paired, more, width = "fp4" in function.__name__, _options(function), call.max_context_len
    shape = (*plan.lens.shape, *q.shape[2:])

    def run(call: PagedLogitsCall) -> torch.Tensor:
        q, weights, plan = call.q, call.weights, call.plan
        if (q.data_ptr() | weights.data_ptr()) % ALIGNMENT:
            return paged_mqa_logits(call)
        q = q.view(shape)
        view = call.cache.servers_view
        return function((q, None) if paired else q, view, weights, plan.lens, plan.table, plan.schedule, width, **more)

    return run


def _has_row_view(block_table: torch.Tensor, next_n: int) -> bool:
    """Whether a table row for each of a request's rows fits its own, and the last request's the storage."""
    stride, rest = divmod(block_table.stride(0), next_n)
    end = block_table.storage_offset() + (len(block_table) * next_n - 1) * stride + block_table.shape[1]
    return next_n == 1 or (rest == 0 and 4 * end <= block_table.untyped_storage().nbytes())


def _schedule(
    lens: torch.Tensor, page_size: int, requests: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    """The schedule of one call over ``lens [A, r]``, all its rows one atom or as many as DeepGEMM makes of them."""
    module = DEEP_GEMM.load()
    num_sms = module.get_num_sms()
    if platform.limits(lens.device).arch == "sm_90":
        from ..common.kernels.schedule import get_paged_mqa_logits_metadata

        if out is None:
            out = torch.empty(num_sms + 1, 2, dtype=torch.int32, device=lens.device)
        get_paged_mqa_logits_metadata(lens, SPLIT_PAGES * page_size, 1, num_sms, out)
        return out
    named = () if requests is None else (requests,)
    made = module.get_paged_mqa_logits_metadata(lens, page_size, num_sms, *named)
    return made if out is None else out.copy_(made)


def _check_schedule(schedule: torch.Tensor, num_sms: int) -> None:
    if schedule.shape[0] != num_sms + 1 or not schedule.is_contiguous():
        raise ValueError(
            f"schedule: shape {tuple(schedule.shape)}, strides {schedule.stride()}, "
            f"need contiguous ({num_sms + 1}, 2): DeepGEMM runs on {num_sms} SMs"
        )


def _deliver(logits: torch.Tensor, call: PagedLogitsCall) -> torch.Tensor:
    """The logits, clean where asked for, in the call's ``out`` or in DeepGEMM's own buffer."""
    from ..common.kernels.mqa_logits import clean_logits, empty_logits

    out, width = call.out, call.max_context_len
    if out is None and not call.clean_logits:
        return _widened(logits)
    if out is None:
        # The pass that cleans widens too, where it copies.
        own = logits.dtype == torch.float32
        out = logits if own else empty_logits(logits.shape[0], width, logits.device)
    clean_logits(logits, call.context_lens, out, width, pages=(call.block_table, call.cache), requests=call.requests)
    return out


def mqa_logits(call: FlatLogitsCall) -> torch.Tensor:
    """``fp8_mqa_logits`` or ``fp8_fp4_mqa_logits``.

    Ranges are put within bounds first: of one that ends before it begins DeepGEMM's kernel makes 2**32 entries. Its
    newest generation counts columns from ks only, so that a result of all entries takes a copy there.
    """
    from ..common.kernels import mqa_logits as kernels

    q, q_scale, k, max_seqlen_k, out = call.q, call.q_scale, call.k, call.max_seqlen_k, call.out
    function = _function("mqa_logits", packed=q_scale is not None)
    entries, width = k.shape[0], k.shape[0] if max_seqlen_k is None else max_seqlen_k
    relative = max_seqlen_k is not None or "clean_logits" not in _parameters(function)
    # Written a segment at a time, past ke too where columns are entries; where they count from ks, never.
    starts, ends = kernels.limit_ranges(call.ks, call.ke, entries, width)
    kv = (_aligned(k), _aligned(call.k_scale))
    if k.dtype == torch.uint8:
        kv = (kv[0].view(torch.int8), kv[1])
    if kv[1].dtype == torch.uint8:
        kv = (kv[0], kv[1].view(torch.int32).squeeze(-1))
    logits = function(
        _pair(q, q_scale, function), kv, _weights(call.weights, q.device), starts, ends,
        max_seqlen_k=width if relative else 0, **_options(function),
    )[:, :width]  # fmt: skip
    shifted = relative and max_seqlen_k is None
    if out is None and not shifted:
        if not call.clean_logits:
            return _widened(logits)
        out = logits if logits.dtype == torch.float32 else None
    if out is None:
        out = kernels.empty_logits(q.shape[0], width, q.device)
    if max_seqlen_k is None:
        kernels.clean_logits(logits, ends[:, None], out, width, starts=starts, shifted=shifted)
    else:
        kernels.clean_logits(logits, (ends - starts)[:, None], out, width)
    return out


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor, split: int, atoms: int, num_sms: int, out: torch.Tensor
) -> None:
    """DeepGEMM's function of this name. Arguments as its Triton counterpart's."""
    module = DEEP_GEMM.load()
    lens = context_lens.int().clamp_min(0).contiguous()
    out.copy_(module.get_paged_mqa_logits_metadata(lens, split // SPLIT_PAGES, num_sms))


def _paged_us(problem: LogitsProblem) -> float:
    """A call, each of whose requests reads all its K, and a pass over logits that are cleaned."""
    total = 0.0
    if problem.ragged or rows_at_once(problem.arch, problem.next_n) < problem.next_n:
        total += _TABLE_US
        at_once = rows_at_once(problem.arch, problem.next_n)
        requests = problem.tokens * problem.next_n // at_once
        problem = dataclasses.replace(problem, tokens=requests, next_n=at_once)
    total += logits_us(problem, *_RATES)
    if problem.clean:
        call, rate = _PASS
        total += call + 4.0 * problem.tokens * problem.next_n * problem.width / rate
    return total


def _flat_us(problem: LogitsProblem) -> float:
    call, rate = _PASS
    passed = call + 4.0 * problem.tokens * problem.width / rate if problem.clean else 0.0
    return logits_us(problem, *_RATES) + passed


def register_kernels() -> None:
    """Add DeepGEMM's kernels to the ops they serve."""
    paged = Kernel(
        "paged_mqa_logits",
        "deep_gemm",
        paged_mqa_logits,
        _paged_us,
        library=DEEP_GEMM,
        archs=ARCHS,
        layouts=LAYOUTS,
        plan=plan_paged,
        prepare=prepare_paged,
        further_reasons=_paged_reasons,
        note=_note,
    )
    flat = Kernel(
        "mqa_logits",
        "deep_gemm",
        mqa_logits,
        _flat_us,
        library=DEEP_GEMM,
        archs=ARCHS,
        further_reasons=_flat_reasons,
        note=_note,
    )
    schedule = Kernel(
        "get_paged_mqa_logits_metadata",
        "deep_gemm",
        get_paged_mqa_logits_metadata,
        # Never predicted, because it runs by name only.
        lambda problem: math.inf,
        library=DEEP_GEMM,
        archs=ARCHS,
        by_name_only=BY_NAME_ONLY,
        further_reasons=_schedule_reasons,
    )
    for kernel in (paged, flat, schedule):
        register(kernel)
