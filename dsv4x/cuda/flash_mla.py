"""FlashMLA on SM90 and SM100: its limits met here, so that they never reach the caller.

Read from FlashMLA 9241ae3 and the ``sgl-flash-mla`` 1.0.0 wheel, and measured on an H200:
64 or 128 heads; index widths in multiples of 64 (decode) and 128 (prefill); int32 indices of which only -1 is invalid
(decode); at least one token, page and row; a scheduler kernel whose shared memory grows with the batch. DSv3.2 pages
are read without lengths and without an extra cache. bf16 pages are rows to the prefill kernel.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..common.core import layouts
from ..common.core.layouts import PagedCache
from ..common.core.model import VALUE_DIM
from ..common.core.platform import platform
from ..common.core.vendor import TRITON, VendorLibrary
from ..common.dispatch import costs
from ..common.dispatch.problem import AttentionProblem
from ..common.dispatch.registry import Kernel, register

FLASH_MLA = VendorLibrary(
    "flash_mla",
    ("sgl-flash-mla", "flash-mla", "flash_mla"),
    attributes=("flash_mla_with_kvcache", "flash_mla_sparse_fwd", "get_mla_metadata"),
    hint="pip install sgl-flash-mla",
)

ARCHS = ("sm_90", "sm_100", "sm_103")
HEADS = (64, 128)
DECODE_WIDTH = 64
PREFILL_WIDTH = 128
SM100_PAGE_ALIGNMENT = {layouts.DSV4.name: 576, layouts.DSV32.name: 656}
BF16_LAYOUTS = (layouts.BF16_512.name, layouts.BF16_576.name)
DECODE_LAYOUTS = (layouts.DSV4.name, layouts.DSV32.name, *BF16_LAYOUTS)

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


@functools.cache
def _options(function: Callable[..., Any]) -> dict[str, bool]:
    """What an entry point takes to reach the V4 kernels: newer wheels moved them behind ``use_legacy``."""
    return {"use_legacy": True} if "use_legacy" in inspect.signature(function).parameters else {}


def _wheel_reasons(problem: AttentionProblem) -> list[str]:
    """What the installed build lacks. Only asked where a GPU could run it."""
    if problem.device != "cuda" or problem.arch not in ARCHS or FLASH_MLA.reason is not None:
        return []
    module = FLASH_MLA.load()
    parameters = inspect.signature(module.flash_mla_with_kvcache).parameters
    if "extra_k_cache" not in parameters:
        return [f"flash_mla at {FLASH_MLA.path} has no extra_k_cache: it predates DeepSeek-V4"]
    if "use_legacy" in parameters:
        if not module.has_legacy():
            return [f"flash_mla at {FLASH_MLA.path} was built without its legacy kernels, which read DSv4 pages"]
    elif "enable_batch_invariant" in parameters:
        return [f"flash_mla at {FLASH_MLA.path} is upstream's 2026.09.30 release or later, which dropped DSv4 pages"]
    return []


def _decode_reasons(problem: AttentionProblem) -> list[str]:
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
        alignment = SM100_PAGE_ALIGNMENT.get(cache.layout, 1)
        if problem.arch != "sm_90" and cache.page_stride % alignment:
            reasons.append(f"page stride is {cache.page_stride}, need a multiple of {alignment} on SM100")
    return reasons + _triton_missing()


def _prefill_reasons(problem: AttentionProblem) -> list[str]:
    return _wheel_reasons(problem) + _triton_missing()


def _triton_missing() -> list[str]:
    return [f"its index pass needs triton: {TRITON.reason}"] if TRITON.reason else []


def _pad_heads(q: torch.Tensor, attn_sink: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    heads = q.shape[1]
    padded = next(h for h in HEADS if heads <= h)
    if padded == heads:
        return q, attn_sink
    q = torch.nn.functional.pad(q, (0, 0, 0, padded - heads))
    return q, None if attn_sink is None else torch.nn.functional.pad(attn_sink, (0, padded - heads))


def _deliver(
    values: torch.Tensor, lse: torch.Tensor, heads: int, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop padded heads; results are contiguous or in the caller's buffer."""
    if heads != values.shape[1]:
        values, lse = values[:, :heads], lse[:, :heads]
    return values.contiguous() if out is None else out.copy_(values), lse.contiguous()


def _servers_view(cache: PagedCache) -> torch.Tensor:
    """The cache as FlashMLA takes it; one page of zeros where it has none."""
    view = cache.servers_view
    return view if cache.pages else view.new_zeros(1, *view.shape[1:])


