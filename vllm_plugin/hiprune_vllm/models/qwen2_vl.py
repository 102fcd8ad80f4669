"""Qwen2-VL: pictures of any size, 2x2 merge, 3-D rotary positions; what its successors share."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from vllm.exceptions import VLLMValidationError

from hiprune_vllm.models.base import (
    Batch,
    Colour,
    FamilyAdapter,
    Grid,
    Shape,
    Tower,
    View,
    object_layer_of,
    shown,
)
from hiprune_vllm.models.images import Part, frames_of
from hiprune_vllm.plan import About, Encoder, TokenCount

OF_MERGING = "half the depth: a default, not a finding"
"""Default object layer of towers whose patches are merged."""

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


class Qwen2VLAdapter(FamilyAdapter):
    """`Qwen2VLForConditionalGeneration`; a video is a row of slices, two frames each.

    Attributes:
        name: of the family.
        careful_ratio: see `Encoder`.
    """

    mrope = True
    videos = True
    about = About(token="2 x 2 patches, 28 x 28 pixels of the scaled picture", layer=OF_MERGING)
    name: ClassVar[str] = "qwen2_vl"
    careful_ratio: ClassVar[float | None] = None

    def encoder(self, hf_config: Any) -> Encoder:
        depth = hf_config.vision_config.depth
        object_layer = object_layer_of(depth, depth, merging=True)
        return Encoder(
            self.name,
            depth,
            object_layer,
            has_cls=False,
            careful_ratio=self.careful_ratio,
            free_sizes=True,
        )

    def pixels(self, info: Any) -> tuple[int, int]:
        of_images = info._merge_and_resolve_mm_processor_kwargs({}).get("images_kwargs", {})
        size = info._get_vision_size(of_images, default_size=info.get_image_processor().size)
        return int(size["shortest_edge"]), int(size["longest_edge"])

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

    def grids(self, hf_config: Any, shape: Shape) -> list[Grid]:
        """A picture has one, a video one for each slice; its shape ends with their times."""
        merge = hf_config.vision_config.spatial_merge_size
        _, rows, columns, *times = shape
        grid = Grid(rows // merge, columns // merge)
        return [grid._replace(time=time) for time in times] or [grid]

    def tower(self, model: Any) -> Tower:
        visual = model.visual
        return Tower(
            visual.blocks,
            attention="attn.attn",
            qkv="attn.qkv",
            heads=visual.num_heads,
            packed=True,
            merge=visual.spatial_merge_size,
            raster=False,
            by_row=("rotary_pos_emb_cos", "rotary_pos_emb_sin"),
        )

    def video_tokens(self, info: Any, videos: Any, index: int) -> int:
        frames, processor = frames_of(videos.get(index)), info.get_hf_processor().video_processor
        alone = type(videos)([frames])
        size = alone.get_frame_size(0)
        patches = processor.get_num_of_video_patches(len(frames), size.height, size.width, {})
        return int(patches) // int(info.get_hf_config().vision_config.spatial_merge_size) ** 2

    def video_slices(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor]
    ) -> list[tuple[int, int]]:
        merge = hf_config.vision_config.spatial_merge_size
        return [
            (slices, rows // merge * (columns // merge))
            for slices, rows, columns in inputs["video_grid_thw"].tolist()
        ]

    def batch(self, model: Any, **kwargs: object) -> Batch:
        if "video_grid_thw" in kwargs:
            inputs = model._parse_and_validate_video_input(**kwargs)
            grids = inputs["video_grid_thw"].tolist()
            pixels = inputs["pixel_values_videos"]
            seconds = inputs.get("second_per_grid_ts")
            seconds = [1.0] * len(grids) if seconds is None else seconds.flatten().tolist()
            pace = getattr(model.config.vision_config, "tokens_per_second", 1.0)
            # As vLLM numbers them (`iter_mm_grid_thw`).
            times = [
                [int(i * (second * pace)) for i in range(grid[0])]
                for grid, second in zip(grids, seconds, strict=True)
            ]
        else:
            inputs = model._parse_and_validate_image_input(**kwargs)
            grids, pixels = inputs["image_grid_thw"].tolist(), inputs["pixel_values"]
            times = [[] for _ in grids]
        shapes = [(*grid, *later) for grid, later in zip(grids, times, strict=True)]
        return Batch(pixels.split([prod(grid) for grid in grids]), shapes)

    def laid_out(self, model: Any, batch: Batch) -> Batch:
        metadata = model.visual.prepare_encoder_metadata(_grids(batch))
        return batch._replace(metadata=metadata)

    def forward(self, model: Any, batch: Batch, parts: Sequence[Sequence[Part]]) -> torch.Tensor:
        embeddings: torch.Tensor = model.visual(
            torch.cat(list(batch.pixels)), grid_thw=_grids(batch), encoder_metadata=batch.metadata
        )
        return embeddings

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


def _grids(batch: Batch) -> list[list[int]]:
    """Slices, rows and columns of patches of each picture or video."""
    return [list(shape[:3]) for shape in batch.shapes]
