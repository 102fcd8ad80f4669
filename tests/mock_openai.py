"""An OpenAI server that answers as slowly as it is told, and breaks as it is told."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FULL = 576


@dataclass(frozen=True)
class Answer:
    """How one request is answered.

    Attributes:
        first_s, between_s: until the first token, and from each to the next.
        tokens: at most; the request's `max_tokens` where it asks for fewer.
        status: HTTP status; other than 200 an error of OpenAI's kind.
        breaks: after the first token: `cut` closes the connection, `error` sends an error,
            `garbage` sends what is no JSON, `hang` says nothing more.
        report: whether there is a `hiprune` object.
        queue_s, prefill_s: the engine's times as reported; None: not reported.
    """

    first_s: float = 0.0
    between_s: float = 0.0
    tokens: int = 8
    status: int = 200
    breaks: str = ""
    report: bool = True
    queue_s: float | None = None
    prefill_s: float | None = None


@dataclass
class Mock:
    """The server's state; what tests set and read.

    Attributes:
        answer: chooses how request number n (from 0) with this body is answered.
        bodies: of all requests, in the order of their arrival.
        metrics: text of `/metrics` after n answered requests; empty for a 404.
        knows_hiprune: whether there is a `GET /v1/hiprune`.
    """

    answer: Callable[[int, dict[str, Any]], Answer] = lambda _number, _body: Answer()
    metrics: Callable[[int], str] = lambda _answered: ""
    knows_hiprune: bool = True
    model: str = "mock"
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def kept(self, body: dict[str, Any]) -> int:
        plan = body["hiprune"]
        return min(FULL, plan["tokens"] if "tokens" in plan else round(plan["ratio"] * FULL))


@contextmanager
def serving(mock: Mock, port: int = 0) -> Iterator[Mock]:
    """`mock` behind a port of this machine until the block ends."""

    class Handler(_Handler):
        state = mock

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients that went away are part of the tests."""

    server = Server(("127.0.0.1", port), Handler)
    mock.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield mock
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Mock
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        mock = self.state
        if self.path == "/v1/models":
            self.send(200, {"data": [{"id": mock.model, "max_model_len": 4096}]})
        elif self.path == "/v1/hiprune" and mock.knows_hiprune:
            told = {
                "supported": True, "model": mock.model, "family": "llava", "default": {},
                "encoder": {"output_layer": 23}, "versions": {"hiprune": "0", "vllm": "0.32.0"},
            }  # fmt: skip
            self.send(200, told)
        elif self.path == "/metrics" and mock.metrics(0):
            with mock.lock:
                self.send(200, mock.metrics(mock.seen["answered"]))
        else:
            self.send(404, {"detail": "Not Found"})

    def send(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        arrived = time.monotonic()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mock = self.state
        with mock.lock:
            number = len(mock.bodies)
            mock.bodies.append(body)
        answer = mock.answer(number, body)
        if answer.status != 200:
            self.send(answer.status, {"error": {"message": "as told", "code": answer.status}})
            return
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if self.in_chunks:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        tokens = min(answer.tokens, body["max_tokens"])
        first: dict[str, Any] = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        if answer.report:
            images = [{"tokens_full": FULL, "tokens_kept": mock.kept(body), "method": "hiprune"}]
            first["hiprune"] = {"images": images}
        self.event(first)
        for i in range(tokens):
            due = arrived + answer.first_s + i * answer.between_s
            time.sleep(max(0.0, due - time.monotonic()))
            self.event({"choices": [{"delta": {"content": "x"}}]})
            if answer.breaks == "cut":
                return
            if answer.breaks == "error":
                self.event({"error": {"message": "as told", "code": 500}})
                return
            if answer.breaks == "garbage":
                self.line(b"data: {not json\n\n")
                return
            if answer.breaks == "hang":
                time.sleep(30)
                return
        last: dict[str, Any] = {
            "choices": [],
            "usage": {"prompt_tokens": mock.kept(body) + 8, "completion_tokens": tokens},
        }
        if answer.prefill_s is not None:
            last["metrics"] = {
                "queue_time_ms": 1000 * (answer.queue_s or 0.0),
                "time_to_first_token_ms": 1000 * answer.prefill_s,
                "generation_time_ms": 1000 * answer.between_s * (tokens - 1),
            }
        self.event(last)
        with mock.lock:
            mock.seen["answered"] += 1
        self.line(b"data: [DONE]\n\n")
        self.line(b"")

    def event(self, content: dict[str, Any]) -> None:
        self.line(b"data: " + json.dumps(content).encode() + b"\n\n")

    @property
    def in_chunks(self) -> bool:
        """HTTP/1.0, which nginx speaks to servers unless told otherwise, knows no chunks."""
        return self.request_version != "HTTP/1.0"

    def line(self, data: bytes) -> None:
        chunk = f"{len(data):x}\r\n".encode() + data + b"\r\n"
        self.wfile.write(chunk if self.in_chunks else data)
        self.wfile.flush()
