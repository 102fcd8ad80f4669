"""Refusals at start-up, through vLLM's own configuration: a ValueError would be swallowed there."""

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from hiprune_server.operations import cli, config
from tests.reference import checkpoints, random_llava


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


@pytest.mark.parametrize("flag", ["--enable-scale-out", "--tokens-only"])
def test_what_hands_a_clients_tensors_to_the_engine_does_not_start(flag, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with pytest.raises(SystemExit):
        cli.serve(["some/model", flag], config.load({}, {}), {})
    told = capsys.readouterr().err
    assert f"{flag} opens /inference/v1/generate" in told
    assert "behind a router" in told


def processor(folder, **options):
    from vllm.multimodal import MULTIMODAL_REGISTRY

    args = EngineArgs(model=str(folder), dtype="float32", max_model_len=1024, **options)
    config = args.create_engine_config()
    return MULTIMODAL_REGISTRY.create_processor(config.model_config)


def test_a_picture_whose_embeddings_are_elsewhere_is_refused_where_only_its_grid_comes(tmp_path):
    """A consumer of encoder outputs: the grid of a pruned picture is not the prompt's length."""
    checkpoints.build_qwen2_5_vl(tmp_path)
    sharing = {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}
    consumer = processor(tmp_path, ec_transfer_config=sharing)
    assert consumer.info.allow_missing_mm_embeddings
    prompt = "<|vision_start|><|image_pad|><|vision_end|>What?"

    def lengths(**image):
        items = consumer.info.parse_mm_data({"image": image})
        result = consumer(prompt, items)
        return [place.length for place in result["mm_placeholders"]["image"]]

    grid = torch.tensor([[1, 8, 8]])
    assert lengths(image_grid_thw=grid, image_embeds=torch.zeros(16, 64)) == [16]
    with pytest.raises(VLLMValidationError, match=r"image 0 must come with image_embeds or as the"):
        lengths(image_grid_thw=grid)
