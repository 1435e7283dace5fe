"""SGLang's DSv4 attention backend on CUDA, its attention by dsv4x. Importing this imports SGLang's models' side.

Every mode goes by the slot rows that SGLang's metadata holds; a plain extend goes by a step of dsv4x's with its choice
of paths. What the measured table does not give to dsv4x, and what dsv4x does not know, is SGLang's own call.

Nothing is kept on SGLang's metadata objects: it fills them again in place. What layers share dies with the step, in
every hook that begins one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.attention import deepseek_v4_backend as base
from sglang.srt.layers.attention import deepseek_v4_trtllm_backend as factories
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

import dsv4x

from ...common.core import layouts
from ...common.core.layouts import PagedCache
from ...common.core.model import WINDOW
from ...common.core.platform import capturing, platform
from ...common.dispatch.registry import candidates
from ...common.step.metadata import ASSUMED_LEN, ExtraPages, StepMetadata
from .. import activation
from ..measured import Table
from ..slot_rows import Rows, SlotRows
from .server import SERVER

_RATIOS = (0, 4, 128)

_KEYWORDS = frozenset(("save_kv_cache", "attn_sink", "cos_sin_cache"))

_WARM_TOKENS = (1, 2, 8, 33, 130)

Attend = Callable[[torch.Tensor, Any, Any], torch.Tensor]
"""q, layer and attention sink to the output, of one step and one ratio."""


def check() -> None:
    """Check every signature and field of SGLang's that this module uses.

    Raises:
        Mismatch: one is not as in 0.5.23.
    """
    backend = base.DeepseekV4AttnBackend
    for name, parameters in {
        "__init__": "model_runner skip_prefill speculative_step_id topk speculative_num_steps",
        "forward": "q k v layer forward_batch *args **kwargs",
        "_forward_attention": "q k v layer forward_batch compress_ratio save_kv_cache attn_sink cos_sin_cache **_",
        "init_forward_metadata": "forward_batch",
        "init_forward_metadata_in_graph": "forward_batch",
        "init_forward_metadata_out_graph": "forward_batch in_capture",
        "init_forward_metadata_for_breakable_cuda_graph_capture": "forward_batch",
        "prepare_forward_metadata_for_breakable_cuda_graph_replay": (
            "capture_metadata forward_batch static_forward_batch"
        ),
        "_snapshot_prefill_shared_reads": "forward_batch num_qo_tokens",
        "store_cache": "layer_id swa_k forward_batch",
    }.items():
        activation.expect_parameters(backend, name, ("self", *parameters.split()))
    multistep = base.DeepseekV4MultiStepBackend
    activation.expect_parameters(multistep, "__init__", ("self", "model_runner", "topk", "speculative_num_steps"))
    activation.expect_parameters(multistep, "_make_step_backend", ("self", "model_runner", "step_id"))
    activation.expect_parameters(factories, "create_deepseek_v4_attn_backend", ("model_runner", "**kwargs"))
    activation.expect_parameters(
        factories, "create_deepseek_v4_multistep_backend", ("model_runner", "topk", "speculative_num_steps")
    )
    activation.expect_attributes(factories, ("is_dsv4_trtllm_attn_enabled", "is_dsv4_mega_attn_enabled"))
    activation.expect_attributes(
        base, ("is_cp_active", "get_parallel", "get_platform", "use_dsv4_q8kv8_sparse_prefill", "async_h2d")
    )
    activation.expect_attributes(base.DSV4Metadata, ("core_attn_metadata", "late_layer_tail"))
    activation.expect_attributes(
        base.DSV4AttnMetadata,
        (
            "page_table", "swa_page_indices", "swa_topk_lengths", "c4_sparse_page_indices", "c4_sparse_raw_indices",
            "c4_sparse_topk_lengths", "c128_page_indices", "c128_topk_lengths_clamp1",
        ),
    )  # fmt: skip
    for name, parameters in {
        "get_swa_key_buffer_radix": "layer_id",
        "get_extra_key_buffer": "layer_id",
        "get_extra_key_page_size": "layer_id",
        "get_swa_key_page_size": "",
        "get_swa_key_layout": "",
        "get_extra_key_layout": "layer_id",
    }.items():
        activation.expect_parameters(base.DeepSeekV4TokenToKVPool, name, ("self", *parameters.split()))
    activation.expect_attributes(
        ForwardBatch,
        (
            "forward_mode", "batch_size", "seq_lens", "seq_lens_cpu", "seq_lens_sum", "req_pool_indices",
            "extend_seq_lens_cpu", "extend_prefix_lens_cpu",
        ),
    )  # fmt: skip
    for name in ("is_idle", "is_draft_extend_v2", "is_extend_without_speculative"):
        activation.expect_attributes(ForwardMode, (name,))
    activation.expect_attributes(SharedReadEnds, ("PRE_REPLAY", "UNKNOWN"))
    if base.KVLayout.V4.bytes_per_token != layouts.DSV4.entry_bytes or base.SWA_WINDOW != WINDOW:
        raise activation.Mismatch(
            f"an entry has {base.KVLayout.V4.bytes_per_token} bytes and the window {base.SWA_WINDOW} tokens, "
            f"need {layouts.DSV4.entry_bytes} and {WINDOW}"
        )


def install() -> None:
    """Put factories of dsv4x's classes where SGLang looks them up.

    Raises:
        Mismatch: SGLang is not what was checked.
    """
    check()
    attn, multistep = factories.create_deepseek_v4_attn_backend, factories.create_deepseek_v4_multistep_backend

    def theirs_by_option() -> bool:
        for option, chosen in (
            ("trtllm", factories.is_dsv4_trtllm_attn_enabled()),
            ("flashmla_mega", factories.is_dsv4_mega_attn_enabled()),
        ):
            if chosen:
                SERVER.stay_out(f"--dsv4-attn-backend {option} asks for SGLang's own kernels")
                return True
        return False

    def create_deepseek_v4_attn_backend(model_runner: Any, **kwargs: Any) -> Any:
        if theirs_by_option():
            return attn(model_runner, **kwargs)
        return Dsv4xAttnBackend(model_runner, **kwargs)

    def create_deepseek_v4_multistep_backend(model_runner: Any, topk: int, speculative_num_steps: int) -> Any:
        if theirs_by_option():
            return multistep(model_runner, topk=topk, speculative_num_steps=speculative_num_steps)
        return Dsv4xMultiStepBackend(model_runner, topk=topk, speculative_num_steps=speculative_num_steps)

    factories.create_deepseek_v4_attn_backend = create_deepseek_v4_attn_backend
    factories.create_deepseek_v4_multistep_backend = create_deepseek_v4_multistep_backend


def refusal(backend: Any) -> str:
    """Why everything of a backend object is left to SGLang; empty where dsv4x may run it."""
    pool = backend.token_to_kv_pool
    ratios = set(backend.present_ratios) - set(_RATIOS)
    refused = {
        "TRT-LLM's kernels were asked for": backend.trtllm_attn,
        "the mega kernel was asked for": backend.mega_attn,
        "DeepSeek-V4.1": backend.is_dsv41,
        f"layers of ratio {', '.join(map(str, sorted(ratios)))}": bool(ratios),
        "a request window": pool.request_window is not None,
        "HiSparse moves entries between pools": backend.hisparse_coordinator is not None,
        "DSpark's draft, whose window is a ring": backend.is_dspark_draft or pool.swa_req_ring_size is not None,
        "an SM120 GPU, for which SGLang has its own kernel": base.get_platform().is_sm120,
        f"cache layout {pool.get_swa_key_layout().value}": pool.get_swa_key_layout() is not base.KVLayout.V4,
    }
    return ", ".join(reason for reason, holds in refused.items() if holds)


class _Step:
    """What the layers of one forward pass share."""

    def __init__(self, in_capture: bool = False):
        self.in_capture = in_capture
        self.core: Any = None
        self.runners: dict[Any, Attend | None] = {}
        self.extend: _Extend | None = None
        self.extend_known = False


_Beside: Any = object
"""The class that the mixin stands before, which has all that it does not define."""


class Dsv4xMixin(_Beside):
    """Attention by dsv4x where the measured table says so; everything else is the class it stands before.

    Attributes:
        dsv4x_kernel, dsv4x_path: a kernel's and a path's name that benchmarks fix; None lets dsv4x choose.
        dsv4x_all: whether everything that dsv4x can run is its, whatever was measured.
        dsv4x_table: what was measured on this arch.
        dsv4x_refused: why all is left to SGLang, or empty.
        dsv4x_heads: this rank's query heads.
        dsv4x_sizes: ratio -> entries a page and pages of its pool; 0 is the window's.
    """

    dsv4x_kernel: str | None = None
    dsv4x_path: str | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        self._dsv4x_step = _Step()
        super().__init__(*args, **kwargs)
        self._dsv4x_caches: dict[int, tuple[int, PagedCache]] = {}
        self._dsv4x_plans: dict[Any, Any] = {}
        self._dsv4x_picks: dict[Any, tuple[str | None, str | None]] = {}
        activation.expect_instance_attributes(
            self,
            (
                "device", "softmax_scale", "page_size", "req_to_token", "token_to_kv_pool", "model_runner",
                "present_ratios", "hisparse_coordinator", "is_dsv41", "is_dspark_draft", "index_topk",
                "dsv4_prefill_backend", "trtllm_attn", "mega_attn", "forward_metadata", "MAX_SEQ_LEN_FOR_CAPTURE",
            ),
        )  # fmt: skip
        activation.expect_instance_attributes(
            self.token_to_kv_pool, ("request_window", "swa_req_ring_size", "full_to_swa_index_mapping", "layer_mapping")
        )
        self.dsv4x_all = SERVER.switch == "all"
        arch = platform.limits(self.device).arch
        self.dsv4x_table = Table.of(Path(__file__).parent, arch)
        self.dsv4x_heads = self.model_runner.model_config.num_attention_heads // base.get_parallel().attn_tp_size
        mapping = self.token_to_kv_pool.layer_mapping
        self._dsv4x_layers = Counter(item.compress_ratio for item in mapping if item is not None)
        # This allocator moves pages of either pool in step, so a page of one is a page of the other.
        allocator = getattr(self.model_runner, "token_to_kv_pool_allocator", None)
        self._dsv4x_pages_in_step = type(allocator) is SWATokenToKVPoolAllocator
        self.dsv4x_refused = refusal(self)
        SERVER.explain(self.dsv4x_table)
        if not self.dsv4x_refused and not self.dsv4x_all and not any(row.ahead for row in self.dsv4x_table.rows):
            self.dsv4x_refused = f"nothing was measured ahead on {arch}; {SERVER.variable}=all takes dsv4x all the same"
        if self.dsv4x_refused:
            SERVER.stay_out(self.dsv4x_refused)
            return
        SERVER.live(self._dsv4x_told(arch))
        self.dsv4x_sizes = {ratio: _size(self, ratio) for ratio in (0, *self.present_ratios)}
        warm_up(self)

    def _dsv4x_told(self, arch: str) -> str:
        if self.dsv4x_all:
            return f"all attention ({SERVER.variable}=all)"
        counted: dict[str, list[bool]] = {}
        for row in self.dsv4x_table.rows:
            mode = f"{'captured' if row.captured else 'eager'} {row.piece} of ratio {row.ratio}"
            counted.setdefault(mode, []).append(row.ahead)
        told = ", ".join(f"{mode} in {sum(ahead)} of {len(ahead)} shapes" for mode, ahead in counted.items())
        card, here = self.dsv4x_table.origin.get("device", "an unnamed card"), platform.limits(self.device).name
        where = f"{arch}, on {card}{'' if here == card else f', which is not this {here}'}"
        return f"attention where it was measured ahead on {where} ({told}), SGLang's own elsewhere"

    # The hooks that begin a step.

    def init_forward_metadata(self, forward_batch: Any) -> Any:
        self._dsv4x_step = _Step()
        return super().init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> Any:
        # What runs eagerly before a capture is its warm-up and takes what the capture will.
        self._dsv4x_step = _Step(in_capture)
        return super().init_forward_metadata_out_graph(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> Any:
        self._dsv4x_step = _Step(self._dsv4x_step.in_capture)
        return super().init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_for_breakable_cuda_graph_capture(self, forward_batch: Any) -> Any:
        self._dsv4x_step = _Step()
        return super().init_forward_metadata_for_breakable_cuda_graph_capture(forward_batch)

    def prepare_forward_metadata_for_breakable_cuda_graph_replay(
        self, capture_metadata: Any, forward_batch: Any, *, static_forward_batch: Any = None
    ) -> Any:
        self._dsv4x_step = _Step()
        return super().prepare_forward_metadata_for_breakable_cuda_graph_replay(
            capture_metadata, forward_batch, static_forward_batch=static_forward_batch
        )

    def _snapshot_prefill_shared_reads(self, forward_batch: Any, *, num_qo_tokens: int) -> Any:
        """Build the step here: afterwards SGLang may give what its tables say to the next batch."""
        known = not self.dsv4x_refused and isinstance(self.forward_metadata, base.DSV4Metadata)
        if known and self._dsv4x_extend(forward_batch, self._dsv4x_begun()) is not None:
            return SharedReadEnds.PRE_REPLAY
        return super()._snapshot_prefill_shared_reads(forward_batch, num_qo_tokens=num_qo_tokens)

    def _forward_attention(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, compress_ratio: int, *args: Any, **kwargs: Any
    ) -> Any:
        attend = None
        if not self.dsv4x_refused and not args and kwargs.keys() <= _KEYWORDS and kwargs.get("cos_sin_cache") is None:
            attend = self._dsv4x_attend(q, layer.tp_q_head_num, forward_batch, compress_ratio)
        if attend is None:
            return super()._forward_attention(q, k, v, layer, forward_batch, compress_ratio, *args, **kwargs)
        if kwargs.get("save_kv_cache", True):
            self.store_cache(layer.layer_id, k, forward_batch)
        return attend(q, layer, kwargs.get("attn_sink"))

    def _dsv4x_begun(self) -> _Step:
        """The step of the metadata in use."""
        step, core = self._dsv4x_step, self.forward_metadata.core_attn_metadata
        if step.core is not core:
            if step.core is not None:
                step = self._dsv4x_step = _Step(step.in_capture)
            step.core = core
        return step

    def _dsv4x_attend(self, q: torch.Tensor, heads: int, forward_batch: Any, ratio: int) -> Attend | None:
        """What runs this layer and those like it, or None for SGLang's own."""
        metadata, mode = self.forward_metadata, forward_batch.forward_mode
        if mode.is_idle() or not isinstance(metadata, base.DSV4Metadata) or metadata.late_layer_tail is not None:
            return None
        step = self._dsv4x_begun()
        key = ratio, q.shape[0], heads, mode, capturing(q.device)
        if key not in step.runners:
            step.runners[key] = self._dsv4x_chosen(step, key, forward_batch)
        return step.runners[key]

    def _dsv4x_chosen(self, step: _Step, key: tuple[Any, ...], forward_batch: Any) -> Attend | None:
        ratio, tokens, heads, mode, captured = key
        core = step.core
        if ratio not in _RATIOS or core.swa_page_indices.ndim != 2 or not tokens:
            return None
        if mode.is_extend_without_speculative():
            extend = self._dsv4x_extend(forward_batch, step)
            if extend is not None and heads == self.dsv4x_heads and tokens >= extend.tokens:
                return _Layers(self, extend, ratio, heads).by_step
            # By rows an extend was never measured. But after a step was built SGLang's tables are not to be read.
            ours = self.dsv4x_all or extend is not None
        else:
            ours = self.dsv4x_all or self.dsv4x_table.verdict(
                "decode", {ratio: 1}, heads, tokens, captured=captured or step.in_capture
            ).ours  # fmt: skip
        return self._dsv4x_rows(step, key, forward_batch) if ours else None

    def _dsv4x_rows(self, step: _Step, key: tuple[Any, ...], forward_batch: Any) -> Attend:
        ratio, tokens, heads, mode, captured = key
        core, extra = step.core, None
        # Lengths can be <= 0 in a draft's extend under data parallel padding; nothing else is out of range.
        clamped = mode.is_draft_extend_v2()
        count = min(tokens, core.swa_page_indices.shape[0])
        if ratio:
            extra = Rows.first(count, core.sparse_page_indices(ratio), core.sparse_topk_lengths(ratio), clamped)
        # A replay's lengths are not known to whoever captures it.
        total = None if captured or step.in_capture else forward_batch.seq_lens_sum
        length = total // max(1, forward_batch.batch_size) if isinstance(total, int) else ASSUMED_LEN
        entries = min(length, WINDOW) + (min(length // ratio, extra.indices.shape[1]) if ratio and extra else 0)
        shared = SlotRows(
            Rows.first(count, core.swa_page_indices, core.swa_topk_lengths, clamped), extra, entries=_rounded(entries),
            trusted=True, captured=captured, kernel=self.dsv4x_kernel, plans=None if captured else self._dsv4x_plans,
        )  # fmt: skip
        return _Layers(self, shared, ratio, heads).by_rows

    def _dsv4x_extend(self, forward_batch: Any, step: _Step) -> _Extend | None:
        """The step of a plain extend, made once; None where it is SGLang's, or no plain extend."""
        if not step.extend_known:
            step.extend_known = True
            lens = forward_batch.extend_seq_lens_cpu
            if (
                forward_batch.forward_mode.is_extend_without_speculative()
                and lens is not None
                and forward_batch.seq_lens_cpu is not None
                and self.forward_metadata.late_layer_tail is None
                and not base.is_cp_active(forward_batch)
                and not base.use_dsv4_q8kv8_sparse_prefill(self.dsv4_prefill_backend)
                and self._dsv4x_pages_in_step
                and len(lens)
                and min(lens) > 0
                and self._dsv4x_extends(sum(lens), max(forward_batch.extend_prefix_lens_cpu or [0]))
            ):
                step.extend = _Extend.build(self, forward_batch, step.core)
        return step.extend

    def _dsv4x_extends(self, tokens: int, context: int) -> bool:
        """Whether a plain extend is dsv4x's: all layers or none, since either way has its own cost a step."""
        return self.dsv4x_all or self.dsv4x_table.verdict(
            "extend", self._dsv4x_layers, self.dsv4x_heads, tokens, captured=False, context=context
        ).ours  # fmt: skip

    def dsv4x_caches_of(self, layer_id: int, ratio: int) -> tuple[PagedCache, PagedCache | None]:
        """The layer's caches. The getters are called each time: a hierarchical cache waits for its transfers there."""
        pool = self.token_to_kv_pool
        swa = self._dsv4x_paged(2 * layer_id, pool.get_swa_key_buffer_radix(layer_id), pool.get_swa_key_page_size())
        if not ratio:
            return swa, None
        page_size = pool.get_extra_key_page_size(layer_id)
        return swa, self._dsv4x_paged(2 * layer_id + 1, pool.get_extra_key_buffer(layer_id), page_size)

    def _dsv4x_paged(self, key: int, buffer: torch.Tensor, page_size: int) -> PagedCache:
        kept = self._dsv4x_caches.get(key)
        if kept is None or kept[0] != buffer.data_ptr() or kept[1].pages != buffer.shape[0]:
            kept = buffer.data_ptr(), PagedCache(buffer.view(torch.uint8), layouts.DSV4, page_size)
            self._dsv4x_caches[key] = kept
        return kept[1]


class _Layers(NamedTuple):
    """The layers of one step and ratio: what they share, and the backend whose caches they read."""

    backend: Any
    shared: Any
    ratio: int
    heads: int

    def by_rows(self, q: torch.Tensor, layer: Any, attn_sink: Any) -> torch.Tensor:
        """By slot rows."""
        caches = self.backend.dsv4x_caches_of(layer.layer_id, self.ratio)
        rows: SlotRows = self.shared
        return rows.attend(q, caches, attn_sink, self.backend.softmax_scale, self.heads)

    def by_step(self, q: torch.Tensor, layer: Any, attn_sink: Any) -> torch.Tensor:
        """By the step of a plain extend."""
        swa_cache, extra_cache = self.backend.dsv4x_caches_of(layer.layer_id, self.ratio)
        extend: _Extend = self.shared
        count, out, given = extend.tokens, None, None
        if q.shape[:2] != (count, self.heads):
            given = out = torch.empty_like(q)
            if q.shape[0] > count:
                out[count:].zero_()
                q, given = q[:count], out[:count]
        selected: dict[str, Any] = extend.selected() if self.ratio == 4 else {}
        meta = extend.step[self.ratio or 1]
        path, kernel = self._picked(q, (swa_cache, extra_cache), meta, selected)
        made, _ = dsv4x.sparse_mla_attention(
            q, swa_cache, extra_cache, meta, attn_sink=attn_sink, out=given, softmax_scale=self.backend.softmax_scale,
            path=path, kernel=kernel, return_lse=False, heads=self.heads, **selected,
        )  # fmt: skip
        return made if out is None else out

    def _picked(self, q: torch.Tensor, caches: Any, meta: Any, selected: dict[str, Any]) -> tuple[Any, Any]:
        """The path and the kernel to name, weighed once for extends of about this size; None leaves it to dsv4x.

        Weighing takes the host longer than a short layer. Only ``direct`` is named, which can always run: another path
        may have no room for its rows the next time.
        """
        backend, extend = self.backend, self.shared
        if backend.dsv4x_path is not None or backend.dsv4x_kernel is not None:
            return backend.dsv4x_path, backend.dsv4x_kernel
        key = self.ratio, q.shape[1], self.heads, _rounded(extend.tokens), _rounded(extend.longest), extend.requests
        if key not in backend._dsv4x_picks:
            found = dsv4x.explain_step(
                q, caches[0], caches[1], meta, selected.get("topk_indices"), return_lse=False,
                topk_slots=selected.get("topk_slots"), heads=self.heads,
            )  # fmt: skip
            direct = found.chosen == "direct"
            backend._dsv4x_picks[key] = ("direct", found.kernels["direct"]) if direct else (None, None)
        return backend._dsv4x_picks[key]


@dataclasses.dataclass
class _Extend:
    """A plain extend as a step of dsv4x's, over copies of what SGLang's tables say.

    Attributes:
        step: the metadata.
        core: SGLang's, in which the indexer leaves its choice.
        tokens: query tokens, padding excluded.
        longest: raw tokens of the longest request.
        requests: how many there are.
    """

    step: StepMetadata
    core: Any
    tokens: int
    longest: int
    requests: int
    _selected: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    _of: Any = None

    @classmethod
    def build(cls, backend: Any, forward_batch: Any, core: Any) -> _Extend:
        device, pool = backend.device, backend.token_to_kv_pool
        seq_lens_cpu = torch.as_tensor(forward_batch.seq_lens_cpu, dtype=torch.int32, device="cpu")
        query_lens = torch.tensor(forward_batch.extend_seq_lens_cpu, dtype=torch.int32, device="cpu")
        starts_cpu = torch.zeros(len(query_lens) + 1, dtype=torch.int32, device="cpu")
        torch.cumsum(query_lens, 0, out=starts_cpu[1:])
        tokens, longest = int(starts_cpu[-1]), int(seq_lens_cpu.max())
        starts = base.async_h2d(starts_cpu.tolist(), dtype=torch.int32, device=device)
        seq_lens = forward_batch.seq_lens.to(torch.int32)
        if seq_lens is forward_batch.seq_lens:
            # The scheduler's own buffer changes under a later batch.
            seq_lens = seq_lens.clone()
        locations = backend.req_to_token[forward_batch.req_pool_indices.long(), : longest : backend.page_size]
        swa_table = (pool.full_to_swa_index_mapping[locations.long()] // backend.page_size).to(torch.int32)
        table = (locations // backend.page_size).to(torch.int32)
        (swa_page_size, swa_pages), sizes = backend.dsv4x_sizes[0], backend.dsv4x_sizes
        topk = core.c4_sparse_page_indices.shape[1] if 4 in sizes else None
        extra = {
            ratio: ExtraPages(table, sizes[ratio][0], sizes[ratio][1], topk=topk if ratio == 4 else None)
            for ratio in backend.present_ratios
        }
        step = StepMetadata.build(
            starts, seq_lens, swa_table, extra, swa_page_size=swa_page_size, swa_pages=swa_pages, num_tokens=tokens,
            query_start_loc_cpu=starts_cpu, seq_lens_cpu=seq_lens_cpu,
        )  # fmt: skip
        return cls(step, core, tokens, longest, len(query_lens))

    def selected(self) -> dict[str, torch.Tensor]:
        """The indexer's choice, of which all layers are given the same tensors."""
        core = self.core
        if self._of is not core.c4_sparse_page_indices:
            self._of = core.c4_sparse_page_indices
            self._selected = {
                "topk_slots": core.c4_sparse_page_indices[: self.tokens],
                "topk_lens": core.c4_sparse_topk_lengths[: self.tokens],
            }
            if core.c4_sparse_raw_indices is not None:
                self._selected["topk_indices"] = core.c4_sparse_raw_indices[: self.tokens]
        return self._selected


def _rounded(count: int) -> int:
    """``count`` up to a quarter more, so that steps of about the same size look alike."""
    unit = 1 << max(0, count.bit_length() - 3)
    return -(-count // unit) * unit


def _size(backend: Any, ratio: int) -> tuple[int, int]:
    """Entries a page, and pages, of the pool of a ratio; once, because the getters wait for transfers."""
    cache = backend.dsv4x_caches_of(_layer_of(backend.token_to_kv_pool, ratio or None), ratio)[1 if ratio else 0]
    return cache.page_size, cache.pages


def _layer_of(pool: Any, ratio: int | None) -> int:
    """The first layer of this stage with a ratio, or with any."""
    for layer_id, item in enumerate(pool.layer_mapping):
        if item is not None and ratio in (None, item.compress_ratio):
            return layer_id
    raise ValueError(f"ratio: got {ratio}, need one that the pool has")


class Dsv4xAttnBackend(Dsv4xMixin, base.DeepseekV4AttnBackend):
    """The target's backend, and a draft's."""


class Dsv4xMultiStepBackend(Dsv4xMixin, base.DeepseekV4MultiStepBackend):
    """A draft's steps, each with a backend of its own."""

    def _make_step_backend(self, model_runner: Any, step_id: int) -> Dsv4xAttnBackend:
        return Dsv4xAttnBackend(
            model_runner, speculative_step_id=step_id, topk=self.topk, speculative_num_steps=self.speculative_num_steps
        )


_warmed: set[Any] = set()


def warm_up(backend: Any) -> None:
    """Compile what the backend will launch before anything is captured, once a process for pools that look alike."""
    pool, device = backend.token_to_kv_pool, backend.device
    if device.type != "cuda":
        return
    layers = {ratio: _layer_of(pool, ratio) for ratio in backend.present_ratios if ratio}
    caches = {ratio: backend.dsv4x_caches_of(layer_id, ratio) for ratio, layer_id in layers.items()}
    caches[0] = backend.dsv4x_caches_of(_layer_of(pool, None), 0)
    # What is compiled depends on no number of pages.
    key = backend.dsv4x_heads, tuple((ratio, swa.page_size) for ratio, (swa, _) in sorted(caches.items()))
    if key in _warmed:
        return
    _warmed.add(key)
    for ratio, pair in caches.items():
        for tokens in _WARM_TOKENS:
            _run_rows(backend, pair, ratio, tokens)
    if backend.dsv4x_all or any(row.ahead for row in backend.dsv4x_table.rows if row.piece == "extend"):
        for ratio, (swa, extra) in caches.items():
            dsv4x.warmup(
                swa, extra, heads=backend.dsv4x_heads, topk=backend.index_topk, compress_ratios=(ratio or 1,),
                softmax_scale=backend.softmax_scale, capturing=False,
            )  # fmt: skip


def _run_rows(backend: Any, caches: tuple[PagedCache, PagedCache | None], ratio: int, tokens: int) -> None:
    """Rows without an entry through every kernel that may be picked for them."""
    device, heads = backend.device, backend.dsv4x_heads
    widths = {4: backend.index_topk, 128: -(-backend.MAX_SEQ_LEN_FOR_CAPTURE // 128 // 64) * 64}

    def rows(width: int) -> Rows:
        indices = torch.full((tokens, width), -1, dtype=torch.int32, device=device)
        return Rows(indices, torch.zeros(tokens, dtype=torch.int32, device=device))

    q = torch.zeros(tokens, heads, 512, dtype=torch.bfloat16, device=device)
    sink = torch.zeros(heads, dtype=torch.float32, device=device)
    swa, extra = rows(WINDOW), rows(max(64, widths[ratio])) if ratio else None
    for entries in (WINDOW, 1024):
        problem = dsv4x.Problem(
            "sparse_mla_decode", device.type, platform.limits(device).arch, tokens=tokens, heads=heads, width=WINDOW,
            extra_width=extra.indices.shape[1] if extra is not None else 0, entries=entries, lse=False,
            caches=tuple(cache.spec for cache in caches if cache is not None),
        )  # fmt: skip
        for record in candidates(problem):
            shared = SlotRows(swa, extra, entries=entries, trusted=True, captured=False, kernel=record.name)
            shared.attend(q, caches, sink, backend.softmax_scale, heads)
