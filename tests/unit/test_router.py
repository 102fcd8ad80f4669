"""vLLM's own router, with the flags of the manifest, before servers that only say who they are."""

import base64
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests import routing
from tests.routing import KEY

PAUSE_S = 1.0


class Replica(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        models = {"object": "list", "data": [{"id": "m", "object": "model"}]}
        self.answer(models if self.path == "/v1/models" else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("stream"):
            self.stream()
            return
        told = {"replica": self.server.server_port, "hiprune": body.get("hiprune")}
        told |= {"session": self.headers.get_all("X-Session-ID"), "path": self.path}
        self.answer(told | {"key": self.headers.get("Authorization")})

    def stream(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in (b"data: {}\n\n", b"data: [DONE]\n\n"):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.flush()
            time.sleep(PAUSE_S)
        self.wfile.write(b"0\r\n\r\n")

    def answer(self, told):
        content = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def replica():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Replica)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    with ExitStack() as stack:
        replicas = [stack.enter_context(replica()) for _ in range(3)]
        yield stack.enter_context(routing.router(replicas, tmp_path_factory.mktemp("router")))


@pytest.fixture(scope="module")
def gate(router, tmp_path_factory):
    if routing.MISSING:
        pytest.skip(routing.MISSING)
    url = str(router.base_url)
    with routing.gate(url, tmp_path_factory.mktemp("gate")) as client:
        yield client


def ask(router, headers, path="/v1/chat/completions", **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": "What is this?"}]} | fields
    return router.post(path, headers=headers, json=body).json()


@pytest.mark.parametrize("header", ["X-Session-ID", "X-User-ID"])
def test_a_session_stays_with_one_replica_and_sessions_are_spread(router, header):
    homes = Counter()
    for session in range(30):
        found = {
            ask(router, {header: f"s{session}"}, user=str(turn))["replica"] for turn in range(4)
        }
        assert len(found) == 1
        homes.update(found)
    assert len(homes) == 3
    assert min(homes.values()) >= 3


def test_without_a_session_the_router_sends_everything_to_one_replica(router):
    """Why the gate names sessions after pictures: the router does not look at them."""
    found = set()
    for n in range(10):
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{n}" + "A" * 99}}
        found.add(ask(router, {}, messages=[{"role": "user", "content": [image]}])["replica"])
    assert len(found) == 1


def test_keys_and_budgets_arrive(router):
    told = ask(router, {"Authorization": "Bearer k"}, hiprune={"tokens": 64})
    assert (told["key"], told["hiprune"]) == ("Bearer k", {"tokens": 64})


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/hiprune/explain"])
def test_other_routes_that_read_budgets_are_routed_the_same(router, path):
    there = ask(router, {"X-Session-ID": "s1", "Authorization": "Bearer k"}, path)
    assert there["path"] == path
    assert there["replica"] == ask(router, {"X-Session-ID": "s1"})["replica"]


def test_the_probes_of_the_manifest_are_answered(gate, router):
    of_gate, of_router = routing.manifest()
    for probe in ("readinessProbe", "livenessProbe"):
        assert gate.get(of_gate[probe]["httpGet"]["path"]).status_code == 200
    address = router.base_url.netloc.decode()
    for probe in ("startupProbe", "livenessProbe"):
        _, *words = of_router[probe]["exec"]["command"]
        assert "127.0.0.1:8081" in words[-1]
        words[-1] = words[-1].replace("127.0.0.1:8081", address)
        assert subprocess.run([sys.executable, *words]).returncode == 0
        words[-1] = words[-1].replace(address, f"127.0.0.1:{routing.free_port()}")
        assert subprocess.run([sys.executable, *words], capture_output=True).returncode


def test_a_gate_without_a_router_is_alive_and_not_ready(tmp_path_factory):
    if routing.MISSING:
        pytest.skip(routing.MISSING)
    nobody = f"http://127.0.0.1:{routing.free_port()}"
    with routing.gate(nobody, tmp_path_factory.mktemp("gate"), path="/alive") as client:
        assert client.get("/readiness").status_code == 503
        refused = client.post("/v1/chat/completions", headers=with_key(), json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, 503)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/hiprune/explain"])
def test_the_gate_asks_for_the_key(gate, path):
    wrong = ("Bearer other", KEY, f"Bearer {KEY}0", f"Bearer 0{KEY}", f"Bearer {KEY.lower()}")
    for headers in ({}, *({"Authorization": given} for given in wrong)):
        refused = gate.post(path, headers=headers, json={"model": "m", "messages": []})
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == 401
    assert ask(gate, {"Authorization": f"bearer {KEY}"}, path)["path"] == path
    there = ask(gate, {"X-Session-ID": "s1", "Authorization": f"Bearer {KEY}"}, path)
    assert (there["path"], there["key"]) == (path, f"Bearer {KEY}")


@pytest.mark.parametrize(
    "path",
    ["/add_worker?url=http://127.0.0.1:1", "/remove_worker", "/v1/%2e%2e/remove_worker", "/workers",
     "/flush_cache", "//add_worker"],
)  # fmt: skip
def test_nobody_reaches_the_routers_own_routes(gate, path):
    key = {"Authorization": f"Bearer {KEY}"}
    for answer in (gate.get(path, headers=key), gate.post(path, headers=key)):
        assert answer.status_code == 404
        assert "/v1 alone" in answer.json()["error"]["message"]


def with_key(**headers):
    return {"Authorization": f"Bearer {KEY}"} | headers


def test_a_picture_as_large_as_the_server_takes_passes_the_gate(gate):
    assert ask(gate, with_key(), user="x" * 63 * 2**20)["replica"]


def test_a_larger_one_is_told_so_in_openais_envelope(gate):
    refused = gate.post("/v1/chat/completions", headers=with_key(), content=b"x" * (66 * 2**20))
    assert refused.status_code == 413
    assert "64 MiB" in refused.json()["error"]["message"]


def picture(number, size=3000):
    """Data that differs from the start, as pictures do after their first bytes."""
    return base64.b64encode(random.Random(number).randbytes(size)).decode()


def chat(url, question):
    image = {"type": "image_url", "image_url": {"url": url}}
    words = {"type": "text", "text": question}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": [words, image]}]}


def response(url, question):
    content = [
        {"type": "input_text", "text": question},
        {"type": "input_image", "image_url": url},
    ]
    return "/v1/responses", {"input": [{"role": "user", "content": content}]}


def message(url, question):
    source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": question}]
    return "/v1/messages", {"messages": [{"role": "user", "content": content}]}


def explanation(url, question):
    return "/v1/hiprune/explain", {"image_url": url}


@pytest.mark.parametrize("shape", [chat, response, message, explanation])
@pytest.mark.parametrize("indent", [None, 1])
def test_questions_about_one_picture_find_one_replica_without_a_header(gate, shape, indent):
    """By the gate: the router does not look at pictures."""
    homes = Counter()
    for number in range(30):
        found = set()
        for question in ("What is this?", 'And "url": what?', "x" * number * 100):
            path, body = shape(f"data:image/png;base64,{picture(number)}", question)
            content = json.dumps(body, indent=indent)
            headers = with_key() | {"Content-Type": "application/json"}
            found.add(gate.post(path, headers=headers, content=content).json()["replica"])
        assert len(found) == 1
        homes.update(found)
    assert len(homes) == 3
    assert min(homes.values()) >= 3


@pytest.mark.parametrize("size", [500_000, 5_000_000, 20_000_000])
def test_so_do_questions_about_large_pictures(gate, size):
    sessions = []
    for number in (1, 2):
        found = set()
        for question in ("What is this?", "And now? " * 1000):
            path, body = chat(f"data:image/png;base64,{picture(number, size)}", question)
            found.add(*gate.post(path, headers=with_key(), json=body).json()["session"])
        assert len(found) == 1
        sessions += found
    assert sessions[0] != sessions[1]


def test_a_conversation_that_grows_stays_with_its_first_picture(gate):
    path, body = chat("https://example.org/a.png", "What is this?")
    asked = body["messages"]
    (before,) = gate.post(path, headers=with_key(), json=body).json()["session"]
    asked += [{"role": "assistant", "content": "A cat."}]
    asked += chat("https://example.org/b.png", "And this?")[1]["messages"]
    assert gate.post(path, headers=with_key(), json=body).json()["session"] == [before]


@pytest.mark.parametrize("header", ["X-Session-ID", "X-User-ID"])
def test_what_a_client_says_goes_before_the_picture(gate, header):
    for number in (1, 2):
        path, body = chat(f"data:image/png;base64,{picture(number)}", "What is this?")
        told = gate.post(path, headers=with_key(**{header: "mine"}), json=body).json()
        assert told["session"] == ["mine"]


def test_requests_without_a_picture_are_spread(gate):
    assert len({ask(gate, with_key())["replica"] for _ in range(30)}) == 3


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'"url": "', b'{"url": 1}', b"[" * 10**6])
def test_a_body_that_is_no_json_goes_on_to_the_server(gate, body):
    """What is wrong with it, the router and the replica tell."""
    answer = gate.post("/v1/chat/completions", headers=with_key(), content=body)
    assert answer.status_code != 404
    assert "nginx" not in answer.text


def test_routes_without_a_body_pass_the_gate(gate):
    assert gate.get("/v1/models", headers=with_key()).json()["object"] == "list"


def test_a_stream_arrives_as_it_is_made(gate):
    path, body = chat(f"data:image/png;base64,{picture(1)}", "What is this?")
    with gate.stream("POST", path, headers=with_key(), json=body | {"stream": True}) as answer:
        came = [time.monotonic() for line in answer.iter_lines() if line.startswith("data: ")]
    assert len(came) == 2
    assert came[1] - came[0] > PAUSE_S / 2


def test_the_router_knows_every_flag_of_the_manifest():
    told = subprocess.run(
        [routing.ROUTER, "--help"], capture_output=True, text=True, check=True
    ).stdout
    for word in routing.manifest()[1]["args"]:
        if word.startswith("--"):
            assert f"  {word.split('=')[0]} " in told or f"  {word.split('=')[0]}\n" in told, word
