"""LLaVA-1.5: one square tile a picture, CLIP or SigLIP tower, features from a single layer."""

from collections.abc import Sequence
from typing import Any

import torch

from hiprune_vllm.models.base import UnsupportedCheckpoint, choose, encoder_layers
from hiprune_vllm.plan import Encoder
from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.record import ScoreRecorder, SumOverRanks, wanted_scores

TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}
"""Supported `vision_config.model_type` -> whether it has a CLS token."""


def default_object_layer(depth: int) -> int:
    """Layer 9 of CLIP-L's 24 (section 4.1 of the paper), at the same relative depth elsewhere."""
    return max(1, round(9 / 24 * depth))


class LlavaAdapter:
    """`LlavaForConditionalGeneration`."""

    def encoder(self, hf_config: Any) -> Encoder:
        vision = hf_config.vision_config
        if vision.model_type not in TOWERS:
            raise UnsupportedCheckpoint(
                f"pruning supports the vision towers {', '.join(TOWERS)}, "
                f"this checkpoint has {vision.model_type}"
            )
        has_cls = TOWERS[vision.model_type]
        layer = hf_config.vision_feature_layer
        if not isinstance(layer, int):
            raise UnsupportedCheckpoint(
                "pruning needs features of a single layer, this checkpoint has "
                f"vision_feature_layer {layer}"
            )
        strategy = hf_config.vision_feature_select_strategy
        if strategy != ("default" if has_cls else "full"):
            raise UnsupportedCheckpoint(
                "pruning needs the patch features alone, this checkpoint has "
                f"vision_feature_select_strategy {strategy!r}"
            )
        depth = vision.num_hidden_layers
        output_layer = depth + layer + 1 if layer < 0 else layer
        object_layer = default_object_layer(depth)
        if not object_layer < output_layer <= depth:
            raise UnsupportedCheckpoint(
                f"pruning needs an object layer ({object_layer} of {depth} by default) below the "
                f"output layer, this checkpoint's output layer is {output_layer}"
            )
        return Encoder("llava", output_layer, object_layer, has_cls)

    def tokens_full(self, info: Any, images: Any, index: int) -> int:
        count: int = info.get_max_image_tokens()  # every picture is scaled to one tile
        return count

    def embed(
        self,
        model: Any,
        budgets: Sequence[ImageBudget],
        sum_over_ranks: SumOverRanks | None,
        max_tokens: int,
        **kwargs: object,
    ) -> list[torch.Tensor]:
        pixels = model._parse_and_validate_image_input(**kwargs)["pixel_values"]
        encoder = self.encoder(model.config)
        vision = model.config.vision_config
        columns = vision.image_size // vision.patch_size
        recorder = ScoreRecorder(
            encoder_layers(model.vision_tower.vision_model),
            heads=vision.num_attention_heads,
            leading_tokens=int(encoder.has_cls),
            sum_over_ranks=sum_over_ranks,
        )
        step = max(1, max_tokens // columns**2)
        kept: list[torch.Tensor] = []
        for first in range(0, len(budgets), step):
            some = budgets[first : first + step]
            with recorder.recording(wanted_scores(some, encoder.output_layer)) as scores:
                features = model._image_pixels_to_features(
                    model.vision_tower, pixels[first : first + step]
                )
            indices = choose(
                some,
                scores,
                output_layer=encoder.output_layer,
                count=features.shape[1],
                columns=columns,
                device=features.device,
            )
            kept += [tile[index] for tile, index in zip(features, indices, strict=True)]
        projected = model.multi_modal_projector(torch.cat(kept))
        return list(projected.split([budget.keep for budget in budgets]))
