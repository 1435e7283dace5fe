"""A cache layout of one's own: a record, written, read back, attended to and drawn.

Run it: ``python examples/new_layout.py [page.svg]``, on a CPU or a GPU; with ``TRITON_INTERPRET=1`` a CPU runs Triton's
kernel too. It compares the layout's bytes with a decoder written from its table, and attention over them with float64
attention over what the decoder found. It prints the worst error and exits with 1 where one is too large.

The record is all there is: addresses, pitches and strides follow from it, and the portable kernels take it as it is.
``python -m dsv4x layout`` shows it too, once it is a member of ``MLAKVCacheLayout`` in
``dsv4x/common/core/layouts.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import dsv4x
from dsv4x import CacheLayout, PagedCache, reference
from dsv4x.common import drawing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGES, PAGE, TOKENS, HEADS, WIDTH = 6, 16, 5, 4, 40
MAX_ERROR, MAX_FP8_ERROR = 4e-3, 4e-2  # relative: of rounding out to bf16, and of storing e4m3

# DSv4's values and RoPE with twice as many scales, and each entry's bytes together.
MINE = CacheLayout(
    "DSv4 by 32",
    nope_dim=448,
    rope_dim=64,
    arrangement="aos",
    value_encoding="e4m3fn",
    scale_encoding="ue8m0",
    scale_tile=32,
    scale_pad=2,
)


def decoded(cache: PagedCache) -> torch.Tensor:
    """bf16 ``[entries, 512]``: what the bytes mean, by the offsets that ``drawing.table`` shows."""
    entries = cache.page_bytes.reshape(-1, 592)
    values = entries[:, :448].view(torch.float8_e4m3fn).float()
    rope = entries[:, 448:576].view(torch.bfloat16)
    scales = torch.exp2(entries[:, 576:590].float() - 127)
    return torch.cat([(values * scales.repeat_interleave(32, 1)).bfloat16(), rope], 1)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def need(what: str, error: float, most: float) -> float:
    if not error <= most:  # NaN too
        sys.exit(f"new_layout: {what}: error {error:.2e}, need <= {most:.0e}")
    return error


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    cache = PagedCache.zeros(PAGES, MINE, PAGE, DEVICE)
    k = torch.randn(cache.capacity, MINE.head_dim, generator=rng).bfloat16().to(DEVICE)
    slots = torch.randperm(cache.capacity, generator=rng).to(DEVICE)
    dsv4x.quantize_and_insert_k_cache(k, cache, slots)
    entries = decoded(cache)
    need("bytes against their decoder", relative(dsv4x.dequantize_k_cache_paged(cache, slots), entries[slots]), 0.0)
    fp8 = need("storing in fp8", relative(entries[slots], k), MAX_FP8_ERROR)

    q = (3 * torch.randn(TOKENS, HEADS, MINE.head_dim, generator=rng)).bfloat16().to(DEVICE)
    rows = torch.stack([torch.randperm(cache.capacity, generator=rng)[:WIDTH] for _ in range(TOKENS)]).int().to(DEVICE)
    rows[:, ::7] = -1
    want, want_lse = reference.attend(q, entries[rows.long()], rows >= 0, None, 512**-0.5, torch.float64)
    worst, ran = 0.0, []
    for kernel in ("reference", "triton", None):
        try:
            out, lse = dsv4x.sparse_mla_decode(q, cache, rows, None, kernel=kernel)
        except (dsv4x.KernelNotSupported, dsv4x.BackendUnavailable):
            if kernel != "triton" or DEVICE == "cuda":
                raise
            continue
        worst = max(worst, need(f"out of {kernel or 'the pick'}", relative(out, want), MAX_ERROR))
        need(f"lse of {kernel or 'the pick'}", relative(lse, want_lse), 1e-4)
        ran.append(kernel or "the pick")
    for path in sys.argv[1:2]:
        Path(path).write_text(drawing.svg(MINE, PAGE))
    kernels = ", ".join(ran)
    print(
        f"new_layout on {DEVICE}: {MINE.entry_bytes} B an entry, by {kernels}, worst error {worst:.1e}, fp8 {fp8:.1e}"
    )


if __name__ == "__main__":
    main()
