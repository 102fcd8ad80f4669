"""The front end's side: a plan becomes N' placeholder tokens and a part of the item's identity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, NamedTuple, cast

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
from hiprune_vllm.engine.asked import VIDEO, AskedProcessing
from hiprune_vllm.engine.checks import (
    check_count,
    check_places,
)
from hiprune_vllm.engine.identity import (
    CachedProcessing,
    KnownImages,
    identify,
    names,
    of_kind,
    with_budget,
)
from hiprune_vllm.engine.scheduling import with_size
from hiprune_vllm.engine.sizes import SizedProcessing, of_processor, with_sizes
from hiprune_vllm.engine.wire import BUDGET_FIELD, VIDEO_BUDGET_FIELD, pack_item
from hiprune_vllm.facade import PictureReport
from hiprune_vllm.models.base import SHAPE_FIELD, FamilyAdapter
from hiprune_vllm.models.images import frames_of
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
    """One image or video of a request as the hooks see it.

    Attributes:
        budget: what to keep of it.
        identity: the final one (a digest).
        sizes: what it is scaled to, where that is not the checkpoint's own.
        known_as: by what its count of tokens is remembered.
    """

    budget: ImageBudget
    identity: str
    sizes: dict[str, int]
    known_as: str


class _Wished(NamedTuple):
    """One image or video of a request, and what is asked for it.

    Attributes:
        kind: vLLM's word for it.
        number: among those of its kind.
        plan: with the operator's default below it.
        sizes: what it is scaled to, where that is not the checkpoint's own.
    """

    kind: str
    number: int
    plan: PruningPlan
    sizes: dict[str, int]


class _Miscounted(Exception):
    """Videos of which the processor has made another number of tokens than was guessed."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = counts


@dataclass
class _ResolvedInputs(ProcessorInputs):
    """Inputs whose plans are resolved and whose items have their final identity."""

    hashes: dict[str, list[str]] = field(default_factory=dict)


def _without_plan(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in kwargs.items() if key != FIELD}


def _items_of(kwargs: Mapping[str, object]) -> Mapping[str, Sequence[_Item]]:
    """By kind the resolved items in processor options; empty where the request has none."""
    items = kwargs.get(FIELD, {})
    assert isinstance(items, dict)
    return items


