"""Messages on their way to the engine, through vLLM's own renderer and processor, no engine."""

import asyncio
import base64
import io
import itertools
import logging

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.renderers.registry import renderer_from_config

import hiprune_server.hardening.media  # noqa: F401 - registers the connector
from hiprune_server.demo import CHECKPOINT
from hiprune_server.hardening.grammars import Grammars
from hiprune_server.hardening.stumbling import ServerTrouble
from hiprune_server.routes.chat import PrunedMessages
from hiprune_server.routes.rendering import PrunedRenderer
from hiprune_server.routes.requests import (
    PrunedChatRequest,
    PrunedMessagesRequest,
    PrunedResponsesRequest,
)
from hiprune_vllm.pruning.budget import BUDGET_INTS
from tests.photos import data_url, photo
from tests.reference import checkpoints

CAT, CUP = (data_url(photo(name).resize((336, 336))) for name in ("chelsea", "coffee"))
TEXT = {"type": "text", "text": "What is this?"}
FULL = 576


@pytest.fixture(autouse=True)
def _connector(monkeypatch):
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "hiprune")


@pytest.fixture
def caplog_vllm(caplog):
    """What vLLM's loggers write, which they keep from all others."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def renderer(folder, template=None, **options):
    given = {"enforce_eager": True, "max_model_len": 4096, **options}
    config = EngineArgs(model=str(folder), **given).create_engine_config()
    of_vllm = renderer_from_config(config)
    plain = OnlineRenderer(
        config.model_config,
        of_vllm,
        request_logger=None,
        chat_template=template,
        chat_template_content_format="auto",
    )
    grammars = Grammars(config, seconds=10)
    return PrunedRenderer.around(plain, of_vllm.mm_processor.info.pruning, {}, grammars)


@pytest.fixture(scope="module")
def llava(clip_checkpoint):
    """Its template takes pictures in every role."""
    return renderer(clip_checkpoint)


@pytest.fixture(scope="module")
def picky(clip_checkpoint):
    """The demo's template, which takes pictures of users alone."""
    template = (CHECKPOINT / "chat_template.jinja").read_text()
    return renderer(clip_checkpoint, template, hf_overrides={"pad_token_id": 0})


@pytest.fixture(scope="module")
def uncached(clip_checkpoint):
    return renderer(clip_checkpoint, mm_processor_cache_gb=0, enable_prefix_caching=False)


def image(url=CAT, **keys):
    return {"type": "image_url", "image_url": {"url": url}, **keys}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def rendered(server, messages, **keys):
    """The engine's input for a chat request."""

    async def render():
        request = PrunedChatRequest.model_validate({"model": "m", "messages": messages, **keys})
        _, (inputs,) = await server.render_chat(request)
        return inputs

    return asyncio.run(render())


def kept(inputs):
    return [one["tokens_kept"] for one in inputs["hiprune"]]


def refused(server, messages, **keys):
    with pytest.raises(VLLMValidationError) as error:
        rendered(server, messages, **keys)
    return error.value


@pytest.mark.parametrize("role", ["system", "assistant", "tool", "critic"])
def test_a_picture_in_a_message_of_any_role_has_its_own_budget(llava, role):
    own = image(CUP, hiprune={"tokens": 33})
    found = {"role": role, "tool_call_id": "a", "content": [TEXT, own]}
    inputs = rendered(llava, [user(TEXT, image()), found, user(TEXT)], hiprune={"tokens": 70})
    assert kept(inputs) == [70, 33]
    assert [one.length for one in inputs["mm_placeholders"]["image"]] == [70, 33]


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_a_template_that_leaves_pictures_out_is_named_with_the_role(picky, role):
    found = {"role": role, "content": [image(CUP)]} | (
        {"tool_call_id": "a"} if role == "tool" else {}
    )
    for messages in ([found, user(TEXT)], [user(TEXT, image()), found, user(TEXT)]):
        error = refused(picky, messages)
        assert error.parameter == "messages"
        assert f"leaves out pictures in {role} messages" in str(error)
    many = [{"role": f"role-{n}", "content": [image(CUP)]} for n in range(40)]
    assert "leaves out pictures in role-0 messages" in str(refused(picky, many))
    assert kept(rendered(picky, [user(TEXT, image()), {**found, "content": "x"}])) == [FULL]


