"""What vLLM's Kimi K2.5 is relied on for; its own processor, no engine."""

import inspect
from itertools import product

import pytest
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import kimi_k25 as models
from vllm.model_executor.models import kimi_k25_vit as vit
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import ProcessorInputs, TimingContext

from hiprune_vllm.pruning.budget import BUDGET_INTS
from tests.contract.test_seams import config
from tests.photos import data_url
from tests.reference import kimi_k25
from tests.unit.test_rendering import image, kept, refused, rendered, renderer, user

SIDES = (1, 13, 14, 29, 391, 1541, 7127, 7141)
SIZES = [size for size in product(SIDES, repeat=2) if size[0] * size[1] < 3e6]
TEXT = {"type": "text", "text": "What is this?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kimi_k25")
    kimi_k25.build(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return MULTIMODAL_REGISTRY.create_processor(config(folder))


@pytest.fixture
def server(folder):
    return renderer(folder)


def processed(processor, images, plan):
    items = [{"type": "image", "image": picture, "uuid": None} for picture in images]
    result = processor.apply(
        ProcessorInputs(
            prompt=[9, *[processor.info.media_token_id] * len(images), 10],
            mm_data_items=processor.info.parse_mm_data({"vision_chunk": items}),
            hf_processor_mm_kwargs={"hiprune": plan},
        ),
        TimingContext(enabled=False),
    )
    family, hf_config = processor.pruning.family, processor.info.get_hf_config()
    encoded = [
        family.encoded_tokens(hf_config, item.get_data())
        for item in result["mm_kwargs"]["vision_chunk"]
    ]
    places = [place.length for place in result["mm_placeholders"]["vision_chunk"]]
    return places, encoded, result["hiprune"]


def test_every_size_comes_to_as_many_tokens_as_were_counted(processor):
    for size in SIZES:
        picture = Image.new("RGB", size, (90, 20, 60))
        (length,), (encoded,), (report,) = processed(processor, [picture], {"ratio": 0.4})
        assert report["tokens_full"] == encoded
        assert length == report["tokens_kept"]


def test_pictures_of_several_sizes_in_one_request(processor):
    images = [Image.new("RGB", size) for size in ((224, 224), (560, 112), (30, 20))]
    places, encoded, reports = processed(processor, images, [{"tokens": 9}, {}, {"tokens": 1}])
    assert encoded == [64, 80, 2]
    assert places == [9, 80, 1]
    assert [report["tokens_full"] for report in reports] == encoded


RED = data_url(Image.new("RGB", (224, 224), "red"))
BLUE = data_url(Image.new("RGB", (112, 112), "blue"))


def hashes(inputs):
    return list(inputs["mm_hashes"]["vision_chunk"])


def test_pictures_of_a_conversation_have_budgets_of_their_own(server):
    own = image(RED, hiprune={"tokens": 3})
    inputs = rendered(server, [user(own, image(BLUE), TEXT)], hiprune={"tokens": 9})
    assert kept(inputs) == [3, 9]
    assert [place.length for place in inputs["mm_placeholders"]["vision_chunk"]] == [3, 9]


@pytest.mark.parametrize("named", [0, 1])
def test_one_of_two_pictures_may_have_a_name(server, named):
    pictures = [image(RED), image(BLUE)]
    unnamed = rendered(server, [user(*pictures, TEXT)], hiprune={"tokens": 7})
    pictures[named] |= {"uuid": "mine"}
    found = rendered(server, [user(*pictures, TEXT)], hiprune={"tokens": 7})
    same = [one == other for one, other in zip(hashes(found), hashes(unnamed), strict=True)]
    assert same == [index != named for index in range(2)]


def test_a_name_alone_brings_the_picture_back_or_is_refused(server):
    plan = {"hiprune": {"tokens": 7}}
    first = rendered(server, [user(image(RED, uuid="mine"), TEXT)], **plan)
    again = rendered(server, [user(image(None, uuid="mine") | {"image_url": None}, TEXT)], **plan)
    assert hashes(again) == hashes(first)
    error = refused(server, [user({"type": "image_url", "image_url": None, "uuid": "other"}, TEXT)])
    assert error.parameter == "uuid"


def test_a_random_choice_does_not_depend_on_the_name(server):
    plan = {"tokens": 7, "method": "random"}
    named, other = (
        rendered(server, [user(image(RED, **name), TEXT)], hiprune=plan)
        for name in ({"uuid": "one"}, {"uuid": "another"})
    )
    rows = [
        inputs["mm_kwargs"]["vision_chunk"][0].get_data()["hiprune_budget"]
        for inputs in (named, other)
    ]
    assert hashes(named) != hashes(other)
    assert rows[0][:BUDGET_INTS].tolist() == rows[1][:BUDGET_INTS].tolist()


def test_a_video_that_vllm_does_not_cut_is_refused_by_name():
    from vllm.renderers import hf

    with pytest.raises(VLLMValidationError) as error:
        hf.rebuild_mm_uuids_from_mm_data({}, {"vision_chunk": [("frames", {})]})
    assert error.value.parameter == "video_url"


def test_the_parts_that_are_called_do_what_the_towers_own_forward_does():
    """It puts patches together behind them, by their places in the whole picture."""
    source = inspect.getsource(vit.MoonViT3dPretrainedModel.forward)
    assert "hidden_states = self.patch_embed(pixel_values, grid_thw_list)" in source
    assert "encoder_metadata=encoder_metadata" in source
    assert "tpool_patch_merger(" in source
    assert "v = v.mean(dim=0)" in inspect.getsource(vit.tpool_patch_merger)
    projector = inspect.getsource(vit.KimiK25MultiModalProjector.forward)
    assert "self.pre_norm(image_features).view(-1, self.hidden_size)" in projector
    parameters = inspect.signature(vit.MoonViT3dEncoder.prepare_encoder_metadata).parameters
    assert list(parameters)[1:3] == ["grid_thw_list", "device"]
    assert "self.vision_tower = MoonViT3dPretrainedModel(" in inspect.getsource(models)


def test_a_block_makes_queries_keys_and_values_together_and_turns_them_row_by_row():
    source = inspect.getsource(vit.MoonViTEncoderLayer.attention_qkvpacked)
    assert "xqkv, _ = self.wqkv(x)" in source
    assert "rope_freqs_cis" in source
    assert "attn_out = self.attn(" in source
    assert "seq_length = x.size(0)" in source
