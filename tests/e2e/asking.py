"""What the conformance suite asks of an engine, which prefills less than an image at a time.

Functions that begin with `run` are called in the engine's process.
"""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from tests.e2e.offline import (
    engine,
    forget,
    generate,
    lose_encoder_outputs,
    one_by_one,
    record_positions,
    scheduler,
    spy_on_selection,
    worker_model,
)
from tests.e2e.test_explain import explained, remembered
from tests.photos import frames
from tests.reference.families import FAMILIES, Family

CHUNK, BLOCK = 40, 32  # tokens of a prefill chunk and of a prefix-cache block
OFFSETS = (0, 9, 23, 31)  # a sample of where images begin in a block
METHODS = ("hiprune", "attention", "random", "stride")
PLANS = (
    *({"tokens": 20, "method": method} for method in METHODS),
    {"tokens": 33, "alpha": 0.5, "buffer": "square"},
    {"tokens": 20, "object_layer": 2, "buffer": "row"},
    {"tokens": 9, "alpha": 1.0, "buffer": "none"},
)
MIXED = ({"tokens": 20}, {}, {"ratio": 0.5}, {"tokens": 21, "method": "stride"})


def prompt(family: Family, images: int, before: str = "", after: str = "What is this?") -> str:
    return f"A {before}{family.image * images}{after} "


def ask(family: Family, names: Any, plan: Any, **text: str) -> dict[str, Any]:
    kwargs = {} if plan is None else {"mm_processor_kwargs": {"hiprune": plan}}
    return {
        "prompt": prompt(family, len(names), **text),
        "multi_modal_data": {
            family.modality: [family.item(family.picture(name)) for name in names]
        },
        **kwargs,
    }


def ask_videos(family: Family, plan: Any) -> list[dict[str, Any]]:
    """A video alone, and one behind an image with `plan`."""
    name = next(iter(family.pictures))
    of_image = None if plan is None else [plan]  # an object is for videos, too
    asked = ask(family, [name], of_image, after=f" and {family.video} Why?")
    clip, known = frames()
    alone = {"video": [(clip, {**known, **family.metadata})]}
    asked["multi_modal_data"] |= alone
    return [{"prompt": f"A {family.video} Why?", "multi_modal_data": alone}, asked]


def whole_videos(llm: Any, family: Family) -> list[dict[str, Any]]:
    """Answers one after the other: bits depend on what is computed together, and from where on."""
    llm.reset_prefix_cache()
    return [generate(llm, [one])[0] for one in ask_videos(family, None)]


def run_videos(llm: Any, family: Family) -> dict[str, Any]:
    forget(llm)
    seen = record_positions(llm)
    whole = whole_videos(llm, family)
    with spy_on_selection() as kept:
        (pruned,) = generate(llm, ask_videos(family, {"tokens": 10})[1:])
    del worker_model(llm).recompute_mrope_positions
    start_of_image = prompt(family, 1).index(family.image)
    before = prompt(family, 1)[:start_of_image] + family.image.split(family.pad)[0]
    return {
        "whole": whole,
        "pruned": pruned,
        "kept": kept,
        "first": len(llm.get_tokenizer().encode(before, add_special_tokens=False)),
        "positions": [seen[one["prompt_tokens"]] for one in (whole[1], pruned)],
    }


def start(family: Family, path: str, *, prepared: bool = True, **options: Any) -> Any:
    os.environ.update(family.environment)
    with family.prepared() if prepared else nullcontext():
        return engine(
            path,
            **{
                "max_num_batched_tokens": CHUNK,
                "max_num_seqs": 4,
                "block_size": BLOCK,
                "enable_prefix_caching": True,
                "worker_extension_cls": "hiprune_vllm.engine.explain.ExplainExtension",
                **family.options,
                **options,
            },
        )


def block_size(llm: Any) -> int:
    """Of which cached prefixes are multiples.

    Where layers differ in what they keep of a token, vLLM makes blocks larger, or those of some
    layers, so that all kinds begin and end together.
    """
    size: int = scheduler(llm).block_size
    return size


def leading(llm: Any) -> str:
    """Text before an image after which a block of any size ends in the same place of it."""
    return "x" * (block_size(llm) - BLOCK)


