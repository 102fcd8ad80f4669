"""Files that deploy the server: images, Compose, Prometheus, Grafana. Read, never run, here."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "hiprune.json"
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
COMPOSE = [ROOT / "compose.yaml", ROOT / "docker" / "compose.yaml"]


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


def passes(*command):
    ran = run(*command)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def services():
    return yaml.safe_load(COMPOSE[1].read_text())["services"]


MONITORING = {"prometheus", "alertmanager", "grafana"}


@cache
def resolved(*profiles, **variables):
    """What Compose itself makes of the files, for the profiles and variables of a host."""
    flags = [flag for profile in profiles for flag in ("--profile", profile)]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | variables
    command = (BIN / "docker-compose", "--env-file", os.devnull, *flags, "config")
    ran = run(*command, "--format", "json", env=environment)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path):
    passes(BIN / "hadolint", path)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_has_two_stages_and_runs_as_nobody_in_particular(path):
    instructions = re.findall(r"^([A-Z]+) (.*)", path.read_text(), re.MULTILINE)
    assert [name for name, _ in instructions].count("FROM") == 2
    (user,) = [rest for name, rest in instructions if name == "USER"][-1:]
    assert int(user.split(":")[0]) > 0
    assert {"LABEL", "ENTRYPOINT"} <= {name for name, _ in instructions}
    for name, rest in instructions:
        if name == "ARG" and "IMAGE=" in rest:
            assert re.search(r":v?\d+\.\d+\.\d+", rest), f"{rest} is not pinned"


def test_images_and_tests_are_of_the_newest_release_that_is_served():
    from hiprune_vllm.engine.releases import BELOW

    (newest,) = re.findall(r"^vllm==(\S+)", (ROOT / "requirements/vllm.lock").read_text())
    assert tuple(map(int, newest.split(".")[:2])) == (BELOW[0], BELOW[1] - 1)
    for name in ("docker/gpu.Dockerfile", "docker/compose.yaml", ".env.example"):
        named = re.findall(r"vllm-openai:v(\d+\.\d+\.\d+)", (ROOT / name).read_text())
        assert set(named) == {newest}, name
    assert f"\nNEWEST := {newest}\n" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_compose_files_are_valid_by_the_specifications_schema(path):
    passes(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)


def test_the_schema_would_find_a_mistake(tmp_path):
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE[1].read_text().replace("stop_grace_period", "grace_period"))
    assert run(
        BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", wrong
    ).returncode


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        ((), {"server"}),
        (("gpu",), {"server"}),
        (("cpu",), {"demo"}),
        (("load",), {"server", "load"}),
        (("gpu", "tls", "dcgm"), {"server", "tls", "dcgm"}),
        (("cpu", "tls"), {"demo", "tls"}),
    ],
)
def test_profiles_choose_what_starts(profiles, expected):
    assert set(resolved(*profiles)["services"]) == expected | MONITORING


def test_nothing_listens_beyond_this_host_unless_asked():
    for profiles in ((), ("cpu",), ("load",)):
        for name, service in resolved(*profiles)["services"].items():
            for port in service.get("ports", []):
                assert port["host_ip"] == "127.0.0.1", name
    opened = resolved(BIND_ADDRESS="0.0.0.0")["services"]
    assert opened["server"]["ports"][0]["host_ip"] == "0.0.0.0"
    assert opened["grafana"]["ports"][0]["host_ip"] == "127.0.0.1"


OURS = {"server", "demo", "load"}


@pytest.mark.parametrize("name", sorted(OURS | MONITORING | {"tls", "dcgm"}))
def test_a_service_can_do_little_and_fills_no_disk(name):
    everything = resolved("gpu", "cpu", "load", "tls", "dcgm")["services"]
    assert set(everything) == OURS | MONITORING | {"tls", "dcgm"}
    service = everything[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service.get("cap_add", []) == (["NET_BIND_SERVICE"] if name == "tls" else [])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    digest = "" if name in OURS else "@sha256:[0-9a-f]{64}"
    assert re.search(rf":v?\d+\.\d+\.\d+[\w.-]*{digest}$", service["image"]), "not pinned"
    if name != "load":
        assert service["restart"] == "unless-stopped"
    if name not in ("load", "dcgm"):
        assert service["healthcheck"]["test"][0] == "CMD"


def test_every_image_that_is_built_stands_on_the_same_python():
    files = [*DOCKERFILES, COMPOSE[1], ROOT / ".env.example"]
    named = {tag for path in files for tag in re.findall(r"/python:([^\s}]+)", path.read_text())}
    assert len(named) == 1
    assert re.fullmatch(r"3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", named.pop())


def test_the_server_has_a_gpu_shared_memory_a_cache_and_time_to_fetch_its_model():
    server = resolved()["services"]["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"], device["count"]) == ("nvidia", ["gpu"], 1)
    assert int(server["shm_size"]) >= 2**30
    assert [volume["target"] for volume in server["volumes"]] == ["/var/cache/hiprune"]
    assert server["healthcheck"]["start_period"] == "1h0m0s"
    assert server["command"][0] == "llava-hf/llava-1.5-7b-hf"
    assert "deploy" not in resolved("cpu")["services"]["demo"]


def test_the_drain_is_over_before_a_container_is_killed():
    from hiprune_server.operations.cli import DRAIN_S

    for name in ("server", "demo"):
        (seconds,) = re.fullmatch(r"(\d+)s", services()[name]["stop_grace_period"]).groups()
        assert int(seconds) > DRAIN_S


def test_the_api_key_is_a_secret_file_or_nothing():
    without = resolved()
    assert without["services"]["server"]["environment"]["VLLM_API_KEY_FILE"] == ""
    assert without["secrets"]["api_key"]["file"] == os.devnull
    given = resolved(API_KEY_FILE="secrets/api_key")
    assert given["services"]["server"]["environment"]["VLLM_API_KEY_FILE"] == "/run/secrets/api_key"
    assert given["secrets"]["api_key"]["file"] == str(ROOT / "docker/secrets/api_key")


def test_vllms_safe_media_settings_are_on():
    environment = resolved()["services"]["server"]["environment"]
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert environment["VLLM_MEDIA_CONNECTOR"] == "hiprune"


def test_every_setting_of_the_server_and_no_other_is_passed_on():
    from hiprune_server.operations.config import SETTINGS

    environment = services()["server"]["environment"]
    passed = {name for name in environment if name.startswith("HIPRUNE_")}
    assert passed == {setting.variable for setting in SETTINGS}


def test_the_example_of_settings_explains_every_variable_with_its_default():
    text = (ROOT / ".env.example").read_text()
    explained = dict(re.findall(r"^#?([A-Z][A-Z_]+)=(.*)$", text, re.MULTILINE))
    compose = "".join(path.read_text() for path in COMPOSE)
    used = dict(re.findall(r"\$\{([A-Z_]+):-([^}$]*)\}", compose))
    used["TENSOR_SIZE"] = used["GPU_COUNT"]
    assert set(used) == set(re.findall(r"\$\{([A-Z_]+)", compose))
    passed = re.findall(r"^  (HIPRUNE_[A-Z_]+):$", compose, re.MULTILINE)
    assert set(explained) == set(used) | set(passed)
    for name, default in used.items():
        assert default in ("/dev/null", explained[name]), name


def test_the_example_is_accepted_as_it_stands(tmp_path):
    example = tmp_path / ".env"
    # With every line switched on.
    lines = re.sub(r"^#([A-Z][A-Z_]+=)", r"\1", (ROOT / ".env.example").read_text(), flags=re.M)
    example.write_text(lines)
    ran = run(BIN / "docker-compose", "--env-file", example, "config", "--format", "json")
    assert ran.returncode == 0, ran.stderr
    from hiprune_server.operations.config import load

    environment = json.loads(ran.stdout)["services"]["server"]["environment"]
    load({}, environment)


def test_what_has_no_name_in_compose_reaches_the_server_by_a_file(tmp_path):
    example = (ROOT / "docker/server.env.example").read_text()
    named = dict(re.findall(r"^#([A-Z][A-Z_]+)=(.*)$", example, re.MULTILINE))
    assert {"HF_ENDPOINT", "HF_HUB_OFFLINE", "HTTPS_PROXY", "NO_PROXY"} <= set(named)
    file = tmp_path / "server.env"
    file.write_text(re.sub(r"^#(?=[A-Z][A-Z_]+=)", "", example, flags=re.MULTILINE))
    environment = resolved(SERVER_ENV=str(file))["services"]["server"]["environment"]
    assert named.items() <= environment.items()
    assert environment.items() - named.items() >= {("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")}
    # Without the file nothing is missing.
    assert not set(named) & set(resolved()["services"]["server"]["environment"])
    assert not [name for name in named if name.startswith("HIPRUNE_")]


def test_a_cache_of_the_host_takes_the_place_of_the_hubs(tmp_path):
    server = resolved(MODELS_DIR=str(tmp_path), SERVER_USER="1000:0")["services"]["server"]
    mounts = {one["target"]: one["source"] for one in server["volumes"]}
    assert mounts == {
        "/var/cache/hiprune": "models",
        "/var/cache/hiprune/.cache/huggingface": str(tmp_path),
    }
    assert server["user"] == "1000:0"
    assert resolved()["services"]["server"]["user"] == "10001:0"


def test_gpus_are_counted_or_named_and_shared_out(tmp_path):
    def flags(**variables):
        command = resolved(**variables)["services"]["server"]["command"]
        return {
            name: command[command.index(f"--{name}-parallel-size") + 1]
            for name in ("tensor", "pipeline")
        }

    assert flags() == {"tensor": "1", "pipeline": "1"}
    assert flags(GPU_COUNT="4") == {"tensor": "4", "pipeline": "1"}
    shared = flags(GPU_COUNT="4", TENSOR_SIZE="2", PIPELINE_SIZE="2")
    assert shared == {"tensor": "2", "pipeline": "2"}
    server = resolved(OVERRIDE="devices.yaml")["services"]["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == ["0"]
    assert "count" not in device


def test_memory_has_a_limit_where_it_is_asked_for():
    assert int(resolved(MEMORY_LIMIT="64g")["services"]["server"]["mem_limit"]) == 64 * 2**30
    assert int(resolved()["services"]["server"].get("mem_limit", 0)) == 0


class Alive(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == self.server.healthy else 503)
        self.end_headers()

    def log_message(self, *args):
        pass


def health_checks():
    for name in ("server", "demo"):
        yield pytest.param(services()[name]["healthcheck"]["test"][1:], "/health", id=name)
    for path in DOCKERFILES:
        if found := re.search(r"^    CMD (\[.*\])$", path.read_text(), re.MULTILINE):
            route = "/liveness" if path.name.startswith("router") else "/health"
            yield pytest.param(json.loads(found[1]), route, id=path.name)


@pytest.mark.parametrize(("command", "route"), list(health_checks()))
def test_a_health_check_asks_the_server_itself_whatever_proxy_is_set(command, route):
    """The check's own words, but for the port, which is one that is free here."""
    with http.server.HTTPServer(("127.0.0.1", 0), Alive) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        dead = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        script = re.sub(r"\b80[08]0\b", str(server.server_port), command[2])
        for healthy, status in ((route, 0), ("/nowhere", 1)):
            server.healthy = healthy
            ran = run(sys.executable, *command[1:2], script, env=os.environ | dead)
            assert ran.returncode == status, ran.stderr
        server.shutdown()


