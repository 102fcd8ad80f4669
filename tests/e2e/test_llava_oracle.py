"""LLaVA in the real engine against Hugging Face eager attention and the paper's transcription."""

import itertools

import pytest
import torch

from hiprune_vllm.pruning.budget import BUFFERS, ImageBudget
from tests.e2e.offline import (
    IN_PROCESS,
    PROMPT,
    assert_same_answer,
    budget_rows,
    engine,
    forget,
    generate,
    in_new_process,
    one_by_one,
    pixels_of_steps,
    request,
    scheduler,
    swept,
)
from tests.photos import photo
from tests.reference.llava import LlavaOracle

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
DEFAULT = {"tokens": 50}  # engine-wide, of the SigLIP engine


def plans(scores):
    return [
        {"tokens": tokens, "alpha": alpha, "buffer": buffer, "score": score}
        for tokens, alpha, buffer, score in itertools.product(
            (192, 128, 64, 1), (0.1, 0.5), BUFFERS, scores
        )
    ]


def run_clip(path):
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    from hiprune_vllm.pruning.record import ScoreRecorder
    from tests.e2e.offline import worker_model

    llm = engine(path)
    images = {name: photo(name) for name in PHOTOS}
    cases = swept(itertools.product(PHOTOS, plans(("global", "cls"))), 7)
    results = {"cases": one_by_one(llm, [request(images[n], p) for n, p in cases])}

    # The same again in one go, batched with each other in whatever way the engine likes.
    forget(llm)
    results["batched"] = generate(llm, [request(images[n], p) for n, p in cases[::3]])

    cat, cup = images["chelsea"], images["coffee"]
    small, large = {"tokens": 64}, {"tokens": 192}
    results["two_images"] = one_by_one(llm, [request([cat, cup], small)])[0]
    results["uuid"] = generate(
        llm,
        [
            request(cat, plan, multi_modal_uuids={"image": ["my-cat"]})
            for plan in (small, large, None, small)
        ],
    )
    generate(llm, [request(cat, large, multi_modal_uuids={"image": ["known"]})])
    results["uuid_only"] = generate(
        llm, [request([None], large, multi_modal_uuids={"image": ["known"]})]
    )
    results["no_uuid"] = generate(llm, [request(cat, plan) for plan in (small, large, None)])
    results["random"] = one_by_one(
        llm,
        [request(image, {"tokens": 64, "method": "random"}) for image in (cat, cup)]
        + [request(cat, {"tokens": 65, "method": "random"})],
    )
    results["stride"] = one_by_one(llm, [request(cat, {"tokens": 64, "method": "stride"})])[0]
    results["attention"] = one_by_one(llm, [request(cat, {"tokens": 64, "method": "attention"})])[0]
    results["layer_5"] = one_by_one(llm, [request(cat, {"tokens": 64, "object_layer": 5})])[0]
    results["unpruned"] = [
        generate(llm, [request(cat, plan)])[0]
        for plan in (None, {}, {"tokens": 576}, {"tokens": 10**6}, {"ratio": 1})
    ]

    # Below the engine: the model's own methods, on the same batch.
    model = worker_model(llm)
    oracle_pixels = LlavaOracle(path).pixels
    pixels = torch.stack([oracle_pixels(images[name]) for name in PHOTOS])

    def rows(*keeps):
        return budget_rows(
            ImageBudget.of(
                576,
                keep,
                method="hiprune",
                alpha=0.1,
                buffer="cross",
                object_layer=3,
                score="global",
            )
            for keep in keeps
        )

    def explode(*args, **kwargs):
        raise AssertionError("scores were computed for an unpruned batch")

    with torch.inference_mode():
        stock = LlavaForConditionalGeneration.embed_multimodal(model, pixel_values=pixels)
        recording, ScoreRecorder.recording = ScoreRecorder.recording, explode
        try:
            full = model.embed_multimodal(
                pixel_values=pixels, hiprune_budget=rows(576, 576, 576, 576)
            )
        finally:
            ScoreRecorder.recording = recording
        results["full_is_stock"] = torch.equal(torch.stack(list(full)), stock)

        projected, patches = [], []
        hooks = [
            model.multi_modal_projector.register_forward_pre_hook(
                lambda _, args: projected.append(args[0].numel() // args[0].shape[-1])
            ),
            model.vision_tower.register_forward_pre_hook(
                lambda _, args: patches.append(args[0].shape[0])
            ),
        ]
        mixed = model.embed_multimodal(pixel_values=pixels, hiprune_budget=rows(64, 576, 1, 192))
        results["projected"], results["forwards"] = list(projected), list(patches)
        results["mixed"] = [tensor.clone() for tensor in mixed]

        for hook in hooks:
            hook.remove()
        results["stock"] = stock

    many = [images["rocket"].rotate(i) for i in range(24)]
    for name, asked in (
        ("whole", [request(one, None) for one in many]),
        ("one token", [request(many, {"tokens": 1})]),
        ("own plans", [request(many, [{"tokens": 1}, {"tokens": 9}] * 12)]),
    ):
        forget(llm)
        with pixels_of_steps(llm) as steps:
            generate(llm, asked, 1)
        results[name] = list(steps)
    results["budget"] = scheduler(llm).max_num_encoder_input_tokens
    return cases, results


@pytest.fixture(scope="module")
def clip(clip_checkpoint):
    return in_new_process(run_clip, str(clip_checkpoint), environment=IN_PROCESS)


@pytest.fixture(scope="module")
def oracle(clip_checkpoint):
    return LlavaOracle(clip_checkpoint)


def check_cases(oracle, cases, results):
    for (name, plan), result in zip(cases, results, strict=True):
        image = photo(name)
        expected = oracle.keep(image, **plan)
        assert result["kept"] == [expected], (name, plan)
        embeddings = oracle.embeddings(image, expected)
        assert_same_answer(
            result, oracle.logprobs(PROMPT, [embeddings], result["tokens"]), within=2e-3
        )


@pytest.mark.sweep
def test_kept_indices_answers_and_logits_equal_the_oracles(clip, oracle):
    cases, results = clip
    for knob, values in (("tokens", 4), ("alpha", 2), ("buffer", 4), ("score", 2)):
        assert len({(name, plan[knob]) for name, plan in cases}) == 4 * values
    check_cases(oracle, cases, results["cases"])


def test_the_cases_differ_from_each_other(clip):
    """Guards the guard: a selection that ignored a knob or the picture could not pass."""
    cases, results = clip
    kept = {
        (name, *plan.values()): tuple(result["kept"][0])
        for (name, plan), result in zip(cases, results["cases"], strict=True)
    }
    at_192 = [v for k, v in kept.items() if k[1] == 192 and k[2] == 0.5]
    assert len(set(at_192)) == len(at_192)
    answers = {tuple(result["tokens"]) for result in results["cases"]}
    assert len(answers) > len(cases) // 4


def test_answers_do_not_depend_on_the_batch(clip):
    _, results = clip
    for alone, batched in zip(results["cases"][::3], results["batched"], strict=True):
        assert alone["tokens"] == batched["tokens"]
        torch.testing.assert_close(
            torch.tensor(alone["logprobs"]), torch.tensor(batched["logprobs"]), rtol=0, atol=2e-3
        )


def test_the_prompt_shrinks_by_exactly_the_tokens_dropped(clip):
    cases, results = clip
    full = results["unpruned"][0]["prompt_tokens"]
    for (_, plan), result in zip(cases, results["cases"], strict=True):
        assert full - result["prompt_tokens"] == 576 - plan["tokens"]


def test_two_images_share_a_plan_and_keep_their_own_tokens(clip, oracle):
    result = clip[1]["two_images"]
    images = [photo("chelsea"), photo("coffee")]
    expected = [oracle.keep(image, tokens=64) for image in images]
    assert result["kept"] == expected
    visual = [oracle.embeddings(*pair) for pair in zip(images, expected, strict=True)]
    prompt = PROMPT.replace("<image>", "<image><image>")
    assert_same_answer(result, oracle.logprobs(prompt, visual, result["tokens"]), within=2e-3)


def test_a_clients_uuid_does_not_mix_up_plans(clip):
    results = clip[1]
    small, large, full = results["no_uuid"]
    for got, expected in zip(results["uuid"], (small, large, full, small), strict=True):
        assert got["prompt_tokens"] == expected["prompt_tokens"]
        assert got["tokens"] == expected["tokens"]
    assert results["uuid_only"][0]["tokens"] == large["tokens"]


FIRST_DRAWN = [8, 16, 17, 19, 26, 35]
"""Of 576 tokens of `chelsea`, the first that a random draw of 64 keeps."""


def test_the_controls_keep_what_they_say(clip, oracle):
    results = clip[1]
    cat = photo("chelsea")
    (first,), (other,), (more,) = (result["kept"] for result in results["random"])
    assert len(set(first)) == 64
    assert first != other
    assert len(more) == 65
    # The checkpoint lies in another folder every time: the draw is the picture's alone.
    assert first[:6] == FIRST_DRAWN
    assert results["stride"]["kept"] == [[9 * i for i in range(64)]]
    assert results["attention"]["kept"] == [oracle.keep(cat, tokens=64, alpha=0.0)]
    assert results["layer_5"]["kept"] == [oracle.keep(cat, tokens=64, object_layer=5)]
    for result, indices in (
        (results["random"][0], first),
        (results["stride"], results["stride"]["kept"][0]),
    ):
        logprobs = oracle.logprobs(PROMPT, [oracle.embeddings(cat, indices)], result["tokens"])
        assert_same_answer(result, logprobs, within=2e-3)


def test_without_pruning_the_forward_is_vllms_own(clip, oracle):
    results = clip[1]
    assert results["full_is_stock"]
    first = results["unpruned"][0]
    assert all(other == first for other in results["unpruned"])
    cat = photo("chelsea")
    logprobs = oracle.logprobs(PROMPT, [oracle.embeddings(cat, range(576))], first["tokens"])
    assert_same_answer(first, logprobs, within=2e-3)


def test_only_kept_tokens_pass_the_projector(clip, oracle):
    results = clip[1]
    assert results["projected"] == [64 + 576 + 1 + 192]
    assert results["forwards"] == [4]
    for name, got, keep in zip(PHOTOS, results["mixed"], (64, 576, 1, 192), strict=True):
        indices = oracle.keep(photo(name), tokens=keep) if keep < 576 else range(576)
        expected = oracle.embeddings(photo(name), indices)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


def test_one_step_never_moves_more_pixels_to_the_device_than_an_unpruned_schedule(clip):
    results = clip[1]
    picture = 3 * 336 * 336
    fit = results["budget"] // 576
    assert fit < 24
    for name in ("one token", "own plans"):
        assert sum(results[name]) == sum(results["whole"]) == 24 * picture
        assert max(results[name]) == fit * picture
        assert max(results[name]) <= max(results["whole"])


def run_stock(path):
    llm = engine(path)
    assert "hiprune" not in type(llm.llm_engine.renderer.mm_processor).__module__
    return generate(llm, [request(photo("chelsea"), None)])[0]


def test_a_full_budget_is_bit_identical_to_vllm_without_the_plugin(clip, clip_checkpoint):
    stock = in_new_process(
        run_stock, str(clip_checkpoint), environment=IN_PROCESS | {"VLLM_PLUGINS": ""}
    )
    assert stock == clip[1]["unpruned"][0]


def run_siglip(path):
    from vllm.exceptions import VLLMValidationError

    llm = engine(path, mm_processor_kwargs={"hiprune": DEFAULT})
    cases = swept(itertools.product(PHOTOS[:2], plans(("global",))), 3)
    results = {"cases": one_by_one(llm, [request(photo(n), p) for n, p in cases])}
    cat = photo("chelsea")
    results["default"] = one_by_one(llm, [request(cat, None)])[0]
    results["alpha_only"] = one_by_one(llm, [request(cat, {"alpha": 0.5})])[0]
    results["full"] = generate(llm, [request(cat, {"ratio": 1.0})])[0]
    try:
        generate(llm, [request(cat, {"score": "cls"})])
    except VLLMValidationError as error:
        results["cls"] = str(error)
    results["after"] = generate(llm, [request(cat, None)])[0]
    return cases, results


@pytest.fixture(scope="module")
def siglip(siglip_checkpoint):
    return in_new_process(run_siglip, str(siglip_checkpoint), environment=IN_PROCESS)


@pytest.mark.sweep
def test_siglip_towers_equal_the_oracle_too(siglip, siglip_checkpoint):
    cases, results = siglip
    check_cases(LlavaOracle(siglip_checkpoint), cases, results["cases"])


def test_an_engine_wide_plan_holds_where_a_request_has_no_wish(siglip, siglip_checkpoint):
    oracle, (_, results), cat = LlavaOracle(siglip_checkpoint), siglip, photo("chelsea")
    assert results["default"]["kept"] == [oracle.keep(cat, **DEFAULT)]
    assert results["alpha_only"]["kept"] == [oracle.keep(cat, **DEFAULT, alpha=0.5)]
    assert results["full"]["prompt_tokens"] - results["default"]["prompt_tokens"] == 256 - 50


def test_an_encoder_without_cls_refuses_cls_scores_and_goes_on(siglip):
    _, results = siglip
    assert "hiprune.score" in results["cls"]
    assert "no CLS token" in results["cls"]
    assert results["after"]["tokens"] == results["default"]["tokens"]
