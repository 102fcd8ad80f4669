"""The processor of a small Kimi-VL: published checkpoints bring theirs as code, and so does it."""

import math
from typing import ClassVar

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

SIDE = 512


class KimiVLImageProcessor(BaseImageProcessor):
    """Pictures as patches, row by row, with black at the right and below up to whole tokens."""

    model_input_names: ClassVar = ["pixel_values", "image_grid_hws"]

    def __init__(
        self,
        patch_size=14,
        in_token_limit=4096,
        merge_kernel_size=(2, 2),
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.in_token_limit = in_token_limit
        self.merge_kernel_size = merge_kernel_size
        self.image_mean, self.image_std = image_mean, image_std

    def _patches(self, image):
        patch = self.patch_size
        count = (image.width // patch) * (image.height // patch)
        if count > self.in_token_limit:
            scale = math.sqrt(self.in_token_limit / count)
            image = image.resize((int(image.width * scale), int(image.height * scale)), 3)
        unit = (patch * self.merge_kernel_size[0], patch * self.merge_kernel_size[1])
        rows, columns = (
            -(-side // one) * one // patch
            for side, one in zip((image.height, image.width), unit, strict=True)
        )
        if max(rows, columns) >= SIDE:
            raise ValueError("more patches on a side than there are positions for")
        padded = np.zeros((rows * patch, columns * patch, 3), dtype=np.float32)
        padded[: image.height, : image.width] = np.asarray(image, dtype=np.float32) / 255
        normal = (padded - np.float32(self.image_mean)) / np.float32(self.image_std)
        cut = torch.from_numpy(normal).view(rows, patch, columns, patch, 3)
        return cut.permute(0, 2, 4, 1, 3).flatten(0, 1), (rows, columns)

    def preprocess(self, images, return_tensors=None, **kwargs):
        images = images if isinstance(images, list) else [images]
        found = [self._patches(image.convert("RGB")) for image in images]
        pixels = torch.cat([patches for patches, _ in found])
        grids = torch.tensor([grid for _, grid in found])
        return BatchFeature({"pixel_values": pixels, "image_grid_hws": grids}, return_tensors)


class KimiVLProcessor(ProcessorMixin):
    """A picture's token as often as the picture has tokens."""

    attributes: ClassVar = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = "<|media_pad|>"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, return_tensors=None, **kwargs):
        texts = [text] if isinstance(text, str) else list(text)
        of_images = {}
        if images is not None:
            of_images = self.image_processor(images, return_tensors=return_tensors)
            down, across = self.image_processor.merge_kernel_size
            counts = (of_images["image_grid_hws"].prod(-1) // (down * across)).tolist()
            pieces = texts[0].split(self.image_token)
            texts = [
                "".join(
                    piece + self.image_token * count
                    for piece, count in zip(pieces, [*counts, 0], strict=True)
                )
            ]
        return BatchFeature({**self.tokenizer(texts), **of_images}, return_tensors)
