"""The plugin under `vllm serve`, without our program in front."""

import json
import os
import sys

import httpx
import pytest
import vllm
from openai import BadRequestError

from tests.e2e.serving import check_budgets_are_refused, content, running
from tests.photos import photo

CAT = photo("chelsea")
OPTIONS = {"hiprune": {"tokens": 64}, "hiprune_limits": {"max_full_tokens": 1200}}


def vllm_serve(folder, checkpoint, *flags):
    """vLLM's own command, and the environment that it needs.

    The re-packaging for CPUs has another name than the one that the command asks the version of.
    """
    site = folder / "site"
    info = site / f"vllm-{vllm.__version__}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.__version__}+cpu\n"
    )
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint)),
        *("--served-model-name", "small", "--max-model-len", "2048", "--enforce-eager", *flags),
    ]
    return command, {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def server(tmp_path_factory, clip_checkpoint):
    """As a chart starts it: a command line, and nothing in the environment."""
    folder = tmp_path_factory.mktemp("plain")
    flags = ("--trust-request-mm-kwargs", "--mm-processor-kwargs", json.dumps(OPTIONS))
    command, environment = vllm_serve(folder, clip_checkpoint, *flags)
    with running(command, folder, environment=environment) as running_server:
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


def test_a_budget_is_read_as_by_our_own_program(server):
    answer = server.ask([CAT], extra_body={"hiprune": {"tokens": 32}})
    (image,) = answer.hiprune["images"]
    assert (image["tokens_full"], image["tokens_kept"]) == (576, 32)
    assert image["source"] == "request"
    assert answer.usage.prompt_tokens == prompt_tokens(server, {"tokens": 32})
    with pytest.raises(BadRequestError) as error:
        server.ask([CAT], extra_body={"hiprune": {"tokens": 0}})
    assert error.value.param == "hiprune.tokens"
    assert httpx.get(f"{server.url}/v1/hiprune").json()["supported"] is True


def test_nobody_explains_without_the_extension_of_our_program(server):
    assert server.post("/v1/hiprune/explain", {"image_url": "data:,"}).status_code == 404


@pytest.fixture(scope="module")
def left_out(tmp_path_factory, clip_checkpoint):
    """Where the operator's list of plugins has the model's part alone."""
    folder = tmp_path_factory.mktemp("left-out")
    command, environment = vllm_serve(folder, clip_checkpoint)
    environment["VLLM_PLUGINS"] = "hiprune"
    with running(command, folder, environment=environment) as one:
        yield one


def test_where_our_routes_are_left_out_budgets_are_refused_and_the_start_says_so(left_out):
    assert "VLLM_PLUGINS=hiprune leaves out hiprune_api" in left_out.log.read_text()
    assert left_out.ask([CAT]).usage.prompt_tokens > 576
    with pytest.raises(BadRequestError) as error:
        left_out.ask([CAT], extra_body={"hiprune": {"tokens": 8}})
    assert error.value.param == "hiprune"
    assert "VLLM_PLUGINS names no hiprune_api" in error.value.body["message"]
    part = content([CAT])[1] | {"hiprune": {"tokens": 8}}
    body = {"model": "small", "messages": [{"role": "user", "content": [part]}]}
    told = left_out.post("/v1/chat/completions", body)
    assert told.status_code == 400
    assert told.json()["error"]["param"] == "messages[0].content[0].hiprune"
    assert httpx.get(f"{left_out.url}/v1/hiprune").status_code == 404


@pytest.mark.long
def test_switched_off_a_budget_is_refused_as_well(tmp_path, clip_checkpoint):
    command, environment = vllm_serve(tmp_path, clip_checkpoint)
    environment["HIPRUNE_DISABLE"] = "1"
    with running(command, tmp_path, environment=environment) as one:
        assert one.ask([CAT]).usage.prompt_tokens > 576
        check_budgets_are_refused(one, CAT, "pruning is switched off (HIPRUNE_DISABLE)")


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("HIPRUNE_DEFAULT", '{"tokens": 64}', '{"hiprune": {"tokens": 64}}'),
        pytest.param(
            *("HIPRUNE_LIMITS_MIN_TOKENS", "16", '{"hiprune_limits": {"min_tokens": 16}}'),
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_setting_that_does_not_reach_the_engine_stops_the_start(
    name, value, flag, tmp_path, clip_checkpoint
):
    command, environment = vllm_serve(tmp_path, clip_checkpoint)
    with (
        pytest.raises(RuntimeError, match="exit code 1") as error,
        running(command, tmp_path, environment=environment | {name: value}),
    ):
        pass
    assert f"--mm-processor-kwargs '{flag}'" in str(error.value)
