"""What Gemma 4's adapter reads from configurations, options and what the processor makes."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import Gemma4ImageProcessor
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionPooler
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.gemma4_mm import Gemma4ProcessingInfo

from hiprune_vllm.engine.checks import check_count
from hiprune_vllm.models.base import Grid, TooShallow, UnsupportedCheckpoint
from hiprune_vllm.models.gemma4 import Gemma4Adapter, _places
from hiprune_vllm.plan import Encoder, TokenCount

GEMMA = Gemma4Adapter()


def config(depth=16):
    return SimpleNamespace(
        vision_config=SimpleNamespace(
            num_hidden_layers=depth, patch_size=16, pooling_kernel_size=3, default_output_length=280
        )
    )


class Info(Gemma4ProcessingInfo):
    def __init__(self, **engine_wide):
        self.ctx = SimpleNamespace(get_merged_mm_kwargs=lambda options: engine_wide | options)

    def get_hf_config(self):
        return config()


def count(width, height, info=None, **options):
    images = SimpleNamespace(get_image_size=lambda _: SimpleNamespace(width=width, height=height))
    return GEMMA.tokens(info or Info(), images, 0, options)


def made(width, height, **options):
    """What the checkpoint's processor makes of a picture, by the names that vLLM gives it."""
    inputs = Gemma4ImageProcessor()(
        Image.new("RGB", (width, height)), return_tensors="pt", **options
    )
    return {
        "pixel_values": inputs["pixel_values"],
        "pixel_position_ids": inputs["image_position_ids"],
    }


def test_the_object_layer_is_half_the_depth():
    assert GEMMA.encoder(config()) == Encoder("gemma4", 16, 8, has_cls=False)
    with pytest.raises(TooShallow, match="depth 1"):
        GEMMA.encoder(config(depth=1))
    with pytest.raises(UnsupportedCheckpoint, match="vision_config None"):
        GEMMA.encoder(SimpleNamespace(vision_config=None))


def test_the_budget_is_of_what_a_request_lets_the_picture_have():
    """The request's own option goes before the engine's, that before the checkpoint's."""
    assert count(600, 400) == TokenCount(260, 260)
    assert count(600, 400, max_soft_tokens=70) == TokenCount(60, 60)
    assert count(600, 400, images_kwargs={"max_soft_tokens": 140}) == TokenCount(126, 126)
    assert count(600, 400, Info(max_soft_tokens=70)) == TokenCount(60, 60)
    assert count(600, 400, Info(max_soft_tokens=70), max_soft_tokens=1120).full == 1080


@pytest.mark.parametrize("value", [0, 71, 1121, -70, "70", 70.0, True, [70]])
def test_other_numbers_of_soft_tokens_are_refused_by_their_field(value):
    with pytest.raises(VLLMValidationError, match="must be one of") as error:
        count(600, 400, max_soft_tokens=value)
    assert error.value.parameter == "mm_processor_kwargs.max_soft_tokens"


@pytest.mark.parametrize("size", [(451, 300), (1, 1), (3, 900), (8000, 20), (1, 700), (112, 560)])
def test_shapes_are_those_of_the_picture_without_padding(size):
    inputs = made(*size, max_soft_tokens=70)
    ((rows, columns),) = GEMMA.shapes(config(), inputs)
    full = count(*size, max_soft_tokens=70).full
    assert GEMMA.grids(config(), (rows, columns)) == [Grid(rows // 3, columns // 3)]
    assert rows * columns == 9 * full
    alone = {name: tensor[0] for name, tensor in inputs.items()}
    assert GEMMA.encoded_tokens(config(), alone) == full
    (view,) = GEMMA.views(config(), alone, (0.0,) * 3, (1.0,) * 3)
    assert view.pixels.shape == (rows * 16, columns * 16, 3)


def test_a_size_that_vllm_counts_otherwise_than_the_processor_is_refused():
    """279 places and 280 embeddings would end the engine."""
    full = count(17, 4760).full
    inputs = made(17, 4760)
    (shape,) = GEMMA.shapes(config(), inputs)
    with pytest.raises(VLLMValidationError, match=r"279 visual tokens .* made 280") as error:
        check_count(full, GEMMA.grids(config(), shape))
    assert error.value.parameter == "image_url"
    check_count(280, GEMMA.grids(config(), shape))


def test_patches_that_the_tower_does_not_take_are_refused():
    inputs = made(451, 300, patch_size=8)
    with pytest.raises(VLLMValidationError, match="got 192 values a patch") as error:
        GEMMA.shapes(config(), inputs)
    assert error.value.parameter == "mm_processor_kwargs"


def test_inputs_that_have_moved_are_told_of():
    alone = {name: tensor[0] for name, tensor in made(451, 300).items()}
    places = alone["pixel_position_ids"]
    for moved in (places.flip(0), places.flip(1), places.clone().clamp(min=0)):
        with pytest.raises(RuntimeError, match="version drift"):
            GEMMA.encoded_tokens(config(), alone | {"pixel_position_ids": moved})


@pytest.mark.parametrize("kept", [1, 2, 40])
def test_the_pooler_averages_patches_that_come_token_by_token(kept):
    states = torch.randn(1, kept * 9, 8)
    places, padding = _places(kept * 9, 3, "cpu")
    pooler = Gemma4VisionPooler(SimpleNamespace(hidden_size=8))
    found, used = pooler(states, places, padding, kept)
    assert used.all()
    expected = states.view(kept, 9, 8).mean(dim=1) * 8**0.5
    torch.testing.assert_close(found[0], expected)
