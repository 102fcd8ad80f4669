"""What a client hears where a request is refused before its route has seen it.

Symptom: clients fail to read an error, or to ask again later, where a middleware refused them.
Cause: vLLM's envelopes for errors are made in its routes, which such a request does not get to;
    Anthropic's clients read another one.
Change: one exception with its status, answered in the envelope of the route that was asked for.
Remove when: vLLM answers what middleware raises in the envelope of the route.
"""

from typing import Any, Final

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

RETRY_AFTER_S: Final = 5
"""Seconds after which a client may ask again where there was no room: about one answer's time."""
ANTHROPIC: Final = ("/v1/messages", "/v1/messages/count_tokens")
"""Routes whose clients read Anthropic's errors."""
_KINDS: Final = {
    400: ("BadRequestError", "invalid_request_error"),
    401: ("AuthenticationError", "authentication_error"),
    408: ("RequestTimeoutError", "timeout_error"),
    413: ("BadRequestError", "request_too_large"),
    503: ("ServiceUnavailableError", "overloaded_error"),
}
"""Status -> the error's type as vLLM and as Anthropic name it."""


class Refusal(Exception):
    """An answer in place of the route's.

    Args:
        status: of HTTP, one of 400, 401, 408, 413, 503.
        message: says what must hold, what came, what to do.
        field: of the body, where one is to blame.
        reason: what `hiprune_rejected_requests_total` counts it as; None: it is not counted.
        headers: besides those that every refusal has.
    """

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        *,
        reason: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.field = field
        self.reason = reason
        self.headers = headers or {}

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with it, in the envelope that the route's clients read."""
        ours, anthropics = _KINDS[self.status]
        body: dict[str, Any]
        if route_of(scope) in ANTHROPIC:
            body = {"type": "error", "error": {"type": anthropics, "message": str(self)}}
        else:
            told = {"message": str(self), "type": ours, "param": self.field, "code": self.status}
            body = {"error": told}
        headers = {"connection": "close"}  # what is left of the body is not read
        if self.status == 503:
            headers["retry-after"] = str(RETRY_AFTER_S)
        await JSONResponse(body, self.status, headers=headers | self.headers)(scope, receive, send)


def route_of(scope: Scope) -> str:
    """The path as the router reads it: without `--root-path`, where it begins with that."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(f"{root}/")):
        return path[len(root) :]
    return path
