"""`detail` of pictures, as OpenAI treats it."""

from typing import get_args

import pytest
from openai.types.responses.image_detail import ImageDetail

from hiprune_server.wishes.details import DETAILS, settled
from hiprune_vllm.plan import PlanError

URL = "data:image/png;base64,AA=="


def chat(**detail):
    part = {"type": "image_url", "image_url": {"url": URL, **detail}}
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, part]}]}


def responses(key="content", **detail):
    part = {"type": "input_image", "image_url": URL, **detail}
    return {"input": [{"role": "user", key: [part]}]}


FORMS = [
    (chat, "messages[0].content[1].image_url.detail"),
    (responses, "input[0].content[0].detail"),
    (lambda **detail: responses("output", **detail), "input[0].output[0].detail"),
]


def test_the_words_are_openais():
    assert sorted(DETAILS) == sorted(get_args(ImageDetail))


@pytest.mark.parametrize(("form", "_"), FORMS)
@pytest.mark.parametrize("word", DETAILS)
def test_openais_words_stay(form, _, word):
    assert settled(form(detail=word)) == form(detail=word)


@pytest.mark.parametrize(("form", "_"), FORMS)
def test_null_is_none(form, _):
    body = form(detail=None)
    assert settled(body) == form()
    assert body == form(detail=None)


@pytest.mark.parametrize(("form", "place"), FORMS)
@pytest.mark.parametrize("word", ["LOW", "High", "Original", " low", "", "medium", 1, ["low"], {}])
def test_another_word_or_case_is_refused_with_its_place_and_the_words(form, place, word):
    with pytest.raises(PlanError) as refusal:
        settled(form(detail=word))
    assert refusal.value.field == place
    assert f"must be one of auto, low, high, original, got {word!r}" in str(refusal.value)


@pytest.mark.parametrize(
    "body",
    [
        [],
        None,
        {"messages": None},
        {"messages": "Hi"},
        {"messages": [1, {"content": 5}, {"content": [None, "x", {"detail": "mine"}]}]},
        {"input": [{"content": [{"type": "input_file", "detail": "LOW"}]}]},
        {"input": "Hi"},
    ],
)
def test_what_is_no_pictures_detail_stays_as_it_is(body):
    assert settled(body) == body
