"""What was measured, as JSON and as a Markdown table."""

import json
from pathlib import Path
from typing import Any


def merge(
    folder: Path, rows: list[dict[str, Any]], machine: dict[str, Any]
) -> list[dict[str, Any]]:
    """Adds rows to `bench.json`, in the place of older ones of the same benchmarks; writes both."""
    file = folder / "bench.json"
    names = {row["benchmark"] for row in rows}
    old = json.loads(file.read_text())["rows"] if file.exists() else []
    kept = [row for row in old if row["benchmark"] not in names]
    noted = [row | {"machine": machine} for row in rows]
    every = sorted(kept + noted, key=lambda row: str(row["benchmark"]))
    file.write_text(json.dumps({"rows": every}, indent=1))
    (folder / "bench.md").write_text(table(every))
    return every


def table(rows: list[dict[str, Any]]) -> str:
    """A line a row: median, quartiles in brackets."""
    lines = [
        "| | what | base | measured | ratio | target |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = row.get("base_seconds") or row.get("base_value")
        unit = " s" if "seconds" in row else ""
        value = row.get("seconds") or row["value"]
        lines.append(
            f"| {row['benchmark']} | {row['what']} | {_shown(base, unit)} | {_shown(value, unit)} "
            f"| {_shown(row.get('ratio'), '')} | {row['target'] or ''} |"
        )
    machines = {json.dumps(row["machine"], sort_keys=True): row["machine"] for row in rows}
    for machine in machines.values():
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        names = sorted({row["benchmark"] for row in rows if row["machine"] == machine})
        lines.append(
            f"\n{', '.join(names)}: {machine['device']}, {machine['cores']} cores of "
            f"{machine['cpu']}, {machine['dtype']}, {machine['clock']} time, "
            f"{versions}, {machine['date']}, "
            f"commit {machine['commit']}"
        )
    return "\n".join(lines) + "\n"


def _shown(figure: dict[str, Any] | None, unit: str) -> str:
    if figure is None:
        return ""
    digits = 3 if figure["median"] < 10 else 1
    low, middle, high = (f"{figure[key]:.{digits}f}" for key in ("q1", "median", "q3"))
    return f"{middle}{unit} [{low}, {high}]" if figure["n"] > 1 else f"{middle}{unit}"
