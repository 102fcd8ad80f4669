"""Strangers, floods and bodies that are made to hold a server up: everybody else is served."""

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import anthropic
import httpx
import openai
import pytest

from tests.e2e.serving import BIN, running
from tests.photos import data_url, photo

KEY = {"Authorization": "Bearer s3cret"}
QUEUE = 6
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    command = [
        *(str(BIN / "hiprune-serve"), "--demo", "--api-key", "s3cret", "second"),
        *("--max-num-seqs", "2", "--max_num_queued_reqs", str(QUEUE)),
        *("--hiprune-body-seconds", "2", "--hiprune-max-held-bytes", "67108864"),
        *("--hiprune-grammar-seconds", "2"),
    ]
    with running(command, tmp_path_factory.mktemp("overload"), model="hiprune-demo") as one:
        yield one


def body(**more):
    return {"model": "hiprune-demo", "max_tokens": 4, "messages": HI, "temperature": 0} | more


def post(server, path, content, **headers):
    data = content if isinstance(content, (bytes, str)) else json.dumps(content)
    kind = {"content-type": "application/json"}
    return httpx.post(server.url + path, content=data, headers=KEY | kind | headers, timeout=300)


class Watched:
    """Asks for `/health` all the time."""

    def __init__(self, server):
        self.server, self.slowest, self._stop = server, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self):
        with httpx.Client(timeout=300) as client:
            while not self._stop.is_set():
                began = time.monotonic()
                assert client.get(f"{self.server.url}/health").status_code == 200
                self.slowest = max(self.slowest, time.monotonic() - began)
                time.sleep(0.01)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def flood(server, path, content, many=40):
    with ThreadPoolExecutor(many) as pool:
        return list(pool.map(lambda _: post(server, path, content), range(many)))


def long(path, **more):
    """A request that keeps its place for a while."""
    if path == "/v1/responses":
        return {"model": "hiprune-demo", "input": "Hi", "max_output_tokens": 200} | more
    if path == "/v1/completions":
        return {"model": "hiprune-demo", "prompt": "Hi", "max_tokens": 200, "ignore_eos": True}
    return body(max_tokens=200, **more)


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_is_refused_and_the_others_are_answered(server, path, stream):
    refused_before = server.total("hiprune_rejected_requests_total", reason="overload")
    request = long(path) | {"stream": stream, "ignore_eos": True}
    answers = flood(server, path, request)
    refused = [one for one in answers if one.status_code == 503]
    accepted = [one for one in answers if one.status_code == 200]
    assert len(refused) + len(accepted) == len(answers)
    assert refused
    assert len(accepted) >= QUEUE
    for one in refused:
        assert int(one.headers["retry-after"]) > 0
        told = one.json()
        assert "busy" in told["error"]["message"]
        assert told.get("type") == "error" if path == "/v1/messages" else "code" in told["error"]
    broken = re.compile(r'"error":\s*\{|event: error')  # a stream that began and broke off
    assert not [one.text for one in accepted if broken.search(one.text)]
    counted = server.total("hiprune_rejected_requests_total", reason="overload") - refused_before
    assert counted == len(refused)
    assert "Traceback" not in server.log.read_text()
    assert post(server, path, long(path)).status_code == 200


