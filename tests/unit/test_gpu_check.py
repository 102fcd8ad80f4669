"""`make gpu-check` where there is no GPU: it says so, and its list is the checklist's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import gpu_check

ROOT = Path(__file__).parents[2]


def steps():
    return subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", "--list"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()


def test_the_checklist_names_the_steps_in_their_order():
    text = (ROOT / "docs/gpu-checklist.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == steps()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_proves_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_step_that_fails_fails_the_check_and_stops_none(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--only", "kernels", "e2e", "checkpoint"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "OUT", tmp_path)
    monkeypatch.setattr(gpu_check, "kernels", lambda: 1 / 0)
    monkeypatch.setattr(gpu_check, "e2e", lambda: gpu_check.OK)
    monkeypatch.setattr(gpu_check, "reachable", lambda: False)
    assert gpu_check.main() == 1
    told = (tmp_path / "summary.txt").read_text()
    assert re.sub(r" +\d+ s", "", told).split("\n")[:3] == [
        "kernels     FAILED",
        "e2e         ok",
        "checkpoint  not run",
    ]


def test_a_command_is_shown_and_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "OUT", tmp_path)
    assert gpu_check.run("x", "sh", "-c", "echo seen; exit 3") == gpu_check.FAILED
    assert "seen" in capsys.readouterr().out
    assert (tmp_path / "x.log").read_text() == "seen\n"
