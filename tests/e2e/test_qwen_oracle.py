"""Qwen2.5-VL in the real engine: indices, 3-D positions, answers, videos, chunks of every size."""

from unittest.mock import patch

import pytest
import torch

from tests.e2e.offline import (
    IN_PROCESS,
    assert_same_answer,
    engine,
    forget,
    generate,
    in_new_process,
    one_by_one,
    pixels_of_steps,
    record_positions,
    scheduler,
    spy_on_selection,
    worker_model,
)
from tests.photos import frames, photo
from tests.reference.checkpoints import build_qwen2_5_vl
from tests.reference.families import SHAPES
from tests.reference.qwen import QwenOracle

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
PICTURES = SHAPES
PLANS = (
    {"ratio": 1 / 3},
    {"ratio": 2 / 9, "alpha": 0.5, "buffer": "square"},
    {"ratio": 1 / 9, "object_layer": 2, "buffer": "row"},
    {"tokens": 3, "alpha": 1.0, "buffer": "none"},
    {"tokens": 1},
)
ODD = ((26, 28), (332, 27), (1, 1), (1, 2), (199, 1), (3, 600), (27, 29), (2, 390))
TOO_LONG = ((1093, 5), (1, 201), (8000, 20), (5000, 1))
CHUNK, BLOCK = 24, 32  # tokens of a prefill chunk and of a prefix-cache block


def picture(name):
    source, size = PICTURES[name]
    return photo(source).resize(size)


def prompt(images, before="", after="What is this?"):
    return f"<|im_start|>user {before}{IMAGE * images}{after}<|im_end|>"


def ask(images, plan, **text):
    kwargs = {} if plan is None else {"mm_processor_kwargs": {"hiprune": plan}}
    return {
        "prompt": prompt(len(images), **text),
        "multi_modal_data": {"image": images},
        **kwargs,
    }


def video_requests(plan):
    video = {"prompt": f"<|im_start|>user {VIDEO}Why?<|im_end|>"}
    both = {"prompt": f"<|im_start|>user {IMAGE}and {VIDEO}Why?<|im_end|>"}
    image = picture("square")
    # A list is for pictures alone.
    kwargs = {} if plan is None else {"mm_processor_kwargs": {"hiprune": [plan]}}
    return [
        {**video, "multi_modal_data": {"video": [frames()]}},
        {**both, "multi_modal_data": {"image": [image], "video": [frames()]}, **kwargs},
    ]


def run(path):
    from vllm.exceptions import VLLMValidationError

    llm = engine(path)
    cases = [(name, plan) for name in PICTURES for plan in PLANS]
    results = {"cases": one_by_one(llm, [ask([picture(n)], p) for n, p in cases])}
    forget(llm)
    results["batched"] = generate(llm, [ask([picture(n)], p) for n, p in cases])
    forget(llm)
    results["own_plans"] = generate(
        llm,
        [
            ask(
                [picture(n) for n in ("wide", "square", "tall", "wide")],
                [{"tokens": 20}, {}, {"ratio": 0.5}, {"tokens": 21}],
            )
        ],
    )[0]
    results["unpruned"] = generate(llm, [ask([picture(n)], None) for n in PICTURES])
    results["videos"] = generate(llm, video_requests(None))
    results["pruned_next_to_video"] = generate(llm, video_requests({"tokens": 10}))
    results["errors"] = []
    for wrong in (
        ask([picture("square")], {"tokens": 5}, after="<|image_pad|> What?"),
        {**ask([picture("square")], {"tokens": 5}), "prompt": "<|vision_start|><|image_pad|>"},
    ):
        try:
            generate(llm, [wrong])
        except (VLLMValidationError, ValueError) as error:
            results["errors"].append(str(error))
    for size in TOO_LONG:
        try:
            generate(llm, [ask([photo("coffee").resize(size)], {"tokens": 5})])
        except VLLMValidationError as error:
            results["errors"].append((error.parameter, str(error)))
    results["odd"] = [
        [
            generate(llm, [ask([photo("coffee").resize(size)], plan)])[0]["prompt_tokens"]
            for plan in (None, {"tokens": 2}, {"tokens": 2, "method": "random"})
        ]
        for size in ODD
    ]
    results["after_errors"] = generate(llm, [ask([picture(cases[0][0])], cases[0][1])])[0]

    # Many pictures of one token each, with room for three whole ones in a step, and one that is
    # larger than a step's budget.
    pictures = [picture("square").rotate(i) for i in range(32)]
    for name, asked in (
        ("many", [ask(pictures, {"tokens": 1})]),
        ("whole", [ask([one], None) for one in pictures]),
        ("large", [ask([picture("square"), picture("huge")], {"tokens": 1})]),
    ):
        forget(llm)
        budget = patch.object(scheduler(llm), "max_num_encoder_input_tokens", 64 * 3)
        with budget, pixels_of_steps(llm) as steps:
            results[name] = generate(llm, asked)[0]
        results[f"{name}_steps"] = list(steps)
    forget(llm)
    results["at_once"] = generate(llm, [ask(pictures, {"tokens": 1})])[0]
    return cases, results


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    build_qwen2_5_vl(folder)
    return folder


