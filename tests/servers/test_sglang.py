# ruff: noqa: E402  what SGLang is to find comes before its import
"""The adapter in SGLang 0.5.23 itself, on a CPU: registration, what goes to SGLang, and its own kit. Needs sglang."""

import copy
import importlib.util
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed; tox run -e sglang", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: SGLang's own kernels run in the interpreter", allow_module_level=True)

import sglang_kit

sglang_kit.prepare("cpu")

import sglang.test.kits.attention_unittest.attention_methods.dsv4_attention as kit
from sglang.srt.layers.attention import attention_registry, deepseek_v4_backend, deepseek_v4_trtllm_backend
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang_server import Mode, Pools, Server, oracle, queries, select

from dsv4x.servers import sglang as adapter
from dsv4x.servers.activation import Mismatch, Required
from dsv4x.servers.measured import Row, Table
from dsv4x.servers.sglang import cuda, rocm
from dsv4x.servers.sglang.server import SERVER

POOLS = Pools("cpu", (0, 4, 128), 4096, 64 * 256, 32 * 256, 4)
HEADS = 8


@pytest.fixture(autouse=True)
def poisoned_scratch():
    """Not poisoned here: SGLang allocates what it never writes and never reads."""


@pytest.fixture(autouse=True, scope="module")
def stubbed():
    sglang_kit.stub_cpu(kit)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setenv("DSV4X_SGLANG", "all")
    monkeypatch.delenv("DSV4X_SERVERS", raising=False)
    monkeypatch.delenv("DSV4X_SERVERS_EXPLAIN", raising=False)
    monkeypatch.setattr(SERVER, "said", set())


@pytest.fixture
def clean(monkeypatch):
    """SGLang's registry and factories as they were, to be registered with anew."""
    monkeypatch.setattr(adapter, "_prepared", [])
    theirs = attention_registry.create_dsv4_backend
    monkeypatch.setitem(attention_registry.ATTENTION_BACKENDS, "dsv4", theirs)
    for name in ("create_deepseek_v4_attn_backend", "create_deepseek_v4_multistep_backend"):
        monkeypatch.setattr(deepseek_v4_trtllm_backend, name, FACTORIES[name])


FACTORIES = {
    name: getattr(deepseek_v4_trtllm_backend, name)
    for name in ("create_deepseek_v4_attn_backend", "create_deepseek_v4_multistep_backend")
}


@pytest.fixture
def server(request):
    prefixes, extends, mode = getattr(request, "param", ([300, 0], [20, 5], Mode.EXTEND))
    return Server(POOLS, prefixes, extends, mode)


def of(server, heads=HEADS, made=None):
    return server.backend(made or cuda.Dsv4xAttnBackend, heads)


def layer(layer_id, heads=HEADS):
    return SimpleNamespace(layer_id=layer_id, tp_q_head_num=heads, v_head_dim=512)


def call(backend, batch, q, sink, layer_id, heads=HEADS, **options):
    given = {"save_kv_cache": False, "attn_sink": sink, **options}
    return backend.forward(
        q=q, k=q, v=q, layer=layer(layer_id, heads), forward_batch=batch, compress_ratio=POOLS.kinds[layer_id], **given
    )


def began(backend, server):
    batch = server.batch()
    backend.init_forward_metadata(batch)
    backend.resolve_prefill_shared_read_ends(batch, num_qo_tokens=sum(server.extends))
    select(server, backend)
    return batch


def same(server, backend, out, q, sink, layer_id, heads=HEADS):
    rows = torch.arange(sum(server.extends))
    want = oracle(server, backend, layer_id, (q, sink, heads), rows)
    torch.testing.assert_close(out[rows, :heads].float(), want, atol=2e-2, rtol=0)


# Registration.


@pytest.mark.usefixtures("clean")
def test_sglangs_plugin_loader_finds_and_runs_it(monkeypatch):
    from sglang.srt import plugins

    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    plugins.load_plugins()
    assert attention_registry.ATTENTION_BACKENDS["dsv4"].dsv4x


