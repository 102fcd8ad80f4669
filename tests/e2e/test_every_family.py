"""Every family in the real engine, in a minute each: what the standing list begins with.

`make test-long` has the whole list (`test_conformance_*.py`); this is what another release of vLLM
is held to in each run.
"""

import pytest

from tests.e2e.asking import MIXED, ask, start
from tests.e2e.conformance import Conformance
from tests.e2e.offline import IN_PROCESS, generate, in_new_process, one_by_one
from tests.reference.families import FAMILIES

PLANS = ({"ratio": 1 / 3}, {"tokens": 9, "alpha": 1.0, "buffer": "square"})


def run(name, path):
    family = FAMILIES[name]
    names = list(family.pictures)
    llm = start(family, path)
    alone = [ask(family, [each], plan) for each, plan in zip(names, PLANS, strict=False)]
    return {
        "alone": one_by_one(llm, alone),
        "mixed": one_by_one(llm, [ask(family, names[:4], list(MIXED))]),
        "whole": generate(llm, [ask(family, names[:1], None)]),
    }


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FAMILIES)
def test_kept_tokens_and_answers_equal_the_oracles(name, tmp_path):
    family = FAMILIES[name]
    family.build(tmp_path)
    results = in_new_process(run, name, str(tmp_path), environment=IN_PROCESS)
    oracle, names, held = family.oracle(tmp_path), list(family.pictures), Conformance()
    for each, plan, answer in zip(names, PLANS, results["alone"], strict=False):
        held.check(family, oracle, [each], [plan], answer)
    held.check(family, oracle, names[:4], MIXED, results["mixed"][0])
    held.check(family, oracle, names[:1], [{}], results["whole"][0])
