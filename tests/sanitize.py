"""A small sweep of every Triton and Gluon kernel over hostile indices and NaN pages, for compute-sanitizer.

Indices hold INT_MIN, -2, one past the end and 2**31 - 1; every entry nothing points at is NaN. Each result is compared
with the reference, so a clean report is one of kernels that did their work.

Usage: PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py
For racecheck, --kernel triton: see docs/architecture.md on warp-specialized kernels. With compute-sanitizer's own
--kernel-name-exclude kns=at::native it leaves out torch's kernels, which are most of the time.
"""

from __future__ import annotations

import argparse
import functools

import torch

import dsv4x
from dsv4x import ExtraPages, PagedCache, StepMetadata, layouts
from dsv4x.common.core.logits_calls import PagedLogitsCall
from dsv4x.common.dispatch import registry
from dsv4x.common.kernels.schedule import spread_rows
from dsv4x.common.step.attention import paths_of

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
        close = a == b
        if a.is_floating_point():
            close |= torch.isclose(a.float(), b.float(), rtol=2e-2, atol=2e-3)
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


GARBAGE = (0, -1, 4, PAGES, 2**31 - 1, -(2**31), 2, 3)
"""A block table's row: pages that are there, and pages that are not."""
SELECTS = {2: True, 4: True, 128: False}
TOKENS, TOPK, HEADS = 42, 24, 16


def sweep_steps() -> int:
    """The entry point on every path: tables of garbage, lengths of 0 and past their bound, rows past the last request.

    Metadata is compared with the reference's, which a step on the CPU is filled by.
    """
    runs = 0
    swa, extra = cache_of(layouts.DSV4)[0], cache_of(layouts.DSV4)[0]
    every = torch.arange(CAPACITY, device=DEVICE)
    for cache in (swa, extra):
        k = (torch.randn(CAPACITY, 512, device=DEVICE) / 4).bfloat16()
        dsv4x.quantize_and_insert_k_cache(k, cache, every)
    for lengths, bound in (([3, 9, 100], None), ([0, 9, 2**31 - 1], 100)):
        step, want = build_step(DEVICE, lengths, bound), build_step("cpu", lengths, bound)
        shared = ("request", "position", "swa_indices", "swa_lens", "clamped")
        compare("step", [getattr(step, name) for name in shared], [getattr(want, name).to(DEVICE) for name in shared])
        # The server's own rows, hostile where they have no entry, and no table of the window.
        given = build_step(DEVICE, lengths, bound, spoiled(step.swa_indices))
        for ratio in (1, *SELECTS):
            for name in ("visible", "extra_lens") if ratio > 1 else ():
                compare(name, [getattr(step[ratio], name)], [getattr(want[ratio], name).to(DEVICE)])
            runs += sweep_layer(swa, extra if ratio > 1 else None, step[ratio], given[ratio])
    return runs


def build_step(
    device: str, lengths: list[int], bound: int | None, swa_indices: torch.Tensor | None = None
) -> StepMetadata:
    table = torch.tensor(GARBAGE, dtype=torch.int32, device=device).expand(3, -1).contiguous()
    starts, seq_lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 3, 3, 40], lengths))
    kinds = {
        ratio: ExtraPages(table, PAGE_SIZE, PAGES, selects, TOPK if selects else None)
        for ratio, selects in SELECTS.items()
    }
    return StepMetadata.build(
        starts, seq_lens, table if swa_indices is None else None, kinds, swa_page_size=PAGE_SIZE, swa_pages=PAGES,
        window_size=32, num_tokens=TOKENS, max_seq_len=bound, swa_indices=swa_indices,
    )  # fmt: skip


def spoiled(slots: torch.Tensor) -> torch.Tensor:
    """The same entries, and in place of every -1 a hostile slot."""
    bad = torch.tensor(HOSTILE, device=DEVICE).int()[torch.randint(len(HOSTILE), slots.shape, device=DEVICE)]
    return torch.where(slots < 0, bad, slots)


