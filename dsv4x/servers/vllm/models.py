"""vLLM's own model classes, whose decoder layers take dsv4x's attention. Imported where a model is loaded."""

from .contract import install

install()

from vllm.models.deepseek_v4 import (  # noqa: E402
    DeepSeekV4MTP,
    DeepseekV4ForCausalLM,
    DeepseekV4ForConditionalGeneration,
    DSparkDeepseekV4ForCausalLM,
)

__all__ = [
    "DSparkDeepseekV4ForCausalLM",
    "DeepSeekV4MTP",
    "DeepseekV4ForCausalLM",
    "DeepseekV4ForConditionalGeneration",
]