@pytest.mark.usefixtures("clean")
def test_the_registry_makes_our_class_and_its_line_is_logged(server, caplog):
    with caplog.at_level(logging.INFO):
        adapter.register()
        adapter.register()
        backend = of(server, made=attention_registry.ATTENTION_BACKENDS["dsv4"])
    assert type(backend) is cuda.Dsv4xAttnBackend
    assert isinstance(backend, deepseek_v4_backend.DeepseekV4AttnBackend)
    assert caplog.text.count("dsv4x is live in SGLang 0.5.23: all attention (DSV4X_SGLANG=all)") == 1


@pytest.mark.usefixtures("clean")
def test_the_draft_factories_make_our_classes(server):
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    adapter.register()
    of(server, made=attention_registry.ATTENTION_BACKENDS["dsv4"])
    factory = SimpleNamespace(draft_model_runner=server.runner, topk=1, speculative_num_steps=3)
    _, steps = DraftBackendFactory._create_dsv4_decode_backend(factory)
    assert type(steps) is cuda.Dsv4xMultiStepBackend
    assert isinstance(steps, deepseek_v4_backend.DeepseekV4MultiStepBackend)
    assert [type(step) for step in steps.attn_backends] == [cuda.Dsv4xAttnBackend] * 3
    assert [step.speculative_step_id for step in steps.attn_backends] == [0, 1, 2]
    _, extend = DraftBackendFactory._create_dsv4_prefill_backend(factory)
    assert type(extend) is cuda.Dsv4xAttnBackend


@pytest.mark.usefixtures("clean")
def test_switched_off_nothing_is_replaced(server, monkeypatch):
    monkeypatch.setenv("DSV4X_SGLANG", "0")
    adapter.register()
    backend = of(server, made=attention_registry.ATTENTION_BACKENDS["dsv4"])
    assert type(backend) is deepseek_v4_backend.DeepseekV4AttnBackend


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("option", ["trtllm", "mega"])
def test_kernels_that_were_asked_for_by_option_are_sglangs(option, server, monkeypatch, caplog):
    made = []
    factories = deepseek_v4_trtllm_backend
    monkeypatch.setattr(factories, "create_deepseek_v4_attn_backend", lambda runner, **kw: made.append(runner))
    monkeypatch.setattr(factories, f"is_dsv4_{option}_attn_enabled", lambda: True)
    monkeypatch.setattr(cuda, "check", lambda: None)
    cuda.install()
    factories.create_deepseek_v4_attn_backend(server.runner)
    assert made == [server.runner]
    assert "asks for SGLang's own kernels" in caplog.text


def test_every_signature_and_field_is_that_of_0_5_23():
    cuda.check()
    rocm.check()


@pytest.mark.parametrize(
    ("owner", "name", "value", "reason"),
    [
        (deepseek_v4_backend.DeepseekV4AttnBackend, "_forward_attention", lambda self, q: q, "takes (self, q), need"),
        (deepseek_v4_backend.DeepSeekV4TokenToKVPool, "get_extra_key_buffer", lambda self: 0, "takes (self), need"),
        (deepseek_v4_backend, "SWA_WINDOW", 256, "the window 256 tokens, need 584 and 128"),
    ],
)
@pytest.mark.usefixtures("clean")
def test_another_sglang_is_left_alone_or_stopped(owner, name, value, reason, server, monkeypatch, caplog):
    with monkeypatch.context() as changed:
        changed.setattr(owner, name, value)
        with pytest.raises(Mismatch, match=re.escape(reason)):
            cuda.check()
        adapter.prepare_factories(attention_registry)
        assert reason in caplog.text
        assert (
            deepseek_v4_trtllm_backend.create_deepseek_v4_attn_backend is FACTORIES["create_deepseek_v4_attn_backend"]
        )
        changed.setattr(adapter, "_prepared", [])
        changed.setenv("DSV4X_SERVERS", "require")
        with pytest.raises(Required, match="stays out of SGLang"):
            adapter.prepare_factories(attention_registry)


@pytest.mark.usefixtures("clean")
def test_a_backend_of_another_name_is_a_reason(monkeypatch, caplog):
    monkeypatch.delitem(attention_registry.ATTENTION_BACKENDS, "dsv4")
    adapter.register()
    assert "SGLang has no attention backend 'dsv4'" in caplog.text


# What is left to SGLang.


