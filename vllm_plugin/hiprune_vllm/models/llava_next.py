"""LLaVA-NeXT: a base tile and a grid of tiles (anyres), each pruned on its own (section 4)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import PIL.Image
import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.exceptions import VLLMValidationError

from hiprune_vllm.models.base import (
    Batch,
    Colour,
    FamilyAdapter,
    Grid,
    Shape,
    Tower,
    View,
    shown,
)
from hiprune_vllm.models.images import Selection
from hiprune_vllm.models.tiles import OF_THE_PAPER, TileAdapter, tile_columns
from hiprune_vllm.plan import About, Encoder, TokenCount
from hiprune_vllm.pruning.select import Region


def picture_region(size: tuple[int, int], grid: tuple[int, int], columns: int) -> Region:
    """The part of the merged grid that shows the picture: the rest is padding ("unpad").

    The picture is scaled to fit the grid and centred; half the empty rows or columns, rounded
    down, are cut on either side.

    Args:
        size: height and width of the picture, pixels.
        grid: rows and columns of tiles.
        columns: tokens in a row of one tile.
    """
    height, width = size
    rows, cols = grid[0] * columns, grid[1] * columns
    if width / height > cols / rows:
        shown = int(round(height * (cols / width), 7))
        cut = (rows - shown) // 2
        return Region(cut, rows - cut, 0, cols)
    shown = int(round(width * (rows / height), 7))
    cut = (cols - shown) // 2
    return Region(0, rows, cut, cols - cut)


def tile_regions(size: tuple[int, int], grid: tuple[int, int], columns: int) -> list[Region]:
    """What may be kept of every tile: the base tile whole, the grid's tiles without padding."""
    whole = picture_region(size, grid, columns)

    def within(low: int, high: int, tile: int) -> tuple[int, int]:
        start = tile * columns
        first, last = max(low, start) - start, min(high, start + columns) - start
        return (first, last) if first < last else (0, 0)

    return [Region(0, columns, 0, columns)] + [
        Region(*within(whole.top, whole.bottom, row), *within(whole.left, whole.right, col))
        for row in range(grid[0])
        for col in range(grid[1])
    ]


