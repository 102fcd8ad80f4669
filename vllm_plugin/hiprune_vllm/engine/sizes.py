"""Pictures that a request wants scaled before they are encoded, each in its own way."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

import PIL.Image
import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from hiprune_vllm.engine.info import without_options
from hiprune_vllm.plan import FIELD, SIZES, PlanError, TokenCount


def of_processor(sizes: Mapping[str, int], frames: int) -> dict[str, object]:
    """Those sizes that the checkpoint's processor has an option for.

    It is not given by their names: vLLM would make and keep a processor for each number of pixels.

    Args:
        sizes: of a picture.
        frames: that it counts the pixels of (`FamilyAdapter.frames`).
    """
    if SIZES[0] not in sizes:
        return {}
    least, most = (sizes[name] * frames for name in SIZES)
    return {"size": {"shortest_edge": least, "longest_edge": most}}


def with_sizes(
    options: Mapping[str, object], of_image: Mapping[str, object]
) -> Mapping[str, object]:
    """A request's options for the checkpoint's processor, an image's own sizes going before."""
    if not of_image:
        return options
    return {name: value for name, value in options.items() if name not in SIZES} | {**of_image}


class SizedProcessing(BaseMultiModalProcessor):
    """Mixin: vLLM's processing with sizes (`PruningInfo.sizes`) of each picture's own."""

    pruning: Any

    @cached_property
    def unsized(self) -> Any:
        """The same without the engine's own pixels, which vLLM would prefer to a picture's size."""
        other = copy.copy(self)
        other.info = copy.copy(self.info)
        other.info.ctx = without_options(self.info.ctx, SIZES)
        return other

    def fitted(self, plain: ProcessorInputs, sizes: Sequence[Mapping[str, int]]) -> ProcessorInputs:
        """The inputs with pictures scaled down to as many tiles as they may have."""
        if not any("max_tiles" in of_image for of_image in sizes):
            return plain
        images, config = plain.mm_data_items["image"], self.info.get_hf_config()
        fitted = []
        for image, of_image in zip(images, sizes, strict=True):
            tiles = of_image.get("max_tiles")
            if tiles is not None and image is not None:
                if not isinstance(image, PIL.Image.Image):
                    raise VLLMValidationError(
                        f"{FIELD}.max_tiles must be left out with pictures that are not Pillow's, "
                        f"got {type(image).__name__}",
                        parameter=f"{FIELD}.max_tiles",
                    )
                image = self.pruning.family.fitted(config, image, tiles)  # noqa: PLW2901
            fitted.append(image)
        items = type(plain.mm_data_items)({**plain.mm_data_items, "image": type(images)(fitted)})
        return replace(plain, mm_data_items=items)

    def check_sizes(self, counts: Sequence[TokenCount], sizes: Sequence[Mapping[str, int]]) -> None:
        """Refuses an image that rounding up has made larger than any that memory was measured with.

        Raises:
            PlanError: naming `min_pixels`, which alone rounds up.
        """
        if not any(SIZES[0] in of_image for of_image in sizes):
            return
        largest = self.info.get_max_image_tokens()
        for count, of_image in zip(counts, sizes, strict=True):
            if "min_pixels" in of_image and count.full > largest:
                raise PlanError(
                    f"{FIELD}.min_pixels",
                    f"must be less: {of_image['min_pixels']} pixels come to {count.full} tokens "
                    f"of a picture of this shape, of {largest} that one may have",
                )

    def scaled(
        self, mm_items: Any, options: Mapping[str, object], sizes: Sequence[Mapping[str, object]]
    ) -> Any:
        """vLLM's own, with options of each image's own: alike neighbours together."""
        images = mm_items["image"]
        others = {kind: items for kind, items in mm_items.items() if kind != "image"}
        found = []
        for of_images, numbers in groupby(range(len(images)), key=lambda i: sizes[i]):
            some = self.info.parse_mm_data({"image": [images[i] for i in numbers]}, validate=False)
            of_vllm: Any = super(SizedProcessing, self.unsized if of_images else self)
            asked = with_sizes(options, of_images)
            found.append(of_vllm._apply_hf_processor_main(mm_items=some, hf_kwargs=asked))
        processed = found[0]
        for name, of_field in self._get_mm_fields_config(processed, options).items():
            if of_field.modality == "image" and name in processed:
                processed[name] = torch.cat([one[name] for one in found])
        if others:
            others = type(mm_items)(others)
            processed.update(super()._apply_hf_processor_main(mm_items=others, hf_kwargs=options))
        return processed
