"""Bounds that launchers and the ops above them both count with. Imports no triton."""

MAX_SPLITS = 128
"""Most parts a row's entries are split into."""

PASS_UNITS = 1 << 26
"""Units one pass over the indices looks for: more than one layer's pool has slots, and 16 MiB of scratch."""

WORD_BITS = 32


def least_part(k: int) -> int:
    """Columns a program selects from at least, where several of them share a row that is long enough for two."""
    return max(8192, 4 * k)
