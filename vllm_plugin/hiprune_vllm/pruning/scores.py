"""What a token scores: the attention it receives (Eq. 2-3), without an H x T x T tensor."""

import torch

BLOCK_ELEMENTS = 1 << 22
"""Attention weights held at once: 4 Mi fp32 values, 16 MiB, twice that while they are made."""

CACHED_ELEMENTS = 1 << 21
"""The same on a CPU, 8 MiB: what one pass over a block leaves in the cache for the next."""


def attention_received(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    *,
    from_first_only: bool = False,
    block_elements: int | None = None,
) -> torch.Tensor:
    """Column sums of `softmax(Q K^T * scale)`, added up over heads (Eq. 2-3 before the 1/H).

    The mean over heads is left to the caller because with tensor parallelism the heads at hand
    are only some of them.

    Args:
        query, key: (B, T, H, D), one image per batch row, as the layer really uses them (after
            rotary embedding where there is one); any float dtype, computed in fp32.
        scale: what the layer multiplies Q K^T by, 1/sqrt(d_k).
        from_first_only: count only the attention paid by token 0 (the CLS token, Table 5a).
        block_elements: upper bound of attention weights held at once, where one query row fits;
            by default what suits the device.

    Returns:
        (B, T) fp32, the sum over heads and attending tokens of the attention each token receives.
    """
    if from_first_only:
        query = query[:, :1]
    on_cpu = key.device.type == "cpu"
    if block_elements is None:
        block_elements = CACHED_ELEMENTS if on_cpu else BLOCK_ELEMENTS
    batch, tokens, heads, _ = key.shape
    rows = query.shape[1]
    # Plain matrix products are the fast ones on a CPU; an accelerator wants few and large launches.
    some_heads = 1 if on_cpu else min(heads, max(1, block_elements // (rows * tokens)))
    some_rows = min(rows, max(1, block_elements // tokens))
    received = torch.zeros(batch, tokens, dtype=torch.float32, device=key.device)
    # Made once: fresh memory for every block would leave the caches each time.
    logits = received.new_empty(some_heads, some_rows, tokens)
    weights = torch.empty_like(logits)
    for total, of_image, by_image in zip(received, query, key, strict=True):
        for head in range(0, heads, some_heads):
            # Some heads at a time, so that no fp32 copy of all of them is ever made.
            part = slice(head, head + some_heads)
            q = of_image[:, part].transpose(0, 1).to(torch.float32, copy=True).mul_(scale)
            k = by_image[:, part].transpose(0, 1).float().contiguous().transpose(1, 2)
            for row in range(0, rows, some_rows):
                some = q[:, row : row + some_rows]
                here = slice(len(some)), slice(some.shape[1])
                if len(some) == 1:
                    torch.mm(some[0], k[0], out=logits[here][0])
                else:
                    torch.bmm(some, k, out=logits[here])
                torch.softmax(logits[here], dim=-1, out=weights[here])
                total.add_(weights[here].flatten(0, 1).sum(dim=0))
    return received


def default_object_layer(depth: int, *, merging: bool) -> int:
    """Where anchors come from unless somebody says otherwise.

    Args:
        depth: blocks of the encoder.
        merging: whether several patches become a token (Qwen). The middle of such an encoder is a
            default, not a finding: the paper (section 4.1) looks at encoders that do not merge,
            and takes layer 9 of CLIP-L's 24; others have the same relative depth.
    """
    return max(1, depth // 2 if merging else round(9 / 24 * depth))
