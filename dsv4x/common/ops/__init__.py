"""The public ops, and the same for torch.compile."""

from . import torch_library

__all__ = ["torch_library"]
