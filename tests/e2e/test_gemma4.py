"""Gemma 4 beyond the standing list: soft tokens of a request, videos, odd sizes."""

import pytest
import torch

from tests.e2e.offline import (
    IN_PROCESS,
    engine,
    forget,
    generate,
    in_new_process,
    one_by_one,
    spy_on_selection,
)
from tests.photos import frames, photo
from tests.reference import gemma4

TEXT = f"A {gemma4.SPECIAL['image_token']}What is this? "
ODD = [(1, 1), (3, 900), (900, 3), (8000, 20), (20, 8000), (1, 700), (6000, 4000), (2, 1)]
OTHERWISE = (17, 1190)
"""Width and height of which vLLM counts 69 tokens, the processor 70."""


def asked(image, plan, **options):
    options |= {} if plan is None else {"hiprune": plan}
    return {
        "prompt": TEXT,
        "multi_modal_data": {"image": [image]},
        "mm_processor_kwargs": options,
    }


def landscape():
    return photo("chelsea").resize((451, 300))


def refusal(llm, request):
    try:
        generate(llm, [request], 1)
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "parameter", None)
    return None


def with_video(plan):
    request = asked(landscape(), plan)
    request["prompt"] = f"{TEXT}Or this {gemma4.SPECIAL['video_token']}? "
    request["multi_modal_data"]["video"] = [frames()]
    return request


def run(path):
    llm = engine(path, max_model_len=4096, max_num_batched_tokens=1024)
    image = landscape()
    counted = [{}, {"max_soft_tokens": 70}, {"max_soft_tokens": 140}, {"max_soft_tokens": 280}]
    results = {
        "counted": one_by_one(llm, [asked(image, {"ratio": 0.25}, **one) for one in counted])
    }
    # The same picture, twice as large for the second request, while the first is cached.
    forget(llm)
    with spy_on_selection() as kept:
        generate(llm, [asked(image, {"tokens": 20}, max_soft_tokens=n) for n in (70, 140, 70)], 1)
    results["cached"] = kept
    results["odd"] = [
        one_by_one(llm, [asked(photo("coffee").resize(size), {"tokens": 4})])[0] for size in ODD
    ]
    refused = [
        asked(photo("coffee").resize(OTHERWISE), {"tokens": 4}),
        asked(photo("coffee").resize(OTHERWISE), None),
        asked(image, {"tokens": 4}, max_soft_tokens=100),
        asked(photo("coffee").resize((96, 96)), {"tokens": 4}, do_resize=False),
        asked(image, {"tokens": 4}, patch_size=8),
        asked(image, {"tokens": 4}, pooling_kernel_size=1),
    ]
    results["refused"] = [refusal(llm, one) for one in refused]
    forget(llm)
    results["videos"] = one_by_one(llm, [with_video(None), with_video({"tokens": 10})])
    results["after"] = one_by_one(llm, [asked(image, {"ratio": 0.25})])
    return results


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma4")
    gemma4.build(folder)
    return str(folder)


@pytest.fixture(scope="module")
def results(checkpoint):
    return in_new_process(run, checkpoint, environment=IN_PROCESS)


@pytest.mark.timeout(600)
def test_a_share_is_of_what_the_request_lets_the_picture_have(checkpoint, results):
    oracle = gemma4.GemmaOracle(checkpoint)
    for most, answer in zip((70, 70, 140, 280), results["counted"], strict=True):
        oracle.soft_tokens = most
        full = oracle.count(landscape())
        expected = oracle.keep(landscape(), ratio=0.25)
        assert answer["kept"] == [expected]
        assert len(expected) == round(full / 4)
        logprobs = oracle.logprobs(TEXT, [landscape()], [expected], answer["tokens"])
        torch.testing.assert_close(
            torch.tensor(answer["logprobs"], dtype=torch.float64), logprobs, rtol=0, atol=1e-3
        )


def test_a_picture_with_other_soft_tokens_is_another_one_to_every_cache(checkpoint, results):
    oracle = gemma4.GemmaOracle(checkpoint)
    expected = []
    for oracle.soft_tokens in (70, 140):
        expected.append(oracle.keep(landscape(), tokens=20))
    assert expected[0] != expected[1]
    assert results["cached"][:2] == expected


def test_pictures_of_odd_sizes_keep_what_was_promised(results):
    for size, answer in zip(ODD, results["odd"], strict=True):
        assert len(answer["kept"][0]) == 4, size


def test_what_would_not_fit_its_places_is_refused_and_the_engine_goes_on(results):
    for found, (name, told) in zip(
        results["refused"],
        [
            ("image_url", "vLLM counts 69 visual tokens"),
            ("image_url", "vLLM counts 69 visual tokens"),
            ("mm_processor_kwargs.max_soft_tokens", "must be one of"),
            ("image_url", "the checkpoint's processor has made"),
            ("mm_processor_kwargs", "values a patch"),
            ("image_url", "the checkpoint's processor has made"),
        ],
        strict=True,
    ):
        kind, text, parameter = found
        assert (kind, parameter) == ("VLLMValidationError", name), found
        assert told in text
    assert results["after"] == results["counted"][:1]


def test_a_video_stays_whole_behind_a_pruned_picture(checkpoint, results):
    whole, pruned = results["videos"]
    full = gemma4.GemmaOracle(checkpoint).count(landscape())
    assert whole["prompt_tokens"] - pruned["prompt_tokens"] == full - 10
    assert len(pruned["kept"][0]) == 10
