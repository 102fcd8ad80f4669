"""Writes what was found: report.html, results.csv and results.json."""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from loadtests import page
from loadtests.quality import plots, results
from loadtests.quality.asking import Answer, Picture
from loadtests.quality.cells import ALPHAS, METHODS, Cell, alpha_cells, unique
from loadtests.quality.results import Answers
from loadtests.quality.stats import accuracy

_NAMES = {method: label for method, (_, _, label) in plots.STYLE.items()} | {"full": "all tokens"}


def write(
    folder: Path,
    *,
    cells: dict[str, list[Cell]],
    answers: Answers,
    asked: Sequence[Picture],
    facts: dict[str, str],
    errors: Counter[str],
    object_layer: int,
    output_layer: int,
    heat_tokens: int,
    examples: Sequence[Answer],
    overlays: Mapping[int, Image.Image],
) -> dict[str, Any]:
    """Writes the three files into `folder` and returns what is in the JSON.

    Args:
        cells: by set ("methods", "alpha", "buffers").
        asked: the pictures, for the examples.
        facts: name -> text for the head of the report.
        errors: how often which error came instead of an answer.
        examples: answers to be shown; none where nothing was drawn.
        overlays: number of a picture -> what was kept of it for the examples.
    """
    every = [cell for group in cells.values() for cell in group]
    methods = cells.get("methods", [])
    buffer_budgets = sorted({c.budget for c in cells.get("buffers", []) if c.budget}, reverse=True)
    found: dict[str, Any] = {
        "facts": facts,
        "errors": dict(errors),
        "methods": results.tables(methods, answers),
        "comparisons": results.comparisons(methods, answers),
        "kinds": results.by_kind(methods, answers),
        "alpha": results.tables(cells.get("alpha", []), answers),
        "ablation": results.ablation(buffer_budgets, object_layer, answers),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, results.COLUMNS)
        writer.writeheader()
        writer.writerows(results.tables(unique(every), answers))
    parts = [_head(facts, errors)]
    if found["methods"]:
        parts += [_methods(found), _kinds(found["kinds"])]
    if found["alpha"]:
        parts.append(_heat(answers, heat_tokens, output_layer))
    if found["ablation"]:
        parts.append(_ablation(found["ablation"]))
    if examples:
        parts.append(_examples(examples, asked, overlays))
    title = f"What a visual-token budget costs: {facts.get('model', '')}"
    (folder / "report.html").write_text(page.page(title, parts))
    return found


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def _interval(row: dict[str, Any]) -> str:
    return f"{_percent(row['accuracy'])} ({_percent(row['low'])}-{_percent(row['high'])})"


def _head(facts: dict[str, str], errors: Counter[str]) -> str:
    told = page.facts(list(facts.items()))
    if errors:
        listed = ", ".join(f"{count} x {kind}" for kind, count in errors.most_common())
        told += page.paragraph(
            f"Not all questions were answered: {listed}. They are left out of every number below."
        )
    return told


def _methods(found: dict[str, Any]) -> str:
    rows = found["methods"]
    budgets = sorted({r["tokens"] for r in rows if r["method"] == "hiprune"}, reverse=True)
    lines = []
    for method in METHODS:
        mine = {r["tokens"]: r for r in rows if r["method"] == method}
        if not mine:
            continue
        if method == "downscaled":  # their token counts are squares: in the budgets' order
            ordered = sorted(mine.values(), key=lambda r: -r["tokens"])
            cells = [f"{_interval(r)} [{r['tokens']}]" for r in ordered]
        else:
            cells = [_interval(mine[b]) if b in mine else "" for b in budgets]
        lines.append([_NAMES[method], *cells])
    whole = [r for r in rows if r["method"] == "full"]
    relative = [
        ["relative to all tokens", *(_percent(r["relative"]) for b in budgets for r in rows
                                     if r["method"] == "hiprune" and r["tokens"] == b)]
    ]  # fmt: skip
    draws = [
        [f"{r['tokens']} tokens", ", ".join(_percent(seed) for seed in r["seeds"])]
        for r in rows
        if r["seeds"]
    ]
    against = [
        [c["tokens"], _NAMES[c["against"]], f"{100 * c['value']:+.1f}",
         f"{100 * c['low']:+.1f} to {100 * c['high']:+.1f}", c["verdict"]]
        for c in found["comparisons"]
    ]  # fmt: skip
    return page.section(
        "Methods and budgets",
        page.paragraph(f"All tokens: {_interval(whole[0])} %." if whole else ""),
        page.figure(
            plots.accuracy_plot(rows),
            "Exact match against visual tokens kept; bars are 95 % intervals, pictures drawn "
            "again as wholes.",
        ),
        page.table(["exact match, %", *(f"{b} tokens" for b in budgets)], lines + relative),
        page.paragraph(
            "A down-scaled picture's own token count is in brackets; the model was not trained "
            "on such pictures."
        )
        if any(r["method"] == "downscaled" for r in rows)
        else "",
        "<h3>Paired comparison: HiPrune minus the other</h3>",
        page.table(("tokens", "against", "points", "95 % interval", "HiPrune is"), against),
        "<h3>Draws of random</h3>" if draws else "",
        page.table(("budget", "exact match of each draw, %"), draws) if draws else "",
    )


