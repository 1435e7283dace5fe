"""vLLM runs DeepSeek-V4's attention on dsv4x: the entry point that vLLM calls, which imports nothing of its models.

``docs/servers/vllm.md`` says what is replaced and how to see it.
"""

from __future__ import annotations

from .. import activation
from .server import SERVER

ARCHITECTURES = {
    "DeepseekV4ForCausalLM": "DeepseekV4ForCausalLM",
    "DeepseekV4ForConditionalGeneration": "DeepseekV4ForConditionalGeneration",
    "DeepSeekV4MTPModel": "DeepSeekV4MTP",
    "DSparkDraftModel": "DSparkDeepseekV4ForCausalLM",
}
"""vLLM's name of a model -> the class, which ``models`` re-exports after the attention class is in its place."""


def register() -> None:
    """Entry point of group ``vllm.general_plugins``, called in every process; it registers strings alone.

    Raises:
        Required: dsv4x stays out, and ``DSV4X_SERVERS=require``.
    """
    SERVER.register(_install)


def _install() -> None:
    from vllm import ModelRegistry

    activation.expect_parameters(ModelRegistry, "register_model", ("model_arch", "model_cls"))
    known = ModelRegistry.get_supported_archs()
    lacking = [name for name in ARCHITECTURES if name not in known]
    if lacking:
        raise activation.Mismatch(f"vLLM's registry has no {', '.join(lacking)}")
    for architecture, name in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"dsv4x.servers.vllm.models:{name}")
