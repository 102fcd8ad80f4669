"""Buffer tokens: the spatial neighbours of the anchors (Eq. 5, Table 5)."""

import torch

from hiprune_vllm.pruning.budget import BUFFERS


def offsets(scheme: str, columns: int) -> tuple[int, ...]:
    """Flat index distances from an anchor to its buffers.

    Flat, as Eq. 5 has them: the right neighbour of the last token in a row is the first token of
    the next row.

    Args:
        scheme: one of `BUFFERS`.
        columns: p, tokens in a row of the grid, >= 1.
    """
    if scheme not in BUFFERS:
        raise ValueError(f"buffer must be one of {', '.join(BUFFERS)}, got {scheme!r}")
    row = (-1, 1)
    column = (-columns, columns)
    diagonal = (-columns - 1, -columns + 1, columns - 1, columns + 1)
    return {
        "none": (),
        "row": row,
        "cross": row + column,
        "square": row + column + diagonal,
    }[scheme]


def buffer_mask(anchors: torch.Tensor, columns: int, scheme: str) -> torch.Tensor:
    """Marks the neighbours of all anchors that lie inside the image and are no anchors themselves.

    Neighbours outside [0, N-1] are dropped (Eq. 5); the reference code clamps them onto the first
    or last token instead.

    Args:
        anchors: (B, N) bool.
        columns: p, tokens in a row of the grid.
        scheme: one of `BUFFERS`.

    Returns:
        (B, N) bool.
    """
    mask = torch.zeros_like(anchors)
    count = anchors.shape[1]
    for offset in offsets(scheme, columns):
        if offset > 0:
            mask[:, offset:] |= anchors[:, : max(0, count - offset)]
        elif offset < 0:
            mask[:, :offset] |= anchors[:, -offset:]
    return mask & ~anchors
