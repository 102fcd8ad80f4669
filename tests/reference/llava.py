"""The oracle: Hugging Face's LLaVA with eager attention, pruned by the slow transcription."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.reference import paper
from tests.reference.text import TextOracle


class LlavaOracle(TextOracle):
    """A checkpoint in fp32. `output_layer` and `object_layer` are 1-based."""

    def __init__(self, path: Path) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        config = self.model.config
        vision = config.vision_config
        self.has_cls = vision.model_type == "clip_vision_model"
        self.columns = vision.image_size // vision.patch_size
        self.output_layer = vision.num_hidden_layers + config.vision_feature_layer + 1
        self._seen: dict[bytes, Any] = {}

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """(3, 336, 336)"""
        processed = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
        pixels: torch.Tensor = processed["pixel_values"][0]
        return pixels

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> Any:
        key = image.tobytes()
        if key not in self._seen:
            self._seen[key] = self.model.model.vision_tower(
                self.pixels(image)[None], output_attentions=True, output_hidden_states=True
            )
        return self._seen[key]

    def scores(self, image: Image.Image, layer: int, *, cls_only: bool) -> list[float]:
        attention = self._encode(image).attentions[layer - 1][0]
        return paper.scores(attention, has_cls=self.has_cls, cls_only=cls_only)

    def keep(
        self,
        image: Image.Image,
        *,
        tokens: int,
        alpha: float = 0.1,
        buffer: str = "cross",
        score: str = "global",
        object_layer: int = 3,
    ) -> list[int]:
        """Indices of the tokens that the paper keeps."""
        cls_only = score == "cls"
        return paper.select(
            self.scores(image, object_layer, cls_only=cls_only),
            self.scores(image, self.output_layer, cls_only=cls_only),
            keep=tokens,
            alpha=alpha,
            columns=self.columns,
            buffer=buffer,
        )

    @torch.inference_mode()
    def embeddings(self, image: Image.Image, indices: Sequence[int]) -> torch.Tensor:
        """(len(indices), text width): the kept tokens behind the projector."""
        hidden = self._encode(image).hidden_states[self.model.config.vision_feature_layer][0]
        features = hidden[int(self.has_cls) :]
        projected: torch.Tensor = self.model.model.multi_modal_projector(features[list(indices)])
        return projected
