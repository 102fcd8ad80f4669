"""LLaVA-OneVision: a small checkpoint with random weights and real grids, and the oracle."""

from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch.nn.functional import interpolate

from tests.reference import paper, random_llava
from tests.reference.checkpoints import SMALL_TOWER, small_text
from tests.reference.llava_next import shares
from tests.reference.text import TextOracle

SPECIAL_TOKENS: Final = (*random_llava.SPECIAL_TOKENS, "<video>")
SIDE, COLUMNS, LARGEST = 384, 27, 9
LAYERS: Final = (2, 3, 8)
"""Those that are scored: object layers and the output layer, 1-based."""


def build(folder: Path, *, seed: int = 9) -> None:
    """SigLIP, a Qwen2 text model, and the processor's own 36 grids of up to 6 x 6 tiles."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer = random_llava.byte_tokenizer(
        SPECIAL_TOKENS,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **{**SMALL_TOWER, "image_size": SIDE}, vision_use_head=False
        ),
        text_config=Qwen2Config(**small_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(config)
        random_llava.spread_weights(model, tokenizer)
    model.save_pretrained(folder)
    random_llava.rename_tower_weights(folder / "model.safetensors")
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(),
        video_processor=LlavaOnevisionVideoProcessor(),
        tokenizer=tokenizer,
        num_image_tokens=COLUMNS**2,
        vision_feature_select_strategy="full",
        chat_template=random_llava.CHAT_TEMPLATE,
    ).save_pretrained(folder)


class OnevisionOracle(TextOracle):
    """Hugging Face's tower and projector tile by tile; what is behind them with plain loops."""

    columns = COLUMNS

    def __init__(self, path: Path) -> None:
        from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

        self.model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self._seen: dict[tuple[Any, bytes], Any] = {}

    def grid(self, image: Image.Image) -> tuple[int, int]:
        """Rows and columns of tiles: most of the picture's pixels, then the least padding."""
        found = []
        for height, width in self.model.config.image_grid_pinpoints:
            scale = min(width / image.width, height / image.height)
            pixels = int(image.width * scale) * int(image.height * scale)
            pixels = min(pixels, image.width * image.height)
            found.append((-pixels, height * width - pixels, height // SIDE, width // SIDE))
        *_, rows, columns = min(found, key=lambda one: one[:2])
        return rows, columns

    def inside(self, image: Image.Image) -> list[tuple[int, int]]:
        """Rows and columns of the merged grid that show the picture, row by row."""
        rows, columns = (COLUMNS * side for side in self.grid(image))
        top = left = 0
        if image.width / image.height > columns / rows:
            top = (rows - int(round(image.height * (columns / image.width), 7))) // 2
        else:
            left = (columns - int(round(image.width * (rows / image.height), 7))) // 2
        return [(r, c) for r in range(top, rows - top) for c in range(left, columns - left)]

    def scaled(self, image: Image.Image) -> tuple[int, int] | None:
        """Rows and columns of tokens where there are too many; else None."""
        inside = self.inside(image)
        ratio = (len(inside) / (LARGEST * COLUMNS**2)) ** 0.5
        if ratio <= 1.1:
            return None
        height = inside[-1][0] - inside[0][0] + 1
        return int(height // ratio), int(len(inside) // height // ratio)

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> tuple[torch.Tensor, list[dict[Any, list[float]]]]:
        """Projected tokens of every tile, (tiles, 729, width), and their scores by layer."""
        key = (image.size, image.tobytes())
        if key not in self._seen:
            rows, columns = self.grid(image)
            processed = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
            tiles = processed["pixel_values"][0]
            assert len(tiles) == 1 + rows * columns
            tokens, scores = [], []
            for tile in tiles:
                seen = self.model.model.vision_tower(
                    tile[None], output_attentions=True, output_hidden_states=True
                )
                tokens.append(self.model.model.multi_modal_projector(seen.hidden_states[-1][0]))
                scores.append(
                    {
                        layer: paper.scores(seen.attentions[layer - 1][0], has_cls=False)
                        for layer in LAYERS
                    }
                )
            self._seen[key] = torch.stack(tokens), scores
        return self._seen[key]

    def _merged(self, image: Image.Image, tiles: torch.Tensor) -> torch.Tensor:
        """(tiles, 729, n) of all tiles but the base as (rows, columns, n) of what is shown."""
        _, across = self.grid(image)
        inside = self.inside(image)
        values = torch.stack(
            [
                tiles[r // COLUMNS * across + c // COLUMNS, r % COLUMNS * COLUMNS + c % COLUMNS]
                for r, c in inside
            ]
        )
        merged = values.view(inside[-1][0] - inside[0][0] + 1, -1, values.shape[-1])
        size = self.scaled(image)
        if size is None:
            return merged
        scaled = interpolate(merged.permute(2, 0, 1)[None], list(size), mode="bilinear")
        return scaled[0].permute(1, 2, 0)

    def allowed(self, image: Image.Image) -> list[list[int]]:
        """Indices in every part that show the picture: tile by tile, or of the scaled grid."""
        every = list(range(COLUMNS**2))
        size = self.scaled(image)
        if size is not None:
            return [every, list(range(size[0] * size[1]))]
        rows, columns = self.grid(image)
        tiles: list[list[int]] = [[] for _ in range(rows * columns)]
        for r, c in self.inside(image):
            tile = r // COLUMNS * columns + c // COLUMNS
            tiles[tile].append(r % COLUMNS * COLUMNS + c % COLUMNS)
        return [every, *tiles]

    def shares(self, image: Image.Image, tokens: int) -> list[int]:
        """Equal parts, of which a scaled grid has nine."""
        caps = [len(part) for part in self.allowed(image)]
        if self.scaled(image) is None:
            return shares(tokens, caps)
        base = min(caps[0], (tokens + LARGEST // 2 + 1) // (LARGEST + 1))
        rest = min(caps[1], tokens - base)
        return [tokens - rest, rest]

    def keep(
        self,
        image: Image.Image,
        *,
        tokens: int,
        alpha: float = 0.1,
        buffer: str = "cross",
        object_layer: int = LAYERS[1],
    ) -> list[list[int]]:
        """Kept indices of every part, the base tile first."""
        _, of_tiles = self._encode(image)
        size, layers = self.scaled(image), (object_layer, LAYERS[-1])
        parts = [[scores[layer] for layer in layers] for scores in of_tiles]
        columns = [COLUMNS] * len(parts)
        if size is not None:
            merged = [
                self._merged(
                    image,
                    torch.tensor([scores[layer] for scores in of_tiles[1:]]).double()[..., None],
                )
                for layer in layers
            ]
            parts = [parts[0], [of_layer.flatten().tolist() for of_layer in merged]]
            columns = [COLUMNS, size[1]]
        return [
            paper.select(
                *scores, keep=share, alpha=alpha, columns=width, buffer=buffer, allowed=inside
            )
            for scores, share, width, inside in zip(
                parts, self.shares(image, tokens), columns, self.allowed(image), strict=True
            )
        ]

    @torch.inference_mode()
    def embeddings(self, image: Image.Image, kept: list[list[int]]) -> torch.Tensor:
        """Kept tokens: the base tile's, then row by row over the picture."""
        tiles, _ = self._encode(image)
        base = tiles[0][kept[0]]
        if self.scaled(image) is not None:
            return torch.cat([base, self._merged(image, tiles[1:]).flatten(0, 1)[kept[1]]])
        _, columns = self.grid(image)
        places = []
        for tile, indices in enumerate(kept[1:]):
            row, column = divmod(tile, columns)
            for index in indices:
                r, c = divmod(index, COLUMNS)
                places.append((row * COLUMNS + r, column * COLUMNS + c, tile + 1, index))
        behind = [tiles[tile, index] for _, _, tile, index in sorted(places)]
        return torch.cat([base, torch.stack(behind)]) if behind else base

    @torch.inference_mode()
    def unpruned(self, image: Image.Image) -> torch.Tensor:
        """All of it, a newline behind each row."""
        tiles, _ = self._encode(image)
        merged = self._merged(image, tiles[1:])
        newlines = self.model.model.image_newline.expand(len(merged), 1, -1)
        return torch.cat([tiles[0], torch.cat([merged, newlines], dim=1).flatten(0, 1)])
