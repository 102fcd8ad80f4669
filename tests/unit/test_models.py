"""What adapters read from configurations; no engine, no weights."""

from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from vllm.exceptions import VLLMValidationError

from hiprune_vllm.models.base import Grid, TooShallow, UnsupportedCheckpoint
from hiprune_vllm.models.glm4v import Glm4vAdapter
from hiprune_vllm.models.internvl import (
    InternVLAdapter,
    InternVLChatAdapter,
    arranged,
)
from hiprune_vllm.models.llava import LlavaAdapter
from hiprune_vllm.models.llava_next import (
    GraniteVisionAdapter,
    LlavaNextAdapter,
    picture_region,
    tile_regions,
)
from hiprune_vllm.models.llava_onevision import LlavaOnevisionAdapter
from hiprune_vllm.models.pixtral import Mistral3Adapter, PixtralAdapter
from hiprune_vllm.models.qwen2_5_vl import Qwen25VLAdapter
from hiprune_vllm.models.qwen2_vl import Qwen2VLAdapter, check_shape
from hiprune_vllm.models.qwen3_vl import Qwen3VLAdapter, Qwen35Adapter
from hiprune_vllm.plan import Encoder


def config(tower="clip_vision_model", depth=24, layer=-2, strategy="default"):
    return SimpleNamespace(
        vision_config=SimpleNamespace(
            model_type=tower, num_hidden_layers=depth, image_size=336, patch_size=14
        ),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_grid_pinpoints=[[336, 672], [672, 672], [1008, 336]],
    )


@pytest.mark.parametrize(
    ("adapter", "family"), [(LlavaAdapter(), "llava"), (LlavaNextAdapter(), "llava_next")]
)
def test_the_papers_layers_are_the_defaults(adapter, family):
    """Section 4.1: layer 9 of CLIP-L's 24, features from hidden state -2, so 23 is the output."""
    tiles = (2, 4) if family == "llava_next" else None
    assert adapter.encoder(config()) == Encoder(family, 23, 9, has_cls=True, tiles=tiles)
    assert adapter.encoder(config(layer=23)) == adapter.encoder(config())
    assert adapter.encoder(config(depth=9)).object_layer == 3
    siglip = config("siglip_vision_model", depth=27, strategy="full")
    assert adapter.encoder(siglip) == Encoder(family, 26, 10, has_cls=False, tiles=tiles)


def test_features_of_several_layers_end_with_the_deepest():
    """Of LLaVA-NeXT alone: vLLM's class of LLaVA-1.5 would take the deepest one's only."""
    layers = [-24, -20, -12, -1]
    granite = config("siglip_vision_model", depth=27, layer=layers, strategy="full")
    found = LlavaNextAdapter().of(granite)
    assert type(found) is GraniteVisionAdapter
    assert found.of(granite) is found
    assert found.encoder(granite) == Encoder("granite_vision", 27, 10, False, tiles=(2, 4))
    for others in ([-1, -2], [-3, 26, -12], (26,)):
        granite.vision_feature_layer = others
        expected = 27 if -1 in others else 26
        assert found.encoder(granite).output_layer == expected
    granite.vision_feature_layer = [-24, -20]
    with pytest.raises(TooShallow):
        found.encoder(granite)
    assert type(LlavaNextAdapter().of(config())) is LlavaNextAdapter


def test_qwens_object_layer_is_half_its_depth():
    vision = SimpleNamespace(vision_config=SimpleNamespace(depth=32))
    for adapter, name in ((Qwen2VLAdapter(), "qwen2_vl"), (Qwen25VLAdapter(), "qwen2_5_vl")):
        assert adapter.encoder(vision) == Encoder(name, 32, 16, has_cls=False, free_sizes=True)
    # Published figures: 87 % of the accuracy is left at half the tokens of Qwen3-VL.
    vision = SimpleNamespace(vision_config=SimpleNamespace(depth=27))
    for adapter, name in ((Qwen3VLAdapter(), "qwen3_vl"), (Qwen35Adapter(), "qwen3_5")):
        assert adapter.encoder(vision) == Encoder(
            name, 27, 13, has_cls=False, careful_ratio=0.5, free_sizes=True
        )


def test_glms_object_layer_is_half_its_depth():
    vision = SimpleNamespace(vision_config=SimpleNamespace(depth=24, spatial_merge_size=2))
    assert Glm4vAdapter().encoder(vision) == Encoder("glm4v", 24, 12, False, free_sizes=True)
    assert Glm4vAdapter().grids(vision, (1, 8, 12)) == [Grid(4, 6)]


