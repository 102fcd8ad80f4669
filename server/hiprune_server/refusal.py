"""Routes that read no budget refuse one: nothing that a client asks for is ignored."""

import json
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hiprune_vllm.plan import FIELD

CARRIES = "/v1/chat/completions"
_MARK = f'"{FIELD}"'.encode()


class RefuseBudgets:
    """ASGI middleware: HTTP 400 where a JSON body has a `hiprune` field that nothing will read.

    The body is read whole before the route sees it, and parsed only where the word is in it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or scope["path"].removeprefix(scope.get("root_path", "")) == CARRIES
            or not _is_json(scope)
        ):
            await self._app(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        path = find(bytes(body))
        if path is not None:
            await _refuse(path, scope["path"], send)
            return
        unread = True

        async def again() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            return await receive()

        await self._app(scope, again, send)


def find(body: bytes) -> str | None:
    """Where in a request a budget stands; None where there is none or it is no JSON."""
    if _MARK not in body:
        return None
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the route says what is wrong
    return next(_places(found, ""), None)


def _places(value: Any, path: str) -> Iterator[str]:
    """Paths of `hiprune` keys at the top, in messages and in their parts."""
    if not isinstance(value, dict):
        return
    if FIELD in value:
        yield f"{path}{FIELD}"
    for key in ("messages", "input", "content"):
        items = value.get(key)
        for i, item in enumerate(items if isinstance(items, list) else ()):
            yield from _places(item, f"{path}{key}[{i}].")


def _is_json(scope: Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return any(b"json" in kind.lower() for kind in kinds)


async def _refuse(field: str, route: str, send: Send) -> None:
    error = {
        "message": f"{field} cannot be served on {route}: send it to {CARRIES}, or leave it out "
        "and the server's default applies",
        "type": "BadRequestError",
        "param": field,
        "code": 400,
    }
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
