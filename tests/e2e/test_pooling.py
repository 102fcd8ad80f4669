"""Budgets where a model answers with numbers: embeddings of pictures."""

import httpx
import numpy as np
import pytest

from tests.e2e.serving import BIN, content, running
from tests.photos import photo
from tests.reference.checkpoints import build_qwen

KEY = {"authorization": "Bearer of-the-server"}
PICTURE = photo("coffee").resize((320, 240))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_vl")
    build_qwen("qwen3_vl", folder)
    command = [
        *(str(BIN / "hiprune-serve"), str(folder), "--served-model-name", "small"),
        *("--max-model-len", "2048", "--enforce-eager", "--runner", "pooling"),
        *("--api-key", "of-the-server"),
    ]
    with running(command, tmp_path_factory.mktemp("log")) as one:
        yield one


def post(server, path, **body):
    body = {"model": "small", **body}
    return httpx.post(server.url + path, json=body, headers=KEY, timeout=120)


def embedded(server, **keys):
    messages = [{"role": "user", "content": content([PICTURE])}]
    answer = post(server, "/v1/embeddings", messages=messages, **keys)
    assert answer.status_code == 200, answer.text
    answer = answer.json()
    return answer["usage"]["prompt_tokens"], np.array(answer["data"][0]["embedding"])


def test_an_embedding_is_of_the_kept_tokens(server):
    whole, of_whole = embedded(server)
    half, of_half = embedded(server, hiprune={"ratio": 0.5})
    fewer, of_fewer = embedded(server, hiprune={"tokens": 9})
    full = 2 * (whole - half)
    assert abs(whole - fewer - (full - 9)) <= 1
    again = embedded(server, hiprune={"ratio": 0.5})
    assert again[0] == half
    np.testing.assert_allclose(again[1], of_half, atol=1e-5)
    assert len({len(of_whole), len(of_half), len(of_fewer)}) == 1
    assert abs(of_half - of_whole).max() > 1e-4 < abs(of_half - of_fewer).max()
    smaller, _ = embedded(server, hiprune={"max_pixels": 20_000})
    assert smaller < whole


def test_what_cannot_be_served_is_refused_by_name(server):
    messages = [{"role": "user", "content": content([PICTURE])}]
    for plan, field in (({"tokens": 0}, "hiprune.tokens"), ("all", "hiprune")):
        refused = post(server, "/v1/embeddings", messages=messages, hiprune=plan)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == field
    part = [{**messages[0]["content"][1], "hiprune": {"tokens": 9}}]
    inside = [{"role": "user", "content": part}]
    refused = post(server, "/v1/embeddings", messages=inside)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages[0].content[0].hiprune"
    for route in ("/score", "/rerank"):
        refused = post(server, route, hiprune={"tokens": 9})
        assert refused.status_code == 400
        assert f"cannot be served on {route}" in refused.json()["error"]["message"]
    assert embedded(server)[0] > 9  # nobody else is harmed


def test_the_key_guards_every_route_and_the_server_tells_what_it_is(server):
    for path in ("/v1/embeddings", "/pooling", "/tokenize", "/v1/hiprune", "/nowhere"):
        assert httpx.post(server.url + path, json={}).status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    told = httpx.get(f"{server.url}/v1/hiprune", headers=KEY).json()
    assert told["family"] == "qwen3_vl"
    assert told["limits"]["max_pixels"]["maximum"] > 20_000
    document = httpx.get(f"{server.url}/openapi.json", headers=KEY)
    assert document.status_code == 200