def sweep_layer(
    swa: PagedCache, extra: PagedCache | None, meta: dsv4x.AttentionMetadata, given: dsv4x.AttentionMetadata
) -> int:
    """Every path and kernel of one layer, its rows made here or ``given``, its top-k local or slots, its q padded."""
    runs = 0
    q, sink = torch.randn(TOKENS, HEADS, 512, device=DEVICE).bfloat16(), torch.randn(HEADS, device=DEVICE)
    padded = torch.cat([q, torch.full_like(q, float("nan"))], 1)
    ways: list[dict] = [{}]
    if meta.selects:
        local = hostile(TOKENS, TOPK, torch.arange(30, device=DEVICE))
        slots = dsv4x.local_to_slots(
            local, meta.request, meta.visible, meta.extra_block_table, PAGE_SIZE, PAGES, kernel="reference"
        )
        ways = [{"topk_indices": local}, {"topk_slots": spoiled(slots)}]
    arguments = {"attn_sink": sink, **ways[0]}
    want = dsv4x.sparse_mla_attention(q, swa, extra, meta, **arguments, path="direct", kernel="reference")
    for path in paths_of(meta.kind):
        for name in attention_names("sparse_mla_decode"):
            for rows in (meta, given):
                for way in ways:
                    arguments = {"attn_sink": sink, **way, "path": path, "kernel": name}
                    got = dsv4x.sparse_mla_attention(q, swa, extra, rows, **arguments)
                    compare(f"ratio {meta.compress_ratio} {path} {name} {list(way)}", got, want)
                    runs += 1
            out = torch.full_like(padded, 7.0)
            arguments = {"attn_sink": sink, **ways[0], "path": path, "kernel": name}
            _, lse = dsv4x.sparse_mla_attention(padded, swa, extra, meta, out=out, heads=HEADS, **arguments)
            compare(f"ratio {meta.compress_ratio} {path} {name} padded", (out[:, :HEADS], lse), want)
            compare(f"ratio {meta.compress_ratio} {path} {name} untouched", [out[:, HEADS:]], [torch.full_like(q, 7.0)])
            runs += 1
    return runs


def sweep_cache_ops() -> int:
    runs = 0
    for layout in (member.value for member in layouts.MLAKVCacheLayout):
        cache, live = cache_of(layout)
        slots = hostile(1, 99, live)[0]
        got = dsv4x.dequantize_k_cache_paged(cache, slots, kernel="triton")
        compare(layout.name, [got], [dsv4x.dequantize_k_cache_paged(cache, slots, kernel="reference")])
        moved = []
        for name in ("triton", "reference"):
            target = PagedCache.zeros(PAGES, layout, 7, DEVICE)
            once = torch.arange(-4, 95, device=DEVICE)
            moved.append(dsv4x.copy_entries(cache, slots, target, once, kernel=name).data)
        compare(f"{layout.name} moved", moved[:1], moved[1:])
        indices = hostile(9, 40, live)
        for gather, capacity in (
            (dsv4x.gather_referenced_rows, 7), (dsv4x.gather_referenced_rows, 60),
            (dsv4x.gather_referenced_cache_blocks, 2), (dsv4x.gather_referenced_cache_blocks, PAGES),
        ):  # fmt: skip
            made = [gather(cache, indices, capacity=capacity, kernel=name) for name in ("triton", "reference")]
            compare(gather.__name__, [made[0].indices, made[0].count], [made[1].indices, made[1].count])
            runs += 1
    return runs


