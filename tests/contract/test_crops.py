"""What the adapter of Gemma 3 takes from vLLM, and pictures of every shape."""

import ast
import hashlib
import inspect
import textwrap

import pytest
from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import gemma3_mm
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests.contract.test_vllm_hooks import parameters
from tests.photos import photo
from tests.reference import gemma3


def test_gemmas_projector_still_does_what_the_adapter_does_by_its_parts():
    tree = ast.parse(
        textwrap.dedent(inspect.getsource(gemma3_mm.Gemma3MultiModalProjector.forward))
    )
    found = hashlib.sha256(ast.unparse(tree.body[0]).encode()).hexdigest()[:16]
    assert found == "168635c9cb4bbc75", "see that a token is still the mean of its patches"
    made = inspect.getsource(gemma3_mm.Gemma3MultiModalProjector.__init__)
    for name in ("mm_input_projection_weight", "mm_soft_emb_norm", "kernel_size"):
        assert f"self.{name} = " in made
    model = gemma3_mm.Gemma3ForConditionalGeneration
    assert parameters(model._image_pixels_to_features) == ["self", "vision_tower", "pixel_values"]
    assert parameters(model._parse_and_validate_image_input) == ["self", "kwargs"]
    fields = inspect.getsource(gemma3_mm.Gemma3MultiModalProcessor._get_mm_fields_config)
    assert 'num_patches=MultiModalFieldConfig.batched("image", keep_on_cpu=True)' in fields


PICTURES = {
    "photo": photo("chelsea"),
    "square": photo("astronaut").resize((224, 224)),
    "tall": photo("coffee").resize((300, 1400)),
    "wide": photo("coffee").resize((1000, 280)),
    "strip": Image.new("RGB", (8000, 20), "red"),
    "thread": Image.new("RGB", (1, 3000)),
    "tiny": Image.new("RGB", (9, 5), "red"),
    "dot": Image.new("RGB", (1, 1)),
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3")
    gemma3.build(folder)
    args = EngineArgs(
        model=str(folder),
        dtype="float32",
        max_model_len=8192,
        mm_processor_kwargs={"do_pan_and_scan": True},
    )
    return MULTIMODAL_REGISTRY.create_processor(args.create_model_config())


def asked(processor, pictures, plans, text="What?", **options):
    items = processor.info.parse_mm_data({"image": pictures})
    kwargs = {"hiprune": plans, **options}
    return processor(gemma3.PICTURE * len(pictures) + text, items, hf_processor_mm_kwargs=kwargs)


@pytest.mark.parametrize("name", PICTURES)
def test_every_budget_has_its_places(processor, name):
    picture = PICTURES[name]
    (whole,) = asked(processor, [picture], [{}])["hiprune"]
    full = whole["tokens_full"]
    assert full % 64 == 0
    for keep in sorted({1, 2, 3, 4, 5, 40, full - 1, full, full + 1}):
        result = asked(processor, [picture], [{"tokens": keep}])
        (place,) = result["mm_placeholders"]["image"]
        (item,) = result["mm_kwargs"]["image"]
        assert place.get_num_embeds() == min(keep, full)
        assert len(item.get_data()["pixel_values"]) * 64 == full


@pytest.mark.parametrize("text", ["What?", "\n\nWhat?", "\n\n\nWhat?"])
def test_text_behind_pictures_side_by_side(processor, text):
    """Frames end in newlines, which vLLM merges with those that follow."""
    pictures = [PICTURES["photo"], PICTURES["tall"], PICTURES["wide"]]
    plans = [{"tokens": 2}, {}, {"tokens": 70}]
    result = asked(processor, pictures, plans, text)
    found = [place.get_num_embeds() for place in result["mm_placeholders"]["image"]]
    assert found == [told["tokens_kept"] for told in result["hiprune"]]


def test_options_that_would_cut_a_picture_further_are_refused(processor):
    options = {"pan_and_scan_max_num_crops": 100, "pan_and_scan_min_crop_size": 1}
    with pytest.raises(VLLMValidationError) as error:
        asked(processor, [PICTURES["strip"]], [{"tokens": 4}], **options)
    assert error.value.parameter == "mm_processor_kwargs"


@pytest.mark.parametrize("plan", [{}, {"tokens": 9}])
def test_the_one_newline_that_vllms_processor_trips_over_is_named(processor, plan):
    with pytest.raises(VLLMValidationError, match="exactly one newline") as error:
        asked(processor, [PICTURES["square"]], [plan], "\nWhat?")
    assert error.value.parameter == "messages"
