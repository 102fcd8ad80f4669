"""LLaVA-OneVision: LLaVA-NeXT's tiles, large pictures scaled to nine tiles' worth of tokens."""

from collections.abc import Mapping
from math import sqrt
from typing import Any, Final

import torch
from torch.nn.functional import interpolate

from hiprune_vllm.models.base import Colour, FamilyAdapter, Grid, Shape, View
from hiprune_vllm.models.images import Part, Selection
from hiprune_vllm.models.llava_next import LlavaNextAdapter, picture_region
from hiprune_vllm.models.tiles import OF_THE_PAPER, tile_columns
from hiprune_vllm.plan import About
from hiprune_vllm.pruning.select import Region

MOST_TILES: Final = 9
"""How many tiles' worth of tokens a picture may have beside the base, `anyres_max_9`: vLLM's model
has it as a constant."""


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """`LlavaOnevisionForConditionalGeneration`; videos stay as they are.

    Tile by tile as LLaVA-NeXT. Where tokens are interpolated over the borders of tiles they are
    chosen from two parts: the base tile, and all that is behind it.
    """

    name = "llava_onevision"
    joins = False
    about = About(
        token="a patch of 14 x 14 pixels, of the whole picture in one tile or of a tile of it; "
        "729 a tile at 384; of a large picture a mixture of neighbours; up to 8,667 a picture",
        layer=OF_THE_PAPER,
        dropped=LlavaNextAdapter.about.dropped,
    )

    def of(self, hf_config: Any) -> FamilyAdapter:
        return self

    def _interpolated(self, hf_config: Any, shape: Shape) -> tuple[int, int] | None:
        """Rows and columns that a picture's grid is scaled to; None where it is not."""
        region = self._region(hf_config, shape)
        columns = tile_columns(hf_config)
        height, width = region.bottom - region.top, region.right - region.left
        ratio = sqrt(height * width / (MOST_TILES * columns**2))
        return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else None

    def _region(self, hf_config: Any, shape: Shape) -> Region:
        height, width = shape
        grid = self._grid(hf_config, shape)
        return picture_region((height, width), grid, tile_columns(hf_config))

    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        height, width = (int(side) for side in inputs["image_sizes"])
        full = super().encoded_tokens(hf_config, inputs)
        scaled = self._interpolated(hf_config, (height, width))
        if scaled is None:
            return full
        rows, columns = scaled
        return tile_columns(hf_config) ** 2 + rows * (columns + 1)

    def grids(self, hf_config: Any, shape: Shape) -> list[Grid]:
        scaled = self._interpolated(hf_config, shape)
        if scaled is None:
            return super().grids(hf_config, shape)
        tile = Grid(tile_columns(hf_config), tile_columns(hf_config))
        rows, cols = self._grid(hf_config, shape)
        merged = Grid(*scaled, weight=MOST_TILES, tiles=(tile,) * (rows * cols))
        return [tile, merged]

    def tiles_of(self, hf_config: Any, shape: Shape, part: Part) -> slice:
        if part.number == 0 or self._interpolated(hf_config, shape) is None:
            return super().tiles_of(hf_config, shape, part)
        rows, cols = self._grid(hf_config, shape)
        return slice(1, 1 + rows * cols)

    def interpolated(self, model: Any, shape: Shape, patches: torch.Tensor) -> torch.Tensor:
        """By vLLM's own function, which takes any number of columns; the base tile goes again."""
        tiles = torch.cat([patches[:1], patches])
        merged: torch.Tensor = model._merge_image_patch_embeddings(
            torch.tensor(shape), tiles, strategy="spatial_unpad"
        )
        return merged[patches.shape[1] :]

    def whole(self, model: Any, shape: Shape, tokens: torch.Tensor) -> torch.Tensor:
        tiles = tokens.view(-1, tile_columns(model.config) ** 2, tokens.shape[-1])
        merged: torch.Tensor = model._merge_image_patch_embeddings(
            torch.tensor(shape), tiles, image_newline=model.image_newline, strategy="spatial_unpad"
        )
        return merged

    def prompt_order(
        self, hf_config: Any, shape: Shape, selection: Selection
    ) -> torch.Tensor | None:
        if self._interpolated(hf_config, shape) is not None:
            return None
        return super().prompt_order(hf_config, shape, selection)

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        """The base tile, and the tiles to the right of it, scaled where their tokens are."""
        height, width = (int(side) for side in inputs["image_sizes"])
        shape = height, width
        views = super().views(hf_config, inputs, mean, std)
        scaled = self._interpolated(hf_config, shape)
        if scaled is None:
            return views
        rows, cols = self._grid(hf_config, shape)
        patch = hf_config.vision_config.patch_size
        seen = tile_columns(hf_config) * patch  # a tile has a strip at its edge that no patch has
        tiles = torch.stack([view.pixels[:seen, :seen] for view in views[1 : 1 + rows * cols]])
        picture = tiles.view(rows, cols, seen, seen, 3).transpose(1, 2)
        picture = picture.reshape(rows * seen, cols * seen, 3)
        top, bottom, left, right = (side * patch for side in self._region(hf_config, shape))
        small = interpolate(
            picture[top:bottom, left:right].permute(2, 0, 1)[None],
            [side * patch for side in scaled],
            mode="bilinear",
            antialias=True,
        )
        return [views[0], View(1, views[1].left, 0, small[0].permute(1, 2, 0).clamp(0, 1))]
