"""What a budget costs, through the real server: the quick evaluation and lmms-eval."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from loadtests.quality.__main__ import main as evaluate
from loadtests.quality.lmms import collect, local
from loadtests.quality.lmms.benchmarks import BENCHMARKS, LOCAL
from tests.e2e.serving import BIN, MAKE, running

pytestmark = pytest.mark.timeout(1200)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with running([str(BIN / "hiprune-serve"), "--demo"], folder, model="hiprune-demo") as one:
        yield one


@pytest.fixture(scope="module")
def lmms_python(tmp_path_factory):
    """lmms-eval's environment, made with the documented command from its lock file."""
    folder = tmp_path_factory.mktemp("lmms") / "venv"
    command = [*MAKE, "lmms-env", f"LMMS_VENV={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    return folder / "bin" / "python"


def run_in_lmms(python, tmp_path, *arguments):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "EVAL_API_KEY": "not-in-any-log",
    }
    return subprocess.run(
        [str(python), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip


def test_the_quick_evaluation_passes_its_thresholds(server, tmp_path):
    assert evaluate(["--quick", "--url", server.url, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {row["method"]: row for row in found["methods"]}
    assert rows["full"]["kept"] == 576
    assert rows["hiprune"]["kept"] == rows["random"]["kept"] == 64
    assert rows["full"]["questions"] >= 400
    assert len(set(rows["random"]["seeds"])) == 2  # the draws differ
    assert (tmp_path / "report.html").read_text().count("<img") >= 4


@pytest.mark.long
def test_lmms_eval_scores_two_budgets(server, lmms_python, tmp_path):
    count = local.write(tmp_path / "task", 60)
    done = run_in_lmms(
        lmms_python, tmp_path, "-m", "loadtests.quality.lmms.evaluate", "--url", server.url,
        "--model", server.model, "--budgets", "full", "8", "--knob", "method=random",
        "--tasks", LOCAL.task, "--include-path", str(tmp_path / "task"),
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert collect.main([str(tmp_path / "out")]) == 0
    full, pruned = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert (full["tokens_kept"], pruned["tokens_kept"]) == (576, 8)
    assert full[LOCAL.name] >= 95
    assert pruned[LOCAL.name] < full[LOCAL.name] - 25
    assert pruned["relative"] == pytest.approx(100 * pruned[LOCAL.name] / full[LOCAL.name])
    assert full["failed"] == pruned["failed"] == 0
    (run, _) = collect.read(tmp_path / "out")
    assert run.questions == {LOCAL.name: count}
    logs = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in logs if "not-in-any-log" in path.read_text()]


@pytest.mark.long
def test_lmms_eval_has_the_papers_benchmarks_and_metrics(lmms_python, tmp_path):
    """Names only: their data is not at hand."""
    code = """
import json, sys
from lmms_eval.tasks import TaskManager
known = TaskManager("ERROR")
found = {}
for name in sys.argv[1:]:
    config = known._get_config(name)
    found[name] = [one["metric"] for one in config["metric_list"]]
print(json.dumps(found))
"""
    done = run_in_lmms(lmms_python, tmp_path, "-c", code, *(one.task for one in BENCHMARKS))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for one in BENCHMARKS:
        assert set(one.metrics) <= set(found[one.task]), one.task
