"""Videos with a budget in the real engine: indices of every slice, positions, logits, chunks."""

import numpy as np
import pytest
import torch

from tests.e2e.offline import (
    IN_PROCESS,
    assert_same_answer,
    engine,
    forget,
    generate,
    in_new_process,
    lose_encoder_outputs,
    one_by_one,
    record_positions,
    spy_on_selection,
    worker_model,
)
from tests.photos import photo
from tests.reference.checkpoints import build_qwen
from tests.reference.qwen import QwenOracle
from tests.reference.qwen_video import VideoOracle

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
BEFORE, AFTER = "<|im_start|>user <|vision_start|>", "<|vision_end|>Why?<|im_end|>"
CLIPS = {"even": (8, 112, 84), "odd": (5, 84, 140), "short": (1, 168, 56), "long": (24, 84, 84)}
FPS = 2.0
PLANS = (
    {"ratio": 1 / 3},
    {"ratio": 2 / 9, "alpha": 0.5, "buffer": "square"},
    {"ratio": 1 / 9, "object_layer": 2, "buffer": "row"},
    {"tokens": 7, "alpha": 1.0, "buffer": "none"},
    {"tokens": 1},
)
CHUNK = 24


def clip(name):
    """Frames of a photograph that drifts, and what vLLM wants to know of them."""
    count, width, height = CLIPS[name]
    still = np.asarray(photo("coffee").resize((width, height)))
    frames = np.stack([np.roll(still, 5 * i, 1) // (1 + i % 3) for i in range(count)])
    known = {"fps": FPS, "total_num_frames": count, "frames_indices": list(range(count))}
    return frames, known


def ask(name, plan, before="", after="Why?"):
    kwargs = {} if plan is None else {"mm_processor_kwargs": {"hiprune": plan}}
    return {
        "prompt": f"<|im_start|>user {before}{VIDEO}{after}<|im_end|>",
        "multi_modal_data": {"video": [clip(name)]},
        **kwargs,
    }


def run(path):
    llm = engine(path)
    cases = [(name, plan) for name in CLIPS for plan in PLANS]
    seen = record_positions(llm)
    results = {"positions": []}
    answers = []
    for name, plan in cases:
        answers += one_by_one(llm, [ask(name, plan)])
        results["positions"].append(seen[answers[-1]["prompt_tokens"]])
    results["cases"] = answers
    del worker_model(llm).recompute_mrope_positions
    forget(llm)
    results["batched"] = generate(llm, [ask(name, plan) for name, plan in cases])
    whole = [ask(name, None) for name in CLIPS]
    forget(llm)
    results["whole"] = one_by_one(llm, whole)
    forget(llm)
    results["full"] = one_by_one(llm, [ask(name, {"ratio": 1.0}) for name in CLIPS])

    picture = photo("astronaut").resize((112, 112))
    for key, prompt in (("first", IMAGE + " and " + VIDEO), ("last", VIDEO + " and " + IMAGE)):
        forget(llm)
        both = {
            "prompt": f"<|im_start|>user {prompt}Why?<|im_end|>",
            "multi_modal_data": {"image": [picture], "video": [clip("even")]},
            "mm_processor_kwargs": {"hiprune": {"total_tokens": 30}},
        }
        with spy_on_selection() as kept:
            (results[key],) = generate(llm, [both])
        results[f"{key}_kept"] = [len(row) for row in kept]
    forget(llm)
    two = {
        "prompt": f"<|im_start|>user {VIDEO}{VIDEO}Why?<|im_end|>",
        "multi_modal_data": {"video": [clip("even"), clip("odd")]},
        "mm_processor_kwargs": {"hiprune": {"tokens": 9}},
    }
    (results["two"],) = generate(llm, [two])
    forget(llm)
    results["again"] = generate(llm, [ask("even", {"tokens": 20})])
    lose_encoder_outputs(llm)
    llm.reset_prefix_cache()
    with spy_on_selection() as kept:
        results["again"] += generate(llm, [ask("even", {"tokens": 20})])
    results["chosen_again"] = list(kept)
    return cases, results


def run_chunked(path):
    llm = engine(path, max_num_batched_tokens=CHUNK, max_num_seqs=1)
    answers = []
    for offset in range(0, 12, 2):
        for plan in ({"tokens": 40}, {"tokens": 9}):
            answers += generate(llm, [ask("even", plan, before="x" * offset)])
        # The same video again, behind a prefix that is known up to somewhere in it.
        answers += generate(llm, [ask("even", {"tokens": 40}, "x" * offset, "How?")])
    return answers


@pytest.fixture(
    scope="module", params=[pytest.param("qwen2_vl", marks=pytest.mark.long), "qwen2_5_vl"]
)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    build_qwen(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def ran(checkpoint):
    return in_new_process(run, str(checkpoint), environment=IN_PROCESS)


@pytest.fixture(scope="module")
def oracle(checkpoint):
    found = VideoOracle(QwenOracle(checkpoint))
    found.clips = {name: found.encode(clip(name)[0]) for name in CLIPS}
    # Two frames a slice; Qwen2-VL numbers slices one by one.
    timed = hasattr(found.model.config.vision_config, "tokens_per_second")
    found.seconds = 2 / FPS if timed else 1.0
    return found


def resolved(oracle, name, plan):
    """N' and the other knobs."""
    slices, rows, columns = oracle.clips[name].grid
    full = slices * rows * columns
    knobs = {key: value for key, value in plan.items() if key not in ("ratio", "tokens")}
    keep = plan.get("tokens") or max(1, round(plan["ratio"] * full))
    return min(keep, full), knobs


def test_indices_positions_and_logits_equal_the_oracles(ran, oracle):
    cases, results = ran
    pairs = zip(cases, results["cases"], results["positions"], strict=True)
    for (name, plan), answer, positions in pairs:
        keep, knobs = resolved(oracle, name, plan)
        kept = oracle.keep(oracle.clips[name], keep, **knobs)
        assert sum(map(len, kept)) == keep
        chosen = [row for row in kept if row]
        assert sorted(answer["kept"]) == sorted(chosen), (name, plan)
        logprobs, expected = oracle.logprobs(
            BEFORE, AFTER, oracle.clips[name], kept, oracle.seconds, answer["tokens"]
        )
        assert torch.equal(positions, expected), (name, plan)
        assert_same_answer(answer, logprobs)


def test_answers_do_not_depend_on_the_batch(ran):
    _, results = ran
    for alone, batched in zip(results["cases"], results["batched"], strict=True):
        assert alone["tokens"] == batched["tokens"]
        assert alone["prompt_tokens"] == batched["prompt_tokens"]


def test_a_full_budget_is_the_whole_video_bit_by_bit(ran):
    _, results = ran
    for whole, full in zip(results["whole"], results["full"], strict=True):
        assert whole["logprobs"] == full["logprobs"]


def test_a_picture_and_a_video_share_a_total_in_either_order(ran):
    _, results = ran
    assert sum(results["first_kept"]) == sum(results["last_kept"]) == 30
    assert results["first"]["prompt_tokens"] == results["last"]["prompt_tokens"]


def test_two_videos_keep_as_many_each(ran, oracle):
    text = len(
        oracle.processor.tokenizer.encode(
            f"<|im_start|>user {VIDEO}{VIDEO}Why?<|im_end|>", add_special_tokens=False
        )
    )
    assert ran[1]["two"]["prompt_tokens"] == text - 2 + 18


def test_a_video_that_is_encoded_again_keeps_its_tokens(ran):
    _, results = ran
    first, second = results["again"]
    assert results["chosen_again"] == []
    assert first == second


def test_chunks_and_cached_prefixes_may_end_anywhere_in_a_video(checkpoint, oracle):
    answers = iter(in_new_process(run_chunked, str(checkpoint), environment=IN_PROCESS))
    even = oracle.clips["even"]
    for offset in range(0, 12, 2):
        before = BEFORE.replace("user ", "user " + "x" * offset)
        for keep, after in ((40, AFTER), (9, AFTER), (40, AFTER.replace("Why", "How"))):
            answer = next(answers)
            kept = oracle.keep(even, keep)
            logprobs, _ = oracle.logprobs(
                before, after, even, kept, oracle.seconds, answer["tokens"]
            )
            assert_same_answer(answer, logprobs)
