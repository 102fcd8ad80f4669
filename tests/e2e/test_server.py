"""The server over HTTP: the OpenAI SDK, budgets, clear errors, no harm done."""

import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import BadRequestError
from PIL import Image

from hiprune_vllm import __version__
from tests.e2e.serving import content, running, serve
from tests.photos import data_url, photo

FULL = 576


@pytest.fixture(scope="module")
def server(tmp_path_factory, clip_checkpoint):
    with running(serve(clip_checkpoint), tmp_path_factory.mktemp("log")) as running_server:
        yield running_server


def answer(response):
    return response.choices[0].message.content, response.usage.prompt_tokens


def report(response):
    return response.model_extra["hiprune"]["images"]


CAT, CUP = photo("chelsea"), photo("coffee")


@pytest.mark.parametrize(
    ("plan", "kept", "method"),
    [
        ({"tokens": 192}, 192, "hiprune"),
        ({"ratio": 1 / 9}, 64, "hiprune"),
        ({"tokens": 1}, 1, "hiprune"),
        ({"tokens": 128, "alpha": 0.5, "buffer": "square", "object_layer": 2}, 128, "hiprune"),
        ({"tokens": 128, "score": "cls"}, 128, "hiprune"),
        ({"tokens": 100, "method": "attention"}, 100, "attention"),
        ({"tokens": 100, "method": "random"}, 100, "random"),
        ({"tokens": 100, "method": "stride"}, 100, "stride"),
        ({"tokens": 577}, 576, "hiprune"),
        ({"tokens": 2**31 - 1}, 576, "hiprune"),
    ],
)
def test_usage_falls_by_exactly_the_tokens_dropped(server, plan, kept, method):
    full = server.ask([CAT])
    pruned = server.ask([CAT], extra_body={"hiprune": plan})
    assert report(full) == [
        {"tokens_full": FULL, "tokens_kept": FULL, "method": "hiprune", "source": "default"}
    ]
    assert report(pruned) == [
        {"tokens_full": FULL, "tokens_kept": kept, "method": method, "source": "request"}
    ]
    assert full.usage.prompt_tokens - pruned.usage.prompt_tokens == FULL - kept


def test_two_budgets_for_one_photo_back_to_back_in_both_orders(server):
    rocket = photo("rocket")
    plans = [{"tokens": 64}, {"tokens": 192}]
    first = [answer(server.ask([rocket], extra_body={"hiprune": plan})) for plan in plans]
    again = [answer(server.ask([rocket], extra_body={"hiprune": plan})) for plan in plans[::-1]]
    assert first == again[::-1]
    assert first[0][0] != first[1][0]
    assert first[1][1] - first[0][1] == 128


def test_two_images_with_one_budget(server):
    one = server.ask([CAT], extra_body={"hiprune": {"tokens": 50}})
    two = server.ask([CAT, CUP], extra_body={"hiprune": {"tokens": 50}})
    assert [image["tokens_kept"] for image in report(two)] == [50, 50]
    assert two.usage.prompt_tokens - one.usage.prompt_tokens == 50
    swapped = server.ask([CUP, CAT], extra_body={"hiprune": {"tokens": 50}})
    assert answer(swapped)[0] != answer(two)[0]


def test_concurrent_clients_get_the_answers_they_get_alone(server):
    images = [photo(name) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    requests = [
        (images[i % 4], plan)
        for i, plan in enumerate(
            [
                *({"tokens": tokens} for tokens in (1, 5, 17, 32, 64, 128, 192, 300, 575)),
                *({"ratio": 0.2, "method": m} for m in ("attention", "random", "stride")),
                {"tokens": 64, "score": "cls"},
                {"tokens": 64, "object_layer": 6, "buffer": "row"},
                {"tokens": 64, "alpha": 1.0},
                {},
            ]
        )
    ]
    assert len(requests) == 16

    def ask(request):
        image, plan = request
        # A sentence of their own keeps the prefix cache out of the first round.
        response = server.ask([image], "Describe it.", extra_body={"hiprune": plan})
        return answer(response), report(response)

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, requests))
    alone = [ask(request) for request in requests]
    assert together == alone


def cached_tokens(server):
    return server.total("vllm:prefix_cache_hits_total")


