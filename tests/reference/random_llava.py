"""A tiny LLaVA with real geometry and random weights, for the oracle to be compared on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEED = 20250801
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
MAX_NEW_TOKENS = 64  # without a limit of the client's: the model never ends an answer by itself


def build(
    folder: Path,
    *,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    siglip: bool = False,
    seed: int = SEED,
) -> None:
    """Writes a LLaVA checkpoint with random weights.

    Args:
        folder: existing folder to write into.
        vision, text, model: changes to the tower's, the text model's and LLaVA's configuration.
        siglip: a SigLIP tower instead of CLIP.
        seed: of the weights.
    """
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    tokenizer = byte_tokenizer()
    tower: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 9,
        "image_size": 336,
        "patch_size": 14,
    } | (vision or {})
    language: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    } | (text or {})
    config = LlavaConfig(
        vision_config=(SiglipVisionConfig if siglip else CLIPVisionConfig)(**tower),
        text_config=LlamaConfig(**language),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **{
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "full" if siglip else "default",
            "tie_word_embeddings": False,
            **(model or {}),
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llava = LlavaForConditionalGeneration(config)
        spread_weights(llava, tokenizer)
    llava.generation_config.max_new_tokens = MAX_NEW_TOKENS
    llava.save_pretrained(folder)
    rename_tower_weights(folder / "model.safetensors")

    size = tower["image_size"]
    images: Any = (
        SiglipImageProcessor(size={"height": size, "width": size})
        if siglip
        else CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower["patch_size"],
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=0 if siglip else 1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def byte_tokenizer(special_tokens: Sequence[str] = SPECIAL_TOKENS, **names: Any) -> Any:
    """One token a byte: any text in any language, without a vocabulary to learn.

    Args:
        special_tokens: the first ids, in order.
        names: which of them is what (`eos_token`, ...); those of a LLaVA by default.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*special_tokens, *alphabet))}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.add_special_tokens(list(special_tokens))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        model_max_length=16384,
        **(
            names
            or {
                "pad_token": "<pad>",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "extra_special_tokens": {"image_token": "<image>"},
            }
        ),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def spread_weights(llava: Any, tokenizer: Any) -> None:
    """Scales the random weights so that attention differs from token to token.

    With the customary standard deviation of 0.02 all attention is nearly uniform, every token
    scores the same and neither the picture nor the budget would change an answer.
    """
    import torch

    letters = tokenizer("abcdefghijklmnopqrstuvwxyz ", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for name, weight in llava.named_parameters():
            if weight.dim() >= 2 and "embed" not in name:
                inputs = weight.shape[-1] if "experts" in name else weight[0].numel()
                weight.normal_(0.0, inputs**-0.5)
                if "q_proj" in name or "k_proj" in name:
                    weight.mul_(2.0)
        llava.get_input_embeddings().weight.normal_(0.0, 1.0)
        # Only letters have logits worth mentioning: an answer is text, also when it is sampled.
        head = torch.zeros_like(llava.lm_head.weight)
        head[letters] = 6.0 * llava.lm_head.weight[letters]
        llava.lm_head.weight.copy_(head)


def rename_tower_weights(path: Path) -> None:
    """`vision_tower.*` to `vision_tower.vision_model.*`, the names of real LLaVA checkpoints."""
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    save_file(
        {
            name.replace("vision_tower.", "vision_tower.vision_model.", 1)
            if not name.startswith("vision_tower.vision_model.")
            else name: tensor
            for name, tensor in weights.items()
        },
        path,
        metadata={"format": "pt"},
    )
