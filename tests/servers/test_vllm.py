"""The adapter for vLLM without vLLM: registration, what is asserted of the server, and who runs what."""

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dsv4x.servers.activation import Mismatch, Required
from dsv4x.servers.measured import Table
from dsv4x.servers.vllm import ARCHITECTURES, attention, contract, lookup, register
from dsv4x.servers.vllm.server import SERVER

FORWARD_MQA = "self, q, kv, positions, output"
DECODE = "self, q, kv_cache, swa_metadata, attn_metadata, swa_only, output"
PREFILL = "self, q, positions, compressed_k_cache, swa_k_cache, output, attn_metadata, swa_metadata"


class Registry:
    """vLLM's registry, as far as the entry point uses it."""

    def __init__(self, known):
        self.known, self.models = known, {}

    def get_supported_archs(self):
        return self.known

    def register_model(self, model_arch, model_cls):
        self.models[model_arch] = model_cls


@pytest.fixture(autouse=True)
def switches(monkeypatch):
    for name in ("DSV4X_VLLM", "DSV4X_SERVERS", "DSV4X_SERVERS_EXPLAIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(SERVER, "said", set())


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(SERVER, "say", lambda message, level: lines.append(message))
    return lines


@pytest.fixture
def vllm(monkeypatch):
    """A vLLM that has what the entry point needs; the version is to be set."""

    def put(version="0.33.0", known=tuple(ARCHITECTURES)):
        module = ModuleType("vllm")
        module.ModelRegistry = Registry(known)
        monkeypatch.setitem(sys.modules, "vllm", module)
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: version if name == "vllm" else pytest.fail(name)
        )
        return module.ModelRegistry

    return put


@pytest.mark.parametrize("version", ["0.30.0", "0.31.0", "0.32.0", "0.33.0", "0.33.0+cu130"])
def test_known_versions_get_strings_and_nothing_is_imported(version, vllm, said):
    registry = vllm(version)
    register()
    assert set(registry.models) == set(ARCHITECTURES)
    assert all(target.startswith("dsv4x.servers.vllm.models:") for target in registry.models.values())
    assert "dsv4x.servers.vllm.models" not in sys.modules
    assert said == []


@pytest.mark.parametrize(
    ("version", "known", "says"),
    [("0.34.0", tuple(ARCHITECTURES), "vllm is 0.34.0, need 0.30.0 or"),
     ("0.33.1", tuple(ARCHITECTURES), "vllm is 0.33.1"),
     ("0.33.0", ("DeepseekV4ForCausalLM",), "registry has no DeepseekV4ForConditionalGeneration")],
)  # fmt: skip
def test_what_does_not_fit_stays_out_and_says_so(version, known, says, vllm, said, monkeypatch):
    registry = vllm(version, known)
    register()
    assert registry.models == {}
    assert len(said) == 1
    assert says in said[0]
    assert "dsv4x stays out of vLLM" in said[0]
    monkeypatch.setenv("DSV4X_SERVERS", "require")
    with pytest.raises(Required, match="DSV4X_SERVERS=require"):
        register()


def test_the_switch_leaves_vllm_alone(vllm, monkeypatch):
    registry = vllm()
    monkeypatch.setenv("DSV4X_VLLM", "0")
    register()
    assert registry.models == {}


def test_the_entry_point_and_the_extra_are_there():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\ndsv4x = "dsv4x.servers.vllm:register"' in text
    extra = text.split("\nvllm = [")[1].split("]")[0]
    assert not any(vendor in extra for vendor in ("flash-mla", "deep-gemm", "flashinfer"))


def made(name, **methods):
    """A class with methods of these signatures."""
    body = {}
    for method, parameters in methods.items():
        exec(f"def {method}({parameters}): pass", body)
    body.pop("__builtins__", None)
    return type(name, (), body)


def cuda_class(**changed):
    signatures = {
        "forward_mqa": FORWARD_MQA, "bind_kv_cache": "self, kv_cache", "get_padded_num_q_heads": "num_heads",
        "_forward_decode": DECODE, "_forward_prefill": PREFILL,
    }  # fmt: skip
    return made("DeepseekV4FlashMLAAttention", **{**signatures, **changed})


def test_the_classes_signatures_are_asserted():
    contract.check_cuda_class(cuda_class())
    for method in ("forward_mqa", "bind_kv_cache", "_forward_decode", "_forward_prefill"):
        with pytest.raises(Mismatch, match=f"{method} takes \\(self, other\\), need \\(self, "):
            contract.check_cuda_class(cuda_class(**{method: "self, other"}))


def test_another_class_than_flash_mlas_is_left_alone(said):
    other = made("DeepseekV4FlashInferMLAAttention")
    assert lookup.selecting(lambda config: other)(None) is other
    assert "DeepseekV4FlashInferMLAAttention, need DeepseekV4FlashMLAAttention" in said[0]
    ours = lookup.selecting(lambda config: cuda_class())(None)
    assert issubclass(ours, attention.Attention)


