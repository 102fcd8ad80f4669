"""What a server hears of an engine, whichever model it serves."""

import asyncio
from types import SimpleNamespace

import pytest

from hiprune_vllm.facade import Engine, reports
from hiprune_vllm.plan import FIELD, NO_LIMITS, PlanError, PruningPlan


def client(processor, architecture="SomeForCausalLM", architectures=("MolmoForCausalLM",)):
    model = SimpleNamespace(
        architecture=architecture, hf_config=SimpleNamespace(architectures=architectures)
    )
    return SimpleNamespace(renderer=SimpleNamespace(mm_processor=processor), model_config=model)


def test_an_engine_without_a_processor_of_ours_refuses_every_plan_with_the_reason():
    pruning = Engine(client(None)).pruning
    assert pruning.encoder is pruning.about is None
    assert (pruning.default, pruning.limits) == (PruningPlan(), NO_LIMITS)
    assert "SomeForCausalLM, MolmoForCausalLM: its visual tokens" in pruning.unsupported
    with pytest.raises(PlanError, match="x cannot be served: hiprune does not support"):
        pruning.parse({}, name="x")


def test_a_model_that_names_itself_once_is_named_once():
    told = Engine(client(None, "GPT", None)).pruning.unsupported
    assert told == "hiprune does not support GPT"


def test_pruning_that_is_switched_off_says_so():
    pruning = Engine(client(None), switched_off="pruning is switched off (X)").pruning
    assert pruning.unsupported == "pruning is switched off (X)"


def test_a_processor_of_ours_answers_for_itself():
    class Processor:
        info = SimpleNamespace(pruning="its own")

        async def explain(self, engine_client, inputs):
            return [engine_client, inputs]

        def views(self, inputs):
            return ["views", inputs]

    one = client(Processor())
    engine = Engine(one)
    assert engine.pruning == "its own"
    assert asyncio.run(engine.explain({"a": 1})) == [one, {"a": 1}]
    assert engine.views({"a": 1}) == ["views", {"a": 1}]


def test_a_prompt_without_pictures_has_no_reports():
    assert list(reports({})) == []
    assert list(reports({FIELD: ["one"]})) == ["one"]
