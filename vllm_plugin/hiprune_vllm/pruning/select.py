"""Which tokens stay: anchors, buffers, registers (Eq. 4-8) and the control methods.

No function here reads a tensor's value on the host: on an accelerator the selection is enqueued
like any other kernel and nothing waits for it.
"""

import torch

from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.neighbours import buffer_mask


def rank_descending(scores: torch.Tensor) -> torch.Tensor:
    """Indices from the highest to the lowest score, ties by lower index.

    Args:
        scores: (B, N).

    Returns:
        (B, N) int64. A stable sort, because `topk` leaves the order of ties open.
    """
    return torch.sort(scores, dim=1, descending=True, stable=True).indices


def _mark(indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, indices, True)


def hiprune_indices(
    object_scores: torch.Tensor,
    output_scores: torch.Tensor,
    *,
    keep: int,
    anchors: int,
    columns: int,
    buffer: str,
) -> torch.Tensor:
    """The tokens HiPrune keeps, in their original order (Eq. 4-8).

    Anchors come first, then their buffers by object-layer score, then registers by output-layer
    score, until `keep` tokens are found: where anchors and buffers exceed the budget, the weakest
    buffers go. Ties break by lower index.

    Args:
        object_scores: (B, N), a[l] of the object layer.
        output_scores: (B, N), a[output].
        keep: N', in [1, N].
        anchors: N_a, in [0, keep].
        columns: p, tokens in a row of the grid.
        buffer: buffer scheme.

    Returns:
        (B, keep) int64, ascending.
    """
    anchor = _mark(rank_descending(object_scores)[:, :anchors], object_scores)
    buffers = buffer_mask(anchor, columns, buffer)
    # Two stable sorts make one lexicographic order: within a kind by score, then by kind.
    by_score = rank_descending(torch.where(buffers, object_scores, output_scores))
    kind = anchor.to(torch.int8) * 2 + buffers.to(torch.int8)
    by_kind = rank_descending(kind.gather(1, by_score))
    chosen = by_score.gather(1, by_kind)[:, :keep]
    return torch.sort(chosen, dim=1).values


def attention_indices(output_scores: torch.Tensor, *, keep: int) -> torch.Tensor:
    """Registers only: the `keep` highest output-layer scores, ascending. (B, N) -> (B, keep)."""
    return torch.sort(rank_descending(output_scores)[:, :keep], dim=1).values


def random_indices(count: int, *, keep: int, seed: int, device: torch.device) -> torch.Tensor:
    """A uniform draw of `keep` of `count` tokens, ascending, the same on every device. (keep,)"""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(count, generator=generator)[:keep]
    return torch.sort(drawn).values.to(device, non_blocking=True)


def stride_indices(count: int, *, keep: int, device: torch.device) -> torch.Tensor:
    """`keep` tokens at even distances over the flat sequence, from token 0 on. (keep,)"""
    return torch.arange(keep, device=device) * count // keep


def kept_indices(
    budget: ImageBudget,
    *,
    count: int,
    columns: int,
    batch: int,
    device: torch.device,
    object_scores: torch.Tensor | None = None,
    output_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies one budget to `batch` images of one size.

    Args:
        budget: what to keep; `random` draws once from its seed, so its images share the draw.
        count: N, visual tokens of each image.
        columns: p, tokens in a row of the grid.
        batch: B.
        device: where the indices are wanted.
        object_scores, output_scores: (B, N), needed as the budget's method needs them.

    Returns:
        (B, budget.keep) int64, ascending in every row.

    Raises:
        ValueError: a score that the method needs is missing.
    """
    if budget.is_full:
        return torch.arange(count, device=device).expand(batch, -1)
    if budget.method == "random":
        drawn = random_indices(count, keep=budget.keep, seed=budget.seed, device=device)
        return drawn.expand(batch, -1)
    if budget.method == "stride":
        return stride_indices(count, keep=budget.keep, device=device).expand(batch, -1)
    if output_scores is None:
        raise ValueError(f"method {budget.method!r} needs output_scores, got none")
    if budget.method == "attention":
        return attention_indices(output_scores, keep=budget.keep)
    if object_scores is None:
        raise ValueError("method 'hiprune' needs object_scores, got none")
    return hiprune_indices(
        object_scores,
        output_scores,
        keep=budget.keep,
        anchors=budget.anchors,
        columns=columns,
        buffer=budget.buffer,
    )
