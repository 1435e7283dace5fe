"""vLLM's own DeepSeek-V4 layers and metadata builders, for tests and benchmarks of the adapter in it.

Import it before vLLM. Without a GPU, in a process with ``TRITON_INTERPRET=1``, vLLM's small kernels run in Triton's
interpreter, and what has no form on a CPU is replaced: CUDA's events and allocator, FlashMLA's scheduler and its two
functions.
"""

# ruff: noqa: E402
import contextlib
import json
import os
from types import SimpleNamespace

CPU = os.environ.get("TRITON_INTERPRET") == "1"
os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
if CPU:
    os.environ.update(TORCHDYNAMO_DISABLE="1", VLLM_TARGET_DEVICE="cpu", VLLM_CPU_KVCACHE_SPACE="1")
os.environ.setdefault("VLLM_PLUGINS", "")

import torch
from triton.backends import backends

if CPU:
    torch.cuda.Event = lambda *args, **keywords: SimpleNamespace(record=lambda *a: None, wait=lambda *a: None)
    torch.accelerator.empty_cache = lambda: None
    backends["nvidia"].driver.is_active = staticmethod(lambda: True)

from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker import workspace

import dsv4x
from dsv4x import PagedCache, layouts, reference
from dsv4x.servers.vllm import attention, lookup

MODEL = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 1024, "hidden_size": 256,
    "moe_intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 1,
    "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 256, "o_lora_rank": 128, "o_groups": 2,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "sliding_window": 128,
    "compress_ratios": [0, 4, 128, 4], "num_experts_per_tok": 6, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_hash_layers": 1, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "swiglu_limit": 10.0,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 16384, "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn", "factor": 16, "original_max_position_embeddings": 1024, "beta_fast": 32, "beta_slow": 1,
    },
    "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}  # fmt: skip

BLOCK_BYTES, MAIN_OFFSET = 93888, 37440
"""A block of vLLM's pool holds pages of several layers: the window's at 0, the compressed cache's behind it."""


def flash_mla_decode(*, q, k_cache, indices, topk_length, softmax_scale, attn_sink, out, extra_k_cache=None,
                     extra_indices_in_kvcache=None, extra_topk_length=None, **_):  # fmt: skip
    """FlashMLA's decode by the oracle; it takes 64 or 128 heads and no others."""
    assert q.shape[2] in (64, 128)
    extra = {}
    if extra_k_cache is not None:
        cache = PagedCache(extra_k_cache.squeeze(2), layouts.DSV4, extra_k_cache.shape[1])
        extra = {"extra_cache": cache, "extra_indices": extra_indices_in_kvcache[:, 0], "extra_lens": extra_topk_length}
    cache = PagedCache(k_cache.squeeze(2), layouts.DSV4, k_cache.shape[1])
    values, lse = reference.sparse_mla_decode(
        q[:, 0], cache, indices[:, 0], topk_length, attn_sink=attn_sink, softmax_scale=softmax_scale, **extra
    )
    out[:, 0] = values.to(out.dtype)
    return out, lse


def flash_mla_prefill(*, q, kv, indices, sm_scale, attn_sink, topk_length, out, **_):
    """FlashMLA's prefill by the oracle."""
    assert q.shape[1] in (64, 128)
    values, lse = reference.sparse_mla_prefill(q, kv[:, 0], indices[:, 0], topk_length, attn_sink, sm_scale)
    out[:] = values.to(out.dtype)
    return out, lse, lse