@pytest.fixture
def theirs(monkeypatch):
    """Calls that came to SGLang's own attention."""
    calls = []

    def own(self, q, *args, **kwargs):
        calls.append(args)
        return q

    monkeypatch.setattr(deepseek_v4_backend.DeepseekV4AttnBackend, "_forward_attention", own)
    return calls


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"trtllm_attn": True}, "TRT-LLM's kernels were asked for"),
        ({"mega_attn": True}, "the mega kernel"),
        ({"is_dsv41": True}, "DeepSeek-V4.1"),
        ({"present_ratios": (1, 2)}, "layers of ratio 1, 2"),
        ({"hisparse_coordinator": object()}, "HiSparse"),
        ({"is_dspark_draft": True}, "DSpark"),
    ],
)
def test_a_backend_that_is_not_ours_says_why(change, reason, server):
    backend = of(server)
    assert cuda.refusal(backend) == ""
    vars(backend).update(change)
    assert reason in cuda.refusal(backend)


def test_pools_and_gpus_that_are_not_ours_say_why(server, monkeypatch):
    backend = of(server)
    monkeypatch.setattr(server.pool, "request_window", object())
    monkeypatch.setattr(server.pool, "kv_layout", deepseek_v4_backend.KVLayout.V41)
    monkeypatch.setattr(deepseek_v4_backend, "get_platform", lambda: SimpleNamespace(is_sm120=True))
    said = cuda.refusal(backend)
    assert all(reason in said for reason in ("a request window", "SM120", "cache layout v41"))


def test_everything_of_a_refused_backend_is_sglangs(server, theirs):
    backend = of(server)
    backend.dsv4x_refused = "no reason"
    q, sink = queries("cpu", 25, HEADS)
    batch = began(backend, server)
    for layer_id in range(3):
        call(backend, batch, q, sink, layer_id)
    assert len(theirs) == 3


@pytest.mark.parametrize("case", ["cos_sin_cache", "another argument", "tail", "idle", "ratio 2"])
def test_calls_that_are_not_ours_are_sglangs(case, server, theirs):
    backend = of(server)
    q, sink = queries("cpu", 25, HEADS)
    batch, options = began(backend, server), {}
    if case == "cos_sin_cache":
        options = {"cos_sin_cache": torch.zeros(1)}
    elif case == "another argument":
        options = {"inv_rope": None}
    elif case == "tail":
        backend.forward_metadata.late_layer_tail = object()
    elif case == "idle":
        batch.forward_mode = Mode.IDLE
    if case == "ratio 2":
        backend.forward(q=q, k=q, v=q, layer=layer(0), forward_batch=batch, compress_ratio=2, attn_sink=sink)
    else:
        call(backend, batch, q, sink, 0, **options)
    assert len(theirs) == 1
    if case not in ("tail", "idle", "ratio 2"):
        call(backend, batch, q, sink, 0)
        assert len(theirs) == 1


def table(*, ours, piece="extend", captured=False, tokens=32):
    us = (1.0, 2.0) if ours else (2.0, 1.0)
    return Table("cpu", {}, tuple(Row(piece, ratio, HEADS, captured, tokens, 300, *us) for ratio in (0, 4, 128)))


def measured(server, monkeypatch, found, **said):
    monkeypatch.setenv("DSV4X_SGLANG", "1")
    monkeypatch.setattr(cuda.Table, "of", lambda folder, arch: found)
    return of(server)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("server", "piece"),
    [
        (([300, 0], [20, 5], Mode.EXTEND), "extend"),
        (([300, 9], [1, 1], Mode.DECODE), "decode"),
        (([300, 9], [4, 4], Mode.TARGET_VERIFY), "decode"),
    ],
    indirect=["server"],
)
def test_the_table_decides(ours, server, piece, theirs, monkeypatch):
    # One more row is ahead, so that the table is not refused as a whole.
    rows = (*table(ours=ours, piece=piece).rows, *table(ours=True, piece="other").rows)
    backend = measured(server, monkeypatch, Table("cpu", {}, rows))
    tokens = sum(server.extends)
    q, sink = queries("cpu", tokens, HEADS)
    batch = began(backend, server)
    for layer_id in range(3):
        out = call(backend, batch, q, sink, layer_id)
        if ours:
            same(server, backend, out, q, sink, layer_id)
    assert len(theirs) == (0 if ours else 3)


