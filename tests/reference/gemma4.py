"""A small Gemma 4 with real geometry and random weights, and Hugging Face's half of the oracle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from PIL import Image

from tests.reference import paper, random_llava
from tests.reference.one_grid import OneGrid

SPECIAL: Final = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}
SOFT_TOKENS = 70
"""Of the largest picture, the least that the family's processor allows."""

_SMALL: Final = {  # like E4B: each layer has inputs of its own, the last read keys of earlier ones
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    "num_key_value_heads": 1,
    "use_double_wide_mlp": True,
}
_LARGE: Final = {  # like 26B-A4B: experts, and keys that are values, too
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}


def build(
    folder: Path,
    *,
    experts: bool = False,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    seed: int = 3,
) -> None:
    """Writes a Gemma 4 checkpoint whose vision encoder has 8 blocks, without a tower for sound.

    Args:
        folder: existing folder to write into.
        experts: like the larger ones, else like the smaller.
        vision, text: changes to the configuration.
        seed: of the weights.
    """
    import transformers

    names = {name: SPECIAL[name] for name in ("pad_token", "eos_token", "bos_token")}
    tokenizer = random_llava.byte_tokenizer(
        tuple(SPECIAL.values()),
        **names,
        extra_special_tokens={name: SPECIAL[name] for name in SPECIAL if name not in names},
    )
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    config = transformers.Gemma4Config(
        text_config={
            "vocab_size": len(tokenizer),
            "vocab_size_per_layer_input": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "head_dim": 32,
            "global_head_dim": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 512,
            "final_logit_softcapping": 30.0,
            "max_position_embeddings": 16384,
            **(_LARGE if experts else _SMALL),
            **(text or {}),
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "position_embedding_size": 256,
            "default_output_length": SOFT_TOKENS,
            "use_clipped_linears": not experts,
            "standardize": experts,
            **(vision or {}),
        },
        audio_config=None,
        **{f"{name.removesuffix('_token')}_token_id": ids[name] for name in (
            "boi_token", "eoi_token", "image_token", "video_token", "boa_token", "audio_token"
        )},
        eoa_token_index=ids["eoa_token"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Gemma4ForConditionalGeneration(config)
        _spread(model, tokenizer)
    model.generation_config.max_new_tokens = random_llava.MAX_NEW_TOKENS
    model.save_pretrained(folder)
    transformers.Gemma4Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=transformers.Gemma4ImageProcessor(max_soft_tokens=SOFT_TOKENS),
        video_processor=transformers.Gemma4VideoProcessor(),
        tokenizer=tokenizer,
        chat_template=random_llava.CHAT_TEMPLATE.replace("<s>", "<bos>").replace(
            "<image>", SPECIAL["image_token"]
        ),
        image_seq_length=SOFT_TOKENS,
    ).save_pretrained(folder)


_TABLES: Final = {
    "embed_tokens_per_layer": 1.0,
    "embed_tokens": 0.03,
    "position_embedding_table": 0.5,
}
"""Standard deviation of tables, by the first of these in a weight's name."""


def _mean(norm: str) -> float:
    """Of a norm's weights, by its name."""
    if norm.endswith(("q_norm.weight", "k_norm.weight")):
        return 1.3 if "vision_tower" in norm else 0.5
    if "language_model" not in norm:
        return 1.0
    if "post_" in norm:  # layers say more than the last token does
        return 2.0
    return 4.0 if norm.endswith("language_model.norm.weight") else 1.0


def _spread(model: Any, tokenizer: Any) -> None:
    """Weights, and buffers that checkpoints bring, so that attention differs from place to place.

    Q and K are normalised, so what spreads attention is the scale of these norms. Answers are of
    the same embeddings as prompts: those of letters are the longest.
    """
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz ", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            table = next((deviation for part, deviation in _TABLES.items() if part in name), None)
            if table is not None:
                weight.normal_(0.0, table)
            elif weight.dim() >= 2:
                inputs = weight.shape[-1] if "experts" in name else weight[0].numel()
                weight.normal_(0.0, inputs**-0.5)
            else:
                weight.uniform_(0.5, 1.5).mul_(_mean(name))
        embeddings = model.get_input_embeddings().weight
        embeddings[letters] *= 4.0
        embeddings[tokenizer.eos_token_id] = 0.0
        for name, buffer in model.named_buffers():
            kind = name.rsplit(".", 1)[-1]
            if kind in ("input_min", "output_min"):
                buffer.fill_(-3.0)
            elif kind in ("input_max", "output_max"):
                buffer.fill_(3.0)
            elif kind == "std_bias":
                buffer.normal_(0.0, 0.5)
            elif kind in ("std_scale", "layer_scalar"):
                buffer.uniform_(0.5, 1.0)


class Encoding(NamedTuple):
    """What the vision encoder makes of an image.

    Attributes:
        attentions: of every block, (H, patches, patches), without padding.
        places: (x, y) of every patch.
        features: (tokens, width) as the language model gets them.
    """

    attentions: list[torch.Tensor]
    places: list[tuple[int, int]]
    features: torch.Tensor


class GemmaOracle(OneGrid):
    """Hugging Face's model.

    Attributes:
        soft_tokens: most of a picture; None for the checkpoint's own.
    """

    soft_tokens: int | None = None

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.depth = self.model.config.vision_config.num_hidden_layers
        self.object_layer = self.depth // 2
        self._seen: dict[tuple[Any, ...], Encoding] = {}

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> Encoding:
        key = (image.size, image.tobytes(), self.soft_tokens)
        if key not in self._seen:
            options = {} if self.soft_tokens is None else {"max_soft_tokens": self.soft_tokens}
            inputs = self.processor.image_processor(
                image.convert("RGB"), return_tensors="pt", **options
            )
            where = inputs["image_position_ids"]
            pixels = inputs["pixel_values"].to(self.model.dtype)
            tower = self.model.model.vision_tower
            seen = tower(pixels, pixel_position_ids=where, output_attentions=True).attentions
            real = [i for i, (x, _) in enumerate(where[0].tolist()) if x >= 0]
            features = self.model.model.get_image_features(pixels, where).pooler_output[0]
            self._seen[key] = Encoding(
                [block[0][:, real][:, :, real] for block in seen],
                [tuple(where[0, i].tolist()) for i in real],
                features,
            )
        return self._seen[key]

    def columns(self, image: Image.Image) -> int:
        """Tokens in a row."""
        side = self.model.config.vision_config.pooling_kernel_size
        return (max(x for x, _ in self._encode(image).places) + 1) // side

    def scores(self, image: Image.Image, layer: int) -> list[float]:
        """Mean over the patches that the pooler averages into a token."""
        encoding, columns = self._encode(image), self.columns(image)
        side = self.model.config.vision_config.pooling_kernel_size
        patches = paper.scores(encoding.attentions[layer - 1], has_cls=False)
        of_tokens: list[list[float]] = [[] for _ in range(self.count(image))]
        for (x, y), score in zip(encoding.places, patches, strict=True):
            of_tokens[y // side * columns + x // side].append(score)
        assert all(len(scores) == side**2 for scores in of_tokens)
        return [sum(scores) / len(scores) for scores in of_tokens]

    def count(self, image: Image.Image) -> int:
        return len(self._encode(image).features)

    @torch.inference_mode()
    def logprobs(
        self,
        text: str,
        images: Sequence[Image.Image],
        kept: Sequence[Sequence[int]],
        answer: Sequence[int],
    ) -> torch.Tensor:
        """Log-probabilities before every token of `answer`, (len(answer), vocabulary).

        By the whole model, which puts given features in the places of image tokens; without kinds
        of tokens it is causal.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tokenizer, image_token = self.processor.tokenizer, SPECIAL["image_token"]
        features, ids = [], []
        for i, piece in enumerate(text.split(image_token)):
            ids += tokenizer.encode(piece, add_special_tokens=False)
            if i < len(images):
                features.append(self._encode(images[i]).features[list(kept[i])])
                marks = [SPECIAL["boi_token"], *[image_token] * len(kept[i]), SPECIAL["eoi_token"]]
                ids += tokenizer.convert_tokens_to_ids(marks)
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=tuple(features))}
        logits = self.model(
            input_ids=torch.tensor([[*ids, *answer]]),
            mm_encoder_outputs=encoded if features else None,
        ).logits[0]
        return torch.log_softmax(logits[-len(answer) - 1 : -1].double(), dim=-1)
