"""Kimi-VL: a small checkpoint with random weights, and the oracle.

Hugging Face's library has no Kimi-VL, but its successor: of a single frame, the encoder and the
projector of Kimi K2.5 do what Kimi-VL's do, with other names and another order within heads.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.kimi_k25.modeling_kimi_k25 import apply_rotary_pos_emb_vision

from tests.reference import checkpoints, paper, random_llava, remote_kimi_vl
from tests.reference.pixtral import Encoding, PixtralOracle

SPECIAL_TOKENS: Final = (
    "[PAD]",
    "[BOS]",
    "[EOS]",
    "<|media_start|>",
    "<|media_content|>",
    "<|media_pad|>",
    "<|media_end|>",
)
PAD: Final = "<|media_pad|>"
PICTURE: Final = "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"
ENVIRONMENT: Final = {"VLLM_MLA_DISABLE": "1"}
"""Of its engines here: latent attention on a CPU would switch off chunks and cached prefixes."""
OF_SUCCESSOR: Final = "as_kimi_k25"
"""Folder of the same weights with the names that Hugging Face's library has for them."""
VISION: Final = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "patch_size": 14,
}
_TEXT: Final = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
}


def _in_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query's or key's projection: the two that a rotary angle turns, side by side."""
    halves = rows.view(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


NAMES: Final = {
    "patch_embed.pos_emb.position_embeddings": "patch_embed.pos_emb.weight",
    "final_layernorm": "encoder.final_layernorm",
    "layers.": "encoder.blocks.",
    ".norm1.": ".norm0.",
    ".norm2.": ".norm1.",
    ".attn.q_proj.": ".wqkv.",
    ".attn.proj.": ".wo.",
    ".mlp.fc1.": ".mlp.fc0.",
    ".mlp.fc2.": ".mlp.fc1.",
}
"""Parts of names of the encoder's weights: Hugging Face's library -> published checkpoints."""


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for one, other in names.items():
        if one in name:
            name = name.replace(one, other)
    return name


def _of_tower(weights: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    """The encoder's weights as published checkpoints have them: Q, K and V in one layer."""
    found = {}
    for name, weight in weights.items():
        if ".attn.k_proj." in name or ".attn.v_proj." in name:
            continue
        own = weight
        if ".attn.q_proj." in name:
            key, value = (weights[name.replace("q_proj", one)] for one in ("k_proj", "v_proj"))
            own = torch.cat([_in_pairs(weight, heads), _in_pairs(key, heads), value])
        found[f"vision_tower.{_renamed(name, NAMES)}"] = own
    return found


@dataclass(frozen=True)
class Published:
    """What published checkpoints of one of both models have of their own.

    Attributes:
        projector: what their projector is called.
        names: parts of names of weights in it: Hugging Face's library -> theirs.
        special_tokens: of the tokenizer.
        picture: what stands for a picture in a prompt.
        finish: writes configurations and the processor, with Hugging Face's configuration of the
            model, before the tokenizer is written.
    """

    projector: str
    names: Mapping[str, str]
    special_tokens: Sequence[str]
    picture: str
    finish: Callable[[Path, Any], None]


def build(folder: Path, *, seed: int = 6) -> None:
    """A model whose vision encoder has 8 blocks, and whose text model has experts."""
    write(folder, KIMI_VL, seed)


