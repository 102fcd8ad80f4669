"""vLLM's newer model runner, which CUDA engines have, as a whole: on the CPU, kernels interpreted.

`make test-long` runs the oracles and what else is asked of an offline engine on it, too.
"""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.e2e import test_qwen_oracle as qwen
from tests.e2e.offline import (
    IN_PROCESS,
    NEWER_RUNNER,
    engine,
    forget,
    generate,
    in_new_process,
    lose_encoder_outputs,
    record_positions,
    runner,
    scheduler,
    spy_on_selection,
    worker_model,
)
from tests.e2e.test_explain import explained
from tests.reference.qwen import QwenOracle

HERE = Path(__file__).parent
ANSWER = 24
PLANS = ({"ratio": 1 / 3}, {"tokens": 9, "alpha": 0.5, "buffer": "square"}, None)
CASES = tuple(product(("square", "wide", "tall"), PLANS))
SEVERAL = ("wide", "square", "tall", "wide")
KEEP = [{"tokens": 20}, {}, {"ratio": 0.5}, {"tokens": 21}]
# A step has less than a picture; 13 blocks of 32 tokens are room for four of the requests at most.
OPTIONS = {
    "max_num_batched_tokens": 48,
    "max_num_seqs": 16,
    "block_size": 32,
    "num_gpu_blocks_override": 14,
    "max_model_len": 416,
}


def warm_up(llm):
    """What a CUDA worker does between loading a model and its first request."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    # The interpreter cannot run the kernels of every sampling parameter.
    SamplingParams.for_sampler_warmup = staticmethod(
        lambda: SamplingParams(temperature=0, max_tokens=4)
    )
    worker = llm.llm_engine.model_executor.driver_worker.worker
    worker.model_runner.profile_run()
    left = len(worker.model_runner.encoder_cache)
    warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
    return left


def run(path):
    extension = "hiprune_vllm.engine.explain.ExplainExtension"
    llm = engine(path, disable_log_stats=False, worker_extension_cls=extension, **OPTIONS)
    results = {
        "runner": [one.__module__ for one in type(runner(llm)).__mro__],
        "scheduler": type(scheduler(llm)).__name__,
        "left_by_warm_up": warm_up(llm),
    }
    items = [qwen.ask([qwen.picture(name)], plan) for name, plan in CASES]
    results["alone"] = []
    for item in items:
        forget(llm)
        positions = record_positions(llm)
        with spy_on_selection() as kept:
            (answer,) = generate(llm, [item])
        del worker_model(llm).recompute_mrope_positions
        found = positions[answer["prompt_tokens"]]
        results["alone"].append(answer | {"kept": kept, "positions": found})
    forget(llm)
    results["together"] = generate(llm, items * 2, ANSWER)
    several = qwen.ask([qwen.picture(name) for name in SEVERAL], KEEP)
    forget(llm)
    results["several"] = generate(llm, [several])[0]
    # The prompt is known up to somewhere in the last picture, its encoder's output is not.
    lose_encoder_outputs(llm)
    again = {**several, "prompt": several["prompt"].replace("What", "How")}
    results["hit"] = generate(llm, [again])[0]
    results["preemptions"] = sum(
        one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions"
    )
    forget(llm)
    ((part,), _) = explained(llm, qwen.prompt(1), qwen.picture("tall"), PLANS[0])
    results["explained"] = part["kept"]
    results["left"] = {}
    for name, reset in {
        "mm_cache": llm.llm_engine.reset_mm_cache,
        "encoder_cache": llm.llm_engine.reset_encoder_cache,
        "weights": lambda: llm.collective_rpc("reload_weights"),
    }.items():
        forget(llm)
        generate(llm, items[:1], 1)
        assert len(worker_model(llm)._kept_before) == 1
        reset()
        results["left"][name] = len(worker_model(llm)._kept_before)
    forget(llm)
    results["after"] = generate(llm, items[:1])[0]
    return results


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    qwen.build_qwen2_5_vl(folder)
    return folder


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return QwenOracle(checkpoint)


@pytest.fixture(scope="module")
def results(checkpoint):
    return in_new_process(run, str(checkpoint), environment=IN_PROCESS | NEWER_RUNNER)


def test_it_is_the_newer_runner_that_runs_and_as_on_cuda(results):
    assert "vllm.v1.worker.gpu.model_runner" in results["runner"]
    assert results["scheduler"] == "AsyncScheduler"
    assert results["left_by_warm_up"] == 0
    assert results["preemptions"] > 0


def test_kept_indices_positions_and_answers_equal_the_oracles(results, oracle):
    for (name, plan), found in zip(CASES, results["alone"], strict=True):
        image = qwen.picture(name)
        kept = oracle.keep(image, **(plan or {"ratio": 1.0}))
        assert found["kept"] == ([] if plan is None else [kept])
        positions = oracle.prompt(qwen.prompt(1), [image], [kept]).positions
        assert torch.equal(found["positions"], positions[:, 0])
        expected = oracle.logprobs(qwen.prompt(1), [image], [kept], found["tokens"])
        qwen.assert_same_answer(found, expected)


def test_preempted_requests_in_chunks_answer_as_the_oracle(results, oracle):
    for (name, plan), found in zip(CASES * 2, results["together"], strict=True):
        image = qwen.picture(name)
        kept = oracle.keep(image, **(plan or {"ratio": 1.0}))
        assert len(found["tokens"]) == ANSWER
        expected = oracle.logprobs(qwen.prompt(1), [image], [kept], found["tokens"])
        qwen.assert_same_answer(found, expected)


def test_pictures_that_are_encoded_again_for_their_second_half_keep_what_they_kept(results, oracle):
    images = [qwen.picture(name) for name in SEVERAL]
    kept = [
        oracle.keep(image, **(plan or {"ratio": 1.0}))
        for image, plan in zip(images, KEEP, strict=True)
    ]
    for name, question in (("several", "What is this?"), ("hit", "How is this?")):
        text, found = qwen.prompt(len(images), after=question), results[name]
        qwen.assert_same_answer(found, oracle.logprobs(text, images, kept, found["tokens"]))


def test_what_is_explained_is_what_is_kept_and_caches_are_emptied_together(results, oracle):
    assert results["explained"] == oracle.keep(qwen.picture("tall"), **PLANS[0])
    assert results["left"] == {"mm_cache": 0, "encoder_cache": 0, "weights": 0}
    before = results["alone"][0]
    assert results["after"]["tokens"] == before["tokens"]


OFFLINE = (
    "test_explain", "test_llava_next_oracle", "test_llava_oracle", "test_parallel",
    "test_qwen_oracle", "test_remembering", "test_tensor_parallel",
)  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA engines have it in these files already")
@pytest.mark.parametrize("name", OFFLINE)
def test_what_is_asked_of_an_engine_holds_on_the_newer_runner(monkeypatch, name):
    for variable, value in NEWER_RUNNER.items():
        monkeypatch.setenv(variable, value)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / f"{name}.py"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-8000:]
