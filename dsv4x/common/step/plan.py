"""Which way a step's attention takes, decided once for layers that look the same.

A path is a record with a problem, reasons to refuse it, a predicted time, and a way to run it, each in a file of its
own: :mod:`.direct`, :mod:`.gathered`, :mod:`.referenced`. Which is fastest follows from tokens, heads, rows and layer
kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from ..core.calls import Result
from ..core.errors import BackendUnavailable, KernelNotSupported
from ..core.layouts import CacheSpec, PagedCache
from ..core.model import LayerKind
from ..dispatch.problem import AttentionProblem
from ..dispatch.registry import Kernel, candidates, select
from .chunk import SparsePrefillChunkCache
from .metadata import AttentionMetadata


class Layer(NamedTuple):
    """What one layer brings to a step; each attribute as of :func:`~dsv4x.sparse_mla_attention`."""

    q: torch.Tensor
    swa_cache: PagedCache
    extra_cache: PagedCache | None
    topk_indices: torch.Tensor | None
    topk_slots: torch.Tensor | None
    topk_lens: torch.Tensor | None
    attn_sink: torch.Tensor | None
    softmax_scale: float
    out: torch.Tensor | None
    swa_k_scale: float
    extra_k_scale: float
    heads: int
    return_lse: bool
    workspace: torch.Tensor | None = None


class Step(NamedTuple):
    """What is known of a layer's call before it runs.

    Attributes:
        meta, chunk: the step's metadata, and the plan of its gathered rows.
        device: of q.
        tokens, heads: query tokens, padding included, and query heads that count.
        caches: the window's cache, and the compressed one.
        topk: width of the top-k rows; 0 where nothing selects.
        local, slots: whether top-k comes as local entries, and as slots.
        lse: whether the lse is wanted.
        out: whether the result goes into a buffer of the caller's.
    """

    meta: AttentionMetadata
    chunk: SparsePrefillChunkCache
    device: torch.device
    tokens: int
    heads: int
    caches: tuple[CacheSpec, ...]
    topk: int
    local: bool
    slots: bool
    lse: bool
    out: bool

    @classmethod
    def of(cls, layer: Layer, meta: AttentionMetadata, chunk: SparsePrefillChunkCache) -> Step:
        caches = tuple(cache.spec for cache in (layer.swa_cache, layer.extra_cache) if cache is not None)
        rows = layer.topk_indices if layer.topk_indices is not None else layer.topk_slots
        topk = 0 if rows is None else rows.shape[1]
        if meta.selects:
            chunk.reserve(topk)
        return cls(
            meta, chunk, layer.q.device, layer.q.shape[0], layer.heads, caches, topk,
            layer.topk_indices is not None, layer.topk_slots is not None, layer.return_lse,
            layer.out is not None,
        )  # fmt: skip

    @property
    def extra_width(self) -> int:
        """Width of the compressed index rows: top-k's, or of every visible entry."""
        return self.topk if self.meta.selects else self.meta.slot_row_width

    @property
    def entries(self) -> int:
        """Entries a token reads on average."""
        return self.meta.mean_entries(self.extra_width)


class StepPlan(NamedTuple):
    """What was decided for layers of one shape.

    Attributes:
        path: the path they take.
        attend: the attention kernel.
        helpers: the kernels of what runs before it, by op.
        prepared: what the path keeps for the next layer that looks the same.
    """

    path: Path
    attend: Kernel
    helpers: dict[str, Kernel]
    prepared: dict[str, Callable[..., Any]]


class Path(Protocol):
    """One way through a step."""

    name: ClassVar[str]

    def has(self, kind: LayerKind) -> bool:
        """Whether layers of this kind have such a path."""

    def problem(self, step: Step) -> AttentionProblem:
        """Its attention call, or one block's of it."""

    def refusal(self, step: Step, problem: AttentionProblem) -> str:
        """Why it cannot run; empty where it can."""

    def by_name_only(self, step: Step, problem: AttentionProblem) -> str:
        """Why it runs only when asked for; empty where prediction may choose it."""

    def predicted_us(self, step: Step, problem: AttentionProblem, kernel: Kernel) -> float:
        """Predicted microseconds of the whole step with an attention kernel."""

    def helpers(self, step: Step, problem: AttentionProblem, kernel: Kernel) -> dict[str, Kernel]:
        """The kernels of what runs before attention, by op."""

    def run(self, plan: StepPlan, layer: Layer, meta: AttentionMetadata, chunk: SparsePrefillChunkCache) -> Result:
        """Attention of one layer, with its device current."""


