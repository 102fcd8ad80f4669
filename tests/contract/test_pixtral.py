"""What vLLM's models with Pixtral's tower are relied on for; its processors, no engine."""

import inspect
from itertools import product

import pytest
import torch
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import llava, mistral3
from vllm.model_executor.models import pixtral as tower
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import ProcessorInputs, TimingContext

from tests.contract.test_seams import config
from tests.reference import pixtral

KINDS = ("mistral3", "pixtral")
SIDES = (1, 2, 13, 28, 29, 57, 319, 561, 1541, 4000)


@pytest.fixture(scope="module", params=KINDS)
def processor(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    pixtral.build(request.param, folder)
    return MULTIMODAL_REGISTRY.create_processor(config(folder, enable_mm_embeds=True))


def processed(processor, images, plan):
    """Placeholder tokens of each image, and the tokens that its pixels come to."""
    token = processor.info.get_hf_config().image_token_index
    result = processor.apply(
        ProcessorInputs(
            prompt=[9, *[token] * len(images), 10],
            mm_data_items=processor.info.parse_mm_data({"image": images}),
            hf_processor_mm_kwargs={"hiprune": plan},
        ),
        TimingContext(enabled=False),
    )
    family, hf_config = processor.pruning.family, processor.info.get_hf_config()
    encoded = [
        family.encoded_tokens(hf_config, item.get_data()) for item in result["mm_kwargs"]["image"]
    ]
    places = result["mm_placeholders"]["image"]
    ids = result["prompt_token_ids"]
    return [ids[one.offset : one.offset + one.length] for one in places], encoded, result["hiprune"]


def nothing_is_left(processor, size):
    """Whether the shorter side is scaled to no pixel at all."""
    longest = processor.info.get_hf_processor().image_processor.size["longest_edge"]
    return min(size) * longest < max(size)


def test_every_size_comes_to_as_many_tokens_as_were_counted(processor):
    token = processor.info.get_hf_config().image_token_index
    end = processor.info.get_tokenizer().convert_tokens_to_ids(pixtral.END)
    refused = 0
    for size in product(SIDES, repeat=2):
        picture = Image.new("RGB", size, (90, 20, 60))
        if nothing_is_left(processor, size):
            with pytest.raises(VLLMValidationError, match=f"{size[0]} x {size[1]}") as error:
                processed(processor, [picture], {"ratio": 0.4})
            assert error.value.parameter == "image_url"
            refused += 1
            continue
        (ids,), (encoded,), (report,) = processed(processor, [picture], {"ratio": 0.4})
        assert report["tokens_full"] == encoded
        if report["tokens_kept"] == encoded:  # ends of rows, too
            assert ids.count(token) == encoded
            assert ids[-1] == end
        else:
            assert ids == [token] * report["tokens_kept"] + [end]
    assert 0 < refused < 20


def test_pictures_of_several_sizes_in_one_request(processor):
    images = [Image.new("RGB", size) for size in ((224, 224), (560, 112), (30, 20))]
    plans = [{"tokens": 9}, {}, {"tokens": 1}]
    tokens, encoded, reports = processed(processor, images, plans)
    assert [report["tokens_full"] for report in reports] == encoded
    assert [report["tokens_kept"] for report in reports] == [9, encoded[1], 1]
    assert len(tokens[0]) == 10
    assert len(tokens[2]) == 2


def test_embeddings_which_vllms_model_cannot_take_are_refused(processor):
    width = processor.info.get_hf_config().text_config.hidden_size
    with pytest.raises(VLLMValidationError, match="image_embeds cannot be served") as error:
        processed(processor, [torch.zeros(5, width)], {})
    assert error.value.parameter == "image_embeds"


def test_a_size_that_the_count_knows_nothing_of_is_refused(tmp_path):
    other = {"mm_processor_kwargs": {"size": {"longest_edge": 64}}}
    folders = [tmp_path / kind for kind in KINDS]
    for kind, folder in zip(KINDS, folders, strict=True):
        folder.mkdir()
        pixtral.build(kind, folder)
    with pytest.raises(RuntimeError, match=r"longest_edge at the tower's 320 pixels, got 64"):
        MULTIMODAL_REGISTRY.create_processor(config(folders[1], **other))
    processor = MULTIMODAL_REGISTRY.create_processor(config(folders[0], **other))
    _, encoded, _ = processed(processor, [Image.new("RGB", (900, 300))], {"tokens": 2})
    assert encoded == [3]


def test_the_tower_splits_what_comes_behind_its_blocks():
    source = inspect.getsource(tower.PixtralHFVisionModel.forward)
    assert "out = self.transformer(" in source
    assert "return torch.split(out.squeeze(0), embed_sizes)" in source
    blocks = inspect.getsource(tower.PixtralHFTransformer)
    assert "rotary_pos_emb_cos," in blocks
    assert list(inspect.signature(tower.PixtralHFTransformerBlock.forward).parameters)[:4] == [
        "self",
        "hidden_states",
        "rotary_pos_emb_cos",
        "rotary_pos_emb_sin",
    ]
    assert "self.attn(" in inspect.getsource(tower.PixtralHFAttention.forward)


def test_the_models_have_the_parts_that_are_called():
    merger = inspect.signature(mistral3.Mistral3MultiModalProjector.forward)
    assert list(merger.parameters) == ["self", "image_features", "image_sizes"]
    assert list(inspect.signature(llava.LlavaMultiModalProjector.forward).parameters) == [
        "self",
        "image_features",
    ]
    info = mistral3.Mistral3ProcessingInfo
    assert "mm_processor_kwargs" in inspect.signature(info.get_vision_encoder_info).parameters


@torch.inference_mode()
def test_the_merger_makes_of_tokens_below_each_other_what_it_makes_of_a_picture():
    torch.manual_seed(0)
    merger = mistral3.Mistral3PatchMerger(8, 2, 14)
    patches = torch.randn(4 * 6, 8)
    whole = merger(patches, [(4 * 14, 6 * 14)])
    squares = patches.view(2, 2, 3, 2, 8).transpose(1, 2).reshape(24, 8)
    below = merger(squares, [(12 * 14, 2 * 14)])
    assert torch.equal(whole, below)
