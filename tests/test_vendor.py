"""Vendor libraries as dsv4x sees them, and FlashMLA's wiring against a double that asserts FlashMLA's own limits."""

import dataclasses
import functools
import importlib
import inspect
import sys

import pytest
import torch
from calling import decode_call, prefill_call
from tolerances import check_decode, check_prefill

import dsv4x
from dsv4x import reference
from dsv4x.common.core import layouts
from dsv4x.common.core.errors import BackendUnavailable
from dsv4x.common.core.layouts import PagedCache
from dsv4x.common.core.vendor import VendorLibrary, aligned, is_aligned
from dsv4x.cuda import flash_mla

NAME = "dsv4x_test_vendor_module"
INF = float("inf")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a module, and the metadata of a distribution, where imports look."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(text, distribution=None, version="1.0"):
        (tmp_path / f"{NAME}.py").write_text(text)
        if distribution:
            info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")

    yield put
    sys.modules.pop(NAME, None)


def library(**fields):
    return VendorLibrary(NAME, ("dsv4x-right",), **{"hint": "pip install dsv4x-right", **fields})


def test_a_library_that_is_not_there_says_how_to_get_it():
    missing = library()
    assert missing.reason == f"{NAME} is not installed (pip install dsv4x-right)"
    assert missing.path is None
    with pytest.raises(BackendUnavailable, match="is not installed") as raised:
        missing.load()
    assert raised.value.__cause__ is None


def test_a_library_is_imported_on_first_use_and_once(install):
    install(
        "import builtins\nbuiltins.dsv4x_imports = getattr(builtins, 'dsv4x_imports', 0) + 1\n", "dsv4x-right", "2.5"
    )
    found = library()
    assert found.distribution == ("dsv4x-right", "2.5")
    assert found.path.endswith(f"{NAME}.py")
    assert NAME not in sys.modules
    assert found.reason is None
    assert found.load() is found.load() is sys.modules[NAME]
    assert found.describe() == {
        "module": NAME, "distribution": "dsv4x-right", "version": "2.5", "path": found.path, "usable": True,
        "reason": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("raises", "kind"),
    [("OSError('libcuda.so.1: cannot open shared object file')", OSError), ("RuntimeError('no device')", RuntimeError),
     ("ImportError('undefined symbol: _ZN3c10')", ImportError), ("ZeroDivisionError('x')", ZeroDivisionError)],
)  # fmt: skip
def test_whatever_an_import_raises_is_the_cause(raises, kind, install):
    install(f"raise {raises}\n")
    broken = library()
    assert broken.reason.startswith(f"import {NAME} failed: {kind.__name__}: ")
    with pytest.raises(BackendUnavailable) as raised:
        broken.load()
    assert type(raised.value.__cause__) is kind
    assert str(raised.value.__cause__) in str(raised.value)


@pytest.mark.parametrize(
    "raises", ["OSError('libx.so')", "ImportError('symbol')", "ModuleNotFoundError('y', name='y')"]
)
def test_a_submodule_of_a_broken_package_says_what_broke(raises, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "__init__.py").write_text(f"raise {raises}\n")
    broken = VendorLibrary(f"{NAME}.inside", ("dsv4x-right",), hint="pip install dsv4x-right")
    assert broken.reason.startswith(f"import {NAME}.inside failed: {raises.partition('(')[0]}: ")
    assert broken.path is None
    with pytest.raises(BackendUnavailable) as raised:
        broken.load()
    assert raised.value.__cause__ is not None
    missing = VendorLibrary(f"{NAME}_absent.inside", ("dsv4x-right",), hint="pip install dsv4x-right")
    assert missing.reason == f"{NAME}_absent.inside is not installed (pip install dsv4x-right)"


def test_an_assertion_without_a_message_still_says_where(install):
    install("HOME = None\nassert HOME is not None\n")
    reason = library().reason
    assert "AssertionError" in reason
    assert "assert HOME is not None" in reason
    assert f"{NAME}.py:2" in reason


def test_a_look_alike_is_told_by_its_distribution_and_never_imported(install):
    install("raise AssertionError('imported')\n", "dsv4x-wrong", "0.13")
    wrong = library(wrong={"dsv4x-wrong": "an asyncio package"})
    assert wrong.reason == f"{NAME} here is an asyncio package; pip install dsv4x-right"
    assert wrong.describe()["distribution"] == "dsv4x-wrong"
    assert NAME not in sys.modules


@pytest.mark.parametrize("version", ["0.1.7.post2.dev18", "0.1.16", "0.0.9+rocm7"])
def test_a_release_that_is_too_old_is_named_and_never_imported(version, install):
    install("raise AssertionError('imported')\n", "dsv4x-right", version)
    old = VendorLibrary(NAME, ("dsv4x-right>=0.1.17",), hint="pip install dsv4x-right")
    assert old.reason == f"dsv4x-right {version} is too old, need 0.1.17 or later; pip install dsv4x-right"
    assert NAME not in sys.modules


