"""vLLM's own DSv4 attention class and dsv4x's, in turns, on the same layers, caches and rows of vLLM's builders.

vLLM's real classes, builders and kernels; no server, no projections and no indexer: q, caches and top-k are random.
``forward_mqa`` is called of each layer of a ratio, four of them, so that no cache stays in the L2.

- ``decode``: R requests of one token, or of three (verify), behind ``context`` tokens: eagerly and captured.
- ``extend``: T tokens of one request behind ``context`` tokens, eagerly, as vLLM's breakable graphs run them.
- ``mixed``: 32 decodes and a chunk.

``gap`` is the relative distance between the two results. An eager call finds the step's metadata as the layers before
it left it; a first call of a step is timed beside (``step``), of all layers, which the table spreads over 43 layers.
Without CuTe DSL vLLM gathers by its own Triton kernel, and the table then has no rows of ``extend``.

Usage: python benchmarks/servers_vllm.py --heads 64 --out benchmarks/results/servers-vllm-h100-64.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--out", type=Path)
PARSER.add_argument("--heads", type=int, default=64)
PARSER.add_argument("--budget", type=float, default=1e9, help="seconds after which no further shape is begun")
PARSER.add_argument("--table", type=Path, nargs="+", help="results to make the table of, instead")
PARSER.add_argument("--only", default="", help="pieces whose name holds this")
ARGS = argparse.Namespace()
"""The command line's, in a run."""
CPU = os.environ.get("TRITON_INTERPRET") == "1"
CUTE = importlib.util.find_spec("cutlass") is not None
MODEL_LAYERS = 43
"""Layers over which a step's own cost is spread: of DeepSeek-V4-Flash, the smallest model."""


def make_table(files: list[Path]) -> None:
    """Print what the adapter reads, of several results."""
    found = [json.loads(file.read_text()) for file in files]
    rows = []
    for result in found:
        for row in result["rows"]:
            piece = {"decode": "decode", "verify": "decode", "extend": "extend"}.get(row["piece"])
            if piece is None or (piece == "extend" and not result["cute_dsl"]):
                continue
            us = dict(row["us"])
            if not row["captured"]:
                us["dsv4x"] += max(0.0, row["step_us"]["dsv4x"] - row["step_us"]["vllm"]) / MODEL_LAYERS
            rows.append({
                "piece": piece, "ratio": row["ratio"], "heads": result["heads"], "captured": row["captured"],
                "tokens": row["tokens"], "context": row["context"], "ours_us": round(us["dsv4x"], 2),
                "server_us": round(us["vllm"], 2),
            })  # fmt: skip
    told = {key: value for key, value in found[0].items() if key not in ("rows", "heads", "command")}
    lines = ",\n  ".join(json.dumps(row) for row in sorted(rows, key=lambda row: tuple(row.values())))
    print(f'{json.dumps(told, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}')


def prepare() -> list[str]:
    """Empty modules for compiled libraries that importing demands and attention never calls; which ones."""
    if CPU:
        return []
    root, missing = Path(importlib.util.find_spec("vllm").origin).parent, []
    for name, pattern in (("vllm._C_stable_libtorch", "_C_stable*.so"), ("vllm._moe_C_stable_libtorch", "_moe_C*.so"),
                          ("vllm.vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn/_vllm_fa2_C*.so")):  # fmt: skip
        if not list(root.glob(pattern)):
            sys.modules[name] = types.ModuleType(name)
            missing.append(name)
    if not CUTE:
        name = "vllm.models.deepseek_v4.nvidia.ops.sparse_attn_compress_cutedsl"
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name]._SPARSE_ATTN_COMPRESSOR_CUTEDSL_KERNEL = None
        missing.append(name)
    return missing


def shapes() -> list[tuple[str, list[int], list[int]]]:
    """Piece, lengths and query tokens; the shapes that matter most come first."""
    if CPU:
        return [("decode", [300, 700], [1, 1]), ("verify", [300, 700], [3, 3]), ("extend", [330], [30]),
                ("mixed", [300, 90], [1, 30])]  # fmt: skip
    wanted = [("decode", [c] * r, [1] * r) for c in (4096, 131072) for r in (1, 64, 8, 256)]
    wanted.insert(4, ("verify", [4096] * 64, [3] * 64))
    wanted += [("extend", [c + t], [t]) for c in (0, 32768, 131072 - 8192) for t in (1024, 64, 8192)]
    return [*wanted, ("mixed", [4096] * 32 + [16384], [1] * 32 + [1024])]


