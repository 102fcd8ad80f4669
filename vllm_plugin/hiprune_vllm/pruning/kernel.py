"""Column sums of attention as Triton kernels, for CUDA: no attention weight ever reaches memory.

Two passes over Q K^T, as a weight needs the sum of its row before it can be added to its column:
the first keeps the log-sum-exp of every row, the second adds up columns. Opt-in: see
`hiprune_vllm.tuning`.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 64, 64
"""Attention weights that a program holds at once."""


@triton.jit
def _row_lse(
    query, key, lse, tokens, rows, scale,
    q_image, q_token, q_head, k_image, k_token, k_head, heads,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: log-sum-exp of `ROWS` rows of one image and head."""
    pair = tl.program_id(1)
    image, head = pair // heads, pair % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PADDED)
    q = tl.load(
        query + image * q_image + head * q_head + row[:, None] * q_token + part[None, :],
        mask=(row[:, None] < rows) & (part[None, :] < WIDTH),
        other=0.0,
    )
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, tokens, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        k = tl.load(
            key + image * k_image + head * k_head + column[None, :] * k_token + part[:, None],
            mask=(column[None, :] < tokens) & (part[:, None] < WIDTH),
            other=0.0,
        )
        logits = tl.dot(q, k, input_precision="ieee") * scale
        logits = tl.where(column[None, :] < tokens, logits, float("-inf"))
        now = tl.maximum(highest, tl.max(logits, axis=1))
        total = total * tl.exp(highest - now) + tl.sum(tl.exp(logits - now[:, None]), axis=1)
        highest = now
    tl.store(lse + pair * rows + row, highest + tl.log(total), mask=row < rows)


@triton.jit
def _column_sums(
    query, key, lse, received, tokens, rows, scale,
    q_image, q_token, q_head, k_image, k_token, k_head, heads,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: what `COLUMNS` tokens receive in one image and head, from all rows in order."""
    pair = tl.program_id(1)
    image, head = pair // heads, pair % heads
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, PADDED)
    k = tl.load(
        key + image * k_image + head * k_head + column[None, :] * k_token + part[:, None],
        mask=(column[None, :] < tokens) & (part[:, None] < WIDTH),
        other=0.0,
    )
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        q = tl.load(
            query + image * q_image + head * q_head + row[:, None] * q_token + part[None, :],
            mask=(row[:, None] < rows) & (part[None, :] < WIDTH),
            other=0.0,
        )
        # A row that is none has an infinite sum: it pays nothing.
        of_row = tl.load(lse + pair * rows + row, mask=row < rows, other=float("inf"))
        logits = tl.dot(q, k, input_precision="ieee") * scale
        total += tl.sum(tl.exp(logits - of_row[:, None]), axis=0)
    tl.store(received + pair * tokens + column, total, mask=column < tokens)


def attention_received(
    query: torch.Tensor, key: torch.Tensor, scale: float, *, from_first_only: bool = False
) -> torch.Tensor:
    """As `pruning.scores.attention_received`, which is what it is tested against.

    Products are taken in the tensors' own dtype and added up in fp32. No two programs add to one
    number, so the result is the same every time.
    """
    if from_first_only:
        query = query[:, :1]
    batch, tokens, heads, width = key.shape
    rows = query.shape[1]
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    lse = torch.empty(batch * heads, rows, dtype=torch.float32, device=key.device)
    received = torch.empty(batch, heads, tokens, dtype=torch.float32, device=key.device)
    shape = (tokens, rows, scale, *query.stride()[:3], *key.stride()[:3], heads)
    sizes = {
        "WIDTH": width,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
    }
    _row_lse[(triton.cdiv(rows, ROWS), batch * heads)](query, key, lse, *shape, **sizes)
    _column_sums[(triton.cdiv(tokens, COLUMNS), batch * heads)](
        query, key, lse, received, *shape, **sizes
    )
    return received.sum(dim=1)
