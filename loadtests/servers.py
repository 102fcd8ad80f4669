"""Starts and stops servers, and asks them what they are."""

import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

_START_TIMEOUT_S = 300


def about(url: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """What `GET /v1/hiprune` says.

    Raises:
        RuntimeError: there is no such server, it does not know budgets, or cannot prune its model.
    """
    try:
        response = httpx.get(f"{url}/v1/hiprune", headers=headers, timeout=30)
    except httpx.TransportError as error:
        raise RuntimeError(f"no server answers at {url} ({error})") from None
    if response.status_code == httpx.codes.NOT_FOUND:
        raise RuntimeError(
            f"{url} must be a server with budgets, but has no /v1/hiprune: start it with "
            "hiprune-serve instead of `vllm serve`"
        )
    if response.status_code != httpx.codes.OK:
        raise RuntimeError(
            f"{url} must be a server with budgets, GET /v1/hiprune says {response.status_code}"
        )
    told: dict[str, Any] = response.json()
    if not told["supported"]:
        raise RuntimeError(f"{url} cannot prune its model: {told['reason']}")
    return told


@contextmanager
def running(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """URL of a server until the block ends.

    Args:
        command: gets `--host` and `--port` added.
        log: what it prints; its folder is made where it is not there.
        environment: all of its variables.

    Raises:
        RuntimeError: it exited or did not answer in time; the end of its log is in the message.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        try:
            _wait(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
    raise RuntimeError(f"server did not start (exit code {process.poll()}):\n{tail}\nsee {log}")
