"""Starts real servers as their users do: the installed commands, on a free port."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from loadtests import servers
from tests.e2e.offline import ENVIRONMENT
from tests.photos import data_url

BIN = Path(sys.executable).parent
# The documented words, in the environment at hand, which make must not set up again: on a GPU host
# it is another one than make's.
MAKE = ("make", f"VENV={BIN.parent}", "-o", f"{BIN.parent}/.installed")


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

    def samples(self) -> list[Sample]:
        """Everything on `/metrics`, read with Prometheus' own parser."""
        text = httpx.get(f"{self.url}/metrics").text
        return [one for family in text_string_to_metric_families(text) for one in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples of that name that have these labels, and perhaps others."""
        return sum(
            one.value
            for one in self.samples()
            if one.name == name and labels.items() <= one.labels.items()
        )

    def ask(self, images: Sequence[Any], text: str = "What is this?", **options: Any) -> Any:
        """A greedy chat completion about `images` (PIL pictures or URLs)."""
        return self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": content(images, text)}],
            **{"temperature": 0, "max_tokens": 8, **options},
        )


def check_budgets_are_refused(server: Server, image: Any, reason: str) -> None:
    """Wherever a budget may stand it is a 400 with that reason, by its place."""
    with pytest.raises(BadRequestError) as refused:
        server.ask([image], extra_body={"hiprune": {"tokens": 8}})
    assert refused.value.param == "hiprune"
    assert reason in refused.value.body["message"]
    part = content([image])[1] | {"hiprune": {"tokens": 8}}
    body = {"model": server.model, "messages": [{"role": "user", "content": [part]}]}
    told = server.post("/v1/chat/completions", body)
    assert told.status_code == 400
    assert told.json()["error"]["param"] == "messages[0].content[0].hiprune"
    told = server.post("/v1/hiprune/explain", {"image_url": data_url(image)})
    assert told.status_code == 400
    assert reason in told.json()["error"]["message"]


def content(images: Sequence[Any], text: str = "What is this?") -> list[Any]:
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"type": "text", "text": text}, *parts]


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
    log = folder / f"server-{len(list(folder.glob('server-*.log')))}.log"
    variables = os.environ | ENVIRONMENT | {"XDG_CACHE_HOME": str(folder)} | (environment or {})
    variables.pop("VLLM_LOGGING_LEVEL")
    with servers.running(command, log, variables) as url:
        yield Server(url, model, log)