class Rig:
    """One model's attention layers of vLLM's NVIDIA class, their caches, and batches built by vLLM's builders."""

    def __init__(self, folder, *, heads=16, ratios=(0, 4, 128, 4), max_len=4096, max_tokens=1024, blocks=200):
        import vllm.models.deepseek_v4.nvidia.flashmla as flashmla
        import vllm.models.deepseek_v4.nvidia.model as model
        from vllm.v1.attention.backends.mla import sparse_swa

        self.device, self.max_len, self.blocks = torch.device("cpu" if CPU else "cuda:0"), max_len, blocks
        sizes = {
            "num_attention_heads": heads, "o_groups": max(1, heads // 8), "num_hidden_layers": len(ratios),
            "compress_ratios": list(ratios), "max_position_embeddings": max(16384, max_len),
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(MODEL | sizes))
        self.config = EngineArgs(
            model=str(folder), skip_tokenizer_init=True, enforce_eager=True, max_model_len=max_len, block_size=256,
            max_num_batched_tokens=max_tokens, max_num_seqs=8 if CPU else 256, dtype="bfloat16", load_format="dummy",
        ).create_engine_config()  # fmt: skip
        # Of the projection behind attention, which is not run.
        flashmla.compute_fp8_einsum_recipe = lambda *args: ((1, 128, 128), False)
        if CPU:
            flashmla.flash_mla_with_kvcache, flashmla.flash_mla_sparse_fwd = flash_mla_decode, flash_mla_prefill
            sparse_swa.get_mla_metadata = lambda *args: (SimpleNamespace(have_initialized=False), None)
        self.select, self.generator = model._select_dsv4_attn_cls, torch.Generator().manual_seed(0)
        self.topk = torch.full((max_tokens, 512), -1, dtype=torch.int32, device=self.device)
        workspace.init_workspace_manager(self.device)
        with set_current_vllm_config(self.config):
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{20000 + os.getpid() % 20000}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        self.layers = self.make("model", len(ratios))

    def make(self, name, count=4):
        """Layers, by whatever class vLLM's lookup gives now, with caches of random entries."""
        with set_current_vllm_config(self.config), self.device:
            cls = self.select(self.config)
            layers = [
                cls(self.config, prefix=f"{name}.layers.{i}.attn", topk_indices_buffer=self.topk, aux_stream_list=None)
                for i in range(count)
            ]
        for layer in layers:
            self.bind(layer)
        return layers

    def bind(self, layer):
        draw, blocks = torch.Generator(self.device).manual_seed(layer.compress_ratio), self.blocks
        pool = torch.zeros(blocks, BLOCK_BYTES, dtype=torch.uint8, device=self.device)

        def view(offset, entries):
            data = pool.as_strided((blocks, 1, entries, 584), (BLOCK_BYTES, 0, 584, 1), offset)
            k = torch.randn(blocks * entries, 512, generator=draw, device=self.device).bfloat16()
            cache = PagedCache(data[:, 0], layouts.DSV4, entries)
            dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(blocks * entries, device=self.device))
            return data

        layer.swa_cache_layer.bind_kv_cache(view(0, 64))
        if layer.compress_ratio > 1:
            layer.bind_kv_cache(view(MAIN_OFFSET, 256 // layer.compress_ratio))
        sink = torch.randn(layer.n_local_heads, generator=draw, device=self.device)
        layer.attn_sink.data.fill_(-torch.inf)[: layer.n_local_heads] = sink

    def batch(self, layers, lens, queries, padding=0):
        """Metadata of every layer, positions, and rows of top-k, of requests with these lengths and queries."""
        lens, queries = torch.tensor(lens, dtype=torch.int32), torch.tensor(queries, dtype=torch.int32)
        starts = torch.zeros(len(lens) + 1, dtype=torch.int32)
        starts[1:] = queries.cumsum(0)
        positions = torch.cat([torch.arange(s - q, s) for s, q in zip(lens.tolist(), queries.tolist())]).long()
        request = torch.repeat_interleave(torch.arange(len(lens)), queries.long())
        padded = torch.cat([positions, torch.zeros(padding, dtype=torch.long)])
        common = {size: self._common(size, lens, queries, starts, positions, request, padded) for size in (64, 256)}
        found, padded = {}, padded.to(self.device)
        with set_current_vllm_config(self.config):
            swa = layers[0].swa_cache_layer
            window = self._builder(swa, swa.prefix).build(0, common[64])
            kinds = {}
            for layer in layers:
                found[layer.swa_cache_layer.prefix] = window
                ratio = layer.compress_ratio
                if ratio > 1 and ratio not in kinds:
                    kinds[ratio] = self._builder(layer, layer.prefix).build(0, common[256])
                if ratio > 1:
                    found[layer.prefix] = kinds[ratio]
        self.choose(positions)
        return found, padded

    def choose(self, positions):
        """Rows of top-k: entries that a token sees, in any order, -1 behind them; garbage behind the tokens."""
        self.topk.fill_(torch.iinfo(torch.int32).max)
        for first in range(0, len(positions), 256):
            seen = (positions[first : first + 256, None] + 1) // 4
            width = max(512, int(seen.max()))
            score = torch.rand(len(seen), width, generator=self.generator)
            best = score.masked_fill_(torch.arange(width) >= seen, -1).topk(512)
            rows = torch.where(best.values < 0, -1, best.indices).int()
            self.topk[first : first + len(seen)] = rows.to(self.device)

    def _builder(self, owner, prefix):
        spec = owner.get_kv_cache_spec(self.config)
        return owner.get_attn_backend().get_builder_cls()(spec, [prefix], self.config, self.device)

    def _common(self, size, lens, queries, starts, positions, request, padded):
        table = torch.full((len(lens), self.max_len // size), -1, dtype=torch.int32)
        needed = (lens + size - 1) // size
        # No page twice where there are enough; else pages are shared, which reading does not mind.
        total, free = int(needed.sum()), self.blocks - 1
        drawn = (
            torch.randperm if total <= free else lambda n, generator: torch.randint(n, (total,), generator=generator)
        )
        order = drawn(free, generator=self.generator).int() + 1
        table[torch.arange(table.shape[1]) < needed[:, None]] = order[:total]
        slots = table[request, positions // size].long() * size + positions % size
        slots = torch.cat([slots, torch.full((len(padded) - len(slots),), -1)])
        d = self.device
        return CommonAttentionMetadata(
            query_start_loc=starts.to(d), query_start_loc_cpu=starts.clone(), seq_lens=lens.to(d), num_reqs=len(lens),
            num_actual_tokens=len(positions), max_query_len=int(queries.max()), max_seq_len=int(lens.max()),
            block_table_tensor=table.to(d), slot_mapping=slots.to(d), positions=padded.to(d),
            seq_lens_cpu_upper_bound=lens.clone(),
        )  # fmt: skip

    def run(self, layer, metadata, positions, padded=None):
        """``forward_mqa`` of one layer on random queries: the result, 7 where nothing was written."""
        heads = layer.padded_heads if padded is None else padded
        q = self.queries(layer, len(positions), heads)
        out = torch.full_like(q, 7.0)
        with set_forward_context(metadata, self.config, num_tokens=len(positions)):
            layer.forward_mqa(q, None, positions, out)
        return out

    def queries(self, layer, tokens, heads):
        """bf16 ``[tokens, heads, 512]``, zeros in the heads that are padding, as vLLM's insert leaves them."""
        draw = torch.Generator(self.device).manual_seed(7)
        q = torch.zeros(tokens, heads, 512, dtype=torch.bfloat16, device=self.device)
        given = torch.randn(tokens, layer.n_local_heads, 512, generator=draw, device=self.device)
        q[:, : layer.n_local_heads] = given.bfloat16()
        return q


@contextlib.contextmanager
def as_dsv4x(layer):
    """The same layer, weights and caches, as the adapter's class."""
    theirs = type(layer)
    layer.__class__ = lookup.subclass_of(theirs)
    layer.__dict__.update(_dsv4x_caches={}, _dsv4x_platform="cuda", _dsv4x_out="")
    layer._dsv4x_table = attention.Table("cpu", {}, ())
    attention._LAYERS[layer.prefix] = layer
    try:
        yield layer
    finally:
        layer.__class__ = theirs
        layer.__dict__.pop("_dsv4x_verdicts", None)
        attention._LAYERS.pop(layer.prefix, None)
