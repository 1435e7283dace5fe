"""``torch.ops.dsv4x``: the ops with flat arguments, for torch.compile and exported graphs.

A paged cache is three arguments here: its bytes, its layout's name and its page size. Results go to buffers the caller
gives, so that no op returns an alias. A step's metadata is a Python object and no argument of an op: a compiled model
gives ``sparse_mla_decode`` the metadata's slots and spans instead. Eager callers use the functions in ``dsv4x`` itself.
"""

from __future__ import annotations

import torch

from ..core import layouts
from ..core.layouts import PagedCache
from . import cache, indices, merge, sparse_mla

_library = torch.library.Library("dsv4x", "DEF")


def _paged(data: torch.Tensor, layout: str, page_size: int) -> PagedCache:
    return PagedCache(data, layouts.by_name(layout), page_size)


def _define(schema: str, run, fake) -> None:  # type: ignore[no-untyped-def]
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dsv4x::{name}", fake, lib=_library)


def _quantize_and_insert(k, data, layout, page_size, slots, k_scale=1.0, kernel=None):  # type: ignore[no-untyped-def]
    cache.quantize_and_insert_k_cache(k, _paged(data, layout, page_size), slots, k_scale=k_scale, kernel=kernel)


def _dequantize(data, layout, page_size, slots, k_scale=1.0, kernel=None):  # type: ignore[no-untyped-def]
    return cache.dequantize_k_cache_paged(_paged(data, layout, page_size), slots, k_scale=k_scale, kernel=kernel)


def _dequantize_fake(data, layout, page_size, slots, k_scale=1.0, kernel=None):  # type: ignore[no-untyped-def]
    return data.new_empty(slots.shape[0], layouts.by_name(layout).head_dim, dtype=torch.bfloat16)


def _copy(  # type: ignore[no-untyped-def]
    src, layout, src_page_size, src_slots, dst, dst_page_size, dst_slots, kernel=None
):
    src, dst = _paged(src, layout, src_page_size), _paged(dst, layout, dst_page_size)
    cache.copy_entries(src, src_slots, dst, dst_slots, kernel=kernel)


def _copy_fake(  # type: ignore[no-untyped-def]
    src, layout, src_page_size, src_slots, dst, dst_page_size, dst_slots, kernel=None
):
    cache.check_copy(_paged(src, layout, src_page_size), src_slots, _paged(dst, layout, dst_page_size), dst_slots)


def _local_to_slots_fake(  # type: ignore[no-untyped-def]
    local, request, limits, block_table, page_size, pages, kernel=None
):
    indices.check_local_to_slots(local, request, limits, block_table, page_size, pages)
    return local.new_empty(local.shape, dtype=torch.int32)


def _decode(  # type: ignore[no-untyped-def]
    q, swa, swa_layout, swa_page_size, swa_indices, swa_lens,
    extra, extra_layout, extra_page_size, extra_indices, extra_lens,
    attn_sink, softmax_scale, out, swa_k_scale=1.0, extra_k_scale=1.0, kernel=None, split_k=None,
):  # fmt: skip
    return sparse_mla.sparse_mla_decode(
        q, _paged(swa, swa_layout, swa_page_size), swa_indices, swa_lens,
        None if extra is None else _paged(extra, extra_layout, extra_page_size), extra_indices, extra_lens,
        attn_sink, softmax_scale, out, kernel, swa_k_scale=swa_k_scale, extra_k_scale=extra_k_scale, split_k=split_k,
    )[1]  # fmt: skip


def _prefill(q, kv, indices, lens, attn_sink, softmax_scale, out, kernel=None):  # type: ignore[no-untyped-def]
    return sparse_mla.sparse_mla_prefill(q, kv, indices, lens, attn_sink, softmax_scale, out, kernel)[1]


def _merge(outs, lses, attn_sink, out, kernel=None):  # type: ignore[no-untyped-def]
    return merge.merge_attention_states(outs, lses, attn_sink, out, kernel=kernel)[1]


def _merge_fake(outs, lses, attn_sink, out, kernel=None):  # type: ignore[no-untyped-def]
    return lses.new_empty(lses.shape[1], lses.shape[2])


def _lse_fake(q, *rest, **named):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[1], dtype=torch.float32)


_define(
    "quantize_and_insert_k_cache(Tensor k, Tensor(a!) cache, str layout, int page_size, Tensor slots, "
    "float k_scale=1.0, *, str? kernel=None) -> ()",
    _quantize_and_insert,
    lambda *args, **named: None,
)
_define(
    "dequantize_k_cache_paged(Tensor cache, str layout, int page_size, Tensor slots, float k_scale=1.0, *, "
    "str? kernel=None) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
_define(
    "copy_entries(Tensor src, str layout, int src_page_size, Tensor src_slots, Tensor(a!) dst, int dst_page_size, "
    "Tensor dst_slots, *, str? kernel=None) -> ()",
    _copy,
    _copy_fake,
)
_define(
    "local_to_slots(Tensor local, Tensor request, Tensor limits, Tensor block_table, int page_size, int pages, *, "
    "str? kernel=None) -> Tensor",
    indices.local_to_slots,
    _local_to_slots_fake,
)
_define(
    "sparse_mla_decode(Tensor q, Tensor swa_cache, str swa_layout, int swa_page_size, Tensor swa_indices, "
    "Tensor? swa_lens, Tensor? extra_cache, str extra_layout, int extra_page_size, Tensor? extra_indices, "
    "Tensor? extra_lens, Tensor? attn_sink, float? softmax_scale, Tensor(a!) out, float swa_k_scale=1.0, "
    "float extra_k_scale=1.0, *, str? kernel=None, int? split_k=None) -> Tensor",
    _decode,
    _lse_fake,
)
_define(
    "sparse_mla_prefill(Tensor q, Tensor kv, Tensor indices, Tensor? lens, Tensor? attn_sink, float? softmax_scale, "
    "Tensor(a!) out, *, str? kernel=None) -> Tensor",
    _prefill,
    _lse_fake,
)
_define(
    "merge_attention_states(Tensor outs, Tensor lses, Tensor? attn_sink, Tensor(a!) out, *, "
    "str? kernel=None) -> Tensor",
    _merge,
    _merge_fake,
)
