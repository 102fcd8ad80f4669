"""What every family is held to, on a real engine that prefills less than an image at a time.

A family comes with a small checkpoint and its Hugging Face half of the oracle
(`tests.reference.families`); a class of tests of its own names it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tests.e2e.offline import (
    IN_PROCESS,
    engine,
    forget,
    generate,
    in_new_process,
    lose_encoder_outputs,
    one_by_one,
    spy_on_selection,
    worker_model,
)
from tests.e2e.test_explain import explained, remembered
from tests.photos import photo
from tests.reference.families import FAMILIES, Family, Oracle
from tests.reference.llava_next import shares

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
        "multi_modal_data": {"image": [family.picture(name) for name in names]},
        **kwargs,
    }


def ask_videos(family: Family, plan: Any) -> list[dict[str, Any]]:
    """A video alone, and one behind an image with `plan`."""
    clip = np.stack(
        [np.roll(np.asarray(photo("coffee").resize((112, 84))), i, 1) for i in range(8)]
    )
    told = {"fps": 2.0, "total_num_frames": 8, "frames_indices": list(range(8))}
    name = next(iter(family.pictures))
    asked = ask(family, [name], plan, after=f" and {family.video} Why?")
    asked["multi_modal_data"]["video"] = [(clip, told)]
    alone = {"video": [(clip, told)]}
    return [{"prompt": f"A {family.video} Why?", "multi_modal_data": alone}, asked]


@contextmanager
def positions_of_prompts(llm: Any) -> Iterator[dict[int, Any]]:
    """The last positions that the worker of an in-process engine had of a prompt, by its length."""
    model, seen = worker_model(llm), {}
    recompute = model.recompute_mrope_positions

    def note(*args: Any, **kwargs: Any) -> Any:
        result = recompute(*args, **kwargs)
        seen[result[1].shape[1]] = result[1].clone()
        return result

    model.recompute_mrope_positions = note
    try:
        yield seen
    finally:
        del model.recompute_mrope_positions


def whole_videos(llm: Any, family: Family) -> list[dict[str, Any]]:
    """Answers one after the other: bits depend on what is computed together, and from where on."""
    llm.reset_prefix_cache()
    return [generate(llm, [one])[0] for one in ask_videos(family, None)]


def run_videos(llm: Any, family: Family) -> dict[str, Any]:
    forget(llm)
    with positions_of_prompts(llm) as seen:
        whole = whole_videos(llm, family)
        with spy_on_selection() as kept:
            (pruned,) = generate(llm, ask_videos(family, {"tokens": 10})[1:])
    start_of_image = prompt(family, 1).index(family.image)
    before = prompt(family, 1)[:start_of_image] + family.image.split("<|image_pad|>")[0]
    return {
        "whole": whole,
        "pruned": pruned,
        "kept": kept,
        "first": len(llm.get_tokenizer().encode(before, add_special_tokens=False)),
        "positions": [seen[one["prompt_tokens"]] for one in (whole[1], pruned)],
    }


def start(family: Family, path: str, *, prepared: bool = True, **options: Any) -> Any:
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


def run(name: str, path: str, budgets: list[int], offsets: tuple[int, ...]) -> dict[str, Any]:
    family = FAMILIES[name]
    names = list(family.pictures)
    first = names[0]
    llm = start(family, path)
    # Of a model with states instead of keys and values vLLM makes blocks larger.
    block = llm.llm_engine.vllm_config.cache_config.block_size
    lead = "x" * (block - BLOCK)  # a block ends in the same place of the images
    results: dict[str, Any] = {"block": block}

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

    model, steps = worker_model(llm), []
    forward = model.forward

    def count_tokens(input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(positions.shape[-1])
        return forward(input_ids, positions, *args, **kwargs)

    model.forward = count_tokens
    results["fresh"], results["hit"] = [], []
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

    results["explained"] = []
    for plan in PLANS:
        asked = ask(family, [first], plan)
        forget(llm)
        generate(llm, [asked], 1)
        kept = remembered(llm)
        told = (asked["prompt"], asked["multi_modal_data"]["image"][0], plan)
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


def run_ranks(name: str, path: str, ranks: int) -> dict[str, Any]:
    family = FAMILIES[name]
    llm = start(family, path, prepared=False, tensor_parallel_size=ranks)  # workers are processes
    names = list(family.pictures)
    asked = [ask(family, [each_name], {"ratio": 1 / 3}) for each_name in names]
    asked += [ask(family, names[:1], plan) for plan in PLANS]
    asked += [ask(family, names[:4], list(MIXED))]
    return {"answers": generate(llm, asked), "kept": llm.apply_model(_remembered)}


def _remembered(model: Any) -> dict[Any, Any]:
    """What a worker has kept of every image. Runs there."""
    return {key: [part.tolist() for part in one.kept] for key, one in model._kept_before.items()}


@pytest.mark.timeout(900)
class Conformance:
    """The standing list. Subclasses say of which family."""

    family: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def of_family(cls) -> Family:
        return FAMILIES[cls.family]

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, of_family, tmp_path_factory):
        folder = tmp_path_factory.mktemp(cls.family)
        of_family.build(folder)
        return folder

    @pytest.fixture(scope="class")
    @classmethod
    def oracle(cls, of_family, checkpoint) -> Oracle:
        return of_family.oracle(checkpoint)

    @pytest.fixture(scope="class")
    @classmethod
    def budgets(cls, of_family, oracle) -> list[int]:
        """1, 2, the last that leaves something out, and from where on nothing is left out."""
        first = of_family.picture(next(iter(of_family.pictures)))
        most = sum(map(len, oracle.allowed(first)))
        return [1, 2, most - 1, oracle.full(first), oracle.full(first) + 1]

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, checkpoint, budgets):
        given = cls.family, str(checkpoint), budgets, OFFSETS
        return in_new_process(run, *given, environment=IN_PROCESS)

    def expected(self, oracle, image, plan, spied=None):
        """What is kept of an image; None where that is all of it."""
        full, allowed = oracle.full(image), oracle.allowed(image)
        knobs = dict(plan)
        tokens = knobs.pop("tokens", None) or max(1, round(knobs.pop("ratio", 1.0) * full))
        method = knobs.pop("method", "hiprune")
        if tokens >= full:
            return None
        each = shares(tokens, [len(part) for part in allowed])
        if method == "stride":
            return [
                [part[i * len(part) // share] for i in range(share)]
                for part, share in zip(allowed, each, strict=True)
            ]
        if method == "random":
            drawn = iter(spied)
            found = [next(drawn) if share else [] for share in each]
            for part, kept, share in zip(allowed, found, each, strict=True):
                assert len(kept) == share
                assert set(kept) <= set(part)
                assert kept == sorted(set(kept))
            return found
        if method == "attention":
            knobs["alpha"] = 0.0
        return oracle.keep(image, tokens=tokens, **knobs)

    def check(self, of_family, oracle, names, plans, answer, **text):
        """Kept indices, greedy answer and log-probabilities of one request."""
        images = [of_family.picture(name) for name in names]
        kept = [
            self.expected(oracle, image, plan, answer.get("kept"))
            for image, plan in zip(images, plans, strict=True)
        ]
        if "kept" in answer:
            spied = answer["kept"]
            if None in kept:  # a whole image in a batch with others is chosen, too: all of it
                spied = [part for part in spied if part != list(range(max(64, len(part))))]
            assert spied == [part for one in kept if one for part in one if part]
        logprobs = oracle.logprobs(
            prompt(of_family, len(names), **text), images, kept, answer["tokens"]
        )
        chosen = logprobs.gather(1, torch.tensor(answer["tokens"])[:, None])[:, 0]
        behind = logprobs.max(dim=-1).values - chosen
        if of_family.within is None:
            assert (behind == 0).double().mean() >= 0.75
            return
        assert (behind <= (0 if of_family.exact else of_family.within)).all()
        got = torch.tensor(answer["logprobs"], dtype=torch.float64)
        torch.testing.assert_close(got, logprobs, rtol=0, atol=of_family.within)

    def test_every_shape_of_grid(self, of_family, oracle, results):
        for name, answer in zip(of_family.pictures, results["grids"], strict=True):
            self.check(of_family, oracle, [name], [{"ratio": 1 / 3}], answer)

    def test_every_budget(self, of_family, oracle, results, budgets):
        first = next(iter(of_family.pictures))
        for budget, answer in zip(budgets, results["budgets"], strict=True):
            self.check(of_family, oracle, [first], [{"tokens": budget}], answer)

    def test_every_method_and_knob(self, of_family, oracle, results):
        first = next(iter(of_family.pictures))
        for plan, answer in zip(PLANS, results["plans"], strict=True):
            self.check(of_family, oracle, [first], [plan], answer)

    def test_mixed_plans_and_sizes_in_one_request(self, of_family, oracle, results):
        (answer,) = results["mixed"]
        self.check(of_family, oracle, list(of_family.pictures)[:4], MIXED, answer)

    def test_answers_do_not_depend_on_the_batch(self, results):
        for alone, batched in zip(results["grids"], results["batched"], strict=True):
            assert alone["tokens"] == batched["tokens"]

    def test_without_a_budget_answers_are_bit_identical_to_vllms(self, results, checkpoint):
        stock = in_new_process(
            run_stock,
            self.family,
            str(checkpoint),
            environment=IN_PROCESS | {"VLLM_PLUGINS": ""},
        )
        assert stock == (results["whole"], results.get("videos", {}).get("whole", []))

    def test_a_video_stays_whole_and_where_it_is_behind_a_pruned_image(self, of_family, results):
        if not of_family.video:
            pytest.skip("the family takes no videos")
        found = results["videos"]
        (kept,), first = found["kept"], found["first"]
        whole, pruned = found["positions"]
        image = whole.shape[1] - pruned.shape[1] + 10
        stay = [*range(first), *(first + index for index in kept)]
        stay += range(first + image, whole.shape[1])
        assert len(kept) == 10
        assert torch.equal(pruned, whole[:, stay])
        assert found["pruned"]["tokens"] != found["whole"][1]["tokens"]

    def test_an_image_that_is_encoded_again_keeps_its_tokens(self, results):
        again = results["again"]
        assert again["chosen"] == []
        assert again["before"] == again["after"]

    @pytest.mark.parametrize(("kind", "after"), [("fresh", "What?"), ("hit", "How is it?")])
    def test_chunks_and_cached_prefixes_that_end_in_an_image(
        self, of_family, oracle, results, kind, after
    ):
        assert len(results[kind]) == len(OFFSETS)
        self.check_chunks(of_family, oracle, results[kind], after)

    def check_chunks(self, of_family, oracle, answers, after):
        names = list(of_family.pictures)[:2]
        plans = ({"tokens": 40}, {"tokens": 17})
        for answer in answers:
            text = {"before": answer["before"], "after": after}
            self.check(of_family, oracle, names, plans, answer, **text)

    def test_prefills_were_chunked_and_prefixes_found(self, results):
        assert max(max(answer["computed"]) for answer in results["fresh"]) == CHUNK
        for answer in results["hit"]:
            saved = answer["prompt_tokens"] + 3 - sum(answer["computed"])
            assert saved >= results["block"]
            assert saved % results["block"] == 0

    def test_what_is_explained_is_what_is_kept(self, results):
        for told in results["explained"]:
            assert told["before"] == told["after"] == told["kept"]

    @pytest.mark.long
    def test_images_that_begin_anywhere_in_a_block(self, of_family, oracle, checkpoint):
        offsets = tuple(range(BLOCK))
        results = in_new_process(
            run, self.family, str(checkpoint), [], offsets, environment=IN_PROCESS
        )
        for kind, after in (("fresh", "What?"), ("hit", "How is it?")):
            self.check_chunks(of_family, oracle, results[kind], after)

    @pytest.mark.long
    def test_two_ranks_keep_and_answer_what_one_does(self, of_family, checkpoint):
        compared = {
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # sends a function
            "PRUNING_SECRET": "of both engines",  # which know an image by the same key then
        }
        one = in_new_process(
            run_ranks, self.family, str(checkpoint), 1, environment=compared | IN_PROCESS
        )
        two = in_new_process(
            run_ranks,
            self.family,
            str(checkpoint),
            2,
            environment=compared | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        )
        (alone,), (first, second) = one["kept"], two["kept"]
        assert first == second
        if not of_family.exact:  # the encoder is in bf16 here: partial sums round otherwise
            pairs = [
                pair for key, parts in alone.items() for pair in zip(parts, first[key], strict=True)
            ]
            common = sum(len(set(a) & set(b)) for a, b in pairs)
            assert common / sum(len(a) for a, _ in pairs) > 0.9
            return
        assert first == alone
        for expected, shared in zip(one["answers"], two["answers"], strict=True):
            assert expected["tokens"] == shared["tokens"]
