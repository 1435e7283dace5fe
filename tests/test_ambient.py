"""What torch's ambient modes are set to changes no bit of a result: dtype, device, autocast, grad, inference, fill."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch

import dsv4x
from dsv4x import AttentionMetadata, PagedCache, TopkMethod, layouts, reference
from dsv4x.common.step import warmup as warmup_module

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
T, H, PAGES, SIZE = 3, 2, 4, 16
MAKERS = {"empty", "empty_strided", "zeros", "ones", "full", "arange", "linspace", "tensor", "as_tensor", "randn"}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def filled():
    """Deterministic algorithms, with what nobody wrote filled by torch."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "bfloat16": lambda device: default_dtype(BF16),
    "float64": lambda device: default_dtype(torch.float64),
    # Nothing can be computed there, so whatever was made without a device is noticed.
    "meta device": lambda device: default_device("meta"),
    "autocast": lambda device: torch.autocast(device, dtype=BF16),
    "inference": lambda device: torch.inference_mode(),
    "no_grad": lambda device: torch.no_grad(),
    "deterministic": lambda device: filled(),
}


class Given:
    """Arguments of every op, the same for each call."""

    def __init__(self, kernel, device):
        self.kernel, self.device = kernel, device
        self.random = torch.Generator("cpu").manual_seed(7)

    def normal(self, *shape, dtype=BF16):
        return torch.randn(*shape, generator=self.random, dtype=F32, device="cpu").to(self.device, dtype)

    def integers(self, low, high, *shape, dtype=I32):
        return torch.randint(low, high, shape, generator=self.random, dtype=dtype, device="cpu").to(self.device)

    def ints(self, values, dtype=I32):
        return torch.tensor(values, dtype=dtype, device=self.device)

    def cache(self, layout=layouts.DSV4):
        cache = PagedCache.zeros(PAGES, layout, SIZE, self.device)
        dsv4x.quantize_and_insert_k_cache(
            self.normal(cache.capacity, layout.head_dim), cache, self.ints(list(range(cache.capacity))),
            kernel="reference",
        )  # fmt: skip
        return cache

    def index_q(self, *shape):
        return self.normal(*shape, 128, dtype=F32).to(torch.float8_e4m3fn)

    def lengths(self):
        return self.ints([0, 1, 3]), self.ints([9, 30])

    def table(self):
        return self.ints([[0, 2], [1, 3]])


def decode(given):
    return {
        "q": given.normal(T, H, 512), "swa_cache": given.cache(), "swa_indices": given.integers(-1, 64, T, 8),
        "swa_lens": given.ints([8, 3, 0]), "extra_cache": given.cache(layouts.DSV41_FP4),
        "extra_indices": given.integers(-1, 64, T, 5), "extra_lens": given.ints([5, 0, 0]),
        "attn_sink": given.normal(H, dtype=F32),
    }  # fmt: skip


def prefill(given):
    return {
        "q": given.normal(T, H, 512), "kv": given.normal(9, 512), "indices": given.integers(-1, 9, T, 8),
        "lens": given.ints([8, 3, 0]), "attn_sink": given.normal(H, dtype=F32),
    }  # fmt: skip


def combine(given):
    starts, lengths = given.lengths()
    vectors = {name: given.ints([4, 4]) for name in ("gather_lens", "compressed_base", "swa_base")}
    return {
        "topk_indices": given.integers(-1, 7, T, 5), "query_start_loc": starts, "seq_lens": lengths, **vectors,
        "window_size": 4, "compress_ratio": 4, "topk": 5,
    }  # fmt: skip


def paged_logits(given):
    return {
        "q": given.index_q(2, 1, 32), "cache": given.cache(layouts.INDEXER_FP8),
        "weights": given.normal(2, 32, dtype=F32), "context_lens": given.ints([[9], [30]]),
        "block_table": given.table(), "max_context_len": 32,
    }  # fmt: skip


def flat_logits(given):
    return {
        "q": given.index_q(T, 32), "k": given.index_q(9), "k_scale": given.normal(9, dtype=F32).abs(),
        "weights": given.normal(T, 32, dtype=F32), "ks": given.ints([0, 2, 9]), "ke": given.ints([9, 5, 9]),
    }  # fmt: skip


