"""AITER's sparse attention entry points, build by build: their parameters in order and where they were read.

Read from ROCm/aiter. docs/dependencies.md says how to read another build.
"""

import inspect

REQUIRED = inspect.Parameter.empty

# Releases by their tag's commit, then main. The last one is main as stored later, file by file.
BUILDS = {
    "0.1.17": "32214c295ea2eec1055bdb3467d2eee7289257be",
    "0.1.18": "d6de77692f62e411375cf2ea0ec17792141d0540",
    "0.1.19": "31350226161346314b3d8882c8085bd31dce6a34",
    "0.1.19.post2": "a63ede724b153564f3ed3fc538055fd15178c77d",
    "0.1.20": "fc2e5d57fb5b8ad8e7e23f7103071dde798ea618",
    "0.1.20.post1": "de07f3885ee5f2030ba72b6cc5940d674fd457cf",
    "main of 2026-08-22": "e4048607a535ace3a2b51ded31b1c8c2d45c0879",
    "main since": None,
}
NAMES = tuple(BUILDS)
LATER = {
    "pa_decode_sparse": "021039d38eb83c48e17998aa347d6e7090c71397",
    "sparse_mla_fwd": "013f408ebe8491e80ddab1fbab4c3dbcbc98bd74",
    "pa_prefill_sparse": BUILDS["main of 2026-08-22"],
    "pa_sparse_prefill_opus": BUILDS["main of 2026-08-22"],
}

MODULES = {
    "pa_decode_sparse": "aiter.ops.triton.attention.pa_decode_sparse",
    "sparse_mla_fwd": "aiter.ops.triton.attention.sparse_mla",
    "pa_sparse_prefill_opus": "aiter.ops.pa_sparse_prefill_opus",
    "pa_prefill_sparse": "aiter.ops.triton.attention.pa_prefill_sparse",
}

# In order: name, default, the first of NAMES that has it. Those behind "*" are keyword-only.
PARAMETERS = {
    "pa_decode_sparse": (
        ("q", REQUIRED, "0.1.17"),
        ("unified_kv", REQUIRED, "0.1.17"),
        ("kv_indices", REQUIRED, "0.1.17"),
        ("kv_indptr", REQUIRED, "0.1.17"),
        ("attn_sink", REQUIRED, "0.1.17"),
        ("softmax_scale", REQUIRED, "0.1.17"),
        ("kv_scales", None, "0.1.17"),
        ("block_h", None, "0.1.17"),
        ("kv_splits", None, "0.1.17"),
        ("has_invalid", True, "0.1.17"),
        ("skip_reduce", False, "0.1.17"),
        ("USE_EXP2", None, "0.1.17"),
        "*",
        ("extra_cache", None, "0.1.20"),
        ("extra_indices", None, "0.1.20"),
        ("extra_indptr", None, "0.1.20"),
        ("out", None, "main since"),
    ),
    "sparse_mla_fwd": (
        ("q", REQUIRED, "main since"),
        ("kv_buffer", REQUIRED, "main since"),
        ("kv_indptr", REQUIRED, "main since"),
        ("kv_indices", REQUIRED, "main since"),
        ("softmax_scale", REQUIRED, "main since"),
        "*",
        ("kv_scale", None, "main since"),
        ("kv_lora_rank", 512, "main since"),
        ("qk_rope_head_dim", 64, "main since"),
        ("kv_splits", None, "main since"),
        ("skip_reduce", False, "main since"),
        ("has_invalid", False, "main since"),
        ("dot_precision", "bf16", "main since"),
        ("q_scale", None, "main since"),
        ("out", None, "main since"),
        ("return_lse", False, "main since"),
        ("attn_sink", None, "main since"),
        ("extra_kv", None, "main since"),
        ("extra_indptr", None, "main since"),
        ("extra_indices", None, "main since"),
        ("extra_kv_scale", None, "main since"),
        ("inv_rope_positions", None, "main since"),
        ("inv_rope_cos_sin_cache", None, "main since"),
        ("out_mxfp8", None, "main since"),
    ),
    "pa_sparse_prefill_opus": (
        ("q", REQUIRED, "0.1.17"),
        ("unified_kv", REQUIRED, "0.1.17"),
        ("kv_indices_prefix", REQUIRED, "0.1.17"),
        ("kv_indptr_prefix", REQUIRED, "0.1.17"),
        ("kv", REQUIRED, "0.1.17"),
        ("kv_indices_extend", REQUIRED, "0.1.17"),
        ("kv_indptr_extend", REQUIRED, "0.1.17"),
        ("attn_sink", REQUIRED, "0.1.17"),
        ("softmax_scale", REQUIRED, "0.1.17"),
        ("out", None, "0.1.17"),
    ),
    "pa_prefill_sparse": (
        ("q", REQUIRED, "0.1.18"),
        ("unified_kv", REQUIRED, "0.1.18"),
        ("kv_indices_prefix", REQUIRED, "0.1.18"),
        ("kv_indptr_prefix", REQUIRED, "0.1.18"),
        ("kv", REQUIRED, "0.1.18"),
        ("kv_indices_extend", REQUIRED, "0.1.18"),
        ("kv_indptr_extend", REQUIRED, "0.1.18"),
        ("attn_sink", REQUIRED, "0.1.18"),
        ("softmax_scale", REQUIRED, "0.1.18"),
        ("has_invalid", None, "0.1.19.post2"),
    ),
}


def signature(function, build):
    """The signature in one of BUILDS, without annotations; None where the build has no such function."""
    there, kind, parameters = NAMES.index(build), inspect.Parameter.POSITIONAL_OR_KEYWORD, []
    for row in PARAMETERS[function]:
        if row == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
        elif NAMES.index(row[2]) <= there:
            parameters.append(inspect.Parameter(row[0], kind, default=row[1]))
    return inspect.Signature(parameters) if parameters else None


def plain(function):
    """An installed function's signature, its annotations dropped for comparison."""
    found = inspect.signature(function)
    bare = [parameter.replace(annotation=REQUIRED) for parameter in found.parameters.values()]
    return found.replace(parameters=bare, return_annotation=REQUIRED)
