"""vLLM's router and the gate before it, as the Kubernetes manifest has them, in processes here."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[1]
BASE = ROOT / "deploy" / "kubernetes" / "base"
ROUTER = Path(sys.executable).parent / "vllm-router"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
NJS = Path("/usr/lib/nginx/modules/ngx_http_js_module.so")
MISSING = (
    ""
    if NGINX and NJS.exists()
    else "needs nginx with JavaScript (Debian's nginx-light, libnginx-mod-http-js)"
)
READY = "/readiness"
KEY = "0123456789abcdefABCDEF" * 3  # as long as `openssl rand -hex 32` makes them, and longer


def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    """The containers of the router's pod: the gate, and the router."""
    documents = yaml.safe_load_all((BASE / "router.yaml").read_text())
    (one,) = [document for document in documents if document["kind"] == "Deployment"]
    gate, router = one["spec"]["template"]["spec"]["containers"]
    return gate, router


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def _running(
    command: Sequence[str | Path], url: str, log: Path, path: str
) -> Iterator[httpx.Client]:
    with log.open("w") as output, httpx.Client(base_url=url, timeout=20) as client:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(client, log, path)
            yield client
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait(client: httpx.Client, log: Path, path: str) -> None:
    for _ in range(150):
        time.sleep(0.2)
        try:
            if client.get(path).status_code == 200:
                return
        except httpx.TransportError:
            pass
    raise RuntimeError(f"not ready in 30 s:\n{log.read_text()[-2000:]}")


@contextmanager
def router(
    replicas: Sequence[str], folder: Path, metrics_port: int | None = None
) -> Iterator[httpx.Client]:
    """The router with the manifest's policy and key, before `replicas` (URLs)."""
    port = free_port()
    (policy,) = [word for word in manifest()[1]["args"] if word.startswith("--policy=")]
    command = [
        ROUTER, f"--port={port}", f"--api-key={KEY}", policy,
        f"--prometheus-port={metrics_port or free_port()}", "--worker-urls", *replicas,
    ]  # fmt: skip
    with _running(command, f"http://127.0.0.1:{port}", folder / "router.log", READY) as client:
        yield client


@contextmanager
def gate(router_url: str, folder: Path, path: str = READY) -> Iterator[httpx.Client]:
    """nginx with the manifest's template and flags, as its image fills them in.

    Waits until it answers `path`.
    """
    port = free_port()
    server = (BASE / "default.conf.template").read_text()
    for before, after in (
        ("${API_KEY}", KEY),
        ("listen 8080", f"listen 127.0.0.1:{port}"),
        ("http://127.0.0.1:8081", router_url),
        ("/etc/nginx/templates", str(BASE)),
    ):
        assert before in server
        server = server.replace(before, after)
    _, _, flags = manifest()[0]["args"]
    flags = flags.replace("modules/ngx_http_js_module.so", str(NJS))
    with _nginx(server, folder, port, path, flags) as client:
        yield client


@contextmanager
def proxy(url: str, folder: Path, *, buffering: bool) -> Iterator[str]:
    """URL of an nginx before a server: with its own defaults, or as streams need it."""
    port = free_port()
    streams = "" if buffering else "proxy_http_version 1.1; proxy_buffering off;"
    server = (
        f"server {{ listen 127.0.0.1:{port}; client_max_body_size 64m; "
        f"location / {{ proxy_pass {url}; {streams} }} }}"
    )
    with _nginx(server, folder, port, "/v1/models", "daemon off;"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _nginx(server: str, folder: Path, port: int, path: str, flags: str) -> Iterator[httpx.Client]:
    """nginx with this `server` block, once it answers `path`."""
    paths = " ".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "" if os.getuid() else "user root;"  # or its workers could not write to the folder
    (folder / "nginx.conf").write_text(
        f"{user} pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {paths}\n{server} }}\n"
    )
    assert NGINX
    command = [NGINX, "-p", folder, "-c", folder / "nginx.conf", "-g", flags]
    with _running(command, f"http://127.0.0.1:{port}", folder / "nginx.log", path) as client:
        yield client
