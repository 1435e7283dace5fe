"""What the layers of a step share: built once, refilled in place, from lengths that may live on the device alone."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..core import checks
from ..core.model import WINDOW, LayerKind
from ..core.platform import capturing
from ..core.refill import KindRows, StepCall
from ..core.spaces import INT32_MAX, check_pool
from ..dispatch.problem import IndexProblem
from ..dispatch.registry import call_on, select
from ..ops import indices

MAX_SLOT_ROW_BYTES = 32 << 20
"""Slot rows of every visible entry are kept for the step up to this size; above it, those of a block are made."""

_ROW_ALIGNMENT = 64
"""Widths of slot rows are multiples of this, which every decode kernel takes as it is."""

ASSUMED_LEN = 32768
"""Raw tokens a request is taken to have, as far as prediction goes, where only a bound is known."""


class ExtraPages(NamedTuple):
    """The compressed cache of one layer kind, as far as :class:`StepMetadata` goes.

    Attributes:
        block_table: int32 ``[R, m]`` page numbers; what stands past a request's last page is never used.
        page_size, pages: of the caches the layers will bring; a page number outside the pool is no page.
        selects: whether an indexer selects; None is True for ratio 4 and False for 128, any other ratio needs it said.
        topk: entries an indexer selects at most; None is the width of ``topk_indices``.
        entries: entries a token reads on average, the window's included, as far as prediction goes; None follows from
            the lengths that the host knows.
    """

    block_table: torch.Tensor
    page_size: int
    pages: int
    selects: bool | None = None
    topk: int | None = None
    entries: int | None = None


class HostLengths(NamedTuple):
    """What the host knows of a step's lengths.

    Attributes:
        starts: where each request's query tokens begin, and the end; exact.
        query_lens: query tokens of each request; exact.
        seq_lens: raw tokens of each request; exact or upper bounds.
    """

    starts: list[int]
    query_lens: list[int]
    seq_lens: list[int]


@dataclass(eq=False)
class StepMetadata:
    """What all layers of one step share, whatever their kind. Make it with :meth:`build`.

    ``step[4]``, ``step[128]`` and so on are the :class:`AttentionMetadata` of the layers of these ratios. ``step[1]``
    is that of layers with a window alone, or ``step.window`` where ratio 1 has a compressed cache of its own.

    It owns what it builds and is filled again in place by :meth:`update`. The tensors given to it are read again by the
    layers' launches: they must stay as they are until the next update, or until a graph's replay refills both.

    Attributes:
        query_start_loc, seq_lens, swa_block_table, swa_page_size, swa_pages, window_size, num_tokens: as given.
        max_seq_len: the bound of lengths; 2**31 - 1 where none was given.
        request, position: int32 ``[T]``, each token's request and position, -1 for padding.
        swa_indices, swa_lens: int32 ``[T, window_size]`` slots and ``[T]`` spans, or the caller's own.
        clamped: int32 ``[1]`` on the device, how many lengths were found past ``max_seq_len`` since the build.
        host: what the host knows of the lengths, or None.
        makes_windows: whether ``swa_indices`` are made here.
        captured: whether it was last filled inside a graph that was being captured.
        kinds: compress ratio -> metadata, of the layers with compressed entries.
        versions: :meth:`current_versions` when it was last filled; None of a copy that nobody used.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    swa_block_table: torch.Tensor | None
    swa_page_size: int
    swa_pages: int
    window_size: int
    num_tokens: int
    max_seq_len: int
    request: torch.Tensor
    position: torch.Tensor
    swa_indices: torch.Tensor
    swa_lens: torch.Tensor | None
    clamped: torch.Tensor
    host: HostLengths | None
    makes_windows: bool
    captured: bool = False
    kinds: dict[int, AttentionMetadata] = field(default_factory=dict)
    versions: tuple[int, ...] | None = ()

    @classmethod
    def build(
        cls,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        swa_block_table: torch.Tensor | None,
        extra: Mapping[int, ExtraPages] | None = None,
        *,
        swa_page_size: int,
        swa_pages: int,
        window_size: int = WINDOW,
        num_tokens: int | None = None,
        max_seq_len: int | None = None,
        query_start_loc_cpu: torch.Tensor | None = None,
        seq_lens_cpu: torch.Tensor | None = None,
        swa_indices: torch.Tensor | None = None,
        swa_lens: torch.Tensor | None = None,
    ) -> StepMetadata:
        """Build the metadata of one step for all its layer kinds, in one launch for two kinds with compressed entries.

        Args:
            extra: compress ratio -> :class:`ExtraPages` of the layers of that ratio.
            query_start_loc, seq_lens, swa_block_table, swa_page_size, swa_pages, window_size, num_tokens, max_seq_len,
            query_start_loc_cpu, seq_lens_cpu, swa_indices, swa_lens: as in :meth:`AttentionMetadata.build`.

        Raises:
            TypeError, ValueError: as :meth:`AttentionMetadata.build`.
        """
        extra = {} if extra is None else dict(extra)
        requests, device = _check_batch(query_start_loc, seq_lens, swa_page_size, swa_pages, window_size)
        _check_rows(swa_block_table, swa_indices, swa_lens, requests, device)
        kinds = {ratio: _checked_kind(ratio, pages, requests, device) for ratio, pages in extra.items()}
        if max_seq_len is not None:
            checks.integer("max_seq_len", max_seq_len, 0, INT32_MAX)
        copies = _Copies(query_start_loc_cpu, seq_lens_cpu)
        host = _host_lengths(query_start_loc, seq_lens, copies, max_seq_len, num_tokens)
        if num_tokens is None:
            if host is None:
                raise ValueError("num_tokens: got None, need q's rows where query_start_loc_cpu is not given")
            num_tokens = host.starts[-1]
        checks.integer("num_tokens", num_tokens, 0 if host is None else host.starts[-1])
        if swa_indices is not None and swa_indices.shape[0] != num_tokens:
            raise ValueError(f"swa_indices: {swa_indices.shape[0]} rows, need num_tokens, which is {num_tokens}")
        if host is not None:
            served = [length for queries, length in zip(host.query_lens, host.seq_lens) if queries]
            if swa_block_table is not None:
                _check_table("swa_block_table", swa_block_table, served, swa_page_size, 1)
            for ratio, pages in extra.items():
                name = "extra_block_table" if len(extra) == 1 else f"extra[{ratio}].block_table"
                _check_table(name, pages.block_table, served, pages.page_size, ratio)

        bound = INT32_MAX if max_seq_len is None else max_seq_len
        # Numbers of a token from one allocation: each costs the host microseconds.
        pitch = -(-max(num_tokens, 1) // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        numbers = torch.empty(4 + 2 * len(extra), pitch, dtype=torch.int32, device=device)
        _, request, position, own_lens, *others = numbers[:, :num_tokens].unbind()
        makes_windows = swa_indices is None
        if swa_indices is None:
            swa_indices = torch.empty(num_tokens, window_size, dtype=torch.int32, device=device)
            swa_lens = own_lens
        step = cls(
            query_start_loc, seq_lens, swa_block_table, swa_page_size, swa_pages, window_size, num_tokens, bound,
            request, position, swa_indices, swa_lens, numbers[0, :1], host, makes_windows,
        )  # fmt: skip
        for at, (ratio, pages) in enumerate(extra.items()):
            width, rows = _row_width(pages, ratio, bound), None
            if not kinds[ratio].selects and 4 * num_tokens * width <= MAX_SLOT_ROW_BYTES:
                # Filled to their ends: kernels that look further than a row's length find no entry there.
                rows = torch.empty(num_tokens, width, dtype=torch.int32, device=device)
            step.kinds[ratio] = AttentionMetadata(
                step, kinds[ratio], others[2 * at], pages.topk, pages.block_table, pages.page_size, pages.pages,
                others[2 * at + 1], rows, width, pages.entries,
            )  # fmt: skip
        step._fill(fresh=True)
        return step

    def update(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        swa_block_table: torch.Tensor | None,
        extra: Mapping[int, torch.Tensor] | None = None,
        *,
        query_start_loc_cpu: torch.Tensor | None = None,
        seq_lens_cpu: torch.Tensor | None = None,
        swa_indices: torch.Tensor | None = None,
        swa_lens: torch.Tensor | None = None,
    ) -> StepMetadata:
        """Refill it in place for another step of the same shapes. Nothing is allocated on the device.

        Inside a captured graph, each replay refills it from what the tensors given here hold by then.

        Args:
            extra: compress ratio -> int32 ``[R, m]`` block table, for every ratio it was built for.
            query_start_loc, seq_lens, swa_block_table, swa_indices, swa_lens: of the shapes it was built with.
            query_start_loc_cpu, seq_lens_cpu: host copies, as for the build. Inside a captured graph the host need not
                know anything: layers are then read in place.

        Raises:
            TypeError, ValueError: as :meth:`build`, before anything is written.
        """
        tables = {} if extra is None else dict(extra)
        device = self.seq_lens.device
        checks.tensor("query_start_loc", query_start_loc, tuple(self.query_start_loc.shape), torch.int32, device)
        checks.tensor("seq_lens", seq_lens, tuple(self.seq_lens.shape), torch.int32, device)
        _check_like("swa_block_table", swa_block_table, self.swa_block_table)
        _check_like("swa_indices", swa_indices, None if self.makes_windows else self.swa_indices)
        _check_like("swa_lens", swa_lens, None if self.makes_windows else self.swa_lens)
        if tables.keys() != self.kinds.keys():
            raise ValueError(f"extra: tables of ratios {sorted(tables)}, need {sorted(self.kinds)} as it was built")
        for ratio, table in tables.items():
            _check_like(f"extra[{ratio}]", table, self.kinds[ratio].extra_block_table)
        copies, bound = _Copies(query_start_loc_cpu, seq_lens_cpu), self.max_seq_len
        host = None
        if copies != (None, None) or not capturing(device):
            bounded = None if bound == INT32_MAX else bound
            host = _host_lengths(query_start_loc, seq_lens, copies, bounded, self.num_tokens)
        self.query_start_loc, self.seq_lens, self.swa_block_table = query_start_loc, seq_lens, swa_block_table
        self.host = host
        if swa_indices is not None:
            self.swa_indices, self.swa_lens = swa_indices, swa_lens
        for ratio, table in tables.items():
            self.kinds[ratio].extra_block_table = table
        self._fill(fresh=False)
        return self

    def __getitem__(self, compress_ratio: int) -> AttentionMetadata:
        if compress_ratio in self.kinds:
            return self.kinds[compress_ratio]
        if compress_ratio == 1:
            return self.window
        raise KeyError(f"compress_ratio {compress_ratio}: the step was built for {sorted({1, *self.kinds})}")

    @functools.cached_property
    def window(self) -> AttentionMetadata:
        """The metadata of layers that attend to their window alone."""
        return AttentionMetadata(self, LayerKind(1, False))

    def current_versions(self) -> tuple[int, ...]:
        """How often torch has changed what the step is filled from; it does not count under ``inference_mode``."""
        return tuple([tensor._version for tensor in self._counted])

    @functools.cached_property
    def _counted(self) -> list[torch.Tensor]:
        """What the step is filled from, as far as torch counts its changes."""
        tables = [kind.extra_block_table for kind in self.kinds.values()]
        tensors = (self.query_start_loc, self.seq_lens, self.swa_block_table, *tables)
        return [tensor for tensor in tensors if tensor is not None and not tensor.is_inference()]

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors count their changes anew; what was out of date stays so.
        kept = {name: value for name, value in self.__dict__.items() if name != "_counted"}
        return {**kept, "versions": () if self.stale else None}

    @property
    def stale(self) -> bool:
        """Whether torch has changed a length or a table since it was filled."""
        if self.versions is None:
            self.versions = self.current_versions()
        return self.versions != self.current_versions()

    def _fill(self, *, fresh: bool) -> None:
        device = self.seq_lens.device
        self.captured = capturing(device)
        for meta in (*self.kinds.values(), *([self.window] if "window" in self.__dict__ else [])):
            meta.kept.clear()
        kinds = tuple(
            KindRows(
                meta.extra_block_table, meta.extra_page_size, meta.extra_pages, meta.compress_ratio, meta.most,
                meta.visible, meta.extra_lens, meta.extra_indices,
            )
            for meta in self.kinds.values()
            if meta.extra_block_table is not None and meta.visible is not None and meta.extra_lens is not None
        )  # fmt: skip
        swa_indices, swa_lens = (self.swa_indices, self.swa_lens) if self.makes_windows else (None, None)
        call = StepCall(
            self.query_start_loc, self.seq_lens, self.max_seq_len, self.swa_block_table, self.swa_page_size,
            self.swa_pages, self.request, self.position, swa_indices, swa_lens, self.clamped, fresh, kinds,
        )  # fmt: skip
        record = select(IndexProblem.on("fill_step", device, tokens=self.num_tokens, width=self.window_size))
        call_on(device, record.run, call)
        for meta in self.kinds.values():
            for plan in meta.plans.values():
                plan.fill(meta)
        self.__dict__.pop("_counted", None)
        self.versions = self.current_versions()
        if checks.check_values_enabled():
            self._check_values()

    def _check_values(self) -> None:
        seen = HostLengths(*_lengths(self.query_start_loc.tolist(), self.seq_lens.tolist()))
        bounds = [self.max_seq_len] * len(seen.seq_lens) if self.host is None else self.host.seq_lens
        if self.host is not None:
            starts = torch.tensor(self.host.starts, dtype=torch.int64, device="cpu")
            checks.same_as_device("query_start_loc_cpu", starts, self.query_start_loc)
        for i, (queries, length, bound) in enumerate(zip(seen.query_lens, seen.seq_lens, bounds)):
            if queries and length > bound:
                name = "max_seq_len" if self.host is None else "seq_lens_cpu"
                raise ValueError(f"{name}: got {bound}, need >= {length}, the length of request {i} on the device")
        if self.makes_windows and self.swa_lens is not None:
            checks.no_holes("swa_indices", self.swa_indices, self.swa_lens, "swa_block_table")
        for meta in self.kinds.values():
            meta.check_pages()


@dataclass(eq=False)
class AttentionMetadata:
    """What one step's layers of one kind share. Make it with :meth:`build`, or take it from a :class:`StepMetadata`.

    Attributes:
        step: what it shares with the step's other kinds; its attributes are to be had here too.
        kind: the :class:`LayerKind`; ``compress_ratio`` and ``selects`` are to be had here too.
        visible: int32 ``[T]``, compressed entries a token may see; None without a compressed cache.
        topk: compressed entries an indexer selects at most, or None for the width of ``topk_indices``.
        extra_block_table, extra_page_size, extra_pages: of the compressed cache; None, 0, 0 without one.
        extra_lens: int32 ``[T]``, compressed entries a token reads at most; None without a compressed cache.
        extra_indices: int32 ``[T, any]`` slots of every visible entry, in rows padded with -1 to a multiple of 64; past
            that a row holds -1 or slots of an earlier step. None where an indexer selects, and where rows pass 32 MiB.
        slot_row_width: width of such a row.
        entries: entries a token reads on average as the caller stated it, or None.
        kept: what layers keep for one another, until the next refill.
        plans: what an indexer's kernels planned, which every refill fills again in place.
        prepared: calls of layers that follow from the shapes alone, and outlast refills.
    """

    step: StepMetadata
    kind: LayerKind
    visible: torch.Tensor | None = None
    topk: int | None = None
    extra_block_table: torch.Tensor | None = None
    extra_page_size: int = 0
    extra_pages: int = 0
    extra_lens: torch.Tensor | None = None
    extra_indices: torch.Tensor | None = None
    slot_row_width: int = 0
    entries: int | None = None
    kept: dict[Any, Any] = field(default_factory=dict)
    plans: dict[Any, Any] = field(default_factory=dict)
    prepared: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        swa_block_table: torch.Tensor | None,
        extra_block_table: torch.Tensor | None = None,
        *,
        compress_ratio: int,
        swa_page_size: int,
        swa_pages: int,
        selects: bool | None = None,
        extra_page_size: int | None = None,
        extra_pages: int | None = None,
        topk: int | None = None,
        window_size: int = WINDOW,
        num_tokens: int | None = None,
        max_seq_len: int | None = None,
        entries: int | None = None,
        query_start_loc_cpu: torch.Tensor | None = None,
        seq_lens_cpu: torch.Tensor | None = None,
        swa_indices: torch.Tensor | None = None,
        swa_lens: torch.Tensor | None = None,
    ) -> AttentionMetadata:
        """Build the metadata of one step and one layer kind.

        A batch may mix prefill chunks with or without a prefix, single-token decode, several-token verify and requests
        without queries; request i's queries are the last ``query_start_loc[i+1] - query_start_loc[i]`` of its
        ``seq_lens[i]`` tokens. A request of length 0 may own query rows: they get out = 0, lse = +inf.

        Answers follow from the lengths on the device. What the host knows decides shapes and predictions:
        ``docs/graphs.md`` has the contract.

        Args:
            query_start_loc: int32 ``[R+1]``, from 0, not decreasing.
            seq_lens: int32 ``[R]``, raw tokens of each request, its queries included.
            swa_block_table: int32 ``[R, m]``, page numbers of the window's cache; what stands past a request's last
                page is never used and may be garbage, and so may pages wholly before every query's window. May be None
                where ``swa_indices`` are given.
            extra_block_table: int32 ``[R, m']``, the same for the compressed cache; None for a window alone.
            compress_ratio: raw tokens a compressed entry stands for, >= 1.
            selects: whether an indexer selects among the compressed entries. None means True for ratio 4, False for 128
                and for 1 without ``extra_block_table``; any other kind needs it said.
            swa_page_size, swa_pages, extra_page_size, extra_pages: entries a page and pages of the caches the layers
                will bring; page numbers outside the pool are no entries.
            topk: compressed entries an indexer selects at most; wider ``topk_indices`` are then an error. None: any.
            window_size: raw tokens a query sees, its own included.
            num_tokens: T when q is padded past ``query_start_loc[-1]``; padding gets out = 0, lse = +inf. Needed where
                the host does not know ``query_start_loc``.
            max_seq_len: bound of ``seq_lens``, from which static shapes follow. With it nothing is copied from the
                device, so nothing waits for it. A longer length is clamped, and counted in ``step.clamped``.
            entries: entries a token reads on average, the window's included, as far as prediction goes.
            query_start_loc_cpu, seq_lens_cpu: host copies: of the offsets exact, of the lengths exact or upper bounds.
                Without them and without ``max_seq_len`` both are copied from the device, which waits for it once.
            swa_indices: int32 ``[T, any]``, the window's rows as the server has them: index space *slot*, any order, -1
                anywhere for none.
            swa_lens: int32 ``[T]`` scan spans of these rows; None means their whole width.

        Raises:
            TypeError, ValueError: an argument's type, dtype, shape, device or value; under ``DSV4X_CHECK=1`` also a
                page a query needs that is outside the pool, a length past its bound, and a host copy of the offsets
                that the device does not agree with.
        """
        checks.integer("compress_ratio", compress_ratio, 1)
        extra = {}
        if extra_block_table is not None:
            check_pool(extra_page_size, extra_pages, "extra_")
            assert extra_page_size is not None
            assert extra_pages is not None
            extra[compress_ratio] = ExtraPages(extra_block_table, extra_page_size, extra_pages, selects, topk, entries)
        else:
            LayerKind.of(compress_ratio, selects, False)
            for name, value in (("extra_page_size", extra_page_size), ("extra_pages", extra_pages), ("topk", topk)):
                if value is not None:
                    raise ValueError(f"{name}: got {value}, need None without an extra_block_table")
        step = StepMetadata.build(
            query_start_loc, seq_lens, swa_block_table, extra, swa_page_size=swa_page_size, swa_pages=swa_pages,
            window_size=window_size, num_tokens=num_tokens, max_seq_len=max_seq_len,
            query_start_loc_cpu=query_start_loc_cpu, seq_lens_cpu=seq_lens_cpu, swa_indices=swa_indices,
            swa_lens=swa_lens,
        )  # fmt: skip
        meta = step[compress_ratio]
        if entries is not None:
            meta.entries = checks.integer("entries", entries, 0)
        return meta

    def update(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        swa_block_table: torch.Tensor | None,
        extra_block_table: torch.Tensor | None = None,
        *,
        query_start_loc_cpu: torch.Tensor | None = None,
        seq_lens_cpu: torch.Tensor | None = None,
        swa_indices: torch.Tensor | None = None,
        swa_lens: torch.Tensor | None = None,
    ) -> AttentionMetadata:
        """Refill it in place, as :meth:`StepMetadata.update`; only where its step has no other kind.

        Raises:
            TypeError, ValueError: as :meth:`StepMetadata.update`.
        """
        if len(self.step.kinds) > 1:
            raise ValueError(f"step: has ratios {sorted(self.step.kinds)}, need step.update for more than one kind")
        extra = None if extra_block_table is None else {self.compress_ratio: extra_block_table}
        self.step.update(
            query_start_loc, seq_lens, swa_block_table, extra, query_start_loc_cpu=query_start_loc_cpu,
            seq_lens_cpu=seq_lens_cpu, swa_indices=swa_indices, swa_lens=swa_lens,
        )  # fmt: skip
        return self

    def __getstate__(self) -> dict[str, Any]:
        """All but what layers keep for one another: a copy makes that anew."""
        return {**self.__dict__, "kept": {}, "plans": {}, "prepared": {}}

    @property
    def compress_ratio(self) -> int:
        return self.kind.compress_ratio

    @property
    def selects(self) -> bool:
        return self.kind.selects

    @property
    def compressed(self) -> bool:
        """Whether there is a compressed cache."""
        return self.extra_block_table is not None

    @property
    def most(self) -> int:
        """Compressed entries a token reads at most, whatever the lengths."""
        if self.selects:
            return INT32_MAX if self.topk is None else self.topk
        return self.slot_row_width

    @property
    def window_size(self) -> int:
        return self.step.window_size

    @property
    def num_tokens(self) -> int:
        return self.step.num_tokens

    @property
    def query_start_loc(self) -> torch.Tensor:
        return self.step.query_start_loc

    @property
    def seq_lens(self) -> torch.Tensor:
        return self.step.seq_lens

    @property
    def swa_block_table(self) -> torch.Tensor | None:
        return self.step.swa_block_table

    @property
    def swa_page_size(self) -> int:
        return self.step.swa_page_size

    @property
    def swa_pages(self) -> int:
        return self.step.swa_pages

    @property
    def request(self) -> torch.Tensor:
        return self.step.request

    @property
    def position(self) -> torch.Tensor:
        return self.step.position

    @property
    def swa_indices(self) -> torch.Tensor:
        return self.step.swa_indices

    @property
    def swa_lens(self) -> torch.Tensor | None:
        return self.step.swa_lens

    def slot_rows(self, tokens: slice) -> torch.Tensor:
        """int32 ``[tokens, slot_row_width]``: the slots of every entry some tokens may see, -1 behind them."""
        assert self.extra_block_table is not None
        assert self.extra_lens is not None
        count = tokens.stop - tokens.start
        every = torch.arange(self.slot_row_width, dtype=torch.int32, device=self.seq_lens.device)
        return indices.local_to_slots(
            every.expand(count, self.slot_row_width), self.request[tokens], self.extra_lens[tokens],
            self.extra_block_table, self.extra_page_size, self.extra_pages,
        )  # fmt: skip

    @property
    def direct_blocks(self) -> list[slice]:
        """The tokens in blocks whose index rows are made at once: one block, but for long rows of every entry."""
        step = max(1, self.num_tokens)
        if self.compressed and not self.selects and self.extra_indices is None:
            step = max(1, MAX_SLOT_ROW_BYTES // (4 * self.slot_row_width))
        return [slice(t, min(t + step, self.num_tokens)) for t in range(0, self.num_tokens, step)] or [slice(0, 0)]

    def compressed_bounds(self) -> list[int]:
        """Compressed entries of each request with queries at most, 0 for the others; of what the host knows."""
        ratio, host = self.compress_ratio, self.step.host
        if not self.compressed:
            return [0] * self.seq_lens.shape[0]
        if host is None:
            return [self.step.max_seq_len // ratio] * self.seq_lens.shape[0]
        return [s // ratio if q else 0 for q, s in zip(host.query_lens, host.seq_lens)]

    def window_bounds(self) -> list[int]:
        """Raw tokens some query of each request may see at most; of what the host knows."""
        host, reach = self.step.host, self.window_size - 1
        if host is None:
            return [min(self.step.max_seq_len, self.num_tokens + reach)] * self.seq_lens.shape[0]
        return [min(s, q + reach) if q else 0 for q, s in zip(host.query_lens, host.seq_lens)]

    def mean_entries(self, extra_width: int) -> int:
        """Window and compressed entries a token reads on average, at most ``extra_width`` of the latter.

        Without a statement and without lengths on the host, requests are taken to have 32768 tokens, or the bound.
        """
        if self.entries is not None:
            return self.entries
        host, window = self.step.host, self.window_size
        if host is None:
            length = min(self.step.max_seq_len, ASSUMED_LEN)
            compressed = min(length // self.compress_ratio, extra_width) if self.compressed else 0
            return min(length, window) + compressed
        total = 0
        for queries, length in zip(host.query_lens, host.seq_lens):
            first = max(length - queries, 0)
            total += _capped_sum(first, length, 1, window)
            if self.compressed:
                total += _capped_sum(first, length, self.compress_ratio, extra_width)
        return -(-total // max(1, self.num_tokens))

    def check_current(self) -> None:
        """Raise ValueError where torch has changed a length or a table since the step was filled."""
        if self.step.stale:
            raise ValueError("meta: a length or a block table changed in place since it was filled, need update(...)")

    def check_pages(self) -> None:
        """Under ``DSV4X_CHECK=1``: every page that some token's visible entries need is in the pool."""
        table = self.extra_block_table
        if table is None:
            return
        entries = self.seq_lens.clamp_max(self.step.max_seq_len) // self.compress_ratio
        entries = torch.where(self.query_start_loc.diff() > 0, entries, 0)
        needed = (entries + self.extra_page_size - 1) // self.extra_page_size
        checks.pages_in_pool("extra_block_table", table, needed, self.extra_pages)


class _Copies(NamedTuple):
    """Host copies as a caller gave them."""

    query_start_loc: torch.Tensor | None
    seq_lens: torch.Tensor | None


def _check_batch(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, swa_page_size: int, swa_pages: int, window_size: int
) -> tuple[int, torch.device]:
    checks.tensor("seq_lens", seq_lens, (None,), torch.int32)
    requests, device = seq_lens.shape[0], seq_lens.device
    checks.tensor("query_start_loc", query_start_loc, (requests + 1,), torch.int32, device)
    check_pool(swa_page_size, swa_pages, "swa_")
    checks.integer("window_size", window_size, 1)
    return requests, device


def _check_rows(
    swa_block_table: torch.Tensor | None,
    swa_indices: torch.Tensor | None,
    swa_lens: torch.Tensor | None,
    requests: int,
    device: torch.device,
) -> None:
    if swa_block_table is not None or swa_indices is None:
        checks.tensor("swa_block_table", swa_block_table, (requests, None), torch.int32, device)
    if swa_indices is not None:
        checks.tensor("swa_indices", swa_indices, (None, None), torch.int32, device)
        if swa_lens is not None:
            checks.tensor("swa_lens", swa_lens, (swa_indices.shape[0],), torch.int32, device)
    elif swa_lens is not None:
        raise ValueError("swa_lens: given, need swa_indices with it")


def _checked_kind(ratio: int, pages: ExtraPages, requests: int, device: torch.device) -> LayerKind:
    """The kind of layers that these pages are of, every field looked at."""
    checks.integer("compress_ratio", ratio, 1)
    checks.tensor("extra_block_table", pages.block_table, (requests, None), torch.int32, device)
    check_pool(pages.page_size, pages.pages, "extra_")
    kind = LayerKind.of(ratio, pages.selects, True)
    if pages.topk is not None:
        if not kind.selects:
            raise ValueError(f"topk: got {pages.topk}, need None for compress_ratio {ratio}, which does not select")
        checks.integer("topk", pages.topk, 0)
    if pages.entries is not None:
        checks.integer("entries", pages.entries, 0)
    return kind


def _check_like(name: str, value: torch.Tensor | None, built: torch.Tensor | None) -> None:
    """Check that a refill brings what the build was given."""
    if built is None:
        if value is not None:
            raise ValueError(f"{name}: given, need None as it was built")
        return
    checks.tensor(name, value, tuple(built.shape), torch.int32, built.device)


def _host_lengths(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    copies: _Copies,
    max_seq_len: int | None,
    num_tokens: int | None,
) -> HostLengths | None:
    """What the host knows of the lengths, checked; None where only their bound is known."""
    if max_seq_len is not None and copies == (None, None):
        return None
    if max_seq_len is not None and copies.query_start_loc is None:
        raise ValueError("query_start_loc_cpu: got None beside seq_lens_cpu, need both or neither with max_seq_len")
    if capturing(seq_lens.device) and None in copies:
        raise ValueError("max_seq_len: got None while a graph is being captured, need the bound of the lengths")
    starts = _on_host("query_start_loc", query_start_loc, copies.query_start_loc)
    if max_seq_len is not None and copies.seq_lens is None:
        lengths = [max_seq_len] * seq_lens.shape[0]
    else:
        lengths = _on_host("seq_lens", seq_lens, copies.seq_lens)
    host = HostLengths(*_lengths(starts, lengths))
    if starts[0] != 0:
        raise ValueError(f"query_start_loc: begins with {starts[0]}, need 0")
    for i, (queries, length) in enumerate(zip(host.query_lens, lengths)):
        if queries < 0:
            raise ValueError(f"query_start_loc: falls from {starts[i]} to {starts[i + 1]} at request {i}, need no fall")
        if queries > length > 0 or length < 0:
            raise ValueError(f"seq_lens: {length} at request {i}, need 0 or >= its {queries} query tokens")
        if max_seq_len is not None and length > max_seq_len and queries:
            raise ValueError(f"seq_lens_cpu: {length} at request {i}, need <= max_seq_len, which is {max_seq_len}")
    if num_tokens is not None and num_tokens < starts[-1]:
        raise ValueError(f"num_tokens: got {num_tokens}, need >= {starts[-1]}")
    return host


def _lengths(starts: list[int], lengths: list[int]) -> tuple[list[int], list[int], list[int]]:
    return starts, [b - a for a, b in itertools.pairwise(starts)], lengths


def _on_host(name: str, value: torch.Tensor, copy: torch.Tensor | None) -> list[int]:
    if copy is None:
        return value.tolist()
    checks.tensor(f"{name}_cpu", copy, tuple(value.shape), checks.INDEX_DTYPES, torch.device("cpu"))
    return copy.tolist()


def _check_table(name: str, table: torch.Tensor, seq_lens: list[int], page_size: int, ratio: int) -> None:
    needed = max((-(-(length // ratio) // page_size) for length in seq_lens), default=0)
    if table.shape[1] < needed:
        raise ValueError(f"{name}: {table.shape[1]} pages a request, need >= {needed} for {max(seq_lens)} tokens")


def _row_width(pages: ExtraPages, ratio: int, max_seq_len: int) -> int:
    """Width of a row of every visible entry: what the table can hold, or the bound allows."""
    entries = min(pages.block_table.shape[1] * pages.page_size, max_seq_len // ratio)
    return max(1, -(-entries // _ROW_ALIGNMENT)) * _ROW_ALIGNMENT


def _capped_sum(first: int, end: int, ratio: int, cap: int) -> int:
    """Sum of min((p + 1) // ratio, cap) over positions p in ``[first, end)``, to within one a position."""
    full = min(max(cap * ratio, first), end)
    return (full * (full + 1) - first * (first + 1)) // (2 * ratio) + (end - full) * cap
