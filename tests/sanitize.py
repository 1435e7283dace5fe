"""A small sweep of every Triton and Gluon kernel over hostile indices and NaN pages, for compute-sanitizer.

Indices hold INT_MIN, -2, one past the end and 2**31 - 1; every entry nothing points at is NaN. Each result is compared
with the reference, so a clean report is one of kernels that did their work.

Usage: PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py
For racecheck, --kernel triton: see docs/architecture.md on warp-specialized kernels. With compute-sanitizer's own
--kernel-name-exclude kns=at::native it leaves out torch's kernels, which are most of the time.
"""

from __future__ import annotations

import argparse

import torch
from layer_kinds import paths_of

import dsv4x
from dsv4x import PagedCache, layouts
from dsv4x.common.dispatch import registry

DEVICE = "cuda"
PAGES, PAGE_SIZE = 5, 16
CAPACITY = PAGES * PAGE_SIZE
KERNELS = ["triton", "gluon"]
HOSTILE = (-(2**31), -2, CAPACITY, 2**31 - 1)


def hostile(rows: int, width: int, live: torch.Tensor) -> torch.Tensor:
    """Index rows over ``live`` slots with a third of them hostile."""
    indices = live[torch.randint(len(live), (rows, width), device=DEVICE)].int()
    bad = torch.tensor(HOSTILE, device=DEVICE).int()[torch.randint(len(HOSTILE), (rows, width), device=DEVICE)]
    return torch.where(torch.rand(rows, width, device=DEVICE) < 1 / 3, bad, indices)


def cache_of(layout: layouts.CacheLayout) -> tuple[PagedCache, torch.Tensor]:
    """A cache whose bytes are all NaN but for the entries of its live slots."""
    cache = PagedCache.zeros(PAGES, layout, PAGE_SIZE, DEVICE)
    cache.data.fill_(0xFF)
    live = torch.arange(0, CAPACITY, 3, device=DEVICE)
    k = (torch.randn(len(live), layout.head_dim, device=DEVICE) / 4).bfloat16()
    slots = torch.cat([live, torch.tensor(HOSTILE, device=DEVICE)])
    dsv4x.quantize_and_insert_k_cache(torch.cat([k, k[: len(HOSTILE)]]), cache, slots)
    return cache, live


def compare(name: str, got, want) -> None:
    for a, b in zip(got, want):
        a, b = a.float(), b.float()
        close = torch.isclose(a, b, rtol=2e-2, atol=2e-3) | (a == b)
        if not close.all():
            raise AssertionError(f"{name}: {int((~close).sum())} of {close.numel()} values differ")


def attention_names(op: str) -> list[str]:
    return [record.name for record in registry.kernels(op) if record.name in KERNELS]


def sweep_attention() -> int:
    runs = 0
    fnuz = layouts.DSV4.with_flavour("e4m3fnuz")
    pairs = [
        (layouts.DSV4, layouts.DSV4), (fnuz, layouts.DSV4), (layouts.DSV41_FP8, layouts.DSV41_FP4),
        (layouts.BF16_512, layouts.UNIFORM_FP8), (layouts.DSV32, None), (layouts.TRTLLM_NATIVE, None),
    ]  # fmt: skip
    for swa_layout, extra_layout in pairs:
        swa, live = cache_of(swa_layout)
        extra = None if extra_layout is None else cache_of(extra_layout)[0]
        for tokens, heads in ((3, 7), (2, 64), (150, 128)):
            q = torch.randn(tokens, heads, swa_layout.head_dim, device=DEVICE).bfloat16()
            sink = torch.randn(heads, device=DEVICE)
            lens = torch.randint(-1, 100, (tokens,), device=DEVICE).int()
            arguments = [q, swa, hostile(tokens, 64, live), lens]
            arguments += [None] * 3 if extra is None else [extra, hostile(tokens, 96, live), None]
            arguments += [sink, 0.05]
            want = dsv4x.sparse_mla_decode(*arguments, kernel="reference")
            for name in attention_names("sparse_mla_decode"):
                if name != "triton" and not supported("sparse_mla_decode", arguments, name):
                    continue
                compare(f"decode {name} {swa_layout.name}", dsv4x.sparse_mla_decode(*arguments, kernel=name), want)
                runs += 1
    for head_dim in (512, 576):
        kv = torch.full((CAPACITY, head_dim), float("nan"), device=DEVICE).bfloat16()
        live = torch.arange(0, CAPACITY, 3, device=DEVICE)
        kv[live] = torch.randn(len(live), head_dim, device=DEVICE).bfloat16() / 4
        for tokens, heads in ((3, 7), (2, 64), (150, 128)):
            q = torch.randn(tokens, heads, head_dim, device=DEVICE).bfloat16()
            for lens in (None, torch.randint(-1, 300, (tokens,), device=DEVICE).int()):
                arguments = [q, kv, hostile(tokens, 200, live), lens, torch.randn(heads, device=DEVICE), 0.05]
                want = dsv4x.sparse_mla_prefill(*arguments, kernel="reference")
                for name in attention_names("sparse_mla_prefill"):
                    if name != "triton" and not supported("sparse_mla_prefill", arguments, name):
                        continue
                    compare(f"prefill {name}", dsv4x.sparse_mla_prefill(*arguments, kernel=name), want)
                    runs += 1
    return runs


def supported(op: str, arguments: list, name: str) -> bool:
    try:
        getattr(dsv4x, op)(*arguments, kernel=name)
    except dsv4x.KernelNotSupported:
        return False
    return True


