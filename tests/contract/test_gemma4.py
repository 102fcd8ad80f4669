"""What Gemma 4's adapter takes for granted of vLLM and of transformers."""

import inspect
import re

from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4 import modeling_gemma4
from vllm.model_executor.models import gemma4_mm

from hiprune_vllm.models.of_transformers import NAME

MODEL = gemma4_mm.Gemma4ForConditionalGeneration


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_transformers_attention_is_looked_up_by_its_blocks_configuration():
    assert NAME in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert parameters(AttentionInterface.get_interface)[1:] == ["attn_implementation", "default"]
    source = inspect.getsource(modeling_gemma4.Gemma4VisionAttention.forward)
    assert re.search(
        r"ALL_ATTENTION_FUNCTIONS\.get_interface\(\s*"
        r"self\.config\._attn_implementation, eager_attention_forward\s*\)",
        source,
    )
    called = source[source.index("= attention_interface(") :]
    order = ["self,", "query_states,", "key_states,", "value_states,", "scaling=self.scaling"]
    assert [called.index(name) for name in order] == sorted(called.index(name) for name in order)
    assert callable(modeling_gemma4.eager_attention_forward)


def test_the_tower_has_the_parts_that_are_called():
    vision = modeling_gemma4.Gemma4VisionModel
    made = inspect.getsource(vision.__init__)
    for part in ("patch_embedder", "encoder", "pooler", "std_bias", "std_scale"):
        assert f"self.{part} = " in made
    assert parameters(modeling_gemma4.Gemma4VisionPatchEmbedder.forward) == [
        "self",
        "pixel_values",
        "pixel_position_ids",
        "padding_positions",
    ]
    assert parameters(modeling_gemma4.Gemma4VisionEncoder.forward)[:4] == [
        "self",
        "inputs_embeds",
        "attention_mask",
        "pixel_position_ids",
    ]
    assert parameters(modeling_gemma4.Gemma4VisionPooler.forward) == [
        "self",
        "hidden_states",
        "pixel_position_ids",
        "padding_positions",
        "output_length",
    ]
    assert "self.layers[: self.config.num_hidden_layers]" in inspect.getsource(
        modeling_gemma4.Gemma4VisionEncoder.forward
    )


def test_vllm_calls_the_tower_as_the_adapter_does():
    source = inspect.getsource(MODEL._process_image_input)
    order = [
        source.index(call)
        for call in (
            "vt.patch_embedder(",
            ").to(self.model_dtype)",
            "vt.encoder(",
            "vt.pooler(",
            "(valid_states - vt.std_bias) * vt.std_scale",
            "torch.cat(all_valid_states, dim=0).to(self.model_dtype)",
            "self.embed_vision(",
        )
    ]
    assert order == sorted(order)
    assert parameters(MODEL._parse_and_validate_image_input) == ["self", "kwargs"]
    made = inspect.getsource(MODEL.__init__)
    for part in ("vision_tower", "embed_vision", "model_dtype"):
        assert f"self.{part} = " in made or f"self.{part}: " in made
    # Each rank has all of it, whatever the mode.
    replaced = inspect.getsource(gemma4_mm.recursive_replace_linear)
    assert '"replicate"' in replaced


def test_vllm_counts_soft_tokens_by_the_size_and_what_a_request_says():
    info = gemma4_mm.Gemma4ProcessingInfo
    assert parameters(info._compute_num_soft_tokens) == [
        "self",
        "image_width",
        "image_height",
        "max_soft_tokens",
    ]
    source = inspect.getsource(gemma4_mm.Gemma4MultiModalProcessor._get_prompt_updates)
    assert "self.info.ctx.get_merged_mm_kwargs(" in source
    from hiprune_vllm.models.gemma4 import ALLOWED

    assert gemma4_mm._SUPPORTED_SOFT_TOKENS == ALLOWED
    fields = inspect.getsource(gemma4_mm.Gemma4MultiModalProcessor._get_mm_fields_config)
    for name in ("pixel_values", "pixel_position_ids"):
        assert f'{name}=MultiModalFieldConfig.batched("image")' in fields
