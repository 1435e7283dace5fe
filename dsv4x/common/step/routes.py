"""Which way a step's attention takes: pages read in place, or rows gathered to bf16 first, and which rows.

``direct`` reads fp8 pages in place. ``gathered`` dequantizes every compressed entry of the step's requests, and the
windows, into a workspace, and attends to its rows: less work a token, once the rows are there. ``referenced`` gathers
only the compressed entries that an indexer's top-k points at: fewer rows of a long prefix, for the price of listing
them. Which is fastest follows from tokens, heads, rows and layer kind, so it is predicted (:mod:`.costs`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..core.errors import BackendUnavailable, KernelNotSupported
from ..core.layouts import PagedCache
from ..dispatch.costs import step_costs
from ..dispatch.problem import AttentionProblem
from ..dispatch.registry import Kernel, candidates, select
from ..ops import indices
from .chunk import SparsePrefillChunkCache, chunk_of
from .metadata import AttentionMetadata

PATHS = ("direct", "gathered", "referenced")


@dataclass(frozen=True)
class StepExplanation:
    """Which path a step takes and why not the others.

    Attributes:
        chosen: the path of the lowest predicted time, or None when every one is refused.
        kernels: path -> its attention kernel, for the paths that can run.
        predicted_us: path -> predicted microseconds of the whole step, for the same.
        refused: path -> why it cannot run.
    """

    chosen: str | None
    kernels: dict[str, str]
    predicted_us: dict[str, float]
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = []
        for path in PATHS:
            if path in self.refused:
                state = f"refused: {self.refused[path]}"
            else:
                verdict = "chosen" if path == self.chosen else "slower"
                state = f"{verdict}, {self.kernels[path]}, predicted {self.predicted_us[path]:.0f} us"
            lines.append(f"  {path:<10} {state}")
        return "\n".join(lines)


def paths_of(compress_ratio: int) -> tuple[str, ...]:
    """The paths a layer kind has."""
    return PATHS if compress_ratio == 4 else PATHS[:2]


def explain_step(
    q: torch.Tensor,
    swa_cache: PagedCache,
    extra_cache: PagedCache | None,
    meta: AttentionMetadata,
    topk_indices: torch.Tensor | None = None,
    kernel: str | None = None,
    chunk: SparsePrefillChunkCache | None = None,
    return_lse: bool = True,
) -> StepExplanation:
    """The path :func:`~dsv4x.sparse_mla_attention` takes for these arguments, which are its own, and the times it
    predicts for each. Runs nothing. Raises ValueError when ``kernel`` is no kernel's name.
    """
    return _explain(q, swa_cache, extra_cache, meta, topk_indices, kernel, chunk, return_lse)[0]


def choose_step(
    q: torch.Tensor,
    swa_cache: PagedCache,
    extra_cache: PagedCache | None,
    meta: AttentionMetadata,
    topk_indices: torch.Tensor | None = None,
    kernel: str | None = None,
    chunk: SparsePrefillChunkCache | None = None,
    return_lse: bool = True,
) -> tuple[str, str]:
    """``(path, kernel)`` of :func:`explain_step`. Raises KernelNotSupported or BackendUnavailable when none can run."""
    explanation, errors = _explain(q, swa_cache, extra_cache, meta, topk_indices, kernel, chunk, return_lse)
    if explanation.chosen is None:
        raise errors[0]
    return explanation.chosen, explanation.kernels[explanation.chosen]


def path_problems(
    q: torch.Tensor,
    swa_cache: PagedCache,
    extra_cache: PagedCache | None,
    meta: AttentionMetadata,
    topk_indices: torch.Tensor | None = None,
    chunk: SparsePrefillChunkCache | None = None,
    return_lse: bool = True,
) -> dict[str, AttentionProblem]:
    """The attention problem of every path the step's kind has, for :func:`dsv4x.explain`.

    ``referenced`` is cut into blocks of tokens; its problem is one block's, under the cap of ``chunk``.
    """
    tokens, heads = q.shape[:2]
    extra_width = 0
    if topk_indices is not None:
        extra_width = topk_indices.shape[1]
    elif meta.compress_ratio == 128:
        extra_width = meta.slot_row_width
    caches = tuple(cache.spec for cache in (swa_cache, extra_cache) if cache is not None)
    entries = meta.mean_entries(extra_width)
    width = indices.combined_topk_width(extra_width, meta.window_size)
    problems = {
        "direct": AttentionProblem.on(
            "sparse_mla_decode", q.device, tokens=tokens, heads=heads, width=meta.swa_indices.shape[1],
            extra_width=extra_width, entries=entries, caches=caches, lse=return_lse,
        ),
        "gathered": AttentionProblem.on(
            "sparse_mla_prefill", q.device, tokens=tokens, heads=heads, width=width, entries=entries,
            rows=sum(meta.compressed_counts) + sum(meta.gather_counts), lse=return_lse,
        ),
    }  # fmt: skip
    if topk_indices is not None:
        block = (chunk or chunk_of(meta)).referenced_block(extra_width) or tokens
        rows = min(block * extra_width, sum(meta.compressed_counts)) + sum(meta.gather_counts)
        problems["referenced"] = AttentionProblem.on(
            "sparse_mla_prefill", q.device, tokens=min(block, tokens), heads=heads, width=width, entries=entries,
            rows=rows, lse=return_lse,
        )  # fmt: skip
    return problems


def _explain(
    q: torch.Tensor,
    swa_cache: PagedCache,
    extra_cache: PagedCache | None,
    meta: AttentionMetadata,
    topk_indices: torch.Tensor | None,
    kernel: str | None,
    chunk: SparsePrefillChunkCache | None,
    return_lse: bool,
) -> tuple[StepExplanation, list[Exception]]:
    chunk = chunk or chunk_of(meta)
    problems = path_problems(q, swa_cache, extra_cache, meta, topk_indices, chunk, return_lse)
    names: dict[str, str] = {}
    predicted: dict[str, float] = {}
    others = [path for path in PATHS if path not in paths_of(meta.compress_ratio)]
    refused = dict.fromkeys(others, f"compress_ratio is {meta.compress_ratio}, need 4")
    errors: list[Exception] = []
    for path, problem in problems.items():
        reason = _refusal(path, problem, meta, chunk, topk_indices)
        if reason:
            refused[path] = reason
            continue
        try:
            record, predicted[path] = step_kernel(path, problem, meta, topk_indices, kernel)
        except (KernelNotSupported, BackendUnavailable) as error:
            refused[path] = str(error)
            errors.append(error)
            continue
        names[path] = record.name
    chosen = min(predicted, key=predicted.__getitem__, default=None)
    return StepExplanation(chosen, names, predicted, refused), errors


def step_kernel(
    path: str,
    problem: AttentionProblem,
    meta: AttentionMetadata,
    topk_indices: torch.Tensor | None,
    kernel: str | None = None,
) -> tuple[Kernel, float]:
    """The attention kernel of a path, and the step's predicted microseconds: the one named, or the step's fastest.

    A step may be faster with a kernel whose own time is longer, if that spares the step a launch. Raises as
    :func:`~dsv4x.common.dispatch.registry.select`.
    """
    # Where none can run it, select says why.
    records = (candidates(problem) if kernel is None else []) or [select(problem, kernel)]
    times = [_predicted_us(path, record, problem, meta, topk_indices) for record in records]
    best = times.index(min(times))
    return records[best], times[best]


def _refusal(
    path: str,
    problem: AttentionProblem,
    meta: AttentionMetadata,
    chunk: SparsePrefillChunkCache,
    topk_indices: torch.Tensor | None,
) -> str:
    if path == "direct":
        return ""
    if problem.capturing:
        return "a graph is being captured, and its replays may have other lengths"
    if not problem.rows:
        return "there is nothing to gather"
    if path == "gathered" and not chunk.fits:
        return f"a request's rows alone pass the cap of {chunk.max_bytes} bytes"
    if path == "referenced":
        assert topk_indices is not None
        if not chunk.referenced_block(topk_indices.shape[1]):
            return f"the windows and one token's rows pass the cap of {chunk.max_bytes} bytes"
    return ""


def _predicted_us(
    path: str, record: Kernel, problem: AttentionProblem, meta: AttentionMetadata, topk_indices: torch.Tensor | None
) -> float:
    costs, indexed = step_costs(problem.arch), topk_indices is not None
    times = record.predicted_us(problem), record.host_us(problem)
    if path == "direct":
        return costs.direct_us(*times, problem, indexed and not record.remaps)
    if path == "gathered":
        return costs.gathered_us(*times, problem, indexed)
    assert topk_indices is not None
    compressed, windows = sum(meta.compressed_counts), sum(meta.gather_counts)
    references = problem.tokens * min(topk_indices.shape[1], meta.topk)
    # How many are distinct only the GPU knows. Independent choices are what is assumed: an indexer's agree more.
    distinct = compressed * -math.expm1(-references / compressed) if compressed else 0.0
    blocks = -(-meta.num_tokens // max(1, problem.tokens))
    return costs.referenced_us(*times, problem, blocks, references, distinct, windows)
