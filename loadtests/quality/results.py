"""Turns answers into the tables of the report: plain data, ready for JSON and CSV."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from loadtests.quality import stats
from loadtests.quality.asking import Answer
from loadtests.quality.cells import ABLATIONS, DOWNSCALED, FULL, Cell, plan

COLUMNS = (
    "method", "tokens", "kept", "alpha", "object_layer", "buffer", "score", "accuracy", "low",
    "high", "relative", "questions", "pictures", "seeds",
)  # fmt: skip


class Answers:
    """All answers, by cell."""

    def __init__(self, answers: Iterable[Answer]) -> None:
        self._by_cell: dict[str, list[Answer]] = {}
        for answer in answers:
            self._by_cell.setdefault(answer.cell, []).append(answer)

    def has(self, cell: Cell) -> bool:
        return cell.key in self._by_cell

    def of(self, cell: Cell, kind: str | None = None) -> list[Answer]:
        answers = self._by_cell.get(cell.key, [])
        return [answer for answer in answers if kind is None or answer.kind == kind]

    def marks(self, cells: Sequence[Cell], kind: str | None = None) -> dict[int, tuple[float, int]]:
        """Right and asked per picture, all cells (draws of one method) together."""
        several = []
        for cell in cells:
            marks: dict[int, tuple[float, int]] = {}
            for answer in self.of(cell, kind):
                right, asked = marks.get(answer.picture, (0.0, 0))
                marks[answer.picture] = (right + answer.right, asked + 1)
            several.append(marks)
        return stats.pooled(several)

    def kept(self, cell: Cell) -> float:
        """Visual tokens kept, on average, as the server reported them."""
        answers = self.of(cell)
        return sum(answer.kept for answer in answers) / len(answers)

    def kinds(self) -> list[str]:
        return sorted({answer.kind for answers in self._by_cell.values() for answer in answers})


def grouped(cells: Iterable[Cell], answers: Answers) -> list[list[Cell]]:
    """Cells with answers; draws of one random plan are one group."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if answers.has(cell):
            groups.setdefault((cell.method, cell.key.split(";seed")[0]), []).append(cell)
    return list(groups.values())


def row(group: Sequence[Cell], answers: Answers, full: float | None) -> dict[str, Any]:
    """One line of the table of results."""
    first = group[0]
    found = stats.accuracy(answers.marks(group))
    line: dict[str, Any] = {
        "method": first.method,
        "tokens": first.budget or (first.side**2 if first.side else None),
        "kept": answers.kept(first),
        **{name: first.plan.get(name) for name in ("alpha", "object_layer", "buffer", "score")},
        "accuracy": found.value,
        "low": found.low,
        "high": found.high,
        "relative": found.value / full if full else None,
        "questions": found.questions,
        "pictures": found.pictures,
        "seeds": None,
    }
    if first.plan.get("method") == "random":
        line["seeds"] = [stats.accuracy(answers.marks([one])).value for one in group]
    return line


def tables(cells: Iterable[Cell], answers: Answers) -> list[dict[str, Any]]:
    """A line for every way that was tried, full first."""
    full = stats.accuracy(answers.marks([FULL])).value if answers.has(FULL) else None
    return [row(group, answers, full) for group in grouped(cells, answers)]


def comparisons(cells: Sequence[Cell], answers: Answers) -> list[dict[str, Any]]:
    """HiPrune against every other method at the same budget, and against all tokens, paired."""
    groups = grouped(cells, answers)
    found = []
    for mine in (group for group in groups if group[0].method == "hiprune"):
        for other in groups:
            cell = other[0]
            near = cell.budget == mine[0].budget or _nearest_side(cell, mine[0])
            if cell.method == "hiprune" or not (near or cell.method == "full"):
                continue
            estimate = stats.difference(answers.marks(mine), answers.marks(other))
            found.append(
                {
                    "tokens": mine[0].budget,
                    "against": cell.method,
                    **asdict(estimate),
                    "verdict": stats.verdict(estimate),
                }
            )
    return found


def _nearest_side(cell: Cell, mine: Cell) -> bool:
    """Whether a down-scaled cell is the one for this cell's budget."""
    return cell.side > 0 and DOWNSCALED.get(mine.budget or 0) == cell.side


def ablation(budgets: Sequence[int], object_layer: int, answers: Answers) -> list[dict[str, Any]]:
    """Table 5's rows: accuracy per budget, relative to the cross of the default."""
    lines = []
    for name, knobs in ABLATIONS:
        for tokens in budgets:
            cell = Cell("hiprune", plan(tokens, object_layer, **knobs))
            base = Cell("hiprune", plan(tokens, object_layer))
            if not (answers.has(cell) and answers.has(base)):
                continue
            found = stats.accuracy(answers.marks([cell]))
            against = stats.difference(answers.marks([cell]), answers.marks([base]))
            lines.append(
                {
                    "scheme": name,
                    "tokens": tokens,
                    "accuracy": found.value,
                    "low": found.low,
                    "high": found.high,
                    "difference": against.value,
                    "difference_low": against.low,
                    "difference_high": against.high,
                    "verdict": stats.verdict(against),
                }
            )
    return lines


def by_kind(cells: Iterable[Cell], answers: Answers) -> list[dict[str, Any]]:
    """Accuracy for every kind of question of the full picture and of HiPrune."""
    lines = []
    for group in grouped(cells, answers):
        if group[0].method not in ("full", "hiprune", "random"):
            continue
        for kind in answers.kinds():
            found = stats.accuracy(answers.marks(group, kind))
            name, tokens = group[0].method, group[0].budget
            lines.append({"method": name, "tokens": tokens, "kind": kind, **asdict(found)})
    return lines
