"""An EAGLE3 head beside Qwen2.5-VL: it gets hidden states of kept tokens, and their positions."""

import pytest
import torch

from tests.e2e.offline import (
    IN_PROCESS,
    engine,
    forget,
    generate,
    in_new_process,
    runner,
    worker_model,
)
from tests.reference.drafts import build_eagle3
from tests.reference.families import FAMILIES

pytestmark = pytest.mark.long
FAMILY = FAMILIES["qwen2_5_vl"]
PLANS = ({"ratio": 1 / 3}, {"tokens": 9, "alpha": 0.5}, {"ratio": 0.4, "method": "stride"}, {})
CHUNK, TOKENS = 40, 24


def asked():
    for name in list(FAMILY.pictures)[:3]:
        for plan in PLANS:
            yield {
                "prompt": f"USER: {FAMILY.image}\nabab cdcd What is this? ASSISTANT: ",
                "multi_modal_data": {"image": [FAMILY.picture(name)]},
                "mm_processor_kwargs": {"hiprune": plan},
            }


def noting(module, seen):
    """Notes the positions of every call."""
    run = module.forward

    def forward(*args, **kwargs):
        seen.append((kwargs["positions"] if "positions" in kwargs else args[1]).clone())
        return run(*args, **kwargs)

    module.forward = forward


def run(path, drafts):
    options = {"speculative_config": drafts} if drafts else {}
    llm = engine(
        path, max_num_batched_tokens=CHUNK, disable_log_stats=False, max_model_len=2048, **options
    )
    answers, given = [], []
    of_model, of_draft = [], []
    if drafts:
        noting(worker_model(llm), of_model)
        noting(runner(llm).drafter.model, of_draft)
    for one in asked():
        forget(llm)
        of_model.clear()
        of_draft.clear()
        (answer,) = generate(llm, [one], TOKENS)
        answers.append(answer)
        prefill = -(-answer["prompt_tokens"] // CHUNK)
        # The draft's first pass of a step has as many tokens as the model's; others have one.
        firsts = [positions for positions in of_draft if positions.shape[1] > 1]
        given.append((of_model[: prefill - 1], firsts[: prefill - 1]))
    found = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    kinds = ("num_draft_tokens", "num_accepted_tokens")
    counts = [found.get(f"vllm:spec_decode_{kind}", 0) for kind in kinds]
    return {"answers": answers, "given": given, "counts": counts}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    FAMILY.build(folder)
    return folder


@pytest.fixture(scope="module")
def plain(checkpoint):
    return in_new_process(run, str(checkpoint), None, environment=IN_PROCESS)


@pytest.fixture(scope="module")
def drafted(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eagle3")
    build_eagle3(checkpoint, folder)
    drafts = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": 3}
    return in_new_process(run, str(checkpoint), drafts, environment=IN_PROCESS)


def test_drafts_change_no_answer(drafted, plain):
    assert len(plain["answers"]) == 12
    for one, other in zip(drafted["answers"], plain["answers"], strict=True):
        assert one["prompt_tokens"] == other["prompt_tokens"]
        assert one["tokens"] == other["tokens"]
        assert torch.allclose(
            torch.tensor(one["logprobs"]), torch.tensor(other["logprobs"]), atol=1e-3
        )


def test_a_draft_has_the_positions_of_kept_tokens(drafted):
    steps = 0
    for of_model, of_draft in drafted["given"]:
        for model, draft in zip(of_model, of_draft, strict=True):
            assert torch.equal(draft, model)
            steps += 1
    assert steps > 12
    shown = torch.cat([one for of_model, _ in drafted["given"] for one in of_model], dim=1)
    assert (shown[1] != shown[2]).any()  # rows and columns of pictures are among them


def test_some_drafts_are_right(drafted):
    drafts, accepted = drafted["counts"]
    assert drafts > 100
    assert accepted > 0
