"""Answers that vLLM cannot finish, or not as the API has them.

Symptom: a grammar that the model cannot fulfil is "Internal server error"; an echoed message with
    pictures puts a list where text belongs.
Cause: vLLM hears of either from the engine alone, and joins all parts of a message as if they were
    text.
Change: the first is a 400 that names the field with the grammar; of the second the text is echoed.
Remove when: vLLM says that a grammar has failed, and echoes text alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.exceptions import GenerationError

from hiprune_server.hardening.grammars import FIELDS, unanswerable


@contextmanager
def blamed_on_the_grammar(request: Any) -> Iterator[None]:
    """Makes a 400 of an answer that failed where the request says what form it must have.

    A grammar may be one that no text of this model's vocabulary fulfils, or that cannot be
    compiled; vLLM tells both from the engine, as "Internal server error".
    """
    try:
        yield
    except GenerationError as error:
        for field in FIELDS:
            if getattr(request, field, None):
                raise unanswerable(field) from error
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
