"""The two attention ops: decode over paged caches in place, prefill over gathered bf16 rows."""

from __future__ import annotations

from typing import Any

import torch

from ..core import checks
from ..core.calls import AttentionCall, DecodeCall, Local, PrefillCall, Result, Scope, output
from ..core.layouts import ALIGNMENT, PagedCache
from ..core.model import HEAD_DIMS, MAX_HEADS, VALUE_DIM
from ..dispatch.problem import AttentionProblem, Problem
from ..dispatch.registry import Kernel, call_on, select
from ..kernels.limits import MAX_SPLITS
from ..kernels.scratch import tensor_bytes
from .indices import local_to_slots


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
    out: torch.Tensor | None = None,
    kernel: str | None = None,
    *,
    trusted_indices: bool = False,
    schedule: dict[Any, Any] | None = None,
    swa_k_scale: float = 1.0,
    extra_k_scale: float = 1.0,
    return_lse: bool = True,
    split_k: int | None = None,
    heads: int | None = None,
    local: Local | None = None,
    workspace: torch.Tensor | None = None,
    entries: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One softmax over a token's window entries and its extra (compressed) entries, pages read in place.

    With s = q . k * softmax_scale over the valid entries: lse = logsumexp(s), natural log, sink excluded;
    out = softmax(s) @ v / (1 + exp(sink - lse)), v the first 512 values of k. A token without valid entries gets
    out = 0 and lse = +inf. An index below 0 or past its cache is no entry, wherever it stands in its row.

    DeepSeek-V3.2 has one cache: give it as ``swa_cache``, its top-k slots as ``swa_indices``, and q of 576.

    Args:
        q: bf16 ``[T, H, D]``, D 512 (V4) or 576 (V3.2), T >= 0, H in 1..128, any strides with the last 1.
        swa_cache: the window's :class:`~dsv4x.PagedCache`, any layout of head dim D; kernels differ in those they read.
        swa_indices: int32 (or int64) ``[T, any]``, index space *slot* of ``swa_cache``, -1 for none.
        swa_lens: int32 (or int64) ``[T]`` scan spans, clamped to the width; None means the whole width.
        extra_cache, extra_indices, extra_lens: the same for the compressed cache, whose layout may be another; all None
            without one.
        attn_sink: float32 ``[H]`` or None; -inf has no effect, +inf makes out 0.
        softmax_scale: finite and > 0; None means 512 ** -0.5, and is refused for D = 576, whose model scales by
            192 ** -0.5 times its YaRN factor.
        out: bf16 ``[T, H, 512]``, any strides with the last 1; None allocates a contiguous one.
        kernel: ``"flash_mla"``, ``"gluon"``, ``"flashinfer"``, ``"triton"``, ``"aiter"`` or ``"reference"``, which
            runs or raises; None picks.
        trusted_indices: the caller vouches that lengths lie in ``[0, width]`` and that every index within them is -1
            or in range, which spares kernels that would fault on others (FlashMLA) a pass over the indices.
        schedule: a dict that lives as long as these lengths do, in which a kernel keeps what depends on lengths and
            shapes alone; :class:`~dsv4x.AttentionMetadata` owns one. None: nothing is kept. While a graph is captured
            only one that belongs to that capture alone is used, which says so as ``{"captured": True}``.
        swa_k_scale, extra_k_scale: the tensor scale a cache was stored with, finite and > 0; other than 1 only where
            its layout stores no scales (trtllm-native, uniform fp8).
        return_lse: whether the lse is wanted. Not all of AITER's kernels make one.
        split_k: batch-invariant mode: into how many parts, 1 to 128, each row's entries are split, whatever else is in
            the batch; equal rows then give equal bits. None lets the kernel decide from the shapes. Partial outputs
            take ``T * H * split_k * 2`` KiB above 1; under None at most about 132 MiB on 132 multiprocessors.
        heads: the leading heads of a padded q that count; the others may hold anything, NaN too. ``out`` may then have
            more heads, of which those past ``heads`` are left as they are, and ``attn_sink`` more values. None: every
            head of q, and as many in ``out`` and ``attn_sink``.
        local: with it ``extra_indices`` are local entries, index space *local*: compressed entries of the token's own
            request, which its :class:`~dsv4x.Local` makes slots of. A negative one, or one the token may not see, is no
            entry.
        entries: entries a token reads on average, where the caller knows: kernels are chosen and split by it instead of
            by the width of rows. Wrong, it costs time and no answer.
        workspace: uint8 ``[bytes]``, contiguous, on 16 bytes, at least :func:`scratch_bytes`: Triton's and Gluon's
            kernels keep their partial outputs in it. Vendors' libraries allocate theirs all the same. None: allocated.

    Returns:
        ``(out, lse)``: bf16 ``[T, H, 512]`` and float32 ``[T, H]``, or None for lse under ``return_lse=False``. H is
        ``heads`` where that is given, but for an ``out`` of the caller's, which comes back as it is.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride, device or layout; under ``DSV4X_CHECK=1``
            also an index outside its cache, a local entry its token may not see, a length past its row, or a NaN in q,
            with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: semantics of FlashMLA's ``flash_mla_with_kvcache`` (tests/ref.py) with two scopes.
    """
    check_values = checks.check_values_enabled()
    counted, tokens = check_q(q, heads), q.shape[0]
    if split_k is not None:
        checks.integer("split_k", split_k, 1, MAX_SPLITS)
    scopes: list[tuple[str, Any, Any, torch.Tensor | None]] = [("swa", swa_cache, swa_indices, swa_lens)]
    if extra_cache is not None or extra_indices is not None:
        scopes.append(("extra", extra_cache, extra_indices, extra_lens))
    elif extra_lens is not None:
        raise ValueError("extra_lens: given, need extra_cache and extra_indices with it")
    elif local is not None:
        raise ValueError("local: given, need extra_cache and extra_indices with it")
    k_scales = {"swa": swa_k_scale, "extra": extra_k_scale}
    for scope, cache, indices, lens in scopes:
        cache = check_cache(f"{scope}_cache", cache, q.device, q.shape[2])
        k_scales[scope] = checks.k_scale(f"{scope}_k_scale", k_scales[scope], cache)
        checks.tensor(f"{scope}_indices", indices, (tokens, None), checks.INDEX_DTYPES, q.device)
        if lens is not None:
            checks.tensor(f"{scope}_lens", lens, (tokens,), checks.INDEX_DTYPES, q.device)
        if local is not None and scope == "extra":
            check_local(local, tokens, cache)
        if check_values and local is not None and scope == "extra":
            checks.index_values("extra_indices", indices, lens, local.visible.clamp_min(0), "local entry")
        elif check_values:
            checks.index_values(f"{scope}_indices", indices, lens, cache.capacity, "slot")
    if check_values:
        checks.finite_rows("q", q[:, :counted], [lens for *_, lens in scopes])
    check_rest(q, attn_sink, out, heads)
    check_workspace(workspace, q.device)
    made = [Scope(cache, indices, lens, k_scales[name]) for name, cache, indices, lens in scopes]
    call = DecodeCall(
        q,
        made[0],
        made[1] if len(made) > 1 else None,
        attn_sink,
        scale_of(softmax_scale, q.shape[2]),
        out,
        counted,
        lse=return_lse,
        local=local,
        split_k=split_k,
        entries=0 if entries is None else checks.integer("entries", entries, 0),
        trusted=trusted_indices,
        schedule=schedule,
        workspace=workspace,
    )
    return _run(call, kernel)


def sparse_mla_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lens: torch.Tensor | None,
    attn_sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    out: torch.Tensor | None = None,
    kernel: str | None = None,
    *,
    trusted_indices: bool = False,
    return_lse: bool = True,
    heads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One softmax over a token's rows of a bf16 workspace; out, lse and sink as in :func:`sparse_mla_decode`.

    Args:
        q: bf16 ``[T, H, D]``, D 512 (V4) or 576 (V3.2), T >= 0, H in 1..128, any strides with the last 1.
        kv: bf16 ``[S, D]``, rows contiguous; a row nothing points at may hold anything.
        indices: int32 (or int64) ``[T, any]``, index space *workspace row*, -1 (or anything outside 0..S-1) for none.
        lens: int32 (or int64) ``[T]`` scan spans, clamped to the width; None means the whole width.
        attn_sink: float32 ``[H]`` or None.
        softmax_scale: finite and > 0; None means 512 ** -0.5, and is refused for D = 576, whose model scales by
            192 ** -0.5 times its YaRN factor.
        out: bf16 ``[T, H, 512]``, any strides with the last 1; None allocates a contiguous one.
        kernel: ``"flash_mla"``, ``"gluon"``, ``"triton"``, ``"aiter"`` or ``"reference"``, which runs or raises; None
            picks.
        trusted_indices: the caller vouches that lengths lie in ``[0, width]`` and no index past a span points at a NaN.
        return_lse: whether the lse is wanted. Not all of AITER's kernels make one.
        heads: the leading heads of a padded q that count, as in :func:`sparse_mla_decode`.

    Returns:
        ``(out, lse)``: bf16 ``[T, H, 512]`` and float32 ``[T, H]``, or None for lse under ``return_lse=False``. H is
        ``heads`` where that is given, but for an ``out`` of the caller's, which comes back as it is.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device; under ``DSV4X_CHECK=1`` also a row
            outside the workspace, a length past its row, or a NaN in q, with its row.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.

    Source: semantics of FlashMLA's ``flash_mla_sparse_fwd`` (tests/ref.py).
    """
    check_values = checks.check_values_enabled()
    counted, tokens = check_q(q, heads), q.shape[0]
    checks.tensor("kv", kv, (None, q.shape[2]), torch.bfloat16, q.device)
    checks.tensor("indices", indices, (tokens, None), checks.INDEX_DTYPES, q.device)
    if lens is not None:
        checks.tensor("lens", lens, (tokens,), checks.INDEX_DTYPES, q.device)
    if check_values:
        checks.index_values("indices", indices, lens, kv.shape[0], "workspace row")
        checks.finite_rows("q", q[:, :counted], [lens])
    check_rest(q, attn_sink, out, heads)
    scale = scale_of(softmax_scale, q.shape[2])
    call = PrefillCall(q, kv, indices, lens, attn_sink, scale, out, counted, return_lse, trusted_indices)
    return _run(call, kernel)


