"""FlashInfer's ``flashinfer.mla.trtllm_batch_decode_with_kv_cache_mla``, release by release.

Read from the wheels of ``flashinfer-python`` (flashinfer/decode.py in 0.5.3, flashinfer/mla.py before 0.6.11,
flashinfer/mla/_core.py from then on). docs/dependencies.md says how to read another one.
"""

import inspect

REQUIRED = inspect.Parameter.empty

RELEASES = (
    "0.5.3", "0.6.0", "0.6.6", "0.6.11", "0.6.12", "0.6.13", "0.6.14", "0.6.15", "0.6.15.post1", "0.6.16",
    "0.6.16.post4", "0.6.17", "0.6.18", "0.6.18.post1", "0.7.0", "0.7.0.post1", "0.7.1", "0.7.2", "0.7.2.post1",
)  # fmt: skip

# In order: name, default, the first of RELEASES that has it.
PARAMETERS = (
    ("query", REQUIRED, "0.5.3"),
    ("kv_cache", REQUIRED, "0.5.3"),
    ("workspace_buffer", REQUIRED, "0.5.3"),
    ("qk_nope_head_dim", REQUIRED, "0.5.3"),
    ("kv_lora_rank", REQUIRED, "0.5.3"),
    ("qk_rope_head_dim", REQUIRED, "0.5.3"),
    ("block_tables", REQUIRED, "0.5.3"),
    ("seq_lens", REQUIRED, "0.5.3"),
    ("max_seq_len", REQUIRED, "0.5.3"),
    ("sparse_mla_top_k", 0, "0.6.0"),
    ("out", None, "0.5.3"),
    ("bmm1_scale", 1.0, "0.5.3"),
    ("bmm2_scale", 1.0, "0.5.3"),
    ("sinks", None, "0.5.3"),
    ("skip_softmax_threshold_scale_factor", None, "0.6.6"),
    ("enable_pdl", None, "0.5.3"),
    ("backend", "auto", "0.5.3"),
    ("is_var_seq", True, "0.6.11"),
    ("uses_shared_paged_kv_idx", True, "0.6.11"),
    ("lse", None, "0.6.12"),
    ("return_lse", False, "0.6.12"),
    ("cute_dsl_impl", "auto", "0.6.12"),
    ("kv_scale_format", "auto", "0.6.14"),
    ("cum_seq_lens_q", None, "0.6.14"),
    ("max_q_len", None, "0.6.14"),
    ("multi_ctas_kv_counter_buffer", None, "0.6.15"),
    ("sparse_mla_top_k_lens", None, "0.6.17"),
    ("enable_dcp", False, "0.6.17"),
    ("cp_world", 1, "0.6.17"),
    ("cp_rank", 0, "0.6.17"),
    ("causal_seqlens_kv_global", None, "0.6.17"),
    ("use_fp16_softmax", None, "0.6.18"),
    ("return_lse_base", None, "0.7.1"),
)


def signature(release):
    """The signature in one of RELEASES, without annotations."""
    there = RELEASES.index(release)
    return inspect.Signature(
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default, first in PARAMETERS
        if RELEASES.index(first) <= there
    )


def plain(function):
    """An installed function's signature, its annotations dropped for comparison."""
    found = inspect.signature(function)
    bare = [parameter.replace(annotation=REQUIRED) for parameter in found.parameters.values()]
    return found.replace(parameters=bare, return_annotation=REQUIRED)
