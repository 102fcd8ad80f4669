"""The pure code on a CUDA device: same tokens as on the CPU, and no waiting. `make test-gpu`."""

import pytest
import torch

from hiprune_vllm.pruning.budget import BUFFERS, METHODS, ImageBudget
from hiprune_vllm.pruning.scores import attention_received
from hiprune_vllm.pruning.select import Region, kept_indices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def keep(method, buffer, scores, region=None):
    budget = ImageBudget.of(
        576, 64, method=method, alpha=0.5, buffer=buffer, object_layer=9, score="global", seed=3
    )
    return kept_indices(
        budget,
        count=576,
        columns=24,
        batch=len(scores[0]),
        device=scores[0].device,
        object_scores=scores[0],
        output_scores=scores[1],
        region=region,
    )


@pytest.mark.parametrize("region", [None, Region(3, 21, 0, 24)])
@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_keeps_what_a_cpu_keeps(method, buffer, region):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 50, (2, 4, 576), generator=generator).float()  # many ties
    on_gpu = keep(method, buffer, scores.cuda(), region)
    assert torch.equal(on_gpu.cpu(), keep(method, buffer, scores, region))


def test_scoring_and_selecting_never_wait_for_the_gpu():
    query, key = torch.randn(2, 2, 577, 16, 64, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = attention_received(query, key, 0.125)[:, 1:]
        kept = keep("hiprune", "cross", torch.stack([scores, scores]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kept.shape == (2, 64)


def test_scores_agree_with_the_cpus():
    query, key = torch.randn(2, 2, 577, 16, 64)
    expected = attention_received(query, key, 0.125)
    got = attention_received(query.cuda(), key.cuda(), 0.125).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_triton_kernels_agree_with_the_plain_scores(dtype):
    from hiprune_vllm.pruning import kernel

    query, key = torch.randn(2, 2, 577, 16, 80, device="cuda").to(dtype)
    expected = attention_received(query, key, 0.125)
    torch.testing.assert_close(
        kernel.attention_received(query, key, 0.125), expected, rtol=1e-3, atol=1e-2
    )
