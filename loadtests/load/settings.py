"""The command line of `make load`, checked before anything starts."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtests.load import cells, compare, pictures, slo
from loadtests.load.cells import Load


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for; `loads` has the list of loads, `command` how it was asked."""
    parser = _parser()
    given = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    given.command = " ".join(["python -m loadtests.load", *words])
    given.url = cells.server(given.url)
    try:
        for budget in given.budgets:
            cells.plan(budget)
        pictures.sizes(given.sizes)
        given.loads = loads(given)
    except ValueError as error:
        parser.error(str(error))
    for name in ("requests", "repeats", "processes", "in_flight", "pictures"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if given.duration < 1:
        parser.error(f"--duration must be at least 1s, got {given.duration:g}s")
    if given.cancel + given.slow > 1:
        parser.error("--cancel and --slow must not be more than all requests together")
    try:
        given.earlier = compare.read(given.compare) if given.compare else None
    except ValueError as error:
        parser.error(f"--compare {error}")
    return given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.load", description=__doc__)
    add = parser.add_argument
    checked = slo.checked
    add("--url", default="http://127.0.0.1:8000", help="server, without /v1")
    add("--model", default="", help="served name (default: the first that the server lists)")
    add("--budgets", nargs="+", default=["full", "192", "64"], metavar="BUDGET",
        help="full, tokens (64), a ratio (0.25) or a hiprune object as JSON")  # fmt: skip
    add("--concurrency", nargs="*", type=int, metavar="USERS", help="users (default: 1 4)")
    add("--rates", nargs="+", type=float, default=[], metavar="PER_S",
        help="open load: arrivals a second (Poisson), instead of users")  # fmt: skip
    add("--stages", type=checked(cells.stages),
        help="a load whose users change, e.g. 20s:2,20s:8, instead of both")  # fmt: skip
    add("--duration", type=checked(cells.seconds), default=20.0, help="window of a cell, e.g. 20s")
    add("--warm-up", type=checked(cells.seconds), default=4.0, help="before it, at least")
    add("--requests", type=int, default=1, metavar="N",
        help="the window goes on until N have finished, 5 times its length at most")  # fmt: skip
    add("--repeats", type=int, default=1, help="rounds of the whole sweep")
    add("--images", default=pictures.PHOTOS, help="photos, or a folder of pictures")
    add("--sizes", default=pictures.SIZES, help=f"distribution, default {pictures.SIZES}")
    add("--pictures", type=int, help="made before the load (default: as many as it may take)")
    add("--question-words", type=checked(cells.span), default=(6, 6), help="e.g. 6 or 6-40")
    add("--answer-tokens", type=checked(cells.span), default=(32, 32), help="e.g. 32 or 16-64")
    add("--natural-length", action="store_true", help="answers end where the model ends them")
    add("--timeout", type=checked(cells.seconds), default=120.0, help="of one request")
    add("--cancel", type=checked(cells.share), default=0.0, metavar="SHARE",
        help="requests that are cancelled after their first token")  # fmt: skip
    add("--slow", type=checked(cells.share), default=0.0, metavar="SHARE",
        help="requests that are read slowly")  # fmt: skip
    add("--allow-cache-hits", action="store_true", help="let pictures come again, on purpose")
    add("--processes", type=int, default=1, help="workers of Locust")
    add("--in-flight", type=int, default=512, help="open load: requests at a time at most")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("build/load"), help="folder of the report")
    add("--compare", type=Path, metavar="JSON", help="results.json of an earlier sweep")
    add("--noise", type=checked(cells.share), default=0.05,
        help="change that two runs of the same may show (default 5%%)")  # fmt: skip
    add("--recover", type=checked(cells.seconds), default=180.0,
        help="how long a server that went away may stay away")  # fmt: skip
    add("--note", default="", help="for the report, e.g. the server's hardware")
    slo.add_arguments(parser)
    return parser


def loads(given: argparse.Namespace) -> list[Load]:
    """The loads that were asked for, of one kind.

    Raises:
        ValueError: of several kinds, or none that can be.
    """
    kinds = [bool(given.concurrency), bool(given.rates), given.stages is not None]
    if sum(kinds) > 1:
        raise ValueError("give one of --concurrency, --rates and --stages")
    if given.stages is not None:
        return [given.stages]
    if given.rates:
        for rate in given.rates:
            if not 0 < rate < math.inf:
                raise ValueError(f"--rates must be above 0, got {rate:g}")
        return [Load("open", rate) for rate in dict.fromkeys(given.rates)]
    users = given.concurrency or [1, 4]
    if min(users) < given.processes:
        raise ValueError(
            f"--concurrency must be at least --processes ({given.processes}), got {min(users)}"
        )
    return [Load("closed", amount) for amount in dict.fromkeys(users)]
