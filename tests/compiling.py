"""Compile every Triton kernel of dsv4x for a GPU that is not here, with the constants its launcher would pass."""

from __future__ import annotations

import importlib
import pathlib
import pkgutil
import re
import subprocess
from dataclasses import dataclass, field

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

import dsv4x.common.kernels as kernels_package
import dsv4x.cuda.hopper as hopper_package
import dsv4x.rocm.cdna as cdna_package
from dsv4x import layouts
from dsv4x.common.kernels import (
    cache,
    compaction,
    decode,
    gather_combine,
    indices,
    merge,
    mqa_logits,
    order,
    prefill,
    schedule,
    step,
    topk,
)
from dsv4x.common.kernels import decode_shapes as config
from dsv4x.common.kernels import prefill_shapes as prefill_config
from dsv4x.common.kernels import requantize as convert
from dsv4x.common.kernels.entries import entry_format
from dsv4x.cuda.hopper import decode as decode_hopper
from dsv4x.cuda.hopper import few_heads
from dsv4x.cuda.hopper import prefill as prefill_hopper
from dsv4x.rocm.cdna import decode as decode_cdna
from dsv4x.rocm.cdna import prefill as prefill_cdna
from dsv4x.rocm.cdna import ragged
from dsv4x.rocm.cdna.products import NUM_WARPS as CDNA_WARPS
from dsv4x.rocm.cdna.shapes import shape_of

TARGETS = {
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
}
SHARED_LIMIT = {
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
}

POINTERS = {
    "cache_ptr": "*u8",
    "swa_ptr": "*u8",
    "extra_ptr": "*u8",
    "slots_ptr": "*i64",
    "row_slots_ptr": "*i32",
    "q_ptr": "*bf16",
    "k_ptr": "*bf16",
    "kv_ptr": "*bf16",
    "sink_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "partial_lse_ptr": "*fp32",
}
FAR = ("cache_ptr", "swa_ptr", "extra_ptr", "kv_ptr", "k_ptr", "src_ptr", "dst_ptr")
"""Pointers to caches and workspaces, whose tensors may take 2 GiB or more."""
SCALARS = {"scale": "fp32", "k_scale": "fp32", "swa_k_scale": "fp32", "extra_k_scale": "fp32"}
ATTENTION_OUT = {"out_ptr": "*bf16"}


@dataclass(frozen=True)
class Case:
    """One compilation: a kernel, its constants, launch options by arch, and types its names do not imply."""

    kernel: triton.JITFunction
    constants: dict[str, object]
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4})
    types: dict[str, str] = field(default_factory=dict)
    label: str = ""
    layouts: tuple[layouts.CacheLayout, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__}{self.label}"

    @property
    def has_far(self) -> bool:
        """Whether one of its pointers may be to 2 GiB or more."""
        return any(name in FAR for name in self.kernel.arg_names)


def cache_layouts() -> list[layouts.CacheLayout]:
    """Every named layout, and DSv4 in gfx942's FP8 flavour."""
    return [member.value for member in layouts.MLAKVCacheLayout] + [layouts.DSV4.with_flavour("e4m3fnuz")]


