"""What the layers of one kind share while a chunk is prefilled from gathered rows, and how it fits its workspace."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from ..core import checks
from ..core.model import TOPK
from ..core.refill import CombineCall, GatherCall, GatherKind
from ..core.spaces import INT32_MAX
from ..dispatch.problem import CacheProblem, IndexProblem
from ..dispatch.registry import Kernel, call_on, select
from ..ops import indices
from ..ops.compaction import compaction_scratch_bytes
from .metadata import AttentionMetadata, StepMetadata

ROW_BYTES = 1024
"""A workspace row: 512 bf16 values."""

DEFAULT_WORKSPACE_BYTES = 256 << 20
"""The workspace cap where none is given."""


@dataclass(frozen=True, eq=False)
class Group:
    """A run of requests that share one filling of the workspace.

    Attributes:
        requests, tokens: the run, as slices of the batch's requests and query tokens.
        slots: int32 ``[S]``, each workspace row's slot: of the extra cache before row C, of the window's from there on.
            -1 where the device's lengths need no row, or its page is not in the pool; such a row is never written.
        compressed_rows: C.
        compressed_base, swa_base: int32 ``[R]``, each of the batch's requests' first row of either kind; only the
            group's own mean anything.
        compressed_lens, gather_lens: int32 ``[R]``, compressed entries and trailing raw tokens of each request that are
            gathered; 0 outside the group.
        seq_lens: int32 ``[R]``, raw tokens of each request, none past the bound.
        entries: compressed entries of the group's longest request, at most.
        blocks: the group's tokens again, in the blocks whose index rows fit beside the rows.
    """

    requests: slice
    tokens: slice
    slots: torch.Tensor
    compressed_rows: int
    compressed_base: torch.Tensor
    compressed_lens: torch.Tensor
    swa_base: torch.Tensor
    gather_lens: torch.Tensor
    seq_lens: torch.Tensor
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
        indices: int32 ``[T, any]`` workspace rows, -1 padded.
        lens: int32 ``[T]`` spans, or None for the whole width.
    """

    slots: torch.Tensor
    indices: torch.Tensor
    lens: torch.Tensor | None

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

    Room is kept for what the host allows the lengths to be; what is gathered follows from the lengths on the device.

    It is good until :meth:`rebuild` or :meth:`close`. Using it with metadata it was not built for, or after the
    metadata was refilled, is an error; nothing is recognised by its address.

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
        self._versions: tuple[int, ...] | None = ()
        self.close()

    def rebuild(self, meta: AttentionMetadata) -> SparsePrefillChunkCache:
        """Plan for another chunk. What was planned before is dropped; tensors are built on first use."""
        if not isinstance(meta, AttentionMetadata):
            raise TypeError(f"meta: got {type(meta).__name__}, need a dsv4x.AttentionMetadata")
        if self._workspace is not None and self._workspace.device != meta.seq_lens.device:
            raise ValueError(f"workspace: on {self._workspace.device}, need {meta.seq_lens.device}")
        meta.check_current()
        self.close()
        self._meta, self._versions = meta, meta.step.versions
        self.reserve(TOPK if meta.topk is None else meta.topk)
        return self

    def close(self) -> None:
        """Drop what was planned; the next use is an error until :meth:`rebuild`."""
        self._meta = None
        self._topk = -1
        self._spans: list[tuple[int, int, int]] | None = None
        self._drop()

    def _drop(self) -> None:
        self._groups: tuple[Group, ...] | None = None
        self._shared: tuple[torch.Tensor, torch.Tensor] | None = None
        self._window: Window | None = None
        self._index_rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self._row_of_slot: dict[Group, torch.Tensor] = {}

    def reserve(self, topk: int) -> None:
        """Cut the chunk for layers whose top-k rows are ``topk`` wide; what it is cut for already stays as it is."""
        if topk != self._topk:
            self._topk = topk
            spans = self._split()
            if spans != self._spans:
                self._drop()
            self._spans = spans

    @property
    def meta(self) -> AttentionMetadata:
        """The metadata it was built for. Raises ValueError where there is none."""
        if self._meta is None:
            raise ValueError("chunk: built for nothing, need rebuild(meta)")
        return self._meta

    @property
    def limits(self) -> tuple[int, int | None]:
        """All that its cuts depend on beside the metadata: the cap in bytes, and the rows of the caller's workspace."""
        return self.max_bytes, None if self._workspace is None else self._workspace.shape[0]

    def check(self, meta: AttentionMetadata) -> None:
        """Raise ValueError unless it was built for ``meta`` as it is now."""
        if self.meta is not meta:
            raise ValueError("chunk: built for other metadata, need rebuild(meta) for this metadata")
        if self._versions != meta.step.current_versions() or self._versions != meta.step.versions:
            raise ValueError("chunk: a length or a block table changed in place since rebuild, need rebuild(meta)")

    @property
    def fits(self) -> bool:
        """Whether every request's rows fit under the cap."""
        return self.meta is not None and self._spans is not None

    @property
    def _cuts(self) -> list[tuple[int, int, int]]:
        """The cuts that were made; none where a request does not fit. Raises ValueError where nothing was built."""
        return [] if not self.fits else self._spans or []

    @property
    def cap(self) -> str:
        """The cap in words, for what does not fit under it."""
        rows = self.limits[1]
        return f"the cap of {self.max_bytes} bytes" + ("" if rows is None else f", or the {rows} rows of the workspace")

    @property
    def workspace_rows(self) -> int:
        """Rows the largest filling of the workspace takes."""
        return max((self._rows(a, b) for a, b, _ in self._cuts), default=0)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace and index rows a layer's call takes at its peak."""
        return max(
            (
                self._rows(a, b) * ROW_BYTES + min(block, _count(self._tokens(a, b))) * self._index_bytes(a, b)
                for a, b, block in self._cuts
            ),
            default=0,
        )

    @property
    def groups(self) -> tuple[Group, ...]:
        """The chunk in fillings of the workspace, built on first use."""
        if self._groups is None:
            plan_groups([self, *self._beside()])
        assert self._groups is not None
        return self._groups

    def _beside(self) -> list[SparsePrefillChunkCache]:
        """The plans of the step's other kinds, where all are the metadata's own: two are made in the same launches."""
        meta = self.meta
        if meta.kept.get("chunk") is not self:
            return []
        others = [chunk_of(other) for other in meta.step.kinds.values() if other is not meta]
        return [other for other in others if other.fits and other._groups is None]

    @property
    def window(self) -> Window:
        """The window rows of the whole chunk, built on first use."""
        if self._window is None:
            meta = self.meta
            if meta.swa_block_table is None:
                self._window = _listed_window(meta)
            else:
                requests = meta.seq_lens.shape[0]
                kind = _gather_kind(meta, 0, requests, 0, self.window_rows)._replace(compress_ratio=0)
                _plan_gather(meta.step, [kind])
                group = _group(self, kind, max(1, meta.num_tokens))
                self._window = Window(group.slots, *self.group_window(group, slice(0, meta.num_tokens)))
        return self._window

    def group_window(self, group: Group, block: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows and spans of one block's windows, counted from the group's row ``compressed_rows``."""
        meta, first = self.meta, group.compressed_rows
        if meta.swa_block_table is None:
            lens = self.window.lens
            return self.window.indices[block], None if lens is None else lens[block]
        tokens, device = _count(block), meta.seq_lens.device
        call = self._call(group, block, meta.position[block, None][:, :0], 0)._replace(
            swa_base=group.swa_base - first,
            row_slots=group.slots[first:],
            out_indices=torch.empty(
                tokens, indices.combined_topk_width(0, meta.window_size), dtype=torch.int32, device=device
            ),
            out_lens=torch.empty(tokens, dtype=torch.int32, device=device),
        )
        if tokens:
            width = call.out_indices.shape[1]
            problem = IndexProblem.on("combine_topk_swa_indices", device, tokens=tokens, width=width)
            call_on(device, select(problem).run, call)
        return call.out_indices, call.out_lens

    def referenced_block(self, width: int) -> int:
        """Tokens the ``referenced`` path takes at once, with top-k rows of ``width``; 0 when not one fits."""
        meta = self.meta
        compressed, windows = sum(meta.compressed_bounds()), self.window_rows
        window_bytes = windows * (ROW_BYTES + 4) + meta.num_tokens * _index_row_bytes(0, self._window_width)
        slots = meta.extra_pages * meta.extra_page_size
        left = self.max_bytes - window_bytes - compaction_scratch_bytes(slots)
        room = left if self._workspace is None else min(left, (self._workspace.shape[0] - windows) * ROW_BYTES)
        # A listed row's slot; an index's slot and its remapped row; the combined index row.
        row = ROW_BYTES + 4
        token = 8 * width + _index_row_bytes(width, self._window_width)
        if compressed * row + meta.num_tokens * token <= left and compressed * ROW_BYTES <= room:
            return max(1, meta.num_tokens)
        return max(0, min(meta.num_tokens, left // (width * row + token), room // max(1, width * ROW_BYTES)))

    def referenced_blocks(self, width: int) -> list[slice]:
        """The chunk's tokens in blocks of :meth:`referenced_block`."""
        tokens, step = self.meta.num_tokens, self.referenced_block(width)
        return [slice(t, min(t + step, tokens)) for t in range(0, tokens, step)]

    def referenced_rows(self, width: int) -> int:
        """Workspace rows a block's referenced entries may take."""
        return min(self.referenced_block(width) * width, sum(self.meta.compressed_bounds()))

    @property
    def window_rows(self) -> int:
        """Workspace rows of the whole chunk's windows, at most."""
        meta = self.meta
        if meta.swa_block_table is None:
            return _listed_rows(meta)
        return sum(self._window_bounds(0, meta.seq_lens.shape[0]))

    def workspace(self, rows: int) -> torch.Tensor:
        """bf16 ``[rows, 512]`` to gather into, not filled."""
        if self._workspace is not None:
            return self._workspace[:rows]
        return torch.empty(rows, 512, dtype=torch.bfloat16, device=self.meta.seq_lens.device)

    def index_rows(self, group: Group, block: slice, combine: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
        """Workspace rows and spans of one block's tokens, of a kind without an indexer; kept for its other layers.

        ``combine`` is the kernel of ``combine_topk_swa_indices`` that makes them, on the current device.
        """
        if self._shared is not None:
            return self._shared
        call = self.combining(group, block, None, None)
        combine.run(call)
        # Only where it is the whole chunk: kept rows count against the cap too.
        if _count(block) == self.meta.num_tokens:
            self._shared = (call.out_indices, call.out_lens)
        return call.out_indices, call.out_lens

    def combining(
        self, group: Group, block: slice, topk_indices: torch.Tensor | None, topk_lens: torch.Tensor | None
    ) -> CombineCall:
        """What makes one block's index rows: of its window, and of top-k or, without it, of every visible entry."""
        tokens, device = _count(block), self.meta.seq_lens.device
        whole = tokens == self.meta.num_tokens
        if topk_indices is None:
            every = torch.arange(group.entries, dtype=torch.int32, device=device)
            local = every.expand(tokens, group.entries)
        else:
            local = topk_indices if whole else topk_indices[block]
            topk_lens = topk_lens if whole or topk_lens is None else topk_lens[block]
        topk = local.shape[1]
        width = indices.combined_topk_width(topk, self._window_width)
        kept = self._index_rows if whole else None
        if kept is None or kept[0].shape[1] != width:
            rows = torch.empty(tokens, width, dtype=torch.int32, device=device)
            kept = (rows, torch.empty(tokens, dtype=torch.int32, device=device))
            if whole:
                # For the next layer to overwrite: allocating costs the host, and the cap counts them already.
                self._index_rows = kept
        call = self._call(group, block, local, topk)
        return call._replace(out_indices=kept[0], out_lens=kept[1], topk_lens=topk_lens)

    def _call(self, group: Group, block: slice, local: torch.Tensor, topk: int) -> CombineCall:
        meta = self.meta
        whole = _count(block) == meta.num_tokens
        positions = (meta.request, meta.position) if whole else (meta.request[block], meta.position[block])
        return CombineCall(
            local, meta.query_start_loc, group.seq_lens, group.gather_lens, group.compressed_base, group.swa_base,
            meta.window_size, meta.compress_ratio, topk, group.slots, positions, positions[0], positions[0], None,
            group.compressed_lens,
        )  # fmt: skip

    def row_of_slot(self, group: Group) -> torch.Tensor:
        """int32 ``[slots of the compressed pool]``: the group's workspace row of each, -1 where it was not gathered."""
        if group not in self._row_of_slot:
            meta = self.meta
            device, pool = meta.seq_lens.device, meta.extra_pages * meta.extra_page_size
            rows = torch.arange(group.compressed_rows, dtype=torch.int32, device=device)
            slots = group.slots[: group.compressed_rows].long()
            # One place more takes what has no slot.
            table = torch.full((pool + 1,), -1, dtype=torch.int32, device=device)
            self._row_of_slot[group] = table.index_copy_(0, torch.where(slots < 0, pool, slots), rows)[:pool]
        return self._row_of_slot[group]

    @property
    def _window_width(self) -> int:
        return self.meta.swa_indices.shape[1]

    def _window_bounds(self, first: int, end: int) -> list[int]:
        return self.meta.window_bounds()[first:end]

    def _rows(self, first: int, end: int) -> int:
        windows = self.window_rows if self.meta.swa_block_table is None else sum(self._window_bounds(first, end))
        return sum(self.meta.compressed_bounds()[first:end]) + windows

    def _index_bytes(self, first: int, end: int) -> int:
        """Bytes of one token's index row and span, in a group of these requests."""
        entries = self._topk if self.meta.selects else max(self.meta.compressed_bounds()[first:end], default=0)
        return _index_row_bytes(entries, self._window_width)

    def _tokens(self, first: int, end: int) -> slice:
        """The query tokens of some requests. Padding belongs to none; it goes with the last."""
        meta, host = self.meta, self.meta.step.host
        if host is None:
            return slice(0, meta.num_tokens)
        starts = host.starts
        return slice(starts[first] if first else 0, meta.num_tokens if end == len(host.query_lens) else starts[end])

    def _split(self) -> list[tuple[int, int, int]] | None:
        """``(first request, end, tokens a block)`` of each group, in order; None where a request does not fit at all.

        As many requests as fit with their index rows whole go together. One that does not fit alone has its index rows
        cut. Where the host does not know whose tokens are whose, or the window's rows are the server's, it is one
        group.
        """
        meta = self.meta
        requests, max_rows = meta.seq_lens.shape[0], self.limits[1]
        if meta.step.host is None and meta.step.max_seq_len == INT32_MAX:
            return None
        rows_of = {
            name: [0, *itertools.accumulate(bounds)]
            for name, bounds in (("compressed", meta.compressed_bounds()), ("window", meta.window_bounds()))
        }

        def rows(first: int, end: int) -> int:
            windows = rows_of["window"][end] - rows_of["window"][first]
            if meta.swa_block_table is None:
                windows = self.window_rows
            return rows_of["compressed"][end] - rows_of["compressed"][first] + windows

        def fits(first: int, end: int, tokens: int) -> bool:
            needed = rows(first, end)
            if max_rows is not None and needed > max_rows:
                return False
            return needed * ROW_BYTES + tokens * self._index_bytes(first, end) <= self.max_bytes

        if fits(0, requests, meta.num_tokens):
            return [(0, requests, max(1, meta.num_tokens))]
        one_group = meta.step.host is None or meta.swa_block_table is None
        spans: list[tuple[int, int, int]] = []
        first = 0
        # Padding alone, without a request, is a group too.
        while first < requests or not spans:
            end = requests if one_group else min(first + 1, requests)
            while end < requests and fits(first, end + 1, _count(self._tokens(first, end + 1))):
                end += 1
            tokens = max(1, _count(self._tokens(first, end)))
            if not fits(first, end, tokens):
                if not fits(first, end, 1):
                    return None
                tokens = (self.max_bytes - rows(first, end) * ROW_BYTES) // self._index_bytes(first, end)
            spans.append((first, end, tokens))
            first = end
        return spans


def chunk_of(meta: AttentionMetadata) -> SparsePrefillChunkCache:
    """The gathered path's plan under the default cap, kept with the metadata, for callers that bring none."""
    if "chunk" not in meta.kept:
        meta.kept["chunk"] = SparsePrefillChunkCache().rebuild(meta)
    return meta.kept["chunk"]


def plan_groups(chunks: list[SparsePrefillChunkCache]) -> None:
    """Make the groups of chunks of one step: two launches for each two groups, whatever chunk they are of."""
    waiting = []
    for chunk in chunks:
        meta, kinds = chunk.meta, []
        for first, end, _ in chunk._spans or ():
            compressed = sum(meta.compressed_bounds()[first:end])
            windows = 0 if meta.swa_block_table is None else sum(meta.window_bounds()[first:end])
            kinds.append(_gather_kind(meta, first, end, compressed, windows))
        waiting.append(kinds)
    every = [kind for kinds in waiting for kind in kinds]
    for at in range(0, len(every), 2):
        _plan_gather(chunks[0].meta.step, every[at : at + 2])
    for chunk, kinds in zip(chunks, waiting):
        chunk._groups = tuple(
            _group(chunk, kind, block) for kind, (_, _, block) in zip(kinds, chunk._spans or ())
        )  # fmt: skip


def _group(chunk: SparsePrefillChunkCache, kind: GatherKind, block: int) -> Group:
    meta, requests = chunk.meta, slice(kind.first, kind.end)
    tokens = chunk._tokens(kind.first, kind.end)
    slots = kind.slots
    if meta.swa_block_table is None:
        slots = torch.cat([slots, chunk.window.slots])
    compressed_base, compressed_lens, swa_base, gather_lens, seq_lens = kind.requests.unbind()
    return Group(
        requests, tokens, slots, kind.compressed_rows, compressed_base, compressed_lens, swa_base, gather_lens,
        seq_lens, max(meta.compressed_bounds()[requests], default=0),
        tuple(slice(t, min(t + block, tokens.stop)) for t in range(tokens.start, tokens.stop, block)),
    )  # fmt: skip


def _gather_kind(meta: AttentionMetadata, first: int, end: int, compressed: int, windows: int) -> GatherKind:
    requests, device = meta.seq_lens.shape[0], meta.seq_lens.device
    # Without compressed entries no page is looked up: any table of the requests will do.
    table = meta.seq_lens[:, None] if meta.extra_block_table is None else meta.extra_block_table
    return GatherKind(
        first, end, meta.compress_ratio if meta.compressed else 0, table, meta.extra_page_size or 1, meta.extra_pages,
        compressed, torch.empty(5, -(-requests // 4) * 4, dtype=torch.int32, device=device)[:, :requests],
        torch.empty(compressed + windows, dtype=torch.int32, device=device),
    )  # fmt: skip


def _plan_gather(step: StepMetadata, kinds: list[GatherKind]) -> None:
    table = kinds[0].block_table if step.swa_block_table is None else step.swa_block_table
    call = GatherCall(
        step.query_start_loc, step.seq_lens, step.max_seq_len, table, step.swa_page_size, step.swa_pages,
        step.window_size, tuple(kinds),
    )  # fmt: skip
    device = step.seq_lens.device
    record = select(CacheProblem.on("plan_gather", device, tokens=sum(kind.slots.shape[0] for kind in kinds)))
    call_on(device, record.run, call)


def _listed_rows(meta: AttentionMetadata) -> int:
    return min(meta.swa_indices.numel(), meta.swa_pages * meta.swa_page_size)


def _listed_window(meta: AttentionMetadata) -> Window:
    """Window rows that the server brought as slots, each once."""
    device, capacity, pool = meta.seq_lens.device, _listed_rows(meta), meta.swa_pages * meta.swa_page_size
    listed = torch.full((capacity,), -1, dtype=torch.int32, device=device)
    rows = torch.full(meta.swa_indices.shape, -1, dtype=torch.int32, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    tokens, width = rows.shape
    record = select(CacheProblem.on("list_referenced", device, tokens=tokens, width=width))
    if rows.numel() and pool:
        call_on(device, record.run, meta.swa_indices, meta.swa_lens, pool, 1, listed, rows, count)
    return Window(listed, rows, meta.swa_lens)


def _count(tokens: slice) -> int:
    return tokens.stop - tokens.start


def _index_row_bytes(extra_width: int, window_size: int) -> int:
    return 4 * indices.combined_topk_width(extra_width, window_size) + 4
