"""What vLLM's Kimi-VL is relied on for; a checkpoint's own processor, no engine."""

import inspect
from itertools import product

import pytest
import torch
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import kimi_vl as models
from vllm.model_executor.models import moonvit
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import ProcessorInputs, TimingContext

from hiprune_vllm.models.kimi_vl import SIDE
from tests.contract.test_seams import config
from tests.reference import kimi_vl

SIDES = (1, 13, 14, 29, 391, 1541, 7127, 7141)
SIZES = [size for size in product(SIDES, repeat=2) if size[0] * size[1] < 3e6]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kimi_vl")
    kimi_vl.build(folder)
    return MULTIMODAL_REGISTRY.create_processor(config(folder, trust_remote_code=True))


def processed(processor, images, plan, **options):
    pad = processor.info.get_hf_config().media_placeholder_token_id
    result = processor.apply(
        ProcessorInputs(
            prompt=[9, *[pad] * len(images), 10],
            mm_data_items=processor.info.parse_mm_data({"image": images}),
            hf_processor_mm_kwargs={"hiprune": plan, **options},
        ),
        TimingContext(enabled=False),
    )
    family, hf_config = processor.pruning.family, processor.info.get_hf_config()
    encoded = [
        family.encoded_tokens(hf_config, item.get_data()) for item in result["mm_kwargs"]["image"]
    ]
    places = [place.length for place in result["mm_placeholders"]["image"]]
    return places, encoded, result["hiprune"]


def test_every_size_comes_to_as_many_tokens_as_were_counted(processor):
    images = processor.info.get_hf_processor().image_processor
    refused = 0
    for size in SIZES:
        picture = Image.new("RGB", size, (90, 20, 60))
        try:
            images.preprocess([picture])
        except ValueError:  # more patches on a side than there are positions for
            with pytest.raises(VLLMValidationError, match=f"{size[0]} x {size[1]}") as error:
                processed(processor, [picture], {"ratio": 0.4})
            assert error.value.parameter == "image_url"
            refused += 1
            continue
        (length,), (encoded,), (report,) = processed(processor, [picture], {"ratio": 0.4})
        assert report["tokens_full"] == encoded
        assert length == report["tokens_kept"]
    assert 0 < refused < len(SIZES) / 2


def test_pictures_of_several_sizes_in_one_request(processor):
    images = [Image.new("RGB", size) for size in ((224, 224), (560, 112), (30, 20))]
    places, encoded, reports = processed(processor, images, [{"tokens": 9}, {}, {"tokens": 1}])
    assert encoded == [64, 80, 2]
    assert places == [9, 80, 1]
    assert [report["tokens_full"] for report in reports] == encoded


def test_embeddings_which_vllms_model_cannot_take_are_refused(processor):
    with pytest.raises((VLLMValidationError, ValueError), match="image_embeds"):
        processed(processor, [torch.zeros(5, 64)], {})


def test_the_tower_has_positions_for_so_many_patches_on_a_side():
    source = inspect.getsource(moonvit.MoonVitEncoder.__init__)
    assert f"{SIDE}, {SIDE}" in source


def test_the_parts_that_are_called_do_what_the_towers_own_forward_does():
    """It puts patches together behind them, by their places in the whole picture."""
    source = inspect.getsource(moonvit.MoonVitPretrainedModel.forward)
    assert 'pixel_values, pos_embeds=encoder_metadata["pos_embeds"]' in source
    for name in ("cu_seqlens", "rope_freqs_cis", "max_seqlen"):
        assert f'{name}=encoder_metadata["{name}"]' in source
    assert "return patch_merger_packed(" in source
    projector = inspect.getsource(models.KimiVLMultiModalProjector.forward)
    assert "self.pre_norm(image_features).view(-1, self.hidden_size)" in projector
    parameters = inspect.signature(moonvit.MoonVitPretrainedModel.prepare_encoder_metadata)
    assert list(parameters.parameters)[1] == "grid_hws_list"


def test_a_block_makes_queries_keys_and_values_together_and_turns_them_row_by_row():
    source = inspect.getsource(moonvit.MoonVitEncoderLayer.attention_qkvpacked)
    assert "xqkv, _ = self.wqkv(x)" in source
    assert "xq, xk = apply_rope(xq, xk, rope_freqs_cis)" in source
    assert "attn_out = self.attn(" in source
    assert "seq_length = x.size(0)" in source
