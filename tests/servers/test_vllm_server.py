"""The adapter in vLLM itself: vLLM's NVIDIA classes, builders and kernels, in Triton's interpreter (tox -e vllm)."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.interpreter

import vllm_server  # noqa: E402
from vllm.v1.worker import workspace  # noqa: E402
from vllm_server import as_dsv4x  # noqa: E402

from dsv4x.servers.activation import Mismatch, Required  # noqa: E402
from dsv4x.servers.vllm import ARCHITECTURES, attention, contract, lookup, register  # noqa: E402
from dsv4x.servers.vllm.server import SERVER  # noqa: E402

DECODES = ([700, 131, 5], [1, 1, 1])
PREFILLS = ([90, 300], [90, 40])
MIXED = ([700, 131, 5, 90, 300], [1, 1, 1, 90, 40])


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    return vllm_server.Rig(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def everything(monkeypatch):
    monkeypatch.setenv("DSV4X_VLLM", "all")
    monkeypatch.delenv("DSV4X_SERVERS", raising=False)


def gap(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize(("lens", "queries"), [DECODES, PREFILLS, MIXED], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize("index", range(4), ids=["window", "C4", "C128", "C4 again"])
def test_the_result_is_vllms(rig, index, lens, queries):
    layer, tokens = rig.layers[index], sum(queries)
    metadata, positions = rig.batch(rig.layers, lens, queries, padding=11)
    want = rig.run(layer, metadata, positions)
    with as_dsv4x(layer):
        got = rig.run(layer, metadata, positions)
    heads = layer.n_local_heads
    assert gap(got[:tokens, :heads], want[:tokens, :heads]) < 1e-3
    assert (got[tokens:] == 7).all(), "wrote rows that are padding"
    assert (got[:, heads:] == 7).all(), "paid for heads that are padding"


@pytest.mark.parametrize("index", range(3), ids=["window", "C4", "C128"])
def test_verify_rows_are_decode_rows(rig, index, monkeypatch):
    verifies = SimpleNamespace(num_speculative_tokens=2, parallel_drafting=False, use_dspark=lambda: False)
    monkeypatch.setattr(rig.config, "speculative_config", verifies)
    metadata, positions = rig.batch(rig.layers, [700, 131, 5], [3, 3, 2])
    layer = rig.layers[index]
    assert metadata[layer.swa_cache_layer.prefix].num_decode_tokens == 8
    want = rig.run(layer, metadata, positions)
    with as_dsv4x(layer):
        got = rig.run(layer, metadata, positions)
    assert gap(got[:, :16], want[:, :16]) < 1e-3


def spied(monkeypatch, name):
    calls, inner = [], getattr(attention, name)
    monkeypatch.setattr(attention, name, lambda *args: calls.append(name) or inner(*args))
    return calls


@pytest.mark.parametrize("reason", ["image spans", "replayed windows", "spread prefill", "not measured"])
def test_what_is_not_ours_is_vllms(rig, reason, monkeypatch):
    layer = rig.layers[1]
    metadata, positions = rig.batch(rig.layers, *MIXED)
    want = rig.run(layer, metadata, positions)
    window = metadata[layer.swa_cache_layer.prefix]
    if reason == "image spans":
        nothing = torch.zeros(len(positions), dtype=torch.int32)
        window.prefill_left_visible = window.prefill_right_visible = nothing
    elif reason == "replayed windows":
        monkeypatch.setattr(layer.swa_cache_layer, "bounded_replay", True)
    elif reason == "spread prefill":
        window.cache_slot_mapping = window.slot_mapping
    else:
        monkeypatch.setenv("DSV4X_VLLM", "1")
    ours = spied(monkeypatch, "_decode") + spied(monkeypatch, "_prefill")
    with as_dsv4x(layer):
        got = rig.run(layer, metadata, positions)
    assert torch.equal(got, want)
    assert ours == []


@pytest.mark.parametrize("mine", ["decode", "extend"])
def test_each_half_of_a_batch_is_who_was_ahead(rig, mine, monkeypatch):
    layer, tokens = rig.layers[1], sum(MIXED[1])
    metadata, positions = rig.batch(rig.layers, *MIXED)
    want = rig.run(layer, metadata, positions)
    verdict = attention.Verdict
    monkeypatch.setattr(attention, "_verdict", lambda layer, piece, tokens: verdict(piece == mine, ""))
    decodes, prefills = spied(monkeypatch, "_decode"), spied(monkeypatch, "_prefill")
    with as_dsv4x(layer):
        got = rig.run(layer, metadata, positions)
    assert (bool(decodes), bool(prefills)) == (mine == "decode", mine == "extend")
    heads = layer.n_local_heads
    assert gap(got[:tokens, :heads], want[:tokens, :heads]) < 1e-3


def test_micro_batches_are_vllms(rig):
    with as_dsv4x(rig.layers[0]) as layer:
        assert attention._not_ours(layer, [{}, {}])


def test_vllms_kernels_get_the_heads_they_need(rig):
    """A layer without padding, and a batch that is vLLM's all the same."""
    layer = rig.layers[2]
    metadata, positions = rig.batch(rig.layers, *DECODES)
    want = rig.run(layer, metadata, positions)
    sink = layer.attn_sink
    with as_dsv4x(layer):
        layer.attn_sink = torch.nn.Parameter(sink[:16].clone(), requires_grad=False)
        metadata[layer.swa_cache_layer.prefix].prefill_left_visible = positions
        got = rig.run(layer, metadata, positions, padded=16)
        assert "attn_sink" not in layer.__dict__
    layer.attn_sink = sink
    assert torch.equal(got, want[:, :16])


