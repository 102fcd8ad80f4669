"""A person's way through the playground, in a real browser against the real server."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe

from hiprune_server.demo import SAMPLES
from tests.e2e.browser import browser, needs_browser
from tests.e2e.serving import BIN, running

pytestmark = needs_browser
PICTURES = Path(__file__).parents[2] / "build" / "playground"
ANSWER = "I see a white star, a red heart, an orange diamond and a card with the number 1."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    command = [str(BIN / "hiprune-serve"), "--demo"]
    with running(command, tmp_path_factory.mktemp("log"), model="hiprune-demo") as one:
        yield one


@pytest.fixture(scope="module")
def chromium():
    PICTURES.mkdir(parents=True, exist_ok=True)
    with browser() as one:
        yield one


@pytest.fixture
def page(chromium, server):
    """The page, and afterwards the proof that it was quiet and asked nobody else."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    one = context.new_page()
    troubles, asked = [], []
    one.on("pageerror", lambda error: troubles.append(str(error)))
    one.on("console", lambda said: said.type == "error" and troubles.append(said.text))
    one.on("request", lambda request: asked.append(request.url))
    one.on("dialog", lambda dialog: troubles.append(f"dialog: {dialog.message}"))
    one.goto(f"{server.url}/playground")
    one.get_by_text("hiprune-demo: llava, anchors from layer 3 of 8").wait_for()
    one.troubles = troubles
    yield one
    assert not troubles
    assert all(url.startswith((f"{server.url}/", "data:", "blob:")) for url in asked)
    context.close()


def choose(page, name="shapes-1.jpg"):
    page.get_by_role("button", name=f"Sample picture {name}").click()
    panel(page, "A").get_by_role("img").wait_for()


def panel(page, name):
    return page.get_by_role("region", name=f"Budget {name}")


def ask(page):
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#stop:not([disabled])").wait_for()
    page.locator("#stop[disabled]").wait_for(timeout=60_000)


def fact(page, name, column="A"):
    return panel(page, column).locator(f".{name}").inner_text()


def accessible(page):
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [n["html"][:80] for n in one["nodes"]]) for one in found] == []


def test_a_whole_way_through(page, tmp_path):
    choose(page)
    assert "64 of 576 visual tokens kept: 1 anchors, 4 buffers, 59 registers" in (
        panel(page, "A").get_by_role("img").get_attribute("alt")
    )
    ask(page)
    assert fact(page, "answer") == ANSWER
    assert (fact(page, "kept"), fact(page, "prompt")) == ("64 of 576", "72")
    assert re.fullmatch(r"\d+ ms", fact(page, "first"))
    # Another budget beside it, moved with the keyboard.
    page.get_by_label("Compare two budgets").check()
    slider = page.get_by_label("Budget B, visual tokens")
    slider.focus()
    page.keyboard.press("Home")
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    panel(page, "B").get_by_text("8 of 576 visual tokens kept").wait_for()
    ask(page)
    assert (fact(page, "kept", "B"), fact(page, "prompt", "B")) == ("8 of 576", "16")
    assert fact(page, "answer", "A") == ANSWER
    assert fact(page, "answer", "B") not in ("", ANSWER)
    page.screenshot(path=PICTURES / "light.png", full_page=True)
    accessible(page)
    # The same request without the page: the picture comes from a file beside it.
    for name, run in (("curl", ["bash", "-c"]), ("Python", [sys.executable, "-c"])):
        panel(page, "A").get_by_role("button", name=f"Copy as {name}").click()
        panel(page, "A").get_by_text("Copied").wait_for()
        text = page.evaluate("navigator.clipboard.readText()")
        ran = subprocess.run([*run, text], capture_output=True, text=True, cwd=SAMPLES, timeout=60)
        assert ANSWER in ran.stdout, ran.stderr
        assert re.search(r"tokens_kept.{1,3}: ?64", ran.stdout)


def test_dark_and_on_a_phone(page):
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    choose(page, "shapes-3.jpg")
    page.get_by_label("Compare two budgets").check()
    panel(page, "B").get_by_role("img").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=PICTURES / "dark-phone.png", full_page=True)
    accessible(page)


def test_with_the_keyboard_alone(page):
    def to(role, name):
        for _ in range(60):
            page.keyboard.press("Tab")
            # The browser's own names, as a screen reader gets them.
            focused = page.locator(":focus")
            named = page.get_by_role(role, name=name, exact=True)
            if named.and_(focused).count():
                return
        raise AssertionError(f"no way to {name}")

    to("button", "Sample picture shapes-2.jpg")
    page.keyboard.press("Enter")
    panel(page, "A").get_by_role("img").wait_for()
    page.locator("body").focus()
    to("textbox", "Question")
    page.keyboard.press("Control+a")
    page.keyboard.type("Tell me where the circle is.")
    to("button", "Ask")
    page.keyboard.press("Enter")
    panel(page, "A").get_by_text("The circle is in the middle.").wait_for()


def transfer(page, name, kind="image/jpeg"):
    """A DataTransfer with a sample picture under another name."""
    data = list((SAMPLES / "shapes-1.jpg").read_bytes())
    return page.evaluate_handle(
        """([data, name, type]) => {
            const all = new DataTransfer();
            all.items.add(new File([new Uint8Array(data)], name, { type }));
            return all;
        }""",
        [data, name, kind],
    )


@pytest.mark.parametrize("way", ["drop", "paste", "file"])
def test_a_picture_of_ones_own(page, way):
    name = "<b>my</b> \"picture\" 'one'.jpg"
    if way == "drop":
        page.dispatch_event("#drop", "drop", {"dataTransfer": transfer(page, name)})
    elif way == "paste":
        page.evaluate(
            """(all) => document.dispatchEvent(
                new ClipboardEvent("paste", { clipboardData: all, bubbles: true }))""",
            transfer(page, name),
        )
    else:
        data = (SAMPLES / "shapes-1.jpg").read_bytes()
        picture = {"name": name, "mimeType": "image/jpeg", "buffer": data}
        page.set_input_files("#file", picture)
    panel(page, "A").get_by_text("64 of 576 visual tokens kept").wait_for()
    assert page.locator("#hint").inner_text() == name
    assert page.locator("#hint b").count() == 0
    ask(page)
    assert fact(page, "answer") == ANSWER


def test_text_is_never_taken_for_html(page):
    choose(page)
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    # The answer and an error as a hostile server would have them.
    chunk = {"choices": [{"delta": {"content": evil}}], "hiprune": {"images": []}}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"),
    )
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".answer", has_text="onerror").wait_for()
    assert fact(page, "answer") == evil
    page.unroute("**/v1/chat/completions")
    told = json.dumps({"error": {"message": evil}})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, body=told))
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#error", has_text="400").wait_for()
    assert page.locator("#error").inner_text() == f"400: {evil}"
    assert page.locator("img[src=x]").count() == 0
    # The browser itself notes a refused request in its console; nothing else is there.
    assert all("400" in one for one in page.troubles)
    page.troubles.clear()


def test_what_the_server_refuses_is_told(page):
    page.set_input_files(
        "#file", {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG no picture"}
    )
    page.locator("#error", has_text="400: image_url must be a picture").wait_for()
    assert all("400" in one for one in page.troubles)
    page.troubles.clear()


def test_a_stream_can_be_stopped(page):
    choose(page)
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("button", name="Stop").click()
    page.locator("#stop[disabled]").wait_for()
    assert page.locator("#error").inner_text() == ""
