"""The oracle: every op in plain torch, slow and obvious.

Attention runs in float32 by default and in float64 on request, on the same dequantized values every kernel sees.
Any index that is negative or past the end is no entry, wherever it stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from .core import encodings
from .core.ambient import without_autocast
from .core.layouts import CacheLayout, PagedCache
from .core.refill import CombineCall, GatherCall, PackCall, StepCall
from .core.spaces import TopkMethod, token_positions

_VALUE_DIM = 512

# Gathered entries held at once, in elements: bounds the oracle's memory, not its results.
_CHUNK_ELEMENTS = 1 << 28


def _entry_bytes(cache: PagedCache, slots: torch.Tensor, offset: torch.Tensor, count: int) -> torch.Tensor:
    """uint8 ``[N, count]``: the bytes at ``offset`` (int64 ``[N]``) inside each slot's page."""
    return cache.page_bytes[
        (slots // cache.page_size)[:, None],
        offset[:, None] + torch.arange(count, dtype=torch.int64, device=slots.device),
    ]


_DECODE = {
    "e4m3fn": encodings.decode_e4m3fn,
    "e4m3fnuz": encodings.decode_e4m3fnuz,
    "e2m1": encodings.decode_e2m1,
}
_ENCODE = {
    "e4m3fn": encodings.encode_e4m3fn,
    "e4m3fnuz": encodings.encode_e4m3fnuz,
    "e2m1": encodings.encode_e2m1,
}


def dequantize_slots(
    cache: PagedCache, slots: torch.Tensor, dtype: torch.dtype = torch.bfloat16, k_scale: float = 1.0
) -> torch.Tensor:
    """slots ``[N]``, all in ``[0, cache.capacity)`` -> ``[N, head_dim]``.

    Values pass through bf16, the type every kernel multiplies in, whatever ``dtype`` is returned.
    """
    layout, slots = cache.layout, slots.long()
    entry = slots % cache.page_size
    data = entry * layout.data_pitch
    parts = []
    if layout.rope_dim:
        rope = _entry_bytes(cache, slots, data + layout.rope_base, 2 * layout.rope_dim).contiguous()
        parts.append(rope.view(torch.bfloat16))
    if not layout.nope_dim:
        return parts[0].to(dtype)
    values = _DECODE[layout.value_encoding](_entry_bytes(cache, slots, data, layout.nope_bytes).contiguous())
    codes = _entry_bytes(
        cache, slots, layout.scale_base(cache.page_size) + entry * layout.scale_pitch, layout.scale_bytes
    ).contiguous()
    if layout.scale_encoding == "none":
        nope = values * torch.tensor(k_scale, dtype=torch.float32, device=values.device)
    else:
        if layout.scale_encoding == "float32":
            scales = codes.view(torch.float32)
        elif layout.scale_encoding == "e4m3fn":
            scales = encodings.decode_e4m3fn(codes)
        else:
            scales = encodings.decode_ue8m0(codes)
        nope = values * scales[:, : layout.num_scales].repeat_interleave(layout.scale_tile, dim=1)
    return torch.cat([nope.to(torch.bfloat16), *parts], dim=1).to(dtype)


def dequantize_k_cache_paged(cache: PagedCache, slots: torch.Tensor, out: torch.Tensor, k_scale: float = 1.0) -> None:
    """Rows of ``out`` whose slot is invalid are left alone."""
    valid = (slots >= 0) & (slots < cache.capacity)
    out[valid] = dequantize_slots(cache, slots[valid], k_scale=k_scale)


def gather_workspace(
    extra_cache: PagedCache | None,
    swa_cache: PagedCache,
    slots: torch.Tensor,
    extra_rows: int,
    out: torch.Tensor,
    extra_k_scale: float = 1.0,
    swa_k_scale: float = 1.0,
) -> None:
    """Rows before ``extra_rows`` from one cache, the others from the other."""
    if extra_cache is not None:
        dequantize_k_cache_paged(extra_cache, slots[:extra_rows], out[:extra_rows], extra_k_scale)
    dequantize_k_cache_paged(swa_cache, slots[extra_rows:], out[extra_rows:], swa_k_scale)


def gather_and_combine(gather: tuple[Any, ...], combine: CombineCall) -> None:
    """:func:`gather_workspace` and :func:`combine_topk_swa_indices`, of their arguments."""
    gather_workspace(*gather)
    combine_topk_swa_indices(combine)


def quantize_and_insert_k_cache(k: torch.Tensor, cache: PagedCache, slots: torch.Tensor, k_scale: float = 1.0) -> None:
    """Rows of ``k`` whose slot is invalid are skipped."""
    layout = cache.layout
    valid = (slots >= 0) & (slots < cache.capacity)
    if not valid.any():
        return
    k, slots = k[valid], slots[valid].long()
    entry = slots % cache.page_size
    data = entry * layout.data_pitch
    pieces = []
    if layout.rope_dim:
        pieces.append((data + layout.rope_base, k[:, layout.nope_dim :].contiguous().view(torch.uint8)))
    if layout.nope_dim:
        values, scale_codes = _quantize(k[:, : layout.nope_dim].float(), layout, k_scale)
        pieces.append((data, values))
        pieces.append((layout.scale_base(cache.page_size) + entry * layout.scale_pitch, scale_codes))
    for offset, written in pieces:
        columns = offset[:, None] + torch.arange(written.shape[1], dtype=torch.int64, device=k.device)
        cache.page_bytes[(slots // cache.page_size)[:, None], columns] = written


def _quantize(x: torch.Tensor, layout: CacheLayout, k_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[N, nope_dim]`` -> uint8 value codes ``[N, nope_bytes]`` and uint8 scale bytes ``[N, scale_bytes]``."""
    tiles = x.unflatten(1, (-1, layout.scale_tile))
    amax = tiles.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=2)
    scale_codes = torch.zeros(len(x), layout.scale_bytes, dtype=torch.uint8, device=x.device)
    # e2m1 has no NaN, so a tile that holds one says so in its scale.
    lost = tiles.isnan().any(dim=2) if layout.value_encoding == "e2m1" else torch.zeros_like(amax, dtype=torch.bool)
    if layout.scale_encoding == "none":
        scales = torch.full_like(amax, k_scale)
    elif layout.scale_encoding == "e4m3fn":
        codes = encodings.encode_scale_e4m3(amax)
        scales = encodings.decode_e4m3fn(codes)
        scale_codes[:] = torch.where(lost, 0x7F, codes)
    else:
        scale_bytes = encodings.tile_scale_byte(amax, layout.min_scale_byte, layout.value_max)
        scales = encodings.decode_ue8m0(scale_bytes.to(torch.uint8))
        stored = torch.where(lost, 255, scale_bytes).to(torch.uint8)
        if layout.scale_encoding == "float32":
            scale_codes = encodings.decode_ue8m0(stored).view(torch.uint8)
        else:
            scale_codes[:, : layout.num_scales] = stored
    values = tiles / scales[..., None]
    return _ENCODE[layout.value_encoding](values.flatten(1)), scale_codes


def copy_entries(src: PagedCache, src_slots: torch.Tensor, dst: PagedCache, dst_slots: torch.Tensor) -> None:
    """Rows of which either slot is invalid are skipped."""
    valid = (src_slots >= 0) & (src_slots < src.capacity) & (dst_slots >= 0) & (dst_slots < dst.capacity)
    reads, writes = src_slots[valid].long(), dst_slots[valid].long()
    runs = src.layout.entry_runs(src.page_size), dst.layout.entry_runs(dst.page_size)
    for (read, size), (write, _) in zip(*runs):
        taken = _entry_bytes(src, reads, read + reads % src.page_size * size, size)
        columns = write + writes % dst.page_size * size
        columns = columns[:, None] + torch.arange(size, dtype=torch.int64, device=writes.device)
        dst.page_bytes[(writes // dst.page_size)[:, None], columns] = taken


def requantize_fp8_to_block_scale(src: PagedCache, dst: PagedCache, pages: torch.Tensor | None, k_scale: float) -> None:
    """Codes copied, ``k_scale`` in every block scale, RoPE decoded; pages outside the pool are skipped."""
    which = torch.arange(src.pages, dtype=torch.int64, device=src.device) if pages is None else pages.long()
    which = which[(which >= 0) & (which < src.pages)]
    size, nope = src.page_size, dst.layout.nope_dim
    entries = src.page_bytes[which].view(len(which), size, src.layout.entry_bytes)
    scale = torch.tensor(k_scale, dtype=torch.float32, device=src.device)
    rope = _DECODE[src.layout.value_encoding](entries[..., nope:].contiguous()) * scale
    scales = scale.expand(len(which), size, dst.layout.num_scales).contiguous()
    written = [entries[..., :nope], scales.view(torch.uint8), rope.to(torch.bfloat16).view(torch.uint8)]
    dst.page_bytes[which] = torch.cat(written, dim=2).flatten(1)


@without_autocast
def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    valid: torch.Tensor,
    attn_sink: torch.Tensor | None,
    softmax_scale: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each token over its own entries; the value is the first 512 of K.

    Args:
        q: ``[T, H, D]``.
        kv: ``[T, N, D]``; entries that are not valid may hold anything, NaN included.
        valid: bool ``[T, N]``.
        attn_sink: ``[H]`` or None: out is scaled by 1 / (1 + exp(sink - lse)); lse is without it.
        softmax_scale: multiplies the logits.
        dtype: float32 or float64.

    Returns:
        ``out [T, H, min(D, 512)]`` and ``lse [T, H]`` (natural log) in ``dtype``. Without valid entries out is 0 and
        lse +inf.
    """
    kv = torch.where(valid[..., None], kv, 0).to(dtype)
    logits = torch.einsum("thd,tnd->thn", q.to(dtype), kv) * softmax_scale
    logits = logits.masked_fill(~valid[:, None, :], -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    empty = ~valid.any(dim=1)
    weights = torch.exp(logits - torch.where(empty[:, None], 0.0, lse)[..., None])
    out = torch.einsum("thn,tnd->thd", weights, kv[..., :_VALUE_DIM])
    if attn_sink is not None:
        out = out / (1 + torch.exp(attn_sink.to(dtype) - lse))[..., None]
    out = out.masked_fill(empty[:, None, None], 0.0)
    return out, lse.masked_fill(empty[:, None], torch.inf)


def _valid_span(indices: torch.Tensor, lens: torch.Tensor | None, capacity: int) -> torch.Tensor:
    valid = (indices >= 0) & (indices < capacity)
    if lens is not None:
        valid &= torch.arange(indices.shape[1], dtype=torch.int64, device=indices.device) < lens[:, None]
    return valid


def tokens_at_once(width: int, head_dim: int) -> int:
    """Tokens whose entries the attention ops gather together."""
    return max(1, _CHUNK_ELEMENTS // max(1, width * head_dim))


def _attend_chunks(
    q: torch.Tensor,
    gather: Callable[[slice], tuple[torch.Tensor, torch.Tensor]],
    width: int,
    attn_sink: torch.Tensor | None,
    softmax_scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`attend` over as many tokens at a time as ``_CHUNK_ELEMENTS`` allows."""
    tokens, heads, head_dim = q.shape
    out = torch.empty(tokens, heads, min(head_dim, _VALUE_DIM), dtype=dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=dtype, device=q.device)
    step = tokens_at_once(width, head_dim)
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        kv, valid = gather(rows)
        out[rows], lse[rows] = attend(q[rows], kv, valid, attn_sink, softmax_scale, dtype)
    return out, lse


def sparse_mla_decode(
    q: torch.Tensor,
    swa_cache: PagedCache,
    swa_indices: torch.Tensor,
    swa_lens: torch.Tensor | None,
    extra_cache: PagedCache | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_lens: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    swa_k_scale: float = 1.0,
    extra_k_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`dsv4x.sparse_mla_decode` in ``dtype``, neither rounded to bf16 nor written to a given buffer."""
    scopes = [(swa_cache, swa_indices, swa_lens, swa_k_scale)]
    if extra_cache is not None and extra_indices is not None:
        scopes.append((extra_cache, extra_indices, extra_lens, extra_k_scale))

    def gather(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        kv, masks = [], []
        for cache, indices, lens, k_scale in scopes:
            part = indices[rows]
            valid = _valid_span(part, None if lens is None else lens[rows], cache.capacity)
            entries = torch.zeros(*part.shape, cache.layout.head_dim, dtype=torch.bfloat16, device=q.device)
            entries[valid] = dequantize_slots(cache, part[valid], k_scale=k_scale)
            kv.append(entries)
            masks.append(valid)
        return torch.cat(kv, dim=1), torch.cat(masks, dim=1)

    width = sum(indices.shape[1] for _, indices, *_ in scopes)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _attend_chunks(q, gather, width, attn_sink, scale, dtype)


def sparse_mla_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lens: torch.Tensor | None,
    attn_sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`dsv4x.sparse_mla_prefill` in ``dtype``, neither rounded to bf16 nor written to a given buffer."""

    def gather(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        part = indices[rows]
        valid = _valid_span(part, None if lens is None else lens[rows], kv.shape[0])
        entries = torch.zeros(*part.shape, kv.shape[1], dtype=kv.dtype, device=kv.device)
        entries[valid] = kv[part[valid].long()]
        return entries, valid

    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _attend_chunks(q, gather, indices.shape[1], attn_sink, scale, dtype)


def merge_attention_states(
    outs: torch.Tensor,
    last: torch.Tensor,
    lses: torch.Tensor,
    attn_sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """:func:`dsv4x.merge_attention_states` of states ``outs [>= N - 1, T, H, V]`` and ``last [T, H, V]``."""
    states = torch.cat([outs[: lses.shape[0] - 1], last[None]]).float()
    empty = lses.isinf()
    none = empty.all(0)
    scores = lses.masked_fill(empty, -torch.inf)
    top = scores.amax(0).masked_fill(none, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(0).masked_fill(none, 1.0)
    merged = (weights[..., None] * states.masked_fill(empty[..., None], 0.0)).sum(0) / total[..., None]
    lse.copy_((top + total.log()).masked_fill(none, torch.inf))
    if attn_sink is not None:
        merged = merged / (1 + torch.exp(attn_sink - lse))[..., None]
    out.copy_(merged.masked_fill(none[..., None], 0.0))


def combine_topk_swa_indices(call: CombineCall) -> None:
    """One row after another, as the definition reads."""
    tokens = call.topk_indices.shape[0]
    request, position = call.positions or token_positions(call.query_start_loc, call.seq_lens, tokens)
    locals_, owners, at = (x.tolist() for x in (call.topk_indices, request, position))
    vectors = (call.seq_lens, call.gather_lens, call.compressed_base, call.swa_base)
    seq, gathered, compressed_base, swa_base = (x.tolist() for x in vectors)
    held = None if call.compressed_lens is None else call.compressed_lens.tolist()
    spans = [call.topk_indices.shape[1]] * tokens if call.topk_lens is None else call.topk_lens.tolist()
    slots = None if call.row_slots is None else call.row_slots.tolist()

    def backed(row: int) -> bool:
        # A base in 64 bits may lead past what a row number can be.
        return 0 <= row < 2**31 and (slots is None or (row < len(slots) and slots[row] >= 0))

    rows = torch.full(call.out_indices.shape, -1, dtype=torch.int64, device="cpu")
    lens = torch.zeros(call.out_lens.shape, dtype=torch.int64, device="cpu")
    for t, (r, p) in enumerate(zip(owners, at)):
        if r < 0 or p < 0:
            continue
        visible = (p + 1) // call.compress_ratio
        if held is not None:
            visible = min(visible, held[r])
        span = max(0, min(spans[t], call.topk, call.topk_indices.shape[1]))
        row = [compressed_base[r] + e for e in locals_[t][:span] if 0 <= e < visible]
        row = [value for value in row if backed(value)]
        first_gathered = seq[r] - gathered[r]
        for x in range(max(0, p - call.window_size + 1), p + 1):
            value = swa_base[r] + x - first_gathered
            row.append(value if x >= first_gathered and backed(value) else -1)
        rows[t, : len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
        lens[t] = len(row)
    call.out_indices.copy_(rows)
    call.out_lens.copy_(lens)


def window_slots(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    page_size: int,
    pages: int,
    out_indices: torch.Tensor,
    out_lens: torch.Tensor,
) -> None:
    """:func:`dsv4x.common.ops.indices.window_slots` in torch."""
    request, position = token_positions(query_start_loc, seq_lens, out_indices.shape[0])
    width = out_indices.shape[1]
    span = (position + 1).clamp_max(width)
    offset = torch.arange(width, dtype=torch.int64, device=position.device)
    local = torch.where(offset < span[:, None], (position - span + 1)[:, None] + offset, -1)
    local_to_slots(local, request, position + 1, block_table, page_size, pages, out_indices)
    out_lens.copy_(span)


def local_to_slots(
    local: torch.Tensor,
    request: torch.Tensor,
    limits: torch.Tensor,
    block_table: torch.Tensor,
    page_size: int,
    pages: int,
    out: torch.Tensor,
) -> None:
    """:func:`dsv4x.common.ops.indices.local_to_slots` in torch."""
    if block_table.numel() == 0:
        out.fill_(-1)
        return
    local, request = local.long(), request.long()
    column = local.div(page_size, rounding_mode="floor")
    owned = (request >= 0) & (request < block_table.shape[0])
    valid = owned[:, None] & (local >= 0) & (local < limits[:, None]) & (column < block_table.shape[1])
    page = block_table.long()[torch.where(owned, request, 0)[:, None], torch.where(valid, column, 0)]
    valid &= (page >= 0) & (page < pages)
    out.copy_(torch.where(valid, page * page_size + local % page_size, -1))


def local_to_workspace_rows(
    local: torch.Tensor, request: torch.Tensor, limits: torch.Tensor, bases: torch.Tensor, out: torch.Tensor
) -> None:
    """:func:`dsv4x.local_to_workspace_rows` in torch."""
    owned = (request >= 0) & (request < bases.shape[0])
    # One base more, of no request: there may be none to look up.
    base = torch.cat([bases.long(), bases.new_full((1,), -1).long()])[torch.where(owned, request, -1).long()]
    room = torch.minimum(limits.long(), 2**31 - base)
    valid = (local >= 0) & (local < room[:, None]) & (base >= 0)[:, None]
    out.copy_(torch.where(valid, base[:, None] + local, -1))


def slots_to_compact_slots(slots: torch.Tensor, page_map: torch.Tensor, page_size: int, out: torch.Tensor) -> None:
    """:func:`dsv4x.slots_to_compact_slots` in torch."""
    slots = slots.long()
    known = (slots >= 0) & (slots < page_map.shape[0] * page_size)
    compact = torch.full_like(slots, -1)
    compact[known] = page_map.long()[slots[known] // page_size]
    compact_slots = compact * page_size + slots % page_size
    out.copy_(torch.where((compact >= 0) & (compact_slots < 2**31), compact_slots, -1))


def dense_to_ragged(
    indices: torch.Tensor,
    lens: torch.Tensor | None,
    upper: int,
    values: torch.Tensor,
    indptr: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """:func:`dsv4x.dense_to_ragged` in torch; ``values`` comes full of -1."""
    # In 64 bits, because 2**31 is an upper bound and no int32.
    valid = _valid_span(indices.long(), lens, upper)
    capacity = values.shape[0]
    kept = indices[valid][:capacity]
    values[: len(kept)] = kept.int()
    indptr[1:] = valid.sum(1).cumsum(0).clamp_max(capacity)
    count.fill_(min(int(valid.sum()), 2**31 - 1))


def ragged_to_dense(values: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor, lens: torch.Tensor) -> None:
    """:func:`dsv4x.ragged_to_dense` row by row, as the definition reads."""
    indices.fill_(-1)
    at = indptr.tolist()
    for t, (start, end) in enumerate(itertools.pairwise(at)):
        # No negative bound: Python would count it from the end.
        row = values[max(start, 0) : max(end, 0)][: indices.shape[1]]
        indices[t, : len(row)] = row.clamp_min(-1)
        lens[t] = len(row)


def combine_swa_extra_indices(
    swa_indices: torch.Tensor,
    swa_lens: torch.Tensor | None,
    extra_indices: torch.Tensor,
    extra_lens: torch.Tensor | None,
    s_kv_swa: int,
    out_indices: torch.Tensor,
    out_lens: torch.Tensor,
) -> None:
    """:func:`dsv4x.combine_swa_extra_indices` row by row, as the definition reads."""
    swa, extra = swa_indices.long(), extra_indices.long()
    swa = torch.where((swa >= 0) & (swa < s_kv_swa), swa, -1)
    extra = torch.where((extra >= 0) & (extra < 2**31 - s_kv_swa), extra + s_kv_swa, -1)
    out_indices.fill_(-1)
    for t in range(swa.shape[0]):
        parts = []
        for rows, lens in ((swa, swa_lens), (extra, extra_lens)):
            parts.append(rows[t] if lens is None else rows[t, : max(int(lens[t]), 0)])
        row = torch.cat(parts)
        out_indices[t, : len(row)] = row.int()
        out_lens[t] = len(row)


def build_swa_token_ids(
    first: torch.Tensor, starts: torch.Tensor, token_ids: torch.Tensor, request: torch.Tensor
) -> None:
    """Positions from ``first`` on (int64 ``[R]``) in rows ``starts[r] ... starts[r+1] - 1``, one request at a time."""
    token_ids.fill_(-1)
    request.fill_(-1)
    at = starts.tolist()
    for r, (start, end) in enumerate(itertools.pairwise(at)):
        rows = slice(start, min(end, token_ids.shape[0]))
        count = max(rows.stop - rows.start, 0)
        token_ids[rows] = (first[r] + torch.arange(count, dtype=torch.int64, device=first.device)).int()
        request[rows] = r


def list_referenced(
    indices: torch.Tensor,
    lens: torch.Tensor | None,
    slots: int,
    unit_slots: int,
    listed: torch.Tensor,
    remapped: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """The distinct units of ``unit_slots`` slots that valid indices point into, ascending, and the indices' own ranks.

    ``listed`` and ``remapped`` come filled with -1 and ``count`` with 0.
    """
    valid = _valid_span(indices, lens, slots)
    slot = indices[valid].long()
    found, rank = torch.unique(slot // unit_slots, return_inverse=True)
    kept = found[: len(listed)]
    listed[: len(kept)] = kept.to(listed.dtype)
    remapped[valid] = torch.where(rank < len(listed), rank * unit_slots + slot % unit_slots, -1).int()
    count.fill_(len(found))


def copy_pages(cache: PagedCache, pages: torch.Tensor, out: PagedCache) -> None:
    """Page ``pages[i]`` of ``cache`` becomes page i of ``out``; where it is -1 that page is left alone."""
    kept = pages >= 0
    out.page_bytes[: len(pages)][kept] = cache.page_bytes[pages[kept].long()]


# Products of the indexer held at once, in elements.
_LOGITS_ELEMENTS = 1 << 25


def indexer_values(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """float32 ``[.., 128]`` of q or K: FP8 as it is; packed e2m1, and FP8 that has them, times ue8m0 scales."""
    values = encodings.decode_e2m1(x) if x.dtype == torch.uint8 else x.float()
    if scale is None:
        return values
    return (values.unflatten(-1, (4, 32)) * encodings.decode_ue8m0(scale)[..., None]).flatten(-2)


@without_autocast
def _weighted_logits(
    q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor | None, weights: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``q [M, H, 128]``, ``k [N, 128]``, ``weights [M, H]`` -> ``[M, N]``; a NaN product counts as 0."""
    out = torch.empty(q.shape[0], k.shape[0], dtype=dtype, device=q.device)
    step = max(1, _LOGITS_ELEMENTS // max(1, k.shape[0] * q.shape[1]))
    for start in range(0, q.shape[0], step):
        rows = slice(start, start + step)
        products = torch.einsum("mhd,nd->mhn", q[rows].to(dtype), k.to(dtype))
        products = torch.where(products > 0, products, 0)
        out[rows] = torch.einsum("mhn,mh->mn", products, weights[rows].to(dtype))
    return out if k_scale is None else out * k_scale.to(dtype)


def _masked_logits(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(~valid | values.isnan(), -torch.inf)


def paged_mqa_logits(
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    cache: PagedCache,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    schedule: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    clean_logits: bool = True,
    requests: torch.Tensor | None = None,
    plan: None = None,
    unscored: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """:func:`dsv4x.paged_mqa_logits`, one request after another.

    ``schedule``, ``plan``, ``unscored`` and ``clean_logits`` change nothing.
    """
    if requests is not None:
        known = (requests >= 0) & (requests < block_table.shape[0])
        context_lens = torch.where(known[:, None], context_lens, 0)
        block_table = block_table[torch.where(known, requests, 0).long()]
    batch, next_n = context_lens.shape
    if out is None:
        out = torch.empty(batch * next_n, max_context_len, dtype=dtype, device=q.device)
    out.fill_(-torch.inf)
    q = indexer_values(q, q_scale)
    most = min(max_context_len, block_table.shape[1] * cache.page_size)
    for request in range(batch):
        lens = context_lens[request].long().clamp(0, most)
        column = torch.arange(int(lens.max()), dtype=torch.int64, device=q.device)
        page = block_table[request].long()[column // cache.page_size]
        there = (page >= 0) & (page < cache.pages)
        slots = torch.where(there, page * cache.page_size + column % cache.page_size, -1)
        k, k_scale = gather_indexer_k(cache, slots)
        scales = k_scale if k_scale.dtype == torch.uint8 else None
        rows = slice(request * next_n, (request + 1) * next_n)
        values = _weighted_logits(
            q[request], indexer_values(k, scales), None if scales is not None else k_scale, weights[rows], dtype
        )
        out[rows, : len(column)] = _masked_logits(values, there & (column < lens[:, None])).to(out.dtype)
    return out


def mqa_logits(
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    max_seqlen_k: int | None = None,
    out: torch.Tensor | None = None,
    clean_logits: bool = True,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """:func:`dsv4x.mqa_logits`; ``clean_logits`` changes nothing."""
    mx, entries = k_scale.dtype == torch.uint8, k.shape[0]
    k_values = indexer_values(k, k_scale if mx else None)
    values = _weighted_logits(indexer_values(q, q_scale), k_values, None if mx else k_scale, weights, dtype)
    ks, ke = ks.long().clamp(0, entries)[:, None], ke.long().clamp(0, entries)[:, None]
    column = torch.arange(entries, dtype=torch.int64, device=q.device)
    values = _masked_logits(values, (column >= ks) & (column < ke))
    if max_seqlen_k is not None:
        at = ks + torch.arange(max_seqlen_k, dtype=torch.int64, device=q.device)
        padded = torch.nn.functional.pad(values, (0, 1), value=-torch.inf)
        values = padded.gather(1, at.clamp_max(entries))
    return values if out is None else out.copy_(values)


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor, split: int, atoms: int, num_sms: int, out: torch.Tensor
) -> None:
    """The schedule, SM by SM."""
    segments = [-(-max(length, 0) // split) for length in context_lens[:, -1].tolist()]
    ends = list(itertools.accumulate(segments))
    total = ends[-1] * atoms
    share, rest = divmod(total, num_sms)
    table = [(0, 0)] * (num_sms + 1)
    if total:
        table[num_sms] = (len(segments) * atoms, 0)
        request = 0
        for sm in range(num_sms):
            mark = sm * share + max(sm - (num_sms - rest), 0)
            while ends[request] * atoms <= mark:
                request += 1
            offset = mark - (ends[request] - segments[request]) * atoms
            table[sm] = (request * atoms + offset // segments[request], offset % segments[request])
    out.copy_(torch.tensor(table, dtype=torch.int32, device=out.device))


def gather_indexer_k(
    cache: PagedCache, slots: torch.Tensor, k: torch.Tensor | None = None, k_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales at ``slots [N]``; zeros where one is invalid."""
    layout = cache.layout
    valid = (slots >= 0) & (slots < cache.capacity)
    slots = torch.where(valid, slots.long(), 0)
    entry = slots % cache.page_size
    if cache.capacity == 0:
        values = slots.new_zeros(len(slots), layout.nope_bytes, dtype=torch.uint8)
        scales = slots.new_zeros(len(slots), layout.scale_bytes, dtype=torch.uint8)
    else:
        values = _entry_bytes(cache, slots, entry * layout.data_pitch, layout.nope_bytes)
        at = layout.scale_base(cache.page_size) + entry * layout.scale_pitch
        scales = _entry_bytes(cache, slots, at, layout.scale_bytes)
    values, scales = (torch.where(valid[:, None], x, 0).contiguous() for x in (values, scales))
    if layout.value_encoding != "e2m1":
        values = values.view(torch.float8_e4m3fn if layout.value_encoding == "e4m3fn" else torch.float8_e4m3fnuz)
    if layout.scale_encoding == "float32":
        scales = scales.view(torch.float32)[:, 0]
    if k is None or k_scale is None:
        return values, scales
    return k.copy_(values), k_scale.copy_(scales)


def _selected(values: torch.Tensor, valid: torch.Tensor, k: int) -> torch.Tensor:
    """int64 ``[rows, k]``: the columns of each row's k best, ascending, then -1."""
    values = torch.where(values.isnan(), -torch.inf, values) + 0.0
    width = values.shape[1]
    best = values.sort(dim=1, descending=True, stable=True).indices
    order = valid.gather(1, best).sort(dim=1, descending=True, stable=True).indices
    chosen = best.gather(1, order)[:, :k]
    count = valid.sum(1, keepdim=True).clamp_max(k)
    chosen = (
        torch.where(torch.arange(chosen.shape[1], dtype=torch.int64, device=values.device) < count, chosen, width)
        .sort(1)
        .values
    )
    chosen = torch.nn.functional.pad(chosen, (0, k - chosen.shape[1]), value=width)
    return torch.where(chosen == width, -1, chosen)


def _in_space(local: torch.Tensor, method: TopkMethod, space: dict[str, Any]) -> torch.Tensor:
    """Local indices, -1 for none, in the space of ``method``; -1 where there is none."""
    if method is TopkMethod.RAGGED:
        base = space["bases"].long()[:, None]
        moved = base + local
        return torch.where((local >= 0) & (base >= 0) & (moved < 2**31), moved, -1)
    if method is TopkMethod.PAGED:
        table, size = space["block_table"].long(), space["page_size"]
        row = torch.arange(len(local), dtype=torch.int64, device=local.device)
        request = row // space["next_n"] if space["requests"] is None else space["requests"].long()
        known = (local >= 0) & ((request >= 0) & (request < len(table)))[:, None] & (local // size < table.shape[1])
        if not known.any():
            return torch.full_like(local, -1)
        request = request.clamp(0, len(table) - 1)
        page = table[request[:, None], torch.where(known, local // size, 0)]
        return torch.where(known & (page >= 0) & (page < space["pages"]), page * size + local % size, -1)
    return local


def topk_transform(
    logits: torch.Tensor,
    lengths: torch.Tensor | None,
    k: int,
    method: TopkMethod,
    row_starts: torch.Tensor | None,
    space: dict[str, Any],
    out: torch.Tensor,
    out_local: torch.Tensor | None = None,
) -> None:
    """:func:`dsv4x.topk_transform` by two stable sorts: by value, then those that are entries first."""
    rows, width = logits.shape
    start = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    if row_starts is not None:
        start = row_starts.long().clamp(0, width)
    length = width - start
    if lengths is not None:
        length = torch.minimum(lengths.long().clamp_min(0), length)
    column = torch.arange(width, dtype=torch.int64, device=logits.device)
    moved = torch.nn.functional.pad(logits, (0, 1)).gather(1, (start[:, None] + column).clamp_max(width))
    chosen = _selected(moved, column < length[:, None], k)
    if out_local is not None:
        out_local.copy_(chosen)
    out.copy_(_in_space(chosen, method, space))


def topk_merge(
    values: torch.Tensor,
    ids: torch.Tensor,
    k: int,
    method: TopkMethod,
    space: dict[str, Any],
    out: torch.Tensor,
    out_values: torch.Tensor | None,
) -> None:
    """The k best of ``values, ids [rows, w]``; an id of -1 is no candidate."""
    chosen = _selected(values, ids >= 0, k)
    at = chosen.clamp_min(0)
    if out_values is not None:
        out_values.copy_(values.gather(1, at))
    out.copy_(_in_space(torch.where(chosen >= 0, ids.long().gather(1, at), -1), method, space))


def fill_step(call: StepCall) -> None:
    """What :func:`dsv4x.common.kernels.step.fill_step` writes, in torch."""
    tokens = call.request.shape[0]
    lengths = call.seq_lens.clamp(0, call.max_seq_len)
    request, position = token_positions(call.query_start_loc, lengths, tokens)
    call.request.copy_(request)
    call.position.copy_(position)
    if call.fresh:
        call.clamped.zero_()
    call.clamped.add_(((call.query_start_loc.diff() > 0) & (call.seq_lens > call.max_seq_len)).sum())
    if call.swa_indices is not None and call.swa_lens is not None and call.swa_block_table is not None:
        window_slots(
            call.query_start_loc, lengths, call.swa_block_table, call.swa_page_size, call.swa_pages,
            call.swa_indices, call.swa_lens,
        )  # fmt: skip
    for kind in call.kinds:
        kind.visible.copy_((position + 1) // kind.compress_ratio)
        kind.lens.copy_(kind.visible.clamp_max(kind.most))
        if kind.rows is not None:
            every = torch.arange(kind.rows.shape[1], dtype=torch.int32, device=call.request.device)
            local_to_slots(
                every.expand(kind.rows.shape), call.request, kind.lens, kind.block_table, kind.page_size, kind.pages,
                kind.rows,
            )  # fmt: skip


def plan_gather(call: GatherCall) -> None:
    """What :func:`dsv4x.common.kernels.step.plan_gather` writes, in torch."""
    lengths = call.seq_lens.clamp(0, call.max_seq_len).long()
    queries = call.query_start_loc.diff().long()
    request = torch.arange(lengths.shape[0], dtype=torch.int64, device=lengths.device)
    for kind in call.kinds:
        gathers = (queries > 0) & (request >= kind.first) & (request < kind.end)
        entries = lengths // kind.compress_ratio if kind.compress_ratio else torch.zeros_like(lengths)
        raw = torch.minimum(lengths, queries + call.window_size - 1)
        kind.slots.fill_(-1)
        parts = (
            (entries, 0, kind.compressed_rows, kind.block_table, kind.page_size, kind.pages),
            (
                raw, kind.compressed_rows, kind.slots.shape[0], call.swa_block_table, call.swa_page_size,
                call.swa_pages,
            ),
        )  # fmt: skip
        for part, (counts, first_row, end_row, table, page_size, pages) in enumerate(parts):
            counts = torch.where(gathers, counts, 0)
            ends = (first_row + counts.cumsum(0)).clamp_max(end_row)
            begins = (first_row + counts.cumsum(0) - counts).clamp_max(end_row)
            kind.requests[2 * part] = begins
            kind.requests[2 * part + 1] = ends - begins
            owner = torch.repeat_interleave(request, ends - begins)
            row = torch.arange(owner.shape[0], dtype=torch.int64, device=owner.device)
            local = row + first_row - begins[owner]
            if part:
                local = local + (lengths - (ends - begins))[owner]
            slots = torch.empty(owner.shape[0], 1, dtype=torch.int32, device=owner.device)
            local_to_slots(local[:, None], owner, local + 1, table, page_size, pages, slots)
            kind.slots[first_row : first_row + owner.shape[0]] = slots[:, 0]
        kind.requests[4] = lengths


def pack_slots(call: PackCall) -> None:
    """What :func:`dsv4x.common.kernels.step.pack_slots` writes, in torch."""
    indices, spans, local, capacity, page_size, out, lens, counted = call
    slots = indices.clone()
    if spans is not None:
        slots[torch.arange(slots.shape[1], dtype=torch.int64, device=slots.device) >= spans[:, None]] = -1
    if local is None:
        slots[slots >= capacity] = -1
    else:
        request, visible, table, pages = local
        local_to_slots(slots, request, visible, table, page_size, pages, slots)
    entry = slots >= 0
    order = torch.argsort((~entry).int(), dim=1, stable=True)
    out.fill_(-1)
    out[:, : slots.shape[1]] = torch.where(entry, slots, -1).gather(1, order)
    if counted:
        lens.copy_(entry.sum(1))
    else:
        lens.copy_(torch.full_like(lens, indices.shape[1]) if spans is None else spans.clamp(0, indices.shape[1]))
