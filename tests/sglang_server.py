"""SGLang's mock model runner with the server's own allocator and pools, and batches over them.

Import it after :func:`sglang_kit.prepare`. On a CPU :func:`sglang_kit.stub_cpu` comes first too.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import sglang.test.kits.attention_unittest.attention_methods.dsv4_attention as kit
import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode as Mode

import dsv4x

PAGE = 256


class Pools(NamedTuple):
    """How large a server is.

    Attributes:
        device: torch's.
        kinds: each layer's compress ratio.
        context: tokens the longest request may have.
        full, swa: tokens of the two pools.
        requests: most requests.
    """

    device: str
    kinds: tuple[int, ...]
    context: int
    full: int
    swa: int
    requests: int


class Server:
    """SGLang's mock runner with the server's own allocator: pages in random order, windows' old pages not kept."""

    def __init__(self, pools: Pools, prefixes: list[int], extends: list[int], mode: Mode):
        self.pools, self.device = pools, pools.device
        self.prefixes, self.extends, self.mode = prefixes, extends, mode
        case = kit.DSV4AttentionCase(
            name="bench", backend="dsv4", forward_mode=mode, num_heads=64, page_size=PAGE,
            prefix_lens=tuple(prefixes), extend_lens=tuple(extends),
        )  # fmt: skip
        kinds = list(pools.kinds)
        config = kit.TinyDSV4ModelConfig(num_heads=64, context_len=pools.context, compression_ratios=kinds)
        made, sizes = kit.DeepSeekV4TokenToKVPool, _sizes(pools)
        kit.DeepSeekV4TokenToKVPool = lambda **options: made(**{**options, **sizes})
        try:
            self.runner = kit.MockDSV4ModelRunner(
                case=case, model_config=config, dtype=torch.bfloat16, device=self.device,
                max_context_len=pools.context, swa_size=pools.swa, compression_ratios=kinds,
                runner_batch_size=pools.requests,
            )  # fmt: skip
        finally:
            kit.DeepSeekV4TokenToKVPool = made
        self.pool = self.runner.token_to_kv_pool
        self.alloc = SWATokenToKVPoolAllocator(
            pools.full, pools.swa, PAGE, torch.float8_e4m3fn, self.device, self.pool, False
        )
        self.runner.token_to_kv_pool_allocator = self.alloc
        shuffle = torch.Generator().manual_seed(1)
        for part in (self.alloc.full_attn_allocator, self.alloc.swa_attn_allocator):
            part.free_pages = part.free_pages[torch.randperm(len(part.free_pages), generator=shuffle).to(self.device)]
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
        loc = self.alloc.alloc_extend_swa_tail(*self._lengths(0), *self._lengths(length), self._one(-1), length, tail)
        self.table[request, :length] = loc.int()

    def _extend(self, request: int, start: int, end: int) -> torch.Tensor:
        last = self._one(int(self.table[request, start - 1]) if start else -1)
        loc = self.alloc.alloc_extend(*self._lengths(start), *self._lengths(end), last, end - start)
        self.table[request, start:end] = loc.int()
        return loc

    def _fill(self) -> None:
        """Random K at every live slot of every layer, by SGLang's store kernel (on a CPU by dsv4x's reference)."""
        random = torch.Generator(device=self.device).manual_seed(7)
        lengths = [p + e for p, e in zip(self.prefixes, self.extends)]
        mapped = [self.pool.full_to_swa_index_mapping[self.table[i, :n].long()] for i, n in enumerate(lengths)]
        swa = torch.cat([slots[slots > 0] for slots in mapped]).int()
        compressed = {
            ratio: torch.cat([self.table[i, ratio - 1 : n : ratio] // ratio for i, n in enumerate(lengths)]).int()
            for ratio in (4, 128)
        }
        for layer_id, ratio in enumerate(self.pools.kinds):
            self._store(layer_id, swa, None, random)
            if ratio:
                self._store(layer_id, compressed[ratio], ratio, random)

    def _store(self, layer_id: int, slots: torch.Tensor, ratio: int | None, random: torch.Generator) -> None:
        for part in slots.split(1 << 18):
            k = torch.randn(len(part), 512, generator=random, device=self.device).bfloat16()
            if self.device == "cpu":
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
            input_ids=torch.zeros(sum(self.extends), dtype=torch.int64, device=self.device),
            req_pool_indices=torch.arange(len(lengths), dtype=torch.int32, device=self.device),
            seq_lens=torch.tensor(shown, device=self.device), seq_lens_cpu=torch.tensor(shown),
            out_cache_loc=self.locs, seq_lens_sum=sum(shown),
            positions=torch.cat([torch.arange(p, n) for p, n in zip(self.prefixes, lengths)]).to(self.device),
        )  # fmt: skip
        self.runner.kv_index_translator.bind_own_plan(made)
        if self.mode == Mode.EXTEND:
            lens = torch.tensor(self.extends, dtype=torch.int32)
            made.extend_seq_lens, made.extend_seq_lens_cpu = lens.to(self.device), list(self.extends)
            made.extend_prefix_lens = torch.tensor(self.prefixes, dtype=torch.int32, device=self.device)
            made.extend_prefix_lens_cpu, made.extend_num_tokens = list(self.prefixes), sum(self.extends)
            made.extend_start_loc = (torch.cumsum(lens, 0) - lens).int().to(self.device)
        elif self.mode.is_target_verify():
            made.spec_info = SimpleNamespace(
                draft_token_num=self.extends[0], draft_token=made.input_ids, ragged_verify_layout=None
            )
        return made

    def backend(self, made: Any, heads: int) -> Any:
        """A backend of the class ``made`` whose rank has ``heads`` query heads."""
        self.runner.model_config.num_attention_heads = heads
        return made(self.runner)

    def _one(self, value: int) -> torch.Tensor:
        return torch.tensor([value], device=self.device)

    def _lengths(self, value: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._one(value), torch.tensor([value])


def _sizes(pools: Pools) -> dict[str, int]:
    return {"c4_size": pools.full // 4, "c128_size": pools.full // 128, "full_size": pools.full}


def select(server: Server, backend: Any) -> None:
    """Every layer's selection in place of SGLang's: the best of random scores, as slots and as local entries."""
    core = backend.forward_metadata.core_attn_metadata
    rows, pages, topk = *core.page_table.shape, core.c4_sparse_page_indices.shape[1]
    # As many columns as the longest request has entries: the rest of a wide table is never chosen.
    columns = max(64, -(-max(p + e for p, e in zip(server.prefixes, server.extends)) // 256) * 64)
    columns = min(columns, pages * 64)
    if server.scores is None or server.scores.shape != (rows, columns):
        random = torch.Generator(device=server.device).manual_seed(11)
        server.scores = torch.rand(rows, columns, generator=random, device=server.device, dtype=torch.bfloat16)
    visible = core.seq_lens_casual // 4
    seen = torch.arange(columns, device=server.device) < visible[:, None]
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


def queries(device: str, tokens: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q of 64 heads as SGLang pads it under tensor parallelism, the others NaN, and the sink with zeros behind."""
    random = torch.Generator(device=device).manual_seed(3)
    width = max(64, heads)
    q = torch.full((tokens, width, 512), float("nan"), device=device, dtype=torch.bfloat16)
    q[:, :heads] = torch.randn(tokens, heads, 512, generator=random, device=device).bfloat16()
    sink = torch.zeros(width, device=device)
    sink[:heads] = torch.randn(heads, generator=random, device=device)
    return q, sink


def oracle(server: Server, backend: Any, layer_id: int, given: tuple[Any, ...], rows: torch.Tensor) -> torch.Tensor:
    """float32 attention of some rows over SGLang's slot rows; ``given`` are q, the sink and the heads that count."""
    q, sink, heads = given
    core, pool, ratio = backend.forward_metadata.core_attn_metadata, server.pool, server.pools.kinds[layer_id]

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
    out, _ = dsv4x.reference.sparse_mla_decode(q[rows, :heads].float(), *scopes, sink[:heads], dtype=torch.float32)
    return out
