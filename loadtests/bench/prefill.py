"""c, e, g: time to first token and the language model's prefill, in an engine of this process."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from loadtests import geometry
from loadtests.bench.measure import Run, in_turn, ratio, spread
from loadtests.bench.models import spread as spread_weights

PROMPT = "<s>USER: <image>\nWhat is in this picture?\nASSISTANT: "
TEXT_TOKENS = 48
"""Text around the picture in e."""


def floor(run: Run) -> list[dict[str, Any]]:
    """c: a pruned request against its parts without pruning: encoder, then a prompt as short."""
    size = run.largest("1b", "small")
    llm = _engine(run.folder, f"llava-{size}", run.dtype)
    model = _model(llm)
    numbers = iter(range(1, 10**6))

    def pruned(keep: int) -> Callable[[], float]:
        request = {
            "prompt": PROMPT,
            "mm_processor_kwargs": {"hiprune": {"tokens": keep}},
        }
        return lambda: _first_token(
            run, llm, request | {"multi_modal_data": {"image": picture(next(numbers))}}
        )

    def parts(keep: int) -> Callable[[], float]:
        def measure() -> float:
            pixels = torch.randn(1, 3, 336, 336, device=run.device)
            with torch.inference_mode():
                encoder = run.seconds(lambda: model.embed_multimodal(pixel_values=pixels))
            length = len(llm.get_tokenizer()(PROMPT, add_special_tokens=False)["input_ids"])
            return encoder + _first_token(run, llm, _ids(length - 1 + keep, next(numbers)))

        return measure

    rows = []
    for keep in (192, 128, 64):
        times = in_turn(
            {"floor": parts(keep), "pruned": pruned(keep)},
            2 * run.rounds,
            warm_up=int(keep == 192),
            name=f"c, {keep} tokens",
        )
        rows.append(
            {
                "benchmark": "c",
                "what": f"time to first token at {keep} of 576 over encoder + prefill of as many, "
                f"llava-{size}",
                "target": "<= 1.02",
                "base_seconds": spread(times["floor"]),
                "seconds": spread(times["pruned"]),
                "ratio": ratio(times["pruned"], times["floor"]),
            }
        )
    return rows


def tiles(run: Run) -> list[dict[str, Any]]:
    """g: a picture of 12 tiles and a thumbnail, whole and pruned; all of it is encoded."""
    size = run.largest("1b", "small")
    llm = _engine(run.folder, f"internvl-{size}", run.dtype)
    numbers = iter(range(1, 10**6))
    budgets = (3328, 1024, 256)
    prompt = f"{geometry.INTERNVL_PLACE}\nWhat is in this picture?"

    def first_token(keep: int) -> float:
        request = {
            "prompt": prompt,
            "multi_modal_data": {"image": picture(next(numbers), 1792, 1344)},
            "mm_processor_kwargs": {"hiprune": {"tokens": keep}},
        }
        return _first_token(run, llm, request)

    times = in_turn(
        {str(keep): partial(first_token, keep) for keep in budgets},
        max(1, run.rounds // 2),
        warm_up=0,
        name="g",
    )
    return [
        {
            "benchmark": "g",
            "what": f"time to first token, 13 tiles of internvl-{size}: 3328 over {keep} tokens",
            "target": "> 1",
            "base_seconds": spread(times["3328"]),
            "seconds": spread(times[str(keep)]),
            "ratio": ratio(times["3328"], times[str(keep)]),
        }
        for keep in budgets[1:]
    ]


def table6(run: Run) -> list[dict[str, Any]]:
    """e: prefill of a language model over LLaVA-NeXT's visual tokens and a short text."""
    size = run.largest(*(["7b"] if run.long else []), "1b", "small")
    llm = _engine(run.folder, f"llava-next-{size}", run.dtype)
    numbers = iter(range(1, 10**6))
    budgets = (2880, 640, 320, 160)

    def prefill(keep: int) -> float:
        return _first_token(run, llm, _ids(keep + TEXT_TOKENS, next(numbers)))

    times = in_turn(
        {str(keep): partial(prefill, keep) for keep in budgets},
        max(1, run.rounds // 2),
        warm_up=0,
        name="e",
    )
    return [
        {
            "benchmark": "e",
            "what": f"prefill of a {size.upper()} text model: 2880 over {keep} visual tokens"
            f" (+ {TEXT_TOKENS} of text)",
            "target": ">= 9.2" if keep == 160 else None,
            "base_seconds": spread(times["2880"]),
            "seconds": spread(times[str(keep)]),
            "ratio": ratio(times["2880"], times[str(keep)]),
            "tflops": {
                text: [geometry.prefill_flops(text, n + TEXT_TOKENS) / 1e12 for n in (2880, keep)]
                for text in sorted({size, "7b"})
            },
        }
        for keep in budgets[1:]
    ]


def picture(seed: int, width: int = 336, height: int = 336) -> Image.Image:
    """Noise of its own: no cache has seen it."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _ids(length: int, seed: int) -> dict[str, Any]:
    ids = np.random.default_rng(seed).integers(10, 250, length).tolist()
    return {"prompt_token_ids": ids}


def _engine(folder: Path, name: str, dtype: str) -> Any:
    # vLLM leaves a core to its other processes, of which there are none here.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "3"}
    from vllm import LLM  # noqa: PLC0415

    llm = LLM(
        str(geometry.write(name, folder / name)),
        dtype=dtype,
        load_format="dummy",
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=4096,
        max_num_seqs=4,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
    )
    with torch.inference_mode():
        spread_weights(_model(llm))
    return llm


def _model(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.get_model()


def _first_token(run: Run, llm: Any, request: dict[str, Any]) -> float:
    from vllm import SamplingParams  # noqa: PLC0415

    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    return run.seconds(lambda: llm.generate([request], sampling, use_tqdm=False))
