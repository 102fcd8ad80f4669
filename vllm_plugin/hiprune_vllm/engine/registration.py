"""Puts the pruned model classes in the place of vLLM's own."""

CLASSES = {
    "LlavaForConditionalGeneration": "hiprune_vllm.engine.classes:HiPruneLlava",
    "LlavaNextForConditionalGeneration": "hiprune_vllm.engine.classes:HiPruneLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "hiprune_vllm.engine.classes:HiPruneQwen25VL",
}
"""Architecture of a checkpoint -> class that serves it, imported by vLLM when it is needed."""


def register_models() -> None:
    """Registers `CLASSES` with vLLM; may run several times in a process."""
    import vllm
    from vllm import ModelRegistry

    from hiprune_vllm.engine.compat import charge_whole_images, check_version

    check_version(vllm.__version__)
    for architecture, path in CLASSES.items():
        ModelRegistry.register_model(architecture, path)
    charge_whole_images(CLASSES)
