"""What the front end knows about pruning: family, encoder, the operator's defaults and limits."""

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.multimodal.processing import InputProcessingContext

from hiprune_vllm.facade import Pruning
from hiprune_vllm.models.base import FamilyAdapter, UnsupportedCheckpoint
from hiprune_vllm.plan import (
    FIELD,
    LIMITS,
    NO_LIMITS,
    NO_PLAN,
    OF_VIDEOS,
    SIZES,
    About,
    Encoder,
    Limits,
    PlanError,
    PruningPlan,
)
from hiprune_vllm.reading import parse_plan


@dataclass(frozen=True)
class PruningInfo:
    """What the front end knows about pruning on this engine.

    Attributes:
        family: the model family's adapter.
        encoder: what the checkpoint's encoder allows; None where it cannot be pruned.
        unsupported: why it cannot, empty otherwise.
        default: engine-wide plan (`--mm-processor-kwargs '{"hiprune": {...}}'`).
        of_videos: the same for videos (`--mm-processor-kwargs '{"hiprune_videos": {...}}'`).
        limits: the operator's (`--mm-processor-kwargs '{"hiprune_limits": {...}}'`).
        pixels: least and most that a picture is scaled to if nobody says anything, where its size
            is free.
    """

    family: FamilyAdapter
    encoder: Encoder | None
    unsupported: str
    default: PruningPlan
    limits: Limits = NO_LIMITS
    of_videos: PruningPlan = NO_PLAN
    pixels: tuple[int, int] | None = None

    @property
    def about(self) -> About:
        """What somebody who chooses a budget should know of the family."""
        return self.family.about

    @property
    def videos(self) -> bool:
        """Whether videos can be pruned."""
        return self.family.videos

    def within(self, pixels: tuple[int, int] | None) -> "PruningInfo":
        """The same for a checkpoint whose pictures have that many pixels.

        Most is what the engine has measured its memory with, so that nobody gets beyond.

        Raises:
            RuntimeError: the operator limits pixels where sizes are fixed.
        """
        if pixels is None:
            if self.limits.max_pixels != NO_LIMITS.max_pixels:
                raise RuntimeError(
                    "limits.max_pixels must be unset for this model, whose pictures are scaled to "
                    f"fixed sizes, got {self.limits.max_pixels}"
                )
            return self
        most = min(self.limits.max_pixels, pixels[1])
        return replace(self, limits=replace(self.limits, max_pixels=most), pixels=pixels)

    def sizes(self, plan: PruningPlan) -> dict[str, int]:
        """What a picture is scaled to; nothing where that is the checkpoint's own."""
        if plan.max_tiles is not None:
            return {"max_tiles": plan.max_tiles}
        if self.pixels is None:
            return {}
        least, most = self.pixels
        most = min(plan.max_pixels or most, self.limits.max_pixels)
        least = min(plan.min_pixels or least, most)
        return {} if (least, most) == self.pixels else dict(zip(SIZES, (least, most), strict=True))

    def parse(
        self, value: object, *, name: str = FIELD, for_one_image: bool = False
    ) -> PruningPlan:
        """A request's `hiprune` object for this model. Raises `PlanError`."""
        if self.encoder is None:
            raise PlanError(name, f"cannot be served: {self.unsupported}")
        plan = parse_plan(value, self.encoder, field=name, for_one_image=for_one_image)
        self.limits.check(plan, name)
        return plan

    def of_operator(self, wish: object, name: str) -> PruningPlan:
        """An engine-wide plan. Raises `PlanError`."""
        plan = self.parse(wish, name=f"mm_processor_kwargs.{name}", for_one_image=True)
        return replace(plan, of_operator=True)

    def check_of_video(self, plan: PruningPlan, name: str = FIELD) -> None:
        """Refuses a plan that is for a video alone and cannot be. Raises `PlanError`."""
        if not self.family.videos:
            raise PlanError(name, "must be left out: videos of this model stay whole")
        for knob in (*SIZES, "max_tiles"):
            if getattr(plan, knob) is not None:
                raise PlanError(f"{name}.{knob}", "must be left out: videos keep their size")


if TYPE_CHECKING:

    def _answers(info: PruningInfo) -> Pruning:  # so the checker holds one to the other
        return info


def without_options(ctx: InputProcessingContext, names: Collection[str]) -> InputProcessingContext:
    """The context without some of the engine-wide options, for one processor alone.

    vLLM merges the engine's `mm_processor_kwargs` into every processor call at several places, so
    they are left out once, in a copy of the configuration.
    """
    model_config = copy.copy(ctx.model_config)
    multimodal = copy.copy(model_config.get_multimodal_config())
    given = multimodal.mm_processor_kwargs or {}
    kept = {name: value for name, value in given.items() if name not in names}
    multimodal.mm_processor_kwargs = kept or None
    model_config.multimodal_config = multimodal
    return InputProcessingContext(model_config, ctx.tokenizer)


def split_context(
    ctx: InputProcessingContext, family: FamilyAdapter
) -> tuple[InputProcessingContext, PruningInfo]:
    """Takes the engine-wide plan out of what the Hugging Face processor will see.

    Raises:
        RuntimeError: the engine-wide plan is invalid, or the encoder too shallow (at start-up).
    """
    given = ctx.model_config.get_multimodal_config().mm_processor_kwargs or {}
    family = family.of(ctx.model_config.hf_config)
    limits = given.get(LIMITS)
    try:
        encoder, unsupported = family.encoder(ctx.model_config.hf_config), ""
    except UnsupportedCheckpoint as error:
        encoder, unsupported = None, str(error)
    info = PruningInfo(family, encoder, unsupported, NO_PLAN)
    try:
        if (wish := given.get(FIELD)) is not None:
            info = replace(info, default=info.of_operator(wish, FIELD))
        if (wish := given.get(OF_VIDEOS)) is not None:
            plan = info.of_operator(wish, OF_VIDEOS)
            info.check_of_video(plan, f"mm_processor_kwargs.{OF_VIDEOS}")
            info = replace(info, of_videos=plan)
        if limits is not None:
            info = replace(info, limits=Limits(**limits))
    except (PlanError, TypeError) as error:
        # vLLM takes a ValueError here for "has no images" and starts without them.
        raise RuntimeError(str(error)) from error
    return without_options(ctx, (FIELD, OF_VIDEOS, LIMITS)), info
