"""An encoder that every rank holds whole (`--mm-encoder-tp-mode data`): images are shared out.

Each rank encodes some images with all heads, so no scores are added up. What it keeps of them is
sent to all others, and so is which tokens that were: whoever encodes an image again keeps the same.
All sizes follow from the budgets, so ranks agree on them without asking.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.nn.functional import pad
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.models.vision import get_load_balance_assignment

from hiprune_vllm.models.base import Batch, FamilyAdapter
from hiprune_vllm.models.encode import encode
from hiprune_vllm.models.images import Encoded, Image, Selection
from hiprune_vllm.models.pieces import parts_of
from hiprune_vllm.pruning.positions import COLUMNS

PLAIN: Final = (torch.float32, torch.bfloat16, torch.float16)
"""What embeddings may be; quantized weights of a block are something else, its norms never."""


def shares_of(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which images each rank encodes, by vLLM's own balance of their sizes."""
    order, counts, _ = get_load_balance_assignment(list(sizes), ranks)
    numbers = iter(order)
    return [[next(numbers) for _ in range(count)] for count in counts]


def encode_shared(
    family: FamilyAdapter, model: Any, batch: Batch, images: Sequence[Image]
) -> list[Encoded]:
    """As `encode`, each rank a share of the images; every rank returns all of them."""
    shares = shares_of(
        [image.budget.full for image in images], get_tensor_model_parallel_world_size()
    )
    mine = shares[get_tensor_model_parallel_rank()]
    encoded = []
    if mine:
        encoded = encode(family, model, batch.some(mine), [images[i] for i in mine], None)
    weights = family.tower(model).blocks[-1].parameters()
    weight = next(one for one in weights if one.dtype in PLAIN)
    width = family.width(model.config)
    columns = width + (COLUMNS if family.mrope else 0)
    # Indices go as fp32, exact up to 2**24: the CPU engine gathers no integers.
    rows, chosen = [weight.new_zeros(0, columns)], [weight.new_zeros(0, dtype=torch.float32)]
    for one in encoded:
        missing = columns - one.embeddings.shape[1]  # an unpruned image brings no positions
        rows.append(pad(one.embeddings, (0, missing)))
        chosen.extend(kept.float() for kept in (one.selection.kept if one.selection else ()))
    embeddings = _gathered(torch.cat(rows), shares, [image.budget.keep for image in images])
    kept = _gathered(
        torch.cat(chosen),
        shares,
        [0 if image.budget.is_full else image.budget.keep for image in images],
    )
    found: list[Encoded] = []
    for i, image in enumerate(images):
        if image.budget.is_full:
            found.append(Encoded(embeddings[i][:, :width], None))
            continue
        parts = parts_of(family.grids(model.config, batch.shapes[i]), image.budget)
        of_parts = torch.split(kept[i].long(), [part.keep for part in parts])
        found.append(Encoded(embeddings[i], Selection(parts, of_parts)))
    return found


def _gathered(
    mine: torch.Tensor, shares: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[torch.Tensor]:
    """Rows of every image from the rank that has them, in the order of the images.

    Args:
        mine: (rows, ...) of this rank's images, one after another.
        shares: the images of each rank.
        counts: rows of each image.
    """
    of_ranks = [[counts[i] for i in share] for share in shares]
    longest = max(map(sum, of_ranks))
    padded = mine.new_zeros(longest, *mine.shape[1:])
    padded[: len(mine)] = mine
    found: dict[int, torch.Tensor] = {}
    everything = tensor_model_parallel_all_gather(padded, dim=0)
    for i, (share, of_rank) in enumerate(zip(shares, of_ranks, strict=True)):
        rows = everything[i * longest : i * longest + sum(of_rank)]
        found |= dict(zip(share, torch.split(rows, of_rank), strict=True))
    return [found[i] for i in range(len(counts))]
