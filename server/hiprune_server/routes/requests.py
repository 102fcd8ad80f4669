"""Request models of the routes that read budgets: vLLM's own, with odd fields refused by name."""

from typing import Any

from pydantic import BaseModel, Field, PrivateAttr, ValidatorFunctionWrapHandler, model_validator
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from hiprune_server.hardening.reading import Readable, first_error_only
from hiprune_server.hardening.stumbling import refused
from hiprune_server.routes.rendering import pictures_sent
from hiprune_server.wishes.messages import tag
from hiprune_vllm.plan import PlanError


class _Lifting(BaseModel):
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


@first_error_only
class PrunedChatRequest(Readable, ChatCompletionRequest):
    """A request of `/v1/chat/completions`."""


@first_error_only
class PrunedResponsesRequest(Readable, _Lifting, ResponsesRequest):
    """A request of `/v1/responses`."""


@first_error_only
class PrunedMessagesRequest(Readable, _Lifting, AnthropicMessagesRequest):
    """A request of `/v1/messages`."""


@first_error_only
class PrunedCountTokensRequest(Readable, _Lifting, AnthropicCountTokensRequest):
    """A request of `/v1/messages/count_tokens`."""
