"""Kimi K2.5 and K2.6: MoonViT with a place in time, whose pictures are chunks of one frame."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import PIL.Image
import torch

from hiprune_vllm.models.base import (
    Batch,
    Colour,
    Shape,
    UnsupportedCheckpoint,
    View,
)
from hiprune_vllm.models.images import Part
from hiprune_vllm.models.kimi_vl import KimiVLAdapter
from hiprune_vllm.models.qwen2_vl import OF_MERGING
from hiprune_vllm.plan import About, Encoder, TokenCount


class KimiK25Adapter(KimiVLAdapter):
    """`KimiK25ForConditionalGeneration`."""

    modality: ClassVar[str] = "vision_chunk"
    about = About(
        token="2 x 2 patches, 28 x 28 pixels of the picture, which is scaled down where it has "
        "more patches than the checkpoint's in_patch_limit",
        layer=OF_MERGING,
    )

    def encoder(self, hf_config: Any) -> Encoder:
        vision = hf_config.vision_config
        kind = getattr(vision, "mm_projector_type", "patchmerger")
        if kind != "patchmerger":
            raise UnsupportedCheckpoint(
                "pruning needs a projector that makes each token of its own patches alone "
                f"(mm_projector_type patchmerger), this checkpoint has {kind}"
            )
        return super().encoder(hf_config)

    def item(self, picture: PIL.Image.Image) -> Any:
        return {"type": "image", "image": picture, "uuid": None}

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        count: int = info.media_tokens_calculator(images.get(index))
        return TokenCount(count, count)

    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        patches, grid = len(inputs["pixel_values"]), inputs["grid_thws"].tolist()
        if grid[0] != 1 or grid[1] * grid[2] != patches:
            raise RuntimeError(
                "version drift: expected one frame with a patch for each place of the grid, got "
                f"{grid}, {patches}"
            )
        return sum(part.rows * part.columns for part in self.grids(hf_config, tuple(grid[1:])))

    def shapes(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> Sequence[Shape]:
        return [(rows, columns) for _, rows, columns in inputs["grid_thws"].tolist()]

    def batch(self, model: Any, **kwargs: object) -> Batch:
        inputs = model._parse_and_validate_media_input(**kwargs)
        shapes = [(rows, columns) for _, rows, columns in inputs["grid_thws"].tolist()]
        return Batch(inputs["pixel_values"].split([h * w for h, w in shapes]), shapes)

    def laid_out(self, model: Any, batch: Batch) -> Batch:
        metadata = model.vision_tower.encoder.prepare_encoder_metadata(
            [[1, *shape] for shape in batch.shapes], device=batch.pixels[0].device
        )
        return batch._replace(metadata=metadata)

    def forward(self, model: Any, batch: Batch, parts: Sequence[Sequence[Part]]) -> torch.Tensor:
        """Not the tower's own forward, which puts patches together by their places in the whole
        picture; those of kept tokens are together. Of one frame there is no mean to take."""
        tower = model.vision_tower
        states = tower.patch_embed(
            torch.cat(list(batch.pixels)), [[1, *shape] for shape in batch.shapes]
        )
        patches = tower.encoder(states, None, encoder_metadata=batch.metadata)
        embeddings: torch.Tensor = model.mm_projector(patches)
        return embeddings

    def colours(self, image_processor: Any) -> tuple[Colour, Colour]:
        told = image_processor.media_proc_cfg
        return tuple(told["image_mean"]), tuple(told["image_std"])

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        grid = {"image_grid_hws": inputs["grid_thws"][1:]}
        return super().views(hf_config, {**inputs, **grid}, mean, std)
