"""Image embeddings beside a default budget, without caches, with a template that is picky."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from hiprune_server.demo import CHECKPOINT
from tests.e2e.serving import content, running, serve
from tests.photos import data_url, photo

CHAT = "/v1/chat/completions"
WIDTH = 128  # of the checkpoint's text model
CAT, CUP = (data_url(photo(name).resize((336, 336))) for name in ("chelsea", "coffee"))
TEXT = {"type": "text", "text": "What is this?"}


@pytest.fixture(scope="module")
def server(tmp_path_factory, clip_checkpoint):
    template = str(CHECKPOINT / "chat_template.jinja")
    flags = ["--enable-mm-embeds", "--hiprune-default", '{"tokens": 64}']
    uncached = ["--mm-processor-cache-gb", "0", "--no-enable-prefix-caching"]
    command = serve(clip_checkpoint, *flags, *uncached, "--chat-template", template)
    with running(command, tmp_path_factory.mktemp("log")) as one:
        yield one


def saved(tensor):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def embeds(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = saved(torch.randn(rows, WIDTH, generator=generator)) if isinstance(rows, int) else rows
    return {"type": "image_embeds", "image_embeds": text}


def post(server, *parts, before=(), **keys):
    messages = [*before, {"role": "user", "content": list(parts)}]
    asked = {"model": server.model, "temperature": 0, "max_tokens": 8, "messages": messages}
    return server.post(CHAT, asked | keys)


def answer(server, *parts, **keys):
    got = post(server, *parts, **keys)
    assert got.status_code == 200, got.text
    return got.json()


def test_embeddings_are_served_as_they_are_whatever_the_default(server):
    alone = answer(server, TEXT)["usage"]["prompt_tokens"]
    for rows in ([5], [7], [5, 7], [9, 9, 3]):
        got = answer(server, TEXT, *(embeds(n, n) for n in rows))
        assert got["usage"]["prompt_tokens"] == alone + sum(rows)
    picture = answer(server, *content([CAT]))
    assert [one["tokens_kept"] for one in picture["hiprune"]["images"]] == [64]


def test_embeddings_of_many_lengths_and_pictures_are_answered_side_by_side(server):
    asked = [(embeds(n, n),) for n in (3, 5, 7, 11)] + [tuple(content([CAT])[1:])] * 2
    expected = [answer(server, TEXT, *parts)["choices"][0]["message"] for parts in asked]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda parts: answer(server, TEXT, *parts), asked * 4))
    assert [one["choices"][0]["message"] for one in found] == expected * 4


@pytest.mark.parametrize(
    "odd",
    [
        "",
        "AAAA",
        "%%%",
        base64.b64encode(bytes(range(250))).decode(),
        base64.b64encode(base64.b64decode(saved(torch.zeros(5, WIDTH)))[:500]).decode(),
        saved(torch.zeros(0, WIDTH)),
        saved(torch.zeros(5, WIDTH - 1)),
        saved({"a": torch.zeros(5, WIDTH)}),
    ],
)
def test_embeddings_that_are_none_are_a_400_and_the_engine_lives(server, odd):
    got = post(server, TEXT, embeds(odd))
    assert got.status_code == 400, got.text
    assert got.json()["error"]["param"] == "image_embeds"
    assert answer(server, TEXT, embeds(5))
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_embeddings_cannot_be_pruned(server):
    for got in (
        post(server, TEXT, embeds(5), hiprune={"tokens": 3}),
        post(server, TEXT, embeds(5) | {"hiprune": {"tokens": 3}}),
    ):
        assert got.status_code == 400
        assert got.json()["error"]["param"] == "hiprune"


def test_random_draws_are_the_same_for_the_same_picture_without_any_cache(server):
    plan = {"tokens": 40, "method": "random"}

    def said(picture, **keys):
        part = content([picture])[1] | keys
        return answer(server, TEXT, part, hiprune=plan)["choices"][0]["message"]["content"]

    # The name is the running number that vLLM gives to pictures where both caches are off.
    names = [{}, {}, *({"uuid": f"renderer0-mm-{n}-image-0"} for n in range(1, 60, 4))]
    assert {said(CAT, **name) for name in names} == {said(CAT)}
    assert said(CAT) != said(CUP)


def test_a_template_that_leaves_pictures_out_is_told_with_the_role(server):
    for role in ("system", "assistant", "tool"):
        before = [{"role": role, "tool_call_id": "a", "content": content([CUP])}]
        got = post(server, *content([CAT]), before=before)
        assert got.status_code == 400
        assert got.json()["error"]["param"] == "messages"
        assert f"leaves out pictures in {role} messages" in got.json()["error"]["message"]


def test_a_picture_by_its_name_alone_has_to_be_sent_where_nothing_is_kept(server):
    part = content([CAT])[1]
    assert answer(server, TEXT, part | {"uuid": "cat"})
    got = post(server, TEXT, {"type": "image_url", "image_url": None, "uuid": "cat"})
    assert got.status_code == 400
    assert got.json()["error"]["param"] == "uuid"
