"""Installing this package beside vLLM changes nothing of it, by what the registry says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hiprune_vllm.engine.releases import BELOW, OLDEST

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
MINORS = [(OLDEST[0], minor) for minor in range(OLDEST[1], BELOW[1])]


def resolved(folder, *requirements, python="3.12"):
    """Package -> release of everything that a GPU host on Linux would get."""
    words = folder / "wanted.in"
    words.write_text("\n".join(requirements))
    ran = subprocess.run(
        [UV, "pip", "compile", "--python-version", python, "--no-header", "--no-annotate",
         "--python-platform", "x86_64-manylinux_2_28", words],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", ran.stdout, re.MULTILINE))


@pytest.mark.parametrize("minor", MINORS, ids=lambda minor: ".".join(map(str, minor)))
def test_vllms_own_requirements_stay_and_ours_are_among_them(minor, tmp_path):
    """So `pip install --no-deps` beside it leaves `pip check` green, and without it torch as it is.

    The newest patch release of each minor that is served.
    """
    engine = f"vllm=={minor[0]}.{minor[1]}.*"
    stock = resolved(tmp_path, engine)
    beside = resolved(tmp_path, engine, f"hiprune-vllm[gpu] @ {ROOT.as_uri()}")
    beside.pop("hiprune-vllm", None)
    assert beside == stock
    assert {"torch", "torchvision", "transformers"} <= stock.keys()
