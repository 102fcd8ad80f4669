"""What `GET /v1/hiprune` says, without an engine."""

import asyncio
from types import SimpleNamespace

import pytest

from hiprune_server.routes.endpoint import describe
from hiprune_vllm.models.qwen3_vl import Qwen3VLAdapter
from hiprune_vllm.plan import NO_LIMITS, Encoder, PruningPlan


def described(encoder):
    models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="small")])
    pruning = SimpleNamespace(
        encoder=encoder,
        about=Qwen3VLAdapter.about,
        unsupported="",
        default=PruningPlan(),
        videos=False,
        of_videos=PruningPlan(),
        limits=NO_LIMITS,
    )
    state = SimpleNamespace(openai_serving_models=models, hiprune=pruning, hiprune_presets={})
    return asyncio.run(describe(SimpleNamespace(app=SimpleNamespace(state=state))))


@pytest.mark.parametrize("careful", [0.5, None])
def test_a_family_with_little_to_spare_says_so(careful):
    told = described(Encoder("qwen3_vl", 27, 13, has_cls=False, careful_ratio=careful))
    assert told["family"] == "qwen3_vl"
    assert told.get("careful_ratio") == careful
    about = told["about"]
    assert about["token"].startswith("2 x 2 patches")
    assert "EADP" in about["published"]
    assert "random" in about["advice"]