def test_a_platform_nobody_read_is_named():
    nobody = SimpleNamespace(is_cuda=lambda: False, is_rocm=lambda: False, is_cpu=lambda: False)
    with pytest.raises(Mismatch, match="need CUDA, ROCm or CPU"):
        contract.platform_of(nobody)
    nobody.is_rocm = lambda: True
    assert contract.platform_of(nobody) == "rocm"


def layer_of(**changed):
    attributes = dict.fromkeys(contract._LAYER_ATTRIBUTES)
    attributes |= {
        "prefix": "model.layers.0.attn", "kv_cache_dtype": "fp8_ds_mla", "compress_ratio": 4, "n_local_heads": 16,
        "swa_cache_layer": SimpleNamespace(prefix="swa", kv_cache=None), "attn_sink": torch.zeros(16),
        "window_size": 128, "max_model_len": 4096, "max_num_batched_tokens": 1024,
        "topk_indices_buffer": torch.zeros(8, 512, dtype=torch.int32),
    }  # fmt: skip
    return SimpleNamespace(**{**attributes, **changed})


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"kv_cache_dtype": "bfloat16"}, "the KV cache is bfloat16, need fp8_ds_mla"),
     ({"compress_ratio": 2}, "compress ratio 2, need 1, 4 or 128")],
)  # fmt: skip
def test_a_layer_of_another_kind_is_vllms(changed, says):
    contract.check_layer(layer_of())
    with pytest.raises(Mismatch, match=says):
        contract.check_layer(layer_of(**changed))
    lacking = layer_of()
    del lacking.window_size
    with pytest.raises(Mismatch, match="window_size"):
        contract.check_layer(lacking)


ROW = {"piece": "decode", "ratio": 4, "heads": 16, "captured": False, "tokens": 8, "context": 32768}


def test_the_table_decides_and_the_switch_overrides(monkeypatch):
    from dsv4x.servers.measured import Row

    ahead, behind = Row(**ROW, ours_us=10, server_us=20), Row(**{**ROW, "piece": "extend"}, ours_us=30, server_us=20)
    layer = layer_of(_dsv4x_table=Table("sm_90", {}, (ahead, behind)))
    assert attention._verdict(layer, "decode", 8).ours
    assert not attention._verdict(layer, "extend", 8).ours
    assert "not measured" in attention._verdict(layer, "decode", 64).why
    monkeypatch.setenv("DSV4X_VLLM", "all")
    fresh = layer_of(_dsv4x_table=Table("sm_90", {}, (ahead, behind)))
    assert attention._verdict(fresh, "extend", 8).ours


def test_a_layer_that_nothing_was_measured_for_compiles_and_reserves_nothing(monkeypatch):
    from dsv4x.servers.measured import Row

    nothing = layer_of(_dsv4x_table=Table("gfx942", {}, ()), _dsv4x_out="")
    row = Row(**ROW, ours_us=10, server_us=20)
    assert not attention._takes_part(nothing)
    assert attention._takes_part(layer_of(_dsv4x_table=Table("sm_90", {}, (row,)), _dsv4x_out=""))
    monkeypatch.setenv("DSV4X_VLLM", "all")
    assert attention._takes_part(nothing)
    assert not attention._takes_part(layer_of(_dsv4x_table=Table("sm_90", {}, (row,)), _dsv4x_out="another cache"))


def test_what_runs_where_is_explained():
    nothing = attention.explain(Table("gfx942", {}, ()))
    assert "attention of prefill rows: vLLM" in nothing
    assert "nothing was measured on gfx942" in nothing
    assert "indexer and top-k: vLLM" in nothing


def window(**changed):
    fields = {"prefill_left_visible": None, "cache_slot_mapping": None, "num_prefill_tokens": 4}
    return {"swa": SimpleNamespace(**{**fields, **changed})}


def test_a_batch_that_is_not_ours_is_told(monkeypatch):
    layer = layer_of()
    assert attention._not_ours(layer, window()) == ""
    assert attention._not_ours(layer, [window()])
    assert attention._not_ours(layer, window(prefill_left_visible=torch.zeros(1)))
    assert attention._not_ours(layer, window(cache_slot_mapping=torch.zeros(1)))
    monkeypatch.setattr(attention, "capturing", lambda device: True)
    assert attention._not_ours(layer, window())
    assert attention._not_ours(layer, window(num_prefill_tokens=0)) == ""
    layer.swa_cache_layer.bounded_replay = True
    assert attention._not_ours(layer, window(num_prefill_tokens=0))


class Rocm:
    """vLLM's ROCm class, as far as the adapter goes: it pads no heads, and its projection takes rotated rows."""

    @classmethod
    def get_padded_num_q_heads(cls, num_heads):
        return num_heads

    def forward_mqa(self, q, kv, positions, output):
        raise AssertionError("vLLM's own attention ran")


