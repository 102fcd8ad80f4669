"""Asks a running server all questions of a cell and keeps the answers on disk."""

import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from hiprune_server.demo.world import HELD_OUT, scene
from loadtests.quality.cells import Cell

MAX_TOKENS = 24
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Picture:
    """A held-out picture with its questions.

    Attributes:
        number: from 0; `HELD_OUT + number` is its seed.
        url: the picture as a data URL (PNG, so that nothing is lost).
        questions: (text, answer, kind).
    """

    number: int
    url: str
    questions: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Answer:
    """What came back for one question.

    Attributes:
        cell: key of the cell.
        picture, question: numbers.
        kind: of the question.
        right: whether the answer was exactly the expected one.
        said: the answer.
        full, kept: visual tokens as the server reported them (0 where it reports none).
        error: what went wrong, empty where nothing did; such an answer counts nowhere.
    """

    cell: str
    picture: int
    question: int
    kind: str
    right: bool
    said: str
    full: int
    kept: int
    error: str = ""


def pictures(questions: int) -> list[Picture]:
    """As many held-out pictures as it takes for at least `questions` questions."""
    found: list[Picture] = []
    count = 0
    while count < questions:
        one = scene(HELD_OUT + len(found))
        asked = tuple((q.text, q.answer, q.kind) for q in one.questions())
        found.append(Picture(len(found), data_url(one.picture), asked))
        count += len(asked)
    return found


def drawn_as(url: str, draw: int) -> str:
    """The same picture as another file, of which a server makes another random draw.

    What follows the end of a PNG is no part of the picture.

    Args:
        url: a data URL.
        draw: number of the draw.
    """
    head, _, data = url.partition(",")
    file = base64.b64decode(data) + f"draw {draw}".encode()
    return f"{head},{base64.b64encode(file).decode()}"


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Log:
    """Answers as JSON lines: what is there is not asked again.

    Args:
        path: the file, made where it is not there.
        setting: what all answers of the file depend on.

    Raises:
        ValueError: the file was begun under another setting.
    """

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.answers: dict[tuple[str, int, int], Answer] = {}
        if path.is_file():
            first, *lines = path.read_text().splitlines() or ["{}"]
            before = json.loads(first)
            changed = {k for k in before.keys() | setting if before.get(k) != setting.get(k)}
            if changed:
                told = ", ".join(
                    f"{k}: {before.get(k)!r} then, {setting.get(k)!r} now" for k in sorted(changed)
                )
                raise ValueError(f"{path} holds answers of another evaluation ({told})")
            for line in lines:
                try:
                    self._take(Answer(**json.loads(line)))
                except json.JSONDecodeError:  # the line that an interruption cut off
                    continue
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(setting) + "\n")
        text = path.read_text()
        if not text.endswith("\n"):
            path.write_text(text + "\n")
        self._file = path.open("a")

    def _take(self, answer: Answer) -> None:
        if not answer.error:
            self.answers[answer.cell, answer.picture, answer.question] = answer

    def add(self, answer: Answer) -> None:
        self._take(answer)
        self._file.write(json.dumps(asdict(answer)) + "\n")

    def close(self) -> None:
        self._file.close()


async def ask_cell(
    url: str,
    model: str,
    cell: Cell,
    asked: Iterable[Picture],
    log: Log,
    *,
    concurrency: int,
    headers: dict[str, str] | None = None,
    tell: Callable[[Answer], None],
) -> None:
    """Asks every question that the log has no answer to.

    Args:
        url: of the server, without `/v1`.
        model: its served name.
        asked: the pictures; the questions of one are asked next to each other, so that the server
            encodes it once.
        concurrency: requests under way at a time.
        tell: called with every new answer.
    """
    waiting = [
        (picture, number)
        for picture in asked
        for number in range(len(picture.questions))
        if (cell.key, picture.number, number) not in log.answers
    ]
    todo = iter(waiting)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(
        base_url=url, timeout=_TIMEOUT_S, limits=limits, headers=headers
    ) as client:

        async def work() -> None:
            for picture, number in todo:
                answer = await _ask(client, model, cell, picture, number)
                log.add(answer)
                tell(answer)

        await asyncio.gather(*(work() for _ in range(concurrency)))


async def _ask(
    client: httpx.AsyncClient, model: str, cell: Cell, picture: Picture, number: int
) -> Answer:
    text, expected, kind = picture.questions[number]
    url = drawn_as(picture.url, cell.seed) if cell.plan.get("method") == "random" else picture.url
    part = {"type": "image_url", "image_url": {"url": url}}
    body: dict[str, Any] = {
        "model": model,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": text}]}],
    }
    if cell.plan:
        body["hiprune"] = cell.plan
    said, full, kept, error = "", 0, 0, ""
    try:
        response = await client.post("/v1/chat/completions", json=body)
        if response.status_code == httpx.codes.OK:
            got = response.json()
            said = (got["choices"][0]["message"]["content"] or "").strip()
            (report,) = got.get("hiprune", {}).get("images") or [{}]
            full, kept = report.get("tokens_full", 0), report.get("tokens_kept", 0)
        else:
            error = f"HTTP {response.status_code}"
    except httpx.TimeoutException:
        error = "timeout"
    except httpx.TransportError as problem:
        error = type(problem).__name__
    except (KeyError, ValueError, IndexError, TypeError):
        error = "unreadable answer"
    right = not error and said == expected
    return Answer(cell.key, picture.number, number, kind, right, said, full, kept, error)