def main() -> int:
    os.environ |= {"DSV4X_VLLM": "all", "DSV4X_SERVERS": "require"}
    missing = prepare()
    import torch
    import vllm_server
    from timing import compare_us, origin
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()
    began, results, failed = time.perf_counter(), [], 0
    folder = Path(tempfile.mkdtemp())
    sizes: dict[str, Any] = {} if CPU else {"max_len": 131072 + 1024, "max_tokens": 8192, "blocks": 6000}
    ratios = (0, 4, 128) if CPU else (0, 4, 128) * 4
    rig = vllm_server.Rig(folder, heads=ARGS.heads, ratios=ratios, **sizes)
    theirs = type(rig.layers[0])
    print(f"layers after {time.perf_counter() - began:.1f} s; missing {missing}", flush=True)
    stack = contextlib.ExitStack()
    for layer in rig.layers:
        stack.enter_context(vllm_server.as_dsv4x(layer))
    arms = {"vllm": theirs.forward_mqa, "dsv4x": type(rig.layers[0]).forward_mqa}

    def compare(runs: dict[str, Any]) -> dict[str, float]:
        if CPU:
            for run in runs.values():
                run()
            return dict.fromkeys(runs, 1.0)
        return compare_us(runs, rounds=4, warmup=2, rep=8)

    def measure(piece: str, lens: list[int], queries: list[int]) -> None:
        if piece == "verify":
            # A request is a decode while it has no more tokens than a step verifies; three in this configuration.
            rig.config.speculative_config = types.SimpleNamespace(
                num_speculative_tokens=2, parallel_drafting=False, use_dspark=lambda: False
            )
        tokens, (fresh, positions) = sum(queries), rig.batch(rig.layers, lens, queries)
        rig.config.speculative_config = None
        decodes = next(iter(fresh.values())).num_decode_tokens
        assert decodes == (0 if piece == "extend" else tokens - (queries[-1] if piece == "mixed" else 0)), decodes
        heads = rig.layers[0].padded_heads
        q = rig.queries(rig.layers[0], tokens, heads)
        outs = {name: torch.empty_like(q) for name in arms}

        def run(name: str, ratio: int | None, found: dict[str, Any]) -> None:
            with set_forward_context(found, rig.config, num_tokens=tokens):
                for layer in rig.layers:
                    if ratio in (None, layer.compress_ratio):
                        arms[name](layer, q, None, positions, outs[name])

        def renew(found: dict[str, Any]) -> None:
            """As if the step were new: what layers keep for one another is dropped."""
            for each in found.values():
                getattr(each, "flashinfer_sparse_index_cache", {}).clear()
                for name in ("tile_sched_swaonly", "tile_sched_c4a", "tile_sched_c128a"):
                    old = getattr(each, name, None)
                    if old is not None:
                        setattr(each, name, type(old)())

        def first(name: str, found: dict[str, Any]) -> None:
            renew(found)
            run(name, None, found)

        for name in arms:
            run(name, None, fresh)
        steps = compare({name: lambda name=name: first(name, fresh) for name in arms})
        layered = compare({name: lambda name=name: run(name, None, fresh) for name in arms})
        step_us = {name: steps[name] - layered[name] for name in arms}
        for ratio in (1, 4, 128):
            count = sum(layer.compress_ratio == ratio for layer in rig.layers)
            for name in arms:
                run(name, ratio, fresh)
            a, b = (outs[name][:, : ARGS.heads].float() for name in arms)
            gap = float((a - b).norm() / a.norm())
            us = {
                name: value / count
                for name, value in compare({n: lambda n=n, r=ratio: run(n, r, fresh) for n in arms}).items()
            }
            add(piece, lens, queries, ratio, False, us, gap, step_us)
            if CPU or piece in ("extend", "mixed"):
                continue
            graphs = {}
            for name in arms:
                renew(fresh)
                run(name, ratio, fresh)
                renew(fresh)
                graphs[name] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[name]):
                    run(name, ratio, fresh)
                outs[name].fill_(7)
                graphs[name].replay()
            torch.cuda.synchronize()
            a, b = (outs[name][:, : ARGS.heads].float() for name in arms)
            gap = float((a - b).norm() / a.norm())
            us = {name: v / count for name, v in compare({n: g.replay for n, g in graphs.items()}).items()}
            add(piece, lens, queries, ratio, True, us, gap, step_us)
            renew(fresh)

    def add(piece, lens, queries, ratio, captured, us, gap, step_us) -> None:  # type: ignore[no-untyped-def]
        row = {
            "piece": piece, "ratio": 0 if ratio == 1 else ratio, "captured": captured, "requests": len(lens),
            "tokens": sum(queries), "context": max(lens) - queries[-1], "us": us, "of_vllm": us["dsv4x"] / us["vllm"],
            "gap": gap, "step_us": step_us,
        }  # fmt: skip
        results.append(row)
        told = " ".join(f"{key} {row[key]}" for key in ("piece", "ratio", "captured", "requests", "tokens", "context"))
        bad = "" if gap < 6e-3 else "BAD "
        print(f"{bad}{told} | vllm {us['vllm']:.1f} dsv4x {us['dsv4x']:.1f} | {row['of_vllm']:.2f} | gap {gap:.1e} "
              f"| step {step_us['vllm']:.0f} {step_us['dsv4x']:.0f}", flush=True)  # fmt: skip

    with torch.inference_mode():
        for piece, lens, queries in shapes():
            if ARGS.only not in piece or time.perf_counter() - began > ARGS.budget:
                print("left out:", piece, len(lens), lens[0], flush=True)
                continue
            try:
                measure(piece, lens, queries)
            except Exception:
                # The shapes behind it are still worth their time; the row is missing from the results.
                traceback.print_exc()
                failed += 1
            gc.collect()
            if ARGS.out is not None:
                ARGS.out.parent.mkdir(parents=True, exist_ok=True)
                told = origin() | {"vllm": "0.33.0", "cute_dsl": CUTE, "missing": missing, "heads": ARGS.heads}
                ARGS.out.write_text(json.dumps(told | {"rows": results}, indent=1) + "\n")
    if not CPU:
        print("peak memory, GiB:", torch.cuda.max_memory_allocated() / 2**30)
    return failed


if __name__ == "__main__":
    PARSER.parse_args(namespace=ARGS)
    if ARGS.table:
        make_table(ARGS.table)
    else:
        code = main()
        sys.stdout.flush()
        os._exit(code)
