"""GLM-4.1V, 4.5V and 4.6V: a small checkpoint with random weights, and the oracle."""

from pathlib import Path
from typing import Any, Final

import torch

from tests.reference import random_llava
from tests.reference.checkpoints import small_text
from tests.reference.qwen import QwenOracle

SPECIAL_TOKENS: Final = (
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)
PICTURE: Final = "<|begin_of_image|><|image|><|end_of_image|>"
_EXPERTS: Final = {
    "head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "use_qk_norm": False,
    "num_hidden_layers": 3,  # the first is dense
}


class GlmOracle(QwenOracle):
    """Towers and positions go by the names of Qwen's in Hugging Face's library."""

    pad = "<|image|>"


def build(folder: Path, *, experts: bool = False, newer: bool = False, seed: int = 4) -> None:
    """A model whose vision encoder has 8 blocks.

    Args:
        folder: existing folder to write into.
        experts: a mixture of experts (GLM-4.5V) instead of a dense text model.
        newer: the processor of GLM-4.6V, which says another time before every frame of a video.
        seed: of the weights.
    """
    import transformers

    tokenizer = random_llava.byte_tokenizer(
        SPECIAL_TOKENS, pad_token="<|endoftext|>", eos_token="<|user|>"
    )
    ids = dict(zip(SPECIAL_TOKENS, range(len(SPECIAL_TOKENS)), strict=True))
    kind = "Glm4vMoe" if experts else "Glm4v"
    config = getattr(transformers, f"{kind}Config")(
        text_config={
            **small_text(tokenizer),
            "bos_token_id": None,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 3, 3],
            },
            **(_EXPERTS if experts else {}),
        },
        vision_config={
            "depth": 8,
            "hidden_size": 64,
            "num_heads": 4,
            "out_hidden_size": 64,
            "intermediate_size": 128,
            "image_size": 336,
            "patch_size": 14,
        },
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"],
        image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"],
        video_end_token_id=ids["<|end_of_video|>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        random_llava.spread_weights(model, tokenizer)
        with torch.no_grad():
            model.model.visual.embeddings.position_embedding.weight.normal_(0.0, 1.0)
            for name, weight in model.named_parameters():
                if "visual" in name and name.endswith("qkv.weight"):
                    weight[: 2 * weight.shape[1]] *= 2.0
    model.save_pretrained(folder)
    # To these processors a picture has two frames, whose pixels count together.
    pixels = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 400}
    of = "Glm46V" if newer else "Glm4v"
    made: Any = getattr(transformers, f"{of}Processor")(
        image_processor=getattr(transformers, f"{of}ImageProcessor")(size=pixels),
        video_processor=getattr(transformers, f"{of}VideoProcessor")(size=pixels),
        tokenizer=tokenizer,
        chat_template=random_llava.CHAT_TEMPLATE.replace("<s>", "").replace("<image>", PICTURE),
    )
    made.save_pretrained(folder)
