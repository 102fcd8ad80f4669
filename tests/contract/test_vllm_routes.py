"""Every route of the application that vLLM really builds asks for the key.

So a route that a later vLLM adds is closed as well, and one that it takes away is told here.
"""

import asyncio
import re

import httpx
import pytest
from starlette.routing import BaseRoute, Mount, WebSocketRoute
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hiprune_server.hardening.auth import ADMINISTRATION, OPEN
from hiprune_server.hardening.releases import make_arg_parser
from hiprune_server.wishes.places import OF_NUMBERS, READ
from hiprune_vllm.facade import WORKER_EXTENSION

KEY = {"authorization": "Bearer s3cret"}
ADMINISTERS = re.compile(
    r"scale|scaling|sleep|wake|pause|resume|profile|weight|rpc|reset|abort|lora|shutdown|"
    r"release|server_info|world_size|fault"
)
"""In the paths of routes that change the engine, or tell of it what only its operator needs."""


def build(monkeypatch, *flags, plugins="hiprune,hiprune_api", **variables):
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    parser = make_arg_parser(FlexibleArgumentParser())
    tasks = ("generate", "realtime", "transcription")
    return build_app(parser.parse_args(["model", *flags]), tasks, None)


@pytest.fixture
def app(monkeypatch):
    explaining = ("--worker-extension-cls", WORKER_EXTENSION)
    return build(monkeypatch, "--api-key", "other", "s3cret", *explaining)


def leaves(routes: list[BaseRoute], prefix: str = ""):
    """Path and route of everything that answers; those below a mount, too."""
    for route in routes:
        path = prefix + getattr(route, "path", "")
        inner = getattr(route, "routes", None)
        if isinstance(route, Mount) and not inner:
            yield path + "/anything", route
        elif inner:
            yield from leaves(inner, path if isinstance(route, Mount) else prefix)
        else:
            yield path, route


def asked(app, method, path, **options):
    async def ask():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


def filled(path):
    """A path without its parameters."""
    return re.sub(r"\{[^}]*\}", "x", path)


def http_routes(app):
    for path, route in leaves(app.routes):
        if not isinstance(route, WebSocketRoute):
            for method in sorted(getattr(route, "methods", None) or {"GET", "POST"}):
                yield method, filled(path)


def test_every_route_but_those_that_watch_the_server_is_closed(app):
    routes = list(http_routes(app))
    paths = {path for _, path in routes}
    of_text = {path for path in READ if path not in OF_NUMBERS}
    assert {*of_text, *OPEN, "/invocations", "/tokenize", "/docs", "/version"} <= paths
    assert len(paths) > 25
    for method, path in routes:
        expected = path in (*OPEN, "/metrics")
        for key in ({}, {"authorization": "Bearer wrong"}):
            answer = asked(app, method, path, headers=key)
            assert (answer.status_code != 401) == expected, (method, path)
            if not expected:
                assert answer.headers["www-authenticate"]
                assert method == "HEAD" or "asks for a key" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1/nowhere", "//health", "/health/", "/metrics/x", "/%68ealth/x", "/"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE"])
def test_paths_that_nobody_serves_are_closed_too(app, method, path):
    assert asked(app, method, path).status_code == 401
    assert asked(app, method, path, headers=KEY).status_code in (404, 405, 307, 200)


def test_a_key_opens_what_needs_no_engine(app):
    for path in ("/version", "/docs", "/openapi.json", "/playground"):
        assert asked(app, "GET", path, headers=KEY).status_code == 200
        assert asked(app, "GET", path, headers={"authorization": "Bearer other"}).status_code == 200


def test_metrics_are_closed_where_the_operator_says_so(monkeypatch):
    app = build(monkeypatch, "--api-key", "s3cret", HIPRUNE_METRICS_KEY="true")
    assert asked(app, "GET", "/metrics").status_code == 401
    assert asked(app, "GET", "/metrics", headers=KEY).status_code == 200


def test_a_root_path_changes_nothing(monkeypatch):
    app = build(monkeypatch, "--api-key", "s3cret", "--root-path", "/api")
    for path in ("/invocations", "/api/invocations", "/api/version", "/apihealth", "/api//health"):
        assert asked(app, "GET", path).status_code == 401
    assert asked(app, "GET", "/api/version", headers=KEY).status_code == 200
    assert asked(app, "GET", "/api/metrics").status_code == 200