@pytest.fixture(scope="module")
def one_shot(checkpoint):
    return in_new_process(run, str(checkpoint), environment=IN_PROCESS)


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return QwenOracle(checkpoint)


def test_kept_indices_positions_answers_and_logits_equal_the_oracles(one_shot, oracle):
    cases, results = one_shot
    for (name, plan), result in zip(cases, results["cases"], strict=True):
        image = picture(name)
        expected = oracle.keep(image, **plan)
        if len(expected) < oracle.count(image):
            assert result["kept"] == [expected], (name, plan)
        if "ratio" in plan:
            assert len(expected) == max(1, round(plan["ratio"] * oracle.count(image)))
        logprobs = oracle.logprobs(prompt(1), [image], [expected], result["tokens"])
        assert_same_answer(result, logprobs)


def test_answers_do_not_depend_on_the_batch(one_shot):
    _, results = one_shot
    for alone, batched in zip(results["cases"], results["batched"], strict=True):
        assert alone["tokens"] == batched["tokens"]


def test_every_picture_of_a_request_gets_its_own_plan(one_shot, oracle):
    result = one_shot[1]["own_plans"]
    images = [picture(name) for name in ("wide", "square", "tall", "wide")]
    plans = ({"tokens": 20}, {"ratio": 1.0}, {"ratio": 0.5}, {"tokens": 21})
    kept = [oracle.keep(image, **plan) for image, plan in zip(images, plans, strict=True)]
    assert_same_answer(result, oracle.logprobs(prompt(4), images, kept, result["tokens"]))


def test_without_pruning_answers_are_the_oracles(one_shot, oracle):
    for name, result in zip(PICTURES, one_shot[1]["unpruned"], strict=True):
        image = picture(name)
        kept = [range(oracle.count(image))]
        assert_same_answer(result, oracle.logprobs(prompt(1), [image], kept, result["tokens"]))


def run_stock(path):
    llm = engine(path)
    return generate(llm, [ask([picture(n)], None) for n in PICTURES]), generate(
        llm, video_requests(None)
    )


@pytest.mark.long
def test_without_pruning_images_and_videos_are_bit_identical_to_vllms(one_shot, checkpoint):
    images, videos = in_new_process(
        run_stock, str(checkpoint), environment=IN_PROCESS | {"VLLM_PLUGINS": ""}
    )
    assert images == one_shot[1]["unpruned"]
    assert videos == one_shot[1]["videos"]


def test_a_video_stays_whole_next_to_a_pruned_image(one_shot):
    _, results = one_shot
    (video, both), (same, pruned) = results["videos"], results["pruned_next_to_video"]
    assert same == video
    assert both["prompt_tokens"] - pruned["prompt_tokens"] == 64 - 10
    assert pruned["tokens"] != both["tokens"]


def test_prompts_that_positions_could_not_be_told_from_are_refused(one_shot):
    _, results = one_shot
    assert "placeholder" in results["errors"][0]
    assert "text must follow" in results["errors"][1]
    assert results["after_errors"]["tokens"] == results["cases"][0]["tokens"]


def test_pictures_of_odd_sizes_are_served_or_refused_by_their_field(one_shot):
    _, results = one_shot
    told = results["errors"][2:]
    assert [field for field, _ in told] == ["image_url"] * len(TOO_LONG)
    for (width, height), (_, message) in zip(TOO_LONG, told, strict=True):
        assert f"{width} x {height} pixels" in message
    (_, least, _), *_ = results["odd"]
    for full, kept, drawn in results["odd"]:
        assert kept == drawn == least
        assert full > kept


def test_one_step_never_moves_more_pixels_to_the_device_than_an_unpruned_schedule(one_shot):
    _, results = one_shot
    steps, whole = results["many_steps"], results["whole_steps"]
    square = 256 * 3 * 2 * 14 * 14  # patches, each of two equal frames
    assert sum(steps) == sum(whole) == 32 * square
    assert max(steps) == max(whole) == 3 * square
    assert results["many"]["tokens"] == results["at_once"]["tokens"]


