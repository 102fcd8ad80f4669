"""Odd and hostile requests beside well-behaved clients: no 5xx, and nobody's answer changes."""

import base64
import io
import itertools
import json
import random
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hiprune_server.demo import SAMPLES
from tests.e2e.serving import BIN, running
from tests.e2e.test_lifetime import under_way, until
from tests.tiffs import tiff

pytestmark = pytest.mark.fuzz

REQUESTS = 3000
GENERATED = 30  # from the OpenAPI document, an operation
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
EXPLAIN = "/v1/hiprune/explain"
OURS = (CHAT, RESPONSES, MESSAGES, "/v1/messages/count_tokens", EXPLAIN, "/v1/hiprune")
MODEL = "hiprune-demo"
# A connection for each request: one that lies idle may be closed just when it is used again.
HTTP = httpx.Client(
    timeout=60, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    command = [str(BIN / "hiprune-serve"), "--demo", "--disable-uvicorn-access-log"]
    with running(command, tmp_path_factory.mktemp("log"), model=MODEL) as one:
        yield one


def encoded(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb():
    """A PNG that claims 60,000 x 60,000 pixels."""
    data = bytearray(saved(Image.new("L", (8, 8))))
    data[16:24] = (60_000).to_bytes(4) + (60_000).to_bytes(4)
    return bytes(data)


def icon(picture):
    """An icon whose directory says 16 x 16."""
    entry = struct.pack("<BBBBHHLL", 16, 16, 0, 0, 1, 32, len(picture), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + picture


def many_scans():
    """A JPEG that is decoded a thousand times over."""
    data = saved(Image.new("RGB", (500, 500)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 1000 + data[-2:]


def long_text():
    info = PngInfo()
    info.add_text("a", " " * 2**23, zip=True)
    return info


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.open(SAMPLES / "shapes-1.jpg"), "JPEG", exif=exif)


def pictures():
    """Name -> (URL, whether it is one that is served)."""
    colour = Image.open(SAMPLES / "shapes-1.jpg").convert("RGB")
    good = {
        "1x1": saved(Image.new("RGB", (1, 1))),
        "8000x20": saved(Image.new("RGB", (8000, 20))),
        "20x8000": saved(Image.new("RGB", (20, 8000))),
        **{mode: saved(colour.convert(mode)) for mode in ("L", "RGBA", "P", "LA", "1")},
        "CMYK": saved(colour.convert("CMYK"), "JPEG"),
        "16 bit": saved(Image.new("I;16", (30, 30), 40_000)),
        "16 bit, big endian": tiff(np.full((30, 30), 40_000, np.uint16), ">"),
        "floats": tiff(np.arange(-3, 897, dtype=np.float32).reshape(30, 30)),
        "floats that are none": tiff(np.full((30, 30), np.nan, np.float32)),
        "an icon": saved(colour.resize((64, 64)), "ICO", sizes=[(16, 16), (64, 64)]),
        "AVIF": saved(colour, "AVIF"),
        "pages": saved(colour, "TIFF", save_all=True, append_images=[colour]),
        "animated": saved(colour.resize((40, 40)), "GIF", save_all=True,
                          append_images=[Image.new("RGB", (40, 40))] * 3),
        "webp": saved(colour, "WEBP"),
        "turned": turned(),
    }  # fmt: skip
    bad = {
        "5000x1": saved(Image.new("RGB", (5000, 1))),
        "1x5000": saved(Image.new("RGB", (1, 5000))),
        "bomb": bomb(),
        "truncated": saved(colour)[:300],
        "empty": b"",
        "an icon of a bomb": icon(bomb()),
        "many scans": many_scans(),
        "a text that blows up": saved(colour, pnginfo=long_text()),
        "a slow format": b"P2 9000 5000 255\n" + b"1 " * 1000,
        "floats of three colours": tiff(np.zeros((9, 9, 3), np.float32), photometric=2),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "html": b"<!doctype html><script>alert(1)</script>",
        "zeros": bytes(1000),
    }
    urls = {
        "no base64": "data:image/svg+xml,<svg/>",
        "not base64": "data:image/png;base64,%%%",
        "no comma": "data:image/png",
        "a file": "file:///etc/passwd",
        "http": "http://127.0.0.1:9/x.png",
        "metadata": "http://169.254.169.254/latest/meta-data",
        "no URL": "picture.png",
        "nothing": "",
        "ftp": "ftp://host/x",
        "long": "x" * 100_000,
    }
    as_written = {
        "in lines": encoded(good["webp"]).replace(",", ",\n").replace("A", "A\r\n "),
        "URL-safe": encoded(good["webp"]).replace("+", "-").replace("/", "_")
        .replace("data:image_png", "data:image/png").rstrip("="),
    }  # fmt: skip
    return (
        {name: (encoded(data), True) for name, data in good.items()}
        | {name: (url, True) for name, url in as_written.items()}
        | {name: (encoded(data), False) for name, data in bad.items()}
        | {name: (url, False) for name, url in urls.items()}
    )


PICTURES = pictures()
SAMPLE = encoded((SAMPLES / "shapes-1.jpg").read_bytes(), "image/jpeg")
ODD = [None, True, False, 0, -1, 1, 64, 2**31, 2**63, 10**400, 0.5, 1e308, "", "64", "\x00", "💥",
       [], [1], [[]], {}, {"tokens": 1}, {"a": {"b": []}}, "x" * 5000]  # fmt: skip
KNOBS = ("tokens", "ratio", "total_tokens", "alpha", "object_layer", "buffer", "score", "method",
         "min_pixels", "max_pixels", "max_tiles", "unknown", "")  # fmt: skip
OPTIONS = ("temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stop_token_ids",
           "logit_bias", "top_logprobs", "prompt_logprobs", "min_tokens", "max_tokens", "priority",
           "response_format", "tools", "tool_choice", "structured_outputs", "mm_processor_kwargs",
           "bad_words", "chat_template", "truncate_prompt_tokens", "stream", "stream_options",
           )  # fmt: skip
FORMS = (  # which the demo model's vocabulary has no words for, or which are none
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
    {"structured_outputs": {"json": {"$ref": "#"}}},
    {"structured_outputs": {"grammar": "root ::= "}},
    {"structured_outputs": {"regex": "("}},
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"choice": [f"word{i}" for i in range(60_000)]}},  # long to prepare
    {"structured_outputs": {"regex": "(.{0,999}x){0,999}"}},
)
KINDS = (  # well formed, and in the wrong place, form or size
    {"extra_body": {"hiprune": {"tokens": 1}}},
    {"metadata": {"hiprune": "1"}},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"hiprune": {}}}}]},
    {"HiPrune": {"tokens": 1}},
    {"echo": True, "add_generation_prompt": False},
    {"echo": True, "add_generation_prompt": False, "stream": True},
    {"truncate_prompt_tokens": 3},
    {"stop": "\ud800"},
    {"user": "\udfff"},
    {"kv_transfer_params": {"prompt_token_ids": [1, 2, 3]}},
)
ROLES = ("system", "assistant", "tool", "developer", "critic")


