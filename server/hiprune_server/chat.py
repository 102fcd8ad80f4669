"""Chat completions with a `hiprune` object: vLLM's own handler, asked and answered with a plan."""

import copy
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError

from hiprune_server import metrics
from hiprune_vllm.plan import FIELD, PlanError, PruningPlan


class Pruning(Protocol):
    """What the engine's processor says about pruning (its `PruningInfo`)."""

    default: PruningPlan

    def parse(
        self, value: object, *, name: str = FIELD, for_one_image: bool = False
    ) -> PruningPlan: ...


Images = list[dict[str, Any]]
Presets = Mapping[str, PruningPlan]
"""`detail` of an image -> the operator's plan for it."""

IMAGE_PARTS = ("image_url", "input_image", "image_pil", "image_embeds")
"""Content parts that vLLM reads as an image: their `type`, or a key where that is missing."""


@dataclass(frozen=True)
class Wishes:
    """What a request asked for: whether at all, for all images, and for each of them."""

    asked: bool
    whole: PruningPlan
    of_images: Sequence["ImageWish"]

    def source(self, index: int) -> str:
        """Who decided the budget of an image."""
        wish = self.of_images[index] if index < len(self.of_images) else ImageWish()
        if wish.own is not None and wish.own.has_budget:
            return "image"
        if wish.detail is not None and wish.detail.has_budget:
            return "detail"
        return "request" if self.whole.has_budget else "default"


class ImageWish(NamedTuple):
    """What one image part says: its `hiprune` object, and the preset of its `detail`."""

    own: PruningPlan | None = None
    detail: PruningPlan | None = None

    def over(self, whole: PruningPlan) -> PruningPlan:
        """The image's plan, `whole` deciding what it leaves open."""
        return (self.own or PruningPlan()).over((self.detail or PruningPlan()).over(whole))


def take_image_wishes(
    request: ChatCompletionRequest, pruning: Pruning, presets: Presets
) -> list[ImageWish]:
    """Removes the `hiprune` objects from the request's image parts; one entry an image, in order.

    Raises:
        PlanError: an object or a `detail` is invalid, or stands where it has no effect.
    """
    wishes: list[ImageWish] = []
    for m, message in enumerate(request.messages):
        if not isinstance(message, dict):
            continue
        if FIELD in message:
            raise PlanError(
                f"messages[{m}].{FIELD}", "must stand in an image part or at the top of the request"
            )
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        # Not always a list: it may be an iterator that can be read once (pydantic's).
        parts: list[Any] = []
        for p, part in enumerate(content):
            parts.append(part)
            if not isinstance(part, dict):
                continue
            name = f"messages[{m}].content[{p}].{FIELD}"
            for key in IMAGE_PARTS:
                if isinstance(part.get(key), dict) and FIELD in part[key]:
                    raise PlanError(
                        f"messages[{m}].content[{p}].{key}.{FIELD}",
                        f"must stand in the image part itself, beside {key}",
                    )
            # As vLLM reads it: by its type, or by its keys where that is missing or where it has
            # a uuid.
            kind = part.get("type") if "uuid" not in part else None
            by_key = any(key in part for key in IMAGE_PARTS)
            if not (kind in IMAGE_PARTS or (kind is None and by_key)):
                if FIELD in part:
                    raise PlanError(name, "must stand in an image part, this part is none")
                continue
            preset = _preset(part, f"messages[{m}].content[{p}]", presets)
            if FIELD not in part:
                wishes.append(ImageWish(None, preset))
                continue
            own = pruning.parse(part[FIELD], name=name, for_one_image=True)
            wishes.append(ImageWish(own, preset))
            parts[-1] = {key: value for key, value in part.items() if key != FIELD}
        cast(dict[str, Any], message)["content"] = parts
    return wishes


def _preset(part: dict[str, Any], name: str, presets: Presets) -> PruningPlan | None:
    """What the image's `detail` means to the operator; None for `auto` and for none."""
    inner = part.get("image_url")
    where, place = (inner, f"{name}.image_url") if isinstance(inner, dict) else (part, name)
    detail = where.get("detail")
    if detail is None or detail == "auto" or not presets:  # none: this model cannot be pruned
        return None
    if not isinstance(detail, str) or detail not in presets:
        raise PlanError(
            f"{place}.detail", f"must be one of auto, {', '.join(presets)}, got {detail!r}"[:200]
        )
    return presets[detail]