def test_a_health_check_of_compose_has_no_blank_that_podman_would_split():
    assert not any(" " in word for word in services()["server"]["healthcheck"]["test"])


ALERTMANAGER = ROOT / "deploy" / "alertmanager"


@pytest.mark.skipif(not shutil.which("amtool"), reason="needs prometheus-alertmanager, of Debian")
def test_alertmanager_accepts_every_receiver():
    passes("amtool", "check-config", *sorted(ALERTMANAGER.glob("*.yaml")))


def test_alerts_go_to_the_receiver_that_is_named():
    config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    (manager,) = config["alerting"]["alertmanagers"]
    assert manager["static_configs"] == [{"targets": ["alertmanager:9093"]}]
    for variables in ({}, {"ALERT_RECEIVER": "slack", "ALERT_URL_FILE": "secrets/alert_url"}):
        command = resolved(**variables)["services"]["alertmanager"]["command"]
        (path,) = [word.partition("=")[2] for word in command if "--config.file" in word]
        assert (ALERTMANAGER / Path(path).name).exists()
    assert "/run/secrets/alert_url" in (ALERTMANAGER / "slack.yaml").read_text()


AS_JSON = ["--limit-mm-per-prompt", '{"image": 4}']


def arguments(line, tmp_path):
    """What Compose hands to `hiprune-serve --demo` for a line of .env, and what Compose says."""
    (tmp_path / ".env").write_text(line + "\n")
    flags = ("--env-file", tmp_path / ".env", "--profile", "cpu", "config", "--format", "json")
    ran = run(BIN / "docker-compose", *flags)
    command = json.loads(ran.stdout)["services"]["demo"]["command"] if ran.stdout else []
    return command, ran.stderr


