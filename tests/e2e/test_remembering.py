"""Forged identities, new weights, adapters and long pictures, in the real engine of each family."""

import json
from pathlib import Path

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
    one_by_one,
    request,
    spy_on_selection,
    worker_model,
)
from tests.e2e.test_qwen_oracle import ask
from tests.photos import photo
from tests.reference import checkpoints, random_llava

TRAINED = 512
"""`max_position_embeddings` of the Qwen2.5-VL checkpoint, whose table has 2048 rows."""
LORA = {"enable_lora": True, "max_lora_rank": 8}


def llava_ask(image, plan):
    return request(image, plan)


def qwen_ask(image, plan):
    return ask([image], plan)


def build_qwen(folder):
    checkpoints.build_qwen2_5_vl(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = TRAINED
    (folder / "config.json").write_text(json.dumps(config))


FAMILIES = {
    "llava": (random_llava.build, llava_ask, LORA),
    "llava_next": (checkpoints.build_llava_next, llava_ask, {"max_model_len": 8192}),
    "qwen2_5_vl": (build_qwen, qwen_ask, {"max_model_len": TRAINED}),
}


def pictures():
    """Two of one size, and one whose tiles or grid are others."""
    return (
        photo("coffee").resize((448, 224)),
        photo("chelsea").resize((448, 224)),
        photo("coffee").resize((200, 448)),
    )


def forged(llm, ask):
    """The same requests with the keys as they are, and with one key for all of them."""
    from hiprune_vllm.engine import wire

    coffee, cat, tall = pictures()
    items = [
        ask(image, {"tokens": tokens, "method": method})
        for image, tokens, method in (
            (coffee, 40, "hiprune"),
            (coffee, 41, "hiprune"),
            (cat, 41, "hiprune"),
            (tall, 41, "hiprune"),
            (coffee, 20, "random"),
            (coffee, 100, "hiprune"),
        )
    ]
    honest = one_by_one(llm, items)
    forget(llm)
    keyed, wire.keyed = wire.keyed, lambda *_: (1, 2, 3, 4)
    try:
        collided = []
        for item in items:
            with spy_on_selection() as kept:
                (answer,) = generate(llm, [item])
            collided.append(answer | {"kept": kept})
        together = generate(llm, items)
    finally:
        wire.keyed = keyed
    forget(llm)
    return {"honest": honest, "forged": collided, "together": together}


def resets(llm, item):
    """What is remembered after each way to drop what vLLM has encoded."""
    left = {}
    remembered = worker_model(llm)._kept_before
    for name, reset in {
        "nothing": lambda: None,
        "mm_cache": llm.llm_engine.reset_mm_cache,
        "encoder_cache": llm.llm_engine.reset_encoder_cache,
        "sleep": lambda: (llm.sleep(level=1), llm.wake_up()),
        "weights": lambda: llm.collective_rpc("reload_weights"),
    }.items():
        forget(llm)
        generate(llm, [item], 1)
        reset()
        left[name] = len(remembered)
    forget(llm)  # new weights empty the worker's encoder cache, not what the scheduler knows of it
    return left


def run(path, family, llm=None):
    _, ask, options = FAMILIES[family]
    llm = llm or engine(path, **options)
    results = forged(llm, ask)
    results["left"] = resets(llm, ask(pictures()[0], {"tokens": 40}))
    return llm, results


def run_family(path, family):
    return run(path, family)[1]


def run_llava(path, other, adapter):
    """Also: an adapter of the language model beside none, then another checkpoint's weights."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    llm = engine(path, **LORA)
    items = [request(photo(name), {"tokens": 64}) for name in ("coffee", "chelsea")]
    lora = LoRARequest("tiny", 1, adapter)
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=-1)
    # In one batch: nobody's adapter may act on the others' requests.
    outputs = llm.generate(
        items * 2, sampling, use_tqdm=False, lora_request=[lora, lora, None, None]
    )
    adapted = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                [step[i].logprob for i in range(len(step))] for step in output.outputs[0].logprobs
            ],
        }
        for output in outputs
    ]
    forget(llm)
    llm, results = run(path, "llava", llm)
    results["lora"] = adapted
    results["before"] = one_by_one(llm, items)
    generate(llm, items)  # remembered, under the old weights
    llm.collective_rpc("reload_weights", kwargs={"weights_path": other})
    llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()
    results["reloaded"] = []
    for item in items:
        with spy_on_selection() as kept:
            (answer,) = generate(llm, [item])
        results["reloaded"].append(answer | {"kept": kept})
    return results


LONG = (11_200, 56)
"""Pixels of a picture of one or two rows: its columns count, however few are kept."""


def run_qwen(path):
    """Also: prompts up to the end of the rotary table, and beyond it."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from hiprune_vllm.engine.rotary_table import rotary_rows

    llm, results = run(path, "qwen2_5_vl")
    model = worker_model(llm)
    table = model.language_model.model.layers[0].self_attn.rotary_emb.cos_sin_cache
    results["rows"] = len(table), rotary_rows(model.config)
    longest = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    seen = []
    forward = model.forward

    def watched(input_ids, positions, *args, **kwargs):
        seen.append(int(positions.max()))
        return forward(input_ids, positions, *args, **kwargs)

    model.forward = watched
    results["accepted"], results["refused"] = [], []
    for count in range(1, 12):
        many = [photo("coffee").resize(LONG).rotate(180 * i) for i in range(count)]
        seen.clear()
        try:
            (output,) = llm.generate([ask(many, {"tokens": 1})], longest, use_tqdm=False)
        except VLLMValidationError as error:
            results["refused"].append((count, error.parameter, str(error)))
            forget(llm)
            continue
        length = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
        results["accepted"].append((count, length, max(seen)))
    model.forward = forward
    results["after"] = generate(llm, [ask([pictures()[0]], {"tokens": 40})])[0]
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in made.items():
        FAMILIES[name][0](folder)
    made["other"] = tmp_path_factory.mktemp("other")
    random_llava.build(made["other"], seed=77)
    made["adapter"] = tmp_path_factory.mktemp("adapter")
    build_adapter(made["adapter"], made["llava"])
    return made


def build_adapter(folder, checkpoint):
    """An adapter of rank 4 for the attention of the language model."""
    from safetensors.torch import load_file, save_file

    weights = load_file(Path(checkpoint) / "model.safetensors")
    draw = torch.Generator().manual_seed(5)
    rank, found = 4, {}
    for name, weight in weights.items():
        if "language_model" in name and name.endswith(("q_proj.weight", "v_proj.weight")):
            place = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            found[f"{place}.lora_A.weight"] = torch.randn(rank, columns, generator=draw) / 8
            found[f"{place}.lora_B.weight"] = torch.randn(rows, rank, generator=draw) / 2
    assert found
    save_file(found, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": 2 * rank,
                "target_modules": ["q_proj", "v_proj"],
                "bias": "none",
            }
        )
    )


