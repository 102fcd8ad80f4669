"""A plan for each image of a request, and a total that they share, over HTTP."""

import json

import pytest
from openai import BadRequestError

from tests.e2e.serving import running, serve
from tests.photos import data_url, photo

FULL, HALF = 576, 288
DEFAULT = {"ratio": 0.5, "method": "attention"}
QUESTION = {"type": "text", "text": "What is this?"}
PICTURES = {name: photo(name).resize((336, 336)) for name in ("chelsea", "coffee", "rocket")}
CAT, CUP, ROCKET = PICTURES.values()
TWO_BUDGETS = "must not have both tokens and total_tokens, got tokens 50 and total_tokens 100"


@pytest.fixture(scope="module")
def server(tmp_path_factory, clip_checkpoint):
    command = serve(clip_checkpoint, "--hiprune-default", json.dumps(DEFAULT))
    with running(command, tmp_path_factory.mktemp("log")) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def text_tokens(server):
    """Prompt tokens of `QUESTION` without any image."""
    return ask(server).usage.prompt_tokens


def image(picture, plan=None, **keys):
    """An image part; `plan` None for one without a `hiprune` key."""
    part = {"type": "image_url", "image_url": {"url": data_url(picture)}, **keys}
    return part if plan is None else {**part, "hiprune": plan}


def user(*parts, **keys):
    return {"role": "user", "content": list(parts), **keys}


def chat(server, messages, plan=None, **options):
    return server.client.chat.completions.create(
        model=server.model,
        messages=messages,
        **{"temperature": 0, "max_tokens": 8, **options},
        extra_body={} if plan is None else {"hiprune": plan},
    )


def ask(server, *images, plan=None):
    return chat(server, [user(QUESTION, *images)], plan)


def text(response):
    return response.choices[0].message.content


def report(response):
    images = response.model_extra["hiprune"]["images"]
    assert all(image["tokens_full"] == FULL for image in images)
    return [(image["tokens_kept"], image["method"], image["source"]) for image in images]


def kept(response):
    return [tokens for tokens, _, _ in report(response)]


OWN = {
    "chelsea": ({"tokens": 30}, (30, "attention", "image")),
    "coffee": (None, (HALF, "attention", "default")),
    "rocket": ({"tokens": 64, "method": "stride"}, (64, "stride", "image")),
}
ORDERS = [
    (["chelsea", "coffee", "rocket"], {"coffee"}),
    (["rocket", "coffee", "chelsea"], {"rocket", "chelsea"}),
    (["coffee", "rocket", "chelsea"], {"rocket"}),
    (["coffee", "chelsea", "rocket"], {"coffee", "chelsea"}),
]


@pytest.mark.parametrize(("order", "seen"), ORDERS)
def test_every_image_keeps_its_plan_in_any_order_seen_before_or_new(
    server, text_tokens, order, seen
):
    def parts(names, identity):
        # Under a `uuid` of its own a picture is new to all caches.
        return [
            image(PICTURES[name], OWN[name][0], uuid=f"{identity} {order} {name}") for name in names
        ]

    assert report(ask(server, *parts(sorted(seen), "mixed")))
    mixed = ask(server, *parts(order, "mixed"))
    new = ask(server, *parts(order, "new"))
    assert report(mixed) == report(new) == [OWN[name][1] for name in order]
    assert mixed.usage.prompt_tokens == new.usage.prompt_tokens == text_tokens + sum(kept(new))
    assert text(mixed) == text(new)


def test_one_picture_under_several_plans_in_one_request(server, text_tokens):
    plans = [{"tokens": tokens} for tokens in (30, 31, 576, 30)]
    response = ask(server, *(image(CAT, plan) for plan in plans))
    assert kept(response) == [30, 31, 576, 30]
    assert response.usage.prompt_tokens == text_tokens + 667


def test_a_plan_belongs_to_its_image_not_to_its_place(server):
    plans = [{"tokens": 64, "method": method} for method in ("stride", "hiprune")]
    straight = ask(server, image(CAT, plans[0]), image(CUP, plans[1]))
    crossed = ask(server, image(CAT, plans[1]), image(CUP, plans[0]))
    assert straight.usage.prompt_tokens == crossed.usage.prompt_tokens
    assert report(straight) == report(crossed)[::-1]
    assert text(straight) != text(crossed)