def documented_form():
    """The line that .env.example gives for a flag with JSON."""
    (line,) = re.findall(r"(VLLM_ARGS=--limit-mm.*)", (ROOT / ".env.example").read_text())
    return line


def test_a_flag_with_json_reaches_the_server_in_the_documented_form(tmp_path):
    from hiprune_server.operations.cli import parse_own

    command, _ = arguments(documented_form(), tmp_path)
    assert command[-2:] == AS_JSON
    assert documented_form() in (ROOT / "docs/deploy.md").read_text()
    assert parse_own(command)[1][-2:] == AS_JSON


@pytest.mark.parametrize(
    ("line", "told"),
    [
        # Compose takes the outer quotes, and splits what is left as a shell would.
        ("""VLLM_ARGS='--limit-mm-per-prompt {"image": 4}'""", "got {image: 4}, which has lost"),
        ("""VLLM_ARGS=--limit-mm-per-prompt {"image":4}""", "got {image:4}, which has lost its"),
        # Compose itself refuses it.
        ("""VLLM_ARGS="--limit-mm-per-prompt {"image": 4}\"""", "unexpected character"),
    ],
)
def test_another_quoting_of_json_is_a_clear_line(line, told, tmp_path, capsys):
    from hiprune_server.operations.cli import parse_own

    command, error = arguments(line, tmp_path)
    if command:
        with pytest.raises(SystemExit):
            parse_own(command)
        error = capsys.readouterr().err
        assert "--limit-mm-per-prompt must be JSON" in error
    assert told in error


needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="needs promtool, of Debian's package prometheus"
)


@needs_promtool
def test_promtool_accepts_the_configuration_and_its_rules():
    told = passes("promtool", "check", "config", PROMETHEUS / "prometheus.yaml")
    assert "2 rule files found" in told


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then():
    passes("promtool", "test", "rules", *sorted((PROMETHEUS / "tests").glob("*.yaml")))


@needs_promtool
def test_alerts_do_not_depend_on_whether_a_range_has_its_first_moment(tmp_path):
    """Prometheus 3 leaves it out: a range of 5 minutes is then one of a millisecond less in 2.

    The installed promtool may be either: under 3 this is the same test as the one above.
    """
    shutil.copytree(PROMETHEUS, tmp_path, dirs_exist_ok=True)
    seconds, shortened = {"s": 1, "m": 60, "h": 3600, "d": 86400}, 0

    def shorter(found):
        return f"[{1000 * int(found[1]) * seconds[found[2]] - 1}ms]"

    for path in tmp_path.glob("*.rules.yaml"):
        text, count = re.subn(r"\[(\d+)([smhd])\]", shorter, path.read_text())
        path.write_text(text)
        shortened += count
    assert shortened == len(re.findall(r"\[\d", "".join(p.read_text() for p in rule_files())))
    passes("promtool", "test", "rules", *sorted((tmp_path / "tests").glob("*.yaml")))


def rule_files():
    return PROMETHEUS.glob("*.rules.yaml")


def alerts():
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.rules.yaml").read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def test_every_alert_has_a_test_and_a_place_in_the_runbook():
    tests = "".join(path.read_text() for path in (PROMETHEUS / "tests").glob("*.yaml"))
    headings = re.findall(r"^#+ (\w+)$", (ROOT / "docs/deploy.md").read_text(), re.MULTILINE)
    for name, rule in alerts().items():
        assert f"alertname: {name}\n        exp_alerts" in tests, name
        assert rule["annotations"]["runbook"] == f"docs/deploy.md#{name.lower()}"
        assert name in headings


