"""A prompt as it would be without pruning, which is what vLLM's models number the tokens of."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from hiprune_vllm.engine.wire import BUDGET_FIELDS, slices_of, unpack_item
from hiprune_vllm.pruning.budget import spread_evenly


class Whole(NamedTuple):
    """A prompt as it would be with nothing pruned.

    Attributes:
        tokens: of that prompt.
        media: vLLM's features, with their places in it.
        places: (tokens of the pruned prompt,) int64, where each of them stands in it; all tokens of
            a pruned image stand at its first, those of a pruned video at their slice's.
    """

    tokens: list[int]
    media: list[MultiModalFeatureSpec]
    places: np.ndarray


def whole_prompt(tokens: Sequence[int], media: Sequence[MultiModalFeatureSpec]) -> Whole:
    """Puts the dropped tokens of a prompt back, behind the last one of their image that stayed.

    Args:
        tokens: of the prompt with its pruned images.
        media: vLLM's features (`MultiModalFeatureSpec`) of it, in any order.
    """
    copies = np.ones(len(tokens), dtype=np.int64)
    embeds = [_embeds(medium.mm_position) for medium in media]
    counts = [dropped(medium) for medium in media]
    for of_medium, count in zip(embeds, counts, strict=True):
        if count:
            copies[of_medium[-1]] += count
    places = np.cumsum(copies) - copies
    moved = []
    for medium, count in zip(media, counts, strict=True):
        place = medium.mm_position
        mask = place.is_embed
        if mask is not None and count:
            of_tokens = copies[place.offset : place.offset + place.length]
            mask = mask.repeat_interleave(torch.from_numpy(of_tokens))
        start = int(places[place.offset])
        moved.append(
            replace(medium, mm_position=PlaceholderRange(start, place.length + count, mask))
        )
    whole = np.repeat(np.asarray(tokens, dtype=np.int64), copies).tolist()
    for medium, of_medium, count in zip(media, embeds, counts, strict=True):
        if count:
            places[of_medium] = places[of_medium[0]] + _slice_starts(medium)
    return Whole(whole, moved, places)


def _embeds(place: PlaceholderRange) -> np.ndarray:
    """Where the prompt has a medium's embeddings, int64."""
    inside = np.arange(place.length) if place.is_embed is None else place.is_embed.nonzero().numpy()
    return place.offset + inside.flatten()


def dropped(medium: MultiModalFeatureSpec) -> int:
    """How many tokens of a medium the prompt has less than without pruning."""
    row = _row(medium)
    if row is None:
        return 0
    budget, _ = unpack_item(row)
    return budget.full - budget.keep


def _row(medium: MultiModalFeatureSpec) -> list[int] | None:
    """A medium's budget as it travels; None for one that has none."""
    for name in BUDGET_FIELDS if medium.data is not None else ():
        if name in medium.data:
            row: list[int] = medium.data[name].data.tolist()
            return row
    return None


def _slice_starts(medium: MultiModalFeatureSpec) -> np.ndarray:
    """Of every kept token of a pruned medium, where its slice begins in the whole one, int64."""
    row = _row(medium)
    assert row is not None
    (budget, _), slices = unpack_item(row), slices_of(row)
    starts = np.arange(slices, dtype=np.int64) * (budget.full // slices)
    return np.repeat(starts, spread_evenly(budget.keep, slices))