@pytest.mark.parametrize(
    ("whole", "own", "expected"),
    [
        (None, None, (HALF, "attention", "default")),
        (None, {}, (HALF, "attention", "default")),
        (None, {"tokens": 30}, (30, "attention", "image")),
        (None, {"method": "stride"}, (HALF, "stride", "default")),
        ({"alpha": 0.5}, None, (HALF, "attention", "default")),
        ({"tokens": 50}, None, (50, "attention", "request")),
        ({"tokens": 50}, {}, (50, "attention", "request")),
        ({"tokens": 50}, {"alpha": 0.5}, (50, "attention", "request")),
        ({"tokens": 50}, {"ratio": 0.25}, (144, "attention", "image")),
        ({"ratio": 0.25}, {"tokens": 50}, (50, "attention", "image")),
        ({"tokens": 50}, {"ratio": 1}, (FULL, "attention", "image")),
        ({"method": "stride", "tokens": 50}, {"tokens": 30}, (30, "stride", "image")),
        ({"method": "stride", "tokens": 50}, {"method": "hiprune"}, (50, "hiprune", "request")),
        ({"total_tokens": 100}, {"method": "stride"}, (100, "stride", "request")),
        ({"total_tokens": 100}, {"tokens": 30}, (30, "attention", "image")),
    ],
)
def test_image_over_request_over_default_field_by_field(server, text_tokens, whole, own, expected):
    response = ask(server, image(CAT, own), plan=whole)
    if whole is None and own is None:
        assert text(response) == text(ask(server, image(CAT, DEFAULT)))
    assert report(response) == [expected]
    assert response.usage.prompt_tokens == text_tokens + expected[0]


def test_fields_of_part_and_request_make_one_plan(server):
    knobs = {"method": "hiprune", "alpha": 0.8, "buffer": "square", "object_layer": 6}
    split = ask(server, image(ROCKET, {"tokens": 60}), plan=knobs)
    together = ask(server, image(ROCKET), plan={"tokens": 60, **knobs})
    assert text(split) == text(together)
    assert report(split) == [(60, "hiprune", "image")]
    assert report(together) == [(60, "hiprune", "request")]
    assert text(split) != text(ask(server, image(ROCKET, {"tokens": 60})))


@pytest.mark.parametrize(
    ("total", "own", "expected"),
    [
        (100, [None, None], [50, 50]),
        (101, [None, None], [51, 50]),
        (2, [None, None], [1, 1]),
        (10**6, [None, None], [FULL, FULL]),
        (100, [{"tokens": 30}, None], [30, 100]),
        (100, [None, {"ratio": 0.25}, None], [50, 144, 50]),
        (100, [None, {"method": "stride"}], [50, 50]),
        (1, [{"tokens": 30}, None], [30, 1]),
        (1, [{"tokens": 30}, {"tokens": 40}], [30, 40]),
    ],
)
def test_a_total_is_shared_by_the_images_without_a_budget(
    server, text_tokens, total, own, expected
):
    pictures = [CAT, CUP, ROCKET][: len(own)]
    parts = [image(picture, plan) for picture, plan in zip(pictures, own, strict=True)]
    response = ask(server, *parts, plan={"total_tokens": total})
    assert kept(response) == expected
    has_budget = [plan is not None and plan.keys() & {"tokens", "ratio"} for plan in own]
    sources = [source for _, _, source in report(response)]
    assert sources == ["image" if budget else "request" for budget in has_budget]
    assert response.usage.prompt_tokens == text_tokens + sum(expected)


def assert_refused(server, messages, param, message, plan=None, **options):
    with pytest.raises(BadRequestError) as error:
        chat(server, messages, plan, **options)
    assert error.value.param == param
    assert error.value.body["message"].startswith(f"{param} {message}")
    # Nobody else is harmed, and the very picture works with a good plan.
    assert kept(ask(server, image(CAT, {"tokens": 30}))) == [30]


@pytest.mark.parametrize(
    ("plan", "own", "param", "message"),
    [
        ({"total_tokens": 1}, None, ".total_tokens", "must be at least 1 for each of 2 images"),
        ({"total_tokens": 2}, {}, ".total_tokens", "must be at least 1 for each of 3 images"),
        ({"total_tokens": 0}, None, ".total_tokens", "must be an integer in [1, 2147483647]"),
        ({"total_tokens": 100, "tokens": 50}, None, "", TWO_BUDGETS),
    ],
)
def test_a_bad_total_is_a_400_and_the_next_request_works(server, plan, own, param, message):
    parts = [image(CAT), image(CUP)] + ([] if own is None else [image(ROCKET, own)])
    assert_refused(server, [user(QUESTION, *parts)], f"hiprune{param}", message, plan)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("own", "field", "message"),
    [
        ({"tokens": 0}, ".tokens", "must be an integer in [1, 2147483647], got 0"),
        ({"total_tokens": 5}, ".total_tokens", "is unknown; allowed are tokens, ratio, alpha"),
        ({"budget": 5}, ".budget", "is unknown; allowed are"),
        ({"object_layer": 8}, ".object_layer", "must be an integer in [1, 7], got 8"),
        ({"tokens": 5, "ratio": 0.5}, "", "must not have both tokens and ratio"),
        (30, "", "must be an object, got 30"),
        ([], "", "must be an object, got an array"),
    ],
)
def test_a_bad_plan_in_a_part_is_a_400_that_names_it(server, own, field, message, stream):
    messages = [user(QUESTION, image(CAT, own))]
    param = f"messages[0].content[1].hiprune{field}"
    assert_refused(server, messages, param, message, stream=stream)


