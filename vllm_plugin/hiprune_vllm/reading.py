"""Reads a `hiprune` object: the only place where a user's knobs are checked.

Standard library only, as `plan`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from hiprune_vllm.plan import (
    BUDGETS,
    FIELD,
    KNOBS,
    MAX_TOKENS,
    NO_LIMITS,
    SIZES,
    Encoder,
    Limits,
    PlanError,
    PruningPlan,
)
from hiprune_vllm.pruning.budget import BUFFERS, METHODS, SCORES


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
    knobs = {key: _READERS[key](value[key], f"{field}.{key}", encoder) for key in value}
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


def schema(encoder: Encoder, limits: Limits = NO_LIMITS) -> dict[str, dict[str, Any]]:
    """Range of every knob that a request may give, in the words of JSON Schema."""
    ranges: dict[str, dict[str, Any]] = {
        "tokens": {
            "type": "integer",
            "minimum": limits.min_tokens,
            "maximum": limits.max_tokens,
        },
        "ratio": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "total_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS},
        "alpha": {"type": "number", "minimum": 0, "maximum": 1},
        "object_layer": {"type": "integer", "minimum": 1, "maximum": encoder.output_layer - 1},
        "buffer": {"enum": list(BUFFERS)},
        "score": {"enum": list(SCORES) if encoder.has_cls else ["global"]},
        "method": {"enum": list(limits.methods)},
    }
    if encoder.free_sizes:
        for knob in SIZES:
            ranges[knob] = {"type": "integer", "minimum": 1, "maximum": limits.max_pixels}
    if encoder.tiles is not None:
        least, most = encoder.tiles
        ranges["max_tiles"] = {"type": "integer", "minimum": least, "maximum": most}
    return {knob: allowed for knob, allowed in ranges.items() if knob not in limits.fixed}


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


def _pixels(value: object, field: str, encoder: Encoder) -> int:
    if not encoder.free_sizes:
        raise PlanError(
            field, "must be left out for this model, whose pictures are scaled to fixed sizes"
        )
    return _integer(value, field, 1, MAX_TOKENS)


def _tiles(value: object, field: str, encoder: Encoder) -> int:
    if encoder.tiles is None:
        raise PlanError(
            field, "must be left out for this model, whose pictures are not cut into tiles"
        )
    return _integer(value, field, *encoder.tiles)


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
    **dict.fromkeys(SIZES, _pixels),
    "max_tiles": _tiles,
}
