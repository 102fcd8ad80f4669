"""CLIP and SigLIP towers of the LLaVA families: square tiles of one size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hiprune_vllm.models.base import (
    TooShallow,
    Trace,
    TracedPart,
    UnsupportedCheckpoint,
    choose,
)
from hiprune_vllm.plan import Encoder
from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.record import ScoreRecorder, SumOverRanks, wanted_scores
from hiprune_vllm.pruning.select import Region

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
    max_tokens: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Runs the tower over tiles and selects in each of them.

    Args:
        model: a vLLM LLaVA model.
        encoder: its encoder.
        tiles: any number, also of several images.
        sum_over_ranks: adds per-rank scores; None where a rank holds all heads.
        max_tokens: visual tokens that one tower forward may hold, at least one tile's in effect.

    Returns:
        Kept features, (keep, tower width) a tile, and their indices in the tile, (keep,) a tile.
    """
    columns = tile_columns(model.config)
    transformer = model.vision_tower.vision_model
    recorder = ScoreRecorder(
        [block.self_attn.attn for block in transformer.encoder.layers],
        heads=model.config.vision_config.num_attention_heads,
        leading_tokens=int(encoder.has_cls),
        sum_over_ranks=sum_over_ranks,
    )
    step = max(1, max_tokens // columns**2)
    kept: list[torch.Tensor] = []
    indices: list[torch.Tensor] = []
    for first in range(0, len(tiles), step):
        some = tiles[first : first + step]
        new = {i: tile.budget for i, tile in enumerate(some) if tile.known is None}
        traces = {i: tile.trace for i, tile in enumerate(some) if tile.trace is not None}
        traced = {i: (trace.layer, trace.score) for i, trace in traces.items()}
        with recorder.recording(wanted_scores(new, encoder.output_layer, traced)) as scores:
            features = model._image_pixels_to_features(
                model.vision_tower, torch.stack([tile.pixels for tile in some])
            )
        chosen = choose(
            new,
            scores,
            output_layer=encoder.output_layer,
            count=features.shape[1],
            columns=columns,
            device=features.device,
            regions={i: some[i].region for i in new},
        )
        of_tiles = [chosen[i] if tile.known is None else tile.known for i, tile in enumerate(some)]
        for i, trace in traces.items():
            at_object, at_output = (
                scores[layer, trace.score, i] for layer in (trace.layer, encoder.output_layer)
            )
            trace.parts.append(
                TracedPart(
                    some[i].number, some[i].budget, columns, some[i].region,
                    at_object, at_output, of_tiles[i],
                )
            )  # fmt: skip
        kept += [tile[index] for tile, index in zip(features, of_tiles, strict=True)]
        indices += of_tiles
    return kept, indices
