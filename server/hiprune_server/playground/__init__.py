"""`/playground`: a page to try budgets on, without a build step or outside resources."""

import hashlib
import os
import secrets
from base64 import b64decode
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hiprune_server.demo import SAMPLES

FILES: Final = Path(__file__).parent / "static"
HEADERS: Final = {
    # Scripts and styles come from files alone: nothing that is shown in the page could ever run.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def attach(app: FastAPI) -> None:
    """Adds the page, its files and the sample pictures to the server."""
    app.router.routes.append(Route("/playground", Keyed(_page), methods=["GET"]))
    app.mount("/playground/samples", Keyed(StaticFiles(directory=SAMPLES)))
    app.mount("/playground", Keyed(StaticFiles(directory=FILES)))


async def _page(scope: Scope, receive: Receive, send: Send) -> None:
    await FileResponse(FILES / "index.html")(scope, receive, send)


class Keyed:
    """Lets requests through that bring the API key, where the server has one.

    vLLM asks for the key below /v1 only. A browser that is refused asks its user for a name and a
    password: the password is the key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keys = _keys(scope["app"].state.args)
        given = _given(dict(scope["headers"]).get(b"authorization", b""))
        if keys and not _is_one(given, keys):
            challenge = {"WWW-Authenticate": 'Basic realm="the password is the API key"'}
            refusal = JSONResponse({"error": "Unauthorized"}, 401, headers=challenge)
            await refusal(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, with_headers)


def _keys(args: Any) -> list[str]:
    """What vLLM takes for keys."""
    return [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]


def _given(header: bytes) -> bytes:
    """The key in an Authorization header, empty without one."""
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return value
    try:
        return b64decode(value).partition(b":")[2] if scheme.lower() == b"basic" else b""
    except ValueError:
        return b""


def _is_one(given: bytes, keys: list[str]) -> bool:
    """Whether the key is one of those, in a time that tells nothing about them."""
    digest = hashlib.sha256(given).digest()
    same = [secrets.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    return any(same)
