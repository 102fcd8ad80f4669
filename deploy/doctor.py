#!/usr/bin/env python3
"""`make doctor`: whether `docker compose up` can succeed on this host, or what to do first.

Reads .env as Compose does, asks the host and changes nothing. Needs Python 3.9 and no package.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30

OK, WARNING, FAILURE = "ok", "warning", "FAILURE"

DRIVERS = {13: 580, 12: 525}
"""Major release of CUDA in an image -> the least branch of the driver that runs it without a
compatibility package (NVIDIA's table of minor version compatibility)."""
COMPUTE = {13: (7, 5), 12: (7, 0)}
"""The least compute capability that it has kernels for: CUDA 13 left Volta out."""
IMAGE_GIB = 30
MODEL_GIB = 60
MEMORY_GIB = 24
"""As docs/deploy.md says of a model of 7B."""


@dataclass(frozen=True)
class Finding:
    level: str
    what: str
    do: str = ""

    def __str__(self) -> str:
        return f"{self.level:>8}  {self.what}" + (f"\n          -> {self.do}" if self.do else "")


def settings(root: Path = ROOT) -> dict:
    """What .env and the environment say; the environment goes first, as in Compose."""
    return {**read_env(root / ".env"), **os.environ}


def read_env(path: Path) -> dict:
    """Names and values of a file of variables; nothing where there is no file."""
    if not path.is_file():
        return {}
    lines = re.findall(r"^\s*(?:export\s+)?(\w+)=(.*)$", path.read_text(), re.MULTILINE)
    return {name: re.sub(r"^(['\"])(.*)\1$", r"\2", value.strip()) for name, value in lines}


def ask(*command: str) -> str:
    """What a program prints; empty where it is missing or fails."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def numbers(text: str) -> tuple:
    """The leading numbers of a version: "25.0.3-ce" -> (25, 0, 3)."""
    found = re.search(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def docker() -> list:
    engine, compose = (
        ask("docker", "version", "--format", "{{.Server.Version}}"),
        ask("docker", "compose", "version", "--short"),
    )
    found = []
    for name, version, least in (("Docker Engine", engine, (25,)), ("Compose", compose, (2, 24))):
        text = ".".join(map(str, least))
        if not version:
            found.append(
                Finding(
                    FAILURE,
                    f"{name} does not answer",
                    f"install {name} {text} or newer, and start it",
                )
            )
        elif numbers(version) < least:
            found.append(Finding(FAILURE, f"{name} is {version}", f"{text} or newer is needed"))
        else:
            found.append(Finding(OK, f"{name} {version}"))
    return found


def cuda_of(image: str) -> int:
    """Major release of CUDA in vLLM's image of that name: 13 since 0.20 unless a tag says other."""
    suffix = re.search(r"-cu(\d\d)\d", image)
    if suffix:
        return int(suffix[1])
    version = re.search(r":v?(\d+)\.(\d+)", image)
    return 12 if version and tuple(map(int, version.groups())) < (0, 20) else 13


def gpus(told: dict) -> list:
    fields = "index,name,memory.total,driver_version,compute_cap"
    table = ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    if not table:
        return [
            Finding(
                FAILURE,
                "nvidia-smi finds no GPU",
                "install NVIDIA's driver; without a GPU: docker compose --profile cpu up",
            )
        ]
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()]
    image = told.get("GPU_BASE_IMAGE", "")
    cuda = cuda_of(image)
    wanted = int(told.get("GPU_COUNT") or 1)
    found = [
        Finding(OK, f"GPU {index}: {name}, {int(memory) // 1024} GiB")
        for index, name, memory, _, _ in rows
        if memory.isdigit()
    ]
    driver = rows[0][3]
    if numbers(driver)[:1] < (DRIVERS[cuda],):
        other = (
            " or GPU_BASE_IMAGE=docker.io/vllm/vllm-openai:<version>-cu129 in .env"
            if cuda == 13
            else ""
        )
        found.append(
            Finding(
                FAILURE,
                f"driver {driver} does not run the image's CUDA {cuda}",
                f"driver {DRIVERS[cuda]} or newer is needed{other}",
            )
        )
    else:
        found.append(Finding(OK, f"driver {driver} runs CUDA {cuda}"))
    for index, name, _, _, capability in rows:
        if numbers(capability) < COMPUTE[cuda]:
            found.append(
                Finding(
                    FAILURE,
                    f"GPU {index} ({name}) has compute capability {capability}",
                    f"CUDA {cuda} needs {'.'.join(map(str, COMPUTE[cuda]))}",
                )
            )
        elif numbers(capability) < (8, 0):
            found.append(
                Finding(
                    WARNING, f"GPU {index} ({name}) knows no bfloat16", "VLLM_ARGS=--dtype half"
                )
            )
    if wanted > len(rows):
        found.append(
            Finding(
                FAILURE, f"GPU_COUNT is {wanted}, and there are {len(rows)}", "lower it in .env"
            )
        )
    shared = int(told.get("TENSOR_SIZE") or wanted) * int(told.get("PIPELINE_SIZE") or 1)
    if shared != wanted:
        found.append(
            Finding(
                FAILURE,
                f"TENSOR_SIZE x PIPELINE_SIZE is {shared}, GPU_COUNT {wanted}",
                "make them equal in .env",
            )
        )
    return found


