"""Qwen2.5-VL over HTTP: long pictures beyond the rotary table, and options of its processor."""

import json

import pytest
from openai import BadRequestError

from tests.e2e.serving import BIN, running
from tests.photos import photo
from tests.reference.checkpoints import build_qwen2_5_vl

TRAINED = 512
LONG = (11_200, 56)
"""Pixels of a picture of one or two rows of tokens."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    build_qwen2_5_vl(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = TRAINED
    (folder / "config.json").write_text(json.dumps(config))
    command = [
        *(str(BIN / "hiprune-serve"), str(folder), "--served-model-name", "small"),
        *("--max-model-len", str(TRAINED), "--enforce-eager", "--trust-request-mm-kwargs"),
    ]
    with running(command, tmp_path_factory.mktemp("log")) as one:
        yield one


def test_pictures_that_leave_the_rotary_table_are_a_400_and_harm_nobody(server):
    long, short = photo("coffee").resize(LONG), photo("chelsea").resize((224, 224))
    one = {"hiprune": {"tokens": 1}}
    expected = server.ask([short], extra_body=one).choices[0].message.content
    few = server.ask([long], extra_body=one)
    assert few.usage.prompt_tokens < 53
    for count in (11, 30, 128):
        with pytest.raises(BadRequestError) as refused:
            server.ask([long] * count, extra_body=one)
        assert refused.value.param == "messages"
        told = refused.value.body["message"]
        assert f"positions must stay below {4 * TRAINED}, got " in told
        assert "--max-model-len 512" in told
    # The same pictures, the very ones that were refused and others.
    assert server.ask([long], extra_body=one).choices[0].message == few.choices[0].message
    assert server.ask([short], extra_body=one).choices[0].message.content == expected
    assert server.ask([short]).usage.prompt_tokens > 64


def test_an_option_of_the_processor_beside_a_budget_decides_how_many_tokens_there_are(server):
    """`max_pixels` by itself, and under a `uuid` that was seen with another one."""
    picture = photo("coffee").resize((448, 336))

    def asked(options, plan=None, **part):
        from tests.e2e.serving import content

        parts = content([picture])
        parts[1] |= part
        answer = server.client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": parts}],
            temperature=0,
            max_tokens=4,
            extra_body={
                "hiprune": plan or {"ratio": 0.5},
                **({"mm_processor_kwargs": options} if options else {}),
            },
        )
        (image,) = answer.model_extra["hiprune"]["images"]
        return image["tokens_full"], image["tokens_kept"], answer.choices[0].message.content

    full, kept, text = asked(None)
    assert (full, kept) == (192, 96)
    for name in ({}, {"uuid": "a"}):
        assert asked(None, **name)[:2] == (192, 96)
        small = asked({"max_pixels": 28 * 28 * 48}, **name)
        assert small[0] <= 48
        assert small[1] == round(small[0] / 2)
        smaller = asked({"max_pixels": 28 * 28 * 12}, **name)
        assert smaller[0] <= 12
        assert asked(None, **name) == (full, kept, text)
