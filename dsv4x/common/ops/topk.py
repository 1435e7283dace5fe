"""Selection of the best-scoring entries: which ones, in what order, and in which index space.

Every row selects ``min(length, k)`` entries: the largest logits, equal ones by the smaller index, in ascending order of
their indices, then -1. NaN counts as -inf, -0 as 0, and -inf comes last but is not left out: a row of no more than k
entries selects all of them whatever their logits, which is what lets short contexts go without logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..core import checks
from ..core.logits_calls import SelectionCall
from ..core.spaces import INT32_MAX, TopkMethod, check_pool
from ..dispatch.problem import SelectionProblem
from ..dispatch.registry import select
from .indices import local_to_slots, local_to_workspace_rows

_METHODS = {
    "sparse_mla_attention": TopkMethod.LOCAL,
    "sparse_mla_prefill": TopkMethod.RAGGED,
    "sparse_mla_decode": TopkMethod.PAGED,
}


def topk_method(op: str) -> TopkMethod:
    """The index space that an attention entry point takes its top-k indices in.

    Args:
        op: ``"sparse_mla_attention"`` (LOCAL: it remaps by its metadata, on either path), ``"sparse_mla_prefill"``
            (RAGGED: rows of its workspace) or ``"sparse_mla_decode"`` (PAGED: slots of its cache).

    Raises ValueError for another name.
    """
    if not isinstance(op, str) or op not in _METHODS:
        raise ValueError(f"op: got {op!r}, need one of {', '.join(_METHODS)}")
    return _METHODS[op]


def topk_transform(
    logits: torch.Tensor,
    lengths: torch.Tensor | None,
    k: int,
    method: TopkMethod = TopkMethod.LOCAL,
    *,
    row_starts: torch.Tensor | None = None,
    bases: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    page_size: int | None = None,
    pages: int | None = None,
    next_n: int = 1,
    requests: torch.Tensor | None = None,
    stable: bool = True,
    out: torch.Tensor | None = None,
    out_local: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """Each row's k best entries, as indices of the space that ``method`` names.

    Args:
        logits: float32 ``[rows, N]``, rows contiguous, any row stride; what stands outside a row's entries may be
            anything.
        lengths: int32 or int64 ``[rows]``, entries of each row, clamped to ``[0, N - start]``; None for all columns.
        k: indices a row, >= 1.
        method: LOCAL, RAGGED (``bases``) or PAGED (``block_table``, ``page_size``, ``pages``).
        row_starts: int32 or int64 ``[rows]``, the column of each row's entry 0, clamped to ``[0, N]``; None for 0.
        bases: int32 or int64 ``[rows]``, workspace row of each row's entry 0; a negative one has none (RAGGED).
        block_table: int32 ``[R, m]`` page numbers (PAGED); an entry whose page is outside the pool or past the table
            becomes -1 where it stands.
        page_size, pages: of the cache (PAGED).
        next_n: rows a request; row i is of request i // next_n.
        requests: int32 or int64 ``[rows]``, each row's request instead; one outside ``[0, R)`` has no pages.
        stable: whether ties go to the smallest index and rows are in ascending order, so that all ranks agree. False
            leaves both open and lets kernels run that promise neither.
        out: int32 ``[rows, k]``, rows contiguous, or None.
        out_local: int32 ``[rows, k]``, rows contiguous, for the same selection in the local space, place by place; an
            entry that the method's space has no index of is there too. None for none.
        kernel: ``"cuda"``, ``"triton"``, ``"flashinfer"``, ``"aiter"`` or ``"reference"``; None picks.

    Returns:
        int32 ``[rows, k]``: ``min(length, k)`` indices, then -1. With PAGED a -1 may also stand between them.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or value; under ``DSV4X_CHECK=1`` also a
            length past its row, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: the two transforms of FlashInfer's ``top_k_*_transform`` and the stable order of AITER's
    ``top_k_per_row_*``.
    """
    checks.tensor("logits", logits, (None, None), torch.float32)
    rows, width, device = *logits.shape, logits.device
    checks.integer("k", k, 1, INT32_MAX)
    for name, value in (("lengths", lengths), ("row_starts", row_starts)):
        if value is not None:
            checks.tensor(name, value, (rows,), checks.INDEX_DTYPES, device)
    given = {
        "bases": bases,
        "block_table": block_table,
        "page_size": page_size,
        "pages": pages,
        "next_n": next_n,
        "requests": requests,
    }
    space = check_space(method, rows, device, given)
    if out is None:
        out = torch.empty(rows, k, dtype=torch.int32, device=device)
    else:
        checks.rows_apart("out", checks.tensor("out", out, (rows, k), torch.int32, device))
    if out_local is not None:
        checks.rows_apart("out_local", checks.tensor("out_local", out_local, (rows, k), torch.int32, device))
    if lengths is not None and checks.check_values_enabled():
        most = width - (0 if row_starts is None else row_starts.long())
        bad = (lengths < 0) | (lengths > most)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"lengths: {int(lengths[row])} in row {row}, need 0 to what is left of {width} columns")
    return launch_topk(logits, lengths, row_starts, Selection(k, method, stable, kernel), space, (out, out_local))


class Selection(NamedTuple):
    """What is selected of each row; fields as :func:`topk_transform` has them."""

    k: int
    method: TopkMethod
    stable: bool
    kernel: str | None


def launch_topk(
    logits: torch.Tensor,
    lengths: torch.Tensor | None,
    row_starts: torch.Tensor | None,
    selection: Selection,
    space: dict[str, Any],
    outs: tuple[torch.Tensor, torch.Tensor | None],
) -> torch.Tensor:
    """:func:`topk_transform` of checked arguments, into ``(out, out_local)``; lengths may end outside the columns."""
    k, method, stable, kernel = selection
    rows, width = logits.shape
    problem = SelectionProblem.on(
        "topk_transform", logits.device, tokens=rows, width=width, k=k, method=method, stable=stable
    )
    record = select(problem, kernel)
    if rows:
        record.launch(logits.device, SelectionCall(logits, lengths, k, method, row_starts, space, *outs))
    return outs[0]


def check_space(method: TopkMethod, rows: int, device: torch.device, given: dict[str, Any]) -> dict[str, Any]:
    """What turns a local index into one of the method's space, checked: those of ``given`` that the method needs."""
    if not isinstance(method, TopkMethod):
        raise TypeError(f"method: got {type(method).__name__}, need a dsv4x.TopkMethod")
    if method is TopkMethod.RAGGED:
        if given["bases"] is None:
            raise ValueError("bases: got None, need an int32 or int64 tensor for RAGGED")
        checks.tensor("bases", given["bases"], (rows,), checks.INDEX_DTYPES, device)
        return {"bases": given["bases"]}
    if method is TopkMethod.LOCAL:
        return {}
    for name in ("block_table", "page_size", "pages"):
        if given[name] is None:
            raise ValueError(f"{name}: got None, need it for PAGED")
    block_table, next_n, requests = given["block_table"], given["next_n"], given["requests"]
    checks.tensor("block_table", block_table, (None, None), torch.int32, device)
    check_pool(given["page_size"], given["pages"])
    checks.integer("next_n", next_n, 1)
    if requests is not None:
        checks.tensor("requests", requests, (rows,), checks.INDEX_DTYPES, device)
    elif rows > block_table.shape[0] * next_n:
        raise ValueError(f"block_table: {block_table.shape[0]} requests, need >= {-(-rows // next_n)} for {rows} rows")
    return {name: value for name, value in given.items() if name != "bases"}


