"""LLaVA-NeXT: a base tile and a grid of tiles (anyres), each pruned on its own (section 4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from hiprune_vllm.models.base import Colour, Encoded, Image, View, shown
from hiprune_vllm.models.tiles import Tile, encode_tiles, tile_columns, tile_encoder
from hiprune_vllm.plan import Encoder, TokenCount
from hiprune_vllm.pruning.budget import ImageBudget, spread
from hiprune_vllm.pruning.record import SumOverRanks
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


class LlavaNextAdapter:
    """`LlavaNextForConditionalGeneration`."""

    def encoder(self, hf_config: Any) -> Encoder:
        return tile_encoder("llava_next", hf_config)

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        size = images.get_image_size(index)
        full: int = info.get_num_image_tokens(image_width=size.width, image_height=size.height)
        regions = self._regions(info.get_hf_config(), (size.height, size.width))
        return TokenCount(full, sum(region.size for region in regions))

    def embed(
        self,
        model: Any,
        images: Sequence[Image],
        sum_over_ranks: SumOverRanks | None,
        **kwargs: object,
    ) -> list[Encoded]:
        inputs = model._parse_and_validate_image_input(**kwargs)
        sizes = [(int(height), int(width)) for height, width in inputs["image_sizes"].tolist()]
        tiles: list[Tile] = []
        places: list[list[int]] = []  # numbers of the tiles that keep something, image by image
        for pixels, size, image in zip(inputs["pixel_values"], sizes, images, strict=True):
            shares = self._shares(model.config, size, image.budget)
            places.append([number for number, (_, share) in enumerate(shares) if share])
            known = iter(image.known or ())
            for number in places[-1]:
                region, share = shares[number]
                budget = image.budget.part(region.size, share, number)
                tile = Tile(pixels[number], budget, region, next(known, None), number, image.trace)
                tiles.append(tile)
        encoder = self.encoder(model.config)
        kept, indices = encode_tiles(model, encoder, tiles, sum_over_ranks)
        projected = model.multi_modal_projector(torch.cat(kept)).split([len(i) for i in indices])
        encoded, first = [], 0
        for numbers, size, image in zip(places, sizes, images, strict=True):
            of_image = slice(first, first + len(numbers))
            first += len(numbers)
            if image.budget.is_full:
                merged = model._merge_image_patch_embeddings(
                    torch.tensor(size), torch.stack(projected[of_image]), strategy="spatial_unpad"
                )
                encoded.append(Encoded(merged, None))
                continue
            grid, columns = self._grid(model.config, size), tile_columns(model.config)
            order = merged_order(numbers, indices[of_image], grid, columns)
            merged = torch.cat(projected[of_image])[order]
            encoded.append(Encoded(merged, tuple(indices[of_image])))
        return encoded

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

    def _grid(self, config: Any, size: tuple[int, int]) -> tuple[int, int]:
        rows, cols = get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        return int(rows), int(cols)

    def _regions(self, config: Any, size: tuple[int, int]) -> list[Region]:
        return tile_regions(size, self._grid(config, size), tile_columns(config))

    def _shares(
        self, config: Any, size: tuple[int, int], budget: ImageBudget
    ) -> list[tuple[Region, int]]:
        """Region and number of kept tokens of every tile; whole tiles for an unpruned image."""
        regions = self._regions(config, size)
        if budget.is_full:
            columns = tile_columns(config)
            return [(Region(0, columns, 0, columns), columns**2) for _ in regions]
        caps = [region.size for region in regions]
        shares = spread(budget.keep, [int(cap > 0) for cap in caps], caps)
        return list(zip(regions, shares, strict=True))


def merged_order(
    numbers: Sequence[int], indices: Sequence[torch.Tensor], grid: tuple[int, int], columns: int
) -> torch.Tensor:
    """Order of kept tokens in the merged picture: the base tile, then row by row over the grid.

    Args:
        numbers: number of each tile, 0 for the base tile.
        indices: kept indices in each of these tiles.
        grid: rows and columns of tiles.
        columns: tokens in a row of one tile.

    Returns:
        (kept,) int64, positions in the concatenation of `indices`.
    """
    keys = []
    for number, index in zip(numbers, indices, strict=True):
        if number == 0:
            keys.append(index)
            continue
        row, col = divmod(number - 1, grid[1])
        line = row * columns + index // columns
        keys.append(columns**2 + line * grid[1] * columns + col * columns + index % columns)
    return torch.argsort(torch.cat(keys))
