"""The `hiprune` object: a user's knobs, who decides them, and what they come to.

Standard library only, so that the server can use it without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, NamedTuple, cast

from hiprune_vllm.pruning.budget import METHODS, ImageBudget, spread, tokens_kept

MAX_TOKENS: Final = 2**31 - 1
MAX_FULL_TOKENS: Final = 2**20
"""Visual tokens that the images of a request may have before pruning, if the operator says nothing:
64 of the largest that Qwen2.5-VL takes (16,384 each), 364 of LLaVA-NeXT's (2,880)."""
DEFAULT_ALPHA: Final = 0.1  # section 4.1 of the paper
FIELD: Final = "hiprune"
OF_VIDEOS: Final = "hiprune_videos"
"""Beside FIELD: the operator's plan of videos, of which a request says nothing."""
LIMITS: Final = "hiprune_limits"
"""Beside FIELD in the engine's `mm_processor_kwargs`: fields of `Limits`."""
BUDGETS: Final = ("tokens", "ratio", "total_tokens")
"""Three ways to say how many; at most one in a plan."""
SIZES: Final = ("min_pixels", "max_pixels")
"""Between which the picture is scaled before it is encoded, where its size is free."""


class PlanError(ValueError):
    """A `hiprune` object that cannot be served.

    Attributes:
        field: path to what is wrong in it.
        unknown: whether there is no such field.
    """

    def __init__(self, field: str, message: str, *, unknown: bool = False) -> None:
        super().__init__(f"{field} {message}")
        self.field = field
        self.unknown = unknown


class PicturesLeftOut(PlanError):
    """Pictures that have no place in the prompt: a chat template drops them, or it was cut.

    `placeholder` are the tokens that mark a place.
    """

    def __init__(self, field: str, message: str, placeholder: Sequence[int]) -> None:
        super().__init__(field, message)
        self.placeholder = placeholder


@dataclass(frozen=True, slots=True)
class Encoder:
    """What a vision encoder allows, read from a checkpoint's configuration.

    Attributes:
        family: model family, for people.
        output_layer: 1-based number of the last block that runs.
        object_layer: default object layer, in [1, output_layer - 1].
        has_cls: whether there is a CLS token to take scores from.
        careful_ratio: share of the tokens below which published figures of this encoder, by any
            method, lose much; None where none are known to.
        free_sizes: whether a picture may have any number of pixels (`SIZES`), and thus of tokens.
        tiles: least and most that a picture is cut into beside the base tile; None where none is.
    """

    family: str
    output_layer: int
    object_layer: int
    has_cls: bool
    careful_ratio: float | None = None
    free_sizes: bool = False
    tiles: tuple[int, int] | None = None


class About(NamedTuple):
    """What somebody who chooses a budget should know of a family; docs/families.md says it, too.

    Attributes:
        token: what one visual token is.
        layer: the default object layer, and why.
        dropped: what goes besides visual tokens where a picture is pruned; empty for nothing.
        published: what is published about pruning this encoder, and by whom; empty for nothing.
    """

    token: str
    layer: str
    dropped: str = ""
    published: str = ""

    @property
    def advice(self) -> str:
        """How to find a budget; no family is offered with one."""
        first = "" if self.published else "Nothing is published: compare with `random` first. "
        return f"{first}Measure on your own questions with `random` beside it: loadtests/quality"

    def to_dict(self) -> dict[str, str]:
        return {**self._asdict(), "advice": self.advice}


