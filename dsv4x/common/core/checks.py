"""Argument checks shared by the public ops. Every message names the argument, the value seen and the value needed.

Shapes, dtypes, strides and devices are checked always, before any launch. Values on the device are only looked at
under ``DSV4X_CHECK=1``, which synchronizes.
"""

from __future__ import annotations

import os

import torch

from .layouts import PagedCache

INDEX_DTYPES = (torch.int32, torch.int64)


def check_values_enabled() -> bool:
    """Whether ``DSV4X_CHECK=1`` asks for value checks. Never while a graph is being captured."""
    if os.environ.get("DSV4X_CHECK") != "1":
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def tensor(
    name: str,
    value: object,
    shape: tuple[int | None, ...],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> torch.Tensor:
    """Check one tensor: ``None`` in ``shape`` matches any size; the last dimension must be contiguous."""
    # A layer's call checks ten tensors, so a good one is told by as little Python as will do.
    if isinstance(value, torch.Tensor) and (value.dtype is dtypes or (type(dtypes) is tuple and value.dtype in dtypes)):
        seen = value.shape
        if len(seen) == len(shape) and (not seen or seen[-1] <= 1 or value.stride(-1) == 1):
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
    if shape and value.shape[-1] > 1 and value.stride(-1) != 1:
        return ValueError(f"{name}: stride({value.dim() - 1}) is {value.stride(-1)}, need 1")
    return ValueError(f"{name}: on {value.device}, need {device}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def rows_apart(name: str, value: torch.Tensor) -> torch.Tensor:
    """A buffer that is written row by row must not have two rows in one place."""
    if value.shape[0] > 1 and value.stride(0) < value.shape[1]:
        raise ValueError(f"{name}: stride(0) is {value.stride(0)}, need >= {value.shape[1]}")
    return value


def cache(name: str, value: object, device: torch.device) -> PagedCache:
    if not isinstance(value, PagedCache):
        raise TypeError(f"{name}: got {type(value).__name__}, need a dsv4x.PagedCache")
    if value.device != device:
        raise ValueError(f"{name}: on {value.device}, need {device}")
    return value


def k_scale(name: str, value: object, cache: PagedCache) -> float:
    """A scale of the whole tensor, which only a layout that stores none takes."""
    if not isinstance(value, (int, float)):
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