def problem_of(call: AttentionCall) -> AttentionProblem:
    """What a call's kernel is chosen by."""
    q = call.q
    tokens, _, head_dim = q.shape
    if isinstance(call, PrefillCall):
        return AttentionProblem.on(
            "sparse_mla_prefill",
            q.device,
            tokens=tokens,
            heads=call.heads,
            head_dim=head_dim,
            width=call.indices.shape[1],
            rows=call.kv.shape[0],
            lse=call.lse,
            out=call.out is not None,
        )
    extra = call.extra
    return AttentionProblem.on(
        "sparse_mla_decode",
        q.device,
        tokens=tokens,
        heads=call.heads,
        head_dim=head_dim,
        width=call.swa.indices.shape[1],
        extra_width=0 if extra is None else extra.indices.shape[1],
        entries=call.entries,
        caches=(call.swa.cache.spec,) if extra is None else (call.swa.cache.spec, extra.cache.spec),
        lse=call.lse,
        split_k=call.split_k or 0,
        out=call.out is not None,
    )


def _run(call: AttentionCall, kernel: str | None) -> Result:
    record = select(problem_of(call), kernel)
    if call.q.shape[0] == 0:
        lse = torch.empty(0, call.heads, dtype=torch.float32, device=call.q.device) if call.lse else None
        return output(call), lse
    return call_on(call.q.device, attend, record, call)


