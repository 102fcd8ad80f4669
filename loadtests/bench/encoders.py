"""a and b: encoder, selection and projector against vLLM's own, which has no selection."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
import torch

from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.scores import attention_received
from loadtests import geometry
from loadtests.bench.measure import Run, in_turn, progress, ratio, spread
from loadtests.bench.models import embed, loaded

BUDGETS = (192, 128, 64)
MIB = 2**20
WHOLE = "whole last block"


def clip(run: Run) -> list[dict[str, Any]]:
    """CLIP-L/14-336 with the projector of LLaVA-1.5-7B."""
    checkpoint = geometry.write("llava-7b", run.folder / "llava-7b")
    rows = []
    with loaded(checkpoint, dtype=run.dtype, device=run.device, text_layers=1) as model:
        for batch in (1,) if run.quick else (1, 8):
            pixels = torch.randn(batch, 3, 336, 336, device=run.device)
            work: dict[str, Callable[[], float]] = {
                "vllm": _timed(run, "kept", model, None, pixel_values=pixels)
            }
            for keep in BUDGETS:
                plans = [_plan(576, keep, 9)] * batch
                work[str(keep)] = _timed(run, "kept", model, plans, pixel_values=pixels)
            if batch == 1:
                plans = [_plan(576, BUDGETS[0], 9)]
                work[WHOLE] = _timed(run, "whole", model, plans, pixel_values=pixels)
            times = in_turn(
                work,
                2 * run.rounds if batch == 1 else max(2, run.rounds // 2),
                warm_up=int(batch == 1),
                name=f"a, batch of {batch}",
            )
            rows += [
                {
                    "benchmark": "a",
                    "what": f"CLIP-L/14-336, batch of {batch}, "
                    + (f"192 of 576, {WHOLE}" if way == WHOLE else f"{way} of 576"),
                    "target": None if way == WHOLE else "<= 1.00" if way == "192" else "<= 1.02",
                    "base_seconds": spread(times["vllm"]),
                    "seconds": spread(times[way]),
                    "ratio": ratio(times[way], times["vllm"]),
                }
                for way in work
                if way != "vllm"
            ]
    return rows


def qwen(run: Run) -> list[dict[str, Any]]:
    """Qwen2.5-VL's tower, 32 blocks of width 1280, at ratio 1/3; peak memory of one scoring."""
    checkpoint = geometry.write("qwen-1b", run.folder / "qwen-1b")
    rows = [_memory(16384, run)]
    with loaded(checkpoint, dtype=run.dtype, device=run.device, text_layers=1) as model:
        for side in (32, 64, 128) if run.long else (32,):
            patches = side * side
            inputs = {
                "pixel_values": torch.randn(
                    patches, 1176, device=run.device, dtype=model.visual.dtype
                ),
                "image_grid_thw": torch.tensor([[1, side, side]]),
            }
            plan = [_plan(patches // 4, round(patches / 4 / 3), 16)]
            times = in_turn(
                {
                    "vllm": _timed(run, "kept", model, None, **inputs),
                    "1/3": _timed(run, "kept", model, plan, **inputs),
                    WHOLE: _timed(run, "whole", model, plan, **inputs),
                },
                max(1, run.rounds * 1024 // patches),
                warm_up=int(patches == 1024),
                name=f"b, {patches} patches",
            )
            rows += [
                {
                    "benchmark": "b",
                    "what": f"Qwen2.5-VL tower, {patches} patches, a third kept"
                    + (f", {WHOLE}" if way == WHOLE else ""),
                    "target": None if way == WHOLE else "<= 1.02",
                    "base_seconds": spread(times["vllm"]),
                    "seconds": spread(times[way]),
                    "ratio": ratio(times[way], times["vllm"]),
                }
                for way in ("1/3", WHOLE)
            ]
    return rows


def _plan(full: int, keep: int, layer: int) -> ImageBudget:
    return ImageBudget.of(
        full, keep, method="hiprune", alpha=0.1, buffer="cross", object_layer=layer, score="global"
    )


def _timed(
    run: Run, last_block: str, model: Any, plans: list[ImageBudget] | None, **inputs: Any
) -> Callable[[], float]:
    def work() -> float:
        os.environ["PRUNING_LAST_BLOCK"] = last_block
        return run.seconds(partial(embed, model, plans, **inputs))

    return work


def _memory(patches: int, run: Run) -> dict[str, Any]:
    """Memory that the scores of one layer need on top of Q and K, at their highest."""
    heads, width = 16, 80
    shape, dtype = (1, patches, heads, width), getattr(torch, run.dtype)
    query, key = (torch.randn(shape, device=run.device).to(dtype) for _ in range(2))
    attention_received(query[:, :64], key[:, :64], width**-0.5)
    mebibytes = []
    for _ in range(3):  # what allocators and libraries keep for later differs from time to time
        with _peak(run.device) as peak:
            took = run.seconds(lambda: attention_received(query, key, width**-0.5))
        mebibytes.append(peak[0] / MIB)
        progress(f"b: scores of {patches} patches: {mebibytes[-1]:.1f} MiB in {took:.1f} s")
    return {
        "benchmark": "b",
        "what": f"additional memory of the scores at {patches} patches, MiB",
        "target": "<= 64",
        "value": spread(mebibytes),
        "full_matrix_mib": heads * patches**2 * 4 / MIB,
    }


@contextmanager
def _peak(device: str) -> Iterator[list[float]]:
    """Bytes by which memory grows at most; on a CPU looked at every millisecond."""
    grown = [0.0]
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield grown
        grown[0] = torch.cuda.max_memory_allocated() - before
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.is_set():
            grown[0] = max(grown[0], process.memory_info().rss - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield grown
    finally:
        done.set()
        watcher.join()
