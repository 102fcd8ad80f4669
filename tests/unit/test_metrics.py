"""What the counters count; the real /metrics is scraped in tests/e2e/test_limits.py."""

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from hiprune_server.operations import metrics
from hiprune_vllm.plan import Encoder, Limits, PlanError
from hiprune_vllm.reading import parse_plan

CLIP = Encoder("llava", output_layer=23, object_layer=9, has_cls=True)


def value(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0.0


@given(st.integers(1, 100_000))
def test_buckets_are_a_closed_set_and_hold_their_numbers(kept):
    low, _, high = metrics.bucket(kept).rstrip("+").partition("-")
    assert int(low) <= kept
    assert not high or kept <= int(high)
    assert int(low) == 1 or int(low) - 1 in metrics.BUCKETS


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({"tokens": 0}, "tokens"),
        ({"alpha": "x"}, "alpha"),
        ({"tokens": 5, "ratio": 0.5}, "other"),
        ({"tokns": 5}, "unknown_field"),
        ({"x" * 1000: 5}, "unknown_field"),
        ([], "other"),
    ],
)
def test_reasons_are_a_closed_set(wish, reason):
    before = value("hiprune_rejected_requests_total", reason=reason)
    with pytest.raises(PlanError) as error:
        parse_plan(wish, CLIP, field="messages[3].content[1].hiprune")
    metrics.count_rejected(error.value)
    assert value("hiprune_rejected_requests_total", reason=reason) == before + 1
    assert reason in metrics.REASONS


def test_a_limit_counts_under_its_knob():
    before = value("hiprune_rejected_requests_total", reason="method")
    with pytest.raises(PlanError) as error:
        Limits(methods=("hiprune",)).check(parse_plan({"method": "random"}, CLIP))
    metrics.count_rejected(error.value)
    assert value("hiprune_rejected_requests_total", reason="method") == before + 1


def test_the_first_token_is_noted_once_and_outputs_pass_unchanged():
    def output(latency):
        return SimpleNamespace(metrics=SimpleNamespace(first_token_latency=latency))

    given_outputs = [output(0.0), output(0.2), output(0.2), SimpleNamespace(metrics=None)]
    closed = []

    async def outputs():
        try:
            for one in given_outputs:
                yield one
        finally:
            closed.append(True)

    async def run(images, stop_after):
        seen = []
        stream = metrics.timed(outputs(), images)
        async for one in stream:
            seen.append(one)
            if len(seen) == stop_after:
                await stream.aclose()
        return seen

    name = "hiprune_time_to_first_token_seconds_count"
    before = value(name, kept_tokens="65-128")
    images = [{"tokens_kept": 64}, {"tokens_kept": 1}]
    assert asyncio.run(run(images, 99)) == given_outputs
    assert value(name, kept_tokens="65-128") == before + 1
    assert asyncio.run(run([], 99)) == given_outputs
    assert value(name, kept_tokens="65-128") == before + 1
    assert asyncio.run(run(images, 1)) == given_outputs[:1]
    assert closed == [True] * 3
