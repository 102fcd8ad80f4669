"""lmms-eval's logs of several budgets as one report: `python -m loadtests.quality.lmms.collect`."""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests import page
from loadtests.quality import plots
from loadtests.quality.lmms.benchmarks import BENCHMARKS, LOCAL, PAPER, Benchmark
from loadtests.quality.lmms.evaluate import DONE, KEPT

_FAILED = "[LMMS_EVAL_"
"""Start of what lmms-eval takes as the answer where there was none; it counts that as wrong."""


@dataclass(frozen=True)
class Run:
    """What one budget has given.

    Attributes:
        budget: tokens, ratio or "full".
        about: the run's own description.
        scores: benchmark -> score on the paper's scale.
        questions: benchmark -> questions asked.
        failed: requests without an answer.
        full, kept: visual tokens of an average request, None where the server reported none.
    """

    budget: str
    about: dict[str, Any]
    scores: dict[str, float]
    questions: dict[str, int]
    failed: int
    full: float | None
    kept: float | None


def read(folder: Path) -> list[Run]:
    """All finished runs under `folder`, the full picture first, then by budget.

    Raises:
        ValueError: there is none, or one has no results.
    """
    runs = [_run(path.parent) for path in sorted(folder.glob(f"*/{DONE}"))]
    if not runs:
        raise ValueError(f"no finished run of lmms-eval in {folder}")
    return sorted(runs, key=lambda run: (run.budget != "full", -float(run.kept or 0)))


def _run(folder: Path) -> Run:
    about = json.loads((folder / DONE).read_text())
    found = sorted(folder.glob("*/*_results.json"))
    if not found:
        raise ValueError(f"lmms-eval left no results in {folder}")
    results = json.loads(found[-1].read_text())["results"]
    scores, questions = {}, {}
    failed = 0
    for one in (*BENCHMARKS, LOCAL):
        score = one.score(results.get(one.task, {}))
        if score is None:
            continue
        scores[one.name] = score
        samples = [
            json.loads(line)
            for path in folder.glob(f"*/*_samples_{one.task}.jsonl")
            for line in path.read_text().splitlines()
        ]
        questions[one.name] = len(samples)
        failed += sum(_FAILED in json.dumps(sample.get("filtered_resps")) for sample in samples)
    if not scores:
        raise ValueError(f"{folder} has no score of a benchmark known here, has {sorted(results)}")
    log = folder / KEPT
    noted = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    reported = [one for one in noted if one["full"]]
    return Run(
        about["budget"],
        about,
        scores,
        questions,
        failed,
        sum(one["full"] for one in reported) / len(reported) if reported else None,
        sum(one["kept"] for one in reported) / len(reported) if reported else None,
    )


def relative(run: Run, full: Run | None) -> float | None:
    """Average over benchmarks of the share of the unpruned score that is kept, in percent."""
    if full is None:
        return None
    shares = [
        run.scores[name] / score
        for name, score in full.scores.items()
        if name in run.scores and score
    ]
    return 100 * sum(shares) / len(shares) if shares else None


def write(folder: Path, runs: Sequence[Run], paper: str | None) -> list[dict[str, Any]]:
    """Writes report.html, results.csv and results.json; returns the rows.

    Args:
        paper: key of PAPER whose row is put beside, or None.
    """
    full = next((run for run in runs if run.budget == "full"), None)
    measured, kept_by_paper = PAPER[paper] if paper else ("", {})
    rows = [
        {
            "budget": run.budget,
            "tokens_full": run.full,
            "tokens_kept": run.kept,
            **run.scores,
            "relative": relative(run, full),
            "relative_in_paper": 100.0 if run.budget == "full" and paper
            else kept_by_paper.get(run.budget),
            "failed": run.failed,
        }
        for run in runs
    ]  # fmt: skip
    (folder / "results.json").write_text(
        json.dumps({"runs": [run.about for run in runs], "paper": measured, "rows": rows}, indent=1)
        + "\n"
    )
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "report.html").write_text(_page(runs, rows, measured))
    return rows


def _page(runs: Sequence[Run], rows: Sequence[dict[str, Any]], measured: str) -> str:
    names = [one for one in (*BENCHMARKS, LOCAL) if any(one.name in run.scores for run in runs)]
    head = ["budget", "tokens kept", *(one.name for one in names), "kept of full, %"]
    head += ["paper, %"] if measured else []
    lines = []
    for row in rows:
        line = [row["budget"], _number(row["tokens_kept"])]
        line += [_number(row.get(one.name)) for one in names] + [_number(row["relative"])]
        lines.append(line + ([_number(row["relative_in_paper"])] if measured else []))
    facts = [
        ("model", runs[0].about["model"]),
        ("questions", ", ".join(f"{name} {count}" for name, count in runs[0].questions.items())),
        ("further fields of the budget", ", ".join(runs[0].about["knobs"]) or "none"),
    ]
    if measured:
        facts.append(("the paper's column", f"{measured}: average share of the unpruned scores"))
    parts = [page.facts(facts)]
    failed = {run.budget: run.failed for run in runs if run.failed}
    if failed:
        told = ", ".join(f"{count} at {budget}" for budget, count in failed.items())
        parts.append(
            page.paragraph(
                f"Requests without an answer: {told}. lmms-eval counts them as wrong, so these "
                "scores are too low; run them again."
            )
        )
    if sum(row["relative"] is not None and row["tokens_kept"] is not None for row in rows) > 1:
        parts.append(
            page.figure(
                plots.relative_plot(rows),
                "Average share of the unpruned scores against visual tokens kept of an image.",
            )
        )
    parts += [page.section("Scores", page.table(head, lines)), _missing(names)]
    return page.page(f"lmms-eval against the budget: {runs[0].about['model']}", parts)


def _missing(names: Sequence[Benchmark]) -> str:
    """Which of the paper's benchmarks were not run, and what was different for the others."""
    told = [f"{one.name} ({one.task}): {one.note}." for one in names if one.note]
    absent = [one.name for one in BENCHMARKS if one not in names]
    if absent:
        told.append(f"Not run: {', '.join(absent)}.")
    return "".join(page.paragraph(text) for text in told)


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "" if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where requests had failed, 2 where there is nothing to collect."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.quality.lmms.collect")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/lmms"))
    parser.add_argument("--paper", choices=sorted(PAPER), help="whose averages to put beside")
    given = parser.parse_args(argv)
    try:
        runs = read(given.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = write(given.folder, runs, given.paper)
    for row in rows:
        told = ", ".join(f"{name} {_number(value)}" for name, value in row.items() if value)
        print(told)
    print(f"wrote {given.folder / 'report.html'}")
    return 1 if any(run.failed for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