def test_the_line_names_the_card_and_says_where_it_is_another(server, monkeypatch, caplog):
    found = Table("cpu", {"device": "a card"}, table(ours=True).rows)
    with caplog.at_level(logging.INFO):
        measured(server, monkeypatch, found)
    assert "ahead on cpu, on a card, which is not this " in caplog.text
    assert "eager extend of ratio 4 in 1 of 1 shapes" in caplog.text


def test_with_nothing_measured_all_is_sglangs_and_it_says_so(server, theirs, monkeypatch, caplog):
    backend = measured(server, monkeypatch, Table("sm_100", {}, ()))
    q, sink = queries("cpu", 25, HEADS)
    call(backend, began(backend, server), q, sink, 0)
    assert len(theirs) == 1
    assert "nothing was measured ahead on cpu; DSV4X_SGLANG=all takes dsv4x all the same" in caplog.text


def test_with_nothing_measured_and_dsv4x_required_the_server_stops(server, monkeypatch):
    monkeypatch.setenv("DSV4X_SERVERS", "require")
    with pytest.raises(Required, match="nothing was measured ahead on cpu"):
        measured(server, monkeypatch, Table("sm_100", {}, ()))


def test_the_table_is_printed_where_that_is_asked_for(server, monkeypatch, capsys):
    monkeypatch.setenv("DSV4X_SERVERS_EXPLAIN", "1")
    measured(server, monkeypatch, table(ours=True))
    printed = capsys.readouterr().out
    assert "dsv4x in SGLang, DSV4X_SGLANG says measured; measured on cpu" in printed
    assert printed.count("dsv4x\n") == 3


# Steps.


@pytest.mark.parametrize("server", [([300, 1500], [20, 5], Mode.EXTEND)], indirect=True)
def test_an_extend_reads_nothing_of_sglangs_tables_after_the_snapshot(server):
    backend = of(server)
    q, sink = queries("cpu", 25, HEADS)
    batch = server.batch()
    # Of the dtype that needs no conversion, and so no copy for that.
    batch.seq_lens = batch.seq_lens.int()
    backend.init_forward_metadata(batch)
    assert backend._snapshot_prefill_shared_reads(batch, num_qo_tokens=25) is SharedReadEnds.PRE_REPLAY
    select(server, backend)
    # What the scheduler may do from here on: the tables are the next batch's.
    server.table.fill_(256 * 3)
    server.pool.full_to_swa_index_mapping.fill_(0)
    batch.seq_lens.fill_(1)
    for layer_id in range(3):
        for path in ("direct", "gathered"):
            backend.dsv4x_path = path
            same(server, backend, call(backend, batch, q, sink, layer_id), q, sink, layer_id)


def test_without_the_snapshot_an_extend_is_built_by_its_first_layer(server):
    backend = of(server)
    q, sink = queries("cpu", 25, HEADS)
    batch = server.batch()
    backend.init_forward_metadata(batch)
    select(server, backend)
    for layer_id in range(3):
        same(server, backend, call(backend, batch, q, sink, layer_id), q, sink, layer_id)
    assert backend._dsv4x_step.extend is not None


@pytest.mark.parametrize(
    "server", [([300, 0], [20, 5], Mode.EXTEND), ([300, 9], [1, 1], Mode.DECODE)], indirect=True
)  # fmt: skip
def test_rows_of_q_past_the_step_give_zeros(server):
    backend = of(server)
    tokens = sum(server.extends)
    q, sink = queries("cpu", tokens + 7, HEADS)
    q[tokens:] = float("nan")
    batch = began(backend, server)
    for layer_id in range(3):
        out = call(backend, batch, q, sink, layer_id)
        assert out.shape == q.shape
        assert out[tokens:].eq(0).all()
        same(server, backend, out, q, sink, layer_id)


def test_another_step_in_the_same_objects_is_seen(server):
    backend = of(server)
    q, sink = queries("cpu", 25, HEADS)
    batch = began(backend, server)
    call(backend, batch, q, sink, 2)
    first = backend._dsv4x_step
    for hook, given in (
        ("init_forward_metadata", (batch,)),
        ("init_forward_metadata_in_graph", (batch,)),
    ):
        getattr(backend, hook)(*given)
        assert backend._dsv4x_step is not first
        assert not backend._dsv4x_step.runners
        first = backend._dsv4x_step