def test_a_prefix_cache_hit_gives_the_same_answer(server):
    ask = {"text": "Where is it?", "extra_body": {"hiprune": {"tokens": 200}}}
    hubble = photo("hubble")
    first = answer(server.ask([hubble], **ask))
    before = cached_tokens(server)
    assert answer(server.ask([hubble], **ask)) == first
    assert cached_tokens(server) > before
    other = answer(server.ask([hubble], "Where?", extra_body={"hiprune": {"tokens": 100}}))
    assert first[1] - other[1] == 100 + len(" is it")


def test_a_stream_reports_on_its_first_chunk(server):
    plan = {"tokens": 64}
    whole = server.ask([CAT], extra_body={"hiprune": plan})
    chunks = list(
        server.ask(
            [CAT],
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"hiprune": plan},
        )
    )
    assert [("hiprune" in (chunk.model_extra or {})) for chunk in chunks] == [
        True,
        *[False] * (len(chunks) - 1),
    ]
    assert report(chunks[0]) == report(whole)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_cancelled_stream_harms_nobody(server):
    expected = answer(server.ask([CAT], extra_body={"hiprune": {"tokens": 64}}))
    for _ in range(3):
        stream = server.ask([CUP], stream=True, max_tokens=500)
        next(iter(stream))
        stream.close()
    assert answer(server.ask([CAT], extra_body={"hiprune": {"tokens": 64}})) == expected


def test_several_choices_and_logprobs_are_still_vllms(server):
    response = server.ask(
        [CAT], n=2, temperature=1, logprobs=True, extra_body={"hiprune": {"tokens": 64}}
    )
    assert len(response.choices) == 2
    assert len(response.choices[0].logprobs.content) == 8
    assert len(report(response)) == 1


def test_a_text_only_request_is_answered(server):
    plain = server.ask([], "Hello")
    assert "hiprune" not in plain.model_extra
    with_plan = server.ask([], "Hello", extra_body={"hiprune": {"tokens": 5}})
    assert report(with_plan) == []
    assert answer(with_plan) == answer(plain)


MODES = {
    "grey": lambda image: image.convert("L"),
    "grey with alpha": lambda image: image.convert("LA"),
    "rgba": lambda image: image.convert("RGBA"),
    "palette": lambda image: image.convert("P"),
    "black and white": lambda image: image.convert("1"),
    "16 bit": lambda image: image.convert("I;16"),
    "one pixel": lambda image: image.resize((1, 1)),
    "thin": lambda image: image.resize((300, 2)),
    "large": lambda image: image.resize((3000, 2000)),
}


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_kind_are_served(server, mode):
    response = server.ask([MODES[mode](CAT)], extra_body={"hiprune": {"tokens": 64}})
    assert report(response)[0]["tokens_kept"] == 64


def test_jpegs_in_cmyk_and_turned_by_exif_are_served(server):
    turned = Image.Exif()
    turned[0x0112] = 6
    for image, options in ((CAT.convert("CMYK"), {}), (CAT, {"exif": turned})):
        url = data_url(image, "JPEG", **options)
        response = server.ask([url], extra_body={"hiprune": {"tokens": 64}})
        assert report(response)[0]["tokens_kept"] == 64