class TokenCount(NamedTuple):
    """Visual tokens of one image.

    Attributes:
        full: placeholder tokens of the unpruned image.
        prunable: those that show a part of the picture, the most that a pruned image keeps;
            below `full` where the model adds tokens of its own (LLaVA-NeXT's newlines).
    """

    full: int
    prunable: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator lets requests ask for.

    Attributes:
        min_tokens, max_tokens: visual tokens kept of one image; one that has fewer may keep all.
        methods: that may be chosen.
        fixed: knobs that may not be given at all.
        max_full_tokens: visual tokens of all images of a request together, as they are before
            pruning, whether or not they are pruned: what the vision encoder has to work on.
        max_pixels: that a picture is scaled to at most, where its size is free, whether or not a
            request says anything of it; at most what the checkpoint's processor says.
    """

    min_tokens: int = 1
    max_tokens: int = MAX_TOKENS
    methods: tuple[str, ...] = METHODS
    fixed: tuple[str, ...] = ()
    max_full_tokens: int = MAX_FULL_TOKENS
    max_pixels: int = MAX_TOKENS

    def __post_init__(self) -> None:
        for name in ("min_tokens", "max_tokens", "max_full_tokens", "max_pixels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{LIMITS}.{name}", f"must be an integer >= 1, got {value!r}")

    def check_images(self, full: Sequence[int]) -> None:
        """Raises `PlanError` where a request's images, of `full` tokens each, are too many."""
        if sum(full) > self.max_full_tokens:
            raise PlanError(
                "image_url",
                f"must come to at most {self.max_full_tokens} visual tokens in all images of a "
                f"request together, before pruning (limits.max_full_tokens), got {sum(full)} in "
                f"{len(full)} images: send fewer or smaller ones",
            )

    def check(self, plan: "PruningPlan", field: str = FIELD) -> None:
        """Raises `PlanError` where a wish is outside, as far as that shows without the image."""
        for knob in self.fixed:
            if getattr(plan, knob) is not None:
                raise PlanError(
                    f"{field}.{knob}", "is set by the operator (limits.fixed), leave it out"
                )
        if plan.method is not None and plan.method not in self.methods:
            raise PlanError(
                f"{field}.method",
                f"must be one of {', '.join(self.methods)} (limits.methods), got {plan.method!r}",
            )
        if plan.tokens is not None and not self.min_tokens <= plan.tokens <= self.max_tokens:
            raise PlanError(f"{field}.tokens", f"{self._told()}, got {plan.tokens}")
        for knob in SIZES:
            wish = getattr(plan, knob)
            if wish is not None and wish > self.max_pixels:
                raise PlanError(
                    f"{field}.{knob}",
                    f"must be at most {self.max_pixels} (limits.max_pixels), got {wish}",
                )

    def apply(self, keep: int, full: int, plan: "PruningPlan") -> int:
        """Tokens kept of an image of `full`: the operator's own wish is held within the limits.

        Raises:
            PlanError: a request's wish comes to something outside.
        """
        held = min(max(keep, min(self.min_tokens, full)), self.max_tokens)
        if keep == held or plan.of_operator:
            return held
        name = [name for name in BUDGETS if getattr(plan, name) is not None][-1]
        raise PlanError(
            f"{FIELD}.{name}", f"{self._told()}, got {keep} of an image's {full} tokens"
        )

    def _told(self) -> str:
        return (
            f"must keep at least {self.min_tokens} (limits.min_tokens) and at most "
            f"{self.max_tokens} (limits.max_tokens) tokens of an image"
        )


