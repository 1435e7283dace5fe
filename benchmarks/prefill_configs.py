"""Where dsv4x/common/kernels/prefill_shapes.py comes from: the launch shapes worth trying of the Triton kernel.

For gfx942 and gfx950, on any machine: compiled, with LDS, registers, spills and MFMA instructions of the code. What is
chosen spills with neither Triton 3.6 nor 3.9, and has the largest block of heads whose MFMAs are not repeated by
several waves; then, two stages where they fit, which load the next rows while these are multiplied. Not so where they
make LDS reads narrow, as on gfx942 with 64 heads: one stage takes two thirds of the instructions. No AMD GPU was there
to time them.

Without ``--arch``, on the GPU that is here: microseconds, medians of ``triton.testing.do_bench`` at 4096 tokens that
read 640 rows.

Usage: python benchmarks/prefill_configs.py --arch gfx942 --out benchmarks/results/prefill-configs-gfx942.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
import triton

from dsv4x.common.kernels import order, prefill
from dsv4x.common.kernels import prefill_shapes as prefill_config
from dsv4x.common.kernels.prefill_shapes import PrefillConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import compiling

HEADS = (16, 32, 64)
GFX_OPTIONS = {
    "gfx942": (("matrix_instr_nonkdim", 16), ("kpack", 2)),
    "gfx950": (("matrix_instr_nonkdim", 16),),
}


def candidates(hip: tuple[tuple[str, int], ...], warps: tuple[int, ...]) -> list[PrefillConfig]:
    shapes = itertools.product(HEADS, (16, 32, 64), warps, (1, 2), (False, True))
    return [PrefillConfig(*shape, hip=hip) for shape in shapes]


def compiled_rows(arch: str) -> list[dict]:
    rows = []
    for config, head_dim in itertools.product(candidates(GFX_OPTIONS[arch], (4, 8)), (512, 576)):
        constants = {
            "BLOCK_H": config.block_h, "BLOCK_K": config.block_k, "PREFETCH": config.prefetch, "VALUE_DIM": 512,
            "TAIL": head_dim - 512, "HAS_LENS": True, "HAS_SINK": True, "DIES": order.dies(arch),
        }  # fmt: skip
        case = compiling.Case(prefill.prefill_kernel, constants, config.options, compiling.ATTENTION_OUT)
        report = compiling.amd_report(compiling.compile_case(case, arch))
        chosen = [most for most, each in prefill_config.prefill_configs(arch, head_dim) if each == config]
        rows.append({"head_dim": head_dim, **shape_of(config), **report, "chosen_up_to_heads": max(chosen, default=0)})
        print(rows[-1], flush=True)
    return rows


def timed_rows() -> list[dict]:
    kv = (torch.randn(65536, 512, device="cuda") / 10).bfloat16()
    indices = torch.randint(0, 65536, (4096, 640), device="cuda", dtype=torch.int32)
    rows = []
    for heads, config in itertools.product(HEADS, candidates((), (2, 4, 8))):
        if config.block_h > heads:
            continue
        q = (torch.randn(4096, heads, 512, device="cuda") / 10).bfloat16()
        out, lse = torch.empty_like(q), torch.empty(4096, heads, device="cuda")

        def run(q=q, out=out, lse=lse, heads=heads, config=config):
            prefill.prefill_kernel[(4096 * -(-heads // config.block_h),)](
                q, kv, indices, lse, lse, out, lse, heads, 65536, 640, 512**-0.5,
                q.stride(0), q.stride(1), 512, 640, out.stride(0), out.stride(1), HAS_LENS=False, HAS_SINK=False,
                BLOCK_H=config.block_h, BLOCK_K=config.block_k, VALUE_DIM=512, TAIL=0, PREFETCH=config.prefetch, DIES=1,
                **config.options,
            )  # fmt: skip

        try:
            us = 1e3 * triton.testing.do_bench(run, warmup=10, rep=30, return_mode="median")
        except triton.runtime.errors.OutOfResources as error:
            us = str(error)
        rows.append({"heads": heads, **shape_of(config), "us": us})
        print(rows[-1], flush=True)
    return rows


def shape_of(config: PrefillConfig) -> dict:
    names = ("block_h", "block_k", "num_warps", "num_stages", "prefetch")
    return {name: getattr(config, name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=sorted(GFX_OPTIONS), help="compile for this arch instead of timing here")
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    arguments = parser.parse_args()
    rows = compiled_rows(arguments.arch) if arguments.arch else timed_rows()
    if arguments.out:
        device = arguments.arch or torch.cuda.get_device_name()
        result = {"device": device, "compiled_only": bool(arguments.arch), "triton": triton.__version__, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=0) + "\n")


if __name__ == "__main__":
    main()
