"""Sends a picture again where the engine does not have what the front end thought it has.

Symptom: a picture that was sent before is "Internal server error" for whoever sends it next.
Cause: vLLM's front end notes a picture as sent before the engine has it; a request that is refused
    in between, or whose client goes away, leaves the note.
Change: a request whose first output is such a failure is rendered again with all its data.
Remove when: vLLM notes what the engine has, or asks again by itself.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final

AGAIN: Final = "hiprune_again"
"""Key in a rendered prompt: renders it again, with the data of all its pictures."""


class Resending:
    """vLLM's engine client, which sends a request again where its pictures were not at hand.

    vLLM's front end sends a picture that it has sent before by its hash alone. A request that is
    refused after its pictures were noted as sent (a prompt that is too long, say), or whose client
    goes away right then, leaves a note that is wrong, and the next request for the same picture,
    whoever's it is, would fail with "Internal server error".

    Args:
        client: vLLM's engine client; everything but `generate` stays its own.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(self, prompt: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """vLLM's `generate`, once more with all data where its first output is such a failure."""
        outputs = self._client.generate(prompt, *args, **kwargs)
        again = prompt.get(AGAIN) if isinstance(prompt, dict) else None
        if again is None or not _by_hash_alone(prompt):
            return outputs  # type: ignore[no-any-return]

        async def regenerate() -> AsyncGenerator[Any, None]:
            return self._client.generate(await again(), *args, **kwargs)  # type: ignore[no-any-return]

        return _unless_missing(outputs, regenerate)


def _by_hash_alone(prompt: dict[str, Any]) -> bool:
    """Whether some picture's data is not in the prompt."""
    items = prompt.get("mm_kwargs") or {}
    return any(item is None for of_kind in items.values() for item in of_kind)


def _failed_at_once(output: Any) -> bool:
    finished = output.outputs
    return bool(finished) and all(
        one.finish_reason == "error" and not one.token_ids for one in finished
    )


async def _unless_missing(
    outputs: AsyncGenerator[Any, None],
    regenerate: Callable[[], Awaitable[AsyncGenerator[Any, None]]],
) -> AsyncGenerator[Any, None]:
    try:
        first = True
        async for output in outputs:
            if first and _failed_at_once(output):
                await outputs.aclose()
                outputs = await regenerate()
                break
            first = False
            yield output
        else:
            return
        async for output in outputs:
            yield output
    finally:
        await outputs.aclose()
