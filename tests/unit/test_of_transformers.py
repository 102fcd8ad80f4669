"""Query and key of towers that are transformers' own."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Gemma4VisionConfig, SiglipVisionConfig, SiglipVisionModel
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionAttention

from hiprune_vllm.models.encode import encode
from hiprune_vllm.models.gemma4 import Gemma4Adapter, _places
from hiprune_vllm.models.of_transformers import of_transformers
from hiprune_vllm.pruning.record import ScoreRecorder, Wanted
from tests.reference import paper

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(params=["sdpa", "eager"])
def siglip(request):
    torch.manual_seed(0)
    config = SiglipVisionConfig(**SIZE, num_attention_heads=2, image_size=32, patch_size=8)
    model = SiglipVisionModel._from_config(config, attn_implementation=request.param).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


def attentions_of(model):
    layers = getattr(model, "vision_model", model).encoder.layers
    return [layer.self_attn for layer in layers]


def test_scores_are_those_of_eager_attention_and_the_tower_does_what_it_did(siglip):
    pixels, modules = torch.randn(3, 3, 32, 32), attentions_of(siglip)
    configs = [module.config for module in modules]
    with torch.no_grad():
        before = siglip(pixels).last_hidden_state
        recorder = ScoreRecorder(modules, heads=2, leading_tokens=0, source=of_transformers)
        wanted = [Wanted(2, "global", (0, 2)), Wanted(2, "cls", (1,)), Wanted(1, "global", (1,))]
        with recorder.recording(wanted) as scores:
            during = siglip(pixels).last_hidden_state
        assert torch.equal(before, during)
        assert all(module.config is config for module, config in zip(modules, configs, strict=True))
        siglip.set_attn_implementation("eager")
        full = siglip(pixels, output_attentions=True).attentions
    for (layer, score, row), found in scores.items():
        attention = full[layer - 1][row]
        expected = paper.scores(attention, has_cls=False, cls_only=score == "cls")
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert set(scores) == {(2, "global", 0), (2, "global", 2), (2, "cls", 1), (1, "global", 1)}


def test_nothing_is_left_behind_of_a_layer_that_did_not_run(siglip):
    modules = attentions_of(siglip)
    recorder = ScoreRecorder(modules, heads=2, leading_tokens=0, source=of_transformers)
    configs = [module.config for module in modules]
    with recorder.recording([Wanted(1, "global", (0,)), Wanted(1, "cls", (0,))]):
        assert modules[0].config is not configs[0]
        assert modules[0].config.hidden_size == 32
    assert [module.config for module in modules] == configs


def test_keys_that_several_heads_share_count_for_each_of_them():
    torch.manual_seed(0)
    config = Gemma4VisionConfig(
        **SIZE, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attn_implementation="sdpa"
    )
    module, states = Gemma4VisionAttention(config, 0), torch.randn(1, 6, 32)
    places, _ = _places(6, 3, "cpu")
    seen = []
    listening = of_transformers(module, lambda *got: seen.append(got))
    turned = torch.ones(1, 6, 8), torch.zeros(1, 6, 8)
    module(states, position_embeddings=turned, position_ids=places)
    listening.remove()
    ((query, key, scale),) = seen
    assert query.shape == key.shape == (1, 6, 4, 8)
    assert torch.equal(key[:, :, 0], key[:, :, 1])
    assert not torch.equal(key[:, :, 1], key[:, :, 2])
    assert scale == 1.0  # its queries and keys are normalised


def test_images_of_a_tower_that_takes_one_at_a_time_are_encoded_alone():
    seen = []

    class Alone(Gemma4Adapter):
        def tower(self, model):
            return SimpleNamespace(one_by_one=True)

        def laid_out(self, model, batch):
            seen.append((batch.pixels, batch.shapes))
            raise StopIteration

    batch = SimpleNamespace(some=lambda numbers: SimpleNamespace(pixels=numbers, shapes=numbers))
    with pytest.raises(StopIteration):
        encode(Alone(), None, batch, [None, None], None)
    assert seen == [([0], [0])]