def test_other_metadata_is_another_step(server):
    backend = of(server)
    q, sink = queries("cpu", 25, HEADS)
    batch = began(backend, server)
    call(backend, batch, q, sink, 0)
    first, metadata = backend._dsv4x_step, backend.forward_metadata
    backend.forward_metadata = copy.copy(metadata)
    call(backend, batch, q, sink, 0)
    assert backend._dsv4x_step is first
    backend.forward_metadata.core_attn_metadata = copy.copy(metadata.core_attn_metadata)
    call(backend, batch, q, sink, 0)
    assert backend._dsv4x_step is not first


@pytest.mark.parametrize(
    "hook",
    [
        "init_forward_metadata", "init_forward_metadata_in_graph", "init_forward_metadata_out_graph",
        "init_forward_metadata_for_breakable_cuda_graph_capture",
        "prepare_forward_metadata_for_breakable_cuda_graph_replay",
    ],
)  # fmt: skip
def test_every_hook_begins_a_step_and_goes_on_to_sglangs(hook, server, monkeypatch):
    backend, seen = of(server), []
    first = backend._dsv4x_step
    monkeypatch.setattr(
        deepseek_v4_backend.DeepseekV4AttnBackend, hook, lambda self, *a, **k: seen.append(self._dsv4x_step) or "theirs"
    )
    given = ("metadata", "batch") if hook.startswith("prepare") else ("batch",)
    assert getattr(backend, hook)(*given) == "theirs"
    assert seen[0] is backend._dsv4x_step is not first


@pytest.mark.parametrize("server", [([300, 9], [1, 1], Mode.DECODE)], indirect=True)
def test_a_captures_warm_up_takes_what_the_capture_will(server, theirs, monkeypatch):
    rows = (*table(ours=True, piece="decode", captured=True).rows, *table(ours=False, piece="decode").rows)
    backend = measured(server, monkeypatch, Table("cpu", {}, rows))
    q, sink = queries("cpu", 2, HEADS)
    batch = server.batch()
    backend.init_cuda_graph_state(2, 2)
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    backend.init_forward_metadata_in_graph(batch)
    call(backend, batch, q, sink, 0)
    assert not theirs
    backend.init_forward_metadata(batch)
    call(backend, batch, q, sink, 0)
    assert len(theirs) == 1


@pytest.mark.parametrize("server", [([300, 9], [4, 4], Mode.DRAFT_EXTEND_V2)], indirect=True)
def test_a_drafts_lengths_below_zero_are_no_entries(server):
    backend = of(server)
    step, core = cuda._Step(), SimpleNamespace(
        swa_page_indices=torch.full((3, 128), 1 << 30, dtype=torch.int32),
        swa_topk_lengths=torch.tensor([0, -3, -1], dtype=torch.int32),
    )  # fmt: skip
    step.core = core
    batch = SimpleNamespace(seq_lens_sum=3, batch_size=3)
    attend = backend._dsv4x_rows(step, (0, 3, HEADS, Mode.DRAFT_EXTEND_V2, False), batch)
    q, sink = queries("cpu", 3, HEADS)
    assert attend(q, layer(0), sink)[:, :HEADS].eq(0).all()
    # Said to be trusted, so a kernel that takes lengths as they are may have them.
    assert attend.__self__.shared.trusted
    assert attend.__self__.shared.swa.lens.tolist() == [0, 0, 0]


def test_caches_are_asked_for_each_time_and_made_once(server, monkeypatch):
    backend, asked = of(server), []
    wait = server.pool.wait_layer_transfer
    monkeypatch.setattr(server.pool, "wait_layer_transfer", lambda layer_id: asked.append(layer_id) or wait(layer_id))
    first = backend.dsv4x_caches_of(1, 4)
    second = backend.dsv4x_caches_of(1, 4)
    assert asked == [1, 1, 1, 1]
    assert all(a is b for a, b in zip(first, second))


