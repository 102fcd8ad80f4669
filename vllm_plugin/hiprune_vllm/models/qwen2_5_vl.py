"""Qwen2.5-VL: pictures of any size, window attention, 2x2 merge, 3-D rotary positions."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError

from hiprune_vllm.models.base import (
    Colour,
    Encoded,
    Image,
    Part,
    Selection,
    TooShallow,
    TracedPart,
    View,
    choose,
    shown,
)
from hiprune_vllm.models.last_block import Kept, kept_only
from hiprune_vllm.plan import Encoder, TokenCount
from hiprune_vllm.pruning.budget import ImageBudget
from hiprune_vllm.pruning.positions import encode_positions, no_positions
from hiprune_vllm.pruning.record import ScoreRecorder, SumOverRanks, wanted_scores
from hiprune_vllm.pruning.select import Region
from hiprune_vllm.tuning import chosen

Grid = tuple[int, int, int]

LONGEST = 200
"""Times that a picture's longer side may be its shorter one, in the checkpoint's processor."""


def check_shape(size: Any) -> None:
    """Refuses a picture that the checkpoint's processor does not scale.

    Raises:
        VLLMValidationError: naming its size.
    """
    if max(size.width, size.height) > LONGEST * min(size.width, size.height):
        raise VLLMValidationError(
            f"image_url must not be that long and narrow: {size.width} x {size.height} pixels, of "
            f"which one is more than {LONGEST} times the other",
            parameter="image_url",
        )


class Qwen25VLAdapter:
    """`Qwen2_5_VLForConditionalGeneration`; videos stay as they are."""

    mrope = True

    def encoder(self, hf_config: Any) -> Encoder:
        depth = hf_config.vision_config.depth
        if depth < 2:
            raise TooShallow(depth // 2, depth, depth)
        return Encoder("qwen2_5_vl", depth, depth // 2, has_cls=False)

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        size = images.get_image_size(index)
        check_shape(size)
        count = info.get_num_image_tokens(
            image_width=size.width,
            image_height=size.height,
            image_processor=info.get_image_processor(**options),
            mm_kwargs=options,
        )
        return TokenCount(count, count)

    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        patches, grid = len(inputs["pixel_values"]), inputs["image_grid_thw"].tolist()
        if grid[0] != 1 or grid[1] * grid[2] != patches:
            raise RuntimeError(
                f"version drift: expected a patch for each place of the grid, got {grid}, {patches}"
            )
        return patches // int(hf_config.vision_config.spatial_merge_size) ** 2

    def embed(
        self,
        model: Any,
        images: Sequence[Image],
        sum_over_ranks: SumOverRanks | None,
        **kwargs: object,
    ) -> list[Encoded]:
        inputs = model._parse_and_validate_image_input(**kwargs)
        grids: list[Grid] = [(t, h, w) for t, h, w in inputs["image_grid_thw"].tolist()]
        pixels = inputs["pixel_values"]
        visual = model.visual
        encoder = self.encoder(model.config)
        recorder = ScoreRecorder(
            [block.attn.attn for block in visual.blocks],
            heads=visual.num_heads,
            leading_tokens=0,
            sum_over_ranks=sum_over_ranks,
            spans=_spans([t * h * w for t, h, w in grids]),
        )
        size = visual.spatial_merge_size
        parts = [
            _parts(grid, size, image.budget) for grid, image in zip(grids, images, strict=True)
        ]
        known = [image.known_of(part) for image, part in zip(images, parts, strict=True)]
        new = {i: image.budget for i, image in enumerate(images) if known[i] is None}
        traced = {
            i: (image.trace.layer, image.trace.score)
            for i, image in enumerate(images)
            if image.trace is not None
        }
        metadata = visual.prepare_encoder_metadata(grids)
        # Original token -> its place in the window order that the blocks run in. What the merger
        # gets below is in the original order already, so the tower must not undo anything.
        places = metadata["reverse_indices"]
        kept_tokens = sum(image.budget.keep for image in images)
        metadata["reverse_indices"] = torch.arange(kept_tokens, device=places.device)
        unit = visual.spatial_merge_unit
        spans = _spans([image.budget.full for image in images])
        kept: list[torch.Tensor] = []

        def select(device: torch.device) -> list[torch.Tensor]:
            """Kept tokens of every image, as places in its own window order."""
            of_images = [places[start:stop] - start for start, stop in spans]
            of_tokens = {
                (layer, score, image): values.view(-1, unit).mean(dim=1)[of_images[image]]
                for (layer, score, image), values in scores.items()
            }
            kept.extend(self._chosen(encoder, images, known, grids, size, of_tokens, device))
            return [here[index] for here, index in zip(of_images, kept, strict=True)]

        def choose_patches() -> list[Kept]:
            of_unit = torch.arange(unit, device=pixels.device)
            return [
                Kept(start * unit, stop * unit, (rows[:, None] * unit + of_unit).flatten())
                for (start, stop), rows in zip(spans, select(pixels.device), strict=True)
            ]

        def keep_only(hidden: torch.Tensor) -> torch.Tensor:
            selected = zip(spans, select(hidden.device), strict=True)
            rows = torch.cat([start + rows for (start, _), rows in selected])
            tokens = hidden.view(-1, unit, hidden.shape[-1])[rows]
            return tokens.reshape(-1, *hidden.shape[1:])

        block = visual.blocks[-1]
        if chosen("PRUNING_LAST_BLOCK") == "kept":
            whole = len(visual.blocks) - 1 in visual.fullatt_block_indexes
            shortened = kept_only(
                block,
                block.attn.qkv,
                block.attn.attn,
                choose_patches,
                within_images=whole and all(t == 1 for t, _, _ in grids),
                # Q and K were turned in the first call.
                rotary_pos_emb_cos=None,
                rotary_pos_emb_sin=None,
            )
        else:
            # Its first layer: the merger itself may be called past its hooks (compile wrapper).
            shortened = _before(visual.merger.ln_q, keep_only)
        wanted = wanted_scores(new, encoder.output_layer, traced)
        with recorder.recording(wanted) as scores, shortened:
            merged = visual(pixels, grid_thw=grids, encoder_metadata=metadata)
        encoded = []
        embeddings = merged.split([image.budget.keep for image in images])
        for i, (image, index, rows) in enumerate(zip(images, kept, embeddings, strict=True)):
            if image.budget.is_full:
                encoded.append(Encoded(torch.cat([rows, no_positions(len(rows), rows)], 1), None))
                continue
            positions = encode_positions(index, grids[i][2] // size, rows.dtype)
            selection = Selection(parts[i], (index,))
            encoded.append(Encoded(torch.cat([rows, positions], dim=1), selection))
        return encoded

    def _chosen(
        self,
        encoder: Encoder,
        images: Sequence[Image],
        known: Sequence[tuple[torch.Tensor, ...] | None],
        grids: Sequence[Grid],
        merge: int,
        scores: Mapping[tuple[int, str, int], torch.Tensor],
        device: torch.device,
    ) -> list[torch.Tensor]:
        """Kept indices of every image, known or chosen; images of one size are chosen together."""
        groups: dict[Grid, dict[int, ImageBudget]] = {}
        for i, (image, grid) in enumerate(zip(images, grids, strict=True)):
            if known[i] is None:
                groups.setdefault(grid, {})[i] = image.budget
        found: dict[int, torch.Tensor] = {}
        for grid, budgets in groups.items():
            found |= choose(
                budgets,
                scores,
                output_layer=encoder.output_layer,
                count=next(iter(budgets.values())).full,
                columns=grid[2] // merge,
                device=device,
            )
        indices = []
        for i, image in enumerate(images):
            before = known[i]
            index = found[i] if before is None else before[0]
            indices.append(index)
            if (trace := image.trace) is not None:
                at_object, at_output = (
                    scores[layer, trace.score, i] for layer in (trace.layer, encoder.output_layer)
                )
                columns = grids[i][2] // merge
                trace.parts.append(
                    TracedPart(0, image.budget, columns, None, at_object, at_output, index)
                )
        return indices

    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        """Patches come in merge blocks of 2x2, each patch with all its colours and frames."""
        vision = hf_config.vision_config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        _, rows, cols = (int(side) for side in inputs["image_grid_thw"])
        blocks = inputs["pixel_values"].view(
            rows // merge, cols // merge, merge, merge, 3, -1, patch, patch
        )[:, :, :, :, :, 0]  # a still image is the same frame twice
        pixels = blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * patch, cols * patch)
        return [View(0, 0, 0, shown(pixels, mean, std))]


def _parts(grid: Grid, merge: int, budget: ImageBudget) -> tuple[Part]:
    """A picture is one part."""
    _, rows, columns = grid
    whole = Region(0, rows // merge, 0, columns // merge)
    return (Part(0, budget.full, whole, budget.keep),)


@contextmanager
def _before(module: torch.nn.Module, change: Any) -> Iterator[None]:
    """Changes the only argument of `module` while inside."""
    handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]),))
    try:
        yield
    finally:
        handle.remove()


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop of consecutive pieces."""
    spans, start = [], 0
    for length in lengths:
        spans.append((start, start + length))
        start += length
    return spans
