"""What stands before every route: a server that stops, large bodies, budgets that nobody reads."""

import json
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hiprune_server.metrics import BODY, OTHER, REJECTED, ROUTE
from hiprune_server.places import READ, fault

STOPPING: Final = "hiprune_stopping"
"""In the application's state: an event that is set once the server is told to stop."""


class Guard:
    """ASGI middleware that reads a request's body before its route does.

    Once the server is told to stop, what is new is HTTP 503 (`/health` too), so that clients and
    load balancers go elsewhere while requests under way finish.
    A body above the limit is HTTP 413, and is not read to its end. A `hiprune` field where nothing
    will read it is HTTP 400: nothing that a client asks for is ignored; so is text that is none
    (see `places.fault`).

    Args:
        max_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _is_stopping(scope) and scope["path"] != "/metrics":
            told = "the server is stopping and takes no new requests: send this one to another"
            await _refuse(503, told, None, send, kind="ServiceUnavailableError")
            return
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        body = bytearray()
        more = _length(scope) <= self._max_bytes
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return
            body += message.get("body", b"")
            more = message.get("more_body", False) and len(body) <= self._max_bytes
        size = max(_length(scope), len(body))
        if size > self._max_bytes:
            REJECTED.labels(BODY).inc()
            told = f"the body must have at most {self._max_bytes} bytes (limits.max_body_bytes), "
            await _refuse(413, told + f"got {size} or more", None, send)
            return
        route = scope["path"].removeprefix(scope.get("root_path", ""))
        wrong = fault(route, bytes(body))
        if wrong is not None:
            REJECTED.labels(OTHER if route in READ else ROUTE).inc()
            await _refuse(400, str(wrong), wrong.field, send)
            return
        unread = True

        async def again() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            return await receive()

        await self._app(scope, again, send)


def _is_stopping(scope: Scope) -> bool:
    stopping = getattr(scope["app"].state, STOPPING, None)
    return stopping is not None and stopping.is_set()


def _header(scope: Scope, name: bytes) -> bytes:
    values: list[bytes] = [value for one, value in scope["headers"] if one == name]
    return values[-1] if values else b""


def _length(scope: Scope) -> int:
    """What the request says of its body's size, 0 where it says nothing."""
    text = _header(scope, b"content-length")
    return int(text) if text.isdigit() else 0


async def _refuse(
    status: int, message: str, field: str | None, send: Send, *, kind: str = "BadRequestError"
) -> None:
    error = {"message": message, "type": kind, "param": field, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),  # what is left of the body is not read
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
