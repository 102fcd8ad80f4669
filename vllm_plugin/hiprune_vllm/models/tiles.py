"""CLIP and SigLIP towers of the LLaVA families: square tiles of one size."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hiprune_vllm.models.base import (
    TooShallow,
    Trace,
    TracedPart,
    UnsupportedCheckpoint,
    choose,
)
from hiprune_vllm.models.last_block import Kept, kept_only
from hiprune_vllm.plan import Encoder
from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.record import ScoreRecorder, SumOverRanks, wanted_scores
from hiprune_vllm.pruning.select import Region
from hiprune_vllm.tuning import chosen

TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}
"""Supported `vision_config.model_type` -> whether it has a CLS token."""


def default_object_layer(depth: int) -> int:
    """Layer 9 of CLIP-L's 24 (section 4.1 of the paper), at the same relative depth elsewhere."""
    return max(1, round(9 / 24 * depth))


def tile_encoder(family: str, hf_config: Any) -> Encoder:
    """What a LLaVA-like checkpoint's tower allows.

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
    object_layer = default_object_layer(depth)
    if not object_layer < output_layer <= depth:
        raise TooShallow(object_layer, output_layer, depth)
    return Encoder(family, output_layer, object_layer, has_cls)


def tile_columns(hf_config: Any) -> int:
    """p: tokens in a row (and rows) of one tile."""
    vision = hf_config.vision_config
    columns: int = vision.image_size // vision.patch_size
    return columns


@dataclass(frozen=True)
class Tile:
    """One tile to encode.

    Attributes:
        pixels: (3, size, size).
        budget: what to keep of it.
        region: the part that may be kept; None for all of it.
        known: indices that were kept of it before; None for a new one.
        number: among the tiles of its image.
        trace: of its image, where somebody asks how it is pruned.
    """

    pixels: torch.Tensor
    budget: ImageBudget
    region: Region | None = None
    known: torch.Tensor | None = None
    number: int = 0
    trace: Trace | None = None


def encode_tiles(
    model: Any,
    encoder: Encoder,
    tiles: Sequence[Tile],
    sum_over_ranks: SumOverRanks | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Runs the tower over tiles and selects in each of them.

    Args:
        model: a vLLM LLaVA model.
        encoder: its encoder.
        tiles: any number, also of several images.
        sum_over_ranks: adds per-rank scores; None where a rank holds all heads.

    Returns:
        Kept features, (keep, tower width) a tile, and their indices in the tile, (keep,) a tile.
    """
    columns = tile_columns(model.config)
    leading = int(encoder.has_cls)
    blocks = model.vision_tower.vision_model.encoder.layers
    recorder = ScoreRecorder(
        [block.self_attn.attn for block in blocks],
        heads=model.config.vision_config.num_attention_heads,
        leading_tokens=leading,
        sum_over_ranks=sum_over_ranks,
    )
    short = chosen("PRUNING_LAST_BLOCK") == "kept" and len(blocks) == encoder.output_layer
    new = {i: tile.budget for i, tile in enumerate(tiles) if tile.known is None}
    traced = {
        i: (tile.trace.layer, tile.trace.score)
        for i, tile in enumerate(tiles)
        if tile.trace is not None
    }
    pixels = torch.stack([tile.pixels for tile in tiles])
    indices: list[torch.Tensor] = []
    with recorder.recording(wanted_scores(new, encoder.output_layer, traced)) as scores:
        select = partial(_selected, tiles, new, scores, encoder, columns, pixels.device, indices)
        with _kept_only(blocks[-1], select, columns**2, leading) if short else nullcontext():
            features = model._image_pixels_to_features(model.vision_tower, pixels)
    if short:
        return list(features[0].split([len(index) for index in indices])), indices
    return [tile[index] for tile, index in zip(features, select(), strict=True)], indices


def _kept_only(
    block: Any, select: Callable[[], Sequence[torch.Tensor]], count: int, leading: int
) -> AbstractContextManager[None]:
    """The tower's last block for the selected tokens of all tiles."""

    def choose() -> list[Kept]:
        tokens = leading + count
        return [
            Kept(i * tokens, (i + 1) * tokens, leading + index) for i, index in enumerate(select())
        ]

    attention = block.self_attn
    return kept_only(
        block,
        attention.qkv_proj,
        attention.attn,
        choose,
        spare_rows=leading,  # vLLM takes the CLS token off the features
        within_images=True,
    )


def _selected(
    tiles: Sequence[Tile],
    new: Mapping[int, ImageBudget],
    scores: Mapping[tuple[int, str, int], torch.Tensor],
    encoder: Encoder,
    columns: int,
    device: torch.device,
    indices: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Fills in kept `indices` of every tile, known or chosen, and returns them."""
    found = choose(
        new,
        scores,
        output_layer=encoder.output_layer,
        count=columns**2,
        columns=columns,
        device=device,
        regions={i: tiles[i].region for i in new},
    )
    for i, tile in enumerate(tiles):
        index = found[i] if tile.known is None else tile.known
        indices.append(index)
        if tile.trace is not None:
            at_object, at_output = (
                scores[layer, tile.trace.score, i]
                for layer in (tile.trace.layer, encoder.output_layer)
            )
            part = TracedPart(
                tile.number, tile.budget, columns, tile.region, at_object, at_output, index
            )
            tile.trace.parts.append(part)
    return indices
