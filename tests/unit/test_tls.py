"""TLS before the server: the real Caddy with the file of `--profile tls`, before a small server."""

import http.client
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CADDYFILE = ROOT / "deploy" / "caddy" / "Caddyfile"
CADDY = shutil.which("caddy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

pytestmark = pytest.mark.skipif(not CADDY, reason="needs caddy, of the dev dependencies")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Upstream(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(json.dumps({"path": self.path, "key": self.headers["Authorization"]}).encode())

    def do_POST(self):
        """A stream whose second token comes when the client has read the first."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for word in (b"one", b"two"):
            self.wfile.write(b"3\r\n" + word + b"\r\n")
            self.wfile.flush()
            if word == b"one":
                assert self.server.read_first.wait(20)
        self.wfile.write(b"0\r\n\r\n")

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module", params=["internal", "of one's own"])
def proxy(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    certificate = "internal"
    if request.param != "internal":
        chain, key = folder / "chain.pem", folder / "key.pem"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
                *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
                *("-keyout", key, "-out", chain),
            ],
            check=True,
            capture_output=True,
        )
        certificate = f"{chain} {key}"
    ports = {name: str(free_port()) for name in ("LISTEN", "HTTP_LISTEN", "HEALTH")}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server.read_first = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HOME": str(folder),
        "PATH": os.environ["PATH"],
        "TLS_NAME": "localhost",
        "TLS_CERTIFICATE": certificate,
        "TLS_UPSTREAM": f"127.0.0.1:{server.server_port}",
        **{f"TLS_{name}": port for name, port in ports.items()},
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [CADDY, "run", "--config", CADDYFILE], env=environment, stdout=log, stderr=log
        )
    try:
        wait_for(int(ports["HEALTH"]), folder / "log")
        yield ports, server
    finally:
        process.terminate()
        process.wait(timeout=30)
        server.shutdown()


def wait_for(port, log):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/alive")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def connect(proxy):
    """As a client that takes the certificate for what it is, since no authority here signed it."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    port = int(proxy[0]["LISTEN"])
    end = time.monotonic() + 20
    while True:
        try:
            one = http.client.HTTPSConnection("localhost", port, context=context, timeout=20)
            one.connect()
        except (OSError, ssl.SSLError):  # a certificate of its own is made within a moment
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
        else:
            return one


def test_requests_reach_the_server_with_their_key(proxy):
    connection = connect(proxy)
    connection.request("GET", "/v1/models", headers={"Authorization": "Bearer abc"})
    answer = connection.getresponse()
    assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
    assert json.load(answer) == {"path": "/v1/models", "key": "Bearer abc"}


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/%6detrics"])
def test_metrics_are_not_for_a_network(proxy, path):
    connection = connect(proxy)
    connection.request("GET", path)
    assert connection.getresponse().status == 404


def test_tokens_come_as_they_are_made(proxy):
    connection = connect(proxy)
    proxy[1].read_first.clear()
    connection.request("POST", "/v1/chat/completions", body=b"{}")
    answer = connection.getresponse()
    assert answer.read(3) == b"one"
    proxy[1].read_first.set()
    assert answer.read() == b"two"


def test_a_body_beyond_the_servers_limit_is_not_taken(proxy):
    connection = connect(proxy)
    proxy[1].read_first.set()
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(66 * 2**20))
    connection.endheaders()
    block, sent = b" " * 2**20, 0
    try:
        for _ in range(66):
            connection.send(block)
            sent += 1
    except OSError:
        pass  # it hung up
    try:
        status = connection.getresponse().status
    except OSError:
        assert sent < 66
    else:
        assert status == 413


def test_plain_http_is_sent_to_https(proxy):
    connection = http.client.HTTPConnection("localhost", int(proxy[0]["HTTP_LISTEN"]), timeout=20)
    connection.request("GET", "/v1/models")
    answer = connection.getresponse()
    assert answer.status in (301, 308)
    assert answer.headers["Location"].startswith("https://localhost")


def test_the_container_does_not_start_without_a_key(tmp_path):
    """The words of the entry point, with a program in Caddy's place."""
    import yaml

    service = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["tls"]
    (script,) = service["entrypoint"][2:]
    key = tmp_path / "api_key"
    script = script.replace("/run/secrets/api_key", str(key)).replace("exec caddy", "exec echo")
    for content, status in ((None, 1), ("", 1), ("abc", 0)):
        if content is not None:
            key.write_text(content)
        ran = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
        assert ran.returncode == status
        assert ("API_KEY_FILE" in ran.stderr) is bool(status)
