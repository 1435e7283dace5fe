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
import importlib
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
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context  # noqa: E402
from sglang_server import Mode, Pools, Server, oracle, queries, select  # noqa: E402

# Not to be had without SGLang.
adapter = importlib.import_module("dsv4x.servers.sglang.cuda")

BEGAN = time.perf_counter()
CPU = ARGS.device == "cpu"
DEVICE, RATIOS = ARGS.device, (0, 4, 128)
LAYERS = 1 if CPU else 4
"""Layers of each ratio: so many that their entries do not stay in the L2 cache for the next round."""
KINDS = [ratio for ratio in RATIOS for _ in range(LAYERS)]
ROUNDS = 2
POOLS = (
    Pools(DEVICE, tuple(KINDS), 4096, 64 * 256, 32 * 256, 4)
    if CPU
    # Rows of ratio 128 are as wide as a context of a million tokens makes them.
    else Pools(DEVICE, tuple(KINDS), 1 << 20, 34000 * 256, 1536 * 256, 256)
)
ARMS = ("dsv4x",) if CPU else ("sglang", "dsv4x")
if CPU:
    sglang_kit.stub_cpu(kit)
if ARGS.no_warm_up:
    adapter.warm_up = lambda backend: None

CLASSES = {"sglang": base.DeepseekV4AttnBackend, "dsv4x": adapter.Dsv4xAttnBackend}


class Arm:
    """One backend over one batch."""

    def __init__(self, name: str, server: Server, heads: int, q: torch.Tensor, sink: torch.Tensor):
        self.name, self.server, self.heads, self.q, self.sink = name, server, heads, q, sink
        self.backend, self.batch = server.backend(CLASSES[name], heads), server.batch()
        self.layers = [SimpleNamespace(layer_id=i, tp_q_head_num=heads, v_head_dim=512) for i in range(len(KINDS))]

    @property
    def given(self) -> tuple[Any, ...]:
        return self.q, self.sink, self.heads

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
        first = next(iter(arms.values()))
        want = oracle(first.server, first.backend, last, first.given, rows)
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
            want = oracle(arm.server, arm.backend, last, arm.given, rows)
            errors[name] = error(out, want, rows, arm.heads)
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
    server, tokens = Server(POOLS, prefixes, extends, mode), sum(extends)
    for heads in ARGS.heads:
        q, sink = queries(DEVICE, tokens, heads)
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
    Server(POOLS, [1], [1], Mode.DECODE).backend(CLASSES["dsv4x"], ARGS.heads[0])
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