class PrunedChat(OpenAIServingChat):
    """vLLM's chat handler with the request's plan handed to the multimodal processor.

    Only this handler's own renderer accepts processor options from a request, and only the plan
    that was checked here; the client's own options meet vLLM's refusal as ever.
    """

    _pruning: Pruning
    _presets: Presets
    _trust_request: bool
    _images: ContextVar[Images | None]

    @classmethod
    def around(cls, handler: OpenAIServingChat, pruning: Pruning, presets: Presets) -> "PrunedChat":
        """A pruned copy of vLLM's `handler`, which itself stays as it is."""
        if type(handler) is not OpenAIServingChat:
            raise RuntimeError(
                f"version drift: expected OpenAIServingChat, got {type(handler).__name__}"
            )
        pruned = cls.__new__(cls)
        pruned.__dict__.update(handler.__dict__)
        pruned._pruning = pruning
        pruned._presets = presets
        pruned._trust_request = handler.online_renderer.trust_request_mm_kwargs
        pruned._images = ContextVar("hiprune_images", default=None)
        pruned.online_renderer = copy.copy(handler.online_renderer)
        pruned.online_renderer.trust_request_mm_kwargs = True
        return pruned

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        validate_request_mm_kwargs(
            mm_processor_kwargs=request.mm_processor_kwargs,
            media_io_kwargs=request.media_io_kwargs,
            trust_request_mm_kwargs=self._trust_request,
        )
        try:
            wishes = self._take_wishes(request)
        except PlanError as error:
            metrics.count_rejected(error)
            raise VLLMValidationError(str(error), parameter=error.field) from error
        try:
            result = await super().render_chat_request(request)
        except VLLMValidationError as error:
            if isinstance(error.__cause__, PlanError):  # known only once the pictures are
                metrics.count_rejected(error.__cause__)
            raise
        if not isinstance(result, ErrorResponse):
            _, engine_inputs = result
            reports = [image for inputs in engine_inputs for image in inputs.get(FIELD, ())]
            images = [{**report, "source": wishes.source(i)} for i, report in enumerate(reports)]
            metrics.count_images(images)
            self._images.set(images if images or wishes.asked else None)
        return result

    def _take_wishes(self, request: ChatCompletionRequest) -> "Wishes":
        """Moves every `hiprune` object of the request to the processor options."""
        extra = request.model_extra or {}
        options = request.mm_processor_kwargs or {}
        of_images = take_image_wishes(request, self._pruning, self._presets)
        asked = FIELD in extra or any(wish.own is not None for wish in of_images)
        detailed = any(wish.detail is not None for wish in of_images)
        if asked and FIELD in options:
            raise PlanError(FIELD, "must be given once, got it in mm_processor_kwargs too")
        if not asked and not detailed:
            value = options.get(FIELD, {})
            whole = self._pruning.parse(value) if isinstance(value, dict) and value else None
            return Wishes(False, whole or PruningPlan(), of_images)
        if detailed and FIELD in options:
            raise PlanError(f"mm_processor_kwargs.{FIELD}", "must not meet an image's detail")
        whole = self._pruning.parse(extra[FIELD]) if FIELD in extra else PruningPlan()
        plans = [wish.over(whole) for wish in of_images]
        uniform = all(wish == ImageWish() for wish in of_images)
        request.mm_processor_kwargs = {**options, FIELD: whole if uniform else plans}
        return Wishes(True, whole, of_images)

    async def chat_completion_full_generator(
        self, request: ChatCompletionRequest, outputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        images = self._images.get()
        if images:
            outputs = metrics.timed(outputs, images)
        response = await super().chat_completion_full_generator(request, outputs, *args, **kwargs)
        if isinstance(response, ChatCompletionResponse) and images is not None:
            setattr(response, FIELD, {"images": images})
        return response

    def chat_completion_stream_generator(
        self, request: ChatCompletionRequest, outputs: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        # Read here, in the request's own context: the stream may be consumed in another one.
        images = self._images.get()
        if images:
            outputs = metrics.timed(outputs, images)
        chunks = super().chat_completion_stream_generator(request, outputs, *args, **kwargs)
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
