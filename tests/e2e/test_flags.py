"""The flags that people run: the same 60 questions get the plain start's answers under each.

`make test` runs a sample, the riskiest; `make test-long` all of them.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from hiprune_server.demo import CHECKPOINT
from hiprune_server.demo.world import HELD_OUT, scene
from tests.e2e.serving import BIN, Server, content, running, serve
from tests.photos import data_url, photo
from tests.reference import altered, checkpoints

pytestmark = pytest.mark.timeout(900)
AT_A_TIME = 8
WHAT = "What is in this picture?"
BUDGETS = (None, 192, 64, 9)  # None: all tokens
METHODS = ("hiprune", "attention", "random")
DEMO, QWEN = "demo", "qwen2_5_vl"


def demo_pictures() -> list[list[Any]]:
    drawn = [scene(HELD_OUT + seed).picture for seed in range(6)]
    return [*([one] for one in drawn[:4]), drawn[4:]]


def qwen_pictures() -> list[list[Any]]:
    sizes = {"astronaut": (448, 448), "chelsea": (451, 300), "coffee": (560, 112)}
    drawn = [photo(name).resize(size) for name, size in sizes.items()]
    return [*([one] for one in drawn), [photo("rocket").resize((120, 480))], drawn[::2]]


@dataclass(frozen=True)
class Family:
    """A model, the command that serves it, and its pictures (lists of one or two)."""

    model: str
    command: list[str]
    pictures: list[list[Any]]

    def questions(self) -> list[tuple[list[Any], int | None, str]]:
        return list(product(self.pictures, BUDGETS, METHODS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all servers here: vLLM looks a model's class up once and writes it down there."""
    return tmp_path_factory.mktemp("flags")


@pytest.fixture(scope="module")
def families(folder):
    checkpoint = folder / "qwen"
    checkpoint.mkdir()
    checkpoints.build_qwen2_5_vl(checkpoint)
    exact = serve(checkpoint, "--dtype", "float32")
    return {
        DEMO: Family("hiprune-demo", [str(BIN / "hiprune-serve"), "--demo"], demo_pictures()),
        QWEN: Family("small", exact, qwen_pictures()),
    }


def ask(server: Server, question: Any, path: str = "", **more: Any) -> httpx.Response:
    pictures, tokens, method = question
    plan = {"method": method} | ({"tokens": tokens} if tokens else {})
    body = {
        "model": server.model, "temperature": 0, "max_tokens": 40, "hiprune": plan,
        "messages": [{"role": "user", "content": content(pictures, WHAT)}],
    }  # fmt: skip
    return server.post(f"{path}/v1/chat/completions", body | more)


def told(answer: httpx.Response) -> Any:
    """What the answer says of its pictures, the prompt's length, and the answer itself."""
    assert answer.status_code == httpx.codes.OK, answer.text
    found = answer.json()
    images, prompt = found["hiprune"]["images"], found["usage"]["prompt_tokens"]
    return images, prompt, found["choices"][0]["message"]["content"]


def ask_all(server: Server, family: Family, path: str = "", **more: Any) -> list[Any]:
    questions = family.questions()
    assert len(questions) == 60
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(lambda one: told(ask(server, one, path, **more)), questions))


@pytest.fixture(scope="module")
def start(families, folder):
    """Starts a server of a family with more flags."""

    def server(name: str, *flags: str, environment: dict[str, str] | None = None) -> Any:
        family = families[name]
        return running(
            [*family.command, *flags], folder, model=family.model, environment=environment
        )

    return server


@pytest.fixture(scope="module")
def plain(families, start):
    """Answers of a family's plain start, asked once."""
    answers: dict[str, list[Any]] = {}

    def of(name: str) -> list[Any]:
        if name not in answers:
            with start(name) as server:
                answers[name] = ask_all(server, families[name])
            kept = {image["tokens_kept"] for images, *_ in answers[name] for image in images}
            assert {9, 64} <= kept
            assert len({text for *_, text in answers[name]}) >= 10
        return answers[name]

    return of


def nothing_more(server: Server) -> None:
    """For flags that show in the answers alone."""


def preempted(server: Server) -> None:
    assert server.total("vllm:num_preemptions_total") > 0


