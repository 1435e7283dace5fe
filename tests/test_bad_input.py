"""Every public op names the argument it cannot take, what it saw and what it needs, before anything is launched."""

import pytest
import torch

import dsv4x
from dsv4x.common.core.layouts import DSV4, DSV32, PagedCache
from dsv4x.common.step.attention import PATHS

BF16, I32, I64, F32 = torch.bfloat16, torch.int32, torch.int64, torch.float32
T, H = 3, 4


def zeros(*shape, dtype=BF16, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def strided(*shape, dtype=BF16):
    """Of this shape, its last dimension not contiguous."""
    return torch.zeros(*shape, 2, dtype=dtype)[..., 0]


def cache(layout=DSV4, device="cpu", pages=2, page_size=64):
    return PagedCache.zeros(pages, layout, page_size, device)


def decode_arguments():
    return {
        "q": zeros(T, H, 512),
        "swa_cache": cache(),
        "swa_indices": zeros(T, 8, dtype=I32),
        "swa_lens": zeros(T, dtype=I32),
        "extra_cache": cache(),
        "extra_indices": zeros(T, 8, dtype=I32),
        "extra_lens": zeros(T, dtype=I32),
        "attn_sink": zeros(H, dtype=F32),
        "out": zeros(T, H, 512),
    }


def prefill_arguments():
    return {
        "q": zeros(T, H, 512),
        "kv": zeros(9, 512),
        "indices": zeros(T, 8, dtype=I32),
        "lens": zeros(T, dtype=I32),
        "attn_sink": zeros(H, dtype=F32),
        "out": zeros(T, H, 512),
    }


def quantize_arguments():
    return {"k": zeros(T, 512), "cache": cache(), "slots": zeros(T, dtype=I64)}


def dequantize_arguments():
    return {"cache": cache(), "slots": zeros(T, dtype=I64), "out": zeros(T, 512)}


def blocks_arguments():
    return {
        "cache": cache(),
        "indices": zeros(T, 8, dtype=I32),
        "lens": zeros(T, dtype=I32),
        "capacity": 2,
        "out": cache(),
        "remapped": zeros(T, 8, dtype=I32),
    }


def rows_arguments():
    return {**blocks_arguments(), "out": zeros(9, 512), "k_scale": 1.0}


def combine_arguments():
    vectors = ("seq_lens", "gather_lens", "compressed_base", "swa_base")
    return {
        "topk_indices": zeros(T, 5, dtype=I32),
        "query_start_loc": torch.tensor([0, 1, 3], dtype=I32),
        **{name: torch.full((2,), 9, dtype=I32) for name in vectors},
        "window_size": 16,
        "compress_ratio": 4,
        "topk": 5,
        "out_indices": zeros(T, 128, dtype=I32),
        "out_lens": zeros(T, dtype=I32),
    }


def combine_halves_arguments():
    return {
        "swa_indices": zeros(T, 5, dtype=I32),
        "swa_lens": zeros(T, dtype=I32),
        "extra_indices": zeros(T, 7, dtype=I32),
        "extra_lens": zeros(T, dtype=I64),
        "s_kv_swa": 9,
        "out_indices": zeros(T, 128, dtype=I32),
        "out_lens": zeros(T, dtype=I32),
    }


def window_arguments():
    return {
        "query_start_loc": torch.tensor([0, 1, 3], dtype=I32),
        "seq_lens": torch.tensor([9, 20], dtype=I32),
        "block_table": zeros(2, 3, dtype=I32),
        "page_size": 64,
        "pages": 2,
        "window_size": 16,
        "tokens": T,
    }


def token_ids_arguments():
    starts, seq_lens = torch.tensor([0, 1, 3], dtype=I32), torch.tensor([9, 20], dtype=I32)
    return {"query_start_loc": starts, "seq_lens": seq_lens, "window_size": 16, "total": 40}


def locals_arguments():
    return {"local": zeros(T, 5, dtype=I32), "request": zeros(T, dtype=I32), "limits": zeros(T, dtype=I32)}


def local_slots_arguments():
    return {**locals_arguments(), "block_table": zeros(2, 3, dtype=I32), "page_size": 64, "pages": 2}


def workspace_rows_arguments():
    return {**locals_arguments(), "bases": zeros(2, dtype=I64)}


def compact_arguments():
    return {"slots": zeros(T, 5, dtype=I64), "page_map": zeros(4, dtype=I32), "page_size": 64}


def to_ragged_arguments():
    return {"indices": zeros(T, 5, dtype=I32), "lens": zeros(T, dtype=I32), "capacity": 9, "upper": 100}


def to_dense_arguments():
    return {"values": zeros(9, dtype=I32), "indptr": torch.tensor([0, 4, 9], dtype=I32), "width": 5}


def build_arguments():
    return {
        "query_start_loc": torch.tensor([0, 1, 3], dtype=I32),
        "seq_lens": torch.tensor([9, 20], dtype=I32),
        "swa_block_table": zeros(2, 3, dtype=I32),
        "extra_block_table": zeros(2, 3, dtype=I32),
        "compress_ratio": 4,
        "swa_page_size": 64,
        "swa_pages": 2,
        "extra_page_size": 64,
        "extra_pages": 2,
        "topk": 8,
        "max_seq_len": None,
        "entries": None,
        "query_start_loc_cpu": None,
        "seq_lens_cpu": None,
        "swa_indices": None,
        "swa_lens": None,
    }


def meta(ratio=4):
    arguments = build_arguments()
    if ratio == 1:
        arguments = {k: v for k, v in arguments.items() if not k.startswith("extra")}
    if ratio != 4:
        del arguments["topk"]
    return dsv4x.AttentionMetadata.build(**{**arguments, "compress_ratio": ratio})


def attention_arguments():
    return {
        "q": zeros(T, H, 512),
        "swa_cache": cache(),
        "extra_cache": cache(),
        "meta": meta(),
        "topk_indices": zeros(T, 8, dtype=I32),
        "attn_sink": zeros(H, dtype=F32),
        "out": zeros(T, H, 512),
    }


def wrong_tensors(name, good, *, need, dtype, resize=None):
    """The ways any tensor argument can be wrong. ``need``: how the message says the dtype it needs."""
    other = torch.float16 if dtype.is_floating_point else torch.int16
    cases = [
        (name, [1, 2], TypeError, ["list", need]),
        (name, good.to(other), TypeError, [str(other).removeprefix("torch."), need]),
        (name, good[None], ValueError, [str((1, *good.shape))]),
        (name, good.to("meta"), ValueError, ["meta", "cpu"]),
    ]
    if good.shape[-1] > 1:
        cases.append((name, strided(*good.shape, dtype=dtype), ValueError, ["stride", "2", "need 1"]))
    for shape in resize or ():
        wrong = torch.zeros(shape, dtype=dtype)
        cases.append((name, wrong, ValueError, [str(tuple(shape))]))
    return cases


def wrong_caches(name):
    return [
        (name, zeros(2, 37440, dtype=torch.uint8), TypeError, ["Tensor", "PagedCache"]),
        (name, cache(device="meta"), ValueError, ["meta", "cpu"]),
    ]


EITHER = "int32 or int64"


def scope_cases(scope):
    return [
        *wrong_caches(f"{scope}_cache"),
        (f"{scope}_cache", None, TypeError, ["NoneType", "PagedCache"]),
        (f"{scope}_cache", cache(DSV32), ValueError, ["576 values (DSv3.2)", "512"]),
        (f"{scope}_k_scale", 2.0, ValueError, ["2.0", "1", "DSv4"]),
        (f"{scope}_k_scale", "1", TypeError, ["str", "float"]),
        *wrong_tensors(f"{scope}_indices", zeros(T, 8, dtype=I32), need=EITHER, dtype=I32, resize=[(T + 1, 8), (8,)]),
        (f"{scope}_indices", None, TypeError, ["NoneType", EITHER]),
        *wrong_tensors(f"{scope}_lens", zeros(T, dtype=I32), need=EITHER, dtype=I32, resize=[(T - 1,), (T, 1)]),
    ]


def anywhere(cases):
    """Without the wrong device: the argument they are about decides where the others have to be."""
    return [case for case in cases if case[3][0] != "meta"]


CHOICE_CASES = [("kernel", "cutlass", ValueError, ["cutlass", "flash_mla", "triton", "reference"])]
LENGTH_CASES = [
    *anywhere(wrong_tensors("seq_lens", zeros(2, dtype=I32), need=EITHER, dtype=I32)),
    *wrong_tensors("query_start_loc", torch.tensor([0, 1, 3], dtype=I32), need=EITHER, dtype=I32, resize=[(2,), (4,)]),
    ("window_size", 0, ValueError, ["0", "1 to 2147483647"]),
    ("window_size", 16.0, TypeError, ["float", "int"]),
]
LOCAL_CASES = [
    *anywhere(wrong_tensors("local", zeros(T, 5, dtype=I32), need=EITHER, dtype=I32, resize=[(T,)])),
    *wrong_tensors("request", zeros(T, dtype=I32), need=EITHER, dtype=I32, resize=[(T + 1,), (T, 1)]),
    *wrong_tensors("limits", zeros(T, dtype=I32), need=EITHER, dtype=I32, resize=[(T - 1,)]),
]
POOL_CASES = [
    *wrong_tensors("block_table", zeros(2, 3, dtype=I32), need="int32", dtype=I32, resize=[(2,)]),
    ("block_table", zeros(2, 3, dtype=I64), TypeError, ["int64", "int32"]),
    ("page_size", 0, ValueError, ["0", ">= 1"]),
    ("page_size", "64", TypeError, ["str", "int"]),
    ("pages", -1, ValueError, ["-1", ">= 0"]),
    ("pages", 2**25 + 1, ValueError, [str(2**25 + 1), "64", "2**31"]),
]
Q_CASES = [
    # The device of q decides the others', so q cannot be on the wrong one; another is named instead.
    *[case for case in wrong_tensors("q", zeros(T, H, 512), need="bfloat16", dtype=BF16) if case[3][0] != "meta"],
    ("q", zeros(T, H, 544), ValueError, ["544", "512 or 576"]),
    ("q", zeros(T, 512), ValueError, ["(3, 512)", "512"]),
    ("q", zeros(T, 0, 512), ValueError, ["0 heads", "1 to 128"]),
    ("q", zeros(T, 129, 512), ValueError, ["129 heads", "1 to 128"]),
]
SPLIT_CASES = [
    ("split_k", 0, ValueError, ["0", "1 to 128"]),
    ("split_k", 129, ValueError, ["129", "1 to 128"]),
    ("split_k", 2.0, TypeError, ["float", "int"]),
]
SINK_AND_OUT_CASES = [
    *wrong_tensors("attn_sink", zeros(H, dtype=F32), need="float32", dtype=F32, resize=[(H + 1,), (1, H)]),
    *wrong_tensors("out", zeros(T, H, 512), need="bfloat16", dtype=BF16, resize=[(T, H + 1, 512), (T + 1, H, 512)]),
    *[("softmax_scale", scale, ValueError, [str(scale), "> 0"]) for scale in (0.0, -0.05, float("inf"), float("nan"))],
    ("softmax_scale", "1", TypeError, ["str", "float"]),
    ("softmax_scale", True, TypeError, ["bool", "float"]),
]
COMPACTION_CASES = [
    ("cache", None, TypeError, ["NoneType", "PagedCache"]),
    ("cache", zeros(2, 37440, dtype=torch.uint8), TypeError, ["Tensor", "PagedCache"]),
    *wrong_tensors("indices", zeros(T, 8, dtype=I32), need=EITHER, dtype=I32, resize=[(8,), (T, 1, 8)]),
    ("indices", None, TypeError, ["NoneType", EITHER]),
    *wrong_tensors("lens", zeros(T, dtype=I32), need=EITHER, dtype=I32, resize=[(T + 1,), (T, 1)]),
    ("capacity", -1, ValueError, ["-1", "0 to"]),
    ("capacity", 2.0, TypeError, ["float", "int"]),
    ("capacity", True, TypeError, ["bool", "int"]),
    ("capacity", 2**31, ValueError, [str(2**31), "0 to"]),
    *wrong_tensors("remapped", zeros(T, 8, dtype=I32), need="int32", dtype=I32, resize=[(T, 9), (T + 1, 8)]),
    ("remapped", zeros(T, 8, dtype=I64), TypeError, ["int64", "int32"]),
    ("remapped", zeros(8, dtype=I32).expand(T, 8), ValueError, ["stride(0) is 0", ">= 8"]),
]
CHOICE_CASES = [("kernel", "cutlass", ValueError, ["cutlass", "flash_mla", "triton", "reference"])]

TABLE = {
    dsv4x.sparse_mla_decode: (
        decode_arguments,
        [*Q_CASES, *scope_cases("swa"), *scope_cases("extra"), *SINK_AND_OUT_CASES, *SPLIT_CASES, *CHOICE_CASES],
    ),
    dsv4x.sparse_mla_prefill: (
        prefill_arguments,
        [
            *Q_CASES,
            *wrong_tensors("kv", zeros(9, 512), need="bfloat16", dtype=BF16, resize=[(9, 576), (9, 1, 512)]),
            *wrong_tensors("indices", zeros(T, 8, dtype=I32), need=EITHER, dtype=I32, resize=[(T + 1, 8), (T, 1, 8)]),
            *wrong_tensors("lens", zeros(T, dtype=I32), need=EITHER, dtype=I32, resize=[(T + 1,)]),
            *SINK_AND_OUT_CASES,
            *CHOICE_CASES,
        ],
    ),
    dsv4x.quantize_and_insert_k_cache: (
        quantize_arguments,
        [
            *[c for c in wrong_tensors("k", zeros(T, 512), need="bfloat16", dtype=BF16) if c[3][0] != "meta"],
            ("k", zeros(T, 576), ValueError, ["576", "512"]),
            ("cache", None, TypeError, ["NoneType", "PagedCache"]),
            *wrong_caches("cache"),
            *wrong_tensors("slots", zeros(T, dtype=I64), need=EITHER, dtype=I64, resize=[(T + 1,), (T, 1)]),
            ("k_scale", True, TypeError, ["bool", "float"]),
            *CHOICE_CASES,
        ],
    ),
    dsv4x.dequantize_k_cache_paged: (
        dequantize_arguments,
        [
            ("cache", None, TypeError, ["NoneType", "PagedCache"]),
            *wrong_caches("cache"),
            *[c for c in wrong_tensors("slots", zeros(T, dtype=I64), need=EITHER, dtype=I64) if c[3][0] != "meta"],
            *wrong_tensors("out", zeros(T, 512), need="bfloat16", dtype=BF16, resize=[(T, 576), (T + 1, 512)]),
            *CHOICE_CASES,
        ],
    ),
    dsv4x.gather_referenced_cache_blocks: (
        blocks_arguments,
        [
            *COMPACTION_CASES,
            *wrong_caches("out"),
            ("out", cache(DSV32), ValueError, ["DSv3.2", "DSv4"]),
            ("out", cache(page_size=2), ValueError, ["2 DSv4", "64 DSv4"]),
            ("out", cache(pages=1), ValueError, ["1", ">= capacity", "2"]),
            ("capacity", 2**25 + 1, ValueError, [str(2**25 + 1), f"0 to {2**25}"]),
            *CHOICE_CASES,
        ],
    ),
    dsv4x.gather_referenced_rows: (
        rows_arguments,
        [
            *COMPACTION_CASES,
            *wrong_tensors("out", zeros(9, 512), need="bfloat16", dtype=BF16, resize=[(9, 576), (9, 1, 512)]),
            ("out", zeros(1, 512), ValueError, ["1", ">= capacity", "2"]),
            ("out", zeros(9, 512).as_strided((9, 512), (256, 1)), ValueError, ["stride(0) is 256", ">= 512"]),
            ("k_scale", 2.0, ValueError, ["2.0", "1", "DSv4"]),
            ("k_scale", "1", TypeError, ["str", "float"]),
            *CHOICE_CASES,
        ],
    ),
    dsv4x.combine_topk_swa_indices: (
        combine_arguments,
        [
            *[c for c in wrong_tensors("topk_indices", zeros(T, 5, dtype=I32), need="int32", dtype=I32)
              if c[3][0] != "meta"],
            ("topk_indices", zeros(T, 5, dtype=I64), TypeError, ["int64", "int32"]),
            *wrong_tensors(
                "query_start_loc", torch.tensor([0, 1, 3], dtype=I32), need=EITHER, dtype=I32, resize=[(2,), (4,)]
            ),
            *wrong_tensors("seq_lens", zeros(2, dtype=I32), need=EITHER, dtype=I32),
            *wrong_tensors("gather_lens", zeros(2, dtype=I32), need=EITHER, dtype=I32, resize=[(3,)]),
            *wrong_tensors("compressed_base", zeros(2, dtype=I32), need=EITHER, dtype=I32, resize=[(3,)]),
            *wrong_tensors("swa_base", zeros(2, dtype=I32), need=EITHER, dtype=I32, resize=[(3,)]),
            *wrong_tensors("row_slots", zeros(9, dtype=I32), need="int32", dtype=I32, resize=[(9, 1)]),
            ("window_size", -1, ValueError, ["-1", ">= 0"]),
            ("window_size", 16.0, TypeError, ["float", "int"]),
            ("positions", 5, TypeError, ["int", "pair of int32"]),
            ("positions", (zeros(T, dtype=I32),), TypeError, ["tuple", "pair of int32"]),
            ("compress_ratio", 0, ValueError, ["0", ">= 1"]),
            ("compress_ratio", True, TypeError, ["bool", "int"]),
            ("topk", -1, ValueError, ["-1", ">= 0"]),
            ("topk", None, TypeError, ["NoneType", "int"]),
            *wrong_tensors("out_indices", zeros(T, 128, dtype=I32), need="int32", dtype=I32, resize=[(T + 1, 128)]),
            ("out_indices", zeros(T, 64, dtype=I32), ValueError, ["64", "128"]),
            ("out_indices", zeros(T, 200, dtype=I32), ValueError, ["200", "128"]),
            *wrong_tensors("out_lens", zeros(T, dtype=I32), need="int32", dtype=I32, resize=[(T + 1,)]),
            *CHOICE_CASES,
        ],
    ),
    dsv4x.combine_swa_extra_indices: (
        combine_halves_arguments,
        [
            *anywhere(wrong_tensors("swa_indices", zeros(T, 5, dtype=I32), need=EITHER, dtype=I32, resize=[(T,)])),
            *wrong_tensors("swa_lens", zeros(T, dtype=I32), need=EITHER, dtype=I32, resize=[(T + 1,)]),
            *wrong_tensors("extra_indices", zeros(T, 7, dtype=I32), need=EITHER, dtype=I32, resize=[(T + 1, 7)]),
            ("extra_indices", None, TypeError, ["NoneType", EITHER]),
            *wrong_tensors("extra_lens", zeros(T, dtype=I32), need=EITHER, dtype=I32, resize=[(T, 1)]),
            ("s_kv_swa", -1, ValueError, ["-1", "0 to 2147483647"]),
            ("s_kv_swa", 2**31, ValueError, ["2147483648", "0 to 2147483647"]),
            ("s_kv_swa", None, TypeError, ["NoneType", "int"]),
            *wrong_tensors("out_indices", zeros(T, 128, dtype=I32), need="int32", dtype=I32, resize=[(T + 1, 128)]),
            ("out_indices", zeros(T, 64, dtype=I32), ValueError, ["64", "128"]),
            ("out_indices", zeros(T, 200, dtype=I32), ValueError, ["200", "128"]),
            *wrong_tensors("out_lens", zeros(T, dtype=I32), need="int32", dtype=I32, resize=[(T + 1,)]),
            *CHOICE_CASES,
        ],
    ),
    dsv4x.window_slots: (
        window_arguments,
        [
            *LENGTH_CASES,
            *POOL_CASES,
            ("block_table", zeros(3, 3, dtype=I32), ValueError, ["(3, 3)", "(2, any)"]),
            ("tokens", -1, ValueError, ["-1", ">= 0"]),
            ("tokens", 3.0, TypeError, ["float", "int"]),
            *CHOICE_CASES,
        ],
    ),
    dsv4x.build_swa_token_ids: (
        token_ids_arguments,
        [
            *LENGTH_CASES,
            ("total", -1, ValueError, ["-1", "0 to 2147483647"]),
            ("total", 2**31, ValueError, ["2147483648", "0 to 2147483647"]),
            ("total", torch.tensor(3), TypeError, ["Tensor", "int"]),
            *CHOICE_CASES,
        ],
    ),
    dsv4x.local_to_slots: (local_slots_arguments, [*LOCAL_CASES, *POOL_CASES, *CHOICE_CASES]),
    dsv4x.local_to_workspace_rows: (
        workspace_rows_arguments,
        [
            *LOCAL_CASES,
            *wrong_tensors("bases", zeros(2, dtype=I64), need=EITHER, dtype=I64, resize=[(2, 1)]),
            *CHOICE_CASES,
        ],
    ),
    dsv4x.slots_to_compact_slots: (
        compact_arguments,
        [
            *anywhere(wrong_tensors("slots", zeros(T, 5, dtype=I64), need=EITHER, dtype=I64, resize=[()])),
            *anywhere(wrong_tensors("slots", zeros(T, 5, dtype=I64)[0], need=EITHER, dtype=I64))[-1:],
            *wrong_tensors("page_map", zeros(4, dtype=I32), need="int32", dtype=I32, resize=[(4, 1)]),
            ("page_map", zeros(4, dtype=I64), TypeError, ["int64", "int32"]),
            ("page_size", 0, ValueError, ["0", "1 to 2147483647"]),
            ("page_size", 64.0, TypeError, ["float", "int"]),
            *CHOICE_CASES,
        ],
    ),
    dsv4x.dense_to_ragged: (
        to_ragged_arguments,
        [
            *anywhere(wrong_tensors("indices", zeros(T, 5, dtype=I32), need=EITHER, dtype=I32, resize=[(T,)])),
            *wrong_tensors("lens", zeros(T, dtype=I32), need=EITHER, dtype=I32, resize=[(T + 1,)]),
            ("capacity", -1, ValueError, ["-1", "0 to 2147483647"]),
            ("capacity", None, TypeError, ["NoneType", "int"]),
            ("upper", -1, ValueError, ["-1", "0 to 2147483648"]),
            ("upper", 2**31 + 1, ValueError, ["2147483649", "0 to 2147483648"]),
            ("upper", 1.5, TypeError, ["float", "int"]),
            *CHOICE_CASES,
        ],
    ),
    dsv4x.ragged_to_dense: (
        to_dense_arguments,
        [
            *anywhere(wrong_tensors("values", zeros(9, dtype=I32), need="int32", dtype=I32, resize=[(9, 1)])),
            ("values", zeros(9, dtype=I64), TypeError, ["int64", "int32"]),
            *wrong_tensors("indptr", torch.tensor([0, 4, 9], dtype=I32), need=EITHER, dtype=I32, resize=[(3, 1)]),
            ("indptr", zeros(0, dtype=I32), ValueError, ["(0,)", "leading 0"]),
            ("width", -1, ValueError, ["-1", "0 to 2147483647"]),
            ("width", "5", TypeError, ["str", "int"]),
            *CHOICE_CASES,
        ],
    ),
    dsv4x.AttentionMetadata.build: (
        build_arguments,
        [
            *[c for c in wrong_tensors("seq_lens", torch.tensor([9, 20], dtype=I32), need="int32", dtype=I32)
              if c[3][0] != "meta"],
            ("seq_lens", torch.tensor([9, 20]), TypeError, ["int64", "int32"]),
            ("seq_lens", torch.tensor([9, 1], dtype=I32), ValueError, ["1 at request 1", "2 query tokens"]),
            ("seq_lens", torch.tensor([-1, 9], dtype=I32), ValueError, ["-1 at request 0"]),
            ("seq_lens", torch.tensor([9, 200], dtype=I32), ValueError, ["swa_block_table", "3 pages", "4", "200"]),
            *wrong_tensors(
                "query_start_loc", torch.tensor([0, 1, 3], dtype=I32), need="int32", dtype=I32, resize=[(2,), (4,)]
            ),
            ("query_start_loc", torch.tensor([1, 2, 3], dtype=I32), ValueError, ["begins with 1", "0"]),
            ("query_start_loc", torch.tensor([0, 3, 1], dtype=I32), ValueError, ["falls from 3 to 1 at request 1"]),
            *wrong_tensors("swa_block_table", zeros(2, 3, dtype=I32), need="int32", dtype=I32, resize=[(3, 3), (2,)]),
            ("swa_block_table", zeros(2, 0, dtype=I32), ValueError, ["0 pages", "1"]),
            *wrong_tensors("extra_block_table", zeros(2, 3, dtype=I32), need="int32", dtype=I32, resize=[(3, 3)]),
            ("extra_block_table", zeros(2, 0, dtype=I32), ValueError, ["0 pages", "1"]),
            ("extra_block_table", None, ValueError, ["got None", "compress_ratio 4"]),
            ("compress_ratio", 8, ValueError, ["selects", "True or False", "compress_ratio 8"]),
            ("compress_ratio", 1, ValueError, ["selects", "True or False", "compress_ratio 1"]),
            ("compress_ratio", 0, ValueError, ["0", ">= 1"]),
            ("compress_ratio", 4.0, TypeError, ["float", "int"]),
            ("max_seq_len", -1, ValueError, ["-1", "0 to"]),
            ("entries", -1, ValueError, ["-1", ">= 0"]),
            ("swa_indices", zeros(2, 8, dtype=I32), ValueError, ["2 rows", "num_tokens, which is 3"]),
            ("swa_lens", zeros(3, dtype=I32), ValueError, ["swa_indices with it"]),
            ("swa_page_size", 0, ValueError, ["0", ">= 1"]),
            ("swa_page_size", "64", TypeError, ["str", "int"]),
            ("swa_pages", -1, ValueError, ["-1", ">= 0"]),
            ("swa_pages", 2**31, ValueError, [str(2**31), "<= 2**31 entries"]),
            ("extra_page_size", None, TypeError, ["NoneType", "int"]),
            ("extra_page_size", 0, ValueError, ["0", ">= 1"]),
            ("extra_pages", None, TypeError, ["NoneType", "int"]),
            ("extra_pages", 2**31, ValueError, [str(2**31), "<= 2**31 entries"]),
            ("topk", -1, ValueError, ["-1", ">= 0"]),
            ("window_size", 0, ValueError, ["0", ">= 1"]),
            ("num_tokens", 2, ValueError, ["2", ">= 3"]),
            ("num_tokens", 3.0, TypeError, ["float", "int"]),
            ("query_start_loc_cpu", [0, 1, 3], TypeError, ["list", EITHER]),
            ("query_start_loc_cpu", torch.tensor([0, 3]), ValueError, ["(2,)", "3"]),
            ("seq_lens_cpu", torch.tensor([9.0, 20.0]), TypeError, ["float32", EITHER]),
            ("seq_lens_cpu", zeros(2, dtype=I64, device="meta"), ValueError, ["meta", "cpu"]),
        ],
    ),
    dsv4x.sparse_mla_attention: (
        attention_arguments,
        [
            *wrong_tensors("q", zeros(T, H, 512), need="bfloat16", dtype=BF16, resize=[(T + 1, H, 512), (T, H, 576)]),
            ("q", zeros(T, 129, 512), ValueError, ["129 heads", "1 to 128"]),
            *wrong_caches("swa_cache"),
            ("swa_cache", cache(page_size=2), ValueError, ["page_size is 2", "64"]),
            ("swa_cache", cache(pages=1), ValueError, ["1 pages", ">= 2"]),
            ("swa_cache", cache(DSV32), ValueError, ["576 values (DSv3.2)", "512"]),
            ("extra_cache", None, TypeError, ["NoneType", "PagedCache"]),
            *wrong_caches("extra_cache"),
            ("extra_cache", cache(page_size=2), ValueError, ["page_size is 2", "64"]),
            ("extra_cache", cache(pages=1), ValueError, ["1 pages", ">= 2"]),
            ("extra_cache", cache(DSV32), ValueError, ["576 values (DSv3.2)", "512"]),
            *wrong_tensors("topk_indices", zeros(T, 8, dtype=I32), need="int32", dtype=I32, resize=[(T + 1, 8), (T,)]),
            ("topk_indices", None, TypeError, ["NoneType", "int32"]),
            *[(f"{scope}_k_scale", 0.5, ValueError, ["0.5", "1", "DSv4"]) for scope in ("swa", "extra")],
            *SINK_AND_OUT_CASES,
            ("path", "fast", ValueError, ["fast", "direct", "gathered"]),
            *CHOICE_CASES,
        ],
    ),
}  # fmt: skip
CASES = [
    pytest.param(op, arguments, *case, id=f"{op.__name__}-{case[0]}-{i}")
    for op, (arguments, cases) in TABLE.items()
    for i, case in enumerate(cases)
]


@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.__name__)
def test_the_arguments_the_table_starts_from_are_good(op):
    op(**TABLE[op][0]())