def cases(arch: str) -> list[Case]:
    """Every kernel, and every configuration of the attention kernels, that ``arch`` would launch."""
    found = []
    for layout in cache_layouts():
        label = f"[{layout.name}]"
        shared = {
            **cache.cache_constexprs(layout, arch),
            "WIDE": layout is layouts.DSV32,
        }
        for kernel, shape, more in (
            (cache.dequantize_kernel, cache.dequantize_shape(layout), {}),
            (
                cache.quantize_insert_kernel,
                cache.quantize_shape(layout),
                {**cache.quantize_constexprs(layout), "UNIT_SCALE": False},
            ),
        ):
            constants = {**shared, **more, "BLOCK_N": shape[0]}
            found.append(Case(kernel, constants, {"num_warps": shape[1]}, ATTENTION_OUT, label=label))
    found += copy_cases(arch)
    found.append(
        Case(
            convert.requantize_kernel,
            {
                "NOPE_DIM": 512, "ROPE_DIM": 64, "SRC_PITCH": 576, "DST_PITCH": 656, "SCALES": 4,
                "BLOCK_N": convert.ENTRIES, "HAS_PAGES": True, "FNUZ": arch == "gfx942",
            },
            types={"src_ptr": "*u8", "dst_ptr": "*u8"},
        )
    )  # fmt: skip
    integers = {"lens_ptr": "*i32", "out_ptr": "*i32"}
    found += [
        Case(indices.window_slots_kernel, {"BLOCK": 128}, {"num_warps": 1}, integers),
        Case(indices.local_to_slots_kernel, {"BLOCK": 512}, types=integers),
        Case(
            indices.combine_kernel,
            {
                "BLOCK": 512,
                "HAS_ROW_SLOTS": True,
                "HAS_POSITIONS": False,
                "HAS_SPANS": True,
                "HAS_COMPRESSED_LENS": True,
            },
            types=integers,
        ),
        *step_cases(),
        gather_case(layouts.DSV4, layouts.DSV4, arch),
        gather_case(layouts.DSV41_FP4, layouts.DSV41_FP8, arch),
        gather_case(layouts.DSV4, layouts.DSV4, arch, combine=True),
        gather_case(layouts.DSV41_FP4, layouts.DSV41_FP8, arch, combine=True),
        Case(indices.local_to_workspace_rows_kernel, {"BLOCK": 512}, types=integers),
        Case(indices.slots_to_compact_slots_kernel, {"BLOCK": 512}, types=integers),
        Case(indices.count_entries_kernel, {"BLOCK": 512, "HAS_LENS": True}, types={"counts_ptr": "*i64"}),
        Case(indices.dense_to_ragged_kernel, {"BLOCK": 512, "HAS_LENS": True}, types={"upper": "i64"}),
        Case(indices.ragged_to_dense_kernel, {"BLOCK": 512}, types=integers),
        Case(
            indices.combine_swa_extra_kernel,
            {"BLOCK": 512, "HAS_SWA_LENS": True, "HAS_EXTRA_LENS": True},
            types={"swa_ptr": "*i32", "extra_ptr": "*i64", **integers},
        ),
        Case(indices.build_swa_token_ids_kernel, {"BLOCK": 512}, types={"first_ptr": "*i64"}),
        Case(indices.sanitize_kernel, {"BLOCK": 512, "HAS_LENS": True}, types=integers),
        Case(compaction.popcount_kernel, {"BLOCK": 64}),
        *(
            Case(
                decode.reduce_kernel,
                {
                    "VALUE_DIM": 512,
                    "HAS_SINK": True,
                    "BLOCK_S": at_once,
                    "EARLY": decode.depends_early(arch),
                    "ONE": one,
                },
                {"num_warps": warps},
                {**ATTENTION_OUT, "swa_lens_ptr": "*i32", "extra_lens_ptr": "*i32"},
                label=f"[{at_once},{one}]",
            )
            for at_once, warps in decode.REDUCTIONS
            for one in (False, True)
        ),
    ]
    for kind, width, states in (("bf16", 512, 2), ("fp32", 512, 16), ("bf16", 200, 1)):
        block_v, block_s, warps = merge.merge_shape(states, width)
        found.append(
            Case(
                merge.merge_kernel,
                {"HAS_SINK": True, "WIDTH": width, "BLOCK_V": block_v, "BLOCK_S": block_s},
                {"num_warps": warps},
                {**dict.fromkeys(("outs_ptr", "last_ptr", "out_ptr"), f"*{kind}"), "lses_ptr": "*fp32"},
                label=f"[{kind} {width} {states}]",
            )
        )
    # Triton makes an integer argument of 1 a constant: the slots of a unit of one slot, and most sizes of a tiny pool.
    tiny = ("width", "slots", "unit_slots", "units", "words", "capacity", "indices_stride", "out_stride")
    for label, wide, ones in (("", False, ()), ("[wide]", True, ("unit_slots",)), ("[tiny]", False, tiny)):
        types = {"indices_ptr": "*i64", "listed_ptr": "*i64", "slots": "i64", "first": "i64"} if wide else {}
        for kernel, constants in (
            (compaction.mark_kernel, {"BLOCK": 512, "HAS_LENS": True, "WIDE": wide}),
            (compaction.list_kernel, {"BLOCK": 64}),
            (compaction.remap_kernel, {"BLOCK": 512, "HAS_LENS": True, "WIDE": wide}),
        ):
            constants |= {name: 1 for name in ones if name in kernel.arg_names}
            found.append(Case(kernel, constants, types={**types, "out_ptr": "*i32"}, label=label))
    for word in (tl.int64, tl.int32):
        constants = {"WORD": word, "BLOCK": 2048}
        found.append(Case(compaction.copy_pages_kernel, constants, types={"out_ptr": "*u8"}, label=f"[{word}]"))
    for heads in (8, 64):
        flags = {"HAS_SWA_LENS": True, "HAS_EXTRA": True, "HAS_EXTRA_LENS": True}
        for swa, extra, split, local in decode_scopes(heads):
            shape = config.decode_config(arch, heads, (swa, extra))
            block = {"BLOCK_H": shape.block_h, "BLOCK_K": shape.block_k, "VALUE_DIM": 512, "HAS_SINK": True}
            constants = {
                **block, **flags, "SPLIT": split, "TAIL": swa.head_dim - 512, "WIDE": False, "LOCAL": local,
                "EARLY": decode.depends_early(arch), "SWA": entry_format(swa, arch), "EXTRA": entry_format(extra, arch),
                "DIES": order.dies(arch), **dict.fromkeys(("SWA_PAGE", "EXTRA_PAGE"), 64 if shape.fixed_pages else 0),
            }  # fmt: skip
            label = f"[H={heads},{swa.name}+{extra.name},split={split},local={local}]"
            found.append(Case(decode.decode_kernel, constants, shape.options, ATTENTION_OUT, label, (swa, extra)))
    for head_dim in (512, 576):
        for most, shape in prefill_config.prefill_configs(arch, head_dim):
            constants = {
                "BLOCK_H": shape.block_h, "BLOCK_K": shape.block_k, "PREFETCH": shape.prefetch, "VALUE_DIM": 512,
                "TAIL": head_dim - 512, "HAS_LENS": True, "HAS_SINK": True, "DIES": order.dies(arch),
            }  # fmt: skip
            label = f"[H<={most},D={head_dim}]"
            found.append(Case(prefill.prefill_kernel, constants, shape.options, ATTENTION_OUT, label=label))
    if arch == "sm_90":
        found += [hopper_decode_case(1, 0, 0, far=True)]
        found += [hopper_decode_case(*flags) for flags in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1))]
        few = ((1, 0, 0, 8), (0, 0, 0, 16), (1, 1, 1, 8), (1, 1, 0, 16), (0, 1, 0, 16), (1, 1, 1, 16))
        found += [few_heads_case(*flags) for flags in few] + [few_heads_case(1, 0, 0, 16, far=True)]
        options = {"num_warps": prefill_hopper.NUM_WARPS}
        for index in ("*i32", "*i64"):
            for given in (False, True):
                constants = {"HAS_LENS": given, "HAS_SINK": given}
                types = {**ATTENTION_OUT, "indices_ptr": index, "lens_ptr": index}
                label = f"[{index},lens={given}]"
                found.append(Case(prefill_hopper.prefill_hopper_kernel, constants, options, types, label=label))
    if arch.startswith("gfx"):
        found += cdna_cases(arch)
        packing = {"HAS_LENS": True, "BLOCK": 512}, {"num_warps": 4}, {"counts_ptr": "*i64", "lens_ptr": "*i32"}
        found.append(Case(ragged.pack_rows_kernel, *packing))
        # Triton makes an integer argument of 1 a constant.
        found.append(Case(ragged.pack_rows_kernel, packing[0] | {"width": 1}, *packing[1:], label="[1]"))
    return found + logits_cases(arch)


