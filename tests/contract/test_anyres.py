"""Pictures of every shape, and processor options, in the families that cut into tiles (anyres)."""

import pytest
import torch
from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests.photos import frames, photo
from tests.reference.families import FAMILIES

NAMES = ("llava_next", "granite_vision", "llava_onevision")
PICTURES = {
    "photo": photo("chelsea"),
    "scaled": photo("coffee").resize((1500, 1152)),
    "square": photo("astronaut").resize((224, 224)),
    "strip": Image.new("RGB", (8000, 20), "red"),
    "thread": Image.new("RGB", (17, 4760)),
    "line": Image.new("RGB", (1, 3000)),
    "dot": Image.new("RGB", (1, 1)),
}


@pytest.fixture(scope="module", params=NAMES)
def processor(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param].build(folder)
    args = EngineArgs(model=str(folder), dtype="float32", max_model_len=12288)
    return MULTIMODAL_REGISTRY.create_processor(args.create_model_config())


def asked(processor, pictures, plans, **options):
    items = processor.info.parse_mm_data({"image": pictures})
    kwargs = {"hiprune": plans, **options}
    return processor("<image>" * len(pictures) + "What?", items, hf_processor_mm_kwargs=kwargs)


@pytest.mark.parametrize("name", PICTURES)
def test_every_budget_has_its_places(processor, name):
    picture = PICTURES[name]
    whole = asked(processor, [picture], [{}])
    (told,), (item,) = whole["hiprune"], whole["mm_kwargs"]["image"]
    full = told["tokens_full"]
    family, config = processor.pruning.family, processor.info.get_hf_config()
    assert family.encoded_tokens(config, item.get_data()) == full
    most = sum(grid.inside.size for grid in family.grids(config, picture.size[::-1]))
    for keep in sorted({1, 2, 3, 40, most, full - 1, full, full + 1}):
        result = asked(processor, [picture], [{"tokens": keep}])
        (place,) = result["mm_placeholders"]["image"]
        assert place.get_num_embeds() == (full if keep >= full else min(keep, most))


def test_pictures_side_by_side(processor):
    """Those of one call of the processor have as many tiles as the one with most of them."""
    pictures = [PICTURES["scaled"], PICTURES["photo"], PICTURES["dot"]]
    result = asked(processor, pictures, [{"tokens": 700}, {}, {"tokens": 2}])
    found = [place.get_num_embeds() for place in result["mm_placeholders"]["image"]]
    assert found == [told["tokens_kept"] for told in result["hiprune"]]
    assert found[0] == 700
    assert found[2] == 2


def test_few_tiles(processor):
    least = processor.pruning.encoder.tiles[0]
    plans = [{"max_tiles": least, "ratio": 0.5}]
    for picture in PICTURES.values():
        result = asked(processor, [picture], plans)
        (item,) = result["mm_kwargs"]["image"]
        assert len(item.get_data()["pixel_values"]) == 1 + least


@pytest.mark.parametrize("plan", [{}, {"tokens": 5}])
@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 200, "width": 200}, "crop_size": {"height": 200, "width": 200}},
        {"crop_size": {"height": 96, "width": 96}, "do_center_crop": True},
    ],
)
def test_options_that_would_cut_a_picture_otherwise_are_refused(processor, options, plan):
    """In the worker tiles would be missing, or of another size, which ends the engine."""
    with pytest.raises(VLLMValidationError, match="must leave the tiles") as error:
        asked(processor, [PICTURES["scaled"]], [plan], **options)
    assert error.value.parameter == "mm_processor_kwargs"


def test_a_video_of_llava_onevision_stays_whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    FAMILIES["llava_onevision"].build(folder)
    args = EngineArgs(model=str(folder), dtype="float32", max_model_len=12288)
    processor = MULTIMODAL_REGISTRY.create_processor(args.create_model_config())
    clip, _ = frames()
    items = processor.info.parse_mm_data({"image": [PICTURES["photo"]], "video": [clip]})
    result = processor(
        "<image> <video>", items, hf_processor_mm_kwargs={"hiprune": [{"tokens": 10}]}
    )
    (image,), (video,) = (result["mm_placeholders"][kind] for kind in ("image", "video"))
    assert image.get_num_embeds() == 10
    assert video.get_num_embeds() == len(clip) * 14**2 + 1
    assert torch.is_tensor(result["mm_kwargs"]["video"][0].get_data()["pixel_values_videos"])
