"""Runs vLLM in a process of its own, so that every engine of the tests starts on clean ground."""

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from hiprune_vllm.pruning.budget import ImageBudget

PROMPT = "<s>USER: <image>\nWhat is this?\nASSISTANT: "

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _call(function: Callable[..., Any], environment: dict[str, str], args: tuple[Any, ...]) -> Any:
    os.environ.update(environment)
    return function(*args)


def in_new_process(
    function: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None
) -> Any:
    """Result of a module-level function in a fresh process with vLLM's environment set."""
    variables = ENVIRONMENT | (environment or {})
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_call, function, variables, args).result()


def engine(model: str, **options: Any) -> Any:
    """A small offline engine. In-process where the environment says so (`IN_PROCESS`)."""
    from vllm import LLM

    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        options.setdefault("distributed_executor_backend", "uni")
    return LLM(
        model,
        **{
            "dtype": "float32",
            "max_model_len": 2048,
            "max_num_seqs": 32,
            "enforce_eager": True,
            "max_logprobs": -1,
            "disable_log_stats": True,
            **options,
        },
    )


def request(images: Any, hiprune: dict[str, Any] | None, **extra: Any) -> dict[str, Any]:
    """A prompt dict for `LLM.generate` with one image or several."""
    count = len(images) if isinstance(images, list) else 1
    return {
        "prompt": PROMPT.replace("<image>", "<image>" * count),
        "multi_modal_data": {"image": images},
        **({} if hiprune is None else {"mm_processor_kwargs": {"hiprune": hiprune}}),
        **extra,
    }


def generate(llm: Any, requests: list[dict[str, Any]], max_tokens: int = 8) -> list[dict[str, Any]]:
    """Greedy answers: prompt length, token ids, and the log-probabilities of each step."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=-1)
    return [
        {
            "prompt_tokens": len(output.prompt_token_ids),
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                [step[i].logprob for i in range(len(step))] for step in output.outputs[0].logprobs
            ],
        }
        for output in llm.generate(requests, sampling, use_tqdm=False)
    ]


def worker_model(llm: Any) -> Any:
    """The model of an in-process engine."""
    return llm.llm_engine.model_executor.driver_worker.worker.get_model()


def scheduler(llm: Any) -> Any:
    """The scheduler of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner(llm: Any) -> Any:
    """The model runner of an in-process engine."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


@contextmanager
def pixels_of_steps(llm: Any) -> Iterator[list[int]]:
    """Notes how many pixel values an in-process engine moves to the device in every step."""
    of_worker, model, steps = runner(llm), worker_model(llm), []
    step, embed = of_worker._execute_mm_encoder, model.embed_multimodal

    def note_step(*args: Any, **kwargs: Any) -> Any:
        steps.append(0)
        result = step(*args, **kwargs)
        if not steps[-1]:
            steps.pop()
        return result

    def note_pixels(**kwargs: Any) -> Any:
        steps[-1] += kwargs["pixel_values"].numel()
        return embed(**kwargs)

    of_worker._execute_mm_encoder, model.embed_multimodal = note_step, note_pixels
    try:
        yield steps
    finally:
        del of_worker._execute_mm_encoder
        del model.embed_multimodal


_identities = itertools.count(1)


def budget_rows(budgets: Iterable[ImageBudget]) -> torch.Tensor:
    """What a model's `embed_multimodal` takes as `hiprune_budget`, for images never seen before."""
    from hiprune_vllm.engine.wire import pack_item

    return torch.tensor([pack_item(budget, f"{next(_identities):015x}") for budget in budgets])


@contextmanager
def spy_on_selection() -> Iterator[list[list[int]]]:
    """Collects the kept indices of every picture or tile that is selected, in order."""
    from hiprune_vllm.models import encode

    kept: list[list[int]] = []
    choose = encode.choose

    def spy(*args: Any, **kwargs: Any) -> Any:
        chosen = choose(*args, **kwargs)
        kept.extend(chosen[row].tolist() for row in sorted(chosen))
        return chosen

    encode.choose = spy
    try:
        yield kept
    finally:
        encode.choose = choose


def forget(llm: Any) -> None:
    """Empties all caches of an in-process engine: equal plans would share an entry."""
    llm.reset_prefix_cache()
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    worker_model(llm)._kept_before.clear()


def one_by_one(llm: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kept indices and greedy answers, each request alone in the engine and encoded anew."""
    results = []
    for item in requests:
        forget(llm)
        with spy_on_selection() as kept:
            (answer,) = generate(llm, [item])
        results.append(answer | {"kept": kept})
    return results
