"""`HIPRUNE_DISABLE=1`: plain vLLM behind our routes, which say why nothing is pruned."""

import httpx
import pytest

from tests.e2e.serving import check_budgets_are_refused, running, serve
from tests.photos import data_url, photo

REASON = "pruning is switched off (HIPRUNE_DISABLE)"
CAT = photo("chelsea")


@pytest.fixture(scope="module")
def server(tmp_path_factory, clip_checkpoint):
    # Whatever else is set for pruning stays where it is: it can be switched on again.
    settings = ("--hiprune-default", '{"tokens": 64}', "--hiprune-min-tokens", "16")
    with running(
        serve(clip_checkpoint, *settings),
        tmp_path_factory.mktemp("off"),
        environment={"HIPRUNE_DISABLE": "1"},
    ) as one:
        yield one


def test_get_hiprune_says_so_with_the_reason(server):
    told = httpx.get(f"{server.url}/v1/hiprune").json()
    assert told["supported"] is False
    assert told["reason"] == REASON
    assert set(told["versions"]) == {"hiprune-vllm", "vllm"}


def test_every_api_serves_pictures_whole(server):
    answer = server.ask([CAT])
    assert answer.usage.prompt_tokens > 576
    assert "hiprune" not in (answer.model_extra or {})
    assert server.ask([CAT], stream=True)
    parts = [{"type": "input_image", "image_url": data_url(CAT), "detail": "auto"}]
    body = {"model": server.model, "input": [{"role": "user", "content": parts}]}
    told = server.post("/v1/responses", body | {"max_output_tokens": 4})
    assert told.status_code == 200, told.text
    assert told.json()["usage"]["input_tokens"] > 576
    source = {
        "type": "base64",
        "media_type": "image/jpeg",
        "data": data_url(CAT, "JPEG").partition(",")[2],
    }
    messages = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    told = server.post(
        "/v1/messages", {"model": server.model, "max_tokens": 4, "messages": messages}
    )
    assert told.status_code == 200, told.text
    for route, body in (
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 2}),
        ("/tokenize", {"prompt": "Hello"}),
    ):
        assert server.post(route, {"model": server.model, **body}).status_code == 200
    assert httpx.get(f"{server.url}/metrics").status_code == 200


def test_a_budget_is_a_400_that_says_that_pruning_is_off(server):
    check_budgets_are_refused(server, CAT, REASON)
