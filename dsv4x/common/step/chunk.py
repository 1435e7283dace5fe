"""What the layers of one kind share while a chunk is prefilled from gathered rows, and how it fits its workspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..core import checks
from ..dispatch.registry import Kernel
from ..ops import indices
from ..ops.compaction import compaction_scratch_bytes
from .metadata import AttentionMetadata

ROW_BYTES = 1024
"""A workspace row: 512 bf16 values."""

DEFAULT_WORKSPACE_BYTES = 256 << 20
"""The workspace cap where none is given."""


@dataclass(frozen=True)
class Group:
    """A run of requests that share one filling of the workspace.

    Attributes:
        requests, tokens: the run, as slices of the batch's requests and query tokens.
        slots: int32 ``[S]``, each workspace row's slot: of the extra cache before row C, of the window's from there on.
            A page that is not in its pool gives -1, and its row is never written.
        compressed_rows: C.
        compressed_base, swa_base: int32 ``[R]``, each of the batch's requests' first row of either kind; only the
            group's own mean anything.
        gather_lens: int32 ``[R]``, trailing raw tokens of each request that are gathered.
        entries: compressed entries of the group's longest request.
        blocks: the group's tokens again, in the blocks whose index rows fit beside the rows.
    """

    requests: slice
    tokens: slice
    slots: torch.Tensor
    compressed_rows: int
    compressed_base: torch.Tensor
    swa_base: torch.Tensor
    gather_lens: torch.Tensor
    entries: int
    blocks: tuple[slice, ...]

    @property
    def rows(self) -> int:
        return self.slots.shape[0]


@dataclass(frozen=True)
class Window:
    """The whole chunk's window rows, and each token's among them.

    Attributes:
        slots: int32 ``[W]``, the window cache's slot of each workspace row, as in :class:`Group`.
        indices: int32 ``[T, >= window_size]`` workspace rows, -1 padded.
        lens: int32 ``[T]`` spans.
    """

    slots: torch.Tensor
    indices: torch.Tensor
    lens: torch.Tensor

    @property
    def rows(self) -> int:
        return self.slots.shape[0]


class SparsePrefillChunkCache:
    """The gathered path's plan for one chunk: built once, shared by the layers of one kind, rebuilt for the next chunk.

    It holds what follows from the chunk alone: which slot every workspace row is gathered from, each request's bases
    and lengths, the index rows of layers that no indexer chooses for, and how the chunk is cut so that workspace and
    index rows stay within ``max_bytes``: by requests first, and by query blocks where one request's index rows are too
    many. Nothing that a layer brings (caches' bytes, top-k, q) is kept. A request whose rows alone pass the cap cannot
    be gathered; :attr:`fits` says so, and another path reads it. The ``referenced`` path is cut by tokens alone.

    ``plans`` is where :func:`~dsv4x.sparse_mla_attention` keeps what it decided for layers of a shape.

    It is good until :meth:`rebuild` or :meth:`close`. Using it with metadata it was not built for, or after a length
    or a block table changed in place, is an error, but for tensors made under ``torch.inference_mode``, whose changes
    torch does not count; nothing is recognised by its address.

    Args:
        max_bytes: the cap on workspace and index rows together.
        workspace: bf16 ``[rows, 512]`` that the caller owns, rows contiguous; its rows then bound the chunk's beside
            ``max_bytes``. None allocates one for the duration of each call.
    """

    def __init__(self, max_bytes: int = DEFAULT_WORKSPACE_BYTES, workspace: torch.Tensor | None = None):
        checks.integer("max_bytes", max_bytes, 0)
        if workspace is not None:
            checks.rows_apart("workspace", checks.tensor("workspace", workspace, (None, 512), torch.bfloat16))
        self.max_bytes, self._workspace = max_bytes, workspace
        self._meta: AttentionMetadata | None = None
        self._versions: tuple[int, ...] = ()
        self._groups: tuple[Group, ...] | None = None
        self._spans: list[tuple[int, int, int]] | None = None
        self._shared: tuple[torch.Tensor, torch.Tensor] | None = None
        self._window: Window | None = None
        self._index_rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self.plans: dict[tuple[Any, ...], Any] = {}

    def rebuild(self, meta: AttentionMetadata) -> SparsePrefillChunkCache:
        """Plan for another chunk. What was planned before is dropped; tensors are built on first use."""
        if self._workspace is not None and self._workspace.device != meta.seq_lens.device:
            raise ValueError(f"workspace: on {self._workspace.device}, need {meta.seq_lens.device}")
        self.close()
        self._meta, self._versions = meta, _versions(meta)
        self._spans = _split(meta, self.max_bytes, None if self._workspace is None else self._workspace.shape[0])
        return self

    def close(self) -> None:
        """Drop what was planned; the next use is an error until :meth:`rebuild`."""
        self._meta = self._groups = self._spans = self._shared = self._window = self._index_rows = None
        self.plans = {}

    def check(self, meta: AttentionMetadata) -> None:
        """Raise ValueError unless it was built for ``meta`` as it is now."""
        if self._meta is not meta:
            seen = "other metadata" if self._meta is not None else "nothing"
            raise ValueError(f"chunk: built for {seen}, need rebuild(meta) for this metadata")
        if self._versions != _versions(meta):
            raise ValueError("chunk: a length or a block table changed in place since rebuild, need rebuild(meta)")

    @property
    def fits(self) -> bool:
        """Whether every request's rows fit under the cap."""
        return self._spans is not None

    @property
    def workspace_rows(self) -> int:
        """Rows the largest filling of the workspace takes."""
        assert self._meta is not None
        return max((_rows(self._meta, a, b) for a, b, _ in self._spans or ()), default=0)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace and index rows a layer's call takes at its peak."""
        meta = self._meta
        assert meta is not None
        return max(
            (
                _rows(meta, a, b) * ROW_BYTES + min(block, _count(_tokens(meta, a, b))) * _index_bytes(meta, a, b)
                for a, b, block in self._spans or ()
            ),
            default=0,
        )

    @property
    def groups(self) -> tuple[Group, ...]:
        """The chunk in fillings of the workspace, built on first use."""
        if self._groups is None:
            assert self._meta is not None
            assert self._spans is not None
            self._groups = tuple(_group(self._meta, *span) for span in self._spans)
        return self._groups

    @property
    def window(self) -> Window:
        """The window rows of the ``referenced`` path, built on first use."""
        if self._window is None:
            meta = self._meta
            assert meta is not None
            slots = _ragged_slots(
                meta.swa_block_table, meta.seq_lens - meta.gathered, meta.gathered, sum(meta.gather_counts),
                meta.swa_page_size, meta.swa_pages,
            )  # fmt: skip
            rows, lens = indices.combine_topk_swa_indices(
                meta.position[:, None][:, :0], meta.query_start_loc, meta.seq_lens, meta.gathered,
                torch.zeros_like(meta.gathered), _exclusive_sum(meta.gathered), meta.window_size, meta.compress_ratio,
                0, row_slots=slots, positions=(meta.request, meta.position),
            )  # fmt: skip
            self._window = Window(slots, rows, lens)
        return self._window

    def referenced_block(self, width: int) -> int:
        """Tokens the ``referenced`` path takes at once, with top-k rows of ``width``; 0 when not one fits."""
        meta = self._meta
        assert meta is not None
        compressed, windows = sum(meta.compressed_counts), sum(meta.gather_counts)
        window_bytes = windows * (ROW_BYTES + 4) + meta.num_tokens * _index_row_bytes(0, meta.window_size)
        slots = meta.extra_pages * meta.extra_page_size
        left = self.max_bytes - window_bytes - compaction_scratch_bytes(slots)
        room = left if self._workspace is None else min(left, (self._workspace.shape[0] - windows) * ROW_BYTES)
        # A listed row's slot; an index's slot and its remapped row; the combined index row.
        row = ROW_BYTES + 4
        token = 8 * width + _index_row_bytes(width, meta.window_size)
        if compressed * row + meta.num_tokens * token <= left and compressed * ROW_BYTES <= room:
            return max(1, meta.num_tokens)
        return max(0, min(meta.num_tokens, left // (width * row + token), room // max(1, width * ROW_BYTES)))

    def referenced_blocks(self, width: int) -> list[slice]:
        """The chunk's tokens in blocks of :meth:`referenced_block`."""
        assert self._meta is not None
        tokens, step = self._meta.num_tokens, self.referenced_block(width)
        return [slice(t, min(t + step, tokens)) for t in range(0, tokens, step)]

    def referenced_rows(self, width: int) -> int:
        """Workspace rows a block's referenced entries may take."""
        assert self._meta is not None
        return min(self.referenced_block(width) * width, sum(self._meta.compressed_counts))

    def workspace(self, rows: int) -> torch.Tensor:
        """bf16 ``[rows, 512]`` to gather into, not filled."""
        if self._workspace is not None:
            return self._workspace[:rows]
        assert self._meta is not None
        return torch.empty(rows, 512, dtype=torch.bfloat16, device=self._meta.seq_lens.device)

    def index_rows(
        self, group: Group, block: slice, topk_indices: torch.Tensor | None, combine: Kernel
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Workspace rows and spans of one block's tokens; kept for the layers where no indexer chooses them.

        ``combine`` is the kernel of ``combine_topk_swa_indices`` that makes them, on the current device.
        """
        if topk_indices is None and self._shared is not None:
            return self._shared
        arguments = self.combining(group, block, topk_indices)
        combine.run(*arguments)
        rows, lens = arguments[-2:]
        # Only where it is the whole chunk: kept rows count against the cap too.
        assert self._meta is not None
        if topk_indices is None and _count(block) == self._meta.num_tokens:
            self._shared = (rows, lens)
        return rows, lens

    def combining(self, group: Group, block: slice, topk_indices: torch.Tensor | None) -> tuple[Any, ...]:
        """What the kernels of ``combine_topk_swa_indices`` take for one block's tokens: rows and spans come last."""
        meta = self._meta
        assert meta is not None
        tokens, device = _count(block), meta.seq_lens.device
        whole = tokens == meta.num_tokens
        if topk_indices is None:
            every = torch.arange(group.entries, dtype=torch.int32, device=device)
            local, topk = every.expand(tokens, group.entries), group.entries
        else:
            local, topk = topk_indices if whole else topk_indices[block], min(topk_indices.shape[1], meta.topk)
        width = indices.combined_topk_width(topk, meta.window_size)
        kept = self._index_rows if whole else None
        if kept is None or kept[0].shape[1] != width:
            rows = torch.empty(tokens, width, dtype=torch.int32, device=device)
            kept = (rows, torch.empty(tokens, dtype=torch.int32, device=device))
            if whole:
                # For the next layer to overwrite: allocating costs the host, and the cap counts them already.
                self._index_rows = kept
        positions = (meta.request, meta.position) if whole else (meta.request[block], meta.position[block])
        return (
            local, meta.query_start_loc, meta.seq_lens, group.gather_lens, group.compressed_base,
            group.swa_base, meta.window_size, meta.compress_ratio, topk, group.slots, positions, *kept,
        )  # fmt: skip


def chunk_of(meta: AttentionMetadata) -> SparsePrefillChunkCache:
    """The gathered path's plan under the default cap, kept with the metadata, for callers that bring none."""
    if "chunk" not in meta.kept:
        meta.kept["chunk"] = SparsePrefillChunkCache().rebuild(meta)
    return meta.kept["chunk"]


def _versions(meta: AttentionMetadata) -> tuple[int, ...]:
    tensors = (meta.query_start_loc, meta.seq_lens, meta.swa_block_table, meta.extra_block_table)
    # torch counts no changes of what was made under inference_mode.
    return tuple(-1 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors)


def _tokens(meta: AttentionMetadata, first: int, end: int) -> slice:
    """The query tokens of some requests. Padding belongs to none; it goes with the last."""
    starts = meta.host_starts
    return slice(starts[first] if first else 0, meta.num_tokens if end == len(meta.host_query_lens) else starts[end])


def _count(tokens: slice) -> int:
    return tokens.stop - tokens.start


def _rows(meta: AttentionMetadata, first: int, end: int) -> int:
    return sum(meta.compressed_counts[first:end]) + sum(meta.gather_counts[first:end])


def _index_bytes(meta: AttentionMetadata, first: int, end: int) -> int:
    """Bytes of one token's index row and span, in a group of these requests."""
    topk = meta.topk if meta.compress_ratio == 4 else max(meta.compressed_counts[first:end], default=0)
    return _index_row_bytes(topk, meta.window_size)


def _index_row_bytes(extra_width: int, window_size: int) -> int:
    return 4 * indices.combined_topk_width(extra_width, window_size) + 4


def _split(meta: AttentionMetadata, max_bytes: int, max_rows: int | None) -> list[tuple[int, int, int]] | None:
    """``(first request, end, tokens a block)`` of each group, in order; None where a request does not fit at all.

    As many requests as fit with their index rows whole go together. One that does not fit alone has its index rows cut.
    """
    requests = len(meta.host_query_lens)
    spans: list[tuple[int, int, int]] = []

    def fits(first: int, end: int, tokens: int) -> bool:
        rows = _rows(meta, first, end)
        if max_rows is not None and rows > max_rows:
            return False
        return rows * ROW_BYTES + tokens * _index_bytes(meta, first, end) <= max_bytes

    if fits(0, requests, meta.num_tokens):
        return [(0, requests, max(1, meta.num_tokens))]
    first = 0
    # Padding alone, without a request, is a group too.
    while first < requests or not spans:
        end = min(first + 1, requests)
        while end < requests and fits(first, end + 1, _count(_tokens(meta, first, end + 1))):
            end += 1
        tokens = max(1, _count(_tokens(meta, first, end)))
        if not fits(first, end, tokens):
            if not fits(first, end, 1):
                return None
            left = max_bytes - _rows(meta, first, end) * ROW_BYTES
            tokens = left // _index_bytes(meta, first, end)
        spans.append((first, end, tokens))
        first = end
    return spans


def _group(meta: AttentionMetadata, first: int, end: int, block: int) -> Group:
    tokens = _tokens(meta, first, end)
    inside = slice(first, end)
    compressed = meta.compressed[inside]
    gathered = meta.gathered[inside]
    compressed_rows, swa_rows = sum(meta.compressed_counts[inside]), sum(meta.gather_counts[inside])
    slots = _ragged_slots(
        meta.swa_block_table[inside], meta.seq_lens[inside] - gathered, gathered, swa_rows,
        meta.swa_page_size, meta.swa_pages,
    )  # fmt: skip
    if meta.extra_block_table is not None:
        first_entry = torch.zeros_like(compressed)
        compressed_slots = _ragged_slots(
            meta.extra_block_table[inside], first_entry, compressed, compressed_rows,
            meta.extra_page_size, meta.extra_pages,
        )  # fmt: skip
        slots = torch.cat([compressed_slots, slots])
    compressed_base, swa_base = torch.zeros_like(meta.compressed), torch.zeros_like(meta.gathered)
    compressed_base[inside] = _exclusive_sum(compressed)
    swa_base[inside] = _exclusive_sum(gathered) + compressed_rows
    blocks = tuple(slice(t, min(t + block, tokens.stop)) for t in range(tokens.start, tokens.stop, block))
    return Group(
        inside, tokens, slots, compressed_rows, compressed_base, swa_base, meta.gathered,
        max(meta.compressed_counts[inside], default=0), blocks,
    )  # fmt: skip


def _exclusive_sum(counts: torch.Tensor) -> torch.Tensor:
    return counts.cumsum(0, dtype=torch.int32) - counts


def _ragged_slots(
    block_table: torch.Tensor,
    first: torch.Tensor,
    counts: torch.Tensor,
    total: int,
    page_size: int,
    pages: int,
) -> torch.Tensor:
    """Slots of entries ``first[i] ... first[i] + counts[i] - 1`` of every request, int32 ``[total]``."""
    request = torch.repeat_interleave(counts.long(), output_size=total)
    row = torch.arange(total, dtype=torch.int32, device=counts.device)
    local = row - _exclusive_sum(counts)[request] + first[request]
    limits = (first + counts)[request]
    return indices.local_to_slots(local[:, None], request.int(), limits, block_table, page_size, pages)[:, 0]