def sweep_remaps() -> int:
    """Index ops over hostile entries, requests, limits, tables and offsets; merges of states that are empty and NaN."""
    ends = [0, -1, 7, 40, -(2**31), 2**31 - 1, 41, 3, 9]
    rows = len(ends)
    lens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    request = torch.tensor([0, 1, 2, -1, 3, 2**31 - 1, -(2**31), 0, 1], dtype=torch.int32, device=DEVICE)
    table = torch.tensor(GARBAGE, dtype=torch.int32, device=DEVICE).expand(3, -1).contiguous()
    starts, lengths = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 3, 3, 8], [3, 9, 100]))
    local = hostile(rows, 40, torch.arange(60, device=DEVICE))
    page_map = torch.tensor([3, -1, 0, -(2**31), 1], dtype=torch.int32, device=DEVICE)
    bases = torch.tensor([5, -1, 2**31 - 9], dtype=torch.int32, device=DEVICE)
    outs, lses = torch.randn(3, rows, 4, 512, device=DEVICE), torch.randn(3, rows, 4, device=DEVICE)
    lses[0, ::2], lses[1, ::3] = float("inf"), float("-inf")
    outs[0, ::2] = float("nan")
    calls: list[tuple] = [
        (dsv4x.window_slots, starts, lengths, table, PAGE_SIZE, PAGES, 32, rows),
        (dsv4x.local_to_slots, local, request, lens, table, PAGE_SIZE, PAGES),
        (dsv4x.local_to_workspace_rows, local, request, lens, bases),
        (dsv4x.slots_to_compact_slots, local, page_map, PAGE_SIZE),
        (functools.partial(dsv4x.dense_to_ragged, capacity=99, upper=60), local, lens),
        (dsv4x.ragged_to_dense, local.view(-1), lens, 17),
        (dsv4x.combine_swa_extra_indices, local, lens, hostile(rows, 9, request.clamp_min(0)), None, CAPACITY),
        (dsv4x.build_swa_token_ids, starts, lengths, 32, 77),
        (dsv4x.merge_attention_states, outs, lses, torch.randn(4, device=DEVICE)),
    ]
    for call, *arguments in calls:
        made = [call(*arguments, kernel=name) for name in ("triton", "reference")]
        got, want = ([x] if isinstance(x, torch.Tensor) else x for x in made)
        compare(str(call), got, want)
    return len(calls)


def sweep_indexer() -> int:
    """Paged and flat logits, their selection and schedule; lengths and ranges that no row has."""
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
        planned = registry.find("paged_mqa_logits", "triton")
        named = torch.tensor([1, -1, 2**31 - 1, 0], dtype=torch.int32, device=DEVICE)
        for requests, shape in ((None, (2, 2)), (named, (4, 1))):
            rows = q.view(*shape, 64, 128), lens.view(shape)
            call = PagedLogitsCall(
                rows[0], None, cache, weights, rows[1], table, 230, clean_logits=False, requests=requests
            )
            got = planned.run(call._replace(plan=planned.plan(call.rows, None)))
            want = dsv4x.paged_mqa_logits(
                rows[0], cache, weights, rows[1], table, 230, requests=requests, kernel="reference"
            )
            there = want > -torch.inf
            compare(f"{layout.name} planned", [got.where(there, 0.0)], [want.where(there, 0.0)])
            spread_rows(call.rows, 1)
        slots = hostile(1, 99, torch.arange(cache.capacity, device=DEVICE))[0]
        made = [dsv4x.gather_indexer_k(cache, slots, kernel=name) for name in ("triton", "reference")]
        for got, want in zip(*made):
            compare(f"{layout.name} gathered", [got.view(torch.uint8)], [want.view(torch.uint8)])
        (flat, scale), ends = made[0], lens.view(-1)
        made = [
            dsv4x.mqa_logits(q.view(4, 64, 128), flat, scale, weights, ends.flip(0), ends, kernel=name)
            for name in ("triton", "reference")
        ]
        compare(f"{layout.name} flat", [made[0].nan_to_num(neginf=-9)], [made[1].nan_to_num(neginf=-9)])
        runs += 5
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


SWEEPS = (sweep_attention, sweep_steps, sweep_cache_ops, sweep_remaps, sweep_indexer)


def main() -> None:
    parts = {part.__name__: part for part in SWEEPS}
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