@pytest.fixture(scope="module")
def results(folders):
    """What the engine of a family does; each is started once."""
    runs = {
        "llava": (run_llava, str(folders["other"]), str(folders["adapter"])),
        "llava_next": (run_family, "llava_next"),
        "qwen2_5_vl": (run_qwen,),
    }
    done = {}

    def of(family):
        if family not in done:
            function, *args = runs[family]
            done[family] = in_new_process(
                function, str(folders[family]), *args, environment=IN_PROCESS
            )
        return done[family]

    return of


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.long] if name != "qwen2_5_vl" else [])
        for name in FAMILIES
    ],
)
def test_a_collision_of_keys_is_a_miss_and_the_engine_lives(results, family):
    found = results(family)
    honest, forged, together = found["honest"], found["forged"], found["together"]
    for one, other, beside in zip(honest, forged, together, strict=True):
        assert one["prompt_tokens"] == other["prompt_tokens"] == beside["prompt_tokens"]
        if other["kept"]:  # chosen anew, for this picture and this budget
            assert other["kept"] == one["kept"]
            assert other["tokens"] == one["tokens"]
    # Another number of tokens, and other tiles or another grid, are other parts: misses all. LLaVA
    # scales whatever comes to the same tile.
    same_parts = [2, 3] if family == "llava" else [2]
    assert [i for i, other in enumerate(forged) if not other["kept"]] == same_parts


@pytest.mark.parametrize("family", FAMILIES)
def test_selections_go_wherever_vllm_drops_what_it_has_encoded(results, family):
    assert results(family)["left"] == {
        "nothing": 1,
        "mm_cache": 0,
        "encoder_cache": 0,
        "sleep": 0,
        "weights": 0,
    }


def test_new_weights_choose_anew_and_answer_as_a_fresh_engine(results, folders):
    from tests.reference.llava import LlavaOracle

    old, new = LlavaOracle(folders["llava"]), LlavaOracle(folders["other"])
    found = results("llava")
    for name, before, after in zip(
        ("coffee", "chelsea"), found["before"], found["reloaded"], strict=True
    ):
        image = photo(name)
        kept = new.keep(image, tokens=64)
        assert before["kept"] == [old.keep(image, tokens=64)]
        assert after["kept"] == [kept] != before["kept"]
        embeddings = new.embeddings(image, kept)
        assert_same_answer(after, new.logprobs(PROMPT, [embeddings], after["tokens"]))


def test_a_language_adapter_answers_with_a_budget_as_merged_weights_do(results, folders):
    from safetensors.torch import load_file

    from tests.reference.llava import LlavaOracle

    merged, plain = LlavaOracle(folders["llava"]), LlavaOracle(folders["llava"])
    adapter = load_file(folders["adapter"] / "adapter_model.safetensors")
    modules = dict(merged.model.named_modules())
    with torch.no_grad():
        for name, low in adapter.items():
            if name.endswith("lora_A.weight"):
                high = adapter[name.replace("lora_A", "lora_B")]
                place = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                tail = place.partition("language_model.")[2].removeprefix("model.")
                (module,) = [
                    one for path, one in modules.items()
                    if path.endswith(tail) and "language_model" in path
                ]  # fmt: skip
                module.weight += 2 * high @ low
    answers = results("llava")["lora"]
    for oracle, pair in ((merged, answers[:2]), (plain, answers[2:])):
        for name, answer in zip(("coffee", "chelsea"), pair, strict=True):
            image = photo(name)
            embeddings = oracle.embeddings(image, oracle.keep(image, tokens=64))
            expected = oracle.logprobs(PROMPT, [embeddings], answer["tokens"])
            assert_same_answer(answer, expected)
    assert [one["tokens"] for one in answers[:2]] != [one["tokens"] for one in answers[2:]]


def test_the_longest_answers_end_inside_the_rotary_table_and_other_prompts_are_refused(results):
    found = results("qwen2_5_vl")
    rows, counted = found["rows"]
    assert rows == counted == 4 * TRAINED
    for _, length, largest in found["accepted"]:
        assert length == TRAINED  # the longest answer there is
        assert largest < rows
    most = max(largest for _, _, largest in found["accepted"])
    columns = found["accepted"][1][2] - found["accepted"][0][2]
    assert most + columns >= rows  # one picture more would have left the table
    assert found["refused"][0][0] == found["accepted"][-1][0] + 1
    assert found["refused"][-1][0] == 11
    for _, parameter, told in found["refused"]:
        assert parameter == "messages"
        assert f"positions must stay below {rows}, got " in told
    assert found["after"]["tokens"] == found["honest"][0]["tokens"]
