"""GLM-4.1V, GLM-4.5V and GLM-4.6V: pictures of any size, 2x2 convolution, 3-D rotary positions."""

from collections.abc import Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError

from hiprune_vllm.models.qwen2_vl import OF_MERGING, Qwen2VLAdapter, check_shape
from hiprune_vllm.plan import About, TokenCount


class Glm4vAdapter(Qwen2VLAdapter):
    """`Glm4vForConditionalGeneration` and its mixture of experts; videos stay as they are."""

    name = "glm4v"
    videos = False
    frames = 2
    about = About(
        token="2 x 2 patches, 28 x 28 pixels of the scaled picture",
        layer=OF_MERGING,
    )

    def pixels(self, info: Any) -> tuple[int, int]:
        size = self._size(info, {})
        return size[0] // self.frames, size[1] // self.frames

    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        """As the checkpoint's processor counts.

        vLLM's own count has not its least size, and knows nothing of a request's options.
        """
        size = images.get_image_size(index)
        check_shape(size)
        processor = info.get_image_processor(**options)
        least, most = self._size(info, options)
        try:
            patches = processor.get_number_of_image_patches(
                size.height, size.width, {"size": {"shortest_edge": least, "longest_edge": most}}
            )
        except ValueError as error:  # at the very limit of `check_shape` it rounds before it looks
            raise VLLMValidationError(
                f"image_url must not be that long and narrow: {size.width} x {size.height} pixels "
                f"({error})",
                parameter="image_url",
            ) from error
        count = patches // int(processor.merge_size) ** 2
        return TokenCount(count, count)

    def _size(self, info: Any, options: Mapping[str, object]) -> tuple[int, int]:
        """Least and most pixels of both frames."""
        resolved = info._merge_and_resolve_mm_processor_kwargs(options)
        size = dict(info.get_image_processor().size)
        size |= resolved.get("images_kwargs", {}).get("size") or {}
        return int(size["shortest_edge"]), int(size["longest_edge"])