@pytest.mark.parametrize("version", ["0.1.17", "0.1.20.post1+rocm7", "0.2", "1.0.0", "0.1.dev7+gabc", "0.0.0"])
def test_a_newer_release_and_a_version_that_tells_nothing_are_taken(version, install):
    install("", "dsv4x-right", version)
    assert VendorLibrary(NAME, ("dsv4x-right>=0.1.17",), hint="pip install dsv4x-right").reason is None


def test_a_look_alike_without_metadata_is_told_by_what_it_lacks(install):
    install("present = 1\n")
    lacking = library(attributes=("present", "absent", "gone"))
    assert "has no absent, gone" in lacking.reason
    assert f"{NAME}.py" in lacking.reason
    assert lacking.reason.endswith("pip install dsv4x-right")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server package with a copy of the library, and whether it is imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "dsv4x_test_server").mkdir()
    (tmp_path / "dsv4x_test_server" / "__init__.py").write_text("")

    def put(text, imported=True):
        (tmp_path / "dsv4x_test_server" / "copy.py").write_text(text)
        if imported:
            importlib.import_module("dsv4x_test_server")

    yield put
    for name in ("dsv4x_test_server", "dsv4x_test_server.copy", NAME):
        sys.modules.pop(name, None)


COPY = "dsv4x_test_server.copy"


def test_a_servers_copy_is_used_in_that_server_alone(server, install):
    install("whose = 'own'\n", "dsv4x-right")
    server("whose = 'copy'\n", imported=False)
    assert library(before=(COPY,)).load().whose == "own"
    importlib.import_module("dsv4x_test_server")
    found = library(before=(COPY,))
    assert found.load().whose == "copy"
    assert found.module == found.describe()["module"] == COPY
    assert found.distribution == ("dsv4x_test_server", None)
    assert library(after=(COPY,)).load().whose == "own"


def test_a_servers_copy_that_does_not_import_leaves_the_library(server, install):
    install("whose = 'own'\n", "dsv4x-right")
    server("raise ImportError('built for another machine')\n")
    found = library(before=(COPY,))
    assert found.load().whose == "own"
    assert found.distribution == ("dsv4x-right", "1.0")


def test_a_servers_copy_without_the_library_says_why_it_fails(server):
    server("raise ImportError('built for another machine')\n")
    assert library(before=(COPY,)).reason == f"import {COPY} failed: ImportError: built for another machine"


def test_of_a_library_that_may_load_once_the_imported_build_is_taken(server, install):
    install("raise AssertionError('a second build')\n", "dsv4x-right")
    server("whose = 'copy'\n")
    importlib.import_module(COPY)
    assert library(after=(COPY,), namespace="dsv4x_nobodys").load().whose == "copy"


def test_no_build_is_imported_beside_anothers_operators(install):
    install("raise AssertionError('a second build')\n", "dsv4x-right")
    # torch's own operators stand for a build that was loaded under a name nobody knows.
    reason = library(namespace="aten").reason
    assert "torch.ops.aten" in reason
    assert NAME not in sys.modules


# FlashMLA.


@dataclasses.dataclass
class SchedMeta:
    """FlashMLA's scheduler object: filled by the first call, reused by later ones of the same shapes *and lengths*."""

    config: tuple | None = None
    lengths: list | None = None


