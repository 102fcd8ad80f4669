"""Image embeddings that a client or another server made."""

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.parse import DictEmbeddingItems


def refuse_without_tensors(images: Any, parser: Any) -> None:
    """Refuses images that are to come by an encoder connector, named by their grid alone.

    How many of its tokens the other server kept is not in the grid: the prompt would not fit.

    Args:
        images: embeddings as vLLM's parser made them.
        parser: that parser.
    """
    if not isinstance(images, DictEmbeddingItems):
        return
    _, elsewhere = parser.embedding_field_sets("image")
    for index in range(len(images)):
        missing = elsewhere - images.get(index).keys()
        if missing:
            raise VLLMValidationError(
                f"image {index} must come with {', '.join(sorted(missing))} or as the picture "
                "itself: its grid does not tell how many of its tokens another server kept",
                parameter="image_embeds",
            )
