"""Encodes images and keeps of each what its budget says: the same for every family.

A family says what its parts are, where its tower keeps its blocks and how their rows lie; here
the scores of two layers are recorded (Eq. 2-3), patches are pooled to the tokens that the language
model would see, tokens are chosen (Eq. 4-8), and the tower's last block ends with the chosen ones,
so that everything behind it, the projector included, works on them alone.

Nothing is read on the host on the way: budgets are integers, so all shapes are known beforehand.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from hiprune_vllm.models.base import Batch, FamilyAdapter, Grid, Tower, UnsupportedCheckpoint
from hiprune_vllm.models.images import Encoded, Image, Part, Selection, Trace, TracedPart
from hiprune_vllm.models.last_block import Kept, kept_after, kept_only, put_off
from hiprune_vllm.pruning.budget import ImageBudget, spread
from hiprune_vllm.pruning.clock import SELECTION
from hiprune_vllm.pruning.positions import encode_positions
from hiprune_vllm.pruning.record import ScoreRecorder, SumOverRanks, wanted_scores
from hiprune_vllm.pruning.select import Region, kept_indices
from hiprune_vllm.tuning import chosen

Scores = Mapping[tuple[int, str, int], torch.Tensor]
"""(layer, score, piece of the batch) -> fp32 scores."""


def parts_of(grids: Sequence[Grid], budget: ImageBudget) -> tuple[Part, ...]:
    """What is to be chosen from an image's grids: even shares that add up to exactly N'.

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
    shares = spread(budget.keep, [1] * len(grids), [region.size for region in regions])
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
        start, stop: its rows among the flattened hidden states of the batch, CLS token included.
        places: of its tokens, see `Batch`, counted from its own first one.
        kept: indices that stay, (part.keep,) int64, once they are known or chosen.
    """

    part: Part
    grid: Grid
    budget: ImageBudget
    known: torch.Tensor | None
    trace: Trace | None
    start: int
    stop: int
    places: torch.Tensor | None
    kept: torch.Tensor = field(init=False)

    @property
    def region(self) -> Region | None:
        """The part of the grid that may be kept; None for all of it."""
        return None if self.part.region.size == self.part.full else self.part.region


def check_tower(family: FamilyAdapter, model: Any) -> None:
    """Holds a model that has just been made against what the checkpoint says of its encoder.

    Raises:
        RuntimeError: the tower does not end with the output layer ("version drift").
    """
    try:
        expected = family.encoder(model.config).output_layer
    except UnsupportedCheckpoint:
        return  # it is served as it is
    found = len(family.tower(model).blocks)
    if found != expected:
        raise RuntimeError(f"version drift: expected {expected} encoder blocks, got {found}")


def encode(
    family: FamilyAdapter,
    model: Any,
    batch: Batch,
    images: Sequence[Image],
    sum_over_ranks: SumOverRanks | None,
) -> list[Encoded]:
    """Encodes a batch of images and projects the kept tokens only.

    Args:
        family: of the model.
        model: the vLLM model.
        batch: as the family reads it from the model's inputs.
        images: in its order.
        sum_over_ranks: adds per-rank scores; None where a rank holds all heads.

    Returns:
        One an image, in order.
    """
    tower = family.tower(model)
    if tower.one_by_one and len(images) > 1:
        alone = [
            encode(family, model, batch.some([i]), [image], sum_over_ranks)
            for i, image in enumerate(images)
        ]
        return [one for (one,) in alone]
    batch = family.laid_out(model, batch)
    output_layer = len(tower.blocks)  # see `check_tower`
    of_images = _pieces(family, model.config, batch, tower, images)
    pieces = [piece for of_image in of_images for piece in of_image]
    recorder = ScoreRecorder(
        [block.get_submodule(tower.attention) for block in tower.blocks],
        heads=tower.heads,
        leading_tokens=tower.leading,
        sum_over_ranks=sum_over_ranks,
        spans=[(piece.start, piece.stop) for piece in pieces] if tower.packed else None,
        source=tower.source,
    )
    wanted = wanted_scores(
        {i: piece.budget for i, piece in enumerate(pieces) if piece.known is None},
        output_layer,
        {i: (p.trace.layer, p.trace.score) for i, p in enumerate(pieces) if p.trace is not None},
    )
    device = next(tower.blocks[-1].parameters()).device

    kept: list[Kept] = []

    def select() -> list[Kept]:
        """What stays of every piece, once both layers were scored."""
        of_tokens = {
            (layer, score, i): pooled(values, pieces[i].grid, tower, pieces[i].places)
            for (layer, score, i), values in scores.items()
        }
        _select(pieces, of_tokens, output_layer, device)
        kept.extend(
            Kept(one.start, one.stop, rows_of(one.kept, one.grid, tower, one.places))
            for one in pieces
        )
        return kept

    parts = [[piece.part for piece in of_image] for of_image in of_images]
    with (
        recorder.recording(wanted) as scores,
        _ending(tower, select),
        put_off(tower.taps, sum(piece.part.keep for piece in pieces)) as tapped,
    ):
        embeddings = family.forward(model, batch, parts)
    if tower.taps:
        embeddings = torch.cat([embeddings, *tapped(kept)], dim=1)
    encoded, first = [], 0
    for image, shape, of_image in zip(images, batch.shapes, of_images, strict=True):
        count = sum(piece.part.keep for piece in of_image)
        tokens = embeddings[first : first + count]
        first += count
        if image.budget.is_full:
            encoded.append(Encoded(family.whole(model, shape, tokens), None))
            continue
        selection = Selection(
            tuple(piece.part for piece in of_image), tuple(piece.kept for piece in of_image)
        )
        if family.mrope:
            where = [encode_positions(p.kept, p.grid.columns, tokens.dtype) for p in of_image]
            tokens = torch.cat([tokens, torch.cat(where)], dim=1)
        order = family.prompt_order(model.config, shape, selection)
        encoded.append(Encoded(tokens if order is None else tokens[order], selection))
    return encoded


def _pieces(
    family: FamilyAdapter, config: Any, batch: Batch, tower: Tower, images: Sequence[Image]
) -> list[list[Piece]]:
    """The parts of every image that are encoded, and where their rows are."""
    of_images, start = [], 0
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
            tokens = grid.rows * grid.columns
            stop = start + tower.leading + tokens * tower.merge**2
            if part is not None:
                places = batch.places
                if places is not None:
                    first = start // tower.merge**2
                    places = places[first : first + tokens] - first
                budget = image.budget.part(part.region.size, part.keep, number)
                before = next(known, None)
                of_image.append(Piece(part, grid, budget, before, image.trace, start, stop, places))
            start = stop
        of_images.append(of_image)
    return of_images


def _ending(tower: Tower, select: Callable[[], Sequence[Kept]]) -> AbstractContextManager[None]:
    """While inside, the tower's last block returns the kept rows alone."""
    block = tower.blocks[-1]
    if not tower.qkv or chosen("PRUNING_LAST_BLOCK") == "whole":
        return kept_after(block, select, spare_rows=tower.leading)
    names = (tower.qkv,) if isinstance(tower.qkv, str) else tower.qkv
    return kept_only(
        block,
        [block.get_submodule(name) for name in names],
        block.get_submodule(tower.attention),
        select,
        spare_rows=tower.leading,
        within_images=tower.within_images,
        by_row=tower.by_row,
    )


