"""The kernels every backend has: Triton's, imported on first use, and the torch reference."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from . import reference
from .core import layouts
from .core.ambient import without_grad
from .core.calls import DecodeCall, PrefillCall, Result, deliver, queries, sinks
from .core.platform import platform
from .core.vendor import TRITON
from .dispatch import costs
from .dispatch.problem import AttentionProblem, LogitsProblem, Problem, SelectionProblem
from .dispatch.registry import Kernel, refuse, register
from .kernels.decode_shapes import decode_config, most_splits
from .kernels.scratch import multiprocessors, partial_bytes, tensor_bytes

# Microseconds a call and FLOP a microsecond, over DSv4 entries, of an H200 (decode-kernels-h200.json of
# benchmarks/results). Up to 16 heads a call and an entry of a token are an H100's (decode-choice-h100.json).
_TRITON_DECODE_RATES = (20.0, 80e6)
_FEW_HEADS, _TRITON_FEW_HEADS_CALL, _TRITON_FEW_HEADS_ENTRY = 16, 9.0, 0.0065
# Gathering bounds few heads, a call and bytes a microsecond: 256 tokens of 640 entries take 131 us at 16 heads
# (decode-choice-h100.json).
_TRITON_DECODE_GATHER = (10.0, 0.75e6)
# Prefill's (benchmarks/results/prefill-kernels-h200.json): heads a program covers -> a call, the rate.
_TRITON_PREFILL_RATES = {16: (50.0, 116e6), 64: (50.0, 190e6)}
_OTHER_TRITON_US = 30.0
# Selection on an H100 (benchmarks/results/selection-triton-h100.json, narrow buffers): up to k 1024, and above.
_TRITON_TOPK = {
    1: (8.2, 16.6, 17.9, 26.3),
    4: (9.1, 17.6, 18.6, 29.9),
    16: (9.7, 18.0, 19.7, 37.6),
    64: (10.8, 19.5, 26.2, 56.3),
    256: (19.2, 36.3, 60.1, 146.0),
}
_TRITON_LARGE_TOPK = {
    1: (8.2, 30.8, 29.2, 28.9),
    4: (9.1, 31.4, 29.9, 31.5),
    16: (9.7, 32.9, 34.2, 38.0),
    64: (10.8, 34.3, 40.8, 57.2),
    256: (19.2, 57.6, 81.6, 148.9),
}
_REFERENCE_RATES = (200.0, 1e6)
_INTERPRETER_US = 1e9
# Nobody measured the reference on a GPU: there it comes after whatever else runs, however large the problem.
_REFERENCE_ON_GPU_US = 1e7


def _lazy(module: str, name: str) -> Callable[..., Any]:
    @functools.cache
    def launcher() -> Callable[..., Any]:
        return getattr(importlib.import_module(f".kernels.{module}", __package__), name)

    return lambda *args, **kwargs: launcher()(*args, **kwargs)


def _triton_us(problem: Problem) -> float:
    return _OTHER_TRITON_US + (_INTERPRETER_US if problem.interpreter else 0.0)


def _flops(problem: Problem) -> float:
    """What attention multiplies; every other op is predicted by its launch alone."""
    return problem.attention_flops if isinstance(problem, AttentionProblem) else 0.0


def _topk_triton_us(problem: SelectionProblem) -> float:
    us = costs.selection_us(_TRITON_TOPK if problem.k <= 1024 else _TRITON_LARGE_TOPK, problem)
    return us + (_INTERPRETER_US if problem.interpreter else 0.0)


def _triton_decode_us(problem: AttentionProblem) -> float:
    """The slower of products and gathers."""
    call, rate = _TRITON_DECODE_RATES
    started, gather_rate = _TRITON_DECODE_GATHER
    entry = max((layouts.described(cache.layout).entry_bytes for cache in problem.caches), default=0)
    gathered = problem.tokens * problem.entries_read * entry
    if problem.heads <= _FEW_HEADS:
        call = _TRITON_FEW_HEADS_CALL + _TRITON_FEW_HEADS_ENTRY * problem.entries_read
    us = max(call + problem.attention_flops / rate, started + gathered / gather_rate)
    return us + (_INTERPRETER_US if problem.interpreter else 0.0)


def _triton_prefill_us(problem: AttentionProblem) -> float:
    """Every program takes its block of heads for full: gathering bounds few heads, and products count rows."""
    block = 16 if problem.heads <= _FEW_HEADS else 64
    call, rate = _TRITON_PREFILL_RATES[block]
    flops = problem.attention_flops / max(problem.heads, 1) * -(-problem.heads // block) * block
    return call + flops / rate + (_INTERPRETER_US if problem.interpreter else 0.0)


def _reference_us(problem: Problem) -> float:
    call, rate = _REFERENCE_RATES
    return call + _flops(problem) / rate + (0.0 if problem.device == "cpu" else _REFERENCE_ON_GPU_US)


def _triton_reasons(problem: Problem) -> list[str]:
    if problem.device == "cpu" and not problem.interpreter:
        return ["device is cpu, need cuda or TRITON_INTERPRET=1 in the environment"]
    return []


def _reference_decode(call: DecodeCall) -> Result:
    swa, extra = call.swa, call.extra
    values, lse = reference.sparse_mla_decode(
        queries(call),
        swa.cache,
        swa.indices,
        swa.lens,
        None if extra is None else extra.cache,
        None if extra is None else extra.indices,
        None if extra is None else extra.lens,
        sinks(call),
        call.softmax_scale,
        swa_k_scale=swa.k_scale,
        extra_k_scale=1.0 if extra is None else extra.k_scale,
    )
    return deliver(call, values.to(call.q.dtype), lse)


def _reference_prefill(call: PrefillCall) -> Result:
    values, lse = reference.sparse_mla_prefill(
        queries(call), call.kv, call.indices, call.lens, sinks(call), call.softmax_scale
    )
    return deliver(call, values.to(call.q.dtype), lse)


def _triton_scratch(problem: AttentionProblem) -> int:
    """Partial outputs, of as many splits as a row may get."""
    if problem.op != "sparse_mla_decode":
        return 0
    config = decode_config(problem.arch, problem.heads, tuple(layouts.described(c.layout) for c in problem.caches))
    blocks = sum(-(-width // config.block_k) for width in (problem.width, problem.extra_width))
    at_once = config.resident * multiprocessors(problem.device, problem.arch)
    programs = problem.tokens * -(-problem.heads // config.block_h)
    splits = problem.split_k or most_splits(programs, blocks, at_once)
    return partial_bytes(problem.tokens, problem.heads, splits)


def _reference_scratch(problem: AttentionProblem) -> int:
    """Gathered and decoded entries, logits and weights of as many tokens as it takes at a time, and float32 results."""
    width = problem.width + problem.extra_width
    tokens = min(problem.tokens, reference.tokens_at_once(width, problem.head_dim))
    entries, logits = tokens * width * problem.head_dim, tokens * width * problem.heads
    return tensor_bytes(entries, 40) + tensor_bytes(logits, 24) + tensor_bytes(problem.tokens * problem.heads * 512, 16)


def _unpacked(run: Callable[..., Any]) -> Callable[..., Any]:
    """Give the oracle, whose signature is the op's, a call's record."""
    return lambda call: run(*call)


# As ``costs.TRITON_LOGITS_RATES``; a guess.
_REFERENCE_LOGITS_RATES = (500.0, 1e5, 1e6, 1e5)


def _logits_triton_us(problem: LogitsProblem) -> float:
    us = costs.logits_us(problem, *costs.TRITON_LOGITS_RATES[problem.op])
    return us + (_INTERPRETER_US if problem.interpreter else 0.0)


def _logits_reference_us(problem: LogitsProblem) -> float:
    return costs.logits_us(problem, *_REFERENCE_LOGITS_RATES)


def _pair(
    op: str,
    module: str,
    *,
    reference_run: Callable[..., Any] | None = None,
    triton_scratch: Callable[[Any], int] = lambda problem: 0,
    reference_scratch: Callable[[Any], int] = lambda problem: 0,
    triton_us: Callable[[Any], float] = _triton_us,
    reference_us: Callable[[Any], float] = _reference_us,
    triton_plan: str | None = None,
) -> None:
    if reference_run is None:
        reference_run = getattr(reference, op)
    if platform.forced and platform.backend == "reference":
        refuse(op, "triton")
    else:
        register(
            Kernel(
                op,
                "triton",
                _lazy(module, op),
                triton_us,
                library=TRITON,
                devices=("cuda", "cpu"),
                fixed_splits=op == "sparse_mla_decode",
                remaps=op == "sparse_mla_decode",
                host_us=functools.partial(costs.kernel_host_us, kernel="triton"),
                plan=None if triton_plan is None else _lazy(module, triton_plan),
                scratch_bytes=triton_scratch,
                further_reasons=_triton_reasons,
            )
        )
    register(
        Kernel(
            op,
            "reference",
            without_grad(reference_run),
            reference_us,
            devices=("cuda", "cpu"),
            capture_safe=False,
            scratch_bytes=reference_scratch,
        )
    )


def register_portable() -> None:
    """Register the Triton and reference kernels of every op; Triton's are left out under DSV4X_BACKEND=reference."""
    _pair("quantize_and_insert_k_cache", "cache")
    _pair("dequantize_k_cache_paged", "cache")
    _pair("copy_entries", "cache")
    _pair("gather_workspace", "cache")
    _pair("gather_and_combine", "gather_combine")
    _pair("requantize_fp8_to_block_scale", "requantize")
    _pair("combine_topk_swa_indices", "indices")
    _pair("combine_swa_extra_indices", "indices")
    _pair("window_slots", "indices")
    _pair("build_swa_token_ids", "indices")
    _pair("fill_step", "step")
    _pair("plan_gather", "step")
    _pair("pack_slots", "step")
    _pair("local_to_slots", "indices")
    _pair("local_to_workspace_rows", "indices")
    _pair("slots_to_compact_slots", "indices")
    _pair("dense_to_ragged", "indices")
    _pair("ragged_to_dense", "indices")
    _pair("list_referenced", "compaction")
    _pair("copy_pages", "compaction")
    logits: dict[str, Any] = {"triton_us": _logits_triton_us, "reference_us": _logits_reference_us}
    paged, flat = _unpacked(reference.paged_mqa_logits), _unpacked(reference.mqa_logits)
    _pair("paged_mqa_logits", "mqa_logits", triton_plan="plan_paged", reference_run=paged, **logits)
    _pair("mqa_logits", "mqa_logits", reference_run=flat, **logits)
    _pair("gather_indexer_k", "mqa_logits")
    _pair("get_paged_mqa_logits_metadata", "schedule")
    _pair(
        "topk_transform", "topk", reference_run=_unpacked(reference.topk_transform), triton_us=_topk_triton_us
    )  # fmt: skip
    _pair("topk_merge", "topk")
    _pair("merge_attention_states", "merge")
    scratch: dict[str, Any] = {"triton_scratch": _triton_scratch, "reference_scratch": _reference_scratch}
    _pair("sparse_mla_decode", "decode", reference_run=_reference_decode, triton_us=_triton_decode_us, **scratch)
    _pair("sparse_mla_prefill", "prefill", reference_run=_reference_prefill, triton_us=_triton_prefill_us, **scratch)
