"""FlashMLA on SM90 and SM100: its limits met here, so that they never reach the caller.

Read from FlashMLA 9241ae3, the ``sgl-flash-mla`` 1.0.0 wheel and the copy in vLLM 0.33.0, and measured on an H200:
64 or 128 heads; index widths in multiples of 64 (decode) and 128 (prefill); int32 indices of which only -1 is invalid
(decode); at least one token, page and row; a scheduler kernel whose shared memory grows with the batch. DSv3.2 pages
are read without lengths and without an extra cache. bf16 pages are rows to the prefill kernel. q, workspace rows and
pages begin on 16 bytes, and so do their strides; index rows on 32 (SM100). What else comes is copied, pages refused.

vLLM's copy has ``out``, which upstream lacks, and from 0.33 on prefill kernels for fewer heads on SM90, whose out may
be a slice of heads. It kept the pages of DSv4 that upstream dropped with its 2026.09.30 release, of which the prefill
kernel of bf16 rows is used: SM100 and 512 values alone.

V4.1's pages are that release's, on SM100, and those of the wheel without ``use_legacy``. Their kernels were never run
here, and what they round is not published: they run by name only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..common.core import layouts
from ..common.core.calls import AttentionCall, DecodeCall, PrefillCall, Result, deliver, in_parts, queries
from ..common.core.layouts import PagedCache
from ..common.core.model import VALUE_DIM
from ..common.core.platform import capturing, platform
from ..common.core.vendor import VendorLibrary, aligned, is_aligned, needs_triton, parameters
from ..common.dispatch import costs
from ..common.dispatch.problem import AttentionProblem
from ..common.dispatch.registry import Kernel, register
from ..common.kernels.scratch import multiprocessors, tensor_bytes

FLASH_MLA = VendorLibrary(
    "flash_mla",
    ("sgl-flash-mla", "flash-mla", "flash_mla"),
    attributes=("flash_mla_with_kvcache", "flash_mla_sparse_fwd", "get_mla_metadata"),
    hint="pip install sgl-flash-mla",
    before=("vllm.third_party.flashmla.flash_mla_interface",),
)

ARCHS = ("sm_90", "sm_100", "sm_103", "sm_107")
HEADS = (64, 128)
# What vLLM's copy adds for prefill on SM90.
SMALL_HEADS = (8, 16, 32)
# The address and the row stride of indices, in bytes: SM90 loads two at a time, SM100 eight.
INDEX_ALIGNMENT = 32
DECODE_WIDTH = 64
PREFILL_WIDTH = 128
BF16_LAYOUTS = (layouts.BF16_512.name, layouts.BF16_576.name)
V41_LAYOUTS = (layouts.DSV41_FP8.name, layouts.DSV41_FP4.name)
# What V4.1's kernels read: 528-byte entries, and 528 or 288 bytes in an extra cache.
V41_CACHES = (V41_LAYOUTS[:1], V41_LAYOUTS[:1] * 2, V41_LAYOUTS)
# Their index widths: which of 64 and 128 one needs is not published, and this is a multiple of both.
V41_WIDTH = 128
DECODE_LAYOUTS = (layouts.DSV4.name, layouts.DSV32.name, *BF16_LAYOUTS, *V41_LAYOUTS)
# SM100 reads pages by tensor maps of whole entries; of DSv4's, whose scales stand apart, of their values.
SM100_PAGE_ALIGNMENT = {
    layouts.DSV4.name: 576,
    **{layout.name: layout.entry_bytes for layout in (layouts.DSV32, layouts.DSV41_FP8, layouts.DSV41_FP4)},
}

# FlashMLA holds one float32 partial output a token and head; this bounds that buffer to 1 GiB. A bound of 256 MiB was
# measured to cost 13 % at 4096 tokens: it has no out argument, so each part's output is copied.
_MAX_PARTIAL_ELEMENTS = 1 << 28


def scheduler_limit(shared_memory: int) -> int:
    """The largest batch whose scheduler kernel fits ``shared_memory`` bytes: it takes 4 * (5 * batch + 1).

    The ``sgl-flash-mla`` wheel takes less and falls back to a slower kernel above; upstream ends the process.
    """
    return (shared_memory // 4 - 1) // 5


def max_batch(heads: int, shared_memory: int) -> int:
    """Tokens one decode call may take: the scheduler's limit and the partial outputs' memory."""
    return min(scheduler_limit(shared_memory), _MAX_PARTIAL_ELEMENTS // (heads * VALUE_DIM))


def _options(function: Callable[..., Any], layout: str = layouts.DSV4.name) -> dict[str, bool]:
    """What an entry point takes to reach the kernels of a layout: newer wheels moved V4's behind ``use_legacy``."""
    return {"use_legacy": layout not in V41_LAYOUTS} if "use_legacy" in parameters(function) else {}


