"""DeepSeek-V4 sparse MLA attention for multi-vendor LLM servers.

A server keeps K entries in paged caches and hands over index lists; dsv4x returns attention output by the fastest
kernel the machine can run, and says which one that was. Importing picks the backend (``dsv4x.platform``) and creates no
device context.

The step, once a step and once a layer::

    step = dsv4x.StepMetadata.build(query_start_loc, seq_lens, swa_block_table, {4: c4_pages, 128: c128_pages}, ...)
    out, lse = dsv4x.sparse_mla_attention(q, swa_cache, extra_cache, step[4], topk_indices, attn_sink)

Under it, the ops: ``quantize_and_insert_k_cache``, ``dequantize_k_cache_paged``, ``copy_entries``,
``combine_topk_swa_indices``, ``sparse_mla_decode``, ``sparse_mla_prefill``; ``merge_attention_states`` joins what
parts of a row's entries gave. ``gather_referenced_cache_blocks`` and ``gather_referenced_rows`` compact what a step
refers to. ``explain(problem)`` tells which kernel runs and why the others do not, ``explain_step`` which path a step
takes and what was predicted for each. ``warmup`` compiles what a server's steps will launch.
``plan_cache(prefill, decode)`` tells what to store and where to convert for two kernels that read different layouts.
The indexer of C4 layers: ``sparse_attn_indexer`` selects for a step's batch, whatever that mixes. Under it
``paged_indexer_topk`` and ``indexer_topk`` go from index queries to the entries that attention reads, over
``paged_mqa_logits``, ``mqa_logits`` (with ``gather_indexer_k``), ``topk_transform`` and
``get_paged_mqa_logits_metadata``; ``indexer_context_lens`` gives the lengths, ``topk_method`` the index space.
Index remaps, bounds-checked: ``window_slots``, ``local_to_slots``, ``local_to_workspace_rows``,
``slots_to_compact_slots``, ``dense_to_ragged``, ``ragged_to_dense``, ``combine_swa_extra_indices``,
``build_swa_token_ids``.
The same ops with flat arguments, for torch.compile, are ``torch.ops.dsv4x.*``.
"""

__version__ = "0.1.0"

from . import cuda, rocm
from .common import ops, reference
from .common.core import layouts
from .common.core.calls import Local
from .common.core.errors import BackendUnavailable, KernelNotSupported
from .common.core.layouts import CacheLayout, CacheSpec, MLAKVCacheLayout, PagedCache
from .common.core.model import LayerKind
from .common.core.platform import platform
from .common.core.spaces import TopkMethod
from .common.dispatch.planning import CachePlan, plan_cache
from .common.dispatch.problem import Problem
from .common.dispatch.registry import explain, refuse
from .common.ops.cache import (
    convert_cache,
    copy_entries,
    dequantize_k_cache_paged,
    quantize_and_insert_k_cache,
    requantize_fp8_to_block_scale,
)
from .common.ops.compaction import (
    CompactedCache,
    CompactedRows,
    compaction_scratch_bytes,
    gather_referenced_cache_blocks,
    gather_referenced_rows,
)
from .common.ops.indexer import (
    gather_indexer_k,
    get_paged_mqa_logits_metadata,
    indexer_context_lens,
    indexer_topk,
    mqa_logits,
    paged_indexer_topk,
    paged_mqa_logits,
)
from .common.ops.indices import (
    build_swa_token_ids,
    combine_swa_extra_indices,
    combine_topk_swa_indices,
    combined_topk_width,
    dense_to_ragged,
    local_to_slots,
    local_to_workspace_rows,
    ragged_to_dense,
    slots_to_compact_slots,
    window_slots,
)
from .common.ops.merge import merge_attention_states
from .common.ops.sparse_mla import scratch_bytes, sparse_mla_decode, sparse_mla_prefill
from .common.ops.topk import topk_method, topk_transform
from .common.portable import register_portable
from .common.step.attention import explain_step, sparse_mla_attention
from .common.step.chunk import SparsePrefillChunkCache
from .common.step.indexer import sparse_attn_indexer
from .common.step.metadata import AttentionMetadata, ExtraPages, StepMetadata
from .common.step.plan import StepExplanation
from .common.step.warmup import warmup


def _register_kernels() -> None:
    """The portable kernels and those of the backend's vendor; the other vendor's are refused by name."""
    register_portable()
    for backend, vendor in (("cuda", cuda), ("rocm", rocm)):
        if platform.backend == backend:
            vendor.register_kernels()
        else:
            for name in vendor.KERNELS:
                refuse(None, name)


_register_kernels()

__all__ = [
    "AttentionMetadata",
    "BackendUnavailable",
    "CacheLayout",
    "CachePlan",
    "CacheSpec",
    "CompactedCache",
    "CompactedRows",
    "ExtraPages",
    "KernelNotSupported",
    "LayerKind",
    "Local",
    "MLAKVCacheLayout",
    "PagedCache",
    "Problem",
    "SparsePrefillChunkCache",
    "StepExplanation",
    "StepMetadata",
    "TopkMethod",
    "build_swa_token_ids",
    "combine_swa_extra_indices",
    "combine_topk_swa_indices",
    "combined_topk_width",
    "compaction_scratch_bytes",
    "convert_cache",
    "copy_entries",
    "dense_to_ragged",
    "dequantize_k_cache_paged",
    "explain",
    "explain_step",
    "gather_indexer_k",
    "gather_referenced_cache_blocks",
    "gather_referenced_rows",
    "get_paged_mqa_logits_metadata",
    "indexer_context_lens",
    "indexer_topk",
    "layouts",
    "local_to_slots",
    "local_to_workspace_rows",
    "merge_attention_states",
    "mqa_logits",
    "ops",
    "paged_indexer_topk",
    "paged_mqa_logits",
    "plan_cache",
    "platform",
    "quantize_and_insert_k_cache",
    "ragged_to_dense",
    "reference",
    "requantize_fp8_to_block_scale",
    "scratch_bytes",
    "slots_to_compact_slots",
    "sparse_attn_indexer",
    "sparse_mla_attention",
    "sparse_mla_decode",
    "sparse_mla_prefill",
    "topk_method",
    "topk_transform",
    "warmup",
    "window_slots",
]
