"""What to store and where to convert, for a prefill and a decode kernel that read different cache layouts.

An entry is prefilled once and read by every later decode step that attends to it: decode reads the stored pages in
place, and what has to be converted is converted on prefill's side. Which kernel reads what, its record says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..core import checks, conversions
from ..core.errors import KernelNotSupported
from ..core.layouts import DSV4, FLAVOURS, CacheLayout, MLAKVCacheLayout, PagedCache
from ..core.model import HEAD_DIMS
from ..core.platform import platform
from . import registry
from .problem import Problem, fields_of

# bf16 stands behind FP8 because its bytes cost every decode step more than any conversion costs prefill once, and 4-bit
# values behind both because they lose accuracy.
_ENCODING_RANK = {"e4m3fn": 0, "e4m3fnuz": 0, "bf16": 1, "e2m1": 2}

DECODE, PREFILL, GATHER = "sparse_mla_decode", "sparse_mla_prefill", "dequantize_k_cache_paged"


@dataclass(frozen=True)
class CachePlan:
    """Which pages a server stores, and how its prefill kernel reads them. Its decode kernel reads them in place.

    Attributes:
        layout: the layout to store.
        prefill, decode: the kernels' names.
        prefill_op: ``"sparse_mla_decode"`` where prefill reads pages, ``"sparse_mla_prefill"`` where it reads rows.
        prefill_layout: the layout of the pages prefill reads; None where it reads rows.
        converter: the public function between the stored pages and what prefill reads, such as
            ``"dsv4x.requantize_fp8_to_block_scale"`` or, for rows, ``"dsv4x.dequantize_k_cache_paged"``; None where
            prefill reads the stored pages in place.
        reasons: name of each other layout -> why it is not the one to store.
    """

    layout: CacheLayout
    prefill: str
    decode: str
    prefill_op: str
    prefill_layout: CacheLayout | None
    converter: str | None
    reasons: dict[str, list[str]]

    @property
    def entry_bytes(self) -> int:
        """Bytes of one stored entry."""
        return self.layout.entry_bytes

    @property
    def needs_k_scale(self) -> bool:
        """Whether an entry is stored without scales, so that the ops need the whole tensor's ``k_scale``."""
        return self.layout.needs_k_scale

    def __str__(self) -> str:
        scale = " and one k_scale for the whole tensor" if self.needs_k_scale else ""
        return (
            f"Store {self.layout.name} pages: {self.entry_bytes} B an entry{scale}. "
            f"Decode kernel {self.decode} reads them in place. "
            f"Prefill kernel {self.prefill} reads {self._read_by_prefill} ({self.prefill_op})."
        )

    @property
    def _read_by_prefill(self) -> str:
        if self.prefill_layout is None:
            return f"bf16 rows that {self.converter} gathers from them"
        if self.converter is not None:
            return f"{self.prefill_layout.name} pages that {self.converter} makes of them, each once"
        return "them in place"

    @property
    def _rank(self) -> tuple[int, tuple[bool, bool]]:
        work = (self.prefill_layout is None, self.converter is not None)
        return _ENCODING_RANK[self.layout.value_encoding], work

    def _loses_to(self, best: CachePlan) -> str:
        (encoding, work), (best_encoding, best_work) = self._rank, best._rank
        seen, chosen = self.layout, best.layout
        if encoding > best_encoding:
            return f"holds {seen.value_encoding} values, stored only where no {chosen.value_encoding} layout serves"
        if work > best_work:
            return f"prefill {self.prefill} would read {self._read_by_prefill}: {chosen.name} takes less work"
        return f"would serve as well, but {chosen.name} stands before it in MLAKVCacheLayout"