def _out(function: Callable[..., Any], call: AttentionCall, heads: int, *middle: int) -> dict[str, torch.Tensor]:
    """The caller's buffer, where the build takes one (vLLM's does) and FlashMLA would write nothing else into it."""
    out = call.out
    if out is None or call.heads != heads or "out" not in parameters(function):
        return {}
    if heads in SMALL_HEADS and is_aligned(out):
        return {"out": out[:, :heads]}
    if out.shape[1] != heads or not (out.is_contiguous() and is_aligned(out)):
        return {}
    return {"out": out.view(out.shape[0], *middle, heads, VALUE_DIM)}


def _wheel_reasons(problem: AttentionProblem) -> list[str]:
    """What the installed build lacks. Only asked where a GPU could run it."""
    if problem.device != "cuda" or problem.arch not in ARCHS or FLASH_MLA.reason is not None:
        return []
    module = FLASH_MLA.load()
    takes = parameters(module.flash_mla_with_kvcache)
    if "extra_k_cache" not in takes:
        return [f"flash_mla at {FLASH_MLA.path} has no extra_k_cache: it predates DeepSeek-V4"]
    if problem.arch == "sm_107" and "use_legacy" not in takes:
        # Every build's dispatch takes any SM100, but only this wheel was seen to carry code for it.
        return [f"flash_mla at {FLASH_MLA.path} may have no code for sm_107, need sgl-flash-mla 1.0.0"]
    if "use_legacy" in takes:
        if not module.has_legacy():
            return [f"flash_mla at {FLASH_MLA.path} was built without its legacy kernels, which read DSv4 pages"]
    elif "enable_batch_invariant" in takes and "out" not in takes:
        return _dropped(problem)
    return []


def _dropped(problem: AttentionProblem) -> list[str]:
    """What upstream left out with its 2026.09.30 release: every page but V4.1's, SM90, and rows of 576 values."""
    build = f"flash_mla at {FLASH_MLA.path} is upstream's 2026.09.30 release or later, which dropped"
    rows = problem.op == "sparse_mla_prefill"
    if not rows and any(cache.layout not in BF16_LAYOUTS for cache in problem.caches):
        return [f"{build} DSv4 pages"]
    reasons = []
    if problem.arch == "sm_90":
        reasons.append(f"{build} SM90")
    if problem.head_dim != VALUE_DIM:
        reasons.append(f"{build} head_dim {problem.head_dim}, need {VALUE_DIM}")
    return reasons


def _reads_v41(problem: AttentionProblem) -> bool:
    return any(cache.layout in V41_LAYOUTS for cache in problem.caches)


def _v41_reasons(problem: AttentionProblem) -> list[str]:
    """Why V4.1's kernels cannot read these caches. The build is asked where a GPU could run it."""
    names = tuple(cache.layout for cache in problem.caches)
    reasons = []
    if names not in V41_CACHES:
        need = f"{V41_LAYOUTS[0]}, alone or with an extra cache of {' or '.join(V41_LAYOUTS)}"
        reasons.append(f"caches of {' and '.join(names)}, need {need}")
    if problem.device == "cuda" and problem.arch in ARCHS and FLASH_MLA.reason is None:
        if problem.arch == "sm_90":
            reasons.append("arch is sm_90, need SM100 for V4.1's pages")
        elif "enable_batch_invariant" not in parameters(FLASH_MLA.load().flash_mla_with_kvcache):
            reasons.append(f"flash_mla at {FLASH_MLA.path} predates 2026.09.30, whose kernels read V4.1's pages")
    return reasons