def chat(url=SAMPLE, plan=None, **part):
    image = {"type": "image_url", "image_url": {"url": url}, **part}
    body = {
        "model": MODEL,
        "max_tokens": 4,
        "temperature": 0,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, image]}],
    }
    return body if plan is None else body | {"hiprune": plan}


def crowd(count, distinct, plan):
    """Many pictures in one request."""
    urls = [encoded(saved(Image.new("RGB", (8, 8), (i, 99, 0)))) for i in range(distinct)]
    parts = [{"type": "image_url", "image_url": {"url": urls[i % distinct]}} for i in range(count)]
    return chat() | {"hiprune": plan, "messages": [{"role": "user", "content": parts}]}


def places(value, path=()):
    """Paths of everything in a body."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def put(value, path, odd):
    """The body with `odd` at a path."""
    if not path:
        return odd
    copied = value.copy()
    copied[path[0]] = put(copied[path[0]], path[1:], odd)
    return copied


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


LARGE = (  # well formed, and slow to read unless somebody takes care
    (CHAT, chat() | {f"key{i}": i for i in range(4000)} | {"tool_calls": 5}),
    (CHAT, chat() | {f"key{i}": i for i in range(4000)} | {"structured_outputs": 5}),
    (CHAT, chat() | {"metadata": nested(90)}),
    (CHAT, chat() | {"metadata": nested(400)}),
    (RESPONSES, {"model": MODEL, "input": [{"a": 1}] * 2000}),
    (RESPONSES, {"model": MODEL, "input": [1] * 5000}),
    (RESPONSES, {"model": MODEL, "input": nested(90)}),
    (MESSAGES, {"model": MODEL, "max_tokens": 2, "messages": [{}] * 5000}),
    (CHAT, chat() | {"allowed_token_ids": [1] * 300_000}),
    (CHAT, chat() | {"stop": [""] * 5000}),
)


def corpus():
    """(route, body) pairs without end; the first are one of each kind."""
    for url, _ in PICTURES.values():
        yield CHAT, chat(url, {"tokens": 20})
        yield EXPLAIN, {"image_url": url, "hiprune": {"tokens": 20}}
        part = {"type": "input_image", "image_url": url}
        yield RESPONSES, {"model": MODEL, "input": [{"role": "user", "content": [part]}],
                          "max_output_tokens": 2}  # fmt: skip
    for option, odd in itertools.product(OPTIONS, ODD):
        yield CHAT, chat() | {option: odd}
    yield from LARGE
    for form in FORMS:
        yield CHAT, chat() | form
    for kind in KINDS:
        yield CHAT, chat() | kind
    for text in ("<image>", "a\0b", "\ud800", "<image>" * 50):
        yield CHAT, put(chat(), ("messages", 0, "content", 0, "text"), text)
    for role in ROLES:
        said = {"role": role, "tool_call_id": "a", "content": chat()["messages"][0]["content"]}
        yield CHAT, chat() | {"messages": [said, *chat()["messages"]]}
    for plan in ({"tokens": 9}, {"tokens": 10}, {"tokens": 9, "method": "random"}):
        named = chat(plan=plan, uuid="named")
        yield CHAT, named
        yield CHAT, put(named, ("messages", 0, "content", 1, "image_url"), None)
        yield f"{CHAT}/batch", chat(plan=plan) | {"messages": [chat()["messages"]]}
    for count, distinct in ((64, 64), (999, 1), (1000, 1), (2000, 1)):
        yield CHAT, crowd(count, distinct, {"tokens": 1})
    for knob, odd in itertools.product(KNOBS, ODD):
        yield CHAT, chat(plan={knob: odd})
        yield CHAT, chat(hiprune={knob: odd})
        yield EXPLAIN, {"image_url": SAMPLE, "hiprune": {knob: odd}}
    dice = random.Random(0)
    plan = {"tokens": 64, "alpha": 0.2, "method": "hiprune"}
    image = {"type": "base64", "media_type": "image/jpeg", "data": SAMPLE.partition(",")[2]}
    bodies = [
        (CHAT, chat(plan=plan, hiprune=plan)),
        (RESPONSES, {"model": MODEL, "max_output_tokens": 2, "hiprune": plan, "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"},
             {"type": "input_image", "image_url": SAMPLE, "hiprune": plan}]}]}),
        (MESSAGES, {"model": MODEL, "max_tokens": 2, "hiprune": plan, "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"},
             {"type": "image", "source": image, "hiprune": plan}]}]}),
        (EXPLAIN, {"image_url": {"url": SAMPLE}, "hiprune": plan}),
    ]  # fmt: skip
    while True:
        route, body = dice.choice(bodies)
        yield route, put(body, dice.choice(list(places(body))), dice.choice(ODD))


class Behaved(threading.Thread):
    """Asks the same question over and over; notes every answer that is not the first one's."""

    def __init__(self, server, number):
        super().__init__()
        self.plan = {"tokens": 32 + 16 * number, "method": ("hiprune", "attention")[number % 2]}
        self.server, self.stop, self.wrong, self.answers = server, threading.Event(), [], 0
        self.expected = self.ask()

    def ask(self):
        body = chat(plan=self.plan) | {"max_tokens": 30}
        answer = HTTP.post(self.server.url + CHAT, json=body).json()
        return answer["choices"][0]["message"]["content"], answer["hiprune"]

    def run(self):
        while not self.stop.is_set():
            try:
                answer = self.ask()
            except Exception as error:
                answer = repr(error)
            self.answers += 1
            if answer != self.expected:
                self.wrong.append(answer)


