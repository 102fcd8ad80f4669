"""What is compared: every cell is one way to spend a budget, as data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

BUDGETS = (192, 128, 64, 32, 16, 8)
ALPHAS = (0.0, 0.1, 0.3, 0.5)
BUFFERS = ("cross", "square", "row", "none")
METHODS = ("hiprune", "attention", "cls", "random", "stride", "downscaled")
SETS = ("methods", "alpha", "buffers")
SEEDS = 3
DOWNSCALED = {192: 14, 128: 11, 64: 8, 32: 6, 16: 4, 8: 3}
"""Budget -> patches on a side of the down-scaled picture; its square is nearest to the budget."""


@dataclass(frozen=True)
class Cell:
    """One way to answer all questions.

    Attributes:
        method: a label of METHODS.
        plan: the request's `hiprune` object; empty for the full picture.
        seed: which draw of `random`, 0 elsewhere.
        side: patches on a side of a down-scaled picture, 0 where it is served whole.
    """

    method: str
    plan: dict[str, Any] = field(hash=False)
    seed: int = 0
    side: int = 0

    @property
    def key(self) -> str:
        """What tells this cell's answers from others': equal for equal plans."""
        knobs = ",".join(f"{name}={value}" for name, value in sorted(self.plan.items()))
        extra = f";seed={self.seed}" if self.plan.get("method") == "random" else ""
        return (knobs or "full") + extra + (f";side={self.side}" if self.side else "")

    @property
    def budget(self) -> int | None:
        """Tokens asked for, None for all."""
        tokens: int | None = self.plan.get("tokens")
        return tokens


FULL = Cell("full", {})


def plan(tokens: int, object_layer: int, **knobs: Any) -> dict[str, Any]:
    """A complete plan, so that equal cells are recognised whatever the server's defaults are."""
    return {
        "tokens": tokens,
        "alpha": 0.1,
        "object_layer": object_layer,
        "buffer": "cross",
        "score": "global",
        "method": "hiprune",
    } | knobs


def method_cells(
    budgets: Sequence[int], object_layer: int, seeds: int, *, downscaled: bool
) -> list[Cell]:
    """Every method at every budget: the shape of the paper's Table 2."""
    cells = [FULL]
    for tokens in budgets:
        cells += [
            Cell("hiprune", plan(tokens, object_layer)),
            Cell("attention", {"tokens": tokens, "method": "attention"}),
            Cell("cls", plan(tokens, object_layer, score="cls")),
            *(
                Cell("random", {"tokens": tokens, "method": "random"}, seed)
                for seed in range(seeds)
            ),
            Cell("stride", {"tokens": tokens, "method": "stride"}),
        ]
        if downscaled:
            cells.append(Cell("downscaled", {}, side=_side(tokens)))
    return cells


def alpha_cells(tokens: int, output_layer: int) -> list[Cell]:
    """Alpha against object layer at one budget: Figure 7."""
    return [
        Cell("hiprune", plan(tokens, layer, alpha=alpha))
        for alpha in ALPHAS
        for layer in range(1, output_layer)
        if alpha > 0 or layer == 1  # without anchors the layer does not matter
    ]


def buffer_cells(budgets: Sequence[int], object_layer: int) -> list[Cell]:
    """Neighbours, anchors and the kind of attention: Table 5."""
    return [
        Cell("hiprune", plan(tokens, object_layer, **knobs))
        for tokens in budgets
        for _, knobs in ABLATIONS
    ]


ABLATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("cross", {}),
    ("square", {"buffer": "square"}),
    ("row", {"buffer": "row"}),
    ("no buffers", {"buffer": "none"}),
    ("no anchors, no buffers", {"alpha": 0.0}),
    ("CLS attention", {"score": "cls"}),
)


def unique(cells: Sequence[Cell]) -> list[Cell]:
    """Each plan once, in order, under the label that it had first."""
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(cell.key, cell)
    return list(found.values())


def _side(tokens: int) -> int:
    return DOWNSCALED.get(tokens) or max(1, round(tokens**0.5))
