"""Small checkpoints with random weights and real geometry, one builder a family."""

from pathlib import Path
from typing import Any

import torch

from tests.reference import random_llava

NEXT_GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""Height and width of every anyres grid of the LLaVA-NeXT checkpoints."""

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


def build_llava_next(folder: Path, *, mistral: bool = False, seed: int = 1) -> None:
    """LLaVA-NeXT with a CLIP tower and a vicuna-like (Llama) or Mistral text model."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        MistralConfig,
    )

    tokenizer = random_llava.byte_tokenizer()
    text = small_text(tokenizer)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**SMALL_TOWER),
        text_config=MistralConfig(**text, sliding_window=None) if mistral else LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[list(grid) for grid in NEXT_GRIDS],
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
            size={"shortest_edge": 336},
            crop_size={"height": 336, "width": 336},
            image_grid_pinpoints=[list(grid) for grid in NEXT_GRIDS],
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
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


def build_qwen2_5_vl(folder: Path, *, seed: int = 2, max_pixels: int = 28 * 28 * 400) -> None:
    """Qwen2.5-VL with 8 blocks, two of them with full attention."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = random_llava.byte_tokenizer(
        QWEN_SPECIAL_TOKENS, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    ids = dict(zip(QWEN_SPECIAL_TOKENS, range(len(QWEN_SPECIAL_TOKENS)), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            **small_text(tokenizer),
            "bos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [4, 6, 6],
                "rope_theta": 1e6,
            },
        },
        vision_config={
            "depth": 8,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "window_size": 112,
            "fullatt_block_indexes": [3, 7],
            "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        random_llava.spread_weights(model, tokenizer)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "visual" in name and name.endswith("qkv.weight"):
                    weight[: 2 * weight.shape[1]] *= 2.0
    model.save_pretrained(folder)
    pixels = {"shortest_edge": 28 * 28 * 4, "longest_edge": max_pixels}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        video_processor=Qwen2VLVideoProcessor(size=pixels),
        tokenizer=tokenizer,
        chat_template=random_llava.CHAT_TEMPLATE.replace("<s>", "").replace(
            "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
        ),
    ).save_pretrained(folder)
