"""What may not reach a route does not, and no body is read before its route asks for it."""

import asyncio
import json
import threading

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from hiprune_server.hardening.auth import Keys
from hiprune_server.hardening.bodies import BodyLimits
from hiprune_server.hardening.guard import STOPPING, Guard
from hiprune_server.wishes.places import READ

LIMIT = 200_000
LIMITS = BodyLimits(max_bytes=LIMIT, max_held=3 * LIMIT, seconds=30, max_values=90_000)


async def echo(request):
    return PlainTextResponse(await request.body())


async def busy(request):
    await request.body()
    return PlainTextResponse("busy", 503)


def application(*, routes=(), keys=(), limits=LIMITS):
    every = Route("/{path:path}", echo, methods=["POST"])
    guard = Middleware(Guard, keys=Keys(keys), limits=limits)
    return Starlette(routes=list(routes) or [every], middleware=[guard])


APP = application()
CLOSED = application(routes=[Route("/known", echo, methods=["POST"])], keys=["s3cret"])


def post(path, body, kind="application/json", *, app=APP, **headers):
    async def send():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, content=body, headers={"content-type": kind} | headers)

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
        for same in (body, f"\n\t {body}", f"\ufeff{body}"):
            assert post("/v1/completions", same, kind).json()["error"]["param"] == "hiprune"


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


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/known", None, 401),
        ("/unknown", None, 401),
        ("/known", "wrong", 401),
        ("/unknown", "s3cret", 404),
    ],
)
def test_a_body_that_nobody_will_serve_is_not_read(path, key, status):
    taken = []

    headers = {"authorization": f"Bearer {key}"} if key else {}

    async def ask():
        """As a server does: the route is called before the body has come."""
        sent = []

        async def receive():
            taken.append(1)
            return {"type": "http.request", "body": b" " * 10_000, "more_body": True}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [
                (b"content-type", b"application/json"),
                (b"transfer-encoding", b"chunked"),
                *((name.encode(), value.encode()) for name, value in headers.items()),
            ],
        }
        await CLOSED(scope, receive, send)
        return sent[0]

    start = asyncio.run(ask())
    assert start["status"] == status
    assert taken == []
    assert (b"connection", b"close") in start["headers"]


def test_a_method_that_a_route_has_not_is_told_without_reading_the_body():
    app = application(routes=[Route("/known", echo, methods=["PUT"])])
    answer = post("/known", b"x" * 1000, app=app)
    assert answer.status_code == 405
    assert answer.headers["connection"] == "close"


def test_a_slow_body_loses_its_place():
    limits = BodyLimits(max_bytes=LIMIT, max_held=LIMIT, seconds=1, max_values=100)
    app = application(limits=limits)

    async def both():
        async def receive():
            await asyncio.sleep(0.2)
            return {"type": "http.request", "body": b" ", "more_body": True}

        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/x", "headers": []}
        await app(scope, receive, send)
        return sent

    start, body = asyncio.run(both())
    assert start["status"] == 408
    assert "limits.body_seconds" in json.loads(body["body"])["error"]["message"]
    assert post("/x", b" " * LIMIT, "text/plain", app=app).status_code == 200  # the room is free


def test_bodies_that_are_held_leave_no_room_for_more_until_they_are_answered():
    limits = BodyLimits(max_bytes=100, max_held=250, seconds=30, max_values=100)
    go = asyncio.Event()

    async def wait(request):
        await request.body()
        await go.wait()
        return PlainTextResponse("done")

    app = application(routes=[Route("/wait", wait, methods=["POST"])], limits=limits)

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:

            async def one():
                return await client.post("/wait", content=b" " * 100)

            held = [asyncio.create_task(one()) for _ in range(2)]
            await asyncio.sleep(0.05)
            refused = await one()
            go.set()
            return refused, [(await task).status_code for task in held], await one()

    refused, held, after = asyncio.run(ask())
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert held == [200, 200]
    assert after.status_code == 200


def test_every_503_says_when_to_come_back():
    app = application(routes=[Route("/busy", busy, methods=["POST"])])
    assert int(post("/busy", b"{}", app=app).headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("[" * 101 + "]" * 101, "at most 100 deep"),
        ('{"a":' * 30_000, "at most 100 deep"),
        ("[" + "1," * 95_000 + "1]", "limits.max_body_values"),
        ("[" + "{}," * 4_000 + "1]", "limits.max_body_values"),
        ("[" + ("9" * 4_000 + ",") * 40 + "{}," * 200 + "1]", "limits.max_body_values"),
        ('"a"' * 500_000, "limits.max_body_bytes"),
        (json.dumps({"hiprune": {}}).encode("utf-16"), "UTF-8"),
        (json.dumps({"hiprune": {}}).encode("utf-32-be"), "UTF-8"),
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "application/x+json; charset=utf-8", ""])
def test_json_that_would_hold_up_everybody_else_is_refused(body, told, kind):
    answer = post("/v1/completions", body, kind)
    assert answer.status_code in (400, 413)
    assert told in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100 + "]" * 100,
        json.dumps({"text": '[{,"' * 25_000}),
        json.dumps({"text": "\\" * 50_000 + '"'}),
        "[" + "1," * 89_000 + "1]",
        '"' + r"\"" * 60_000,  # never closed: the route says so
    ],
)
def test_what_only_looks_like_much_goes_through(body):
    assert post("/v1/chat/completions", body).text == body


def test_a_refusal_is_told_as_the_routes_clients_read_it():
    ours = post("/known", b"", app=CLOSED).json()
    assert ours["error"]["code"] == 401
    assert "Bearer" in ours["error"]["message"]
    anthropics = post("/v1/messages", b"", app=CLOSED).json()
    assert anthropics["type"] == "error"
    assert anthropics["error"]["type"] == "authentication_error"
    assert "x-api-key" in anthropics["error"]["message"]
