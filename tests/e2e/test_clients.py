"""docs/clients.md, as its readers run it: every example, and what it prints."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.serving import BIN, running

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs/clients.md").read_text(), re.M | re.S)
EXAMPLES = [
    (kind, code, shown)
    for (kind, code), (after, shown) in itertools.pairwise(BLOCKS)
    if kind in ("python", "bash") and after == "text"
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    command = [str(BIN / "hiprune-serve"), "--demo"]
    with running(command, tmp_path_factory.mktemp("log"), model="hiprune-demo") as one:
        yield one


def test_every_example_says_what_it_prints():
    assert len(EXAMPLES) == sum(kind in ("python", "bash") for kind, _ in BLOCKS) >= 10


@pytest.mark.parametrize(("kind", "code", "shown"), EXAMPLES)
def test_an_example_prints_what_the_page_shows(server, kind, code, shown):
    (ROOT / "build").mkdir(exist_ok=True)
    assert "http://127.0.0.1:8000" in code
    code = code.replace("http://127.0.0.1:8000", server.url)
    program = [sys.executable, "-c"] if kind == "python" else ["bash", "-euo", "pipefail", "-c"]
    ran = subprocess.run([*program, code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ran.stdout == shown, ran.stderr
    assert ran.returncode == 0
