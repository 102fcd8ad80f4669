"""`make doctor` on hosts that are made up of programs that answer as theirs do."""

import http.server
import socket
import subprocess
import sys
import threading

import pytest

from deploy import doctor
from deploy.doctor import FAILURE, OK, WARNING

CARD = "0, NVIDIA L4, 23034, {driver}, {capability}"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Puts a program on the path that prints what it is told to for a word of its command line."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def program(name, **answers):
        cases = "".join(f"*{word}*) printf '%s\\n' '{text}';;\n" for word, text in answers.items())
        (tmp_path / name).write_text(f'#!/bin/sh\ncase "$*" in\n{cases}*) exit 1;;\nesac\n')
        (tmp_path / name).chmod(0o755)

    return program


def levels(found):
    return [one.level for one in found]


def test_old_docker_is_told_from_new_and_from_none(host):
    assert levels(doctor.docker()) == [FAILURE, FAILURE]
    host("docker", Server="24.0.7", short="2.29.1")
    assert levels(doctor.docker()) == [FAILURE, OK]
    host("docker", Server="28.1.1", short="v2.24.0-desktop.1")
    assert levels(doctor.docker()) == [OK, OK]


@pytest.mark.parametrize(
    ("image", "cuda"),
    [
        ("", 13),
        ("docker.io/vllm/vllm-openai:v0.33.0", 13),
        ("vllm/vllm-openai:v0.33.0-cu129", 12),
        ("vllm/vllm-openai:v0.33.0-cu130-ubuntu2404", 13),
        ("vllm/vllm-openai:v0.19.1", 12),
        ("registry.example.org:5000/vllm:nightly", 13),
    ],
)
def test_the_images_cuda_is_read_off_its_tag(image, cuda):
    assert doctor.cuda_of(image) == cuda


@pytest.mark.parametrize(
    ("driver", "capability", "image", "level", "told"),
    [
        ("580.95.05", "8.9", "", OK, "driver 580.95.05 runs CUDA 13"),
        ("570.133.20", "8.9", "", FAILURE, "-cu129 in .env"),
        ("570.133.20", "8.9", "vllm/vllm-openai:v0.33.0-cu129", OK, "runs CUDA 12"),
        ("515.65.01", "8.9", "vllm/vllm-openai:v0.33.0-cu129", FAILURE, "525 or newer"),
        ("580.95.05", "7.0", "", FAILURE, "CUDA 13 needs 7.5"),
        ("580.95.05", "7.5", "", WARNING, "--dtype half"),
    ],
)
def test_driver_and_gpu_are_held_to_the_images_cuda(host, driver, capability, image, level, told):
    host("nvidia-smi", query=CARD.format(driver=driver, capability=capability))
    found = doctor.gpus({"GPU_BASE_IMAGE": image})
    assert max(levels(found), key=[OK, WARNING, FAILURE].index) == level
    assert any(told in str(one) for one in found)


def test_gpus_are_counted(host):
    assert levels(doctor.gpus({})) == [FAILURE]
    host("nvidia-smi", query=CARD.format(driver="580.1", capability="9.0"))
    assert FAILURE not in levels(doctor.gpus({"GPU_COUNT": "1"}))
    (told,) = [one for one in doctor.gpus({"GPU_COUNT": "2"}) if one.level == FAILURE]
    assert "GPU_COUNT is 2, and there are 1" in told.what
    found = doctor.gpus({"GPU_COUNT": "1", "PIPELINE_SIZE": "2"})
    assert any("PIPELINE_SIZE is 2" in one.what for one in found if one.level == FAILURE)


def test_the_container_toolkit_is_a_runtime_of_dockers(host):
    host("docker", Runtimes='{"runc": {}}')
    assert levels(doctor.toolkit()) == [FAILURE]
    host("docker", Runtimes='{"nvidia": {}, "runc": {}}')
    assert levels(doctor.toolkit()) == [OK]