def test_pictures_of_developers_come_first_as_vllm_puts_them_there(llava):
    said = {"role": "developer", "content": [TEXT, image(hiprune={"tokens": 9})]}
    assert kept(rendered(llava, [said, user(TEXT, image())])) == [9, FULL]
    error = refused(llava, [user(TEXT, image()), said, user(TEXT)])
    assert error.parameter == "messages[1]"
    assert "developer" in str(error)


def test_a_cut_prompt_is_named_as_that(llava):
    messages = [user(image(), TEXT)]
    for limit in (3, 100):
        error = refused(llava, messages, truncate_prompt_tokens=limit)
        assert error.parameter == "truncate_prompt_tokens"
    assert kept(rendered(llava, messages, truncate_prompt_tokens=3000)) == [FULL]


@pytest.fixture(scope="module")
def families(llava, tmp_path_factory):
    """Family -> its renderer and the placeholder of a picture."""
    found = {"llava": (llava, "<image>")}
    for name, build, mark in (
        ("llava-next", checkpoints.build_llava_next, "<image>"),
        ("qwen2.5-vl", checkpoints.build_qwen2_5_vl, "<|image_pad|>"),
    ):
        folder = tmp_path_factory.mktemp(name)
        build(folder)
        found[name] = (renderer(folder), mark)
    return found


@pytest.mark.parametrize("family", ["llava", "llava-next", "qwen2.5-vl"])
@pytest.mark.parametrize("plan", [{}, {"tokens": 20}])
def test_the_placeholder_as_text_beside_a_picture_is_refused(families, family, plan):
    server, mark = families[family]
    odd = {"type": "text", "text": f"What does {mark} mean?"}
    for messages in (
        [user(odd, image())],
        [user(image(), odd)],
        [{"role": "system", "content": mark}, user(image(), TEXT)],
        [user(TEXT, image()), {"role": "assistant", "content": mark * 3}, user(TEXT)],
    ):
        error = refused(server, messages, hiprune=plan)
        assert error.parameter == "messages"
        assert "placeholder" in str(error)
    assert len(rendered(server, [user(image(), TEXT, image(CUP))], hiprune=plan)["hiprune"]) == 2


def alone(uuid):
    return {"type": "image_url", "image_url": None, "uuid": uuid}


@pytest.mark.parametrize("method", ["hiprune", "random"])
def test_a_picture_by_its_name_alone_is_served_with_the_budget_it_had(llava, method):
    plan, name = {"tokens": 64, "method": method}, f"name-{method}"
    first = rendered(llava, [user(TEXT, image(uuid=name))], hiprune=plan)
    again = rendered(llava, [user(TEXT, alone(name))], hiprune=plan)
    assert again["mm_hashes"] == first["mm_hashes"]
    assert again["prompt_token_ids"] == first["prompt_token_ids"]
    spelt = {"ratio": 64 / FULL, "method": method}
    same = rendered(llava, [user(TEXT, alone(name))], hiprune=spelt)
    assert same["mm_hashes"] == first["mm_hashes"]


@pytest.mark.parametrize(
    "plan", [{"tokens": 65}, {}, {"tokens": 64, "method": "random"}, {"tokens": 64, "alpha": 0.5}]
)
def test_a_picture_by_its_name_alone_with_another_budget_has_to_be_sent_again(llava, plan):
    rendered(llava, [user(TEXT, image(uuid="mine"))], hiprune={"tokens": 64})
    for parts in ([alone("mine")], [image(CUP), alone("mine")], [alone("nobody's")]):
        error = refused(llava, [user(TEXT, *parts)], hiprune=plan)
        assert error.parameter == "uuid"
        assert f"image {len(parts) - 1}" in str(error)
        assert "send the picture itself again" in str(error)


