"""Placeholders of several tiles, cut to each one's share."""

from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from hiprune_vllm.models.base import Grid, UnsupportedCheckpoint
from hiprune_vllm.models.gemma3 import Gemma3Adapter
from hiprune_vllm.models.tiles import check_tiles
from hiprune_vllm.plan import Encoder

IMAGE, NEWLINE, BEGIN, END, TEXT = 9, 1, 2, 3, 4
CROP = [NEWLINE, BEGIN, IMAGE, IMAGE, IMAGE, IMAGE, END, NEWLINE]


def cut(adapter, tokens, keep):
    found = adapter.placeholder(tokens, [token == IMAGE for token in tokens], keep)
    assert found.count(IMAGE) == keep
    return found


def of_crop(keep):
    return [NEWLINE, BEGIN, *[IMAGE] * keep, END, NEWLINE]


@pytest.mark.parametrize("keep", range(1, 5))
def test_one_crop_keeps_its_frame(keep):
    assert cut(Gemma3Adapter(), CROP, keep) == of_crop(keep)


@pytest.mark.parametrize(
    ("keep", "shares"),
    [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (4, (2, 1, 1)), (11, (4, 4, 3))],
)
def test_crops_have_their_shares_and_none_has_an_empty_frame(keep, shares):
    expected = []
    for number, share in enumerate(shares):
        expected += [TEXT + number, *(of_crop(share) if share else [])]
    tokens = [TEXT, *CROP, TEXT + 1, *CROP, TEXT + 2, *CROP]
    assert cut(Gemma3Adapter(), [*tokens, TEXT], keep) == [*expected, TEXT]


def test_more_tiles_than_the_checkpoint_has_are_refused():
    check_tiles(64, 64)
    with pytest.raises(VLLMValidationError, match="65 tokens, of 64") as error:
        check_tiles(65, 64)
    assert error.value.parameter == "mm_processor_kwargs"


def vision(**own):
    return SimpleNamespace(
        **{
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 27,
            "image_size": 896,
            "patch_size": 14,
            **own,
        }
    )


def test_what_is_read_of_gemma_3():
    config = SimpleNamespace(vision_config=vision(), mm_tokens_per_image=256)
    adapter = Gemma3Adapter()
    assert adapter.encoder(config) == Encoder("gemma3", 27, 13, has_cls=False)
    assert adapter.grids(config, (3,)) == [Grid(16, 16)] * 3
    config.mm_tokens_per_image = 200
    with pytest.raises(UnsupportedCheckpoint, match="mm_tokens_per_image 200 of 64 x 64"):
        adapter.encoder(config)
    config.vision_config = vision(model_type="gemma4_vision")
    with pytest.raises(UnsupportedCheckpoint, match="gemma4_vision"):
        adapter.encoder(config)
