"""What is proved at start-up and what is bounded by vLLM's tables, on the installed vLLM."""

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.models import llava, llava_next, qwen2, qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    ProcessorInputs,
    PromptUpdateDetails,
    TimingContext,
)
from vllm.multimodal.processing.processor import MultiModalProcessingResult

from hiprune_vllm.engine.rotary_table import rotary_rows
from hiprune_vllm.models.llava import LlavaAdapter
from tests.photos import photo
from tests.reference import random_llava
from tests.reference.checkpoints import QWEN, build_llava_next, build_qwen

BUILDERS = {
    "llava": random_llava.build,
    "llava_next": build_llava_next,
    **{name: partial(build_qwen, name) for name in QWEN},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in BUILDERS}
    for name, folder in folders.items():
        BUILDERS[name](folder)
    return folders


def config(folder, **options):
    return EngineArgs(model=str(folder), max_model_len=512, **options).create_model_config()


@pytest.mark.parametrize("family", BUILDERS)
def test_every_family_proves_its_seams_when_its_processor_is_made(checkpoints, family):
    assert MULTIMODAL_REGISTRY.create_processor(config(checkpoints[family]))
    # Nothing is proved where no pictures are let in, and a limit does not stand in the way.
    for options in (
        {"limit_mm_per_prompt": {"image": 0}},
        {"mm_processor_kwargs": {"hiprune_limits": {"min_tokens": 3, "max_tokens": 5}}},
        {"mm_processor_kwargs": {"hiprune": {"tokens": 1, "method": "random"}}},
    ):
        assert MULTIMODAL_REGISTRY.create_processor(config(checkpoints[family], **options))


def other_count(self, *args, **kwargs):
    return 7


def no_fields(self, *args, **kwargs):
    return {}