class Double:
    """FlashMLA as measured (formats.md, section 5): it takes nothing that the real one would not, and answers right."""

    def __init__(self, generation):
        self.calls, self.metas, self.outs, self.prefill_heads = [], [], [], (64, 128)
        if generation == "use_legacy":
            self.flash_mla_with_kvcache = lambda *a, use_legacy=False, **k: self._decode(use_legacy, *a, **k)
            self.flash_mla_sparse_fwd = lambda *a, use_legacy=False, **k: self._prefill(use_legacy, *a, **k)
            self.has_legacy = lambda: True
        elif generation.startswith("vLLM's"):
            if generation == "vLLM's 0.33":

                def decode(*a, out=None, enable_batch_invariant=False, **k):
                    assert not enable_batch_invariant, "SM90 has no unsplit path"
                    return self._decode(True, *a, out=out, **k)

                self.flash_mla_with_kvcache, self.prefill_heads = decode, (8, 16, 32, 64, 128)
            else:
                self.flash_mla_with_kvcache = lambda *a, out=None, **k: self._decode(True, *a, out=out, **k)
            self.flash_mla_sparse_fwd = lambda *a, out=None, **k: self._prefill(True, *a, out=out, **k)
        elif generation == "upstream 2026.09.30":

            def flash_mla_with_kvcache(q, extra_k_cache=None, enable_batch_invariant=False):
                pytest.fail("it reads V4.1 pages only")

            def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
                assert q.shape[-1] == 512
                return self._prefill(True, q, kv, indices, sm_scale, d_v, attn_sink, topk_length)

            self.flash_mla_with_kvcache, self.flash_mla_sparse_fwd = flash_mla_with_kvcache, flash_mla_sparse_fwd
        else:
            self.flash_mla_with_kvcache = lambda *a, **k: self._decode(True, *a, **k)
            self.flash_mla_sparse_fwd = lambda *a, **k: self._prefill(True, *a, **k)

    def get_mla_metadata(self, *args, **kwargs):
        self.metas.append(SchedMeta())
        return self.metas[-1], None

    def _cache(self, k_cache):
        pages, page_size, one, entry = k_cache.shape
        assert k_cache.dtype == torch.uint8
        assert pages > 0
        layout = {584: layouts.DSV4, 656: layouts.DSV32}[entry]
        assert one == 1
        assert k_cache.stride()[1:] == (entry, entry, 1) or page_size == 1
        assert k_cache.stride(3) == 1
        assert pages == 1 or k_cache.stride(0) >= layout.page_stride(page_size)
        assert k_cache.data_ptr() % 16 == 0
        assert pages == 1 or k_cache.stride(0) % 16 == 0
        return PagedCache(k_cache, layout, page_size)

    def _indices(self, indices, lens, tokens, capacity, multiple):
        assert indices.dtype == torch.int32
        assert indices.shape[:2] == (tokens, 1)
        assert indices.shape[2] > 0
        assert indices.shape[2] % multiple == 0
        assert indices.stride(2) == 1
        self._steps(indices, 32)
        assert bool(((indices == -1) | ((indices >= 0) & (indices < capacity))).all()), "an illegal access"
        if lens is not None:
            assert lens.dtype == torch.int32
            assert lens.shape == (tokens,)
            assert lens.is_contiguous()
            assert bool(((lens >= 0) & (lens <= indices.shape[2])).all()), "a length past its row"
        return indices[:, 0]

    @staticmethod
    def _steps(tensor, size):
        """Tensor maps and vector loads, which look at the stride of one row too."""
        assert tensor.data_ptr() % size == 0
        for stride in tensor.stride()[:-1]:
            assert stride > 0
            assert stride * tensor.element_size() % size == 0

    def _heads(self, q, attn_sink, counts=(64, 128)):
        self._steps(q, 16)
        assert q.dtype == torch.bfloat16
        assert q.shape[-2] in counts
        assert q.shape[-1] in (512, 576)
        assert q.stride(-1) == 1
        assert q.shape[0] > 0
        if attn_sink is not None:
            assert attn_sink.dtype == torch.float32
            assert attn_sink.shape == (q.shape[-2],)
            assert attn_sink.is_contiguous()

    def _decode(
        self, use_legacy, q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
        softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, extra_k_cache=None,
        extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None, out=None,
    ):  # fmt: skip
        extra_indices = extra_indices_in_kvcache
        assert use_legacy, "only the legacy kernels read DSv4 pages"
        tokens, one = q.shape[:2]
        assert one == 1
        self._heads(q[:, 0], attn_sink)
        assert q.stride(1) % 8 == 0
        assert q.stride(0) % q.stride(1) == 0, "SM100 asserts it"
        assert block_table is cache_seqlens is num_splits is None
        assert (head_dim_v, causal, is_fp8_kvcache) == (512, False, True)
        assert type(softmax_scale) is float
        assert (extra_k_cache is None) == (extra_indices is None)
        cache = self._cache(k_cache)
        assert cache.layout.head_dim == q.shape[-1]
        if cache.layout is layouts.DSV32:
            assert topk_length is extra_k_cache is None, "the V3.2 kernel asserts both"
        rows = self._indices(indices, topk_length, tokens, cache.capacity, 64)
        extra = extra_rows = None
        if extra_k_cache is not None:
            extra = self._cache(extra_k_cache)
            extra_rows = self._indices(extra_indices, extra_topk_length, tokens, extra.capacity, 64)
        meta = tile_scheduler_metadata
        assert isinstance(meta, SchedMeta)
        config = (
            q.shape, k_cache.shape[1:3], indices.shape[-1],
            None if extra is None else extra_k_cache.shape[1], None if extra is None else extra_indices.shape[-1],
        )  # fmt: skip
        lengths = [None if x is None else x.tolist() for x in (topk_length, extra_topk_length)]
        if meta.config is None:
            meta.config, meta.lengths = config, lengths
        assert meta.config == config, "FlashMLA asserts that shapes are those of the first call"
        assert meta.lengths == lengths, "stale: FlashMLA would split this call by the first call's lengths"
        self.calls.append(tokens)
        values, lse = reference.sparse_mla_decode(
            q[:, 0], cache, rows, topk_length, extra, extra_rows, extra_topk_length, attn_sink, softmax_scale
        )
        return self._written(values[:, None], out), lse[:, None].contiguous().transpose(1, 2)

    def _written(self, values, out):
        if out is None:
            return values.bfloat16()
        assert out.shape == values.shape
        assert out.is_contiguous() or (out.dim() == 3 and out.shape[1] in (8, 16, 32) and out.stride(2) == 1)
        assert out.data_ptr() % 16 == 0
        self.outs.append(out.data_ptr())
        return out.copy_(values)

    def _prefill(self, use_legacy, q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, out=None):
        assert use_legacy
        self._heads(q, attn_sink, self.prefill_heads)
        assert kv.dtype == torch.bfloat16
        assert kv.shape[0] > 0
        assert kv.shape[1:] == (1, q.shape[-1])
        assert kv.stride(2) == 1
        self._steps(kv, 16)
        assert d_v == 512
        rows = self._indices(indices, topk_length, q.shape[0], kv.shape[0], 128)
        if topk_length is not None:
            past = torch.arange(rows.shape[1]) >= topk_length[:, None]
            pointed = rows[past & (rows >= 0)].long()
            assert not kv[pointed].isnan().any(), "a NaN row past topk_length can poison out"
        self.calls.append(q.shape[0])
        values, lse = reference.sparse_mla_prefill(q, kv[:, 0], rows, topk_length, attn_sink, sm_scale)
        return self._written(values, out), torch.full_like(lse, float("nan")), lse


