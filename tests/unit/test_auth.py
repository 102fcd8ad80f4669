"""Which requests bring a key, and which need none."""

from argparse import Namespace
from base64 import b64encode

import pytest

from hiprune_server.hardening.auth import Keys
from hiprune_server.hardening.refusals import Refusal, route_of

KEYS = Keys(["s3cret", "schlüssel"])


def scope(path, *headers, kind="http", root=""):
    return {
        "type": kind,
        "path": path,
        "root_path": root,
        "headers": [(name, value) for name, value in headers],
    }


def asked(keys, *args, **options):
    """The status that a request is refused with, None where it passes."""
    try:
        keys.check(scope(*args, **options))
    except Refusal as refusal:
        return refusal.status
    return None


def bearer(key):
    return (b"authorization", b"Bearer " + key)


def basic(key):
    return (b"authorization", b"Basic " + b64encode(b"anybody:" + key))


@pytest.mark.parametrize("path", ["/health", "/ping", "/metrics"])
def test_what_watches_the_server_needs_no_key(path):
    assert asked(KEYS, path) is None
    assert asked(KEYS, "/api" + path, root="/api") is None
    assert asked(KEYS, path, kind="websocket") == 401


@pytest.mark.parametrize(
    "path",
    [
        "//health",
        "/health/",
        "/health/x",
        "/healthz",
        "/HEALTH",
        "/x/../health",
        "/metrics/",
        "/metricsfoo",
        "/apihealth",
        "/v1/models",
        "/invocations",
        "/nowhere",
        "/",
        "",
    ],
)
def test_every_other_path_does(path):
    assert asked(KEYS, path, root="/api") == 401
    assert asked(KEYS, path) == 401
    assert asked(KEYS, path, bearer(b"s3cret")) is None


def test_metrics_need_one_where_the_operator_says_so():
    closed = Keys(["s3cret"], metrics=True)
    assert asked(closed, "/metrics") == 401
    assert asked(closed, "/metrics", bearer(b"s3cret")) is None
    assert asked(closed, "/health") is None


@pytest.mark.parametrize(
    "header",
    [
        bearer(b"wrong"),
        bearer(b""),
        bearer(b"s3cre"),
        bearer(b"s3cret2"),
        bearer(b"\xff\xfe\x00"),
        (b"authorization", b"s3cret"),
        (b"authorization", b"Basic !!!"),
        (b"authorization", b""),
        basic(b"s3cret"),  # only pages are opened by a browser's password
        (b"x-api-key", b"s3cret"),
        (b"api-key", b"s3cret"),
    ],
)
def test_a_wrong_key_is_none_whatever_its_bytes(header):
    assert asked(KEYS, "/v1/chat/completions", header) == 401


@pytest.mark.parametrize("key", [b"s3cret", "schlüssel".encode()])
@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER  "])
def test_each_of_several_keys_opens(key, scheme):
    assert asked(KEYS, "/v1/models", (b"authorization", scheme + key)) is None


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropics_clients_send_theirs_in_a_header_of_its_own(path):
    assert asked(KEYS, path, (b"x-api-key", b"s3cret")) is None
    assert asked(KEYS, path, (b"x-api-key", b"wrong")) == 401
    assert asked(KEYS, path, (b"x-api-key", b"wrong"), bearer(b"s3cret")) is None
    assert asked(KEYS, path, bearer(b"s3cret")) is None


@pytest.mark.parametrize("path", ["/playground", "/playground/page.js", "/docs", "/openapi.json"])
def test_a_browser_brings_it_as_a_password(path):
    assert asked(KEYS, path, basic(b"s3cret")) is None
    with pytest.raises(Refusal) as refused:
        KEYS.check(scope(path, basic(b"wrong")))
    assert refused.value.headers["www-authenticate"].startswith("Basic")


def test_others_are_asked_for_a_bearer():
    with pytest.raises(Refusal) as refused:
        KEYS.check(scope("/v1/models"))
    assert refused.value.headers["www-authenticate"] == "Bearer"


def test_a_server_without_keys_is_open(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert asked(Keys.of(Namespace(api_key=None), metrics=True), "/v1/models") is None
    monkeypatch.setenv("VLLM_API_KEY", "of-the-variable")
    given = Keys.of(Namespace(api_key=None), metrics=False)
    assert asked(given, "/v1/models") == 401
    assert asked(given, "/v1/models", bearer(b"of-the-variable")) is None
    flags = Keys.of(Namespace(api_key=["a", "b"]), metrics=False)
    assert asked(flags, "/v1/models", bearer(b"of-the-variable")) == 401
    assert asked(flags, "/v1/models", bearer(b"b")) is None


@pytest.mark.parametrize(
    ("path", "root", "route"),
    [
        ("/v1/x", "", "/v1/x"),
        ("/api/v1/x", "/api", "/v1/x"),
        ("/api/v1/x", "/api/", "/v1/x"),
        ("/apiv1", "/api", "/apiv1"),
        ("/api/api/x", "/api", "/api/x"),
        ("/v1/x", "/api", "/v1/x"),
    ],
)
def test_a_route_is_the_path_as_the_router_reads_it(path, root, route):
    assert route_of(scope(path, root=root)) == route