def test_without_a_cache_no_picture_is_served_by_its_name_alone(uncached):
    rendered(uncached, [user(TEXT, image(uuid="mine"))])
    assert refused(uncached, [user(TEXT, alone("mine"))]).parameter == "uuid"


def seeds(inputs):
    """The budgets' integers of a prompt's pictures, whose identity is cut off."""
    items = inputs["mm_kwargs"]["image"]
    rows = [item["hiprune_budget"].data.tolist() for item in items if item is not None]
    return [row[:BUDGET_INTS] for row in rows]


def test_a_random_draw_follows_the_picture_whatever_it_is_called(llava, uncached):
    plan = {"tokens": 64, "method": "random"}

    def draw(server, picture, **keys):
        budget = rendered(server, [user(TEXT, image(picture, **keys))], hiprune=plan)
        return budget["mm_hashes"]["image"][0], seeds(budget)[0]

    _, cat = draw(uncached, CAT)
    _, cup = draw(uncached, CUP)
    named, of_named = draw(llava, CAT, uuid="a-cat")
    unnamed, of_unnamed = draw(llava, CAT)
    assert cat == draw(uncached, CAT)[1] == draw(uncached, CAT, uuid="x")[1]
    assert cat == of_named == of_unnamed
    assert cat != cup
    assert named != unnamed


def test_with_both_caches_off_a_picture_is_known_by_its_content(uncached):
    def identity(picture, **keys):
        return rendered(uncached, [user(TEXT, image(picture, **keys))])["mm_hashes"]["image"][0]

    cat = identity(CAT)
    assert cat == identity(CAT) == identity(CAT, uuid="renderer0-mm-1-image-0")
    # The running number that vLLM would have given to the next picture.
    stolen = [identity(CUP, uuid=f"renderer0-mm-{n}-image-0") for n in range(9)]
    assert set(stolen) == {identity(CUP)}
    assert cat not in stolen


def test_a_name_is_no_other_pictures_content(llava, monkeypatch):
    """A client that knows how a picture is known must not put its own in that place."""
    known = []
    of_vllm = BaseMultiModalProcessor._get_mm_hashes

    def watched(self, inputs):
        known.append(of_vllm(self, inputs))
        return known[-1]

    monkeypatch.setattr(BaseMultiModalProcessor, "_get_mm_hashes", watched)
    theirs = rendered(llava, [user(TEXT, image(CUP))])["mm_hashes"]["image"]
    (content,) = known[0]["image"]
    forged = rendered(llava, [user(TEXT, image(CAT, uuid=content))])["mm_hashes"]["image"]
    assert known[1]["image"] == [content]
    assert forged != theirs


def test_a_cache_that_is_smaller_than_a_request_serves_it(clip_checkpoint):
    # A picture has 1.3 MB.
    small = renderer(clip_checkpoint, mm_processor_cache_gb=0.003)
    pictures = [data_url(photo(n).resize((336, 336))) for n in ("chelsea", "coffee", "rocket")]
    pictures.append(data_url(photo("chelsea").resize((300, 300))))
    rendered(small, [user(TEXT, image(pictures[-1]))])
    inputs = rendered(small, [user(TEXT, *map(image, pictures))], hiprune={"tokens": 20})
    again = rendered(small, [user(TEXT, *map(image, pictures[::-1]))], hiprune={"tokens": 20})
    assert kept(inputs) == kept(again) == [20] * 4
    assert inputs["mm_hashes"]["image"] == again["mm_hashes"]["image"][::-1]


def test_what_is_not_the_requests_fault_is_the_servers_and_logged(llava, monkeypatch, caplog_vllm):
    for stumble in (KeyError("x"), TypeError("x"), AssertionError("x"), RuntimeError("x")):
        with monkeypatch.context() as patch:
            patch.setattr(llava.renderer, "_process_multimodal_async", _raising(stumble))
            with pytest.raises(ServerTrouble, match="Internal server error"):
                rendered(llava, [user(TEXT, image())])
        assert "could not be rendered" in caplog_vllm.text
        assert type(stumble).__name__ in caplog_vllm.text
        caplog_vllm.clear()


