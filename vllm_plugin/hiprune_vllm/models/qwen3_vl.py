"""Qwen3-VL, Qwen3.5 and what loads as one: as Qwen2-VL, and three earlier blocks are read, too."""

from typing import Any

from hiprune_vllm.models.base import Tower
from hiprune_vllm.models.qwen2_vl import Qwen2VLAdapter


class Qwen3VLAdapter(Qwen2VLAdapter):
    """`Qwen3VLForConditionalGeneration` and its mixture of experts; videos stay as they are."""

    name = "qwen3_vl"
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
