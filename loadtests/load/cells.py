"""What is measured: budgets, loads, and a cell for each pair; how they are written down."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FULL = "full"
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "": 1.0}


def seconds(text: str) -> float:
    """`500ms`, `20s`, `2min` or a plain number of seconds.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|min|m|)", text.strip())
    if match is None:
        raise ValueError(f"a duration must look like 500ms, 20s or 2min, got {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def share(text: str) -> float:
    """`1%` or `0.01` as a number in [0, 1].

    Raises:
        ValueError: it is no share.
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise ValueError(f"a share must look like 1% or 0.01, got {text!r}")
    return value


def span(text: str) -> tuple[int, int]:
    """`16` or `16-64` as the lowest and the highest number, from 1.

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise ValueError(f"a length must look like 16 or 16-64, got {text!r}")
    return low, high


def server(url: str) -> str:
    """A server's URL without a slash or `/v1` at its end."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def plan(budget: str) -> dict[str, Any]:
    """The `hiprune` object of a budget: `full`, tokens (`64`), a ratio (`0.25`) or JSON.

    Raises:
        ValueError: it is none of these.
    """
    if budget == FULL:
        return {"ratio": 1.0}
    try:
        value = json.loads(budget)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return {"tokens": value}
    if isinstance(value, float) and 0 < value <= 1:
        return {"ratio": value}
    raise ValueError(
        f"a budget must be full, a number of tokens, a ratio with a point (0.25) or a `hiprune` "
        f"object, got {budget!r}"
    )


@dataclass(frozen=True)
class Load:
    """How hard the server is asked.

    Attributes:
        kind: `closed`: `amount` users, each with one request at a time; `open`: requests arrive
            as a Poisson process, `amount` a second, whatever the server does; `stages`: closed,
            the number of users changes.
        amount: users (the most of them, for stages) or requests a second.
        stages: (seconds, users) one after the other, begun again at their end.
    """

    kind: Literal["closed", "open", "stages"]
    amount: float
    stages: tuple[tuple[float, int], ...] = ()

    @property
    def name(self) -> str:
        if self.kind == "open":
            return f"{self.amount:g}/s"
        if self.kind == "stages":
            return " ".join(f"{length:g}s:{users}" for length, users in self.stages)
        return f"{self.amount:g}"


def stages(text: str) -> Load:
    """`20s:2,20s:8` as a load whose number of users changes.

    Raises:
        ValueError: it is not that.
    """
    steps = []
    for part in text.split(","):
        length, colon, users = part.partition(":")
        if not colon or not users.strip().isdigit() or int(users) < 1:
            raise ValueError(f"stages must look like 20s:2,20s:8, got {text!r}")
        steps.append((seconds(length), int(users)))
    if min(length for length, _ in steps) < 1:
        raise ValueError(f"a stage must last a second at least, got {text!r}")
    return Load("stages", max(users for _, users in steps), tuple(steps))


@dataclass(frozen=True)
class Asking:
    """What every request of a sweep has in common.

    Attributes:
        model: served name.
        answer, question: lowest and highest length; tokens and words.
        exact: whether answers have exactly that many tokens (`ignore_eos`), so that every budget
            decodes as much.
        timeout_s: of one request, from its start to its end.
        cancelled, slow: shares of requests that are cancelled after their first token, and that
            are read slowly.
        cache_hits: whether pictures come again and may be found in caches.
        seed: of lengths, arrivals and pictures.
    """

    model: str
    answer: tuple[int, int] = (32, 32)
    question: tuple[int, int] = (6, 6)
    exact: bool = True
    timeout_s: float = 120.0
    cancelled: float = 0.0
    slow: float = 0.0
    cache_hits: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """One budget under one load.

    Attributes:
        number: from 0, in the order of running.
        run: name of the sweep; pictures' identities in the server's caches begin with it.
        url: of the server, without `/v1`.
        pool: file of the pictures (`loadtests.load.pictures`).
        images, sizes: what further ones are made from where the pool has no more.
        folder: where the load generator leaves what it saw.
        in_flight: under an open load, requests at a time; later ones are not sent.
    """

    number: int
    run: str
    budget: str
    load: Load
    url: str
    pool: str
    folder: str
    images: str
    sizes: str
    asking: Asking = field(default_factory=lambda: Asking(""))
    in_flight: int = 512

    @property
    def name(self) -> str:
        return f"{self.budget} @ {self.load.name}"

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Cell":
        """Inverse of `write`."""
        told = json.loads(path.read_text())
        steps = tuple((length, users) for length, users in told["load"].pop("stages"))
        asking = told["asking"]
        for name in ("answer", "question"):
            asking[name] = tuple(asking[name])
        return cls(
            **{
                **told,
                "load": Load(**told["load"], stages=steps),
                "asking": Asking(**asking),
            }
        )


def sweep(budgets: Sequence[str], loads: Sequence[Load], repeats: int) -> list[tuple[str, Load]]:
    """(budget, load) in the order of running.

    Rounds go one after the other, every second one backwards: a machine that slowly gets faster
    or slower then favours no cell.
    """
    once = [(budget, load) for load in loads for budget in budgets]
    every: list[tuple[str, Load]] = []
    for number in range(repeats):
        every += reversed(once) if number % 2 else once
    return every
