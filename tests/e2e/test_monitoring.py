"""The real Prometheus reads the real server under load: every panel and every rule has data."""

import json
import math
import re
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.serving import BIN, running
from tests.photos import data_url, photo

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/hiprune.json").read_text())
LOAD_S = 20

pytestmark = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="needs Debian's package prometheus"
)


def panels():
    """Every query of the dashboard."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")


def rules(kind):
    for path in sorted(PROMETHEUS.glob("*.rules.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                if kind in rule:
                    yield pytest.param(rule["expr"], id=rule[kind])


class Monitor:
    def __init__(self, url):
        self.url = url

    def ask(self, expression):
        """Values of an instant query, one a series."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", answer
        return [float(one["value"][1]) for one in answer["data"]["result"]]


@contextmanager
def prometheus(target, folder):
    """Our configuration as it is, but for where the server is and how often it is read."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    (job,) = [one for one in config["scrape_configs"] if one["job_name"] == "hiprune"]
    job["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            until(lambda: httpx.get(f"http://127.0.0.1:{port}/-/ready").status_code == 200)
            yield Monitor(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(timeout=30)


def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if holds():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"did not happen within {seconds} s")


def load(server, pictures):
    """What real clients do: budgets of every source, follow-up questions, and mistakes."""
    plans = [
        {},
        {"hiprune": {"tokens": 64}},
        {"hiprune": {"ratio": 0.25, "method": "random"}},
        {"hiprune": {"tokens": 0}},  # refused
    ]
    parts = [{}, {"detail": "low"}]
    end = time.monotonic() + LOAD_S

    def client(number):
        asked = 0
        while time.monotonic() < end:
            asked += 1
            image = {"url": pictures[asked // 2 % len(pictures)]} | parts[asked % 2]
            part = {"type": "image_url", "image_url": image}
            if asked % 5 == 0:
                part["hiprune"] = {"tokens": 100}
            body = {
                "model": server.model,
                "max_tokens": 8,
                "messages": [
                    {"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}
                ],
            } | plans[(asked + number) % len(plans)]
            server.post("/v1/chat/completions", body)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))


@pytest.fixture(scope="module")
def monitor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitoring")
    pictures = [data_url(photo(name)) for name in ("astronaut", "coffee", "chelsea")]
    command = [str(BIN / "hiprune-serve"), "--demo"]
    with (
        running(command, folder, model="hiprune-demo") as server,
        prometheus(server.url.removeprefix("http://"), folder) as found,
    ):
        # Once before it is measured: a counter's first value is no increase.
        until(lambda: found.ask('up{job="hiprune"}') == [1.0])
        server.post("/v1/chat/completions", {"model": server.model, "messages": []})
        load(server, pictures)
        until(lambda: found.ask("job:hiprune_prefix_cache_hits:ratio_rate15m"))
        yield found


@pytest.mark.parametrize("expression", list(panels()))
def test_a_panel_shows_something(monitor, expression):
    variables = {"$__rate_interval": "1m", "$job": "hiprune", "$instance": ".*"}
    for name, value in variables.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    values = monitor.ask(expression)
    assert values
    assert not all(math.isnan(value) for value in values)


@pytest.mark.parametrize("expression", list(rules("record")))
def test_a_recording_rule_records_something(monitor, expression):
    values = monitor.ask(expression)
    assert values
    assert not all(math.isnan(value) for value in values)


@pytest.mark.parametrize("expression", list(rules("alert")))
def test_an_alert_has_data_to_compare(monitor, expression):
    """With `bool` a comparison says 0 or 1 where it compares something, and nothing elsewhere."""
    compared, count = re.subn(r" (==|<|>) ", r" \1 bool ", expression)
    assert count
    values = monitor.ask(compared)
    assert values
    assert set(values) <= {0.0, 1.0}


def test_prometheus_evaluates_all_rules_without_an_error(monitor):
    groups = httpx.get(f"{monitor.url}/api/v1/rules").json()["data"]["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len(found) == len([*rules("record"), *rules("alert")])
    for rule in found:
        assert rule["health"] == "ok", (rule["name"], rule.get("lastError"))
    firing = {rule["name"] for rule in found if rule.get("state") == "firing"}
    assert not firing  # a healthy server under a light load


def test_recorded_numbers_are_those_of_the_server(monitor):
    """Against the raw counters, over the whole time."""
    (full,) = monitor.ask("hiprune_visual_tokens_full_total")
    (kept,) = monitor.ask("hiprune_visual_tokens_kept_total")
    assert 0 < kept < full
    assert full % 576 == 0
    (saved,) = monitor.ask("job:hiprune_visual_tokens_saved:rate5m")
    (rate,) = monitor.ask('sum(rate(hiprune_visual_tokens_full_total{job="hiprune"}[5m]))')
    # The same share, within what the ends of the window leave open.
    assert saved / rate == pytest.approx(1 - kept / full, abs=0.1)