def test_a_picture_larger_than_a_steps_budget_has_a_step_of_its_own(one_shot):
    steps = one_shot[1]["large_steps"]
    assert len(steps) == 2
    assert steps[0] == 256 * 3 * 2 * 14 * 14 < steps[1]
    assert len(one_shot[1]["large"]["tokens"]) == 8


def run_bf16(path):
    llm = engine(path, dtype="bfloat16")
    positions = record_positions(llm)
    results = []
    for name in PICTURES:
        for plan in PLANS[:3]:
            forget(llm)
            with spy_on_selection() as kept:
                (answer,) = generate(llm, [ask([picture(name)], plan)])
            answer["kept"], answer["positions"] = kept, positions[answer["prompt_tokens"]]
            results.append((name, plan, answer))
    return results


@pytest.mark.long
def test_positions_are_exact_in_bf16_also_beyond_256(checkpoint, oracle):
    overlaps, largest = [], 0
    for name, plan, result in in_new_process(run_bf16, str(checkpoint), environment=IN_PROCESS):
        image = picture(name)
        (kept,) = result["kept"]
        expected = oracle.prompt(prompt(1), [image], [kept]).positions
        assert torch.equal(result["positions"], expected[:, 0])
        largest = max(largest, int(expected.max()))
        wanted = oracle.keep(image, **plan)
        overlaps.append(len(set(kept) & set(wanted)) / len(wanted))
    assert largest > 256
    assert sum(overlaps) / len(overlaps) > 0.9


COUNTS = (1, 2, 4)
KEEP = ({"tokens": 40}, {"tokens": 17}, {}, {"tokens": 33})
NAMES = ("square", "tall", "tiny", "wide")


def chunked_requests(after):
    return [
        (offset, count, ask(images, plans, before="x" * offset, after=after))
        for count in COUNTS
        for offset in range(BLOCK)
        for images, plans in [([picture(n) for n in NAMES[:count]], list(KEEP[:count]))]
    ]


def run_chunked(path):
    llm = engine(
        path,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=4,
        block_size=BLOCK,
        enable_prefix_caching=True,
    )
    model, chunks = worker_model(llm), []
    forward = model.forward

    def count_tokens(input_ids, positions, *args, **kwargs):
        chunks.append(positions.shape[-1])
        return forward(input_ids, positions, *args, **kwargs)

    model.forward = count_tokens
    results = {"fresh": [], "hit": [], "together": []}
    for offset, count, item in chunked_requests("What?"):
        forget(llm)
        results["fresh"].append((offset, count, generate(llm, [item], 4)[0]))
        results.setdefault("chunks", list(chunks))
        # The prefix is known up to somewhere in the last image; its encoder output is not.
        llm.llm_engine.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()
        again = {**item, "prompt": item["prompt"].replace("What?", "How is it?")}
        before = len(chunks)
        results["hit"].append((offset, count, generate(llm, [again], 4)[0]))
        results.setdefault("hit_tokens", []).append(sum(chunks[before:]))
    forget(llm)
    items = chunked_requests("What?")
    answers = generate(llm, [item for _, _, item in items], 4)
    results["together"] = [
        (offset, count, answer) for (offset, count, _), answer in zip(items, answers, strict=True)
    ]
    return results


@pytest.fixture(scope="module")
def chunked(checkpoint):
    return in_new_process(run_chunked, str(checkpoint), environment=IN_PROCESS)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "after"), [("fresh", "What?"), ("hit", "How is it?"), ("together", "What?")]
)
def test_chunks_that_begin_and_end_anywhere_in_images_change_nothing(chunked, oracle, kind, after):
    kept = {
        name: oracle.keep(picture(name), **(plan or {"ratio": 1.0}))
        for name, plan in zip(NAMES, KEEP, strict=True)
    }
    assert len(chunked[kind]) == len(COUNTS) * BLOCK
    for offset, count, result in chunked[kind]:
        names = NAMES[:count]
        text = prompt(count, before="x" * offset, after=after)
        expected = oracle.logprobs(
            text, [picture(n) for n in names], [kept[n] for n in names], result["tokens"]
        )
        assert_same_answer(result, expected)


@pytest.mark.long
def test_the_sweep_really_chunks_and_really_hits_the_cache(chunked):
    assert max(chunked["chunks"]) == CHUNK
    lengths = [result["prompt_tokens"] for _, _, result in chunked["hit"]]
    saved = [length + 3 - used for length, used in zip(lengths, chunked["hit_tokens"], strict=True)]
    assert min(saved) >= BLOCK
    assert all(value % BLOCK == 0 for value in saved)
