"""Locust's users: a cell of the sweep where LOAD_CELL names one, else Locust's own page.

locust -f loadtests/load/locustfile.py --host http://127.0.0.1:8000      # or: make load-ui
"""

import contextlib
import json
import logging
import os
import random
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import gevent
import psutil
from locust import LoadTestShape, User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtests.load import asking, pictures, preflight
from loadtests.load.asking import Client
from loadtests.load.cells import Asking, Cell, plan, server, span
from loadtests.load.credentials import headers
from loadtests.load.records import NOT_ERRORS, UNSENT, Record
from loadtests.load.running import LAG_EVERY_S

CELL = Cell.read(Path(os.environ["LOAD_CELL"])) if "LOAD_CELL" in os.environ else None
BACK_OFF_S = 0.5
"""How long a user waits after an error: a server that is not there is not to be hammered."""
PRIORITY = -10
HEALTH_EVERY_S = 1.0


def index(environment: Environment) -> int:
    """Which of Locust's workers this process is, from 0."""
    runner = environment.runner
    return max(runner.worker_index, 0) if isinstance(runner, WorkerRunner) else 0


def processes(environment: Environment) -> int:
    """How many workers there are."""
    return max(1, getattr(environment.parsed_options, "processes", None) or 1)


class Pictures:
    """Numbers and data URLs of the pictures that this worker asks about, none of them twice."""

    def __init__(self, environment: Environment) -> None:
        options: Any = environment.parsed_options
        self._numbers = count(index(environment), processes(environment))
        self._pool = pictures.Pool(Path(CELL.pool)) if CELL else None
        self._again = CELL is not None and CELL.asking.cache_hits
        chosen: Any = CELL or options
        seed = CELL.asking.seed if CELL else random.getrandbits(30)
        self._source = pictures.Source(chosen.images, pictures.sizes(chosen.sizes), seed)

    def next(self) -> tuple[int, str]:
        """The next one, from the pool while that lasts."""
        number = next(self._numbers)
        if self._pool is None:
            return number, self._source.url(number)
        if self._again:
            number %= len(self._pool)
        url = self._pool[number] if number < len(self._pool) else self._source.url(number)
        return number, url