def _kinds(rows: list[dict[str, Any]]) -> str:
    if len({r["tokens"] for r in rows if r["method"] == "hiprune"}) < 2:
        return ""
    return page.section(
        "By kind of question",
        page.figure(plots.kinds_plot(rows), "HiPrune's exact match for each kind of question."),
    )


def _heat(answers: Answers, tokens: int, output_layer: int) -> str:
    layers = list(range(1, output_layer))
    values: dict[tuple[float, int], float] = {}
    for cell in alpha_cells(tokens, output_layer):
        if answers.has(cell):
            value = accuracy(answers.marks([cell])).value
            alpha = cell.plan["alpha"]
            for layer in layers if alpha == 0 else [cell.plan["object_layer"]]:
                values[alpha, layer] = value
    grid = [[values.get((alpha, layer)) for layer in layers] for alpha in ALPHAS]
    return page.section(
        "Alpha and object layer",
        page.figure(
            plots.heat_map(grid, ALPHAS, layers, row_label="alpha", column_label="object layer"),
            f"Exact match in % at {tokens} tokens. With alpha 0 there are no anchors, so the "
            "object layer plays no part.",
        ),
    )


def _ablation(rows: list[dict[str, Any]]) -> str:
    budgets = list(dict.fromkeys(r["tokens"] for r in rows))
    lines = []
    for scheme in dict.fromkeys(r["scheme"] for r in rows):
        mine = {r["tokens"]: r for r in rows if r["scheme"] == scheme}
        lines.append(
            [scheme]
            + [
                f"{_interval(mine[b])}, {100 * mine[b]['difference']:+.1f}" if b in mine else ""
                for b in budgets
            ]
        )
    return page.section(
        "Buffers, anchors, kind of attention",
        page.table(
            ["exact match, %; difference to cross", *(f"{b} tokens" for b in budgets)], lines
        ),
    )


def _examples(
    examples: Sequence[Answer], asked: Sequence[Picture], overlays: Mapping[int, Image.Image]
) -> str:
    """Right and wrong answers with the tokens that they were given on."""
    by_picture = {picture.number: picture for picture in asked}
    shown = []
    for answer in examples:
        text, expected, _ = by_picture[answer.picture].questions[answer.question]
        mark = "right" if answer.right else "wrong"
        image = page.picture(overlays[answer.picture], f"kept tokens of picture {answer.picture}")
        said = escape(answer.said or "(nothing)")
        said = f"{escape(text)} <b class='{mark}'>{said}</b>"
        wanted = "" if answer.right else f"<br><small>expected: {escape(expected)}</small>"
        shown.append(f"<figure>{image}<figcaption>{said}{wanted}</figcaption></figure>")
    return page.section(
        f"Examples at {examples[0].kept} tokens",
        "<p>Anchors are framed in yellow, buffers in red, registers in cyan; "
        "<small>dropped patches are dimmed, as the server draws them.</small></p>",
        f"<div class='examples'>{''.join(shown)}</div>",
    )
