"""Argument checks shared by the public ops. Every message names the argument, the value seen and the value needed.

Shapes, dtypes, strides and devices are checked always, before any launch. Values on the device are only looked at
under ``DSV4X_CHECK=1``, which synchronizes.
"""

from __future__ import annotations

import functools
import os

import torch

from .layouts import PagedCache

INDEX_DTYPES = (torch.int32, torch.int64)


_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@functools.lru_cache(maxsize=16)
def _switch(name: str, value: str) -> bool:
    """What an environment variable that is on or off says."""
    said = value.strip().lower()
    if said in _ON:
        return True
    if said and said not in _OFF:
        raise ValueError(f"{name}: got {value!r}, need one of {', '.join(_ON)}, or {', '.join(_OFF)} or nothing")
    return False


def check_values_enabled() -> bool:
    """Whether ``DSV4X_CHECK`` asks for value checks. Never while a graph is being captured.

    Raises ValueError when it is neither on (1, true, yes) nor off (0, false, no, empty), in any case.
    """
    if not _switch("DSV4X_CHECK", os.environ.get("DSV4X_CHECK", "")):
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def tensor(
    name: str,
    value: object,
    shape: tuple[int | None, ...],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> torch.Tensor:
    """Check one tensor: ``None`` in ``shape`` matches any size; the last dimension must be contiguous.

    An empty tensor has no wrong stride: numpy's come with any.
    """
    # A layer's call checks ten tensors, so a good one is told by as little Python as will do.
    if isinstance(value, torch.Tensor) and (value.dtype is dtypes or (type(dtypes) is tuple and value.dtype in dtypes)):
        seen = value.shape
        if len(seen) == len(shape) and (not seen or seen[-1] <= 1 or value.stride(-1) == 1 or not value.numel()):
            for wanted, size in zip(shape, seen):
                if wanted is not None and wanted != size:
                    break
            else:
                if device is None or value.device == device:
                    return value
    raise _wrong_tensor(name, value, shape, dtypes if isinstance(dtypes, tuple) else (dtypes,), device)


def _wrong_tensor(
    name: str,
    value: object,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None,
) -> TypeError | ValueError:
    if not isinstance(value, torch.Tensor):
        return TypeError(f"{name}: got {type(value).__name__}, need a {_names(dtypes)} tensor")
    if value.dtype not in dtypes:
        return TypeError(f"{name}: dtype is {_names((value.dtype,))}, need {_names(dtypes)}")
    if value.dim() != len(shape) or any(w not in (None, s) for w, s in zip(shape, value.shape)):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        return ValueError(f"{name}: shape is {tuple(value.shape)}, need ({wanted})")
    if shape and value.shape[-1] > 1 and value.stride(-1) != 1 and value.numel():
        return ValueError(f"{name}: stride({value.dim() - 1}) is {value.stride(-1)}, need 1")
    return ValueError(f"{name}: on {value.device}, need {device}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def rows_apart(name: str, value: torch.Tensor) -> torch.Tensor:
    """A buffer that is written must not have two of its rows in one place, as an expanded one has.

    Args:
        value: ``[.., n]``, its last dimension contiguous; a row is what stands along it.
    """
    if value.is_contiguous():
        return value
    *sizes, width = value.shape
    if value.dim() == 2:
        if value.stride(0) < width:
            raise ValueError(f"{name}: stride(0) is {value.stride(0)}, need >= {width}")
        return value
    filled = width
    for stride, size in sorted(zip(value.stride(), sizes)):
        if size > 1 and stride < filled:
            break
        filled += (size - 1) * stride
    else:
        return value
    # Dimensions may also be woven into one another, which only the rows' own places tell from an overlap.
    starts = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in zip(value.stride(), sizes):
        along = torch.arange(size, dtype=torch.int64, device="cpu") * stride
        starts = (starts[:, None] + along).flatten()
    if (starts.sort().values.diff() < width).any():
        raise ValueError(f"{name}: strides {value.stride()} lay rows of {tuple(value.shape)} over one another")
    return value


def cache(name: str, value: object, device: torch.device) -> PagedCache:
    if not isinstance(value, PagedCache):
        raise TypeError(f"{name}: got {type(value).__name__}, need a dsv4x.PagedCache")
    if value.device != device:
        raise ValueError(f"{name}: on {value.device}, need {device}")
    return value


def k_scale(name: str, value: object, cache: PagedCache) -> float:
    """A scale of the whole tensor, which only a layout that stores none takes."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, need a float")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: got {value}, need a finite number > 0")
    if value != 1 and not cache.layout.needs_k_scale:
        raise ValueError(f"{name}: got {value}, need 1: {cache.layout.name} has no scale of the whole tensor")
    return float(value)


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, need an int")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: got {value}, need {f'{low} to {high}' if high is not None else f'>= {low}'}")
    return value


def index_values(
    name: str, indices: torch.Tensor, lens: torch.Tensor | None, capacity: int | torch.Tensor, space: str
) -> None:
    """Report the first row with a length past its width or an index that is neither -1 nor in ``[0, capacity)``.

    ``capacity`` is one number, or one a row.
    """
    rows = indices if indices.dim() == 2 else indices[:, None]
    limits = torch.as_tensor(capacity, dtype=torch.int64, device=rows.device).expand(rows.shape[0])
    bad = (rows < -1) | (rows >= limits[:, None])
    if lens is not None:
        past = (lens < 0) | (lens > rows.shape[1])
        if past.any():
            row = int(past.nonzero()[0])
            raise ValueError(f"{name}: length {int(lens[row])} in row {row}, need 0 to {rows.shape[1]}")
        bad &= torch.arange(rows.shape[1], dtype=torch.int64, device=rows.device) < lens[:, None]
    if bad.any():
        row, column = (int(x) for x in bad.nonzero()[0])
        raise ValueError(
            f"{name}: {space} {int(rows[row, column])} in row {row}, column {column}, "
            f"need -1 or 0 to {int(limits[row]) - 1}"
        )


def no_holes(name: str, slots: torch.Tensor, lens: torch.Tensor, table: str) -> None:
    """Report the first token with a -1 among the slots its span promises: its page is not in the pool."""
    bad = (slots < 0) & (torch.arange(slots.shape[1], dtype=torch.int64, device=slots.device) < lens[:, None])
    if bad.any():
        row, column = (int(x) for x in bad.nonzero()[0])
        raise ValueError(f"{table}: token {row} needs a page that is outside the pool ({name} column {column})")


def pages_in_pool(name: str, table: torch.Tensor, counts: torch.Tensor, pages: int) -> None:
    """Report the first page number outside ``[0, pages)`` among those that each request needs.

    Args:
        table: int32 ``[R, m]`` page numbers.
        counts: int32 or int64 ``[R]``, leading pages each request needs; more than m is an error too.
    """
    short = counts > table.shape[1]
    if short.any():
        row = int(short.nonzero()[0])
        raise ValueError(f"{name}: {table.shape[1]} pages, need >= {int(counts[row])} for request {row}")
    column = torch.arange(table.shape[1], dtype=torch.int64, device=table.device)
    bad = (column < counts[:, None]) & ((table < 0) | (table >= pages))
    if bad.any():
        row, at = (int(x) for x in bad.nonzero()[0])
        raise ValueError(f"{name}: page {int(table[row, at])} of request {row} at {at}, need 0 to {pages - 1}")


def nothing_past_span(name: str, indices: torch.Tensor, lens: torch.Tensor) -> None:
    """Report the first row of ``indices [T, K]`` with an entry at or past its span of ``lens [T]``: nobody reads it."""
    column = torch.arange(indices.shape[1], dtype=torch.int64, device=indices.device)
    bad = (indices >= 0) & (column >= lens[:, None])
    if bad.any():
        row, at = (int(x) for x in bad.nonzero()[0])
        raise ValueError(
            f"{name}: entry {int(indices[row, at])} in row {row}, column {at}, need -1 past its {int(lens[row])}"
        )


def same_as_device(name: str, host: torch.Tensor, device: torch.Tensor) -> None:
    """Report the first value of a host copy that is unlike the device's own."""
    bad = host.long() != device.to("cpu", torch.int64)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name}: {int(host[at])} at {at}, need {int(device[at])} as on the device")


def ascending(name: str, starts: torch.Tensor, total: int) -> None:
    """Report the first value of ``starts`` that is below the one before it or outside ``[0, total]``."""
    starts = starts.long()
    before = torch.cat([starts.new_zeros(1), starts[:-1].clamp_min(0)])
    bad = (starts < before) | (starts > total)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name}: {int(starts[row])} at {row}, need {int(before[row])} to {total}")


def finite_rows(name: str, values: torch.Tensor, spans: list[torch.Tensor | None] | None = None) -> None:
    """Report the first row of ``values`` that holds a NaN; rows whose spans are all 0 are padding and may."""
    bad = values.flatten(1).isnan().any(1)
    if spans is not None and all(span is not None for span in spans):
        bad &= torch.stack([span > 0 for span in spans if span is not None]).any(0)
    if bad.any():
        raise ValueError(f"{name}: NaN in row {int(bad.nonzero()[0])}")