@pytest.fixture
def behaved(server):
    clients = [Behaved(server, number) for number in range(8)]
    for client in clients:
        client.start()
    yield clients
    for client in clients:
        client.stop.set()
    for client in clients:
        client.join(60)
        assert not client.is_alive()
        assert client.answers > 3
        assert client.wrong == []
    until(lambda: under_way(server) == 0, 20)
    assert httpx.get(f"{server.url}/health").status_code == 200


def send(server, route, body):
    try:
        content = json.dumps(body).encode()
    except ValueError:  # an integer too long to be written
        content = b'{"hiprune": {"tokens": ' + b"9" * 401 + b"}}"
    headers = {"Content-Type": "application/json"}
    answer = HTTP.post(server.url + route, content=content, headers=headers)
    secrets = ("Traceback", "site-packages", "/work", str(SAMPLES.parent), " at 0x")
    told = answer.text if answer.status_code != 200 else ""
    return answer.status_code, told, [one for one in secrets if one in told]


def test_mutated_requests(server, behaved):
    found = []
    with ThreadPoolExecutor(8) as pool:
        asked = list(itertools.islice(corpus(), REQUESTS))
        for (route, body), (status, told, leaks) in zip(
            asked, pool.map(lambda one: send(server, *one), asked), strict=True
        ):
            if status >= 500 or leaks:
                found.append((route, str(body)[:300], status, told[:300], leaks))
    assert found == [], f"{len(found)} of {REQUESTS}"


