"""LLaVA-NeXT: a base tile and a grid of tiles (anyres), each pruned on its own (section 4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from hiprune_vllm.models.base import Colour, Encoded, Image, Part, Selection, View, shown
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

    mrope = False

    def encoder(self, hf_config: Any) -> Encoder:
        return tile_encoder("llava_next", hf_config)

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        size = images.get_image_size(index)
        full: int = info.get_num_image_tokens(image_width=size.width, image_height=size.height)
        regions = self._regions(info.get_hf_config(), (size.height, size.width))
        return TokenCount(full, sum(region.size for region in regions))

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
        parts: list[tuple[Part, ...]] = []
        for pixels, size, image in zip(inputs["pixel_values"], sizes, images, strict=True):
            parts.append(self._parts(model.config, size, image.budget))
            known = iter(image.known_of(parts[-1]) or ())
            for number, _, region, share in parts[-1]:
                budget = image.budget.part(region.size, share, number)
                tile = Tile(pixels[number], budget, region, next(known, None), number, image.trace)
                tiles.append(tile)
        encoder = self.encoder(model.config)
        kept, indices = encode_tiles(model, encoder, tiles, sum_over_ranks)
        projected = model.multi_modal_projector(torch.cat(kept)).split([len(i) for i in indices])
        encoded, first = [], 0
        for of_parts, size, image in zip(parts, sizes, images, strict=True):
            of_image = slice(first, first + len(of_parts))
            first += len(of_parts)
            if image.budget.is_full:
                merged = model._merge_image_patch_embeddings(
                    torch.tensor(size), torch.stack(projected[of_image]), strategy="spatial_unpad"
                )
                encoded.append(Encoded(merged, None))
                continue
            grid, columns = self._grid(model.config, size), tile_columns(model.config)
            numbers = [part.number for part in of_parts]
            order = merged_order(numbers, indices[of_image], grid, columns)
            merged = torch.cat(projected[of_image])[order]
            encoded.append(Encoded(merged, Selection(of_parts, tuple(indices[of_image]))))
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

    def _parts(self, config: Any, size: tuple[int, int], budget: ImageBudget) -> tuple[Part, ...]:
        """Tiles that keep something; all of them, whole, of an unpruned image."""
        regions, columns = self._regions(config, size), tile_columns(config)
        if budget.is_full:
            whole = Region(0, columns, 0, columns)
            return tuple(Part(i, whole.size, whole, whole.size) for i in range(len(regions)))
        caps = [region.size for region in regions]
        shares = spread(budget.keep, [int(cap > 0) for cap in caps], caps)
        return tuple(
            Part(number, columns**2, region, share)
            for number, (region, share) in enumerate(zip(regions, shares, strict=True))
            if share
        )


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
