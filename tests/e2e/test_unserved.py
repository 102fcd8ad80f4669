"""A family that cannot be pruned is served whole, and says why a budget is refused."""

import httpx
import pytest

from hiprune_vllm.models.unserved import UNSERVED
from tests.e2e.serving import check_budgets_are_refused, running, serve
from tests.photos import photo
from tests.reference.blip2 import QUERIES, build_blip2

CAT = photo("chelsea")
REASON = UNSERVED["Blip2ForConditionalGeneration"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip2")
    build_blip2(folder)
    # The operator's default is for models that can be pruned.
    with running(serve(folder, "--hiprune-default", '{"tokens": 8}'), folder) as one:
        yield one


def test_get_hiprune_says_why(server):
    told = httpx.get(f"{server.url}/v1/hiprune").json()
    assert told["supported"] is False
    assert told["reason"] == f"hiprune does not support Blip2ForConditionalGeneration: {REASON}"


def test_pictures_are_served_whole(server):
    usage = server.ask([CAT]).usage
    assert usage.prompt_tokens_details.image_tokens == QUERIES
    assert usage.prompt_tokens > QUERIES


def test_a_budget_is_a_400_that_says_why(server):
    check_budgets_are_refused(server, CAT, REASON)
    assert server.ask([CAT]).usage.prompt_tokens > QUERIES


@pytest.mark.long
def test_a_checkpoint_by_transformers_own_model_is_served_whole(clip_checkpoint):
    serving = serve(clip_checkpoint, "--model-impl", "transformers")
    with running(serving, clip_checkpoint) as server:
        assert server.ask([CAT]).usage.prompt_tokens > 576
        reason = UNSERVED["TransformersMultiModalForCausalLM"]
        assert httpx.get(f"{server.url}/v1/hiprune").json()["reason"].endswith(reason)
        check_budgets_are_refused(server, CAT, reason)
