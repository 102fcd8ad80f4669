"""`make reference`: writes the tables of docs/reference.md that come from the code.

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`; a test finds drift.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

from hiprune_server.operations import metrics
from hiprune_server.operations.config import SETTINGS
from hiprune_server.wishes.places import EACH, PLACES
from hiprune_vllm.plan import FIELD, MAX_TOKENS, Encoder, PruningPlan, complete
from hiprune_vllm.reading import schema

PAGE: Final = Path(__file__).parents[1] / "docs" / "reference.md"
_ANY: Final = Encoder(
    family="", output_layer=2, object_layer=1, has_cls=True, free_sizes=True, tiles=(1, MAX_TOKENS)
)
_OF_MODEL: Final = {
    "object_layer": ("integer, 1-based, below the output layer", "the family's"),
    "min_pixels": (None, "the checkpoint's"),
    "max_pixels": (None, "the checkpoint's"),
    "max_tiles": ("integer within what the checkpoint cuts", "the checkpoint's"),
}
"""Knob -> range and default in words, where they are the served model's."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def settings() -> str:
    """Every setting of the operator."""
    rows = (
        (
            f"`{one.key}`",
            f"`{one.flag}`",
            f"`{one.variable}`",
            f"`{one.show(one.default)}`",
            one.help,
        )
        for one in SETTINGS
    )
    return table(["in the file", "flag", "variable", "built in", ""], rows)


def fields() -> str:
    """Every field of a `hiprune` object, its range and what holds where nobody says anything."""
    default = complete(PruningPlan(), _ANY).to_dict()
    rows = []
    for knob, allowed in schema(_ANY).items():
        wanted, standard = _OF_MODEL.get(knob, (None, str(default.get(knob, ""))))
        rows.append((f"`{knob}`", wanted or _range(allowed), allowed["description"], standard))
    return table(["field", "range", "", "where nobody says anything"], rows)


def _range(allowed: Mapping[str, Any]) -> str:
    if "enum" in allowed:
        return " ".join(f"`{name}`" for name in allowed["enum"])
    if allowed["type"] == "integer":
        return f"integer >= {allowed['minimum']}"
    low = "(0" if "exclusiveMinimum" in allowed else f"[{allowed['minimum']}"
    return f"number in {low}, {allowed['maximum']}]"


def routes() -> str:
    """Where on each route a `hiprune` object may stand."""
    rows = []
    for route, places in PLACES.items():
        parts = [place for place in places if EACH in place]
        told = [
            "yes" if found else ""
            for found in ((FIELD,) in places, parts, ("mm_processor_kwargs", FIELD) in places)
        ]
        rows.append((f"`{route}`", *told))
    head = [
        "route",
        "at the top",
        "in a picture's part",
        "in `mm_processor_kwargs`, as vLLM trusts it",
    ]
    return table(head, rows)


def meters() -> str:
    """Every metric of ours on `/metrics`."""
    from hiprune_vllm.engine import model  # registers the worker's own

    of_worker = {model.SELECTION_SECONDS, model.ENCODER_SECONDS}
    known = [one for one in vars(metrics).values() if isinstance(one, MetricWrapperBase)]
    rows = []
    for one in [*known, *sorted(of_worker, key=lambda found: str(found._name))]:
        assert one in REGISTRY._collector_to_names
        name = f"{one._name}_total" if one._type == "counter" else one._name
        labels = ", ".join(f"`{label}`" for label in one._labelnames)
        rows.append((f"`{name}`", one._type, labels, one._documentation))
    return table(["name", "type", "labels", ""], rows)


def reasons() -> str:
    """Values of the label `reason` of refused requests."""
    return " ".join(f"`{reason}`" for reason in metrics.REASONS)


TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "fields": fields,
    "settings": settings,
    "routes": routes,
    "metrics": meters,
    "reasons": reasons,
}


def written(page: str) -> str:
    """The page with every table as the code has it.

    Raises:
        KeyError: a mark names no table.
    """
    mark = re.compile(r"(<!-- generated: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
    return mark.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", page)


def main() -> int:
    PAGE.write_text(written(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
