"""lmms-eval's logs become our report; its own part is proved in tests/e2e/test_quality.py."""

import json

import pytest

from loadtests.quality.lmms import collect, evaluate, local
from loadtests.quality.lmms.benchmarks import BENCHMARKS, PAPER

FULL = {
    "gqa": {"alias": "gqa", "exact_match,none": 0.6, "exact_match_stderr,none": 0.01},
    "mme": {"mme_perception_score,none": 1500.0, "mme_cognition_score,none": 300.0},
    "pope": {"pope_accuracy,none": 0.87, "pope_f1_score,none": 0.8},
    "mmbench_en_dev": {"gpt_eval_score,none": 64.0, "submission,none": None},
}
PRUNED = {
    "gqa": {"exact_match,none": 0.54},
    "mme": {"mme_perception_score,none": 1350.0, "mme_cognition_score,none": 270.0},
    "pope": {"pope_f1_score,none": 0.8},
    "mmbench_en_dev": {"gpt_eval_score,none": 32.0},
}


def run(folder, budget, results, *, answers=("yes", "no"), kept=None):
    """A folder as `evaluate` and lmms-eval leave it."""
    logs = folder / budget / "llava__demo"
    logs.mkdir(parents=True)
    (logs / "20261101_101010_results.json").write_text(json.dumps({"results": results}))
    for task in results:
        lines = [{"doc_id": i, "filtered_resps": [said]} for i, said in enumerate(answers)]
        text = "\n".join(json.dumps(line) for line in lines) + "\n"
        (logs / f"20261101_101010_samples_{task}.jsonl").write_text(text)
    if kept is not None:
        lines = [json.dumps({"full": 576, "kept": kept})] * 2 + [json.dumps({"full": 0, "kept": 0})]
        (folder / budget / "kept.jsonl").write_text("\n".join(lines) + "\n")
    about = {"budget": budget, "tasks": list(results), "model": "m<1>", "knobs": ["alpha=0.2"]}
    (folder / budget / "budget.json").write_text(json.dumps(about))


def test_scores_are_on_the_papers_scale_and_relative_to_the_full_picture(tmp_path, capsys):
    run(tmp_path, "64", PRUNED, kept=64)
    run(tmp_path, "full", FULL, kept=576)
    assert collect.main([str(tmp_path), "--paper", "llava-1.5"]) == 0
    first, second = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [first[name] for name in ("GQA", "MMB", "MME", "POPE")] == [60, 64, 1800, 80]
    assert (first["tokens_kept"], second["tokens_kept"]) == (576, 64)
    assert first["relative"] == 100
    assert second["relative"] == pytest.approx((90 + 50 + 90 + 100) / 4)
    assert second["relative_in_paper"] == PAPER["llava-1.5"][1]["64"] == 92.7
    page = (tmp_path / "report.html").read_text()
    assert "m&lt;1&gt;" in page
    assert "alpha=0.2" in page
    assert "Not run: MMB-CN, SQA, VQAv2, TextVQA, VizWiz." in page
    assert "92.7" in page
    assert "82.5" in page
    header, *lines = (tmp_path / "results.csv").read_text().splitlines()
    assert header.startswith("budget,tokens_full,tokens_kept,GQA,MMB,MME,POPE,relative")
    assert len(lines) == 2
    assert "relative 82.5" in capsys.readouterr().out


def test_requests_without_an_answer_are_told_and_fail_the_command(tmp_path):
    run(tmp_path, "full", FULL, answers=("yes", "[LMMS_EVAL_REQUEST_FAILED after 5 retries] x"))
    assert collect.main([str(tmp_path)]) == 1
    page = (tmp_path / "report.html").read_text()
    assert "Requests without an answer: 4 at full" in page


def test_without_the_full_picture_nothing_is_relative(tmp_path):
    run(tmp_path, "64", PRUNED)
    assert collect.main([str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["relative"] is None
    assert row["tokens_kept"] is None


def test_nothing_to_collect_is_an_error(tmp_path, capsys):
    assert collect.main([str(tmp_path)]) == 2
    run(tmp_path, "full", {"other_task": {"exact_match,none": 1.0}})
    assert collect.main([str(tmp_path)]) == 2
    assert "other_task" in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["0", "1.5", "-3", "half"])
def test_budgets_that_no_server_takes_are_refused_before_anything_runs(budget, tmp_path, capsys):
    command = ["--model", "m", "--tasks", "gqa", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        evaluate.main([*command, "--budgets", "full", budget])
    assert budget in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_papers_nine_benchmarks_are_known():
    names = ["GQA", "MMB", "MMB-CN", "MME", "POPE", "SQA", "VQAv2", "TextVQA", "VizWiz"]
    assert [one.name for one in BENCHMARKS] == names


def test_the_local_task_carries_its_pictures(tmp_path):
    count = local.write(tmp_path, 20)
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert count == len(lines) >= 20
    assert {"picture", "question", "answer"} == set(lines[0])
    assert str(tmp_path / "questions.jsonl") in (tmp_path / "demo_shapes.yaml").read_text()
