"""The referenced path: windows, and the compressed entries that top-k points at, as bf16 rows of a workspace."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from ..core.calls import PrefillCall, Result
from ..core.model import LayerKind
from ..dispatch.costs import step_costs
from ..dispatch.problem import AttentionProblem, CacheProblem, IndexProblem
from ..dispatch.registry import Kernel, select
from ..ops import indices
from ..ops.sparse_mla import attend
from .chunk import SparsePrefillChunkCache
from .direct import local_of, packed_slots
from .metadata import AttentionMetadata
from .plan import Layer, Step, StepPlan
from .results import Results


class Referenced:
    """Fewer rows of a long prefix than the gathered path, for the price of listing them."""

    name: ClassVar[str] = "referenced"

    def has(self, kind: LayerKind) -> bool:
        return kind.selects

    def problem(self, step: Step) -> AttentionProblem:
        """One block's of tokens, under the chunk's cap."""
        meta, block = step.meta, step.chunk.referenced_block(step.topk) or step.tokens
        rows = min(block * step.topk, sum(meta.compressed_bounds())) + step.chunk.window_rows
        return AttentionProblem.on(
            "sparse_mla_prefill", step.device, tokens=min(block, step.tokens), heads=step.heads,
            width=indices.combined_topk_width(step.topk, meta.window_size), entries=step.entries, rows=rows,
            lse=step.lse, out=step.out,
        )  # fmt: skip

    def refusal(self, step: Step, problem: AttentionProblem) -> str:
        if not step.chunk.referenced_block(step.topk):
            return f"the windows and one token's rows pass {step.chunk.cap}"
        return ""

    def by_name_only(self, step: Step, problem: AttentionProblem) -> str:
        if problem.capturing:
            return "a graph is being captured, and its replays may have other lengths"
        return "" if problem.rows else "there is nothing to gather"

    def predicted_us(self, step: Step, problem: AttentionProblem, kernel: Kernel) -> float:
        meta, costs = step.meta, step_costs(problem.arch)
        compressed, windows = sum(meta.compressed_bounds()), step.chunk.window_rows
        references = problem.tokens * step.topk
        # How many are distinct only the GPU knows. Independent choices are what is assumed: an indexer's agree more.
        distinct = compressed * -math.expm1(-references / compressed) if compressed else 0.0
        blocks = -(-step.tokens // max(1, problem.tokens))
        times = kernel.predicted_us(problem), kernel.host_us(problem)
        return costs.referenced_us(*times, problem, blocks, references, distinct, windows)

    def helpers(self, step: Step, problem: AttentionProblem, kernel: Kernel) -> dict[str, Kernel]:
        device, tokens, width = step.device, problem.tokens, problem.width
        compressed = step.caches[1:]
        return {
            "pack_slots": select(IndexProblem.on("pack_slots", device, tokens=tokens, width=step.topk)),
            "gather_workspace": select(
                CacheProblem.on("gather_workspace", device, tokens=problem.rows, caches=step.caches)
            ),
            "list_referenced": select(CacheProblem.on("list_referenced", device, tokens=tokens, width=step.topk)),
            "dequantize_k_cache_paged": select(
                CacheProblem.on("dequantize_k_cache_paged", device, tokens=problem.rows, caches=compressed)
            ),
            "combine_swa_extra_indices": select(
                IndexProblem.on("combine_swa_extra_indices", device, tokens=tokens, width=width)
            ),
        }

    def run(self, plan: StepPlan, layer: Layer, meta: AttentionMetadata, chunk: SparsePrefillChunkCache) -> Result:
        rows = layer.topk_slots if layer.topk_slots is not None else layer.topk_indices
        assert rows is not None
        assert layer.extra_cache is not None
        width, device = rows.shape[1], layer.q.device
        local = local_of(meta) if layer.topk_slots is None else None
        window, blocks, capacity = chunk.window, chunk.referenced_blocks(width), chunk.referenced_rows(width)
        results = Results(layer, len(blocks))
        workspace = chunk.workspace(capacity + window.rows)
        if window.rows:
            gather = (None, layer.swa_cache, window.slots, 0, workspace[capacity:], 1.0, layer.swa_k_scale)
            plan.helpers["gather_workspace"].run(*gather)
        for block in blocks:
            slots, lens = packed_slots(plan, layer, local, meta.extra_page_size, block)
            listed = torch.full((capacity,), -1, dtype=torch.int32, device=device)
            compact = torch.full(slots.shape, -1, dtype=torch.int32, device=device)
            count = torch.zeros(1, dtype=torch.int32, device=device)
            if capacity:
                plan.helpers["list_referenced"].run(slots, lens, layer.extra_cache.capacity, 1, listed, compact, count)
                plan.helpers["dequantize_k_cache_paged"].run(
                    layer.extra_cache, listed, workspace[:capacity], layer.extra_k_scale
                )
            swa_rows, swa_lens = window.indices[block], None if window.lens is None else window.lens[block]
            index_width = indices.combined_topk_width(slots.shape[1], swa_rows.shape[1])
            index_rows = torch.empty(slots.shape[0], index_width, dtype=torch.int32, device=device)
            index_lens = torch.empty(slots.shape[0], dtype=torch.int32, device=device)
            # The compressed half first, as on the gathered path, so that both give the same bits.
            plan.helpers["combine_swa_extra_indices"].run(
                compact, lens, swa_rows, swa_lens, capacity, index_rows, index_lens
            )
            q = layer.q if results.whole else layer.q[block]
            results.add(block, attend(plan.attend, PrefillCall(
                q, workspace, index_rows, index_lens, layer.attn_sink, layer.softmax_scale, results.buffer(block),
                layer.heads, layer.return_lse, trusted=True,
            )))  # fmt: skip
        return results.all()