def scratch_bytes(problem: Problem, kernel: str | None = None) -> int:
    """At most how many bytes an attention op allocates beside its results, vendors' own allocations included.

    A ``workspace`` of as many is enough for every kernel that takes one. Two things are not counted: a copy of a
    prefill workspace whose rows do not begin on 16 bytes (32 for Gluon), and what libraries keep from call to call.

    Args:
        problem: of ``sparse_mla_decode`` or ``sparse_mla_prefill``.
        kernel: the kernel's name; None takes the one that would be chosen.

    Raises:
        ValueError: an op without scratch to speak of, or no kernel's name.
        KernelNotSupported, BackendUnavailable: no kernel, or not the one asked for, can run it.
    """
    if not isinstance(problem, AttentionProblem):
        raise ValueError(f"problem: of {problem.op}, need sparse_mla_decode or sparse_mla_prefill")
    record = select(problem, kernel)
    slots = 0 if record.remaps else tensor_bytes(problem.tokens * problem.extra_width, 4)
    return record.scratch_bytes(problem) + slots


def attend(record: Kernel, call: AttentionCall) -> Result:
    """Run an attention kernel; None for the lse where none is wanted, whatever the kernel made.

    Local entries are made slots of first where the kernel does not by itself.
    """
    if isinstance(call, DecodeCall) and call.local is not None and not record.remaps:
        call = _with_slots(call, call.local)
    out, lse = record.run(call)
    return out, lse if call.lse else None


