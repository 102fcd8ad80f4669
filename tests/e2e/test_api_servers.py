"""Two API server processes behind one port, with an API key."""

import httpx
import pytest

from tests.e2e.serving import running, serve
from tests.photos import data_url, photo

KEY = {"Authorization": "Bearer secret"}
REQUESTS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory, clip_checkpoint):
    command = serve(
        clip_checkpoint,
        *("--api-server-count", "2", "--api-key", "secret"),
        *("--hiprune-preset", 'low={"tokens": 40}', "--hiprune-max-body-bytes", "500000"),
    )
    with running(command, tmp_path_factory.mktemp("two")) as one:
        yield one


def chat(server, **headers):
    """One request on a connection of its own, so that either process may get it."""
    image = {"url": data_url(photo("coffee").resize((336, 336))), "detail": "low"}
    text = {"type": "text", "text": "What is this?"}
    content = [text, {"type": "image_url", "image_url": image}]
    body = {
        "model": server.model,
        "max_tokens": 2,
        "messages": [{"role": "user", "content": content}],
    }
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def test_metrics_of_all_processes_add_up(server):
    for _ in range(REQUESTS):
        images = chat(server, **KEY).json()["hiprune"]["images"]
        assert [(one["tokens_kept"], one["source"]) for one in images] == [(40, "detail")]
    assert server.total("hiprune_images_total") == REQUESTS
    assert server.total("hiprune_visual_tokens_kept_total") == 40 * REQUESTS
    assert server.total("hiprune_kept_ratio_count") == REQUESTS
    assert server.total("hiprune_time_to_first_token_seconds_count") == REQUESTS


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("GET", "/v1/hiprune"),
        ("POST", "/v1/hiprune/explain"),
        ("GET", "/playground"),
        ("GET", "/playground/page.js"),
        ("GET", "/playground/samples/shapes-1.jpg"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/completions"),
        ("POST", "/invocations"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/generative_scoring"),
        ("POST", "/scale_elastic_ep"),
        ("GET", "/load"),
        ("GET", "/docs"),
        ("GET", "/version"),
        ("GET", "/nowhere"),
    ],
)
def test_the_key_covers_every_route(server, method, route):
    answer = httpx.request(method, server.url + route, json={"hiprune": {"tokens": 0}})
    assert answer.status_code == 401
    assert "hiprune" not in answer.text.lower()


def test_a_browser_brings_the_key_as_a_password(server):
    page = f"{server.url}/playground"
    assert "Basic" in httpx.get(page).headers["www-authenticate"]
    assert httpx.get(page, auth=("anybody", "wrong")).status_code == 401
    for options in ({"auth": ("anybody", "secret")}, {"headers": KEY}):
        answer = httpx.get(page, **options)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    for path in ("/../__init__.py", "/%2e%2e/__init__.py", "/samples/../../cli.py", "/none.js"):
        assert httpx.get(page + path, headers=KEY).status_code == 404


def test_a_large_body_is_refused(server):
    answer = httpx.post(f"{server.url}/v1/completions", content=b" " * 500_001, headers=KEY)
    assert answer.status_code == 413
    assert "limits.max_body_bytes" in answer.json()["error"]["message"]
    assert chat(server, **KEY).status_code == 200
