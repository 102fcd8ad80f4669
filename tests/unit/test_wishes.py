"""Wishes of image parts: off chat messages, and behind URLs where models would drop them."""

import pytest

from hiprune_server.wishes.messages import (
    ImageWish,
    Wishes,
    check_arrived,
    is_picture,
    tag,
    take_image_wishes,
)
from hiprune_vllm.plan import Encoder, PlanError, PruningPlan
from hiprune_vllm.reading import parse_plan

ENCODER = Encoder("llava", 8, 3, has_cls=True)
PRESETS = {"low": PruningPlan(ratio=0.1), "high": PruningPlan(ratio=1.0)}
URL = "data:image/png;base64,AAAA"


class Pruning:
    default = PruningPlan()

    def parse(self, value, *, name="hiprune", for_one_image=False):
        return parse_plan(value, ENCODER, field=name, for_one_image=for_one_image)

    def check_of_video(self, plan, name="hiprune"):
        if plan.alpha == 1:
            raise PlanError(name, "must be left out")


def take(*parts):
    messages = [{"role": "user", "content": list(parts)}]
    taken = take_image_wishes(messages, Pruning(), PRESETS)
    return taken.plain[0]["content"], taken.wishes


def carried(part):
    """A part of the Responses API after `tag`, as vLLM hands it on."""
    body = {"model": "m", "input": [{"role": "user", "content": [part]}]}
    tagged, marks = tag(body)
    assert list(marks.values()) == ["input[0].content[0]"]
    assert body["input"][0]["content"][0] is part
    return tagged["input"][0]["content"][0]


def test_messages_stay_as_they_are_and_are_read_once():
    part = {"type": "image_url", "image_url": {"url": URL}, "hiprune": {"tokens": 5}}
    message = {"role": "user", "content": iter([part])}
    plain, wishes, *_ = take_image_wishes([message], Pruning(), PRESETS)
    assert message["content"] == [part]
    assert plain[0]["content"] == [{"type": "image_url", "image_url": {"url": URL}}]
    assert wishes == [ImageWish(PruningPlan(tokens=5))]


def test_a_wish_comes_back_from_behind_its_url():
    part = {"type": "input_image", "detail": "low", "image_url": URL, "hiprune": {"tokens": 7}}
    tagged = carried(part)
    assert "hiprune" not in tagged
    assert tagged["image_url"].startswith(URL)
    plain, wishes = take(tagged)
    assert plain == [{"type": "input_image", "image_url": URL, "detail": "low"}]
    assert wishes == [ImageWish(PruningPlan(tokens=7), PRESETS["low"])]


@pytest.mark.parametrize("value", [None, [], "%", {"a": "ü#\n"}, {"tokens": 10**30}])
def test_whatever_it_is_it_is_refused_under_its_own_name(value):
    tagged = carried({"type": "input_image", "image_url": URL, "hiprune": value})
    with pytest.raises(PlanError) as error:
        take(tagged)
    assert error.value.field.startswith("input[0].content[0].hiprune")


@pytest.mark.parametrize("key", ["data", "url"])
def test_blocks_of_the_messages_api(key):
    source = {"type": "url" if key == "url" else "base64", key: "AAAA"}
    block = {"type": "image", "source": source, "hiprune": {"tokens": 7}}
    tool = {"type": "tool_result", "content": [block]}
    tagged, marks = tag({"messages": [{"role": "user", "content": [block, tool]}]})
    assert list(marks.values()) == ["messages[0].content[0]", "messages[0].content[1].content[0]"]
    for found in (
        tagged["messages"][0]["content"][0],
        tagged["messages"][0]["content"][1]["content"][0],
    ):
        assert set(found) == {"type", "source"}
        assert found["source"][key].startswith("AAAA#hiprune-")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": [{"role": "user", "hiprune": {}}]}, "input[0].hiprune"),
        ({"input": [{"content": [{"type": "input_text", "hiprune": {}}]}]},
         "input[0].content[0].hiprune"),
        ({"input": [{"content": [{"type": "input_image", "file_id": "x", "hiprune": {}}]}]},
         "input[0].content[0].hiprune"),
        ({"messages": [{"content": [{"type": "image", "source": 5, "hiprune": {}}]}]},
         "messages[0].content[0].hiprune"),
        ({"system": [{"type": "text", "hiprune": {}}]}, "system[0].hiprune"),
    ],
)  # fmt: skip
def test_a_wish_without_a_picture_is_refused(body, field):
    with pytest.raises(PlanError) as error:
        tag(body)
    assert error.value.field == field


def test_a_client_cannot_write_a_tag():
    url = f"{URL}#hiprune-{'0' * 32}-%5B%22x%22%2C%7B%7D%5D"
    plain, wishes = take({"type": "input_image", "image_url": url})
    assert plain[0]["image_url"] == url
    assert wishes == [ImageWish()]


def test_bodies_of_any_shape_go_through():
    for body in ({}, {"input": "x"}, {"messages": [5, None, [{}]]}, {"input": {"a": 1}}):
        assert tag(body) == (body, {})


