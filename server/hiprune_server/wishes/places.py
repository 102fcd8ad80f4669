"""Where in a request a budget may stand; everywhere else its name is refused, not ignored."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from hiprune_vllm.plan import FIELD, PlanError

Path = tuple[str | int, ...]
"""Keys and indices from a body to something in it."""

EACH: Final = None
"""Stands for every index of a list in the paths below."""
OF_NUMBERS: Final = ("/v1/embeddings", "/v2/embed", "/pooling", "/classify")
"""Routes of models that make no text, see `pooling`."""
_WHOLE: Final = (FIELD,)
_OF_PROCESSOR: Final = ("mm_processor_kwargs", FIELD)
"""vLLM's own way, which it refuses by itself where requests are not trusted with it."""
_OF_PARTS: Final = ("messages", EACH, "content", EACH, FIELD)
_OF_MESSAGES: Final = frozenset(
    {_WHOLE, _OF_PARTS, (*_OF_PARTS[:-1], "content", EACH, FIELD), ("system", EACH, FIELD)}
)

PLACES: Final[Mapping[str, frozenset[tuple[str | None, ...]]]] = {
    "/v1/chat/completions": frozenset({_WHOLE, _OF_PARTS, _OF_PROCESSOR}),
    "/v1/responses": frozenset(
        {
            _WHOLE,
            _OF_PROCESSOR,
            ("input", EACH, "content", EACH, FIELD),
            ("input", EACH, "output", EACH, FIELD),
        }
    ),
    "/v1/messages": _OF_MESSAGES,
    "/v1/messages/count_tokens": _OF_MESSAGES,
    "/v1/hiprune/explain": frozenset({_WHOLE}),
    **dict.fromkeys(OF_NUMBERS, frozenset({_WHOLE, _OF_PROCESSOR})),
    # Routes of vLLM's alone, which read no budget but what its own way brings.
    "/v1/chat/completions/batch": frozenset({_OF_PROCESSOR}),
    "/tokenize": frozenset({_OF_PROCESSOR}),
    "/invocations": frozenset({_OF_PROCESSOR}),
}
READ: Final = tuple(route for route, places in PLACES.items() if _WHOLE in places)
"""Routes that read budgets."""


def fault(route: str, body: bytes) -> PlanError | None:
    """What in a body must not be handed on; None where there is nothing or it is no JSON.

    That is a `hiprune` key, however it is written, where no budget is read, and text that no
    tokenizer can take. The body is parsed only where one of them may be in it. Linear in its size.

    Args:
        route: path of the route that the body is for.
        body: as it came, whatever it was declared as.
    """
    if not _may_have_some(body):
        return None
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the route says what is wrong
    if not isinstance(parsed, dict | list | str):
        return None
    allowed = PLACES.get(route, frozenset())
    for chain, text, is_key in _keys_and_texts(parsed):
        if not _encodable(text):
            place = written(path_of(chain)).encode(errors="backslashreplace").decode() or "body"
            return PlanError(
                place, "must be text of whole Unicode characters, got half of a surrogate pair"
            )
        if is_key and _means_a_budget(text):
            path = path_of(chain)
            general = tuple(EACH if isinstance(step, int) else step for step in path)
            if general not in allowed:
                return PlanError(written(path), _advice(route, path, general))
    return None


def unread(route: str, parsed: object) -> str:
    """The first place of a budget in a body that vLLM alone does not read; empty without one.

    It reads what stands in `mm_processor_kwargs`, on routes that have it.
    """
    if not isinstance(parsed, dict | list):
        return ""
    read = {_OF_PROCESSOR} & PLACES.get(route, frozenset())
    for chain, text, is_key in _keys_and_texts(parsed):
        path = path_of(chain) if is_key and _means_a_budget(text) else ()
        if path and path not in read:
            return written(path)
    return ""


def written(path: Path) -> str:
    """A path as errors name it: `messages[0].content[1].hiprune`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def _may_have_some(body: bytes) -> bool:
    """Whether a body may have such a key or such text; never no where it has.

    A letter may be written as an escape (`\\u00..`), half of a pair as another (`\\ud...`) or in
    bytes that begin with `ed`; zeros are those of UTF-16 and UTF-32, which Python reads too.
    """
    if b"\\" in body and any(mark in body for mark in (b"\\u00", b"\\ud", b"\\uD")):
        return True
    return b"\0" in body or b"\xed" in body or b"prune" in body.lower()


def _keys_and_texts(value: Any) -> Iterator[tuple[Any, str, bool]]:
    """Every string that may be at fault: the way to it, itself, and whether it is a key.

    A way is a chain of (the way before, step), to be written out only where it is needed.
    """
    waiting: list[tuple[Any, Any]] = [(None, value)]
    while waiting:
        chain, value = waiting.pop()
        if isinstance(value, str):
            yield chain, value, False
            continue
        keyed = isinstance(value, dict)
        pairs: Any = value.items() if keyed else enumerate(value)
        for step, inner in pairs:
            if keyed and (not step.isascii() or "prune" in step.lower()):
                yield (chain, step), step, True
            if isinstance(inner, dict | list) or (isinstance(inner, str) and not inner.isascii()):
                waiting.append(((chain, step), inner))


def path_of(chain: Any) -> Path:
    """The path that a chain of (the way before, step) stands for; None begins one."""
    steps = []
    while chain is not None:
        chain, step = chain
        steps.append(step)
    return tuple(reversed(steps))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _means_a_budget(key: str) -> bool:
    return "".join(letter for letter in key.casefold() if letter.isalnum()) == FIELD


def _advice(route: str, path: Path, general: tuple[str | None, ...]) -> str:
    """What is wrong with a key at that path, and where it belongs."""
    if path[-1] != FIELD:
        return f"is unknown: the name of a budget is written {FIELD}"
    if route not in READ:
        return (
            f"cannot be served on {route}: send it to {READ[0]}, or leave it out and the server's "
            "default applies"
        )
    if "extra_body" in path:
        return (
            f"has no effect: the OpenAI SDK's argument extra_body is merged into the body, in raw "
            f"JSON {FIELD} stands at the top of the request"
        )
    parent = general[:-1]
    if (*parent[:-1], FIELD) in PLACES[route] and parent[-1:] != (EACH,) and len(parent) > 1:
        kind = "video" if path[-2] == "video_url" else "image"
        return f"must stand in the {kind} part itself, beside {path[-2]}"
    return (
        "must stand in an image part or at the top of the request; no other key may be called so"
        if len(PLACES[route]) > 1
        else "must stand at the top of the request"
    )