def _raising(error):
    async def process(*args, **kwargs):
        raise error

    return process


ODD = [None, -1, "x", [], [None], {"a": 1}]
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "name": "n", "content": [
        TEXT, image(uuid="u"), {"type": "refusal", "refusal": "no"}, {"image_url": CAT}, "text",
        {"type": "input_image", "image_url": CAT, "detail": "auto"}]},
    {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "a", "content": [TEXT, image()]},
]  # fmt: skip


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def put(value, path, odd):
    if not path:
        return odd
    copied = value.copy()
    copied[path[0]] = put(copied[path[0]], path[1:], odd)
    return copied


def test_odd_messages_are_rendered_or_refused_and_never_the_servers_trouble(llava):
    rendered(llava, MESSAGES)
    served = 0
    for path, odd in itertools.product(places(MESSAGES), ODD):
        try:
            rendered(llava, put(MESSAGES, path, odd))
            served += 1
        except ServerTrouble as error:
            pytest.fail(f"{path} {odd!r}: {error.__cause__!r}")
        except (VLLMError, ValueError):  # which vLLM's handlers make a 400
            pass
    assert served > 20


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"type": "text", "text": 5}, "text"),
        (image(uuid=["u"]), "uuid"),
        ({"type": "image_url", "image_url": {"url": 1.5}, "uuid": "u"}, "image_url.url"),
        ({"image_url": None}, "image_url"),
        ({"image_pil": "/etc/passwd", "uuid": "u"}, "image_pil"),
        ({"image_embeds": {"a": 1}, "uuid": "u"}, "image_embeds"),
    ],
)
def test_what_is_wrong_with_a_part_is_named(llava, part, field):
    error = refused(llava, [user(TEXT), user(TEXT, part)])
    assert error.parameter == f"messages[1].content[1].{field}"


@pytest.fixture(scope="module")
def embedding(clip_checkpoint):
    default = {"hiprune": {"tokens": 64}}
    return renderer(clip_checkpoint, enable_mm_embeds=True, mm_processor_kwargs=default)


def saved(tensor):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def embeds(text):
    return {"type": "image_embeds", "image_embeds": text}


ROWS = torch.zeros(5, 128)
CUT = base64.b64encode(base64.b64decode(saved(ROWS))[:500]).decode()


def test_embeddings_are_served_unpruned_whatever_the_default(embedding):
    for part in (embeds(saved(ROWS)), embeds(saved(ROWS[None]))):
        inputs = rendered(embedding, [user(TEXT, part)])
        assert [one.length for one in inputs["mm_placeholders"]["image"]] == [5]
    several = [embeds(saved(torch.zeros(n, 128))) for n in (5, 7)]
    inputs = rendered(embedding, [user(TEXT, *several)], hiprune={})
    assert [one.length for one in inputs["mm_placeholders"]["image"]] == [5, 7]
    assert kept(rendered(embedding, [user(TEXT, image())])) == [64]


@pytest.mark.parametrize("keys", [{"hiprune": {"tokens": 3}}, {"hiprune": {"ratio": 0.5}}])
def test_embeddings_cannot_be_pruned(embedding, keys):
    assert refused(embedding, [user(TEXT, embeds(saved(ROWS)))], **keys).parameter == "hiprune"
    own = embeds(saved(ROWS)) | keys
    assert refused(embedding, [user(TEXT, own)]).parameter == "hiprune"


@pytest.mark.parametrize(
    "odd",
    [
        "AAAA", "%%%", base64.b64encode(bytes(range(200))).decode(), CUT, saved({"a": ROWS}),
        saved(ROWS[:0]), saved(ROWS[:, :7]), saved(ROWS.long()), saved(ROWS[0]),
        saved(ROWS.to(torch.complex64)), saved(torch.zeros(2, 2, 5, 128)), {"a": saved(ROWS)},
        base64.b64encode(b"\x93NUMPY").decode(),
    ],
)  # fmt: skip
def test_embeddings_that_are_none_are_refused(embedding, odd):
    assert refused(embedding, [user(TEXT, embeds(odd))]).parameter == "image_embeds"