def test_disk_is_looked_at_where_images_and_models_go(host, tmp_path, monkeypatch):
    host("docker", DockerRootDir=str(tmp_path))
    usage = shutil_usage(free=25)
    monkeypatch.setattr(doctor.shutil, "disk_usage", usage)
    assert levels(doctor.disk({})) == [WARNING]
    usage.free = 200 * doctor.GIB
    assert levels(doctor.disk({})) == [OK]
    assert levels(doctor.disk({"MODELS_DIR": str(tmp_path)})) == [OK, OK]
    assert levels(doctor.disk({"MODELS_DIR": str(tmp_path / "missing")})) == [OK, FAILURE]


class shutil_usage:  # noqa: N801 - called as the function that it stands for
    def __init__(self, free):
        self.free = free * doctor.GIB

    def __call__(self, path):
        return self


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (told,) = [one for one in doctor.ports({"SERVER_PORT": port}) if port in one.what]
    assert told.level == WARNING
    assert "SERVER_PORT= in .env" in told.do


def test_memory_is_that_of_this_host():
    (told,) = doctor.memory()
    assert "GiB of memory are free" in told.what


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response({"/a/b": 200, "/gated/b": 401}.get(self.path.split("/resolve")[0], 404))
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror():
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        server.shutdown()


def test_the_hub_or_a_mirror_is_asked_for_the_model(mirror):
    assert levels(doctor.hub({"MODEL": "a/b"}, mirror)) == [OK]
    (told,) = doctor.hub({"MODEL": "gated/b"}, mirror)
    assert (told.level, told.do) == (FAILURE, "HF_TOKEN_FILE in .env")
    assert levels(doctor.hub({"MODEL": "gated/b", "HF_TOKEN_FILE": "x"}, mirror)) == [WARNING]
    assert levels(doctor.hub({"MODEL": "not/there"}, mirror)) == [FAILURE]
    (told,) = doctor.hub({"MODEL": "a/b"}, {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert told.level == FAILURE
    assert "HF_HUB_OFFLINE=1" in told.do


def test_offline_the_model_has_to_be_there(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1"}
    told = {"MODEL": "a/b", "MODELS_DIR": str(tmp_path)}
    assert levels(doctor.hub(told, offline)) == [FAILURE]
    snapshot = tmp_path / "hub/models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert levels(doctor.hub(told, offline)) == [OK]
    assert levels(doctor.hub({"MODEL": "/var/cache/hiprune/b"}, offline)) == [OK]


def test_keys_have_to_be_there_and_readable(tmp_path):
    folder = tmp_path / "docker/secrets"
    folder.mkdir(parents=True)
    told = {"API_KEY_FILE": "secrets/api_key"}
    assert levels(doctor.secrets(told, {}, tmp_path)) == [FAILURE]
    (folder / "api_key").write_text("abc")
    (folder / "api_key").chmod(0o600)
    assert "chmod 644" in doctor.secrets(told, {}, tmp_path)[0].do
    (folder / "api_key").chmod(0o644)
    assert levels(doctor.secrets(told, {}, tmp_path)) == [OK]
    (open_,) = doctor.secrets({"BIND_ADDRESS": "0.0.0.0"}, {}, tmp_path)
    assert open_.level == FAILURE
    (lost,) = doctor.secrets({}, {"HIPRUNE_DEFAULT": "{}"}, tmp_path)
    assert "move it to .env" in lost.do


def test_settings_are_those_of_compose(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("# a comment\nMODEL='a/b'\nGPU_COUNT=2\n")
    monkeypatch.setenv("GPU_COUNT", "4")
    told = doctor.settings(tmp_path)
    assert (told["MODEL"], told["GPU_COUNT"]) == ("a/b", "4")


def test_the_command_says_how_much_is_to_be_mended(tmp_path):
    """On this machine, which has no Docker engine that answers."""
    ran = subprocess.run(
        [sys.executable, doctor.__file__],
        env={"PATH": str(tmp_path), "COMPOSE_PROFILES": "cpu"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1, ran.stderr
    assert "FAILURE  Docker Engine does not answer" in ran.stdout
    assert "2 to mend before" in ran.stdout
    assert "nvidia-smi" not in ran.stdout
