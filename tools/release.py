"""`make release-check`: what is still missing for a release."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from hiprune_vllm import __version__

ROOT = Path(__file__).parents[1]
FOLLOWERS = (
    ".env.example",
    "docker/compose.yaml",
    "docker/cpu.Dockerfile",
    "docker/gpu.Dockerfile",
    "docker/load.Dockerfile",
    "docker/router.Dockerfile",
    "deploy/kubernetes/base/server.yaml",
    "deploy/kubernetes/base/router.yaml",
    "deploy/kubernetes/multi-node/group.yaml",
)
"""Files that name images by the version of the package."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def clean() -> str:
    return "uncommitted changes" if run("git", "status", "--porcelain").stdout else ""


def changelog(version: str = __version__) -> str:
    """The newest entry is this version's, has a date and says something."""
    text = (ROOT / "CHANGELOG.md").read_text()
    heading, _, entry = text.partition("\n## ")[2].partition("\n")
    if not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", heading):
        return f"CHANGELOG.md begins with {heading!r}, not '{version} (YYYY-MM-DD)'"
    return "" if "\n- " in entry.partition("\n## ")[0] else f"no entry for {version}"


def versions() -> str:
    """Files in which an image or a label has another version than the package."""
    wrong = [
        f"{name} has {found}"
        for name in FOLLOWERS
        for found in named(ROOT / name)
        if found != __version__
    ]
    return ", ".join(wrong)


def named(path: Path) -> set[str]:
    """Versions that a file gives our images."""
    pattern = r"hiprune-(?:cpu|gpu|load|router):(\d[\w.]*)|^ARG VERSION=(\S+)"
    return {a or b for a, b in re.findall(pattern, path.read_text(), re.MULTILINE)}


def locks() -> str:
    """Lock files that `make lock` would change; asks the package registry."""
    names = sorted((ROOT / "requirements").glob("*.lock"))
    before = {path: path.read_bytes() for path in names}
    try:
        ran = run("make", "lock")
        if ran.returncode:
            return f"make lock failed: {ran.stderr.strip()[-200:]}"
        changed = [path.name for path in names if path.read_bytes() != before[path]]
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    return f"make lock changes {', '.join(changed)}" if changed else ""


def wheel() -> str:
    """The wheel builds and has this version."""
    with tempfile.TemporaryDirectory() as folder:
        ran = run(
            sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder
        )
        if ran.returncode:
            return ran.stderr.strip()[-200:]
        (built,) = Path(folder).glob("*.whl")
        return "" if f"-{__version__}-" in built.name else f"the wheel is {built.name}"


def documents() -> str:
    ran = run(sys.executable, "-m", "tools.docs")
    return ran.stderr.strip() if ran.returncode else ""


CHECKS: dict[str, Callable[[], str]] = {
    "clean tree": clean,
    "changelog": changelog,
    "versions": versions,
    "wheel": wheel,
    "documents": documents,
    "locks": locks,
}


def main() -> int:
    """Every check with what it complains of; 1 where one does."""
    complaints = 0
    for name, check in CHECKS.items():
        told = check()
        complaints += bool(told)
        print(f"{name:<12}{told or 'ok'}", flush=True)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
