"""What vLLM's Idefics3 is relied on for, and pictures of every shape; no engine."""

import inspect

import pytest
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import idefics2_vision_model as tower
from vllm.model_executor.models import idefics3 as models
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests.contract.test_crops import PICTURES
from tests.contract.test_seams import config
from tests.reference import idefics3


@pytest.fixture(scope="module", params=idefics3.SIZES)
def processor(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    idefics3.build(request.param, folder)
    return MULTIMODAL_REGISTRY.create_processor(config(folder))


def asked(processor, pictures, plans, **options):
    items = processor.info.parse_mm_data({"image": pictures})
    kwargs = {"hiprune": plans, **options}
    prompt = idefics3.PICTURE * len(pictures) + "What?"
    return processor(prompt, items, hf_processor_mm_kwargs=kwargs)


@pytest.mark.parametrize("name", PICTURES)
def test_every_budget_has_its_places(processor, name):
    picture, config = PICTURES[name], processor.info.get_hf_config()
    (whole,) = asked(processor, [picture], [{}])["hiprune"]
    full = whole["tokens_full"]
    for keep in sorted({1, 2, 3, 4, 5, 40, full - 1, full, full + 1}):
        result = asked(processor, [picture], [{"tokens": keep}])
        (place,) = result["mm_placeholders"]["image"]
        (item,) = result["mm_kwargs"]["image"]
        assert place.get_num_embeds() == min(keep, full)
        assert processor.pruning.family.encoded_tokens(config, item.get_data()) == full


def test_a_tile_that_keeps_nothing_has_no_tag(processor):
    result = asked(processor, [PICTURES["square"]], [{"tokens": 3}])
    (place,) = result["mm_placeholders"]["image"]
    ids = result["prompt_token_ids"][place.offset : place.offset + place.length]
    tags = ["<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>"]
    assert processor.info.get_tokenizer().decode(ids) == (
        f"{idefics3.FAKE}{tags[0]}<image>{idefics3.FAKE}{tags[1]}<image>\n"
        f"{idefics3.FAKE}{tags[2]}<image>\n\n{idefics3.FAKE}"
    )


def test_pictures_side_by_side(processor):
    pictures = [PICTURES["photo"], PICTURES["tiny"], PICTURES["wide"]]
    result = asked(processor, pictures, [{"tokens": 2}, {}, {"tokens": 70}])
    found = [place.get_num_embeds() for place in result["mm_placeholders"]["image"]]
    assert found == [told["tokens_kept"] for told in result["hiprune"]]


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"longest_edge": 8000}},
        {"max_image_size": {"longest_edge": 40}},
        {"do_resize": False},
    ],
)
def test_options_that_make_other_tiles_are_refused(processor, options):
    with pytest.raises(VLLMValidationError) as error:
        asked(processor, [Image.new("RGB", (1200, 300))], [{"tokens": 4}], **options)
    assert error.value.parameter == "mm_processor_kwargs"


def test_the_parts_that_are_called_do_what_the_towers_own_forward_does():
    forward = inspect.getsource(tower.Idefics2VisionTransformer.forward)
    assert "if not self.apply_encoder_attention_mask or flat_patch_mask is None:" in forward
    assert "self.encoder(hidden_states, attention_mask=attention_mask)" in forward
    assert "self.post_layernorm(encoder_outputs)" in forward
    made = inspect.signature(tower.Idefics2VisionTransformer.__init__)
    assert made.parameters["apply_encoder_attention_mask"].default is False
    assert "apply_encoder_attention_mask" not in inspect.getsource(models)
    attention = inspect.getsource(tower.Idefics2VisionAttention.forward)
    assert "out = self.attn(query_states, key_states, value_states)" in attention
    connector = inspect.getsource(models.Idefics3Connector.forward)
    assert "self.modality_projection(image_hidden_states)" in connector
    fields = inspect.getsource(models.Idefics3MultiModalProcessor._get_mm_fields_config)
    assert 'num_patches=MultiModalFieldConfig.batched("image", keep_on_cpu=True)' in fields
