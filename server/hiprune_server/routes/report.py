"""What an answer says of its pictures: the `hiprune` report, and their share of the prompt."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from vllm.entrypoints.serve.engine.protocol import PromptTokenUsageInfo

from hiprune_vllm.plan import FIELD

Item = dict[str, Any]
Images = list[Item]

MEDIA: Final = {"image_tokens": ("image", "vision_chunk"), "video_tokens": ("video",)}
"""Names among the details of a prompt's tokens -> what vLLM calls such items."""


@dataclass(frozen=True)
class Report:
    """What is known of a request once it is rendered.

    Attributes:
        images: of the `hiprune` object; None where the request has no images and asked nothing.
        media: tokens of the prompt that are pictures and videos, as they are kept.
        videos: of the `hiprune` object, where some are pruned.
    """

    images: Images | None
    media: Mapping[str, int]
    videos: Sequence[Item] = ()

    @property
    def told(self) -> Item:
        """The `hiprune` object of the answer."""
        return {"images": self.images} | ({"videos": [*self.videos]} if self.videos else {})

    @property
    def items(self) -> Images:
        """Pictures and videos, for whoever counts."""
        return [*(self.images or ()), *self.videos]

    def on_usage(self, usage: Any) -> None:
        """Adds the details to the usage of a chat or a Responses answer (vLLM's models)."""
        if usage is None:
            return
        details = getattr(usage, "input_tokens_details", None)
        if details is None:
            details = usage.prompt_tokens_details = (
                usage.prompt_tokens_details or PromptTokenUsageInfo()
            )
        for name, count in self.media.items():
            setattr(details, name, count)

    def on_response(self, response: Any) -> None:
        """Adds all to an answer (vLLM's models)."""
        if self.images is not None:
            setattr(response, FIELD, self.told)
        self.on_usage(response.usage)

    def in_usage(self, usage: Item) -> None:
        """Adds the details to a usage as JSON has it."""
        known = usage.get("prompt_tokens_details") or {}
        usage["prompt_tokens_details"] = {**known, **self.media}


report_of: ContextVar[Report | None] = ContextVar("hiprune_report", default=None)
"""The report of the request at hand, once it is rendered."""


def media_tokens(inputs: Any) -> dict[str, int]:
    """Tokens of a rendered prompt that stand for its pictures and its videos."""
    places = inputs.get("mm_placeholders") or {}
    return {
        name: sum(place.get_num_embeds() for kind in kinds for place in places.get(kind, ()))
        for name, kinds in MEDIA.items()
    }


async def on_events(
    events: AsyncGenerator[str, None], report: Report, *, within: str | None
) -> AsyncGenerator[str, None]:
    """Adds a report to a stream: `hiprune` to its first event, the details to every usage.

    Args:
        events: of the stream.
        within: name of the object in the first event that is the answer; None: the event itself.
    """
    first = True
    try:
        async for event in events:
            # In a text the quotation marks would be escaped.
            told = (first and report.images is not None) or '"usage":{' in event
            yield _on_event(event, report, within, first) if told else event
            first = False
    finally:
        await events.aclose()


def _on_event(event: str, report: Report, within: str | None, first: bool) -> str:
    """The event with a report; unchanged where it is an error or none of JSON."""
    head, prefix, text = event.partition("data: ")
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        return event
    if not isinstance(body, dict):
        return event
    if first and ("choices" if within is None else within) in body and report.images is not None:
        (body if within is None else body[within])[FIELD] = report.told
    for place in (body, body.get(within) if within is not None else None):
        if isinstance(place, dict) and isinstance(place.get("usage"), dict):
            report.in_usage(place["usage"])
    return f"{head}{prefix}{json.dumps(body, separators=(',', ':'), ensure_ascii=False)}\n\n"


async def on_responses(
    events: AsyncGenerator[Any, None], report: Report
) -> AsyncGenerator[Any, None]:
    """Adds a report to every event that has the response as a whole."""
    try:
        async for event in events:
            response = getattr(event, "response", None)
            if response is not None:
                report.on_response(response)
            yield event
    finally:
        await events.aclose()