def _indices_for(
    indices: torch.Tensor, lens: torch.Tensor | None, capacity: int, multiple: int, trusted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Indices as FlashMLA may have them: its own width, int32, and nothing but -1 or in range."""
    ready = indices.dtype == torch.int32 and indices.shape[1] > 0 and indices.shape[1] % multiple == 0
    if trusted and ready and (lens is None or (lens.dtype == torch.int32 and lens.is_contiguous())):
        return indices, lens
    from ..common.kernels.indices import sanitize_indices

    return sanitize_indices(indices, lens, capacity, multiple)


def decode(
    q: torch.Tensor,
    swa_cache: PagedCache,
    swa_indices: torch.Tensor,
    swa_lens: torch.Tensor | None,
    extra_cache: PagedCache | None,
    extra_indices: torch.Tensor | None,
    extra_lens: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    softmax_scale: float,
    out: torch.Tensor | None,
    *,
    trusted_indices: bool = False,
    schedule: dict[Any, Any] | None = None,
    swa_k_scale: float = 1.0,
    extra_k_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``flash_mla_with_kvcache``, batches past its limits split. Arguments as in :func:`dsv4x.sparse_mla_decode`.

    bf16 pages go to ``flash_mla_sparse_fwd``, to which slots are rows. Every layout it reads stores its scales.
    """
    if swa_cache.layout.name in BF16_LAYOUTS:
        kv = swa_cache.page_bytes.view(torch.bfloat16).view(-1, q.shape[2])
        # Decode's promise says nothing of what stands past a span, and there a NaN row would poison this kernel.
        trusted = trusted_indices and swa_lens is None
        return prefill(q, kv, swa_indices, swa_lens, attn_sink, softmax_scale, out, trusted_indices=trusted)
    heads = q.shape[1]
    q, attn_sink = _pad_heads(q, attn_sink)
    takes_lens = swa_cache.layout.name != layouts.DSV32.name
    # Where the kernel takes no lengths, the pass over the indices makes -1 of what stands past them.
    trusted_indices = trusted_indices and (takes_lens or swa_lens is None)
    indices, lens = _indices_for(swa_indices, swa_lens, swa_cache.capacity, DECODE_WIDTH, trusted_indices)
    if not takes_lens:
        lens = None
    e_indices = e_lens = None
    if extra_cache is not None and extra_indices is not None:
        e_indices, e_lens = _indices_for(extra_indices, extra_lens, extra_cache.capacity, DECODE_WIDTH, trusted_indices)
    step = max_batch(q.shape[1], platform.limits(q.device).shared_memory)
    caches = (swa_cache, extra_cache)
    if q.shape[0] <= step:
        # No slicing: in a small call each view costs a microsecond or two of the host's time.
        rows = (q, indices, lens, e_indices, e_lens)
        return _decode_rows(rows, caches, attn_sink, softmax_scale, schedule, 0, heads, out)
    if out is None:
        out = torch.empty(q.shape[0], heads, VALUE_DIM, dtype=q.dtype, device=q.device)
    parts = []
    for at in range(0, q.shape[0], step):
        block = slice(at, at + step)
        rows = (
            q[block], indices[block], None if lens is None else lens[block],
            None if e_indices is None else e_indices[block], None if e_lens is None else e_lens[block],
        )  # fmt: skip
        parts.append(_decode_rows(rows, caches, attn_sink, softmax_scale, schedule, at, heads, out[block])[1])
    return out, torch.cat(parts)


def _decode_rows(
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    caches: tuple[PagedCache, PagedCache | None],
    attn_sink: torch.Tensor | None,
    softmax_scale: float,
    schedule: dict[Any, Any] | None,
    start: int,
    heads: int,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call, for the tokens from ``start`` on: q, window indices and lengths, extra indices and lengths."""
    q, indices, lens, extra_indices, extra_lens = rows
    swa_cache, extra_cache = caches
    if extra_indices is None:
        extra_cache = None
    function = FLASH_MLA.load().flash_mla_with_kvcache
    values, lse = function(
        q.unsqueeze(1),
        _servers_view(swa_cache),
        None,
        None,
        VALUE_DIM,
        _scheduler(schedule, q, swa_cache, indices, extra_cache, extra_indices, start),
        None,
        softmax_scale,
        False,
        True,
        indices.unsqueeze(1),
        attn_sink,
        None if extra_cache is None else _servers_view(extra_cache),
        None if extra_indices is None else extra_indices.unsqueeze(1),
        lens,
        extra_lens,
        **_options(function),
    )
    return _deliver(values.squeeze(1), lse.squeeze(2), heads, out)


def _scheduler(
    schedule: dict[Any, Any] | None,
    q: torch.Tensor,
    swa_cache: PagedCache,
    indices: torch.Tensor,
    extra_cache: PagedCache | None,
    extra_indices: torch.Tensor | None,
    start: int,
) -> Any:
    """FlashMLA's scheduler object, which it fills on first use and checks for shapes but not for lengths.

    It is shared only through a ``schedule`` whose lifetime is its lengths', under all the shapes it depends on. Under
    graph capture each call fills its own, so that a replay recomputes it from the lengths it then finds; unless the
    schedule is the graph's too, whose replays then recompute it once.
    """
    metadata = FLASH_MLA.load().get_mla_metadata
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    if schedule is None or capturing != schedule.get("captured", False):
        return metadata()[0]
    key = (
        "flash_mla",
        start,
        q.shape,
        q.device,
        swa_cache.page_size,
        indices.shape[1],
        None if extra_cache is None else extra_cache.page_size,
        None if extra_indices is None else extra_indices.shape[1],
    )
    kept = schedule.get(key)
    if kept is None:
        kept = schedule[key] = metadata()[0]
    return kept


def prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lens: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    softmax_scale: float,
    out: torch.Tensor | None,
    *,
    trusted_indices: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``flash_mla_sparse_fwd``. Arguments as in :func:`dsv4x.sparse_mla_prefill`."""
    function = FLASH_MLA.load().flash_mla_sparse_fwd
    heads = q.shape[1]
    q, attn_sink = _pad_heads(q, attn_sink)
    indices, lens = _indices_for(indices, lens, kv.shape[0], PREFILL_WIDTH, trusted_indices)
    if kv.shape[0] == 0:
        kv = kv.new_zeros(1, kv.shape[1])
    values, _, lse = function(
        q, kv.unsqueeze(1), indices.unsqueeze(1), softmax_scale, VALUE_DIM, attn_sink, lens, **_options(function)
    )
    return _deliver(values, lse, heads, out)


# Where no table was measured: a short call, and the rate of long batches, of an H200.
_RATES = {"sparse_mla_decode": (17.0, 300e6), "sparse_mla_prefill": (20.0, 480e6)}

# Microseconds of padding heads around prefill, a call, a token, and a token and head: of an H200
# (benchmarks/results/prefill-kernels-h200.json). The tables hold none, they were measured at 64 and 128 heads.
_PADDING = (8.0, 0.02, 0.0025)


def padding_us(problem: AttentionProblem) -> float:
    """What prefill's copies of q and of the output take where heads are padded; 0 elsewhere."""
    if problem.op != "sparse_mla_prefill" or problem.heads in HEADS:
        return 0.0
    call, token, head = _PADDING
    return call + problem.tokens * (token + head * problem.heads)


# In a captured graph a call schedules itself anew, but where the graph builds the metadata too: of an H200.
_SCHEDULING_US = 16.0


def _predicted_us(problem: AttentionProblem) -> float:
    scheduling = _SCHEDULING_US if problem.capturing and problem.op == "sparse_mla_decode" else 0.0
    return _kernel_us(problem) + padding_us(problem) + scheduling


def _kernel_us(problem: AttentionProblem) -> float:
    padded = next((h for h in HEADS if problem.heads <= h), HEADS[-1])
    table = costs.table_of(problem.arch)
    if table is not None:
        op, width = problem.op.removeprefix("sparse_mla_"), problem.entries or problem.width + problem.extra_width
        if op == "decode":
            # However few entries there are, a scope takes a block.
            width = max(width, DECODE_WIDTH * len(problem.caches))
        rows = problem.rows or max((cache.pages * cache.page_size for cache in problem.caches), default=1)
        return costs.kernel_us(table, op, padded, problem.tokens, width, rows)
    call, rate = _RATES[problem.op]
    return call + problem.attention_flops * padded / max(problem.heads, 1) / rate


def register_kernels() -> None:
    """Add FlashMLA's two kernels to the ops they serve."""
    for op, run, reasons, names in (
        ("sparse_mla_decode", decode, _decode_reasons, DECODE_LAYOUTS),
        ("sparse_mla_prefill", prefill, _prefill_reasons, ()),
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
                host_us=functools.partial(costs.kernel_host_us, kernel="flash_mla"),
                further_reasons=reasons,
            )
        )
