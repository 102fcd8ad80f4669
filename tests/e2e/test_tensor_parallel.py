"""Two tensor-parallel ranks of the real engine keep what one rank keeps."""

import os

import pytest
import torch

from hiprune_vllm.pruning.budget import ImageBudget
from tests.e2e.offline import (
    IN_PROCESS,
    budget_rows,
    engine,
    generate,
    in_new_process,
    request,
    spy_on_selection,
)
from tests.photos import photo

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
PLANS = (
    {"tokens": 192},
    {"tokens": 64, "alpha": 0.5},
    {"tokens": 64, "score": "cls"},
    {"tokens": 1, "method": "attention"},
    {"tokens": 128, "buffer": "square", "object_layer": 5},
)


class Probe:
    """Runs in every worker: kept indices of one batch of pictures."""

    def __init__(self, pixels, rows):
        self.pixels, self.rows = pixels, rows

    def __call__(self, model):
        with spy_on_selection() as kept, torch.inference_mode():
            model.embed_multimodal(pixel_values=self.pixels, hiprune_budget=self.rows)
        return kept


def run(path, ranks, pixels, rows):
    llm = engine(path, tensor_parallel_size=ranks)
    requests = [request(photo(name), plan) for name in PHOTOS for plan in PLANS]
    return {
        "kept": llm.apply_model(Probe(pixels, rows)),
        "answers": generate(llm, requests),
    }


@pytest.fixture(scope="module")
def probe(clip_checkpoint):
    from tests.reference.llava import LlavaOracle

    oracle = LlavaOracle(clip_checkpoint)
    pixels, rows, expected = [], [], []
    for name in PHOTOS:
        for plan in PLANS:
            standard = {
                "method": "hiprune",
                "alpha": 0.1,
                "buffer": "cross",
                "object_layer": 3,
                "score": "global",
            }
            knobs = standard | {k: v for k, v in plan.items() if k != "tokens"}
            pixels.append(oracle.pixels(photo(name)))
            rows.append(ImageBudget.of(576, plan["tokens"], **knobs))
            if knobs.pop("method") == "attention":
                knobs["alpha"] = 0.0
            expected.append(oracle.keep(photo(name), tokens=plan["tokens"], **knobs))
    return torch.stack(pixels), budget_rows(rows), expected


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
def test_two_ranks_keep_and_answer_what_one_rank_does(clip_checkpoint, probe):
    pixels, rows, expected = probe
    path = str(clip_checkpoint)
    insecure = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # apply_model sends a function
    one = in_new_process(run, path, 1, pixels, rows, environment=insecure | IN_PROCESS)
    two = in_new_process(
        run, path, 2, pixels, rows, environment=insecure | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    )
    assert one["kept"] == [expected]
    assert two["kept"] == [expected, expected]
    for alone, shared in zip(one["answers"], two["answers"], strict=True):
        assert alone["tokens"] == shared["tokens"]
        torch.testing.assert_close(
            torch.tensor(alone["logprobs"]), torch.tensor(shared["logprobs"]), rtol=0, atol=5e-3
        )