def _with_slots(call: DecodeCall, local: Local) -> DecodeCall:
    extra = call.extra
    assert extra is not None
    slots = local_to_slots(
        extra.indices, local.request, local.visible, local.block_table, extra.cache.page_size, local.pages
    )
    return call._replace(extra=extra._replace(indices=slots), local=None)


def check_cache(name: str, value: object, device: torch.device, head_dim: int) -> PagedCache:
    """A cache that attention may read with q of ``head_dim`` values, on ``device``."""
    cache = checks.cache(name, value, device)
    if cache.layout.head_dim != head_dim:
        raise ValueError(
            f"{name}: entries of {cache.layout.head_dim} values ({cache.layout.name}), need {head_dim} as q has"
        )
    return cache


def check_q(q: torch.Tensor, heads: int | None) -> int:
    """Check q; returns how many of its heads count."""
    checks.tensor("q", q, (None, None, None), torch.bfloat16)
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"q: head dim is {q.shape[2]}, need {' or '.join(map(str, HEAD_DIMS))}")
    if heads is not None:
        return checks.integer("heads", heads, 1, min(q.shape[1], MAX_HEADS))
    check_heads(q)
    return q.shape[1]


def check_heads(q: torch.Tensor) -> None:
    """Check how many heads q has."""
    if not 1 <= q.shape[1] <= MAX_HEADS:
        raise ValueError(f"q: {q.shape[1]} heads, need 1 to {MAX_HEADS}")


def check_rest(
    q: torch.Tensor, attn_sink: torch.Tensor | None, out: torch.Tensor | None, heads: int | None = None
) -> None:
    """Check what stands beside q: of q's own heads, or with ``heads`` of at least so many."""
    exact = q.shape[1] if heads is None else None
    if attn_sink is not None:
        checks.tensor("attn_sink", attn_sink, (exact,), torch.float32, q.device)
        if heads is not None and attn_sink.shape[0] < heads:
            raise ValueError(f"attn_sink: {attn_sink.shape[0]} heads, need >= {heads}")
    if out is not None:
        checks.tensor("out", out, (q.shape[0], exact, VALUE_DIM), torch.bfloat16, q.device)
        if heads is not None and out.shape[1] < heads:
            raise ValueError(f"out: {out.shape[1]} heads, need >= {heads}")
        checks.rows_apart("out", out)


def check_workspace(workspace: torch.Tensor | None, device: torch.device) -> None:
    """Check a buffer for partial outputs."""
    if workspace is not None:
        checks.tensor("workspace", workspace, (None,), torch.uint8, device)
        if workspace.data_ptr() % ALIGNMENT:
            raise ValueError(f"workspace: address {workspace.data_ptr():#x}, need a multiple of {ALIGNMENT}")


def check_local(local: Local, tokens: int, cache: PagedCache) -> None:
    if not isinstance(local, Local):
        raise TypeError(f"local: got {type(local).__name__}, need a dsv4x.Local")
    checks.tensor("local.request", local.request, (tokens,), torch.int32, cache.device)
    checks.tensor("local.visible", local.visible, (tokens,), torch.int32, cache.device)
    checks.tensor("local.block_table", local.block_table, (None, None), torch.int32, cache.device)
    checks.integer("local.pages", local.pages, 0, cache.pages)


def scale_of(softmax_scale: object, head_dim: int) -> float:
    """The scale an argument means."""
    if softmax_scale is None:
        if head_dim != VALUE_DIM:
            raise ValueError(f"softmax_scale: got None, need the model's scale for q of {head_dim}")
        return VALUE_DIM**-0.5
    if not isinstance(softmax_scale, (int, float)) or isinstance(softmax_scale, bool):
        raise TypeError(f"softmax_scale: got {type(softmax_scale).__name__}, need a float or None")
    # FlashMLA takes the maximum before it scales, which only a positive scale allows.
    if not 0 < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale: got {softmax_scale}, need a finite number > 0")
    return float(softmax_scale)
