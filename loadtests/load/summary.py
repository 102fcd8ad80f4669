"""Records and scrapes into numbers: one row for each budget under each load.

Times are seconds everywhere; what is not known is None.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import numpy as np

from loadtests.load.cells import FULL
from loadtests.load.engine import PHASES, Between, Restarted
from loadtests.load.records import (
    CANCELLED,
    NOT_ERRORS,
    OK,
    REFUSED,
    SLOW,
    TIMEOUT,
    UNANSWERED,
    Record,
)
from loadtests.load.running import LAG_EVERY_S, Run

PERCENTILES: Final = (50, 90, 99)
METRICS: Final = ("ttft", "itl", "e2e", "prefill", "queue")
"""What has percentiles: time to first token, between tokens, as a whole; the engine's own."""
BUSY = 0.8
"""Share of a core from which a process of the load generator may hold the load back."""
LATE = 0.1
"""Share of the median time to first token that the load generator may be late by."""
LATE_S = 0.01
PATIENCE = 3.0
"""How many times as long as the slowest request that was answered one may wait before it counts as
not answered."""
FEW = 3
"""Times between tokens from which an answer shows how it arrives."""
AT_ONCE = 0.1
"""Share of the decode time that an answer's tokens arrive in at most where something holds it."""
TOO_FAST_S = 2e-4
"""Between tokens: no model generates so fast, so where nobody tells the decode time this does."""
CROWDED = 3.0
"""Load average for each core from which other work must be in the way: engine, API server and load
generator together keep about three threads busy."""


def values(records: Sequence[Record], metric: str) -> list[float]:
    """A metric of all records that have it, in their order."""
    match metric:
        case "itl":
            return [gap for record in records for gap in record.gaps]
        case "e2e":
            return [record.seconds for record in records]
        case _:
            found = [getattr(record, metric) for record in records]
            return [value for value in found if value is not None]


def percentile(numbers: Sequence[float], which: float) -> float | None:
    """Linear between neighbours, as numpy has it; None of nothing."""
    return float(np.percentile(numbers, which)) if len(numbers) else None


def mean(numbers: Sequence[float]) -> float | None:
    return float(np.mean(numbers)) if len(numbers) else None


def rows(runs: Sequence[Run], limits: Mapping[str, float], made: int) -> list[dict[str, Any]]:
    """One row for all rounds of a budget under a load, with what it gains over the full budget.

    Args:
        limits: metric -> seconds that a request must stay within to count for goodput.
        made: pictures that were made before the load.
    """
    order = list(dict.fromkeys((run.cell.load.name, run.cell.budget) for run in runs))
    by_name = sorted(runs, key=lambda run: order.index((run.cell.load.name, run.cell.budget)))
    grouped = groupby(by_name, key=lambda run: (run.cell.load.name, run.cell.budget))
    found = [row(list(group), limits, made) for _, group in grouped]
    for one in found:
        full = [r for r in found if r["load"] == one["load"] and r["budget"] == FULL]
        for name, metric, better in (
            ("ttft", "ttft_p50", "low"),
            ("prefill", "prefill_mean", "low"),
            ("rps", "rps", "high"),
        ):
            if metric == "prefill_mean" and one[metric] is None:
                # Not told for each request: the engine's own mean is as exact.
                metric = "engine_prefill"  # noqa: PLW2901
            mine, base = one[metric], full[0][metric] if full else None
            gain = None if not mine or not base else base / mine if better == "low" else mine / base
            one[f"gain_{name}"] = gain
    return found