def space(given):
    return {"block_table": given.table(), "page_size": SIZE, "pages": PAGES}


def step(given, ratio):
    starts, lengths = given.lengths()
    extra = {} if ratio == 1 else {"extra_page_size": SIZE, "extra_pages": PAGES, "extra_block_table": given.table()}
    return AttentionMetadata.build(
        starts, lengths, given.table(), compress_ratio=ratio, swa_page_size=SIZE, swa_pages=PAGES,
        window_size=8, **extra,
    )  # fmt: skip


def attention(ratio, path):
    def arguments(given):
        extra = None if ratio == 1 else given.cache()
        return {
            "q": given.normal(T, H, 512), "swa_cache": given.cache(), "extra_cache": extra,
            "topk_indices": given.integers(-1, 7, T, 4) if ratio == 4 else None, "ratio": ratio, "path": path,
            "attn_sink": given.normal(H, dtype=F32),
        }  # fmt: skip

    return arguments


def attend(ratio, given, **arguments):
    return dsv4x.sparse_mla_attention(meta=step(given, ratio), **arguments)


def insert(k, cache, slots, **options):
    dsv4x.quantize_and_insert_k_cache(k, cache, slots, **options)
    return cache


def converted(src, layout, **options):
    return dsv4x.convert_cache(src, PagedCache.zeros(PAGES, layout, SIZE, src.device), **options)


def moved(src, src_slots, dst_slots, **options):
    return dsv4x.copy_entries(src, src_slots, PagedCache.zeros(PAGES, src.layout, 20, src.device), dst_slots, **options)