def _decode_reasons(problem: AttentionProblem) -> list[str]:
    if _reads_v41(problem):
        reasons = _v41_reasons(problem)
    else:
        reasons = _wheel_reasons(problem)
        if len(problem.caches) == 2 and any(cache.layout != layouts.DSV4.name for cache in problem.caches):
            names = " and ".join(cache.layout for cache in problem.caches)
            reasons.append(f"two caches of {names}, need {layouts.DSV4.name} for both, or one cache")
    for cache in problem.caches:
        if cache.pages * cache.page_size > 2**31 - 1:
            reasons.append(f"cache has {cache.pages * cache.page_size} slots, need < 2**31")
        if cache.layout in BF16_LAYOUTS:
            packed = layouts.by_name(cache.layout).page_stride(cache.page_size)
            if cache.page_stride != packed:
                reasons.append(f"page stride is {cache.page_stride}, need {packed}: it reads bf16 pages as rows")
            continue
        if cache.page_stride > 2**31 - 1:
            reasons.append(f"page stride is {cache.page_stride} bytes, need < 2**31")
        alignment = layouts.ALIGNMENT
        if problem.arch != "sm_90":
            alignment = SM100_PAGE_ALIGNMENT.get(cache.layout, alignment)
        if cache.pages > 1 and cache.page_stride % alignment:
            where = "" if problem.arch == "sm_90" else " on SM100"
            reasons.append(f"page stride is {cache.page_stride}, need a multiple of {alignment}{where}")
    return reasons + needs_triton("its index pass")


def _prefill_reasons(problem: AttentionProblem) -> list[str]:
    return _wheel_reasons(problem) + needs_triton("its index pass")


def _padded_heads(heads: int, counts: tuple[int, ...] = HEADS) -> int:
    return next(h for h in counts if heads <= h)


def prefill_heads(arch: str, module: Any) -> tuple[int, ...]:
    """The head counts that prefill takes: vLLM's copy has more on SM90 since both entry points tell it."""
    newer = "enable_batch_invariant" in parameters(module.flash_mla_with_kvcache)
    small = arch == "sm_90" and newer and "out" in parameters(module.flash_mla_sparse_fwd)
    return SMALL_HEADS + HEADS if small else HEADS


def _padded(call: AttentionCall, counts: tuple[int, ...] = HEADS) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q and sink of a head count FlashMLA has: a view where q is as wide, whatever its other heads hold."""
    q, sink = call.q, call.attn_sink
    padded = _padded_heads(call.heads, counts)
    if q.shape[1] > padded:
        q = q[:, :padded]
    elif q.shape[1] < padded:
        q = torch.nn.functional.pad(queries(call), (0, 0, 0, padded - call.heads))
    if sink is not None and sink.shape[0] != padded:
        sink = sink[:padded] if sink.shape[0] > padded else torch.nn.functional.pad(sink, (0, padded - sink.shape[0]))
    # Tensor maps describe q: an address and strides of 16 bytes.
    return aligned(q), sink


def _servers_view(cache: PagedCache) -> torch.Tensor:
    """The cache as FlashMLA takes it; one page of zeros where it has none."""
    view = cache.servers_view
    return view if cache.pages else view.new_zeros(1, *view.shape[1:])


def _indices_for(
    indices: torch.Tensor, lens: torch.Tensor | None, capacity: int, multiple: int, trusted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Indices as FlashMLA may have them: its own width, int32, and nothing but -1 or in range."""
    ready = indices.dtype == torch.int32 and indices.shape[1] > 0 and indices.shape[1] % multiple == 0
    ready = ready and is_aligned(indices, INDEX_ALIGNMENT, INDEX_ALIGNMENT)
    if trusted and ready and (lens is None or (lens.dtype == torch.int32 and lens.is_contiguous())):
        return indices, lens
    from ..common.kernels.indices import sanitize_indices

    return sanitize_indices(indices, lens, capacity, multiple)


