"""LLaVA-OneVision beyond the standing list: odd sizes, the largest picture, videos, `explain`."""

import pytest
import torch

from tests.e2e.offline import IN_PROCESS, engine, forget, generate, in_new_process, one_by_one
from tests.e2e.test_explain import explained
from tests.photos import frames, photo
from tests.reference import llava_onevision

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

TEXT = "A <image>What is this? "
ODD = [(1, 1), (17, 4760), (8000, 20), (20, 8000), (1, 3000), (2, 1)]
LARGEST = (2304, 2304)
"""6 x 6 tiles, 81 x 81 tokens of them."""


def asked(size, plan):
    return {
        "prompt": TEXT,
        "multi_modal_data": {"image": [photo("coffee").resize(size)]},
        "mm_processor_kwargs": {"hiprune": plan},
    }


def with_video(plan):
    request = asked((451, 300), plan)
    request["prompt"] = f"{TEXT}Or this <video>? "
    request["multi_modal_data"]["video"] = [frames()]
    return request


def run(path):
    llm = engine(
        path,
        max_model_len=12288,
        max_num_batched_tokens=2048,
        max_num_seqs=8,
        worker_extension_cls="hiprune_vllm.engine.explain.ExplainExtension",
    )
    forget(llm)
    together = generate(llm, [asked(size, {"tokens": 40}) for size in ODD], 1)
    return {
        "odd": one_by_one(llm, [asked(size, {"tokens": 4}) for size in ODD]),
        "together": [answer["prompt_tokens"] for answer in together],
        "largest": one_by_one(llm, [asked(LARGEST, {"tokens": 100})]),
        "videos": one_by_one(llm, [with_video({}), with_video({"tokens": 10})]),
        "explained": explained(llm, TEXT, photo("coffee").resize((1500, 1152)), {"tokens": 50}),
        "after": one_by_one(llm, [asked((451, 300), {"tokens": 10})]),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onevision")
    llava_onevision.build(folder)
    return str(folder)


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return llava_onevision.OnevisionOracle(checkpoint)


@pytest.fixture(scope="module")
def results(checkpoint):
    return in_new_process(run, checkpoint, environment=IN_PROCESS)


def kept_parts(parts):
    return [part for part in parts if part]


def test_pictures_of_odd_sizes_keep_what_was_promised(oracle, results):
    text = len(TEXT) - len("<image>")
    assert results["together"] == [text + 40] * len(ODD)
    for size, answer in zip(ODD, results["odd"], strict=True):
        image = photo("coffee").resize(size)
        assert answer["kept"] == kept_parts(oracle.keep(image, tokens=4)), size


def test_the_largest_picture_is_chosen_from_as_a_whole(oracle, results):
    image = photo("coffee").resize(LARGEST)
    assert oracle.scaled(image) == (81, 81)
    (answer,) = results["largest"]
    expected = oracle.keep(image, tokens=100)
    assert answer["kept"] == expected
    assert [len(part) for part in expected] == [10, 90]


def test_a_video_stays_whole_behind_a_pruned_picture(oracle, results):
    clip, _ = frames()
    processed = oracle.processor.video_processor([clip], return_tensors="pt")
    with torch.inference_mode():
        (video,) = oracle.model.model.get_video_features(
            processed["pixel_values_videos"], return_dict=True
        ).pooler_output
    image = photo("coffee").resize((451, 300))
    kept = oracle.keep(image, tokens=10)
    whole, pruned = results["videos"]
    assert pruned["kept"] == kept_parts(kept)
    assert whole["kept"] == []
    prompt = f"{TEXT}Or this <image>? "
    for answer, visual in (
        (whole, oracle.unpruned(image)),
        (pruned, oracle.embeddings(image, kept)),
    ):
        expected = oracle.logprobs(prompt, [visual, video], answer["tokens"])
        got = torch.tensor(answer["logprobs"], dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_a_scaled_picture_is_explained_as_it_is_chosen_from(oracle, results):
    image = photo("coffee").resize((1500, 1152))
    told, views = results["explained"]
    assert [part["kept"] for part in told] == oracle.keep(image, tokens=50)
    base, merged = told
    rows, columns = oracle.scaled(image)
    assert (base["grid"], merged["grid"]) == ([27, 27], [rows, columns])
    assert [view[0] for view in views] == [0, 1]
    (_, left, top, pixels) = views[1]
    assert (left, top) == (384, 0)
    assert pixels.shape == (rows * 14, columns * 14, 3)
    # It is the picture: shrunk alike they hardly differ.
    small = torch.tensor(pixels).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(small, (32, 32), mode="area")[0]
    expected = image.convert("RGB").resize((32, 32), resample=4)
    wanted = torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8)
    difference = small - wanted.view(32, 32, 3).permute(2, 0, 1)
    assert difference.abs().mean() < 6


def test_the_engine_goes_on(oracle, results):
    image = photo("coffee").resize((451, 300))
    assert results["after"][0]["kept"] == kept_parts(oracle.keep(image, tokens=10))
