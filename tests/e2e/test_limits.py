"""The operator's presets and limits over HTTP, read from a file."""

import httpx
import pytest
from openai import BadRequestError

from tests.e2e.serving import running, serve
from tests.photos import data_url, photo

SETTINGS = """
presets: {low: {tokens: 50}, original: {tokens: 300}}
limits: {min_tokens: 16, max_tokens: 400, methods: [hiprune, attention], fixed: [object_layer],
         max_full_tokens: 1800}
"""
QUESTION = {"type": "text", "text": "What is this?"}


@pytest.fixture(scope="module")
def server(tmp_path_factory, clip_checkpoint):
    folder = tmp_path_factory.mktemp("limits")
    (folder / "settings.yaml").write_text(SETTINGS)
    command = serve(clip_checkpoint, "--hiprune-config", str(folder / "settings.yaml"))
    with running(command, folder) as one:
        yield one


@pytest.fixture(scope="module")
def picture():
    return data_url(photo("coffee").resize((336, 336)))


def ask(server, picture, *, detail=None, own=None, plan=None):
    part = {"type": "image_url", "image_url": {"url": picture}}
    if detail is not None:
        part["image_url"]["detail"] = detail
    if own is not None:
        part["hiprune"] = own
    return server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": [QUESTION, part]}],
        temperature=0,
        max_tokens=8,
        extra_body={} if plan is None else {"hiprune": plan},
    )


@pytest.mark.parametrize(
    ("wish", "kept", "source"),
    [
        ({}, 400, "default"),  # all 576, held within the limits
        ({"detail": "auto"}, 400, "default"),
        ({"detail": "low"}, 50, "detail"),
        ({"detail": "high"}, 400, "detail"),
        ({"detail": "original"}, 300, "detail"),
        ({"detail": "low", "plan": {"tokens": 100}}, 50, "detail"),
        ({"detail": "auto", "plan": {"tokens": 100}}, 100, "request"),
        ({"detail": "low", "own": {"tokens": 70}}, 70, "image"),
        ({"detail": "low", "own": {"alpha": 0.3}}, 50, "detail"),
    ],
)
def test_who_decides_how_much_stays(server, picture, wish, kept, source):
    answer = ask(server, picture, **wish)
    (image,) = answer.model_extra["hiprune"]["images"]
    assert (image["tokens_kept"], image["source"]) == (kept, source)
    assert (
        answer.usage.prompt_tokens - kept
        == ask(server, picture, own={"tokens": 16}).usage.prompt_tokens - 16
    )


def test_a_preset_answers_as_the_same_plan_does(server, picture):
    by_detail = ask(server, picture, detail="low").choices[0].message.content
    assert by_detail == ask(server, picture, plan={"tokens": 50}).choices[0].message.content


@pytest.mark.parametrize(
    ("wish", "field", "limit"),
    [
        ({"plan": {"tokens": 15}}, "hiprune.tokens", "limits.min_tokens"),
        ({"plan": {"tokens": 401}}, "hiprune.tokens", "limits.max_tokens"),
        ({"plan": {"ratio": 1.0}}, "hiprune.ratio", "limits.max_tokens"),
        ({"plan": {"total_tokens": 3}}, "hiprune.total_tokens", "limits.min_tokens"),
        ({"plan": {"method": "random"}}, "hiprune.method", "limits.methods"),
        ({"plan": {"object_layer": 2}}, "hiprune.object_layer", "limits.fixed"),
        ({"own": {"ratio": 0.01}}, "hiprune.ratio", "limits.min_tokens"),
        ({"own": {"tokens": 1}}, "messages[0].content[1].hiprune.tokens", "limits.min_tokens"),
        ({"detail": "medium"}, "detail", "low"),
    ],
)
def test_a_wish_outside_the_limits_is_a_400_that_names_the_limit(
    server, picture, wish, field, limit
):
    with pytest.raises(BadRequestError) as refused:
        ask(server, picture, **wish)
    assert field in refused.value.body["message"]
    assert limit in refused.value.body["message"]
    assert ask(server, picture).choices  # nobody is harmed


def test_get_hiprune_shows_presets_and_limits(server):
    told = httpx.get(f"{server.url}/v1/hiprune").json()
    assert told["presets"] == {
        "low": {"tokens": 50},
        "high": {"ratio": 1.0},
        "original": {"tokens": 300},
    }
    tokens = told["limits"]["tokens"]
    assert (tokens["type"], tokens["minimum"], tokens["maximum"]) == ("integer", 16, 400)
    assert tokens["description"].startswith("visual tokens kept per picture")
    assert told["limits"]["method"]["enum"] == ["hiprune", "attention"]
    assert "object_layer" not in told["limits"]
    assert told["limits"]["max_full_tokens"] == 1800


def chat_part(picture, **own):
    return {"type": "image_url", "image_url": {"url": picture}, **own}