def internvl(**changes):
    vision = {"num_hidden_layers": 24, "image_size": 448, "patch_size": 14}
    chat = {
        "ps_version": "v2",
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
    }
    chat |= changes
    return SimpleNamespace(vision_config=SimpleNamespace(**vision), **chat)


def test_internvls_object_layer_is_half_its_depth():
    expected = Encoder("internvl", 24, 12, has_cls=True, tiles=(1, 12))
    chat = InternVLChatAdapter()
    assert chat.encoder(internvl()) == chat.encoder(internvl(select_layer=23)) == expected
    assert chat.encoder(internvl(select_layer=-4)).output_layer == 21
    assert chat.encoder(internvl(dynamic_image_size=False)).tiles is None
    assert chat.grids(internvl(), (13,)) == [Grid(16, 16)] * 13
    vision = SimpleNamespace(num_hidden_layers=24, image_size=[448, 448], patch_size=[14, 14])
    config = SimpleNamespace(vision_config=vision, downsample_ratio=0.5)
    assert InternVLAdapter().encoder(config) == expected
    assert InternVLAdapter().grids(config, (1,)) == [Grid(16, 16)]


def test_internvls_tokens_by_columns_and_of_broken_patches_are_refused():
    with pytest.raises(UnsupportedCheckpoint, match="ps_version 'v1'"):
        InternVLChatAdapter().encoder(internvl(ps_version="v1"))
    with pytest.raises(UnsupportedCheckpoint, match="32 patches in a row and downsample"):
        InternVLChatAdapter().encoder(internvl(downsample_ratio=0.3))
    with pytest.raises(TooShallow, match="depth 24"):
        InternVLChatAdapter().encoder(internvl(select_layer=-14))


@pytest.mark.parametrize("most", [12, 40])
def test_a_picture_that_may_have_few_tiles_is_scaled_to_the_best_grid_of_so_few(most):
    """However many the checkpoint lets it have, or the operator."""
    chat, config = InternVLChatAdapter(), internvl()
    for width, height in ((4000, 3000), (300, 5000), (2000, 2000), (900, 850), (7, 5), (1, 1)):
        picture = PIL.Image.new("RGB", (width, height))
        across, down = chat._grid(config, picture, most)
        for tiles in range(1, 13):
            fitted = chat.fitted(config, picture, tiles)
            assert chat._grid(config, fitted, most) == chat._grid(config, picture, tiles)
            if most == 40 and across * down <= tiles:
                assert fitted is picture


def test_both_layouts_cut_a_picture_alike():
    chat, other = InternVLChatAdapter(), InternVLAdapter()
    vision = SimpleNamespace(image_size=[448, 448], patch_size=[14, 14])
    for width, height in ((640, 480), (1000, 100), (41, 8000), (900, 900), (3, 3)):
        picture = PIL.Image.new("RGB", (width, height))
        of_other = other._grid(SimpleNamespace(vision_config=vision), picture, 12)
        assert chat._grid(internvl(), picture, 12) == of_other


def test_the_grid_of_tiles_is_found_by_the_thumbnail():
    pictures = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))
    for down, across in ((2, 3), (3, 2), (1, 6), (6, 1)):
        size = down * 16, across * 16
        large = torch.nn.functional.interpolate(pictures[None], size, mode="bilinear")[0]
        cut = large.unflatten(1, (down, 16)).unflatten(3, (across, 16))
        tiles = cut.permute(1, 3, 0, 2, 4).flatten(0, 1)
        small = torch.nn.functional.interpolate(pictures[None], (16, 16), mode="bilinear")
        assert arranged(torch.cat([tiles, small])) == (down, across)


def test_a_token_of_qwen3_vl_has_the_columns_of_earlier_blocks_behind_its_own():
    """A client's embeddings of another width would end the engine."""
    text = SimpleNamespace(hidden_size=64)
    for indexes, width in (([1, 3, 5], 256), ([], 64)):
        vision = SimpleNamespace(deepstack_visual_indexes=indexes)
        config = SimpleNamespace(vision_config=vision, get_text_config=lambda: text)
        assert Qwen3VLAdapter().width(config) == width
        assert Qwen2VLAdapter().width(config) == 64


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tower": "pixtral"}, "pixtral"),
        ({"strategy": "full"}, "'full'"),
    ],
)
def test_variants_that_cannot_be_pruned_are_refused_by_name(changes, named):
    for adapter in (LlavaAdapter(), LlavaNextAdapter()):
        with pytest.raises(UnsupportedCheckpoint, match=named):
            adapter.encoder(config(**changes))


