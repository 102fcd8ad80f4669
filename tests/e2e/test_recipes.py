"""The command lines of published recipes, with a small checkpoint of the class that each is for."""

import json

import pytest

from tests.e2e.serving import BIN, running
from tests.photos import photo
from tests.reference.families import FAMILIES

A_CORE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
TWO_RANKS = ("--tensor-parallel-size", "2", "--mm-encoder-tp-mode", "data")
MTP = ("--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 2}))
IN_BFLOAT16 = ("--dtype", "bfloat16", "--no-enable-prefix-caching")
# On a GPU these go without the last flag: vLLM's CPU engine has no kernel for both.
RECIPES = {
    "qwen2_5_vl": (*TWO_RANKS, "--limit-mm-per-prompt", '{"image": 2, "video": 0}'),
    "qwen3_vl": (*TWO_RANKS, "--async-scheduling", "--mm-processor-cache-type", "shm"),
    # Without --enable-expert-parallel: vLLM's CPU kernels end with a fault in memory under it.
    "qwen3_vl_moe": (*TWO_RANKS, "--async-scheduling"),
    "qwen3_5": (*IN_BFLOAT16, *MTP, "--reasoning-parser", "qwen3"),
    "qwen3_5_moe": (
        *IN_BFLOAT16,
        *MTP,
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
    ),
    "llava_next": ("--mm-encoder-tp-mode", "data", "--tensor-parallel-size", "2"),
    "mistral3": (*TWO_RANKS, "--config-format", "hf", "--load-format", "hf"),
}


def served(name, folder, log, flags, ranks):
    FAMILIES[name].build(folder)
    command = [
        *(str(BIN / "hiprune-serve"), str(folder), "--served-model-name", "small"),
        *("--max-model-len", "4096", "--enforce-eager", *flags),
    ]
    return running(command, log, environment=A_CORE_EACH if ranks else {})


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_serves_pruned_and_whole_pictures(name, tmp_path_factory):
    flags = RECIPES[name]
    folder, log = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("log")
    with served(name, folder, log, flags, "2" in flags) as server:
        pictures = [photo("chelsea"), photo("coffee").resize((160, 120))]
        whole = server.ask(pictures[:1])
        assert whole.choices[0].finish_reason in ("length", "stop")
        for _ in range(2):  # the second from what is remembered and cached
            answer = server.ask(pictures, extra_body={"hiprune": {"ratio": 0.5}})
            images = answer.model_extra["hiprune"]["images"]
            kept = sum(image["tokens_kept"] for image in images)
            assert kept < sum(image["tokens_full"] for image in images)
            assert answer.usage.completion_tokens
            assert answer.usage.prompt_tokens_details.image_tokens == kept


@pytest.mark.long
def test_a_server_for_text_alone_has_no_tower_and_refuses_pictures(tmp_path_factory):
    folder, log = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("log")
    flags = ("--dtype", "bfloat16", "--language-model-only")
    with served("qwen3_5", folder, log, flags, ranks=False) as server:
        answer = server.ask([], "What is this?")
        assert answer.usage.completion_tokens
        assert answer.usage.prompt_tokens_details.image_tokens == 0
        refused = server.post(
            "/v1/chat/completions",
            {
                "model": "small",
                "messages": [{"role": "user", "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
                ]}],
            },
        )  # fmt: skip
        assert refused.status_code == 400
