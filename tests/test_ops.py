"""torch.ops.dsv4x: schemas and fakes that hold, and the same results compiled as eager."""

import pytest
import torch

import dsv4x
from dsv4x.common.core.layouts import DSV4, DSV32, UNIFORM_FP8, PagedCache

ops = torch.ops.dsv4x
WITH_GPU = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# The ops have no gradients; autograd_registration asserts what would happen if they had.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(params=WITH_GPU)
def device(request):
    return request.param


@pytest.fixture
def arguments(device, make_cache, index_rows, rng, on_device):
    """Positional arguments of every op, by name."""
    swa, slots = make_cache(2, 64, 20)
    extra, extra_slots = make_cache(8, 2, 10, spread=2)
    q = torch.randn(3, 4, 512, generator=rng).bfloat16().to(device)
    sink = torch.randn(4, generator=rng).to(device)
    indices, extra_indices = (index_rows(live, 3, 8).to(device) for live in (slots, extra_slots))
    lens = torch.tensor([8, 0, 5], dtype=torch.int32, device=device)
    kv = torch.randn(9, 512, generator=rng).bfloat16().to(device)
    rows = torch.randint(-1, 9, (3, 8), dtype=torch.int32, generator=rng).to(device)
    swa, extra = on_device(swa, device), on_device(extra, device)
    k = torch.randn(5, 512, generator=rng).bfloat16().to(device)
    return {
        "quantize_and_insert_k_cache": (k, swa.data.clone(), "DSv4", 64, torch.arange(5, device=device)),
        "dequantize_k_cache_paged": (swa.data, "DSv4", 64, slots.to(device)),
        "copy_entries": (
            swa.data, "DSv4", 64, torch.arange(5, device=device), extra.data.clone(), 2,
            torch.tensor([3, -1, 0, 99, 7], dtype=torch.int32, device=device),
        ),
        "local_to_slots": (
            torch.randint(-1, 30, (3, 8), dtype=torch.int32, generator=rng).to(device),
            torch.tensor([0, 1, -1], device=device), torch.tensor([9, 30, 9], device=device),
            torch.tensor([[0, 2], [1, 3]], dtype=torch.int32, device=device), 16, 4,
        ),
        "sparse_mla_decode": (
            q, swa.data, "DSv4", 64, indices, lens, extra.data, "DSv4", 2, extra_indices, lens, sink, None,
            torch.zeros_like(q),
        ),
        "sparse_mla_prefill": (q, kv, rows, lens, sink, 0.05, torch.zeros_like(q)),
        "merge_attention_states": (
            torch.randn(2, 3, 4, 512, generator=rng).bfloat16().to(device),
            torch.randn(2, 3, 4, generator=rng).to(device), sink, torch.zeros_like(q),
        ),
    }  # fmt: skip


def eager(name, args):
    """The public function's results for an op's arguments: what it returns and what it writes."""
    if name == "quantize_and_insert_k_cache":
        k, data, _, page_size, slots = args
        dsv4x.quantize_and_insert_k_cache(k, PagedCache(data, DSV4, page_size), slots)
        return [data]
    if name == "dequantize_k_cache_paged":
        data, _, page_size, slots = args
        return [dsv4x.dequantize_k_cache_paged(PagedCache(data, DSV4, page_size), slots)]
    if name == "copy_entries":
        src, _, src_page, src_slots, dst, dst_page, dst_slots = args
        dsv4x.copy_entries(PagedCache(src, DSV4, src_page), src_slots, PagedCache(dst, DSV4, dst_page), dst_slots)
        return [dst]
    if name == "sparse_mla_decode":
        q, swa, _, swa_page, indices, lens, extra, _, extra_page, extra_indices, extra_lens, sink, scale, out = args
        extra = None if extra is None else PagedCache(extra, DSV4, extra_page)
        swa = PagedCache(swa, DSV4, swa_page)
        return list(dsv4x.sparse_mla_decode(q, swa, indices, lens, extra, extra_indices, extra_lens, sink, scale, out))
    result = getattr(dsv4x, name)(*args)
    return [result] if isinstance(result, torch.Tensor) else list(result)


def called(name, args):
    """The same through the op: its return value and the argument it writes."""
    result = getattr(ops, name)(*args)
    written = {"quantize_and_insert_k_cache": 1, "copy_entries": 4}.get(name)
    if written is not None:
        assert result is None
        return [args[written]]
    return [result] if name in ("dequantize_k_cache_paged", "local_to_slots") else [args[-1], result]


def copied(args):
    """Copies with the same strides: a clone of a cache would close the gaps between its pages."""

    def copy(value):
        if not isinstance(value, torch.Tensor):
            return value
        raw = value.new_empty(0).set_(value.untyped_storage()).clone()
        return raw.as_strided(value.shape, value.stride(), value.storage_offset())

    return tuple(copy(value) for value in args)


