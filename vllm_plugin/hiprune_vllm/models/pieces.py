"""The parts of a batch's images: their shares of a budget, their rows, their tokens' scores.

A family says what the parts are. Here patches are pooled to the tokens that the language model
would see, or interpolated, where it sees mixtures of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hiprune_vllm.models.base import Batch, FamilyAdapter, Grid, Shape, Tower
from hiprune_vllm.models.images import Image, Part, Trace
from hiprune_vllm.models.last_block import Kept
from hiprune_vllm.pruning.budget import ImageBudget, spread, spread_evenly
from hiprune_vllm.pruning.select import Region


def parts_of(grids: Sequence[Grid], budget: ImageBudget) -> tuple[Part, ...]:
    """What is to be chosen from an image's grids: shares by weight that add up to exactly N'.

    Args:
        grids: all of the image.
        budget: of the image; N' is at most what the grids' regions hold.

    Returns:
        Those that keep something; all of them, whole, of an unpruned image.
    """
    if budget.is_full:
        wholes = [Region(0, grid.rows, 0, grid.columns) for grid in grids]
        return tuple(Part(i, whole.size, whole, whole.size) for i, whole in enumerate(wholes))
    regions = [grid.inside for grid in grids]
    sizes = [region.size for region in regions]
    if grids[0].time is None:
        shares = spread(budget.keep, [grid.weight for grid in grids], sizes)
    else:
        shares = spread_evenly(budget.keep, len(grids))
    return tuple(
        Part(number, grid.rows * grid.columns, region, share)
        for number, (grid, region, share) in enumerate(zip(grids, regions, shares, strict=True))
        if share
    )


def pooled(
    values: torch.Tensor, grid: Grid, tower: Tower, places: torch.Tensor | None = None
) -> torch.Tensor:
    """Scores of an image's tokens: the mean over the patches that become one (section 4).

    Args:
        values: (patches,), in the order that the blocks run in.
        grid: of its tokens.
        tower: how many patches make a token, and how they lie.
        places: (tokens,) int64, see `Batch`.

    Returns:
        (tokens,), row by row.
    """
    merge = tower.merge
    if merge > 1 and tower.raster:
        values = values.view(grid.rows, merge, grid.columns, merge).mean(dim=(1, 3)).flatten()
    elif merge > 1:
        values = values.view(-1, merge**2).mean(dim=1)
    return values if places is None else values[places]


def rows_of(
    tokens: torch.Tensor, grid: Grid, tower: Tower, places: torch.Tensor | None = None
) -> torch.Tensor:
    """Where the patches of some tokens are: token by token, each token's row by row.

    Args:
        tokens: (n,) int64, flat indices in the grid.
        grid, tower, places: as for `pooled`.

    Returns:
        (n * merge**2,) int64, rows of the part's hidden states, the CLS token's included.
    """
    merge = tower.merge
    if places is not None:
        tokens = places[tokens]
    if merge == 1:
        return tower.leading + tokens
    inside = torch.arange(merge**2, device=tokens.device)
    if tower.raster:
        width = grid.columns * merge
        tokens = tokens // grid.columns * merge * width + tokens % grid.columns * merge
        inside = inside // merge * width + inside % merge
    else:
        tokens = tokens * merge**2
    return tower.leading + (tokens[:, None] + inside).flatten()


@dataclass
class Piece:
    """One part of an image in the batch.

    Attributes:
        part: what is to be chosen from it.
        grid: of its tokens.
        budget: of this part alone.
        known: indices that were kept of it before; None for a new one.
        trace: of its image, where somebody asks how it is pruned.
        shape: of its image.
        scored: rows of the batch (parts, where it is packed) that its scores are recorded of.
        start, stop: its rows among the flattened hidden states of the batch, CLS token included.
        places: of its tokens, see `Batch`, counted from its own first one.
        kept: indices that stay, (part.keep,) int64, once they are known or chosen.
    """

    part: Part
    grid: Grid
    budget: ImageBudget
    known: torch.Tensor | None
    trace: Trace | None
    shape: Shape
    scored: range
    start: int
    stop: int
    places: torch.Tensor | None
    kept: torch.Tensor = field(init=False)

    @property
    def region(self) -> Region | None:
        """The part of the grid that may be kept; None for all of it."""
        return None if self.part.region.size == self.part.full else self.part.region

    @property
    def projected(self) -> int:
        """Tokens that go through the projector: where they are interpolated, all of its tiles."""
        tiles = self.grid.tiles
        return sum(tile.rows * tile.columns for tile in tiles) if tiles else self.part.keep

    def staying(self, tower: Tower) -> list[Kept]:
        """What the last block returns of it, once `kept` is known."""
        if not self.grid.tiles:
            rows = rows_of(self.kept, self.grid, tower, self.places)
            return [Kept(self.start, self.stop, rows)]
        size = (self.stop - self.start) // len(self.grid.tiles)
        every = torch.arange(tower.leading, size, device=self.kept.device)
        return [Kept(first, first + size, every) for first in range(self.start, self.stop, size)]


def pieces_of(
    family: FamilyAdapter, config: Any, batch: Batch, tower: Tower, images: Sequence[Image]
) -> list[list[Piece]]:
    """The parts of every image that are encoded, and where their rows are."""
    of_images, start, row = [], 0, 0
    for image, shape in zip(images, batch.shapes, strict=True):
        grids = family.grids(config, shape)
        parts = parts_of(grids, image.budget)
        known = iter(image.known_of(parts) or ())
        by_number = {part.number: part for part in parts}
        of_image = []
        for number, grid in enumerate(grids):
            part = by_number.get(number)
            if part is None and not tower.packed:
                continue  # a tile of which nothing is kept is not encoded
            tiles = grid.tiles or (grid,)
            tokens = tiles[0].rows * tiles[0].columns
            stop = start + len(tiles) * (tower.leading + tokens * tower.merge**2)
            if part is not None:
                places = batch.places
                if places is not None:
                    first = start // tower.merge**2
                    places = places[first : first + tokens] - first
                budget = image.budget.part(part.region.size, part.keep, number)
                before = next(known, None)
                scored = range(row, row + len(tiles))
                of_image.append(
                    Piece(
                        part, grid, budget, before, image.trace, shape, scored, start, stop, places
                    )
                )
                row = scored.stop
            start = stop
        of_images.append(of_image)
    return of_images


def scores_of(
    family: FamilyAdapter, model: Any, tower: Tower, piece: Piece, scores: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Scores of a piece's tokens, from those of the patches of each of `Piece.scored`."""
    if piece.grid.tiles:
        patches = torch.stack(tuple(scores))[:, :, None]
        return family.interpolated(model, piece.shape, patches).flatten()
    return pooled(scores[0], piece.grid, tower, piece.places)


def tokens_of(
    family: FamilyAdapter, model: Any, of_image: Sequence[Piece], tokens: torch.Tensor
) -> torch.Tensor:
    """An image's kept tokens from all that the projector has made of its pieces."""
    found = []
    made = torch.split(tokens, [piece.projected for piece in of_image])
    for piece, rows in zip(of_image, made, strict=True):
        if not piece.grid.tiles:
            found.append(rows)
            continue
        patches = rows.view(len(piece.grid.tiles), -1, rows.shape[-1])
        found.append(family.interpolated(model, piece.shape, patches)[piece.kept])
    return torch.cat(found)
