"""`make load` against the real engine, and its report in a real browser."""

import json
import subprocess
from pathlib import Path

import pytest

from loadtests.load.__main__ import main as load
from tests.e2e.browser import browser, needs_browser
from tests.e2e.serving import BIN, MAKE, running

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "build" / "load-report"
SHORT = ["--duration", "4s", "--warm-up", "1s", "--answer-tokens", "12", "--requests", "4"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with running([str(BIN / "hiprune-serve"), "--demo"], folder, model="hiprune-demo") as one:
        yield one


@pytest.fixture(scope="module")
def swept(server, tmp_path_factory):
    """Folder of a small sweep, run by the documented command."""
    out = tmp_path_factory.mktemp("sweep")
    command = [*MAKE, "load", f"HOST={server.url}", "BUDGETS=full 64", "CONCURRENCY=1 3",
               "DURATION=4s", "WARM_UP=1s", "ANSWER_TOKENS=12", f"OUT={out}",
               "ARGS=--requests 4 --cancel 15% --slo-ttft-p99 60s --slo-error-rate 0"]  # fmt: skip
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "first token" in ran.stderr  # progress is shown
    return out


def test_a_sweep_shows_what_the_engine_did(swept):
    cells = json.loads((swept / "results.json").read_text())["cells"]
    assert [(c["budget"], c["load"]) for c in cells] == [
        ("full", "1"), ("64", "1"), ("full", "3"), ("64", "3"),
    ]  # fmt: skip
    for cell in cells:
        kept = 576 if cell["budget"] == "full" else 64
        assert (cell["tokens_full"], cell["tokens_kept"]) == (576, kept)
        assert cell["prompt_tokens"] == pytest.approx(kept + 12, abs=12)
        assert cell["requests"] >= 4
        assert cell["errors"] == {}
        assert cell["answer_tokens"] == 12
        # The engine's prefill is a part of what the client waited for.
        assert 0 < cell["prefill_p50"] < cell["ttft_p50"]
        assert 0 < cell["engine_encoder"] <= 2 * cell["engine_prefill"]
        assert cell["engine_prefill"] == pytest.approx(cell["prefill_mean"], rel=0.6)
        assert cell["engine_decode"] > 0
        # Neither another cell nor the requests before it left anything in a cache.
        assert cell["hits_prefix"] == 0
        assert cell["hits_pictures"] == 0
    assert sum(cell["cancelled"] for cell in cells) > 0


def test_cache_hits_are_measured_on_purpose(server, tmp_path):
    words = ["--budgets", "64", "--concurrency", "2", "--allow-cache-hits", "--pictures", "3"]
    assert load(["--url", server.url, "--out", str(tmp_path), *SHORT, *words]) == 0
    (cell,) = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert cell["hits_pictures"] > 0.4


@needs_browser
def test_the_report_is_readable_everywhere(swept):
    PICTURES.mkdir(parents=True, exist_ok=True)
    with browser() as chromium:
        for name, width, wish in (
            ("light", 1100, {"color_scheme": "light"}),
            ("dark", 1100, {"color_scheme": "dark"}),
            ("phone", 390, {"color_scheme": "light"}),
        ):
            context = chromium.new_context(viewport={"width": width, "height": 900}, **wish)
            page = context.new_page()
            troubles, asked = [], []
            page.on("console", lambda said, to=troubles: to.append(said.text))
            page.on("pageerror", lambda error, to=troubles: to.append(str(error)))
            page.on("request", lambda request, to=asked: to.append(request.url))
            page.goto(f"file://{swept}/report.html")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=PICTURES / f"{name}.png", full_page=True)
            if name == "light":
                page.pdf(path=PICTURES / "print.pdf", format="A4")
            assert not troubles
            assert asked == [f"file://{swept}/report.html"]
            headings = page.locator("h2").all_inner_texts()
            context.close()
    for heading in ("Latency against tokens kept", "Throughput", "Where the time goes", "SLOs"):
        assert heading in headings