class Written:
    """A file that this worker adds lines of JSON to."""

    def __init__(self, name: str) -> None:
        self._file = (Path(CELL.folder) / f"{name}-{os.getpid()}.jsonl").open("a") if CELL else None

    def add(self, line: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


class Worker:
    """What all users of one process share; made when the test starts."""

    current: ClassVar["Worker"]

    def __init__(self, environment: Environment) -> None:
        options: Any = environment.parsed_options
        self.environment = environment
        url = CELL.url if CELL else server(environment.host or "")
        self.asking = CELL.asking if CELL else _asked_on_page(options, url)
        self.budgets = [CELL.budget] if CELL else options.budgets.split()
        for budget in self.budgets:
            plan(budget)
        self.pictures = Pictures(environment)
        self.client = Client(url, headers(), self.asking.timeout_s)
        self.requests = Written("requests")
        # The same arrivals and cancellations in every cell.
        self.dice = random.Random(f"{self.asking.seed} {index(environment)}")
        self.under_way: dict[int, float] = {}

    def ask(self, started: float | None = None) -> Record:
        """One request from its picture to its record."""
        number, url = self.pictures.next()
        budget = self.budgets[number % len(self.budgets)]
        identity = ""
        if CELL and not self.asking.cache_hits:
            identity = f"{CELL.run}-{CELL.number}-{number}"
        wished = asking.body(self.asking, plan(budget), url, number, identity=identity)
        fate = self.dice.random()
        cancel = fate < self.asking.cancelled
        slow = not cancel and fate < self.asking.cancelled + self.asking.slow
        record = Record(number, time.monotonic() if started is None else started)
        self.under_way[id(record)] = record.started
        try:
            self.client.ask(wished, record, cancel=cancel, slow=slow)
        finally:
            del self.under_way[id(record)]
        self.note(record, budget)
        return record

    def note(self, record: Record, budget: str) -> None:
        """Writes a record down and shows it to Locust."""
        self.requests.add(asdict(record))
        fire = self.environment.events.request.fire
        failed = record.outcome not in NOT_ERRORS
        said = f"{record.outcome} {record.detail}".strip()
        length = record.answer or 0
        fire(
            request_type="POST", name=f"{asking.PATH} {budget}", response_length=length,
            response_time=1000 * record.seconds, exception=RuntimeError(said) if failed else None,
        )  # fmt: skip
        shown = {"TTFT": record.ttft, "prefill": record.prefill, "queue": record.queue}
        if record.gaps:
            shown["ITL"] = sum(record.gaps) / len(record.gaps)
        for name, seconds in shown.items():
            if seconds is not None:
                fire(request_type=name, name=budget, response_time=1000 * seconds,
                     response_length=0, exception=None)  # fmt: skip


def _asked_on_page(options: Any, url: str) -> Asking:
    """What the fields of Locust's page say."""
    return Asking(
        options.model or next(iter(preflight.models(url, headers()))),
        answer=span(options.answer_tokens),
        question=span(options.question_words),
    )


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    try:
        Worker.current = Worker(environment)
    except (ValueError, RuntimeError, OSError) as error:
        # A field of the page is wrong, or no server is there: its log and its page say so.
        logging.getLogger(__name__).error("%s", error)
        if environment.runner:
            gevent.spawn(environment.runner.stop)
        return
    if CELL:
        # On the server's own machine it would otherwise wait for the engine's threads, and their
        # time slices would be what it measures. It needs little and may not have the right to.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
        gevent.spawn(watch, environment)


def watch(environment: Environment) -> None:
    """Writes down how this process fares: its processor time and how late it wakes up."""
    sweep = int(os.environ["LOAD_SWEEP"])
    health, process = Written("health"), psutil.Process()
    lags: list[float] = []
    spent, since = sum(process.cpu_times()[:2]), time.monotonic()
    while True:
        slept = time.monotonic()
        gevent.sleep(LAG_EVERY_S)
        now = time.monotonic()
        lags.append(max(0.0, now - slept - LAG_EVERY_S))
        if now - since >= HEALTH_EVERY_S:
            used = sum(process.cpu_times()[:2])
            waiting = os.getloadavg()[0] / (os.cpu_count() or 1)
            cpu = (used - spent) / (now - since)
            open_since = list(Worker.current.under_way.values())
            health.add(
                {"at": now, "cpu": cpu, "lags": lags, "waiting": waiting, "open": open_since}
            )
            lags, spent, since = [], used, now
            if environment.runner and not psutil.pid_exists(sweep):
                environment.runner.quit()  # or it would go on for ever


class Closed(User):
    """A user with one request at a time."""

    abstract = CELL is not None and CELL.load.kind == "open"

    @task
    def ask(self) -> None:
        record = Worker.current.ask()
        if record.outcome not in NOT_ERRORS:
            gevent.sleep(BACK_OFF_S)


class Arrivals(User):
    """Requests that arrive as a Poisson process, whatever the server does; one user a worker."""

    abstract = CELL is None or CELL.load.kind != "open"

    @task
    def arrive(self) -> None:
        assert CELL is not None
        worker = Worker.current
        workers = processes(worker.environment)
        rate = CELL.load.amount / workers
        most = max(1, CELL.in_flight // workers)
        due = time.monotonic()
        while True:
            due += worker.dice.expovariate(rate)
            gevent.sleep(max(0.0, due - time.monotonic()))
            if len(worker.under_way) >= most:
                late = Record(-1, due, time.monotonic(), UNSENT)
                worker.note(late, CELL.budget)
                continue
            # From when it was due, so that a load generator that is late shows.
            gevent.spawn(worker.ask, due)


if CELL is not None and CELL.load.kind == "stages":

    class Stages(LoadTestShape):
        """The number of users over time, as the cell says."""

        def tick(self) -> tuple[int, float] | None:
            assert CELL is not None
            passed = self.get_run_time() % sum(length for length, _ in CELL.load.stages)
            for length, users in CELL.load.stages:
                if passed < length:
                    return users, 100.0
                passed -= length
            return CELL.load.stages[-1][1], 100.0


@events.init_command_line_parser.add_listener
def arguments(parser: LocustArgumentParser) -> None:
    """Fields of Locust's page."""
    if CELL is not None:
        return
    for name, default, told in (
        ("--budgets", "full 64", "budgets, taken in turn: full, tokens, a ratio"),
        ("--model", "", "served model (empty: the first that the server lists)"),
        ("--images", pictures.PHOTOS, "photos, or a folder of pictures"),
        ("--sizes", pictures.SIZES, "sizes of the pictures as a distribution"),
        ("--question-words", "6", "length of the question, or a range such as 6-40"),
        ("--answer-tokens", "32", "length of the answer, or a range"),
    ):
        parser.add_argument(name, default=default, help=told)
