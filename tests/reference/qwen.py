"""The oracle for Qwen's families: Hugging Face eager attention over whole images, its positions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from tests.reference import paper
from tests.reference.one_grid import OneGrid


class Encoding(NamedTuple):
    """What the vision encoder makes of an image.

    Attributes:
        attentions: full attention of every block.
        features: merged, in picture order; first what the language model gets in front, then what
            is added behind each of its first layers (none but in Qwen3-VL).
        grid: (1, 3), frames, rows and columns of patches.
    """

    attentions: list[torch.Tensor]
    features: list[torch.Tensor]
    grid: torch.Tensor


class Prompt(NamedTuple):
    """A prompt with pruned images.

    Attributes:
        embeds: (1, L, width).
        positions: (3, 1, L), the model's own for the unpruned prompt, without the dropped tokens'.
        visual: (1, L), where the images' tokens are.
        levels: of all of them, what is added behind the first layers.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    levels: list[torch.Tensor]


def queries_and_keys(module: Any, args: Any, kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of an attention module that is called with these, turned, (heads, patches, width) each."""
    hidden = args[0] if args else kwargs["hidden_states"]
    cos, sin = kwargs["position_embeddings"]
    qkv = module.qkv(hidden).reshape(len(hidden), 3, module.num_heads, -1)
    query, key, _ = qkv.permute(1, 0, 2, 3).unbind(0)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    return query.transpose(0, 1), key.transpose(0, 1)


class QwenOracle(OneGrid):
    pad = "<|image_pad|>"  # what a prompt has for an image

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.depth = self.model.config.vision_config.depth
        self.object_layer = self.depth // 2
        self._seen: dict[tuple[Any, bytes], Encoding] = {}

    def inputs(self, image: Image.Image) -> Any:
        return self.processor.image_processor(image.convert("RGB"), return_tensors="pt")

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> Encoding:
        key = (image.size, image.tobytes())
        if key in self._seen:
            return self._seen[key]
        visual = self.model.model.visual
        attentions: list[torch.Tensor] = []

        def full_attention(module: Any, args: Any, kwargs: Any) -> None:
            attentions.append(paper.attention(*queries_and_keys(module, args, kwargs)))

        hooks = [
            block.attn.register_forward_pre_hook(full_attention, with_kwargs=True)
            for block in visual.blocks
        ]
        inputs = self.inputs(image)
        grid = inputs["image_grid_thw"]
        encoded = visual(
            inputs["pixel_values"].to(self.model.dtype), grid_thw=grid, return_dict=True
        )
        for hook in hooks:
            hook.remove()
        features = [encoded.pooler_output, *getattr(encoded, "deepstack_features", [])]
        self._seen[key] = Encoding(attentions, features, grid)
        return self._seen[key]

    def scores(self, image: Image.Image, layer: int) -> list[float]:
        """Mean over the four patches of a token, in picture order."""
        attentions, _, grid = self._encode(image)
        patches = paper.scores(attentions[layer - 1], has_cls=False)
        vision = self.model.config.vision_config
        if not hasattr(vision, "window_size"):
            return [sum(patches[i : i + 4]) / 4 for i in range(0, len(patches), 4)]
        window_index, _ = get_vision_window_index(
            grid, vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        found = [0.0] * len(window_index)
        for place, original in enumerate(window_index.tolist()):
            found[original] = sum(patches[4 * place : 4 * place + 4]) / 4
        return found

    def count(self, image: Image.Image) -> int:
        return int(self._encode(image).grid.prod()) // 4

    def columns(self, image: Image.Image) -> int:
        return int(self._encode(image).grid[0, 2]) // 2

    @torch.inference_mode()
    def prompt(
        self, text: str, images: Sequence[Image.Image], kept: Sequence[Sequence[int]]
    ) -> Prompt:
        """A prompt; `text` has one `pad` an image."""
        tokenizer, config = self.processor.tokenizer, self.model.config
        pieces = text.split(self.pad)
        ids, use = [], []
        features: list[list[torch.Tensor]] = []
        for i, piece in enumerate(pieces):
            new = tokenizer.encode(piece, add_special_tokens=False)
            ids += new
            use += [True] * len(new)
            if i < len(images):
                total = self.count(images[i])
                ids += [config.image_token_id] * total
                use += [index in set(kept[i]) for index in range(total)]
                features.append([each[list(kept[i])] for each in self._encode(images[i]).features])
        full = torch.tensor([ids])
        grids = torch.cat([self._encode(image).grid for image in images]) if images else None
        kinds = (full == config.image_token_id).int()
        positions, _ = self.model.model.get_rope_index(
            full, mm_token_type_ids=kinds, image_grid_thw=grids
        )
        mask = torch.tensor(use)
        short = full[:, mask]
        embeds = self.model.get_input_embeddings()(short)
        visual = short == config.image_token_id
        first, *levels = [torch.cat(of_images) for of_images in zip(*features, strict=True)] or [
            None
        ]
        if first is not None:
            embeds[visual] = first
        return Prompt(embeds, positions[:, :, mask], visual, levels)

    @torch.inference_mode()
    def logprobs(
        self,
        text: str,
        images: Sequence[Image.Image],
        kept: Sequence[Sequence[int]],
        answer: Sequence[int],
    ) -> torch.Tensor:
        """Log-probabilities before every token of `answer`, (len(answer), vocabulary)."""
        embeds, positions, visual, levels = self.prompt(text, images, kept)
        following = positions.max() + 1 + torch.arange(len(answer))
        positions = torch.cat([positions, following.expand(3, 1, -1)], dim=2)
        answer_embeds = self.model.get_input_embeddings()(torch.tensor([list(answer)]))
        deepstack = {}
        if levels:
            behind = torch.zeros(1, len(answer), dtype=torch.bool)
            deepstack = {
                "visual_pos_masks": torch.cat([visual, behind], dim=1),
                "deepstack_visual_embeds": levels,
            }
        hidden = self.model.model.language_model(
            inputs_embeds=torch.cat([embeds, answer_embeds], dim=1),
            position_ids=positions,
            **deepstack,
        ).last_hidden_state[0]
        logits = self.model.lm_head(hidden[-len(answer) - 1 : -1])
        return torch.log_softmax(logits.double(), dim=-1)
