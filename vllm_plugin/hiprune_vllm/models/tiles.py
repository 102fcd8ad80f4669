"""CLIP and SigLIP towers of the LLaVA families: square tiles of one size."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch
from vllm.exceptions import VLLMValidationError

from hiprune_vllm.models.base import (
    Batch,
    FamilyAdapter,
    Shape,
    Tower,
    UnsupportedCheckpoint,
    object_layer_of,
)
from hiprune_vllm.models.images import Part
from hiprune_vllm.plan import Encoder
from hiprune_vllm.pruning.budget import spread

TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}
"""Supported `vision_config.model_type` -> whether it has a CLS token."""

OF_THE_PAPER = "9 of CLIP-L's 24, the paper's; the same relative depth of other towers"
"""Default object layer of towers that do not merge patches."""


def tile_columns(hf_config: Any) -> int:
    """p: tokens in a row (and rows) of one tile."""
    vision = hf_config.vision_config
    columns: int = vision.image_size // vision.patch_size
    return columns


def feature_layer(hf_config: Any, *, joins: bool = False) -> int:
    """Output layer of a LLaVA-like checkpoint, 1-based: the deepest that features are of.

    Args:
        hf_config: the checkpoint's configuration.
        joins: whether vLLM's class puts features of several layers side by side.

    Raises:
        UnsupportedCheckpoint: its features are of several layers, and it does not.
    """
    found = hf_config.vision_feature_layer
    if not isinstance(found, int) and not joins:
        raise UnsupportedCheckpoint(
            "pruning needs features of a single layer, this checkpoint has "
            f"vision_feature_layer {found}"
        )
    depth: int = hf_config.vision_config.num_hidden_layers
    layers: Sequence[int] = [found] if isinstance(found, int) else found
    return max(depth + layer + 1 if layer < 0 else layer for layer in layers)


def cut_by_tile(
    tokens: Sequence[int],
    is_embed: Sequence[bool],
    keep: int,
    *,
    framed: Callable[[int, int], tuple[int, int]],
) -> list[int]:
    """A placeholder of several tiles, each a run of embeddings of its own, with their shares of N'.

    Args:
        tokens, is_embed, keep: as for `FamilyAdapter.placeholder`.
        framed: of the places where a run starts and stops, where what goes with it does, if its
            tile keeps nothing.
    """
    runs, place = [], 0
    for embed, group in groupby(is_embed):
        start, place = place, place + len(list(group))
        if embed:
            runs.append((start, place))
    shares = spread(keep, [1] * len(runs), [stop - start for start, stop in runs])
    cut: list[int] = []
    place = 0
    for (start, stop), share in zip(runs, shares, strict=True):
        if share:
            cut += tokens[place : start + share]
            place = stop
        else:
            first, after = framed(start, stop)
            cut += tokens[place:first]
            place = after
    return [*cut, *tokens[place:]]


def check_tiles(count: int, most: int) -> None:
    """Refuses a picture that a request's processor options make larger than any is by itself.

    Args:
        count: tokens of it.
        most: that a picture has with the checkpoint's own options.

    Raises:
        VLLMValidationError: naming both.
    """
    if count > most:
        raise VLLMValidationError(
            f"mm_processor_kwargs must not cut a picture into that many tiles: {count} tokens, "
            f"of {most} that one may have",
            parameter="mm_processor_kwargs",
        )


def batch_of_tiles(pixels: Any, counts: Sequence[int]) -> Batch:
    """A batch of images that are so many tiles each, all of them in `pixels`, one after another."""
    return Batch(pixels.split(list(counts)), [(count,) for count in counts])


def tiles_kept(batch: Batch, parts: Sequence[Sequence[Part]]) -> torch.Tensor:
    """The tiles of which something stays, (tiles, 3, side, side), where each part is one."""
    return torch.stack(
        [
            pixels[part.number]
            for pixels, of_image in zip(batch.pixels, parts, strict=True)
            for part in of_image
        ]
    )


class TileAdapter(FamilyAdapter):
    """A LLaVA-like family; each tile is a row of the batch.

    Attributes:
        name: of the family.
        joins: whether vLLM's class takes features of several layers.
    """

    name: ClassVar[str]
    joins: ClassVar[bool] = False

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
        output_layer = feature_layer(hf_config, joins=self.joins)
        strategy = hf_config.vision_feature_select_strategy
        if strategy != ("default" if has_cls else "full"):
            raise UnsupportedCheckpoint(
                "pruning needs the patch features alone, this checkpoint has "
                f"vision_feature_select_strategy {strategy!r}"
            )
        depth = vision.num_hidden_layers
        object_layer = object_layer_of(depth, output_layer, merging=False)
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
            tile
            for pixels, shape, of_image in zip(batch.pixels, batch.shapes, parts, strict=True)
            for part in of_image
            for tile in pixels[self.tiles_of(model.config, shape, part)]
        ]
        features = model._image_pixels_to_features(model.vision_tower, torch.stack(tiles))
        embeddings: torch.Tensor = model.multi_modal_projector(features[0])
        return embeddings

    def tiles_of(self, hf_config: Any, shape: Shape, part: Part) -> slice:
        """Which tiles of an image a part is made of."""
        return slice(part.number, part.number + 1)
