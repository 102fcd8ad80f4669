"""The worker's side: a model class that hands pruned batches to its family's adapter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from cachetools import LRUCache
from prometheus_client import Histogram
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

from hiprune_vllm.engine import patches
from hiprune_vllm.engine.compat import check_engine
from hiprune_vllm.engine.sharing import encode_shared
from hiprune_vllm.engine.wire import BUDGET_FIELD, BUDGET_FIELDS, Key, unpack_item
from hiprune_vllm.models.base import SHAPE_FIELD, FamilyAdapter
from hiprune_vllm.models.encode import check_tower, encode
from hiprune_vllm.models.images import Encoded, Image, Selection, Trace, TracedPart
from hiprune_vllm.pruning.clock import ENCODER, SELECTION, Stopwatch

REMEMBERED_IMAGES = 1024
"""Selections that a worker remembers, least recently used out first: 24 MiB at 2880 tokens each."""

SELECTION_SECONDS = Histogram(
    "hiprune_selection_seconds",
    "Scoring of two encoder layers and selection, for a batch of pictures in the worker.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
ENCODER_SECONDS = Histogram(
    "hiprune_encoder_seconds",
    "Vision encoder, selection and projector, for a batch of pictures in the worker.",
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)


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

    family: FamilyAdapter

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_engine(vllm_config)
        patches.where_a_model_is_made(vllm_config, self.family)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.family = type(self).family.of(vllm_config.model_config.hf_config)
        multimodal = vllm_config.model_config.multimodal_config
        # A server that takes no pictures has no tower, nor have the other stages of a pipeline.
        if multimodal.get_limit_per_prompt(self.family.modality) and get_pp_group().is_first_rank:
            check_tower(self.family, self)
        self._whole_on_each_rank = multimodal.mm_encoder_tp_mode == "data"
        self._kept_before: LRUCache[Key, Selection] = LRUCache(REMEMBERED_IMAGES)

    def forget(self) -> None:
        """Drops what was remembered: other weights would choose other tokens."""
        self._kept_before.clear()

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Embeddings of a batch of images, as `_embed` makes them; their time is noted."""
        with ENCODER.running(next(self.parameters()).device):
            embeddings = self._embed(**kwargs)
        _note(ENCODER, ENCODER_SECONDS)
        return self.as_sent(embeddings)

    def as_sent(self, items: Any) -> Any:
        """What goes to vLLM's cache of encoded items, of what the encoder has made of a batch."""
        return items

    def through_graphs(self, run: Callable[[dict[str, Any]], Any], inputs: dict[str, Any]) -> Any:
        """A batch by vLLM's captured encoder; None where some image of it is pruned.

        Args:
            run: vLLM's own, which knows nothing of budgets.
            inputs: the model's own multimodal inputs of the batch.
        """
        rows = _rows(inputs)
        if rows is not None and not all(unpack_item(row)[0].is_full for row in rows.tolist()):
            return None
        ours = (*BUDGET_FIELDS, SHAPE_FIELD)
        of_vllm = {name: value for name, value in inputs.items() if name not in ours}
        return self.as_sent(run(of_vllm))

    def _embed(self, **kwargs: object) -> Any:
        """vLLM's own forward where no image of the batch is pruned.

        An image that is encoded again (its first part is in the prefix cache, or it left the
        encoder cache) keeps the tokens that it kept before: with another batch around it, rounding
        could turn a near-tie, and the two halves of one picture would not fit together. What is
        remembered counts only where it fits the image and its budget (`Image.known_of`).
        """
        given = kwargs.get("image_embeds")
        if isinstance(given, list):
            # Embeddings of several lengths, of one request or more: vLLM's own models refuse such
            # a batch, which ends the engine.
            embed: Any = super().embed_multimodal  # type: ignore[misc]
            return [item for one in given for item in embed(image_embeds=one[None])]
        rows = _rows(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in BUDGET_FIELDS}
        # The rows were kept on the CPU: reading them waits for nothing.
        items = [unpack_item(row) for row in rows.tolist()] if rows is not None else []
        if all(budget.is_full for budget, _ in items):
            kwargs.pop(SHAPE_FIELD, None)
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        encoded = self._encode(
            [Image(budget, self._kept_before.get(key)) for budget, key in items],
            [key for _, key in items],
            **kwargs,
        )
        return [image.embeddings for image in encoded]

    def explain(self, layer: int, score: str, **kwargs: object) -> list[TracedPart]:
        """How the tokens of one image are chosen, by the code that chooses them.

        What is kept is what a request for the same image keeps, before and after: the choice is
        remembered.

        Args:
            layer, score: object layer and kind of score to report.
            kwargs: the model's multimodal inputs of a batch of this one image.

        Returns:
            One a part (tile) that keeps something.
        """
        rows: Any = kwargs.pop(BUDGET_FIELD)
        ((budget, key),) = [unpack_item(row) for row in rows.tolist()]
        trace = Trace(layer, score)
        self._encode([Image(budget, self._kept_before.get(key), trace)], [key], **kwargs)
        return trace.parts

    def _encode(
        self, images: Sequence[Image], keys: Sequence[Key], **kwargs: object
    ) -> list[Encoded]:
        batch = self.family.batch(self, **kwargs)
        ranks = get_tensor_model_parallel_world_size()
        whole_on_each = ranks == 1 or (
            self._whole_on_each_rank or self.family.tower(self).replicated
        )
        if ranks > 1 and whole_on_each and images[0].trace is None:
            encoded = encode_shared(self.family, self, batch, images)
        else:
            add = None if whole_on_each else sum_over_ranks
            encoded = encode(self.family, self, batch, images, add)
        for key, image in zip(keys, encoded, strict=True):
            if image.selection is not None:
                self._kept_before[key] = image.selection
        _note(SELECTION, SELECTION_SECONDS)
        return encoded


def _rows(inputs: Mapping[str, Any]) -> Any:
    """Budgets of a batch, whose items are all of one kind; None where they have none."""
    return next((inputs[name] for name in BUDGET_FIELDS if name in inputs), None)


def _note(clock: Stopwatch, seconds: Histogram) -> None:
    """Ends a batch: its time goes to the metric, from the first of several ranks."""
    laps = clock.lap()
    if get_tensor_model_parallel_rank() == 0:
        for lap in laps:
            seconds.observe(lap)