def toolkit() -> list:
    runtimes = ask("docker", "info", "--format", "{{json .Runtimes}}")
    devices = [
        path for folder in ("/etc/cdi", "/var/run/cdi") for path in Path(folder).glob("nvidia*")
    ]
    if "nvidia" in runtimes or devices:
        return [Finding(OK, "Docker has NVIDIA's container toolkit")]
    return [
        Finding(
            FAILURE,
            "Docker does not know NVIDIA's container toolkit",
            "install nvidia-container-toolkit, `nvidia-ctk runtime configure`, restart Docker",
        )
    ]


def memory() -> list:
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    if not found:
        return []
    free = int(found[1]) * 1024 // GIB
    enough = free >= MEMORY_GIB
    return [
        Finding(
            OK if enough else WARNING,
            f"{free} GiB of memory are free",
            ""
            if enough
            else f"{MEMORY_GIB} GiB are advised for a model of 7B, whose weights pass through",
        )
    ]


def disk(told: dict) -> list:
    root = ask("docker", "info", "--format", "{{.DockerRootDir}}")
    places = [(root, IMAGE_GIB + (0 if told.get("MODELS_DIR") else MODEL_GIB), "images and models")]
    if told.get("MODELS_DIR"):
        places = [
            (root, IMAGE_GIB, "images"),
            (told["MODELS_DIR"], MODEL_GIB, "models (MODELS_DIR)"),
        ]
    found = []
    for path, need, what in places:
        if not path or not Path(path).exists():
            level = FAILURE if path else WARNING
            found.append(
                Finding(
                    level,
                    f"the folder of {what} cannot be looked at: {path or 'Docker names none'}",
                )
            )
            continue
        free = shutil.disk_usage(path).free // GIB
        enough = free >= need
        found.append(
            Finding(
                OK if enough else WARNING,
                f"{free} GiB of disk are free for {what}, {path}",
                ""
                if enough
                else f"a first start takes up to {need} GiB: image 20, model twice its weights",
            )
        )
    return found


def ports(told: dict) -> list:
    found = []
    for name, address, default in (
        ("SERVER_PORT", "BIND_ADDRESS", 8000),
        ("PROMETHEUS_PORT", "MONITORING_ADDRESS", 9090),
        ("ALERTMANAGER_PORT", "MONITORING_ADDRESS", 9093),
        ("GRAFANA_PORT", "MONITORING_ADDRESS", 3000),
    ):
        port, host = int(told.get(name) or default), told.get(address) or "127.0.0.1"
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind((host, port))
            except OSError as error:
                found.append(
                    Finding(
                        WARNING,
                        f"{host}:{port} ({name}) cannot be had: {error.strerror}",
                        f"docker compose ps, if that is this project; else {name}= in .env",
                    )
                )
            else:
                found.append(Finding(OK, f"{host}:{port} ({name}) is free"))
    return found