def row(runs: Sequence[Run], limits: Mapping[str, float], made: int) -> dict[str, Any]:
    """The numbers of one budget under one load; `runs` are its rounds."""
    cell = runs[0].cell
    records = [record for run in runs for record in run.records]
    good = [record for record in records if record.outcome == OK]
    outcomes = Counter(record.outcome for record in records)
    unfinished, stuck = zip(*(waiting(run) for run in runs), strict=True)
    if sum(stuck):
        outcomes[UNANSWERED] = sum(stuck)
    errors = {kind: n for kind, n in sorted(outcomes.items()) if kind not in NOT_ERRORS}
    seconds = sum(run.end - run.begin for run in runs)
    failed = sum(errors.values())
    line: dict[str, Any] = {
        "budget": cell.budget,
        "load": cell.load.name,
        "kind": cell.load.kind,
        "amount": cell.load.amount,
        "rounds": len(runs),
        "seconds": seconds,
        "requests": len(good),
        "cancelled": outcomes[CANCELLED],
        "slow": outcomes[SLOW],
        "failed": failed,
        "errors": errors,
        "unfinished": sum(unfinished),
        "error_rate": failed / outcomes.total() if outcomes else None,
        "tokens_full": mean([r.full for r in good if r.full is not None]),
        "tokens_kept": mean([r.kept for r in good if r.kept is not None]),
        "prompt_tokens": mean([r.prompt for r in good if r.prompt is not None]),
        "answer_tokens": mean([r.answer for r in good if r.answer is not None]),
        "rps": len(good) / seconds if seconds else None,
        "tokens_per_second": sum(r.answer or 0 for r in good) / seconds if seconds else None,
    }
    for metric in METRICS:
        numbers = values(good, metric)
        line |= {f"{metric}_p{which}": percentile(numbers, which) for which in PERCENTILES}
        line[f"{metric}_mean"] = mean(numbers)
    line |= engine_view(runs)
    line["outside_mean"] = outside(line)
    told = limits and all(values(good, metric) or metric == "itl" for metric in limits)
    line["goodput"] = (
        sum(within(record, limits) for record in good) / seconds if told and seconds else None
    )
    line["windows"] = [run.end - run.begin for run in runs]
    line["samples"] = [
        samples([r for r in run.records if r.outcome == OK], run.begin) for run in runs
    ]
    line["held_back"] = held_back(good, line["engine_decode"])
    line |= health(runs, line["ttft_p50"], made)
    troubles = [run.trouble for run in runs if run.trouble]
    line["trouble"] = "; ".join(
        filter(None, [*dict.fromkeys(troubles), line.pop("engine_trouble")])
    )
    return line


def held_back(records: Sequence[Record], engine_decode: float | None) -> bool:
    """Whether answers arrive in one piece, as from a proxy that buffers them.

    The time to the first token is then the time to the last one.

    Args:
        engine_decode: the engine's mean from first to last token, for records that do not tell
            theirs.
    """
    spans = [
        (
            sum(record.gaps),
            record.decode or engine_decode or TOO_FAST_S * len(record.gaps) / AT_ONCE,
        )
        for record in records
        if len(record.gaps) >= FEW
    ]
    shares = [seen / decode for seen, decode in spans]
    return bool(shares) and float(np.median(shares)) < AT_ONCE


def waiting(run: Run) -> tuple[int, int]:
    """Requests that had no end when the window had, and those of them that are as good as lost.

    Lost is what has waited for the whole window, and `PATIENCE` times as long as the slowest that
    ended in it.
    """
    since = [start for samples in run.health.values() for start in samples[-1]["open"]]
    slowest = max((record.seconds for record in run.records), default=0.0)
    limit = max(run.end - run.begin, PATIENCE * slowest)
    return len(since), sum(run.end - start > limit for start in since)


def samples(records: Sequence[Record], begin: float) -> dict[str, list[float]]:
    """What the JSON report keeps of a round's requests, in the order of their ends."""
    ordered = sorted(records, key=lambda record: record.ended)
    kept: dict[str, list[float]] = {"ended": [round(r.ended - begin, 4) for r in ordered]}
    for metric in ("ttft", "e2e", "prefill"):
        kept[metric] = [round(value, 6) for value in values(ordered, metric)]
    means = [mean(record.gaps) for record in ordered]
    kept["itl"] = [round(value, 6) for value in means if value is not None]
    return kept


