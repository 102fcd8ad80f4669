"""What our sources import of vLLM is there, in functions too: nothing is imported to see it."""

import ast
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest

from tools.vllm_release.sources import OURS, Release, imports, sources


def test_the_release_has_all_that_is_imported_of_it():
    """Those of engines started by tests as well: they run on other releases."""
    release = Release(Path(find_spec("vllm").origin).parents[1])
    missing = [
        told for name, tree in sources(*OURS, "tests/e2e") for told in release.missing(name, tree)
    ]
    assert not missing, "\n" + "\n".join(missing)


def test_imports_are_found_wherever_they_stand():
    found = {(one.module, one.name) for name, tree in sources() for one in every(tree)}
    assert ("vllm", None) in found
    assert ("vllm", "envs") in found
    assert ("vllm.v1.engine", "utils") in found  # in a function of the server's
    assert ("vllm.multimodal.processing", "ProcessorInputs") in found


def every(tree):
    return [one for branches in imports(tree) for branch in branches for one in branch]


PACKAGE = {
    "__init__.py": """
        from .version import __version__
        import typing
        LATE = {"Engine": ".engine.core:Engine", "Options": "vllm.options:Settings"}
        if typing.TYPE_CHECKING:
            from vllm.engine.core import Engine
        else:
            def __getattr__(name):
                return load(LATE[name]) if name in LATE else now() if name == "platform" else None
    """,
    "version.py": "__version__ = '1.0'",
    "options.py": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from vllm.engine.core import Engine
        try:
            from fast import Settings
        except ImportError:
            class Settings: ...
        if fast:
            size, (width, height) = 1, (2, 3)
        with lock() as held:
            for number in range(3):
                last = number
        annotated: int = 3
    """,
    "engine/__init__.py": "from .core import *\nfrom . import core as heart",
    "engine/core.py": """
        __all__ = ["Engine", "start"]
        from os import path
        class Engine: ...
        def start(): ...
        def stop(): ...
    """,
    "engine/parts/__init__.py": "from ..core import *\nfrom ...options import Settings as Parts",
    "stars.py": "from vllm.hidden import *\nfrom elsewhere import *",
    "hidden.py": "shown = 1\n_hidden = 2",
    "circle.py": "from vllm.round import ring",
    "round.py": "from vllm.circle import ring",
    "moved/new.py": "def start(): ...\nclass Gone: ...",
}


@pytest.fixture
def release(tmp_path):
    for name, text in PACKAGE.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    return Release(tmp_path)


def missing(release, text):
    return release.missing("ours.py", ast.parse(dedent(text)))


@pytest.mark.parametrize(
    "line",
    [
        "import vllm",
        "import vllm.engine.core",
        "import vllm.engine.core as core",
        "from vllm import __version__, engine, Engine, Options, platform",
        "from vllm.engine import Engine, heart, core, parts",
        "from vllm.engine.parts import start, Parts",
        "from vllm.engine.core import stop, path",
        "from vllm.options import Settings, size, width, height, held, number, last, annotated",
        "from vllm.stars import shown",
        "from vllm.engine import *",
        "from elsewhere import anything",
        "import vllms.own",
    ],
)
def test_what_is_there_is_found(release, line):
    assert missing(release, line) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("import vllm.engine.body", "no vllm.engine.body; body is in: nowhere"),
        ("from vllm import Nobody", "vllm has no Nobody; Nobody is in: nowhere"),
        ("from vllm.old import Gone", "no vllm.old; Gone is in: vllm.moved.new"),
        ("from vllm.old import parts", "no vllm.old; parts is in: vllm.engine.parts"),
        (
            "from vllm.options import start",
            "vllm.options has no start; start is in: vllm.engine.core, vllm.moved.new",
        ),
        # Not in `__all__`, not public, only for the type checker, a name that two ask each other.
        ("from vllm.engine import stop", "vllm.engine has no stop; stop is in: vllm.engine.core"),
        ("from vllm.stars import _hidden", "vllm.stars has no _hidden; _hidden is in: vllm.hidden"),
        (
            "from vllm.options import Engine",
            "vllm.options has no Engine; Engine is in: vllm.engine.core",
        ),
        ("from vllm.circle import ring", "vllm.circle has no ring; ring is in: nowhere"),
    ],
)
def test_what_is_missing_is_told_with_its_line_and_where_it_is_now(release, line, told):
    assert missing(release, line) == [f"ours.py:1: {told}"]


def test_an_import_in_a_function_is_seen(release):
    text = """
        def serve():
            if late:
                from vllm.old import Gone
    """
    assert missing(release, text) == ["ours.py:4: no vllm.old; Gone is in: vllm.moved.new"]


def attempt(body, *handlers):
    return "\n".join([f"try:\n    {body}", *(f"except {one}" for one in handlers)])


THERE, ELSEWHERE = "from vllm.moved.new import Gone", "from vllm.old import Gone"


@pytest.mark.parametrize(
    "text",
    [
        attempt(ELSEWHERE, f"ImportError:\n    {THERE}"),
        attempt(THERE, f"ImportError:\n    {ELSEWHERE}"),
        attempt(ELSEWHERE, f"(ModuleNotFoundError, KeyError):\n    {THERE}"),
        attempt(ELSEWHERE, "ImportError:\n    Gone = None"),
        attempt(
            ELSEWHERE,
            "ImportError:\n    try:\n        from vllm.older import Gone\n"
            f"    except ImportError:\n        {THERE}",
        ),
    ],
)
def test_one_of_several_spellings_is_enough(release, text):
    assert missing(release, text) == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (attempt(ELSEWHERE, "ImportError:\n    from vllm.older import Gone"), [2, 4]),
        (attempt(ELSEWHERE, f"ValueError:\n    {THERE}"), [2]),
        (attempt(ELSEWHERE, "ImportError:\n    raise SystemExit"), [2]),
        (attempt(THERE, f"ImportError:\n    {THERE}\nelse:\n    {ELSEWHERE}"), [6]),
    ],
)
def test_no_spelling_that_does_is_told_with_all_of_them(release, text, lines):
    assert [int(told.split(":")[1]) for told in missing(release, text)] == lines
