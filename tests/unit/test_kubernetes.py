"""What Kubernetes would be told: schemas, and what the resources say of each other."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
BIN = Path(sys.executable).parent
FILES = [
    path
    for path in sorted(FOLDER.rglob("*.yaml"))
    if path.name not in ("kustomization.yaml", "hiprune.yaml", "adapter-rule.yaml")
]
OLDEST, NEWEST = "1.30", "1.37"


def resources():
    return [one for path in FILES for one in yaml.safe_load_all(path.read_text())]


def find(kind, name):
    (one,) = [r for r in resources() if (r["kind"], r["metadata"]["name"]) == (kind, name)]
    return one


def validate(version, *paths):
    command = [BIN / "kubernetes-validate", "--strict", "-k", version, *paths]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_resources_are_valid_by_kubernetes_own_schemas(version):
    ran = validate(version, *FILES)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # Kinds of the Prometheus operator are no part of these schemas.
    known = [one for one in resources() if "monitoring.coreos.com" not in one["apiVersion"]]
    assert (ran.stdout + ran.stderr).count("passed for resource") == len(known)


def test_the_schemas_would_find_a_mistake(tmp_path):
    wrong = tmp_path / "server.yaml"
    wrong.write_text(
        (FOLDER / "base/server.yaml").read_text().replace("startupProbe", "startProbe")
    )
    assert validate(NEWEST, wrong).returncode


def kustomized(folder):
    ran = subprocess.run([BIN / "kubectl", "kustomize", folder], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return list(yaml.safe_load_all(ran.stdout))


def test_the_documented_overlay_sets_registry_size_label_and_model(tmp_path):
    shutil.copytree(ROOT / "deploy", tmp_path / "hiprune" / "deploy")
    text = (ROOT / "docs/deploy.md").read_text()
    (overlay,) = re.findall(r"^```yaml\n(resources: .*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay/kustomization.yaml").write_text(overlay)
    made = kustomized(tmp_path / "overlay")
    (server,) = [one for one in made if one["kind"] == "StatefulSet"]
    (container,) = server["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("registry.example.org/hiprune-gpu:")
    assert container["args"][0] == "llava-hf/llava-v1.6-mistral-7b-hf"
    assert server["spec"]["replicas"] == 4
    (monitor,) = [one for one in made if one["kind"] == "ServiceMonitor"]
    assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_kustomize_puts_it_together():
    made = kustomized(FOLDER)
    kinds = [one["kind"] for one in made]
    assert len(made) == len(resources()) + 3  # the settings, the gate and the dashboard
    assert all(one["metadata"].get("namespace", "hiprune") == "hiprune" for one in made)
    (server,) = [one for one in made if one["kind"] == "StatefulSet"]
    volumes = {one["name"]: one for one in server["spec"]["template"]["spec"]["volumes"]}
    names = {one["metadata"]["name"] for one in made if one["kind"] == "ConfigMap"}
    assert kinds.count("ConfigMap") == 3
    assert volumes["settings"]["configMap"]["name"] in names  # the name with the hash
    assert volumes["secrets"]["secret"]["defaultMode"] == 0o440


def test_the_generators_name_files_that_are_there():
    for path in [*FOLDER.rglob("kustomization.yaml"), ROOT / "deploy/grafana/kustomization.yaml"]:
        told = yaml.safe_load(path.read_text())
        generated = [file for one in told.get("configMapGenerator", []) for file in one["files"]]
        for name in [*told.get("resources", []), *generated]:
            assert (path.parent / name).exists(), name


def test_the_settings_are_the_servers():
    from hiprune_server.operations.config import load

    config = load({"config": str(FOLDER / "base/hiprune.yaml")}, {})
    assert config["presets.low"] == {"ratio": 0.111}


def test_selectors_choose_the_pods_that_they_mean():
    server = find("StatefulSet", "hiprune")["spec"]["template"]
    router = find("Deployment", "hiprune-router")["spec"]["template"]
    labels = {
        "hiprune": server["metadata"]["labels"],
        "hiprune-router": router["metadata"]["labels"],
    }
    for one in resources():
        spec = one.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector", {}))
        chosen = selector.get("matchLabels", selector)
        if chosen:
            assert chosen.items() <= labels[one["metadata"]["name"]].items(), one["kind"]
    given = router["spec"]["containers"][1]["args"]
    words = given[given.index("--selector") + 1 :]
    assert dict(word.split("=") for word in words) == labels["hiprune"]


def test_a_replica_is_ready_when_its_model_is_loaded_and_not_before():
    (container,) = find("StatefulSet", "hiprune")["spec"]["template"]["spec"]["containers"]
    startup = container["startupProbe"]
    assert startup["httpGet"] == {"path": "/health", "port": "http"}
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
    assert container["readinessProbe"]["httpGet"] == startup["httpGet"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_a_pods_services_are_not_taken_for_settings():
    from hiprune_server.operations.config import ConfigError, load

    with pytest.raises(ConfigError, match="HIPRUNE_ROUTER_SERVICE_HOST"):
        load({}, {"HIPRUNE_ROUTER_SERVICE_HOST": "10.0.0.1"})
    for kind, name in (("StatefulSet", "hiprune"), ("Deployment", "hiprune-router")):
        assert find(kind, name)["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_the_autoscaler_alone_says_how_many_replicas_there_are():
    target = find("HorizontalPodAutoscaler", "hiprune")["spec"]["scaleTargetRef"]
    assert "replicas" not in find(target["kind"], target["name"])["spec"]


def test_requests_under_way_end_before_a_pod_is_killed():
    from hiprune_server.operations.cli import DRAIN_S

    pod = find("StatefulSet", "hiprune")["spec"]["template"]["spec"]
    wait = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > wait + DRAIN_S


def test_pods_are_restricted_as_their_namespace_demands():
    for kind, name in (("StatefulSet", "hiprune"), ("Deployment", "hiprune-router")):
        pod = find(kind, name)["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert ":" in container["image"]
            assert not container["image"].endswith(":latest")


def test_the_operators_rules_are_those_that_promtool_tested():
    groups = [
        group
        for name in ("recording", "alerts")
        for group in yaml.safe_load((ROOT / f"deploy/prometheus/{name}.rules.yaml").read_text())[
            "groups"
        ]
    ]
    assert find("PrometheusRule", "hiprune")["spec"]["groups"] == groups