DRIFTS = {
    "llava": (llava.BaseLlavaProcessingInfo, "get_max_image_tokens", other_count, "got 576"),
    "llava_next": (
        llava_next.LlavaNextProcessingInfo, "_get_num_unpadded_features",
        lambda self, **_: (7, 0), "expected 583",
    ),
    "qwen2_5_vl": (
        qwen2_5_vl.Qwen2_5_VLProcessingInfo, "get_num_image_tokens", other_count, "expected 7",
    ),
    "fields": (
        llava.LlavaMultiModalProcessor, "_get_mm_fields_config", no_fields, "KeyError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("drift", DRIFTS)
def test_a_drifted_processor_stops_the_start_with_what_was_expected(
    checkpoints, drift, monkeypatch
):
    owner, name, changed, told = DRIFTS[drift]
    monkeypatch.setattr(owner, name, changed)
    with pytest.raises(RuntimeError, match=r"version drift: expected .* got ") as error:
        MULTIMODAL_REGISTRY.create_processor(config(checkpoints.get(drift, checkpoints["llava"])))
    assert told in str(error.value)


BOI, EOI, ROW = 1, 2, 3


def structured(tokens):
    """vLLM's own kind of placeholder with tokens around and between the embeddings."""
    rows = [token for i in range(0, len(tokens), 24) for token in (*tokens[i : i + 24], ROW)]
    return PromptUpdateDetails.select_token_id([BOI, *rows, EOI], tokens[0])


@pytest.fixture
def with_structure(monkeypatch):
    of_vllm = llava.LlavaMultiModalProcessor._get_prompt_updates

    def updates(self, *args, **kwargs):
        (update,) = of_vllm(self, *args, **kwargs)
        return [replace(update, replacement=lambda i: structured(update.resolve(i).content.full))]

    monkeypatch.setattr(llava.LlavaMultiModalProcessor, "_get_prompt_updates", updates)


def processed(processor, plan):
    result = processor.apply(
        ProcessorInputs(
            prompt=[5, processor.info.get_hf_config().image_token_index, 6],
            mm_data_items=processor.info.parse_mm_data({"image": [photo("chelsea")]}),
            hf_processor_mm_kwargs={"hiprune": plan},
        ),
        TimingContext(enabled=False),
    )
    (place,) = result["mm_placeholders"]["image"]
    return result["prompt_token_ids"], place


def test_tokens_around_and_between_embeddings_stay_where_an_image_is_pruned(
    checkpoints, with_structure
):
    processor = MULTIMODAL_REGISTRY.create_processor(config(checkpoints["llava"]))
    image = processor.info.get_hf_config().image_token_index
    tokens, place = processed(processor, {"tokens": 30})
    rows = [*[image] * 24, ROW, *[image] * 6, *[ROW] * 23]
    assert tokens == [5, BOI, *rows, EOI, 6]
    assert (place.offset, place.length, place.get_num_embeds()) == (1, len(tokens) - 2, 30)
    whole, place = processed(processor, {})
    assert (len(whole), place.get_num_embeds()) == (576 + 24 + 2 + 2, 576)


def test_a_family_says_which_tokens_go_with_their_patches(checkpoints, with_structure, monkeypatch):
    def without_rows(self, tokens, is_embed, keep):
        return [BOI, *[tokens[1]] * keep, EOI]

    monkeypatch.setattr(LlavaAdapter, "placeholder", without_rows)
    processor = MULTIMODAL_REGISTRY.create_processor(config(checkpoints["llava"]))
    tokens, place = processed(processor, {"tokens": 30})
    assert tokens == [5, BOI, *[tokens[2]] * 30, EOI, 6]
    assert place.is_embed.tolist() == [False, *[True] * 30, False]


def test_a_family_that_cuts_a_placeholder_wrongly_does_not_start(checkpoints, monkeypatch):
    monkeypatch.setattr(
        LlavaAdapter, "placeholder", lambda self, tokens, is_embed, keep: tokens[: keep + 1]
    )
    with pytest.raises(RuntimeError, match=r"expected 192 placeholder tokens for embeddings, got"):
        MULTIMODAL_REGISTRY.create_processor(config(checkpoints["llava"]))


ROPES = {
    "default": {"rope_type": "default"},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("kind", ROPES)
def test_the_table_has_the_rows_that_the_front_end_counts_with(checkpoints, kind):
    text = {
        "max_position_embeddings": 512,
        "rope_parameters": {"mrope_section": [4, 6, 6], "rope_theta": 1e6, **ROPES[kind]},
    }
    found = config(checkpoints["qwen2_5_vl"], hf_overrides={"text_config": text}).hf_config
    layer = found.get_text_config()
    assert layer.max_position_embeddings == 512
    # As Qwen2's attention makes it.
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            32, max_position=layer.max_position_embeddings, rope_parameters=layer.rope_parameters,
            dtype=torch.float32,
        )  # fmt: skip
    assert isinstance(rope, MRotaryEmbedding)
    assert rope.cos_sin_cache.shape[0] == rotary_rows(found) == 2048


def test_the_text_model_asks_for_that_table():
    made = inspect.getsource(qwen2.Qwen2Attention)
    call = re.search(r"get_rope\((.*?)\n        \)", made, re.DOTALL)[1]
    assert "max_position=max_position" in call
    assert "mrope_positions_factor" not in call
    assert "max_position=config.max_position_embeddings" in inspect.getsource(
        qwen2.Qwen2DecoderLayer
    )


def test_what_is_noted_of_a_medium_stays_with_it_in_the_cache():
    hook = BaseMultiModalProcessor._maybe_apply_prompt_updates
    assert list(inspect.signature(hook).parameters) == ["self", "mm_items", "mm_res"]
    assert "prompt_updates" in MultiModalProcessingResult._fields
    recomputed = inspect.getsource(BaseMultiModalProcessor._recompute_cached_prompt_update)
    assert "replace(cached_update, item_idx=new_item_idx)" in recomputed
    resolved = inspect.getsource(BaseMultiModalProcessor._bind_and_group_updates)
    assert "update.resolve(item_idx)" in resolved
    from vllm.multimodal.processing.processor import PromptUpdateDetails

    assert [one.name for one in fields(PromptUpdateDetails)] == ["full", "is_embed"]


def test_a_name_of_a_video_or_of_embeddings_never_meets_a_picture(checkpoints):
    """Under one name they would share an entry of vLLM's caches, of another length."""
    from PIL import Image
    from vllm.multimodal.processing import ProcessorInputs

    processor = MULTIMODAL_REGISTRY.create_processor(
        config(checkpoints["qwen2_5_vl"], enable_mm_embeds=True)
    )
    picture = Image.new("RGB", (56, 56))
    clip = torch.zeros(4, 56, 56, 3).numpy(), {"fps": 2.0, "total_num_frames": 4}
    embeddings = {"image_embeds": torch.zeros(4, 64), "image_grid_thw": torch.tensor([[1, 4, 4]])}

    def identity(kind, data):
        return processor._get_mm_hashes(
            ProcessorInputs(
                prompt=[],
                mm_data_items=processor.info.parse_mm_data({kind: data}),
                mm_uuid_items={kind: ["x"]},
            )
        )[kind][0]

    assert identity("image", [picture]) == "x"  # vLLM's own, a budget and a digest follow
    video, rows = identity("video", [clip]), identity("image", embeddings)
    assert len({"x", video, rows}) == 3
    assert len(video) == len(rows) == 64
    assert identity("video", [clip]) == video


ANOTHER_RELEASE = """
import sys, types
version = types.ModuleType("vllm._version")
version.__version__, version.__version_tuple__ = "0.99.0", (0, 99, 0)
sys.modules["vllm._version"] = version
"""

START = """
import sys
import vllm
assert vllm.__version__ == "0.99.0"
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
config = EngineArgs(model=sys.argv[1], max_model_len=512).create_model_config()
print("SERVES", config.architectures, flush=True)
if config.is_multimodal_model:
    MULTIMODAL_REGISTRY.create_processor(config)
"""


def started(folder, tmp_path, **environment):
    """What becomes of a checkpoint under a release of vLLM that nobody has tested."""
    (tmp_path / "sitecustomize.py").write_text(ANOTHER_RELEASE)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", START, str(folder)],
        env=os.environ
        | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HIPRUNE_ANY_VLLM": "0"}
        | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.long
def test_an_unlisted_vllm_serves_text_and_refuses_what_would_be_pruned(checkpoints, tmp_path):
    from transformers import LlamaConfig

    text = tmp_path / "text"
    LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(text)  # fmt: skip
    ran = started(text, tmp_path)
    assert "SERVES ['LlamaForCausalLM']" in ran.stdout, ran.stderr

    ran = started(checkpoints["llava"], tmp_path)
    assert ran.returncode != 0
    told = "hiprune-vllm was tested with vllm >=0.32,<0.34, found 0.99.0. Install a tested release"
    assert told in ran.stderr
    assert "VLLM_PLUGINS" in ran.stderr

    # The remedy, and the switches, work.
    for remedy in ({"VLLM_PLUGINS": ""}, {"HIPRUNE_DISABLE": "1"}, {"HIPRUNE_ANY_VLLM": "1"}):
        ran = started(checkpoints["llava"], tmp_path, **remedy)
        assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(("value", "registers"), [("1", False), ("true", False), ("0", True)])
def test_the_switch_leaves_vllms_classes_in_their_place(value, registers):
    code = (
        "import hiprune_vllm, json; hiprune_vllm.register();"
        "from vllm import ModelRegistry;"
        "one = ModelRegistry.models['LlavaForConditionalGeneration'];"
        "print(json.dumps(one.module_name))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HIPRUNE_DISABLE": value},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    module = json.loads(ran.stdout.splitlines()[-1])
    assert (module == "hiprune_vllm.engine.classes") is registers


def test_a_switch_that_says_neither_stops_the_start(monkeypatch):
    import hiprune_vllm

    monkeypatch.setenv("HIPRUNE_DISABLE", "perhaps")
    with pytest.raises(ValueError, match="HIPRUNE_DISABLE must be 1 or 0, got 'perhaps'"):
        hiprune_vllm.register()
