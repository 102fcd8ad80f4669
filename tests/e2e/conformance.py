"""What every family is held to, on a real engine.

A family comes with a small checkpoint and its Hugging Face half of the oracle
(`tests.reference.families`); a class of tests of its own names it.
"""

from typing import ClassVar

import pytest
import torch

from tests.e2e.asking import (
    BLOCK,
    CHUNK,
    MIXED,
    OFFSETS,
    PLANS,
    prompt,
    run,
    run_offsets,
    run_ranks,
    run_stock,
)
from tests.e2e.offline import IN_PROCESS, in_new_process
from tests.reference.families import FAMILIES, Family
from tests.reference.oracles import Oracle


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
        given = cls.family, str(checkpoint), budgets
        return in_new_process(run, *given, environment=IN_PROCESS)

    def expected(self, oracle, image, plan, spied=None):
        """What is kept of an image; None where that is all of it."""
        full, allowed = oracle.full(image), oracle.allowed(image)
        knobs = dict(plan)
        tokens = knobs.pop("tokens", None) or max(1, round(knobs.pop("ratio", 1.0) * full))
        method = knobs.pop("method", "hiprune")
        if tokens >= full:
            return None
        each = oracle.shares(image, tokens)
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
        assert found["pruned"]["logprobs"] != found["whole"][1]["logprobs"]

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
        given = self.family, str(checkpoint)
        results = in_new_process(run_offsets, *given, environment=IN_PROCESS)
        assert len(results["fresh"]) == len(results["hit"]) == BLOCK
        for kind, after in (("fresh", "What?"), ("hit", "How is it?")):
            self.check_chunks(of_family, oracle, results[kind], after)

    @pytest.mark.long
    @pytest.mark.parametrize("mode", ["weights", "data"])
    def test_two_ranks_keep_and_answer_what_one_does(self, of_family, checkpoint, mode):
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
            mode,
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
