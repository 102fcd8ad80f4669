"""Chat completions with a `hiprune` object: vLLM's own handler, asked and answered with a plan."""

import copy
import json
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any, Protocol

from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError

from hiprune_vllm.plan import FIELD, PlanError, PruningPlan


class Pruning(Protocol):
    """What the engine's processor says about pruning (its `PruningInfo`)."""

    default: PruningPlan

    def parse(self, value: object) -> PruningPlan: ...


Images = list[dict[str, Any]]


class PrunedChat(OpenAIServingChat):
    """vLLM's chat handler with the request's plan handed to the multimodal processor.

    Only this handler's own renderer accepts processor options from a request, and only the plan
    that was checked here; the client's own options meet vLLM's refusal as ever.
    """

    _pruning: Pruning
    _trust_request: bool
    _images: ContextVar[Images | None]

    @classmethod
    def around(cls, handler: OpenAIServingChat, pruning: Pruning) -> "PrunedChat":
        """A pruned copy of vLLM's `handler`, which itself stays as it is."""
        if type(handler) is not OpenAIServingChat:
            raise RuntimeError(
                f"version drift: expected OpenAIServingChat, got {type(handler).__name__}"
            )
        pruned = cls.__new__(cls)
        pruned.__dict__.update(handler.__dict__)
        pruned._pruning = pruning
        pruned._trust_request = handler.online_renderer.trust_request_mm_kwargs
        pruned._images = ContextVar("hiprune_images", default=None)
        pruned.online_renderer = copy.copy(handler.online_renderer)
        pruned.online_renderer.trust_request_mm_kwargs = True
        return pruned

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        source = self._take_plan(request)
        result = await super().render_chat_request(request)
        if not isinstance(result, ErrorResponse):
            _, engine_inputs = result
            images = [
                {**image, "source": source}
                for engine_input in engine_inputs
                for image in engine_input.get(FIELD, ())
            ]
            asked = FIELD in (request.model_extra or {})
            self._images.set(images if images or asked else None)
        return result

    def _take_plan(self, request: ChatCompletionRequest) -> str:
        """Moves the request's plan to the processor options; returns where its budget is from."""
        validate_request_mm_kwargs(
            mm_processor_kwargs=request.mm_processor_kwargs,
            media_io_kwargs=request.media_io_kwargs,
            trust_request_mm_kwargs=self._trust_request,
        )
        extra = request.model_extra or {}
        options = request.mm_processor_kwargs or {}
        if FIELD not in extra:
            plan = self._parse(options[FIELD]) if FIELD in options else PruningPlan()
        elif FIELD in options:
            raise VLLMValidationError(
                f"{FIELD} must be given once, got it in mm_processor_kwargs too", parameter=FIELD
            )
        else:
            plan = self._parse(extra[FIELD])
            request.mm_processor_kwargs = {**options, FIELD: plan.to_dict()}
        return "request" if plan.has_budget else "default"

    def _parse(self, value: object) -> PruningPlan:
        try:
            return self._pruning.parse(value)
        except PlanError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from error

    async def chat_completion_full_generator(
        self, request: ChatCompletionRequest, *args: Any, **kwargs: Any
    ) -> Any:
        response = await super().chat_completion_full_generator(request, *args, **kwargs)
        images = self._images.get()
        if isinstance(response, ChatCompletionResponse) and images is not None:
            setattr(response, FIELD, {"images": images})
        return response

    def chat_completion_stream_generator(
        self, request: ChatCompletionRequest, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        # Read here, in the request's own context: the stream may be consumed in another one.
        images = self._images.get()
        chunks = super().chat_completion_stream_generator(request, *args, **kwargs)
        return chunks if images is None else _with_images(chunks, images)


async def _with_images(
    chunks: AsyncGenerator[str, None], images: Images
) -> AsyncGenerator[str, None]:
    """Adds `hiprune` to the first chunk of a stream, unless that is an error."""
    try:
        async for first in chunks:
            yield _add_to_event(first, images)
            break
        async for chunk in chunks:
            yield chunk
    finally:
        await chunks.aclose()


def _add_to_event(event: str, images: Images) -> str:
    prefix = "data: "
    try:
        body = json.loads(event.removeprefix(prefix))
    except json.JSONDecodeError:
        return event
    if not isinstance(body, dict) or "choices" not in body:
        return event
    body[FIELD] = {"images": images}
    return f"{prefix}{json.dumps(body, separators=(',', ':'), ensure_ascii=False)}\n\n"
