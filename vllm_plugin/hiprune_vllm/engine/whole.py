"""A prompt as it would be without pruning, which is what vLLM's models number the tokens of."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.multimodal.inputs import PlaceholderRange

from hiprune_vllm.engine.wire import BUDGET_FIELD, unpack_item


class Whole(NamedTuple):
    """A prompt as it would be with nothing pruned.

    Attributes:
        tokens: of that prompt.
        media: vLLM's features, with their places in it.
        places: (tokens of the pruned prompt,) int64, where each of them stands in it; all tokens of
            a pruned image stand at its first.
    """

    tokens: list[int]
    media: list[Any]
    places: np.ndarray


def whole_prompt(tokens: Sequence[int], media: Sequence[Any]) -> Whole:
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
    for of_medium, count in zip(embeds, counts, strict=True):
        if count:
            places[of_medium] = places[of_medium[0]]
    return Whole(whole, moved, places)


def _embeds(place: PlaceholderRange) -> np.ndarray:
    """Where the prompt has a medium's embeddings, int64."""
    inside = np.arange(place.length) if place.is_embed is None else place.is_embed.nonzero().numpy()
    return place.offset + inside.flatten()


def dropped(medium: Any) -> int:
    """How many tokens of a medium the prompt has less than without pruning."""
    if medium.data is None or BUDGET_FIELD not in medium.data:
        return 0
    budget, _ = unpack_item(medium.data[BUDGET_FIELD].data.tolist())
    return budget.full - budget.keep