def copy_cases(arch: str) -> list[Case]:
    """Entries moved: each layout between pages of 64 and of 16; of some pages of one entry, and past 2**31 slots."""
    types = {"src_ptr": "*u8", "dst_ptr": "*u8", "src_slots_ptr": "*i64", "dst_slots_ptr": "*i32"}
    wider = {**types, "src_capacity": "i64", "dst_capacity": "i64"}
    found = []
    for layout in cache_layouts():
        further = ((True, False), (False, True)) if layout in (layouts.DSV4, layouts.DSV32, layouts.INDEXER_FP8) else ()
        for one, wide in ((False, False), *further):
            sizes = (1, 1) if one else (64, 16)
            places = [(size, layout.page_stride(size)) for size in sizes]
            constants = cache.copy_constexprs(layout, *places, wide, arch)
            if one:
                constants = {**constants, "src_page_size": 1, "dst_page_size": 1}
            options = {"num_warps": cache.COPY_WARPS}
            label = f"[{layout.name},{one},{wide}]"
            found.append(Case(cache.copy_entries_kernel, constants, options, wider if wide else types, label))
    return found


LOGITS_TYPES = {
    "q_ptr": "*u8", "k_ptr": "*u8", "k_scale_ptr": "*u8", "weights_ptr": "*fp32", "logits_ptr": "*fp32",
    "out_ptr": "*fp32",
}  # fmt: skip
ARCH_FP8 = {"gfx942": "e4m3fnuz"}