@pytest.mark.parametrize(("op", "arguments", "name", "value", "error", "says"), CASES)
def test_a_wrong_argument_is_named_with_what_was_seen_and_needed(op, arguments, name, value, error, says):
    with pytest.raises(error) as raised:
        op(**{**arguments(), name: value})
    assert type(raised.value) is error, "a subclass would say something about kernels, not about the argument"
    text = str(raised.value)
    for word in says if name in ("compress_ratio", "seq_lens") else [name, *says]:
        assert word in text, text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "value", "error", "says"), TABLE[dsv4x.sparse_mla_attention][1])
def test_all_paths_refuse_the_same_arguments(name, value, error, says, path):
    """What one path happens not to look at must not pass there and fail on another machine."""
    if name == "path":
        return
    arguments = attention_arguments()
    for _ in range(2):
        with pytest.raises(error) as raised:
            dsv4x.sparse_mla_attention(**{**arguments, name: value}, path=path)
        for word in (name, *says):
            assert word in str(raised.value), str(raised.value)
        # A layer before with good ones, whose checks are remembered, changes nothing.
        dsv4x.sparse_mla_attention(**arguments, path=path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"extra_cache": None, "extra_indices": None}, ["extra_lens", "extra_cache", "extra_indices"]),
        ({"extra_cache": None}, ["extra_cache", "NoneType"]),
        ({"extra_indices": None}, ["extra_indices", "NoneType"]),
    ],
)
def test_half_an_extra_scope_is_refused(changes, says):
    with pytest.raises((TypeError, ValueError)) as raised:
        dsv4x.sparse_mla_decode(**{**decode_arguments(), **changes})
    for word in says:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("ratio", "changes", "says"),
    [
        (1, {}, ["extra_cache", "given", "None", "compress_ratio 1"]),
        (1, {"extra_cache": None}, ["topk_indices", "given", "None", "compress_ratio 1"]),
        (128, {}, ["topk_indices", "given", "None", "compress_ratio 128"]),
    ],
)
def test_a_layer_takes_only_what_its_kind_has(ratio, changes, says):
    with pytest.raises(ValueError, match="given") as raised:
        dsv4x.sparse_mla_attention(**{**attention_arguments(), "meta": meta(ratio), **changes})
    for word in says:
        assert word in str(raised.value)


