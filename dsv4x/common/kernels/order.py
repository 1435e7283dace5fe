"""Which program takes which token and block of heads."""

import triton
import triton.language as tl

XCDS = 8
"""Dies of an MI300X and an MI355X, which take programs in turn and have an L2 cache each."""


def dies(arch: str) -> int:
    """Dies that programs are handed out over, one after the other, for :func:`token_and_block`; 1 where one L2 is all.

    Parts of such a GPU have four, two or one: there what is right for eight is right as well.
    """
    return XCDS if arch.startswith(("gfx942", "gfx950")) else 1


@triton.jit
def token_and_block(program, tokens, blocks, DIES: tl.constexpr):
    """``(token, block of heads)`` of a program: the blocks of a token are ``DIES`` programs apart, on one die.

    They read the same entries, and find them in that die's L2. The last tokens, fewer than dies, are not kept together.
    """
    group = DIES * blocks
    first = program // group * DIES
    inside = program % group
    together = tl.minimum(tokens - first, DIES)
    return first + inside % together, inside // together
