"""LLaVA-NeXT in the real engine: tiles, padding, order, and the unpruned model at a full budget."""

import itertools

import pytest
import torch

from tests.e2e.offline import (
    IN_PROCESS,
    PROMPT,
    assert_same_answer,
    engine,
    forget,
    generate,
    in_new_process,
    lose_encoder_outputs,
    one_by_one,
    request,
    spy_on_selection,
    swept,
    worker_model,
)
from tests.photos import photo
from tests.reference.checkpoints import build_llava_next
from tests.reference.llava_next import LlavaNextOracle

PICTURES = {
    "square": ("astronaut", (512, 512)),  # 2x2 tiles
    "landscape": ("chelsea", (451, 300)),  # 2x2, padded above and below
    "wide": ("coffee", (1000, 300)),  # 1x3
    "tall": ("coffee", (300, 1000)),  # 3x1
    "1x2": ("rocket", (672, 336)),
    "2x1": ("rocket", (336, 672)),
    "narrow": ("rocket", (120, 900)),  # most of 3x1 is padding
    "tiny": ("chelsea", (40, 25)),
    "huge": ("hubble", (2600, 1900)),
}
ODD = ((26, 28), (332, 27), (1093, 5), (1, 1), (1, 2), (5000, 1), (1, 5000), (20, 8000))
PLANS = (
    {"tokens": 640},
    {"tokens": 320, "alpha": 0.5, "buffer": "square"},
    {"tokens": 163, "score": "cls", "object_layer": 5},
    {"tokens": 7, "alpha": 1.0, "buffer": "none"},
    {"tokens": 1},
)


def picture(name):
    source, size = PICTURES[name]
    return photo(source).resize(size)


def run(path, names):
    from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration

    llm = engine(path, max_model_len=8192, max_num_batched_tokens=8192)
    cases = swept(itertools.product(names, PLANS), 2)  # every picture, and every plan
    results = {"cases": one_by_one(llm, [request(picture(n), p) for n, p in cases])}
    forget(llm)
    results["batched"] = generate(llm, [request(picture(n), p) for n, p in cases])
    forget(llm)
    results["several"] = one_by_one(
        llm, [request([picture(n) for n in ("wide", "tiny", "tall")], {"tokens": 50})]
    )[0]
    results["own_plans"] = generate(
        llm,
        [
            request(
                [picture(n) for n in ("wide", "tiny", "tall", "wide")],
                [{"tokens": 30}, {}, {"ratio": 0.01}, {"tokens": 31}],
            )
        ],
    )[0]
    results["total"] = generate(
        llm, [request([picture(n) for n in ("wide", "1x2")], {"total_tokens": 300})]
    )[0]
    forget(llm)
    results["full"] = generate(llm, [request(picture(n), None) for n in names])
    results["odd"] = [
        [
            generate(llm, [request(photo("coffee").resize(size), plan)])[0]["prompt_tokens"]
            for plan in (None, {"tokens": 20}, {"tokens": 20, "method": "random"})
        ]
        for size in ODD
    ]
    results["nearly_full"] = one_by_one(llm, [request(picture("wide"), {"tokens": 2170})])[0]

    # In one batch of the model's: unpruned next to pruned, and the stock forward.
    model = worker_model(llm)
    seen = []
    embed, model.embed_multimodal = model.embed_multimodal, None

    def record(**kwargs):
        seen.append(kwargs)
        return embed(**kwargs)

    model.embed_multimodal = record
    forget(llm)
    generate(llm, [request(picture("landscape"), {"tokens": 99999})])
    model.embed_multimodal = embed
    (kwargs,) = seen
    kwargs = {name: value for name, value in kwargs.items() if name != "hiprune_budget"}
    with torch.inference_mode():
        stock = LlavaNextForConditionalGeneration.embed_multimodal(model, **kwargs)
        ours = embed(**seen[0])
    results["full_is_stock"] = torch.equal(stock[0], ours[0])

    # The first half of a picture is in the prefix cache, the encoder has to run again.
    forget(llm)
    wish = request(picture("square"), {"tokens": 400})
    first = generate(llm, [wish])[0]
    # The encoder's outputs alone are lost: with the caches' resets the selections would be, too.
    lose_encoder_outputs(llm)
    with spy_on_selection() as chosen_again:
        again = generate(llm, [{**wish, "prompt": wish["prompt"] + "x"}])[0]
        results["again"] = generate(llm, [wish])[0] == first and again["tokens"] is not None
    results["chosen_again"] = chosen_again
    return cases, results


@pytest.fixture(scope="module", params=["vicuna", pytest.param("mistral", marks=pytest.mark.long)])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    build_llava_next(folder, mistral=request.param == "mistral")
    return folder