def test_an_owned_workspace_has_its_rows_apart():
    with pytest.raises(ValueError, match=r"workspace: stride\(0\) is 0, need >= 512"):
        dsv4x.SparsePrefillChunkCache(workspace=zeros(1, 512).expand(9, 512))


@pytest.mark.parametrize("op", [dsv4x.gather_referenced_cache_blocks, dsv4x.gather_referenced_rows])
def test_indices_are_not_remapped_in_their_own_memory(op):
    indices = zeros(T, 8, dtype=I32)
    with pytest.raises(ValueError, match="remapped: the memory of indices, need other memory"):
        op(cache(), indices, remapped=indices)


@pytest.mark.parametrize(
    ("op", "name"), [(dsv4x.quantize_and_insert_k_cache, "k"), (dsv4x.dequantize_k_cache_paged, "slots")]
)
def test_no_tensor_is_named_and_not_the_device_of_the_cache(op, name):
    given = {**TABLE[op][0](), "cache": PagedCache.zeros(2, DSV4, 64, "meta"), name: None}
    given.pop("out", None)
    with pytest.raises(TypeError, match=f"{name}: got NoneType"):
        op(**given)


@pytest.mark.parametrize(("units", "error", "says"), [(-1, ValueError, "units: got -1"), (1.0, TypeError, "got float")])
def test_scratch_bytes_check_their_argument(units, error, says):
    with pytest.raises(error, match=says):
        dsv4x.compaction_scratch_bytes(units)


def test_dsv32_is_for_the_cache_ops():
    k, slots = zeros(T, 576), torch.arange(T)
    dsv4x.quantize_and_insert_k_cache(k, cache(DSV32), slots)
    with pytest.raises(ValueError, match=r"k: shape is \(3, 512\), need \(any, 576\)"):
        dsv4x.quantize_and_insert_k_cache(zeros(T, 512), cache(DSV32), slots)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((-1, 1), ValueError, "topk: got -1"),
        ((1, -1), ValueError, "window_size: got -1"),
        ((1.0, 1), TypeError, "topk: got float"),
    ],
)
def test_combined_width_checks_its_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        dsv4x.combined_topk_width(*arguments)


def test_an_op_without_kernels_is_named():
    with pytest.raises(ValueError, match=r"op: got 'nothing', need one of .*sparse_mla_decode"):
        dsv4x.explain(dsv4x.Problem("nothing"))
