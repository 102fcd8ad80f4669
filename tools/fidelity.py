"""`make fidelity`: how close the engine is to the oracles, the table of docs/results.md.

fp32: kept indices equal, positions equal, worst difference of a log-probability. bf16 weights and
arithmetic: overlap of the kept sets with the fp32 oracle's, and the worst difference of a
log-probability from an fp32 oracle that is fed with the engine's own kept set; beside it the same
for unpruned pictures, which is what bf16 costs without any pruning.
"""

import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tests.e2e.offline import (
    IN_PROCESS,
    engine,
    forget,
    generate,
    in_new_process,
    spy_on_selection,
    worker_model,
)
from tests.photos import photo
from tests.reference import gemma3
from tests.reference.families import FAMILIES, Family
from tests.reference.oracles import Oracle
from tests.reference.qwen import QwenOracle

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "hubble")
NAMES = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "granite_vision": "Granite Vision",
    "llava_onevision": "LLaVA-OneVision",
    "mistral3": "Mistral Small 3",
    "ministral3": "Ministral 3",
    "pixtral": "Pixtral",
    "gemma4": "Gemma 4",
    "gemma4_moe": "Gemma 4, experts",
    "internvl": "InternVL",
    "internvl_hf": "InternVL, other layout",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL, experts",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5, experts",
    "gemma3": "Gemma 3",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "kimi_vl": "Kimi-VL",
    "kimi_k25": "Kimi K2.5",
    "glm4v": "GLM-4.1V",
    "glm46v": "GLM-4.6V",
    "glm4v_moe": "GLM-4.5V, experts",
}
BUDGETS = {
    "llava": (192, 128, 64),
    **dict.fromkeys(("llava_next", "granite_vision", "llava_onevision"), (640, 320, 160)),
}
"""Tokens; of the other families a third, two ninths and a ninth."""
UNPRUNED = {"ratio": 1.0}


def picture(name: str) -> Any:
    image = photo(name)
    image.thumbnail((480, 480))
    return image


def prompt(family: Family) -> str:
    # Gemma 3's processor takes a single newline for the picture's own.
    after = " " if family.image == gemma3.PICTURE else "\n"
    return f"USER: {family.image}{after}What is this?\nASSISTANT: "


def plans(name: str) -> list[dict[str, Any]]:
    budgets = [{"tokens": tokens} for tokens in BUDGETS.get(name, ())]
    return [*(budgets or [{"ratio": ninths / 9} for ninths in (3, 2, 1)]), UNPRUNED]


def run(path: str, name: str, exact: bool) -> list[tuple[Any, dict[str, Any]]]:
    """Every photo and budget, each alone: kept indices, positions, greedy answer.

    Args:
        path: of the checkpoint.
        name: of the family.
        exact: as the conformance suite runs it (fp32, the vision encoder at least), else bf16.
    """
    family = FAMILIES[name]
    options = {"dtype": "float32", **family.options}
    if not exact:
        options["dtype"] = "bfloat16"
    os.environ.update(family.environment)
    with family.prepared() if exact else nullcontext():
        llm = engine(path, **{"max_model_len": 4096, **options})
    model, seen = worker_model(llm), []
    recompute = getattr(model, "recompute_mrope_positions", None)
    if recompute is not None:

        def record(*args: Any, **kwargs: Any) -> Any:
            result = recompute(*args, **kwargs)
            seen.append(result[1].clone())
            return result

        model.recompute_mrope_positions = record
    results = []
    for image in PHOTOS:
        for plan in plans(name):
            forget(llm)
            seen.clear()
            item = {
                "prompt": prompt(family),
                "multi_modal_data": {family.modality: family.item(picture(image))},
                "mm_processor_kwargs": {"hiprune": plan},
            }
            with spy_on_selection() as kept:
                (answer,) = generate(llm, [item])
            results.append(((image, plan), answer | {"kept": kept, "positions": seen[:1]}))
    return results


def compare(family: Family, oracle: Oracle, case: Any, result: dict[str, Any]) -> tuple[Any, ...]:
    """Indices equal, overlap, positions equal (None without M-RoPE), worst difference."""
    name, plan = case
    image = picture(name)
    whole = plan == UNPRUNED
    kept = None if whole else result["kept"]
    logprobs = oracle.logprobs(prompt(family), [image], [kept], result["tokens"])
    worst = worst_difference(logprobs, result)
    if whole:
        return True, 1.0, None, worst
    tokens = plan.get("tokens") or round(plan["ratio"] * oracle.full(image))
    wanted, positions = oracle.keep(image, tokens=tokens), None
    if isinstance(oracle.of_model, QwenOracle):
        expected = oracle.of_model.prompt(prompt(family), [image], kept).positions
        positions = torch.equal(result["positions"][0], expected[:, 0])
    common = sum(len(set(a) & set(b)) for a, b in zip(wanted, kept, strict=True))
    return wanted == kept, common / sum(map(len, wanted)), positions, worst


def worst_difference(logprobs: torch.Tensor, result: dict[str, Any]) -> float:
    """Over what might be said at all: other tokens have a probability around e-20."""
    got = torch.tensor(result["logprobs"], dtype=torch.float64)
    worst: float = (got - logprobs)[logprobs > -10].abs().max().item()
    return worst


def main() -> None:
    print(
        "| family | kept indices equal | positions equal | worst logit fp32 "
        "| kept sets' overlap bf16 | worst logit bf16 | the same, unpruned |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or FAMILIES:
        family = FAMILIES[name]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            family.build(path)
            oracle = family.oracle(path)
            measured = {}
            for exact in (True, False):
                kind = "fp32" if exact else "bf16"
                print(f"measuring {NAMES[name]} in {kind} ...", file=sys.stderr)
                results = in_new_process(run, folder, name, exact, environment=IN_PROCESS)
                for control in (False, True):
                    measured[exact, control] = [
                        compare(family, oracle, *result)
                        for result in results
                        if (result[0][1] == UNPRUNED) is control
                    ]
        fp32, bf16 = measured[True, False], measured[False, False]
        control = max(row[3] for row in measured[False, True])
        equal = sum(row[0] for row in fp32)
        known = [row[2] for row in fp32 + bf16 if row[2] is not None]
        positions = f"{sum(known)} of {len(known)}" if known else "1-D"
        overlap = sum(row[1] for row in bf16) / len(bf16)
        # The CPU engine has no linear attention in fp32: the text model is in bf16 there, too.
        in_fp32 = "dtype" not in family.options
        worst = f"{max(row[3] for row in fp32):.1e}" if in_fp32 else "bf16 alone"
        print(
            f"| {NAMES[name]} | {equal} of {len(fp32)} | {positions} | {worst} "
            f"| {100 * overlap:.1f} % | {max(row[3] for row in bf16):.2f} | {control:.2f} |"
        )


if __name__ == "__main__":
    main()
