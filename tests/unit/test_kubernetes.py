"""What Kubernetes would be told: schemas, and what the resources say of each other."""

import json
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
EVERY = [
    path
    for path in sorted(FOLDER.rglob("*.yaml"))
    if path.name not in ("kustomization.yaml", "hiprune.yaml", "adapter-rule.yaml", "names.yaml")
]
# What an overlay adds or takes instead is looked at by itself.
ALONE = ("components", "multi-node", "keda")
FILES = [path for path in EVERY if path.relative_to(FOLDER).parts[0] not in ALONE]
# Of operators, whose schemas are no part of Kubernetes'.
OF_OPERATORS = (
    "monitoring.coreos.com",
    "leaderworkerset.x-k8s.io",
    "keda.sh",
    "gateway.networking",
)
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
    ran = validate(version, *EVERY)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    every = [one for path in EVERY for one in yaml.safe_load_all(path.read_text())]
    known = [one for one in every if not one["apiVersion"].startswith(OF_OPERATORS)]
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


COMPONENTS = sorted(path.parent.name for path in FOLDER.glob("components/*/kustomization.yaml"))


def with_components(folder, *names):
    """What kustomize makes of the base with these components, and Kubernetes' word on it."""
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    overlay = {
        "resources": ["deploy/kubernetes/base"],
        "components": [f"deploy/kubernetes/components/{name}" for name in names],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    made = kustomized(folder)
    (folder / "made.yaml").write_text(yaml.safe_dump_all(made))
    ran = validate(NEWEST, folder / "made.yaml")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return made


def of_kind(made, kind):
    (one,) = [one for one in made if one["kind"] == kind]
    return one


def pod_of(made, kind="StatefulSet"):
    return of_kind(made, kind)["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_fits_the_base(name, tmp_path):
    assert len(with_components(tmp_path, name)) >= len(kustomized(FOLDER / "base"))


def test_components_fit_each_other(tmp_path):
    made = with_components(tmp_path, *COMPONENTS)
    pod = pod_of(made)
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod_of(made, "Deployment")["imagePullSecrets"] == [{"name": "registry"}]
    mounts = {one["name"]: one["mountPath"] for one in pod["containers"][0]["volumeMounts"]}
    assert mounts["hub"] == f"{mounts['models']}/.cache/huggingface"
    claims = {one["metadata"]["name"]: one for one in made if "Claim" in one["kind"]}
    (volume,) = [one for one in pod["volumes"] if one["name"] == "hub"]
    claim = claims[volume["persistentVolumeClaim"]["claimName"]]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_on_openshift_no_user_is_asked_for_and_names_are_served_elsewhere(tmp_path):
    made = with_components(tmp_path, "openshift")
    for kind in ("StatefulSet", "Deployment"):
        assert set(pod_of(made, kind)["securityContext"]) == {"runAsNonRoot", "seccompProfile"}
    (policy,) = [
        one
        for one in made
        if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == "hiprune"
    ]
    ports = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert 5353 in ports


def test_from_outside_only_the_routers_api_is_reached(tmp_path):
    made = with_components(tmp_path, "ingress", "gateway")
    (rule,) = of_kind(made, "Ingress")["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert (path["path"], path["backend"]["service"]["name"]) == ("/v1", "hiprune-router")
    assert of_kind(made, "Ingress")["spec"]["tls"][0]["hosts"] == [rule["host"]]
    (rule,) = of_kind(made, "HTTPRoute")["spec"]["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
    assert rule["backendRefs"] == [{"name": "hiprune-router", "port": 80}]
    (listener,) = of_kind(made, "Gateway")["spec"]["listeners"]
    assert listener["tls"]["mode"] == "Terminate"


def test_what_ci_starts_is_the_base_without_a_gpu(tmp_path):
    made = kustomized(FOLDER / "ci")
    (tmp_path / "made.yaml").write_text(yaml.safe_dump_all(made))
    ran = validate(NEWEST, tmp_path / "made.yaml")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    pod = pod_of(made)
    assert "nodeSelector" not in pod
    (server,) = pod["containers"]
    assert (server["image"], server["args"][0]) == ("hiprune-cpu:ci", "--demo")
    assert "nvidia.com/gpu" not in server["resources"]["limits"]
    (shm,) = [one for one in pod["volumes"] if one["name"] == "shm"]
    assert shm["emptyDir"]["sizeLimit"] == "1Gi"


def test_a_group_of_hosts_takes_the_place_of_the_replicas(tmp_path):
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    image = {"name": "hiprune-gpu", "newName": "registry.example.org/hiprune-gpu"}
    overlay = {"resources": ["deploy/kubernetes/multi-node"], "images": [image]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    made = kustomized(tmp_path)
    assert "StatefulSet" not in [one["kind"] for one in made]
    group = of_kind(made, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    leader, worker = (group[f"{role}Template"]["spec"] for role in ("leader", "worker"))
    flags = [pod["containers"][0]["args"] for pod in (leader, worker)]
    assert flags[1] == [*flags[0][:8], "--headless", *flags[0][8:]]
    given = dict(flag.removeprefix("--").split("=") for flag in flags[0][1:])
    gpus = group["size"] * int(leader["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus == int(given["tensor-parallel-size"]) * int(given["pipeline-parallel-size"])
    # Clients and Prometheus find the leader alone.
    (service,) = [
        one for one in made if one["kind"] == "Service" and one["metadata"]["name"] == "hiprune"
    ]
    labels = [group[f"{role}Template"]["metadata"]["labels"] for role in ("leader", "worker")]
    chosen = [service["spec"]["selector"].items() <= one.items() for one in labels]
    assert chosen == [True, False]
    settings = {one["metadata"]["name"] for one in made if one["kind"] == "ConfigMap"}
    for pod in (leader, worker):
        (volume,) = [one for one in pod["volumes"] if one["name"] == "settings"]
        assert volume["configMap"]["name"] in settings
        assert pod["containers"][0]["image"].startswith("registry.example.org/")
        assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_both_autoscalers_count_requests_that_run_and_wait():
    rule = yaml.safe_load((FOLDER / "autoscaling/adapter-rule.yaml").read_text())
    (custom,) = rule["rules"]["custom"]
    hpa = find("HorizontalPodAutoscaler", "hiprune")["spec"]
    (metric,) = hpa["metrics"]
    assert metric["pods"]["metric"]["name"] == custom["name"]["as"]
    keda = yaml.safe_load((FOLDER / "keda/scaler.yaml").read_text())["spec"]
    (trigger,) = keda["triggers"]
    for query in (custom["metricsQuery"], trigger["metadata"]["query"]):
        assert "vllm:num_requests_running{" in query
        assert "vllm:num_requests_waiting{" in query
    assert trigger["metadata"]["threshold"] == metric["pods"]["target"]["averageValue"]
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert keda["scaleTargetRef"] == hpa["scaleTargetRef"]
    assert hpa["minReplicas"] == keda["minReplicaCount"] == 1


STACK = ROOT / "deploy" / "production-stack" / "values.yaml"


def test_the_production_stacks_values_are_of_this_version_and_read_by_the_plugin():
    from hiprune_vllm import __version__
    from hiprune_vllm.plan import Encoder, Limits
    from hiprune_vllm.reading import parse_plan

    values = yaml.safe_load(STACK.read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    assert (model["repository"].rpartition("/")[2], model["tag"]) == ("hiprune-gpu", __version__)
    assert model["vllmConfig"]["enablePrefixCaching"] is True
    flags = model["vllmConfig"]["extraArgs"]
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    wide = json.loads(given["--mm-processor-kwargs"])
    encoder = Encoder("llava", 24, 23, has_cls=True)
    assert parse_plan(wide.pop("hiprune"), encoder).ratio == 1.0
    assert Limits(**wide.pop("hiprune_limits")).min_tokens == 16
    assert not wide
    named = {one["name"]: one["value"] for one in model["env"]}
    assert named["VLLM_PLUGINS"].split(",") == ["hiprune", "hiprune_api"]
    # The header that the gate and clients name a session with.
    session = values["routerSpec"]["sessionKey"]
    assert session in (FOLDER / "base/gate.js").read_text().lower()


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