@pytest.mark.parametrize("name", PICTURES)
def test_an_odd_picture_is_served_or_refused_with_its_field(server, name):
    url, served = PICTURES[name]
    answer = server.post(CHAT, chat(url, {"tokens": 20}))
    assert answer.status_code == (200 if served else 400), answer.text
    if served:
        assert answer.json()["hiprune"]["images"][0]["tokens_kept"] == 20
    elif url:  # without one vLLM itself refuses the part
        assert answer.json()["error"]["param"] == "image_url"
        assert "image_url" in answer.json()["error"]["message"]


def generated(operation, url, found):
    """Sends requests made from an operation; notes 5xx in `found` and returns how many it sent."""
    sent = []

    @seed(0)
    @settings(max_examples=GENERATED, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=operation.as_strategy())
    def one(case):
        sent.append(1)
        answer = case.call(base_url=url, timeout=60)
        if answer.status_code >= 500:
            found.append((operation.path, str(case.body)[:300], answer.text[:300]))

    one()
    return len(sent)


def test_requests_made_from_the_openapi_document(server, behaved):
    document = httpx.get(f"{server.url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    for name in ("PrunedChatRequest", "PrunedResponsesRequest", "PrunedMessagesRequest"):
        assert schemas[name]["properties"]["hiprune"] == {
            "$ref": "#/components/schemas/HiPrunePlan"
        }
    assert schemas["HiPrunePlan"]["properties"]["object_layer"]["maximum"] == 7
    schema = schemathesis.openapi.from_dict(document)
    found, sent = [], 0
    for route in OURS:
        for method in document["paths"][route]:
            sent += generated(schema[route][method], server.url, found)
    assert sent > 100
    assert found == []
