"""The oracle for LLaVA-NeXT: Hugging Face's tower tile by tile, merged with plain loops."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from tests.reference import paper
from tests.reference.text import TextOracle


def shares(total: int, caps: list[int]) -> list[int]:
    """One token after the other to the tile that has least of its equal part, none beyond caps."""
    found = [0] * len(caps)
    for _ in range(total):
        roomy = [i for i in range(len(caps)) if found[i] < caps[i]]
        found[min(roomy, key=lambda i: (found[i], i))] += 1
    return found


class LlavaNextOracle(TextOracle):
    """Also for features of several layers, of a tower with or without a CLS token."""

    def __init__(self, path: Path) -> None:
        self.model = LlavaNextForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        config, vision = self.model.config, self.model.config.vision_config
        self.side = vision.image_size
        self.columns = vision.image_size // vision.patch_size
        self.has_cls = vision.model_type == "clip_vision_model"
        layers = config.vision_feature_layer
        self.layers = [layers] if isinstance(layers, int) else list(layers)
        self.output_layer = vision.num_hidden_layers + max(self.layers) + 1
        self._seen: dict[tuple[Any, bytes], Any] = {}

    def inputs(self, image: Image.Image) -> Any:
        return self.processor.image_processor(image.convert("RGB"), return_tensors="pt")

    def grid(self, image: Image.Image) -> tuple[int, int]:
        rows, columns = get_anyres_image_grid_shape(
            (image.height, image.width), self.model.config.image_grid_pinpoints, self.side
        )
        return int(rows), int(columns)

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> Any:
        key = (image.size, image.tobytes())
        if key not in self._seen:
            rows, columns = self.grid(image)
            tiles = self.inputs(image)["pixel_values"][0][: 1 + rows * columns]
            self._seen[key] = self.model.model.vision_tower(
                tiles, output_attentions=True, output_hidden_states=True
            )
        return self._seen[key]

    def allowed(self, image: Image.Image) -> list[list[int]]:
        """Indices in every tile that show the picture, found with the model's own unpadding."""
        side = self.columns
        rows, columns = self.grid(image)
        places = torch.arange(rows * side * columns * side).view(1, rows * side, columns * side)
        shown = set(unpad_image(places, (image.height, image.width)).flatten().tolist())
        tiles = [list(range(side * side))]
        for row in range(rows):
            for column in range(columns):
                tiles.append(
                    [
                        r * side + c
                        for r in range(side)
                        for c in range(side)
                        if (row * side + r) * columns * side + column * side + c in shown
                    ]
                )
        return tiles

    def keep(
        self,
        image: Image.Image,
        *,
        tokens: int,
        alpha: float = 0.1,
        buffer: str = "cross",
        score: str = "global",
        object_layer: int = 3,
    ) -> list[list[int]]:
        """Kept indices of every tile, the base tile first."""
        attentions = self._encode(image).attentions
        allowed = self.allowed(image)
        kept = []
        for tile, share in enumerate(shares(tokens, [len(tile) for tile in allowed])):
            of_layers = [
                paper.scores(
                    attentions[layer - 1][tile], has_cls=self.has_cls, cls_only=score == "cls"
                )
                for layer in (object_layer, self.output_layer)
            ]
            kept.append(
                paper.select(
                    *of_layers,
                    keep=share,
                    alpha=alpha,
                    columns=self.columns,
                    buffer=buffer,
                    allowed=allowed[tile],
                )
            )
        return kept

    @torch.inference_mode()
    def embeddings(self, image: Image.Image, kept: list[list[int]]) -> torch.Tensor:
        """Kept tokens behind the projector: the base tile's, then row by row over the picture."""
        states = self._encode(image).hidden_states
        hidden = torch.cat([states[layer] for layer in self.layers], dim=-1)
        side, (_, columns) = self.columns, self.grid(image)
        places = []
        for tile, indices in enumerate(kept):
            row, column = divmod(tile - 1, columns)
            for index in indices:
                r, c = divmod(index, side)
                where = (0, r, c) if tile == 0 else (1, row * side + r, column * side + c)
                places.append((where, tile, index))
        features = torch.stack(
            [hidden[tile, self.has_cls + index] for _, tile, index in sorted(places)]
        )
        projected: torch.Tensor = self.model.model.multi_modal_projector(features)
        return projected

    @torch.inference_mode()
    def unpruned(self, image: Image.Image) -> torch.Tensor:
        """What the model itself makes of the picture, newlines included."""
        inputs = self.inputs(image)
        features = self.model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], return_dict=True
        )
        packed: torch.Tensor = features.pooler_output[0]
        return packed
