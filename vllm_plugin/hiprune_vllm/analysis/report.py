"""Plots, a page and a JSON file of an analysis."""

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.manifold import TSNE

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #8884; text-align: right; }
.proposal { border-left: 4px solid #1f77d0; padding-left: 1rem; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""


def attention_maps(
    path: Path, pictures: list[Image.Image], scores: list[np.ndarray], layers: list[int]
) -> None:
    """Figure 2: the scores of every layer as a picture, a row a picture."""
    figure, axes = plt.subplots(
        len(pictures), 1 + len(layers), squeeze=False,
        figsize=(1.3 * (1 + len(layers)), 1.5 * len(pictures)),
    )  # fmt: skip
    for row, picture, score in zip(axes, pictures, scores, strict=True):
        row[0].imshow(picture)
        for cell, layer in zip(row[1:], layers, strict=True):
            shown = score[layer - 1]
            cell.imshow(shown, cmap="inferno", vmax=np.quantile(shown, 0.99))
        for cell in row:
            cell.set_axis_off()
    for cell, name in zip(axes[0], ["picture", *(f"layer {n}" for n in layers)], strict=True):
        cell.set_title(name, fontsize=8)
    _save(figure, path)


def similarity_map(path: Path, similarity: np.ndarray) -> None:
    """Figure 3: rank similarity between layers."""
    figure, axes = plt.subplots(figsize=(4.6, 4))
    shown = axes.imshow(similarity, cmap="viridis", vmin=min(0.0, similarity.min()), vmax=1)
    figure.colorbar(shown, label="Spearman correlation")
    count = len(similarity)
    ticks = range(0, count, max(1, count // 12))
    axes.set_xticks(ticks, [str(t + 1) for t in ticks])
    axes.set_yticks(ticks, [str(t + 1) for t in ticks])
    axes.set(xlabel="layer", ylabel="layer")
    _save(figure, path)


def rank_map(path: Path, ranks: np.ndarray, seed: int) -> None:
    """t-SNE of ranks; `ranks` is (pictures, layers, tokens) of pictures with one grid."""
    pictures, layers, tokens = ranks.shape
    count = pictures * layers
    points = ranks.reshape(count, tokens) / tokens
    perplexity = min(30.0, max(1.0, (count - 1) / 3))
    placed = TSNE(2, perplexity=perplexity, random_state=seed, init="pca").fit_transform(points)
    figure, axes = plt.subplots(figsize=(5, 4))
    colours = np.tile(np.arange(1, layers + 1), pictures)
    shown = axes.scatter(placed[:, 0], placed[:, 1], c=colours, cmap="turbo", s=14)
    figure.colorbar(shown, label="layer")
    axes.set(xticks=[], yticks=[], title="one dot a picture and layer")
    _save(figure, path)


def layer_plot(
    path: Path, values: np.ndarray, label: str, *, reference: float, proposed: int
) -> None:
    """Mean and spread over pictures by layer; `values` is (pictures, layers)."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    layers = np.arange(1, values.shape[1] + 1)
    axes.errorbar(layers, values.mean(0), yerr=values.std(0), marker="o", ms=4, capsize=2)
    axes.axhline(reference, color="grey", ls="--", lw=1, label="chance")
    axes.axvline(proposed, color="#d0781f", lw=1, label="proposed object layer")
    axes.set(xlabel="layer", ylabel=label, xticks=layers)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    _save(figure, path)


def write(folder: Path, numbers: dict[str, Any], plots: list[tuple[str, str]]) -> None:
    """analysis.json and report.html; `plots` are (file name, caption)."""
    (folder / "analysis.json").write_text(json.dumps(numbers, indent=1) + "\n")
    names = [name for name in ("dispersion", "overlap") if name in numbers]
    rows = "".join(
        f"<tr><td>{layer}</td>"
        + "".join(f"<td>{numbers[name][layer - 1]:.3f}</td>" for name in names)
        + "</tr>"
        for layer in range(1, numbers["output_layer"] + 1)
    )
    figures = "".join(
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode((folder / name).read_bytes()).decode()}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for name, caption in plots
    )
    head = "".join(f"<th>{name}</th>" for name in ("layer", *names))
    proposal = numbers["proposal"]
    (folder / "report.html").write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Where {escape(numbers['checkpoint'])} looks</title><style>{_STYLE}</style></head>"
        f"<body><h1>Where {escape(numbers['checkpoint'])} looks</h1>"
        f"<p>{escape(numbers['kind'])}, {numbers['depth']} layers, output layer "
        f"{numbers['output_layer']}, {numbers['pictures']} pictures.</p>"
        f'<p class="proposal"><b>Proposed object layer: {proposal["layer"]}</b>'
        f"{'' if proposal['sure'] else ' (not sure)'}<br>{escape(proposal['reason'])}.</p>"
        f"{figures}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></body></html>"
    )


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