def write(folder: Path, published: Published, seed: int) -> None:
    """Writes a small checkpoint as `published` has it, and its weights for the oracle."""
    from transformers import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        Kimi_K25Config,
        Kimi_K25ForConditionalGeneration,
    )

    tokenizer = random_llava.byte_tokenizer(
        published.special_tokens, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]"
    )
    text = DeepseekV3Config(**checkpoints.small_text(tokenizer) | _TEXT)
    pad = tokenizer.convert_tokens_to_ids(PAD)
    config = Kimi_K25Config(
        text_config=text,
        vision_config={**VISION, "pos_emb_height": 12, "pos_emb_width": 12},
        projection_hidden_size=64,
        image_token_id=pad,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Kimi_K25ForConditionalGeneration(config)
        random_llava.spread_weights(model, tokenizer)
        with torch.no_grad():
            model.model.vision_tower.patch_embed.pos_emb.position_embeddings.normal_(0.0, 1.0)
    # Not `save_pretrained`: it would use the names of its published checkpoints.
    config.save_pretrained(folder / OF_SUCCESSOR)
    save_file(model.state_dict(), folder / OF_SUCCESSOR / "state.safetensors")
    alone = DeepseekV3ForCausalLM(text)
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    alone.save_pretrained(folder / "text")
    weights = _of_tower(model.model.vision_tower.state_dict(), VISION["num_attention_heads"])
    for name, weight in model.model.mm_projector.state_dict().items():
        weights[f"{published.projector}.{_renamed(name, published.names)}"] = weight
    for name, weight in load_file(folder / "text" / "model.safetensors").items():
        weights[f"language_model.{name}"] = weight
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    shutil.rmtree(folder / "text")
    published.finish(folder, config)
    tokenizer.chat_template = random_llava.CHAT_TEMPLATE.replace("<s>", "").replace(
        "<image>", published.picture
    )
    tokenizer.save_pretrained(folder)


def _finish(folder: Path, config: Any) -> None:
    vision = config.vision_config
    told = {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "dtype": "float32",
        "media_placeholder_token_id": config.image_token_id,
        "vision_config": {
            **{name: getattr(vision, name) for name in VISION},
            "model_type": "moonvit",
            "init_pos_emb_height": 12,
            "init_pos_emb_width": 12,
            "merge_kernel_size": [2, 2],
        },
        "text_config": {
            **config.text_config.to_dict(),
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
    }
    (folder / "config.json").write_text(json.dumps(told, indent=1))
    shutil.copy(remote_kimi_vl.__file__, folder / "processing_kimi_vl.py")
    code = {
        "AutoProcessor": "processing_kimi_vl.KimiVLProcessor",
        "AutoImageProcessor": "processing_kimi_vl.KimiVLImageProcessor",
    }
    told = {
        "auto_map": code,
        "processor_class": "KimiVLProcessor",
        "in_token_limit": 1600,
        "image_processor_type": "KimiVLImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    (folder / "processor_config.json").write_text(
        json.dumps(
            {
                "auto_map": {"AutoProcessor": code["AutoProcessor"]},
                "processor_class": "KimiVLProcessor",
            }
        )
    )


KIMI_VL: Final = Published(
    "multi_modal_projector",
    {"in_proj": "linear_1", "out_proj": "linear_2"},
    SPECIAL_TOKENS,
    PICTURE,
    _finish,
)


class KimiOracle(PixtralOracle):
    picture = PAD

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoTokenizer, Kimi_K25Config

        same = path / OF_SUCCESSOR
        self.model = AutoModelForImageTextToText.from_config(
            Kimi_K25Config.from_pretrained(same),
            dtype=torch.float32,
            attn_implementation="eager",
        ).eval()
        self.model.load_state_dict(load_file(same / "state.safetensors"))
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.images = self.processor(json.loads((path / "preprocessor_config.json").read_text()))
        self.merge = 2
        self.depth = self.model.config.vision_config.num_hidden_layers
        self.object_layer = self.depth // 2
        self._seen: dict[Any, Encoding] = {}

    def processor(self, told: dict[str, Any]) -> remote_kimi_vl.KimiVLImageProcessor:
        """Makes patches of pictures, of what the checkpoint tells its own."""
        return remote_kimi_vl.KimiVLImageProcessor(in_token_limit=told["in_token_limit"])

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> Encoding:
        key = (image.size, image.tobytes())
        if key in self._seen:
            return self._seen[key]
        inputs = self.images.preprocess([image])
        rows, columns = inputs["image_grid_hws"][0].tolist()
        attentions: list[torch.Tensor] = []

        def full_attention(module: Any, args: Any, kwargs: Any) -> None:
            (states,) = args
            query, key = (
                projection(states).view(len(states), module.num_heads, -1)
                for projection in (module.q_proj, module.k_proj)
            )
            turned = apply_rotary_pos_emb_vision(query, key, *kwargs["position_embeddings"])
            attentions.append(paper.attention(*(one.transpose(0, 1) for one in turned)))

        hooks = [
            layer.attn.register_forward_pre_hook(full_attention, with_kwargs=True)
            for layer in self.model.model.vision_tower.layers
        ]
        found = self.model.model.get_image_features(
            inputs["pixel_values"], image_grid_thw=torch.tensor([[1, rows, columns]])
        )
        for hook in hooks:
            hook.remove()
        self._seen[key] = Encoding(attentions, found.pooler_output[0], rows // 2, columns // 2)
        return self._seen[key]

    def visual(self, image: Image.Image, indices: Sequence[int]) -> torch.Tensor:
        return self._encode(image).tokens[list(indices)]
