"""Request models of the routes that read budgets: vLLM's own, with odd fields refused by name."""

from collections.abc import Iterator
from typing import Any, Final

from pydantic import BaseModel, Field, PrivateAttr, ValidatorFunctionWrapHandler, model_validator
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError

from hiprune_server.rendering import STUMBLES, pictures_sent, refused
from hiprune_server.wishes import tag
from hiprune_vllm.plan import PlanError

INTEGERS: Final = range(-(2**63), 2**64)
"""What the way to the engine can carry."""


class _Readable(BaseModel):
    """Mixin: makes a 400 that names the field of what vLLM's own checks stumble over.

    They look into a body before its types are known; without this an odd one is a 500.
    """

    @model_validator(mode="wrap")
    @classmethod
    def read(cls, body: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        for path, number in _large_integers(body):
            raise VLLMValidationError(
                f"{path} must be in [{INTEGERS[0]}, {INTEGERS[-1]}], got a number of "
                f"{len(f'{number:x}')} hexadecimal digits",
                parameter=path,
            )
        try:
            return handler(body)
        except STUMBLES as error:
            field = _stumbling_block(body, handler)
            raise VLLMValidationError(
                f"{field} must be what the API has there, got something that cannot be read",
                parameter=field,
            ) from error


def _large_integers(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _large_integers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _large_integers(inner, f"{path}[{i}]")
    elif isinstance(value, int) and value not in INTEGERS:
        yield path, value


def _stumbling_block(body: Any, handler: ValidatorFunctionWrapHandler) -> str:
    """The field without which the body could at least be checked."""
    for field in body if isinstance(body, dict) else ():
        try:
            handler({key: value for key, value in body.items() if key != field})
        except STUMBLES:
            continue
        except (ValueError, VLLMValidationError):
            pass
        return str(field)
    return "body"


class _Lifting(_Readable):
    """Mixin for request models that would drop the `hiprune` objects of image parts."""

    hiprune: Any = Field(default=None)
    _misplaced: PlanError | None = PrivateAttr(None)
    _pictures: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def lift(cls, body: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        misplaced, pictures = None, dict[str, str]()
        if isinstance(body, dict):
            try:
                body, pictures = tag(body)
            except PlanError as error:
                misplaced = error
        request = handler(body)
        request._misplaced, request._pictures = misplaced, pictures
        return request

    def check(self) -> None:
        """Raises vLLM's validation error where a `hiprune` object stands in the wrong place.

        Notes which pictures have to arrive where the request is rendered.
        """
        if self._misplaced is not None:
            raise refused(self._misplaced)
        pictures_sent.set(self._pictures)


class PrunedChatRequest(_Readable, ChatCompletionRequest):
    """A request of `/v1/chat/completions`."""


class PrunedResponsesRequest(_Lifting, ResponsesRequest):
    """A request of `/v1/responses`."""


class PrunedMessagesRequest(_Lifting, AnthropicMessagesRequest):
    """A request of `/v1/messages`."""


class PrunedCountTokensRequest(_Lifting, AnthropicCountTokensRequest):
    """A request of `/v1/messages/count_tokens`."""
