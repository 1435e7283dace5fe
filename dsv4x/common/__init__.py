"""Vendor-neutral rooms: layouts, indices, the oracle, the registry and the Triton kernels."""
