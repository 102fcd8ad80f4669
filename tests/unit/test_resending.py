import asyncio
from types import SimpleNamespace

import pytest

from hiprune_server.hardening.resending import AGAIN, Resending

FAILED = SimpleNamespace(outputs=[SimpleNamespace(finish_reason="error", token_ids=[])])
WORD = SimpleNamespace(outputs=[SimpleNamespace(finish_reason=None, token_ids=[7])])
LAST = SimpleNamespace(outputs=[SimpleNamespace(finish_reason="stop", token_ids=[8])])
LATE = SimpleNamespace(outputs=[SimpleNamespace(finish_reason="error", token_ids=[9])])


class Engine:
    """Answers a prompt by what it holds; notes which streams were closed."""

    name = "engine"

    def __init__(self, **answers):
        self.answers, self.asked, self.closed = answers, [], []

    async def generate(self, prompt, sampling, *, request_id):
        self.asked.append((prompt["text"], sampling, request_id))
        try:
            for output in self.answers[prompt["text"]]:
                yield output
        finally:
            self.closed.append(prompt["text"])


def prompt(text, item, again=None):
    made = {"text": text, "mm_kwargs": {"image": [item]}}
    if again is not None:

        async def rendered():
            return prompt(again, "data")

        made[AGAIN] = rendered
    return made


def answer(engine, asked, limit=None):
    async def collect():
        outputs, found = Resending(engine).generate(asked, "greedy", request_id="r"), []
        async for output in outputs:
            found.append(output)
            if len(found) == limit:
                break
        await outputs.aclose()
        return found

    return asyncio.run(collect())


def test_a_picture_the_engine_does_not_have_is_sent_with_its_data():
    engine = Engine(hash=[FAILED], data=[WORD, LAST])
    assert answer(engine, prompt("hash", None, "data")) == [WORD, LAST]
    assert engine.asked == [("hash", "greedy", "r"), ("data", "greedy", "r")]
    assert engine.closed == ["hash", "data"]


def test_a_second_failure_is_handed_on():
    engine = Engine(hash=[FAILED], data=[FAILED])
    assert answer(engine, prompt("hash", None, "data")) == [FAILED]


@pytest.mark.parametrize("outputs", [[WORD, LAST], [WORD, LATE], [LATE]])
def test_an_answer_that_has_begun_is_never_begun_again(outputs):
    engine = Engine(hash=outputs)
    assert answer(engine, prompt("hash", None, "data")) == outputs
    assert len(engine.asked) == 1


def test_a_request_that_brought_its_data_fails_once():
    engine = Engine(data=[FAILED])
    assert answer(engine, prompt("data", "data", "data")) == [FAILED]
    assert len(engine.asked) == 1


def test_a_client_that_goes_away_closes_the_engines_stream():
    engine = Engine(hash=[FAILED], data=[WORD, LAST])
    assert answer(engine, prompt("hash", None, "data"), limit=1) == [WORD]
    assert engine.closed == ["hash", "data"]


def test_all_else_is_the_engines_own():
    assert Resending(Engine()).name == "engine"
