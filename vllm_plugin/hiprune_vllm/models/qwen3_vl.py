"""Qwen3-VL, Qwen3.5 and what loads as one: as Qwen2-VL, and three earlier blocks are read, too."""

from typing import Any

from hiprune_vllm.models.base import Tower
from hiprune_vllm.models.qwen2_vl import OF_MERGING, Qwen2VLAdapter
from hiprune_vllm.plan import About


class Qwen3VLAdapter(Qwen2VLAdapter):
    """`Qwen3VLForConditionalGeneration` and its mixture of experts; videos stay as they are."""

    name = "qwen3_vl"
    videos = False
    about = About(
        token="2 x 2 patches, 32 x 32 pixels of the scaled picture, so there is little to spare",
        layer=OF_MERGING,
        published="EADP (ECCV 2026, 8B): the best method of its comparison, not HiPrune, leaves "
        "86.7, 80.9 and 74.4 % of the accuracy at 50, 25 and 12.5 %",
    )
    careful_ratio = 0.5

    def width(self, hf_config: Any) -> int:
        levels = getattr(hf_config.vision_config, "deepstack_visual_indexes", ())
        return super().width(hf_config) * (1 + len(levels))

    def tower(self, model: Any) -> Tower:
        """What first blocks of the language model add to a token has mergers of its own."""
        return super().tower(model)._replace(taps=model.visual.deepstack_merger_list)


class Qwen35Adapter(Qwen3VLAdapter):
    """`Qwen3_5ForConditionalGeneration` and its mixture of experts; videos stay as they are."""

    name = "qwen3_5"
    about = About(token=Qwen3VLAdapter.about.token, layer=OF_MERGING)