BAD = [
    (None, "hiprune", "must be an object, got null"),
    ([], "hiprune", "must be an object, got an array"),
    ("192", "hiprune", "must be an object, got '192'"),
    ({"budget": 5}, "hiprune.budget", "is unknown; allowed are"),
    ({"tokens": 0}, "hiprune.tokens", "must be an integer in [1, 2147483647], got 0"),
    ({"tokens": -5}, "hiprune.tokens", "got -5"),
    ({"tokens": 1.5}, "hiprune.tokens", "got 1.5"),
    ({"tokens": "192"}, "hiprune.tokens", "got '192'"),
    ({"tokens": True}, "hiprune.tokens", "got true"),
    ({"tokens": None}, "hiprune.tokens", "got null"),
    ({"tokens": 2**31}, "hiprune.tokens", "got 2147483648"),
    ({"ratio": 0}, "hiprune.ratio", "must be a number in (0, 1], got 0"),
    ({"ratio": 1.5}, "hiprune.ratio", "got 1.5"),
    ({"ratio": float("nan")}, "hiprune.ratio", "got nan"),
    ({"ratio": "0.5"}, "hiprune.ratio", "got '0.5'"),
    ({"tokens": 5, "ratio": 0.5}, "hiprune", "must not have both tokens and ratio"),
    ({"alpha": -0.1}, "hiprune.alpha", "must be a number in [0, 1], got -0.1"),
    ({"alpha": 2}, "hiprune.alpha", "got 2"),
    ({"object_layer": 0}, "hiprune.object_layer", "must be an integer in [1, 7], got 0"),
    ({"object_layer": 8}, "hiprune.object_layer", "got 8"),
    ({"object_layer": 99}, "hiprune.object_layer", "got 99"),
    ({"object_layer": 2.5}, "hiprune.object_layer", "got 2.5"),
    ({"buffer": "plus"}, "hiprune.buffer", "must be one of none, row, cross, square, got 'plus'"),
    ({"score": "local"}, "hiprune.score", "must be one of global, cls, got 'local'"),
    ({"method": "best"}, "hiprune.method", "must be one of hiprune, attention, random, stride"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("plan", "field", "message"), BAD)
def test_bad_plans_are_400_and_the_next_request_works(server, plan, field, message, stream):
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": content([CAT])}],
        "max_tokens": 4,
        "temperature": 0,
        "stream": stream,
    }
    response = server.post("/v1/chat/completions", json.dumps(body | {"hiprune": plan}))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(field)
    assert message in error["message"]
    assert {"type", "code"} <= set(error)
    assert server.post("/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("mm_processor_kwargs", {"hiprune": {"tokens": 5}}),
        ("media_io_kwargs", {"image": {"image_mode": "L"}}),
    ],
)
@pytest.mark.parametrize("plan", [{}, {"hiprune": {"tokens": 5}}])
def test_a_clients_own_processor_options_meet_vllms_refusal(server, field, options, plan):
    with pytest.raises(BadRequestError) as error:
        server.ask([CAT], extra_body={field: options, **plan})
    assert error.value.param == field
    assert "--trust-request-mm-kwargs" in error.value.message


def test_a_budget_among_the_options_of_loading_is_refused(server):
    with pytest.raises(BadRequestError) as error:
        server.ask([CAT], extra_body={"media_io_kwargs": {"hiprune": {"tokens": 5}}})
    assert error.value.param == "media_io_kwargs.hiprune"


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,AAAA",
        "data:image/png;base64,%%%",
        data_url(CAT)[:2000],
        "no url at all",
    ],
)
def test_an_undecodable_image_is_a_400_and_the_next_request_works(server, url):
    with pytest.raises(BadRequestError):
        server.ask([url], extra_body={"hiprune": {"tokens": 5}})
    assert report(server.ask([CAT], extra_body={"hiprune": {"tokens": 5}}))


def test_get_hiprune_describes_the_server(server):
    described = httpx.get(f"{server.url}/v1/hiprune").json()
    assert described["model"] == "small"
    assert described["supported"] is True
    assert described["family"] == "llava"
    assert described["versions"]["hiprune-vllm"] == __version__
    assert described["encoder"] == {"output_layer": 8, "has_cls": True}
    assert described["default"] == {
        "ratio": 1.0,
        "alpha": 0.1,
        "object_layer": 3,
        "buffer": "cross",
        "score": "global",
        "method": "hiprune",
    }
    layer = described["limits"]["object_layer"]
    assert (layer["type"], layer["minimum"], layer["maximum"]) == ("integer", 1, 7)
    assert described["videos"] == {"supported": False, "default": {"ratio": 1.0}}


def test_other_routes_stay_vllms(server):
    assert server.client.models.list().data[0].id == "small"
    completion = server.client.completions.create(
        model=server.model, prompt="Hello", max_tokens=3, temperature=0
    )
    assert completion.usage.completion_tokens == 3
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/hiprune", "/v1/responses", "/tokenize"} <= set(paths)


def test_start_up_prints_a_request_to_paste_that_works(server):
    log = server.log.read_text()
    assert f"small at {server.url}/v1" in log
    (command,) = re.findall(r"^  curl .*?^.*\}'$", log, flags=re.MULTILINE | re.DOTALL)
    assert '"hiprune": {"tokens": 192}' in command
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    ran = subprocess.run(["bash", "-c", command], capture_output=True, check=True, text=True)
    assert json.loads(ran.stdout)["hiprune"]["images"][0]["tokens_kept"] == 192
