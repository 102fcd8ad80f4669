"""vLLM's own handlers of three APIs, with a plan and a report of what was kept."""

from collections.abc import AsyncGenerator
from typing import Any

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicUsage
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError

from hiprune_server.hardening.answers import blamed_on_the_grammar, spoken
from hiprune_server.hardening.resending import Resending
from hiprune_server.hardening.stumbling import blamed_on_the_request
from hiprune_server.hardening.tracing import Traced, put_budgets_on_spans
from hiprune_server.operations import metrics
from hiprune_server.routes.rendering import PrunedRenderer
from hiprune_server.routes.report import Images, Report, on_events, on_responses, report_of
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
    if handler.engine_client.vllm_config.observability_config.otlp_traces_endpoint:
        put_budgets_on_spans()
        copied.engine_client = Traced(copied.engine_client, _reported)
    return copied


def _reported() -> Images | None:
    """The pictures of the request at hand, as its answer reports them."""
    report = report_of.get()
    return None if report is None else report.items


def answered(outputs: Any) -> tuple[Any, Report | None]:
    """Counts a request whose answer begins.

    Returns:
        The engine's outputs, their first token timed, and what the answer reports.
    """
    # Read here, in the request's own context: a stream may be consumed in another one.
    report = report_of.get()
    if report is None or not report.items:
        return outputs, report
    metrics.count_items(report.items)
    return metrics.timed(outputs, report.items), report


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
        outputs, report = answered(outputs)
        with blamed_on_the_grammar(request):
            response = await super().chat_completion_full_generator(
                request, outputs, request_id, model_name, spoken(conversation), *args, **kwargs
            )
        if isinstance(response, ChatCompletionResponse) and report is not None:
            report.on_response(response)
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
        outputs, report = answered(outputs)
        chunks = super().chat_completion_stream_generator(
            request, outputs, request_id, model_name, spoken(conversation), *args, **kwargs
        )
        return chunks if report is None else on_events(chunks, report, within=None)


class PrunedResponses(OpenAIServingResponses):
    """`/v1/responses`."""

    async def responses_full_generator(
        self, request: Any, sampling_params: Any, outputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        report = None
        if not request.stream:  # a stream's own answer gets its report as an event
            outputs, report = answered(outputs)
        with blamed_on_the_grammar(request):
            response = await super().responses_full_generator(
                request, sampling_params, outputs, *args, **kwargs
            )
        if isinstance(response, ResponsesResponse) and report is not None:
            report.on_response(response)
        return response

    def responses_stream_generator(
        self, request: Any, sampling_params: Any, outputs: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        outputs, report = answered(outputs)
        events = super().responses_stream_generator(
            request, sampling_params, outputs, *args, **kwargs
        )
        return events if report is None else on_responses(events, report)


class PrunedUsage(AnthropicUsage):
    """A usage of `/v1/messages`."""

    prompt_tokens_details: dict[str, int]


class PrunedMessagesResponse(AnthropicMessagesResponse):
    """An answer of `/v1/messages`."""

    usage: PrunedUsage
    hiprune: dict[str, Any] | None = None


class PrunedMessages(PrunedChat, AnthropicServingMessages):
    """`/v1/messages` and `/v1/messages/count_tokens`: vLLM makes a chat request of each."""

    async def create_messages(self, request: Any, raw_request: Any = None) -> Any:
        try:
            return await super().create_messages(request, raw_request)
        except GracefulHTTPError as error:  # a full queue: the route would log a traceback of each
            return create_error_response(error)

    @classmethod
    def to_chat_completion_request(cls, request: Any, **kwargs: Any) -> Any:
        with blamed_on_the_request("messages"):
            chat = super().to_chat_completion_request(request, **kwargs)
        if FIELD in request.model_fields_set:
            setattr(chat, FIELD, request.hiprune)
        return chat

    def messages_full_converter(self, response: Any) -> Any:
        answer, report = super().messages_full_converter(response), report_of.get()
        if report is None:
            return answer
        usage = PrunedUsage(**dict(answer.usage), prompt_tokens_details=dict(report.media))
        told = PrunedMessagesResponse.model_construct(**answer.__dict__ | {"usage": usage})
        if report.images is not None:
            told.hiprune = report.told
        return told

    def message_stream_converter(
        self, chunks: AsyncGenerator[str, None]
    ) -> AsyncGenerator[str, None]:
        events, report = super().message_stream_converter(chunks), report_of.get()
        return events if report is None else on_events(events, report, within="message")