def test_features_of_several_layers_are_refused_where_vllm_joins_none():
    for adapter in (LlavaAdapter(), LlavaOnevisionAdapter()):
        with pytest.raises(UnsupportedCheckpoint, match=r"\[-24, -20, -12, -1\]"):
            adapter.encoder(config(layer=[-24, -20, -12, -1]))


def pixtral_config(tower="pixtral", depth=24, layer=-1, **own):
    vision = SimpleNamespace(
        model_type=tower, num_hidden_layers=depth, image_size=1540, patch_size=14
    )
    return SimpleNamespace(vision_config=vision, vision_feature_layer=layer, **own)


def test_pixtrals_tower_with_and_without_merging():
    merging = pixtral_config(spatial_merge_size=2)
    assert Mistral3Adapter().encoder(merging) == Encoder("mistral3", 24, 12, has_cls=False)
    alone = pixtral_config(vision_feature_select_strategy="full")
    assert PixtralAdapter().encoder(alone) == Encoder("pixtral", 24, 9, has_cls=False)
    assert PixtralAdapter().encoder(pixtral_config(layer=-2)).output_layer == 23
    assert Mistral3Adapter().grids(merging, (56, 84))[0][:2] == (2, 3)
    assert PixtralAdapter().grids(alone, (56, 84))[0][:2] == (4, 6)
    with pytest.raises(TooShallow):
        Mistral3Adapter().encoder(pixtral_config(depth=1, spatial_merge_size=2))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tower": "siglip_vision_model"}, "siglip_vision_model"),
        ({"layer": [-2, -1]}, r"\[-2, -1\]"),
        ({"vision_feature_select_strategy": "default"}, "'default'"),
    ],
)
def test_variants_of_pixtral_that_cannot_be_pruned_are_refused_by_name(changes, named):
    for adapter in (PixtralAdapter(), Mistral3Adapter()):
        with pytest.raises(UnsupportedCheckpoint, match=named):
            adapter.encoder(pixtral_config(**changes))


def test_a_llava_with_pixtrals_tower_has_an_adapter_of_its_own():
    llava = LlavaAdapter()
    assert type(llava.of(config("pixtral"))) is PixtralAdapter
    for other in (config(), config("siglip_vision_model"), config("dinov2")):
        assert llava.of(other) is llava


def test_a_pruned_picture_ends_where_it_did_and_its_rows_do_not():
    image, row, end = 5, 7, 8
    tokens = [image, image, row, image, image, end]
    embeds = [token == image for token in tokens]
    for keep in (1, 2, 3):
        assert Mistral3Adapter().placeholder(tokens, embeds, keep) == [image] * keep + [end]


def test_a_tower_without_a_layer_for_anchors_does_not_start():
    with pytest.raises(TooShallow, match=r"depth 2 .* VLLM_PLUGINS"):
        LlavaAdapter().encoder(config(depth=2))
    with pytest.raises(TooShallow, match="more layers"):
        Qwen25VLAdapter().encoder(SimpleNamespace(vision_config=SimpleNamespace(depth=1)))


def test_what_qwens_processor_does_not_scale_is_refused_by_its_field():
    """The limit is the one of the checkpoint's processor, on both sides of it."""
    for long in (199, 200, 201, 1000):
        for size in ((long * 3, 3), (1, long)):
            refused = False
            try:
                smart_resize(size[1], size[0])
            except ValueError:
                refused = True
            shape = SimpleNamespace(width=size[0], height=size[1])
            if not refused:
                check_shape(shape)
                continue
            with pytest.raises(VLLMValidationError, match=f"{size[0]} x {size[1]}") as error:
                check_shape(shape)
            assert error.value.parameter == "image_url"


def test_the_picture_is_centred_in_its_grid():
    assert picture_region((512, 512), (2, 2), 24) == (0, 48, 0, 48)
    assert picture_region((300, 1000), (1, 3), 24) == (1, 23, 0, 72)
    assert picture_region((1000, 300), (3, 1), 24) == (0, 72, 1, 23)


def test_tiles_of_padding_alone_keep_nothing():
    regions = tile_regions((900, 60), (1, 3), 24)
    assert [region.size for region in regions] == [576, 0, 24 * 2, 0]
