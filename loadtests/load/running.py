"""Runs one cell: Locust in processes of its own, a warm-up, a window that counts."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.load import engine
from loadtests.load.cells import Cell
from loadtests.load.engine import Scrape
from loadtests.load.records import NOT_ERRORS, Record

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_LOOK_EVERY_S = 0.25
_START_S = 60
_STOP_S = 15
BUSY_S = 60
LAG_EVERY_S = 0.02
"""How often the load generator looks whether it wakes up in time."""
LONGEST = 5
"""A window that waits for a number of requests lasts at most so many times its length."""


@dataclass(frozen=True)
class Length:
    """How long a cell lasts.

    Attributes:
        warm_up_s: left out of every number; longer where users need it for their first answer.
        window_s: what counts.
        requests: the window goes on until as many have finished, `LONGEST` times its length at
            most.
    """

    warm_up_s: float
    window_s: float
    requests: int = 1


@dataclass
class Run:
    """What one cell showed.

    Attributes:
        records: of all requests that ended in the window.
        begin, end: of the window, monotonic clock.
        health: samples of the load generator in the window, by process.
        at_start, before, after: the server's metrics when the cell began and at the window's
            borders; None where it did not answer.
        trouble: what went wrong with the cell as a whole; empty where nothing did.
        busy: whether the engine had requests of somebody else's when the cell began.
    """

    cell: Cell
    records: list[Record] = field(default_factory=list)
    begin: float = 0.0
    end: float = 0.0
    health: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    at_start: Scrape | None = None
    before: Scrape | None = None
    after: Scrape | None = None
    trouble: str = ""
    busy: bool = False


class Tail:
    """New lines of JSON in the files of a folder, as they come."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._read: dict[Path, int] = {}

    def lines(self) -> list[tuple[str, dict[str, Any]]]:
        """(process, line) for each line that was finished since the last call."""
        found = []
        for path in sorted(self._folder.glob(f"{self._name}-*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            process = path.stem.rpartition("-")[2]
            found += [(process, json.loads(line)) for line in whole.splitlines()]
        return found


def run(
    cell: Cell,
    length: Length,
    headers: Mapping[str, str],
    processes: int,
    tell: Callable[[str, float, list[Record]], None],
) -> Run:
    """Runs `cell` to its end, whatever the server does.

    Args:
        headers: for the server's `/metrics`.
        processes: workers of Locust.
        tell: hears the phase (`warm-up`, `window`), how much of it has passed in seconds and
            what has ended in it.
    """
    done = Run(cell)
    folder = Path(cell.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    done.at_start = engine.scrape(cell.url, headers)
    requests = Tail(folder, "requests")
    records: list[Record] = []

    def look() -> None:
        time.sleep(_LOOK_EVERY_S)
        records.extend(Record(**line) for _, line in requests.lines())

    def ended(since: float) -> list[Record]:
        return [record for record in records if record.ended > since]

    with _locust(cell, folder, processes) as process:
        began = time.monotonic()
        while process.poll() is None and not list(folder.glob("health-*.jsonl")):
            if time.monotonic() - began > _START_S:
                done.trouble = f"the load generator did not start in {_START_S} s"
                return done
            time.sleep(_LOOK_EVERY_S)
        began = time.monotonic()
        users = cell.load.amount if cell.load.kind != "open" else 1
        longest = length.warm_up_s + cell.asking.timeout_s
        while process.poll() is None:
            passed = time.monotonic() - began
            warm = passed >= length.warm_up_s and len(records) >= users
            if warm or passed >= longest:
                break
            look()
            tell("warm-up", passed, records)
        done.before = engine.scrape(cell.url, headers)
        done.begin = time.monotonic()
        while process.poll() is None:
            passed = time.monotonic() - done.begin
            answered = sum(r.outcome in NOT_ERRORS for r in ended(done.begin))
            enough = answered >= length.requests or passed >= LONGEST * length.window_s
            if passed >= length.window_s and enough:
                break
            look()
            tell("window", passed, ended(done.begin))
        if process.poll() is not None:
            done.trouble = _why(folder, process)
        done.end = time.monotonic()
        done.after = engine.scrape(cell.url, headers)
        look()
    done.records = [r for r in ended(done.begin) if r.ended <= done.end]
    for name, sample in Tail(folder, "health").lines():
        if done.begin < sample["at"] <= done.end + 1:
            done.health.setdefault(name, []).append(sample)
    return done


def _why(folder: Path, process: subprocess.Popen[bytes]) -> str:
    tail = (folder / "locust.log").read_text(errors="replace").strip().splitlines()[-3:]
    return f"the load generator ended with status {process.returncode}: {' / '.join(tail)}"


@contextmanager
def _locust(cell: Cell, folder: Path, processes: int) -> Iterator[subprocess.Popen[bytes]]:
    """Locust at work on `cell` until the block ends; all of its processes are gone then."""
    cell.write(folder / "cell.json")
    users = int(cell.load.amount) if cell.load.kind == "closed" else processes
    command = [
        sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--host", cell.url,
        "--headless", "--only-summary", "--loglevel", "WARNING", "--stop-timeout", "0",
    ]  # fmt: skip
    if cell.load.kind != "stages":
        command += ["--users", str(users), "--spawn-rate", "100"]
    if processes > 1:
        command += ["--processes", str(processes)]
    environment = os.environ | {"LOAD_CELL": str(folder / "cell.json"), "PYTHONUNBUFFERED": "1"}
    environment["LOAD_SWEEP"] = str(os.getpid())
    environment["PYTHONPATH"] = str(LOCUSTFILE.parents[2])
    with (folder / "locust.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_idle(url: str, headers: Mapping[str, str], away_s: float) -> Scrape | None:
    """Waits until the engine has nothing under way, `BUSY_S` at most: it may have other clients.

    Returns:
        Its metrics; None where it did not answer for `away_s`.
    """
    began = time.monotonic()
    while True:
        seen = engine.scrape(url, headers, timeout_s=10)
        passed = time.monotonic() - began
        if seen is None:
            if passed > away_s:
                return None
        elif not seen.under_way or passed > BUSY_S:
            return seen
        time.sleep(0.5)