def logits_cases(arch: str) -> list[Case]:
    """The indexer's kernels: the arch's own FP8, the other flavour, and e2m1 with either kind of q."""
    own = ARCH_FP8.get(arch, "e4m3fn")
    other = "e4m3fn" if own == "e4m3fnuz" else "e4m3fnuz"
    found = []
    pairs = [(own, own), (own, other), (own, "e2m1"), ("bf16", "e2m1")]
    if own == "e4m3fn":
        pairs.append((own, "mxfp8"))
    for q, k in pairs:
        native = mqa_logits.native(q, k, own)
        types = {**LOGITS_TYPES, "q_ptr": "*bf16" if q == "bf16" else "*u8"}
        # Heads where shared memory and registers are most; sm_100's fp8 is sm_90's.
        for next_n in (1, 2, None):
            shape = mqa_logits.logits_config(arch, native, next_n=next_n)
            constants = {
                "HEADS": 64, "ROWS": shape.rows, "BLOCK": shape.block, "Q": q, "K": k, "NATIVE": native,
                "STAGES": shape.num_stages,
            }  # fmt: skip
            label = f"[{q},{k},{next_n}"
            if next_n is None:
                for relative in (False, True):
                    more = {**constants, "RELATIVE": relative}
                    kernel = mqa_logits.mqa_logits_kernel
                    found.append(Case(kernel, more, shape.options, types, label=f"{label},{relative}]"))
            else:
                for whole in (False, True):
                    more = {**constants, "WHOLE_PAGES": whole, "HAS_REQUESTS": next_n == 1}
                    paged = {**more, "CLEAN": whole}, {**more, "SPLIT": mqa_logits.SPLIT}
                    kernels = mqa_logits.paged_mqa_logits_kernel, mqa_logits.scheduled_mqa_logits_kernel
                    for kernel, given in zip(kernels, paged):
                        found.append(Case(kernel, given, shape.options, types, label=f"{label},{whole}]"))
    for starts, shifted, table, in_place in ((False, False, True, True), (True, True, False, False)):
        constants = {
            "BLOCK": 2048, "HAS_STARTS": starts, "SHIFTED": shifted, "HAS_TABLE": table, "HAS_REQUESTS": table,
            "IN_PLACE": in_place, "ALIGNED": not in_place,
        }  # fmt: skip
        label = f"[{starts},{table}]"
        found.append(Case(mqa_logits.clean_logits_kernel, constants, {"num_warps": 8}, LOGITS_TYPES, label=label))
    # DeepGEMM's logits on SM100, which are widened on the way.
    wider = {**constants, "HAS_STARTS": False, "SHIFTED": False, "HAS_TABLE": True, "HAS_REQUESTS": False}
    types = {**LOGITS_TYPES, "logits_ptr": "*bf16"}
    found.append(Case(mqa_logits.clean_logits_kernel, wider, {"num_warps": 8}, types, label="[bf16]"))
    found.append(Case(mqa_logits.limit_ranges_kernel, {"BLOCK": 1024}))
    bytes_of = {"k_ptr": "*u8", "scale_ptr": "*i32"}
    for size, wide in ((128, False), (64, True)):
        constants = {"ENTRY": size, "BLOCK": 32, "WIDE": wide}
        label = f"[{size}]"
        found.append(Case(mqa_logits.gather_indexer_k_kernel, constants, types=bytes_of, label=label))
    sums = {"sums_ptr": "*i64"}
    found.append(Case(schedule.segment_sums_kernel, {"BLOCK": 1024}, types=sums))
    for one, block in ((True, 256), (True, 1024), (False, 1024)):
        constants = {"ONE_BLOCK": one, "BLOCK": block, "SUMS": 1024}
        label = f"[{one},{block}]"
        found.append(Case(schedule.schedule_kernel, constants, types={} if one else sums, label=label))
    found.append(Case(schedule.limit_lens_kernel, {"BLOCK": 256}))
    for named in (False, True):
        constants = {"HAS_REQUESTS": named, "BLOCK": 1024}
        found.append(Case(schedule.spread_rows_kernel, constants, label=f"[{named}]"))
    values = {"logits_ptr": "*fp32", "values_ptr": "*fp32"}
    sizes = topk._SIZES
    for method, ids, aligned in ((0, False, True), (1, True, False), (2, False, False), (2, False, True)):
        constants = {
            "METHOD": method, "HAS_IDS": ids, "HAS_STARTS": not (ids or aligned), "HAS_LENS": not ids,
            "HAS_REQUESTS": method == 2 and not aligned, "HAS_LOCAL": method == 2, "HAS_VALUES": ids,
            "ALIGNED": aligned, "LISTS": not ids, "EARLY": decode.depends_early(arch), "SMALL": sizes.small,
            "LARGE": sizes.large, "ROOM": sizes.large, "SAMPLE": sizes.sample, "BLOCK": sizes.block,
            "STAGES": sizes.stages,
        }  # fmt: skip
        label = f"[{method},{ids},{aligned}]"
        found.append(Case(topk.topk_kernel, constants, {"num_warps": topk.num_warps(arch)}, values, label=label))
    return found


