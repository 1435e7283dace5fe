"""Attention calls as kernels get them, from the arguments of the public ops."""

from dsv4x.common.core.calls import DecodeCall, PrefillCall, Scope


def decode_call(
    q, swa_cache, swa_indices, swa_lens=None, extra_cache=None, extra_indices=None, extra_lens=None, attn_sink=None,
    softmax_scale=512**-0.5, out=None, *, heads=None, trusted_indices=False, return_lse=True, swa_k_scale=1.0,
    extra_k_scale=1.0, **more,
):  # fmt: skip
    extra = None if extra_cache is None else Scope(extra_cache, extra_indices, extra_lens, extra_k_scale)
    swa = Scope(swa_cache, swa_indices, swa_lens, swa_k_scale)
    return DecodeCall(
        q, swa, extra, attn_sink, softmax_scale, out, heads or q.shape[1], return_lse, trusted=trusted_indices, **more
    )


def prefill_call(
    q, kv, indices, lens=None, attn_sink=None, softmax_scale=512**-0.5, out=None, *, heads=None, trusted_indices=False,
    return_lse=True, **more,
):  # fmt: skip
    return PrefillCall(
        q, kv, indices, lens, attn_sink, softmax_scale, out, heads or q.shape[1], return_lse, trusted_indices, **more
    )