def test_the_dashboard_reads_the_provisioned_source_and_its_panels_do_not_overlap():
    dashboard = json.loads(DASHBOARD.read_text())
    source = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"][0]
    chosen = {one["name"]: one for one in dashboard["templating"]["list"]}["datasource"]
    assert (chosen["query"], chosen["current"]["value"]) == (source["type"], source["uid"])
    cells = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in cells, panel["title"]
                cells.add((x, y))
        assert panel["type"] == "row" or (panel["description"] and panel["targets"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


RENOVATE = ROOT / ".github" / "renovate.json"


def test_renovates_configuration_is_valid():
    passes(BIN / "check-jsonschema", "--builtin-schema", "vendor.renovate", RENOVATE)


def test_renovate_finds_every_image_of_compose_and_of_its_example():
    (manager,) = json.loads(RENOVATE.read_text())["customManagers"]
    (pattern,) = manager["matchStrings"]
    pattern = re.compile(pattern.replace("(?<", "(?P<"))
    for path in (COMPOSE[1], ROOT / ".env.example"):
        text = path.read_text()
        found = {one["depName"] for one in pattern.finditer(text)}
        assert found == {
            "docker.io/vllm/vllm-openai",
            "docker.io/library/python",
            "docker.io/library/caddy",
            "docker.io/prom/prometheus",
            "docker.io/prom/alertmanager",
            "docker.io/grafana/grafana",
            "nvcr.io/nvidia/k8s/dcgm-exporter",
        }, path.name
        for one in pattern.finditer(text):
            assert one["currentDigest"] or one["depName"].endswith("vllm-openai")


WORKFLOWS = ROOT / ".github" / "workflows"
WORKFLOW = WORKFLOWS / "ci.yml"


@pytest.mark.parametrize("name", sorted(path.name for path in WORKFLOWS.glob("*.yml")))
def test_workflows_are_valid_and_safe_and_their_actions_pinned(name):
    path = WORKFLOWS / name
    passes(BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", path)
    passes(BIN / "zizmor", "--offline", "--no-progress", path)
    used = re.findall(r"uses: (\S+)", path.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action), f"{action} is not pinned"


def test_once_a_week_a_newer_vllm_is_looked_for_and_tried(tmp_path):
    """The step's own words, with a registry that has another release, the same, or none."""
    workflow = yaml.safe_load((WORKFLOWS / "vllm.yml").read_text())
    assert workflow[True]["schedule"] == [{"cron": "17 4 * * 1"}]  # YAML reads `on` as true
    steps = workflow["jobs"]["contract"]["steps"]
    (looks,) = [step for step in steps if step.get("id") == "newest"]
    assert all(step["if"] == "steps.newest.outputs.release" for step in steps[2:])
    assert "make contract VLLM=" in steps[-1]["run"]
    known = re.search(r"^NEWEST := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for registry, wanted, told in (
        ("vllm (99.1.0)", "", "release=99.1.0\n"),
        (f"vllm ({known})", "", ""),
        (f"vllm ({known})", "98.0.0", "release=98.0.0\n"),
        ("", "", None),
    ):
        (tmp_path / "pip").write_text(f"#!/bin/sh\necho '{registry}'\n")
        (tmp_path / "pip").chmod(0o755)
        out = tmp_path / "out"
        out.write_text("")
        ran = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", looks["run"]], cwd=ROOT, capture_output=True,
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}", "WANTED": wanted,
                "GITHUB_OUTPUT": str(out), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
            },
        )  # fmt: skip
        assert (ran.returncode == 0) is (told is not None)
        assert out.read_text() == (told or "")


def shell_steps(path):
    for name, job in yaml.safe_load(path.read_text())["jobs"].items():
        for step in job["steps"]:
            if "run" in step:
                yield pytest.param(step["run"], id=f"{path.stem}: {name}: {step['name']}")


@pytest.mark.parametrize(
    "script", [one for path in WORKFLOWS.glob("*.yml") for one in shell_steps(path)]
)
def test_the_shell_of_a_workflow_can_be_read(script):
    ran = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_what_asks_the_demo_in_ci_tells_a_kept_budget_from_another():
    """`.github/ask.sh` before a server that says what it is told to."""

    class Demo(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["hiprune"] == {"tokens": 64}
            right = self.headers["Authorization"] == "Bearer right"
            images = [{"tokens_full": 576, "tokens_kept": self.server.kept}]
            body = json.dumps({"hiprune": {"images": images}}, separators=(",", ":")).encode()
            self.send_response(200 if right else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Demo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for kept, key, good in ((64, "right", True), (576, "right", False), (64, "no", False)):
            server.kept = kept
            ran = run(".github/ask.sh", url, key)
            assert (ran.returncode == 0) is good, ran.stderr
        server.shutdown()


def test_a_release_is_published_without_a_password_and_signed():
    jobs = yaml.safe_load((WORKFLOWS / "release.yml").read_text())["jobs"]
    publish = jobs["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert not any("password" in step.get("with", {}) for step in publish["steps"])
    script = jobs["images"]["steps"][-1]["run"]
    for words in ("--provenance mode=max", "--sbom true", 'cosign sign --yes "$image@$digest"'):
        assert words in script
    assert set(jobs["images"]["strategy"]["matrix"]["name"]) == {
        path.name.removesuffix(".Dockerfile") for path in DOCKERFILES
    }


def test_the_workflow_runs_what_a_desk_runs_on_three_pythons():
    workflow = yaml.safe_load(WORKFLOW.read_text())
    job = workflow["jobs"]["test"]
    assert any(".ci/run" in step.get("run", "") for step in job["steps"])
    minors = [version.rpartition(".")[0] for version in job["strategy"]["matrix"]["python"]]
    assert minors == ["3.11", "3.12", "3.13"]