def test_the_profile_run_reserves_what_attention_takes(rig):
    manager = workspace.current_workspace_manager()
    layer = rig.layers[1]
    with as_dsv4x(layer):
        out = rig.run(layer, None, torch.zeros(5, dtype=torch.long))
        most = attention.most_scratch(layer, torch.device("cpu"))
    assert (out == 0).all()
    assert manager._current_workspaces[0].numel() >= attention._gathered_rows(layer) * 1024
    assert most >= 0


def test_new_caches_are_seen(rig):
    layer = rig.layers[1]
    metadata, positions = rig.batch(rig.layers, *DECODES)
    with as_dsv4x(layer):
        before = rig.run(layer, metadata, positions)
        pages, entries, size = layer.kv_cache.shape
        zeros = torch.zeros(pages, vllm_server.BLOCK_BYTES, dtype=torch.uint8)
        layer.bind_kv_cache(zeros.as_strided((pages, 1, entries, size), (vllm_server.BLOCK_BYTES, 0, size, 1)))
        metadata[layer.swa_cache_layer.prefix].flashinfer_sparse_index_cache.clear()
        after = rig.run(layer, metadata, positions)
        rig.bind(layer)
    assert not torch.equal(before, after)


def test_the_plugin_registers_every_architecture():
    from vllm import ModelRegistry

    register()
    for name in ARCHITECTURES:
        assert ModelRegistry.models[name].module_name == "dsv4x.servers.vllm.models"


def test_the_lookup_gives_the_subclass(rig, monkeypatch):
    import vllm.models.deepseek_v4.nvidia.model as model

    monkeypatch.setattr(model, "_select_dsv4_attn_cls", rig.select)
    lookup.put_in_place("cuda")
    cls = model._select_dsv4_attn_cls(rig.config)
    assert cls.__mro__[1:3] == (attention.Attention, rig.select(rig.config))
    assert cls.__name__ == "Dsv4xDeepseekV4FlashMLAAttention"


def test_a_layer_that_is_made_says_that_dsv4x_is_live(rig, monkeypatch):
    said = []
    monkeypatch.setattr(SERVER, "say", lambda message, level: said.append(message))
    monkeypatch.setattr(rig, "select", lookup.selecting(rig.select))
    layers = rig.make("another")
    assert [type(layer).__name__ for layer in layers] == ["Dsv4xDeepseekV4FlashMLAAttention"] * 4
    assert any("dsv4x is live in vLLM" in message for message in said)
    metadata, positions = rig.batch(layers, *MIXED)
    for layer, theirs in zip(layers, rig.layers):
        got = rig.run(layer, metadata, positions)
        for name in ("", ".swa_cache"):
            if f"{layer.prefix}{name}" in metadata:
                metadata[f"{theirs.prefix}{name}"] = metadata[f"{layer.prefix}{name}"]
        want = rig.run(theirs, metadata, positions)
        assert gap(got[:, :16], want[:, :16]) < 1e-3


@pytest.mark.parametrize("platform", ["cuda", "cpu"])
def test_a_field_that_went_is_a_mismatch(platform, monkeypatch):
    monkeypatch.setattr(contract, "_WINDOW_FIELDS", ("block_table", "no_such_field"))
    with pytest.raises(Mismatch, match="DeepseekSparseSWAMetadata has no no_such_field"):
        lookup.put_in_place(platform)


def test_a_mismatch_stops_a_server_that_requires_dsv4x(monkeypatch):
    monkeypatch.setattr(contract, "_WINDOW_FIELDS", ("no_such_field",))
    monkeypatch.setenv("DSV4X_SERVERS", "require")
    with pytest.raises(Required, match="no_such_field"):
        lookup.install.__wrapped__()
