"""vLLM, as this adapter knows it."""

from ..activation import Server

SERVER = Server("vLLM", "vllm", ("0.30.0", "0.31.0", "0.32.0", "0.33.0"), "DSV4X_VLLM", logger="vllm.dsv4x")
