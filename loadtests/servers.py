"""Starts and stops the servers that the evaluation talks to, and asks them what they are."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from hiprune_server.demo import CHECKPOINT

_START_TIMEOUT_S = 300


@contextmanager
def demo_server(folder: Path, *flags: str) -> Iterator[str]:
    """URL of a demo server of our own, until the block ends."""
    with _serving(["--demo", *flags], folder / "server.log") as url:
        yield url


@contextmanager
def downscaled_server(side: int, folder: Path) -> Iterator[str]:
    """URL of a demo server whose encoder sees pictures of `side` x `side` patches."""
    checkpoint = folder / f"downscaled-{side}"
    downscale(side, checkpoint)
    flags = ["--served-model-name", "hiprune-demo", "--max-model-len", "4096"]
    flags += ["--enforce-eager", "--dtype", "float32"]
    with _serving([str(checkpoint), *flags], folder / f"server-{side}.log") as url:
        yield url


def downscale(side: int, target: Path) -> None:
    """Writes a copy of the demo checkpoint for smaller pictures.

    The position embeddings of the patches are interpolated (bicubic), as is customary; the model
    was not trained on such pictures.

    Args:
        side: patches on a side of the picture.
        target: folder, replaced.
    """
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(CHECKPOINT, target)
    config = json.loads((target / "config.json").read_text())
    pixels = side * config["vision_config"]["patch_size"]
    config["vision_config"]["image_size"] = pixels
    config["image_seq_length"] = side * side
    (target / "config.json").write_text(json.dumps(config))
    for path in target.glob("*processor_config.json"):
        text = json.loads(path.read_text())
        images = text.get("image_processor", text)
        if "crop_size" in images:
            images["crop_size"] = {"height": pixels, "width": pixels}
            images["size"] = {"shortest_edge": pixels}
        path.write_text(json.dumps(text))
    weights = load_file(target / "model.safetensors")
    (name,) = [one for one in weights if one.endswith("position_embedding.weight")]
    cls, patches = weights[name][:1].float(), weights[name][1:].float()
    grid = round(len(patches) ** 0.5)
    square = patches.T.reshape(1, -1, grid, grid)
    small = torch.nn.functional.interpolate(square, (side, side), mode="bicubic", antialias=True)
    weights[name] = torch.cat([cls, small.flatten(2)[0].T]).half().contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def weights() -> str:
    """What tells the demo model's weights from those of another training."""
    return hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()[:16]


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
def _serving(arguments: Sequence[str], log: Path) -> Iterator[str]:
    program = Path(sys.executable).parent / "hiprune-serve"
    command = [str(program), *arguments, "--disable-uvicorn-access-log"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    with running(command, log, environment) as url:
        yield url


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
