"""What travels from the front end to the worker with an image: its budget and its key.

Importing this changes and registers nothing.
"""

from collections.abc import Sequence
from typing import Final

from hiprune_vllm.engine.secret import keyed
from hiprune_vllm.pruning.budget import BUDGET_INTS, ImageBudget

BUDGET_FIELD: Final = "hiprune_budget"
"""Name of the per-image tensor, (n,) int64, that carries `pack_item`."""
VIDEO_BUDGET_FIELD: Final = "hiprune_video_budget"
"""The same of videos."""
BUDGET_FIELDS: Final = (BUDGET_FIELD, VIDEO_BUDGET_FIELD)

Key = tuple[int, ...]
"""What a worker knows an image and its budget by: nobody outside of the server can compute it."""


def pack_item(budget: ImageBudget, identity: str, slices: int = 1) -> list[int]:
    """A budget and the key of the image's identity as integers in [-2**63, 2**63).

    And in how many slices, one after another in the prompt, a video shares the budget evenly.
    """
    numbers = budget.to_ints()
    return [*numbers, slices, *keyed(identity, numbers)]


def unpack_item(row: Sequence[int]) -> tuple[ImageBudget, Key]:
    """A budget and its image's key from what `pack_item` made."""
    return ImageBudget.from_ints(row[:BUDGET_INTS]), tuple(row[BUDGET_INTS + 1 :])


def slices_of(row: Sequence[int]) -> int:
    """In how many slices the budget of `pack_item`'s row is shared."""
    return row[BUDGET_INTS]