def _select(
    pieces: Sequence[Piece], scores: Scores, output_layer: int, device: torch.device
) -> None:
    """Fills in what is kept of every piece, known or chosen, and the traces."""
    new = {i: piece for i, piece in enumerate(pieces) if piece.known is None}
    found = choose(new, scores, output_layer=output_layer, device=device)
    for i, piece in enumerate(pieces):
        piece.kept = found[i] if piece.known is None else piece.known
        if (trace := piece.trace) is not None:
            trace.parts.append(
                TracedPart(
                    piece.part.number,
                    piece.budget,
                    piece.grid.columns,
                    piece.region,
                    object_scores=scores[trace.layer, trace.score, i],
                    output_scores=scores[output_layer, trace.score, i],
                    kept=piece.kept,
                )
            )


def choose(
    pieces: Mapping[int, Piece], scores: Scores, *, output_layer: int, device: torch.device
) -> dict[int, torch.Tensor]:
    """Kept indices of pieces of the batch.

    Those with the same grid and budget are selected together: one set of kernels for all of them.

    Args:
        pieces: by their number in the batch.
        scores: of their tokens, (tokens,) each.
        output_layer: 1-based.
        device: of the indices.

    Returns:
        A (budget.keep,) int64 tensor a piece, ascending.
    """
    with SELECTION.running(device):
        groups: dict[tuple[ImageBudget, int, int, Region | None], list[int]] = {}
        for i, piece in pieces.items():
            alike = piece.budget, piece.part.full, piece.grid.columns, piece.region
            groups.setdefault(alike, []).append(i)
        found: dict[int, torch.Tensor] = {}
        for (budget, count, columns, region), numbers in groups.items():
            at_object, at_output = (
                torch.stack([scores[layer, budget.score, i] for i in numbers]) if needed else None
                for layer, needed in (
                    (budget.object_layer, budget.anchors),
                    (output_layer, budget.needs_attention),
                )
            )
            kept = kept_indices(
                budget,
                count=count,
                columns=columns,
                batch=len(numbers),
                device=device,
                object_scores=at_object,
                output_scores=at_output,
                region=region,
            )
            found.update(zip(numbers, kept, strict=True))
        return found
