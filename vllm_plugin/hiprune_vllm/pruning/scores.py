"""What a token scores: the attention it receives (Eq. 2-3), without an H x T x T tensor."""

import torch

BLOCK_ELEMENTS = 1 << 22
"""Attention weights held at once: 4 Mi fp32 values, 16 MiB, twice that while they are made."""


def attention_received(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    *,
    from_first_only: bool = False,
    block_elements: int = BLOCK_ELEMENTS,
) -> torch.Tensor:
    """Column sums of `softmax(Q K^T * scale)`, added up over heads (Eq. 2-3 before the 1/H).

    The mean over heads is left to the caller because with tensor parallelism the heads at hand
    are only some of them.

    Args:
        query, key: (B, T, H, D), one image per batch row, as the layer really uses them (after
            rotary embedding where there is one); any float dtype, computed in fp32.
        scale: what the layer multiplies Q K^T by, 1/sqrt(d_k).
        from_first_only: count only the attention paid by token 0 (the CLS token, Table 5a).
        block_elements: upper bound of attention weights held at once, where one query row fits.

    Returns:
        (B, T) fp32, the sum over heads and attending tokens of the attention each token receives.
    """
    if from_first_only:
        query = query[:, :1]
    batch, tokens, heads, width = key.shape
    rows = query.shape[1]
    # (B*H, rows, D) and (B*H, D, T): every pair of image and head is one matrix product.
    q = query.transpose(1, 2).reshape(batch * heads, rows, width)
    k = key.transpose(1, 2).reshape(batch * heads, tokens, width).transpose(1, 2)
    pairs = max(1, block_elements // (rows * tokens))
    row_block = min(rows, max(1, block_elements // tokens))
    received = torch.empty(batch * heads, tokens, dtype=torch.float32, device=key.device)
    for first in range(0, batch * heads, pairs):
        some_q = q[first : first + pairs].float() * scale
        some_k = k[first : first + pairs].float()
        total = received[first : first + pairs]
        total.zero_()
        for row in range(0, rows, row_block):
            logits = torch.bmm(some_q[:, row : row + row_block], some_k)
            total += torch.softmax(logits, dim=-1).sum(dim=1)
    return received.view(batch, heads, tokens).sum(dim=1)
