"""A small DeepSeek-V4-shaped attention layer: RMSNorm, RoPE on the last 64 dims, an entry every r tokens, top-k, sink.

:meth:`Layer.dense` computes it over a whole sequence at once, without caches, pages or index lists: the oracle of the
demo and of the chunk-invariance tests. Weights are random; every shape but the hidden size is the model's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..common import reference
from ..common.core import encodings
from ..common.core.layouts import DSV4, INDEXER_FP8, PagedCache
from ..common.core.platform import platform
from ..common.core.spaces import TopkMethod

HEAD_DIM, ROPE_DIM = DSV4.head_dim, DSV4.rope_dim
HIDDEN, INDEX_HEADS, INDEX_DIM = 128, 32, INDEXER_FP8.head_dim
VOCABULARY = 256


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rope(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of the last 64 values of ``x [L, .., 512]`` by their position's angles."""
    frequency = 10000.0 ** (-torch.arange(0, ROPE_DIM, 2, device=x.device, dtype=torch.float64) / ROPE_DIM)
    angle = positions.double()[:, None] * frequency
    angle = angle.view(len(positions), *[1] * (x.dim() - 2), ROPE_DIM // 2)
    even, odd = x[..., -ROPE_DIM::2], x[..., -ROPE_DIM + 1 :: 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return torch.cat([x[..., :-ROPE_DIM], rotated], dim=-1)


def as_stored(entries: torch.Tensor) -> torch.Tensor:
    """bf16 ``[N, 512]`` after the fp8 cache: what attention over it can at best be exact about."""
    cache = PagedCache.zeros(1, DSV4, max(1, len(entries)), entries.device)
    slots = torch.arange(len(entries), dtype=torch.int64, device=entries.device)
    reference.quantize_and_insert_k_cache(entries, cache, slots)
    return reference.dequantize_slots(cache, slots)


@dataclass(frozen=True)
class Sequence:
    """All that one sequence brings to the layer.

    Attributes:
        q: bf16 ``[L, H, 512]``.
        raw: bf16 ``[L, 512]``, the window's entries.
        compressed: bf16 ``[L // r, 512]``; entry e is complete, and visible, from position (e + 1) * r - 1 on.
        topk: int64 ``[L, min(K, L // r)]`` of local entry numbers, ascending, -1 for none (C4 only).
        index_q: FP8 ``[L, 32, 128]``, the indexer's queries (C4 only, like the rest).
        index_weights: float32 ``[L, 32]``.
        index_k: bf16 ``[L // r, 128]``, the indexer's entries.
    """

    q: torch.Tensor
    raw: torch.Tensor
    compressed: torch.Tensor
    topk: torch.Tensor | None
    index_q: torch.Tensor | None = None
    index_weights: torch.Tensor | None = None
    index_k: torch.Tensor | None = None


class Layer:
    """One layer of a given compress ratio (1, 4 or 128), its weights drawn from ``seed``."""

    def __init__(
        self,
        compress_ratio: int,
        heads: int,
        *,
        topk: int = 512,
        window_size: int = 128,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.compress_ratio, self.heads, self.topk, self.window_size = compress_ratio, heads, topk, window_size
        generator = torch.Generator("cpu").manual_seed(seed)

        def weight(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * shape[0] ** -0.5).to(
                device
            )

        self.embedding = weight(VOCABULARY, HIDDEN) * VOCABULARY**0.5
        self.wq = weight(HIDDEN, heads * HEAD_DIM)
        self.wk = weight(HIDDEN, HEAD_DIM)
        self.wc, self.wg = weight(HIDDEN, HEAD_DIM), weight(HIDDEN, HEAD_DIM)
        self.wiq, self.wik = weight(HIDDEN, INDEX_HEADS * INDEX_DIM), weight(HIDDEN, INDEX_DIM)
        self.wiw = weight(HIDDEN, INDEX_HEADS)
        self.attn_sink = weight(1, heads)[0].float()
        flavour = platform.limits(device).fp8
        self.index_layout = INDEXER_FP8.with_flavour("e4m3fnuz") if flavour == "e4m3fnuz" else INDEXER_FP8

    def sequence(self, tokens: torch.Tensor) -> Sequence:
        """tokens int64 ``[L]`` in 0..255 -> what the sequence brings. Float64 inside, so chunking cannot matter."""
        length, ratio = len(tokens), self.compress_ratio
        x = self.embedding[tokens]
        # Equal bytes would bring equal entries; a little of the past tells them apart.
        x = rms_norm(
            x + 0.3 * x.cumsum(0) * torch.arange(1, length + 1, dtype=torch.int64, device=x.device)[:, None] ** -0.5
        )
        positions = torch.arange(length, dtype=torch.int64, device=x.device)
        q = rope(rms_norm((x @ self.wq).view(length, self.heads, HEAD_DIM)), positions).bfloat16()
        raw = rope(rms_norm(x @ self.wk), positions).bfloat16()
        entries = 0 if ratio == 1 else length // ratio
        groups = x[: entries * ratio].view(entries, -1 if entries else 1, HIDDEN)
        gate = torch.softmax(groups @ self.wg, dim=1)
        compressed = rms_norm((gate * (groups @ self.wc)).sum(1))
        compressed = rope(compressed, torch.arange(entries, dtype=torch.int64, device=x.device) * ratio).bfloat16()
        if ratio != 4:
            return Sequence(q, raw, compressed, None)
        index_q, index_weights, index_k = self._index(x, groups)
        topk = self._select(index_q, index_weights, index_k)
        return Sequence(q, raw, compressed, topk, index_q, index_weights, index_k)

    def _index(self, x: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The indexer's queries, weights and entries.

        Small integers: every kernel's products and sums of them are exact, so that any two of them select the same
        entries, of many equal scores the same too.
        """
        length = len(x)
        iq = (x @ self.wiq).round().clamp(-2, 2).view(length, INDEX_HEADS, INDEX_DIM).float()
        fnuz = self.index_layout.value_encoding == "e4m3fnuz"
        codes = encodings.encode_e4m3fnuz(iq) if fnuz else encodings.encode_e4m3fn(iq)
        weights = (2 * x @ self.wiw).round().clamp(-8, 8).float()
        ik = (2 * groups.mean(1) @ self.wik).round().clamp(-2, 2).bfloat16()
        return codes.view(torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn), weights, ik

    def _select(self, q: torch.Tensor, weights: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Each query's best-scoring visible entries, as the reference selects them from what its cache holds."""
        length, entries = len(q), len(k)
        chosen = torch.full((length, min(self.topk, entries)), -1, dtype=torch.int64, device=q.device)
        if entries == 0:
            return chosen
        cache = PagedCache.zeros(1, self.index_layout, entries, q.device)
        slots = torch.arange(entries, dtype=torch.int64, device=q.device)
        reference.quantize_and_insert_k_cache(k, cache, slots)
        visible = (torch.arange(length, dtype=torch.int64, device=q.device) + 1) // self.compress_ratio
        stored = reference.gather_indexer_k(cache, slots)
        logits = reference.mqa_logits(q, None, *stored, weights, torch.zeros_like(visible), visible)
        reference.topk_transform(logits, visible, chosen.shape[1], TopkMethod.LOCAL, None, {}, chosen)
        return chosen

    def visible(self, positions: torch.Tensor, entries: int) -> torch.Tensor:
        """bool ``[len(positions), entries]``: which compressed entries each position may see."""
        return (
            torch.arange(entries, dtype=torch.int64, device=positions.device)
            < ((positions + 1) // self.compress_ratio)[:, None]
        )

    def dense(
        self, sequence: Sequence, *, stored: bool, dtype: torch.dtype = torch.float32, block: int = 64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole sequence against all its entries, masked: out ``[L, H, 512]`` and lse ``[L, H]`` in ``dtype``.

        ``stored`` takes the entries as the fp8 cache holds them, else as they were computed.
        """
        raw, compressed = sequence.raw, sequence.compressed
        if stored:
            raw, compressed = as_stored(raw), as_stored(compressed)
        kv = torch.cat([raw, compressed]).to(dtype)
        length = len(raw)
        out = torch.empty(length, self.heads, HEAD_DIM, dtype=dtype, device=kv.device)
        lse = torch.empty(length, self.heads, dtype=dtype, device=kv.device)
        token = torch.arange(length, dtype=torch.int64, device=kv.device)
        for start in range(0, length, block):
            rows = token[start : start + block]
            behind = rows[:, None] - token
            mask = (behind >= 0) & (behind < self.window_size)
            extra = self.visible(rows, len(compressed))
            if sequence.topk is not None:
                chosen = torch.zeros(len(rows), len(compressed) + 1, dtype=torch.bool, device=kv.device)
                chosen.scatter_(1, sequence.topk[rows] % (len(compressed) + 1), True)
                extra = chosen[:, :-1]
            mask = torch.cat([mask, extra], dim=1)
            logits = torch.einsum("lhd,nd->lhn", sequence.q[rows].to(dtype), kv) * HEAD_DIM**-0.5
            logits = logits.masked_fill(~mask[:, None], -torch.inf)
            lse[rows] = torch.logsumexp(logits, -1)
            weights = torch.exp(logits - lse[rows][..., None])
            share = 1 / (1 + torch.exp(self.attn_sink.to(dtype) - lse[rows]))
            out[rows] = torch.einsum("lhn,nd->lhd", weights, kv) * share[..., None]
        return out, lse
