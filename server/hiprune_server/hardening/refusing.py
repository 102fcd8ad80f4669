"""Stands in for our routes where vLLM's own server must not load them.

Symptom: a request with a `hiprune` field is answered as if it were without one.
Cause: vLLM drops fields that it does not know.
Change: a budget that nothing reads is a 400.
Remove when: vLLM refuses fields that it does not know.
"""

import argparse
import json

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hiprune_server.hardening.refusals import Refusal, route_of
from hiprune_server.wishes.places import unread


class RefusingPlugin:
    """What vLLM's endpoint-plugin mechanism expects; adds no route.

    Args:
        reason: why nothing here reads a budget.
    """

    name = "hiprune_refusals"
    required_tasks = None

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def attach_router(self, app: FastAPI) -> None:
        app.add_middleware(RefuseBudgets, reason=self._reason)

    async def init_state(
        self, engine_client: object, state: State, args: argparse.Namespace
    ) -> None:
        """Nothing to do: no route asks for anything."""


class RefuseBudgets:
    """ASGI middleware: a body with a `hiprune` field that nothing reads is a 400.

    Bodies are as large as vLLM lets them be.
    """

    def __init__(self, app: ASGIApp, *, reason: str) -> None:
        self._app = app
        self._reason = reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        place = _place(route_of(scope), body)
        if place:
            told = f"{place} cannot be served: {self._reason}"
            await Refusal(400, told, place).send(scope, receive, send)
            return

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, again, send)


def _place(route: str, body: bytes) -> str:
    """Where a body asks for a budget that nothing reads; empty where it does not."""
    if b"prune" not in body.lower() and b"\\u00" not in body and b"\0" not in body:
        return ""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return ""  # the route says what is wrong
    return unread(route, parsed)
