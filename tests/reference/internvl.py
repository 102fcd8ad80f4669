"""InternVL: small checkpoints in both layouts, and the oracle, Hugging Face's model for either."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tests.reference import paper, random_llava
from tests.reference.checkpoints import small_text
from tests.reference.llava_next import shares
from tests.reference.text import TextOracle

SPECIAL_TOKENS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|video_pad|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
)
SIDE, PATCH, MERGE, TILES = 448, 14, 2, 4
COLUMNS = SIDE // PATCH // MERGE
IMAGENET: Final = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}

CONFIGURATION: Final = '''"""A configuration as InternVL's own code has it."""

from transformers import AutoConfig, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    has_no_defaults_at_init = True

    def __init__(self, vision_config=None, llm_config=None, **options):
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = AutoConfig.for_model(**(llm_config or {"model_type": "qwen2"}))
        super().__init__(**options)
'''

_TOWER = "model.vision_tower."
OF_BLOCKS: Final = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.projection_layer",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OF_MODEL: Final = {
    "vision_model.embeddings.class_embedding": f"{_TOWER}embeddings.cls_token",
    "vision_model.embeddings.position_embedding": f"{_TOWER}embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding": f"{_TOWER}embeddings.patch_embeddings.projection",
    "mlp1.0": "model.multi_modal_projector.layer_norm",
    "mlp1.1": "model.multi_modal_projector.linear_1",
    "mlp1.3": "model.multi_modal_projector.linear_2",
    "language_model.lm_head": "lm_head",
    "language_model.model": "model.language_model",
}
"""Names of InternVL's own layout -> Hugging Face's."""


def tokenizer() -> Any:
    return random_llava.byte_tokenizer(
        SPECIAL_TOKENS,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<|video_pad|>",
        },
    )


def _config(of_text: Any) -> InternVLConfig:
    text = small_text(of_text) | {"bos_token_id": None}
    return InternVLConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 8,
            "attention_bias": True,
            "image_size": [SIDE, SIDE],
            "patch_size": [PATCH, PATCH],
        },
        text_config=Qwen2Config(**text).to_dict(),
        image_token_id=of_text.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=COLUMNS**2,
        tie_word_embeddings=False,
    )


def _model(config: InternVLConfig, of_text: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
        random_llava.spread_weights(model, of_text)
        with torch.no_grad():
            for name, weight in model.model.vision_tower.named_parameters():
                if "lambda" in name:
                    weight.uniform_(0.5, 1.0)
                elif "patch_embeddings" in name and weight.dim() > 1:
                    weight.normal_(0.0, weight[0].numel() ** -0.5)
                elif "embeddings" in name or name.endswith("bias"):
                    weight.normal_(0.0, 0.5)
    return model


def build_hf(folder: Path, *, seed: int = 3) -> None:
    """In Hugging Face's layout."""
    of_text = tokenizer()
    config = _config(of_text)
    _model(config, of_text, seed).save_pretrained(folder)
    template = random_llava.CHAT_TEMPLATE.replace("<s>", "").replace("<image>", "<IMG_CONTEXT>")
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size={"height": SIDE, "width": SIDE}, max_patches=TILES, **IMAGENET
        ),
        video_processor=InternVLVideoProcessor(size={"height": SIDE, "width": SIDE}, **IMAGENET),
        tokenizer=of_text,
        image_seq_length=COLUMNS**2,
        chat_template=template,
    ).save_pretrained(folder)


def build_chat(folder: Path, *, seed: int = 3, **changes: Any) -> None:
    """In the layout of InternVL's own code, which vLLM reads the configuration with.

    `changes` are to its configuration.
    """
    of_text = tokenizer()
    config = _config(of_text)
    weights = _model(config, of_text, seed).state_dict()
    names = {theirs: ours for ours, theirs in OF_MODEL.items()}
    renamed: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        _, found, rest = name.partition(f"{_TOWER}encoder.layer.")
        if not found:
            start = max((old for old in names if name.startswith(old)), key=len)
            renamed[names[start] + name[len(start) :]] = weight
            continue
        number, _, rest = rest.partition(".")
        block = f"vision_model.encoder.layers.{number}"
        kind = rest.rpartition(".")[2]
        if ".q_proj." in rest:
            made = [weights[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            renamed[f"{block}.attn.qkv.{kind}"] = torch.cat(made)
        elif "_proj." not in rest:
            (ours, theirs) = next(pair for pair in OF_BLOCKS.items() if rest.startswith(pair[1]))
            renamed[f"{block}.{ours}{rest[len(theirs) :]}"] = weight
    save_file(
        {name: weight.contiguous() for name, weight in renamed.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    vision, text = config.vision_config, config.text_config.to_dict()
    told = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers,
            "image_size": SIDE,
            "patch_size": PATCH,
            "num_channels": 3,
            "qkv_bias": True,
            "qk_normalization": False,
            "norm_type": "layer_norm",
            "layer_norm_eps": vision.layer_norm_eps,
            "hidden_act": "gelu",
            "initializer_factor": 1.0,
        },
        "llm_config": text | {"architectures": ["Qwen2ForCausalLM"]},
        "select_layer": -1,
        "force_image_size": SIDE,
        "downsample_ratio": 1 / MERGE,
        "ps_version": "v2",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": TILES,
        "template": "internvl2_5",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(told | changes))
    (folder / "configuration_internvl_chat.py").write_text(CONFIGURATION)
    of_text.chat_template = random_llava.CHAT_TEMPLATE.replace("<s>", "")
    of_text.save_pretrained(folder)


class InternVLOracle(TextOracle):
    """Hugging Face's model with eager attention; a checkpoint of either layout."""

    columns = COLUMNS
    object_layer, output_layer = 4, 8

    def __init__(self, path: Path) -> None:
        self.of_text = PreTrainedTokenizerFast.from_pretrained(path)
        self.own = not (path / "configuration_internvl_chat.py").exists()
        eager = {"dtype": torch.float32, "attn_implementation": "eager"}
        if self.own:
            self.model = InternVLForConditionalGeneration.from_pretrained(path, **eager)
        else:
            config = _config(self.of_text)
            self.model = InternVLForConditionalGeneration._from_config(config, **eager)
            self.model.load_state_dict(_as_hf(load_file(path / "model.safetensors")))
        self.model.eval()
        self.processor = self
        self.tokenizer = self.of_text
        self._seen: dict[Any, Any] = {}

    def tiles(self, image: Image.Image) -> torch.Tensor:
        """(tiles, 3, 448, 448), by the processor that the layout comes with."""
        picture = image.convert("RGB")
        if self.own:
            processor = GotOcr2ImageProcessor(
                size={"height": SIDE, "width": SIDE}, max_patches=TILES, **IMAGENET
            )
            found: torch.Tensor = processor(picture, crop_to_patches=True, return_tensors="pt")[
                "pixel_values"
            ]
            return found
        return _cut(picture)

    def count(self, image: Image.Image) -> int:
        return len(self._encode(image)[0]) * COLUMNS**2

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> Any:
        """Features of all patches, and scores of all tokens by tile, layer and kind."""
        key = (image.size, image.tobytes())
        if key not in self._seen:
            features, scores = [], []
            for tile in self.tiles(image):
                seen = self.model.model.vision_tower(tile[None], output_attentions=True)
                features.append(seen.last_hidden_state[0, 1:])
                scores.append(
                    {
                        (layer, cls_only): _of_tokens(
                            paper.scores(attention[0], has_cls=True, cls_only=cls_only)
                        )
                        for layer, attention in enumerate(seen.attentions, start=1)
                        for cls_only in (False, True)
                        if layer in (2, self.object_layer, self.output_layer)
                    }
                )
            self._seen[key] = torch.stack(features), scores
        return self._seen[key]

    def keep(
        self,
        image: Image.Image,
        *,
        tokens: int,
        alpha: float = 0.1,
        buffer: str = "cross",
        score: str = "global",
        object_layer: int = object_layer,
    ) -> list[list[int]]:
        """Kept indices of every tile."""
        _, scores = self._encode(image)
        cls_only = score == "cls"
        return [
            paper.select(
                of_tile[object_layer, cls_only],
                of_tile[self.output_layer, cls_only],
                keep=share,
                alpha=alpha,
                columns=COLUMNS,
                buffer=buffer,
            )
            for of_tile, share in zip(
                scores, shares(tokens, [COLUMNS**2] * len(scores)), strict=True
            )
        ]

    @torch.inference_mode()
    def embeddings(self, image: Image.Image, kept: Sequence[Sequence[int]] | None) -> torch.Tensor:
        """Of all tiles one after another, by the model's own pixel shuffle and projector."""
        features, _ = self._encode(image)
        side = SIDE // PATCH
        shuffled = self.model.model.pixel_shuffle(
            features.view(len(features), side, side, -1), scale_factor=1 / MERGE
        ).flatten(1, 2)
        chosen = shuffled.flatten(0, 1)
        if kept is not None:
            chosen = torch.cat([tile[list(of)] for tile, of in zip(shuffled, kept, strict=True)])
        projected: torch.Tensor = self.model.model.multi_modal_projector(chosen)
        return projected

    def logprobs(
        self, prompt: str, visual: Sequence[torch.Tensor], answer: Sequence[int]
    ) -> torch.Tensor:
        place = "<IMG_CONTEXT>" if self.own else "<image>"
        return super().logprobs(prompt.replace(place, "<img><image></img>"), visual, answer)


def _of_tokens(scores: Sequence[float]) -> list[float]:
    """The mean over the patches of a token."""
    side = SIDE // PATCH
    return [
        sum(scores[(2 * row + r) * side + 2 * column + c] for r in (0, 1) for c in (0, 1)) / 4
        for row in range(COLUMNS)
        for column in range(COLUMNS)
    ]


def _as_hf(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of InternVL's own layout in Hugging Face's."""
    found = {}
    for name, weight in weights.items():
        _, of_block, rest = name.partition("vision_model.encoder.layers.")
        if not of_block:
            (start,) = [old for old in OF_MODEL if name.startswith(old)]
            found[OF_MODEL[start] + name[len(start) :]] = weight
            continue
        number, _, rest = rest.partition(".")
        block = f"{_TOWER}encoder.layer.{number}"
        if rest.startswith("attn.qkv"):
            for one, part in zip("qkv", weight.chunk(3), strict=True):
                found[f"{block}.attention.{one}_proj{rest[len('attn.qkv') :]}"] = part
            continue
        (start,) = [old for old in OF_BLOCKS if rest.startswith(old)]
        found[f"{block}.{OF_BLOCKS[start]}{rest[len(start) :]}"] = weight
    return found


def _cut(picture: Image.Image) -> torch.Tensor:
    """What InternVL's own code does: the grid of the closest shape, scaled, cut, a thumbnail."""
    grids = sorted(
        ((w, h) for w in range(1, TILES + 1) for h in range(1, TILES + 1) if w * h <= TILES),
        key=lambda grid: grid[0] * grid[1],
    )
    best, least = (1, 1), float("inf")
    for width, height in grids:
        away = abs(picture.width / picture.height - width / height)
        large = picture.width * picture.height > SIDE**2 * width * height / 2
        if away < least or (away == least and large):
            best, least = (width, height), away
    scaled = picture.resize((best[0] * SIDE, best[1] * SIDE), Image.Resampling.BICUBIC)
    tiles = [
        scaled.crop((col * SIDE, row * SIDE, (col + 1) * SIDE, (row + 1) * SIDE))
        for row in range(best[1])
        for col in range(best[0])
    ]
    if len(tiles) > 1:
        tiles.append(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    mean, std = (torch.tensor(IMAGENET[name]).view(3, 1, 1) for name in IMAGENET)
    values = [
        torch.frombuffer(bytearray(tile.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)
        for tile in tiles
    ]
    return torch.stack([(one.permute(2, 0, 1).float() / 255 - mean) / std for one in values])
