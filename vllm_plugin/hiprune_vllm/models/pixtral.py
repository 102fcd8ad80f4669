"""Pixtral's tower, as Hugging Face has it: pictures of any shape, and Mistral's that merge."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

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
from hiprune_vllm.models.last_block import set_aside
from hiprune_vllm.models.qwen2_vl import OF_MERGING
from hiprune_vllm.models.tiles import OF_THE_PAPER, feature_layer
from hiprune_vllm.plan import About, Encoder, TokenCount

TOWER = "pixtral"
"""The one `vision_config.model_type`."""


def _merge(hf_config: Any) -> int:
    """Patches a side of a token: LLaVA's configuration knows nothing of merging."""
    merge: int = getattr(hf_config, "spatial_merge_size", 1)
    return merge


def _side(hf_config: Any) -> int:
    """Pixels a side of a token, of the scaled picture."""
    side: int = hf_config.vision_config.patch_size * _merge(hf_config)
    return side


class PixtralAdapter(FamilyAdapter):
    """`LlavaForConditionalGeneration` with Pixtral's tower.

    Attributes:
        name: of the family.
    """

    name: ClassVar[str] = "pixtral"
    takes_embeddings = False
    about = About(
        token="a patch of 16 x 16 pixels of the scaled picture; up to 4,096 a picture at 1024",
        layer=OF_THE_PAPER,
        dropped="the ends of rows; the end of the picture stays",
    )

    def encoder(self, hf_config: Any) -> Encoder:
        """What a checkpoint's tower allows.

        Raises:
            UnsupportedCheckpoint: naming what in the configuration stands in the way.
            TooShallow: the tower has fewer layers than pruning needs.
        """
        vision = hf_config.vision_config
        if vision.model_type != TOWER:
            raise UnsupportedCheckpoint(
                f"pruning supports the vision tower {TOWER}, this checkpoint has "
                f"{vision.model_type}"
            )
        output_layer = feature_layer(hf_config)
        strategy = getattr(hf_config, "vision_feature_select_strategy", "full")
        if strategy != "full":
            raise UnsupportedCheckpoint(
                "pruning needs all patches of a tower without a CLS token, this checkpoint has "
                f"vision_feature_select_strategy {strategy!r}"
            )
        depth = vision.num_hidden_layers
        object_layer = object_layer_of(depth, output_layer, merging=_merge(hf_config) > 1)
        return Encoder(self.name, output_layer, object_layer, has_cls=False)

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        size = images.get_image_size(index)
        count = self.counted(info, size, options)
        if count < 1:
            raise VLLMValidationError(
                f"image_url must not be that long and narrow: of {size.width} x {size.height} "
                "pixels nothing is left where the longer side is scaled to what the model sees",
                parameter="image_url",
            )
        return TokenCount(count, count)

    def counted(self, info: Any, size: Any, options: Mapping[str, object]) -> int:
        """vLLM's own count, which takes the tower's size for the one that pictures are scaled to.

        Raises:
            VLLMValidationError: where that is not so, and the prompt would not fit the picture.
        """
        expected = info.get_hf_config().vision_config.image_size
        of_images = info._merge_and_resolve_mm_processor_kwargs(options).get("images_kwargs", {})
        sizes = info.get_hf_processor().image_processor.size | of_images.get("size", {})
        longest = sizes["longest_edge"]
        if longest != expected:
            raise VLLMValidationError(
                "mm_processor_kwargs.size must leave longest_edge at the tower's "
                f"{expected} pixels, got {longest}",
                parameter="mm_processor_kwargs.size",
            )
        count: int = info.get_num_image_tokens(image_width=size.width, image_height=size.height)
        return count

    def placeholder(self, tokens: Sequence[int], is_embed: Sequence[bool], keep: int) -> list[int]:
        """Ends of rows go with their patches: nobody knows before what is left of a row."""
        return [tokens[0]] * keep + list(tokens[-1:])

    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        _, height, width = inputs["pixel_values"].shape
        side = _side(hf_config)
        if height % side or width % side:
            raise RuntimeError(
                f"version drift: expected multiples of {side} pixels, got {width} x {height}"
            )
        return (height // side) * (width // side)

    def grids(self, hf_config: Any, shape: Shape) -> list[Grid]:
        """One; `shape` is height and width in pixels."""
        side = _side(hf_config)
        return [Grid(shape[0] // side, shape[1] // side)]

    def tower(self, model: Any) -> Tower:
        return Tower(
            model.vision_tower.transformer.layers,
            attention="attention.attn",
            qkv="attention.qkv_proj",
            heads=model.config.vision_config.num_attention_heads,
            packed=True,
            merge=_merge(model.config),
            by_row=("rotary_pos_emb_cos", "rotary_pos_emb_sin"),
        )

    def batch(self, model: Any, **kwargs: object) -> Batch:
        pixels = list(model._parse_and_validate_image_input(**kwargs)["pixel_values"])
        return Batch(pixels, [(image.shape[-2], image.shape[-1]) for image in pixels])

    def forward(self, model: Any, batch: Batch, parts: Sequence[Sequence[Part]]) -> torch.Tensor:
        with set_aside(model.vision_tower.transformer) as made:
            model.vision_tower(batch.pixels)
        return self.projected(model, made[0].squeeze(0))

    def projected(self, model: Any, patches: torch.Tensor) -> torch.Tensor:
        """What the language model gets of the kept tokens' patches, (patches, width)."""
        embeddings: torch.Tensor = model.multi_modal_projector(patches)
        return embeddings

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        return [View(0, 0, 0, shown(inputs["pixel_values"], mean, std))]


class Mistral3Adapter(PixtralAdapter):
    """`Mistral3ForConditionalGeneration`: 2 x 2 patches become a token."""

    name = "mistral3"
    about = About(
        token="2 x 2 patches, 28 x 28 pixels of the scaled picture; up to 3,025 a picture at 1540",
        layer=OF_MERGING,
        dropped=PixtralAdapter.about.dropped,
    )

    def counted(self, info: Any, size: Any, options: Mapping[str, object]) -> int:
        encoder = info.get_vision_encoder_info(options)
        count: int = encoder.get_num_image_tokens(image_width=size.width, image_height=size.height)
        return count

    def projected(self, model: Any, patches: torch.Tensor) -> torch.Tensor:
        """The merger cuts pictures into squares; here it gets one as wide as a single token."""
        width = model.config.vision_config.patch_size * _merge(model.config)
        height = width * (len(patches) // _merge(model.config) ** 2)
        embeddings: torch.Tensor = model.multi_modal_projector(patches, [(height, width)])
        return embeddings