def decode(call: DecodeCall) -> Result:
    """``flash_mla_with_kvcache``, batches past its limits split.

    bf16 pages go to ``flash_mla_sparse_fwd``, to which slots are rows. Every layout it reads stores its scales.
    """
    swa = call.swa
    if swa.cache.layout.name in BF16_LAYOUTS:
        kv = swa.cache.page_bytes.view(torch.bfloat16).view(-1, call.q.shape[2])
        # Decode's promise says nothing of what stands past a span, and there a NaN row would poison this kernel.
        trusted = call.trusted and swa.lens is None
        return prefill(PrefillCall(
            call.q, kv, swa.indices, swa.lens, call.attn_sink, call.softmax_scale, call.out, call.heads, call.lse,
            trusted,
        ))  # fmt: skip
    step = max_batch(_padded_heads(call.heads), platform.limits(call.q.device).shared_memory)
    if call.q.shape[0] <= step:
        # No slicing: in a small call each view costs a microsecond or two of the host's time.
        return _decode_part(call, call.schedule, 0)
    return in_parts(call, step, lambda part, start: _decode_part(part, call.schedule, start))


def _decode_part(call: DecodeCall, schedule: dict[Any, Any] | None, start: int) -> Result:
    """One call of FlashMLA's, for the tokens from ``start`` on."""
    swa, extra = call.swa, call.extra
    q, attn_sink = _padded(call)
    takes_lens = swa.cache.layout.name != layouts.DSV32.name
    # Where the kernel takes no lengths, the pass over the indices makes -1 of what stands past them.
    trusted = call.trusted and (takes_lens or swa.lens is None)
    multiple = V41_WIDTH if swa.cache.layout.name in V41_LAYOUTS else DECODE_WIDTH
    indices, lens = _indices_for(swa.indices, swa.lens, swa.cache.capacity, multiple, trusted)
    if not takes_lens:
        lens = None
    e_indices = e_lens = None
    shapes: tuple[Any, ...] = (q.shape, swa.cache.page_size, indices.shape[1])
    if extra is not None:
        e_indices, e_lens = _indices_for(extra.indices, extra.lens, extra.cache.capacity, multiple, trusted)
        shapes += (extra.cache.page_size, e_indices.shape[1])
    function = FLASH_MLA.load().flash_mla_with_kvcache
    values, lse = function(
        # A token's one query has the token's stride: SM100 asks for a divisor of it, and takes no other.
        q=q.as_strided((len(q), 1, *q.shape[1:]), (q.stride(0), *q.stride())),
        k_cache=_servers_view(swa.cache),
        block_table=None,
        cache_seqlens=None,
        head_dim_v=VALUE_DIM,
        tile_scheduler_metadata=_scheduler(schedule, q.device, (start, *shapes)),
        softmax_scale=call.softmax_scale,
        is_fp8_kvcache=True,
        indices=indices.unsqueeze(1),
        attn_sink=attn_sink,
        extra_k_cache=None if extra is None else _servers_view(extra.cache),
        extra_indices_in_kvcache=None if e_indices is None else e_indices.unsqueeze(1),
        topk_length=lens,
        extra_topk_length=e_lens,
        **_options(function, swa.cache.layout.name),
        **_out(function, call, q.shape[1], 1),
    )
    return deliver(call, values.squeeze(1), lse.squeeze(2))


