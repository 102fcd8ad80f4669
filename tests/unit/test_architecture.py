"""The arrows of the design: who may import whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "vllm_plugin"
SERVER = ROOT / "server"

OF_THE_PLUGIN = (
    "hiprune_vllm.facade",
    "hiprune_vllm.plan",
    "hiprune_vllm.reading",
    "hiprune_vllm",  # its version, see below
)
"""All that the server may know of the plugin, pure modules each."""

# Folder or module -> prefixes of what it may import besides the standard library.
ALLOWED = {
    "hiprune_vllm/__init__.py": ["hiprune_vllm.engine", "hiprune_vllm"],
    "hiprune_vllm/plan.py": ["hiprune_vllm.pruning.budget"],
    "hiprune_vllm/facade.py": ["numpy", "hiprune_vllm.plan", "hiprune_vllm.models.unserved"],
    "hiprune_vllm/reading.py": ["hiprune_vllm.plan", "hiprune_vllm.pruning.budget"],
    "hiprune_vllm/tuning.py": [],
    "hiprune_vllm/pruning/kernel.py": ["torch", "triton"],
    "hiprune_vllm/pruning": ["torch", "hiprune_vllm.pruning", "hiprune_vllm.tuning"],
    "hiprune_vllm/models": [
        "torch",
        "transformers",
        "vllm",
        "PIL",
        "hiprune_vllm.pruning",
        "hiprune_vllm.plan",
        "hiprune_vllm.tuning",
        "hiprune_vllm.models",
    ],
    "hiprune_vllm/analysis": [
        "torch",
        "transformers",
        "numpy",
        "PIL",
        "matplotlib",
        "sklearn",
        "hiprune_vllm.pruning.scores",
        "hiprune_vllm.analysis",
    ],
    "hiprune_vllm/engine": [
        "torch",
        "vllm",
        "cachetools",
        "numpy",
        "PIL",
        "prometheus_client",
        "hiprune_vllm",
    ],
    # The server's rooms, from what knows least to what knows all. Metrics and settings stand with
    # what an operator deals with, and are the two modules there that other rooms may know.
    "hiprune_server/__init__.py": [],
    "hiprune_server/wishes": ["hiprune_server.wishes", "hiprune_vllm.facade", "hiprune_vllm.plan"],
    "hiprune_server/operations/metrics.py": ["prometheus_client", "hiprune_vllm.plan"],
    "hiprune_server/operations/config.py": [
        "yaml",
        "hiprune_server.wishes.details",
        "hiprune_vllm.plan",
        "hiprune_vllm.reading",
    ],
    "hiprune_server/operations/banner.py": ["PIL", "hiprune_vllm", "hiprune_server.demo"],
    "hiprune_server/hardening": [
        "vllm",
        "fastapi",
        "starlette",
        "pydantic",
        "pydantic_core",
        "aiohttp",
        "requests",
        "pybase64",
        "hiprune_server.hardening",
        "hiprune_server.wishes",
        "hiprune_server.operations.metrics",
        "hiprune_vllm.plan",
    ],
    # Modules that can be read without the rest of their room.
    "hiprune_server/hardening/bodies.py": [
        "starlette",
        "hiprune_server.operations.metrics",
        "hiprune_server.hardening.refusals",
    ],
    "hiprune_server/hardening/guard.py": [
        "starlette",
        "hiprune_server.hardening",
        "hiprune_server.operations.metrics",
        "hiprune_server.wishes.places",
    ],
    "hiprune_server/hardening/pictures.py": ["numpy", "PIL"],
    "hiprune_server/hardening/refusals.py": ["starlette"],
    "hiprune_server/hardening/grammars.py": ["vllm", "hiprune_server.operations.metrics"],
    "hiprune_server/hardening/grammar_trial.py": ["torch", "vllm"],
    "hiprune_server/hardening/releases.py": ["vllm"],
    "hiprune_server/hardening/resending.py": [],
    "hiprune_server/hardening/shape.py": ["vllm"],
    "hiprune_server/pages": ["fastapi", "starlette", "hiprune_server.demo"],
    "hiprune_server/routes": [
        "vllm",
        "fastapi",
        "starlette",
        "pydantic",
        "PIL",
        "hiprune_server.routes",
        "hiprune_server.hardening",
        "hiprune_server.wishes",
        "hiprune_server.pages",
        "hiprune_server.operations.metrics",
        "hiprune_server.operations.config",
        "hiprune_server.operations.banner",
        *OF_THE_PLUGIN,
    ],
    "hiprune_server/operations": ["vllm", "yaml", "hiprune_server", *OF_THE_PLUGIN],
    "hiprune_server/demo/__init__.py": [],
    "hiprune_server/demo/world.py": ["numpy", "PIL", "hiprune_server.demo.language"],
    "hiprune_server/demo/language.py": ["numpy"],
    # The words of the Makefile that are neither served nor a test; fidelity has the tests' oracles.
    "tools": [
        "prometheus_client",
        "hiprune_server",
        "torch",
        "vllm",
        "packaging",
        "hiprune_vllm",
        "tests",
        "tools",
    ],
    "tools/demo_training": [
        "numpy",
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "hiprune_server.demo",
        "tools.demo_training",
    ],
    "loadtests/bench": [  # the engine's parts by themselves
        "torch",
        "vllm",
        "numpy",
        "PIL",
        "httpx",
        "psutil",
        "hiprune_vllm",
        "hiprune_server.demo",
        "loadtests",
    ],
    "loadtests": [
        "httpx",
        "gevent",
        "geventhttpclient",
        "locust",
        "prometheus_client",
        "psutil",
        "skimage",
        "numpy",
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "matplotlib",
        "PIL",
        "lmms_eval",
        "hiprune_server.demo",
        "loadtests",
    ],
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = str(node.module)
            for name in node.names:  # a module of a package, or what a module has
                inner = f"{module}.{name.name}".replace(".", "/") + ".py"
                found = any((base / inner).is_file() for base in (PLUGIN, SERVER, ROOT))
                yield f"{module}.{name.name}" if found else module


def modules():
    for base, folder in (
        (PLUGIN, PLUGIN),
        (SERVER, SERVER),
        (ROOT, ROOT / "loadtests"),
        (ROOT, ROOT / "tools"),
    ):
        yield from ((base, path) for path in sorted(folder.rglob("*.py")))


def within(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize(("base", "path"), list(modules()), ids=lambda value: value.name)
def test_every_module_imports_only_what_its_place_allows(base, path):
    place = path.relative_to(base).as_posix()
    rules = [rule for rule in ALLOWED if place == rule or place.startswith(rule + "/")]
    rule = max(rules, key=len)
    for name in imports(path):
        if name.split(".")[0] in sys.stdlib_module_names:
            continue
        assert any(within(name, prefix) for prefix in ALLOWED[rule]), f"{place} imports {name}"


def test_the_server_meets_the_plugin_at_its_facade():
    for path in SERVER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and within(node.module, "hiprune_vllm"):
                version = [name.name for name in node.names] == ["__version__"]
                assert version or node.module in OF_THE_PLUGIN[:-1], path


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("hiprune_vllm", ("torch", "vllm", "transformers")),
        ("hiprune_vllm.plan", ("torch", "vllm", "transformers")),
        ("hiprune_vllm.facade", ("torch", "vllm", "transformers")),
        ("hiprune_vllm.reading", ("torch", "vllm", "transformers")),
        ("hiprune_vllm.pruning.select", ("vllm", "transformers")),
        ("hiprune_vllm.pruning.record", ("vllm", "transformers")),
        ("hiprune_server.operations.cli", ("torch", "vllm", "transformers")),
    ],
)
def test_light_modules_load_nothing_heavy(module, heavy):
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ran.stdout.strip() == "[]"


OF_VLLM = {
    "engine/asked.py": "the processor class with plans by kind; refusals",
    "engine/checks.py": "how vLLM words a refusal, and embeddings that a client sends ready-made",
    "engine/chunks.py": "patch: names of pictures among vision chunks",
    "engine/classes.py": "registers classes and processors",
    "engine/compat.py": "patches: scheduler, worker, runners, graphs, adapters",
    "engine/drafts.py": "patch: positions of drafts",
    "engine/explain.py": "ships one picture to the worker and its trace back",
    "engine/identity.py": "what caches know a picture by",
    "engine/info.py": "what a processor is made with",
    "engine/model.py": "the model class in front of vLLM's",
    "engine/patches.py": "when each patch is made",
    "engine/plain.py": "patch: routes under vLLM's own server",
    "engine/positions.py": "the model class with 3-D positions",
    "engine/processing.py": "the processor class in front of vLLM's",
    "engine/proof.py": "asks vLLM's processor what the adapter takes for granted",
    "engine/registration.py": "names the classes to vLLM",
    "engine/rotary.py": "the processor class with 3-D positions",
    "engine/scheduling.py": "the cache manager that counts whole pictures",
    "engine/sharing.py": "pictures shared out over ranks",
    "engine/sizes.py": "the processor class with sizes of a request",
    "engine/whole.py": "a prompt as vLLM numbers it",
    "models/internvl.py": "sizes of vLLM's own tile processor",
    "models/llava.py": "asks whether vLLM's fused forward is on; refusals",
    **dict.fromkeys(
        (
            f"models/{family}.py"
            for family in (
                "gemma4",
                "glm4v",
                "idefics3",
                "kimi_vl",
                "llava_next",
                "pixtral",
                "qwen2_vl",
                "tiles",
            )
        ),
        "how vLLM words a refusal",
    ),
}
"""Module of the plugin -> what of vLLM it is there for. None else knows vLLM."""


def imports_vllm(path):
    """Inside functions, too; not what the type checker alone reads."""
    tree = ast.parse(path.read_text())
    unread = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    return any(
        within(name, "vllm")
        for node in ast.walk(tree)
        if node not in unread and isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else names(node))
    )


def names(node):
    return [name.name for name in node.names]


def test_the_list_of_what_knows_vllm_is_true():
    package = PLUGIN / "hiprune_vllm"
    found = {
        path.relative_to(package).as_posix() for path in package.rglob("*.py") if imports_vllm(path)
    }
    assert found == set(OF_VLLM)


def changes_of_vllm():
    """Name of each function that says "Symptom: ..." -> its module in the plugin."""
    for path in sorted((PLUGIN / "hiprune_vllm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "Symptom: " in (ast.get_docstring(node) or ""):
                yield node, path


def test_each_change_of_vllm_says_why_is_listed_and_made_at_one_place():
    engine = PLUGIN / "hiprune_vllm" / "engine"
    patches = (engine / "patches.py").read_text()
    made = {node.name: (node, path) for node, path in changes_of_vllm()}
    assert len(made) > 8
    for name, (node, path) in made.items():
        for part in ("Symptom: ", "Cause: ", "Change: ", "Remove when: "):
            assert part in ast.get_docstring(node), name
        assert OF_VLLM[path.relative_to(engine.parent).as_posix()].startswith("patch"), path
        assert f"    {name}(" in patches, name
        for other in (PLUGIN / "hiprune_vllm").rglob("*.py"):
            if other not in (path, engine / "patches.py"):
                assert name not in other.read_text(), other


def test_nothing_else_writes_into_vllm():
    """An attribute of a module or class that comes from vLLM is set in patches alone."""
    for path in sorted((PLUGIN / "hiprune_vllm").rglob("*.py")):
        tree = ast.parse(path.read_text())
        of_vllm = {
            name.asname or name.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and within(node.module, "vllm")
            for name in node.names
        }
        place = path.relative_to(PLUGIN / "hiprune_vllm").as_posix()
        if OF_VLLM.get(place, "").startswith("patch"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                written = {
                    ast.unparse(target).split(".")[0]
                    for target in targets
                    if isinstance(target, (ast.Attribute, ast.Subscript))
                }
                assert not written & of_vllm, (path, node.lineno)


MOST_ANY = {"vllm_plugin": 409, "server": 217}
"""How often `Any` is written. It falls: lower a number when it has. A new family, and
each hook that an adapter gains, brings the few of its signatures; nothing else raises one."""


@pytest.mark.parametrize("folder", MOST_ANY)
def test_any_is_written_no_more_often_than_before(folder):
    found = sum(
        isinstance(node, ast.Name) and node.id == "Any"
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    )
    assert found <= MOST_ANY[folder]


def test_every_module_that_hardens_vllm_says_why_and_until_when():
    form = re.compile(r"^Symptom: .+^Cause: .+^Change: .+^Remove when: ", re.DOTALL | re.MULTILINE)
    for path in sorted((SERVER / "hiprune_server" / "hardening").glob("*.py")):
        told = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert path.name == "__init__.py" or form.search(told), path


def test_modules_stay_small():
    for _, path in modules():
        if ROOT / "tools" / "vllm_release" in path.parents:
            continue  # reads sources and prints; nothing is built on it
        assert len(path.read_text().splitlines()) <= 400, path
