"""Idefics3 and SmolVLM: tiles and the whole picture, each behind a tag; patches are shuffled."""

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
)
from hiprune_vllm.models.images import Part
from hiprune_vllm.models.internvl import views_of_tiles
from hiprune_vllm.models.qwen2_vl import OF_MERGING
from hiprune_vllm.models.tiles import batch_of_tiles, check_tiles, cut_by_tile, tiles_kept
from hiprune_vllm.plan import About, Encoder, TokenCount


class Idefics3Adapter(FamilyAdapter):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`."""

    takes_embeddings = False
    about = About(
        token="2 x 2 patches, 28 x 28 pixels of a tile of 364, 169 a tile (Idefics3); 3 x 3 or 4 x "
        "4 patches, 64 or 81 a tile (SmolVLM); a picture is scaled up to its longest side, so it "
        "has many tiles, and one more shows all of it",
        layer=OF_MERGING,
        dropped="the tag of a tile that keeps nothing",
    )

    def encoder(self, hf_config: Any) -> Encoder:
        vision, merge = hf_config.vision_config, hf_config.scale_factor
        patches = vision.image_size // vision.patch_size
        if patches % merge:
            raise UnsupportedCheckpoint(
                f"pruning needs tokens of whole patches, this checkpoint has {patches} patches in "
                f"a row and scale_factor {merge}"
            )
        depth = vision.num_hidden_layers
        object_layer = object_layer_of(depth, depth, merging=True)
        return Encoder("idefics3", depth, object_layer, has_cls=False)

    def _columns(self, hf_config: Any) -> int:
        """Tokens in a row of a tile."""
        vision = hf_config.vision_config
        columns: int = vision.image_size // vision.patch_size // hf_config.scale_factor
        return columns

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        size = images.get_image_size(index)
        count = info.get_num_image_tokens(
            image_width=size.width,
            image_height=size.height,
            processor=info.get_hf_processor(**options),
            mm_kwargs=options,
        )
        processor = info.get_hf_processor()
        longest = processor.image_processor.size["longest_edge"]
        most = info.get_num_image_tokens(
            image_width=longest, image_height=longest, processor=processor, mm_kwargs={}
        )
        check_tiles(count, most)
        return TokenCount(count, count)

    def placeholder(self, tokens: Sequence[int], is_embed: Sequence[bool], keep: int) -> list[int]:
        """Of each tile its own, behind its tag, which begins with the first token of all."""

        def with_tag(start: int, stop: int) -> tuple[int, int]:
            tag = next(i for i in range(start - 1, -1, -1) if tokens[i] == tokens[0])
            return tag, stop

        return cut_by_tile(tokens, is_embed, keep, framed=with_tag)

    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        tiles, found = int(inputs["num_patches"]), len(inputs["pixel_values"])
        if tiles != found:
            raise RuntimeError(f"version drift: expected {tiles} tiles of a picture, got {found}")
        return found * self._columns(hf_config) ** 2

    def shapes(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> Sequence[Shape]:
        """Tiles, as they were counted; here they are held against what the processor has made."""
        counts = inputs["num_patches"].tolist()
        _, _, height, width = inputs["pixel_values"].shape
        side, found = hf_config.vision_config.image_size, len(inputs["pixel_values"])
        if sum(counts) != found or (height, width) != (side, side):
            raise VLLMValidationError(
                f"mm_processor_kwargs must leave pictures in tiles of {side} pixels, {sum(counts)} "
                f"in all; the checkpoint's processor has made {found} of {width} x {height}",
                parameter="mm_processor_kwargs",
            )
        return [(count,) for count in counts]

    def grids(self, hf_config: Any, shape: Shape) -> list[Grid]:
        """One for each tile, row by row, and last one for the whole picture."""
        columns = self._columns(hf_config)
        return [Grid(columns, columns)] * shape[0]

    def tower(self, model: Any) -> Tower:
        return Tower(
            model.model.vision_model.encoder.layers,
            attention="self_attn.attn",
            qkv="self_attn.qkv_proj",
            heads=model.config.vision_config.num_attention_heads,
            merge=model.config.scale_factor,
        )

    def batch(self, model: Any, **kwargs: object) -> Batch:
        inputs = model._parse_and_validate_image_input(**kwargs)
        return batch_of_tiles(inputs["pixel_values"], inputs["num_patches"].flatten().tolist())

    def forward(self, model: Any, batch: Batch, parts: Sequence[Sequence[Part]]) -> torch.Tensor:
        """The tiles that keep something, of `batch.pixels`: (tiles, 3, side, side) an image.

        Tiles are full of the picture, so there is nothing to mask. Not the tower's own forward:
        with `--mm-encoder-tp-mode data` it would share out tiles that are shared out already.
        """
        tiles = tiles_kept(batch, parts)
        vision, connector = model.model.vision_model, model.model.connector
        side = vision.config.image_size // vision.config.patch_size
        whole = torch.ones(len(tiles), side, side, dtype=torch.bool, device=tiles.device)
        states = vision.embeddings(tiles, patch_attention_mask=whole)
        patches = vision.post_layernorm(vision.encoder(states))
        merged = patches.reshape(-1, connector.scale_factor**2 * patches.shape[-1])
        embeddings: torch.Tensor = connector.modality_projection(merged)
        return embeddings

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        """The whole picture, which is the last part, and the grid of tiles to the right of it."""
        tiles = inputs["pixel_values"]
        return views_of_tiles(tiles, mean, std, whole_last=len(tiles) > 1)
