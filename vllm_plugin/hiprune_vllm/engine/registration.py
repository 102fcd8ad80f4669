"""Puts the pruned model classes in the place of vLLM's own."""

from hiprune_vllm.engine.releases import is_served
from hiprune_vllm.engine.secret import share

CLASSES = {
    "LlavaForConditionalGeneration": "hiprune_vllm.engine.classes:HiPruneLlava",
    "LlavaNextForConditionalGeneration": "hiprune_vllm.engine.classes:HiPruneLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "hiprune_vllm.engine.classes:HiPruneQwen25VL",
}
"""Architecture of a checkpoint -> class that serves it, imported by vLLM when it is needed."""


def register_models() -> None:
    """Registers `CLASSES` with vLLM; may run several times in a process.

    Refuses no release of vLLM: a text-only model is none of this plugin's business. The gate stands
    where the classes are imported.
    """
    import vllm
    from vllm import ModelRegistry

    share()
    for architecture, path in CLASSES.items():
        ModelRegistry.register_model(architecture, path)
    if is_served(vllm.__version__):
        from hiprune_vllm.engine.compat import charge_whole_images

        charge_whole_images(CLASSES)
