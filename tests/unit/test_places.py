"""Where a budget may stand on each route; anywhere else, and in any spelling, its name is told."""

import gc
import json
import time

import pytest

from hiprune_server.wishes.places import OF_NUMBERS, PLACES, READ, fault, unread

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PLAN = {"tokens": 64}
OWN = [{"type": "image_url", "image_url": {"url": "x"}, "hiprune": PLAN}]


def refused(route, body):
    """The path and the text of a refusal; None where there is none."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    error = fault(route, text)
    return None if error is None else (error.field, str(error))


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {"hiprune": PLAN, "messages": [{"content": OWN}, {"role": "tool", "content": OWN}]}),
        (CHAT, {"mm_processor_kwargs": {"hiprune": [PLAN]}}),
        (RESPONSES, {"hiprune": None, "input": [{"content": OWN}, {"output": OWN}]}),
        (MESSAGES, {"messages": [{"content": [*OWN, {"type": "tool_result", "content": OWN}]}]}),
        ("/v1/messages/count_tokens", {"hiprune": PLAN}),
        ("/v1/hiprune/explain", {"hiprune": PLAN}),
        ("/tokenize", {"mm_processor_kwargs": {"hiprune": PLAN}}),
        ("/v1/completions", {"prompt": 'what is "hiprune"? {"hiprune": 1}'}),
        (CHAT, {"messages": [{"role": "user", "content": '{"hiprune": {}}'}]}),
        (CHAT, {"metadata": {"pruned": 1, "hiprune_run": 2}}),
    ],
)
def test_a_budget_in_its_place_and_the_word_in_a_text_are_handed_on(route, body):
    assert refused(route, body) is None


@pytest.mark.parametrize(
    ("route", "body", "field", "told"),
    [
        (CHAT, {"extra_body": {"hiprune": PLAN}}, "extra_body.hiprune", "at the top"),
        (RESPONSES, {"extra_body": {"a": [{"hiprune": 1}]}}, "extra_body.a[0].hiprune", "SDK"),
        (MESSAGES, {"extra_body": {"hiprune": PLAN}}, "extra_body.hiprune", "merged into the body"),
        (CHAT, {"metadata": {"hiprune": "64"}}, "metadata.hiprune", "image part or at the top"),
        (CHAT, {"vllm_xargs": {"hiprune": 64}}, "vllm_xargs.hiprune", "image part or at the top"),
        (CHAT, {"chat_template_kwargs": {"hiprune": 1}}, "chat_template_kwargs.hiprune", "top"),
        (CHAT, {"messages": [{"hiprune": PLAN, "content": "x"}]}, "messages[0].hiprune", "part"),
        (CHAT, {"messages": [{"content": [{"image_url": {"url": "x", "hiprune": PLAN}}]}]},
         "messages[0].content[0].image_url.hiprune", "in the image part itself, beside image_url"),
        (CHAT, {"messages": [{"content": [{"video_url": {"url": "x", "hiprune": PLAN}}]}]},
         "messages[0].content[0].video_url.hiprune", "in the video part itself, beside video_url"),
        (CHAT, {"messages": [[{"content": OWN}]]}, "messages[0][0].content[0].hiprune", "must"),
        (CHAT, {"tools": [{"function": {"parameters": {"properties": {"hiprune": {}}}}}]},
         "tools[0].function.parameters.properties.hiprune", "no other key"),
        (MESSAGES, {"messages": [{"content": [{"type": "image", "source": {"hiprune": PLAN}}]}]},
         "messages[0].content[0].source.hiprune", "beside source"),
        (MESSAGES, {"mm_processor_kwargs": {"hiprune": PLAN}}, "mm_processor_kwargs.hiprune", ""),
        (RESPONSES, {"input": [{"output": [{"content": OWN}]}]},
         "input[0].output[0].content[0].hiprune", "image part"),
        ("/v1/hiprune/explain", {"image_url": {"url": "x", "hiprune": PLAN}},
         "image_url.hiprune", "must stand at the top of the request"),
        ("/v1/chat/completions/batch", {"messages": [[{"content": OWN}]]},
         "messages[0][0].content[0].hiprune", f"send it to {CHAT}"),
        ("/v1/completions", [[{"a": {"hiprune": 1}}]], "[0][0].a.hiprune", "/v1/completions"),
        ("/a/route/of/a/later/vllm", {"hiprune": {}}, "hiprune", "cannot be served on /a/route"),
        (CHAT, {"HiPrune": PLAN}, "HiPrune", "is written hiprune"),
        (CHAT, {"messages": [{"content": [{"hi_prune": 1}]}]},
         "messages[0].content[0].hi_prune", "is written hiprune"),
        (CHAT, {"hiprune ": PLAN}, "hiprune ", "is written hiprune"),
    ],
)  # fmt: skip
def test_anywhere_else_it_is_refused_with_its_path_and_where_it_belongs(route, body, field, told):
    escaped = json.dumps(body).replace("prune", r"\u0070rune").encode()
    for content in (body, escaped, json.dumps(body).encode("utf-16"), b"\xef\xbb\xbf" + escaped):
        found, message = refused(route, content)
        assert found == field
        assert message.startswith(field)
        assert told in message


def test_of_two_keys_the_last_one_holds_as_for_the_route():
    twice = b'{"metadata": {"hiprune": 1}, "metadata": {}, "hiprune": {}, "hiprune": {"tokens": 1}}'
    assert refused(CHAT, twice) is None
    assert refused(CHAT, b'{"metadata": {}, "metadata": {"hiprune": 1}}')[0] == "metadata.hiprune"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (rb'{"messages": [{"content": "a \ud800 b"}]}', "messages[0].content"),
        (b'{"stop": ["x", "\xed\xa0\x80"]}', "stop[1]"),
        (rb'{"tools": [{"\uDFFF": 1}]}', "tools[0].\\udfff"),
        (rb'"\udc00"', "body"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_with_its_path(body, field):
    for route in (CHAT, "/v1/completions"):
        assert refused(route, body)[0] == field
        assert "surrogate" in refused(route, body)[1]


def test_whole_characters_of_every_width_and_bodies_of_every_kind_are_handed_on():
    for text in ("\U0001f4a5 ü 한 \0", 'é"prune"'):
        for body in (json.dumps({"a": text}), json.dumps({"a": text}, ensure_ascii=False)):
            assert refused(CHAT, body.encode()) is None
    for body in (b"", b"[]", b'null "prune"', b"5 \\u00", b'{"hiprune": ', b"--x\r\nprune\0\xff"):
        assert refused(CHAT, body) is None
    assert refused(CHAT, b"[" * 10**5 + b'"prune"') is None


def test_every_route_that_reads_budgets_reads_one_at_the_top():
    assert set(READ) < set(PLACES)
    assert len(READ) == 5 + len(OF_NUMBERS)


@pytest.mark.parametrize(
    "body",
    [
        lambda n: b'{"prune": [' + b'{"a":[]},' * n + b"0]}",
        lambda n: b'{"prune": [' + b'"\\ud83d\\ude00",' * n + b"0]}",
        lambda n: b'{"a":' * 400 + b'{"prune": ["' + b"x" * n * 40 + b'"]}' + b"}" * 400,
        lambda n: b"{" + b",".join(b'"prune%d":"\xc3\xa9"' % i for i in range(n)) + b"}",
    ],
)
def test_looking_takes_time_in_proportion_to_the_body(body):
    def best(n):
        text = body(n)
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            assert fault(CHAT, text) is None
            times.append(time.perf_counter() - begun)
        return min(times)

    gc.disable()  # its pauses depend on all that the process has
    try:
        small, large = best(80_000), best(320_000)
    finally:
        gc.enable()
    assert large < 12 * small  # 16 times, were it quadratic


def test_where_vllm_alone_reads_a_body_a_budget_counts_in_its_processors_options_only():
    inside = {"mm_processor_kwargs": {"hiprune": PLAN}}
    assert unread(CHAT, inside) == ""
    assert (
        unread(CHAT, {**inside, "messages": [{"content": OWN}]}) == "messages[0].content[0].hiprune"
    )
    assert unread("/nowhere", inside) == "mm_processor_kwargs.hiprune"
    assert unread(CHAT, [{"hiprune": PLAN}]) == "[0].hiprune"
    assert unread(CHAT, "hiprune") == ""


def test_a_body_that_is_a_number_has_no_places():
    assert fault(CHAT, b'5 "hiprune"') is None  # no JSON: the route says so
    assert fault(CHAT, "5".encode("utf-16-le")) is None
