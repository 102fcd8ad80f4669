"""The wheel in an environment of its own, as its users install it: the demo answers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.serving import BIN, running
from tests.photos import photo

ROOT = Path(__file__).parents[2]
UV = shutil.which("uv", path=str(BIN))

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not UV, reason="needs uv, which the CPU engine is installed with"),
    pytest.mark.timeout(1500),
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder of the programs of an empty environment that got the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "hatchling", "build", "--directory", folder / "dist"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    python = os.environ.get("INSTALLED_PYTHON", sys.executable)
    subprocess.run([UV, "venv", "--python", python, folder / "venv"], check=True)
    # The releases of the lock, so that what is fetched is what is there; not its hashes, since the
    # wheel has none.
    lock = (ROOT / "requirements/image.lock").read_text()
    (folder / "constraints.txt").write_text(
        "".join(line.rstrip(" \\") + "\n" for line in lock.splitlines() if line[:1].isalnum())
    )
    subprocess.run(
        [
            *(UV, "pip", "install", "--python", folder / "venv/bin/python"),
            *("--override", ROOT / "requirements/overrides.txt"),
            *("--constraint", folder / "constraints.txt", f"hiprune-vllm[cpu] @ {wheel.as_uri()}"),
        ],
        check=True,
    )
    return folder / "venv" / "bin"


def test_the_demo_answers_with_a_budget(installed, tmp_path):
    # Nothing of this checkout is on the way.
    clean = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [str(installed / "hiprune-serve"), "--demo"]
    with running(command, tmp_path, model="hiprune-demo", environment=clean) as server:
        answer = server.ask([photo("chelsea")], extra_body={"hiprune": {"tokens": 64}})
        (image,) = answer.hiprune["images"]
        assert (image["tokens_full"], image["tokens_kept"]) == (576, 64)
    where = "import hiprune_server; print(hiprune_server.__file__)"
    ran = subprocess.run(
        [installed / "python", "-c", where], cwd=tmp_path, env={}, capture_output=True, text=True
    )
    assert ran.stdout.startswith(str(installed.parent)), ran.stderr
