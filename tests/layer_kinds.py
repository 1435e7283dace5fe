"""The paths of DeepSeek-V4's layer kinds, by their ratio."""

from dsv4x import LayerKind
from dsv4x.common.step import attention


def paths_of(ratio):
    return attention.paths_of(LayerKind.of(ratio, None, ratio > 1))
