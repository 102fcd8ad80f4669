"""Where kept tokens stood in the picture, as columns beside their embeddings.

A language model with 3-D rotary positions has to see a kept token where it was (section 4), and
only the worker knows which tokens were kept. The grid row and column travel with the embedding, in
its own dtype, so they are split into digits: bf16 holds integers exactly only to 256.
"""

from typing import Final

import torch

COLUMNS: Final = 5
"""Pruned or not, row (high digit, low digit), column (high digit, low digit)."""

_BASE: Final = 128
LARGEST: Final = 128 * 256 - 1
"""Largest row or column that two digits hold exactly in bf16."""


def encode_positions(kept: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Positions of the kept tokens of a pruned image.

    Args:
        kept: (n,) int64, flat indices in the grid.
        columns: p, tokens in a row of the grid.
        dtype: of the embeddings they travel with.

    Returns:
        (n, COLUMNS) of `dtype`.
    """
    row, column = kept // columns, kept % columns
    digits = [torch.ones_like(row), row // _BASE, row % _BASE, column // _BASE, column % _BASE]
    return torch.stack(digits, dim=1).to(dtype)


def no_positions(count: int, like: torch.Tensor) -> torch.Tensor:
    """Columns for `count` tokens of an unpruned item, whose positions are known already."""
    return like.new_zeros(count, COLUMNS)


def decode_positions(encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse of `encode_positions` and `no_positions`.

    Returns:
        (n,) bool whether the token is of a pruned image, and (n,) int64 its row and its column.
    """
    pruned, row_high, row_low, column_high, column_low = encoded.long().unbind(dim=1)
    return pruned.bool(), row_high * _BASE + row_low, column_high * _BASE + column_low