# name -> (function, arguments); a function that takes `given` builds metadata in the mode too.
OPS = {
    "sparse_mla_decode": (dsv4x.sparse_mla_decode, decode),
    "sparse_mla_prefill": (dsv4x.sparse_mla_prefill, prefill),
    **{
        f"sparse_mla_attention {ratio} {path}": (attend, attention(ratio, path))
        for ratio, path in ((1, "direct"), (1, "gathered"), (4, "direct"), (4, "gathered"), (4, "referenced"),
                            (128, "direct"), (128, "gathered"))
    },
    **{
        f"quantize_and_insert_k_cache {layout.name}": (
            insert, lambda given, layout=layout: {
                "k": given.normal(T, layout.head_dim), "cache": given.cache(layout), "slots": given.ints([5, -1, 40]),
            },
        )
        for layout in (layouts.DSV4, layouts.DSV32, layouts.DSV41_FP4, layouts.BF16_512, layouts.INDEXER_FP4)
    },
    "dequantize_k_cache_paged": (
        dsv4x.dequantize_k_cache_paged, lambda given: {"cache": given.cache(), "slots": given.ints([5, -1, 40])}),
    "copy_entries": (
        moved, lambda given: {"src": given.cache(), "src_slots": given.ints([5, -1, 40]),
                              "dst_slots": given.ints([7, 8, 64])}),
    "requantize_fp8_to_block_scale": (
        dsv4x.requantize_fp8_to_block_scale,
        lambda given: {"cache": given.cache(layouts.TRTLLM_NATIVE), "k_scale": 0.7, "pages": given.ints([0, 3, -1])}),
    "convert_cache": (converted, lambda given: {"src": given.cache(), "layout": layouts.DSV41_FP8}),
    "gather_referenced_cache_blocks": (
        dsv4x.gather_referenced_cache_blocks,
        lambda given: {"cache": given.cache(), "indices": given.integers(-1, 64, T, 6)}),
    "gather_referenced_rows": (
        dsv4x.gather_referenced_rows,
        lambda given: {"cache": given.cache(), "indices": given.integers(-1, 64, T, 6)}),
    "combine_topk_swa_indices": (dsv4x.combine_topk_swa_indices, combine),
    "combine_swa_extra_indices": (
        dsv4x.combine_swa_extra_indices,
        lambda given: {"swa_indices": given.integers(-1, 9, T, 5), "swa_lens": given.ints([5, 2, 0]),
                       "extra_indices": given.integers(-1, 7, T, 4), "extra_lens": None, "s_kv_swa": 9}),
    "window_slots": (
        dsv4x.window_slots,
        lambda given: dict(zip(("query_start_loc", "seq_lens", "block_table"), (*given.lengths(), given.table())),
                           page_size=SIZE, pages=PAGES, window_size=8, tokens=T)),
    "build_swa_token_ids": (
        dsv4x.build_swa_token_ids,
        lambda given: dict(zip(("query_start_loc", "seq_lens"), given.lengths()), window_size=8, total=20)),
    "local_to_slots": (
        dsv4x.local_to_slots,
        lambda given: {"local": given.integers(-1, 32, T, 5), "request": given.ints([0, 1, -1]),
                       "limits": given.ints([9, 30, 9]), **space(given)}),
    "local_to_workspace_rows": (
        dsv4x.local_to_workspace_rows,
        lambda given: {"local": given.integers(-1, 32, T, 5), "request": given.ints([0, 1, -1]),
                       "limits": given.ints([9, 30, 9]), "bases": given.ints([0, 9])}),
    "slots_to_compact_slots": (
        dsv4x.slots_to_compact_slots,
        lambda given: {"slots": given.integers(-1, 64, T, 5), "page_map": given.ints([1, -1, 0, 2]),
                       "page_size": SIZE}),
    "dense_to_ragged": (
        dsv4x.dense_to_ragged,
        lambda given: {"indices": given.integers(-1, 9, T, 5), "lens": given.ints([5, 2, 0]), "capacity": 9}),
    "ragged_to_dense": (
        dsv4x.ragged_to_dense,
        lambda given: {"values": given.integers(-1, 9, 7), "indptr": given.ints([0, 3, 7]), "width": 5}),
    "paged_mqa_logits": (dsv4x.paged_mqa_logits, paged_logits),
    "mqa_logits": (dsv4x.mqa_logits, flat_logits),
    "get_paged_mqa_logits_metadata": (
        dsv4x.get_paged_mqa_logits_metadata,
        lambda given: {"context_lens": given.ints([[9], [30]]), "page_size": SIZE, "num_sms": 4}),
    "gather_indexer_k": (
        dsv4x.gather_indexer_k,
        lambda given: {"cache": given.cache(layouts.INDEXER_FP8), "slots": given.ints([5, -1, 40])}),
    "indexer_context_lens": (
        lambda kernel, **arguments: dsv4x.indexer_context_lens(**arguments),
        lambda given: {"seq_lens": given.ints([9, 30]), "next_n": 2, "compress_ratio": 4}),
    "paged_indexer_topk": (
        lambda kernel, **arguments: dsv4x.paged_indexer_topk(**arguments, kernel=kernel, topk_kernel=kernel),
        lambda given: {**paged_logits(given), "k": 4, "method": TopkMethod.PAGED}),
    "paged_indexer_topk of everything": (
        lambda kernel, **arguments: dsv4x.paged_indexer_topk(**arguments, kernel=kernel, topk_kernel=kernel),
        lambda given: {**paged_logits(given), "k": 40, "method": TopkMethod.LOCAL}),
    "indexer_topk": (
        lambda kernel, **arguments: dsv4x.indexer_topk(**arguments, kernel=kernel, topk_kernel=kernel),
        lambda given: {**flat_logits(given), "topk": 4, "method": TopkMethod.RAGGED}),
    "merge_attention_states": (
        dsv4x.merge_attention_states,
        lambda given: {"outs": given.normal(4, T, H, 512), "lses": given.normal(4, T, H, dtype=F32),
                       "attn_sink": given.normal(H, dtype=F32)}),
    "topk_transform": (
        dsv4x.topk_transform,
        lambda given: {"logits": given.normal(T, 9, dtype=F32), "lengths": given.ints([9, 2, 0]), "k": 4}),
}  # fmt: skip


def tensors(result):
    """Every tensor of a result as its bytes."""
    if isinstance(result, torch.Tensor):
        return [result.contiguous().reshape(-1).view(torch.uint8)]
    if isinstance(result, PagedCache):
        return tensors(result.data)
    values = result if isinstance(result, tuple) else vars(result).values()
    return [part for value in values if value is not None for part in tensors(value)]