def engine_view(runs: Sequence[Run]) -> dict[str, Any]:
    """The engine's queue, encoder, prefill and decode time, from its `/metrics`.

    `bucket_p50` and so on are the bounds (from, to) of the histogram's bucket that holds the
    percentile of prefill, in the last round; means are exact and of all rounds.
    """
    found: dict[str, Any] = {f"engine_{name}": None for name in (*PHASES, "encoder")}
    found |= {"engine_requests": 0, "hits_prefix": None, "hits_pictures": None}
    found |= {f"bucket_p{which}": None for which in PERCENTILES}
    found["engine_trouble"] = ""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for run in runs:
        if not (run.at_start and run.before and run.after):
            found["engine_trouble"] = "the server's metrics could not be read"
            continue
        if any(record.outcome == REFUSED for record in run.records):
            found["engine_trouble"] = "the server was away: no numbers of the engine's"
            continue
        try:
            window = Between(run.before, run.after)
            whole = Between(run.at_start, run.after)
        except Restarted:
            found["engine_trouble"] = "the server was restarted: no numbers of the engine's"
            continue
        finished = window.counted(f"{PHASES['prefill']}_count")
        ours = sum(record.picture >= 0 for record in run.records)
        if run.busy or finished > ours + max(2.0, run.cell.load.amount):
            found["engine_trouble"] = (
                f"others used the server too ({finished:.0f} requests ended in the engine, {ours} "
                "of them here): the engine's numbers are of all of them"
            )
        for name, metric in PHASES.items():
            histogram = window.histogram(metric)
            sums[name] += histogram.total
            counts[name] += histogram.count
            if name == "prefill":
                for which in PERCENTILES:
                    bounds = histogram.quantile(which / 100)
                    # JSON has no infinity: above the last bound there is no other.
                    found[f"bucket_p{which}"] = bounds and [
                        bound if bound < float("inf") else None for bound in bounds
                    ]
        encoder = window.encoder_seconds()
        if encoder is not None:
            # The engine does not count requests that were broken off, but encodes their pictures.
            broken = sum(record.outcome in (CANCELLED, TIMEOUT) for record in run.records)
            sums["encoder"] += encoder
            counts["encoder"] += finished + broken
        for name, key in (("prefix", "hits_prefix"), ("pictures", "hits_pictures")):
            rate = whole.hit_rate(name)
            if rate is not None:
                found[key] = max(rate, found[key] or 0.0)
    found |= {f"engine_{name}": sums[name] / counts[name] for name in counts if counts[name]}
    found["engine_requests"] = counts["prefill"]
    return found


def outside(line: Mapping[str, Any]) -> float | None:
    """Mean time that a request spent outside the engine: HTTP, decoding the picture, text."""
    inside: list[float | None] = [line[f"engine_{name}"] for name in PHASES]
    known = [seconds for seconds in inside if seconds is not None]
    if line["e2e_mean"] is None or len(known) < len(inside):
        return None
    return max(0.0, float(line["e2e_mean"]) - sum(known))


def within(record: Record, limits: Mapping[str, float]) -> bool:
    """Whether a request stayed within every limit; between tokens its own mean counts.

    What was not measured is not within; an answer of one token has nothing between tokens.
    """
    for metric, limit in limits.items():
        seen = mean(values([record], metric))
        if seen is None and metric == "itl":
            continue
        if seen is None or seen > limit:
            return False
    return True


def every_moment(lags: Sequence[float]) -> list[float]:
    """How late something would have been at every moment, not only how late each wake-up was.

    While the loop was held up nothing could wake up and show it: what would have is added, as
    HdrHistogram does against the same mistake.
    """
    found = []
    for lag in lags:
        late = lag
        while late > LAG_EVERY_S:
            found.append(late)
            late -= LAG_EVERY_S
        found.append(late)
    return found


def health(runs: Sequence[Run], ttft: float | None, made: int) -> dict[str, Any]:
    """How the load generator fared, and whether it may have been what was measured."""
    cpu = [mean([s["cpu"] for s in samples]) for run in runs for samples in run.health.values()]
    lags = [
        percentile(every_moment([lag for s in per for lag in s["lags"]]), 99)
        for run in runs
        for per in run.health.values()
    ]
    longest = [lag for run in runs for per in run.health.values() for s in per for lag in s["lags"]]
    loads = [s["waiting"] for run in runs for per in run.health.values() for s in per]
    extra = 0
    if not runs[0].cell.asking.cache_hits:
        extra = sum(record.picture >= made for run in runs for record in run.records)
    found: dict[str, Any] = {
        "generator_cpu": max((share for share in cpu if share is not None), default=None),
        "lag_p99": max((lag for lag in lags if lag is not None), default=None),
        "lag_max": max(longest, default=None),
        "made_meanwhile": extra,
        "machine_load": mean(loads),
    }
    told = []
    if found["generator_cpu"] is not None and found["generator_cpu"] > BUSY:
        told.append(f"a process of it used {found['generator_cpu']:.0%} of a core")
    late = found["lag_p99"]
    if late is not None and late > max(LATE_S, LATE * (ttft or 0.0)):
        told.append(f"its event loop was up to {1000 * late:.0f} ms late (p99)")
    if extra:
        told.append(f"{extra} pictures had to be made during the load")
    found["bottleneck"] = "; ".join(told)
    crowd = found["machine_load"]
    found["crowded"] = crowd is not None and crowd > CROWDED
    return found
