"""Checkpoints of real geometry without weights: what a speed depends on, in a second and 2 MB.

    python -m loadtests.geometry llava-1b FOLDER
    hiprune-serve FOLDER --load-format dummy

Only configuration, tokenizer and processor are written; vLLM's `dummy` loader makes up the weights,
so the answers mean nothing, and a client that wants a certain number of tokens sets `ignore_eos`.
Add `--dtype float32` on a CPU without bfloat16 instructions (lscpu: avx512_bf16 or amx_bf16), where
bfloat16 is emulated several hundred times slower.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers as hf

VOCABULARY = 32064
"""Tokens of LLaVA's text model: what the last layer costs."""

LLAVA_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
INTERNVL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<video>", "<img>", "</img>")
INTERNVL_PLACE = "<IMG_CONTEXT>"
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_SMALL = CLIP_L_336 | {  # ViT-S: the same 24 x 24 patches for a thirteenth of the work
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 6,
    "num_hidden_layers": 12,
}
NEXT_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
INTERN_VIT_300M = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "attention_bias": True,
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
TEXT_SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "small": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "1b": {  # TinyLlama's
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {  # Vicuna's
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
"""Text models: about 0.02, 0.11, 1.1 and 6.7 thousand million parameters.

With `small` goes a smaller LLaVA tower, too.
"""


def byte_tokenizer(special: Sequence[str], names: dict[str, Any], template: str) -> Any:
    """One token a byte, and as many that no text ever has, up to `VOCABULARY`: all can be decoded.

    Args:
        special: the first ids, in order.
        names: which of them is what (`eos_token`, ...).
        template: for chats.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    known = (*special, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    padded = (*known, *(f"~{i}" for i in range(len(known), VOCABULARY)))
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(padded)}, merges=[]))
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32768, **names)
    fast.chat_template = template
    return fast


def _llava_tokenizer() -> Any:
    names = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    return byte_tokenizer(LLAVA_TOKENS, names, CHAT_TEMPLATE)


def _text(size: str, tokenizer: Any) -> dict[str, Any]:
    return {
        **TEXT_SIZES[size],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32768,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }


def write_llava(folder: Path, size: str) -> None:
    """LLaVA-1.5: CLIP-L/14-336, 24 x 24 tokens a picture, features of the last but one layer."""
    tokenizer = _llava_tokenizer()
    _save(
        folder,
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**(CLIP_SMALL if size == "small" else CLIP_L_336)),
            text_config=hf.LlamaConfig(**_text(size, tokenizer)),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        ),
        "LlavaForConditionalGeneration",
        hf.LlavaProcessor(
            image_processor=hf.CLIPImageProcessor(
                size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
            ),
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        ),
    )


def write_llava_next(folder: Path, size: str) -> None:
    """LLaVA-NeXT: the same tower, up to five tiles a picture."""
    tokenizer = _llava_tokenizer()
    _save(
        folder,
        hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**(CLIP_SMALL if size == "small" else CLIP_L_336)),
            text_config=hf.LlamaConfig(**_text(size, tokenizer)),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=NEXT_GRIDS,
            tie_word_embeddings=False,
        ),
        "LlavaNextForConditionalGeneration",
        hf.LlavaNextProcessor(
            image_processor=hf.LlavaNextImageProcessor(
                size={"shortest_edge": 336},
                crop_size={"height": 336, "width": 336},
                image_grid_pinpoints=NEXT_GRIDS,
            ),
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        ),
    )


def write_qwen(folder: Path, size: str) -> None:
    """Qwen2.5-VL: 32 blocks of width 1280 with window attention, pictures up to 16,384 patches."""
    template = CHAT_TEMPLATE.replace("<s>", "").replace(
        "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
    )
    tokenizer = byte_tokenizer(
        QWEN_TOKENS, {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, template
    )
    ids = {token: i for i, token in enumerate(QWEN_TOKENS)}
    width, heads = TEXT_SIZES[size]["hidden_size"], TEXT_SIZES[size]["num_attention_heads"]
    half = width // heads // 2  # of a head: turned by time, row and column in the ratio 2 : 3 : 3
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8],
    }
    pixels = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 4096}
    _save(
        folder,
        hf.Qwen2_5_VLConfig(
            text_config={**_text(size, tokenizer), "rope_parameters": rope},
            vision_config={**QWEN_VISION, "out_hidden_size": width},
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
        ),
        "Qwen2_5_VLForConditionalGeneration",
        hf.Qwen2_5_VLProcessor(
            image_processor=hf.Qwen2VLImageProcessor(size=pixels),
            video_processor=hf.Qwen2VLVideoProcessor(size=pixels),
            tokenizer=tokenizer,
            chat_template=template,
        ),
    )


def write_internvl(folder: Path, size: str) -> None:
    """InternVL: InternViT-300M, 16 x 16 tokens a tile, up to 12 tiles and a thumbnail."""
    template = CHAT_TEMPLATE.replace("<s>", "").replace("<image>", INTERNVL_PLACE)
    names = {
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "extra_special_tokens": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": INTERNVL_PLACE,
            "video_token": "<video>",
        },
    }
    tokenizer = byte_tokenizer((*INTERNVL_TOKENS, INTERNVL_PLACE), names, template)
    side = {"height": 448, "width": 448}
    _save(
        folder,
        hf.InternVLConfig(
            vision_config=INTERN_VIT_300M,
            text_config=hf.Qwen2Config(**_text(size, tokenizer)).to_dict(),
            image_token_id=tokenizer.convert_tokens_to_ids(INTERNVL_PLACE),
            tie_word_embeddings=False,
        ),
        "InternVLForConditionalGeneration",
        hf.InternVLProcessor(
            image_processor=hf.GotOcr2ImageProcessor(size=side),
            video_processor=hf.InternVLVideoProcessor(size=side),
            tokenizer=tokenizer,
            chat_template=template,
        ),
    )


WRITERS: dict[str, Callable[[Path, str], None]] = {
    "llava": write_llava,
    "llava-next": write_llava_next,
    "internvl": write_internvl,
    "qwen": write_qwen,
}
NAMES = tuple(f"{family}-{size}" for family in WRITERS for size in TEXT_SIZES)


def write(name: str, folder: Path) -> Path:
    """Writes the checkpoint `name`, one of `NAMES`, into `folder`, which is made. Returns it."""
    family, _, size = name.rpartition("-")
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[family](folder, size)
    return folder


def prefill_flops(size: str, tokens: int) -> float:
    """Counted, not measured: multiplications and additions of one prefill.

    Matrix products of all layers for every token, causal attention (half of tokens x tokens), and
    the vocabulary once.
    """
    text = TEXT_SIZES[size]
    width, layers = text["hidden_size"], text["num_hidden_layers"]
    kv = width * text["num_key_value_heads"] // text["num_attention_heads"]
    weights = width * (2 * width + 2 * kv) + 3 * width * text["intermediate_size"]
    return (
        2.0 * layers * weights * tokens
        + 2.0 * layers * width * tokens * tokens
        + 2.0 * width * VOCABULARY
    )


def _save(folder: Path, config: Any, architecture: str, processor: Any) -> None:
    config.architectures = [architecture]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m loadtests.geometry", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("folder", type=Path)
    wish = parser.parse_args()
    print(f"{write(wish.name, wish.folder)}: start with --load-format dummy")