def test_null_as_the_plan_of_a_part_is_a_400(server):
    messages = [user(QUESTION, image(CAT, hiprune=None))]
    assert_refused(server, messages, "messages[0].content[1].hiprune", "must be an object")


def test_a_plan_where_it_has_no_effect_is_a_400_that_says_where_it_belongs(server):
    plan = {"tokens": 30}
    within_url = {"url": data_url(CAT), "hiprune": plan}
    for messages, param, message in (
        (
            [user({**QUESTION, "hiprune": plan}, image(CAT))],
            "messages[0].content[0].hiprune",
            "must stand in an image or video part, this part is none",
        ),
        (
            [user(QUESTION, image(CAT), hiprune=plan)],
            "messages[0].hiprune",
            "must stand in an image part or at the top of the request",
        ),
        (
            [user(QUESTION), {"role": "assistant", "content": "A cat.", "hiprune": {}}],
            "messages[1].hiprune",
            "must stand in an image part or at the top of the request",
        ),
        (
            [user(QUESTION, {"type": "image_url", "image_url": within_url})],
            "messages[0].content[1].image_url.hiprune",
            "must stand in the image part itself, beside image_url",
        ),
    ):
        assert_refused(server, messages, param, message)


def prefix_cache_hits(server):
    return server.total("vllm:prefix_cache_hits_total")


def test_two_spellings_of_one_budget_share_their_cache_entries(server):
    hubble = photo("hubble")
    first = ask(server, image(hubble, {"ratio": 0.3333}))
    before = prefix_cache_hits(server)
    second = ask(server, image(hubble, {"tokens": 192}))
    # The text in front of the image is shorter than that.
    assert prefix_cache_hits(server) - before >= 128
    assert text(first) == text(second)
    assert report(first) == report(second) == [(192, "attention", "image")]
    assert first.usage.prompt_tokens == second.usage.prompt_tokens


def conversation(first, second, third):
    return [
        {"role": "system", "content": "You are terse."},
        user(image(CAT, first), QUESTION),
        {"role": "assistant", "content": "A cat."},
        user(QUESTION, image(CUP, second), {"type": "text", "text": "And this?"}),
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
        user(image(ROCKET, third)),
    ]


def test_plans_in_a_conversation_go_to_the_right_images(server):
    own = [{"tokens": 30}, None, {"tokens": 40, "method": "stride"}]
    response = chat(server, conversation(*own), {"tokens": 64})
    assert report(response) == [
        (30, "attention", "image"),
        (64, "attention", "request"),
        (40, "stride", "image"),
    ]
    one_each = chat(server, conversation(*[{"tokens": 1}] * 3))
    assert response.usage.prompt_tokens - one_each.usage.prompt_tokens == 30 + 64 + 40 - 3
    turned = chat(server, conversation(*own[::-1]), {"tokens": 64})
    assert kept(turned) == [40, 64, 30]
    assert turned.usage.prompt_tokens == response.usage.prompt_tokens
    assert text(turned) != text(response)
    assert text(chat(server, conversation(*own), {"tokens": 64})) == text(response)


def test_a_bad_plan_late_in_a_conversation_is_named_by_its_place(server):
    messages = conversation({"tokens": 30}, {"tokens": -1}, None)
    assert_refused(server, messages, "messages[3].content[1].hiprune.tokens", "must be an integer")


def test_fields_of_a_message_that_openai_does_not_know_change_no_plan(server, text_tokens):
    # vLLM then hands the parts over as an iterator instead of a list.
    first = user(QUESTION, image(CAT, {"tokens": 30}), reasoning=["none"])
    response = chat(server, [first])
    assert report(response) == [(30, "attention", "image")]
    assert response.usage.prompt_tokens == text_tokens + 30
    response = chat(server, [first, user(image(CUP, {"tokens": 40}))])
    assert kept(response) == [30, 40]
    bad = user(QUESTION, image(CAT, {"tokens": 0}), reasoning=["none"])
    assert_refused(server, [bad], "messages[0].content[1].hiprune.tokens", "must be an integer")


def test_a_part_that_is_no_part_is_a_400_and_the_next_request_works(server):
    detail = {"url": data_url(CAT), "detail": "no such detail"}
    part = {"type": "image_url", "image_url": detail, "hiprune": {"tokens": 30}}
    with pytest.raises(BadRequestError):
        chat(server, [user(QUESTION, part)])
    assert kept(ask(server, image(CAT, {"tokens": 30}))) == [30]
