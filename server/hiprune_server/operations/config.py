"""The operator's settings: flags before environment before a YAML file before what is built in.

Standard library and a YAML reader only: a wrong setting is told before the engine is loaded.
"""

import json
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hiprune_server.wishes.details import PRESETS
from hiprune_vllm.plan import (
    MAX_FULL_TOKENS,
    MAX_TOKENS,
    NO_LIMITS,
    SIZES,
    Encoder,
    Limits,
    PlanError,
)
from hiprune_vllm.reading import parse_plan

PREFIX: Final = "HIPRUNE_"
"""Every environment variable that begins with this is a setting."""
FILE: Final = "config"
METHODS: Final = NO_LIMITS.methods
BUILT_IN: Final = "built in"
PIXELS: Final = "limits.max_image_pixels"
DISABLE: Final = "disable"
"""Its variable, HIPRUNE_DISABLE, is read by the plugin as well, in every process."""
FIXABLE: Final = ("alpha", "object_layer", "buffer", "score", *SIZES, "max_tiles")
"""What `limits.fixed` can take out of a request's hands."""
ANY_ENCODER: Final = Encoder(family="", output_layer=2**31, object_layer=1, has_cls=True)
"""Allows whatever some model allows: the model's own limits are checked once it is known."""


class ConfigError(ValueError):
    """A setting that cannot be served; the message names its key and where it came from."""


@dataclass(frozen=True)
class Setting:
    """One thing that an operator can set.

    Attributes:
        key: in the file, nested at the dot; the environment variable is made of it.
        shape: what a flag's value looks like, for the help text.
        help: what it does.
        read: makes the value from what a file has; raises ValueError saying what must hold.
        parse: makes what a file would have from a flag's or variable's text.
        default: built in.
    """

    key: str
    shape: str
    help: str
    read: Callable[[object], Any]
    parse: Callable[[str], object]
    default: Any

    @property
    def flag(self) -> str:
        name = self.key.replace("presets.", "preset-").split(".")[-1]
        return "--hiprune-" + name.replace("_", "-")

    def show(self, value: Any) -> str:
        """The text that `parse` reads as this value."""
        return ",".join(value) if isinstance(value, list) else json.dumps(value)

    @property
    def variable(self) -> str:
        return PREFIX + self.key.replace(".", "_").upper()


@dataclass(frozen=True)
class Value:
    """A setting's value and who has set it."""

    value: Any
    source: str


@dataclass(frozen=True)
class Config:
    """All settings.

    Attributes:
        values: key -> value and source, in the order of SETTINGS.
    """

    values: Mapping[str, Value]

    def __getitem__(self, key: str) -> Any:
        return self.values[key].value

    @property
    def limits(self) -> Limits:
        """What a request may ask for."""
        return Limits(
            min_tokens=self["limits.min_tokens"],
            max_tokens=self["limits.max_tokens"],
            methods=tuple(self["limits.methods"]),
            fixed=tuple(self["limits.fixed"]),
            max_full_tokens=self["limits.max_full_tokens"],
            max_pixels=self["limits.max_pixels"],
        )

    @property
    def presets(self) -> dict[str, dict[str, Any]]:
        """`detail` of an image -> its plan."""
        return {name: self[f"presets.{name}"] for name in PRESETS}

    def text(self) -> str:
        """Every setting with its source, as YAML with comments."""
        return "".join(
            f"{key}: {json.dumps(found.value)}  # {found.source}\n"
            for key, found in self.values.items()
        )

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Puts what was set into the environment, where the API server's processes read it."""
        for setting in SETTINGS:
            found = self.values[setting.key]
            if found.source != BUILT_IN:
                environment[setting.variable] = setting.show(found.value)
        environment.pop(PREFIX + FILE.upper(), None)


def _plan(value: object) -> dict[str, Any]:
    try:
        return parse_plan(value, ANY_ENCODER, field="", for_one_image=True).to_dict()
    except PlanError as error:
        raise ValueError(str(error)) from None  # ".tokens must ..." or " must ..."


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"must be an integer >= 1, got {value!r}")
    return value


def _some_of(allowed: tuple[str, ...], *, at_least: int) -> Callable[[object], list[str]]:
    def read(value: object) -> list[str]:
        wanted = f"must be a list of {', '.join(allowed)}"
        if not isinstance(value, list) or not set(map(str, value)) <= set(allowed):
            raise ValueError(f"{wanted}, got {value!r}")
        if len(value) < at_least:
            raise ValueError(f"{wanted}, at least {at_least}, got {value!r}")
        return list(dict.fromkeys(value))

    return read


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON, got {text!r} ({error})") from None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _true_or_false(text: str) -> object:
    return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)


def _number(text: str) -> object:
    try:
        return int(text)
    except ValueError:
        return text  # the reader says what must hold


