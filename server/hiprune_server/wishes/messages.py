"""What a request wishes for its pictures and videos: read from the request, part by part."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

from hiprune_vllm.facade import Pruning
from hiprune_vllm.plan import FIELD, PlanError, PruningPlan

Presets = Mapping[str, PruningPlan]
"""`detail` of an image -> the operator's plan for it."""

IMAGE_PARTS: Final = ("image_url", "input_image", "image_pil", "image_embeds")
"""Content parts that vLLM reads as an image: their `type`, or a key where that is missing."""

VIDEO_PART: Final = "video_url"

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
    """What a request asked for: whether at all, for all of it, for each image and each video."""

    asked: bool
    whole: PruningPlan
    of_images: Sequence[ImageWish]
    of_videos: Sequence[ImageWish] = ()

    def source(self, index: int) -> str:
        """Who decided the budget of an image."""
        return self._source(self.of_images, index, "image")

    def source_of_video(self, index: int) -> str:
        """Who decided the budget of a video."""
        return self._source(self.of_videos, index, "video")

    def _source(self, wishes: Sequence[ImageWish], index: int, own: str) -> str:
        wish = wishes[index] if index < len(wishes) else ImageWish()
        if wish.own is not None and wish.own.has_budget:
            return own
        if wish.detail is not None and wish.detail.has_budget:
            return "detail"
        return "request" if self.whole.has_budget else "default"


class Taken(NamedTuple):
    """Chat messages without what was wished in them, and what that was."""

    plain: list[Any]
    wishes: list[ImageWish]  # one an image, in order
    of_videos: list[ImageWish]
    arrived: set[str]  # marks of the pictures that `tag` has marked


def take_image_wishes(messages: Sequence[Any], pruning: Pruning, presets: Presets) -> Taken:
    """Reads the `hiprune` objects of the image and video parts of chat messages.

    Raises:
        PlanError: an object or a `detail` is invalid, or stands where it has no effect.
    """
    taken = Taken([], [], [], set())
    for m, message in enumerate(messages):
        taken.plain.append(message)
        if not isinstance(message, dict):
            continue
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        # Not always a list: it may be an iterator that can be read once (pydantic's).
        message["content"] = parts = list(content)
        without = []
        for p, part in enumerate(parts):
            # What a tool has found is an object, not a dict, on /v1/responses at times.
            dump = getattr(part, "model_dump", None)
            part = part if dump is None else dump(exclude_none=True)  # noqa: PLW2901
            name = f"messages[{m}].content[{p}]"
            if is_video(part):
                part, of_video = _take_video(part, name, pruning)  # noqa: PLW2901
                taken.of_videos.append(of_video)
            else:
                part, wish = _take(part, name, pruning, presets, taken.arrived)  # noqa: PLW2901
                if wish is not None:
                    taken.wishes.append(wish)
            without.append(part)
        taken.plain[-1] = {**message, "content": without}
    return taken


def _take(
    part: Any, name: str, pruning: Pruning, presets: Presets, arrived: set[str]
) -> tuple[Any, ImageWish | None]:
    """A part without its wish, and the wish; None for a part that is no image."""
    if not isinstance(part, dict):
        return part, None
    if not is_picture(part):
        if FIELD in part:
            raise PlanError(
                f"{name}.{FIELD}", "must stand in an image or video part, this part is none"
            )
        return part, None
    preset = _preset(part, name, presets)
    part, where, value = _untagged(part, f"{name}.{FIELD}", arrived)
    if value is _NOTHING:
        return part, ImageWish(None, preset)
    own = pruning.parse(value, name=where, for_one_image=True)
    return {key: one for key, one in part.items() if key != FIELD}, ImageWish(own, preset)


def _take_video(
    part: dict[str, Any], name: str, pruning: Pruning
) -> tuple[dict[str, Any], ImageWish]:
    """A part without its wish, and the wish. `detail` has no meaning for a video."""
    if FIELD not in part:
        return part, ImageWish()
    own = pruning.parse(part[FIELD], name=f"{name}.{FIELD}", for_one_image=True)
    pruning.check_of_video(own, f"{name}.{FIELD}")
    return {key: one for key, one in part.items() if key != FIELD}, ImageWish(own)


