"""Kimi-VL: MoonViT on pictures of any size, padded to whole tokens of 2x2 patches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError

from hiprune_vllm.models.base import (
    Batch,
    Colour,
    FamilyAdapter,
    Grid,
    Shape,
    Tower,
    UnsupportedCheckpoint,
    View,
    object_layer_of,
    shown,
)
from hiprune_vllm.models.images import Part
from hiprune_vllm.models.qwen2_vl import OF_MERGING
from hiprune_vllm.plan import About, Encoder, TokenCount

SIDE = 512
"""Rows and columns of patches that MoonViT has positions for; the checkpoint's processor wants
fewer."""


class KimiVLAdapter(FamilyAdapter):
    """`KimiVLForConditionalGeneration`."""

    takes_embeddings = False
    about = About(
        token="2 x 2 patches, 28 x 28 pixels of the picture, which is scaled down where it has "
        "more than 4,096 patches (in_token_limit)",
        layer=OF_MERGING,
    )

    def encoder(self, hf_config: Any) -> Encoder:
        vision = hf_config.vision_config
        down, across = vision.merge_kernel_size
        if down != across:
            raise UnsupportedCheckpoint(
                "pruning needs tokens of as many rows of patches as columns, this checkpoint has "
                f"merge_kernel_size {down} x {across}"
            )
        depth = vision.num_hidden_layers
        object_layer = object_layer_of(depth, depth, merging=True)
        return Encoder("kimi_vl", depth, object_layer, has_cls=False)

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        size = images.get_image_size(index)
        count: int = info.get_num_image_tokens(image_width=size.width, image_height=size.height)
        self._check_sides(info, size)
        return TokenCount(count, count)

    def _check_sides(self, info: Any, size: Any) -> None:
        """Refuses a picture that the checkpoint's processor raises for.

        Raises:
            VLLMValidationError: naming its size.
        """
        processor = info.get_hf_processor().image_processor
        patch, most = processor.patch_size, processor.in_token_limit
        patches = (size.width // patch) * (size.height // patch)
        scale = (most / patches) ** 0.5 if patches > most else 1.0
        token = patch * processor.merge_kernel_size[0]
        # Padded up to whole tokens.
        longest = -(-int(max(size.width, size.height) * scale) // token) * token
        if longest // patch >= SIDE:
            raise VLLMValidationError(
                f"image_url must not be that long and narrow: {size.width} x {size.height} pixels "
                f"have {longest // patch} patches on a side where they are scaled to {most} in "
                f"all, and the model takes less than {SIDE}",
                parameter="image_url",
            )

    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        patches, grid = len(inputs["pixel_values"]), inputs["image_grid_hws"].tolist()
        if grid[0] * grid[1] != patches:
            raise RuntimeError(
                f"version drift: expected a patch for each place of the grid, got {grid}, {patches}"
            )
        return sum(grid.rows * grid.columns for grid in self.grids(hf_config, tuple(grid)))

    def shapes(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> Sequence[Shape]:
        """Rows and columns of patches, as `batch` has them: held against vLLM's count, which knows
        nothing of a request's processor options."""
        return [(rows, columns) for rows, columns in inputs["image_grid_hws"].tolist()]

    def grids(self, hf_config: Any, shape: Shape) -> list[Grid]:
        merge = hf_config.vision_config.merge_kernel_size[0]
        rows, columns = shape
        return [Grid(rows // merge, columns // merge)]

    def tower(self, model: Any) -> Tower:
        vision = model.config.vision_config
        return Tower(
            model.vision_tower.encoder.blocks,
            attention="attn",
            qkv="wqkv",
            heads=vision.num_attention_heads,
            packed=True,
            merge=vision.merge_kernel_size[0],
            by_row=("rope_freqs_cis",),
        )

    def batch(self, model: Any, **kwargs: object) -> Batch:
        inputs = model._parse_and_validate_image_input(**kwargs)
        shapes = [(rows, columns) for rows, columns in inputs["image_grid_hws"].tolist()]
        return Batch(inputs["pixel_values"].split([h * w for h, w in shapes]), shapes)

    def laid_out(self, model: Any, batch: Batch) -> Batch:
        metadata = model.vision_tower.prepare_encoder_metadata(batch.shapes)
        return batch._replace(metadata=metadata)

    def forward(self, model: Any, batch: Batch, parts: Sequence[Sequence[Part]]) -> torch.Tensor:
        """Not the tower's own forward, which puts patches together by their places in the whole
        picture; those of kept tokens are together."""
        tower, of_batch = model.vision_tower, batch.metadata
        states = tower.patch_embed(torch.cat(list(batch.pixels)), pos_embeds=of_batch["pos_embeds"])
        patches = tower.encoder(
            states,
            cu_seqlens=of_batch["cu_seqlens"],
            rope_freqs_cis=of_batch["rope_freqs_cis"],
            max_seqlen=of_batch["max_seqlen"],
        )
        embeddings: torch.Tensor = model.multi_modal_projector(patches)
        return embeddings

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        patches = inputs["pixel_values"]
        rows, columns = inputs["image_grid_hws"].tolist()
        height, width = patches.shape[-2:]
        pixels = patches.view(rows, columns, 3, height, width).permute(2, 0, 3, 1, 4)
        picture = pixels.reshape(3, rows * height, columns * width)
        return [View(0, 0, 0, shown(picture, mean, std))]