def test_explanations_wait_in_a_short_queue(server):
    picture = data_url(photo("coffee").resize((1200, 1200)))
    before = server.total("hiprune_rejected_requests_total", reason="overload")
    answers = flood(server, "/v1/hiprune/explain", {"image_url": picture, "hiprune": {"tokens": 9}})
    statuses = [one.status_code for one in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 9
    assert all(one.headers["retry-after"] for one in answers if one.status_code == 503)
    after = server.total("hiprune_rejected_requests_total", reason="overload")
    assert after - before == statuses.count(503)


def test_both_sdks_bring_their_key_as_they_are(server):
    picture = data_url(photo("coffee").resize((336, 336))).partition(",")[2]
    block = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": picture},
        "hiprune": {"tokens": 9},
    }
    messages = [{"role": "user", "content": [block, {"type": "text", "text": "What is this?"}]}]
    client = anthropic.Anthropic(base_url=server.url, api_key="second", max_retries=0)
    answer = client.messages.create(model="hiprune-demo", max_tokens=5, messages=messages)
    assert answer.hiprune["images"][0]["tokens_kept"] == 9
    counted = client.messages.count_tokens(model="hiprune-demo", messages=messages)
    assert 0 < counted.input_tokens < 64
    wrong = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        wrong.messages.create(model="hiprune-demo", max_tokens=5, messages=messages)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret", max_retries=0)
    assert client.chat.completions.create(model="hiprune-demo", messages=HI, max_tokens=2).id
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (CHAT, b"", 401),
        ("/nowhere", b"", 401),
        ("/invocations", b"Authorization: Bearer wrong\r\n", 401),
        ("/nowhere", b"Authorization: Bearer s3cret\r\n", 404),
        ("/version", b"Authorization: Bearer s3cret\r\n", 405),
        (CHAT, b"Authorization: Bearer s\xfc\xff\r\n", 401),
    ],
)
def test_an_answer_comes_before_the_body_has(server, path, headers, status):
    """60 MiB are announced, 1,000 bytes are sent: whoever read the body would wait for the rest."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
        connection.sendall(head + headers + b"Content-Length: 62914560\r\n\r\n" + b" " * 1000)
        answer = b""
        while data := connection.recv(65536):  # and then the server closes
            answer += data
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in answer.lower()


def test_a_body_that_trickles_in_is_given_up(server):
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        key = "Authorization: Bearer s3cret\r\n"
        connection.sendall(f"{head}{key}Content-Length: 100000\r\n\r\n".encode())
        connection.settimeout(0.5)
        answer = b""
        for _ in range(40):
            try:
                if not answer:
                    connection.sendall(b" ")
                received = connection.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            answer += received
            if not received:  # the server has closed
                break
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"limits.body_seconds" in answer


LARGE = {
    "keys": lambda n: body(structured_outputs=5) | {f"key{i}": i for i in range(n * 6000)},
    "odd items": lambda n: {"model": "hiprune-demo", "input": [{"a": 1}] * (n * 2000)},
    "parts": lambda n: body(
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * (n * 2000)}]
    ),
    "long text": lambda n: body(messages=[{"role": "user", "content": "a" * (n * 4_000_000)}]),
    "brackets": lambda n: "[" * (n * 4_000_000),
    "numbers": lambda n: body(allowed_token_ids=[1] * (n * 1_000_000)),
    "long numbers": lambda n: '{"a": [' + ("9" * 4000 + ",") * (n * 1000) + "1]}",
}


@pytest.mark.parametrize("shape", LARGE)
def test_health_is_answered_while_an_odd_body_is_read(server, shape):
    path = "/v1/responses" if shape == "odd items" else CHAT

    def held(size):
        with Watched(server) as watched:
            began = time.monotonic()
            status = post(server, path, LARGE[shape](size)).status_code
            took = time.monotonic() - began
        assert status in (200, 400)
        return took, watched.slowest

    plain = max(held_by_plain_text(server), 0.1)
    small, _ = held(1)
    large, slowest = held(4)
    # In proportion, and nothing holds it longer than a few times what plain text of 16 MB does.
    assert large < 10 * max(small, plain)
    assert slowest < 10 * plain


def held_by_plain_text(server):
    """How long 16 MB of text in the right place keep the server."""
    text = body(messages=[{"role": "user", "content": "a" * 16_000_000}])
    began = time.monotonic()
    assert post(server, CHAT, text).status_code == 400  # longer than the model's context
    return time.monotonic() - began


RULES = range(3000)
COSTLY = {
    "many words": {"structured_outputs": {"choice": [f"word{i}" for i in range(100_000)]}},
    "entangled rules": {
        "structured_outputs": {
            "grammar": "root ::= r0\n"
            + "\n".join(
                f'r{i} ::= (r{(7 * i + 1) % 3000} | r{(3 * i + 2) % 3000} | "x")*' for i in RULES
            )
        }
    },
    "long texts": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "long",
                "schema": {
                    "type": "object",
                    "properties": {f"p{i}": {"type": "string", "maxLength": 5000} for i in RULES},
                },
            },
        }
    },
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", COSTLY)
def test_a_form_that_takes_long_to_prepare_is_refused_and_holds_nobody_up(server, kind, stream):
    post(server, CHAT, body(structured_outputs={"choice": ["a", "an"]}))  # starts what tries them
    (field,) = COSTLY[kind]
    with Watched(server) as watched:
        answer = post(server, CHAT, body(stream=stream, **COSTLY[kind]))
        others = post(server, CHAT, body())
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field
    assert "limits.grammar_seconds" in error["message"]
    assert others.status_code == 200
    assert watched.slowest < 5


def test_a_costly_form_is_refused_on_routes_that_are_vllms_own(server):
    request = {"model": "hiprune-demo", "prompt": "Hi"} | COSTLY["entangled rules"]
    answer = post(server, "/v1/completions", request)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "structured_outputs"


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_form_that_the_model_has_no_words_for_is_the_requests_fault(server, path):
    form = {"structured_outputs": {"json": {"type": "object", "required": ["a"]}}}
    request = body(**form) if path == CHAT else {"model": "hiprune-demo", "prompt": "Hi"} | form
    answer = post(server, path, request)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "structured_outputs"


def test_a_form_of_everyday_use_is_kept(server):
    request = body(structured_outputs={"choice": ["red", "green"]})
    first = post(server, CHAT, request)
    assert first.json()["choices"][0]["message"]["content"].strip() in ("red", "green")
    assert post(server, CHAT, request).json()["choices"] == first.json()["choices"]