def _scheduler(schedule: dict[Any, Any] | None, device: torch.device, shapes: tuple[Any, ...]) -> Any:
    """FlashMLA's scheduler object, which it fills on first use and checks for shapes but not for lengths.

    It is shared only through a ``schedule`` whose lifetime is its lengths', under all the shapes it depends on. Under
    graph capture each call fills its own, so that a replay recomputes it from the lengths it then finds; unless the
    schedule is the graph's too, whose replays then recompute it once.
    """
    metadata = FLASH_MLA.load().get_mla_metadata
    if schedule is None or capturing(device) != schedule.get("captured", False):
        return metadata()[0]
    key = ("flash_mla", device, *shapes)
    kept = schedule.get(key)
    if kept is None:
        kept = schedule[key] = metadata()[0]
    return kept


def prefill(call: PrefillCall) -> Result:
    """``flash_mla_sparse_fwd``."""
    module = FLASH_MLA.load()
    function = module.flash_mla_sparse_fwd
    q, attn_sink = _padded(call, prefill_heads(platform.limits(call.q.device).arch, module))
    kv = call.kv
    indices, lens = _indices_for(call.indices, call.lens, kv.shape[0], PREFILL_WIDTH, call.trusted)
    kv = aligned(kv) if kv.shape[0] else kv.new_zeros(1, kv.shape[1])
    values, _, lse = function(
        q=q,
        kv=kv.unsqueeze(1),
        indices=indices.unsqueeze(1),
        sm_scale=call.softmax_scale,
        d_v=VALUE_DIM,
        attn_sink=attn_sink,
        topk_length=lens,
        **_options(function),
        **_out(function, call, q.shape[1]),
    )
    return deliver(call, values, lse)


# Where no table was measured: a short call, and the rate of long batches, of an H200.
_RATES = {"sparse_mla_decode": (17.0, 300e6), "sparse_mla_prefill": (20.0, 480e6)}

# Microseconds of padding heads around prefill, a call, a token, and a token and head: of an H200
# (benchmarks/results/prefill-kernels-h200.json). The tables hold none, they were measured at 64 and 128 heads.
_PADDING = (8.0, 0.02, 0.0025)
# Decode's, a call and a token: of an H100 in graphs, 8 to 32 heads (benchmarks/results/decode-choice-h100.json).
_DECODE_PADDING = (10.0, 0.09)


def padding_us(problem: AttentionProblem) -> float:
    """What copies of q and of the output take where heads are padded; 0 elsewhere."""
    if problem.heads in HEADS:
        return 0.0
    if problem.op == "sparse_mla_decode":
        call, token = _DECODE_PADDING
        return call + problem.tokens * token
    call, token, head = _PADDING
    return call + problem.tokens * (token + head * problem.heads)


# A copy of the result into the caller's buffer, which most builds do not take: a call, and bytes read and written a
# microsecond, of an H100 (benchmarks/results/decode-step-h100.json: what `out` cost at 128 heads).
_COPY = (1.5, 3.2e6)


def _copy_us(problem: AttentionProblem) -> float:
    """What it takes to copy the result to its place; where heads are padded, the padding's copy brings it there."""
    if not problem.out or problem.heads not in HEADS:
        return 0.0
    name = "flash_mla_with_kvcache" if problem.op == "sparse_mla_decode" else "flash_mla_sparse_fwd"
    if FLASH_MLA.reason is None and "out" in parameters(getattr(FLASH_MLA.load(), name)):
        return 0.0
    call, rate = _COPY
    return call + 4.0 * problem.tokens * problem.heads * VALUE_DIM / rate


# In a captured graph layers that share lengths schedule themselves once: 10 us of an H100, over at least four layers.
_SCHEDULING_US = 2.5
# What padding q and cutting the output takes of the host in an eager decode call.
_PADDING_HOST_US = 45.0


def _host_us(problem: AttentionProblem) -> float:
    padded = problem.op == "sparse_mla_decode" and problem.heads not in HEADS
    return costs.kernel_host_us(problem, "flash_mla") + (_PADDING_HOST_US if padded else 0.0)