def test_warming_up_runs_every_kernel_that_may_be_picked(server):
    backend = of(server)
    for ratio, layer_id in ((0, 0), (4, 1), (128, 2)):
        cuda._run_rows(backend, backend.dsv4x_caches_of(layer_id, ratio), ratio, 2)


@pytest.mark.parametrize("chosen", ["direct", "gathered"])
def test_extends_of_about_one_size_are_weighed_once_and_only_direct_is_named(chosen, server, monkeypatch):
    backend, asked, named = of(server), [], []
    attention = cuda.dsv4x.sparse_mla_attention

    def explain(*given, **options):
        asked.append(given)
        return SimpleNamespace(chosen=chosen, kernels={chosen: "reference"})

    def attend(*given, **options):
        named.append((options["path"], options["kernel"]))
        return attention(*given, **options)

    monkeypatch.setattr(cuda.dsv4x, "explain_step", explain)
    monkeypatch.setattr(cuda.dsv4x, "sparse_mla_attention", attend)
    q, sink = queries("cpu", 25, HEADS)
    for _ in range(2):
        batch = began(backend, server)
        for layer_id in range(3):
            same(server, backend, call(backend, batch, q, sink, layer_id), q, sink, layer_id)
    assert len(asked) == 3
    assert named == [("direct", "reference") if chosen == "direct" else (None, None)] * 6


@pytest.mark.parametrize(("count", "rounded"), [(0, 0), (1, 1), (7, 7), (9, 10), (384, 384), (385, 448), (1025, 1280)])
def test_rounding_is_up_and_by_a_quarter_at_most(count, rounded):
    assert cuda._rounded(count) == rounded


