"""Problems: one call of one op, as far as choosing its kernel goes. Each family of ops has its own fields."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..core.layouts import CacheSpec
from ..core.platform import platform
from ..core.spaces import TopkMethod

# Triton reads it once too, when a kernel is defined.
_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"

_P = TypeVar("_P", bound="Problem")


@dataclass(frozen=True)
class Problem:
    """What every op's problem says.

    ``Problem("sparse_mla_decode", heads=64, width=128)`` builds an :class:`AttentionProblem`: the op's name decides the
    family. An op that dsv4x does not have gets this class; a kernel of such an op may be asked with any other.

    Attributes:
        op: the op's name, such as ``"sparse_mla_decode"``.
        device: ``"cuda"`` (also on ROCm torch) or ``"cpu"``.
        arch: ``"sm_90"``, ``"gfx942"``, ... or ``"cpu"``.
        tokens: query tokens, or rows for cache and index ops.
        interpreter: whether Triton runs in its interpreter (``TRITON_INTERPRET=1``).
        capturing: whether the current stream is being captured into a graph.

    Raises:
        TypeError: a field that the op's family does not have; the message lists those it has.
    """

    op: str
    device: str = "cuda"
    arch: str = ""
    tokens: int = 1
    _: KW_ONLY
    interpreter: bool = _INTERPRETER
    capturing: bool = False

    if TYPE_CHECKING:
        # Which fields there are follows from the op's name, which a type checker does not look up.
        def __init__(self, op: str, device: str = "cuda", arch: str = "", tokens: int = 1, **fields: Any) -> None: ...

    def __new__(cls: type[_P], op: str = "", *args: Any, **fields: Any) -> _P:
        if cls is not Problem:
            return object.__new__(cls)
        if not isinstance(op, str):
            raise TypeError(f"op: got {type(op).__name__}, need an op's name")
        known = fields_of(op)
        for name in fields:
            if name not in known:
                raise TypeError(f"{name}: no field of a problem of {op}, need one of {', '.join(known)}")
        return object.__new__(family_of(op))  # type: ignore[return-value]

    @classmethod
    def on(cls: type[_P], op: str, device: torch.device, **fields: Any) -> _P:
        """A problem on ``device`` and its current stream."""
        if device.type != "cuda":
            return cls(op, device.type, "cpu", **fields)
        capturing = torch.cuda.is_current_stream_capturing()
        return cls(op, device.type, platform.limits(device).arch, capturing=capturing, **fields)


@dataclass(frozen=True, kw_only=True)
class CacheProblem(Problem):
    """An op over paged caches.

    Attributes:
        caches: the caches read or written, the window's first.
        width: width of the index rows; 0 where the op has none.
    """

    caches: tuple[CacheSpec, ...] = ()
    width: int = 0


@dataclass(frozen=True, kw_only=True)
class AttentionProblem(CacheProblem):
    """``sparse_mla_decode`` or ``sparse_mla_prefill``; ``width`` is that of the (window) index rows.

    Attributes:
        heads: query heads on this rank.
        head_dim: values per head of q.
        extra_width: width of the extra index rows; 0 without an extra cache.
        entries: entries a token reads on average; 0 where nobody knows, and the widths are taken.
        rows: workspace rows (``sparse_mla_prefill``).
        lse: whether the lse has to be returned.
        split_k: the splits of each row's entries that the caller fixed; 0 where the kernel decides.
        local: whether the extra indices are local entries, of which the kernel has to make slots.
        out: whether the result goes into a buffer of the caller's; some vendors' kernels only make their own.
    """

    heads: int = 0
    head_dim: int = 512
    extra_width: int = 0
    entries: int = 0
    rows: int = 0
    lse: bool = True
    split_k: int = 0
    local: bool = False
    out: bool = False

    @property
    def entries_read(self) -> int:
        """Entries a token reads on average: as stated, or of rows as long as they are wide."""
        return self.entries or self.width + self.extra_width

    @property
    def attention_flops(self) -> float:
        return 4.0 * self.tokens * self.heads * self.head_dim * self.entries_read


@dataclass(frozen=True, kw_only=True)
class LogitsProblem(CacheProblem):
    """``paged_mqa_logits``, whose tokens are requests, or ``mqa_logits``; ``width`` is the columns of the logits.

    Attributes:
        heads: index heads.
        head_dim: values per head.
        next_n: query rows a request (``paged_mqa_logits``).
        ragged: whether rows are single and name their requests (``paged_mqa_logits``).
        rows: flat rows of K (``mqa_logits``).
        q_encoding: ``"e4m3fn"``, ``"e4m3fnuz"`` or ``"e2m1"``.
        k_encoding: the same of flat K, or ``"mxfp8"``: e4m3fn with ue8m0 scales. What a cache holds, its layout says.
        relative: whether columns count from each row's own first entry (``max_seqlen_k`` of ``mqa_logits``).
        clean: whether columns outside a row's entries have to be -inf.
    """

    heads: int = 0
    head_dim: int = 128
    next_n: int = 1
    ragged: bool = False
    rows: int = 0
    q_encoding: str = "e4m3fn"
    k_encoding: str = "e4m3fn"
    relative: bool = False
    clean: bool = False


@dataclass(frozen=True, kw_only=True)
class SelectionProblem(Problem):
    """``topk_transform`` or ``topk_merge``.

    Attributes:
        width: columns of the logits, or candidates a row.
        k: indices a row.
        method: the index space of the result.
        stable: whether ties go to the smallest index and rows are in ascending order.
    """

    width: int = 0
    k: int = 0
    method: TopkMethod = TopkMethod.LOCAL
    stable: bool = True


@dataclass(frozen=True, kw_only=True)
class ScheduleProblem(Problem):
    """``get_paged_mqa_logits_metadata``, whose tokens are requests.

    Attributes:
        next_n: query rows a request.
        page_size: entries a page.
        num_sms: multiprocessors of the kernel the schedule is for.
    """

    next_n: int = 1
    page_size: int = 64
    num_sms: int = 0


@dataclass(frozen=True, kw_only=True)
class IndexProblem(Problem):
    """An op that makes index rows of index rows.

    Attributes:
        width: width of the index rows.
    """

    width: int = 0


@dataclass(frozen=True, kw_only=True)
class MergeProblem(Problem):
    """``merge_attention_states``.

    Attributes:
        states: partial states a row.
        heads: query heads.
    """

    states: int = 0
    heads: int = 0


_FAMILIES: dict[str, type[Problem]] = {
    **dict.fromkeys(("sparse_mla_decode", "sparse_mla_prefill"), AttentionProblem),
    **dict.fromkeys(("paged_mqa_logits", "mqa_logits"), LogitsProblem),
    **dict.fromkeys(("topk_transform", "topk_merge"), SelectionProblem),
    "get_paged_mqa_logits_metadata": ScheduleProblem,
    "merge_attention_states": MergeProblem,
    **dict.fromkeys(
        (
            "quantize_and_insert_k_cache",
            "dequantize_k_cache_paged",
            "copy_entries",
            "gather_workspace",
            "gather_and_combine",
            "requantize_fp8_to_block_scale",
            "list_referenced",
            "copy_pages",
            "gather_indexer_k",
            "plan_gather",
        ),
        CacheProblem,
    ),
    **dict.fromkeys(
        (
            "combine_topk_swa_indices",
            "combine_swa_extra_indices",
            "window_slots",
            "build_swa_token_ids",
            "local_to_slots",
            "fill_step",
            "pack_slots",
            "local_to_workspace_rows",
            "slots_to_compact_slots",
            "dense_to_ragged",
            "ragged_to_dense",
        ),
        IndexProblem,
    ),
}


def family_of(op: str) -> type[Problem]:
    """The class of an op's problems; :class:`Problem` itself for an op that dsv4x does not have."""
    return _FAMILIES.get(op, Problem)


def fields_of(op: str) -> tuple[str, ...]:
    """The names of the fields that a problem of ``op`` has."""
    return tuple(field.name for field in dataclasses.fields(family_of(op)))
