"""The worker's side: a model class that hands pruned batches to its family's adapter."""

from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

from hiprune_vllm.engine.compat import check_engine
from hiprune_vllm.models.base import FamilyAdapter
from hiprune_vllm.pruning.budget import ImageBudget

BUDGET_FIELD = "hiprune_budget"
"""Name of the per-image tensor that carries `ImageBudget.to_ints` from processor to worker."""


def sum_over_ranks(partial: torch.Tensor) -> torch.Tensor:
    """Totals of per-rank scores, (B, N) -> (B, N).

    Gathered and added in rank order rather than all-reduced: every rank then adds the same
    numbers in the same order and cannot disagree on a near-tie, whatever the reduction
    algorithm.
    """
    ranks = get_tensor_model_parallel_world_size()
    gathered = tensor_model_parallel_all_gather(partial.contiguous(), dim=0)
    return gathered.view(ranks, *partial.shape).sum(dim=0)


class PrunedModel(torch.nn.Module):
    """Mixin in front of a vLLM multimodal model class."""

    family: ClassVar[FamilyAdapter]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # What an unpruned schedule would hand to the tower at once: the scheduler charges an
        # image by its pruned length and may send many more.
        self._max_encoder_tokens = vllm_config.scheduler_config.max_num_encoder_input_tokens

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Embeddings of a batch of images; vLLM's own forward where none of them is pruned."""
        rows: Any = kwargs.pop(BUDGET_FIELD, None)
        # The rows were kept on the CPU: reading them waits for nothing.
        budgets = [ImageBudget.from_ints(r) for r in rows.tolist()] if rows is not None else []
        if all(budget.is_full for budget in budgets):
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        parallel = get_tensor_model_parallel_world_size() > 1
        return self.family.embed(
            self,
            budgets,
            sum_over_ranks if parallel else None,
            self._max_encoder_tokens,
            **kwargs,
        )
