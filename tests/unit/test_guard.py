"""Bodies that are too large and budgets that nobody reads are refused; all else passes."""

import asyncio
import json
import threading

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from hiprune_server.guard import STOPPING, Guard
from hiprune_server.places import READ

LIMIT = 200_000


async def echo(request):
    return PlainTextResponse(await request.body())


APP = Starlette(
    routes=[Route("/{path:path}", echo, methods=["POST"])],
    middleware=[Middleware(Guard, max_bytes=LIMIT)],
)


def post(path, body, kind="application/json"):
    async def send():
        transport = httpx.ASGITransport(APP)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, content=body, headers={"content-type": kind})

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "x", "hiprune": {"tokens": 1}}, "hiprune"),
        ({"hiprune": None}, "hiprune"),
        ({"messages": [{"role": "user"}, {"content": [{"hiprune": {}}]}]},
         "messages[1].content[0].hiprune"),
        ({"input": [{"content": [{}, {"type": "input_image", "hiprune": {}}]}]},
         "input[0].content[1].hiprune"),
        ({"input": [{"type": "input_image", "hiprune": {}}]}, "input[0].hiprune"),
    ],
)  # fmt: skip
def test_a_budget_is_refused_with_its_place(body, field):
    escaped = json.dumps(body).replace('"hiprune"', r'"h\u0069prune"')
    for route in ("/v1/completions", "/v1/chat/completions/batch", "/tokenize"):
        assert post(route, escaped).status_code == 400
        answer = post(route, json.dumps(body))
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == field
        assert route in error["message"]
        assert "/v1/chat/completions" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt": "what is \\"hiprune\\"?"}',
        '{"messages": [{"role": "user", "content": "\\"hiprune\\""}]}',
        '{"hiprune": ',
        "[" * 100_000 + '"hiprune"',
        "",
        "[]",
        'null "hiprune"',
    ],
)
def test_everything_else_goes_through_unchanged(body):
    answer = post("/v1/completions", body)
    assert answer.status_code == 200
    assert answer.text == body


def test_a_body_is_looked_at_whatever_it_says_it_is():
    body = '{"hiprune": {}}'
    for route in READ:
        assert post(route, body, "text/plain").text == body
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert post("/v1/completions", body, kind).json()["error"]["param"] == "hiprune"


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/any"])
def test_a_body_above_the_limit_is_refused(route):
    assert post(route, b" " * LIMIT, "text/plain").text == " " * LIMIT
    answer = post(route, b" " * (LIMIT + 1), "text/plain")
    assert answer.status_code == 413
    assert "limits.max_body_bytes" in answer.json()["error"]["message"]


def test_a_body_without_a_length_is_read_no_further_than_the_limit():
    sent = []

    async def endless():
        while True:
            sent.append(1)
            yield b" " * 10_000

    assert post("/v1/completions", endless()).status_code == 413
    assert len(sent) <= LIMIT // 10_000 + 2


def test_a_server_that_stops_sends_new_requests_elsewhere(monkeypatch):
    stopping = threading.Event()
    monkeypatch.setattr(APP.state, STOPPING, stopping, raising=False)
    assert post("/v1/chat/completions", b"{}").status_code == 200
    stopping.set()
    refusal = post("/v1/chat/completions", b"{}")
    assert refusal.status_code == 503
    assert refusal.json()["error"]["type"] == "ServiceUnavailableError"
