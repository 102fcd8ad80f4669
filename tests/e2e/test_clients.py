"""The first request of the README and all of docs/clients.md, as their readers run them."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.serving import BIN, running

ROOT = Path(__file__).parents[2]
FIRST_REQUEST = (ROOT / "README.md").read_text().split("\n## ")[2]
CLIENTS = (ROOT / "docs/clients.md").read_text()


def blocks(document):
    """Kind and content of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


def examples(document):
    """Kind, code and what the document says that it prints."""
    return [
        (kind, code, shown)
        for (kind, code), (after, shown) in itertools.pairwise(blocks(document))
        if kind in ("python", "bash") and after == "text"
    ]


def printed(shown):
    """A pattern for what a document shows: `...` stands for anything, a line may be broken."""
    words = (re.escape(word) for word in shown.split())
    return r"\s*".join(words).replace(re.escape("..."), ".*") + r"\s*"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    command = [str(BIN / "hiprune-serve"), "--demo"]
    with running(command, tmp_path_factory.mktemp("log"), model="hiprune-demo") as one:
        yield one


@pytest.mark.parametrize(("document", "least"), [(FIRST_REQUEST, 2), (CLIENTS, 10)])
def test_every_example_says_what_it_prints(document, least):
    runnable = [kind for kind, _ in blocks(document) if kind in ("python", "bash")]
    assert len(examples(document)) == len(runnable) >= least


@pytest.mark.parametrize(("kind", "code", "shown"), examples(FIRST_REQUEST) + examples(CLIENTS))
def test_an_example_prints_what_the_page_shows(server, kind, code, shown):
    (ROOT / "build").mkdir(exist_ok=True)
    assert "http://127.0.0.1:8000" in code
    code = code.replace("http://127.0.0.1:8000", server.url)
    program = [sys.executable, "-c"] if kind == "python" else ["bash", "-euo", "pipefail", "-c"]
    ran = subprocess.run([*program, code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ran.returncode == 0, ran.stderr
    if "..." in shown:
        assert re.fullmatch(printed(shown), ran.stdout, re.DOTALL), ran.stdout
    else:
        assert ran.stdout == shown, ran.stderr
