"""``python -m shared_entries``: that dsv4x chooses the kernel where it can run, says why elsewhere, and is right.

Prints the worst error against the float64 oracle; exits with 1 where something is not as it should be.
"""

from __future__ import annotations

import sys

import torch

import dsv4x
from dsv4x import PagedCache, Problem, layouts, reference

MAX_ERROR = 4e-3  # relative; rounding out to bf16 costs about 2e-3
PAGES, PAGE, HEADS = 8, 64, 4


def need(what: str, holds: bool) -> None:
    if not holds:
        sys.exit(f"shared_entries: {what}")


def worst_error(tokens: int, rng: torch.Generator) -> float:
    """Of out and lse, for the last tokens of one request: windows that overlap, holes, spans, repeated entries."""

    def pool() -> PagedCache:
        cache = PagedCache.zeros(PAGES, layouts.DSV4, PAGE)
        k = torch.randn(cache.capacity, 512, generator=rng).bfloat16()
        dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(cache.capacity))
        return cache

    swa, extra = pool(), pool()
    window = torch.arange(tokens, dtype=torch.int32)[:, None] + torch.arange(128, dtype=torch.int32)
    chosen = torch.randint(-3, extra.capacity + 3, (tokens, 40), generator=rng, dtype=torch.int32)
    lens = torch.randint(0, 41, (tokens,), generator=rng, dtype=torch.int32)
    spans = torch.full((tokens,), 128, dtype=torch.int32)
    spans[-1] = lens[-1] = 0  # a token without entries
    q = (3 * torch.randn(tokens, HEADS, 512, generator=rng)).bfloat16()
    sink = torch.randn(HEADS, generator=rng)
    rows = (q, swa, window, spans, extra, chosen, lens, sink)
    want, want_lse = reference.sparse_mla_decode(*rows, dtype=torch.float64)
    out, lse = dsv4x.sparse_mla_decode(*rows, kernel="shared_entries")
    need("a token without entries has to give out = 0 and lse = +inf", not out[-1].any() and lse[-1].isposinf().all())
    error = (out - want).norm() / want.norm().clamp_min(1e-30)
    lse_error = (lse - want_lse)[:-1].norm() / want_lse[:-1].norm().clamp_min(1e-30)
    return max(float(error), float(lse_error))


def main() -> None:
    few, many = (Problem("sparse_mla_decode", "cpu", "cpu", tokens, heads=HEADS, width=128) for tokens in (4, 64))
    explained = dsv4x.explain(few)
    need(f"it has to be chosen for 4 tokens on a CPU:\n{explained}", explained.chosen == "shared_entries")
    found = dsv4x.explain(many).reasons["shared_entries"]
    need(f"64 tokens have to be refused, got {found}", len(found) == 1 and found[0].startswith("64 tokens, need <= 8"))
    found = dsv4x.explain(Problem("sparse_mla_decode", "cuda", "sm_90", 4, heads=HEADS, width=128))
    found = found.reasons["shared_entries"]
    need(f"a GPU has to be refused, got {found}", "device is cuda, need cpu" in found)
    rng = torch.Generator().manual_seed(0)
    errors = [worst_error(tokens, rng) for tokens in (1, 2, 8)]
    error = max(errors)
    need(f"error {error:.2e}, need <= {MAX_ERROR:.0e}", error <= MAX_ERROR)
    print(f"shared_entries on cpu: chosen for 4 tokens, refused for 64 and on a GPU, worst relative error {error:.1e}")


if __name__ == "__main__":
    main()
