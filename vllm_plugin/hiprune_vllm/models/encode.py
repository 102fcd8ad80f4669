"""Encodes images and keeps of each what its budget says: the same for every family.

A family says what its parts are, where its tower keeps its blocks and how their rows lie; here
the scores of two layers are recorded (Eq. 2-3), patches are pooled to the tokens that the language
model would see, tokens are chosen (Eq. 4-8), and the tower's last block ends with the chosen ones,
so that everything behind it, the projector included, works on them alone.

Nothing is read on the host on the way: budgets are integers, so all shapes are known beforehand.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from hiprune_vllm.models.base import (
    Batch,
    FamilyAdapter,
    Tower,
    UnsupportedCheckpoint,
)
from hiprune_vllm.models.images import Encoded, Image, Selection, TracedPart
from hiprune_vllm.models.last_block import Kept, kept_after, kept_of_all, kept_only, put_off
from hiprune_vllm.models.pieces import Piece, pieces_of, scores_of, tokens_of
from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.clock import SELECTION
from hiprune_vllm.pruning.positions import encode_positions
from hiprune_vllm.pruning.record import ScoreRecorder, SumOverRanks, wanted_scores
from hiprune_vllm.pruning.select import Region, kept_indices
from hiprune_vllm.tuning import chosen

Scores = Mapping[tuple[int, str, int], torch.Tensor]
"""(layer, score, piece of the batch) -> fp32 scores."""


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
    of_images = pieces_of(family, model.config, batch, tower, images)
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
        {row: piece.budget for piece in pieces if piece.known is None for row in piece.scored},
        output_layer,
        {
            row: (piece.trace.layer, piece.trace.score)
            for piece in pieces
            if piece.trace is not None
            for row in piece.scored
        },
    )
    device = next(tower.blocks[-1].parameters()).device

    kept: list[Kept] = []

    def select() -> list[Kept]:
        """What stays of every piece, once both layers were scored."""
        of_tokens = {
            (layer, score, i): scores_of(family, model, tower, piece, [scores[key] for key in keys])
            for layer, score in {(layer, score) for layer, score, _ in scores}
            for i, piece in enumerate(pieces)
            if (keys := [(layer, score, row) for row in piece.scored])[0] in scores
        }
        _select(pieces, of_tokens, output_layer, device)
        kept.extend(rows for piece in pieces for rows in piece.staying(tower))
        return kept

    parts = [[piece.part for piece in of_image] for of_image in of_images]
    with (
        recorder.recording(wanted) as scores,
        _ending(tower, select),
        put_off(tower.taps, sum(piece.projected for piece in pieces)) as tapped,
        kept_of_all(tower.joined, kept, spare_rows=tower.leading),
    ):
        embeddings = family.forward(model, batch, parts)
    if tower.taps:
        embeddings = torch.cat([embeddings, *tapped(kept)], dim=1)
    encoded, first = [], 0
    for image, shape, of_image in zip(images, batch.shapes, of_images, strict=True):
        count = sum(piece.projected for piece in of_image)
        tokens = embeddings[first : first + count]
        first += count
        if image.budget.is_full:
            encoded.append(Encoded(family.whole(model, shape, tokens), None))
            continue
        if any(piece.grid.tiles for piece in of_image):
            tokens = tokens_of(family, model, of_image, tokens)
        selection = Selection(
            tuple(piece.part for piece in of_image), tuple(piece.kept for piece in of_image)
        )
        if family.mrope:
            where = [
                encode_positions(p.kept, p.grid.columns, tokens.dtype, p.grid.time or 0)
                for p in of_image
            ]
            tokens = torch.cat([tokens, torch.cat(where)], dim=1)
        order = family.prompt_order(model.config, shape, selection)
        encoded.append(Encoded(tokens if order is None else tokens[order], selection))
    return encoded


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
