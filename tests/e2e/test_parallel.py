"""What is kept and answered does not depend on ranks, stages, engines or drafts."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import httpx
import pytest
import torch

from tests.e2e import test_llava_next_oracle as llava_next
from tests.e2e import test_qwen_oracle as qwen
from tests.e2e.offline import IN_PROCESS, engine, generate, in_new_process, request
from tests.e2e.serving import running, serve
from tests.photos import data_url, photo
from tests.reference import checkpoints

needs_two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
needs_two_gpus_or_none = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none"
)
A_CORE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
COMPARED = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # sends a function
    "PRUNING_SECRET": "of all engines here",  # which know a picture by the same key then
}
TEXT = "abab cdcd What is this? abab cdcd "  # something to look drafts up in
TOKENS = 32


def next_requests():
    plans = ({"tokens": 320, "alpha": 0.5, "buffer": "square"}, {"tokens": 7}, None)
    return [
        request(llava_next.picture(name), plan)
        for name, plan in product(("square", "narrow"), plans)
    ]


def qwen_requests():
    text = {"before": TEXT, "after": TEXT}
    names, plans = ("square", "wide", "tall"), ({"ratio": 1 / 3}, {"tokens": 9, "alpha": 0.5}, None)
    several = [qwen.picture(name) for name in ("wide", "square", "tall")]
    return [
        *(qwen.ask([qwen.picture(name)], plan, **text) for name, plan in product(names, plans)),
        qwen.ask(several, [{"tokens": 20}, {}, {"ratio": 0.5}], **text),
    ]


FAMILIES = {
    "llava_next": (
        checkpoints.build_llava_next,
        next_requests,
        {"max_model_len": 8192, "max_num_batched_tokens": 8192},
    ),
    # Less than a picture at a time: 3-D positions come in pieces.
    "qwen2_5_vl": (checkpoints.build_qwen2_5_vl, qwen_requests, {"max_num_batched_tokens": 48}),
}


def remembered(model):
    """What a worker has kept of every picture. Runs there."""
    return {key: [part.tolist() for part in one.kept] for key, one in model._kept_before.items()}


def run(path, family, options):
    _, requests, family_options = FAMILIES[family]
    llm = engine(path, disable_log_stats=False, **family_options | options)
    answers = generate(llm, requests(), TOKENS)
    accepted = [
        metric.value
        for metric in llm.get_metrics()
        if metric.name == "vllm:spec_decode_num_accepted_tokens"
    ]
    return {"answers": answers, "kept": llm.apply_model(remembered), "accepted": sum(accepted)}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Gives what an engine of a family does with certain options; each is asked once."""
    folders, results = {}, {}

    def ask(family, **options):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            FAMILIES[family][0](folders[family])
        key = family, repr(options)
        if key not in results:
            ranks = any(name.endswith("parallel_size") for name in options)
            results[key] = in_new_process(
                run, str(folders[family]), family, options,
                environment=COMPARED | (A_CORE_EACH if ranks else IN_PROCESS),
            )  # fmt: skip
        return results[key]

    return ask


def assert_same_answers(found, expected):
    for one, other in zip(found["answers"], expected["answers"], strict=True):
        assert one["prompt_tokens"] == other["prompt_tokens"]
        assert one["tokens"] == other["tokens"]
        torch.testing.assert_close(
            torch.tensor(one["logprobs"]), torch.tensor(other["logprobs"]), rtol=0, atol=5e-3
        )


@needs_two_cores
@needs_two_gpus_or_none
@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", pytest.param("llava_next", marks=pytest.mark.long)]
)
def test_two_tensor_parallel_ranks_keep_and_answer_what_one_rank_does(result, family):
    alone, two = result(family), result(family, tensor_parallel_size=2)
    (kept,) = alone["kept"]
    assert len(kept) >= 4
    assert two["kept"] == [kept, kept]
    assert_same_answers(two, alone)


@needs_two_cores
@needs_two_gpus_or_none
@pytest.mark.long
def test_two_ranks_that_share_pictures_keep_and_answer_what_one_rank_does(result):
    room = {"max_num_batched_tokens": 2048}  # several pictures a step: seven, three of one request
    alone = result("qwen2_5_vl", **room)
    two = result("qwen2_5_vl", tensor_parallel_size=2, mm_encoder_tp_mode="data", **room)
    (kept,) = alone["kept"]
    assert len(kept) >= 4
    assert two["kept"] == [kept, kept]  # each rank knows what the other one has chosen
    assert_same_answers(two, alone)


@pytest.mark.long
@needs_two_cores
@needs_two_gpus_or_none
def test_every_stage_of_a_pipeline_has_the_3d_positions_of_kept_tokens(result):
    alone, two = result("qwen2_5_vl"), result("qwen2_5_vl", pipeline_parallel_size=2)
    assert two["kept"] == [*alone["kept"], {}]  # the first stage alone encodes
    assert_same_answers(two, alone)


