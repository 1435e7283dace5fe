"""One request's compressed entries over two ranks: each attends to the pages it holds, and the parts are merged.

Run it: ``python examples/split_kv.py``, on a CPU or a GPU. Two processes over gloo compare what they merge with one
float64 pass over all entries and print the worst error; it exits with 1 where that is too large.

What makes the parts add up:

- No entry is attended to twice. Page j of a request is on rank j % 2 alone. The window is small, so both ranks have it,
  and rank 0 counts it.
- A rank's block table has -1 for the pages of the other, and -1 is no page in dsv4x.
- Parts are made without the sink, which ``merge_attention_states`` applies once.
- A rank without an entry of a token gives lse = +inf, and the merge gives it no weight.
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch
import torch.distributed as dist

import dsv4x
from dsv4x import PagedCache, layouts, reference

RANKS, REQUESTS, HEADS, DIM, WINDOW, PAGE = 2, 4, 8, 512, 128, 16
ENTRIES = (150, 33, 5, 0)  # compressed entries of each request; rank 1 has none of the last two
COLUMNS = -(-max(ENTRIES) // PAGE)
MAX_ERROR = 4e-3  # relative; each part's out is rounded to bf16, and the merged one again


def filled(pages: int, page_size: int, entries: torch.Tensor, slots: torch.Tensor) -> PagedCache:
    """A cache that holds bf16 entries at their slots; a slot of -1 is not stored."""
    cache = PagedCache.zeros(pages, layouts.DSV4, page_size, entries.device)
    dsv4x.quantize_and_insert_k_cache(entries, cache, slots)
    return cache


def slots_of(table: torch.Tensor, pages: int) -> torch.Tensor:
    """int32 ``[REQUESTS, COLUMNS * PAGE]``: the slots of every entry through a block table, -1 for none."""
    device = table.device
    every = torch.arange(COLUMNS * PAGE, device=device).expand(REQUESTS, -1)
    request = torch.arange(REQUESTS, device=device)
    return dsv4x.local_to_slots(every, request, torch.tensor(ENTRIES, device=device), table, PAGE, pages)


def exchange(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every rank's part, by one collective: an lse travels in the bytes of two more values of its out."""
    mine = torch.cat([out, lse[..., None].view(torch.bfloat16)], -1)
    # gloo moves host memory, and bytes whatever they mean. With NCCL both views stay on the GPU.
    parts = [torch.empty(mine.shape, dtype=mine.dtype).view(torch.uint8) for _ in range(RANKS)]
    dist.all_gather(parts, mine.cpu().view(torch.uint8))
    together = torch.stack(parts).to(out.device).view(torch.bfloat16)
    return together[..., :DIM], together[..., DIM:].contiguous().view(torch.float32)[..., 0]


def serve(rank: int, folder: str) -> None:
    """One rank: its own pages, its part of the attention, the merge."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
    # The same on every rank: queries, and the entries that a model would have computed.
    rng = torch.Generator().manual_seed(0)
    q = (3 * torch.randn(REQUESTS, HEADS, DIM, generator=rng)).bfloat16().to(device)
    raw = torch.randn(REQUESTS * WINDOW, DIM, generator=rng).bfloat16().to(device)
    compressed = torch.randn(REQUESTS * COLUMNS * PAGE, DIM, generator=rng).bfloat16().to(device)
    sink = (8 + torch.randn(HEADS, generator=rng)).to(device)  # as large as an lse, so that it counts

    # A page for every second column of the table: page numbers are the rank's own.
    column = torch.arange(COLUMNS, dtype=torch.int32)
    held = -(-COLUMNS // RANKS)
    table = torch.arange(REQUESTS, dtype=torch.int32)[:, None] * held + column // RANKS
    table = torch.where(column % RANKS == rank, table, -1).to(device)
    slots = slots_of(table, REQUESTS * held)
    extra = filled(REQUESTS * held, PAGE, compressed, slots.flatten())
    window = torch.arange(REQUESTS * WINDOW, dtype=torch.int32, device=device).view(REQUESTS, WINDOW)
    swa = filled(REQUESTS, WINDOW, raw, window.flatten())
    counted = torch.full((REQUESTS,), WINDOW if rank == 0 else 0, dtype=torch.int32, device=device)

    out, lse = dsv4x.sparse_mla_decode(q, swa, window, counted, extra, slots)
    merged, merged_lse = dsv4x.merge_attention_states(*exchange(out, lse), sink)

    # One pass over one cache of everything.
    table = torch.arange(REQUESTS * COLUMNS, dtype=torch.int32, device=device).view(REQUESTS, COLUMNS)
    slots = slots_of(table, REQUESTS * COLUMNS)
    whole = filled(REQUESTS * COLUMNS, PAGE, compressed, slots.flatten())
    want, want_lse = reference.sparse_mla_decode(q, swa, window, None, whole, slots, None, sink, dtype=torch.float64)
    error = float((merged - want).norm() / want.norm())
    lse_error = float((merged_lse - want_lse).norm() / want_lse.norm())
    if not error <= MAX_ERROR or not lse_error <= 1e-4:
        sys.exit(f"split_kv: rank {rank}: error {error:.2e}, need <= {MAX_ERROR}; of lse {lse_error:.2e}, need <= 1e-4")
    if rank == 0:
        print(f"split_kv on {device.type}: {RANKS} ranks, worst relative errors: out {error:.1e}, lse {lse_error:.1e}")
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(serve, (folder,), nprocs=RANKS)


if __name__ == "__main__":
    main()
