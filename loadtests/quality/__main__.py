"""`make eval` and `make eval-quick`: accuracy against budget, through a running server."""

import argparse
import asyncio
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtests import demo, machine, servers
from loadtests.quality import cells as grid
from loadtests.quality import examples, report
from loadtests.quality.asking import Answer, Log, Picture, ask_cell, pictures
from loadtests.quality.cells import Cell
from loadtests.quality.results import Answers
from loadtests.quality.stats import accuracy

QUICK_QUESTIONS = 400
CLOSE_TO_FULL = 0.02
"""HiPrune at 64 tokens may be this much below the full picture."""
FAR_FROM_FULL = 0.25
"""Random at 64 tokens must be at least this much below: otherwise the questions show nothing."""
HEAT_TOKENS = 32
BUFFER_BUDGETS = (192, 64, 16)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the evaluation; returns 0, or 1 where a threshold or a question failed, 2 on misuse."""
    given = _arguments(argv)
    try:
        return asyncio.run(_evaluate(given))
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.quality", description=__doc__)
    parser.add_argument("--url", help="a running server of the demo model (default: start one)")
    parser.add_argument("--out", type=Path, help="folder of answers and report")
    parser.add_argument("--questions", type=int, help="at least so many a cell (default 1000)")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(grid.BUDGETS))
    parser.add_argument("--sets", nargs="+", choices=grid.SETS, default=list(grid.SETS))
    parser.add_argument("--seeds", type=int, default=grid.SEEDS, help="draws of random")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="three cells, with thresholds")
    given = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    given.command = " ".join(["python -m loadtests.quality", *words])
    given.out = given.out or Path("build/eval-quick" if given.quick else "build/eval")
    given.questions = given.questions or (QUICK_QUESTIONS if given.quick else 1000)
    for name in ("questions", "seeds", "concurrency"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}")
    if min(given.budgets) < 1:
        parser.error(f"--budgets must be at least 1, got {min(given.budgets)}")
    return given


async def _evaluate(given: argparse.Namespace) -> int:
    began = time.monotonic()
    key = os.environ.get("EVAL_API_KEY")  # not an argument: those go into the report
    headers = {"Authorization": f"Bearer {key}"} if key else None
    asked = pictures(given.questions)
    errors: Counter[str] = Counter()
    own = nullcontext(given.url) if given.url else demo.demo_server(given.out)
    _say("starting the demo server" if not given.url else f"asking {given.url}")
    with own as url:
        told = servers.about(url, headers)
        object_layer = told["default"]["object_layer"]
        sets = _sets(given, told, object_layer)
        every = grid.unique([cell for group in sets.values() for cell in group])
        setting = _setting(told, asked, "" if given.url else demo.weights())
        log = Log(given.out / "answers.jsonl", setting)
        progress = _Progress(every, asked, log, errors)
        for cell in every:
            if not cell.side:
                await _ask(url, told["model"], cell, asked, log, progress, given, headers)
        kept, shown = None, list[Answer]()
        if told["model"] == "hiprune-demo":
            kept, shown = examples.chosen(sets.get("methods", []), Answers(log.answers.values()))
        wanted = {answer.picture for answer in shown}
        drawn = kept and examples.overlays(
            url, headers, kept, [picture for picture in asked if picture.number in wanted]
        )
    for cell in every:
        if cell.side and not progress.done(cell):
            _say(f"starting a server for pictures of {cell.side} x {cell.side} patches")
            with demo.downscaled_server(cell.side, given.out) as url:
                await _ask(url, "hiprune-demo", cell, asked, log, progress, given, None)
    log.close()
    answers = Answers(log.answers.values())
    facts = _facts(told, asked, given, progress, time.monotonic() - began)
    report.write(
        given.out, cells=sets, answers=answers, asked=asked, facts=facts, errors=errors,
        object_layer=object_layer, output_layer=told["encoder"]["output_layer"],
        heat_tokens=HEAT_TOKENS, examples=shown, overlays=drawn or {},
    )  # fmt: skip
    _say(f"wrote {given.out / 'report.html'}")
    failed = shortfalls(answers, object_layer, given.seeds) if given.quick else []
    if errors:
        failed.append(f"{sum(errors.values())} questions failed: {dict(errors)}")
    for line in failed:
        _say(f"FAILED: {line}")
    return 1 if failed else 0


def _sets(
    given: argparse.Namespace, told: dict[str, Any], object_layer: int
) -> dict[str, list[Cell]]:
    if given.quick:
        given.seeds = min(given.seeds, 2)
        chosen = [
            cell
            for cell in grid.method_cells((64,), object_layer, given.seeds, downscaled=False)
            if cell.method in ("full", "hiprune", "random")
        ]
        return {"methods": chosen}
    sets = {}
    if "methods" in given.sets:
        sets["methods"] = grid.method_cells(
            given.budgets, object_layer, given.seeds, downscaled=not given.url
        )
        if not told["encoder"]["has_cls"]:
            sets["methods"] = [cell for cell in sets["methods"] if cell.method != "cls"]
    if "alpha" in given.sets:
        sets["alpha"] = grid.alpha_cells(HEAT_TOKENS, told["encoder"]["output_layer"])
    if "buffers" in given.sets:
        sets["buffers"] = grid.buffer_cells(BUFFER_BUDGETS, object_layer)
    return sets


def shortfalls(answers: Answers, object_layer: int, seeds: int) -> list[str]:
    """What of the quick evaluation is not as it must be; empty where all is well."""
    wanted = grid.method_cells((64,), object_layer, seeds, downscaled=False)
    groups: dict[str, list[Cell]] = {}
    for cell in wanted:
        groups.setdefault(cell.method, []).append(cell)
    full, pruned, random = (
        accuracy(answers.marks(groups[name])).value for name in ("full", "hiprune", "random")
    )
    _say(f"all tokens {full:.1%}, HiPrune at 64 {pruned:.1%}, random at 64 {random:.1%}")
    failed = []
    if pruned < full - CLOSE_TO_FULL:
        failed.append(f"HiPrune at 64 tokens must be within 2 points of {full:.1%}: {pruned:.1%}")
    if random > full - FAR_FROM_FULL:
        failed.append(f"random at 64 tokens must be 25 points below {full:.1%}: {random:.1%}")
    return failed


async def _ask(
    url: str, model: str, cell: Cell, asked: Sequence[Picture], log: Log,
    progress: "_Progress", given: argparse.Namespace, headers: dict[str, str] | None,
) -> None:  # fmt: skip
    await ask_cell(
        url, model, cell, asked, log,
        concurrency=given.concurrency, headers=headers, tell=progress.answered,
    )  # fmt: skip


def _setting(told: dict[str, Any], asked: Sequence[Picture], weights: str) -> dict[str, Any]:
    """What answers depend on: a log goes on only where it is the same."""
    return {
        "weights": weights,
        "model": told["model"],
        "versions": told["versions"],
        "pictures": len(asked),
        "encoder": told["encoder"],
    }


def _facts(
    told: dict[str, Any], asked: Sequence[Picture], given: argparse.Namespace,
    progress: "_Progress", seconds: float,
) -> dict[str, str]:  # fmt: skip
    questions = sum(len(picture.questions) for picture in asked)
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    facts = {
        "model": told["model"],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": given.command,
        "questions": f"{questions} about {len(asked)} held-out pictures in every cell",
        "versions": f"{versions}, Python {platform.python_version()}",
        "hardware": f"{machine.processor()} (where this was asked from)",
    }
    if progress.asked:
        facts["this run"] = (
            f"{progress.asked} questions in {seconds / 60:.0f} min, "
            f"{progress.rate():.0f} a second at concurrency {given.concurrency}"
        )
    if given.url and "methods" in given.sets and not given.quick:
        facts["left out"] = "the down-scaled picture: it needs a server of its own for each size"
    return facts


class _Progress:
    """A line on the terminal: cell, questions, rate, time left."""

    def __init__(
        self, cells: Sequence[Cell], asked: Sequence[Picture], log: Log, errors: Counter[str]
    ) -> None:
        self._each = sum(len(picture.questions) for picture in asked)
        self._cells = {cell.key: number for number, cell in enumerate(cells, 1)}
        self._answered = Counter(key[0] for key in log.answers if key[0] in self._cells)
        self._errors = errors
        self._began = self._told = time.monotonic()
        self.asked = 0

    def done(self, cell: Cell) -> bool:
        return self._answered[cell.key] == self._each

    def rate(self) -> float:
        """Questions a second."""
        return self.asked / max(1e-9, self._told - self._began)

    def answered(self, answer: Answer) -> None:
        if not self.asked:
            self._began = time.monotonic()
        self.asked += 1
        if answer.error:
            self._errors[answer.error] += 1
        else:
            self._answered[answer.cell] += 1
        now = time.monotonic()
        if now - self._told > 2 or self._answered[answer.cell] == self._each:
            self._told = now
            left = self._each * len(self._cells) - sum(self._answered.values())
            minutes = left / max(1e-9, self.rate()) / 60
            _say(
                f"cell {self._cells[answer.cell]} of {len(self._cells)}  {answer.cell}  "
                f"{self._answered[answer.cell]}/{self._each}  {self.rate():.1f}/s  "
                f"about {minutes:.0f} min left"
            )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
