"""Videos with budgets over HTTP: the report, precedence, odd files, names, metrics."""

import base64
from concurrent.futures import ThreadPoolExecutor

import cv2
import httpx
import numpy as np
import pytest
from openai import BadRequestError

from tests.e2e.serving import BIN, running
from tests.photos import data_url, photo
from tests.reference.checkpoints import build_qwen2_5_vl


def clip(folder, *, frames=8, size=(112, 84), name="clip.mp4"):
    """A photograph that drifts, as a file; its bytes."""
    path = folder / name
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 2, size)
    still = np.asarray(photo("coffee").resize(size))[:, :, ::-1]
    for i in range(frames):
        writer.write(np.ascontiguousarray(np.roll(still, 5 * i, 1)))
    writer.release()
    return path.read_bytes()


def part(data, plan=None, kind="video/mp4", **more):
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    found = {"type": "video_url", "video_url": {"url": url}, **more}
    return found if plan is None else {**found, "hiprune": plan}


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|{{ 'video' if 'video' in part.type else 'image' }}_pad|>"
    "<|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
"""As published checkpoints have it, in short: pictures and videos."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    build_qwen2_5_vl(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    command = [
        *(str(BIN / "hiprune-serve"), str(folder), "--served-model-name", "small"),
        *("--max-model-len", "2048", "--enforce-eager", "--hiprune-default", '{"tokens": 11}'),
    ]
    with running(command, tmp_path_factory.mktemp("log")) as one:
        yield one


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return clip(tmp_path_factory.mktemp("clips"))


def ask(server, parts, plan=None, **options):
    text = {"type": "text", "text": "What happens?"}
    return server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": [*parts, text]}],
        temperature=0,
        max_tokens=4,
        extra_body={} if plan is None else {"hiprune": plan},
        **options,
    )


def test_get_hiprune_says_what_of_videos_is_kept(server):
    about = httpx.get(f"{server.url}/v1/hiprune").json()
    assert about["videos"] == {"supported": True, "default": {"ratio": 1.0}}


def told(answer):
    return answer.model_extra["hiprune"]


def test_a_video_stays_whole_unless_somebody_asks(server, video):
    """The operator's default is for pictures."""
    answer = ask(server, [part(video)])
    assert "hiprune" not in answer.model_extra
    assert answer.usage.prompt_tokens_details.video_tokens == 48


@pytest.mark.parametrize(
    ("own", "whole", "kept", "source"),
    [
        (None, {"tokens": 20}, 20, "request"),
        ({"ratio": 0.25}, None, 12, "video"),
        ({"tokens": 7}, {"tokens": 20}, 7, "video"),
        ({"alpha": 0.5}, {"total_tokens": 9}, 9, "request"),
        ({"tokens": 500}, None, None, None),
    ],
)
def test_a_budget_of_the_part_or_the_request_is_reported(server, video, own, whole, kept, source):
    answer = ask(server, [part(video, own)], whole)
    if kept is None:
        kept = 48
    assert answer.usage.prompt_tokens_details.video_tokens == kept
    if source:
        assert told(answer) == {
            "images": [],
            "videos": [
                {"kind": "video", "frames": 8, "tokens_full": 48, "tokens_kept": kept,
                 "method": "hiprune", "source": source}
            ],
        }  # fmt: skip


def test_a_picture_and_two_videos_have_budgets_of_their_own(server, video, tmp_path):
    picture = {"type": "image_url", "image_url": {"url": data_url(photo("chelsea"))}}
    other = clip(tmp_path, frames=5, size=(84, 140))
    answer = ask(server, [part(video, {"tokens": 9}), picture, part(other, {"ratio": 0.5})])
    (image,), (first, second) = told(answer)["images"], told(answer)["videos"]
    assert (image["tokens_kept"], image["source"]) == (11, "default")
    assert (first["tokens_kept"], first["frames"]) == (9, 8)
    assert (second["tokens_kept"], second["tokens_full"]) == (15, 30)


