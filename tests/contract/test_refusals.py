"""Refusals at start-up, through vLLM's own configuration: a ValueError would be swallowed there."""

import pytest
from vllm.engine.arg_utils import EngineArgs

from hiprune_server import cli, config
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


def test_what_hands_a_clients_tensors_to_the_engine_does_not_start(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with pytest.raises(SystemExit):
        cli.serve(["some/model", "--enable-scale-out"], config.load({}, {}), {})
    told = capsys.readouterr().err
    assert "--enable-scale-out opens /inference/v1/generate" in told
    assert "behind a router" in told
