"""The report's plots as inline SVG, without a background of their own: they suit any theme."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import NullFormatter, ScalarFormatter

from loadtests.drawing import INK, RC, plt, svg

STYLE = {
    "hiprune": ("#1f77d0", "o", "HiPrune"),
    "attention": ("#8a5cd0", "s", "attention only"),
    "cls": ("#d0781f", "^", "HiPrune, CLS attention"),
    "random": ("#808080", "x", "random"),
    "stride": ("#3c9a5f", "D", "stride"),
    "downscaled": ("#c03a5a", "v", "down-scaled picture"),
}


def accuracy_plot(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy against tokens kept, a line a method, with intervals."""
    with plt.rc_context(RC):
        figure, axes = plt.subplots(figsize=(7.2, 4.2))
        for row in rows:
            if row["method"] == "full":
                axes.axhline(100 * row["accuracy"], color=INK, lw=1, ls="--")
                axes.annotate(
                    "all tokens", (0.01, 100 * row["accuracy"]), (0, 2), fontsize=9,
                    xycoords=("axes fraction", "data"), textcoords="offset points",
                )  # fmt: skip
        for depth, (method, (colour, marker, label)) in enumerate(STYLE.items()):
            mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["tokens"])
            if not mine:
                continue
            value = [100 * r["accuracy"] for r in mine]
            low = [v - 100 * r["low"] for v, r in zip(value, mine, strict=True)]
            high = [100 * r["high"] - v for v, r in zip(value, mine, strict=True)]
            axes.errorbar(
                [r["tokens"] for r in mine], value, yerr=[low, high],
                color=colour, marker=marker, ms=5, lw=1.6, capsize=2, label=label,
                zorder=10 - depth,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(
            sorted({r["tokens"] for r in rows if r["tokens"] and r["method"] != "downscaled"})
        )
        axes.set(xlabel="visual tokens kept", ylabel="exact match, %", ylim=(0, 104))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return svg(figure)


def heat_map(values: Sequence[Sequence[float | None]], rows: Sequence[Any], columns: Sequence[Any],
             *, row_label: str, column_label: str) -> str:  # fmt: skip
    """A table of percentages as colours, each with its number."""
    grid = [[float("nan") if v is None else 100 * v for v in line] for line in values]
    with plt.rc_context(RC):
        figure, axes = plt.subplots(figsize=(1.2 + 0.8 * len(columns), 1.2 + 0.5 * len(rows)))
        axes.imshow(grid, cmap="viridis", aspect="auto")
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                if not np.isnan(value):
                    axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=9,
                              color="black" if value > middle else "white")  # fmt: skip
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel=column_label, ylabel=row_label)
        for side in axes.spines.values():
            side.set_visible(False)
        return svg(figure)


def kinds_plot(rows: Sequence[dict[str, Any]]) -> str:
    """HiPrune's accuracy by kind of question against tokens kept."""
    with plt.rc_context(RC):
        figure, axes = plt.subplots(figsize=(7.2, 3.8))
        for kind in sorted({r["kind"] for r in rows}):
            mine = [r for r in rows if r["kind"] == kind and r["method"] == "hiprune"]
            mine.sort(key=lambda r: r["tokens"])
            axes.plot([r["tokens"] for r in mine], [100 * r["value"] for r in mine],
                      marker="o", ms=4, label=kind)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xticks(sorted({r["tokens"] for r in rows if r["tokens"]}))
        axes.set(xlabel="visual tokens kept (HiPrune)", ylabel="exact match, %", ylim=(0, 104))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right")
        return svg(figure)


def relative_plot(rows: Sequence[dict[str, Any]]) -> str:
    """Average share of the unpruned scores against tokens kept, the paper's values beside ours."""
    with plt.rc_context(RC):
        figure, axes = plt.subplots(figsize=(6.4, 3.6))
        for name, label, colour in (
            ("relative", "measured", "#1f77d0"),
            ("relative_in_paper", "paper", "#d0781f"),
        ):
            mine = [r for r in rows if r[name] is not None and r["tokens_kept"] is not None]
            if mine:
                axes.plot([r["tokens_kept"] for r in mine], [r[name] for r in mine],
                          marker="o", ms=5, color=colour, label=label)  # fmt: skip
        axes.set(xlabel="visual tokens kept of a request", ylabel="kept of the unpruned score, %")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
        return svg(figure)
