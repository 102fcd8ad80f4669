"""What a request asks for its pictures and videos, kind by kind."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from hiprune_vllm.engine.checks import check_embeddings, refuse_without_tensors
from hiprune_vllm.engine.info import PruningInfo
from hiprune_vllm.plan import FIELD, PlanError, Plans, PruningPlan

VIDEO: Final = "video"
"""What vLLM calls a video."""


class AskedProcessing(BaseMultiModalProcessor):
    """Mixin: a request's plans, one for each item that may be pruned."""

    @property
    def pruning(self) -> PruningInfo:
        pruning: PruningInfo = self.info.pruning
        return pruning

    @property
    def modality(self) -> str:
        return self.pruning.family.modality

    def _plans(self, inputs: ProcessorInputs) -> dict[str, Sequence[PruningPlan]]:
        """What a request asks for, by kind of what may be pruned: one plan an item.

        An object is for all pictures and videos, a list has one for each picture.
        """
        kwargs, media = inputs.hf_processor_mm_kwargs, inputs.mm_data_items
        wish: Any = kwargs.get(FIELD)
        pictures, videos = len(media.get(self.modality, ())), len(media.get(VIDEO, ()))
        try:
            if isinstance(wish, Plans):
                asked = dict(zip((self.modality, VIDEO), wish, strict=True))
            elif isinstance(wish, list):
                if len(wish) != pictures:
                    raise PlanError(
                        FIELD, f"must have one object an image ({pictures}), got {len(wish)}"
                    )
                own = [self._plan(plan, name=f"{FIELD}[{i}]") for i, plan in enumerate(wish)]
                asked = {self.modality: own, VIDEO: [PruningPlan()] * videos}
            else:
                plan = self._plan(wish) if FIELD in kwargs else PruningPlan()
                asked = {self.modality: [plan] * pictures, VIDEO: [plan] * videos}
        except PlanError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from error
        return asked if self.pruning.family.videos else {self.modality: asked[self.modality]}

    def _plan(self, wish: object, *, name: str = FIELD) -> PruningPlan:
        """A plan, checked, as the server's own routes hand it over, or an object to read."""
        return wish if isinstance(wish, PruningPlan) else self.pruning.parse(wish, name=name)

    def _prunable(
        self, inputs: ProcessorInputs, asked: Mapping[str, Sequence[PruningPlan]]
    ) -> dict[str, list[PruningPlan]]:
        """By kind the plans of what goes through the encoder; of videos only if one is pruned.

        Raises:
            VLLMValidationError: embeddings that cannot be served, or are to be pruned.
        """
        found = {}
        for kind, items in inputs.mm_data_items.items():
            embedded = isinstance(items, EmbeddingItems | DictEmbeddingItems)
            if embedded:
                if kind == self.modality and not self.pruning.family.takes_embeddings:
                    raise VLLMValidationError(
                        "image_embeds cannot be served by this model; send the image itself",
                        parameter="image_embeds",
                    )
                config = self.info.ctx.get_hf_config()
                check_embeddings(items, config, self.pruning.family.width(config))
            if kind not in asked:
                continue
            if embedded:
                if not all(plan.keeps_all for plan in asked[kind]):
                    raise VLLMValidationError(
                        f"{FIELD} cannot prune {kind} embeddings, which have left the vision "
                        f"encoder already; send the {kind} itself",
                        parameter=FIELD,
                    )
                if self.pruning.encoder is not None and kind == self.modality:
                    refuse_without_tensors(items, self.info.data_parser)
                continue
            default = self.pruning.of_videos if kind == VIDEO else self.pruning.default
            plans = [plan.over(default) for plan in asked[kind]]
            if plans and (kind != VIDEO or not all(plan.drops_nothing for plan in plans)):
                found[kind] = plans
        return {kind: found[kind] for kind in (self.modality, VIDEO) if kind in found}
