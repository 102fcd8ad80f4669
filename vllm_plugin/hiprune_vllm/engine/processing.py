"""The front end's side: a plan becomes N' placeholder tokens and a part of the item's identity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import (
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

from hiprune_vllm.engine import explain
from hiprune_vllm.engine.checks import (
    check_count,
    check_embeddings,
    check_places,
    refuse_without_tensors,
)
from hiprune_vllm.engine.identity import (
    CachedProcessing,
    KnownImages,
    identify,
    names,
    of_kind,
    with_budget,
)
from hiprune_vllm.engine.info import PruningInfo
from hiprune_vllm.engine.scheduling import with_size
from hiprune_vllm.engine.sizes import SizedProcessing, of_processor, with_sizes
from hiprune_vllm.engine.wire import BUDGET_FIELD, pack_item
from hiprune_vllm.models.base import SHAPE_FIELD, FamilyAdapter
from hiprune_vllm.plan import (
    FIELD,
    FULL,
    NO_LIMITS,
    PlanError,
    PruningPlan,
    TokenCount,
    complete,
    resolve_all,
    with_seed,
)
from hiprune_vllm.pruning.budget import ImageBudget

THIRD: Final = PruningPlan(ratio=1 / 3)
"""What a family's proof at start-up prunes its dummy picture to."""


class _Item(NamedTuple):
    """One image of a request as the hooks see it.

    Attributes:
        budget: what to keep of it.
        identity: the final one (a digest).
        sizes: what it is scaled to, where that is not the checkpoint's own.
    """

    budget: ImageBudget
    identity: str
    sizes: dict[str, int]


@dataclass
class _ResolvedInputs(ProcessorInputs):
    """Inputs whose plans are resolved and whose items have their final identity."""

    hashes: dict[str, list[str]] = field(default_factory=dict)


def _without_plan(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in kwargs.items() if key != FIELD}


def _items_of(kwargs: Mapping[str, object]) -> tuple[_Item, ...]:
    """Resolved images in processor options; empty where the request has none."""
    items = kwargs.get(FIELD, ())
    assert isinstance(items, tuple)
    return items


