"""A page of a layout as a table and as an SVG, both read off the record."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from .core.layouts import CacheLayout


@dataclass(frozen=True)
class Region:
    """One kind of bytes in a page: entry i's stand at ``offset + i * pitch``, ``size`` of them."""

    name: str
    encoding: str
    offset: int
    size: int
    pitch: int


def byte_map(layout: CacheLayout, page_size: int) -> list[Region]:
    """The regions of a page, in the order of entry 0's offsets; what no region covers is padding."""
    regions = []
    if layout.nope_dim:
        encoding = f"{layout.nope_dim} x {layout.value_encoding}"
        regions.append(Region("values", encoding, 0, layout.nope_bytes, layout.data_pitch))
    if layout.rope_dim:
        name = "RoPE values" if layout.nope_dim else "values"
        encoding = f"{layout.rope_dim} x bf16"
        regions.append(Region(name, encoding, layout.rope_base, 2 * layout.rope_dim, layout.data_pitch))
    if layout.scale_bytes:
        base, used = layout.scale_base(page_size), layout.scale_bytes - layout.scale_pad
        encoding = f"{layout.num_scales} x {layout.scale_encoding}, one per {layout.scale_tile}"
        regions.append(Region("scales", encoding, base, used, layout.scale_pitch))
        if layout.scale_pad:
            regions.append(Region("pad", "zero", base + used, layout.scale_pad, layout.scale_pitch))
    return sorted(regions, key=lambda region: region.offset)


def table(layout: CacheLayout, page_size: int) -> str:
    """The byte map as text."""
    stride, used = layout.page_stride(page_size), page_size * layout.entry_bytes
    lines = [
        f"{layout.name}: head dim {layout.head_dim}, {layout.entry_bytes} B an entry, {layout.arrangement}",
        f"page of {page_size}: {used} B used, {stride} B stride"
        + (f" (a multiple of {layout.page_alignment})" if layout.page_alignment > 1 else ""),
        "",
        f"{'region':<12}{'encoding':<34}{'entry i at':<22}{'bytes':>6}{'first':>9}{'last ends':>11}",
    ]
    for region in byte_map(layout, page_size):
        where = f"{region.offset} + i * {region.pitch}"
        end = region.offset + (page_size - 1) * region.pitch + region.size
        lines.append(f"{region.name:<12}{region.encoding:<34}{where:<22}{region.size:>6}{region.offset:>9}{end:>11}")
    if stride > used:
        lines.append(f"{'page pad':<12}{'never touched':<34}{used!s:<22}{stride - used:>6}{used:>9}{stride:>11}")
    return "\n".join(lines)


_COLOURS = {"values": "#7fb2e5", "RoPE values": "#a6d9a0", "scales": "#f0b86c", "pad": "#d8d8d8", "page pad": "#d8d8d8"}
_WIDTH, _BAR, _MARGIN = 860, 44, 20


def svg(layout: CacheLayout, page_size: int) -> str:
    """Two bars: a whole page to scale, and below it the bytes of entry 0, each region with its offset and size."""
    stride, used = layout.page_stride(page_size), page_size * layout.entry_bytes
    regions = byte_map(layout, page_size)
    page: list[tuple[str, int, int]] = []
    if layout.arrangement == "soa":
        page.append(("values", 0, page_size * layout.data_bytes))
        if layout.scale_bytes:
            page.append(("scales", page_size * layout.data_bytes, page_size * layout.scale_bytes))
    else:
        page += [("values", i * layout.entry_bytes, layout.entry_bytes) for i in range(page_size)]
    if stride > used:
        page.append(("page pad", used, stride - used))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + 2 * _MARGIN}" height="265" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_MARGIN}" y="22" font-size="15">{escape(layout.name)}: a page of {page_size} entries, '
        f"{stride} B</text>",
    ]
    for name, offset, size in page:
        parts.append(_box(_MARGIN + _WIDTH * offset / stride, 34, _WIDTH * size / stride, name, ""))
    caption = (
        "all data rows, then all scale rows"
        if layout.arrangement == "soa" and layout.scale_bytes
        else f"entries together, {layout.entry_bytes} B each"
    )
    parts.append(f'<text x="{_MARGIN}" y="96">{caption}</text>')
    parts.append(f'<text x="{_MARGIN}" y="132" font-size="15">entry 0: {layout.entry_bytes} B</text>')
    left = float(_MARGIN)
    # A floor on the width keeps a region of a few bytes readable beside one of hundreds.
    shares = [max(region.size / layout.entry_bytes, 0.16) for region in regions]
    for region, share in zip(regions, shares):
        width = _WIDTH * share / sum(shares)
        parts.append(_box(left, 144, width, region.name, region.name))
        texts = [*region.encoding.split(", "), f"at {region.offset}", f"{region.size} B, next +{region.pitch}"]
        for line, text in enumerate(texts):
            parts.append(f'<text x="{left + 2:.1f}" y="{206 + 15 * line}" font-size="10">{escape(text)}</text>')
        left += width
    return "\n".join([*parts, "</svg>", ""])


def _box(x: float, y: float, width: float, kind: str, label: str) -> str:
    box = (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BAR}" fill="{_COLOURS[kind]}" '
        'stroke="#444" stroke-width="0.6"/>'
    )
    return box + (f'<text x="{x + 4:.1f}" y="{y + 26}">{escape(label)}</text>' if label else "")


def document(page_size: int = 64) -> str:
    """``docs/layouts.md``: every named layout's table and drawing."""
    from .core.layouts import MLAKVCacheLayout

    parts = [
        "# Layouts\n",
        "Written by `python -m dsv4x layout --docs docs`; a test holds it to the records in "
        "`dsv4x/common/core/layouts.py`.",
        f"Pages of {page_size} entries. What the encodings mean is in [formats.md](formats.md).",
    ]
    for member in MLAKVCacheLayout:
        parts.append(f"\n## {member.name}\n\n![{member.value.name}](layouts/{member.name.lower()}.svg)\n")
        parts.append(f"```\n{table(member.value, page_size)}\n```")
    return "\n".join(parts) + "\n"
