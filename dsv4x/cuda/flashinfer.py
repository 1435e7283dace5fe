"""FlashInfer's trtllm-gen sparse MLA decode on SM100: DeepSeek-V3.2's dense caches, q of 576 values, values of 512.

Read from the ``flashinfer-python`` wheels 0.6.15 to 0.7.2.post1 and the kernel list of ``flashinfer-cubin`` 0.6.13: q
and cache are both e4m3 or both bf16; 8, 16, 32, 64 or 128 heads; pages of 32 or 64 entries, back to back; index rows
whose entries stand before any -1; an lse in base 2, in which a sink is counted when one is given.

No Blackwell GPU was used. The call is checked on a CPU against FlashInfer's signatures, its Python side, and what its
C++ launcher demands (``tests/test_flashinfer.py``); what the kernels compute has not been seen.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from ..common.core import encodings, layouts
from ..common.core.calls import DecodeCall, Result, deliver, in_parts, queries, sinks
from ..common.core.layouts import PagedCache
from ..common.core.model import VALUE_DIM
from ..common.core.vendor import VendorLibrary, aligned, parameters
from ..common.dispatch.problem import AttentionProblem
from ..common.dispatch.registry import Kernel, refuse, register
from ..common.kernels.scratch import tensor_bytes

FLASHINFER = VendorLibrary(
    "flashinfer",
    ("flashinfer-python",),
    attributes=("mla",),
    hint="pip install 'dsv4x[flashinfer]'; see docs/dependencies.md",
)

FUNCTION = "trtllm_batch_decode_with_kv_cache_mla"
# The list of flashinfer-cubin names its kernels for the family, Sm100f.
ARCHS = ("sm_100", "sm_103")
LAYOUTS = (layouts.TRTLLM_NATIVE.name, layouts.BF16_576.name)
HEADS = (8, 16, 32, 64, 128)
PAGE_SIZES = (32, 64)
HEAD_DIM = 576
# The launcher asks for a multiple of 4. A whole tile of 128 keys never reaches into the next row, and FlashInfer's own
# tests run 128 and 2048 only.
WIDTH = 128

BY_NAME_ONLY = (
    "it rounds q and the softmax weights to e4m3 where the cache is e4m3, and no Blackwell GPU has run it for dsv4x"
)

# What an older release lacks, and what that means.
_NEEDED = {
    "sparse_mla_top_k": "it has no sparse decode",
    "return_lse": "it returns no lse, and sparse_mla_decode does",
    "multi_ctas_kv_counter_buffer": "its counters stand in the workspace, to be zeroed before each call",
}
_ARGUMENTS = (
    "query",
    "kv_cache",
    "workspace_buffer",
    "qk_nope_head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "block_tables",
    "seq_lens",
    "max_seq_len",
    "sparse_mla_top_k",
    "bmm1_scale",
    "bmm2_scale",
    "backend",
    "return_lse",
)

# The launcher takes 256 slots of 8 bytes a token and head for the lse, plus a guard of 1 MiB, from the workspace.
_STATS_BYTES = 256 * 8
_GUARD_BYTES = 1 << 20
_MAX_STATS_BYTES = 1 << 28
# Moving entries to the front of their rows takes some int64 an index.
_MAX_INDICES = 1 << 24
# The rest is scratch, whose size the launcher does not check: one tile of 64 heads for each of at most as many CTAs as
# there are SMs (160 on a B300), 512 partial values and two statistics a head, is 20 MiB in float32.
_SCRATCH_BYTES = 64 << 20


def max_batch(heads: int, width: int) -> int:
    """Tokens one call may take, so that its lse's workspace and its index rows stay within 256 MiB or so each."""
    return max(1, min(_MAX_STATS_BYTES // (_STATS_BYTES * heads), _MAX_INDICES // max(1, width)))


def workspace_bytes(tokens: int, heads: int) -> int:
    """Bytes of workspace for one call."""
    return _STATS_BYTES * tokens * heads + _GUARD_BYTES + _SCRATCH_BYTES


def compact_indices(
    indices: torch.Tensor, lens: torch.Tensor | None, capacity: int, multiple: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row's entries moved to its front, in their order, before a tail of -1.

    trtllm-gen reads as many indices of a row as its length says, from the front, and takes none of them for a hole.

    Args:
        indices: int32 or int64 ``[T, w]``, index space *slot*; outside ``[0, capacity)`` or past its row's length it is
            no entry.
        lens: int ``[T]`` scan spans or None.
        capacity: slots, < 2**31.
        multiple: the rows' width becomes a positive multiple of it.

    Returns:
        int32 ``[T, ceil(w / multiple) * multiple]`` and int32 ``[T]``, the entries of each row.
    """
    tokens, width = indices.shape
    valid = (indices >= 0) & (indices < capacity)
    if lens is not None:
        valid &= torch.arange(width, dtype=torch.int64, device=indices.device) < lens[:, None]
    padded = max(1, -(-width // multiple)) * multiple
    # A row with a hole leaves its last column free, so that column takes every hole's -1.
    column = torch.where(valid, valid.cumsum(1) - 1, padded - 1)
    rows = torch.full((tokens, padded), -1, dtype=torch.int32, device=indices.device)
    rows.scatter_(1, column, torch.where(valid, indices, -1).int())
    return rows, valid.sum(1, dtype=torch.int32)


def quantize_query(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q in e4m3 and the scale that goes with it.

    The kernel takes one scale a call. A power of two keeps a token's rounding independent of the tokens beside it, but
    for values more than 2**13 times smaller than the call's largest.

    Args:
        q: bf16, any shape.

    Returns:
        e4m3 of q's shape, contiguous, and float32 ``[1]``: q is about their product. What is NaN or infinite becomes
        NaN, and does not enter the scale.
    """
    finite = q.isfinite()
    amax = torch.where(finite, q, 0).abs().amax().float().view(1)
    # Never byte 0, a subnormal that kernels flush to zero.
    exponent = encodings.tile_scale_byte(amax, 1, layouts.TRTLLM_NATIVE.value_max)
    scale = encodings.decode_ue8m0(exponent.to(torch.uint8))
    # Division by a power of two is exact in bf16, so the only rounding is the one to e4m3.
    scaled = torch.where(finite, q / scale.to(q.dtype), torch.nan)
    return scaled.contiguous().to(torch.float8_e4m3fn), scale


def _function() -> Any:
    """FlashInfer's function, or None in releases that have it elsewhere."""
    return getattr(FLASHINFER.load().mla, FUNCTION, None)


def _options(function: Callable[..., Any]) -> dict[str, Any]:
    """What newer releases take besides: the lse's base, else 2 by a default that other backends read otherwise."""
    return {"return_lse_base": "base2"} if "return_lse_base" in parameters(function) else {}


def _release_reasons() -> list[str]:
    """What the installed release lacks, told by its signature."""
    if FLASHINFER.reason is not None:
        return []
    where = f"flashinfer at {FLASHINFER.path}"
    function = _function()
    if function is None:
        return [f"{where} has no flashinfer.mla.{FUNCTION}"]
    signature = inspect.signature(function)
    lacking = [f"no {name}: {why}" for name, why in _NEEDED.items() if name not in signature.parameters]
    if lacking:
        return [f"{FUNCTION} of {where} has {reason}" for reason in lacking]
    try:
        signature.bind(**dict.fromkeys(_ARGUMENTS))
    except TypeError as error:
        return [f"{FUNCTION} of {where} takes other arguments than the releases dsv4x was written for: {error}"]
    return []


def _decode_reasons(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.head_dim != HEAD_DIM:
        reasons.append(f"head_dim is {problem.head_dim}, need {HEAD_DIM}")
    if problem.extra_width or len(problem.caches) > 1:
        reasons.append("an extra cache is given, need none: it reads one cache a call")
    for cache in problem.caches:
        if cache.page_size not in PAGE_SIZES:
            reasons.append(f"page_size is {cache.page_size}, need {' or '.join(map(str, PAGE_SIZES))}")
        if cache.layout in LAYOUTS:
            packed = layouts.by_name(cache.layout).page_stride(cache.page_size)
            if cache.page_stride != packed:
                reasons.append(
                    f"page stride is {cache.page_stride} bytes, need {packed}: it reads slot i at i entries from the "
                    "first, so pages must stand back to back"
                )
        if cache.pages * cache.page_size > 2**31 - 1:
            reasons.append(f"cache has {cache.pages * cache.page_size} slots, need < 2**31")
    # Asked last, because asking imports FlashInfer.
    if reasons or problem.device != "cuda" or problem.arch not in ARCHS:
        return reasons
    return _release_reasons()


def _cache_view(cache: PagedCache) -> torch.Tensor:
    """The cache as FlashInfer takes it, ``[pages, 1, page_size, 576]``; one page of zeros where it has none."""
    dtype = torch.float8_e4m3fn if cache.layout.nope_dim else torch.bfloat16
    view = cache.page_bytes if cache.pages else cache.page_bytes.new_zeros(1, cache.page_bytes.shape[1])
    return view.view(dtype).view(-1, 1, cache.page_size, HEAD_DIM)


def decode(call: DecodeCall) -> Result:
    """``trtllm_batch_decode_with_kv_cache_mla``, each token a request of its own, long batches split.

    **It rounds q to e4m3 where the cache is e4m3**, because trtllm-gen multiplies values of one type; its own softmax
    weights are then e4m3 too. That is less exact than every other kernel of the op. A bf16 cache keeps q as it is.

    The sink is applied here: handed over, it would be part of the lse (``fmhaReduction.cu``), which excludes it.
    A row without entries is lent the pool's first one, because FlashInfer leaves an empty row's output unwritten, and
    what comes of it is replaced.

    A first call of a shape compiles, fetches and loads kernels, so make it before a graph is captured.

    ``trusted`` is of no use, as moving entries to the front of their rows also drops those out of range; neither is
    ``schedule``, as trtllm-gen plans on the device.

    Args:
        call: q of 576 values; one cache of layout ``trtllm-native`` or ``bf16 576``, pages of 32 or 64 entries, back
            to back, and no extra one.
    """
    step = max_batch(_padded_heads(call.heads), call.swa.indices.shape[1])
    if call.q.shape[0] <= step:
        return _decode_part(call)
    return in_parts(call, step, lambda part, start: _decode_part(part))


def _padded_heads(heads: int) -> int:
    return next(h for h in HEADS if heads <= h)


def _decode_part(call: DecodeCall) -> Result:
    function = _function()
    heads, swa = call.heads, call.swa
    padded = _padded_heads(heads)
    kv_cache = _cache_view(swa.cache)
    q = queries(call)
    if heads != padded:
        q = torch.nn.functional.pad(q, (0, 0, 0, padded - heads))
    indices, counts = compact_indices(swa.indices, swa.lens, swa.cache.capacity, WIDTH)
    empty = counts == 0
    indices[:, 0].masked_fill_(empty, 0)
    qk_scale: float | torch.Tensor = call.softmax_scale
    v_scale: float | torch.Tensor = 1.0
    if kv_cache.dtype == torch.float8_e4m3fn:
        q, q_scale = quantize_query(q)
        # Both on the device: its scale is known only there, and FlashInfer names them as a pair.
        qk_scale = q_scale * (call.softmax_scale * swa.k_scale)
        v_scale = torch.full_like(q_scale, swa.k_scale)
    values, log2_sum = function(
        query=aligned(q.contiguous())[:, None],
        kv_cache=kv_cache,
        workspace_buffer=torch.empty(workspace_bytes(len(q), padded), dtype=torch.uint8, device=q.device),
        # Of the model before absorption; names a key of FlashInfer's autotuner and nothing the kernel reads.
        qk_nope_head_dim=128,
        kv_lora_rank=VALUE_DIM,
        qk_rope_head_dim=HEAD_DIM - VALUE_DIM,
        block_tables=indices[:, None],
        seq_lens=counts.clamp_min(1),
        max_seq_len=indices.shape[1],
        sparse_mla_top_k=indices.shape[1],
        bmm1_scale=qk_scale,
        bmm2_scale=v_scale,
        backend="trtllm-gen",
        return_lse=True,
        **_options(function),
    )
    values, natural = values[:, 0, :heads], log2_sum[:, :heads] * math.log(2)
    sink = sinks(call)
    if sink is not None:
        values = values.float() / (1 + torch.exp(sink - natural))[..., None]
    values = values.masked_fill(empty[:, None, None], 0).to(call.q.dtype)
    return deliver(call, values, natural.masked_fill(empty[:, None], math.inf))


def _scratch(problem: AttentionProblem) -> int:
    """The workspace of one part of the batch, and what is made around it: index rows, q in e4m3, values in float32."""
    heads = _padded_heads(problem.heads)
    tokens = min(problem.tokens, max_batch(heads, problem.width))
    width = max(1, -(-problem.width // WIDTH)) * WIDTH
    rows = tokens * heads
    made = tensor_bytes(tokens * width, 64) + tensor_bytes(rows * HEAD_DIM, 14) + tensor_bytes(rows * VALUE_DIM, 16)
    return workspace_bytes(tokens, heads) + made + 4 * tensor_bytes(rows, 4)


def register_kernels() -> None:
    """Add the decode kernel, and say why there is no prefill one."""
    register(
        Kernel(
            "sparse_mla_decode",
            "flashinfer",
            decode,
            # Nobody has timed it, so nothing else is predicted to be slower.
            lambda problem: math.inf,
            library=FLASHINFER,
            archs=ARCHS,
            layouts=LAYOUTS,
            max_heads=HEADS[-1],
            by_name_only=BY_NAME_ONLY,
            scratch_bytes=_scratch,
            further_reasons=_decode_reasons,
        )
    )
    refuse("sparse_mla_prefill", "flashinfer", "trtllm-gen reads paged caches, and sparse_mla_prefill a workspace")