def test_a_picture_that_did_not_arrive_is_named_by_its_place():
    image = {"type": "image", "source": {"type": "base64", "data": "AAAA"}}
    body = {"system": [image], "messages": [{"content": [image, {"type": "text", "text": "x"}]}]}
    tagged, marks = tag(body)
    url = tagged["messages"][0]["content"][0]["source"]["data"]
    given = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    taken = take_image_wishes(given, Pruning(), PRESETS)
    assert taken.plain[0]["content"][0]["image_url"] == {"url": "AAAA"}
    assert taken.wishes == [ImageWish()]
    with pytest.raises(PlanError) as error:
        check_arrived(marks, taken.arrived)
    assert error.value.field == "system[0]"
    check_arrived(
        {mark: path for mark, path in marks.items() if path != "system[0]"}, taken.arrived
    )


def test_what_a_tool_has_found_needs_no_detail():
    found = {"type": "input_image", "image_url": URL}
    tagged, _ = tag({"input": [{"type": "function_call_output", "output": [found]}]})
    assert tagged["input"][0]["output"][0]["detail"] == "auto"


def test_what_a_picture_leaves_open_its_detail_decides_and_then_the_request():
    whole = PruningPlan(tokens=9, alpha=0.3, buffer="row")
    both = ImageWish(PruningPlan(ratio=0.5), PruningPlan(tokens=5, alpha=0.2))
    assert both.over(whole) == PruningPlan(ratio=0.5, alpha=0.2, buffer="row")
    assert ImageWish(detail=PruningPlan(tokens=5)).over(whole).tokens == 5
    assert ImageWish().over(whole) == whole


def test_who_decided_is_who_said_how_many():
    few, knob = PruningPlan(tokens=5), PruningPlan(alpha=0.2)
    of_images = [ImageWish(few, few), ImageWish(knob, few), ImageWish(knob, knob), ImageWish()]
    told = [Wishes(True, few, of_images).source(i) for i in range(5)]
    assert told == ["image", "detail", "request", "request", "request"]
    assert Wishes(False, knob, of_images).source(3) == "default"


def test_only_parts_with_a_picture_are_read():
    class Found:
        """What a tool has found, as an object that can be told as a dict."""

        def model_dump(self, *, exclude_none):
            assert exclude_none
            return {"type": "input_image", "image_url": URL, "detail": "low"}

    text = {"type": "text", "text": "x"}
    content = ["odd", text, Found(), {"image_url": URL}]
    messages = ["odd", {"content": "x"}, {"role": "user"}, {"role": "user", "content": content}]
    plain, wishes, *_ = take_image_wishes(messages, Pruning(), PRESETS)
    assert plain[:3] == messages[:3]
    assert plain[3]["content"][:2] == ["odd", text]
    assert wishes == [ImageWish(None, PRESETS["low"]), ImageWish()]
    assert not is_picture("odd")
    assert is_picture({"type": "text", "uuid": "a", "image_url": None})


@pytest.mark.parametrize(
    ("part", "field", "told"),
    [
        ({"type": "text", "text": "x", "hiprune": {}}, "hiprune", "is none"),
        (
            {"type": "input_image", "image_url": URL, "detail": "LOW"},
            "detail",
            "must be one of auto, low, high, got 'LOW'",
        ),
        (
            {"type": "image_url", "image_url": {"url": URL, "detail": 5}},
            "image_url.detail",
            "got 5",
        ),
    ],
)
def test_a_part_that_cannot_be_served_is_named(part, field, told):
    with pytest.raises(PlanError) as error:
        take(part)
    assert error.value.field == f"messages[0].content[0].{field}"
    assert told in str(error.value)


def test_a_picture_without_a_place_for_a_mark_stays_as_it_is():
    odd = [{"type": "input_image", "file_id": "a"}, {"type": "image", "source": {"type": "url"}}]
    body = {"input": [{"role": "user", "content": odd}]}
    assert tag(body) == (body, {})


def test_videos_have_wishes_of_their_own():
    clip = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    parts = [
        clip,
        {"image_url": URL, "hiprune": {"tokens": 5}},
        {**clip, "hiprune": {"ratio": 0.5}},
    ]
    taken = take_image_wishes([{"role": "user", "content": parts}], Pruning(), PRESETS)
    assert taken.plain[0]["content"] == [clip, {"image_url": URL}, clip]
    assert taken.wishes == [ImageWish(PruningPlan(tokens=5))]
    assert taken.of_videos == [ImageWish(), ImageWish(PruningPlan(ratio=0.5))]
    wishes = Wishes(True, PruningPlan(tokens=7), taken.wishes, taken.of_videos)
    assert [wishes.source_of_video(i) for i in range(3)] == ["request", "video", "request"]
    for wrong in ({"alpha": 1}, {"total_tokens": 5}, 5):
        with pytest.raises(PlanError) as error:
            take({"type": "text", "text": "x"}, {**clip, "hiprune": wrong})
        assert error.value.field.startswith("messages[0].content[1].hiprune")