NO_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """A wish for one image. `None` means "no wish": whoever is next in precedence decides.

    `of_operator` is no knob: the budget is the server's own, not a request's.
    """

    tokens: int | None = None
    ratio: float | None = None
    total_tokens: int | None = None
    alpha: float | None = None
    object_layer: int | None = None
    buffer: str | None = None
    score: str | None = None
    method: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tiles: int | None = None
    of_operator: bool = False

    @property
    def has_budget(self) -> bool:
        return any(getattr(self, name) is not None for name in BUDGETS)

    @property
    def drops_nothing(self) -> bool:
        """Whether nothing is asked for that would drop a token."""
        return self.tokens is self.total_tokens is None and self.ratio in (None, 1.0)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is asked for that would drop a token or scale a picture."""
        sizes = self.min_pixels, self.max_pixels, self.max_tiles
        return self.drops_nothing and sizes == (None, None, None)

    def over(self, base: "PruningPlan") -> "PruningPlan":
        """This wish, with `base` deciding what it leaves open. The budget counts as one knob.

        Where one's least pixels are more than the other's most, this wish's number is both.
        """
        chosen = {
            name: mine if (mine := getattr(self, name)) is not None else getattr(base, name)
            for name in KNOBS
        }
        decides = self if self.has_budget else base
        chosen |= {name: getattr(decides, name) for name in (*BUDGETS, "of_operator")}
        least, most = chosen["min_pixels"], chosen["max_pixels"]
        if None not in (least, most) and least > most:
            chosen |= dict.fromkeys(SIZES, least if self.max_pixels is None else most)
        return PruningPlan(**chosen)

    def to_dict(self) -> dict[str, Any]:
        """The wish as the JSON object that `parse_plan` reads."""
        return {name: value for name in KNOBS if (value := getattr(self, name)) is not None}

    def resolve(
        self, count: TokenCount, encoder: Encoder, limits: Limits = NO_LIMITS
    ) -> ImageBudget:
        """Numbers for one image (not for `total_tokens`); `seed` is left at 0.

        Raises:
            PlanError: it comes to a number outside the limits.
        """
        plan = complete(self, encoder)
        keep = tokens_kept(count.full, tokens=plan.tokens, ratio=plan.ratio)
        keep = limits.apply(keep, count.full, plan)
        return ImageBudget.of(
            count.full,
            keep if keep == count.full else min(keep, count.prunable),
            method=cast(str, plan.method),
            alpha=cast(float, plan.alpha),
            buffer=cast(str, plan.buffer),
            object_layer=cast(int, plan.object_layer),
            score=cast(str, plan.score),
        )


class Plans(NamedTuple):
    """What a request wishes, one plan a picture and one a video, each in order."""

    pictures: Sequence[PruningPlan]
    videos: Sequence[PruningPlan]


KNOBS: Final = tuple(one.name for one in fields(PruningPlan) if one.name != "of_operator")
"""Every field of a `hiprune` object."""
FULL: Final = PruningPlan(ratio=1.0)
NO_PLAN: Final = PruningPlan(of_operator=True)
"""Of an operator who says nothing."""


def resolve_all(
    plans: Sequence[PruningPlan],
    counts: Sequence[TokenCount],
    encoder: Encoder,
    limits: Limits = NO_LIMITS,
) -> list[ImageBudget]:
    """Numbers for all images of one request.

    Images whose plan has `total_tokens` share it in proportion to their full size, at least one
    token each.

    Raises:
        PlanError: fewer total tokens than images that share them, more than one total, or an image
            outside the limits.
    """
    plans = list(plans)
    sharing = [i for i, plan in enumerate(plans) if plan.total_tokens is not None]
    if sharing:
        totals = {cast(int, plans[i].total_tokens) for i in sharing}
        if len(totals) > 1:
            raise PlanError(
                f"{FIELD}.total_tokens",
                f"must be one number for the whole request, got {sorted(totals)}",
            )
        (total,) = totals
        if total < len(sharing):
            raise PlanError(
                f"{FIELD}.total_tokens",
                f"must be at least 1 for each of {len(sharing)} images, got {total}",
            )
        sizes = [counts[i].full for i in sharing]
        shares = spread(min(total, sum(sizes)), sizes, sizes)
        for empty in [i for i, share in enumerate(shares) if not share]:
            shares[shares.index(max(shares))] -= 1
            shares[empty] = 1
        for i, share in zip(sharing, shares, strict=True):
            plans[i] = replace(plans[i], tokens=share)
    return [plan.resolve(count, encoder, limits) for plan, count in zip(plans, counts, strict=True)]


def complete(plan: PruningPlan, encoder: Encoder) -> PruningPlan:
    """The plan with every knob that it leaves open at its standard value."""
    return plan.over(
        PruningPlan(
            ratio=1.0,
            alpha=DEFAULT_ALPHA,
            object_layer=encoder.object_layer,
            buffer="cross",
            score="global",
            method="hiprune",
            of_operator=True,
        )
    )


def with_seed(budget: ImageBudget, seed: int) -> ImageBudget:
    """The budget with `seed`, where its method draws at random; unchanged otherwise."""
    return replace(budget, seed=seed) if budget.method == "random" else budget
