"""Puts the budget of a request on its trace.

Symptom: a trace (`--otlp-traces-endpoint`) has the tokens of a prompt, and not what they were
    before, nor why they are fewer.
Cause: vLLM makes the span of a request from what its engine knows, when the request ends.
Change: the span of a request with pictures has `hiprune.tokens_full`, `hiprune.tokens_kept`,
    `hiprune.method` and `hiprune.source`, one of each a picture.
Remove when: vLLM's handlers can add attributes to the span.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import wraps
from typing import Final

from vllm.tracing import SpanAttributes
from vllm.v1.engine import output_processor

Images = Sequence[Mapping[str, object]]

_UNDER_WAY: Final[dict[str, Images]] = {}
"""Pictures of the requests that the engine has at the moment, by the id in their span."""


_GENERATE: Final = "generate"


class Traced:
    """vLLM's engine client, which remembers what is reported of a request while it runs.

    Args:
        client: vLLM's engine client; everything but `generate` stays its own.
        images: those of the request at hand, as its answer reports them; None or empty without.
    """

    def __init__(self, client: object, images: Callable[[], Images | None]) -> None:
        self._client = client
        self._images = images

    def __getattr__(self, name: str) -> object:
        return getattr(self._client, name)

    def generate(
        self,
        prompt: object,
        sampling_params: object,
        request_id: str,
        *args: object,
        **kwargs: object,
    ) -> AsyncGenerator[object, None]:
        outputs = getattr(self._client, _GENERATE)(
            prompt, sampling_params, request_id, *args, **kwargs
        )
        images = self._images()
        return _noted(outputs, request_id, images) if images else outputs


async def _noted(
    outputs: AsyncGenerator[object, None], request_id: str, images: Images
) -> AsyncGenerator[object, None]:
    _UNDER_WAY[request_id] = images
    try:
        async for output in outputs:
            yield output
    finally:
        del _UNDER_WAY[request_id]
        await outputs.aclose()


def attributes(images: Images) -> dict[str, list[object]]:
    """What a span says of pictures, one value a picture."""
    return {
        f"hiprune.{name}": [image[name] for image in images]
        for name in ("tokens_full", "tokens_kept", "method", "source")
    }


def put_budgets_on_spans() -> None:
    """Patches vLLM, as this module says. Idempotent."""
    original = output_processor.instrument_manual
    if hasattr(original, "of_vllm"):
        return

    @wraps(original)
    def instrument(*args: object, **kwargs: object) -> object:
        given = kwargs.get("attributes")
        given = given if isinstance(given, dict) else {}
        images = _UNDER_WAY.get(given.get(SpanAttributes.GEN_AI_REQUEST_ID, ""))
        if images:
            kwargs["attributes"] = {**given, **attributes(images)}
        return original(*args, **kwargs)

    instrument.of_vllm = original  # type: ignore[attr-defined]
    output_processor.instrument_manual = instrument