def run(name, kernel, device, mode=contextlib.nullcontext):
    """The bytes of a result; arguments are made outside the mode, everything else inside."""
    function, arguments = OPS[name]
    given = Given(kernel, device)
    call = {**arguments(given), "kernel": kernel}
    if function is attend:
        call["given"] = given
    with mode():
        result = function(**call)
        return tensors(result)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPS)
def test_the_result_keeps_its_bits(name, mode, kernel_device):
    kernel, device = kernel_device
    expected = run(name, kernel, device)
    found = run(name, kernel, device, lambda: MODES[mode](device))
    assert len(found) == len(expected)
    for a, b in zip(expected, found):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["sparse_mla_decode", "sparse_mla_prefill", "quantize_and_insert_k_cache DSv4"])
def test_what_needs_a_gradient_gives_results_without_one(name, kernel_device):
    """A model's sink is a parameter."""
    kernel, device = kernel_device
    function, arguments = OPS[name]
    call = {**arguments(Given(kernel, device)), "kernel": kernel}
    for value in call.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_()
    result = function(**call)
    found = [result.data] if isinstance(result, PagedCache) else result
    assert not any(tensor.requires_grad for tensor in found)
    for a, b in zip(run(name, kernel, device), tensors(result)):
        assert torch.equal(a, b.detach())


@pytest.mark.parametrize("dtype", [F32, torch.float64])
def test_the_oracle_by_itself_is_deaf_to_autocast(dtype):
    call = decode(Given("reference", "cpu"))
    expected = reference.sparse_mla_decode(**call, dtype=dtype)
    with torch.autocast("cpu", dtype=BF16):
        found = reference.sparse_mla_decode(**call, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("layout", [layouts.DSV4, layouts.DSV32, layouts.INDEXER_FP8, layouts.DSV41_FP4])
def test_a_cache_made_under_inference_mode_is_written_whole(layout, kernel_device):
    kernel, device = kernel_device
    given = Given(kernel, device)
    k, slots = given.normal(T, layout.head_dim), given.ints([5, -1, 40])
    plain = PagedCache.zeros(PAGES, layout, SIZE, device)
    with torch.inference_mode():
        made = PagedCache.zeros(PAGES, layout, SIZE, device)
        touched = PagedCache.zeros(PAGES, layout, SIZE, device)
        assert not touched.page_bytes.any()
    touched_inside = PagedCache.zeros(PAGES, layout, SIZE, device)
    with torch.inference_mode():
        assert not touched_inside.page_bytes.any()
    for cache in (plain, made, touched, touched_inside):
        dsv4x.quantize_and_insert_k_cache(k, cache, slots, kernel=kernel)
        assert torch.equal(cache.data, plain.data)
    assert plain.data.any()


@pytest.mark.parametrize("mode", ["bfloat16", "float64", "meta device", "autocast", "inference"])
def test_warmup_names_no_argument_that_nobody_gave(mode, monkeypatch):
    # Batches of every size are test_warmup's matter.
    monkeypatch.setattr(warmup_module, "_TOKENS", (2,))
    monkeypatch.setattr(warmup_module, "_REQUESTS", (1,))
    monkeypatch.setattr(warmup_module, "least_part", lambda k: 64)
    caches = [PagedCache.zeros(PAGES, layouts.DSV4, SIZE, "cpu") for _ in range(2)]
    index = PagedCache.zeros(PAGES, layouts.INDEXER_FP8, 64, "cpu")
    with MODES[mode]("cpu"):
        assert dsv4x.warmup(*caches, heads=2, topk=4, window_size=8, index_cache=index, index_heads=32) == 0


def test_every_new_tensor_says_its_dtype_and_its_device():
    root = Path(dsv4x.__file__).parent
    vague = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS):
                continue
            if ast.unparse(node.func.value) == "torch" and not {"dtype", "device"} <= {k.arg for k in node.keywords}:
                vague.append(f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)}")
    assert not vague
