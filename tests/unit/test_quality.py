"""The evaluation's arithmetic, exactly known: a mock server answers as it is told."""

import base64
import csv
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from loadtests import demo
from loadtests.quality import asking, cells, report, results, stats
from loadtests.quality.__main__ import main, shortfalls

KNOWN = {
    "model": "mock",
    "supported": True,
    "versions": {"hiprune-vllm": "0", "vllm": "0"},
    "encoder": {"output_layer": 4, "has_cls": True},
    "default": {"object_layer": 2},
}


@contextmanager
def mock(say, known=KNOWN):
    """A server whose answers are `say(body)`: text, or a number for a status."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer leaves in one piece

        def reply(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()

        def do_GET(self):
            self.reply(200, known)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            said = say(body)
            if isinstance(said, int):
                self.reply(said, {"error": {}})
                return
            kept = body.get("hiprune", {}).get("tokens", 576)
            images = [{"tokens_full": 576, "tokens_kept": kept}]
            choice = {"message": {"content": said}}
            self.reply(200, {"choices": [choice], "hiprune": {"images": images}})

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()


@pytest.fixture(scope="module")
def key():
    """Question and picture -> the right answer."""
    return {
        (picture.url, text): answer
        for picture in asking.pictures(60)
        for text, answer, _ in picture.questions
    }


CELL = ("method", "tokens", "alpha", "object_layer", "buffer", "score")


def asked_of(body):
    """URL and text; a draw of random has its number behind the picture."""
    image, text = body["messages"][0]["content"]
    head, _, data = image["image_url"]["url"].partition(",")
    picture = base64.b64decode(data).partition(b"draw ")[0]
    return f"{head},{base64.b64encode(picture).decode()}", text["text"]


def test_accuracy_is_the_share_of_right_answers_with_pictures_as_clusters():
    marks = {i: (float(i % 2) * 4, 4) for i in range(100)}  # a picture is all right or all wrong
    found = stats.accuracy(marks)
    assert (found.value, found.questions, found.pictures) == (0.5, 400, 100)
    half = (found.high - found.low) / 2
    assert half == pytest.approx(1.96 * 0.5 / 10, rel=0.1)  # of 100 pictures, not 400 questions


def test_a_paired_difference_is_narrower_than_the_two_alone():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    first = {i: (float(h > 0.3) * 5, 5) for i, h in enumerate(hard)}
    second = {i: (max(0.0, right - (i % 10 == 0)), n) for i, (right, n) in first.items()}
    found = stats.difference(first, second)
    assert found.low <= found.value <= found.high
    assert found.low > 0
    assert stats.verdict(found) == "better"
    alone = stats.accuracy(first)
    assert found.high - found.low < (alone.high - alone.low) / 2
    assert stats.verdict(stats.difference(first, first)) == "no difference shown"


def test_no_answers_are_no_accuracy():
    with pytest.raises(ValueError, match="no answers"):
        stats.accuracy({})


def test_equal_plans_are_one_cell():
    every = [
        *cells.method_cells((64, 32), 2, 2, downscaled=True),
        *cells.alpha_cells(32, 4),
        *cells.buffer_cells((64,), 2),
    ]
    once = cells.unique(every)
    keys = Counter(cell.key for cell in once)
    assert set(keys.values()) == {1}
    assert len(once) < len(every)
    seeds = [cell for cell in once if cell.method == "random"]
    assert len({cell.key for cell in seeds}) == 4


def test_the_report_shows_exactly_what_the_server_did(tmp_path, key):
    """Full: all right. HiPrune: right where tokens >= 64. Everything else: wrong."""

    def say(body):
        plan = body.get("hiprune", {})
        good = not plan or (
            plan["method"] == "hiprune" and plan["score"] == "global" and plan["tokens"] >= 64
        )
        return f" {key[asked_of(body)]}\n" if good else "nonsense"

    with mock(say) as (url, seen):
        command = ["--url", url, "--out", str(tmp_path), "--questions", "30", "--seeds", "2"]
        assert main([*command, "--budgets", "64", "8"]) == 0
        first = len(seen)
        assert main([*command, "--budgets", "64", "8"]) == 0  # nothing is asked again
        assert len(seen) == first
    found = json.loads((tmp_path / "results.json").read_text())
    share = {(r["method"], r["tokens"]): r["accuracy"] for r in found["methods"]}
    assert share["full", None] == share["hiprune", 64] == 1.0
    assert share["hiprune", 8] == share["random", 64] == share["stride", 64] == 0.0
    assert {r["kept"] for r in found["methods"]} == {576, 64, 8}
    (versus,) = [c for c in found["comparisons"] if (c["tokens"], c["against"]) == (64, "random")]
    assert (versus["value"], versus["verdict"]) == (1.0, "better")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(
        r"(src|href)=.https?:|url\(.?https?:|@import", page
    )  # nothing from outside
    assert "100.0 (100.0-100.0)" in page
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len({tuple(line[name] for name in CELL) for line in lines}) == len(lines)
    listed = {(line["method"], line["tokens"], float(line["accuracy"])) for line in lines}
    assert {(m, str(t or ""), share[m, t]) for m, t in share} <= listed
    assert found["ablation"]
    draws = [
        body["messages"][0]["content"][0]["image_url"]["url"]
        for body in seen
        if "random" in str(body.get("hiprune"))
    ]
    assert len(set(draws)) == 2 * len({asked_of(body)[0] for body in seen})


def test_errors_are_counted_and_fail_the_run(tmp_path, key, capsys):
    def say(body):
        return 500 if "How many" in asked_of(body)[1] else key[asked_of(body)]

    with mock(say) as (url, _):
        command = ["--url", url, "--out", str(tmp_path), "--questions", "50", "--sets", "methods"]
        assert main([*command, "--budgets", "64", "--seeds", "1"]) == 1
    assert "HTTP 500" in capsys.readouterr().err
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["errors"]["HTTP 500"] > 0
    assert found["methods"][0]["accuracy"] == 1.0  # what was not answered counts nowhere
    assert "Not all questions were answered" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("pruned", "random", "failed"),
    [(1.0, 0.5, 0), (0.9, 0.5, 1), (1.0, 0.9, 1), (0.9, 0.9, 2)],
)
def test_the_quick_thresholds_can_fail(pruned, random, failed):
    def answers(cell, share):
        return [
            asking.Answer(cell.key, i, 0, "colour", i < 100 * share, "", 576, 64)
            for i in range(100)
        ]

    full, mine, *others = [
        cell
        for cell in cells.method_cells((64,), 3, 2, downscaled=False)
        if cell.method in ("full", "hiprune", "random")
    ]
    every = answers(full, 1.0) + answers(mine, pruned)
    for cell in others:
        every += answers(cell, random)
    assert len(shortfalls(results.Answers(every), 3, 2)) == failed


def test_a_log_of_another_evaluation_is_refused(tmp_path, key, capsys):
    with mock(lambda body: key[asked_of(body)]) as (url, _):
        command = ["--url", url, "--out", str(tmp_path), "--sets", "methods", "--budgets", "64"]
        assert main([*command, "--questions", "20", "--seeds", "1"]) == 0
        assert main([*command, "--questions", "50", "--seeds", "1"]) == 2
    assert "answers of another evaluation (pictures: " in capsys.readouterr().err


def test_an_interrupted_line_is_asked_again(tmp_path):
    log = asking.Log(tmp_path / "a.jsonl", {"model": "m"})
    log.add(asking.Answer("full", 0, 0, "colour", True, "x", 1, 1))
    log.add(asking.Answer("full", 0, 1, "colour", False, "", 0, 0, "timeout"))
    log.close()
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"cell": "full", "pict')
    again = asking.Log(tmp_path / "a.jsonl", {"model": "m"})
    assert set(again.answers) == {("full", 0, 0)}
    again.add(asking.Answer("full", 0, 1, "colour", True, "x", 1, 1))
    again.close()
    assert len(asking.Log(tmp_path / "a.jsonl", {"model": "m"}).answers) == 2


def test_a_server_without_budgets_is_named_before_anything_starts(capsys, tmp_path):
    assert main(["--url", "http://127.0.0.1:9", "--out", str(tmp_path), "--questions", "5"]) == 2
    assert "no server answers" in capsys.readouterr().err
    unsupported = {"model": "m", "supported": False, "reason": "no vision tower"}
    with mock(lambda body: "", unsupported) as (url, _):
        assert main(["--url", url, "--out", str(tmp_path), "--questions", "5"]) == 2
    assert "no vision tower" in capsys.readouterr().err


def test_answers_are_text_in_the_report_never_html():
    answer = asking.Answer("tokens=1", 0, 0, "colour", False, "<b>x</b>", 1, 1)
    pictures = asking.pictures(1)
    cell = cells.Cell("hiprune", cells.plan(32, 3))
    answer = asking.Answer(cell.key, 0, 0, "colour", False, "<script>x</script>", 576, 32)
    page = report._examples([answer], pictures, {0: asking.scene(0).picture})
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_downscaled_checkpoint_sees_smaller_pictures(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoProcessor

    demo.downscale(8, tmp_path / "small")
    config = AutoConfig.from_pretrained(tmp_path / "small")
    assert config.vision_config.image_size == 112
    weights = load_file(tmp_path / "small" / "model.safetensors")
    (name,) = [n for n in weights if n.endswith("position_embedding.weight")]
    assert weights[name].shape == (65, 128)
    processor = AutoProcessor.from_pretrained(tmp_path / "small").image_processor
    picture = asking.scene(1).picture
    assert processor(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, 112, 112)
