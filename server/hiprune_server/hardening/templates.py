"""Why pictures of a request have no place in its prompt.

Symptom: pictures in some roles fail with an error that no client can act on, or change places.
Cause: chat templates leave pictures out of roles that they have none for, and vLLM puts what a
    developer says before everything else.
Change: the refusal names the role whose pictures are left out, and an order that would change is
    refused.
Remove when: vLLM says which pictures a template has left out, and keeps their order.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from vllm.exceptions import VLLMValidationError

from hiprune_server.wishes.messages import is_picture
from hiprune_vllm.plan import PicturesLeftOut

TRIED: Final = 5
"""Roles of one request that are tried; no API has more, but a client may name others."""


def check_order(messages: Sequence[Any], field: str) -> None:
    """Refuses pictures of a developer's behind those of others.

    For templates that do not know that role vLLM puts what it says before everything else, and the
    pictures would change places.

    Raises:
        VLLMValidationError: names the message.
    """
    others = False
    for m, message in enumerate(messages):
        has_pictures = bool(_pictures(message))
        if message.get("role") != "developer":
            others = others or has_pictures
        elif others and has_pictures:
            raise VLLMValidationError(
                f"{field}[{m}] must not have pictures: those in developer messages must come "
                "before all others",
                parameter=f"{field}[{m}]",
            )


async def left_out(
    renderer: Any, request: Any, messages: Sequence[Any], cause: PicturesLeftOut
) -> VLLMValidationError:
    """The refusal of such a request: a chat template leaves them out, or the prompt was cut.

    The messages are put through the template again without the pictures of one role at a time,
    nothing is loaded for that.

    Args:
        renderer: vLLM's online renderer.
        request: as vLLM has it.
        messages: chat messages, their content is text, a list or missing.
        cause: what the processor found.
    """
    params = request.build_chat_params(
        renderer.chat_template, renderer.chat_template_content_format
    ).with_defaults(renderer.default_chat_template_kwargs | {"tokenize": False})
    placeholder = renderer.renderer.get_tokenizer().decode(cause.placeholder)

    async def places(without: str | None) -> int:
        shown = _unloaded(messages, without)
        _, prompt = await renderer.renderer.render_messages_async(shown, params)
        text: str = prompt["prompt"]
        return text.count(placeholder)

    pictures = Counter(str(m.get("role")) for m in messages for _ in _pictures(m))
    all_places = await places(None)
    for role, number in list(pictures.items())[:TRIED]:
        if all_places - await places(role) < number:
            field = "input" if hasattr(request, "input") else "messages"
            return VLLMValidationError(
                f"{field} must have pictures where the model takes them: its chat template leaves "
                f"out pictures in {role} messages",
                parameter=field,
            )
    limit = getattr(request, "truncate_prompt_tokens", None)
    if limit is not None:
        return VLLMValidationError(
            f"truncate_prompt_tokens must leave the pictures of the prompt in it, {limit} cuts "
            "some off",
            parameter="truncate_prompt_tokens",
        )
    return VLLMValidationError(str(cause), parameter=cause.field)


def _pictures(message: dict[str, Any]) -> list[Any]:
    content = message.get("content")
    return [part for part in content if is_picture(part)] if isinstance(content, list) else []


def _unloaded(messages: Sequence[Any], without: str | None) -> list[Any]:
    """The messages with empty pictures, and with none in those of the role `without`."""
    empty = {"type": "image_url", "image_url": None, "uuid": "-"}
    shown = []
    for message in messages:
        shown.append(message)
        if _pictures(message):
            dropped = message.get("role") == without
            content = [
                empty if is_picture(part) else part
                for part in message["content"]
                if not (dropped and is_picture(part))
            ]
            shown[-1] = {**message, "content": content}
    return shown
