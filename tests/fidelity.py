"""Measures how close the engine is to the oracles and prints the README's table: `make fidelity`.

fp32: kept indices equal, positions equal, worst difference of a log-probability. bf16 weights and
arithmetic: overlap of the kept sets with the fp32 oracle's, and the worst difference of a
log-probability from an fp32 oracle that is fed with the engine's own kept set; beside it the same
for unpruned pictures, which is what bf16 costs without any pruning.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.e2e.offline import (
    IN_PROCESS,
    PROMPT,
    engine,
    forget,
    generate,
    in_new_process,
    request,
    spy_on_selection,
    worker_model,
)
from tests.photos import photo
from tests.reference import random_llava
from tests.reference.checkpoints import build_llava_next, build_qwen2_5_vl
from tests.reference.llava import LlavaOracle
from tests.reference.llava_next import LlavaNextOracle
from tests.reference.qwen2_5_vl import QwenOracle

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "hubble")
QWEN_PROMPT = PROMPT.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
RATIOS = (1 / 3, 2 / 9, 1 / 9)
UNPRUNED = {"ratio": 1.0}


def picture(name: str) -> Any:
    image = photo(name)
    image.thumbnail((480, 480))
    return image


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[Path], None]
    oracle: Callable[[Path], Any]
    tokens: tuple[int, ...] | None  # None: by RATIOS
    prompt: str = PROMPT


FAMILIES = (
    Family("LLaVA-1.5", random_llava.build, LlavaOracle, (192, 128, 64)),
    Family("LLaVA-NeXT", build_llava_next, LlavaNextOracle, (640, 320, 160)),
    Family("Qwen2.5-VL", build_qwen2_5_vl, QwenOracle, None, QWEN_PROMPT),
)


def plans(family: Family) -> list[dict[str, Any]]:
    if family.tokens is None:
        return [{"ratio": ratio} for ratio in RATIOS] + [UNPRUNED]
    return [{"tokens": tokens} for tokens in family.tokens] + [UNPRUNED]


def run(path: str, index: int, dtype: str) -> list[tuple[Any, dict[str, Any]]]:
    """Every photo and budget, each alone: kept indices, positions, greedy answer."""
    llm = engine(path, dtype=dtype, max_model_len=4096)
    model, seen = worker_model(llm), []
    recompute = getattr(model, "recompute_mrope_positions", None)
    if recompute is not None:

        def record(*args: Any, **kwargs: Any) -> Any:
            result = recompute(*args, **kwargs)
            seen.append(result[1].clone())
            return result

        model.recompute_mrope_positions = record
    results = []
    for name in PHOTOS:
        for plan in plans(FAMILIES[index]):
            forget(llm)
            seen.clear()
            item = request(picture(name), plan) | {"prompt": FAMILIES[index].prompt}
            with spy_on_selection() as kept:
                (answer,) = generate(llm, [item])
            results.append(((name, plan), answer | {"kept": kept, "positions": seen[:1]}))
    return results


def compare(family: Family, oracle: Any, case: Any, result: dict[str, Any]) -> tuple[Any, ...]:
    """Indices equal, overlap, positions equal (None without M-RoPE), worst difference."""
    name, plan = case
    image = picture(name)
    if plan == UNPRUNED:
        return True, 1.0, None, worst_difference(unpruned(family, oracle, image, result), result)
    wanted, kept = oracle.keep(image, **plan), result["kept"]
    positions = None
    if isinstance(oracle, QwenOracle):
        wanted = [wanted]
        _, expected = oracle.prompt(family.prompt, [image], kept)
        positions = torch.equal(result["positions"][0], expected[:, 0])
        logprobs = oracle.logprobs(family.prompt, [image], kept, result["tokens"])
    elif isinstance(oracle, LlavaNextOracle):
        visual = oracle.embeddings(image, kept)
        logprobs = oracle.logprobs(family.prompt, [visual], result["tokens"])
    else:
        wanted = [wanted]
        visual = oracle.embeddings(image, kept[0])
        logprobs = oracle.logprobs(family.prompt, [visual], result["tokens"])
    worst = worst_difference(logprobs, result)
    common = sum(len(set(a) & set(b)) for a, b in zip(wanted, kept, strict=True))
    return wanted == kept, common / sum(map(len, wanted)), positions, worst


def worst_difference(logprobs: torch.Tensor, result: dict[str, Any]) -> float:
    """Over what might be said at all: other tokens have a probability around e-20."""
    got = torch.tensor(result["logprobs"], dtype=torch.float64)
    worst: float = (got - logprobs)[logprobs > -10].abs().max().item()
    return worst


def unpruned(family: Family, oracle: Any, image: Any, result: dict[str, Any]) -> torch.Tensor:
    if isinstance(oracle, QwenOracle):
        kept = [range(oracle.count(image))]
        return oracle.logprobs(family.prompt, [image], kept, result["tokens"])
    whole = isinstance(oracle, LlavaNextOracle)
    visual = oracle.unpruned(image) if whole else oracle.embeddings(image, range(576))
    logprobs: torch.Tensor = oracle.logprobs(family.prompt, [visual], result["tokens"])
    return logprobs


def main() -> None:
    print(
        "| family | kept indices equal | positions equal | worst logit fp32 "
        "| kept sets' overlap bf16 | worst logit bf16 | the same, unpruned |"
    )
    print("|---|---|---|---|---|---|---|")
    for index, family in enumerate(FAMILIES):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            family.build(path)
            oracle = family.oracle(path)
            measured = {}
            for dtype in ("float32", "bfloat16"):
                print(f"measuring {family.name} in {dtype} ...", file=sys.stderr)
                results = in_new_process(run, folder, index, dtype, environment=IN_PROCESS)
                for control in (False, True):
                    measured[dtype, control] = [
                        compare(family, oracle, *result)
                        for result in results
                        if (result[0][1] == UNPRUNED) is control
                    ]
        fp32, bf16 = measured["float32", False], measured["bfloat16", False]
        control = max(row[3] for row in measured["bfloat16", True])
        equal = sum(row[0] for row in fp32)
        known = [row[2] for row in fp32 + bf16 if row[2] is not None]
        positions = f"{sum(known)} of {len(known)}" if known else "1-D"
        overlap = sum(row[1] for row in bf16) / len(bf16)
        print(
            f"| {family.name} | {equal} of {len(fp32)} | {positions} "
            f"| {max(row[3] for row in fp32):.1e} | {100 * overlap:.1f} % "
            f"| {max(row[3] for row in bf16):.2f} | {control:.2f} |"
        )


if __name__ == "__main__":
    main()
