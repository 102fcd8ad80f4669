"""What the benchmarks make of their figures."""

import json

import pytest

from loadtests import geometry
from loadtests.bench import measure, report
from loadtests.bench.releases import figures, table


def test_all_ways_are_measured_in_turn_and_the_warm_up_does_not_count():
    order = []

    def way(name):
        def measured():
            order.append(name)
            return float(len(order))

        return measured

    figures = measure.in_turn({"a": way("a"), "b": way("b")}, 2, warm_up=1)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert figures == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_ratios_are_of_the_same_round():
    found = measure.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 2.0])
    assert found == {"median": 2.0, "q1": 2.0, "q3": 2.5, "n": 3}
    assert measure.spread([5.0]) == {"median": 5.0, "q1": 5.0, "q3": 5.0, "n": 1}


def row(name, ratio):
    figure = measure.spread([ratio, ratio])
    return {
        "benchmark": name,
        "what": f"thing {name}",
        "target": "<= 1.02",
        "base_seconds": figure,
        "seconds": figure,
        "ratio": figure,
    }


def test_a_benchmark_that_ran_again_replaces_itself_alone(tmp_path):
    machine = measure.machine("cpu") | {"dtype": "float32", "clock": "wall"}
    report.merge(tmp_path, [row("b", 1.0), row("a", 2.0)], machine)
    report.merge(tmp_path, [row("a", 3.0)], machine)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(r["benchmark"], r["ratio"]["median"]) for r in rows] == [("a", 3.0), ("b", 1.0)]
    text = (tmp_path / "bench.md").read_text()
    assert "| a | thing a | 3.000 s [3.000, 3.000] |" in text
    assert "torch" in text
    assert machine["cpu"] in text


def test_counted_flops_are_those_of_the_papers_model():
    # Table 6 of the paper: 40.57 at 2880 visual tokens, of which the encoder is a part.
    assert geometry.prefill_flops("7b", 2880 + 40) / 1e12 == pytest.approx(39.7, abs=1.0)


def test_two_releases_are_compared_by_the_ratio_of_each_round():
    spread = measure.spread
    row = {
        "benchmark": "a",
        "what": "CLIP",
        "seconds": spread([2.0]),
        "base_seconds": spread([4.0]),
    }
    counted = {"benchmark": "f", "what": "requests", "value": spread([8.0])}
    found = figures([row, counted])
    assert found == {
        ("a", "CLIP: vLLM alone"): 4.0, ("a", "CLIP: pruned"): 2.0, ("f", "requests: pruned"): 8.0,
    }  # fmt: skip
    old = {key: [value, 2 * value] for key, value in found.items()}
    new = {key: [1.1 * value, 2.2 * value] for key, value in found.items()}
    lines = table("old", "new", old, new).splitlines()
    assert lines[2] == "| a | CLIP: pruned | 3 | 3.3 | 1.10 [1.10, 1.10] |"
    assert len(lines) == 5
