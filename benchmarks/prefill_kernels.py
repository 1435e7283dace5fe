"""The prefill kernels alone on one GPU in one run, beside FlashMLA called bare and what the hardware would allow.

Microseconds: the best of four medians of ``triton.testing.do_bench`` of graphs, inputs as in attention.py: rows random
in a bf16 workspace of 65 536, every entry valid, sink on.

- ``bare``: ``flash_mla_sparse_fwd`` on ready arguments; fewer than 64 heads are padded to 64 beforehand.
- ``flash_mla``, ``gluon``, ``triton``: ``dsv4x.sparse_mla_prefill`` with that kernel, indices untrusted.
- ``flops_us``: 4 * T * H * K * 512 FLOP at the 790 TFLOP/s of a large bf16 matrix product on this GPU.
- ``gather_us``: every entry's 1 KiB once for each 64 heads, from L2, at 5.5 TB/s; ``hbm_us``: q, out and the workspace
  once, at 4.2 TB/s.

Usage: python benchmarks/prefill_kernels.py --out benchmarks/results/prefill-kernels-<gpu>.json
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from flash_mla import flash_mla_sparse_fwd
from timing import captured, compare_us, write

import dsv4x

ROWS = 65536
SHAPES = ((8, 640), (16, 640), (32, 640), (64, 128), (64, 640), (128, 1152))
TOKENS = (1, 32, 128, 512, 1024, 4096)
FLOPS_US, L2_US, HBM_US = 790e6, 5.5e6, 4.2e6


def measure(heads: int, width: int, tokens: int) -> dict[str, float]:
    kv = (torch.randn(ROWS, 512, device="cuda") / 10).bfloat16()
    q = (torch.randn(tokens, heads, 512, device="cuda") / 10).bfloat16()
    sink = torch.randn(heads, device="cuda")
    indices = torch.randint(0, ROWS, (tokens, width), device="cuda", dtype=torch.int32)
    lens = torch.full((tokens,), width, dtype=torch.int32, device="cuda")
    padded = max(64, heads)
    wide_q = torch.nn.functional.pad(q, (0, 0, 0, padded - heads))
    wide_sink = torch.nn.functional.pad(sink, (0, padded - heads))

    def bare():
        flash_mla_sparse_fwd(
            wide_q, kv[:, None], indices[:, None], 512**-0.5, 512, wide_sink, lens, use_legacy=True
        )  # fmt: skip

    ours = {
        kernel: functools.partial(dsv4x.sparse_mla_prefill, q, kv, indices, lens, sink, kernel=kernel)
        for kernel in ("flash_mla", "gluon", "triton")
    }
    runs = {name: captured(run) for name, run in {"bare": bare, **ours}.items()}
    return compare_us(runs) | {
        "flops_us": 4 * tokens * heads * width * 512 / FLOPS_US,
        "gather_us": tokens * width * 1024 * -(-heads // 64) / L2_US,
        "hbm_us": (2 * tokens * heads + ROWS) * 1024 / HBM_US,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for heads, width in SHAPES:
        for tokens in TOKENS:
            row = {"heads": heads, "width": width, "tokens": tokens, **measure(heads, width, tokens)}
            rows.append(row)
            print(" ".join(f"{k}={v:.1f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    write(arguments.out, unit="us", rows=rows)


if __name__ == "__main__":
    main()