def hopper_decode_flags(given: int, split: int, local: int, far: bool) -> tuple[dict[str, object], dict[str, str], str]:
    """(constants, types, label) with all optional arguments or none, int32 and int64 rows side by side."""
    constants = {
        "HAS_SWA_LENS": bool(given), "HAS_EXTRA_LENS": bool(given), "HAS_SINK": bool(given), "SPLIT": bool(split),
        "BIG_PAGES": not given, "FAR_HEADS": far, "LOCAL": bool(local),
    }  # fmt: skip
    types = {**ATTENTION_OUT, "extra_lens_ptr": "*i64", "extra_indices_ptr": "*i32" if local else "*i64"}
    return constants, types, f"given={given},split={split},local={local}{',far' * far}"


def hopper_decode_case(given: int, split: int, local: int, far: bool = False) -> Case:
    constants, types, label = hopper_decode_flags(given, split, local, far)
    constants |= {"RIGHT": decode_hopper.RIGHT_REGISTERS, "LOADER": decode_hopper.LOADER_REGISTERS}
    return Case(decode_hopper.decode_hopper_kernel, constants, {"num_warps": 4}, types, label=f"[{label}]")


def few_heads_case(given: int, split: int, local: int, heads: int, far: bool = False) -> Case:
    constants, types, label = hopper_decode_flags(given, split, local, far)
    constants |= {"BLOCK_H": heads}
    return Case(few_heads.decode_few_heads_kernel, constants, {"num_warps": 4}, types, label=f"[H={heads},{label}]")