@pytest.mark.long
def test_drafts_looked_up_in_the_prompt_change_no_answer(result):
    ngram = {"method": "ngram", "num_speculative_tokens": 3}
    drafted = result(
        "qwen2_5_vl",
        speculative_config=ngram | {"prompt_lookup_min": 1, "prompt_lookup_max": 3},
    )
    assert drafted["accepted"] > 10
    assert drafted["kept"] == result("qwen2_5_vl")["kept"]
    assert_same_answers(drafted, result("qwen2_5_vl"))


BUDGETS = (64, 17, 1, 576)
PHOTOS = ("astronaut", "chelsea", "coffee")
CASES = tuple(product(PHOTOS, BUDGETS))
EXACT = ("--dtype", "float32")  # vLLM would serve these weights in bfloat16


def ask(server, case):
    """Kept tokens as the answer tells them, and the tokens of prompt and answer."""
    name, budget = case
    extra = {"hiprune": {"tokens": budget}, "return_token_ids": True}
    answer = server.ask([photo(name)], extra_body=extra)
    (image,) = answer.hiprune["images"]
    return image["tokens_kept"], answer.prompt_token_ids, answer.choices[0].token_ids


def explain(server, case):
    name, budget = case
    body = {"image_url": data_url(photo(name)), "hiprune": {"tokens": budget}}
    response = server.post("/v1/hiprune/explain", body)
    assert response.status_code == 200, response.text
    (part,) = response.json()["parts"]
    return part["kept"]


def all_at_once(server):
    """Answers and explanations of all cases, asked for together."""
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, server, case) for case in CASES]
        explanations = [pool.submit(explain, server, case) for case in CASES]
        return [one.result() for one in answers], [one.result() for one in explanations]


@pytest.fixture(scope="module")
def oracle(clip_checkpoint):
    from tests.reference.llava import LlavaOracle

    return LlavaOracle(clip_checkpoint)


def check_all(server, oracle):
    """Everything asked for is the oracle's, and a wrong wish is a 400."""
    answers, explanations = all_at_once(server)
    image = oracle.processor.tokenizer.convert_tokens_to_ids("<image>")
    for (name, budget), (kept, prompt, tokens), explained in zip(
        CASES, answers, explanations, strict=True
    ):
        expected = oracle.keep(photo(name), tokens=budget)
        assert explained == expected
        assert kept == prompt.count(image) == budget
        text = "<s>USER: What is this?<image>ASSISTANT: "
        visual = oracle.embeddings(photo(name), expected)
        assert oracle.logprobs(text, [visual], tokens).argmax(dim=-1).tolist() == tokens
    wrong = {"image_url": data_url(photo("coffee")), "hiprune": {"tokens": 0}}
    assert server.post("/v1/hiprune/explain", wrong).status_code == 400
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.long
@needs_two_cores
@needs_two_gpus_or_none
def test_a_server_with_a_pipeline_answers_and_explains_as_the_oracle(
    clip_checkpoint, oracle, tmp_path
):
    command = serve(clip_checkpoint, *EXACT, "--pipeline-parallel-size", "2")
    with running(command, tmp_path, environment=A_CORE_EACH) as server:
        check_all(server, oracle)


@pytest.mark.long
@needs_two_cores
@needs_two_gpus_or_none
def test_a_server_with_two_engines_answers_as_the_oracle_and_counts_what_both_do(
    clip_checkpoint, oracle, tmp_path
):
    engines = ("--data-parallel-size", "2", "--api-server-count", "1")
    command = serve(clip_checkpoint, *EXACT, *engines)
    with running(command, tmp_path, environment=A_CORE_EACH) as server:
        check_all(server, oracle)
        assert server.total("hiprune_images_total") == len(CASES)
        assert server.total("hiprune_visual_tokens_kept_total") == len(PHOTOS) * sum(BUDGETS)
        assert server.total("hiprune_time_to_first_token_seconds_count") == len(CASES)
        assert server.total("hiprune_rejected_requests_total") == 1
        done = [server.total("vllm:request_success_total", engine=name) for name in ("0", "1")]
        assert sum(done) == len(CASES)
        assert min(done) > 0
        assert server.total("hiprune_selection_seconds_count") > 0


@pytest.mark.long
@needs_two_cores
@needs_two_gpus_or_none
def test_a_server_whose_ranks_share_pictures_explains_what_it_keeps(tmp_path):
    from tests.reference.qwen import QwenOracle

    checkpoints.build_qwen2_5_vl(tmp_path)
    ranks = ("--tensor-parallel-size", "2", "--mm-encoder-tp-mode", "data")
    command = serve(tmp_path, *EXACT, *ranks)
    oracle = QwenOracle(tmp_path)
    with running(command, tmp_path, environment=A_CORE_EACH) as server:
        with ThreadPoolExecutor(4) as pool:
            cases = [(name, budget) for name in PHOTOS for budget in (1, 17, 60)]
            answers = [pool.submit(ask, server, case) for case in cases]
            explanations = [pool.submit(explain, server, case) for case in cases]
        for (name, budget), answer, explained in zip(cases, answers, explanations, strict=True):
            assert explained.result() == oracle.keep(photo(name), tokens=budget)
            assert answer.result()[0] == budget
