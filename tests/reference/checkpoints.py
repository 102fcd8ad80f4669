"""Small checkpoints with random weights and real geometry, one builder a family."""

from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tests.reference import random_llava

NEXT_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of every anyres grid of the LLaVA-NeXT checkpoints."""

SMALL_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "image_size": 336,
    "patch_size": 14,
}


def small_text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 16384,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }


def build_llava_next(
    folder: Path, *, mistral: bool = False, granite: bool = False, seed: int = 1
) -> None:
    """LLaVA-NeXT with a CLIP tower and a vicuna-like (Llama) or Mistral text model.

    Or Granite Vision: SigLIP, and features of several of its layers, each of another scale.
    """
    from transformers import (
        CLIPVisionConfig,
        GraniteConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        MistralConfig,
        SiglipVisionConfig,
    )

    tokenizer = random_llava.byte_tokenizer()
    text: Any = small_text(tokenizer)
    side, strategy = (384, "full") if granite else (336, "default")
    grids = [[side * rows, side * columns] for rows, columns in NEXT_TILES]
    tower: Any = {**SMALL_TOWER, "image_size": side}
    if granite:
        of_text: Any = GraniteConfig(**text, attention_multiplier=0.2, embedding_multiplier=1.5)
    else:
        of_text = MistralConfig(**text, sliding_window=None) if mistral else LlamaConfig(**text)
    config = LlavaNextConfig(
        vision_config=(SiglipVisionConfig if granite else CLIPVisionConfig)(**tower),
        text_config=of_text,
        vision_feature_layer=[-7, -5, -3, -1] if granite else -2,
        vision_feature_select_strategy=strategy,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config)
        random_llava.spread_weights(model, tokenizer)
    model.save_pretrained(folder)
    random_llava.rename_tower_weights(folder / "model.safetensors")
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=grids,
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=0 if granite else 1,
        chat_template=random_llava.CHAT_TEMPLATE,
    ).save_pretrained(folder)


QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


class Qwen(NamedTuple):
    """What is a Qwen family's own in a small checkpoint.

    Attributes:
        name: of its classes in Hugging Face's library, without what follows.
        processor: the same of its processor's.
        patch: pixels a side.
        text, vision: of its configuration.
        rotary: sections of the rotary embedding, for time, rows and columns.
    """

    name: str
    processor: str
    patch: int
    text: dict[str, Any]
    vision: dict[str, Any]
    rotary: dict[str, Any]


_INTERLEAVED = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
_TOWER = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64}
_QWEN3_TOWER = {**_TOWER, "num_position_embeddings": 144}
_DEEPSTACK = {**_QWEN3_TOWER, "deepstack_visual_indexes": [1, 3, 5]}
_QWEN3_TEXT = {"head_dim": 32, "num_hidden_layers": 4}
_QWEN35_TEXT = {  # every other layer has states instead of keys and values
    "head_dim": 128,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mtp_num_hidden_layers": 1,
}
_QWEN35_ROTARY = {**_INTERLEAVED, "mrope_section": [6, 5, 5], "partial_rotary_factor": 0.25}

QWEN: Final = {
    "qwen2_vl": Qwen(
        "Qwen2VL",
        "Qwen2VL",
        14,
        {},
        {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2},
        {"mrope_section": [4, 6, 6]},
    ),
    "qwen2_5_vl": Qwen(
        "Qwen2_5_VL",
        "Qwen2_5_VL",
        14,
        {},
        {
            **_TOWER,
            "window_size": 112,
            "fullatt_block_indexes": [3, 7],
            "tokens_per_second": 2,
        },
        {"mrope_section": [4, 6, 6]},
    ),
    "qwen3_vl": Qwen("Qwen3VL", "Qwen3VL", 16, _QWEN3_TEXT, _DEEPSTACK, _INTERLEAVED),
    "qwen3_vl_moe": Qwen(
        "Qwen3VLMoe",
        "Qwen3VL",
        16,
        {**_QWEN3_TEXT, **_EXPERTS, "norm_topk_prob": True},
        _DEEPSTACK,
        _INTERLEAVED,
    ),
    "qwen3_5": Qwen("Qwen3_5", "Qwen3VL", 16, _QWEN35_TEXT, _QWEN3_TOWER, _QWEN35_ROTARY),
    "qwen3_5_moe": Qwen(
        "Qwen3_5Moe",
        "Qwen3VL",
        16,
        {**_QWEN35_TEXT, **_EXPERTS, "shared_expert_intermediate_size": 64},
        _QWEN3_TOWER,
        _QWEN35_ROTARY,
    ),
}
"""By the name of the family."""


def build_qwen(family: str, folder: Path, *, seed: int = 2, tokens: int = 400) -> None:
    """A Qwen model whose vision encoder has 8 blocks.

    Args:
        family: of `QWEN`.
        folder: existing folder to write into.
        seed: of the weights.
        tokens: of the largest picture.
    """
    import transformers

    own = QWEN[family]

    def of(name: str) -> Any:
        return getattr(transformers, name)

    tokenizer = random_llava.byte_tokenizer(
        QWEN_SPECIAL_TOKENS, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    ids = dict(zip(QWEN_SPECIAL_TOKENS, range(len(QWEN_SPECIAL_TOKENS)), strict=True))
    config = of(f"{own.name}Config")(
        text_config={
            **small_text(tokenizer),
            "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **own.rotary},
            **own.text,
        },
        vision_config={"depth": 8, "num_heads": 4, "patch_size": own.patch, **own.vision},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = of(f"{own.name}ForConditionalGeneration")(config)
        random_llava.spread_weights(model, tokenizer)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "visual" in name and name.endswith("qkv.weight"):
                    weight[: 2 * weight.shape[1]] *= 2.0
    model.save_pretrained(folder)
    _as_published(family, folder / "model.safetensors")
    side = 2 * own.patch
    pixels = {"shortest_edge": side * side * 4, "longest_edge": side * side * tokens}
    of(f"{own.processor}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(size=pixels, patch_size=own.patch),
        video_processor=of(f"{own.processor.replace('2_5_VL', '2VL')}VideoProcessor")(
            size=pixels, patch_size=own.patch
        ),
        tokenizer=tokenizer,
        chat_template=random_llava.CHAT_TEMPLATE.replace("<s>", "").replace(
            "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
        ),
    ).save_pretrained(folder)


def _heads_for_a_second_token(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Qwen3.5's own draft: a last layer over the hidden state and the next token's embedding.

    Here it is the text model's last layer once more, so that some of its drafts are right.
    """
    last, start = _QWEN35_TEXT["num_hidden_layers"] - 1, "model.language_model."
    made = {
        f"mtp.layers.0.{rest}": weight.clone()
        for name, weight in weights.items()
        for _, found, rest in [name.partition(f"{start}layers.{last}.")]
        if found
    }
    norm = weights[f"{start}norm.weight"]
    for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        made[f"mtp.{name}.weight"] = norm.clone()
    one = torch.eye(len(norm), dtype=norm.dtype)
    return made | {"mtp.fc.weight": torch.cat([one, one], dim=1) / 2}


def _as_published(family: str, path: Path) -> None:
    """Makes weights what they are in published checkpoints, where Hugging Face's classes do not."""
    weights = load_file(path)
    if family == "qwen3_vl_moe":  # experts have inputs before outputs
        weights = {
            name: weight.transpose(1, 2).contiguous() if ".experts." in name else weight
            for name, weight in weights.items()
        }
    if family.startswith("qwen3_5"):
        weights |= _heads_for_a_second_token(weights)
    save_file(weights, path, metadata={"format": "pt"})


build_qwen2_5_vl = partial(build_qwen, "qwen2_5_vl")