def plan_cache(
    prefill: str,
    decode: str,
    *,
    head_dim: int | None = None,
    stored: CacheLayout | None = None,
    page_size: int = 64,
    heads: int = 64,
    device: torch.device | str | None = None,
    arch: str | None = None,
) -> CachePlan:
    """The layout to store for two kernels that read different ones, and what prefill converts. Decode never converts.

    ``decode`` reads the stored pages in place. ``prefill`` reads them in place too if it can; else pages that an exact
    converter makes of them, each once; else bf16 rows gathered from them. Of the layouts ``decode`` reads, FP8 comes
    before bf16 and bf16 before 4-bit values; then the one that gives ``prefill`` the earliest of these ways; then the
    first in :class:`~dsv4x.MLAKVCacheLayout`, which begins with the models' own, e4m3fn before e4m3fnuz. With 512
    values, kernels are asked for DeepSeek-V4's two caches, both in the planned layout.

    Args:
        prefill, decode: kernels' names, such as ``"flash_mla"`` and ``"triton"``; they may be the same.
        head_dim: values an entry holds, 512 (DeepSeek-V4) or 576 (V3.2); None means that of ``stored``, or 512.
        stored: the layout of a cache that exists already; None lets the plan choose.
        page_size: entries a page, > 0; some kernels refuse some page strides.
        heads: query heads on this rank, > 0.
        device: a device of this machine, asked for its arch; None means the current one.
        arch: plan for a machine of this arch instead, such as ``"sm_100"`` or ``"gfx942"``; no device is asked. The
            software is still this process's: a kernel that its backend does not have or whose library it cannot load is
            refused, so a plan is never for a kernel that was not seen to load. The library is asked for last: where it
            is a kernel's only reason, everything else fits.

    Raises:
        TypeError, ValueError: an argument's type or value.
        KernelNotSupported: no layout serves both kernels; the message says what each reads and, for every layout, each
            kernel's reasons.

    Source: the kernels' own records, by ``not_supported_reasons``.
    """
    for argument, name in (("prefill", prefill), ("decode", decode)):
        if name not in registry.kernel_names():
            raise ValueError(f"{argument}: got {name!r}, need one of {', '.join(registry.kernel_names())}")
    if stored is not None and not isinstance(stored, CacheLayout):
        raise TypeError(f"stored: got {type(stored).__name__}, need a CacheLayout such as dsv4x.layouts.DSV4")
    if arch is not None and device is not None:
        raise ValueError(f"arch: got {arch!r} beside device {device}, need one of the two")
    checks.integer("page_size", page_size, 1)
    checks.integer("heads", heads, 1)
    if head_dim not in (None, *HEAD_DIMS):
        raise ValueError(f"head_dim: got {head_dim}, need {' or '.join(map(str, HEAD_DIMS))}")
    needed = HEAD_DIMS if head_dim is None else (head_dim,)
    if stored is not None and stored.head_dim not in needed:
        raise ValueError(f"stored: head dim is {stored.head_dim} ({stored.name}), need {' or '.join(map(str, needed))}")
    if head_dim is None:
        head_dim = HEAD_DIMS[0] if stored is None else stored.head_dim
    candidates = list(_layouts_of(head_dim)) if stored is None else [stored]
    machine = _Machine(arch or platform.limits(device).arch, page_size, heads, head_dim)
    plans: list[CachePlan] = []
    refused: dict[str, list[tuple[str, str]]] = {}
    reasons: dict[str, list[str]] = {}
    for layout in candidates:
        # A stored layout is asked about all the same, for the advice in the refusal.
        if stored is None and not _declares(decode, layout):
            reasons[layout.name] = [f"decode {_reads(decode, DECODE)}"]
            continue
        outcome = machine.plan(prefill, decode, layout)
        if isinstance(outcome, CachePlan):
            plans.append(outcome)
        else:
            refused[layout.name] = outcome
            reasons[layout.name] = [sentence for _, sentence in outcome]
    if not plans:
        raise _no_layout(machine, prefill, decode, refused)
    best = min(plans, key=lambda plan: plan._rank)
    reasons |= {plan.layout.name: [plan._loses_to(best)] for plan in plans if plan is not best}
    return dataclasses.replace(best, reasons=reasons)


