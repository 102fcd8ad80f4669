"""What the adapter of GLM's families takes from vLLM, beside what Qwen's do."""

import inspect
import re
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import Glm4vImageProcessor, Glm46VImageProcessor
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import glm4_1v
from vllm.multimodal import MULTIMODAL_REGISTRY

from hiprune_vllm.models.glm4v import Glm4vAdapter
from tests.contract.test_vllm_hooks import parameters
from tests.photos import photo
from tests.reference import glm

MODELS = (glm4_1v.Glm4vForConditionalGeneration, glm4_1v.Glm4vMoeForConditionalGeneration)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_glm_has_the_parts_that_are_called(model):
    visual = glm4_1v.Glm4vVisionTransformer
    assert parameters(visual.forward) == ["self", "x", "grid_thw", "encoder_metadata"]
    assert parameters(visual.prepare_encoder_metadata)[:2] == ["self", "grid_thw_list"]
    made = inspect.getsource(visual.prepare_encoder_metadata)
    for name in ("rotary_pos_emb_cos", "rotary_pos_emb_sin", "pos_embeds"):
        assert f'metadata["{name}"]' in made
    source = inspect.getsource(visual.__init__)
    for attribute in ("blocks", "num_heads", "spatial_merge_size", "out_hidden_size"):
        assert f"self.{attribute} = " in source
    # Behind the blocks all goes by rows, four of them to a token.
    behind = inspect.getsource(visual.forward).split("for blk in self.blocks:")[1]
    assert "x = self.post_layernorm(x)" in behind
    assert "x.view(-1, self.spatial_merge_size, self.spatial_merge_size, x.shape[-1])" in behind
    # The front end asks for positions of a model that has a configuration and nothing else.
    for walk in (model.get_mrope_input_positions, model.iter_mm_grid_thw):
        read = set(re.findall(r"self\.(\w+)", inspect.getsource(walk)))
        assert read <= {"config", "iter_mm_grid_thw"}
    assert parameters(model._parse_and_validate_image_input) == ["self", "kwargs"]


@pytest.fixture(scope="module", params=[False, True], ids=["4.1V", "4.6V"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("glm")
    glm.build(folder, newer=request.param)
    return folder


def a_processor(folder, **options):
    args = EngineArgs(model=str(folder), dtype="float32", max_model_len=4096, **options)
    return MULTIMODAL_REGISTRY.create_processor(args.create_model_config())


PICTURES = {
    "photo": photo("chelsea"),
    "tall": photo("coffee").resize((70, 400)),
    "strip": photo("coffee").resize((8000, 41)),
    "tiny": Image.new("RGB", (9, 5), "red"),
    "dot": Image.new("RGB", (1, 1)),
}
SIZES = ({}, {"max_pixels": 30_000}, {"max_pixels": 1}, {"min_pixels": 60_000})


def asked(processor, pictures, plans):
    items = processor.info.parse_mm_data({"image": pictures})
    result = processor(
        glm.PICTURE * len(pictures) + "What?", items, hf_processor_mm_kwargs={"hiprune": plans}
    )
    return result["hiprune"], [item.get_data() for item in result["mm_kwargs"]["image"]]


def test_pixels_of_a_picture_are_counted_twice_by_the_processor(folder):
    """`max_pixels` are those of the picture that people see, not of its two frames."""
    processor = a_processor(folder)
    assert processor.pruning.pixels == (112 * 112 // 2, 28 * 28 * 400)
    plans = [{"ratio": 0.5, **size} for size in SIZES]
    for name, picture in PICTURES.items():
        told, data = asked(processor, [picture] * len(plans), plans)
        for size, of_image, item in zip(SIZES, told, data, strict=True):
            least = size.get("min_pixels", processor.pruning.pixels[0])
            most = size.get("max_pixels", processor.pruning.pixels[1])
            kind = type(processor.info.get_image_processor())
            assert kind in (Glm4vImageProcessor, Glm46VImageProcessor)
            expected = kind(size={"shortest_edge": 2 * min(least, most), "longest_edge": 2 * most})(
                picture, return_tensors="pt"
            )
            assert torch.equal(item["image_grid_thw"], expected["image_grid_thw"][0]), name
            assert of_image["tokens_full"] == len(item["pixel_values"]) // 4


def test_an_engine_wide_size_counts(folder):
    size = {"shortest_edge": 2 * 28 * 28 * 4, "longest_edge": 2 * 28 * 28 * 50}
    processor = a_processor(folder, mm_processor_kwargs={"size": size})
    assert processor.pruning.pixels == (28 * 28 * 4, 28 * 28 * 50)
    (told,), (item,) = asked(processor, [photo("chelsea")], [{"ratio": 0.5}])
    assert told["tokens_full"] == len(item["pixel_values"]) // 4 <= 50


@pytest.mark.parametrize("size", [(8000, 20), (1, 6000), (5, 1001)])
def test_what_the_processor_does_not_scale_is_refused_by_its_field(folder, size):
    processor = a_processor(folder)
    with pytest.raises(VLLMValidationError, match=f"{size[0]} x {size[1]}") as error:
        asked(processor, [Image.new("RGB", size)], [{"ratio": 0.5}])
    assert error.value.parameter == "image_url"


def test_whatever_is_not_refused_is_scaled(folder):
    """It rounds a short side before it looks at the shape, one way or the other."""
    info = a_processor(folder).info
    adapter = Glm4vAdapter()
    for short in range(1, 30):
        for long in (short * 199 + 7, short * 200 - 1, short * 200, short * 200 + 1):
            size = SimpleNamespace(width=long, height=short)
            images = SimpleNamespace(get_image_size=lambda _, size=size: size)
            with suppress(VLLMValidationError):
                assert adapter.tokens(info, images, 0, {}).full >= 1
