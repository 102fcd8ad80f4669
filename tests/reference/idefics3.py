"""Idefics3 and SmolVLM: small checkpoints with random weights, and the oracle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from tests.reference import random_llava
from tests.reference.checkpoints import SMALL_TOWER, small_text
from tests.reference.gemma3 import Gemma3Oracle

MOST: Final = 6  # tiles a side that the tokenizer has tags for
PICTURE, FAKE, WHOLE, END = "<image>", "<fake_token_around_image>", "<global-img>", "</s>"
TAGS: Final = tuple(
    f"<row_{row + 1}_col_{column + 1}>" for row in range(MOST) for column in range(MOST)
)
SPECIAL_TOKENS: Final = ("<pad>", "<s>", END, PICTURE, FAKE, WHOLE, "<end_of_utterance>", *TAGS)
SIZES: Final = {"Idefics3": (364, 14, 2), "SmolVLM": (512, 16, 4)}
"""Pixels a side of a tile and of a patch, patches a side of a token."""


def build(name: str, folder: Path, *, seed: int = 7) -> None:
    """A model whose vision encoder has 8 blocks, and whose pictures have four tiles and the whole.

    Args:
        name: of its classes in Hugging Face's library, without what follows.
        folder: existing folder to write into.
        seed: of the weights.
    """
    import transformers

    tile, patch, merge = SIZES[name]
    tokenizer = random_llava.byte_tokenizer(
        SPECIAL_TOKENS, pad_token="<pad>", bos_token="<s>", eos_token=END
    )
    config = getattr(transformers, f"{name}Config")(
        text_config={**small_text(tokenizer), "model_type": "llama"},
        vision_config={**SMALL_TOWER, "image_size": tile, "patch_size": patch},
        scale_factor=merge,
        image_token_id=tokenizer.convert_tokens_to_ids(PICTURE),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        random_llava.spread_weights(model, tokenizer)
        with torch.no_grad():
            for weight_name, weight in model.named_parameters():
                if weight_name.endswith("position_embedding.weight"):
                    weight.normal_(0.0, 1.0)
    model.save_pretrained(folder)
    images = getattr(transformers, f"{name}ImageProcessor")(
        size={"longest_edge": 2 * tile}, max_image_size={"longest_edge": tile}
    )
    getattr(transformers, f"{name}Processor")(
        image_processor=images,
        tokenizer=tokenizer,
        **({"video_processor": transformers.SmolVLMVideoProcessor()} if name == "SmolVLM" else {}),
        image_seq_len=(tile // patch // merge) ** 2,
        chat_template=random_llava.CHAT_TEMPLATE,
    ).save_pretrained(folder)


class IdeficsOracle(Gemma3Oracle):
    """Of tiles row by row, and the whole picture behind them."""

    picture = PICTURE

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        config = self.model.config
        self.image_token = config.image_token_id
        self.merge = config.scale_factor
        self.side = config.vision_config.image_size // config.vision_config.patch_size // self.merge
        self.depth = config.vision_config.num_hidden_layers
        self._seen: dict[tuple[Any, bytes], Any] = {}

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> tuple[list[torch.Tensor], torch.Tensor]:
        key = (image.size, image.tobytes())
        if key not in self._seen:
            inputs = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
            attentions: list[torch.Tensor] = []
            hooks = [
                layer.self_attn.register_forward_hook(
                    lambda module, args, made: attentions.append(made[1])
                )
                for layer in self.model.model.vision_model.encoder.layers
            ]
            tokens = self.model.model.get_image_features(
                inputs["pixel_values"], inputs["pixel_attention_mask"]
            ).pooler_output
            for hook in hooks:
                hook.remove()
            self._seen[key] = attentions, tokens
        return self._seen[key]

    def _columns(self, image: Image.Image) -> int:
        """Tiles in a row."""
        _, _, columns = self.processor.image_processor.get_number_of_image_patches(
            image.height, image.width
        )
        return int(columns)

    def visual(self, image: Image.Image, kept: Sequence[Sequence[int]]) -> str:
        """What stands for a picture; a tile that keeps nothing has no tag."""
        *tiles, whole = kept
        text, across = "", self._columns(image)
        for number, one in enumerate(tiles):
            row, column = divmod(number, across)
            if one:
                text += f"{FAKE}<row_{row + 1}_col_{column + 1}>{PICTURE * len(one)}"
            if column == across - 1:
                text += "\n"
        text += "\n" if tiles else ""
        return text + (f"{FAKE}{WHOLE}{PICTURE * len(whole)}" if whole else "") + FAKE