def test_websockets_are_closed(app):
    paths = [path for path, route in leaves(app.routes) if isinstance(route, WebSocketRoute)]
    assert paths == ["/v1/realtime"]

    async def connect(path, headers):
        sent = []

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "websocket",
            "path": path,
            "query_string": b"",
            "headers": headers,
            "extensions": {"websocket.http.response": {}},
        }
        await app(scope, receive, send)
        return sent[0]

    for path in (*paths, "/health", "/nowhere"):
        refusal = asyncio.run(connect(path, []))
        assert (refusal["type"], refusal["status"]) == ("websocket.http.response.start", 401)
    unknown = asyncio.run(connect("/nowhere", [(b"authorization", b"Bearer s3cret")]))
    assert unknown["type"] == "websocket.close"


def test_a_browsers_question_before_its_request_is_answered_without_a_key(monkeypatch):
    allowed = ("--allowed-origins", '["https://page.example"]')
    app = build(monkeypatch, "--api-key", "s3cret", *allowed)
    asks = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answer = asked(app, "OPTIONS", "/v1/chat/completions", headers=asks)
    assert answer.status_code == 200, answer.text
    assert "POST" in answer.headers["access-control-allow-methods"]
    refused = asked(app, "POST", "/v1/chat/completions", headers={"origin": asks["origin"]})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"]  # so that the page can read why


def test_without_a_key_nothing_is_closed(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    app = build(monkeypatch)
    assert asked(app, "GET", "/version").status_code == 200
    assert asked(app, "GET", "/nowhere").status_code == 404


def test_vllms_own_check_is_found_and_taken_out(app, monkeypatch):
    def stack(of):
        return [one.cls for one in of.user_middleware]

    app.build_middleware_stack()
    assert AuthenticationMiddleware not in stack(app)
    assert AuthenticationMiddleware in stack(build(monkeypatch, "--api-key", "x", plugins=""))


def test_routes_that_administer_the_engine_are_off(app):
    """Scale-out's, with ids to abort, answer 403: `hiprune-serve` refuses its flag."""
    administering = {path for _, path in http_routes(app) if ADMINISTERS.search(path)}
    assert administering == {"/inference/v1/abort_requests"}
    for path in (*ADMINISTRATION, "/sleep", "/wake_up", "/collective_rpc", "/start_profile",
                 "/update_weights", "/reset_mm_cache", "/v1/load_lora_adapter"):  # fmt: skip
        assert asked(app, "POST", path, json={}, headers=KEY).status_code == 404
    path = "/inference/v1/abort_requests"
    assert asked(app, "POST", path, json={}, headers=KEY).status_code == 403


def test_an_operator_turns_them_on(monkeypatch):
    paths = {path for _, path in http_routes(build(monkeypatch, "--enable-elastic-ep"))}
    assert set(ADMINISTRATION) <= paths
    paths = {path for _, path in http_routes(build(monkeypatch, VLLM_SERVER_DEV_MODE="1"))}
    assert {"/sleep", "/wake_up", "/collective_rpc", "/reset_mm_cache", "/update_weights"} <= paths
    assert not paths & set(ADMINISTRATION)


@pytest.mark.parametrize(
    ("path", "field", "item"),
    [
        ("/v1/chat/completions", "messages", 5),
        ("/v1/chat/completions/batch", "messages", 5),
        ("/v1/responses", "input", {"a": 1}),
        ("/v1/responses/render", "input", {"a": 1}),
        ("/v1/messages", "messages", 5),
        ("/tokenize", "messages", 5),
        ("/generative_scoring", "items", {}),
    ],
)
def test_every_route_tells_of_the_first_wrong_element_alone(path, field, item, monkeypatch):
    """Each is wrong in up to hundreds of ways, which take milliseconds to find."""
    app = build(monkeypatch, "--enable-scale-out")

    def told(many):
        body = {"model": "m", "max_tokens": 1, "query": "x", field: [item] * many}
        answer = asked(app, "POST", path, json=body)
        assert answer.status_code == 400
        return answer.json()["error"]["message"].partition("\n")[0]

    assert "validation error" in told(1)
    assert told(2) == told(50)
