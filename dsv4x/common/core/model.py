"""The models' numbers, each written once."""

VALUE_DIM = 512
"""V is the first 512 values of K."""

HEAD_DIMS = (512, 576)
"""Values of K: DeepSeek-V4's, and V3.2's, whose 64 RoPE values are not part of V."""

MAX_HEADS = 128

INDEX_DIM = 128
"""Values of the indexer's q and K."""
