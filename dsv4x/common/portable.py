"""The kernels every backend has: Triton's, imported on first use, and the torch reference."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from . import reference
from .core.ambient import without_grad
from .core.model import VALUE_DIM
from .core.platform import platform
from .core.vendor import TRITON
from .dispatch import costs
from .dispatch.registry import Kernel, Problem, register

# Microseconds a call and FLOP a microsecond. Triton's are an H200's (decode-kernels-h200.json of benchmarks/results,
# over DSv4 entries); the reference's are a guess that keeps it last on a GPU.
_TRITON_RATES = {"sparse_mla_decode": (20.0, 80e6)}
# Prefill's (benchmarks/results/prefill-kernels-h200.json): heads a program covers -> a call, the rate.
_TRITON_PREFILL_RATES = {16: (50.0, 116e6), 64: (50.0, 190e6)}
_OTHER_TRITON_RATES = (30.0, 1e6)
_REFERENCE_RATES = (200.0, 1e6)
_INTERPRETER_US = 1e6


def _lazy(module: str, name: str) -> Callable[..., Any]:
    @functools.cache
    def launcher() -> Callable[..., Any]:
        return getattr(importlib.import_module(f".kernels.{module}", __package__), name)

    return lambda *args, **kwargs: launcher()(*args, **kwargs)


def _triton_us(problem: Problem) -> float:
    call, rate = _TRITON_RATES.get(problem.op, _OTHER_TRITON_RATES)
    return call + problem.attention_flops / rate + (_INTERPRETER_US if problem.interpreter else 0.0)


def _triton_prefill_us(problem: Problem) -> float:
    """Every program takes its block of heads for full: gathering bounds few heads, and products count rows."""
    block = 16 if problem.heads <= 16 else 64
    call, rate = _TRITON_PREFILL_RATES[block]
    flops = problem.attention_flops / max(problem.heads, 1) * -(-problem.heads // block) * block
    return call + flops / rate + (_INTERPRETER_US if problem.interpreter else 0.0)


def _reference_us(problem: Problem) -> float:
    call, rate = _REFERENCE_RATES
    return call + problem.attention_flops / rate


def _triton_reasons(problem: Problem) -> list[str]:
    if problem.device == "cpu" and not problem.interpreter:
        return ["device is cpu, need cuda or TRITON_INTERPRET=1 in the environment"]
    return []


def _attention(run: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Give a launcher, which writes into ``out`` and returns lse, the op's whole argument list."""

    def call(
        q: torch.Tensor, *args: Any, trusted_indices: bool = False, schedule: Any = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        *inputs, out = args
        if out is None:
            out = torch.empty(*q.shape[:2], VALUE_DIM, dtype=q.dtype, device=q.device)
        return out, run(q, *inputs, out, **options)

    return call


def _reference_attention(name: str) -> Callable[..., torch.Tensor]:
    def run(*args: Any, **scales: float) -> torch.Tensor:
        *inputs, out = args
        values, lse = getattr(reference, name)(*inputs, **scales)
        out.copy_(values)
        return lse

    return run


# Microseconds a call, and bytes of K, FLOP and bytes of logits a microsecond: an H200's, and for the reference a guess.
TRITON_LOGITS_RATES = {"paged_mqa_logits": (8.0, 3.8e6, 650e6, 4e6), "mqa_logits": (8.0, 3.8e6, 880e6, 4e6)}
_REFERENCE_LOGITS_RATES = (500.0, 1e5, 1e6, 1e5)


def logits_us(problem: Problem, call: float, k_rate: float, flop_rate: float, logits_rate: float) -> float:
    """Predicted microseconds of logits: a call, and the slowest of reading K, multiplying, and writing logits."""
    rows = problem.tokens * problem.next_n
    read = (problem.tokens if problem.op == "paged_mqa_logits" else 1) * problem.width * 132
    flops = 2.0 * rows * problem.heads * problem.head_dim * problem.width
    return call + max(read / k_rate, flops / flop_rate, 4.0 * rows * problem.width / logits_rate)


def _logits_triton_us(problem: Problem) -> float:
    return logits_us(problem, *TRITON_LOGITS_RATES[problem.op]) + (_INTERPRETER_US if problem.interpreter else 0.0)


def _logits_reference_us(problem: Problem) -> float:
    return logits_us(problem, *_REFERENCE_LOGITS_RATES)


def _pair(
    op: str,
    module: str,
    *,
    attention: bool = False,
    triton_us: Callable[[Problem], float] = _triton_us,
    reference_us: Callable[[Problem], float] = _reference_us,
) -> None:
    triton_run, reference_run = _lazy(module, op), getattr(reference, op)
    if attention:
        triton_run, reference_run = _attention(triton_run), _attention(_reference_attention(op))
    if not (platform.forced and platform.backend == "reference"):
        register(
            Kernel(
                op,
                "triton",
                triton_run,
                triton_us,
                library=TRITON,
                devices=("cuda", "cpu"),
                fixed_splits=op == "sparse_mla_decode",
                remaps=op == "sparse_mla_decode",
                host_us=functools.partial(costs.kernel_host_us, kernel="triton"),
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
        )
    )


def register_portable() -> None:
    """Register the Triton and reference kernels of every op; Triton's are left out under DSV4X_BACKEND=reference."""
    _pair("quantize_and_insert_k_cache", "cache")
    _pair("dequantize_k_cache_paged", "cache")
    _pair("gather_workspace", "cache")
    _pair("gather_and_combine", "gather_combine")
    _pair("requantize_fp8_to_block_scale", "requantize")
    _pair("combine_topk_swa_indices", "indices")
    _pair("combine_swa_extra_indices", "indices")
    _pair("window_slots", "indices")
    _pair("build_swa_token_ids", "indices")
    _pair("local_to_slots", "indices")
    _pair("local_to_workspace_rows", "indices")
    _pair("slots_to_compact_slots", "indices")
    _pair("dense_to_ragged", "indices")
    _pair("ragged_to_dense", "indices")
    _pair("list_referenced", "compaction")
    _pair("copy_pages", "compaction")
    for op in ("paged_mqa_logits", "mqa_logits"):
        _pair(op, "mqa_logits", triton_us=_logits_triton_us, reference_us=_logits_reference_us)
    _pair("gather_indexer_k", "mqa_logits")
    _pair("get_paged_mqa_logits_metadata", "schedule")
    _pair("topk_transform", "topk")
    _pair("topk_merge", "topk")
    _pair("merge_attention_states", "merge")
    _pair("sparse_mla_decode", "decode", attention=True)
    _pair("sparse_mla_prefill", "prefill", attention=True, triton_us=_triton_prefill_us)
