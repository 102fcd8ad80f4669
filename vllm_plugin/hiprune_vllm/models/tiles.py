"""CLIP and SigLIP towers of the LLaVA families: square tiles of one size."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from hiprune_vllm.models.base import Batch, FamilyAdapter, TooShallow, Tower, UnsupportedCheckpoint
from hiprune_vllm.models.images import Part
from hiprune_vllm.plan import Encoder
from hiprune_vllm.pruning.scores import default_object_layer

TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}
"""Supported `vision_config.model_type` -> whether it has a CLS token."""

OF_THE_PAPER = "9 of CLIP-L's 24, the paper's; the same relative depth of other towers"
"""Default object layer of towers that do not merge patches."""


def tile_columns(hf_config: Any) -> int:
    """p: tokens in a row (and rows) of one tile."""
    vision = hf_config.vision_config
    columns: int = vision.image_size // vision.patch_size
    return columns


class TileAdapter(FamilyAdapter):
    """A LLaVA-like family; each tile is a row of the batch.

    Attributes:
        name: of the family.
    """

    name: ClassVar[str]

    def encoder(self, hf_config: Any) -> Encoder:
        """What a checkpoint's tower allows.

        Raises:
            UnsupportedCheckpoint: naming what in the configuration stands in the way.
            TooShallow: the tower has fewer layers than pruning needs.
        """
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
        object_layer = default_object_layer(depth, merging=False)
        if not object_layer < output_layer <= depth:
            raise TooShallow(object_layer, output_layer, depth)
        return Encoder(self.name, output_layer, object_layer, has_cls)

    def tower(self, model: Any) -> Tower:
        vision = model.config.vision_config
        return Tower(
            model.vision_tower.vision_model.encoder.layers,
            attention="self_attn.attn",
            qkv="self_attn.qkv_proj",
            heads=vision.num_attention_heads,
            leading=int(TOWERS[vision.model_type]),
        )

    def forward(self, model: Any, batch: Batch, parts: Sequence[Sequence[Part]]) -> torch.Tensor:
        """The tiles that keep something, of `batch.pixels`: (tiles, 3, size, size) an image."""
        tiles = [
            pixels[part.number]
            for pixels, of_image in zip(batch.pixels, parts, strict=True)
            for part in of_image
        ]
        features = model._image_pixels_to_features(model.vision_tower, torch.stack(tiles))
        embeddings: torch.Tensor = model.multi_modal_projector(features[0])
        return embeddings
