"""The limits of what waits in the engine, and what counts when they are reached."""

import asyncio
import contextvars
from types import SimpleNamespace

import pytest
from fastapi import HTTPException
from prometheus_client import REGISTRY
from vllm.exceptions import QueueOverflowError, VLLMValidationError

from hiprune_server.hardening.overload import ENTRY, Entry, bound_the_queue
from hiprune_server.routes.explain import WAITING, Explainer


def overloads():
    return REGISTRY.get_sample_value("hiprune_rejected_requests_total", {"reason": "overload"})


class Engine:
    """As much of vLLM's client as is looked at."""

    def __init__(self, *, reqs=None, tokens=None, engines=1, full=False):
        self.full, self.room = full, 1000
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(
                max_num_queued_reqs=reqs,
                max_num_queued_tokens=tokens,
                max_num_seqs=10,
                max_num_batched_tokens=100,
            ),
            parallel_config=SimpleNamespace(data_parallel_size=engines),
            model_config=SimpleNamespace(max_model_len=500),
        )

    def check_admission(self, n=1, request_id=None):
        if self.full or n > self.room:
            raise QueueOverflowError


def limits(engine, processes):
    bound_the_queue(engine, SimpleNamespace(api_server_count=processes))
    scheduler = engine.vllm_config.scheduler_config
    return scheduler.max_num_queued_reqs, scheduler.max_num_queued_tokens


def test_limits_fit_the_model_and_are_shared_out_among_processes():
    assert limits(Engine(), 1) == (40, 6400)
    assert limits(Engine(), None) == (40, 6400)
    assert limits(Engine(engines=2), 1) == (80, 12800)
    assert limits(Engine(engines=2), 4) == (20, 3200)
    assert limits(Engine(), 3) == (14, 2134)


def test_where_one_runs_at_a_time_some_may_wait():
    engine = Engine()
    engine.vllm_config.scheduler_config.max_num_seqs = 1
    assert limits(engine, 1)[0] == 32


def test_the_longest_prompts_fit_however_small_a_step_is():
    engine = Engine()
    engine.vllm_config.scheduler_config.max_num_batched_tokens = 2
    assert limits(engine, 1)[1] == 4 * 500


def test_what_the_operator_gave_stays():
    assert limits(Engine(reqs=0, tokens=7), 2) == (0, 7)


def test_a_refusal_is_counted_once_and_handed_on():
    engine = Engine(full=True)
    limits(engine, 1)
    before = overloads()
    with pytest.raises(QueueOverflowError):
        engine.check_admission(3, "id")
    assert overloads() == before + 1
    engine.full = False
    engine.check_admission()
    assert overloads() == before + 1


@pytest.mark.parametrize("full", [False, True])
def test_more_answers_than_ever_fit_are_the_requests_own_mistake(full):
    engine = Engine(full=full)
    limits(engine, 1)
    before = overloads()
    with pytest.raises(VLLMValidationError, match="n must be at most 40") as refused:
        engine.check_admission(41)
    assert refused.value.parameter == "n"
    assert overloads() == before


def within(function):
    """Runs it as a request, whose places come back when it ends."""

    def run():
        entry = Entry()
        ENTRY.set(entry)
        try:
            return function()
        finally:
            entry.leave()

    return contextvars.copy_context().run(run)


def test_who_was_let_in_has_a_place_until_it_is_in_the_queue():
    engine = Engine(reqs=3)
    engine.room = 3
    limits(engine, 1)

    def ask(n, then):
        engine.check_admission(n)
        return then()

    def refused():
        with pytest.raises(QueueOverflowError):
            within(lambda: engine.check_admission(2))

    def arrive():
        engine.full = True  # by others: whoever was let in is not asked again
        engine.check_admission(2, "id")
        engine.full = False
        within(lambda: engine.check_admission(3))  # the place itself is vLLM's to count now

    within(lambda: ask(2, refused))
    within(lambda: engine.check_admission(3))  # the places of both are free again
    within(lambda: ask(2, arrive))
    within(lambda: engine.check_admission(3))


def test_one_of_several_prompts_gives_back_its_own_place_only():
    engine = Engine(reqs=3)
    engine.room = 3
    limits(engine, 1)

    def ask():
        engine.check_admission(2)
        engine.check_admission(1, "first")
        with pytest.raises(QueueOverflowError):
            within(lambda: engine.check_admission(3))
        engine.check_admission(1, "second")
        within(lambda: engine.check_admission(3))

    within(ask)


def test_an_explanation_takes_its_turn_before_its_picture_is_decoded():
    inside, most = 0, 0
    go = asyncio.Event()

    class One(Explainer):
        async def _explain(self, request):
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            await go.wait()
            inside -= 1
            return {}, []

    async def ask():
        explainer = One(None, None)
        tasks = [asyncio.create_task(explainer.explain(None)) for _ in range(WAITING + 4)]
        await asyncio.sleep(0.01)
        refused = [task.exception() for task in tasks if task.done()]
        tasks[3].cancel()  # a client that goes away leaves its place
        go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        return refused, answers, await explainer.explain(None)

    before = overloads()
    refused, answers, after = asyncio.run(ask())
    assert [error.status_code for error in refused] == [503] * 3
    assert all(isinstance(error, HTTPException) for error in refused)
    assert answers.count(({}, [])) == WAITING
    assert most == 1
    assert after == ({}, [])
    assert overloads() == before + 3
