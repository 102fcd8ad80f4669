"""InternVL 2.5, 3 and 3.5: tiles and a thumbnail, a token of 2x2 patches, no separators."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any, ClassVar

import PIL.Image
import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_got_ocr2 import (
    GotOcr2ImageProcessor,
    get_optimal_tiled_canvas,
)
from vllm.transformers_utils.processors.internvl import (
    calculate_internvl_targets,
    get_internvl_target_ratios,
)

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
from hiprune_vllm.models.tiles import batch_of_tiles, tiles_kept
from hiprune_vllm.plan import About, Encoder, TokenCount

MANY = 40
"""Tiles that a picture may be cut into where the operator lets the processor cut into more."""


def size_of_grid(across: int, down: int, side: int) -> tuple[int, int]:
    """Width and height of the largest picture that InternVL's processor cuts just so.

    Of all grids of a picture's very shape it takes the largest that has less than twice its pixels.

    Args:
        across, down: tiles.
        side: of a tile, pixels.
    """
    times = gcd(across, down)
    unit = min(times * side, int(side * (times + 1) / 2**0.5))
    return across // times * unit, down // times * unit


def arranged(tiles: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a picture's tiles, the last of which shows all of it (thumbnail).

    The processor does not tell; of all grids it is the one that looks most like the thumbnail.

    Args:
        tiles: (n + 1, 3, side, side).
    """
    *cut, thumbnail = tiles.float()
    found = {}
    for down in range(1, len(cut) + 1):
        if len(cut) % down:
            continue
        across = len(cut) // down
        rows = [torch.cat(cut[row * across : (row + 1) * across], dim=2) for row in range(down)]
        small = torch.nn.functional.interpolate(
            torch.cat(rows, dim=1)[None], thumbnail.shape[1:], mode="area"
        )
        found[down, across] = float((small[0] - thumbnail).abs().mean())
    return min(found, key=lambda grid: found[grid])


def views_of_tiles(
    tiles: torch.Tensor, mean: Colour, std: Colour, *, whole_last: bool
) -> list[View]:
    """Where the tiles of a picture belong; to the right of one that shows all of it."""
    side = tiles.shape[-1]
    across = arranged(tiles)[1] if whole_last else len(tiles)
    views = []
    for number, tile in enumerate(tiles):
        row, col = divmod(number, across)
        if whole_last:
            row, col = (0, 0) if number == len(tiles) - 1 else (row, col + 1)
        views.append(View(number, col * side, row * side, shown(tile, mean, std)))
    return views