def test_a_grid_that_lies_about_its_embeddings_is_refused(tmp_path):
    checkpoints.build_qwen2_5_vl(tmp_path)
    server = renderer(tmp_path, enable_mm_embeds=True)

    def asked(rows, grid, width=64):
        given = {
            "image_embeds": saved(torch.zeros(rows, width)),
            "image_grid_thw": saved(torch.tensor(grid)),
        }
        return [user({"type": "image_embeds", "image_embeds": given}, TEXT)]

    inputs = rendered(server, asked(6, [1, 4, 6]))
    assert [one.length for one in inputs["mm_placeholders"]["image"]] == [6]
    for rows, grid, width in (
        (5, [1, 4, 6], 64), (6, [1, 8, 6], 64), (6, [1, 4, 6], 65),
        (6, [0, 4, 6], 64), (6, [1, 2**31, 2**31], 64), (6, [-1, -4, 6], 64), (6, [4, 6], 64),
    ):  # fmt: skip
        assert refused(server, asked(rows, grid, width)).parameter == "image_embeds"


PART = {"type": "input_image", "image_url": CAT, "hiprune": {"tokens": 33}}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


def responses(server, *items):
    async def render():
        body = {"model": "m", "input": [{"role": "user", "content": "Hi"}, *items]}
        request = PrunedResponsesRequest.model_validate(body)
        request.check()
        return (await server.render_responses(request)).engine_input

    return asyncio.run(render())


@pytest.mark.parametrize("more", [{}, {"id": "fc_1", "status": "completed"}])
def test_a_picture_that_a_tool_has_found_has_its_own_budget_on_responses(llava, more):
    found = {"type": "function_call_output", "call_id": "c", "output": [PART], **more}
    assert kept(responses(llava, CALL, found)) == [33]
    system = {"role": "system", "content": [PART | {"hiprune": {"tokens": 20}}]}
    assert kept(responses(llava, system, CALL, found)) == [20, 33]


def test_a_picture_that_an_api_would_drop_is_refused_by_its_place(llava):
    said = {"role": "assistant", "content": [{"type": "input_text", "text": "x"}, PART]}
    with pytest.raises(VLLMValidationError) as error:
        responses(llava, said)
    assert error.value.parameter == "input[1].content[1]"
    assert "text alone" in str(error.value)


def messages(server, body):
    async def render():
        request = PrunedMessagesRequest.model_validate({"model": "m", "max_tokens": 5, **body})
        request.check()
        _, (inputs,) = await server.render_chat(PrunedMessages.to_chat_completion_request(request))
        return inputs

    return asyncio.run(render())


SOURCE = {"type": "base64", "media_type": "image/png", "data": CAT.partition(",")[2]}
BLOCK = {"type": "image", "hiprune": {"tokens": 33}, "source": SOURCE}


def test_blocks_of_the_messages_api_are_served_or_refused_by_their_place(llava):
    result = {"type": "tool_result", "tool_use_id": "a", "content": [BLOCK]}
    said = [{"role": "assistant", "content": [BLOCK]}, {"role": "user", "content": [result, BLOCK]}]
    assert kept(messages(llava, {"messages": said})) == [33] * 3
    hi = {"role": "user", "content": "Hi"}
    for body, field in (
        ({"system": [{"type": "text", "text": "x"}, BLOCK], "messages": [hi]}, "system[1]"),
        ({"messages": [{"role": "system", "content": [BLOCK]}, hi]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": [result]}, hi]},
         "messages[0].content[0].content[0]"),
    ):  # fmt: skip
        with pytest.raises(VLLMValidationError) as error:
            messages(llava, body)
        assert error.value.parameter == field