def test_a_stream_says_it_first(server, video):
    with server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": [part(video, {"tokens": 5})]}],
        stream=True,
        max_tokens=3,
    ) as stream:
        first = next(iter(stream))
    assert first.model_extra["hiprune"]["videos"][0]["tokens_kept"] == 5


def test_two_budgets_back_to_back_and_at_once_do_not_meet(server, video):
    expected = {n: ask(server, [part(video, {"tokens": n})]).choices[0].message for n in (6, 30)}
    asked = [6, 30] * 6

    def again(tokens):
        return ask(server, [part(video, {"tokens": tokens})]).choices[0].message

    with ThreadPoolExecutor(6) as pool:
        for tokens, message in zip(asked, pool.map(again, asked), strict=True):
            assert message == expected[tokens]


def test_a_video_named_alone_keeps_the_budget_it_had(server, video):
    first = ask(server, [part(video, {"tokens": 8}, uuid="clip-1")])
    named = {"type": "video_url", "video_url": None, "uuid": "clip-1"}
    again = ask(server, [{**named, "hiprune": {"tokens": 8}}])
    assert again.choices[0].message == first.choices[0].message
    assert told(again)["videos"][0]["tokens_kept"] == 8
    with pytest.raises(BadRequestError, match="video 0 is named by its uuid alone"):
        ask(server, [{**named, "hiprune": {"tokens": 9}}])


@pytest.mark.parametrize(
    ("plan", "field", "message"),
    [
        ({"tokens": 0}, "tokens", "must be an integer"),
        ({"total_tokens": 5}, "total_tokens", "is unknown"),
        ({"max_pixels": 5000}, "max_pixels", "videos keep their size"),
        ({"share": "even"}, "share", "is unknown"),
        ([], None, "must be an object"),
    ],
)
def test_a_wrong_plan_is_a_400_with_its_path(server, video, plan, field, message):
    with pytest.raises(BadRequestError) as refused:
        ask(server, [part(video, plan)])
    path = "messages[0].content[0].hiprune"
    assert refused.value.param == (path if field is None else f"{path}.{field}")
    assert message in refused.value.body["message"]


def odd_files(folder, whole):
    yield "empty", b"", "video/mp4"
    yield "cut", whole[: len(whole) // 2], "video/mp4"
    yield "noise", bytes(range(256)) * 20, "video/mp4"
    yield "picture", base64.b64decode(data_url(photo("coffee")).partition(",")[2]), "video/mp4"
    yield "frame", clip(folder, frames=1, name="one.mp4"), "video/mp4"
    yield "tiny", clip(folder, frames=4, size=(2, 2), name="tiny.mp4"), "video/mp4"
    yield "many", clip(folder, frames=600, size=(56, 56), name="many.mp4"), "video/mp4"


def test_odd_files_are_served_or_a_400_and_the_next_request_works(server, video, tmp_path):
    outcomes = {}
    for name, data, kind in odd_files(tmp_path, video):
        try:
            answer = ask(server, [part(data, {"tokens": 3}, kind)])
            outcomes[name] = told(answer)["videos"][0]["tokens_kept"]
        except BadRequestError as refused:
            outcomes[name] = refused.param
    for name in ("empty", "cut", "noise"):
        assert outcomes[name] == "video_url", outcomes
    for name in ("tiny", "many"):  # a single frame is too few for vLLM's sampling
        assert outcomes[name] == 3, outcomes
    assert told(ask(server, [part(video, {"tokens": 4})]))["videos"][0]["tokens_kept"] == 4


def test_metrics_count_videos_apart(server, video):
    before = server.total("hiprune_videos_total")
    ask(server, [part(video, {"tokens": 10})])
    assert server.total("hiprune_videos_total") == before + 1
    assert server.total("hiprune_visual_tokens_kept_total", kind="video") >= 10
