"""Compiling ahead what a server's steps will launch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import checks, registry
from .attention import COMPRESS_RATIOS, AttentionMetadata, sparse_mla_attention
from .cache import quantize_and_insert_k_cache
from .layouts import PagedCache
from .routing import PATHS, explain_step, path_problems
from .sparse_mla import VALUE_DIM, sparse_mla_decode, sparse_mla_prefill

# A kernel predicted to take up to this many times the fastest one's time may be the fastest for another batch.
_CLOSE = 2.0

# A batch on either side of every bound in a table of launch shapes, and of one split and several.
_TOKENS = (1, 2, 8, 33, 130, 1024)


def warmup(
    swa_cache: PagedCache,
    extra_cache: PagedCache | None = None,
    *,
    heads: int,
    topk: int = 512,
    window_size: int = 128,
    compress_ratios: Sequence[int] = COMPRESS_RATIOS,
    softmax_scale: float | None = None,
    kernel: str | None = None,
) -> int:
    """Compile every Triton kernel that attention over caches like these launches, whatever the batches will be.

    Nothing is tuned, here or later: launch shapes come from tables. The caches are read and nothing is stored in them.
    Kernels that Triton has on disk from an earlier process are loaded, and count too.

    Args:
        swa_cache, extra_cache: the server's caches of one layer, or small ones of the same layouts, page sizes and page
            strides. Without ``extra_cache`` only compress ratio 1. Entries of 576 values (V3.2) have no steps: the two
            attention ops are run over ``swa_cache`` instead.
        heads: query heads on this rank.
        topk, window_size: as in :meth:`AttentionMetadata.build`.
        compress_ratios: the layer kinds that will be served.
        softmax_scale: needed for entries of 576 values, as in :func:`~dsv4x.sparse_mla_decode`.
        kernel: the attention kernel that will be asked for by name; None compiles for those that prediction picks.

    Returns:
        How many kernels were compiled or loaded; 0 where nothing is, as on a CPU.

    Raises:
        TypeError, ValueError: an argument's type or value.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run the steps.
    """
    device = swa_cache.device if isinstance(swa_cache, PagedCache) else torch.device("cpu")
    swa_cache = checks.cache("swa_cache", swa_cache, device)
    checks.integer("heads", heads, 1)
    before = _compiled()
    for cache in (swa_cache, extra_cache):
        if cache is not None:
            checks.cache("extra_cache", cache, device)
            k = torch.zeros(2, cache.layout.head_dim, dtype=torch.bfloat16, device=device)
            quantize_and_insert_k_cache(k, cache, torch.full((2,), -1, dtype=torch.int64, device=device))
    for tokens in _TOKENS:
        if swa_cache.layout.head_dim != VALUE_DIM:
            _run_ops(swa_cache, tokens, heads, topk, softmax_scale, kernel)
            continue
        for ratio in compress_ratios:
            if ratio == 1 or extra_cache is not None:
                _run_step(swa_cache, extra_cache, tokens, heads, topk, window_size, ratio, kernel)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _compiled() - before


def _run_step(
    swa_cache: PagedCache,
    extra_cache: PagedCache | None,
    tokens: int,
    heads: int,
    topk: int,
    window_size: int,
    ratio: int,
    kernel: str | None,
) -> None:
    """Every path that can run, over block tables of -1: there are no entries, and all that reads them is launched."""
    device = swa_cache.device
    length = max(tokens, 4 * topk)
    lengths = torch.tensor([length, 1], dtype=torch.int32)
    starts = torch.tensor([0, tokens, tokens + 1], dtype=torch.int32)
    extra: dict[str, Any] = {}
    if ratio > 1:
        assert extra_cache is not None
        columns = -(-length // ratio // extra_cache.page_size) + 1
        extra = {
            "extra_block_table": torch.full((2, columns), -1, dtype=torch.int32, device=device),
            "extra_page_size": extra_cache.page_size,
            "extra_pages": extra_cache.pages,
        }
    meta = AttentionMetadata.build(
        starts.to(device),
        lengths.to(device),
        torch.full((2, -(-length // swa_cache.page_size) + 1), -1, dtype=torch.int32, device=device),
        compress_ratio=ratio,
        swa_page_size=swa_cache.page_size,
        swa_pages=swa_cache.pages,
        topk=topk,
        window_size=window_size,
        query_start_loc_cpu=starts,
        seq_lens_cpu=lengths,
        **extra,
    )
    q = torch.zeros(tokens + 1, heads, VALUE_DIM, dtype=torch.bfloat16, device=device)
    chosen = torch.full((tokens + 1, topk), -1, dtype=torch.int32, device=device) if ratio == 4 else None
    cache = extra_cache if ratio > 1 else None
    explanation = explain_step(q, swa_cache, cache, meta, chosen, kernel)
    problems = path_problems(q, swa_cache, cache, meta, chosen)
    for path in (path for path in PATHS if path in explanation.kernels):
        for name in _kernels_of(problems[path], kernel):
            for sink in (None, torch.zeros(heads, device=device)):
                sparse_mla_attention(q, swa_cache, cache, meta, chosen, sink, path=path, kernel=name)
    if not explanation.kernels:
        sparse_mla_attention(q, swa_cache, cache, meta, chosen, kernel=kernel)


def _kernels_of(problem: registry.Problem, kernel: str | None) -> list[str]:
    """The kernel asked for, or those that prediction may pick for batches like this one."""
    if kernel is not None:
        return [kernel]
    predicted = registry.explain(problem).predicted_us
    fastest = min(predicted.values())
    return [name for name, us in predicted.items() if us <= _CLOSE * fastest]


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


def _compiled() -> int:
    """Compiled kernels that this process holds of dsv4x's."""
    triton = sys.modules.get("triton")
    if triton is None:
        return 0
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(f"{__package__}.kernels.")]
    functions = {id(f): f for m in modules for f in vars(m).values() if isinstance(f, triton.runtime.JITFunction)}
    return sum(len(kept[0]) for function in functions.values() for kept in function.device_caches.values())