class LlavaNextAdapter(TileAdapter):
    """`LlavaNextForConditionalGeneration`."""

    name = "llava_next"
    joins = True
    about = About(
        token="a patch of 14 x 14 pixels, of the whole picture in one tile or of a tile of it; up "
        "to 2,880 a picture at 336",
        layer=OF_THE_PAPER,
        dropped="the newlines behind rows; padding is never kept",
        published="HiPrune's paper (7B, five benchmarks): 102.6, 99.5 and 92.5 % of the accuracy "
        "at 640, 320 and 160 tokens",
    )

    def of(self, hf_config: Any) -> FamilyAdapter:
        return self if isinstance(hf_config.vision_feature_layer, int) else GraniteVisionAdapter()

    def encoder(self, hf_config: Any) -> Encoder:
        encoder = super().encoder(hf_config)
        sizes = [self._tiles(hf_config, one) for one in hf_config.image_grid_pinpoints]
        return replace(encoder, tiles=(min(sizes), max(sizes)))

    def fitted(self, hf_config: Any, picture: PIL.Image.Image, tiles: int) -> PIL.Image.Image:
        """As large as it is shown in the best grid of so few tiles: there it is cut into these.

        Of all grids that show as much of it the processor takes the one with the least padding.
        """
        grids, shape = hf_config.image_grid_pinpoints, (picture.height, picture.width)
        if self._tiles(hf_config, select_best_resolution(shape, grids)) <= tiles:
            return picture
        few = [one for one in grids if self._tiles(hf_config, one) <= tiles]
        height, width = select_best_resolution(shape, few)
        scale = min(width / picture.width, height / picture.height)
        size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
        return picture.resize(size, PIL.Image.Resampling.BICUBIC)

    def _tiles(self, hf_config: Any, resolution: Sequence[int]) -> int:
        height, width = resolution
        return int(height * width) // int(hf_config.vision_config.image_size) ** 2

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        size = images.get_image_size(index)
        full: int = info.get_num_image_tokens(image_width=size.width, image_height=size.height)
        grids = self.grids(info.get_hf_config(), (size.height, size.width))
        return TokenCount(full, sum(grid.inside.size for grid in grids))

    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        """Of the base tile, and of the picture in the grid of tiles, a newline behind each row."""
        height, width = (int(side) for side in inputs["image_sizes"])
        tiles, _, side, _ = inputs["pixel_values"].shape
        columns = side // hf_config.vision_config.patch_size
        grid = self._grid(hf_config, (height, width))
        if tiles != 1 + grid[0] * grid[1]:
            raise RuntimeError(
                f"version drift: expected 1 + {grid} tiles of a picture, got {tiles}"
            )
        region = picture_region((height, width), grid, columns)
        return int(columns**2 + region.size + region.bottom - region.top)

    def shapes(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> Sequence[Shape] | None:
        """None: sizes come to the worker by themselves. What is cut of pictures is held to them."""
        side = hf_config.vision_config.image_size
        for pixels, size in zip(
            inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True
        ):
            rows, cols = self._grid(hf_config, size)
            tiles, _, height, width = pixels.shape
            if tiles < 1 + rows * cols or (height, width) != (side, side):
                raise VLLMValidationError(
                    "mm_processor_kwargs must leave the tiles of a picture as they are: 1 + "
                    f"{rows} x {cols} of {side} pixels a side, got {tiles} of {width} x {height}",
                    parameter="mm_processor_kwargs",
                )
        return None

    def grids(self, hf_config: Any, shape: Shape) -> list[Grid]:
        height, width = shape
        columns = tile_columns(hf_config)
        regions = tile_regions((height, width), self._grid(hf_config, shape), columns)
        return [Grid(columns, columns, region) for region in regions]

    def batch(self, model: Any, **kwargs: object) -> Batch:
        inputs = model._parse_and_validate_image_input(**kwargs)
        sizes = [(int(height), int(width)) for height, width in inputs["image_sizes"].tolist()]
        return Batch(inputs["pixel_values"], sizes)

    def whole(self, model: Any, shape: Shape, tokens: torch.Tensor) -> torch.Tensor:
        """The picture in the grid of tiles without padding, a newline behind each row."""
        tiles = tokens.view(-1, tile_columns(model.config) ** 2, tokens.shape[-1])
        merged: torch.Tensor = model._merge_image_patch_embeddings(
            torch.tensor(shape), tiles, strategy="spatial_unpad"
        )
        return merged

    def prompt_order(
        self, hf_config: Any, shape: Shape, selection: Selection
    ) -> torch.Tensor | None:
        """The base tile, then row by row over the grid of tiles."""
        _, across = self._grid(hf_config, shape)
        columns = tile_columns(hf_config)
        keys = []
        for part, index in zip(selection.parts, selection.kept, strict=True):
            if part.number == 0:
                keys.append(index)
                continue
            row, col = divmod(part.number - 1, across)
            line = row * columns + index // columns
            keys.append(columns**2 + line * across * columns + col * columns + index % columns)
        return torch.argsort(torch.cat(keys))

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        """The base tile, and the grid of tiles to the right of it."""
        height, width = (int(side) for side in inputs["image_sizes"])
        _, cols = self._grid(hf_config, (height, width))
        views = []
        for number, tile in enumerate(inputs["pixel_values"]):
            side = tile.shape[-1]
            row, col = divmod(number - 1, cols) if number else (0, -1)
            views.append(View(number, (col + 1) * side, row * side, shown(tile, mean, std)))
        return views

    def _grid(self, config: Any, size: Shape) -> tuple[int, int]:
        rows, cols = get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        return int(rows), int(cols)


class GraniteVisionAdapter(LlavaNextAdapter):
    """The same with features of several layers side by side: Granite Vision 3.x."""

    name = "granite_vision"
    about = About(
        token="a patch of 14 x 14 pixels, of the whole picture in one tile or of a tile of it; "
        "729 a tile at 384, up to 8,019 a picture",
        layer=OF_THE_PAPER,
        dropped=LlavaNextAdapter.about.dropped,
    )

    def of(self, hf_config: Any) -> FamilyAdapter:
        return self

    def tower(self, model: Any) -> Tower:
        return super().tower(model)._replace(joined=model.vision_tower.vision_model.encoder)
