"""`make load`: prefill latency, throughput and goodput against budget, at a given load."""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loadtests import machine
from loadtests.load import compare, preflight, report, running, slo, summary
from loadtests.load.cells import Asking, Cell, sweep
from loadtests.load.credentials import headers
from loadtests.load.pictures import Pool, Source, sizes
from loadtests.load.progress import Progress, say
from loadtests.load.running import Length, Run
from loadtests.load.settings import arguments

CACHED_PICTURES = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep.

    Returns:
        0; 1 where an SLO was missed or a cell was not measured; 2 where it could not start; 130
        where it was interrupted (the report has the cells that were done).
    """
    given = arguments(argv)
    try:
        source = Source(given.images, sizes(given.sizes), given.seed)
        wanted = Asking(
            model=given.model,
            answer=given.answer_tokens,
            question=given.question_words,
            exact=not given.natural_length,
            timeout_s=given.timeout,
            cancelled=given.cancel,
            slow=given.slow,
            cache_hits=given.allow_cache_hits,
            seed=given.seed,
        )
        server = preflight.check(given.url, headers(), wanted, given.budgets, source, say)
        began = time.monotonic()
        wanted = replace(wanted, model=server.model)
        _writable(given.out)
        made = _pictures(given, server, source)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    runs, interrupted = _cells(given, wanted)
    if not runs:
        return 130
    limits = slo.given(given)
    rows = summary.rows(runs, slo.per_request(limits), made)
    missed = slo.missed(rows, limits)
    facts = _facts(given, server, time.monotonic() - began)
    earlier = given.earlier
    report.write(
        given.out,
        rows=rows,
        facts=facts,
        limits=limits,
        missed=missed,
        changes=compare.compare(earlier, {"cells": rows}, given.noise) if earlier else None,
        differences=compare.differences(earlier["facts"], facts) if earlier else [],
        cache_hits=given.allow_cache_hits,
    )
    return _verdict(given, rows, missed, runs, interrupted)


def _writable(folder: Path) -> None:
    """Raises ValueError where no file can be made in a folder: it may be another user's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        told = f"OUT must be a folder that user {os.getuid()} can write to, got {folder}"
        raise ValueError(f"{told}: {error.strerror}") from None


def _pictures(given: argparse.Namespace, server: preflight.Server, source: Source) -> int:
    """Makes the pool; how many pictures it has."""
    seconds = given.warm_up + given.duration * (1 if given.requests == 1 else 2)
    needed = preflight.pictures_needed(
        server, [(budget, load) for budget in given.budgets for load in given.loads], seconds
    )
    count = given.pictures or (CACHED_PICTURES if given.allow_cache_hits else needed)
    progress = Progress()
    Pool.fill(
        given.out / "pictures.txt", source, count,
        lambda made: progress.show(f"making pictures: {made} of {count}", last=made == count),
    )  # fmt: skip
    return count


def _cells(given: argparse.Namespace, wanted: Asking) -> tuple[list[Run], bool]:
    """Runs all cells, as far as the server and the person at the keyboard allow."""
    order = sweep(given.budgets, given.loads, given.repeats)
    length = Length(given.warm_up, given.duration, given.requests)
    name = f"{time.time_ns():x}"
    progress = Progress(len(order), given.warm_up + given.duration)
    runs: list[Run] = []
    cells = [
        Cell(
            number=number,
            run=name,
            budget=budget,
            load=load,
            url=given.url,
            pool=str((given.out / "pictures.txt").resolve()),
            folder=str((given.out / "cells" / f"{number:02d}").resolve()),
            images=given.images if given.images == "photos" else str(Path(given.images).resolve()),
            sizes=given.sizes,
            asking=wanted,
            in_flight=given.in_flight,
        )
        for number, (budget, load) in enumerate(order)
    ]
    for number, cell in enumerate(cells):
        progress.begin(number + 1, cell.name)
        try:
            idle = running.wait_until_idle(given.url, headers(), given.recover)
            if idle is None:
                progress.show(f"the server has not answered for {given.recover:g} s", last=True)
                gone = "not measured: the server did not come back"
                return [*runs, *(Run(left, trouble=gone) for left in cells[number:])], False
            run = running.run(cell, length, headers(), given.processes, progress.phase)
        except KeyboardInterrupt:
            say("\nstopped: the report has the cells that were done")
            return runs, True
        run.busy = idle.under_way > 0
        progress.end(run)
        runs.append(run)
    return runs, False


def _facts(given: argparse.Namespace, server: preflight.Server, seconds: float) -> dict[str, str]:
    told = server.told
    encoder = told["encoder"]
    cache = server.cache
    config = {
        "context": server.longest,
        "block size": cache.get("block_size"),
        "prefix caching": cache.get("enable_prefix_caching"),
        "KV blocks": cache.get("num_gpu_blocks"),
        "reports per request": server.per_request,
    }
    words, tokens = (
        f"{low}" if low == high else f"{low} to {high}"
        for low, high in (given.question_words, given.answer_tokens)
    )
    facts = {
        "model": f"{server.model} ({told['family']})",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": given.command,
        "took": f"{seconds / 60:.1f} min",
        "server": ", ".join(f"{k} {v}" for k, v in config.items() if v not in (None, "None")),
        "pruning": f"default {json.dumps(told['default'])}, encoder {json.dumps(encoder)}",
        "versions": ", ".join(f"{k} {v}" for k, v in told["versions"].items())
        + f"; load generator: Locust {version('locust')}, Python {platform.python_version()}",
        "load generator": f"{machine.processor()}, {given.processes} process(es)",
        "pictures": f"{given.images}, sizes {given.sizes}, seed {given.seed}",
        "question": f"{words} words",
        "answer": f"{tokens} tokens" + (" at most" if given.natural_length else ""),
        "cell": f"warm-up {given.warm_up:g} s, window {given.duration:g} s, "
        f"{given.repeats} round(s)",
    }
    if given.note:
        facts["note"] = given.note
    return facts


def _verdict(
    given: argparse.Namespace, rows: Sequence[dict[str, Any]], missed: Sequence[str],
    runs: Sequence[Run], interrupted: bool,
) -> int:  # fmt: skip
    say("")
    for row in rows:
        say(
            f"{report.name(row):>16}  {row['requests']:5d} requests  "
            f"{row['rps'] or 0:6.2f}/s  first token {report.ms(row['ttft_p50']):>6} ms  "
            + _prefill(row)
            + (f"  {row['failed']} failed" if row["failed"] else "")
            + (f"  !! {row['bottleneck']}" if row["bottleneck"] else "")
            + (
                "  !! a proxy holds streams back: no time to first token"
                if row["held_back"]
                else ""
            )
            + ("  !! the machine was busy with other work" if row["crowded"] else "")
        )
    say(f"wrote {given.out / 'report.html'}")
    for line in missed:
        say(f"SLO MISSED: {line}")
    nothing = [report.name(row) for row in rows if not row["requests"]]
    if nothing:
        say(f"FAILED: no request was answered in {', '.join(nothing)}")
    troubles = [f"{run.cell.name}: {run.trouble}" for run in runs if run.trouble]
    for line in troubles:
        say(f"FAILED: {line}")
    if interrupted:
        return 130
    return 1 if missed or nothing or troubles else 0


def _prefill(row: dict[str, Any]) -> str:
    """Its median, or the engine's mean where it is not told for each request."""
    if row["prefill_p50"] is None and row["engine_prefill"] is not None:
        return f"prefill {report.ms(row['engine_prefill']):>6} ms (mean)"
    return f"prefill {report.ms(row['prefill_p50']):>6} ms"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as if from the keyboard
    sys.exit(main())