def four_pictures_at_most(server: Server) -> None:
    """And a path before every route, as a proxy that does not strip it sends it."""
    question = (demo_pictures()[0] * 5, 9, "hiprune")
    assert ask(server, question).status_code == httpx.codes.BAD_REQUEST
    question = (demo_pictures()[0] * 4, 9, "hiprune")
    assert told(ask(server, question)) == told(ask(server, question, "/models"))
    body = {"model": server.model, "prompt": "Hello", "hiprune": {"tokens": 9}}
    for path in ("", "/models"):
        assert server.post(f"{path}/v1/completions", body).status_code == httpx.codes.BAD_REQUEST


SMALL_STEPS = ("--max-num-batched-tokens", "64", "--max-num-seqs", "16")
# 39 blocks of 32 tokens, one more is vLLM's own: two pictures in full, no room for the answers.
SMALL_CACHE = ("--max-model-len", "1216", "--block-size", "32", "--num-gpu-blocks-override", "40")
LIMITS = ("--limit-mm-per-prompt", '{"image": 4}', "--root-path", "/models")

Check = Callable[[Server], None]
SETS: dict[str, tuple[tuple[str, ...], Check]] = {
    "preempted in steps of 64 tokens": ((*SMALL_STEPS, *SMALL_CACHE), preempted),
    "steps of 64 tokens": (SMALL_STEPS, nothing_more),
    "steps of 600 tokens": (("--max-num-batched-tokens", "600"), nothing_more),
    "pictures in shared memory": (("--mm-processor-cache-type", "shm"), nothing_more),
    "no cache of pictures": (("--mm-processor-cache-gb", "0"), nothing_more),
    "no prefix cache": (("--no-enable-prefix-caching",), nothing_more),
    "one at a time": (("--max-num-seqs", "1"), nothing_more),
    "four pictures, behind a path": (LIMITS, four_pictures_at_most),
    # The CPU engine takes both and schedules as ever.
    "scheduled ahead": (("--async-scheduling",), nothing_more),
    "not scheduled ahead": (("--no-async-scheduling",), nothing_more),
}
SAMPLE = {(QWEN, "preempted in steps of 64 tokens")}
"""What every run has: parts of pictures, encoded again after a preemption."""


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        pytest.param(*one, marks=[] if one in SAMPLE else pytest.mark.long)
        for one in product((DEMO, QWEN), SETS)
    ],
)
def test_flags_change_no_answer(start, families, plain, name, flags):
    expected = plain(name)
    words, check = SETS[flags]
    with start(name, *words) as server:
        assert ask_all(server, families[name]) == expected
        check(server)