def cdna_cases(arch: str) -> list[Case]:
    """Gluon's decode and prefill, with all optional arguments and without; :func:`compile_case` says ``FAR``."""
    fnuz = layouts.DSV4.with_flavour("e4m3fnuz")
    found = []
    for heads, swa, extra, split, local in (
        (8, layouts.DSV4, layouts.DSV4, True, True),
        (8, fnuz, fnuz, True, False),
        (64, layouts.DSV4, layouts.DSV4, False, True),
        (64, layouts.DSV4, layouts.DSV4, True, True),
        (64, layouts.DSV4, layouts.DSV4, True, False),
        (64, fnuz, layouts.DSV4, True, True),
        (64, fnuz, fnuz, True, True),
    ):
        shape = shape_of(arch, heads)
        constants = {
            **dict.fromkeys(("HAS_SWA_LENS", "HAS_EXTRA", "HAS_EXTRA_LENS", "HAS_SINK"), True), "SPLIT": split,
            "BLOCK_H": shape.block_h, "BLOCK_K": shape.block_k, "LOCAL": local, "SWA_PAGE": 64, "EXTRA_PAGE": 64,
            "SWA_FNUZ": swa is fnuz, "EXTRA_FNUZ": extra is fnuz, "FAR": False, "CDNA4": arch == "gfx950",
            "DIES": order.dies(arch),
        }  # fmt: skip
        options = {"num_warps": CDNA_WARPS, **shape.options}
        label = f"[H={heads},{swa.name}+{extra.name},split={split},local={local}]"
        kernel = decode_cdna.decode_cdna_kernel
        found.append(Case(kernel, constants, options, ATTENTION_OUT, label, (swa, extra)))
    bare = {**constants, **dict.fromkeys(("HAS_SWA_LENS", "HAS_EXTRA", "HAS_EXTRA_LENS", "HAS_SINK", "SPLIT"), False)}
    types = {**ATTENTION_OUT, "swa_indices_ptr": "*i64"}
    found.append(Case(kernel, {**bare, "LOCAL": False}, options, types, "[H=64,DSv4 fnuz,bare]", (fnuz, fnuz)))
    for heads, given in ((8, True), (64, True), (64, False)):
        shape = shape_of(arch, heads)
        constants = {
            "HAS_LENS": given, "HAS_SINK": given, "BLOCK_H": shape.block_h, "BLOCK_K": shape.block_k,
            "CDNA4": arch == "gfx950", "DIES": order.dies(arch),
        }  # fmt: skip
        options = {"num_warps": CDNA_WARPS, **shape.options}
        types = {**ATTENTION_OUT, "indices_ptr": "*i32" if given else "*i64"}
        label = f"[H={heads},given={given}]"
        found.append(Case(prefill_cdna.prefill_cdna_kernel, constants, options, types, label))
    return found


def step_cases() -> list[Case]:
    """A step's metadata for the model's kinds, and for the further ones of a second launch; its gather plan."""
    integers = {"out_ptr": "*i32", "lens_ptr": "*i32"}
    found = []
    for first, a, b in ((True, step.SELECTS, step.ROWS), (True, step.NONE, step.NONE), (False, step.ROWS, step.NONE)):
        constants = {
            "FIRST": first, "WINDOW": first, "A": a, "B": b, "BLOCK_W": 128, "BLOCK_R": step.BLOCK_R, "TILE": step.TILE,
        }  # fmt: skip
        found.append(Case(step.step_kernel, constants, label=f"[{first},{a},{b}]"))
    found += [
        Case(step.gather_requests_kernel, {"BLOCK_R": step.BLOCK_R}),
        Case(step.gather_slots_kernel, {"TILE": step.GATHER_TILE}),
    ]
    for local in (False, True):
        constants = {"HAS_SPANS": True, "LOCAL": local, "COUNTED": local, "BLOCK": 512}
        found.append(Case(step.pack_slots_kernel, constants, types=integers, label=f"[{local}]"))
    return found


def gather_case(extra: layouts.CacheLayout, swa: layouts.CacheLayout, arch: str, combine: bool = False) -> Case:
    constants: dict[str, object] = {}
    for scope, layout in (("EXTRA", extra), ("SWA", swa)):
        made = cache.cache_constexprs(layout, arch)
        constants |= {
            f"{scope}_BLOCK": cache.dequantize_shape(layout)[0], f"{scope}_TILES": made["TILES"],
            f"{scope}_ROPE": made["ROPE_BLOCK"], f"{scope}_WIDE": False, scope: made["FORMAT"],
        }  # fmt: skip
    options = {"num_warps": cache.dequantize_shape(swa)[1]}
    kernel = gather_combine.gather_combine_kernel if combine else cache.gather_kernel
    if combine:
        constants |= {
            "HAS_ROW_SLOTS": True, "HAS_POSITIONS": True, "HAS_SPANS": False, "HAS_COMPRESSED_LENS": True, "BLOCK": 512,
        }  # fmt: skip
    return Case(kernel, constants, options, ATTENTION_OUT, label=f"[{extra.name}+{swa.name}]")


