"""`/playground`: a page to try budgets on, without a build step or outside resources."""

from pathlib import Path
from typing import Final

from fastapi import FastAPI
from fastapi.responses import FileResponse
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
    app.router.routes.append(Route("/playground", Sealed(_page), methods=["GET"]))
    app.mount("/playground/samples", Sealed(StaticFiles(directory=SAMPLES)))
    app.mount("/playground", Sealed(StaticFiles(directory=FILES)))


async def _page(scope: Scope, receive: Receive, send: Send) -> None:
    await FileResponse(FILES / "index.html")(scope, receive, send)


class Sealed:
    """Adds the headers that keep a page to its own scripts and files."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, with_headers)
