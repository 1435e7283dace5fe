"""One layer's prefill step as a server would hold it, for the benchmarks."""

from __future__ import annotations

import torch
from flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata

import dsv4x
from dsv4x import AttentionMetadata, PagedCache, SparsePrefillChunkCache, layouts
from dsv4x.common.dispatch import registry
from dsv4x.common.ops import indices

PAGE_SIZE = 64
WINDOW = 128
FILLED = 1 << 14


def pool(pages: int) -> PagedCache:
    """A cache in which every entry holds ordinary values."""
    small = PagedCache.zeros(FILLED // PAGE_SIZE, layouts.DSV4, PAGE_SIZE, "cuda")
    k = (torch.randn(FILLED, 512, device="cuda") / 10).bfloat16()
    dsv4x.quantize_and_insert_k_cache(k, small, torch.arange(FILLED, device="cuda"))
    data = small.data.repeat(-(-pages // small.pages), 1)[:pages].contiguous()
    return PagedCache(data, layouts.DSV4, PAGE_SIZE)


def block_table(lengths: list[int], pages: list[int], generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(sum(pages), generator=generator, device="cuda").int()
    table = torch.full((len(lengths), max(pages)), -1, dtype=torch.int32, device="cuda")
    at = 0
    for row, count in enumerate(pages):
        table[row, :count] = order[at : at + count]
        at += count
    return table


class Step:
    """A chunk of ``tokens`` query tokens behind ``prefix`` tokens, both spread evenly over ``requests``."""

    def __init__(self, tokens: int, prefix: int, heads: int, topk: int, ratio: int, requests: int):
        generator = torch.Generator("cuda").manual_seed(tokens + prefix)
        queries = [tokens // requests + (i < tokens % requests) for i in range(requests)]
        lengths = [prefix // requests + q for q in queries]
        raw = [-(-n // PAGE_SIZE) for n in lengths]
        self.swa, swa_table = pool(sum(raw)), block_table(lengths, raw, generator)
        self.extra, extra = None, {}
        if ratio == 4:
            extra["topk"] = topk
        if ratio > 1:
            compressed = [max(1, -(-(n // ratio) // PAGE_SIZE)) for n in lengths]
            self.extra = pool(sum(compressed))
            extra |= {
                "extra_block_table": block_table(lengths, compressed, generator),
                "extra_page_size": PAGE_SIZE,
                "extra_pages": self.extra.pages,
            }
        starts = torch.tensor([0, *queries]).cumsum(0).int()
        host_lengths = torch.tensor(lengths, dtype=torch.int32)
        self.meta = AttentionMetadata.build(
            starts.cuda(), host_lengths.cuda(), swa_table, compress_ratio=ratio, swa_page_size=PAGE_SIZE,
            swa_pages=self.swa.pages, query_start_loc_cpu=starts, seq_lens_cpu=host_lengths, **extra,
        )  # fmt: skip
        self.q = torch.empty(tokens, heads, 512, dtype=torch.bfloat16, device="cuda").normal_(generator=generator) / 10
        self.sink = torch.randn(heads, device="cuda", generator=generator)
        self.topk, self.topk_lens = None, None
        if ratio == 4:
            visible = self.meta.visible[:, None]
            chosen = (torch.rand(tokens, topk, device="cuda", generator=generator) * visible).int()
            every = torch.arange(topk, dtype=torch.int32, device="cuda")
            self.topk = torch.where(visible > topk, chosen, torch.where(every < visible, every, -1))
            # Its rows are packed to the front.
            self.topk_lens = self.meta.extra_lens
        # A cap no point of the grid meets: routing is judged apart from it.
        self.chunk = SparsePrefillChunkCache(2 << 30).rebuild(self.meta)
        self.scheduler = get_mla_metadata()[0]
        self.combine = registry.find("combine_topk_swa_indices", "triton")

    def run(self, path: str | None = None, chunk: SparsePrefillChunkCache | None = None):
        return dsv4x.sparse_mla_attention(
            self.q, self.swa, self.extra, self.meta, self.topk, self.sink, path=path, chunk=chunk or self.chunk,
            topk_lens=self.topk_lens,
        )  # fmt: skip

    def peer_direct(self):
        """FlashMLA on the fp8 pages, as servers call it: top-k to slots, then the kernel with its scheduler filled."""
        meta, extra = self.meta, {}
        if self.extra is not None:
            if self.topk is not None:
                rows = indices.local_to_slots(
                    self.topk, meta.request, meta.visible, meta.extra_block_table, PAGE_SIZE, meta.extra_pages
                )
            else:
                rows = meta.slot_rows(slice(0, meta.num_tokens)) if meta.extra_indices is None else meta.extra_indices
            extra = {
                "extra_k_cache": self.extra.servers_view,
                "extra_indices_in_kvcache": rows[:, None],
                "extra_topk_length": meta.extra_lens,
            }
        return flash_mla_with_kvcache(
            self.q[:, None], self.swa.servers_view, None, None, 512, self.scheduler, None, 512**-0.5, False, True,
            meta.swa_indices[:, None], self.sink, topk_length=meta.swa_lens, use_legacy=True, **extra,
        )  # fmt: skip

    def kernel_alone(self):
        """A call of nothing but the gathered path's attention kernel."""
        workspace, rows, lens = self.gathered()
        kv, rows = workspace[:, None], rows[:, None]
        return lambda: flash_mla_sparse_fwd(self.q, kv, rows, 512**-0.5, 512, self.sink, lens, use_legacy=True)

    def peer_gathered(self):
        """Everything dequantized, a launch a cache, then combined and attended to, as servers do it."""
        workspace, rows, lens = self.gathered()
        return flash_mla_sparse_fwd(
            self.q, workspace[:, None], rows[:, None], 512**-0.5, 512, self.sink, lens, use_legacy=True
        )

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The workspace, and the index rows and spans over it."""
        (group,) = self.chunk.groups
        workspace = torch.empty(group.rows, 512, dtype=torch.bfloat16, device="cuda")
        if self.extra is not None:
            compressed = group.compressed_rows
            dsv4x.dequantize_k_cache_paged(self.extra, group.slots[:compressed], workspace[:compressed])
            dsv4x.dequantize_k_cache_paged(self.swa, group.slots[compressed:], workspace[compressed:])
        else:
            dsv4x.dequantize_k_cache_paged(self.swa, group.slots, workspace)
        return workspace, *self.index_rows()

    def index_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the gathered workspace and spans, of every token; kept between calls where no indexer selects."""
        (group,) = self.chunk.groups
        (block,) = group.blocks
        if self.topk is None:
            return self.chunk.index_rows(group, block, self.combine)
        call = self.chunk.combining(group, block, self.topk, self.topk_lens)
        self.combine.run(call)
        return call.out_indices, call.out_lens