def row_ranges(
    logits: torch.Tensor, lengths: torch.Tensor | None, row_starts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 ``(starts, lengths)`` of each row's entries, within its columns, as vendors' kernels need them."""
    rows, width = logits.shape
    starts = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    if row_starts is not None:
        starts = row_starts.clamp(0, width).int()
    lens = width - starts
    return starts, lens if lengths is None else torch.minimum(lengths.clamp(0, width).int(), lens)


def plain_order(logits: torch.Tensor) -> torch.Tensor:
    """A copy in which a vendor's order of float32 is this module's: NaN as -inf, -0 as 0; rows back to back."""
    return torch.where(logits.isnan(), -torch.inf, logits + 0.0).contiguous()


def put_in_space(
    local: torch.Tensor,
    lens: torch.Tensor,
    method: TopkMethod,
    space: dict[str, Any],
    out: torch.Tensor,
    out_local: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write local indices below ``lens``, -1 for none, to ``out`` in the space of ``method``.

    Args:
        local: int32 or int64 ``[rows, k]``, any row stride.
        lens: int32 or int64 ``[rows]``.
        method, space: as :func:`check_space` returns it.
        out: int32 ``[rows, k]``.
        out_local: int32 ``[rows, k]`` for the local indices, or None.
    """
    if out_local is not None:
        out_local.copy_(torch.where(local < lens[:, None], local, -1))
    if method is TopkMethod.LOCAL:
        return out.copy_(torch.where(local < lens[:, None], local, -1))
    row = torch.arange(out.shape[0], dtype=torch.int32, device=out.device)
    if method is TopkMethod.RAGGED:
        return out.copy_(local_to_workspace_rows(local, row, lens, space["bases"]))
    request = row // space["next_n"] if space["requests"] is None else space["requests"]
    table, page_size, pages = space["block_table"], space["page_size"], space["pages"]
    return out.copy_(local_to_slots(local, request, lens, table, page_size, pages))