def run_chunks(llm: Any, family: Family, offsets: Iterable[int]) -> dict[str, Any]:
    """Two images that begin anywhere in a block, anew and with their prefix in the cache."""
    lead, names = leading(llm), list(family.pictures)
    model, steps = worker_model(llm), []
    forward = model.forward

    def count_tokens(input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(positions.shape[-1])
        return forward(input_ids, positions, *args, **kwargs)

    model.forward = count_tokens
    results: dict[str, Any] = {"fresh": [], "hit": []}
    for offset in offsets:
        for after_it, kind in (("What?", "fresh"), ("How is it?", "hit")):
            # "hit" has its prefix in the cache up to somewhere in the last image.
            if kind == "fresh":
                forget(llm)
            before_it = lead + "x" * offset
            plans = [{"tokens": 40}, {"tokens": 17}]
            asked = ask(family, names[:2], plans, before=before_it, after=after_it)
            done = len(steps)
            (answer,) = generate(llm, [asked], 4)
            answer |= {"computed": steps[done:], "before": before_it}
            results[kind].append(answer)
    del model.forward
    return results


def run_offsets(name: str, path: str) -> dict[str, Any]:
    family = FAMILIES[name]
    return run_chunks(start(family, path), family, range(BLOCK))


def run(name: str, path: str, budgets: list[int]) -> dict[str, Any]:
    family = FAMILIES[name]
    names = list(family.pictures)
    first = names[0]
    llm = start(family, path)
    lead = leading(llm)
    results: dict[str, Any] = {"block": block_size(llm)}

    def each(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return one_by_one(llm, requests)

    grids = [ask(family, [each_name], {"ratio": 1 / 3}) for each_name in names]
    results["grids"] = each(grids)
    forget(llm)
    results["batched"] = generate(llm, grids)
    results["budgets"] = each([ask(family, [first], {"tokens": budget}) for budget in budgets])
    results["plans"] = each([ask(family, [first], plan) for plan in PLANS])
    results["mixed"] = each([ask(family, names[:4], list(MIXED))])
    forget(llm)
    results["whole"] = generate(llm, [ask(family, [each_name], None) for each_name in names])

    if family.video:
        results["videos"] = run_videos(llm, family)

    # The first half of an image is in the prefix cache; what was encoded of it is lost.
    forget(llm)
    wish = ask(family, [first], {"tokens": 40}, before=lead)
    (before,) = generate(llm, [wish])
    lose_encoder_outputs(llm)
    with spy_on_selection() as again:
        generate(llm, [ask(family, [first], {"tokens": 40}, before=lead, after="Why so?")])
        (after,) = generate(llm, [wish])
    results["again"] = {"before": before, "after": after, "chosen": again}

    results |= run_chunks(llm, family, OFFSETS)
    results["explained"] = []
    for plan in PLANS:
        asked = ask(family, [first], plan)
        forget(llm)
        generate(llm, [asked], 1)
        kept = remembered(llm)
        told = (asked["prompt"], asked["multi_modal_data"][family.modality][0], plan)
        after_it, _ = explained(llm, *told)
        forget(llm)
        before_it, _ = explained(llm, *told)
        results["explained"].append(
            {"kept": kept, **{when: [part["kept"] for part in parts]
                              for when, parts in (("after", after_it), ("before", before_it))}}
        )  # fmt: skip
    return results


def run_stock(name: str, path: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    family = FAMILIES[name]
    llm = start(family, path, worker_extension_cls="")
    asked = [ask(family, [each_name], None) for each_name in family.pictures]
    answers = generate(llm, asked)
    return answers, whole_videos(llm, family) if family.video else []


def run_ranks(name: str, path: str, ranks: int, mode: str = "weights") -> dict[str, Any]:
    """Answers, and what is remembered of images, of `ranks` that share the encoder by `mode`."""
    family = FAMILIES[name]
    llm = start(  # workers are processes
        family, path, prepared=False, tensor_parallel_size=ranks, mm_encoder_tp_mode=mode
    )
    names = list(family.pictures)
    asked = [ask(family, [each_name], {"ratio": 1 / 3}) for each_name in names]
    asked += [ask(family, names[:1], plan) for plan in PLANS]
    asked += [ask(family, names[:4], list(MIXED))]
    alone = ask(family, names[1:2], {"ratio": 0.4})  # one picture, whatever there are of ranks
    answers = [*generate(llm, [alone]), *generate(llm, asked)]
    return {"answers": answers, "kept": llm.apply_model(_remembered)}


def _remembered(model: Any) -> dict[Any, Any]:
    """What a worker has kept of every image. Runs there."""
    return {key: [part.tolist() for part in one.kept] for key, one in model._kept_before.items()}