MANY = {
    "/v1/chat/completions": lambda server, picture, count: {
        "messages": [{"role": "user", "content": [QUESTION, *[chat_part(picture)] * count]}],
        "max_tokens": 2,
    },
    "/v1/responses": lambda server, picture, count: {
        "input": [
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "What?"},
                    *[{"type": "input_image", "image_url": picture, "detail": "low"}] * count,
                ],
            }
        ],
        "max_output_tokens": 2,
    },
    "/v1/messages": lambda server, picture, count: {
        "messages": [
            {
                "role": "user",
                "content": [
                    QUESTION,
                    *[
                        {
                            "type": "image",
                            "source": {
                                "type": "base64",
                                "media_type": "image/png",
                                "data": picture.partition(",")[2],
                            },
                        }
                    ]
                    * count,
                ],
            }
        ],
        "max_tokens": 2,
    },
}
MANY["/v1/messages/count_tokens"] = MANY["/v1/messages"]


@pytest.mark.parametrize("plan", [{"tokens": 16}, {}])
@pytest.mark.parametrize("route", MANY)
def test_more_tokens_before_pruning_than_the_limit_are_a_400_that_names_it(
    server, picture, route, plan
):
    """Pruned or not: three pictures of 576 are within 1,800, the same four are not."""
    body = {"model": server.model, "hiprune": plan}
    if route.endswith("count_tokens"):
        body.pop("hiprune")
    fits = server.post(route, body | MANY[route](server, picture, 3))
    assert fits.status_code == 200, fits.text
    refused = server.post(route, body | MANY[route](server, picture, 4))
    assert refused.status_code == 400
    told = refused.json()["error"]["message"]
    assert "at most 1800 visual tokens" in told
    assert "limits.max_full_tokens" in told
    assert "got 2304 in 4 images" in told


def test_pictures_that_are_named_by_uuid_alone_count_too(server, picture):
    def asked(*parts):
        message = {"role": "user", "content": [QUESTION, *parts]}
        body = {"model": server.model, "messages": [message], "max_tokens": 2}
        return server.post("/v1/chat/completions", body | {"hiprune": {"tokens": 16}})

    known = {"type": "image_url", "image_url": None, "uuid": "seen"}
    assert asked(chat_part(picture, uuid="seen")).status_code == 200
    assert asked(*[known] * 3).status_code == 200
    refused = asked(*[known] * 4)
    assert refused.status_code == 400
    assert "limits.max_full_tokens" in refused.json()["error"]["message"]


ROUTES = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
    "/tokenize": {"prompt": "Hello"},
}


@pytest.mark.parametrize("route", ROUTES)
def test_other_routes_refuse_a_budget_and_are_vllms_without(server, route):
    body = {"model": server.model, **ROUTES[route]}
    assert server.post(route, body).status_code == 200
    refused = server.post(route, {**body, "hiprune": {"tokens": 64}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "hiprune"
    assert route in refused.json()["error"]["message"]


def scraped(server):
    """Sample -> value of our metrics."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for sample in server.samples()
        if sample.name.startswith("hiprune_")
    }


def test_metrics_count_what_answers_say(server, picture):
    before = scraped(server)
    ask(server, picture, detail="low")
    part = {"type": "image_url", "image_url": {"url": picture}}
    stream = server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": [QUESTION, part]}],
        max_tokens=3,
        stream=True,
        extra_body={"hiprune": {"tokens": 70, "method": "attention"}},
    )
    assert list(stream)
    for wish in ({"tokens": 1}, {"ratio": 1.0}, {"unheard": 1}):
        with pytest.raises(BadRequestError):
            ask(server, picture, plan=wish)
    server.post("/v1/completions", {"model": server.model, "prompt": "x", "hiprune": {}})
    after = scraped(server)

    def more(name, **labels):
        key = (name, *sorted(labels.items()))
        return after[key] - before.get(key, 0.0)

    assert more("hiprune_images_total", method="hiprune", source="detail") == 1
    assert more("hiprune_images_total", method="attention", source="request") == 1
    assert more("hiprune_visual_tokens_full_total", kind="image") == 2 * 576
    assert more("hiprune_visual_tokens_kept_total", kind="image") == 50 + 70
    assert more("hiprune_kept_ratio_count") == 2
    assert more("hiprune_kept_ratio_sum") == pytest.approx(120 / 576)
    # From the worker; a picture that was seen before may not be scored again.
    assert 1 <= more("hiprune_selection_seconds_count") <= 2
    assert 0 < more("hiprune_selection_seconds_sum") < 10
    assert 1 <= more("hiprune_encoder_seconds_count") <= 2
    assert more("hiprune_selection_seconds_sum") < more("hiprune_encoder_seconds_sum") < 20
    for label in ("1-64", "65-128"):
        assert more("hiprune_time_to_first_token_seconds_count", kept_tokens=label) == 1
        assert 0 < more("hiprune_time_to_first_token_seconds_sum", kept_tokens=label) < 60
    for reason in ("tokens", "ratio", "unknown_field", "route"):
        assert more("hiprune_rejected_requests_total", reason=reason) == 1