def hub(told: dict, server: dict) -> list:
    model = told.get("MODEL") or "llava-hf/llava-1.5-7b-hf"
    if model.startswith("/"):
        return [Finding(OK, f"{model} is a folder of the container: nothing is fetched")]
    cached = bool(told.get("MODELS_DIR")) and any(
        Path(told["MODELS_DIR"]).glob(
            f"hub/models--{model.replace('/', '--')}/snapshots/*/config.json"
        )
    )
    if cached:
        return [Finding(OK, f"{model} is in MODELS_DIR")]
    if server.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        return [
            Finding(
                FAILURE,
                f"HF_HUB_OFFLINE is set, and {model} is not in MODELS_DIR",
                "name the hub's cache that has it (the folder above hub/), or a folder in MODEL",
            )
        ]
    endpoint = (server.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    proxies = {
        name: server[f"{name.upper()}_PROXY"]
        for name in ("http", "https")
        if server.get(f"{name.upper()}_PROXY")
    }
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies or None))
    address = f"{endpoint}/{model}/resolve/main/config.json"
    try:
        opener.open(urllib.request.Request(address, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError as error:
        do = "HF_TOKEN_FILE in .env" if error.code in (401, 403) else "is MODEL right?"
        level = WARNING if error.code in (401, 403) and told.get("HF_TOKEN_FILE") else FAILURE
        return [Finding(level, f"{address} answers {error.code}", do)]
    except OSError as error:
        return [
            Finding(
                FAILURE,
                f"{endpoint} cannot be reached: {error}",
                "docker/server.env: a mirror (HF_ENDPOINT), HTTPS_PROXY or HF_HUB_OFFLINE=1",
            )
        ]
    return [Finding(OK, f"{endpoint} has {model}")]


def secrets(told: dict, server: dict, root: Path = ROOT) -> list:
    found = []
    for name in ("API_KEY_FILE", "HF_TOKEN_FILE", "ALERT_URL_FILE"):
        if not told.get(name):
            continue
        path = root / "docker" / told[name]
        if not path.is_file() or not path.stat().st_size:
            found.append(
                Finding(
                    FAILURE,
                    f"{name} names {path}, which is missing or empty",
                    "docs/deploy.md has the commands that make one",
                )
            )
        elif not path.stat().st_mode & 0o004:
            found.append(
                Finding(FAILURE, f"{path} cannot be read by the server's user", f"chmod 644 {path}")
            )
        else:
            found.append(Finding(OK, f"{name} is there"))
    address = told.get("BIND_ADDRESS") or "127.0.0.1"
    if not address.startswith("127.") and not told.get("API_KEY_FILE"):
        found.append(
            Finding(
                FAILURE,
                f"BIND_ADDRESS={address} opens the server to a network without a key",
                "API_KEY_FILE in .env",
            )
        )
    misplaced = sorted(name for name in server if name.startswith("HIPRUNE_"))
    if misplaced:
        found.append(
            Finding(
                FAILURE,
                f"{', '.join(misplaced)} in docker/server.env does not reach the server",
                "move it to .env",
            )
        )
    return found


def examine(root: Path = ROOT) -> list:
    """Everything that was found, in the order in which a start needs it."""
    told = settings(root)
    given = Path(told.get("SERVER_ENV") or "server.env")
    server = {**read_env(root / "docker" / given)}
    on_gpu = "cpu" not in told.get("COMPOSE_PROFILES", "").split(",")
    found = docker()
    if on_gpu:
        found += gpus(told) + toolkit()
    found += memory() + disk(told) + ports(told)
    if on_gpu:
        found += hub(told, server)
    return found + secrets(told, server, root)


def main() -> int:
    found = examine()
    for one in found:
        print(one)
    failures = sum(one.level == FAILURE for one in found)
    if failures:
        print(f"\n{failures} to mend before `docker compose up` can succeed.")
    else:
        print("\nNothing stands in the way of `docker compose up`.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
