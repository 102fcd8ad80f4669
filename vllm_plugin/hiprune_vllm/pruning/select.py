"""Which tokens stay: anchors, buffers, registers (Eq. 4-8) and the control methods.

No function here reads a tensor's value on the host: on an accelerator the selection is enqueued
like any other kernel and nothing waits for it.
"""

from typing import NamedTuple

import torch

from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.neighbours import buffer_mask


class Region(NamedTuple):
    """The part of a grid that shows the picture: rows [top, bottom), columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def size(self) -> int:
        return max(0, self.bottom - self.top) * max(0, self.right - self.left)

    def mask(self, count: int, columns: int, device: torch.device) -> torch.Tensor:
        """(count,) bool: which tokens of a grid with `columns` lie inside."""
        index = torch.arange(count, device=device)
        row, column = index // columns, index % columns
        return (
            (row >= self.top) & (row < self.bottom) & (column >= self.left) & (column < self.right)
        )


def rank_descending(scores: torch.Tensor) -> torch.Tensor:
    """Indices from the highest to the lowest score, ties by lower index.

    Args:
        scores: (B, N).

    Returns:
        (B, N) int64. A stable sort, because `topk` leaves the order of ties open.
    """
    return torch.sort(scores, dim=1, descending=True, stable=True).indices


def best_order(kind: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Indices by kind, highest first, within a kind by score, ties by lower index. (B, N)."""
    # Two stable sorts make one lexicographic order.
    by_score = rank_descending(scores)
    return by_score.gather(1, rank_descending(kind.gather(1, by_score)))


def best_indices(kind: torch.Tensor, scores: torch.Tensor, keep: int) -> torch.Tensor:
    """The first `keep` tokens by kind, within a kind by score, then by lower index.

    Args:
        kind: (B, N) int8, higher goes first.
        scores: (B, N).
        keep: in [0, N].

    Returns:
        (B, keep) int64, ascending.
    """
    return torch.sort(best_order(kind, scores)[:, :keep], dim=1).values


ROLES = ("register", "buffer", "anchor")
"""Why a token stays, by its kind."""


def token_kinds(
    object_scores: torch.Tensor,
    *,
    anchors: int,
    columns: int,
    buffer: str,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """What every token would stay as (Eq. 4-7): 2 an anchor, 1 a buffer, 0 a register.

    Args:
        object_scores: (B, N), a[l] of the object layer.
        anchors: N_a.
        columns: p, tokens in a row of the grid.
        buffer: buffer scheme.
        allowed: (N,) bool: tokens that may be kept; None for all.

    Returns:
        (B, N) int8, below 0 where a token may not be kept. Ties break by lower index.
    """
    may = torch.zeros_like(object_scores, dtype=torch.int8)
    if allowed is not None:
        may = may - (~allowed).to(torch.int8)
    order = best_order(may, object_scores)[:, :anchors]
    anchor = torch.zeros_like(may, dtype=torch.bool).scatter_(1, order, True)
    buffers = buffer_mask(anchor, columns, buffer)
    if allowed is not None:
        buffers = buffers & allowed
    return may + anchor.to(torch.int8) * 2 + buffers.to(torch.int8)


def hiprune_indices(
    object_scores: torch.Tensor,
    output_scores: torch.Tensor,
    *,
    keep: int,
    anchors: int,
    columns: int,
    buffer: str,
    allowed: torch.Tensor | None = None,
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
        allowed: (N,) bool with at least `keep` set: tokens that may be kept; None for all.

    Returns:
        (B, keep) int64, ascending.
    """
    kind = token_kinds(
        object_scores, anchors=anchors, columns=columns, buffer=buffer, allowed=allowed
    )
    buffers = kind == ROLES.index("buffer")
    return best_indices(kind, torch.where(buffers, object_scores, output_scores), keep)


def attention_indices(
    output_scores: torch.Tensor, *, keep: int, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """Registers only: the `keep` highest output-layer scores, ascending. (B, N) -> (B, keep)."""
    may = torch.ones_like(output_scores, dtype=torch.int8)
    if allowed is not None:
        may = may * allowed
    return best_indices(may, output_scores, keep)


def random_scores(count: int, *, seed: int, device: torch.device) -> torch.Tensor:
    """(1, count) scores whose highest are a uniform draw, the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(count, generator=generator)
    return drawn[None].to(device, non_blocking=True)


def stride_indices(
    count: int, *, keep: int, device: torch.device, region: Region | None = None, columns: int = 1
) -> torch.Tensor:
    """`keep` tokens at even distances over the flat sequence (of the region), the first included.

    Returns:
        (keep,) int64, ascending.
    """
    if region is None:
        return torch.arange(keep, device=device) * count // keep
    inside = torch.arange(keep, device=device) * region.size // max(1, keep)
    width = max(1, region.right - region.left)
    return (region.top + inside // width) * columns + region.left + inside % width


def kept_indices(
    budget: ImageBudget,
    *,
    count: int,
    columns: int,
    batch: int,
    device: torch.device,
    object_scores: torch.Tensor | None = None,
    output_scores: torch.Tensor | None = None,
    region: Region | None = None,
) -> torch.Tensor:
    """Applies one budget to `batch` images of one size.

    Args:
        budget: what to keep; `random` draws once from its seed, so its images share the draw.
        count: N, visual tokens of each image.
        columns: p, tokens in a row of the grid.
        batch: B.
        device: where the indices are wanted.
        object_scores, output_scores: (B, N), needed as the budget's method needs them.
        region: only tokens inside may be kept; at least `budget.keep` of them. None for all.

    Returns:
        (B, budget.keep) int64, ascending in every row.

    Raises:
        ValueError: a score that the method needs is missing.
    """
    keep = budget.keep
    if budget.is_full or budget.method == "stride":
        return stride_indices(
            count, keep=keep, device=device, region=region, columns=columns
        ).expand(batch, -1)
    allowed = None if region is None else region.mask(count, columns, device)
    if budget.method == "random":
        drawn = random_scores(count, seed=budget.seed, device=device)
        return attention_indices(drawn, keep=keep, allowed=allowed).expand(batch, -1)
    if output_scores is None:
        raise ValueError(f"method {budget.method!r} needs output_scores, got none")
    if budget.anchors == 0:
        return attention_indices(output_scores, keep=keep, allowed=allowed)
    if object_scores is None:
        raise ValueError("method 'hiprune' needs object_scores, got none")
    return hiprune_indices(
        object_scores,
        output_scores,
        keep=keep,
        anchors=budget.anchors,
        columns=columns,
        buffer=budget.buffer,
        allowed=allowed,
    )
