"""The `hiprune` object: the only place where a user's knobs are read and checked.

Standard library only, so that the server can use it without torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, NamedTuple, cast

from hiprune_vllm.pruning.budget import BUFFERS, METHODS, SCORES, ImageBudget, spread, tokens_kept

MAX_TOKENS: Final = 2**31 - 1
DEFAULT_ALPHA: Final = 0.1  # section 4.1 of the paper
FIELD: Final = "hiprune"
BUDGETS: Final = ("tokens", "ratio", "total_tokens")
"""Three ways to say how many; at most one in a plan."""


class PlanError(ValueError):
    """A `hiprune` object that cannot be served; `field` is the path to what is wrong in it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


@dataclass(frozen=True, slots=True)
class Encoder:
    """What a vision encoder allows, read from a checkpoint's configuration.

    Attributes:
        family: model family, for people.
        output_layer: 1-based number of the last block that runs.
        object_layer: default object layer, in [1, output_layer - 1].
        has_cls: whether there is a CLS token to take scores from.
    """

    family: str
    output_layer: int
    object_layer: int
    has_cls: bool


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
class PruningPlan:
    """A wish for one image. `None` means "no wish": whoever is next in precedence decides."""

    tokens: int | None = None
    ratio: float | None = None
    total_tokens: int | None = None
    alpha: float | None = None
    object_layer: int | None = None
    buffer: str | None = None
    score: str | None = None
    method: str | None = None

    @property
    def has_budget(self) -> bool:
        return any(getattr(self, name) is not None for name in BUDGETS)

    def over(self, base: "PruningPlan") -> "PruningPlan":
        """This wish, with `base` deciding what it leaves open. The budget counts as one knob."""
        chosen = {
            f.name: mine if (mine := getattr(self, f.name)) is not None else getattr(base, f.name)
            for f in fields(self)
        }
        if self.has_budget:
            chosen |= {name: getattr(self, name) for name in BUDGETS}
        return PruningPlan(**chosen)

    def to_dict(self) -> dict[str, Any]:
        """The wish as the JSON object that `parse_plan` reads."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def resolve(self, count: TokenCount, encoder: Encoder) -> ImageBudget:
        """Numbers for one image (not for `total_tokens`); `seed` is left at 0."""
        plan = complete(self, encoder)
        keep = tokens_kept(count.full, tokens=plan.tokens, ratio=plan.ratio)
        return ImageBudget.of(
            count.full,
            keep if keep == count.full else min(keep, count.prunable),
            method=cast(str, plan.method),
            alpha=cast(float, plan.alpha),
            buffer=cast(str, plan.buffer),
            object_layer=cast(int, plan.object_layer),
            score=cast(str, plan.score),
        )


FULL: Final = PruningPlan(ratio=1.0)


def resolve_all(
    plans: Sequence[PruningPlan], counts: Sequence[TokenCount], encoder: Encoder
) -> list[ImageBudget]:
    """Numbers for all images of one request.

    Images whose plan has `total_tokens` share it in proportion to their full size, at least one
    token each.

    Raises:
        PlanError: fewer total tokens than images that share them, or more than one total.
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
            plans[i] = replace(plans[i], tokens=share, total_tokens=None)
    return [plan.resolve(count, encoder) for plan, count in zip(plans, counts, strict=True)]


def parse_plan(
    value: object, encoder: Encoder, *, field: str = FIELD, for_one_image: bool = False
) -> PruningPlan:
    """Reads a `hiprune` object as it came from a client, a flag or a configuration.

    Args:
        value: decoded JSON.
        encoder: what the served model allows.
        field: how to call the object in errors.
        for_one_image: refuse what only a whole request can have (`total_tokens`).

    Raises:
        PlanError: naming the field, what must hold and what came.
    """
    if not isinstance(value, Mapping):
        raise PlanError(field, f"must be an object, got {_show(value)}")
    known = [f.name for f in fields(PruningPlan)]
    if for_one_image:
        known.remove("total_tokens")
    for key in value:
        if key not in known:
            raise PlanError(
                f"{field}.{_short(str(key))}", f"is unknown; allowed are {', '.join(known)}"
            )
    knobs = {key: _READERS[key](value[key], f"{field}.{key}", encoder) for key in value}
    plan = PruningPlan(**knobs)
    given = [name for name in BUDGETS if getattr(plan, name) is not None]
    if len(given) > 1:
        raise PlanError(
            field,
            f"must not have both {' and '.join(given)}, "
            f"got {' and '.join(f'{name} {getattr(plan, name)}' for name in given)}",
        )
    return plan


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
        )
    )


def schema(encoder: Encoder) -> dict[str, dict[str, Any]]:
    """Range of every knob in the words of JSON Schema, for people and clients to read."""
    return {
        "tokens": {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS},
        "ratio": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "total_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS},
        "alpha": {"type": "number", "minimum": 0, "maximum": 1},
        "object_layer": {"type": "integer", "minimum": 1, "maximum": encoder.output_layer - 1},
        "buffer": {"enum": list(BUFFERS)},
        "score": {"enum": list(SCORES) if encoder.has_cls else ["global"]},
        "method": {"enum": list(METHODS)},
    }


def with_seed(budget: ImageBudget, seed: int) -> ImageBudget:
    """The budget with `seed`, where its method draws at random; unchanged otherwise."""
    return replace(budget, seed=seed) if budget.method == "random" else budget


def _show(value: object) -> str:
    """A client's value as it would look in JSON, short enough for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 200:
        return "an integer of more than 60 digits"
    if isinstance(value, str | int | float):
        return _short(repr(value))
    return "an array" if isinstance(value, list | tuple) else "an object"


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _integer(value: object, field: str, low: int, high: int) -> int:
    wanted = f"must be an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise PlanError(field, f"{wanted}, got {_show(value)}")
    return value


def _number(value: object, field: str, *, low_is_open: bool) -> float:
    wanted = f"must be a number in {'(' if low_is_open else '['}0, 1]"
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= 1  # NaN is not either
        or (low_is_open and value == 0)
    ):
        raise PlanError(field, f"{wanted}, got {_show(value)}")
    return float(value)


def _name(value: object, field: str, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise PlanError(field, f"must be one of {', '.join(allowed)}, got {_show(value)}")
    return value


def _score(value: object, field: str, encoder: Encoder) -> str:
    name = _name(value, field, SCORES)
    if name == "cls" and not encoder.has_cls:
        raise PlanError(
            field, "must be 'global' for this model, whose encoder has no CLS token, got 'cls'"
        )
    return name


_READERS: Final[Mapping[str, Callable[[object, str, Encoder], Any]]] = {
    "tokens": lambda value, field, _: _integer(value, field, 1, MAX_TOKENS),
    "ratio": lambda value, field, _: _number(value, field, low_is_open=True),
    "total_tokens": lambda value, field, _: _integer(value, field, 1, MAX_TOKENS),
    "alpha": lambda value, field, _: _number(value, field, low_is_open=False),
    "object_layer": lambda value, field, encoder: _integer(
        value, field, 1, encoder.output_layer - 1
    ),
    "buffer": lambda value, field, _: _name(value, field, BUFFERS),
    "score": _score,
    "method": lambda value, field, _: _name(value, field, METHODS),
}
