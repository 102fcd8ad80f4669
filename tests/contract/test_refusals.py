"""Refusals at start-up, through vLLM's own configuration: a ValueError would be swallowed there."""

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.reference import random_llava


def load(folder, **options):
    config = EngineArgs(model=str(folder), **options).create_model_config()
    return config.supports_multimodal_inputs


def test_an_invalid_engine_wide_plan_does_not_start(clip_checkpoint):
    assert load(clip_checkpoint, mm_processor_kwargs={"hiprune": {"object_layer": 7}})
    for plan, message in (
        ({"object_layer": 8}, r"mm_processor_kwargs\.hiprune\.object_layer must be .* got 8"),
        ({"total_tokens": 9}, "total_tokens is unknown"),
        ("all", "must be an object, got 'all'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            load(clip_checkpoint, mm_processor_kwargs={"hiprune": plan})


def test_an_encoder_without_a_layer_for_anchors_does_not_start(tmp_path):
    random_llava.build(tmp_path, vision={"num_hidden_layers": 2})
    with pytest.raises(RuntimeError, match="more layers"):
        load(tmp_path)
