"""Starts real servers as their users do: the installed commands, on a free port."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from tests.e2e.offline import ENVIRONMENT
from tests.photos import data_url

START_TIMEOUT_S = 240
BIN = Path(sys.executable).parent


def serve(checkpoint: Path, *flags: str) -> list[str]:
    """The command that serves a small checkpoint under the name "small"."""
    name = ["--served-model-name", "small", "--max-model-len", "4096", "--enforce-eager"]
    return [str(BIN / "hiprune-serve"), str(checkpoint), *name, *flags]


@dataclass(frozen=True)
class Server:
    url: str
    model: str
    log: Path

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def post(self, path: str, body: Any) -> httpx.Response:
        content = {"content": body} if isinstance(body, str) else {"json": body}
        headers = {"Content-Type": "application/json"}
        return httpx.post(self.url + path, headers=headers, timeout=120, **content)

    def ask(self, images: Sequence[Any], text: str = "What is this?", **options: Any) -> Any:
        """A greedy chat completion about `images` (PIL pictures or URLs)."""
        return self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": content(images, text)}],
            **{"temperature": 0, "max_tokens": 8, **options},
        )


def content(images: Sequence[Any], text: str = "What is this?") -> list[Any]:
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"type": "text", "text": text}, *parts]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(
    command: Sequence[str],
    folder: Path,
    *,
    model: str = "small",
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """A server until the block ends; `command` gets `--host` and `--port` added.

    Raises:
        RuntimeError: it exited or did not answer in time; the end of its log is in the message.
    """
    port = free_port()
    log = folder / f"server-{port}.log"
    server = Server(f"http://127.0.0.1:{port}", model, log)
    variables = os.environ | ENVIRONMENT | {"XDG_CACHE_HOME": str(folder)} | (environment or {})
    variables.pop("VLLM_LOGGING_LEVEL")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
        )
        try:
            _wait_until_healthy(server, process)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-40:])
    raise RuntimeError(f"server did not start (exit code {process.poll()}):\n{tail}")
