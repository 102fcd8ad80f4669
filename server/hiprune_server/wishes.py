"""What a request wishes for its pictures: read from the request, part by part."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import quote, unquote

from hiprune_vllm.plan import FIELD, PlanError, PruningPlan


class Pruning(Protocol):
    """What the engine's processor says about pruning (its `PruningInfo`)."""

    default: PruningPlan

    def parse(
        self, value: object, *, name: str = FIELD, for_one_image: bool = False
    ) -> PruningPlan: ...


Presets = Mapping[str, PruningPlan]
"""`detail` of an image -> the operator's plan for it."""

IMAGE_PARTS: Final = ("image_url", "input_image", "image_pil", "image_embeds")
"""Content parts that vLLM reads as an image: their `type`, or a key where that is missing."""

_TAG: Final = f"#{FIELD}-{secrets.token_hex(16)}-"
"""Begins a wish behind a URL; nobody outside of this process can write it."""


class ImageWish(NamedTuple):
    """What one image part says: its `hiprune` object, and the preset of its `detail`."""

    own: PruningPlan | None = None
    detail: PruningPlan | None = None

    def over(self, whole: PruningPlan) -> PruningPlan:
        """The image's plan, `whole` deciding what it leaves open."""
        return (self.own or PruningPlan()).over((self.detail or PruningPlan()).over(whole))


@dataclass(frozen=True)
class Wishes:
    """What a request asked for: whether at all, for all images, and for each of them."""

    asked: bool
    whole: PruningPlan
    of_images: Sequence[ImageWish]

    def source(self, index: int) -> str:
        """Who decided the budget of an image."""
        wish = self.of_images[index] if index < len(self.of_images) else ImageWish()
        if wish.own is not None and wish.own.has_budget:
            return "image"
        if wish.detail is not None and wish.detail.has_budget:
            return "detail"
        return "request" if self.whole.has_budget else "default"


def take_image_wishes(
    messages: Sequence[Any], pruning: Pruning, presets: Presets
) -> tuple[list[Any], list[ImageWish]]:
    """Reads the `hiprune` objects of the image parts of chat messages.

    Returns:
        The messages without them, and one entry an image, in order.

    Raises:
        PlanError: an object or a `detail` is invalid, or stands where it has no effect.
    """
    plain: list[Any] = []
    wishes: list[ImageWish] = []
    for m, message in enumerate(messages):
        plain.append(message)
        if not isinstance(message, dict):
            continue
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        # Not always a list: it may be an iterator that can be read once (pydantic's).
        message["content"] = parts = list(content)
        without = []
        for p, part in enumerate(parts):
            part, wish = _take(part, f"messages[{m}].content[{p}]", pruning, presets)  # noqa: PLW2901
            without.append(part)
            if wish is not None:
                wishes.append(wish)
        plain[-1] = {**message, "content": without}
    return plain, wishes


def _take(part: Any, name: str, pruning: Pruning, presets: Presets) -> tuple[Any, ImageWish | None]:
    """A part without its wish, and the wish; None for a part that is no image."""
    if not isinstance(part, dict):
        return part, None
    # As vLLM reads it: by its type, or by its keys where that is missing or where it has a uuid.
    kind = part.get("type") if "uuid" not in part else None
    by_key = any(key in part for key in IMAGE_PARTS)
    if not (kind in IMAGE_PARTS or (kind is None and by_key)):
        if FIELD in part:
            raise PlanError(f"{name}.{FIELD}", "must stand in an image part, this part is none")
        return part, None
    preset = _preset(part, name, presets)
    part, where, value = _untagged(part, f"{name}.{FIELD}")
    if value is _NOTHING:
        return part, ImageWish(None, preset)
    own = pruning.parse(value, name=where, for_one_image=True)
    return {key: one for key, one in part.items() if key != FIELD}, ImageWish(own, preset)


def _preset(part: dict[str, Any], name: str, presets: Presets) -> PruningPlan | None:
    """What the image's `detail` means to the operator; None for `auto` and for none."""
    inner = part.get("image_url")
    where, place = (inner, f"{name}.image_url") if isinstance(inner, dict) else (part, name)
    detail = where.get("detail")
    if detail is None or detail == "auto" or not presets:  # none: this model cannot be pruned
        return None
    if not isinstance(detail, str) or detail not in presets:
        raise PlanError(
            f"{place}.detail", f"must be one of auto, {', '.join(presets)}, got {detail!r}"[:200]
        )
    return presets[detail]


# vLLM's models of the Responses and the Messages API drop unknown fields. There a picture's
# wish travels behind its URL, which every conversion of theirs hands on, to `take_image_wishes`.

_NOTHING: Final = object()


def tag(body: Mapping[str, Any]) -> dict[str, Any]:
    """A request with the `hiprune` objects of its image parts moved behind their URLs.

    Args:
        body: of /v1/responses or /v1/messages, as it came; stays as it is.

    Raises:
        PlanError: an object stands where it has no effect.
    """
    return {
        key: _tagged(value, key) if key in ("input", "messages", "system") else value
        for key, value in body.items()
    }


def _tagged(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return [_tagged(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if FIELD in value:
        return _tag_part(value, f"{path}.{FIELD}")
    return {
        key: _tagged(inner, f"{path}.{key}") if key in ("content", "output") else inner
        for key, inner in value.items()
    }


def _tag_part(part: dict[str, Any], path: str) -> dict[str, Any]:
    kind, source = part.get("type"), part.get("source")
    wish = _TAG + quote(json.dumps([path, part[FIELD]]))
    rest = {key: value for key, value in part.items() if key != FIELD}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        return rest | {"image_url": part["image_url"] + wish}
    if kind == "image" and isinstance(source, dict):
        key = "url" if source.get("type") == "url" else "data"
        if isinstance(source.get(key), str):
            return rest | {"source": source | {key: source[key] + wish}}
    raise PlanError(path, "must stand in an image part with a picture, this part is none")


def _untagged(part: dict[str, Any], name: str) -> tuple[dict[str, Any], str, Any]:
    """An image part without a tag, the path of its `hiprune` object, and the object."""
    inner = part.get("image_url")
    url = inner.get("url") if isinstance(inner, dict) else inner
    if not isinstance(url, str) or _TAG not in url:
        return part, name, part.get(FIELD, _NOTHING)
    url, _, text = url.partition(_TAG)
    path, value = json.loads(unquote(text))
    without = inner | {"url": url} if isinstance(inner, dict) else url
    return part | {"image_url": without}, path, value
