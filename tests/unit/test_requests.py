import time

import pytest
from pydantic import ValidationError
from vllm.exceptions import VLLMValidationError

from hiprune_server.routes.requests import (
    PrunedChatRequest,
    PrunedCountTokensRequest,
    PrunedMessagesRequest,
    PrunedResponsesRequest,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def refusal(model, body):
    with pytest.raises(VLLMValidationError) as refused:
        model.model_validate(body)
    return refused.value


@pytest.mark.parametrize("odd", [True, 0, 1.5, "x", [], [1]])
def test_what_vllm_stumbles_over_is_refused_by_its_name(odd):
    error = refusal(PrunedChatRequest, CHAT | {"structured_outputs": odd})
    assert error.parameter == "structured_outputs"
    assert "structured_outputs must be" in str(error)


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**400])
@pytest.mark.parametrize("model", [PrunedChatRequest, PrunedMessagesRequest])
def test_an_integer_that_no_message_to_the_engine_can_carry_is_refused(model, number):
    assert refusal(model, CHAT | {"max_tokens": 5, "top_k": number}).parameter == "top_k"
    nested = CHAT | {"max_tokens": 5, "tools": [{"a": number}]}
    assert refusal(model, nested).parameter == "tools[0].a"


def test_good_requests_and_their_budgets_stay_as_they_are():
    plan = {"tokens": 64}
    chat = PrunedChatRequest.model_validate(CHAT | {"top_k": 2**31, "hiprune": plan})
    assert chat.top_k == 2**31
    assert chat.hiprune == plan
    asked = PrunedResponsesRequest.model_validate({"model": "m", "input": "Hi", "hiprune": plan})
    assert asked.hiprune == plan


def test_other_mistakes_are_told_as_vllm_tells_them():
    with pytest.raises(ValidationError, match="temperature"):
        PrunedChatRequest.model_validate(CHAT | {"temperature": "warm"})


@pytest.mark.parametrize("odd", ["tool_calls", "structured_outputs"])
def test_the_field_is_found_among_thousands_of_others(odd):
    body = CHAT | {f"key{i}": i for i in range(3000)} | {"structured_outputs": 5}
    assert refusal(PrunedChatRequest, body | {odd: 5}).parameter == "structured_outputs"


def test_where_two_fields_cannot_be_read_one_is_named():
    error = refusal(PrunedChatRequest, CHAT | {"structured_outputs": 5, "messages": 5})
    assert error.parameter in ("structured_outputs", "messages")


@pytest.mark.parametrize("depth", [10, 5_000])
def test_a_large_integer_is_found_however_deep(depth):
    value = 2**70
    for _ in range(depth):
        value = [value]
    error = refusal(PrunedChatRequest, CHAT | {"metadata": value})
    assert error.parameter == "metadata" + "[0]" * depth


def chat(content):
    return PrunedChatRequest, {"model": "m", "messages": [{"role": "user", "content": content}]}


def responses(items, **more):
    return PrunedResponsesRequest, {"model": "m", "input": items} | more


def messages(items):
    return PrunedMessagesRequest, {"model": "m", "max_tokens": 1, "messages": items}


PICTURE = {"type": "input_image", "detail": "auto", "image_url": "data:x", "hiprune": {"tokens": 3}}
SOURCE = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
SHAPES = {
    "extra keys": lambda n: (
        PrunedChatRequest,
        CHAT | {f"key{i}": 1 for i in range(n)} | {"structured_outputs": 5},
    ),
    "extra keys of an unused name": lambda n: (
        PrunedChatRequest,
        CHAT | {f"key{i}": 1 for i in range(n)} | {"tool_calls": 5, "structured_outputs": 5},
    ),
    "parts": lambda n: chat([{"type": "text", "text": "a"}] * n),
    "odd parts": lambda n: chat([{}] * n),
    "numbers for parts": lambda n: chat([1] * n),
    "a long string": lambda n: chat("\\" * n * 100),
    "messages": lambda n: (PrunedChatRequest, CHAT | {"messages": CHAT["messages"] * n}),
    "wide and deep": lambda n: (PrunedChatRequest, CHAT | {"metadata": [[[[1] * n] * 2] * 2]}),
    "items": lambda n: responses([{"role": "user", "content": "a"}] * n),
    "odd items": lambda n: responses([{"a": 1}] * n),
    "numbers for items": lambda n: responses([1] * n),
    "odd parts of an item": lambda n: responses([{"role": "user", "content": [{}] * n}]),
    "odd tools": lambda n: responses("a", tools=[{"type": "function"}] * n),
    "wishes": lambda n: responses([{"role": "user", "content": [PICTURE] * n}]),
    "wishes in blocks": lambda n: messages(
        [
            {
                "role": "user",
                "content": [{"type": "image", "source": SOURCE, "hiprune": {"tokens": 3}}] * n,
            }
        ]
    ),
    "misplaced wishes": lambda n: messages([{"role": "user", "content": "a", "hiprune": {}}] * n),
    "odd messages": lambda n: messages([{}] * n),
}


def seconds(model, body):
    """Of this thread, the best of several."""
    best = float("inf")
    for _ in range(5):
        began = time.thread_time()
        try:
            model.model_validate(body)
        except (VLLMValidationError, ValidationError) as error:
            if isinstance(error, ValidationError):
                error.errors()
        best = min(best, time.thread_time() - began)
    return best


@pytest.mark.parametrize("shape", SHAPES)
def test_reading_takes_time_in_proportion_to_the_body(shape):
    size, times = 500, 4
    small, large = seconds(*SHAPES[shape](size)), seconds(*SHAPES[shape](size * times))
    # Four times as much: quadratic reading would take 16 times as long. What does not depend on
    # the size is in both.
    assert large / small < 2.2 * times


def test_wrong_items_cost_no_more_than_right_ones():
    """20 kB of them took 13 seconds: each is wrong in more than two hundred ways."""
    right, wrong = SHAPES["items"](1000), SHAPES["odd items"](1000)
    assert seconds(*wrong) < seconds(*right)


@pytest.mark.parametrize(
    "model", [PrunedChatRequest, PrunedResponsesRequest, PrunedMessagesRequest,
              PrunedCountTokensRequest],
)  # fmt: skip
def test_only_the_first_wrong_element_of_a_list_is_told(model):
    field = "input" if model is PrunedResponsesRequest else "messages"
    with pytest.raises(ValidationError) as refused:
        model.model_validate({"model": "m", "max_tokens": 5, field: [5, 6, 7]})
    places = {error["loc"] for error in refused.value.errors()}
    assert not any(1 in place or 2 in place for place in places)