@dataclass(frozen=True)
class StepExplanation:
    """Which path a step takes and why not the others.

    Attributes:
        chosen: the path of the lowest predicted time, or None when every one is refused.
        kernels: path -> its attention kernel, for the paths that can run.
        predicted_us: path -> predicted microseconds of the whole step, for the same.
        refused: path -> why it cannot run.
        problems: path -> its attention problem, or one block's of it, for the paths that can run; for
            :func:`~dsv4x.explain`.
    """

    chosen: str | None
    kernels: dict[str, str]
    predicted_us: dict[str, float]
    refused: dict[str, str]
    problems: dict[str, AttentionProblem]

    def __str__(self) -> str:
        lines = []
        for path in (*self.kernels, *self.refused):
            if path in self.refused:
                state = f"refused: {self.refused[path]}"
            else:
                verdict = "chosen" if path == self.chosen else "slower"
                state = f"{verdict}, {self.kernels[path]}, predicted {self.predicted_us[path]:.0f} us"
            lines.append(f"  {path:<10} {state}")
        return "\n".join(lines)


class Option(NamedTuple):
    """One path that can run, with the kernel it would take."""

    path: Path
    problem: AttentionProblem
    kernel: Kernel
    us: float


def plan_step(step: Step, paths: tuple[Path, ...], kernel: str | None) -> StepPlan:
    """The plan of the fastest of ``paths`` by prediction.

    Raises:
        ValueError: a single path was asked for and refuses.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run any of them.
    """
    options, refused, errors = _options(step, paths, kernel)
    if not options:
        if errors:
            raise errors[0]
        raise ValueError("; ".join(f"path: {name}, but {reason}" for name, reason in refused.items()))
    best = min(options, key=lambda option: option.us)
    return StepPlan(best.path, best.kernel, best.path.helpers(step, best.problem, best.kernel), {})


def explain_paths(step: Step, paths: tuple[Path, ...], kernel: str | None) -> StepExplanation:
    """What :func:`plan_step` weighs."""
    options, refused, _ = _options(step, paths, kernel)
    best = min(options, key=lambda option: option.us, default=None)
    return StepExplanation(
        best.path.name if best is not None else None,
        {option.path.name: option.kernel.name for option in options},
        {option.path.name: option.us for option in options},
        refused,
        {option.path.name: option.problem for option in options},
    )


def kernel_of(path: Path, step: Step, problem: AttentionProblem, kernel: str | None = None) -> tuple[Kernel, float]:
    """The attention kernel of a path, and the step's predicted microseconds: the one named, or the step's fastest.

    A step may be faster with a kernel whose own time is longer, if that spares the step a launch. Raises as
    :func:`~dsv4x.common.dispatch.registry.select`.
    """
    # Where none can run it, select says why.
    records = (candidates(problem) if kernel is None else []) or [select(problem, kernel)]
    times = [path.predicted_us(step, problem, record) for record in records]
    best = times.index(min(times))
    return records[best], times[best]


def _options(
    step: Step, paths: tuple[Path, ...], kernel: str | None
) -> tuple[list[Option], dict[str, str], list[Exception]]:
    options: list[Option] = []
    refused: dict[str, str] = {}
    errors: list[Exception] = []
    for path in paths:
        if not path.has(step.meta.kind):
            refused[path.name] = f"no indexer selects in layers of compress_ratio {step.meta.compress_ratio}"
            continue
        problem = path.problem(step)
        reason = path.refusal(step, problem) or ("" if len(paths) == 1 else path.by_name_only(step, problem))
        if reason:
            refused[path.name] = reason
            continue
        try:
            options.append(Option(path, problem, *kernel_of(path, step, problem, kernel)))
        except (KernelNotSupported, BackendUnavailable) as error:
            refused[path.name] = str(error)
            errors.append(error)
    return options, refused, errors
