"""Gemma 4: transformers' own tower, patches averaged by their places, soft tokens a request."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError

from hiprune_vllm.models.base import (
    SHAPE_FIELD,
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
from hiprune_vllm.models.of_transformers import of_transformers
from hiprune_vllm.models.qwen2_vl import OF_MERGING
from hiprune_vllm.plan import About, Encoder, TokenCount

OPTION = "max_soft_tokens"
"""Processor option of a request: tokens that a picture has at most, before anything is pruned."""

ALLOWED = (70, 140, 280, 560, 1120)
"""What vLLM and the checkpoint's processor take for it."""


class Gemma4Adapter(FamilyAdapter):
    """`Gemma4ForConditionalGeneration`; videos and sound stay as they are."""

    about = About(
        token="3 x 3 patches, 48 x 48 pixels of the scaled picture; at most 280 a picture, or what "
        "a request says by max_soft_tokens",
        layer=OF_MERGING,
    )

    def encoder(self, hf_config: Any) -> Encoder:
        vision = hf_config.vision_config
        if vision is None:
            raise UnsupportedCheckpoint(
                "pruning needs a vision encoder, this checkpoint has vision_config None"
            )
        depth = vision.num_hidden_layers
        object_layer = object_layer_of(depth, depth, merging=True)
        return Encoder("gemma4", depth, object_layer, has_cls=False)

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        """A picture's own count by `max_soft_tokens` comes first, the budget is of that.

        Raises:
            VLLMValidationError: the option is none of `ALLOWED`.
        """
        merged = info.ctx.get_merged_mm_kwargs(options)
        most = merged.get(OPTION)
        if most is None:
            most = (merged.get("images_kwargs") or {}).get(OPTION)
        if most is not None and (type(most) is not int or most not in ALLOWED):
            raise VLLMValidationError(
                f"mm_processor_kwargs.{OPTION} must be one of {ALLOWED}, got {most!r}",
                parameter=f"mm_processor_kwargs.{OPTION}",
            )
        size = images.get_image_size(index)
        count = info._compute_num_soft_tokens(size.width, size.height, max_soft_tokens=most)
        return TokenCount(count, count)

    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        side, places = hf_config.vision_config.pooling_kernel_size, inputs["pixel_position_ids"]
        ((rows, columns),) = _shapes(places[None])
        found, patches = places.tolist(), rows * columns
        if found[:patches] != [[x, y] for y in range(rows) for x in range(columns)]:
            raise RuntimeError("version drift: expected patches row by row, then padding")
        if any(place != [-1, -1] for place in found[patches:]) or rows % side or columns % side:
            raise RuntimeError(
                f"version drift: expected {side} x {side} patches a token and padding at "
                f"(-1, -1), got {rows} x {columns} patches of {len(found)}"
            )
        return patches // int(side) ** 2

    def shapes(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> Sequence[Shape]:
        patch, found = hf_config.vision_config.patch_size, inputs["pixel_values"].shape[-1]
        if found != 3 * patch**2:
            raise VLLMValidationError(
                f"mm_processor_kwargs must leave patches {patch} x {patch} pixels large, got "
                f"{found} values a patch",
                parameter="mm_processor_kwargs",
            )
        return _shapes(inputs["pixel_position_ids"])

    def grids(self, hf_config: Any, shape: Shape) -> list[Grid]:
        side = hf_config.vision_config.pooling_kernel_size
        rows, columns = shape
        return [Grid(rows // side, columns // side)]

    def tower(self, model: Any) -> Tower:
        vision, encoder = model.config.vision_config, model.vision_tower.encoder
        return Tower(
            encoder.layers[: vision.num_hidden_layers],
            attention="self_attn",
            qkv="",
            heads=vision.num_attention_heads,
            merge=vision.pooling_kernel_size,
            source=of_transformers,
            # Pictures have different numbers of patches: side by side they would need padding.
            one_by_one=True,
            replicated=True,
        )

    def batch(self, model: Any, **kwargs: Any) -> Batch:
        """Patches without the padding behind them."""
        inputs = model._parse_and_validate_image_input(**kwargs)
        shapes = [(rows, columns) for rows, columns in kwargs[SHAPE_FIELD].tolist()]
        images = zip(inputs["pixel_values"], shapes, strict=True)
        return Batch([pixels[: rows * cols] for pixels, (rows, cols) in images], shapes)

    def forward(self, model: Any, batch: Batch, parts: Sequence[Sequence[Part]]) -> torch.Tensor:
        """What `_process_image_input` does with one picture, and nothing of it is padding."""
        ((part,),), (pixels,), ((_, columns),) = parts, batch.pixels, batch.shapes
        tower, side = model.vision_tower, model.config.vision_config.pooling_kernel_size
        places, padding = _places(len(pixels), columns, pixels.device)
        states = tower.encoder(
            inputs_embeds=tower.patch_embedder(pixels[None], places, padding).to(model.model_dtype),
            attention_mask=None,
            pixel_position_ids=places,
        ).last_hidden_state
        # The pooler averages by places. Patches of kept tokens come token by token: a column of
        # tokens one below the other has its patches in this order.
        places, padding = _places(part.keep * side**2, side, pixels.device)
        pooled, _ = tower.pooler(
            hidden_states=states,
            pixel_position_ids=places,
            padding_positions=padding,
            output_length=part.keep,
        )
        if tower.config.standardize:
            pooled = (pooled - tower.std_bias) * tower.std_scale
        embeddings: torch.Tensor = model.embed_vision(inputs_embeds=pooled.to(model.model_dtype))
        return embeddings[0]

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        ((rows, columns),) = _shapes(inputs["pixel_position_ids"][None])
        patch = hf_config.vision_config.patch_size
        patches = inputs["pixel_values"][: rows * columns].view(rows, columns, patch, patch, 3)
        pixels = patches.permute(4, 0, 2, 1, 3).reshape(3, rows * patch, columns * patch)
        return [View(0, 0, 0, shown(pixels, mean, std))]


def _shapes(positions: torch.Tensor) -> list[Shape]:
    """Rows and columns of patches of each image, from all (x, y): padding is at (-1, -1)."""
    last = [places.amax(dim=0).tolist() for places in positions]
    return [(y + 1, x + 1) for x, y in last]


def _places(patches: int, columns: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) of patches row by row, (1, patches, 2), and that none of them is padding."""
    numbers = torch.arange(patches, device=device)
    places = torch.stack([numbers % columns, numbers // columns], dim=-1)[None]
    return places, torch.zeros_like(places[..., 0], dtype=torch.bool)