NAMES = [
    "quantize_and_insert_k_cache", "dequantize_k_cache_paged", "copy_entries", "local_to_slots",
    "sparse_mla_decode", "sparse_mla_prefill", "merge_attention_states",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_and_the_fake_tell_the_truth(name, arguments):
    torch.library.opcheck(getattr(ops, name).default, arguments[name], test_utils=CHECKS)


def test_the_fakes_hold_without_optional_arguments(arguments):
    q, swa, layout, page, indices, *_ = arguments["sparse_mla_decode"]
    alone = (q, swa, layout, page, indices, None, None, "", 0, None, None, None, None, torch.zeros_like(q))
    torch.library.opcheck(ops.sparse_mla_decode.default, alone, test_utils=CHECKS)
    q, kv, rows, *_ = arguments["sparse_mla_prefill"]
    bare = (q, kv, rows, None, None, None, torch.zeros_like(q))
    torch.library.opcheck(ops.sparse_mla_prefill.default, bare, test_utils=CHECKS)
    outs, lses, _, out = arguments["merge_attention_states"]
    torch.library.opcheck(ops.merge_attention_states.default, (outs, lses, None, out), test_utils=CHECKS)


def test_the_fake_knows_each_layouts_width(device):
    data = PagedCache.zeros(2, DSV32, 64, device).data
    args = (data, "DSv3.2", 64, torch.arange(3, device=device))
    assert ops.dequantize_k_cache_paged(*args).shape == (3, 576)
    torch.library.opcheck(ops.dequantize_k_cache_paged.default, args, test_utils=CHECKS)


@pytest.mark.parametrize("name", NAMES)
def test_op_and_function_agree(name, arguments):
    args = arguments[name]
    want = eager(name, copied(args))
    for a, b in zip(called(name, copied(args)), want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_without_a_graph_break_gives_the_same(name, arguments):
    args = arguments[name]
    want = eager(name, copied(args))
    compiled = torch.compile(lambda *a: called(name, a), fullgraph=True, backend="eager")
    for a, b in zip(compiled(*copied(args)), want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_sees_what_the_op_before_it_wrote(backend, device, rng):
    """Functionalization must carry the cache's mutation from the insert to the attention that reads it."""

    def step(k, q, data, slots, indices, out):
        ops.quantize_and_insert_k_cache(k * 0.5, data, "DSv4", 64, slots)
        lse = ops.sparse_mla_decode(q * 2, data, "DSv4", 64, indices, None, None, "", 0, None, None, None, None, out)
        return out + 1, lse, ops.dequantize_k_cache_paged(data, "DSv4", 64, slots)

    def fresh():
        data = PagedCache.zeros(2, DSV4, 64, device).data
        return k, q, data, torch.arange(5, device=device), indices, torch.zeros_like(q)

    k, q = (torch.randn(*shape, generator=rng).bfloat16().to(device) for shape in ((5, 512), (3, 4, 512)))
    indices = torch.randint(0, 5, (3, 6), dtype=torch.int32, generator=rng).to(device)
    plain, compiled = fresh(), fresh()
    want = step(*plain)
    got = torch.compile(step, fullgraph=True, backend=backend)(*compiled)
    for a, b in zip((*got, compiled[2], compiled[5]), (*want, plain[2], plain[5])):
        assert torch.equal(a, b)
    assert want[1].isfinite().all()


def test_a_compiled_op_takes_other_batch_sizes(device, rng):
    """One graph for all T: the fakes must not pin a size."""
    compiled = torch.compile(ops.sparse_mla_prefill, fullgraph=True, backend="eager", dynamic=True)
    kv = torch.randn(20, 512, generator=rng).bfloat16().to(device)
    for tokens in (2, 3, 7):
        q = torch.randn(tokens, 4, 512, generator=rng).bfloat16().to(device)
        rows = torch.randint(-1, 20, (tokens, 8), dtype=torch.int32, generator=rng).to(device)
        out = torch.empty_like(q)
        want = dsv4x.sparse_mla_prefill(q, kv, rows, None)
        assert torch.equal(compiled(q, kv, rows, None, None, None, out), want[1])
        assert torch.equal(out, want[0])


def test_each_cache_has_its_own_layout_and_scale(device, rng):
    swa, extra = (PagedCache.zeros(2, layout, 64, device) for layout in (DSV4, UNIFORM_FP8))
    k = (torch.randn(20, 512, generator=rng) / 10).bfloat16().to(device)
    for cache, k_scale in ((swa, 1.0), (extra, 0.02)):
        dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(20, device=device), k_scale=k_scale)
    q = torch.randn(2, 4, 512, generator=rng).bfloat16().to(device)
    rows = torch.arange(40, dtype=torch.int32, device=device).view(2, 20) % 20
    args = (q, swa.data, "DSv4", 64, rows, None, extra.data, "uniform fp8", 64, rows, None, None, None)
    args = (*args, torch.zeros_like(q), 1.0, 0.02)
    torch.library.opcheck(ops.sparse_mla_decode.default, args, test_utils=CHECKS)
    want = dsv4x.sparse_mla_decode(q, swa, rows, None, extra, rows, None, extra_k_scale=0.02)
    assert torch.equal(ops.sparse_mla_decode(*args), want[1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_move_within_one_pool_is_seen_and_takes_other_sizes(backend, device, rng):
    """One pool is both arguments, and the read behind the move finds what it wrote; one graph for all N."""

    def move(data, src_slots, dst_slots):
        ops.copy_entries(data, "DSv4", 64, src_slots, data, 64, dst_slots)
        return ops.dequantize_k_cache_paged(data, "DSv4", 64, dst_slots)

    made = []

    def counted(graph, example):
        made.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    compiled = torch.compile(move, fullgraph=True, dynamic=True, backend=counted)
    k = torch.randn(20, 512, generator=rng).bfloat16().to(device)
    for count in (3, 5, 9):
        cache = PagedCache.zeros(2, DSV4, 64, device)
        dsv4x.quantize_and_insert_k_cache(k, cache, torch.arange(20, device=device))
        src_slots, dst_slots = torch.arange(count, device=device), torch.arange(count, device=device) + 100
        want = dsv4x.dequantize_k_cache_paged(cache, src_slots)
        assert torch.equal(compiled(cache.data, src_slots, dst_slots), want)
        assert torch.equal(dsv4x.dequantize_k_cache_paged(cache, dst_slots), want)
    assert len(made) == 1


def test_the_fake_of_a_move_checks_what_the_op_checks(arguments):
    args = list(arguments["copy_entries"])
    shapes = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    for at, value, says in (
        (6, torch.zeros(4, dtype=torch.int64), r"dst_slots: shape is \(4,\), need \(5\)"),
        (3, torch.zeros(5), "src_slots: dtype is float32"),
        (1, "DSv9", "layout: got 'DSv9'"),
        (5, 4096, "data: rows of"),
    ):
        value = value.to(args[0].device) if isinstance(value, torch.Tensor) else value
        wrong = [*args[:at], value, *args[at + 1 :]]
        with pytest.raises((TypeError, ValueError), match=says):
            ops.copy_entries(*wrong)
        with pytest.raises((TypeError, ValueError), match=says):
            under(shapes, wrong)


def under(mode, args, op=ops.copy_entries):
    """The op's fake, asked with fake tensors."""
    fake = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in args]
    with mode:
        return op(*fake)


def test_the_fake_of_a_remap_checks_what_the_op_checks(arguments):
    args = list(arguments["local_to_slots"])
    mode = torch._subclasses.FakeTensorMode()
    for at, value, says in (
        (1, args[1][:2], r"request: shape is \(2,\), need \(3\)"),
        (3, args[3].long(), "block_table: dtype is int64, need int32"),
        (4, 0, "page_size: got 0"),
    ):
        wrong = [*args[:at], value, *args[at + 1 :]]
        with pytest.raises((TypeError, ValueError), match=says):
            ops.local_to_slots(*wrong)
        with pytest.raises((TypeError, ValueError), match=says):
            under(mode, wrong, ops.local_to_slots)


@pytest.mark.parametrize("name", NAMES)
def test_an_op_takes_a_kernels_name(name, arguments):
    args = arguments[name]
    with pytest.raises(ValueError, match="kernel: got 'none', need one of"):
        getattr(ops, name)(*copied(args), kernel="none")
    torch.library.opcheck(getattr(ops, name).default, args, {"kernel": "reference"}, test_utils=CHECKS)


def test_decode_takes_fixed_splits(arguments):
    args = arguments["sparse_mla_decode"]
    with pytest.raises(ValueError, match="split_k: got 0, need 1 to 128"):
        ops.sparse_mla_decode(*args, split_k=0)
    more = {"split_k": 2, "kernel": "reference"}
    with pytest.raises(dsv4x.KernelNotSupported, match="split"):
        ops.sparse_mla_decode(*args, **more)


def test_an_unknown_layout_is_named(arguments):
    data, _, page_size, slots = arguments["dequantize_k_cache_paged"]
    with pytest.raises(ValueError, match=r"layout: got 'DSv9', need one of DSv4, DSv3.2"):
        ops.dequantize_k_cache_paged(data, "DSv9", page_size, slots)


def test_errors_reach_the_caller_as_they_are(arguments):
    q, kv, rows, lens, sink, scale, out = arguments["sparse_mla_prefill"]
    with pytest.raises(TypeError, match="q: dtype is float32, need bfloat16"):
        ops.sparse_mla_prefill(q.float(), kv, rows, lens, sink, scale, out)
