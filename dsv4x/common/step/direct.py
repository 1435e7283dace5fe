"""The direct path: the decode op over paged caches, read in place."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..core.calls import DecodeCall, Local, Result, Scope
from ..core.model import LayerKind
from ..core.refill import PackCall
from ..dispatch import trace
from ..dispatch.costs import step_costs
from ..dispatch.problem import AttentionProblem, IndexProblem
from ..dispatch.registry import Kernel, select
from ..ops.sparse_mla import attend
from .chunk import SparsePrefillChunkCache
from .metadata import AttentionMetadata
from .plan import Layer, Step, StepPlan
from .results import Results

ROW_ALIGNMENT = 64
"""Widths of the slot rows made of top-k are multiples of this, which every decode kernel takes as it is."""


class Direct:
    """Reads pages in place, whatever the number of tokens."""

    name: ClassVar[str] = "direct"

    def has(self, kind: LayerKind) -> bool:
        return True

    def problem(self, step: Step) -> AttentionProblem:
        return AttentionProblem.on(
            "sparse_mla_decode", step.device, tokens=step.tokens, heads=step.heads,
            width=step.meta.swa_indices.shape[1], extra_width=step.extra_width, entries=step.entries,
            caches=step.caches, lse=step.lse, out=step.out,
        )  # fmt: skip

    def refusal(self, step: Step, problem: AttentionProblem) -> str:
        return ""

    def by_name_only(self, step: Step, problem: AttentionProblem) -> str:
        return ""

    def predicted_us(self, step: Step, problem: AttentionProblem, kernel: Kernel) -> float:
        costs, remapped = step_costs(problem.arch), step.local and not step.slots
        return costs.direct_us(
            kernel.predicted_us(problem), kernel.host_us(problem), problem, remapped and not kernel.remaps
        )

    def helpers(self, step: Step, problem: AttentionProblem, kernel: Kernel) -> dict[str, Kernel]:
        if not step.local or step.slots or kernel.remaps:
            return {}
        return {"pack_slots": select(IndexProblem.on("pack_slots", step.device, tokens=step.tokens, width=step.topk))}

    def run(self, plan: StepPlan, layer: Layer, meta: AttentionMetadata, chunk: SparsePrefillChunkCache) -> Result:
        prepared, blocks = plan.prepared.get("attend"), None
        if prepared is None:
            blocks = meta.direct_blocks
            if len(blocks) == 1 and plan.attend.prepare is not None:
                prepared = plan.attend.prepare(self._call(plan, layer, meta, None, layer.out))
                prepared = trace.ranged(f"{plan.attend.op}/{plan.attend.name}", prepared)
                plan.prepared["attend"] = prepared
        if prepared is not None:
            out, lse = prepared(self._call(plan, layer, meta, None, layer.out))
            return out, lse if layer.return_lse else None
        assert blocks is not None
        results = Results(layer, len(blocks))
        for block in blocks:
            part = None if results.whole else block
            results.add(block, attend(plan.attend, self._call(plan, layer, meta, part, results.buffer(block))))
        return results.all()

    def _call(
        self, plan: StepPlan, layer: Layer, meta: AttentionMetadata, block: slice | None, out: torch.Tensor | None
    ) -> DecodeCall:
        """The call of some tokens, or with None of all."""
        step = meta.step
        q, swa_indices, swa_lens, extra_lens = layer.q, step.swa_indices, step.swa_lens, meta.extra_lens
        if block is not None:
            # Only rows of every visible entry are cut, which are then made a block at a time.
            assert extra_lens is not None
            q, swa_indices, extra_lens = q[block], swa_indices[block], extra_lens[block]
            swa_lens = None if swa_lens is None else swa_lens[block]
        extra, local, trusted = None, None, step.makes_windows
        if layer.extra_cache is not None:
            if not meta.selects:
                indices = meta.extra_indices
                if indices is None:
                    indices = meta.slot_rows(slice(0, meta.num_tokens) if block is None else block)
                extra = Scope(layer.extra_cache, indices, extra_lens, layer.extra_k_scale)
            elif layer.topk_slots is not None:
                extra, trusted = Scope(layer.extra_cache, layer.topk_slots, layer.topk_lens, layer.extra_k_scale), False
            else:
                assert layer.topk_indices is not None
                entries = local_of(meta)
                if plan.attend.remaps:
                    local = entries
                    extra = Scope(layer.extra_cache, layer.topk_indices, layer.topk_lens, layer.extra_k_scale)
                else:
                    slots, lens = packed_slots(plan, layer, entries, meta.extra_page_size, counted=False)
                    # Not how many there are: a kernel's schedule is for the lengths that all layers have.
                    spans = None if layer.topk_lens is None else lens
                    extra = Scope(layer.extra_cache, slots, spans, layer.extra_k_scale)
        return DecodeCall(
            q, Scope(layer.swa_cache, swa_indices, swa_lens, layer.swa_k_scale), extra, layer.attn_sink,
            layer.softmax_scale, out, layer.heads, layer.return_lse, local,
            entries=meta.entries or 0, trusted=trusted, schedule=_schedule(meta, block, layer.topk_lens),
            workspace=layer.workspace,
        )  # fmt: skip


def local_of(meta: AttentionMetadata) -> Local:
    """What makes slots of a step's local entries."""
    assert meta.visible is not None
    assert meta.extra_block_table is not None
    return Local(meta.request, meta.visible, meta.extra_block_table, meta.extra_pages)


def packed_slots(
    plan: StepPlan,
    layer: Layer,
    local: Local | None,
    page_size: int,
    tokens: slice | None = None,
    counted: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of a layer's top-k, packed to the front of its rows, and how many; or the spans that were scanned."""
    rows = layer.topk_indices if local is not None else layer.topk_slots
    assert rows is not None
    assert layer.extra_cache is not None
    spans = layer.topk_lens
    if tokens is not None:
        rows, spans = rows[tokens], None if spans is None else spans[tokens]
        local = None if local is None else local.part(tokens)
    width = max(1, -(-rows.shape[1] // ROW_ALIGNMENT)) * ROW_ALIGNMENT
    slots = torch.empty(rows.shape[0], width, dtype=torch.int32, device=rows.device)
    lens = torch.empty(rows.shape[0], dtype=torch.int32, device=rows.device)
    capacity = layer.extra_cache.capacity
    plan.helpers["pack_slots"].run(PackCall(rows, spans, local, capacity, page_size, slots, lens, counted))
    return slots, lens


def _schedule(meta: AttentionMetadata, block: slice | None, topk_lens: torch.Tensor | None) -> dict[Any, Any]:
    """Where a kernel keeps, for the step's other layers, what follows from the lengths alone.

    Layers share it whose lengths are the metadata's or stand in one tensor.
    """
    key = ("schedule", 0 if block is None else block.start)
    lens, kept = meta.kept.get(key, (None, None))
    if kept is None or lens is not topk_lens:
        kept = {"captured": meta.step.captured}
        meta.kept[key] = topk_lens, kept
    return kept
