"""SGLang, as this adapter knows it."""

from ..activation import Server

SERVER = Server("SGLang", "sglang", ("0.5.23",), "DSV4X_SGLANG")
