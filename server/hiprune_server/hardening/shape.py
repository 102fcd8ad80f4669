"""The shape of chat messages that vLLM's templates and loaders take for granted.

Symptom: a message with a number for its text, or a part without its URL, is a 500.
Cause: vLLM's models let some odd messages pass, which templates and loaders then stumble over.
Change: the shape is checked before either sees it; what is wrong is a 400 that names its place.
Remove when: vLLM's request models refuse all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vllm.exceptions import VLLMValidationError

TEXTS: Final = ("text", "refusal", "thinking", "uuid")
"""Keys of a part that hold text."""
URLS: Final = ("image_url", "audio_url", "video_url")
"""Keys of a part that hold a URL, or an object with one."""
TENSORS: Final = ("image_embeds", "audio_embeds", "video_embeds")
"""Keys of a part that hold an encoded tensor, or an object of them."""


def check_messages(messages: Sequence[Any], field: str) -> None:
    """Refuses messages that could not be read, by name: vLLM's own models let some of them pass.

    Args:
        messages: chat messages; their content is text, a list or missing.
        field: what the request calls them.

    Raises:
        VLLMValidationError: names the first thing that is wrong.
    """
    for m, message in enumerate(messages):
        if not isinstance(message, dict):
            _refuse(f"{field}[{m}]", "an object", message)
        content = message.get("content")
        for p, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, str):
                _check_part(part, f"{field}[{m}].content[{p}]")


def tensors_in(messages: Sequence[Any]) -> str | None:
    """The key of a part with tensors of the client's own, if there is one."""
    parts = [
        part
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, dict)
    ]
    return next((key for key in TENSORS for part in parts if key in part), None)


def _check_part(part: Any, name: str) -> None:
    if not isinstance(part, dict):
        _refuse(name, "an object or text", part)
    for key in TEXTS:
        if not isinstance(part.get(key), str | None):
            _refuse(f"{name}.{key}", "text", part[key])
    for key in URLS:
        url, place = part.get(key), f"{name}.{key}"
        if isinstance(url, Mapping):
            url, place = url.get("url"), f"{place}.url"
        if not isinstance(url, str | None):
            _refuse(place, "a URL", url)
        if key in part and not url and part.get("uuid") is None:
            _refuse(place, "a URL where the part has no uuid", url)
    for key in TENSORS:
        tensors = part.get(key)
        for encoded in tensors.values() if isinstance(tensors, Mapping) else [tensors]:
            if not isinstance(encoded, str | list | None):
                _refuse(f"{name}.{key}", "encoded tensors", encoded)
    if part.get("image_pil") is not None:  # for programs: no JSON is such a picture
        _refuse(f"{name}.image_pil", "null", part["image_pil"])


def _refuse(name: str, wanted: str, got: object) -> None:
    raise VLLMValidationError(
        f"{name} must be {wanted}, got {type(got).__name__}: {got!r:.60}", parameter=name
    )