def sweep_steps() -> int:
    """The entry point on every path, over block tables whose tails and middles are garbage."""
    runs = 0
    swa, extra = cache_of(layouts.DSV4)[0], cache_of(layouts.DSV4)[0]
    live = dsv4x.dequantize_k_cache_paged(swa, torch.arange(CAPACITY, device=DEVICE))
    dsv4x.quantize_and_insert_k_cache(live.nan_to_num(0.5), swa, torch.arange(CAPACITY, device=DEVICE))
    dsv4x.quantize_and_insert_k_cache(live.nan_to_num(0.5), extra, torch.arange(CAPACITY, device=DEVICE))
    garbage = torch.tensor([0, -1, 4, PAGES, 2**31 - 1, -(2**31), 2, 3], dtype=torch.int32, device=DEVICE)
    starts, lengths = torch.tensor([0, 3, 3, 40]).int(), torch.tensor([3, 9, 100]).int()
    for ratio in (1, 4, 128):
        table = garbage.expand(3, -1).contiguous()
        more = {} if ratio == 1 else {"extra_block_table": table, "extra_page_size": PAGE_SIZE, "extra_pages": PAGES}
        meta = dsv4x.AttentionMetadata.build(
            starts.cuda(), lengths.cuda(), table, compress_ratio=ratio, swa_page_size=PAGE_SIZE, swa_pages=PAGES,
            topk=24, window_size=32, num_tokens=42, **more,
        )  # fmt: skip
        q = torch.randn(42, 16, 512, device=DEVICE).bfloat16()
        chosen = hostile(42, 24, torch.arange(30, device=DEVICE)) if ratio == 4 else None
        cache = extra if ratio > 1 else None
        want = dsv4x.sparse_mla_attention(q, swa, cache, meta, chosen, path="direct", kernel="reference")
        for path in paths_of(ratio):
            for name in attention_names("sparse_mla_decode"):
                got = dsv4x.sparse_mla_attention(q, swa, cache, meta, chosen, path=path, kernel=name)
                compare(f"{path} {name}", got, want)
                runs += 1
    return runs


def sweep_cache_ops() -> int:
    runs = 0
    for layout in (member.value for member in layouts.MLAKVCacheLayout):
        cache, live = cache_of(layout)
        slots = hostile(1, 99, live)[0]
        got = dsv4x.dequantize_k_cache_paged(cache, slots, kernel="triton")
        compare(layout.name, [got], [dsv4x.dequantize_k_cache_paged(cache, slots, kernel="reference")])
        indices = hostile(9, 40, live)
        for gather, capacity in (
            (dsv4x.gather_referenced_rows, 7), (dsv4x.gather_referenced_rows, 60),
            (dsv4x.gather_referenced_cache_blocks, 2), (dsv4x.gather_referenced_cache_blocks, PAGES),
        ):  # fmt: skip
            made = [gather(cache, indices, capacity=capacity, kernel=name) for name in ("triton", "reference")]
            compare(gather.__name__, [made[0].indices, made[0].count], [made[1].indices, made[1].count])
            runs += 1
    return runs


def sweep_indexer() -> int:
    runs = 0
    for layout in (layouts.INDEXER_FP8, layouts.INDEXER_FP4):
        cache = PagedCache.zeros(PAGES, layout, 64, DEVICE)
        k = torch.randn(cache.capacity, 128, device=DEVICE).bfloat16()
        dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(cache.capacity, device=DEVICE))
        table = torch.tensor([[0, 4, PAGES, -1], [2, 2**31 - 1, -(2**31), 1]], dtype=torch.int32, device=DEVICE)
        q = torch.randn(2, 2, 64, 128, device=DEVICE).to(torch.float8_e4m3fn)
        weights = torch.rand(4, 64, device=DEVICE)
        lens = torch.tensor([[-(2**31), 200], [0, 2**31 - 1]], dtype=torch.int32, device=DEVICE)
        made = [
            dsv4x.paged_mqa_logits(q, cache, weights, lens, table, 230, kernel=name) for name in ("triton", "reference")
        ]
        compare(layout.name, [made[0].nan_to_num(neginf=-9)], [made[1].nan_to_num(neginf=-9)])
        runs += 1
    logits = torch.randn(5, 3000, device=DEVICE)
    logits[:, ::7] = 0.25
    logits[:, ::11] = float("nan")
    lengths = torch.tensor([-(2**31), 0, 7, 2999, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    for k in (16, 512):
        made = [dsv4x.topk_transform(logits, lengths, k, kernel=name) for name in ("triton", "reference")]
        compare("topk", made[:1], made[1:])
        runs += 1
    context = torch.randint(-5, 5000, (300, 2), dtype=torch.int32, device=DEVICE)
    made = [dsv4x.get_paged_mqa_logits_metadata(context, 64, 132, kernel=name) for name in ("triton", "reference")]
    compare("schedule", made[:1], made[1:])
    return runs + 1


def main() -> None:
    parts = {part.__name__: part for part in (sweep_attention, sweep_steps, sweep_cache_ops, sweep_indexer)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(parts)}, these alone")
    parser.add_argument("--kernel", choices=KERNELS, help="of attention, this one alone")
    arguments = parser.parse_args()
    if arguments.kernel:
        KERNELS[:] = [arguments.kernel]
    torch.manual_seed(0)
    for name in arguments.parts or parts:
        print(name, parts[name](), "runs", flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