def _predicted_us(problem: AttentionProblem) -> float:
    scheduling = _SCHEDULING_US if problem.capturing and problem.op == "sparse_mla_decode" else 0.0
    return _kernel_us(problem) + padding_us(problem) + _copy_us(problem) + scheduling


def _kernel_us(problem: AttentionProblem) -> float:
    """Infinite for V4.1's pages, so that their kernels are not picked unasked."""
    if _reads_v41(problem):
        return float("inf")
    padded = next((h for h in HEADS if problem.heads <= h), HEADS[-1])
    table = costs.table_of(problem.arch)
    if table is not None:
        op, width = problem.op.removeprefix("sparse_mla_"), problem.entries_read
        if op == "decode":
            # However few entries there are, a scope takes a block.
            width = max(width, DECODE_WIDTH * len(problem.caches))
        rows = problem.rows or max((cache.pages * cache.page_size for cache in problem.caches), default=1)
        return costs.kernel_us(table, op, padded, problem.tokens, width, rows)
    call, rate = _RATES[problem.op]
    return call + problem.attention_flops * padded / max(problem.heads, 1) / rate


_SCHEDULE_BYTES = 32
"""A scheduler's words for each of its parts of a multiprocessor's work."""


def _index_bytes(tokens: int, width: int, multiple: int) -> int:
    return tensor_bytes(tokens * max(1, -(-width // multiple)) * multiple, 4) + tensor_bytes(tokens, 4)


def _around_bytes(problem: AttentionProblem, tokens: int) -> int:
    """q and the sink padded or aligned, and FlashMLA's own outputs: its values, lse and largest logits."""
    heads = _padded_heads(problem.heads)
    rows = tokens * heads
    values = tensor_bytes(rows * problem.head_dim, 2) + tensor_bytes(rows * VALUE_DIM, 2)
    return values + 2 * tensor_bytes(rows, 4) + tensor_bytes(heads, 4)


def _prefill_scratch(problem: AttentionProblem) -> int:
    """A copy of a workspace that is off its alignment is not counted."""
    return _around_bytes(problem, problem.tokens) + _index_bytes(problem.tokens, problem.width, PREFILL_WIDTH)


def _decode_scratch(problem: AttentionProblem) -> int:
    """What ``sparse_attn_decode_interface`` allocates for one part of the batch, and what is made for it."""
    if any(cache.layout in BF16_LAYOUTS for cache in problem.caches):
        return _prefill_scratch(problem)
    heads = _padded_heads(problem.heads)
    tokens = min(problem.tokens, _MAX_PARTIAL_ELEMENTS // (heads * VALUE_DIM))
    # One for each token, and for each multiprocessor one more at most.
    parts = multiprocessors(problem.device, problem.arch)
    splits = (tokens + parts) * heads
    partial = tensor_bytes(splits * VALUE_DIM, 4) + tensor_bytes(splits, 4)
    schedule = tensor_bytes(parts, _SCHEDULE_BYTES) + tensor_bytes(tokens + 1, 4)
    multiple = V41_WIDTH if _reads_v41(problem) else DECODE_WIDTH
    rows = _index_bytes(tokens, problem.width, multiple)
    if len(problem.caches) > 1:
        rows += _index_bytes(tokens, problem.extra_width, multiple)
    return partial + schedule + rows + _around_bytes(problem, tokens)


def register_kernels() -> None:
    """Add FlashMLA's two kernels to the ops they serve."""
    for op, run, reasons, names, scratch in (
        ("sparse_mla_decode", decode, _decode_reasons, DECODE_LAYOUTS, _decode_scratch),
        ("sparse_mla_prefill", prefill, _prefill_reasons, (), _prefill_scratch),
    ):
        register(
            Kernel(
                op,
                "flash_mla",
                run,
                _predicted_us,
                library=FLASH_MLA,
                archs=ARCHS,
                layouts=names,
                max_heads=HEADS[-1],
                scratch_bytes=scratch,
                host_us=_host_us,
                further_reasons=reasons,
            )
        )
