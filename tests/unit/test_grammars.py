"""What is remembered of grammars, what waits, and what becomes of those who wait."""

import asyncio
import sys

import pytest
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from hiprune_server.hardening import grammars
from hiprune_server.hardening.grammars import MOST_WAITING, Grammars

# Stands for the process that tries: says "costly" of what is longer than 1,000 bytes.
TRIES = """
import struct, sys, time
print("ready", flush=True)
sys.stdin.buffer.read(struct.unpack(">Q", sys.stdin.buffer.read(8))[0])
while length := sys.stdin.buffer.read(8):
    sys.stdin.buffer.read(struct.unpack(">Q", length)[0])
    time.sleep(0.02)
    if struct.unpack(">Q", length)[0] > 5000:
        sys.exit(3)
    print("costly" if struct.unpack(">Q", length)[0] > 1000 else "fine", flush=True)
"""


@pytest.fixture
def tried(monkeypatch):
    """Grammars whose process is a stand-in, and what it was asked."""
    monkeypatch.setattr(grammars, "_PROCESS", (sys.executable, "-c", TRIES))
    made = Grammars({}, seconds=3)
    asked, exchange = [], made._exchange

    async def counted(value):
        asked.append(value)
        return await exchange(value)

    monkeypatch.setattr(made, "_exchange", counted)
    return made, asked


def form(text):
    return SamplingParams(structured_outputs=StructuredOutputsParams(regex=text))


def test_no_form_is_no_trial(tried):
    made, asked = tried
    asyncio.run(made.check(SamplingParams()))
    assert not asked


def test_each_form_is_tried_once_however_often_it_is_asked_for(tried):
    made, asked = tried

    async def many():
        await asyncio.gather(*(made.check(form("a")) for _ in range(40)))
        await made.check(form("a"))
        await made.check(form("b"))

    asyncio.run(many())
    assert [one.structured_outputs.regex for one in asked[1:]] == ["a", "b"]


def test_a_costly_one_is_the_requests_fault_and_names_the_field(tried):
    made, asked = tried

    async def twice():
        for _ in range(2):
            with pytest.raises(VLLMValidationError, match=r"response_format must .* 3 s") as caught:
                await made.check(form("a" * 2000), "response_format")
            assert caught.value.parameter == "response_format"

    asyncio.run(twice())
    assert len(asked) == 2


def test_more_than_can_wait_is_an_overload(tried):
    made, _ = tried

    async def many():
        wanted = (made.check(form(f"a{i}")) for i in range(MOST_WAITING + 5))
        return await asyncio.gather(*wanted, return_exceptions=True)

    outcomes = asyncio.run(many())
    refused = [one for one in outcomes if one is not None]
    assert len(refused) == 5
    assert all(isinstance(one, GracefulHTTPError) for one in refused)
    assert {one.http_status for one in refused} == {503}


def test_a_client_that_leaves_takes_nobody_with_it(tried):
    made, _ = tried

    async def two():
        leaves = asyncio.create_task(made.check(form("a")))
        stays = asyncio.create_task(made.check(form("a")))
        await asyncio.sleep(0.01)
        leaves.cancel()
        await stays
        with pytest.raises(asyncio.CancelledError):
            await leaves

    asyncio.run(two())


def test_a_process_that_ends_is_started_again(tried):
    made, _ = tried

    async def after():
        with pytest.raises(GracefulHTTPError):
            await made.check(form("a" * 6000))
        await made.check(form("a"))

    asyncio.run(after())
