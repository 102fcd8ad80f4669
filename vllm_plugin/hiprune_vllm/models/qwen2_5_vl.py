"""Qwen2.5-VL: as Qwen2-VL, and most blocks attend in windows."""

from collections.abc import Sequence
from typing import Any

import torch

from hiprune_vllm.models.base import Batch, Tower
from hiprune_vllm.models.images import Part
from hiprune_vllm.models.qwen2_vl import OF_MERGING, Qwen2VLAdapter
from hiprune_vllm.plan import About


class Qwen25VLAdapter(Qwen2VLAdapter):
    """`Qwen2_5_VLForConditionalGeneration`; windows end with their slice of a video."""

    name = "qwen2_5_vl"
    about = About(
        token="2 x 2 patches, 28 x 28 pixels of the scaled picture",
        layer=OF_MERGING,
        published="HiPrune's paper (3B, five benchmarks): 98.6, 97.1 and 92.8 % of the accuracy at "
        "33, 22 and 11 %; text suffers first (7B, TextVQA: 83.1 falls to 78.5, 74.1 and 62.6). "
        "IDPruner's tables count 87.8 and 72.2 % at 25 and 10 % (7B)",
    )

    def tower(self, model: Any) -> Tower:
        visual = model.visual
        last_is_full = len(visual.blocks) - 1 in visual.fullatt_block_indexes
        return super().tower(model)._replace(within_images=last_is_full)

    def laid_out(self, model: Any, batch: Batch) -> Batch:
        """Tokens in the order of the windows."""
        batch = super().laid_out(model, batch)
        return batch._replace(places=batch.metadata["reverse_indices"])

    def forward(self, model: Any, batch: Batch, parts: Sequence[Sequence[Part]]) -> torch.Tensor:
        kept = sum(part.keep for of_image in parts for part in of_image)
        # What the merger gets is in the original order already, so the tower must not undo
        # anything.
        order = torch.arange(kept, device=batch.metadata["reverse_indices"].device)
        metadata = {**batch.metadata, "reverse_indices": order}
        return super().forward(model, batch._replace(metadata=metadata), parts)
