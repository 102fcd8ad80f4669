"""OpenAI's `detail` of a picture in a request's body: which words it may be, and null is none."""

from typing import Any, Final

from hiprune_vllm.plan import PlanError

PRESETS: Final = ("low", "high", "original")
"""OpenAI's words for a picture that stand for a plan of the operator's."""
AUTO: Final = "auto"
DETAILS: Final = (AUTO, *PRESETS)
"""All that OpenAI has. As there, a word in another case is none of them."""


def settled(body: Any) -> Any:
    """The body without the `detail`s that are null, which say as much as none.

    Args:
        body: of a chat or a Responses request, before its types are known; stays as it is.

    Raises:
        PlanError: a `detail` is something else than one of DETAILS; it names the place.
    """
    if not isinstance(body, dict):
        return body
    return body | {
        where: [_message(one, f"{where}[{i}]") for i, one in enumerate(body[where])]
        for where in ("messages", "input")
        if isinstance(body.get(where), list)
    }


def _message(message: Any, path: str) -> Any:
    if not isinstance(message, dict):
        return message
    return message | {
        key: [_part(one, f"{path}.{key}[{p}]") for p, one in enumerate(message[key])]
        for key in ("content", "output")
        if isinstance(message.get(key), list)
    }


def _part(part: Any, path: str) -> Any:
    if not isinstance(part, dict):
        return part
    inner = part.get("image_url")
    if isinstance(inner, dict):
        return part | {"image_url": _without_null(inner, f"{path}.image_url.detail")}
    if inner is not None or part.get("type") in ("input_image", "image_url"):
        return _without_null(part, f"{path}.detail")
    return part


def _without_null(holder: dict[str, Any], path: str) -> dict[str, Any]:
    value = holder.get("detail")
    if value is None:
        return {key: inner for key, inner in holder.items() if key != "detail"}
    if not isinstance(value, str) or value not in DETAILS:
        raise PlanError(path, f"must be one of {', '.join(DETAILS)}, got {value!r}"[:200])
    return holder
