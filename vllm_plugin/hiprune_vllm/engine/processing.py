"""The front end's side: a plan becomes N' placeholder tokens and a part of the item's identity."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    InputProcessingContext,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

from hiprune_vllm.engine.model import BUDGET_FIELD
from hiprune_vllm.models.base import FamilyAdapter, UnsupportedCheckpoint
from hiprune_vllm.plan import FIELD, FULL, Encoder, PlanError, PruningPlan, parse_plan, with_seed
from hiprune_vllm.pruning.budget import ImageBudget


@dataclass(frozen=True)
class PruningInfo:
    """What the front end knows about pruning on this engine.

    Attributes:
        family: the model family's adapter.
        encoder: what the checkpoint's encoder allows; None where it cannot be pruned.
        unsupported: why it cannot, empty otherwise.
        default: engine-wide plan (`--mm-processor-kwargs '{"hiprune": {...}}'`).
    """

    family: FamilyAdapter
    encoder: Encoder | None
    unsupported: str
    default: PruningPlan

    def parse(self, value: object, *, name: str = FIELD) -> PruningPlan:
        """Reads a `hiprune` object for this model. Raises `PlanError`."""
        if self.encoder is None:
            raise PlanError(name, f"cannot be served: {self.unsupported}")
        return parse_plan(value, self.encoder, field=name)


def split_context(
    ctx: InputProcessingContext, family: FamilyAdapter
) -> tuple[InputProcessingContext, PruningInfo]:
    """Takes the engine-wide plan out of what the Hugging Face processor will see.

    vLLM merges the engine's `mm_processor_kwargs` into every processor call at several places, so
    the key is removed once from a copy of the configuration that this processor alone reads.

    Raises:
        PlanError: the engine-wide plan is invalid (at start-up).
    """
    model_config = copy.copy(ctx.model_config)
    multimodal = copy.copy(model_config.get_multimodal_config())
    kwargs = dict(multimodal.mm_processor_kwargs or {})
    wish = kwargs.pop(FIELD, None)
    multimodal.mm_processor_kwargs = kwargs or None
    model_config.multimodal_config = multimodal
    try:
        encoder, unsupported = family.encoder(ctx.model_config.hf_config), ""
    except UnsupportedCheckpoint as error:
        encoder, unsupported = None, str(error)
    info = PruningInfo(family, encoder, unsupported, PruningPlan())
    if wish is not None:
        info = replace(info, default=info.parse(wish, name=f"mm_processor_kwargs.{FIELD}"))
    return InputProcessingContext(model_config, ctx.tokenizer), info


@dataclass
class _ResolvedInputs(ProcessorInputs):
    """Inputs whose plans are resolved and whose items have their final identity."""

    hashes: dict[str, list[str]] = field(default_factory=dict)


def _without_plan(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in kwargs.items() if key != FIELD}


def _budgets_of(kwargs: Mapping[str, object]) -> tuple[ImageBudget, ...]:
    """Resolved budgets in processor options, one an image; empty before `apply` put them there."""
    budgets = kwargs.get(FIELD, ())
    assert isinstance(budgets, tuple)
    return budgets


class PrunedProcessor(BaseMultiModalProcessor):
    """Mixin in front of a vLLM multimodal processor class.

    `apply` replaces the raw `hiprune` object in the processor options by a tuple of
    `ImageBudget`, one an image; all other hooks see that tuple, aligned with the images they get.
    """

    @property
    def pruning(self) -> PruningInfo:
        pruning: PruningInfo = self.info.pruning
        return pruning

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        # Memory and cache sizes are measured with the largest images, whatever the default plan.
        inputs = super().get_dummy_inputs(*args, **kwargs)
        if self.pruning.encoder is None:
            return inputs
        return replace(inputs, hf_processor_mm_kwargs={FIELD: FULL.to_dict()})

    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        """vLLM's `apply`; the result also has `hiprune`: a dict an image, full and kept tokens."""
        plan = self._plan(inputs.hf_processor_mm_kwargs)
        images = inputs.mm_data_items.get("image", [])
        if isinstance(images, ImageEmbeddingItems):
            if plan.has_budget and plan != FULL:
                raise VLLMValidationError(
                    f"{FIELD} cannot prune image embeddings, which have left the vision encoder "
                    "already; send the image itself",
                    parameter=FIELD,
                )
            images = []
        encoder = self.pruning.encoder
        if encoder is None or not images:
            plain = replace(
                inputs, hf_processor_mm_kwargs=_without_plan(inputs.hf_processor_mm_kwargs)
            )
            return super().apply(plain, *args, **kwargs)
        family = self.pruning.family
        full = [family.tokens_full(self.info, images, i) for i in range(len(images))]
        budgets = [plan.resolve(count, encoder) for count in full]
        resolved = self._resolved(inputs, budgets)
        result: Any = super().apply(resolved, *args, **kwargs)
        result[FIELD] = [
            {
                "tokens_full": count,
                "tokens_kept": budget.keep,
                "method": plan.method or "hiprune",
            }
            for count, budget in zip(full, budgets, strict=True)
        ]
        return result

    def _plan(self, kwargs: Mapping[str, object]) -> PruningPlan:
        if FIELD not in kwargs:
            return self.pruning.default
        try:
            return self.pruning.parse(kwargs[FIELD]).over(self.pruning.default)
        except PlanError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from error

    def _resolved(self, inputs: ProcessorInputs, budgets: Sequence[ImageBudget]) -> _ResolvedInputs:
        """Puts the budgets into the options and into every image's identity.

        The identity is a hash of vLLM's own (content or the client's `uuid`) and the budget, for
        unpruned images too: a client that names its image by somebody else's identity must not
        meet an entry of another length.
        """
        plain = replace(inputs, hf_processor_mm_kwargs=_without_plan(inputs.hf_processor_mm_kwargs))
        hashes = {name: list(items) for name, items in super()._get_mm_hashes(plain).items()}
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        seeded = []
        for index, (identity, budget) in enumerate(zip(hashes["image"], budgets, strict=True)):
            seed = int(MultiModalHasher.hash_kwargs(algorithm, seed=identity)[:15], 16)
            seeded.append(with_seed(budget, seed))
            hashes["image"][index] = MultiModalHasher.hash_kwargs(
                algorithm, identity=identity, hiprune=list(seeded[-1].to_ints())
            )
        return _ResolvedInputs(
            prompt=inputs.prompt,
            mm_data_items=inputs.mm_data_items,
            mm_uuid_items=inputs.mm_uuid_items,
            hf_processor_mm_kwargs={**plain.hf_processor_mm_kwargs, FIELD: tuple(seeded)},
            media_io_kwargs=inputs.media_io_kwargs,
            cache=inputs.cache,
            hashes=hashes,
        )

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        if isinstance(inputs, _ResolvedInputs):
            return inputs.hashes
        return super()._get_mm_hashes(inputs)

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, object]:
        kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        budgets = _budgets_of(kwargs)
        if not budgets:
            return kwargs
        cached = mm_is_cached["image"]
        missing = tuple(b for b, known in zip(budgets, cached, strict=True) if not known)
        return {**kwargs, FIELD: missing}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        processed = super()._apply_hf_processor_main(
            mm_items=mm_items, hf_kwargs=_without_plan(hf_kwargs)
        )
        if budgets := _budgets_of(hf_kwargs):
            processed[BUDGET_FIELD] = torch.tensor(
                [budget.to_ints() for budget in budgets], dtype=torch.int64
            )
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            **super()._get_mm_fields_config(hf_inputs, _without_plan(hf_processor_mm_kwargs)),
            BUDGET_FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(
            mm_items=mm_items,
            hf_processor_mm_kwargs=_without_plan(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )
        budgets = _budgets_of(hf_processor_mm_kwargs)
        return [
            _pruned_update(update, budgets) if budgets and update.modality == "image" else update
            for update in updates
        ]


def _pruned_update(update: PromptUpdate, budgets: Sequence[ImageBudget]) -> PromptUpdate:
    """vLLM's own replacement of one image's placeholder, cut to the tokens that stay."""
    if not isinstance(update, PromptReplacement):
        raise RuntimeError(f"version drift: expected PromptReplacement, got {type(update)}")

    def replacement(index: int) -> PromptUpdateDetails:
        stock = update.resolve(index).content
        if budgets[index].is_full:
            return stock
        if stock.is_embed is not None:
            raise RuntimeError("version drift: expected image tokens only, got is_embed")
        if len(stock.full) <= budgets[index].keep:
            raise RuntimeError(
                f"version drift: expected more than {budgets[index].keep} placeholder tokens, "
                f"got {len(stock.full)}"
            )
        return PromptUpdateDetails.from_seq(stock.full[: budgets[index].keep])

    return replace(update, replacement=replacement)