@pytest.fixture
def rocm(monkeypatch):
    """One decode row over a window that gfx942's writer stored, in a vLLM for ROCm of a few functions."""
    from dsv4x import PagedCache, layouts, quantize_and_insert_k_cache

    monkeypatch.setenv("DSV4X_VLLM", "all")
    rotated, current = [], SimpleNamespace(is_fp8_fnuz=lambda: True)
    metadata = {}
    for name, values in (
        ("vllm", {}), ("vllm.platforms", {"current_platform": current}),
        ("vllm.forward_context", {"get_forward_context": lambda: SimpleNamespace(attn_metadata=metadata)}),
        ("vllm.v1", {}), ("vllm.v1.attention", {}), ("vllm.v1.attention.ops", {}),
        ("vllm.v1.attention.ops.rocm_aiter_mla_sparse",
         {"rocm_inverse_rope_rows_": lambda o, positions, cos_sin, dim: rotated.append((o, positions, cos_sin, dim))}),
    ):  # fmt: skip
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)

    def make(fnuz, fp8_weight=None):
        current.is_fp8_fnuz = lambda: fnuz
        rotated.clear()
        layout = layouts.DSV4.with_flavour("e4m3fnuz") if fnuz else layouts.DSV4
        cache = PagedCache.zeros(2, layout, 64, "cpu")
        k = torch.randn(128, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
        quantize_and_insert_k_cache(k, cache, torch.arange(128))
        ours = lookup.subclass_of(Rocm)
        layer = ours.__new__(ours)
        layer.__dict__.update(vars(layer_of(
            compress_ratio=1, _dsv4x_caches={}, _dsv4x_platform="rocm", _dsv4x_out="", scale=512**-0.5,
            swa_cache_layer=SimpleNamespace(prefix="swa", kv_cache=cache.servers_view.squeeze(2)),
            _wo_a_fp8_weight=fp8_weight,
            rotary_emb=SimpleNamespace(cos_sin_cache="cos and sin"), rope_head_dim=64,
        )))  # fmt: skip
        layer._dsv4x_table = Table("gfx942", {}, ())
        rows = torch.full((2, 1, 128), -1, dtype=torch.int32)
        rows[:, 0, :5] = torch.tensor([3, 70, 9, 100, 1])
        metadata["swa"] = SimpleNamespace(
            num_decode_tokens=2, num_prefill_tokens=0, prefill_left_visible=None, decode_swa_indices=rows,
            decode_swa_lens=torch.tensor([5, 0], dtype=torch.int32), flashinfer_sparse_index_cache={},
        )  # fmt: skip
        return layer, k, rotated

    return make


@pytest.mark.parametrize("fnuz", [True, False], ids=["gfx942", "gfx950"])
def test_on_rocm_the_window_has_its_own_flavour_and_rows_are_rotated_back(fnuz, rocm):
    layer, k, rotated = rocm(fnuz)
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(3, 16, 512, generator=draw).bfloat16()
    positions, out = torch.tensor([4, 0, 0]), torch.full((3, 16, 512), 7.0, dtype=torch.bfloat16)
    layer.forward_mqa(q, None, positions, out)
    seen = k[[3, 70, 9, 100, 1]].float()
    weights = torch.softmax(torch.cat([q[0].float() @ seen.T * 512**-0.5, layer.attn_sink[:, None]], 1), 1)[:, :5]
    # Entries are stored as e4m3.
    assert float((out[0].float() - weights @ seen).norm() / (weights @ seen).norm()) < 0.05
    assert (out[1] == 0).all()
    assert (out[2] == 7).all()
    (((rows, where, cos_sin, dim)),) = rotated
    assert rows.data_ptr() == out.data_ptr()
    assert rows.shape == (3, 16, 512)
    assert (where is positions, cos_sin, dim) == (True, "cos and sin", 64)


def test_on_rocm_rows_stay_as_they_are_where_the_projection_rotates(rocm):
    layer, _, rotated = rocm(True, fp8_weight=torch.zeros(1))
    q = torch.zeros(2, 16, 512, dtype=torch.bfloat16)
    layer.forward_mqa(q, None, torch.zeros(2, dtype=torch.long), torch.empty_like(q))
    assert rotated == []


def test_the_compressed_cache_keeps_ocps_flavour_on_rocm(rocm):
    layer, _, _ = rocm(True)
    layer.compress_ratio, layer.kv_cache = 4, layer.swa_cache_layer.kv_cache[:]
    swa, extra = attention._caches(layer)
    assert swa.layout.value_encoding == "e4m3fnuz"
    assert extra.layout.value_encoding == "e4m3fn"


def test_scratch_is_bounded_for_each_kind():
    for ratio in (1, 4, 128):
        assert attention.most_scratch(layer_of(compress_ratio=ratio), torch.device("cpu")) >= 0


def test_fields_of_the_contract_are_fields_of_the_code():
    """Each field that is asserted is one the adapter reads, so that no mismatch is for nothing."""
    text = Path(attention.__file__).read_text()
    for name in contract._WINDOW_FIELDS + contract._MAIN_FIELDS + contract._LAYER_ATTRIBUTES:
        assert f".{name}" in text or name == "kv_cache_dtype", name
