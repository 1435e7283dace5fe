"""SGLang 0.5.23's own attention test kit over its DSv4 backend; the wheel brings the kit.

On a CPU the kit runs in Triton's interpreter, so :func:`prepare` comes before anything imports SGLang or dsv4x:
``TRITON_INTERPRET=1`` counts when a kernel is defined. SGLang's own path cannot run there: interpreted, its kernel
multiplies the bits of bf16 as numbers. Usage on a GPU: python tests/sglang_kit.py --backend sglang|dsv4x
"""

from __future__ import annotations

import argparse
import os
import sys
import unittest
from collections.abc import Callable
from typing import Any, NamedTuple

# Of the indexer, which the kit does not run: its metadata would be built by a minute's worth of CUDA compilation.
ENVIRONMENT = {"SGLANG_FP8_PAGED_MQA_LOGITS_TORCH": "1", "SGLANG_OPT_USE_TOPK_V2": "0"}


def prepare(device: str) -> None:
    """What importing SGLang takes: settings of a CPU, and the ops that torchvision expects of a CUDA build of torch."""
    os.environ.update(ENVIRONMENT)
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if "+cpu" in torch.__version__ and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


_kept: list[Any] = []


class Case(NamedTuple):
    """A case of the kit by name, and what runs it."""

    name: str
    run: Callable[[], None]


def stub_cpu(kit: Any) -> None:
    """What a CPU cannot do: CUDA's random state, FlashMLA's scheduler, the compressor's plan, interpreted fp8.

    The compressor is not under test: the kit fills the compressed caches itself.
    """
    import torch
    from sglang.srt.layers.attention import deepseek_v4_backend as base

    torch.cuda.get_rng_state = lambda device=None: None
    torch.cuda.set_rng_state = lambda state, device=None: None
    base._create_flashmla_metadata = lambda: None
    base.create_paged_compressor_data = lambda **kw: None

    def pack(k):
        from sglang.kernels.ops.kvcache.dsv4_main_kv_store import NopeFp8RopeBf16Pack

        nope = k[:, :448].float().view(len(k), 7, 64)
        exponent = torch.ceil(torch.log2(nope.abs().amax(-1).clamp_min(1e-8) / 448))
        codes = (nope * torch.exp2(-exponent)[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales = (exponent.int() + 127).to(torch.uint8)
        return NopeFp8RopeBf16Pack(codes.view(len(k), 448), k[:, 448:].contiguous(), scales)

    kit.quant_to_nope_fp8_rope_bf16_pack_triton = pack


def cases(device: str, sparse_extends: bool = False) -> list[Case]:
    """Every case: windows; extend, decode, verify and their graph-shaped kin of ratios 0, 4, 128; a draft's extend.

    Args:
        device: the torch device's type.
        sparse_extends: whether extends of SGLang's own path go by its gathered route; a GPU's alone.
    """
    import sglang.test.kits.attention_unittest.attention_methods.dsv4_attention as kit
    import sglang.test.kits.attention_unittest.runner_modes.cuda_graph_decode_runner as decode_runner
    import sglang.test.kits.attention_unittest.runner_modes.speculative_target_verify_runner as verify_runner
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    if device == "cpu":
        stub_cpu(kit)
    test = unittest.TestCase()
    found = []

    def add(case, run, **options):
        found.append(Case(case.name, lambda: run(test, case, device=device, **options)))

    def case(name, mode, ratio, prefix, extend=()):
        return kit.DSV4AttentionCase(
            name=name, backend="dsv4", forward_mode=mode, num_heads=64, page_size=256, prefix_lens=prefix,
            extend_lens=extend, compress_ratio=ratio, attn_sink_value=0.0,
        )  # fmt: skip

    for window in kit.make_dsv4_cases("dsv4"):
        add(window, kit.run_dsv4_attention_case)
    for ratio in (4, 128):
        compressed = kit.run_dsv4_compress_attention_case
        add(case(f"c{ratio} extend", ForwardMode.EXTEND, ratio, (128,), (32,)), compressed)
        add(case(f"c{ratio} decode", ForwardMode.DECODE, ratio, (160, 40)), compressed)
        if device != "cpu":
            sparse = case(f"c{ratio} sparse extend", ForwardMode.EXTEND, ratio, (0,), (96,))
            add(sparse, compressed, sparse_prefill=sparse_extends)
    for ratio in (0, 4, 128):
        verify = ForwardMode.TARGET_VERIFY
        add(case(f"c{ratio} verify", verify, ratio, (40, 90), (4, 4)), kit.run_dsv4_target_verify_attention_case)
        decode = case(f"c{ratio} graph-shaped decode", ForwardMode.DECODE, ratio, (100,))
        add(decode, decode_runner.run_dsv4_cuda_graph_decode_case)
        graph = case(f"c{ratio} graph-shaped verify", verify, ratio, (40,), (4,))
        add(graph, verify_runner.run_dsv4_eagle_verify_cuda_graph_case)
    draft = case("c0 draft extend", ForwardMode.DRAFT_EXTEND_V2, 0, (40, 90), (4, 4))
    add(draft, kit.run_dsv4_draft_extend_attention_case)
    return found


def count_calls() -> list[str]:
    """Count dsv4x's attention calls from now on: the names of what ran, one a layer call."""
    from dsv4x.servers.sglang import cuda

    calls: list[str] = []
    for name in ("by_rows", "by_step"):
        function = getattr(cuda._Layers, name)

        def counted(self, *args, _name=name, _function=function):
            calls.append(_name)
            return _function(self, *args)

        setattr(cuda._Layers, name, counted)
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("sglang", "dsv4x"), default="dsv4x")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    arguments = parser.parse_args()
    prepare(arguments.device)
    calls: list[str] = []
    if arguments.backend == "dsv4x":
        os.environ |= {"DSV4X_SGLANG": "all", "DSV4X_SERVERS": "require"}
        from dsv4x.servers.sglang import register

        register()
        from dsv4x.servers.sglang import cuda

        # Compiling for every batch to come is no part of the kit.
        cuda.warm_up = lambda backend: None
        calls = count_calls()
    failed = 0
    for case in cases(arguments.device, sparse_extends=arguments.backend == "sglang"):
        if arguments.only not in case.name:
            continue
        before = len(calls)
        try:
            case.run()
            state = "PASS"
        except unittest.SkipTest as error:
            state = f"SKIP {error}"
        except Exception as error:
            state = f"FAIL {type(error).__name__}: {str(error)[:300]}".replace("\n", " ")
        ran = len(calls) - before
        missed = arguments.backend == "dsv4x" and not ran
        failed += state != "PASS" or missed
        print(f"{state} {case.name} | dsv4x calls {ran}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
