"""Budgets on the Responses and the Messages API: the same answers as a chat with the same plan."""

import json

import httpx
import pytest

from tests.e2e.serving import running, serve
from tests.photos import data_url, photo

QUESTION = "What is this?"
CAT, CUP = (data_url(photo(name).resize((336, 336))) for name in ("chelsea", "coffee"))
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"


@pytest.fixture(scope="module")
def server(tmp_path_factory, clip_checkpoint):
    command = serve(clip_checkpoint)
    stored = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with running(command, tmp_path_factory.mktemp("log"), environment=stored) as one:
        yield one


def image(route, url, **keys):
    """An image part as each API has it."""
    if route == RESPONSES:
        return {"type": "input_image", "image_url": url, **keys}
    if route == "/v1/chat/completions":
        return {"type": "image_url", "image_url": {"url": url}, **keys}
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": kind, "data": data},
        **keys,
    }


def body(server, route, *parts, **keys):
    text = {"type": "input_text" if route == RESPONSES else "text", "text": QUESTION}
    messages = [{"role": "user", "content": [text, *parts]}]
    named = {"input": messages} if route == RESPONSES else {"messages": messages}
    length = {"max_output_tokens": 8} if route == RESPONSES else {"max_tokens": 8}
    return {"model": server.model, "temperature": 0, **named, **length, **keys}


def ask(server, route, *parts, **keys):
    answer = server.post(route, body(server, route, *parts, **keys))
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(answer):
    if "choices" in answer:
        return answer["choices"][0]["message"]["content"]
    content = answer["output"][0]["content"] if "output" in answer else answer["content"]
    return content[0]["text"]


def prompt_tokens(answer):
    usage = answer["usage"]
    return usage.get("prompt_tokens", usage.get("input_tokens"))


def kept(answer):
    return [(one["tokens_kept"], one["source"]) for one in answer["hiprune"]["images"]]


CASES = [
    # plans of two images, plan of the request, what is reported
    ((None, None), None, [(576, "default"), (576, "default")]),
    ((None, None), {"tokens": 40}, [(40, "request"), (40, "request")]),
    (({"tokens": 30}, {"tokens": 90}), None, [(30, "image"), (90, "image")]),
    (({"tokens": 90}, {"tokens": 30}), None, [(90, "image"), (30, "image")]),
    ((None, {"ratio": 0.1, "method": "stride"}), {"tokens": 64}, [(64, "request"), (58, "image")]),
    ((None, None), {"total_tokens": 100}, [(50, "request"), (50, "request")]),
]


@pytest.mark.parametrize("route", [RESPONSES, MESSAGES])
@pytest.mark.parametrize(("plans", "whole", "expected"), CASES)
def test_an_answer_is_that_of_a_chat_with_the_same_plan(server, route, plans, whole, expected):
    def asked(at):
        parts = [
            image(at, url, **({} if plan is None else {"hiprune": plan}))
            for url, plan in zip((CAT, CUP), plans, strict=True)
        ]
        return ask(server, at, *parts, **({} if whole is None else {"hiprune": whole}))

    chat, answer = asked("/v1/chat/completions"), asked(route)
    assert kept(answer) == kept(chat) == expected
    assert text_of(answer) == text_of(chat)
    assert prompt_tokens(answer) == prompt_tokens(chat)


def test_detail_means_something_in_responses(server):
    answer = ask(server, RESPONSES, image(RESPONSES, CAT, detail="low"))
    assert kept(answer) == [(64, "detail")]
    both = image(RESPONSES, CAT, detail="low", hiprune={"tokens": 70})
    assert kept(ask(server, RESPONSES, both)) == [(70, "image")]


def test_a_later_turn_keeps_the_wish_of_an_earlier_picture(server):
    first = ask(server, RESPONSES, image(RESPONSES, CAT, hiprune={"tokens": 33}))
    more = {"model": server.model, "input": "And now?", "previous_response_id": first["id"]}
    second = server.post(RESPONSES, {**more, "temperature": 0, "max_output_tokens": 8}).json()
    assert kept(second) == [(33, "image")]
    got = httpx.get(f"{server.url}{RESPONSES}/{first['id']}").json()
    assert kept(got) == [(33, "image")]


def test_a_picture_in_a_tool_result_has_its_own_budget(server):
    result = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [image(MESSAGES, CUP, hiprune={"tokens": 20})],
    }
    answer = ask(server, MESSAGES, image(MESSAGES, CAT, hiprune={"tokens": 90}), result)
    # vLLM puts what tools have found before the rest of the message.
    assert kept(answer) == [(20, "image"), (90, "image")]


