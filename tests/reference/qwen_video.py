"""The oracle for videos in Qwen2-VL and Qwen2.5-VL: each slice as a picture of its own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.vision_utils import get_vision_window_index

from tests.reference import paper
from tests.reference.qwen import QwenOracle, queries_and_keys


class Clip(NamedTuple):
    """What the vision encoder makes of a video.

    Attributes:
        scores: by layer (from 1) and slice, one number a token, in picture order.
        features: (tokens, width), merged, slice after slice.
        grid: slices, and rows and columns of tokens of each.
    """

    scores: list[list[list[float]]]
    features: torch.Tensor
    grid: tuple[int, int, int]


class VideoOracle:
    """Of a picture's oracle, whose model it asks."""

    def __init__(self, of_pictures: QwenOracle) -> None:
        self.model, self.processor = of_pictures.model, of_pictures.processor
        self.depth, self.object_layer = of_pictures.depth, of_pictures.object_layer

    @torch.inference_mode()
    def encode(self, frames: Any) -> Clip:
        """`frames`: (frames, height, width, 3) uint8."""
        visual, vision = self.model.model.visual, self.model.config.vision_config
        inputs = self.processor.video_processor(
            [frames], return_tensors="pt", do_sample_frames=False
        )
        grid = inputs["video_grid_thw"]
        slices, rows, columns = (int(side) for side in grid[0])
        patches = rows * columns
        seen: list[list[list[float]]] = []

        def of_slices(module: Any, args: Any, kwargs: Any) -> None:
            query, key = queries_and_keys(module, args, kwargs)
            found = []
            for start in range(0, slices * patches, patches):
                here = slice(start, start + patches)
                full = paper.attention(query[:, here], key[:, here])
                found.append(paper.scores(full, has_cls=False))
            seen.append(found)

        hooks = [
            block.attn.register_forward_pre_hook(of_slices, with_kwargs=True)
            for block in visual.blocks
        ]
        pixels = inputs["pixel_values_videos"].to(self.model.dtype)
        features = visual(pixels, grid_thw=grid, return_dict=True).pooler_output
        for hook in hooks:
            hook.remove()
        order = list(range(patches // 4))
        if hasattr(vision, "window_size"):
            one = torch.tensor([[1, rows, columns]])
            index, _ = get_vision_window_index(
                one, vision.spatial_merge_size, vision.window_size, vision.patch_size
            )
            order = index.tolist()
        scores = []
        for of_layer in seen:
            scores.append([])
            for of_patches in of_layer:
                tokens = [0.0] * len(order)
                for place, original in enumerate(order):
                    tokens[original] = sum(of_patches[4 * place : 4 * place + 4]) / 4
                scores[-1].append(tokens)
        return Clip(scores, features, (slices, rows // 2, columns // 2))

    def keep(
        self,
        clip: Clip,
        keep: int,
        *,
        alpha: float = 0.1,
        buffer: str = "cross",
        object_layer: int | None = None,
    ) -> list[list[int]]:
        """Kept indices of every slice that keeps some; shares as even as whole numbers can be."""
        slices, _, columns = clip.grid
        ends = [int(i * keep / slices + 0.5) for i in range(slices + 1)]
        return [
            paper.select(
                clip.scores[(object_layer or self.object_layer) - 1][i],
                clip.scores[self.depth - 1][i],
                keep=ends[i + 1] - ends[i],
                alpha=alpha,
                columns=columns,
                buffer=buffer,
            )
            if ends[i + 1] > ends[i]
            else []
            for i in range(slices)
        ]

    @torch.inference_mode()
    def logprobs(
        self,
        before: str,
        after: str,
        clip: Clip,
        kept: Sequence[Sequence[int]],
        seconds: float,
        answer: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Before every token of `answer`, (len(answer), vocabulary); positions, (3, prompt)."""
        tokenizer, config = self.processor.tokenizer, self.model.config
        head, tail = (tokenizer.encode(text, add_special_tokens=False) for text in (before, after))
        slices, rows, columns = clip.grid
        pace = seconds * getattr(config.vision_config, "tokens_per_second", 1.0)
        start, places, indices = len(head), [], []
        for i, of_slice in enumerate(kept):
            for index in of_slice:
                row, column = divmod(index, columns)
                places.append([start + int(i * pace), start + row, start + column])
                indices.append(i * rows * columns + index)
        behind = 1 + start + max(int((slices - 1) * pace), rows - 1, columns - 1)
        text = torch.arange(len(tail) + len(answer)) + behind
        positions = torch.cat(
            [torch.arange(start).expand(3, -1), torch.tensor(places).T, text.expand(3, -1)], dim=1
        )
        embed = self.model.get_input_embeddings()
        embeds = torch.cat(
            [
                embed(torch.tensor(head)),
                clip.features[indices],
                embed(torch.tensor([*tail, *answer])),
            ]
        )
        hidden = self.model.model.language_model(
            inputs_embeds=embeds[None], position_ids=positions[:, None]
        ).last_hidden_state[0]
        logits = self.model.lm_head(hidden[-len(answer) - 1 : -1])
        return torch.log_softmax(logits.double(), dim=-1), positions[:, : -len(answer)]