class OfInternVL(FamilyAdapter):
    """What both layouts of its checkpoints share; videos stay as they are.

    Attributes:
        pixels_name: the model's input of all images' tiles.
    """

    about = About(
        token="2 x 2 patches, 28 x 28 pixels of a tile of 448; 256 a tile, up to 12 tiles and a "
        "thumbnail of the whole picture, 3,328 in all",
        layer=OF_MERGING,
    )
    pixels_name: ClassVar[str]

    @abstractmethod
    def _geometry(self, hf_config: Any) -> tuple[int, int]:
        """Sides of a tile and of a patch, pixels."""

    @abstractmethod
    def _grid(self, hf_config: Any, picture: PIL.Image.Image, tiles: int) -> tuple[int, int]:
        """Columns and rows of tiles that a picture is cut into, of so many at most."""

    def _thumbnail(self, hf_config: Any) -> bool:
        """Whether one tile more shows all of a picture that is cut."""
        return True

    def _encoder(self, hf_config: Any, output_layer: int, tiles: tuple[int, int]) -> Encoder:
        depth = hf_config.vision_config.num_hidden_layers
        side, patch = self._geometry(hf_config)
        if side // patch % self._merge(hf_config):
            raise UnsupportedCheckpoint(
                f"pruning needs tokens of whole patches, this checkpoint has {side // patch} "
                f"patches in a row and downsample_ratio {hf_config.downsample_ratio}"
            )
        object_layer = object_layer_of(depth, output_layer, merging=True)
        least, most = tiles
        cut = (least, most) if most > 1 else None
        return Encoder("internvl", output_layer, object_layer, has_cls=True, tiles=cut)

    def _merge(self, hf_config: Any) -> int:
        """Patches a side of a token."""
        return int(1 / hf_config.downsample_ratio)

    def _columns(self, hf_config: Any) -> int:
        """Tokens in a row of a tile."""
        side, patch = self._geometry(hf_config)
        return side // patch // self._merge(hf_config)

    def fitted(self, hf_config: Any, picture: PIL.Image.Image, tiles: int) -> PIL.Image.Image:
        """Scaled to the shape of the best grid of so few tiles, as the processor itself does.

        How many there are follows from a picture's shape: a smaller one of the same shape would
        mostly be cut into as many.
        """
        across, down = self._grid(hf_config, picture, MANY)
        if across * down <= tiles:
            return picture
        side, _ = self._geometry(hf_config)
        size = size_of_grid(*self._grid(hf_config, picture, tiles), side)
        return picture.resize(size, PIL.Image.Resampling.BICUBIC)

    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        tiles, _, rows, columns = inputs[self.pixels_name].shape
        told = int(inputs["image_num_patches"])
        side, _ = self._geometry(hf_config)
        if (tiles, rows, columns) != (told, side, side):
            raise RuntimeError(
                f"version drift: expected {told} tiles of {side} x {side} pixels, got "
                f"{tiles} of {rows} x {columns}"
            )
        return int(tiles * self._columns(hf_config) ** 2)

    def grids(self, hf_config: Any, shape: Shape) -> list[Grid]:
        (tiles,) = shape
        columns = self._columns(hf_config)
        return [Grid(columns, columns)] * tiles

    def batch(self, model: Any, **kwargs: object) -> Batch:
        inputs = model._parse_and_validate_image_input(**kwargs)
        return batch_of_tiles(inputs[self.pixels_name], inputs["num_patches"].flatten().tolist())

    def forward(self, model: Any, batch: Batch, parts: Sequence[Sequence[Part]]) -> torch.Tensor:
        """The tiles that keep something, of `batch.pixels`: (tiles, 3, side, side) an image."""
        patches = self._patches(model, tiles_kept(batch, parts))[0, 1:]
        merged = patches.reshape(-1, self._merge(model.config) ** 2 * patches.shape[-1])
        return self._projected(model, merged)

    @abstractmethod
    def _patches(self, model: Any, tiles: torch.Tensor) -> torch.Tensor:
        """Features of vLLM's tower, the CLS token's first."""

    @abstractmethod
    def _projected(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens, the features of their patches in a row each, by vLLM's projector."""

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        """The thumbnail, which is the last part, and the grid of tiles to the right of it."""
        tiles = inputs[self.pixels_name]
        thumbnail = len(tiles) > 1 and self._thumbnail(hf_config)
        return views_of_tiles(tiles, mean, std, whole_last=thumbnail)


class InternVLChatAdapter(OfInternVL):
    """`InternVLChatModel`: checkpoints in the layout of InternVL's own code."""

    pixels_name = "pixel_values_flat"

    def encoder(self, hf_config: Any) -> Encoder:
        if hf_config.ps_version != "v2":
            raise UnsupportedCheckpoint(
                "pruning needs tokens in the order of the picture, this checkpoint has "
                f"ps_version {hf_config.ps_version!r}, which has them by columns"
            )
        depth, layer = hf_config.vision_config.num_hidden_layers, hf_config.select_layer
        output_layer = depth + layer + 1 if layer < 0 else layer + 1
        return self._encoder(hf_config, output_layer, self._tiles(hf_config))

    def _tiles(self, hf_config: Any) -> tuple[int, int]:
        """Least and most that a picture is cut into, the thumbnail aside."""
        if not hf_config.dynamic_image_size:
            return 1, 1
        return hf_config.min_dynamic_patch, hf_config.max_dynamic_patch

    def _geometry(self, hf_config: Any) -> tuple[int, int]:
        vision = hf_config.vision_config
        return vision.image_size, vision.patch_size

    def _thumbnail(self, hf_config: Any) -> bool:
        return bool(hf_config.use_thumbnail)

    def _grid(self, hf_config: Any, picture: PIL.Image.Image, tiles: int) -> tuple[int, int]:
        least, _ = self._tiles(hf_config)
        side, _ = self._geometry(hf_config)
        _, width, height = calculate_internvl_targets(
            orig_width=picture.width,
            orig_height=picture.height,
            target_ratios=get_internvl_target_ratios(least, tiles),
            image_size=side,
            use_thumbnail=False,
        )
        return width // side, height // side

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        size = images.get_image_size(index)
        count = info.get_num_image_tokens(
            image_width=size.width,
            image_height=size.height,
            processor=info.get_hf_processor(**options),
        )
        return TokenCount(count, count)

    def tower(self, model: Any) -> Tower:
        return Tower(
            model.vision_model.encoder.layers,
            attention="attn.attn",
            qkv="attn.qkv",
            heads=model.config.vision_config.num_attention_heads,
            leading=1,
            merge=self._merge(model.config),
        )

    def _patches(self, model: Any, tiles: torch.Tensor) -> torch.Tensor:
        # Not the tower's own forward: with `--mm-encoder-tp-mode data` it would share out tiles
        # that are shared out already.
        vision = model.vision_model
        features: torch.Tensor = vision.encoder(inputs_embeds=vision.embeddings(tiles))
        return features

    def _projected(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = model.mlp1(tokens)
        return embeddings

    def colours(self, image_processor: Any) -> tuple[Colour, Colour]:
        """vLLM's processor of this layout has them as constants."""
        return tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)


class InternVLAdapter(OfInternVL):
    """`InternVLForConditionalGeneration`: the same in Hugging Face's layout."""

    pixels_name = "pixel_values"

    def encoder(self, hf_config: Any) -> Encoder:
        depth = hf_config.vision_config.num_hidden_layers
        # How far it may cut is not in the model's configuration: what the processor does if its
        # own says nothing.
        most = GotOcr2ImageProcessor.max_patches
        return self._encoder(hf_config, depth, (GotOcr2ImageProcessor.min_patches, most))

    def _geometry(self, hf_config: Any) -> tuple[int, int]:
        vision = hf_config.vision_config
        return vision.image_size[0], vision.patch_size[0]

    def _grid(self, hf_config: Any, picture: PIL.Image.Image, tiles: int) -> tuple[int, int]:
        side, _ = self._geometry(hf_config)
        across, down = get_optimal_tiled_canvas(
            (picture.height, picture.width),
            (side, side),
            GotOcr2ImageProcessor.min_patches,
            tiles,
        )
        return across, down

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        size = images.get_image_size(index)
        # The processor cuts unless it is called with other options; what its image processor's
        # own configuration says of that counts for nothing.
        cut = {"crop_to_patches": True, **info.ctx.get_merged_mm_kwargs(options)}
        count = info.get_num_image_tokens(
            image_width=size.width,
            image_height=size.height,
            processor=info.get_hf_processor(**options),
            mm_kwargs=cut,
        )
        return TokenCount(count, count)

    def tower(self, model: Any) -> Tower:
        return Tower(
            model.vision_tower.encoder.layer,
            attention="attention.attn",
            qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            heads=model.config.vision_config.num_attention_heads,
            leading=1,
            merge=self._merge(model.config),
        )

    def _patches(self, model: Any, tiles: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = model.vision_tower(pixel_values=tiles)
        return features

    def _projected(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = model.multi_modal_projector(tokens)
        return embeddings
