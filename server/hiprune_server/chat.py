"""Answers that say what was kept: vLLM's own handlers of three APIs, with a plan and a report."""

import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.exceptions import GenerationError, VLLMValidationError

from hiprune_server import metrics
from hiprune_server.rendering import (
    Images,
    PrunedRenderer,
    blamed_on_the_request,
    images_kept,
)
from hiprune_server.resending import Resending
from hiprune_vllm.plan import FIELD


def pruned(handler: Any, plain: Any, cls: Any, renderer: PrunedRenderer) -> Any:
    """A copy of vLLM's `handler` of class `plain` as a `cls` that renders with `renderer`."""
    if type(handler) is not plain:
        raise RuntimeError(
            f"version drift: expected {plain.__name__}, got {type(handler).__name__}"
        )
    copied: Any = cls.__new__(cls)
    copied.__dict__.update(handler.__dict__)
    copied.online_renderer = renderer
    copied.engine_client = Resending(handler.engine_client)
    return copied


def answered(outputs: Any) -> tuple[Any, Images | None]:
    """Counts a request whose answer begins.

    Returns:
        The engine's outputs, their first token timed, and what the answer reports.
    """
    # Read here, in the request's own context: a stream may be consumed in another one.
    images = images_kept.get()
    if not images:
        return outputs, images
    metrics.count_images(images)
    return metrics.timed(outputs, images), images


@contextmanager
def blamed_on_the_grammar(request: Any) -> Iterator[None]:
    """Makes a 400 of an answer that failed where the request says what form it must have.

    A grammar may be one that no text of this model's vocabulary fulfils, or that cannot be
    compiled; vLLM tells both from the engine, as "Internal server error".
    """
    try:
        yield
    except GenerationError as error:
        for field in ("structured_outputs", "response_format", "text", "tools"):
            if getattr(request, field, None):
                raise VLLMValidationError(
                    f"{field} must be a form that this model can answer in, "
                    "got one that ended the answer with an error",
                    parameter=field,
                ) from error
        raise


def spoken(conversation: Sequence[Any]) -> list[Any]:
    """A conversation whose last message is text alone, which vLLM needs where it is echoed.

    It joins the texts of all its parts, as if there were no other kinds, and puts the list of them
    into a stream where text belongs.
    """
    *before, last = conversation or [{}]
    content = last.get("content")
    if not isinstance(content, list):
        return list(conversation)
    texts = [part["text"] for part in content if isinstance(part, dict) and "text" in part]
    return [*before, {**last, "content": "\n".join(texts)}]


class PrunedChat(OpenAIServingChat):
    """`/v1/chat/completions`."""

    def _get_message_types(self, request: Any) -> set[str]:
        with blamed_on_the_request("messages"):
            return super()._get_message_types(request)

    async def chat_completion_full_generator(
        self,
        request: Any,
        outputs: Any,
        request_id: str,
        model_name: str,
        conversation: list[Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        outputs, images = answered(outputs)
        with blamed_on_the_grammar(request):
            response = await super().chat_completion_full_generator(
                request, outputs, request_id, model_name, spoken(conversation), *args, **kwargs
            )
        if isinstance(response, ChatCompletionResponse) and images is not None:
            setattr(response, FIELD, {"images": images})
        return response

    def chat_completion_stream_generator(
        self,
        request: Any,
        outputs: Any,
        request_id: str,
        model_name: str,
        conversation: list[Any],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        outputs, images = answered(outputs)
        chunks = super().chat_completion_stream_generator(
            request, outputs, request_id, model_name, spoken(conversation), *args, **kwargs
        )
        return chunks if images is None else _on_first(chunks, images, within=None)


class PrunedResponses(OpenAIServingResponses):
    """`/v1/responses`."""

    async def responses_full_generator(
        self, request: Any, sampling_params: Any, outputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        images = None
        if not request.stream:  # a stream's own answer gets its report as an event
            outputs, images = answered(outputs)
        with blamed_on_the_grammar(request):
            response = await super().responses_full_generator(
                request, sampling_params, outputs, *args, **kwargs
            )
        if isinstance(response, ResponsesResponse) and images is not None:
            setattr(response, FIELD, {"images": images})
        return response

    def responses_stream_generator(
        self, request: Any, sampling_params: Any, outputs: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        outputs, images = answered(outputs)
        events = super().responses_stream_generator(
            request, sampling_params, outputs, *args, **kwargs
        )
        return events if images is None else _on_responses(events, images)


class PrunedMessagesResponse(AnthropicMessagesResponse):
    """An answer of `/v1/messages`."""

    hiprune: dict[str, Any] | None = None


class PrunedMessages(PrunedChat, AnthropicServingMessages):
    """`/v1/messages` and `/v1/messages/count_tokens`: vLLM makes a chat request of each."""

    @classmethod
    def to_chat_completion_request(cls, request: Any, **kwargs: Any) -> Any:
        with blamed_on_the_request("messages"):
            chat = super().to_chat_completion_request(request, **kwargs)
        if FIELD in request.model_fields_set:
            setattr(chat, FIELD, request.hiprune)
        return chat

    def messages_full_converter(self, response: Any) -> Any:
        answer = super().messages_full_converter(response)
        images = images_kept.get()
        if images is None:
            return answer
        return PrunedMessagesResponse.model_construct(
            **answer.__dict__, **{FIELD: {"images": images}}
        )

    def message_stream_converter(
        self, chunks: AsyncGenerator[str, None]
    ) -> AsyncGenerator[str, None]:
        events = super().message_stream_converter(chunks)
        images = images_kept.get()
        return events if images is None else _on_first(events, images, within="message")


async def _on_first(
    events: AsyncGenerator[str, None], images: Images, *, within: str | None
) -> AsyncGenerator[str, None]:
    """Adds `hiprune` to the first event of a stream (`within` an object in it)."""
    try:
        async for first in events:
            yield _add_to_event(first, images, within)
            break
        async for event in events:
            yield event
    finally:
        await events.aclose()


async def _on_responses(
    events: AsyncGenerator[Any, None], images: Images
) -> AsyncGenerator[Any, None]:
    """Adds `hiprune` to every event that has the response as a whole."""
    try:
        async for event in events:
            response = getattr(event, "response", None)
            if response is not None:
                setattr(response, FIELD, {"images": images})
            yield event
    finally:
        await events.aclose()


def _add_to_event(event: str, images: Images, within: str | None) -> str:
    """The event with a report; unchanged where it is an error."""
    head, prefix, text = event.partition("data: ")
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        return event
    if not isinstance(body, dict) or ("choices" if within is None else within) not in body:
        return event
    place = cast(dict[str, Any], body if within is None else body[within])
    place[FIELD] = {"images": images}
    return f"{head}{prefix}{json.dumps(body, separators=(',', ':'), ensure_ascii=False)}\n\n"
