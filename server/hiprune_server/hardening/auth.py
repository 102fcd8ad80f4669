"""Who may ask: the API keys, and the few routes that answer without one.

Symptom: `/invocations` and other routes answer strangers on a server that has a key; clients of
    Anthropic's API are refused with the right one; routes that change the engine are open.
Cause: vLLM asks for its key below some prefixes only, and in one header; it attaches routes for
    elastic expert parallelism unasked.
Change: every path but a few asks for a key, in the headers that its clients send, and routes that
    administer the engine are there only where the operator switched them on.
Remove when: vLLM closes every path that is not named as open.
"""

import argparse
import hashlib
import os
import secrets
from base64 import b64decode
from collections.abc import Iterator, Sequence
from typing import Any, Final

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import Scope
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from hiprune_server.hardening.refusals import ANTHROPIC, Refusal, route_of
from hiprune_server.operations.metrics import KEY

OPEN: Final = ("/health", "/ping")
"""What load balancers ask, without a key; exactly these paths."""
METRICS: Final = "/metrics"
BROWSED: Final = ("/playground", "/docs", "/redoc", "/openapi.json")
"""Pages, and what is below them: a browser brings the key as a password."""
VARIABLE: Final = "VLLM_API_KEY"


class Keys:
    """The keys of a server; without any it is open to everybody.

    vLLM asks for its key below some prefixes only, so that `/invocations` answers strangers. Here
    every path is closed, known or not, but those that are named as open.

    Args:
        keys: each of them opens the server.
        metrics: whether `/metrics` asks for one, too.
    """

    def __init__(self, keys: Sequence[str], *, metrics: bool = False) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._open = OPEN if metrics else (*OPEN, METRICS)

    @classmethod
    def of(cls, args: argparse.Namespace, *, metrics: bool) -> "Keys":
        """What vLLM takes for keys: those of `--api-key`, else that of its variable."""
        given = args.api_key or [os.environ.get(VARIABLE)]
        return cls([key for key in given if key], metrics=metrics)

    def check(self, scope: Scope) -> None:
        """Raises the refusal of a request or a websocket that brings none of the keys."""
        route = route_of(scope)
        if not self._digests or (scope["type"] == "http" and route in self._open):
            return
        if any(self._is_one(key) for key in _given(scope, route)):
            return
        browsed = _is_browsed(route)
        raise Refusal(
            401,
            "this server asks for a key: send one as `Authorization: Bearer KEY`"
            + (" or `x-api-key: KEY`" if route in ANTHROPIC else ""),
            reason=KEY,
            headers={
                "www-authenticate": 'Basic realm="the password is the API key"'
                if browsed
                else "Bearer"
            },
        )

    def _is_one(self, given: bytes) -> bool:
        """Whether it is a key, in a time that tells nothing about them."""
        digest = hashlib.sha256(given).digest()
        # Digests are of one length; how many of the server's keys were looked at may show.
        return any(secrets.compare_digest(digest, one) for one in self._digests)


def _is_browsed(route: str) -> bool:
    return any(route == page or route.startswith(f"{page}/") for page in BROWSED)


def _given(scope: Scope, route: str) -> Iterator[bytes]:
    """The keys that a request brings, as the bytes that came."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                yield key.strip()
            elif scheme.lower() == b"basic" and _is_browsed(route):
                try:
                    yield b64decode(key).partition(b":")[2]
                except ValueError:
                    continue
        elif name == b"x-api-key" and route in ANTHROPIC:
            yield value


def replace_vllms(app: FastAPI) -> None:
    """Takes vLLM's own check out of the stack of middleware once that is complete.

    It stands before ours, and refuses the header that Anthropic's clients send.
    """
    build = app.build_middleware_stack

    def without() -> Any:
        kept: list[Middleware] = [
            one for one in app.user_middleware if one.cls is not AuthenticationMiddleware
        ]
        app.user_middleware[:] = kept
        return build()

    app.build_middleware_stack = without  # type: ignore[method-assign]


ADMINISTRATION: Final = ("/scale_elastic_ep", "/is_scaling_elastic_ep")
"""Routes that change the engine and that vLLM attaches unasked; it asks for switches elsewhere."""


def close_administration(app: FastAPI) -> None:
    """Takes away the routes that administer the engine, unless the operator asked for them.

    Sleep, weight updates, resets, `/collective_rpc` and the like need VLLM_SERVER_DEV_MODE=1,
    profiling `--profiler-config`, adapters VLLM_ALLOW_RUNTIME_LORA_UPDATING: vLLM's own switches.
    Tokens in and out, and aborting by id, answer 403.
    """
    if not app.state.args.enable_elastic_ep:
        app.router.routes[:] = [
            one for one in app.router.routes if getattr(one, "path", None) not in ADMINISTRATION
        ]