@dataclass(frozen=True)
class _Machine:
    """What a kernel is asked about: where it would run, and the step it would run in."""

    arch: str
    page_size: int
    heads: int
    head_dim: int

    def plan(self, prefill: str, decode: str, layout: CacheLayout) -> CachePlan | list[tuple[str, str]]:
        """The plan that stores ``layout``, or every refusal: a kernel's name and a sentence."""
        refusals = [(decode, f"decode {decode}: {reason}") for reason in self._refusals(DECODE, layout, kernel=decode)]
        ways: dict[str, list[str]] = {}
        for op, pages, function in _ways(layout):
            read = () if pages is None else (pages,)
            reasons = self._refusals(op, *read, kernel=prefill)
            if function is not None:
                reasons += self._refusals(function, layout, *read)
            if not reasons:
                converter = None if function is None else f"dsv4x.{function}"
                return refusals or CachePlan(layout, prefill, decode, op, pages, converter, {})
            way = "from bf16 rows" if pages is None else "in place" if function is None else f"from {pages.name} pages"
            for reason in reasons:
                ways.setdefault(reason, []).append(way)
        if not conversions.exact_from(layout):
            ways["no exact converter makes them"] = ["from other pages"]
        return refusals + [(prefill, f"prefill {prefill} {' or '.join(on)}: {why}") for why, on in ways.items()]

    def _refusals(self, op: str, *read: CacheLayout, kernel: str | None = None) -> list[str]:
        """Why ``kernel``, or every kernel, refuses ``op`` on caches of these layouts."""
        caches = tuple(PagedCache.zeros(1, layout, self.page_size, "meta").spec for layout in read)
        if op == DECODE and self.head_dim == DSV4.head_dim:
            # Most of its layers read a window and compressed entries, which some kernels take in fewer layouts.
            caches *= 2
        asked: dict[str, Any] = {
            "heads": self.heads,
            "head_dim": self.head_dim,
            "width": 128,
            "extra_width": 128 * (len(caches) - 1) if op == DECODE else 0,
            "rows": self.page_size,
            "caches": caches,
        }
        fields = {name: asked[name] for name in fields_of(op) if name in asked}
        problem = Problem(op, "cpu" if self.arch == "cpu" else "cuda", self.arch, **fields)
        if kernel is not None:
            return list(dict.fromkeys(registry.refusals(problem, kernel)))
        explanation = registry.explain(problem)
        if explanation.chosen is not None:
            return []
        return [f"dsv4x.{op} by {name}: {reason}" for name, why in explanation.reasons.items() for reason in why]


def _ways(layout: CacheLayout) -> Iterator[tuple[str, CacheLayout | None, str | None]]:
    """How prefill may read ``layout``, best first: its op, the pages it reads (None: rows), and what makes those."""
    yield DECODE, layout, None
    for conversion in conversions.exact_from(layout):
        yield DECODE, conversion.target, conversion.function
    yield PREFILL, None, GATHER


def _no_layout(
    machine: _Machine, prefill: str, decode: str, refused: dict[str, list[tuple[str, str]]]
) -> KernelNotSupported:
    """What each kernel reads, then every refusal; layouts refused alike share a line."""
    read = [(prefill, f"prefill {_reads(prefill, DECODE, PREFILL)}"), (decode, f"decode {_reads(decode, DECODE)}")]
    reasons: dict[str, list[str]] = {}
    alike: dict[str, list[str]] = {}
    for kernel, sentence in [*read, *(refusal for refusals in refused.values() for refusal in refusals)]:
        if sentence not in reasons.setdefault(kernel, []):
            reasons[kernel].append(sentence)
    for layout, refusals in refused.items():
        alike.setdefault("; ".join(sentence for _, sentence in refusals), []).append(layout)
    lines = [
        f"no cache layout of head dim {machine.head_dim} serves prefill={prefill!r} and decode={decode!r} "
        f"on {machine.arch}, pages of {machine.page_size}",
        *(f"  {sentence}" for _, sentence in read),
        *(f"  {', '.join(names)}: {sentences}" for sentences, names in alike.items()),
    ]
    return KernelNotSupported("\n".join(lines), reasons)


def _declares(kernel: str, layout: CacheLayout) -> bool:
    record = registry.find(DECODE, kernel)
    return record is not None and (not record.layouts or layout.name in record.layouts)


def _reads(kernel: str, *ops: str) -> str:
    """The kernel and what its records of these ops declare to read, or why there are none."""
    records = [record for op in ops if (record := registry.find(op, kernel)) is not None]
    if not records:
        return f"{kernel}: {registry.absent(ops[0], kernel)}"
    read = ["bf16 rows" if r.op == PREFILL else f"{', '.join(r.layouts) or 'any'} pages" for r in records]
    return f"{kernel} reads {' and '.join(read)}"


def _layouts_of(head_dim: int) -> Iterator[CacheLayout]:
    """The named layouts of a head dimension, each in every flavour it has."""
    for member in MLAKVCacheLayout:
        layout = member.value
        if layout.head_dim == head_dim:
            yield layout
            if layout.value_encoding in FLAVOURS:
                yield layout.with_flavour("e4m3fnuz")
