"""vLLM's own model classes, whose decoder layers take dsv4x's attention. Imported where a model is loaded."""

from .lookup import install

install()

from vllm.models.deepseek_v4 import (  # noqa: E402
    DeepseekV4ForCausalLM,
    DeepseekV4ForConditionalGeneration,
    DeepSeekV4MTP,
    DSparkDeepseekV4ForCausalLM,
)

__all__ = [
    "DSparkDeepseekV4ForCausalLM",
    "DeepSeekV4MTP",
    "DeepseekV4ForCausalLM",
    "DeepseekV4ForConditionalGeneration",
]
