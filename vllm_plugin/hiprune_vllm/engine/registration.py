"""Puts the pruned model classes in the place of vLLM's own."""

from typing import Final

from hiprune_vllm.engine.secret import share

CLASSES: Final = {
    "Gemma3ForConditionalGeneration": ("gemma3_mm", "gemma3:Gemma3Adapter"),
    "Glm4vForConditionalGeneration": ("glm4_1v", "glm4v:Glm4vAdapter"),
    "Glm4vMoeForConditionalGeneration": ("glm4_1v", "glm4v:Glm4vAdapter"),
    "LlavaForConditionalGeneration": ("llava", "llava:LlavaAdapter"),
    "Gemma4ForConditionalGeneration": ("gemma4_mm", "gemma4:Gemma4Adapter"),
    "LlavaNextForConditionalGeneration": ("llava_next", "llava_next:LlavaNextAdapter"),
    "LlavaOnevisionForConditionalGeneration": (
        "llava_onevision",
        "llava_onevision:LlavaOnevisionAdapter",
    ),
    "Idefics3ForConditionalGeneration": ("idefics3", "idefics3:Idefics3Adapter"),
    "SmolVLMForConditionalGeneration": ("smolvlm", "idefics3:Idefics3Adapter"),
    "InternVLChatModel": ("internvl", "internvl:InternVLChatAdapter"),
    "InternVLForConditionalGeneration": (
        "interns1:InternS1ForConditionalGeneration",
        "internvl:InternVLAdapter",
    ),
    "KimiK25ForConditionalGeneration": ("kimi_k25", "kimi_k25:KimiK25Adapter"),
    "KimiVLForConditionalGeneration": ("kimi_vl", "kimi_vl:KimiVLAdapter"),
    "Mistral3ForConditionalGeneration": ("mistral3", "pixtral:Mistral3Adapter"),
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", "qwen2_vl:Qwen2VLAdapter"),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", "qwen2_5_vl:Qwen25VLAdapter"),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl", "qwen3_vl:Qwen3VLAdapter"),
    "Qwen3VLMoeForConditionalGeneration": ("qwen3_vl_moe", "qwen3_vl:Qwen3VLAdapter"),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", "qwen3_vl:Qwen35Adapter"),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5", "qwen3_vl:Qwen35Adapter"),
}
"""Architecture of a checkpoint -> the module of vLLM's class of it, below
`vllm.model_executor.models`, with the class's name where that is another one, and the family's
adapter, below `hiprune_vllm.models`. From these `engine.classes` makes the class that serves it."""


def register_models() -> None:
    """Registers a class for each of `CLASSES` with vLLM; may run several times in a process.

    Refuses no release of vLLM: a text-only model is none of this plugin's business. The gate stands
    where the classes are imported.
    """
    from vllm import ModelRegistry

    share()
    for architecture in CLASSES:
        ModelRegistry.register_model(architecture, f"hiprune_vllm.engine.classes:{architecture}")