GENERATIONS = ["use_legacy", "before use_legacy", "vLLM's", "vLLM's 0.33"]


@pytest.fixture(params=GENERATIONS)
def double(request, monkeypatch):
    return use_double(monkeypatch, request.param)


@pytest.fixture
def one_double(monkeypatch):
    return use_double(monkeypatch, "use_legacy")


def use_double(monkeypatch, generation, max_batch=1000):
    double = Double(generation)

    class Library:
        reason, path = None, "/site/flash_mla"

        def load(self):
            return double

    monkeypatch.setattr(flash_mla, "FLASH_MLA", Library())
    monkeypatch.setattr(flash_mla, "prefill_heads", lambda arch, module: double.prefill_heads)
    # A CPU has no shared memory to bound a batch by.
    monkeypatch.setattr(flash_mla, "max_batch", lambda heads, shared_memory: max_batch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return double


@pytest.fixture
def decode_case(make_cache, index_rows, rng):
    def make(
        tokens=3, heads=8, width=64, extra_width=None, page_size=64, spread=2, lens=True, sink=True, layout=layouts.DSV4
    ):
        q = 3 * torch.randn(tokens, heads, layout.head_dim, generator=rng).bfloat16()
        case = {"q": q, "swa_cache": None, "swa_indices": None, "swa_lens": None, "extra_cache": None,
                "extra_indices": None, "extra_lens": None}  # fmt: skip
        for scope, columns, size in (("swa", width, page_size), ("extra", extra_width, 2)):
            if columns is not None:
                cache, slots = make_cache(max(3, 40 // size), size, min(20, 3 * size), layout, spread=spread)
                case[f"{scope}_cache"], case[f"{scope}_indices"] = cache, index_rows(slots, tokens, columns)
                if lens:
                    case[f"{scope}_lens"] = torch.randint(0, columns + 1, (tokens,), dtype=torch.int32, generator=rng)
        case["attn_sink"] = torch.randn(heads, generator=rng) if sink else None
        return case

    return make


@pytest.fixture
def prefill_case(index_rows, rng):
    def make(tokens=3, heads=8, width=128, lens=True, sink=True):
        kv = torch.full((40, 512), float("nan"), dtype=torch.bfloat16)
        slots = torch.randperm(40, generator=rng)[:20]
        kv[slots] = (torch.randn(20, 512, generator=rng) / 10).bfloat16()
        return {
            "q": 3 * torch.randn(tokens, heads, 512, generator=rng).bfloat16(),
            "kv": kv,
            "indices": index_rows(slots, tokens, width),
            "lens": torch.randint(0, width + 1, (tokens,), dtype=torch.int32, generator=rng) if lens else None,
            "attn_sink": torch.randn(heads, generator=rng) if sink else None,
        }

    return make


def run_decode(case, out=None, **keywords):
    got, lse = flash_mla.decode(decode_call(**case, out=out, **keywords))
    want = reference.sparse_mla_decode(**case, softmax_scale=512**-0.5, dtype=torch.float64)
    check_decode(got, lse, *want)
    assert lse.is_contiguous()
    assert got is out if out is not None else got.is_contiguous()
    return got, lse


def run_prefill(case, out=None, **keywords):
    got, lse = flash_mla.prefill(prefill_call(**case, out=out, **keywords))
    check_prefill(got, lse, *reference.sparse_mla_prefill(**case, dtype=torch.float64))
    assert lse.is_contiguous()
    assert got is out if out is not None else got.is_contiguous()
    return got, lse


def odd_out(tokens, heads):
    around = torch.full((tokens, 2 * heads + 1, 600), 7.0, dtype=torch.bfloat16)
    out = around[:, 1 : 1 + heads, 40:552]
    out.fill_(float("nan"))
    return around, out


@pytest.mark.interpreter
@pytest.mark.parametrize("heads", [1, 8, 20, 64, 100, 128])
def test_decode_meets_flash_mlas_head_counts(heads, double, decode_case):
    run_decode(decode_case(heads=heads, extra_width=40))
    case = decode_case(heads=heads, sink=False)
    around, out = odd_out(3, heads)
    run_decode(case, out)
    out.fill_(7)
    assert (around == 7).all(), "wrote outside out"


def padded(case, wide, garbage=float("nan")):
    """q and sink of ``wide`` heads, those past the case's own of garbage."""
    q = torch.nn.functional.pad(case["q"], (0, 0, 0, wide - case["q"].shape[1]), value=garbage)
    sink = case["attn_sink"]
    return {**case, "q": q, "attn_sink": torch.nn.functional.pad(sink, (0, wide - len(sink)), value=garbage)}


@pytest.mark.interpreter
@pytest.mark.parametrize(("heads", "wide"), [(8, 64), (8, 128), (8, 9), (64, 128), (64, 100), (65, 128), (100, 200)])
def test_a_padded_q_is_handed_over_as_it_is(heads, wide, double, decode_case, prefill_case, monkeypatch):
    for run, oracle, check, name, case in (
        (lambda x: flash_mla.decode(decode_call(**x)), reference.sparse_mla_decode, check_decode,
         "flash_mla_with_kvcache", decode_case(heads=heads, extra_width=64)),
        (lambda x: flash_mla.prefill(prefill_call(**x)), reference.sparse_mla_prefill, check_prefill,
         "flash_mla_sparse_fwd", prefill_case(heads=heads)),
    ):  # fmt: skip
        seen, inner = [], getattr(double, name)
        counts = double.prefill_heads if name == "flash_mla_sparse_fwd" else (64, 128)
        needed = next(count for count in counts if heads <= count)

        @functools.wraps(inner)
        def watch(seen=seen, inner=inner, **given):
            seen.append(given["q"])
            return inner(**given)

        watch.__signature__ = inspect.signature(inner)
        monkeypatch.setattr(double, name, watch)
        wider = padded(case, wide)
        around = torch.full((3, heads + 3, 512), 7.0, dtype=torch.bfloat16)
        for out in (None, around):
            got, lse = run({**wider, "heads": heads, "out": out})
            check(got[:, :heads], lse, *oracle(**case, dtype=torch.float64))
        assert (around[:, heads:] == 7).all(), "wrote to heads that do not count"
        assert [q.shape[-2] for q in seen] == [needed, needed]
        assert all((q.data_ptr() == wider["q"].data_ptr()) == (wide >= needed) for q in seen)


def shifted(tensor, by, gap=0):
    """The same values ``by`` elements into memory, rows ``gap`` elements further apart."""
    *rows, width = tensor.shape
    wide = tensor.new_empty(*rows, width + gap + by)
    flat = tensor.new_empty(wide.numel() + by)
    view = flat[by:].view(wide.shape)[..., :width]
    return view.copy_(tensor)


@pytest.mark.interpreter
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(("by", "gap"), [(1, 0), (3, 5), (8, 4), (4, 4), (0, 1)])
@pytest.mark.parametrize("heads", [5, 64])
def test_what_is_off_its_alignment_is_copied(heads, by, gap, trusted, double, decode_case, prefill_case):
    for tokens in (1, 3):
        case = decode_case(tokens=tokens, heads=heads, extra_width=64)
        for name in ("q", "swa_indices", "extra_indices", "swa_lens", "extra_lens", "attn_sink"):
            case[name] = shifted(case[name], by, 0 if case[name].dim() == 1 else gap)
        run_decode(case, shifted(torch.empty(tokens, heads, 512).bfloat16(), by, gap), trusted_indices=trusted)
        rows = prefill_case(tokens=tokens, heads=heads)
        rows["lens"].fill_(128)
        for name in ("q", "kv", "indices", "lens", "attn_sink"):
            rows[name] = shifted(rows[name], by, 0 if rows[name].dim() == 1 else gap)
        run_prefill(rows, shifted(torch.empty(tokens, heads, 512).bfloat16(), by, gap), trusted_indices=trusted)


@pytest.mark.interpreter
def test_a_stride_that_torch_does_not_care_for_is_mended(one_double, decode_case):
    case = decode_case(tokens=1, heads=64)
    case["q"] = case["q"].as_strided((1, 64, 512), (3, 512, 1))
    case["swa_indices"] = case["swa_indices"].as_strided((1, 64), (1, 1))
    run_decode(case, trusted_indices=True)
    case = decode_case(tokens=3, heads=64)
    run_decode({**case, "q": case["q"][:1].expand(3, 64, 512)})


@pytest.mark.parametrize(
    ("shift", "strides", "base", "step", "well"),
    [
        (0, (64, 1), 16, 16, True),
        (4, (64, 1), 16, 16, True),
        (4, (64, 1), 32, 16, False),
        (1, (64, 1), 16, 16, False),
        (0, (66, 1), 16, 16, False),
        (0, (68, 1), 16, 16, True),
        (0, (68, 1), 16, 32, False),
        (0, (0, 1), 16, 16, False),
        (0, (64, 2), 16, 16, False),
    ],
)
def test_alignment_is_told_and_made(shift, strides, base, step, well):
    tensor = torch.arange(400, dtype=torch.int32)[shift:].as_strided((3, 16), strides)
    assert is_aligned(tensor, base, step) == well
    made = aligned(tensor, base, step)
    assert (made is tensor) == well
    assert torch.equal(made, tensor)
    assert is_aligned(made, base, step)


@pytest.mark.interpreter
def test_bf16_rows_go_to_upstreams_newest_release(monkeypatch, prefill_case):
    double = use_double(monkeypatch, "upstream 2026.09.30")
    run_prefill(prefill_case(heads=8))
    assert double.calls == [3]


@pytest.mark.interpreter
def test_a_build_that_takes_out_writes_into_the_callers(monkeypatch, decode_case, prefill_case):
    double = use_double(monkeypatch, "vLLM's")
    case, rows = decode_case(heads=64), prefill_case(heads=64)
    out = torch.empty(3, 64, 512, dtype=torch.bfloat16)
    run_decode(case, out)
    run_prefill(rows, out)
    assert double.outs == [out.data_ptr()] * 2
    # Where heads are padded, or the buffer is strided or begins in between, the result is copied.
    run_decode(decode_case(heads=8), torch.empty(3, 8, 512, dtype=torch.bfloat16))
    run_decode(case, odd_out(3, 64)[1])
    run_prefill(rows, torch.empty(3 * 64 * 512 + 4, dtype=torch.bfloat16)[4:].view(3, 64, 512))
    assert len(double.outs) == 2


@pytest.mark.interpreter
@pytest.mark.parametrize("width", [0, 1, 63, 64, 100])
@pytest.mark.parametrize("extra_width", [None, 0, 1, 63, 64, 100])
def test_decode_meets_flash_mlas_widths(width, extra_width, one_double, decode_case):
    for lens in (False, True):
        run_decode(decode_case(width=width, extra_width=extra_width, lens=lens))
    assert one_double.calls == [3, 3]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("width", [64, 100])
def test_decode_hands_over_no_index_that_would_fault(width, lens, dtype, one_double, decode_case):
    case = decode_case(tokens=6, width=width, extra_width=width)
    for scope in ("swa", "extra"):
        rows = case[f"{scope}_indices"] = case[f"{scope}_indices"].to(dtype)
        capacity = case[f"{scope}_cache"].capacity
        rows[:, 1], rows[:, 5], rows[:, 7], rows[:, 9] = capacity, -2, 2**31 - 1, -(2**31)
        if dtype == torch.int64:
            rows[:, 11], rows[:, 13] = 2**40, -(2**40)
        case[f"{scope}_lens"] = None
        if lens:
            case[f"{scope}_lens"] = torch.tensor([0, 3, 10, width, width + 1000, -5], dtype=dtype)
            rows[0] = 2**31 - 1
            rows[1, 3:] = capacity + 12345
    run_decode(case)


@pytest.mark.interpreter
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9])
def test_decode_splits_batches_past_the_limit(tokens, given, double, decode_case, monkeypatch):
    monkeypatch.setattr(flash_mla, "max_batch", lambda heads, shared_memory: 4)
    case = decode_case(tokens=tokens, heads=5, width=30, extra_width=20)
    around, out = odd_out(tokens, 5) if given else (None, None)
    run_decode(case, out)
    assert double.calls == [4] * (tokens // 4) + [tokens % 4] * (tokens % 4 > 0)
    if given:
        out.fill_(7)
        assert (around == 7).all(), "wrote outside out"


@pytest.mark.interpreter
@pytest.mark.parametrize("trusted", [False, True])
def test_a_schedule_is_filled_once_and_shared_by_layers(trusted, double, decode_case, monkeypatch):
    monkeypatch.setattr(flash_mla, "max_batch", lambda heads, shared_memory: 2)
    case = decode_case(tokens=5, width=64, extra_width=64)
    schedule = {}
    for _ in range(2):
        run_decode(case, schedule=schedule, trusted_indices=trusted)
    assert len(double.metas) == 3, "one scheduler for each part, not for each layer"
    # Layers of one step may differ in page size, widths and heads; each kind has its own scheduler.
    others = [
        decode_case(tokens=5, width=128, extra_width=64),
        decode_case(tokens=5, width=64, extra_width=128),
        decode_case(tokens=5, width=64),
        decode_case(tokens=5, width=64, extra_width=64, page_size=2),
        decode_case(tokens=5, heads=128, width=64, extra_width=64),
    ]
    for other in others:
        other["swa_lens"] = case["swa_lens"]
        if other["extra_lens"] is not None:
            other["extra_lens"] = case["extra_lens"]
        run_decode(other, schedule=schedule, trusted_indices=trusted)


@pytest.mark.interpreter
def test_other_lengths_take_another_schedule(one_double, decode_case):
    case = decode_case(tokens=4, width=64)
    run_decode(case, schedule={})
    run_decode({**case, "swa_lens": case["swa_lens"].flip(0) // 2}, schedule={})
    for lens in (case["swa_lens"], case["swa_lens"].flip(0) // 2):
        run_decode({**case, "swa_lens": lens})
    assert len(one_double.metas) == 4, "without a schedule nothing is kept"


def test_a_captured_call_keeps_no_scheduler(one_double, monkeypatch):
    """A replay must plan for the lengths it then finds, not for those of the eager step that shared the dict."""
    schedule = {}

    def scheduler():
        return flash_mla._scheduler(schedule, torch.device("cuda:0"), (0, (4, 64, 512), 64, 64))

    eager = scheduler()
    assert scheduler() is eager
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = scheduler()
    assert captured is not eager
    assert scheduler() is not captured
    assert list(schedule.values()) == [eager]
    # A graph that builds its lengths recomputes the scheduler with them, and no eager call may have that one.
    schedule = {"captured": True}
    shared = scheduler()
    assert scheduler() is shared
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert scheduler() is not shared


@pytest.mark.interpreter
def test_trusted_indices_of_the_right_shape_are_passed_as_they_are(one_double, decode_case, monkeypatch):
    case = decode_case(tokens=3, width=64, extra_width=128)
    untouched = (case["swa_indices"].data_ptr(), case["extra_indices"].data_ptr())
    seen = []
    inner = one_double.flash_mla_with_kvcache

    def watch(*, use_legacy=False, **given):
        seen.append((given["indices"].data_ptr(), given["extra_indices_in_kvcache"].data_ptr()))
        return inner(use_legacy=use_legacy, **given)

    one_double.flash_mla_with_kvcache = watch
    assert "use_legacy" in inspect.signature(watch).parameters
    run_decode(case, trusted_indices=True)
    assert seen == [untouched]
    run_decode(case)
    assert seen[1] != untouched


@pytest.mark.interpreter
def test_trusted_indices_of_a_wrong_shape_are_still_padded(one_double, decode_case):
    for width, extra_width in ((1, None), (100, 63), (0, 64)):
        run_decode(decode_case(width=width, extra_width=extra_width), trusted_indices=True)
    case = decode_case(width=64)
    run_decode({**case, "swa_indices": case["swa_indices"].long(), "swa_lens": case["swa_lens"].long()},
               trusted_indices=True)  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("pages", [0, 1])
def test_a_cache_of_one_page_or_none_is_served(pages, one_double, decode_case):
    case = decode_case(width=64, extra_width=64)
    empty = PagedCache.zeros(pages, layouts.DSV4, 64)
    run_decode({**case, "extra_cache": empty})
    run_decode({**case, "swa_cache": empty})


@pytest.mark.interpreter
@pytest.mark.parametrize("page_size", [1, 2, 61, 64])
def test_strided_pools_reach_flash_mla_by_their_stride(page_size, one_double, decode_case):
    run_decode(decode_case(width=64, page_size=page_size, spread=3))


@pytest.mark.interpreter
def test_q_and_sinks_may_be_strided(one_double, decode_case):
    case = decode_case(heads=64)
    wide = torch.full((3, 192, 512), float("nan"), dtype=torch.bfloat16)
    wide[:, 64:128] = case["q"]
    run_decode({**case, "q": wide[:, 64:128], "attn_sink": torch.tensor([INF, -INF] * 32)})


@pytest.mark.interpreter
@pytest.mark.parametrize("heads", [1, 8, 20, 64, 100, 128])
def test_prefill_meets_flash_mlas_head_counts(heads, double, prefill_case):
    run_prefill(prefill_case(heads=heads))
    case = prefill_case(heads=heads, sink=False)
    around, out = odd_out(3, heads)
    run_prefill(case, out)
    out.fill_(7)
    assert (around == 7).all(), "wrote outside out"


@pytest.mark.interpreter
@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("width", [0, 1, 63, 64, 100, 128, 129])
def test_prefill_meets_flash_mlas_widths(width, lens, one_double, prefill_case):
    run_prefill(prefill_case(width=width, lens=lens))
    run_prefill(prefill_case(width=width, lens=lens), trusted_indices=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_prefill_hands_over_no_row_that_would_fault_or_poison(dtype, one_double, prefill_case):
    case = prefill_case(tokens=5, width=128)
    rows = case["indices"] = case["indices"].to(dtype)
    rows[:, 1], rows[:, 5], rows[:, 7], rows[:, 9] = 40, -2, 2**31 - 1, -(2**31)
    case["lens"] = torch.tensor([0, 3, 12, 128, 129], dtype=dtype)
    nan_row = int(case["kv"].isnan().any(1).nonzero()[0])
    rows[0], rows[1, 3:] = nan_row, nan_row
    run_prefill(case)
    run_prefill({**case, "lens": -case["lens"]})


@pytest.mark.interpreter
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("layout", [layouts.DSV32, layouts.BF16_512, layouts.BF16_576], ids=lambda x: x.name)
def test_other_layouts_are_served(layout, lens, trusted, double, decode_case):
    """Lengths reach the V3.2 kernel as -1; a NaN row past a length does not reach the prefill kernel."""
    case = decode_case(width=64 if layout.nope_dim else 128, spread=1, lens=lens, layout=layout)
    if lens:
        past = torch.arange(case["swa_indices"].shape[1]) >= case["swa_lens"][:, None]
        garbage = torch.arange(int(past.sum()), dtype=torch.int32) % case["swa_cache"].capacity
        case["swa_indices"][past] = garbage
    run_decode(case, trusted_indices=trusted)
    run_decode(decode_case(width=9, heads=65, spread=1, layout=layout), trusted_indices=trusted)
    assert double.calls == [3, 3]


@pytest.mark.parametrize(("heads", "padded"), [(8, 64), (64, 64), (65, 128)])
def test_scratch_is_what_its_launcher_allocates(heads, padded):
    """``sparse_attn_decode_interface`` of 9241ae3, by hand: an arch that is not here is taken for 304 SMs."""
    spec = dsv4x.CacheSpec("DSv4", 64, 100, 37440)
    fields = {"tokens": 100, "heads": heads, "width": 128, "extra_width": 500, "caches": (spec, spec)}
    parts, rows = 304, 100 * padded
    floats = (100 + parts) * padded * 513 + rows * 2 + padded + 8 * parts + 101 + 100 * (128 + 512 + 2)
    least = 4 * floats + 2 * rows * 1024
    bound = flash_mla._decode_scratch(dsv4x.Problem("sparse_mla_decode", "cuda", "sm_90x", **fields))
    assert least <= bound <= least + 13 * 512
    more = {**fields, "tokens": 10**7}
    most = flash_mla._decode_scratch(dsv4x.Problem("sparse_mla_decode", "cuda", "sm_90x", **more))
    assert most < 4 * 2**30, "long batches are cut"


@pytest.mark.interpreter
def test_prefill_of_an_empty_workspace_is_served(one_double, prefill_case):
    case = prefill_case()
    run_prefill({**case, "kv": case["kv"][:0]})


@pytest.mark.interpreter
def test_the_wiring_is_what_the_registered_kernel_runs(one_double, decode_case, replaced):
    """From the public op down, on a machine that would choose FlashMLA."""
    from dsv4x.common.dispatch import registry

    case = decode_case(tokens=2, heads=20, extra_width=9)
    replaced(empty=["sparse_mla_decode", "sparse_mla_prefill"])
    flash_mla.register_kernels()
    record = registry.find("sparse_mla_decode", "flash_mla")
    replaced(dataclasses.replace(record, devices=("cpu",), archs=(), further_reasons=lambda problem: (), library=None))
    got = dsv4x.sparse_mla_decode(**case, kernel="flash_mla")
    check_decode(*got, *reference.sparse_mla_decode(**case, dtype=torch.float64))
    assert one_double.calls == [2]


def test_prefill_heads_are_told_by_signature_and_arch():
    new, old = Double("vLLM's 0.33"), Double("vLLM's")
    upstream = Double("before use_legacy")
    assert flash_mla.prefill_heads("sm_90", new) == (8, 16, 32, 64, 128)
    for arch, build in (("sm_100", new), ("sm_90", old), ("sm_90", upstream)):
        assert flash_mla.prefill_heads(arch, build) == (64, 128)


@pytest.mark.interpreter
def test_few_heads_are_prefilled_as_a_slice_of_the_servers_buffer(monkeypatch, prefill_case):
    double = use_double(monkeypatch, "vLLM's 0.33")
    case = prefill_case(heads=16)
    around = torch.full((3, 64, 512), 7.0, dtype=torch.bfloat16)
    got, _ = flash_mla.prefill(prefill_call(**padded(case, 64), heads=16, out=around))
    assert got is around
    assert double.outs == [around.data_ptr()]
    want = reference.sparse_mla_prefill(**case, dtype=torch.float64)
    check_prefill(around[:, :16], want[1].float(), *want)
    assert (around[:, 16:] == 7).all()