@pytest.fixture(scope="module")
def engine_results(checkpoint):
    # The text model does not change what the tower does: a few pictures are enough for Mistral.
    names = list(PICTURES)[:: 4 if "mistral" in checkpoint.name else 1]
    return in_new_process(run, str(checkpoint), names, environment=IN_PROCESS)


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return LlavaNextOracle(checkpoint)


@pytest.mark.sweep
def test_kept_indices_order_answers_and_logits_equal_the_oracles(engine_results, oracle):
    cases, results = engine_results
    for (name, plan), result in zip(cases, results["cases"], strict=True):
        image = picture(name)
        expected = oracle.keep(image, **plan)
        assert result["kept"] == [tile for tile in expected if tile], (name, plan)
        assert sum(map(len, expected)) == plan["tokens"]
        visual = oracle.embeddings(image, expected)
        assert_same_answer(result, oracle.logprobs(PROMPT, [visual], result["tokens"]))


def test_padding_is_never_kept(engine_results, oracle):
    cases, results = engine_results
    padded = 0
    for (name, plan), result in zip(cases, results["cases"], strict=True):
        allowed = oracle.allowed(picture(name))
        padded += sum(576 - len(tile) for tile in allowed)
        if plan["tokens"] >= len(allowed) and all(allowed):
            for tile, kept in zip(allowed, result["kept"], strict=True):
                assert set(kept) <= set(tile)
    assert padded


def test_every_anyres_grid_is_covered(oracle):
    assert {oracle.grid(picture(name)) for name in PICTURES} == {
        (1, 2),
        (2, 1),
        (2, 2),
        (1, 3),
        (3, 1),
    }


def test_answers_do_not_depend_on_the_batch(engine_results):
    _, results = engine_results
    for alone, batched in zip(results["cases"], results["batched"], strict=True):
        assert alone["tokens"] == batched["tokens"]


def test_pictures_of_odd_sizes_are_served(engine_results):
    """A budget is kept to the token, and a full one is what vLLM counts and encodes."""
    _, results = engine_results
    (_, least, _), *_ = results["odd"]
    for full, kept, drawn in results["odd"]:
        assert kept == drawn == least
        assert full >= kept - 20 + 576  # the base tile, and what the grid shows of the picture


def test_pictures_with_different_grids_in_one_request(engine_results, oracle):
    result = engine_results[1]["several"]
    visual = []
    for name in ("wide", "tiny", "tall"):
        visual.append(oracle.embeddings(picture(name), oracle.keep(picture(name), tokens=50)))
    prompt = PROMPT.replace("<image>", "<image>" * 3)
    assert_same_answer(result, oracle.logprobs(prompt, visual, result["tokens"]))


def test_every_picture_of_a_request_gets_its_own_plan(engine_results, oracle):
    result = engine_results[1]["own_plans"]
    tall = oracle.unpruned(picture("tall")).shape[0]
    visual = []
    for name, tokens in (("wide", 30), ("tiny", None), ("tall", round(0.01 * tall)), ("wide", 31)):
        image = picture(name)
        visual.append(
            oracle.unpruned(image)
            if tokens is None
            else oracle.embeddings(image, oracle.keep(image, tokens=tokens))
        )
    prompt = PROMPT.replace("<image>", "<image>" * 4)
    assert_same_answer(result, oracle.logprobs(prompt, visual, result["tokens"]))


def test_a_total_is_shared_in_proportion(engine_results, oracle):
    result = engine_results[1]["total"]
    names = ("wide", "1x2")
    sizes = [oracle.unpruned(picture(name)).shape[0] for name in names]
    first = round(300 * sizes[0] / sum(sizes))
    visual = [
        oracle.embeddings(picture(name), oracle.keep(picture(name), tokens=tokens))
        for name, tokens in zip(names, (first, 300 - first), strict=True)
    ]
    prompt = PROMPT.replace("<image>", "<image>" * 2)
    assert_same_answer(result, oracle.logprobs(prompt, visual, result["tokens"]))


def test_a_full_budget_is_the_unpruned_model_newlines_included(engine_results, oracle):
    cases, results = engine_results
    assert results["full_is_stock"]
    names = dict.fromkeys(name for name, _ in cases)
    for name, result in zip(names, results["full"], strict=True):
        visual = oracle.unpruned(picture(name))
        assert_same_answer(result, oracle.logprobs(PROMPT, [visual], result["tokens"]))


def test_above_all_patches_the_newlines_go_first(engine_results, oracle):
    result = engine_results[1]["nearly_full"]
    image = picture("wide")
    patches = sum(map(len, oracle.allowed(image)))
    newlines = oracle.unpruned(image).shape[0] - patches
    assert newlines > 0
    visual = oracle.embeddings(image, oracle.keep(image, tokens=min(2170, patches)))
    assert_same_answer(result, oracle.logprobs(PROMPT, [visual], result["tokens"]))


def test_a_picture_that_is_encoded_again_keeps_its_tokens(engine_results):
    _, results = engine_results
    assert results["again"]
    assert results["chosen_again"] == []
