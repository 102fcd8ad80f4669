"""The report's plots."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from loadtests.drawing import INK, RC, plt, svg
from loadtests.load.summary import PERCENTILES

COLOURS = ("#1f77d0", "#d0781f", "#3c9a5f", "#c03a5a", "#8a5cd0", "#2aa0a8", "#a08a2a", "#808080")
MARKERS = "osD^vPX*"
PHASES = (
    ("engine_queue", "queue", "#9a9a9a"),
    ("engine_encoder", "encoder", "#d0781f"),
    ("prefill_rest", "prefill, the rest", "#1f77d0"),
    ("engine_decode", "decode", "#3c9a5f"),
    ("outside_mean", "outside the engine", "#b78fd6"),
)
Rows = Sequence[Mapping[str, Any]]


def by_tokens(rows: Rows, metric: str) -> str:
    """A latency against tokens kept: a panel a percentile, a line a load.

    Where only histograms know it, a bar shows the bucket that the percentile is in.
    """
    loads = list(dict.fromkeys(row["load"] for row in rows))
    tokens = sorted({row["tokens_kept"] for row in rows if row["tokens_kept"]})
    with plt.rc_context(RC):
        figure, panels = plt.subplots(1, len(PERCENTILES), figsize=(9.6, 3.1), sharey=True)
        for which, axes in zip(PERCENTILES, panels, strict=True):
            for number, load in enumerate(loads):
                mine = [r for r in rows if r["load"] == load and r["tokens_kept"]]
                mine.sort(key=lambda r: r["tokens_kept"])
                style = {"color": COLOURS[number % 8], "marker": MARKERS[number % 8]}
                exact = [r for r in mine if r[f"{metric}_p{which}"] is not None]
                axes.plot(
                    [r["tokens_kept"] for r in exact],
                    [1000 * r[f"{metric}_p{which}"] for r in exact],
                    label=load, ms=5, lw=1.6, **style,
                )  # fmt: skip
                rough = [r for r in mine if r not in exact and metric == "prefill"]
                for row in rough:
                    low, high = row[f"bucket_p{which}"] or (0, None)
                    if high is not None:
                        axes.plot([row["tokens_kept"]] * 2, [1000 * low, 1000 * high],
                                  lw=5, alpha=0.35, color=style["color"])  # fmt: skip
            axes.set(title=f"p{which}", xlabel="visual tokens kept")
            _token_axis(axes, tokens)
            axes.grid(alpha=0.25)
        panels[0].set(ylabel="ms", ylim=(0, None))
        panels[-1].legend(frameon=False, fontsize=9, title=_kind(rows), loc="upper left",
                          bbox_to_anchor=(1.0, 1.0))  # fmt: skip
        figure.tight_layout()
        return svg(figure)


def throughput(rows: Rows) -> str:
    """Finished requests a second against the load, a line a budget."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    loads = sorted({row["amount"] for row in rows})
    with plt.rc_context(RC):
        figure, axes = plt.subplots(figsize=(6.4, 3.4))
        for number, budget in enumerate(budgets):
            mine = [r for r in rows if r["budget"] == budget and r["rps"] is not None]
            mine.sort(key=lambda r: r["amount"])
            axes.plot([r["amount"] for r in mine], [r["rps"] for r in mine], ms=5, lw=1.6,
                      color=COLOURS[number % 8], marker=MARKERS[number % 8],
                      label=budget)  # fmt: skip
        if any(row["kind"] == "open" for row in rows):
            axes.plot(loads, loads, color=INK, lw=1, ls="--", label="as they arrive")
        axes.set(xlabel=_kind(rows), ylabel="requests/s", ylim=(0, None))
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9, title="budget", loc="upper left",
                    bbox_to_anchor=(1.0, 1.0))  # fmt: skip
        return svg(figure)


def time_split(rows: Rows) -> str:
    """Where the mean request's time went: a panel a load, a bar a budget."""
    loads = list(dict.fromkeys(row["load"] for row in rows))
    with plt.rc_context(RC):
        height = max(len([r for r in rows if r["load"] == load]) for load in loads)
        figure, panels = plt.subplots(
            len(loads), 1, figsize=(7.6, (0.75 + 0.32 * height) * len(loads) + 0.6), squeeze=False
        )
        for load, axes in zip(loads, panels[:, 0], strict=True):
            mine = [split(row) for row in rows if row["load"] == load]
            names = [row["budget"] for row in rows if row["load"] == load]
            left = [0.0] * len(mine)
            for key, label, colour in PHASES:
                widths = [1000 * (one.get(key) or 0.0) for one in mine]
                axes.barh(
                    range(len(mine)), widths, left=left, color=colour, label=label, height=0.7
                )
                left = [a + b for a, b in zip(left, widths, strict=True)]
            axes.set_yticks(range(len(mine)), names)
            axes.invert_yaxis()
            axes.xaxis.set_major_locator(MaxNLocator(8))
            axes.set_title(f"{_kind(rows)} {load}", loc="left", fontsize=10)
        panels[-1, 0].set_xlabel("ms, mean of a request")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.tight_layout()
        figure.legend(handles, labels, frameon=False, fontsize=9, ncols=len(PHASES),
                      loc="lower center", bbox_to_anchor=(0.5, 1.0))  # fmt: skip
        return svg(figure)


def split(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the mean request by phase; empty where the engine's numbers are not known."""
    if row["engine_prefill"] is None:
        return {}
    parts = {key: row[key] or 0.0 for key, *_ in PHASES if key in row}
    encoder = min(parts["engine_encoder"], row["engine_prefill"])
    return parts | {"engine_encoder": encoder, "prefill_rest": row["engine_prefill"] - encoder}


def _kind(rows: Rows) -> str:
    kinds = {row["kind"] for row in rows}
    return {"closed": "concurrency", "open": "arrivals a second"}.get(
        kinds.pop() if len(kinds) == 1 else "", "load"
    )


def _token_axis(axes: Any, tokens: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each budget that has room for one."""
    if not tokens:
        return
    axes.set_xscale("log", base=2)
    shown = [tokens[-1]]
    for value in reversed(tokens[:-1]):
        if shown[-1] / value >= 1.4:
            shown.append(value)
    axes.set_xticks(shown)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
