"""Gemma 3: a small checkpoint with random weights, and the oracle, whose text model is causal.

Real ones let tokens of one picture see each other both ways; vLLM's CPU engine does not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from tests.reference import paper, random_llava
from tests.reference.checkpoints import SMALL_TOWER, small_text
from tests.reference.llava_next import shares

SPECIAL_TOKENS: Final = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
NEWLINES: Final = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")
PICTURE: Final = "<start_of_image>"
SIDE, MERGE = 8, 4  # tokens a side of a crop, patches a side of a token


def a_tokenizer() -> Any:
    tokenizer = random_llava.byte_tokenizer(
        SPECIAL_TOKENS,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    tokenizer.add_tokens(list(NEWLINES))
    return tokenizer


def build(folder: Path, *, seed: int = 6) -> None:
    """Crops of 448 pixels instead of 896, so that the oracle's attention has its size."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
    )

    tokenizer = a_tokenizer()
    pixels = SIDE * MERGE * SMALL_TOWER["patch_size"]
    config = Gemma3Config(
        text_config={
            **small_text(tokenizer),
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 512,  # vLLM finds no prefix whose window it has not kept
        },
        vision_config={**SMALL_TOWER, "image_size": pixels, "vision_use_head": False},
        mm_tokens_per_image=SIDE**2,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma3ForConditionalGeneration(config)
        random_llava.spread_weights(model, tokenizer)
        with torch.no_grad():
            # Word embeddings are scaled up by the root of the width, those of pictures are not.
            model.get_input_embeddings().weight.mul_(config.text_config.hidden_size**-0.5)
            for name, weight in model.named_parameters():
                if name.endswith("position_embedding.weight"):
                    weight.normal_(0.0, 1.0)
    model.save_pretrained(folder)
    random_llava.rename_tower_weights(folder / "model.safetensors")
    Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": pixels, "width": pixels}),
        tokenizer=tokenizer,
        image_seq_length=SIDE**2,
        chat_template=random_llava.CHAT_TEMPLATE.replace("<s>", "<bos>").replace(
            "<image>", PICTURE
        ),
    ).save_pretrained(folder)


class Gemma3Oracle:
    """Subclasses have other tiles.

    Attributes:
        side: tokens a side of a crop.
        merge: patches a side of a token.
        picture: what stands for an image in a prompt.
    """

    side, merge, picture = SIDE, MERGE, PICTURE

    def __init__(self, path: Path, *, crops: bool) -> None:
        from transformers import AutoProcessor, Gemma3ForConditionalGeneration

        self.model = Gemma3ForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.crops = crops
        self.image_token = self.model.config.image_token_index
        self.depth = self.model.config.vision_config.num_hidden_layers
        self._seen: dict[tuple[Any, bytes], Any] = {}

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Attention of every block, (crops, H, T, T), and tokens, (crops, tokens, width)."""
        key = (image.size, image.tobytes())
        if key not in self._seen:
            inputs = self.processor(
                text=PICTURE,
                images=image.convert("RGB"),
                return_tensors="pt",
                do_pan_and_scan=self.crops,
            )
            seen = self.model.model.vision_tower(
                pixel_values=inputs["pixel_values"], output_attentions=True, return_dict=True
            )
            tokens = self.model.model.multi_modal_projector(seen.last_hidden_state)
            self._seen[key] = list(seen.attentions), tokens
        return self._seen[key]

    def count(self, image: Image.Image) -> int:
        return len(self._encode(image)[1]) * self.side**2

    def allowed(self, image: Image.Image) -> list[list[int]]:
        return [list(range(self.side**2))] * len(self._encode(image)[1])

    def scores(self, image: Image.Image, layer: int, crop: int) -> list[float]:
        """Mean over the sixteen patches of a token."""
        attentions, _ = self._encode(image)
        patches = paper.scores(attentions[layer - 1][crop], has_cls=False)
        side, merge = self.side, self.merge
        width = side * merge
        found = []
        for row in range(side):
            for column in range(side):
                inside = [
                    patches[(row * merge + r) * width + column * merge + c]
                    for r in range(merge)
                    for c in range(merge)
                ]
                found.append(sum(inside) / len(inside))
        return found

    def keep(
        self,
        image: Image.Image,
        *,
        tokens: int | None = None,
        ratio: float | None = None,
        alpha: float = 0.1,
        buffer: str = "cross",
        object_layer: int | None = None,
    ) -> list[list[int]]:
        """Kept indices of the picture and of every crop."""
        total = tokens or max(1, round((ratio or 1.0) * self.count(image)))
        allowed = self.allowed(image)
        return [
            paper.select(
                self.scores(image, object_layer or self.depth // 2, crop),
                self.scores(image, self.depth, crop),
                keep=share,
                alpha=alpha,
                columns=self.side,
                buffer=buffer,
            )
            for crop, share in enumerate(shares(total, [len(one) for one in allowed]))
        ]

    def visual(self, image: Image.Image, kept: Sequence[Sequence[int]]) -> str:
        """What stands for a picture; a crop that keeps nothing has no frame."""
        token = "<image_soft_token>"
        frames = [
            f"\n\n<start_of_image>{token * len(one)}<end_of_image>\n\n" if one else ""
            for one in kept
        ]
        if len(frames) == 1:
            return frames[0]
        return (
            f"Here is the original image {frames[0]} and here are some crops to help you see "
            f"better {' '.join(frames[1:])}"
        )

    @torch.inference_mode()
    def logprobs(
        self,
        text: str,
        images: Sequence[Image.Image],
        kept: Sequence[Sequence[Sequence[int]] | None],
        answer: Sequence[int],
    ) -> torch.Tensor:
        """Log-probabilities before every token of `answer`, (len(answer), vocabulary)."""
        first, *pieces = text.split(self.picture)
        visual = []
        for image, of_image, piece in zip(images, kept, pieces, strict=True):
            indices = self.allowed(image) if of_image is None else of_image
            first += self.visual(image, indices) + piece
            _, tokens = self._encode(image)
            visual += [tokens[crop][list(one)] for crop, one in enumerate(indices)]
        ids = self.processor.tokenizer.encode(first, add_special_tokens=False)
        whole = torch.tensor([[*ids, *answer]])
        embeds = self.model.get_input_embeddings()(whole)
        embeds[whole == self.image_token] = torch.cat(visual)
        hidden = self.model.get_decoder()(inputs_embeds=embeds).last_hidden_state[0]
        logits = self.model.lm_head(hidden[-len(answer) - 1 : -1])
        return torch.log_softmax(logits.double(), dim=-1)
