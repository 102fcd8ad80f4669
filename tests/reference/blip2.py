"""A small BLIP-2: what its text model sees are learned queries, so that nothing can be pruned."""

from pathlib import Path

import torch

from tests.reference import random_llava

QUERIES = 32
"""Visual tokens of every picture."""


def build_blip2(folder: Path) -> None:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
    )

    tokenizer = random_llava.byte_tokenizer()
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = Blip2Config(
        vision_config={**small, "num_attention_heads": 4, "image_size": 224, "patch_size": 14},
        qformer_config={**small, "num_attention_heads": 4, "encoder_hidden_size": 64},
        text_config={
            "model_type": "opt",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 4096,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        Blip2ForConditionalGeneration(config).save_pretrained(folder)
    Blip2Processor(
        BlipImageProcessor(size={"height": 224, "width": 224}),
        tokenizer,
        num_query_tokens=QUERIES,
        chat_template=random_llava.CHAT_TEMPLATE,
    ).save_pretrained(folder)
