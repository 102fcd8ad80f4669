"""Where kept tokens stood in the picture, as columns beside their embeddings.

A language model with 3-D rotary positions has to see a kept token where it was (section 4), and
only the worker knows which tokens were kept. The grid row and column travel with the embedding, in
its own dtype, so they are split into digits: bf16 holds integers exactly only to 256.
"""

from typing import Final

import torch

COLUMNS: Final = 7
"""Pruned or not, then two digits each, the high one first: row, column, time."""

_BASE: Final = 128
LARGEST: Final = 128 * 256 - 1
"""Largest row, column or time that two digits hold exactly in bf16."""


def encode_positions(
    kept: torch.Tensor, columns: int, dtype: torch.dtype, time: int = 0
) -> torch.Tensor:
    """Positions of the kept tokens of a pruned image, or of one slice of a pruned video.

    Args:
        kept: (n,) int64, flat indices in the grid.
        columns: p, tokens in a row of the grid.
        dtype: of the embeddings they travel with.
        time: positions that a slice comes later than its video begins, in [0, LARGEST].

    Returns:
        (n, COLUMNS) of `dtype`.
    """
    row, column = kept // columns, kept % columns
    digits = [torch.ones_like(row)]
    for number in (row, column, torch.full_like(row, time)):
        digits += [number // _BASE, number % _BASE]
    return torch.stack(digits, dim=1).to(dtype)


def no_positions(count: int, like: torch.Tensor) -> torch.Tensor:
    """Columns for `count` tokens of an unpruned item, whose positions are known already."""
    return like.new_zeros(count, COLUMNS)


def decode_positions(encoded: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Inverse of `encode_positions` and `no_positions`.

    Returns:
        (n,) bool whether the token is of something pruned, and (n,) int64 its row, its column and
        its time.
    """
    pruned, *digits = encoded.long().unbind(dim=1)
    pairs = zip(digits[::2], digits[1::2], strict=True)
    return pruned.bool(), *(high * _BASE + low for high, low in pairs)