def is_video(part: object) -> bool:
    """Whether vLLM reads a part as a video: as for `is_picture`."""
    return isinstance(part, dict) and _of_kind(part, (VIDEO_PART,))


def is_picture(part: object) -> bool:
    """Whether vLLM reads a part as a picture: by its type, or by its keys where it has none.

    Where a part has a `uuid` its type is not looked at either.
    """
    return isinstance(part, dict) and _of_kind(part, IMAGE_PARTS)


def _of_kind(part: Mapping[str, object], kinds: Sequence[str]) -> bool:
    kind = part.get("type") if part.get("uuid") is None else None
    return kind in kinds or (kind is None and any(key in part for key in kinds))


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


# vLLM's models of the Responses and the Messages API drop unknown fields, and their conversions
# drop pictures in some places. There every picture has a mark behind its URL, which conversions
# hand on to `take_image_wishes`: it brings the picture's wish, and shows that the picture arrived.

_NOTHING: Final = object()
_NUMBERS: Final = count()


def tag(body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A request with its pictures marked and their `hiprune` objects moved into the marks.

    Args:
        body: of /v1/responses or /v1/messages, as it came; stays as it is.

    Returns:
        The request, and by mark the path of each picture.

    Raises:
        PlanError: an object stands where it has no effect.
    """
    marks: dict[str, str] = {}
    tagged = {
        key: _tagged(value, key, marks) if key in ("input", "messages", "system") else value
        for key, value in body.items()
    }
    return tagged, marks


def _tagged(value: Any, path: str, marks: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_tagged(item, f"{path}[{i}]", marks) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if FIELD in value or value.get("type") in ("input_image", "image"):
        return _tag_part(value, path, marks)
    return {
        key: _tagged(inner, f"{path}.{key}", marks) if key in ("content", "output") else inner
        for key, inner in value.items()
    }


def _tag_part(part: dict[str, Any], path: str, marks: dict[str, str]) -> dict[str, Any]:
    kind, source = part.get("type"), part.get("source")
    rest = {key: value for key, value in part.items() if key != FIELD}
    mark = str(next(_NUMBERS))
    wish = [f"{path}.{FIELD}", part[FIELD]] if FIELD in part else []
    behind = _TAG + quote(json.dumps([mark, *wish]))
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        marks[mark] = path
        # OpenAI demands no `detail` of what a tool has found, vLLM does.
        return {"detail": "auto"} | rest | {"image_url": part["image_url"] + behind}
    if kind == "image" and isinstance(source, dict):
        key = "url" if source.get("type") == "url" else "data"
        if isinstance(source.get(key), str):
            marks[mark] = path
            return rest | {"source": source | {key: source[key] + behind}}
    if wish:
        raise PlanError(
            f"{path}.{FIELD}", "must stand in an image part with a picture, this part is none"
        )
    return part


def _untagged(
    part: dict[str, Any], name: str, arrived: set[str]
) -> tuple[dict[str, Any], str, Any]:
    """An image part without a mark, the path of its `hiprune` object, and the object."""
    inner = part.get("image_url")
    url = inner.get("url") if isinstance(inner, dict) else inner
    if not isinstance(url, str) or _TAG not in url:
        return part, name, part.get(FIELD, _NOTHING)
    url, _, text = url.partition(_TAG)
    mark, path, value = (*json.loads(unquote(text)), name, _NOTHING)[:3]
    arrived.add(mark)
    without = inner | {"url": url} if isinstance(inner, dict) else url
    return part | {"image_url": without}, path, value


def check_arrived(marks: Mapping[str, str], arrived: set[str]) -> None:
    """Refuses a request with a picture that did not get into the messages for the model.

    Raises:
        PlanError: names the first one.
    """
    for mark, path in marks.items():
        if mark not in arrived:
            raise PlanError(
                path,
                "must not be a picture: this API hands on text alone from there. Put it into a "
                "message of the user's or into what a tool has found",
            )
