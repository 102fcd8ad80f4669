"""What stands before every route: a server that stops, its key, bodies, budgets nobody reads.

Symptom: a request that will be refused has its whole body read first; a budget on a route that
    does not know it is ignored; a server that is stopping takes new requests and drops them.
Cause: vLLM's routes read the body before anything else, and its models drop unknown fields.
Change: one middleware outside of all others, which asks in the order of what costs least.
Remove when: vLLM's routes know `hiprune`, check keys and sizes before bodies, and drain.
"""

import re
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hiprune_server.hardening.auth import METRICS, Keys
from hiprune_server.hardening.bodies import Bodies, BodyLimits, ClientGone, content_length, header
from hiprune_server.hardening.overload import ENTRY, Entry
from hiprune_server.hardening.refusals import RETRY_AFTER_S, Refusal, route_of
from hiprune_server.operations.metrics import OTHER, REJECTED, ROUTE
from hiprune_server.wishes.places import READ, fault

STOPPING: Final = "hiprune_stopping"
"""In the application's state: an event that is set once the server is told to stop."""
_BEGINS_AS_JSON: Final = re.compile(rb"(\xef\xbb\xbf)?\s*[\[{]")


class Guard:
    """ASGI middleware: nothing reaches a route that may not, and no body is read before it must.

    In this order:

    1. A server that was told to stop refuses what is new (503, `/health` too), so that clients and
       load balancers go elsewhere while requests under way finish.
    2. A request without a key is a 401.
    3. The router says 404 or 405; the body of such a request is never read.
    4. A body is read when its route asks for it, within the limits of `Bodies`.
    5. A `hiprune` field where nothing will read it is a 400: nothing that a client asks for is
       ignored. So is text that is none (see `places.fault`).

    Args:
        keys: what the server asks for.
        limits: of bodies.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, limits: BodyLimits) -> None:
        self._app = app
        self._keys = keys
        self._bodies = Bodies(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            if _is_stopping(scope) and route_of(scope) != METRICS:
                told = "the server is stopping and takes no new requests: send this one to another"
                raise Refusal(503, told)
            self._keys.check(scope)
        except Refusal as refusal:
            await _answer(refusal, scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return
        request, entry = _Request(scope, receive, send, self._bodies), Entry()
        token = ENTRY.set(entry)
        try:
            await self._app(scope, request.receive, request.send)
        except Exception:
            if request.refusal is None:  # else the route stumbled over a body that it did not get
                raise
        finally:
            ENTRY.reset(token)
            entry.leave()
            self._bodies.release(request.held)
        if request.refusal is not None and not request.answered:
            await _answer(request.refusal, scope, receive, send)


class _Request:
    """One request: its body is read when asked for, a refusal takes the place of its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, bodies: Bodies) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._bodies = bodies
        self._unread = True
        self.held = 0
        self.answered = False
        self.refusal: Refusal | None = None

    async def receive(self) -> Message:
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        if not self._unread:
            return await self._receive()
        self._unread = False
        try:
            body = await self._bodies.read(self._scope, self._receive)
            self.held = len(body)
            if _is_json(self._scope, body):
                self._bodies.check_shape(body)
                _refuse_faults(route_of(self._scope), body)
        except ClientGone:
            return {"type": "http.disconnect"}
        except Refusal as refusal:
            self.refusal = refusal
            return {"type": "http.disconnect"}  # ends the route: its answer would not be sent
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if self.refusal is not None and not self.answered:
            return  # `Guard` sends the refusal
        if message["type"] == "http.response.start":
            self.answered = True
            message = {
                **message,
                "headers": [*message.get("headers", ()), *self._headers(message)],
            }
        await self._send(message)

    def _headers(self, message: Message) -> list[tuple[bytes, bytes]]:
        """What our server adds to an answer."""
        added = []
        given = {name.lower() for name, _ in message.get("headers", ())}
        if message["status"] == 503 and b"retry-after" not in given:
            added.append((b"retry-after", b"%d" % RETRY_AFTER_S))
        has_body = content_length(self._scope) or header(self._scope, b"transfer-encoding")
        if self._unread and has_body and b"connection" not in given:
            added.append((b"connection", b"close"))  # the body is not read
        return added


async def _answer(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    if refusal.reason is not None:
        REJECTED.labels(refusal.reason).inc()
    await refusal.send(scope, receive, send)


def _refuse_faults(route: str, body: bytes) -> None:
    wrong = fault(route, body)
    if wrong is not None:
        raise Refusal(400, str(wrong), wrong.field, reason=OTHER if route in READ else ROUTE)


def _is_stopping(scope: Scope) -> bool:
    stopping = getattr(scope["app"].state, STOPPING, None)
    return stopping is not None and stopping.is_set()


def _is_json(scope: Scope, body: bytes) -> bool:
    """Whether a body is JSON, or at least begins as if it were, whatever it was declared as."""
    kind = header(scope, b"content-type").lower()
    # FastAPI reads what has no type as JSON, too.
    return not kind or b"json" in kind or _BEGINS_AS_JSON.match(body) is not None
