"""Whole sweeps of `make load` against a server with known latencies and known faults."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from loadtests.load import __main__ as load
from tests import routing
from tests.mock_openai import FULL, Answer, Mock, serving

ROOT = Path(__file__).parents[2]
FIRST, BETWEEN, TOKENS = 0.4, 0.02, 6
LATE = 0.12
"""A busy machine is late by so much in the median, and never early."""
SHORT = ["--duration", "2.5s", "--warm-up", "0.5s", "--answer-tokens", str(TOKENS)]


def sweep(mock, out, *words):
    """Exit code and the cells of the JSON report."""
    code = load.main(["--url", mock.url, "--out", str(out), *SHORT, *words])
    return code, json.loads((out / "results.json").read_text())["cells"]


def steady(**more):
    return lambda _number, _body: Answer(FIRST, BETWEEN, TOKENS, **more)


def vllm(answered):
    """`/metrics` of an engine whose requests all took the same."""
    lines = ["# TYPE vllm:prompt_tokens counter", f"vllm:prompt_tokens_total {answered * 72}"]
    for phase, seconds in (("queue", 0.05), ("prefill", 0.12), ("decode", 0.1)):
        name = f"vllm:request_{phase}_time_seconds"
        lines += [
            f"# TYPE {name} histogram", f'{name}_bucket{{le="0.3"}} {answered}',
            f'{name}_bucket{{le="+Inf"}} {answered}', f"{name}_count {answered}",
            f"{name}_sum {answered * seconds}",
        ]  # fmt: skip
    lines += ["# TYPE hiprune_encoder_seconds histogram",
              f"hiprune_encoder_seconds_count {answered}",
              f"hiprune_encoder_seconds_sum {answered * 0.08}"]  # fmt: skip
    for name, hits in (("prefix_cache", 0), ("mm_cache", answered // 4)):
        lines += [f"# TYPE vllm:{name}_queries counter", f"vllm:{name}_queries_total {answered}",
                  f"# TYPE vllm:{name}_hits counter", f"vllm:{name}_hits_total {hits}"]  # fmt: skip
    return "\n".join(lines) + "\n"


def test_the_report_shows_what_the_server_did(tmp_path):
    """Budgets answer at different speeds, and say how many tokens they kept."""

    def answer(_number, body):
        pruned = "tokens" in body["hiprune"]
        first = FIRST / 2 if pruned else FIRST
        return Answer(first, BETWEEN, TOKENS, queue_s=0.05, prefill_s=first - 0.08)

    with serving(Mock(answer, vllm)) as mock:
        words = ("--budgets", "full", "64", "--concurrency", "1", "3", "--slo-ttft-p50", "390ms")
        code, cells = sweep(mock, tmp_path, *words)
    assert code == 1  # the full budget misses the SLO
    assert [(cell["budget"], cell["load"]) for cell in cells] == [
        ("full", "1"), ("64", "1"), ("full", "3"), ("64", "3"),
    ]  # fmt: skip
    for cell in cells:
        first = FIRST if cell["budget"] == "full" else FIRST / 2
        whole = first + BETWEEN * (TOKENS - 1)
        assert cell["failed"] == 0
        assert cell["tokens_kept"] == (FULL if cell["budget"] == "full" else 64)
        assert (cell["tokens_full"], cell["answer_tokens"]) == (FULL, TOKENS)
        assert first - 0.005 <= cell["ttft_p50"] <= first + LATE
        assert cell["itl_mean"] == pytest.approx(BETWEEN, abs=BETWEEN / 2)
        assert whole - 0.005 <= cell["e2e_p50"] <= whole + LATE
        assert cell["prefill_p50"] == pytest.approx(first - 0.08)
        assert cell["queue_p99"] == pytest.approx(0.05)
        assert cell["rps"] == pytest.approx(cell["amount"] / cell["e2e_mean"], rel=0.25)
        # The window's own counts: a request may fall between scrape and clock.
        assert abs(cell["engine_requests"] - cell["requests"]) <= 2 * cell["amount"]
        assert cell["engine_prefill"] == pytest.approx(0.12)
        assert cell["engine_encoder"] == pytest.approx(0.08)
        assert cell["bucket_p50"] == [0.0, 0.3]
        assert cell["hits_prefix"] == 0
        assert 0.1 < cell["hits_pictures"] <= 0.4
        assert 0 < cell["generator_cpu"] < 1
        if cell["budget"] == "full":
            assert cell["goodput"] == 0
        else:
            assert cell["rps"] / 2 < cell["goodput"] <= cell["rps"]
    assert 1.4 < cells[1]["gain_ttft"] < 2.5
    # The same pictures in every cell, never twice in one, and another identity each time.
    seen = {}
    for body in mock.bodies[3:]:
        part = body["messages"][0]["content"][0]
        _, cell, number = part["uuid"].split("-")
        seen.setdefault(cell, {})[number] = part["image_url"]["url"]
    assert len(seen) == 4
    for pictures in seen.values():
        assert len(set(pictures.values())) == len(pictures)
        assert all(seen["0"].get(number, url) == url for number, url in pictures.items())
    identities = Counter(b["messages"][0]["content"][0]["uuid"] for b in mock.bodies)
    assert max(identities.values()) == 1
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "of the picture cache" in page  # hits that nobody wanted
    assert "must be at most ttft p50 390 ms" in page


def test_every_fault_is_counted_by_its_kind_and_the_sweep_goes_on(tmp_path):
    faults = ["", "cut", "error", "garbage", "hang", "busy", "mute"]

    def answer(number, _body):
        fault = faults[number % len(faults)] if number >= 2 else ""
        return Answer(
            0.05, 0.005, TOKENS, status=503 if fault == "busy" else 200,
            breaks=fault if fault not in ("busy", "mute") else "", report=fault != "mute",
        )  # fmt: skip

    with serving(Mock(answer)) as mock:
        words = ("--budgets", "64", "--concurrency", "8", "--timeout", "1s")
        code, (cell,) = sweep(mock, tmp_path, *words)
    assert code == 0
    assert set(cell["errors"]) == {
        "HTTP 503", "stream cut off", "error in the stream", "unreadable answer", "timeout",
        "no hiprune report",
    }  # fmt: skip
    assert cell["requests"] > 0
    assert 0.4 < cell["error_rate"] < 0.95
    assert cell["failed"] == sum(cell["errors"].values())


def test_a_request_that_hangs_misses_the_slo_though_its_time_is_not_up(tmp_path):
    def answer(number, _body):
        return Answer(0.05, 0.005, TOKENS, breaks="hang" if number == 4 else "")

    with serving(Mock(answer)) as mock:
        words = ("--budgets", "64", "--concurrency", "3", "--slo-error-rate", "0")
        code, (cell,) = sweep(mock, tmp_path, *words)
    assert code == 1
    assert cell["errors"] == {"no answer": 1}
    assert cell["requests"] > 20


def test_a_server_that_stays_away_fails_the_sweep_and_names_what_was_not_measured(tmp_path, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mock = Mock(steady())
    mock.url = f"http://127.0.0.1:{port}"

    def die():
        with serving(mock, port):
            while len(mock.bodies) < 12:
                time.sleep(0.01)

    thread = threading.Thread(target=die)
    thread.start()
    words = ("--budgets", "full", "64", "--concurrency", "2", "--recover", "1s")
    code, cells = sweep(mock, tmp_path, *words)
    thread.join()
    assert code == 1
    assert [cell["requests"] > 0 for cell in cells] == [True, False]
    assert "FAILED: 64 @ 2: not measured: the server did not come back" in capsys.readouterr().err


def test_cancelled_and_slow_requests_are_no_errors_and_no_latencies(tmp_path):
    with serving(Mock(steady())) as mock:
        words = ("--budgets", "64", "--concurrency", "6", "--cancel", "30%", "--slow", "30%",
                 "--duration", "5s")  # fmt: skip
        code, (cell,) = sweep(mock, tmp_path, *words)
    assert code == 0
    assert cell["errors"] == {}
    assert cell["cancelled"] > 0
    assert cell["slow"] > 0
    assert cell["itl_p99"] < 0.15  # a slow reader's gaps are longer


def test_a_server_that_is_restarted_costs_requests_and_not_the_sweep(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mock = Mock(steady(), vllm)
    died = threading.Event()

    def restart():
        with serving(mock, port):
            while len(mock.bodies) < 12:
                time.sleep(0.01)
        died.set()
        time.sleep(1.5)
        with mock.lock:
            mock.seen.clear()
        with serving(mock, port):
            ended.wait(60)

    ended = threading.Event()
    mock.url = f"http://127.0.0.1:{port}"
    thread = threading.Thread(target=restart)
    thread.start()
    try:
        words = ("--budgets", "full", "64", "--concurrency", "2", "--duration", "5s")
        code, cells = sweep(mock, tmp_path, *words)
    finally:
        ended.set()
        thread.join()
    assert died.is_set()
    assert code == 0
    assert cells[0]["errors"].get("connection refused", 0) > 0
    assert cells[0]["engine_prefill"] is None
    assert "the server was away" in cells[0]["trouble"]
    assert cells[1]["errors"] == {}
    assert cells[1]["engine_prefill"] == pytest.approx(0.12)


def test_an_open_load_arrives_at_its_rate_whatever_the_server_does(tmp_path):
    with serving(Mock(lambda _number, _body: Answer(0.8, 0.0, 1))) as mock:
        words = ("--budgets", "64", "--rates", "20", "--processes", "2", "--in-flight", "60")
        code, (cell,) = sweep(mock, tmp_path, *words)
        files = list((tmp_path / "cells" / "00").glob("requests-*.jsonl"))
    assert code == 0
    assert cell["rps"] == pytest.approx(20, rel=0.35)
    assert cell["ttft_p50"] == pytest.approx(0.8, abs=0.1)
    written = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    numbers = [one["picture"] for one in written if one["picture"] >= 0]
    assert len(numbers) == len(set(numbers))  # workers share no picture
    assert sum(bool(file.read_text()) for file in files) == 2


def test_requests_beyond_the_cap_are_not_sent_and_are_counted(tmp_path):
    with serving(Mock(lambda _number, _body: Answer(1.0, 0.0, 1))) as mock:
        words = ("--budgets", "64", "--rates", "20", "--processes", "2", "--in-flight", "4")
        _, (cell,) = sweep(mock, tmp_path, *words)
    assert cell["errors"].keys() == {"not sent: too many under way"}
    assert cell["rps"] == pytest.approx(4, abs=1.5)


def test_stages_change_the_number_of_users(tmp_path):
    lock, under_way, most = threading.Lock(), [], []

    def answer(_number, _body):
        with lock:
            now = time.monotonic()
            under_way.append(now)
            most.append(sum(then > now - 0.3 for then in under_way))
        return Answer(0.3, 0.0, 1)

    with serving(Mock(answer)) as mock:
        words = ("--budgets", "64", "--stages", "2s:1,2s:6", "--duration", "6s")
        code, (cell,) = sweep(mock, tmp_path, *words)
    assert code == 0
    assert cell["load"] == "2s:1 2s:6"
    assert 1 in most[5:]
    assert max(most) >= 5


def test_cache_hits_come_on_purpose_only(tmp_path):
    with serving(Mock(lambda _number, _body: Answer(0.02, 0.0, 1), vllm)) as mock:
        words = ("--budgets", "64", "--concurrency", "4", "--allow-cache-hits", "--pictures", "5")
        code, _ = sweep(mock, tmp_path, *words)
    assert code == 0
    parts = [body["messages"][0]["content"][0] for body in mock.bodies[2:]]
    assert len({part["image_url"]["url"] for part in parts}) == 5
    assert not any("uuid" in part for part in parts)
    assert "on purpose" in (tmp_path / "report.html").read_text()


def test_an_earlier_sweep_is_compared_with(tmp_path):
    once = ("--budgets", "64", "--concurrency", "12", "--duration", "4s")
    with serving(Mock(steady())) as mock:
        assert sweep(mock, tmp_path / "before", *once)[0] == 0
        mock.answer = lambda _number, _body: Answer(2 * FIRST, BETWEEN, TOKENS)
        earlier = str(tmp_path / "before" / "results.json")
        assert sweep(mock, tmp_path / "after", *once, "--compare", earlier)[0] == 0
    found = json.loads((tmp_path / "after" / "results.json").read_text())["compared"]
    changes = {line["metric"]: line for line in found}
    assert changes["time to first token p50"]["verdict"] == "worse"
    assert changes["time to first token p50"]["change"] == pytest.approx(1.0, abs=0.3)
    assert changes["requests/s"]["change"] < -0.1  # more where the machine has nothing else to do
    assert "Against the earlier sweep" in (tmp_path / "after" / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        ({"knows_hiprune": False}, [], "start it with hiprune-serve instead of `vllm serve`"),
        ({}, ["--model", "other"], "serves mock, not other: set MODEL"),
        ({"answer": lambda _n, _b: Answer(status=400)}, [], "budget full: HTTP 400 as told"),
        ({"answer": lambda _n, _b: Answer(report=False)}, [], "no hiprune report"),
    ],
)
def test_a_server_that_will_not_do_is_named_before_anything_starts(
    change, words, told, tmp_path, capsys
):
    with serving(Mock(**change)) as mock:
        assert load.main(["--url", mock.url, "--out", str(tmp_path / "out"), *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_not_there_is_named(tmp_path, capsys):
    assert load.main(["--url", "http://127.0.0.1:9", "--out", str(tmp_path)]) == 2
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_a_folder_that_takes_no_report_is_named_before_the_first_cell(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with serving(Mock(steady())) as mock:
        assert load.main(["--url", mock.url, "--out", str(file / "report"), *SHORT]) == 2
    told = capsys.readouterr().err
    assert f"user {os.getuid()} can write to, got {file / 'report'}: Not a directory" in told


@pytest.mark.skipif(not routing.NGINX, reason="needs nginx (Debian's nginx-light)")
@pytest.mark.parametrize("buffering", [True, False])
def test_a_proxy_that_holds_streams_back_is_named(tmp_path, capsys, buffering):
    """nginx as it comes, before a server that sends no chunks, and as streams need it."""
    with (
        serving(Mock(steady())) as mock,
        routing.proxy(mock.url, tmp_path, buffering=buffering) as url,
    ):
        words = ("--url", url, "--out", str(tmp_path / "out"), "--budgets", "64")
        assert load.main([*words, *SHORT, "--concurrency", "2"]) == 0
    (cell,) = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert cell["failed"] == 0
    assert cell["held_back"] is buffering
    whole = FIRST + BETWEEN * (TOKENS - 1)
    assert cell["ttft_p50"] >= (whole if buffering else FIRST) - 0.005
    assert ("a proxy holds streams back" in capsys.readouterr().err) is buffering
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("answers arrived in one piece" in page) is buffering


def test_an_interrupted_sweep_leaves_a_report_and_no_processes(tmp_path):
    with serving(Mock(steady())) as mock:
        command = [sys.executable, "-m", "loadtests.load", "--url", mock.url,
                   "--out", str(tmp_path), *SHORT, "--concurrency", "2"]  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        folder = tmp_path / "cells" / "01"
        while not list(folder.glob("requests-*.jsonl")):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        before = len(mock.bodies)
        time.sleep(1.5)
        assert len(mock.bodies) == before
    assert process.returncode == 130
    assert "the report has the cells that were done" in said
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 1


def test_locusts_own_page_has_the_fields(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving(Mock(steady())) as mock:
        command = ["make", "load-ui", f"VENV={Path(sys.executable).parents[1]}", f"HOST={mock.url}",
                   "MODEL=mock", f"ARGS=--web-port {port}"]  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        page = f"http://127.0.0.1:{port}"
        try:
            text = ""
            for _ in range(200):
                try:
                    text = httpx.get(page).text
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            for field in ("budgets", "question_words", "answer_tokens", "images"):
                assert field in text
            form = {"user_count": 2, "spawn_rate": 2, "host": mock.url, "budgets": "full 64",
                    "model": "mock", "answer_tokens": "4", "question_words": "5",
                    "images": "photos", "sizes": "64x64"}  # fmt: skip
            assert httpx.post(f"{page}/swarm", data=form).json()["success"]
            time.sleep(4)
            stats = httpx.get(f"{page}/stats/requests").json()["stats"]
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    names = {(one["method"], one["name"]) for one in stats}
    assert {("TTFT", "full"), ("TTFT", "64"), ("ITL", "64")} <= names
    assert ("POST", "/v1/chat/completions 64") in names
