"""The plugin under vLLM's own server, without ours in front."""

import json
import sys

import httpx
import pytest
from openai import BadRequestError

from tests.e2e.serving import running
from tests.photos import photo

CAT = photo("chelsea")
OPTIONS = {"hiprune": {"tokens": 64}, "hiprune_limits": {"max_full_tokens": 1200}}


@pytest.fixture(scope="module")
def server(tmp_path_factory, clip_checkpoint):
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(clip_checkpoint), "--served-model-name", "small"),
        *("--max-model-len", "2048", "--enforce-eager", "--trust-request-mm-kwargs"),
        *("--mm-processor-kwargs", json.dumps(OPTIONS)),
    ]
    with running(command, tmp_path_factory.mktemp("plain")) as running_server:
        yield running_server


def prompt_tokens(server, plan=None):
    extra = {} if plan is None else {"mm_processor_kwargs": {"hiprune": plan}}
    return server.ask([CAT], extra_body=extra).usage.prompt_tokens


def test_the_engine_wide_plan_and_a_requests_own_one(server):
    default = prompt_tokens(server)
    assert prompt_tokens(server, {"tokens": 192}) - default == 192 - 64
    assert prompt_tokens(server, {"ratio": 1}) - default == 576 - 64
    assert prompt_tokens(server, {"alpha": 0.5}) == default


def test_a_bad_plan_is_a_400_and_the_next_request_works(server):
    for plan, field in (
        ({"tokens": 0}, "hiprune.tokens"),
        ({"object_layer": 8}, "hiprune.object_layer"),
        ("all", "hiprune"),
    ):
        with pytest.raises(BadRequestError) as error:
            prompt_tokens(server, plan)
        assert error.value.param == field
        prompt_tokens(server)


def test_more_tokens_before_pruning_than_the_limit_are_a_400_that_names_it(server):
    assert server.ask([CAT, CAT]).usage.prompt_tokens
    with pytest.raises(BadRequestError, match=r"limits\.max_full_tokens\), got 1728 in 3 images"):
        server.ask([CAT, CAT, CAT])


def test_our_routes_are_not_there(server):
    assert httpx.get(f"{server.url}/v1/hiprune").status_code == 404
