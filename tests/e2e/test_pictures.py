"""Pictures of the kinds that clients have, in the words that they use, through the demo server."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from hiprune_server.demo import SAMPLES
from tests import hosts
from tests.e2e.serving import BIN, running
from tests.hosts import BAD_HOSTS, BAD_URLS, png, wrapped
from tests.tiffs import tiff


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    command = [str(BIN / "hiprune-serve"), "--demo", "--allowed-media-domains", "127.0.0.1"]
    bounds = {"VLLM_IMAGE_FETCH_TIMEOUT": "2", "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": "1"}
    folder = tmp_path_factory.mktemp("log")
    with running(command, folder, model="hiprune-demo", environment=bounds) as one:
        yield one


@pytest.fixture(scope="module")
def host():
    with hosts.serving() as url:
        yield url


GREY = Image.open(SAMPLES / "shapes-1.jpg").convert("L")
WIDE = np.asarray(GREY).astype(np.uint16) * 257
QUESTIONS = [
    question for question, _ in json.loads((SAMPLES / "questions.json").read_text())["shapes-1.jpg"]
]
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
EXPLAIN = "/v1/hiprune/explain"


def in_base64(data):
    return base64.b64encode(data).decode()


def body(route, picture, question="Read the card.", **part):
    """A request about a picture: the text of a data URL behind its comma, or another URL."""
    remote = picture.startswith("http")
    url = picture if remote else f"data:image/png;base64,{picture}"
    if route == EXPLAIN:
        return {"image_url": url, "hiprune": {"tokens": 64}}
    if route == MESSAGES:
        source = {"type": "base64", "media_type": "image/png", "data": picture}
        source = {"type": "url", "url": url} if remote else source
        image = {"type": "image", "source": source}
    elif route == RESPONSES:
        image = {"type": "input_image", "image_url": url, **part}
    else:
        image = {"type": "image_url", "image_url": {"url": url, **part}}
    text = {"type": "input_text" if route == RESPONSES else "text", "text": question}
    asked = [{"role": "user", "content": [text, image]}]
    return {
        "model": "hiprune-demo", "temperature": 0,
        **({"input": asked, "max_output_tokens": 20} if route == RESPONSES
           else {"messages": asked, "max_tokens": 20}),
    }  # fmt: skip


def answer(server, route, *args, **kwargs):
    got = server.post(route, body(route, *args, **kwargs))
    assert got.status_code == 200, got.text
    told = got.json()
    if route == EXPLAIN:
        return told["parts"]
    if route == CHAT:
        return told["choices"][0]["message"]["content"]
    content = told["output"][0]["content"] if route == RESPONSES else told["content"]
    return content[0]["text"]


DEEP = {
    "16-bit PNG": png(Image.fromarray(WIDE)),
    "16-bit TIFF, big endian": tiff(WIDE, ">"),
    "F": tiff(WIDE.astype(np.float32)),
}


@pytest.mark.parametrize("name", DEEP)
def test_grey_of_16_and_32_bits_is_answered_as_the_8_bit_picture(server, name):
    plain, deep = in_base64(png(GREY)), in_base64(DEEP[name])
    for question in QUESTIONS:
        expected = answer(server, CHAT, plain, question)
        assert "mixed up" not in expected
        assert answer(server, CHAT, deep, question) == expected


@pytest.mark.parametrize("route", [CHAT, RESPONSES, MESSAGES, EXPLAIN])
def test_every_route_reads_16_bits_in_base64_as_people_write_it(server, route):
    plain, deep = in_base64(png(GREY)), DEEP["16-bit PNG"]
    expected = answer(server, route, plain)
    for text in (
        wrapped(in_base64(deep)),
        wrapped(in_base64(deep), 64, "\r\n"),
        base64.urlsafe_b64encode(deep).decode().rstrip("="),
    ):
        assert answer(server, route, text) == expected


@pytest.mark.parametrize("route", [CHAT, RESPONSES, MESSAGES, EXPLAIN])
@pytest.mark.parametrize("path", BAD_URLS)
def test_what_is_wrong_with_a_url_is_a_400(server, host, route, path):
    got = server.post(route, body(route, f"{host}/{path}"))
    assert got.status_code == 400, got.text
    error = got.json()["error"]
    assert BAD_URLS[path] in error["message"]
    assert error.get("param", "image_url") == "image_url"
    assert host.rpartition(":")[2] not in got.text


@pytest.mark.parametrize("route", [CHAT, RESPONSES, MESSAGES, EXPLAIN])
@pytest.mark.parametrize("path", BAD_HOSTS)
def test_what_is_wrong_with_a_host_is_a_502_or_504(server, host, route, path):
    status, told = BAD_HOSTS[path]
    got = server.post(route, body(route, f"{host}/{path}"))
    assert got.status_code == status, got.text
    assert got.json()["error"]["message"] == f"image_url cannot be fetched now: {told}"
    assert f"image_url on 127.0.0.1: {told}" in server.log.read_text()


def test_a_picture_of_a_host_that_works_is_served(server, host):
    assert answer(server, CHAT, f"{host}/picture")


@pytest.mark.parametrize("route", [CHAT, RESPONSES])
def test_detail_is_what_it_is_at_openai(server, route):
    def asked(**detail):
        return server.post(route, body(route, in_base64(png(GREY)), **detail))

    def images(got):
        return got.json().get("hiprune", {}).get("images")

    whole = {"tokens_full": 576, "tokens_kept": 576, "method": "hiprune"}
    assert images(asked(detail="original")) == [whole | {"source": "detail"}]
    assert images(asked(detail=None)) == images(asked()) == images(asked(detail="auto"))
    got = asked(detail="LOW")
    assert got.status_code == 400
    place = (
        "input[0].content[1].detail"
        if route == RESPONSES
        else "messages[0].content[1].image_url.detail"
    )
    assert got.json()["error"]["param"] == place
    assert "must be one of auto, low, high, original, got 'LOW'" in got.json()["error"]["message"]
