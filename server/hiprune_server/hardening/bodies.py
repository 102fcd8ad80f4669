"""Reading a request's body: how large, how slow, how many at a time, of what shape.

Symptom: a few clients with large, slow or oddly shaped bodies take a server's memory or hold all
    its other requests up.
Cause: neither vLLM nor uvicorn bounds a body's size, its time, or what it takes to check.
Change: limits of each, the operator's `limits.*_body_*` and `limits.max_held_bytes`, which are
    checked while the body comes.
Remove when: vLLM has such limits, also for what all bodies take together.
"""

import asyncio
import json
import re
import time
from dataclasses import dataclass
from typing import Final

from starlette.types import Receive, Scope

from hiprune_server.hardening.refusals import Refusal
from hiprune_server.operations.metrics import BODY, HELD, SHAPE, SLOW

PACE: Final = 64 * 1024
"""Bytes a second that keep a body's place once its first seconds have passed."""
DEPTH: Final = 100
"""Objects and lists that may stand in each other: whoever walks through a body needs a bound."""
WEIGHT: Final = 25
"""Values that an object or a list counts as: what checks them is that much slower."""

_STRUCTURE: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]|[0-9]{40,}+', re.DOTALL)
"""A string as a whole, what opens, parts or closes values, or an integer that is slow to read.

An open string ends the body: a closing quote that must be there would be looked for again from
every quote on.
"""


class ClientGone(Exception):
    """The client went away while its body was read."""


@dataclass(frozen=True)
class BodyLimits:
    """What bodies may take.

    Attributes:
        max_bytes: of one body.
        max_held: bytes of all bodies that this process holds at a time.
        seconds: that a body may take, besides what its bytes take at PACE.
        max_values: of one JSON body; an object or list counts as WEIGHT.
    """

    max_bytes: int
    max_held: int
    seconds: int
    max_values: int


class Bodies:
    """Reads bodies within limits that all requests of this process share."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._held = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """A request's body; `release` gives its room back.

        Raises:
            Refusal: it is too large (413), too slow (408), or there is no room (503).
            ClientGone: there is nobody to answer.
        """
        limits = self._limits
        declared = content_length(scope)
        self._check(declared, declared)
        chunks: list[bytes] = []
        size, more, began = 0, True, time.monotonic()
        try:
            while more:
                left = limits.seconds + size / PACE - (time.monotonic() - began)
                message = await asyncio.wait_for(receive(), max(left, 0.001))
                if message["type"] != "http.request":
                    raise ClientGone
                chunk = message.get("body", b"")
                self._check(size + len(chunk), len(chunk))
                chunks.append(chunk)
                size += len(chunk)
                self._held += len(chunk)
                more = message.get("more_body", False)
        except BaseException as error:
            self.release(size)
            if isinstance(error, TimeoutError):
                told = (
                    f"the body must come within {limits.seconds} seconds (limits.body_seconds) and "
                    f"one more for every {PACE} bytes of it, got {size} bytes: send it faster"
                )
                raise Refusal(408, told, reason=SLOW) from None
            raise
        return b"".join(chunks)

    def release(self, size: int) -> None:
        """Gives back the room of a body of so many bytes."""
        self._held -= size

    def _check(self, size: int, added: int) -> None:
        limits = self._limits
        if size > limits.max_bytes:
            told = f"the body must have at most {limits.max_bytes} bytes (limits.max_body_bytes), "
            raise Refusal(413, told + f"got {size} or more", reason=BODY)
        if self._held + added > limits.max_held:
            told = "this server holds as many bytes of requests as it may: ask again later"
            raise Refusal(503, told, reason=HELD)

    def check_shape(self, body: bytes) -> None:
        """Raises the refusal of JSON of more values than its checks could go through at once.

        Reading stops at the limit, so that it costs no more than the limit does.
        """
        encoding = json.detect_encoding(body)
        if encoding not in ("utf-8", "utf-8-sig"):
            told = f"the body must be JSON in UTF-8, got {encoding}"
            raise Refusal(400, told, reason=SHAPE)
        limit, weight, depth = self._limits.max_values, 0, 0
        if sum(map(body.count, (b",", b"[", b"{"))) <= min(DEPTH, limit // WEIGHT):
            return  # most bodies: text without braces, and base64
        for seen, found in enumerate(_STRUCTURE.finditer(body)):
            sign = found[0]
            if sign == b",":
                weight += 1
            elif sign in (b"[", b"{"):
                weight += WEIGHT
                depth += 1
            elif sign in (b"]", b"}"):
                depth -= 1
            elif sign.isdigit():
                weight += len(sign)  # reading takes time with the square of it, up to 4,300 digits
            if depth > DEPTH:
                told = f"the body must have objects and lists at most {DEPTH} deep, got deeper ones"
                raise Refusal(400, told, reason=SHAPE)
            if weight > limit or seen > 4 * limit:  # so many signs are no JSON of fewer values
                told = f"the body must have at most {limit} values (limits.max_body_values), "
                told += f"an object or list counting as {WEIGHT}, got more"
                raise Refusal(400, told, reason=SHAPE)


def content_length(scope: Scope) -> int:
    """What the request says of its body's size, 0 where it says nothing."""
    text = header(scope, b"content-length")
    return int(text) if text.isdigit() else 0


def header(scope: Scope, name: bytes) -> bytes:
    """The last header of that name, empty without one."""
    values: list[bytes] = [value for one, value in scope["headers"] if one == name]
    return values[-1] if values else b""
