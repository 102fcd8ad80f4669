"""Plots as inline SVG, without a background of their own: they suit any theme."""

import io
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

__all__ = ["INK", "RC", "plt", "svg"]

INK = "#7a7a7a"  # readable on white and on black
RC: Any = {
    "svg.fonttype": "none", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "svg.hashsalt": "hiprune",
}  # fmt: skip


def svg(figure: Any) -> str:
    """The figure as an inline <svg> element."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, bbox_inches="tight",
                   metadata={"Date": None})  # fmt: skip
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
