"""The real Prometheus reads the real server under load: every panel and every rule has data.

And what they say while there is no server.
"""

import http.server
import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.serving import BIN, running
from tests.photos import data_url, photo
from tests.routing import KEY, free_port, router

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
def prometheus(target, folder, others=()):
    """Our configuration as it is, but for where things are and how often they are read.

    Args:
        target: the server's address.
        others: pairs of a job and its address.
    """
    config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    del config["alerting"]
    jobs = {one["job_name"]: one for one in config["scrape_configs"]}
    for name, address in (("hiprune", target), *others):
        jobs.setdefault(name, {"job_name": name})["static_configs"] = [{"targets": [address]}]
    config["scrape_configs"] = list(jobs.values())
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


class Exporter(http.server.BaseHTTPRequestHandler):
    """Says what NVIDIA's exporter says of a GPU, by the names of its default counters."""

    def do_GET(self):
        labels = 'gpu="0",UUID="GPU-0",device="nvidia0",modelName="NVIDIA L4",Hostname="host"'
        values = {"FB_USED": 20000, "FB_FREE": 3000, "GPU_UTIL": 90, "XID_ERRORS": 0}
        lines = [f"DCGM_FI_DEV_{name}{{{labels}}} {value}\n" for name, value in values.items()]
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write("".join(lines).encode())

    def log_message(self, *args):
        pass


@contextmanager
def exporter():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Exporter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def monitor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitoring")
    pictures = [data_url(photo(name)) for name in ("astronaut", "coffee", "chelsea")]
    command = [str(BIN / "hiprune-serve"), "--demo"]
    metrics = free_port()
    with (
        running(command, folder, model="hiprune-demo") as server,
        router([server.url], folder, metrics) as before,
        exporter() as gpus,
        prometheus(
            server.url.removeprefix("http://"),
            folder,
            (("dcgm", gpus), ("hiprune-router", f"127.0.0.1:{metrics}")),
        ) as found,
    ):
        before.headers["Authorization"] = f"Bearer {KEY}"
        # Once before it is measured: a counter's first value is no increase.
        until(lambda: found.ask('up{job="hiprune"}') == [1.0])
        server.post("/v1/chat/completions", {"model": server.model, "messages": []})
        say_hello(before, server.model)
        load(server, pictures)
        say_hello(before, server.model)
        until(lambda: found.ask("job:hiprune_prefix_cache_hits:ratio_rate15m"))
        yield found


def say_hello(client, model):
    """A request through the router, twice, so that it counts and then counts more."""
    for _ in range(2):
        body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def chosen(expression):
    """An expression with Grafana's variables as they are when nobody has chosen."""
    variables = {"$__rate_interval": "1m", "$job": "hiprune"}
    for name, value in variables.items():
        expression = expression.replace(name, value)
    expression = re.sub(r"\$(instance|namespace|model)\b", ".*", expression)
    assert "$" not in expression
    return expression


def choices(monitor, name):
    """What Grafana offers for a variable."""
    (one,) = [one for one in DASHBOARD["templating"]["list"] if one["name"] == name]
    selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", one["definition"]).groups()
    answer = httpx.get(f"{monitor.url}/api/v1/series", params={"match[]": chosen(selector)}).json()
    return {series[label] for series in answer["data"] if label in series}


def test_variables_offer_what_is_there(monitor):
    assert choices(monitor, "job") == {"hiprune"}
    assert len(choices(monitor, "instance")) == 1
    assert choices(monitor, "model") == {"hiprune-demo"}
    assert choices(monitor, "namespace") == set()  # there are none outside of Kubernetes


@pytest.mark.parametrize("expression", list(panels()))
def test_a_panel_shows_something(monitor, expression):
    values = monitor.ask(chosen(expression))
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


@pytest.fixture(scope="module")
def nobody(tmp_path_factory):
    """Prometheus of a server that has never answered, as during its first download."""
    folder = tmp_path_factory.mktemp("down")
    with prometheus(f"127.0.0.1:{free_port()}", folder) as found:
        until(lambda: found.ask('up{job="hiprune"}') == [0.0])
        time.sleep(3)  # rules are evaluated every second
        yield found


def test_while_no_server_answers_the_dashboard_has_its_job_and_says_so(nobody):
    assert choices(nobody, "job") == {"hiprune"}
    assert len(choices(nobody, "instance")) == 1
    (up,) = [one for one in panels() if one.id == "Servers up A"]
    assert nobody.ask(chosen(up.values[0])) == [0.0]


@pytest.mark.parametrize("expression", list(panels()))
def test_a_panel_is_no_error_while_no_server_answers(nobody, expression):
    values = nobody.ask(chosen(expression))
    assert not any(math.isnan(value) for value in values)


def test_while_no_server_answers_it_is_the_start_that_is_waited_for(nobody):
    groups = httpx.get(f"{nobody.url}/api/v1/rules").json()["data"]["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in found} == {"ok"}
    waiting = {rule["name"] for rule in found if rule.get("state") in ("pending", "firing")}
    assert waiting == {"HipruneServerNotStarting"}


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
