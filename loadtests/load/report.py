"""Writes what was found: report.html, results.csv and results.json."""

import csv
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from loadtests import page
from loadtests.load import plots, slo
from loadtests.load.compare import LEVEL, NAMES
from loadtests.load.summary import PERCENTILES

CACHED = 0.01
"""Hit rate of a cache from which it may have made the numbers."""
_LISTS: Final = ("errors", "samples", "windows", *(f"bucket_p{which}" for which in PERCENTILES))


def write(
    folder: Path,
    *,
    rows: Sequence[dict[str, Any]],
    facts: Mapping[str, str],
    limits: Mapping[str, float],
    missed: Sequence[str],
    changes: Sequence[Mapping[str, Any]] | None,
    differences: Sequence[str],
    cache_hits: bool,
) -> dict[str, Any]:
    """Writes the three files into `folder` and returns what is in the JSON.

    Args:
        rows: of `summary.rows`, with `samples` and `windows` of each round.
        facts: name -> text for the head of the report.
        limits, missed: SLOs and what missed them.
        changes, differences: against an earlier sweep; None where there was none to compare with.
        cache_hits: whether they were wanted.
    """
    found = {
        "facts": dict(facts),
        "limits": dict(limits),
        "missed": list(missed),
        "compared": None if changes is None else list(changes),
        "cells": list(rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    flat = [_flat(row) for row in rows]
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
    parts = [
        page.facts(list(facts.items())),
        _warnings(rows, cache_hits),
        _latency(rows),
        _throughput(rows),
        _split(rows),
        _table(rows, limits),
        _slos(limits, missed),
        _changes(changes, differences),
        _honesty(rows),
        _words(),
    ]
    title = f"What a visual-token budget buys: {facts.get('model', '')}"
    (folder / "report.html").write_text(page.page(title, parts))
    return found


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for the CSV: numbers and text only."""
    flat = {name: value for name, value in row.items() if name not in _LISTS}
    flat["errors"] = "; ".join(f"{n} x {kind}" for kind, n in row["errors"].items())
    for which in PERCENTILES:
        low, high = row[f"bucket_p{which}"] or (None, None)
        flat |= {f"bucket_low_p{which}": low, f"bucket_high_p{which}": high}
    return flat


def name(row: Mapping[str, Any]) -> str:
    return f"{row['budget']} @ {row['load']}"


def ms(seconds: float | None, digits: int | None = None) -> str:
    """Milliseconds, with a place behind the point where they are few."""
    if seconds is None:
        return "-"
    places = digits if digits is not None else 1 if seconds < 0.1 else 0
    return f"{1000 * seconds:.{places}f}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _warnings(rows: Sequence[Mapping[str, Any]], cache_hits: bool) -> str:
    lines = []
    for row in rows:
        if row["trouble"]:
            lines.append(f"{name(row)}: {row['trouble']}.")
        if not row["requests"]:
            lines.append(f"{name(row)}: no request was answered.")
        if row["failed"]:
            told = ", ".join(f"{n} x {kind}" for kind, n in row["errors"].items())
            lines.append(f"{name(row)}: {row['failed']} requests failed ({told}).")
        if row["bottleneck"]:
            lines.append(
                f"{name(row)}: the load generator may be what was measured: {row['bottleneck']}."
            )
        if row["held_back"]:
            lines.append(
                f"{name(row)}: answers arrived in one piece although their tokens were generated "
                "one by one: a proxy holds streams back (nginx's proxy_buffering), and times to "
                "the first token and between tokens are the proxy's, not the server's."
            )
        if row["crowded"]:
            lines.append(
                f"{name(row)}: the load generator's machine had {row['machine_load']:.1f} threads "
                "running or waiting for each core: other work was in the way, and if the server "
                "runs there too, its numbers mean little."
            )
        for key, cache in (("hits_prefix", "prefix"), ("hits_pictures", "picture")):
            if not cache_hits and (row[key] or 0) > CACHED:
                lines.append(
                    f"{name(row)}: {row[key]:.0%} of the {cache} cache's look-ups were hits, "
                    "although no picture came twice."
                )
    if cache_hits:
        lines.insert(0, "Pictures came again on purpose: caches are part of what was measured.")
    if not lines:
        return ""
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<section class='warn'><h2>To know before reading</h2><ul>{listed}</ul></section>"


def _latency(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [row for row in rows if row["tokens_kept"]]
    if not shown:
        return ""
    per_request = any(row["prefill_p50"] is not None for row in shown)
    prefill = ""
    if per_request or any(row["bucket_p50"] for row in shown):
        prefill = page.figure(
            plots.by_tokens(shown, "prefill"),
            "Prefill in the engine, from scheduling to the first token, without queueing; "
            + (
                "as the server reported it for each request."
                if per_request
                else "only vLLM's histogram knows it, so bars show the bucket that each percentile "
                "is in. Start the server with --enable-per-request-metrics for exact ones."
            ),
        )
    return page.section(
        "Latency against tokens kept",
        "<h3>Prefill</h3>" if prefill else "",
        prefill,
        "<h3>Time to first token</h3>",
        page.figure(
            plots.by_tokens(shown, "ttft"),
            "As the client saw it: sending, queueing, the picture's decoding, encoder and prefill.",
        ),
    )


def _throughput(rows: Sequence[Mapping[str, Any]]) -> str:
    return page.section(
        "Throughput",
        page.figure(plots.throughput(rows), "Requests finished a second."),
    )


def _split(rows: Sequence[Mapping[str, Any]]) -> str:
    known = [row for row in rows if row["engine_prefill"] is not None]
    if not known:
        return ""
    head = ("budget @ load", "queue", "encoder", "prefill, the rest", "decode", "outside",
            "whole request")  # fmt: skip
    lines = []
    for row in known:
        parts = plots.split(row)
        keys = ("engine_queue", "engine_encoder", "prefill_rest", "engine_decode", "outside_mean")
        lines.append([name(row), *(ms(parts.get(key)) for key in keys), ms(row["e2e_mean"])])
    return page.section(
        "Where the time goes",
        page.figure(
            plots.time_split(known),
            "Means from the engine's /metrics. Encoder: its time in the window shared among the "
            "requests that finished; the rest of prefill has the language model and waiting for "
            "others in the same batch. Outside: the client's time less the engine's.",
        ),
        page.table([f"{head[0]}, ms", *head[1:]], lines),
    )


def _table(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> str:
    goodput = any("_p" in limit for limit in limits)
    latency, second = [], []
    for row in rows:
        kept = f"{_number(row['tokens_kept'], '.0f')} of {_number(row['tokens_full'], '.0f')}"
        cells = [
            " / ".join(_percentile(row, metric, which) for which in PERCENTILES)
            for metric in ("prefill", "ttft", "itl", "e2e")
        ]
        latency.append([name(row), kept, row["requests"], *cells])
        second.append(
            [
                name(row),
                _number(row["rps"]),
                *([_number(row["goodput"])] if goodput else []),
                _number(row["tokens_per_second"], ".1f"),
                *(_times(row[f"gain_{gain}"]) for gain in ("prefill", "ttft", "rps")),
                "-" if row["error_rate"] is None else f"{row['error_rate']:.1%}",
                row["cancelled"] + row["slow"] or "-",
            ]
        )
    head = ["budget @ load", "tokens kept", "requests", "prefill", "first token",
            "between tokens", "whole request"]  # fmt: skip
    more = ["budget @ load", "requests/s", *(["goodput/s"] if goodput else []), "tokens/s",
            "prefill gain", "first-token gain", "requests/s gain", "failed",
            "cancelled, slow"]  # fmt: skip
    return page.section(
        "All cells",
        page.paragraph(
            "Percentiles 50 / 90 / 99 in ms. Of fewer than 100 requests the 99th is close to the "
            "slowest one."
        ),
        page.table(head, latency),
        page.paragraph(
            "Gains are against the full budget under the same load: mean prefill, median time to "
            "first token, requests a second. Failed includes what waited in vain until the end."
        ),
        page.table(more, second),
    )


def _percentile(row: Mapping[str, Any], metric: str, which: int) -> str:
    value = row[f"{metric}_p{which}"]
    if value is None and metric == "prefill" and row[f"bucket_p{which}"]:
        low, high = row[f"bucket_p{which}"]
        return f"> {ms(low, 0)}" if high is None else f"{ms(low, 0)} to {ms(high, 0)}"
    return ms(value)


def _times(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:.2f}x"


def _slos(limits: Mapping[str, float], missed: Sequence[str]) -> str:
    if not limits:
        return ""
    told = ", ".join(slo.told(limit, value) for limit, value in limits.items())
    listed = "".join(f"<li>{escape(line)}</li>" for line in missed)
    verdict = f"<ul class='wrong'>{listed}</ul>" if missed else "<p class='right'>All were met.</p>"
    return page.section("SLOs", page.paragraph(f"At most: {told}."), verdict)


def _changes(changes: Sequence[Mapping[str, Any]] | None, differences: Sequence[str]) -> str:
    if changes is None:
        return ""
    if not changes:
        return page.section(
            "Against the earlier sweep",
            page.paragraph("The two have no budget under the same load in common."),
        )
    other = "".join(f"<li>{escape(line)}</li>" for line in differences)
    lines = []
    for change in changes:
        rate = change["metric"] == NAMES["rps"]
        show = _number if rate else ms
        lines.append(
            [
                f"{name(change)}: {change['metric']}",
                show(change["before"]),
                show(change["now"]),
                f"{change['change']:+.1%}",
                f"{change['low']:+.1%} to {change['high']:+.1%}",
                f"{change['noise']:.0%}",
                change["verdict"],
            ]
        )
    head = ("what", "before", "now", "change", f"{LEVEL:.0%} interval", "noise", "verdict")
    return page.section(
        "Against the earlier sweep",
        f"<p>Not the same in both:</p><ul>{other}</ul>" if other else "",
        page.paragraph(
            "Times in ms. A change counts where its whole interval (blocks of neighbouring "
            "requests drawn again) lies beyond the noise: what two runs of the same may differ by."
        ),
        page.table(head, lines),
    )


def _honesty(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            name(row),
            _share(row["generator_cpu"]),
            ms(row["lag_p99"]),
            ms(row["lag_max"]),
            _number(row["machine_load"], ".1f"),
            row["made_meanwhile"],
            _share(row["hits_prefix"]),
            _share(row["hits_pictures"]),
        ]
        for row in rows
    ]
    head = ("budget @ load", "CPU, of a core", "late p99, ms", "late max, ms", "load per core",
            "made meanwhile", "prefix hits", "picture hits")  # fmt: skip
    return page.section(
        "Load generator and caches",
        page.paragraph(
            "How much of a core the busiest process of the load generator used, how late its event "
            "loop woke up, pictures that had to be made during the load, and how much of what was "
            "looked up in the server's caches (prefixes, pictures) was there."
        ),
        page.table(head, lines),
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _words() -> str:
    return page.section(
        "What the words mean",
        page.facts(
            [
                ("prefill", "in the engine: from scheduling to the first token, no queueing"),
                ("first token", "at the client: from sending (open load: from when it was due)"),
                ("between tokens", "between the arrival of one token and the next, all gaps"),
                ("requests/s", "answers finished in the window over its length"),
                ("goodput/s", "the same, only answers within the SLOs' times (the widest of each)"),
                ("window", "what counts; requests that ended in the warm-up or later do not"),
            ]
        ),
    )