SETTINGS: Final = (
    Setting("default", "JSON", "plan of requests that ask for nothing", _plan, _json, {}),
    Setting("default_video", "JSON", "plan of videos whose request asks for nothing; none: whole",
            _plan, _json, {}),
    Setting("presets.low", "JSON", 'plan of an image with detail "low"', _plan, _json,
            {"ratio": 0.111}),
    Setting("presets.high", "JSON", 'plan of an image with detail "high"', _plan, _json,
            {"ratio": 1.0}),
    Setting("presets.original", "JSON", 'plan of an image with detail "original"', _plan, _json,
            {"ratio": 1.0}),
    Setting("limits.min_tokens", "N", "fewest visual tokens that an image may be asked to keep",
            _count, _number, 1),
    Setting("limits.max_tokens", "N", "most visual tokens that an image may be asked to keep",
            _count, _number, MAX_TOKENS),
    Setting("limits.methods", "A,B", "methods that requests may choose",
            _some_of(METHODS, at_least=1), _names, list(METHODS)),
    Setting("limits.fixed", "A,B", "knobs that requests may not change",
            _some_of(FIXABLE, at_least=0), _names, []),
    Setting("limits.max_full_tokens", "N",
            "visual tokens that all images of a request may have together before pruning",
            _count, _number, MAX_FULL_TOKENS),
    Setting("limits.max_pixels", "N",
            "pixels that a picture is scaled to at most, where its size is free",
            _count, _number, MAX_TOKENS),
    Setting("limits.max_body_bytes", "N", "bytes that a request's body may have",
            _count, _number, 64 * 2**20),
    Setting("limits.max_held_bytes", "N",
            "bytes of request bodies that an API server process holds at a time",
            _count, _number, 2**30),
    Setting("limits.body_seconds", "N", "seconds that a body may take, and 1 more for each 64 KiB",
            _count, _number, 30),
    Setting("limits.max_body_values", "N",
            "values that a JSON body may have; an object or list counts as 25",
            _count, _number, 250_000),
    Setting("limits.grammar_seconds", "N",
            "seconds of a processor that making the form of an answer (JSON schema, grammar) may "
            "take", _count, _number, 10),
    Setting(PIXELS, "N", "pixels that a picture may have, also once it is scaled for the encoder",
            _count, _number, 50_000_000),
    Setting("metrics_key", "BOOL", "whether /metrics asks for the API key, too",
            _switch, _true_or_false, False),
    Setting("explain", "BOOL", "whether POST /v1/hiprune/explain is there",
            _switch, _true_or_false, True),
    Setting("playground", "BOOL", "whether the page /playground is there",
            _switch, _true_or_false, True),
    Setting(DISABLE, "BOOL", "whether pruning is off altogether: vLLM serves as it is",
            _switch, _true_or_false, False),
)  # fmt: skip


def load(flags: Mapping[str, str], environment: Mapping[str, str]) -> Config:
    """Reads all settings.

    Args:
        flags: key -> text of a flag that was given ("config" among them).
        environment: all variables of the process.

    Raises:
        ConfigError: a setting is wrong or unknown, or the settings contradict each other.
    """
    path = flags.get(FILE) or environment.get(PREFIX + FILE.upper())
    in_file = _flat(Path(path)) if path else {}
    known = {setting.key for setting in SETTINGS}
    for key in in_file:
        if key not in known:
            raise ConfigError(f"{path}: {key} is unknown; known are {', '.join(sorted(known))}")
    variables = {setting.variable for setting in SETTINGS} | {PREFIX + FILE.upper()}
    for name in environment:
        if name.startswith(PREFIX) and name not in variables:
            raise ConfigError(f"{name} is unknown; known are {', '.join(sorted(variables))}")
    config = Config(
        {setting.key: _value(setting, flags, environment, in_file, path) for setting in SETTINGS}
    )
    _check(config)
    return config


def _value(
    setting: Setting,
    flags: Mapping[str, str],
    environment: Mapping[str, str],
    in_file: Mapping[str, object],
    path: str | None,
) -> Value:
    if setting.key in flags:
        source, text = setting.flag, flags[setting.key]
    elif environment.get(setting.variable):  # an empty one, as in `.env`, says nothing
        source, text = setting.variable, environment[setting.variable]
    else:
        source, text = f"{path}: {setting.key}", None
        if setting.key not in in_file:
            return Value(setting.default, BUILT_IN)
    try:
        return Value(
            setting.read(in_file[setting.key] if text is None else setting.parse(text)), source
        )
    except ValueError as error:
        told = str(error)  # " must ..." or ".field must ..."
        raise ConfigError(source + (told if told[0] in " ." else f" {told}")) from None


def _flat(path: Path) -> dict[str, object]:
    """The file's settings with dots for nesting; a plan's own fields stay together."""
    import yaml  # noqa: PLC0415

    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML ({' '.join(str(error).split())})") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold keys and values, got a {type(found).__name__}")
    flat: dict[str, object] = {}
    for key, value in found.items():
        if key in ("presets", "limits"):
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {key} must hold keys and values, got {value!r}")
            flat |= {f"{key}.{inner}": one for inner, one in value.items()}
        else:
            flat[str(key)] = value
    return flat


def _check(config: Config) -> None:
    """Settings that contradict each other, as far as that shows without a model."""
    limits = config.limits
    if limits.min_tokens > limits.max_tokens:
        raise ConfigError(
            f"limits.min_tokens ({config.values['limits.min_tokens'].source}) must not be above "
            f"limits.max_tokens, got {limits.min_tokens} and {limits.max_tokens}"
        )
    if config["limits.max_held_bytes"] < config["limits.max_body_bytes"]:
        raise ConfigError(
            f"limits.max_held_bytes ({config.values['limits.max_held_bytes'].source}) must not be "
            "below limits.max_body_bytes, "
            f"got {config['limits.max_held_bytes']} and {config['limits.max_body_bytes']}"
        )
    for key in ("default", *(f"presets.{name}" for name in PRESETS)):
        plan = config[key]
        tokens = plan.get("tokens")
        if tokens is not None and not limits.min_tokens <= tokens <= limits.max_tokens:
            raise ConfigError(
                f"{key} ({config.values[key].source}): tokens must be within the limits "
                f"[{limits.min_tokens}, {limits.max_tokens}], got {tokens}"
            )
        if plan.get("method", limits.methods[0]) not in limits.methods:
            raise ConfigError(
                f"{key} ({config.values[key].source}): method must be one of limits.methods "
                f"({', '.join(limits.methods)}), got {plan['method']}"
            )