def decode_scopes(heads: int) -> list[tuple[layouts.CacheLayout, layouts.CacheLayout, bool, bool]]:
    """(window layout, extra layout, split, local) of the decode compilations: every layout in one scope at least."""
    fnuz = layouts.DSV4.with_flavour("e4m3fnuz")
    found = [
        (layouts.DSV4, layouts.DSV4, False, True),
        (layouts.DSV4, layouts.DSV4, True, False),
        (fnuz, layouts.DSV4, True, True),
        (layouts.DSV41_FP8, layouts.DSV41_FP4, True, True),
        (layouts.DSV32, layouts.TRTLLM_NATIVE, True, False),
    ]
    if heads > 8:
        found += [
            (layouts.DSV4, layouts.DSV4, False, False),
            (fnuz, fnuz, True, True),
            (layouts.DSV41_FP8_SOA, layouts.UNIFORM_FP8, True, False),
            (layouts.BF16_512, layouts.BF16_512, True, True),
            (layouts.BF16_576, layouts.BF16_576, True, False),
        ]
    return found


def launchable_kernels() -> set[str]:
    """Names of the kernels launchers launch: the jit functions called ``*_kernel``."""
    names = set()
    for package in (kernels_package, hopper_package, cdna_package):
        for module in pkgutil.iter_modules(package.__path__):
            loaded = importlib.import_module(f"{package.__name__}.{module.name}")
            for name, value in vars(loaded).items():
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                    names.add(name)
    return names


def compile_case(case: Case, arch: str, far: bool = False) -> triton.compiler.CompiledKernel:
    """Compile with pointers and strides 16-byte aligned, as the ops' checks leave them, where Triton looks at that.

    On HIP it also looks whether a tensor's storage is below 2 GiB, and takes 32-bit offsets then. All tensors are small
    here; with ``far`` those in ``FAR`` are not, and a kernel with a constant of that name is compiled for it.
    """
    hip = TARGETS[arch].backend == "hip"
    constants = {**case.constants, **({"FAR": far} if "FAR" in case.constants else {})}
    signature = {}
    attributes = {}
    for position, name in enumerate(case.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        default = "*i32" if name.endswith("_ptr") else "i32"
        signature[name] = case.types.get(name) or POINTERS.get(name) or SCALARS.get(name, default)
        if case.kernel.params[position].do_not_specialize:
            continue
        found: list[list[object]] = []
        if name.endswith(("_ptr", "_stride", "_stride_t", "_stride_h")):
            found.append(["tt.divisibility", 16])
        if hip and name.endswith("_ptr") and not (far and name in FAR):
            found.append(["tt.pointer_range", 32])
        if found:
            attributes[(position,)] = found
    make = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = make(case.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[arch], options=dict(case.options))


def amd_report(compiled: triton.compiler.CompiledKernel) -> dict[str, int]:
    """VGPRs, AGPRs, spills and MFMA instructions, read from the assembly."""
    text = compiled.asm["amdgcn"]

    def field_of(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        assert match is not None, f"no .{name} in the assembly"
        return int(match.group(1))

    return {
        "lds": compiled.metadata.shared,
        "vgpr": field_of("vgpr_count"),
        "agpr": field_of("agpr_count"),
        "spills": field_of("vgpr_spill_count"),
        "mfma": len(re.findall(r"^\s*v_mfma_", text, re.M)),
        "calls": len(re.findall(r"^\s*s_(?:swappc|call)", text, re.M)),
        "fp8": len(re.findall(r"^\s*v_cvt_(?:scalef32_)?pk_f32_fp8", text, re.M)),
    }


def nvidia_report(compiled: triton.compiler.CompiledKernel, cubin: pathlib.Path) -> dict[str, int]:
    """Bytes of stack a thread, which is where spills go, and warpgroup MMA instructions; writes ``cubin``."""
    cubin.write_bytes(compiled.asm["cubin"])
    return {"stack": stack_bytes(cubin), "wgmma": compiled.asm["ptx"].count("wgmma.mma_async")}


def stack_bytes(cubin: pathlib.Path) -> int:
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    return int(match.group(2))
