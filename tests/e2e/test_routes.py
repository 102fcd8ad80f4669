"""Budgets on the Responses and the Messages API: the same answers as a chat with the same plan."""

import json
import time

import httpx
import pytest
from vllm.entrypoints.anthropic import protocol as anthropic
from vllm.entrypoints.openai.responses import protocol as responses

from tests.e2e.serving import running, serve
from tests.photos import data_url, photo

QUESTION = "What is this?"
CAT, CUP = (data_url(photo(name).resize((336, 336))) for name in ("chelsea", "coffee"))
# Releases of vLLM differ in what they call an answer that is cut, and an error.
CUT = "incomplete" if hasattr(responses, "OpenAIResponseIncompleteEvent") else "completed"
TRANSLATED = hasattr(anthropic, "translate_error_type")
CHAT = "/v1/chat/completions"
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
    if route == CHAT:
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


def media_tokens(usage):
    """Of a prompt, as any of the APIs tells it."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    return details["image_tokens"], details["video_tokens"]


@pytest.mark.parametrize("route", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("stream", [False, True])
def test_every_usage_tells_how_much_of_the_prompt_its_pictures_are(server, route, stream):
    for parts, keys, expected in (
        ([CAT, CUP], {"hiprune": {"tokens": 40}}, 80),
        ([CAT], {}, 576),
        ([], {}, 0),
    ):
        asked = body(server, route, *(image(route, url) for url in parts), **keys)
        if not stream:
            usages = [server.post(route, asked).json()["usage"]]
        else:
            asked |= {"stream": True}
            if route == CHAT:
                asked["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
            lines = server.post(route, asked).text.splitlines()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            holders = [
                holder
                for event in events
                for holder in (event, event.get("message"), event.get("response"))
                if holder
            ]
            usages = [holder["usage"] for holder in holders if holder.get("usage")]
            assert len(usages) >= {CHAT: 8, RESPONSES: 1, MESSAGES: 2}[route]
        assert {media_tokens(usage) for usage in usages} == {(expected, 0)}


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
    assert [events[0]["type"], events[-1]["type"]] == ["response.created", f"response.{CUT}"]
    assert events[-1]["response"]["status"] == "incomplete"  # eight tokens are no whole answer
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


def test_an_error_of_the_messages_api_has_the_type_that_this_vllm_gives_it(server):
    answer = server.post(MESSAGES, body(server, MESSAGES, image(MESSAGES, CAT, hiprune=[])))
    told = answer.json()
    assert told["type"] == "error"
    wanted = "invalid_request_error" if TRANSLATED else "BadRequestError"
    assert told["error"]["type"] == wanted
    missing = body(server, MESSAGES) | {"model": "nobody's"}
    told = server.post(MESSAGES, missing).json()
    assert told["error"]["type"] == ("not_found_error" if TRANSLATED else "NotFoundError")


@pytest.mark.parametrize("route", [CHAT, RESPONSES, MESSAGES, "/v1/hiprune/explain"])
def test_a_client_that_goes_away_leaves_nothing_behind(server, route):
    """vLLM answers nobody, with nothing or with an empty body: neither may be an error of ours."""
    before = server.log.read_text()
    # Before the engine has it, and while it works; explaining takes less than that.
    for delay in (0.02,) if route.endswith("explain") else (0.02, 0.3):
        picture = data_url(photo("rocket").resize((300, 200 + int(1000 * delay))))
        if route.endswith("explain"):
            asked = {"model": server.model, "image_url": {"url": picture}, "overlay": True}
        else:
            longer = {"max_output_tokens" if route == RESPONSES else "max_tokens": 2000}
            asked = body(server, route, image(route, picture)) | longer
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + route, json=asked, timeout=httpx.Timeout(30, read=delay))
    deadline = time.monotonic() + 20
    while server.total("vllm:num_requests_running"):
        assert time.monotonic() < deadline, "the engine works for nobody"
        time.sleep(0.1)
    assert ask(server, CHAT, image(CHAT, CAT, hiprune={"tokens": 9}))
    said = server.log.read_text().removeprefix(before)
    assert "Traceback" not in said
    assert " 500 " not in said


@pytest.mark.parametrize("route", [RESPONSES, MESSAGES])
def test_processor_options_of_a_client_stay_refused(server, route):
    answer = server.post(
        route,
        body(server, route, image(route, CAT), mm_processor_kwargs={"hiprune": {"tokens": 5}}),
    )
    assert answer.status_code == 400
    # The Messages API has no such field, and nothing is dropped that has to do with a budget.
    wanted = "mm_processor_kwargs.hiprune" if route == MESSAGES else "mm_processor_kwargs"
    assert wanted in answer.json()["error"]["message"]


def test_other_routes_refuse_a_budget(server):
    for route in ("/v1/completions", "/v1/chat/completions/batch", "/tokenize", "/invocations"):
        answer = server.post(route, {"model": server.model, "prompt": "x", "hiprune": {}})
        assert answer.status_code == 400
        assert "/v1/chat/completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_request_does_not_harm_the_next_one_for_its_picture(server, stream):
    """The front end has noted the picture as sent, but the engine has never seen it."""
    picture = data_url(photo("rocket").resize((100, 100 + stream)))
    refused = body(server, CHAT, image(CHAT, picture), hiprune={"tokens": 9}, top_k=-2)
    assert server.post(CHAT, refused).status_code == 400
    good = body(server, CHAT, image(CHAT, picture), hiprune={"tokens": 9}, stream=stream)
    answer = server.post(CHAT, good)
    assert answer.status_code == 200, answer.text
    assert '"error"' not in answer.text
    assert '"tokens_kept":9' in answer.text


def test_counting_tokens_does_not_harm_the_message_that_is_then_sent(server):
    picture = image(MESSAGES, data_url(photo("rocket").resize((90, 90))))
    counted = ask(server, COUNT, picture, hiprune={"tokens": 11})
    sent = ask(server, MESSAGES, picture, hiprune={"tokens": 11})
    assert sent["usage"]["input_tokens"] == counted["input_tokens"]


PLAN = {"tokens": 64}


@pytest.mark.parametrize(
    ("route", "keys", "part", "field"),
    [
        (CHAT, {"extra_body": {"hiprune": PLAN}}, {}, "extra_body.hiprune"),
        (RESPONSES, {"extra_body": {"hiprune": PLAN}}, {}, "extra_body.hiprune"),
        (MESSAGES, {"extra_body": {"hiprune": PLAN}}, {}, "extra_body.hiprune"),
        (CHAT, {"metadata": {"hiprune": "64"}}, {}, "metadata.hiprune"),
        (RESPONSES, {"metadata": {"hiprune": "64"}}, {}, "metadata.hiprune"),
        (CHAT, {"vllm_xargs": {"hiprune": 64}}, {}, "vllm_xargs.hiprune"),
        (MESSAGES, {"metadata": {"user_id": "x", "hiprune": 64}}, {}, "metadata.hiprune"),
        (CHAT, {"Hiprune": PLAN}, {}, "Hiprune"),
        (CHAT, {}, {"image_url": {"url": CAT, "hiprune": PLAN}},
         "messages[0].content[1].image_url.hiprune"),
        (MESSAGES, {}, {"source": {"type": "base64", "data": "AAAA", "hiprune": PLAN}},
         "messages[0].content[1].source.hiprune"),
    ],
)  # fmt: skip
def test_a_budget_in_a_place_where_nobody_reads_it_is_refused(server, route, keys, part, field):
    answer = server.post(route, body(server, route, image(route, CAT) | part, **keys))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(field)
    assert error.get("param", field) == field  # the Messages API has an envelope of its own


def test_a_batch_with_a_budget_is_refused_with_its_path(server):
    asked = body(server, CHAT, image(CHAT, CAT, hiprune=PLAN))
    answer = server.post(f"{CHAT}/batch", asked | {"messages": [asked["messages"]]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0][0].content[1].hiprune"
    without = body(server, CHAT, image(CHAT, CAT))
    served = server.post(f"{CHAT}/batch", without | {"messages": [without["messages"]]})
    assert served.status_code == 200


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_pictures_in_messages_of_other_roles_are_answered_with_their_budget(server, role):
    found = {"role": role, "content": [image(CHAT, CUP, hiprune={"tokens": 20})]}
    if role == "tool":
        found["tool_call_id"] = "a"
    asked = body(server, CHAT, image(CHAT, CAT, hiprune={"tokens": 90}))
    question = {"role": "user", "content": "And here?"}
    answer = server.post(CHAT, asked | {"messages": [*asked["messages"], found, question]})
    assert answer.status_code == 200, answer.text
    assert kept(answer.json()) == [(90, "image"), (20, "image")]


def test_a_picture_that_a_function_has_found_is_answered_with_its_budget(server):
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    found = {"type": "function_call_output", "call_id": "c",
             "output": [image(RESPONSES, CUP, hiprune={"tokens": 20})]}  # fmt: skip
    asked = body(server, RESPONSES, image(RESPONSES, CAT), hiprune={"tokens": 90})
    answer = server.post(RESPONSES, asked | {"input": [*asked["input"], call, found]})
    assert answer.status_code == 200, answer.text
    assert kept(answer.json()) == [(90, "request"), (20, "image")]


def test_a_picture_in_the_system_prompt_of_the_messages_api_is_refused_by_its_place(server):
    answer = server.post(MESSAGES, body(server, MESSAGES, system=[image(MESSAGES, CAT)]))
    assert answer.status_code == 400
    assert "system[0] must not be a picture" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_is_the_text_of_the_last_message(server, stream):
    keys = {"echo": True, "add_generation_prompt": False, "stream": stream}
    asked = body(server, CHAT, image(CHAT, CAT), {"type": "text", "text": "Or this?"}, **keys)
    answer = server.post(CHAT, asked)
    assert answer.status_code == 200, answer.text
    if stream:
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        assert not any("error" in json.loads(line) for line in lines)
        deltas = [json.loads(line)["choices"][0]["delta"].get("content") for line in lines]
        said = "".join(text for text in deltas if text)
    else:
        said = text_of(answer.json())
    assert said.startswith(f"{QUESTION}\nOr this?")


def test_a_picture_is_served_by_its_name_alone_or_has_to_be_sent_again(server):
    named = image(CHAT, CAT, uuid="cat")
    alone = {"type": "image_url", "image_url": None, "uuid": "cat"}
    first = ask(server, CHAT, named, hiprune=PLAN)
    again = ask(server, CHAT, alone, hiprune=PLAN)
    assert text_of(again) == text_of(first)
    assert kept(again) == [(64, "request")]
    answer = server.post(CHAT, body(server, CHAT, alone, hiprune={"tokens": 65}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "uuid"
    assert "send the picture itself again" in answer.json()["error"]["message"]
    assert text_of(ask(server, CHAT, named, hiprune={"tokens": 65}))


@pytest.mark.parametrize(
    ("text", "keys", "field"),
    [
        ("What is <image>?", {}, "messages"),
        ("x", {"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ("half \ud800 a pair", {}, "messages[0].content[1].text"),
        ("x", {"stop": ["\udfff"]}, "stop[0]"),
        ("x", {"model": "\ud800"}, "model"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_by_its_name(server, text, keys, field):
    parts = {"type": "text", "text": text}, image(CHAT, CAT)
    answer = server.post(CHAT, json.dumps(body(server, CHAT, *parts, **keys)))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert kept(ask(server, CHAT, image(CHAT, CAT))) == [(576, "default")]
