"""Runs vLLM in a process of its own, so that every engine of the tests starts on clean ground."""

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hiprune_vllm.pruning.budget import ImageBudget

PROMPT = "<s>USER: <image>\nWhat is this?\nASSISTANT: "

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

WHOLE_SWEEPS = os.environ.get("SWEEPS") == "whole"
"""Whether sweeps run whole (`make test-long`) and not a fixed sample of them."""


def swept(cases: Iterable[Any], every: int) -> list[Any]:
    """All cases of a sweep, or the first of every so many; tests of it are marked `sweep`."""
    return list(cases)[:: 1 if WHOLE_SWEEPS else every]


IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

INTERPRETED = Path(__file__).parent.parent / "interpreted"
INTERPRETED_KERNELS = {
    "TRITON_INTERPRET": "1",
    "TORCH_COMPILE_DISABLE": "1",  # the compiler would ask Triton's back end for more than it has
    "PYTHONPATH": os.pathsep.join(filter(None, [str(INTERPRETED), os.environ.get("PYTHONPATH")])),
}
"""Triton's kernels run on the CPU."""

NEWER_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
"""vLLM's newer model runner, which CUDA engines have by themselves."""
if not torch.cuda.is_available():
    NEWER_RUNNER |= INTERPRETED_KERNELS


@contextmanager
def new_process(environment: dict[str, str] | None = None) -> Iterator[Callable[..., Any]]:
    """Calls module-level functions in one fresh process with vLLM's environment set."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def call(function: Callable[..., Any], *args: Any) -> Any:
        # It starts at the first call: what is read before any of our code runs has to be there.
        with patch.dict(os.environ, ENVIRONMENT | (environment or {})):
            return pool.submit(function, *args).result()

    with pool:
        yield call


def in_new_process(
    function: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None
) -> Any:
    """Result of a module-level function in a fresh process with vLLM's environment set."""
    with new_process(environment) as call:
        return call(function, *args)


def schedule_ahead() -> None:
    """Leaves vLLM's choice to schedule a step while another one runs, as on CUDA. Idempotent.

    On the CPU vLLM takes it back, since its older runner has nothing of it there.
    """
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    check = platform.check_and_update_config
    if not current_platform.is_cpu() or hasattr(check, "of_vllm"):
        return

    def check_all_else(config: Any) -> None:
        chosen = config.scheduler_config.async_scheduling
        check(config)
        config.scheduler_config.async_scheduling = chosen

    check_all_else.of_vllm = check  # type: ignore[attr-defined]
    platform.check_and_update_config = staticmethod(check_all_else)


def engine(model: str, **options: Any) -> Any:
    """A small offline engine. In-process where the environment says so (`IN_PROCESS`)."""
    from vllm import LLM

    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        schedule_ahead()
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


def assert_same_answer(
    answer: dict[str, Any], expected: torch.Tensor, within: float = 5e-3
) -> None:
    """Greedy by the oracle's log-probabilities at every step, and all of them close to the own."""
    assert expected.argmax(dim=-1).tolist() == answer["tokens"]
    got = torch.tensor(answer["logprobs"], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=within)


def worker_model(llm: Any) -> Any:
    """The model of an in-process engine."""
    return llm.llm_engine.model_executor.driver_worker.worker.get_model()


def record_positions(llm: Any) -> dict[int, torch.Tensor]:
    """The last 3-D positions that the worker has from now on of a prompt, by its length."""
    model = worker_model(llm)
    seen: dict[int, torch.Tensor] = {}
    recompute = model.recompute_mrope_positions

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = recompute(*args, **kwargs)
        seen[result[1].shape[1]] = result[1].clone().cpu()  # the newer runner's are on the device
        return result

    model.recompute_mrope_positions = spy
    return seen


def scheduler(llm: Any) -> Any:
    """The scheduler of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner(llm: Any) -> Any:
    """The model runner of an in-process engine."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def lose_encoder_outputs(llm: Any) -> None:
    """Empties vLLM's own cache of an in-process engine: a reset would empty more."""
    scheduler(llm).encoder_cache_manager.reset()
    cache = runner(llm).encoder_cache
    getattr(cache, "encoder_outputs", cache).clear()  # the newer runner's is an object


@contextmanager
def pixels_of_steps(llm: Any) -> Iterator[list[int]]:
    """Notes how many pixel values an in-process engine moves to the device in every step."""
    model, steps = worker_model(llm), []
    of_worker, name = runner(llm), "_execute_mm_encoder"
    if not hasattr(of_worker, name):  # vLLM's newer runner
        of_worker, name = of_worker.model_state, "execute_mm_encoder"
    step, embed = getattr(of_worker, name), model.embed_multimodal

    def note_step(*args: Any, **kwargs: Any) -> Any:
        steps.append(0)
        result = step(*args, **kwargs)
        if not steps[-1]:
            steps.pop()
        return result

    def note_pixels(**kwargs: Any) -> Any:
        steps[-1] += kwargs["pixel_values"].numel()
        return embed(**kwargs)

    setattr(of_worker, name, note_step)
    model.embed_multimodal = note_pixels
    try:
        yield steps
    finally:
        delattr(of_worker, name)
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