class PrunedProcessor(SizedProcessing, CachedProcessing):
    """Mixin in front of a vLLM multimodal processor class.

    `apply` replaces the raw `hiprune` object (or list of objects, one an image) in the processor
    options by a tuple of `_Item`, one an image; all other hooks see that tuple, aligned with the
    images they get.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known = KnownImages()

    @property
    def pruning(self) -> PruningInfo:
        pruning: PruningInfo = self.info.pruning
        return pruning

    @property
    def modality(self) -> str:
        return self.pruning.family.modality

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        # Memory and cache sizes are measured with the largest images, whatever the default plan.
        inputs = super().get_dummy_inputs(*args, **kwargs)
        if self.pruning.encoder is None:
            return inputs
        return replace(inputs, hf_processor_mm_kwargs={FIELD: FULL})

    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        """vLLM's `apply`; the result also has `hiprune`: a dict an image.

        It has `tokens_full`, `tokens_kept`, `method`, and the whole `plan` (a `PruningPlan`).
        """
        images = inputs.mm_data_items.get(self.modality, [])
        for items in inputs.mm_data_items.values():
            if isinstance(items, EmbeddingItems | DictEmbeddingItems):
                if items.modality == self.modality and not self.pruning.family.takes_embeddings:
                    raise VLLMValidationError(
                        "image_embeds cannot be served by this model; send the image itself",
                        parameter="image_embeds",
                    )
                config = self.info.ctx.get_hf_config()
                check_embeddings(items, config, self.pruning.family.width(config))
        asked = self._plans(inputs.hf_processor_mm_kwargs, len(images))
        plans = [plan.over(self.pruning.default) for plan in asked]
        if isinstance(images, EmbeddingItems | DictEmbeddingItems):
            if not all(plan.keeps_all for plan in asked):
                raise VLLMValidationError(
                    f"{FIELD} cannot prune image embeddings, which have left the vision encoder "
                    "already; send the image itself",
                    parameter=FIELD,
                )
            if self.pruning.encoder is not None:
                refuse_without_tensors(images, self.info.data_parser)
            images = []
        encoder = self.pruning.encoder
        plain = replace(inputs, hf_processor_mm_kwargs=_without_plan(inputs.hf_processor_mm_kwargs))
        if encoder is None or not images:
            return super().apply(plain, *args, **kwargs)
        plain = identify(plain, self.modality)
        hashes = {name: list(items) for name, items in self._get_mm_hashes(plain).items()}
        # The very objects that the server's own dummy pictures come with: no request has them.
        given = inputs.hf_processor_mm_kwargs.get(FIELD)
        measured = given is FULL or given is THIRD
        sizes = [{} if measured else self.pruning.sizes(plan) for plan in plans]
        plain = self.fitted(plain, sizes)
        counts = [
            self._count(plain, i, identity, of_image)
            for i, (identity, of_image) in enumerate(zip(hashes[self.modality], sizes, strict=True))
        ]
        try:
            limits = NO_LIMITS if measured else self.pruning.limits
            if not measured:
                limits.check_images([count.full for count in counts])
                self.check_sizes(counts, sizes)
            budgets = resolve_all(plans, counts, encoder, limits)
        except PlanError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from error
        resolved = self._resolved(plain, hashes, budgets, sizes)
        result: Any = super().apply(resolved, *args, **kwargs)
        self._check(result, budgets)
        result[FIELD] = [
            {
                "tokens_full": budget.full,
                "tokens_kept": budget.keep,
                "method": plan.method,
                "plan": plan,
            }
            for plan, budget in zip(
                [complete(plan, encoder) for plan in plans], budgets, strict=True
            )
        ]
        return result

    def _count(
        self, plain: ProcessorInputs, index: int, identity: str, sizes: Mapping[str, int]
    ) -> TokenCount:
        """Tokens of an image that is scaled as `sizes` say, or was before under this identity."""
        images = plain.mm_data_items[self.modality]
        own = of_processor(sizes, self.pruning.family.frames)
        options = with_sizes(plain.hf_processor_mm_kwargs, own)
        info = self.unsized.info if own else self.info
        counted = partial(self.pruning.family.tokens, info, images, index, options)
        return self._known.count(images, index, f"{identity} {[*sizes.values()]}", counted)

    async def explain(self, engine_client: Any, inputs: Any) -> list[dict[str, Any]]:
        """Which tokens of a prompt's only image stay and why; see `engine.explain`."""
        return await explain.explain(engine_client, inputs)

    def views(self, inputs: Any) -> list[tuple[int, int, int, Any]]:
        """A prompt's only image as the encoder sees it; see `engine.explain`."""
        return explain.views(self.info, inputs)

    def _plans(self, kwargs: Mapping[str, object], images: int) -> list[PruningPlan]:
        """What a request asks for, one plan an image."""
        wish = kwargs.get(FIELD, {})
        if FIELD not in kwargs:
            return [PruningPlan()] * images
        try:
            if not isinstance(wish, list):
                return [self._plan(wish)] * images
            if len(wish) != images:
                raise PlanError(FIELD, f"must have one object an image ({images}), got {len(wish)}")
            return [self._plan(plan, name=f"{FIELD}[{i}]") for i, plan in enumerate(wish)]
        except PlanError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from error

    def _plan(self, wish: object, *, name: str = FIELD) -> PruningPlan:
        """A plan, checked, as the server's own routes hand it over, or an object to read."""
        return wish if isinstance(wish, PruningPlan) else self.pruning.parse(wish, name=name)

    def _check(self, result: Any, budgets: Sequence[ImageBudget]) -> None:
        """Refuses a prompt that a family cannot serve with these budgets; most can serve all."""

    def _resolved(
        self,
        plain: ProcessorInputs,
        hashes: dict[str, list[str]],
        budgets: Sequence[ImageBudget],
        sizes: Sequence[dict[str, int]],
    ) -> _ResolvedInputs:
        """Puts budgets and sizes into the options and into every image's identity."""
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        identities = hashes[self.modality]
        seeds = [0] * len(identities)
        if any(budget.method == "random" for budget in budgets):
            seeds = self._known.seeds(plain, self.modality, identities, algorithm)
        seeded = [with_seed(*pair) for pair in zip(budgets, seeds, strict=True)]
        items = [
            _Item(budget, with_budget(identity, name, budget, of_image, algorithm), of_image)
            for identity, name, budget, of_image in zip(
                identities, names(plain, self.modality), seeded, sizes, strict=True
            )
        ]
        return _ResolvedInputs(
            prompt=plain.prompt,
            mm_data_items=plain.mm_data_items,
            mm_uuid_items=plain.mm_uuid_items,
            hf_processor_mm_kwargs={**plain.hf_processor_mm_kwargs, FIELD: tuple(items)},
            media_io_kwargs=plain.media_io_kwargs,
            cache=plain.cache,
            hashes={
                **hashes,
                self.modality: [with_size(item.identity, item.budget.full) for item in items],
            },
        )

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        if isinstance(inputs, _ResolvedInputs):
            return inputs.hashes
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        hashes = dict(super()._get_mm_hashes(inputs))
        for modality, items in inputs.mm_data_items.items():
            if modality == self.modality and not isinstance(
                items, EmbeddingItems | DictEmbeddingItems
            ):
                continue
            kind = type(items).__name__
            hashes[modality] = [of_kind(one, kind, algorithm) for one in hashes[modality]]
        return hashes

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Any) -> Any:
        check_places(
            token_ids, mm_prompt_updates, lambda ids: self.info.get_tokenizer().decode(ids)
        )
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)

    def _validate_mm_placeholders(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._validate_mm_placeholders(*args, **kwargs)
        except RuntimeError as error:
            if (misread := self.pruning.family.misread) is None:
                raise
            raise VLLMValidationError(f"messages: {misread}", parameter="messages") from error

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, object]:
        kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        items = _items_of(kwargs)
        if not items:
            return kwargs
        cached = mm_is_cached[self.modality]
        missing = tuple(item for item, known in zip(items, cached, strict=True) if not known)
        return {**kwargs, FIELD: missing}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        items, plain = _items_of(hf_kwargs), _without_plan(hf_kwargs)
        sizes = [of_processor(item.sizes, self.pruning.family.frames) for item in items]
        if any(sizes):
            processed = self.scaled(mm_items, plain, sizes)
        else:
            processed = super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=plain)
        if items:
            processed[BUDGET_FIELD] = torch.tensor(
                [pack_item(item.budget, item.identity) for item in items], dtype=torch.int64
            )
            family, config = self.pruning.family, self.info.get_hf_config()
            shapes = family.shapes(config, processed)
            if shapes is not None:
                for item, shape in zip(items, shapes, strict=True):
                    check_count(item.budget.full, family.grids(config, shape))
                processed[SHAPE_FIELD] = torch.tensor(shapes, dtype=torch.int64)
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            **super()._get_mm_fields_config(hf_inputs, _without_plan(hf_processor_mm_kwargs)),
            BUDGET_FIELD: MultiModalFieldConfig.batched(self.modality, keep_on_cpu=True),
            SHAPE_FIELD: MultiModalFieldConfig.batched(self.modality, keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(
            mm_items=mm_items,
            hf_processor_mm_kwargs=_without_plan(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )
        budgets = [item.budget for item in _items_of(hf_processor_mm_kwargs)]
        return [
            _pruned_update(update, budgets, self.pruning.family)
            if budgets and update.modality == self.modality
            else update
            for update in updates
        ]


def _pruned_update(
    update: PromptUpdate, budgets: Sequence[ImageBudget], family: FamilyAdapter
) -> PromptUpdate:
    """vLLM's own replacement of one image's placeholder, cut to the tokens that stay."""
    if not isinstance(update, PromptReplacement):
        raise RuntimeError(f"version drift: expected PromptReplacement, got {type(update)}")

    def replacement(index: int) -> PromptUpdateDetails:
        stock, budget = update.resolve(index).content, budgets[index]
        tokens = list(stock.full)
        # It is a function of the tokens, so it holds for those that stay, too.
        embeds = [True] * len(tokens) if stock.is_embed is None else stock.is_embed(tokens).tolist()
        if sum(embeds) != budget.full:
            raise RuntimeError(
                f"version drift: expected {budget.full} placeholder tokens, got {sum(embeds)}"
            )
        if budget.is_full:
            return stock
        return PromptUpdateDetails(family.placeholder(tokens, embeds, budget.keep), stock.is_embed)

    return replace(update, replacement=replacement)