def test_tokens_are_counted_as_kept(server):
    part = image(MESSAGES, CAT, hiprune={"tokens": 70})
    counted = ask(server, COUNT, part)["input_tokens"]
    assert counted == prompt_tokens(ask(server, MESSAGES, part))
    assert ask(server, COUNT, image(MESSAGES, CAT))["input_tokens"] == counted + 506


def streamed(server, route, *parts):
    answer = server.post(route, body(server, route, *parts, stream=True))
    assert answer.status_code == 200
    lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_streams_report_at_their_beginning(server):
    part = {"hiprune": {"tokens": 70}}
    events = streamed(server, RESPONSES, image(RESPONSES, CAT, **part))
    for event in (events[0], events[-1]):
        assert kept(event["response"]) == [(70, "image")]
    assert [events[0]["type"], events[-1]["type"]] == ["response.created", "response.completed"]
    whole = ask(server, RESPONSES, image(RESPONSES, CAT, **part))
    said = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    assert said == text_of(whole)
    events = streamed(server, MESSAGES, image(MESSAGES, CAT, **part))
    assert kept(events[0]["message"]) == [(70, "image")]
    assert "hiprune" not in json.dumps(events[1:])


REFUSED = [
    (RESPONSES, {"hiprune": {"tokens": 0}}, {}, "input[0].content[1].hiprune.tokens"),
    (RESPONSES, {"hiprune": {"total_tokens": 9}}, {}, "input[0].content[1].hiprune.total_tokens"),
    (RESPONSES, {}, {"hiprune": {"x": 1}}, "hiprune.x"),
    (RESPONSES, {}, {"hiprune": None}, "hiprune"),
    (RESPONSES, {"type": "input_text", "text": "x", "hiprune": {}}, {},
     "input[0].content[1].hiprune"),
    (MESSAGES, {"hiprune": []}, {}, "messages[0].content[1].hiprune"),
    (MESSAGES, {}, {"hiprune": {"ratio": 2}}, "hiprune.ratio"),
    (MESSAGES, {}, {"system": [{"type": "text", "text": "x", "hiprune": {}}]}, "system[0].hiprune"),
    (COUNT, {}, {"hiprune": {"ratio": 0}}, "hiprune.ratio"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "part", "keys", "field"), REFUSED)
def test_what_cannot_be_served_is_refused_with_its_place(server, route, part, keys, field):
    answer = server.post(route, body(server, route, image(route, CAT) | part, **keys))
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"]
    if route == RESPONSES:  # the Messages API has an envelope of its own
        assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize("route", [RESPONSES, MESSAGES])
def test_processor_options_of_a_client_stay_refused(server, route):
    answer = server.post(
        route,
        body(server, route, image(route, CAT), mm_processor_kwargs={"hiprune": {"tokens": 5}}),
    )
    assert answer.status_code == 400
    # The Messages API has no such field, and nothing is dropped that has to do with a budget.
    wanted = "mm_processor_kwargs.hiprune" if route == MESSAGES else "mm_processor_kwargs"
    assert answer.json()["error"]["param"] == wanted


def test_other_routes_refuse_a_budget(server):
    for route in ("/v1/completions", "/v1/chat/completions/batch", "/tokenize", "/invocations"):
        answer = server.post(route, {"model": server.model, "prompt": "x", "hiprune": {}})
        assert answer.status_code == 400
        assert "/v1/chat/completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_request_does_not_harm_the_next_one_for_its_picture(server, stream):
    """The front end has noted the picture as sent, but the engine has never seen it."""
    chat = "/v1/chat/completions"
    picture = data_url(photo("rocket").resize((100, 100 + stream)))
    refused = body(server, chat, image(chat, picture), hiprune={"tokens": 9}, top_k=-2)
    assert server.post(chat, refused).status_code == 400
    good = body(server, chat, image(chat, picture), hiprune={"tokens": 9}, stream=stream)
    answer = server.post(chat, good)
    assert answer.status_code == 200, answer.text
    assert '"error"' not in answer.text
    assert '"tokens_kept":9' in answer.text


def test_counting_tokens_does_not_harm_the_message_that_is_then_sent(server):
    picture = image(MESSAGES, data_url(photo("rocket").resize((90, 90))))
    counted = ask(server, COUNT, picture, hiprune={"tokens": 11})
    sent = ask(server, MESSAGES, picture, hiprune={"tokens": 11})
    assert sent["usage"]["input_tokens"] == counted["input_tokens"]
