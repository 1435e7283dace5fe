"""The gathered path: windows and every compressed entry as bf16 rows of a workspace, then the prefill op over it."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..core.calls import PrefillCall, Result
from ..core.model import LayerKind
from ..dispatch.costs import step_costs
from ..dispatch.problem import AttentionProblem, CacheProblem, IndexProblem
from ..dispatch.registry import Kernel, select
from ..ops import indices
from ..ops.sparse_mla import attend
from .chunk import Group, SparsePrefillChunkCache
from .metadata import AttentionMetadata
from .plan import Layer, Step, StepPlan
from .results import Results


class Gathered:
    """Less work a token than reading pages in place, once the rows are there."""

    name: ClassVar[str] = "gathered"

    def has(self, kind: LayerKind) -> bool:
        return True

    def problem(self, step: Step) -> AttentionProblem:
        meta = step.meta
        rows = sum(meta.compressed_bounds()) + step.chunk.window_rows
        entries = max(meta.compressed_bounds(), default=0) if not meta.selects else step.topk
        return AttentionProblem.on(
            "sparse_mla_prefill", step.device, tokens=step.tokens, heads=step.heads,
            width=indices.combined_topk_width(entries, meta.window_size), entries=step.entries, rows=rows, lse=step.lse,
            out=step.out,
        )  # fmt: skip

    def refusal(self, step: Step, problem: AttentionProblem) -> str:
        if step.chunk.fits:
            return ""
        if step.meta.step.host is None:
            return f"nothing but max_seq_len bounds the rows, which pass {step.chunk.cap}"
        return f"a request's rows alone pass {step.chunk.cap}"

    def by_name_only(self, step: Step, problem: AttentionProblem) -> str:
        if problem.capturing:
            return "a graph is being captured, and its replays may have other lengths"
        return "" if problem.rows else "there is nothing to gather"

    def predicted_us(self, step: Step, problem: AttentionProblem, kernel: Kernel) -> float:
        costs = step_costs(problem.arch)
        return costs.gathered_us(kernel.predicted_us(problem), kernel.host_us(problem), problem, step.meta.selects)

    def helpers(self, step: Step, problem: AttentionProblem, kernel: Kernel) -> dict[str, Kernel]:
        device, tokens, width = step.device, problem.tokens, problem.width
        found = {
            op: select(CacheProblem.on(op, device, tokens=problem.rows, caches=step.caches))
            for op in ("gather_workspace", "gather_and_combine")
        }
        for op in ("combine_topk_swa_indices", "combine_swa_extra_indices", "slots_to_compact_slots"):
            found[op] = select(IndexProblem.on(op, device, tokens=tokens, width=width))
        return found

    def run(self, plan: StepPlan, layer: Layer, meta: AttentionMetadata, chunk: SparsePrefillChunkCache) -> Result:
        results = Results(layer, sum(len(group.blocks) for group in chunk.groups))
        for group in chunk.groups:
            # Not filled: rows without a slot stay unwritten, and no index points at them.
            workspace = chunk.workspace(group.rows)
            gather = (
                layer.extra_cache, layer.swa_cache, group.slots, group.compressed_rows, workspace,
                layer.extra_k_scale, layer.swa_k_scale,
            )  # fmt: skip
            waiting = group.rows > 0
            in_one = layer.topk_indices is not None and meta.swa_block_table is not None
            if waiting and not in_one:
                plan.helpers["gather_workspace"].run(*gather)
                waiting = False
            for block in group.blocks:
                if not in_one:
                    rows, lens = self._index_rows(plan, layer, meta, chunk, group, block)
                else:
                    call = chunk.combining(group, block, layer.topk_indices, layer.topk_lens)
                    rows, lens = call.out_indices, call.out_lens
                    if waiting:
                        plan.helpers["gather_and_combine"].run(gather, call)
                        waiting = False
                    else:
                        plan.helpers["combine_topk_swa_indices"].run(call)
                q = layer.q if results.whole else layer.q[block]
                results.add(block, attend(plan.attend, PrefillCall(
                    q, workspace, rows, lens, layer.attn_sink, layer.softmax_scale, results.buffer(block), layer.heads,
                    layer.return_lse, trusted=True,
                )))  # fmt: skip
        return results.all()

    def _index_rows(
        self,
        plan: StepPlan,
        layer: Layer,
        meta: AttentionMetadata,
        chunk: SparsePrefillChunkCache,
        group: Group,
        block: slice,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Workspace rows and spans that no single launch makes beside the gather."""
        combine = plan.helpers["combine_topk_swa_indices"]
        if layer.topk_slots is None and layer.topk_indices is None and meta.swa_block_table is not None:
            return chunk.index_rows(group, block, combine)
        swa_rows, swa_lens = chunk.group_window(group, block)
        if layer.topk_indices is None and layer.topk_slots is not None:
            spans = layer.topk_lens
            slots, lens = layer.topk_slots[block], None if spans is None else spans[block]
            rows = torch.empty(slots.shape, dtype=torch.int32, device=slots.device)
            if rows.numel():
                table = chunk.row_of_slot(group)
                plan.helpers["slots_to_compact_slots"].run(slots, table, 1, rows)
        else:
            call = chunk.combining(group, block, layer.topk_indices, layer.topk_lens)
            # Alone: the window's rows are the server's.
            call = call._replace(
                window_size=0, out_indices=torch.empty_like(call.out_indices), out_lens=torch.empty_like(call.out_lens)
            )
            combine.run(call)
            rows, lens = call.out_indices[:, : call.topk], call.out_lens
        width = indices.combined_topk_width(rows.shape[1], swa_rows.shape[1])
        out = torch.empty(rows.shape[0], width, dtype=torch.int32, device=rows.device)
        out_lens = torch.empty(rows.shape[0], dtype=torch.int32, device=rows.device)
        if rows.shape[0]:
            plan.helpers["combine_swa_extra_indices"].run(
                rows, lens, swa_rows, swa_lens, group.compressed_rows, out, out_lens
            )
        return out, out_lens