class PrunedProcessor(AskedProcessing, SizedProcessing, CachedProcessing):
    """Mixin in front of a vLLM multimodal processor class.

    `apply` replaces the raw `hiprune` object (or list of objects, one an image) in the processor
    options by a list of `_Item`, one an image, and one of videos where some are pruned; all other
    hooks see those lists, aligned with the items they get.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known = KnownImages()

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        # Memory and cache sizes are measured with the largest images, whatever the default plan.
        inputs = super().get_dummy_inputs(*args, **kwargs)
        if self.pruning.encoder is None:
            return inputs
        return replace(inputs, hf_processor_mm_kwargs={FIELD: FULL})

    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        """vLLM's `apply`; the result also has `hiprune`, a report (`PictureReport`) an item."""
        asked = self._plans(inputs)
        media = self._prunable(inputs, asked)
        encoder = self.pruning.encoder
        plain = replace(inputs, hf_processor_mm_kwargs=_without_plan(inputs.hf_processor_mm_kwargs))
        if encoder is None or not media:
            return super().apply(plain, *args, **kwargs)
        for kind in media:
            plain = identify(plain, kind)
        hashes = {name: list(items) for name, items in self._get_mm_hashes(plain).items()}
        # The very objects that the server's own dummy pictures come with: no request has them.
        given = inputs.hf_processor_mm_kwargs.get(FIELD)
        measured = given is FULL or given is THIRD
        wished = [
            _Wished(kind, i, plan, {} if measured or kind == VIDEO else self.pruning.sizes(plan))
            for kind, plans in media.items()
            for i, plan in enumerate(plans)
        ]
        of_pictures = [one.sizes for one in wished if one.kind != VIDEO]
        plain = self.fitted(plain, of_pictures)
        known_as = [f"{hashes[one.kind][one.number]} {[*one.sizes.values()]}" for one in wished]
        counts = [self._count(plain, one, name) for one, name in zip(wished, known_as, strict=True)]
        try:
            limits = NO_LIMITS if measured else self.pruning.limits
            if not measured:
                limits.check_images([count.full for count in counts])
                self.check_sizes(counts[: len(of_pictures)], of_pictures)
            budgets = resolve_all([one.plan for one in wished], counts, encoder, limits)
        except PlanError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from error
        of_kinds: dict[str, list[_Item]] = {kind: [] for kind in media}
        for one, budget, name in zip(wished, budgets, known_as, strict=True):
            of_kinds[one.kind].append(_Item(budget, "", one.sizes, name))
        try:
            result: Any = super().apply(self._resolved(plain, hashes, of_kinds), *args, **kwargs)
        except _Miscounted as error:
            for name, count in error.counts.items():
                self._known.correct(name, count)
            return self.apply(inputs, *args, **kwargs)
        self._check(result, budgets)
        result[FIELD] = [
            _report(one, complete(one.plan, encoder), budget, plain)
            for one, budget in zip(wished, budgets, strict=True)
        ]
        return result

    def _count(self, plain: ProcessorInputs, wished: _Wished, known_as: str) -> TokenCount:
        """Tokens of an image, scaled as its sizes say, or of a video; at hand or seen before."""
        items, index, family = plain.mm_data_items[wished.kind], wished.number, self.pruning.family
        if wished.kind == VIDEO:
            guessed = partial(family.video_tokens, self.info, items, index)
            return self._known.likely(items, index, known_as, guessed)
        own = of_processor(wished.sizes, family.frames)
        options = with_sizes(plain.hf_processor_mm_kwargs, own)
        info = self.unsized.info if own else self.info
        counted = partial(family.tokens, info, items, index, options)
        return self._known.count(items, index, known_as, counted)

    async def explain(self, engine_client: Any, inputs: Any) -> list[dict[str, Any]]:
        """Which tokens of a prompt's only image stay and why; see `engine.explain`."""
        return await explain.explain(engine_client, inputs)

    def views(self, inputs: Any) -> list[tuple[int, int, int, Any]]:
        """A prompt's only image as the encoder sees it; see `engine.explain`."""
        return explain.views(self.info, inputs)

    def _check(self, result: Any, budgets: Sequence[ImageBudget]) -> None:
        """Refuses a prompt that a family cannot serve with these budgets; most can serve all."""

    def _resolved(
        self,
        plain: ProcessorInputs,
        hashes: dict[str, list[str]],
        of_kinds: Mapping[str, Sequence[_Item]],
    ) -> _ResolvedInputs:
        """Puts budgets and sizes into the options and into every item's identity."""
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        resolved: dict[str, list[_Item]] = {}
        for kind, items in of_kinds.items():
            seeds = [0] * len(items)
            if any(item.budget.method == "random" for item in items):
                seeds = self._known.seeds(plain, kind, hashes[kind], algorithm)
            resolved[kind] = []
            for item, seed, base, name in zip(
                items, seeds, hashes[kind], names(plain, kind), strict=True
            ):
                budget = with_seed(item.budget, seed)
                identity = with_budget(base, name, budget, item.sizes, algorithm)
                resolved[kind].append(item._replace(budget=budget, identity=identity))
        return _ResolvedInputs(
            prompt=plain.prompt,
            mm_data_items=plain.mm_data_items,
            mm_uuid_items=plain.mm_uuid_items,
            hf_processor_mm_kwargs={**plain.hf_processor_mm_kwargs, FIELD: resolved},
            media_io_kwargs=plain.media_io_kwargs,
            cache=plain.cache,
            hashes=hashes
            | {
                kind: [with_size(item.identity, item.budget.full) for item in items]
                for kind, items in resolved.items()
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
        of_kinds = _items_of(kwargs)
        if not of_kinds:
            return kwargs
        missing = {
            kind: [item for item, known in zip(items, mm_is_cached[kind], strict=True) if not known]
            for kind, items in of_kinds.items()
        }
        return {**kwargs, FIELD: missing}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        of_kinds, plain = _items_of(hf_kwargs), _without_plan(hf_kwargs)
        items, videos = of_kinds.get(self.modality, ()), of_kinds.get(VIDEO, ())
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
        if videos:
            self._sliced(videos, processed)
        return processed

    def _sliced(self, videos: Sequence[_Item], processed: Any) -> None:
        """Adds the budgets of videos. Raises `_Miscounted` where they are of other counts."""
        made = self.pruning.family.video_slices(self.info.get_hf_config(), processed)
        pairs = list(zip(videos, made, strict=True))
        counts = {
            item.known_as: slices * each
            for item, (slices, each) in pairs
            if slices * each != item.budget.full
        }
        if counts:
            raise _Miscounted(counts)
        rows = [pack_item(item.budget, item.identity, slices) for item, (slices, _) in pairs]
        processed[VIDEO_BUDGET_FIELD] = torch.tensor(rows, dtype=torch.int64)

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            **super()._get_mm_fields_config(hf_inputs, _without_plan(hf_processor_mm_kwargs)),
            BUDGET_FIELD: MultiModalFieldConfig.batched(self.modality, keep_on_cpu=True),
            SHAPE_FIELD: MultiModalFieldConfig.batched(self.modality, keep_on_cpu=True),
            VIDEO_BUDGET_FIELD: MultiModalFieldConfig.batched(VIDEO, keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(
            mm_items=mm_items,
            hf_processor_mm_kwargs=_without_plan(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )
        of_kinds = _items_of(hf_processor_mm_kwargs)
        budgets = {kind: [item.budget for item in items] for kind, items in of_kinds.items()}
        return [
            _pruned_update(update, budgets[update.modality], self.pruning.family)
            if budgets.get(update.modality)
            else update
            for update in updates
        ]


def _pruned_update(
    update: PromptUpdate, budgets: Sequence[ImageBudget], family: FamilyAdapter
) -> PromptUpdate:
    """vLLM's own replacement of one item's placeholder, cut to the tokens that stay."""
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


def _report(
    wished: _Wished, plan: PruningPlan, budget: ImageBudget, plain: ProcessorInputs
) -> PictureReport:
    """What is told of an item; frames of a video that is not known by its name alone."""
    is_video = wished.kind == VIDEO
    video = plain.mm_data_items[VIDEO].get(wished.number) if is_video else None
    return {
        "kind": VIDEO if is_video else "image",
        "frames": None if video is None else len(frames_of(video)),
        "tokens_full": budget.full,
        "tokens_kept": budget.keep,
        "method": cast(str, plan.method),
        "plan": plan,
    }
