"""What a `hiprune` object may hold: each knob stands once, and is read, published and described
from there.

Standard library only, as `plan`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from hiprune_vllm.plan import (
    BUDGETS,
    FIELD,
    KNOBS,
    MAX_TOKENS,
    NO_LIMITS,
    Encoder,
    Limits,
    PlanError,
    PruningPlan,
)
from hiprune_vllm.pruning.budget import BUFFERS, SCORES

Schema = dict[str, Any]
"""Of one value, in the words of JSON Schema: `type` with bounds, or `enum`."""


class Knob(NamedTuple):
    """One field of a `hiprune` object.

    Attributes:
        help: what it does, for people.
        allows: its values for an encoder and within an operator's limits; None where a model has
            no such knob.
        lacking: what the models are that have none of it, or not all of its values.
    """

    help: str
    allows: Callable[[Encoder, Limits], Schema | None]
    lacking: str = ""


def _integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _pixels(encoder: Encoder, limits: Limits) -> Schema | None:
    return _integer(1, limits.max_pixels) if encoder.free_sizes else None


_FIXED_SIZES: Final = "whose pictures are scaled to fixed sizes"
_KNOBS: Final[Mapping[str, Knob]] = {
    "tokens": Knob(
        "visual tokens kept per picture or video; more than it has means all",
        lambda _, limits: _integer(limits.min_tokens, limits.max_tokens),
    ),
    "ratio": Knob(
        "share kept per picture or video, at least one token",
        lambda *_: {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    ),
    "total_tokens": Knob(
        "visual tokens of all pictures and videos together, in proportion to their full size",
        lambda *_: _integer(1, MAX_TOKENS),
    ),
    "alpha": Knob(
        "share of anchors and buffers together",
        lambda *_: {"type": "number", "minimum": 0, "maximum": 1},
    ),
    "object_layer": Knob(
        "layer that anchors come from, counted from 1",
        lambda encoder, _: _integer(1, encoder.output_layer - 1),
    ),
    "buffer": Knob(
        "which neighbours of an anchor stay with it", lambda *_: {"enum": list(BUFFERS)}
    ),
    "score": Knob(
        "attention counted from all tokens, or from the CLS token only",
        lambda encoder, _: {"enum": list(SCORES) if encoder.has_cls else ["global"]},
        "whose encoder has no CLS token",
    ),
    "method": Knob(
        "how tokens are chosen; random and stride are controls",
        lambda _, limits: {"enum": list(limits.methods)},
    ),
    "min_pixels": Knob("pixels that a picture is scaled to at least", _pixels, _FIXED_SIZES),
    "max_pixels": Knob("pixels that a picture is scaled to at most", _pixels, _FIXED_SIZES),
    "max_tiles": Knob(
        "tiles that a picture is cut into at most, beside the whole of it",
        lambda encoder, _: None if encoder.tiles is None else _integer(*encoder.tiles),
        "whose pictures are not cut into tiles",
    ),
}
"""Name -> knob, for each of `plan.KNOBS` and in their order."""


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
    known = list(KNOBS)
    if for_one_image:
        known.remove("total_tokens")
    for key in value:
        if key not in known:
            raise PlanError(
                f"{field}.{_short(str(key))}",
                f"is unknown; allowed are {', '.join(known)}",
                unknown=True,
            )
    knobs = {key: _read(_KNOBS[key], one, f"{field}.{key}", encoder) for key, one in value.items()}
    plan = PruningPlan(**knobs)
    given = [name for name in BUDGETS if getattr(plan, name) is not None]
    if len(given) > 1:
        raise PlanError(
            field,
            f"must not have both {' and '.join(given)}, "
            f"got {' and '.join(f'{name} {getattr(plan, name)}' for name in given)}",
        )
    least, most = plan.min_pixels, plan.max_pixels
    if least is not None and most is not None and least > most:
        raise PlanError(f"{field}.min_pixels", f"must be at most max_pixels {most}, got {least}")
    return plan


def schema(encoder: Encoder, limits: Limits = NO_LIMITS) -> dict[str, Schema]:
    """Every knob that a request may give, in the words of JSON Schema."""
    return {
        name: allowed | {"description": knob.help}
        for name, knob in _KNOBS.items()
        if name not in limits.fixed and (allowed := knob.allows(encoder, limits)) is not None
    }


def _read(knob: Knob, value: object, field: str, encoder: Encoder) -> Any:
    """The value, once it is what the knob allows; the operator's limits are asked later."""
    allowed = knob.allows(encoder, NO_LIMITS)
    if allowed is None:
        raise PlanError(field, f"must be left out for this model, {knob.lacking}")
    if "enum" in allowed:
        names = allowed["enum"]
        if isinstance(value, str) and value in names:
            return value
        wanted = f"one of {', '.join(names)}" if len(names) > 1 else repr(names[0])
        model = f" for this model, {knob.lacking}" if knob.lacking and len(names) == 1 else ""
        raise PlanError(field, f"must be {wanted}{model}, got {_show(value)}")
    whole = allowed["type"] == "integer"
    low, high = allowed.get("minimum", 0), allowed["maximum"]
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    open_low = "exclusiveMinimum" in allowed
    if is_number and low <= value <= high and not (open_low and value == low):
        return value if whole else float(value)  # type: ignore[arg-type]
    told = f"{'an integer' if whole else 'a number'} in {'(' if open_low else '['}{low}, {high}]"
    raise PlanError(field, f"must be {told}, got {_show(value)}")


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
