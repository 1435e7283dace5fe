"""SGLang 0.5.23's DSv4 attention backend object: its own attention and dsv4x's, in turns, on one machine.

SGLang's own allocator, pools, metadata and store kernels; no server, no model, no indexer: scores are random, the
selection is by torch, and compressed entries are stored as random K. Both arms read the same caches by the same rows.

- ``decode``: R requests of one token, and R of four drafts each (verify), behind ``context`` tokens: eagerly, and
  captured at length 1 and replayed at the batch's own lengths.
- ``extend``: T tokens of one request behind ``context`` tokens, eagerly.
- ``step``: metadata and every layer of both, eagerly: what a forward pass pays, building included.

Times are of one layer's call: several layers' caches in turn, less what the metadata alone takes. ``error`` is the
largest distance from the float32 oracle over a sample of rows, of an eager call and of a replay.

Usage: python benchmarks/servers_sglang.py --out benchmarks/results/servers-sglang-h100.json
       --table dsv4x/servers/sglang/measured_sm_90.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
os.environ |= {"DSV4X_SGLANG": "all", "DSV4X_SERVERS": "require"}
import sglang_kit

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--out", type=Path)
PARSER.add_argument("--table", type=Path, help="where to write the table that the adapter reads")
PARSER.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
PARSER.add_argument("--heads", type=int, nargs="+", default=[64, 16], help="16 stand in a q of 64 whose others are NaN")
PARSER.add_argument("--quick", action="store_true", help="small shapes, few repetitions: does everything run?")
PARSER.add_argument("--no-warm-up", action="store_true", help="kernels are compiled as they come, outside the times")
PARSER.add_argument("--eager", action="store_true", help="no captured calls")
PARSER.add_argument("--budget", type=float, default=1e9, help="seconds after which no further shape is begun")
PARSER.add_argument("--only", default="", help="pieces whose name holds this")
ARGS = PARSER.parse_args()
sglang_kit.prepare(ARGS.device)

import sglang.test.kits.attention_unittest.attention_methods.dsv4_attention as kit  # noqa: E402
import torch  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.layers.attention import deepseek_v4_backend as base  # noqa: E402
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardBatch  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode as Mode  # noqa: E402
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context  # noqa: E402

import dsv4x  # noqa: E402
from dsv4x.servers.sglang import cuda as adapter  # noqa: E402

BEGAN = time.perf_counter()
CPU = ARGS.device == "cpu"
PAGE, DEVICE, RATIOS = 256, ARGS.device, (0, 4, 128)
LAYERS = 1 if CPU else 4
"""Layers of each ratio: so many that their entries do not stay in the L2 cache for the next round."""
KINDS = [ratio for ratio in RATIOS for _ in range(LAYERS)]
ROUNDS = 2
CONTEXT = 4096 if CPU else 1 << 20
"""Tokens the longest request may have: rows of ratio 128 are a 128th as wide."""
FULL, SWA = (64 * PAGE, 32 * PAGE) if CPU else (34000 * PAGE, 1536 * PAGE)
MOST_REQUESTS = 4 if CPU else 256
ARMS = ("dsv4x",) if CPU else ("sglang", "dsv4x")
if CPU:
    sglang_kit.stub_cpu(kit)
if ARGS.no_warm_up:
    adapter.warm_up = lambda backend: None

_pool = kit.DeepSeekV4TokenToKVPool
kit.DeepSeekV4TokenToKVPool = lambda **kw: _pool(
    **{**kw, "c4_size": FULL // 4, "c128_size": FULL // 128, "full_size": FULL}
)


class Server:
    """SGLang's mock runner with the server's own allocator: pages in random order, windows' old pages not kept."""

    def __init__(self, prefixes: list[int], extends: list[int], mode: Mode):
        self.prefixes, self.extends, self.mode = prefixes, extends, mode
        case = kit.DSV4AttentionCase(
            name="bench", backend="dsv4", forward_mode=mode, num_heads=64, page_size=PAGE,
            prefix_lens=tuple(prefixes), extend_lens=tuple(extends),
        )  # fmt: skip
        config = kit.TinyDSV4ModelConfig(num_heads=64, context_len=CONTEXT, compression_ratios=KINDS)
        self.runner = kit.MockDSV4ModelRunner(
            case=case, model_config=config, dtype=torch.bfloat16, device=DEVICE, max_context_len=CONTEXT, swa_size=SWA,
            compression_ratios=KINDS, runner_batch_size=MOST_REQUESTS,
        )  # fmt: skip
        self.pool = self.runner.token_to_kv_pool
        self.alloc = SWATokenToKVPoolAllocator(FULL, SWA, PAGE, torch.float8_e4m3fn, DEVICE, self.pool, False)
        self.runner.token_to_kv_pool_allocator = self.alloc
        shuffle = torch.Generator().manual_seed(1)
        for part in (self.alloc.full_attn_allocator, self.alloc.swa_attn_allocator):
            part.free_pages = part.free_pages[torch.randperm(len(part.free_pages), generator=shuffle).to(DEVICE)]
        self.table = self.runner.req_to_token_pool.req_to_token
        for request, prefix in enumerate(prefixes):
            if prefix:
                self._prefix(request, prefix)
        self.locs = torch.cat([self._extend(i, p, p + e) for i, (p, e) in enumerate(zip(prefixes, extends))])
        self._fill()
        self.scores: torch.Tensor | None = None

    def _prefix(self, request: int, length: int) -> None:
        """A prefix of which the window's pages alone are kept, as after its prefill."""
        tail = length - max(0, length - 127) // PAGE * PAGE
        loc = self.alloc.alloc_extend_swa_tail(*_lengths(0), *_lengths(length), _one(-1), length, tail)
        self.table[request, :length] = loc.int()

    def _extend(self, request: int, start: int, end: int) -> torch.Tensor:
        last = _one(int(self.table[request, start - 1]) if start else -1)
        loc = self.alloc.alloc_extend(*_lengths(start), *_lengths(end), last, end - start)
        self.table[request, start:end] = loc.int()
        return loc

    def _fill(self) -> None:
        """Random K at every live slot of every layer, by SGLang's store kernel (on a CPU by dsv4x's reference)."""
        random = torch.Generator(device=DEVICE).manual_seed(7)
        lengths = [p + e for p, e in zip(self.prefixes, self.extends)]
        mapped = [self.pool.full_to_swa_index_mapping[self.table[i, :n].long()] for i, n in enumerate(lengths)]
        swa = torch.cat([slots[slots > 0] for slots in mapped]).int()
        compressed = {
            ratio: torch.cat([self.table[i, ratio - 1 : n : ratio] // ratio for i, n in enumerate(lengths)]).int()
            for ratio in (4, 128)
        }
        for layer_id, ratio in enumerate(KINDS):
            self._store(layer_id, swa, None, random)
            if ratio:
                self._store(layer_id, compressed[ratio], ratio, random)

    def _store(self, layer_id: int, slots: torch.Tensor, ratio: int | None, random: torch.Generator) -> None:
        for part in slots.split(1 << 18):
            k = torch.randn(len(part), 512, generator=random, device=DEVICE).bfloat16()
            if CPU:
                pool = self.pool
                buffer = (pool.get_swa_key_buffer_radix if ratio is None else pool.get_extra_key_buffer)(layer_id)
                page = PAGE // (ratio or 1)
                cache = dsv4x.PagedCache(buffer.view(torch.uint8), dsv4x.layouts.DSV4, page)
                dsv4x.quantize_and_insert_k_cache(k, cache, part.long(), kernel="reference")
            elif ratio is None:
                self.pool.set_swa_key_buffer_radix_fused(layer_id, part, k)
            else:
                self.pool.set_extra_key_buffer_fused(layer_id, part, k)

    def batch(self) -> ForwardBatch:
        lengths = [p + e for p, e in zip(self.prefixes, self.extends)]
        # A verify's lengths are shown without the drafts.
        shown = self.prefixes if self.mode.is_target_verify() else lengths
        made = ForwardBatch(
            forward_mode=self.mode, batch_size=len(lengths),
            input_ids=torch.zeros(sum(self.extends), dtype=torch.int64, device=DEVICE),
            req_pool_indices=torch.arange(len(lengths), dtype=torch.int32, device=DEVICE),
            seq_lens=torch.tensor(shown, device=DEVICE), seq_lens_cpu=torch.tensor(shown),
            out_cache_loc=self.locs, seq_lens_sum=sum(shown),
            positions=torch.cat([torch.arange(p, n) for p, n in zip(self.prefixes, lengths)]).to(DEVICE),
        )  # fmt: skip
        self.runner.kv_index_translator.bind_own_plan(made)
        if self.mode == Mode.EXTEND:
            lens = torch.tensor(self.extends, dtype=torch.int32)
            made.extend_seq_lens, made.extend_seq_lens_cpu = lens.to(DEVICE), list(self.extends)
            made.extend_prefix_lens = torch.tensor(self.prefixes, dtype=torch.int32, device=DEVICE)
            made.extend_prefix_lens_cpu, made.extend_num_tokens = list(self.prefixes), sum(self.extends)
            made.extend_start_loc = (torch.cumsum(lens, 0) - lens).int().to(DEVICE)
        elif self.mode.is_target_verify():
            made.spec_info = SimpleNamespace(
                draft_token_num=self.extends[0], draft_token=made.input_ids, ragged_verify_layout=None
            )
        return made

    def backend(self, arm: str, heads: int) -> Any:
        self.runner.model_config.num_attention_heads = heads
        made = {"sglang": base.DeepseekV4AttnBackend, "dsv4x": adapter.Dsv4xAttnBackend}[arm]
        return made(self.runner)


def _one(value: int) -> torch.Tensor:
    return torch.tensor([value], device=DEVICE)


def _lengths(value: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _one(value), torch.tensor([value])


def select(server: Server, backend: Any) -> None:
    """Every layer's selection in place of SGLang's: the best of random scores, as slots and as local entries."""
    core = backend.forward_metadata.core_attn_metadata
    rows, pages, topk = *core.page_table.shape, core.c4_sparse_page_indices.shape[1]
    # As many columns as the longest request has entries: the rest of a wide table is never chosen.
    columns = max(64, -(-max(p + e for p, e in zip(server.prefixes, server.extends)) // 256) * 64)
    columns = min(columns, pages * 64)
    if server.scores is None or server.scores.shape != (rows, columns):
        random = torch.Generator(device=DEVICE).manual_seed(11)
        server.scores = torch.rand(rows, columns, generator=random, device=DEVICE, dtype=torch.bfloat16)
    visible = core.seq_lens_casual // 4
    seen = torch.arange(columns, device=DEVICE) < visible[:, None]
    best, local = server.scores.masked_fill(~seen, -1).topk(min(topk, columns), sorted=False)
    # Chosen entries to the front, as SGLang's own top-k leaves them.
    order = (best < 0).int().argsort(dim=1, stable=True)
    local = torch.where(best < 0, -1, local).gather(1, order)
    slots = core.page_table.gather(1, (local.clamp_min(0) // 64)) * 64 + local.clamp_min(0) % 64
    core.c4_sparse_page_indices.fill_(-1)
    core.c4_sparse_page_indices[:, : local.shape[1]] = torch.where(local < 0, -1, slots).int()
    if core.c4_sparse_raw_indices is not None:
        core.c4_sparse_raw_indices.fill_(-1)
        core.c4_sparse_raw_indices[:, : local.shape[1]] = local.int()


def queries(tokens: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q of 64 heads as SGLang pads it under tensor parallelism, the others NaN, and the sink with zeros behind."""
    random = torch.Generator(device=DEVICE).manual_seed(3)
    width = max(64, heads)
    q = torch.full((tokens, width, 512), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    q[:, :heads] = torch.randn(tokens, heads, 512, generator=random, device=DEVICE).bfloat16()
    sink = torch.zeros(width, device=DEVICE)
    sink[:heads] = torch.randn(heads, generator=random, device=DEVICE)
    return q, sink


class Arm:
    """One backend over one batch."""

    def __init__(self, name: str, server: Server, heads: int, q: torch.Tensor, sink: torch.Tensor):
        self.name, self.server, self.heads, self.q, self.sink = name, server, heads, q, sink
        self.backend, self.batch = server.backend(name, heads), server.batch()
        self.layers = [SimpleNamespace(layer_id=i, tp_q_head_num=heads, v_head_dim=512) for i in range(len(KINDS))]

    def metadata(self) -> None:
        """What SGLang does before the first layer of an eager step."""
        self.backend.init_forward_metadata(self.batch)
        self.backend.resolve_prefill_shared_read_ends(self.batch, num_qo_tokens=self.q.shape[0])

    def layer(self, layer_id: int) -> torch.Tensor:
        return self.backend.forward(
            q=self.q, k=self.q, v=self.q, layer=self.layers[layer_id], forward_batch=self.batch,
            compress_ratio=KINDS[layer_id], save_kv_cache=False, attn_sink=self.sink,
        )  # fmt: skip

    def of_ratio(self, ratio: int) -> torch.Tensor:
        with forward_context(ForwardContext(attn_backend=self.backend)):
            for layer_id, kind in enumerate(KINDS):
                if kind == ratio:
                    out = self.layer(layer_id)
        return out

    def step(self) -> None:
        with forward_context(ForwardContext(attn_backend=self.backend)):
            self.metadata()
            for layer_id in range(len(KINDS)):
                self.layer(layer_id)

    def captured(self, ratios: tuple[int, ...]) -> tuple[Any, dict[int, torch.Tensor]]:
        """A graph as SGLang's decode runner makes it: lengths of 1 at the capture, the batch's own at replays."""
        backend, batch, outs = self.backend, self.batch, {}
        backend.init_cuda_graph_state(batch.batch_size, self.q.shape[0])
        true = batch.seq_lens.clone()
        batch.seq_lens.fill_(1)
        backend.init_forward_metadata_out_graph(batch, in_capture=True)

        def run() -> None:
            backend.init_forward_metadata_in_graph(batch)
            select(self.server, backend)
            for ratio in ratios:
                for _ in range(ROUNDS):
                    outs[ratio] = self.of_ratio(ratio)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        backend.on_after_cuda_graph_warmup()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        batch.seq_lens.copy_(true)
        backend.init_forward_metadata_out_graph(batch)
        graph.replay()
        torch.cuda.synchronize()
        return graph, outs


def oracle(arm: Arm, layer_id: int, rows: torch.Tensor) -> torch.Tensor:
    """float32 attention of some rows over SGLang's own slot rows."""
    core, pool, ratio = arm.backend.forward_metadata.core_attn_metadata, arm.server.pool, KINDS[layer_id]

    def scope(buffer: torch.Tensor, page: int, indices: torch.Tensor, lens: torch.Tensor) -> tuple[Any, ...]:
        lens = lens[rows]
        cache = dsv4x.PagedCache(buffer.view(torch.uint8), dsv4x.layouts.DSV4, page)
        return cache, indices[rows][:, : max(1, int(lens.max()))].contiguous(), lens

    scopes = scope(
        pool.get_swa_key_buffer_radix(layer_id), PAGE, core.swa_page_indices, core.swa_topk_lengths
    )  # fmt: skip
    if ratio:
        scopes += scope(
            pool.get_extra_key_buffer(layer_id), PAGE // ratio, core.sparse_page_indices(ratio),
            core.sparse_topk_lengths(ratio),
        )  # fmt: skip
    else:
        scopes += (None, None, None)
    out, _ = dsv4x.reference.sparse_mla_decode(
        arm.q[rows, : arm.heads].float(), *scopes, arm.sink[: arm.heads], dtype=torch.float32
    )
    return out


def error(out: torch.Tensor, want: torch.Tensor, rows: torch.Tensor, heads: int) -> float:
    return (out[rows][:, :heads].float() - want).abs().max().item()


def compare(runs: dict[str, Any], scale: float = 1.0) -> dict[str, float]:
    """Microseconds of each in turns; on a CPU they only run."""
    if CPU:
        for run in runs.values():
            run()
        return {}
    from timing import compare_us

    rounds, rep = (1, 4) if ARGS.quick else (4, 10)
    return {name: us * scale for name, us in compare_us(runs, rounds=rounds, warmup=2, rep=rep).items()}


def eager(arms: dict[str, Arm], row: dict[str, Any], results: list[dict[str, Any]]) -> None:
    for arm in arms.values():
        arm.metadata()
        select(arm.server, arm.backend)
    tokens = next(iter(arms.values())).q.shape[0]
    rows = torch.unique(torch.linspace(0, tokens - 1, min(tokens, 32)).long()).to(DEVICE)
    for ratio in RATIOS:
        last = max(i for i, kind in enumerate(KINDS) if kind == ratio)
        want = oracle(next(iter(arms.values())), last, rows)
        errors = {name: error(arm.of_ratio(ratio), want, rows, arm.heads) for name, arm in arms.items()}
        us = compare({name: lambda arm=arm, ratio=ratio: arm.of_ratio(ratio) for name, arm in arms.items()}, 1 / LAYERS)
        add(results, {**row, "ratio": ratio, "captured": False, "us": us, "error": errors})


def captured(arms: dict[str, Arm], row: dict[str, Any], results: list[dict[str, Any]]) -> None:
    tokens = next(iter(arms.values())).q.shape[0]
    rows = torch.unique(torch.linspace(0, tokens - 1, min(tokens, 32)).long()).to(DEVICE)
    bare = {name: arm.captured(())[0] for name, arm in arms.items()}
    without = compare({name: graph.replay for name, graph in bare.items()})
    for ratio in RATIOS:
        last = max(i for i, kind in enumerate(KINDS) if kind == ratio)
        graphs, errors = {}, {}
        for name, arm in arms.items():
            graphs[name], outs = arm.captured((ratio,))
            out = outs[ratio].clone()
            arm.backend.init_forward_metadata(arm.batch)
            select(arm.server, arm.backend)
            errors[name] = error(out, oracle(arm, last, rows), rows, arm.heads)
        us = compare({name: graph.replay for name, graph in graphs.items()})
        us = {name: (us[name] - without[name]) / (ROUNDS * LAYERS) for name in us}
        add(results, {**row, "ratio": ratio, "captured": True, "us": us, "error": errors})


def whole_step(arms: dict[str, Arm], row: dict[str, Any], results: list[dict[str, Any]]) -> None:
    us = compare({name: arm.step for name, arm in arms.items()})
    add(results, {**row, "piece": f"{row['piece']} step", "layers": len(KINDS), "us": us})


def add(results: list[dict[str, Any]], row: dict[str, Any]) -> None:
    us = row["us"]
    if "sglang" in us:
        row["of_sglang"] = us["dsv4x"] / us["sglang"]
    bad = {name: value for name, value in row.get("error", {}).items() if not value < 2e-2}
    results.append(row)
    told = {key: value for key, value in row.items() if key not in ("us", "error", "of_sglang")}
    numbers = " ".join(f"{name} {value:.1f}" for name, value in us.items())
    errors = " ".join(f"{value:.4f}" for value in row.get("error", {}).values())
    ratio = f"{row['of_sglang']:.2f}" if "of_sglang" in row else ""
    print(f"{'BAD ' if bad else ''}{told} | us {numbers} | {ratio} | error {errors}", flush=True)


def shapes() -> list[tuple[str, Mode, list[int], list[int]]]:
    """Piece, mode, prefixes and query tokens of what is measured; the shapes that matter most come first."""
    if CPU:
        return [
            ("decode", Mode.DECODE, [1, 300, 2049], [1, 1, 1]),
            ("verify", Mode.TARGET_VERIFY, [40, 900], [4, 4]),
            ("extend", Mode.EXTEND, [300], [40]),
            ("extend", Mode.EXTEND, [0, 1500], [30, 20]),
        ]
    if ARGS.quick:
        return [
            ("decode", Mode.DECODE, [300, 9000], [1, 1]),
            ("verify", Mode.TARGET_VERIFY, [300, 9000], [4, 4]),
            ("extend", Mode.EXTEND, [9000, 0], [64, 300]),
        ]
    wanted = [("decode", Mode.DECODE, [c] * r, [1] * r) for r, c in ((1, 4096), (64, 4096), (8, 4096), (256, 4096))]
    wanted += [("extend", Mode.EXTEND, [c], [t]) for c in (0, 32768, 131072) for t in (64, 1024, 8192)]
    wanted += [("decode", Mode.DECODE, [c] * r, [1] * r) for r, c in ((1, 131072), (64, 131072), (8, 131072))]
    wanted += [("decode", Mode.DECODE, [32512] * 256, [1] * 256), ("verify", Mode.TARGET_VERIFY, [4096] * 64, [4] * 64)]
    return wanted


def measure(piece: str, mode: Mode, prefixes: list[int], extends: list[int], results: list[dict[str, Any]]) -> None:
    server, tokens = Server(prefixes, extends, mode), sum(extends)
    for heads in ARGS.heads:
        q, sink = queries(tokens, heads)
        row = {
            "piece": piece, "heads": heads, "requests": len(extends), "tokens": tokens, "context": max(prefixes),
        }  # fmt: skip
        arms = {name: Arm(name, server, heads, q, sink) for name in ARMS}
        with torch.inference_mode(), envs.SGLANG_OPT_FLASHMLA_SPARSE_PREFILL.override(True):
            eager(arms, row, results)
            whole_step(arms, row, results)
            if not CPU and mode != Mode.EXTEND and not ARGS.eager:
                captured(arms, row, results)


MODEL_LAYERS = 43
"""Layers over which a step's own cost is spread: of DeepSeek-V4-Flash, the smallest model."""


def table_of(results: list[dict[str, Any]], origin: dict[str, Any]) -> dict[str, Any]:
    """What the adapter reads. Verify goes by the same rows as decode; eagerly ours bears what its step costs more."""

    def shape(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["piece"].split()[0], row["heads"], row["requests"], row["tokens"], row["context"]

    steps = {shape(row): row["us"] for row in results if "ratio" not in row}
    layers: dict[Any, dict[str, float]] = {}
    for row in results:
        if "ratio" in row and not row["captured"]:
            sums = layers.setdefault(shape(row), dict.fromkeys(ARMS, 0.0))
            for name, us in row["us"].items():
                sums[name] += LAYERS * us
    rows = []
    for row in results:
        if "ratio" not in row:
            continue
        ours, server = row["us"]["dsv4x"], row["us"]["sglang"]
        if not row["captured"]:
            beside = {name: steps[shape(row)][name] - layers[shape(row)][name] for name in ARMS}
            ours += max(0.0, beside["dsv4x"] - beside["sglang"]) / MODEL_LAYERS
        rows.append({
            "piece": "extend" if row["piece"] == "extend" else "decode", "ratio": row["ratio"], "heads": row["heads"],
            "captured": row["captured"], "tokens": row["tokens"], "context": row["context"],
            "ours_us": round(ours, 2), "server_us": round(server, 2),
        })  # fmt: skip
    return origin | {"rows": sorted(rows, key=lambda row: tuple(row.values()))}


def main() -> None:
    from importlib.metadata import version

    from timing import origin

    results: list[dict[str, Any]] = []
    failed = 0
    began = time.perf_counter()
    Server([1], [1], Mode.DECODE).backend("dsv4x", ARGS.heads[0])
    warm_up_s = time.perf_counter() - began
    print(f"first backend, warm-up included: {warm_up_s:.1f} s", flush=True)
    told = origin() | {"sglang": version("sglang")}

    def write() -> None:
        if ARGS.out is not None and results:
            ARGS.out.parent.mkdir(parents=True, exist_ok=True)
            ARGS.out.write_text(json.dumps(told | {"warm_up_s": warm_up_s, "rows": results}, indent=1) + "\n")
        if ARGS.table is not None and results and not CPU:
            ARGS.table.parent.mkdir(parents=True, exist_ok=True)
            table = table_of(results, told)
            lines = ",\n  ".join(json.dumps(row) for row in table.pop("rows"))
            head = json.dumps(table, indent=1)[:-2]
            ARGS.table.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n')

    for piece, mode, prefixes, extends in shapes():
        if ARGS.only not in piece:
            continue
        if time.perf_counter() - BEGAN > ARGS.budget:
            print("budget spent before", piece, len(prefixes), prefixes[0], extends[0], flush=True)
            break
        began = time.perf_counter()
        try:
            measure(piece, mode, prefixes, extends, results)
        except Exception:
            # The shapes behind it are still worth their time; the row is missing from the results.
            traceback.print_exc()
            failed += 1
        print(f"  {time.perf_counter() - began:.1f} s", flush=True)
        write()
        gc.collect()
        if not CPU:
            torch.cuda.empty_cache()
    print("peak memory, GiB:", 0 if CPU else torch.cuda.max_memory_allocated() / 2**30)
    sys.exit(failed)


if __name__ == "__main__":
    main()
