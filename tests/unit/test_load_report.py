"""Verdicts, comparisons and the report of `make load`."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.load import compare, report, settings, slo, summary
from loadtests.load.running import Run
from tests.load_records import cell, record

ROOT = Path(__file__).parents[2]


def test_slos_name_the_cell_the_limit_and_the_value():
    asked = settings.arguments(
        ["--slo-ttft-p99", "500ms", "--slo-error-rate", "1%", "--slo-e2e-p50", "1s"]
    )
    limits = slo.given(asked)
    assert limits == {"ttft_p99": 0.5, "error_rate": 0.01, "e2e_p50": 1.0}
    assert slo.per_request(limits | {"ttft_p50": 0.1}) == {"ttft": 0.5, "e2e": 1.0}
    rows = [
        {"budget": "64", "load": "4", "ttft_p99": 0.6, "error_rate": 0.0, "e2e_p50": None},
        {"budget": "32", "load": "4", "ttft_p99": 0.5, "error_rate": 0.01, "e2e_p50": 1.0},
    ]
    assert slo.missed(rows, limits) == [
        "64 @ 4: must be at most ttft p99 500 ms, was ttft p99 600 ms",
        "64 @ 4: must be at most e2e p50 1000 ms, was not measured",
    ]


def told(seed, scale=1.0, count=200):
    """What a JSON report has of one cell: latencies around 100 ms, two rounds."""
    rng = np.random.default_rng(seed)

    def one():
        seconds = (scale * rng.gamma(20, 0.005, count)).tolist()
        ended = np.cumsum(seconds).tolist()
        return {"ended": ended, "ttft": seconds, "e2e": seconds, "prefill": [], "itl": []}

    rounds = [one(), one()]
    windows = [rounds[0]["ended"][-1], rounds[1]["ended"][-1]]
    return {
        "cells": [{"budget": "64", "load": "4", "samples": rounds, "windows": windows}],
        "facts": {},
    }


def test_a_comparison_sees_what_changed_and_not_what_is_noise():
    same = compare.compare(told(1), told(2), 0.05)
    assert {line["metric"] for line in same} == {
        "time to first token p50", "time to first token p99", "whole request p50", "requests/s",
    }  # fmt: skip
    assert {line["verdict"] for line in same} == {"no change shown"}
    slower = {line["metric"]: line for line in compare.compare(told(1), told(2, 1.3), 0.05)}
    assert slower["time to first token p50"]["verdict"] == "worse"
    assert slower["time to first token p50"]["change"] == pytest.approx(0.3, abs=0.06)
    assert slower["requests/s"]["verdict"] == "worse"
    faster = {line["metric"]: line for line in compare.compare(told(1, 1.3), told(2), 0.05)}
    assert faster["whole request p50"]["verdict"] == "better"
    assert faster["requests/s"]["verdict"] == "better"


def test_few_requests_have_no_99th_percentile_to_compare():
    metrics = {line["metric"] for line in compare.compare(told(1, count=20), told(2), 0.05)}
    assert "time to first token p99" not in metrics
    assert "time to first token p50" in metrics


def test_too_few_requests_show_no_change_whatever_they_say():
    found = compare.compare(told(1, count=3), told(2, 5.0), 0.05)
    assert {line["verdict"] for line in found} == {compare.TOO_FEW}


def test_small_cells_of_the_same_server_seldom_seem_to_differ():
    wrong = [
        line["metric"]
        for seed in range(40)
        for line in compare.compare(told(seed, count=12), told(1000 + seed, count=12), 0.05)
        if line["verdict"] != "no change shown"
    ]
    assert len(wrong) <= 6  # of 120


def test_a_cell_that_was_not_measured_is_left_out():
    gone = told(1)
    gone["cells"][0]["samples"] = [{"ended": [], "ttft": [], "e2e": [], "prefill": [], "itl": []}]
    gone["cells"][0]["windows"] = [0.0]
    assert compare.compare(gone, told(2), 0.05) == []
    assert compare.compare(told(2), gone, 0.05) == []


def test_an_earlier_report_is_read_back(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(told(1)))
    assert compare.read(tmp_path / "results.json") == told(1)


def test_rounds_that_lie_apart_are_noise():
    wide = told(1)
    rounds = wide["cells"][0]["samples"]
    rounds[1]["ttft"] = [2 * value for value in rounds[0]["ttft"]]
    line = next(line for line in compare.compare(wide, told(2, 1.2), 0.05))
    assert line["noise"] == pytest.approx(2 / 3)
    assert line["verdict"] == "no change shown"


@given(st.floats(-0.9, 3), st.floats(0, 1))
def test_a_verdict_needs_the_whole_interval_beyond_the_noise(low, width):
    found = compare.verdict(low, low + width, 0.05, more_is_better=False)
    expected = "worse" if low > 0.05 else "better" if low + width < -0.05 else "no change shown"
    assert found == expected


def test_the_three_files_say_the_same(tmp_path):
    records = [record(i / 10, ttft=i / 1000, prefill=0.2, seconds=0.5) for i in range(1, 41)]
    runs = [Run(cell(budget), records, 0.0, 4.0) for budget in ("full", "64")]
    rows = summary.rows(runs, {"ttft": 0.02}, 100)
    found = report.write(
        tmp_path, rows=rows, facts={"model": "a <b>"}, limits={"ttft_p99": 0.02},
        missed=["64 @ 1: <late>"], changes=compare.compare({"cells": rows}, {"cells": rows}, 0.05),
        differences=["versions: 1 then, 2 now"], cache_hits=False,
    )  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
    head, first, _ = (tmp_path / "results.csv").read_text().splitlines()
    line = dict(zip(head.split(","), first.split(","), strict=True))
    assert float(line["ttft_p50"]) == rows[0]["ttft_p50"]
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;b&gt;" in page
    assert "64 @ 1: &lt;late&gt;" in page
    assert "no change shown" in page
    # Self-contained: the only links are those inside a plot.
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*|@import|url\((?!#)""", page)
    # What the tables show is what the files say, cell by cell.
    latency, rates = (table(page, head) for head in ("first token", "requests/s gain"))
    for row in rows:
        name = f"{row['budget']} @ 1"
        shown = [report.ms(row[f"ttft_p{which}"]) for which in (50, 90, 99)]
        assert latency[name]["first token"] == " / ".join(shown)
        assert latency[name]["prefill"] == "200 / 200 / 200"
        assert latency[name]["tokens kept"] == "64 of 576"
        assert latency[name]["requests"] == "40"
        assert rates[name]["requests/s"] == "10.00"
        assert rates[name]["goodput/s"] == f"{row['goodput']:.2f}"
        assert rates[name]["first-token gain"] == "1.00x"
        assert rates[name]["failed"] == "0.0%"


def table(page, column):
    """The table that has this column: first cell of a row -> column -> text."""
    for found in re.findall(r"<table.*?</table>", page, re.DOTALL):
        head, *lines = [
            [
                html.unescape(re.sub("<.*?>", "", text))
                for text in re.findall(r"<t[hd].*?</t[hd]>", line, re.DOTALL)
            ]
            for line in re.findall(r"<tr.*?</tr>", found, re.DOTALL)
        ]
        if column in head:
            return {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    raise AssertionError(column)


def test_sweeps_without_a_cell_in_common_say_so(tmp_path):
    rows = summary.rows([Run(cell(), [record(1)], 0.0, 5.0)], {}, 10)
    report.write(tmp_path, rows=rows, facts={}, limits={}, missed=[], changes=[], differences=[],
                 cache_hits=False)  # fmt: skip
    assert "no budget under the same load in common" in (tmp_path / "report.html").read_text()


def test_the_load_test_needs_neither_server_nor_plugin():
    """Its image has neither."""
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('hiprune_server', 'hiprune_vllm', 'vllm', 'torch'))\n"
        "import loadtests.load.__main__, loadtests.load.preflight, loadtests.load.plots"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