def sharing(folder: Path, role: str) -> tuple[str, str]:
    """vLLM's example of a connector for encoder outputs: files in a folder."""
    config = {
        "ec_connector": "ECExampleConnector",
        "ec_role": role,
        "ec_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    return "--ec-transfer-config", json.dumps(config)


@pytest.mark.long
@pytest.mark.parametrize("name", [QWEN, DEMO])
def test_an_encoder_of_its_own_hands_over_kept_tokens_and_their_positions(
    start, families, plain, tmp_path, name
):
    expected = plain(name)
    with start(name, *sharing(tmp_path, "ec_producer"), "--no-enable-prefix-caching") as server:
        for answer in ask_all(server, families[name], max_tokens=1):
            assert not answer[-1]  # it has no language model
    lengths = [len(load_file(file)["ec_cache"]) for file in tmp_path.rglob("*.safetensors")]
    kept = {image["tokens_kept"] for images, *_ in expected for image in images}
    assert set(lengths) == kept
    with start(name, *sharing(tmp_path, "ec_consumer")) as server:
        assert ask_all(server, families[name]) == expected
        assert server.total("hiprune_selection_seconds_count") == 0  # nothing was encoded here
        # What the encoder has not seen is encoded here.
        new = ([photo("hubble").resize((224, 224))], 32, "hiprune")
        assert told(ask(server, new))[0][0]["tokens_kept"] == 32
        assert server.total("hiprune_selection_seconds_count") == 1


@pytest.mark.long
@pytest.mark.parametrize("name", [DEMO, QWEN])
def test_kv_blocks_from_a_connector_answer_as_computed_ones(start, families, plain, tmp_path, name):
    """vLLM's example, files in a folder; it stores prompts that are computed in one step."""
    config = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    flags = ("--kv-transfer-config", json.dumps(config), "--no-enable-prefix-caching")
    with start(name, *flags, "--max-num-batched-tokens", "16384", "--block-size", "32") as server:
        for _ in range(2):  # stored, then read
            assert ask_all(server, families[name]) == plain(name)
        assert server.total("vllm:external_prefix_cache_hits_total") > 0


@pytest.mark.long
def test_a_language_model_in_awqs_4_bits_answers_as_with_the_same_weights_in_bfloat16(
    families, folder, tmp_path
):
    altered.write_awq(CHECKPOINT, tmp_path / "awq", tmp_path / "dequantized")
    answers = {}
    for name in ("awq", "dequantized"):
        command = serve(tmp_path / name, "--dtype", "bfloat16")
        with running(command, folder) as server:
            answers[name] = ask_all(server, families[DEMO])
            log = server.log.read_text()
            assert ("CPUWNA16LinearKernel" in log) is (name == "awq")
    pairs = list(zip(answers["awq"], answers["dequantized"], strict=True))
    assert all(one[:2] == other[:2] for one, other in pairs)  # pictures and prompts
    # Two kernels round bfloat16 sums otherwise: a near-tie may turn, mostly where a question has
    # nine tokens at random and the answer is a guess.
    assert sum(one[2] != other[2] for one, other in pairs) <= 3


@pytest.mark.long
def test_the_served_model_answers_the_same_beside_its_adapter(start, families, plain, tmp_path):
    altered.write_lora(CHECKPOINT, tmp_path, scale=4.0)  # so that most answers are others
    flags = ("--enable-lora", "--lora-modules", f"other={tmp_path}")
    with start(DEMO, *flags) as server, ThreadPoolExecutor(2) as pool:
        base = pool.submit(ask_all, server, families[DEMO])
        other = pool.submit(ask_all, server, families[DEMO], model="other")
        assert base.result() == plain(DEMO)
        pairs = list(zip(base.result(), other.result(), strict=True))
    assert all(mine[:2] == theirs[:2] for mine, theirs in pairs)  # pictures and prompts
    assert sum(mine[2] != theirs[2] for mine, theirs in pairs) > 30


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
def test_two_ranks_with_little_shared_memory_answer_through_refusals_and_cancelled_streams(
    start, families, plain
):
    """Pictures of a request that no rank reads stay in vLLM's shared memory: it fills up."""
    flags = ("--mm-processor-cache-type", "shm", "--mm-processor-cache-gb", "0.05")
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    pictures = [scene(HELD_OUT + 100 + seed).picture for seed in range(40)]  # 54 MB of pixels

    def disturb(server: Server) -> None:
        for number, picture in enumerate(pictures):
            if number % 2:
                # Seen by the processor, and then refused for its sampling; or before all that.
                more = {"top_k": -2} if number % 4 == 1 else {"hiprune": {"tokens": 0}}
                refused = ask(server, ([picture], 64, "hiprune"), **more)
                assert refused.status_code == httpx.codes.BAD_REQUEST
                continue
            body = {
                "model": server.model, "stream": True, "max_tokens": 400, "ignore_eos": True,
                "messages": [{"role": "user", "content": content([data_url(picture)], WHAT)}],
            }  # fmt: skip
            url = f"{server.url}/v1/chat/completions"
            with suppress(httpx.ReadTimeout):
                # Half of them go before the first token.
                limit = httpx.Timeout(60, read=0.05 if number % 4 else 60)
                with httpx.stream("POST", url, json=body, timeout=limit) as stream:
                    next(stream.iter_lines())

    with start(DEMO, "--tensor-parallel-size", "2", *flags, environment=cores) as server:
        with ThreadPoolExecutor(1) as pool:
            disturbed = pool.submit(disturb, server)
            assert ask_all(server, families[DEMO]) == plain(DEMO)
            disturbed.result()
        assert ask_all(server, families[DEMO]) == plain(DEMO)
        assert httpx.get(f"{server.url}/health").status_code == httpx.codes.OK
