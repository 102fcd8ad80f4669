"""LLaVA-1.5: one square tile a picture, features from a single layer of the tower."""

from collections.abc import Sequence
from typing import Any

import torch

from hiprune_vllm.models.tiles import encode_tiles, tile_encoder
from hiprune_vllm.plan import Encoder
from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.record import SumOverRanks


class LlavaAdapter:
    """`LlavaForConditionalGeneration`."""

    def encoder(self, hf_config: Any) -> Encoder:
        return tile_encoder("llava", hf_config)

    def tokens_full(self, info: Any, images: Any, index: int) -> int:
        count: int = info.get_max_image_tokens()  # every picture is scaled to one tile
        return count

    def embed(
        self,
        model: Any,
        budgets: Sequence[ImageBudget],
        sum_over_ranks: SumOverRanks | None,
        max_tokens: int,
        **kwargs: object,
    ) -> list[torch.Tensor]:
        pixels = model._parse_and_validate_image_input(**kwargs)["pixel_values"]
        encoder = self.encoder(model.config)
        kept, _ = encode_tiles(model, encoder, pixels, budgets, sum_over_ranks, max_tokens)
        projected = model.multi_modal_projector(torch.cat(kept))
        return list(projected.split([budget.keep for budget in budgets]))