def test_the_entry_point_imports_nothing_of_sglangs_models():
    code = """
import sys
import sglang_kit
sglang_kit.prepare("cpu")
from dsv4x.servers.sglang import register
register()
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
heavy = ["flash_mla", "deep_gemm", "flashinfer", "sgl_kernel", "sglang.srt.layers.attention.deepseek_v4_backend"]
print(ATTENTION_BACKENDS["dsv4"].dsv4x, torch.cuda.is_initialized(), [name for name in heavy if name in sys.modules])
"""
    path = os.pathsep.join([os.path.dirname(sglang_kit.__file__), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=True
    )
    assert found.stdout.splitlines()[-1] == "True False []"


# SGLang's own kit.

CASES = sglang_kit.cases("cpu")


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_kit(case, monkeypatch):
    calls = []
    for name in ("by_rows", "by_step"):
        function = getattr(cuda._Layers, name)
        monkeypatch.setattr(cuda._Layers, name, lambda *a, f=function: calls.append(f) or f(*a))
    monkeypatch.setenv("DSV4X_SERVERS", "require")
    adapter.register()
    case.run()
    assert calls


# ROCm.


class TestRocm:
    @pytest.fixture
    def hip(self, server, monkeypatch):
        """A backend of SGLang's CUDA class called through the function that replaces the HIP class's."""
        monkeypatch.setattr(rocm.hip, "DSV4AttnMetadata", deepseek_v4_backend.DSV4AttnMetadata)
        backend = of(server, made=deepseek_v4_backend.DeepseekV4AttnBackend)
        backend._opus_prefill_applies = lambda *given: False
        return backend

    @staticmethod
    def call(hip, server, q, sink, layer_id, calls, **options):
        def theirs(self, *args, **kwargs):
            calls.append(kwargs)

        given = {"save_kv_cache": False, "attn_sink": sink, **options}
        return rocm.replacement(theirs)(
            hip, q, q, q, layer(layer_id), server.batch(), POOLS.kinds[layer_id], **given
        )  # fmt: skip

    def test_it_is_attention_at_the_ranks_own_heads(self, hip, server):
        began(hip, server)
        q, sink = queries("cpu", 25, HEADS)
        for given in (q, q[:, :HEADS].contiguous()):
            for layer_id in range(3):
                out = self.call(hip, server, given, sink[: given.shape[1]], layer_id, [])
                assert out.shape == given.shape
                same(server, hip, out, q, sink, layer_id)

    def test_the_inverse_rotation_is_applied_where_it_is_asked_for(self, hip, server, monkeypatch):
        began(hip, server)
        q, sink = queries("cpu", 25, HEADS)
        rotated = []

        def rotate(out, inv_rope):
            rotated.append(inv_rope)
            out[..., -64:] *= -1

        monkeypatch.setattr(rocm.hip_flash_mla, "_apply_inverse_rope", rotate)
        plain = self.call(hip, server, q, sink, 1, [])
        turned = self.call(hip, server, q, sink, 1, [], inv_rope=("freqs", "positions"))
        assert rotated == [("freqs", "positions")]
        assert torch.equal(turned[:, :HEADS, :448], plain[:, :HEADS, :448])
        assert torch.equal(turned[:, :HEADS, 448:], -plain[:, :HEADS, 448:])

    @pytest.mark.parametrize("case", ["unified", "opus", "quantized", "metadata", "argument", "torch"])
    def test_what_is_not_ours_is_sglangs(self, case, hip, server, monkeypatch):
        began(hip, server)
        q, sink = queries("cpu", 25, HEADS)
        calls, options = [], {}
        if case == "unified":
            monkeypatch.setattr(rocm.unified_kv_gate, "is_unified_kv_triton", lambda: True)
        elif case == "opus":
            hip._opus_prefill_applies = lambda *given: True
        elif case == "quantized":
            options = {"wo_a_quant_freqs": torch.zeros(1)}
        elif case == "metadata":
            monkeypatch.setattr(rocm.hip, "DSV4AttnMetadata", dict)
        elif case == "argument":
            options = {"something_new": 1}
        else:
            monkeypatch.setattr(rocm.hip_flash_mla, "resolve_hip_flashmla_backend", lambda: "torch")
        self.call(hip, server, q, sink, 0, calls, **options)
        assert len(calls) == 1

    @pytest.mark.parametrize(
        "name",
        [
            "dsv4_swa_decode_within_window", "dsv4_swa_extend_above_window", "c4 extend", "c4 decode", "c128 extend",
            "c128 decode", "c0 draft extend",
        ],
    )  # fmt: skip
    def test_sglangs_hip_class_passes_the_kit(self, name, monkeypatch):
        """The kit is written for the CUDA class: what it looks for and HIP's lacks is lent."""
        hip, calls = rocm.hip, []
        monkeypatch.setattr(hip, "_create_flashmla_metadata", lambda: None)
        monkeypatch.setattr(hip, "create_paged_compressor_data", lambda **options: None)
        for lent in ("set_sparse_topk", "sparse_page_indices", "sparse_topk_lengths"):
            function = getattr(deepseek_v4_backend.DSV4AttnMetadata, lent)
            monkeypatch.setattr(hip.DSV4AttnMetadata, lent, function, raising=False)
        monkeypatch.setattr(hip.DSV4Metadata, "sparse_prefill_cache", None, raising=False)
        backend = hip.DeepseekV4HipRadixBackend
        monkeypatch.setattr(backend, "_forward_attention", rocm.replacement(backend._forward_attention))
        attend = rocm.attend
        monkeypatch.setattr(rocm, "attend", lambda *given: calls.append(given) or attend(*given))
        monkeypatch.setitem(kit.ATTENTION_BACKENDS, "dsv4", backend)
        next(case for case in CASES if case.name == name).run()
        assert calls

    def test_fnuz_caches_are_read_as_such(self):
        buffer = torch.zeros(2, 37440, dtype=torch.uint8)
        assert rocm._paged(buffer.view(torch.float8_e4m3fnuz), 64).layout.value_encoding == "e4m3fnuz"
        assert rocm._paged(buffer.view(torch.float8_e4m3fn), 64).layout.value_encoding == "e4m3fn"

    def test_it_takes_over_only_where_all_was_asked_for(self, monkeypatch):
        function = rocm.hip.DeepseekV4HipRadixBackend._forward_attention
        monkeypatch.setattr(rocm.hip.DeepseekV4HipRadixBackend, "_forward_attention", function)
        monkeypatch.setenv("DSV4X_SGLANG", "1")
        with pytest.raises(Mismatch, match="nothing was measured on AMD"):
            rocm.install()
        assert rocm.hip.DeepseekV4HipRadixBackend._forward_attention is function
        monkeypatch.setenv("DSV4X_SGLANG", "all")
        rocm.install()
        assert rocm.hip.DeepseekV4HipRadixBackend._forward_attention is not function
