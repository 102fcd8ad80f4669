"""What the front end asks of a request's pictures before anything of them goes to the engine."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems

from hiprune_vllm.models.base import Grid
from hiprune_vllm.plan import PicturesLeftOut


def check_embeddings(items: EmbeddingItems | DictEmbeddingItems, config: Any, width: int) -> None:
    """Refuses embeddings that would not fill their places; vLLM looks at their width at most.

    Args:
        items: embeddings of a request, of pictures or videos.
        config: the model's, of Hugging Face.
        width: of a visual token.

    Raises:
        VLLMValidationError: an item is not (rows, width) floating-point numbers with a row for
            each place that its grid, where it has one, takes in the prompt.
    """
    field = f"{items.modality}_embeds"
    for i in range(items.get_count()):
        item: Any = items.get(i)
        grid = None
        if isinstance(item, Mapping):
            grid, item = item.get(f"{items.modality}_grid_thw"), item.get(field)
            if item is None:
                continue  # it comes by an encoder connector
        if not isinstance(item, torch.Tensor) or item.ndim != 2:
            _refuse(field, i, f"must be a tensor of the shape (rows, {width})")
        if not item.is_floating_point() or item.shape[1] != width or not len(item):
            got = f"{tuple(item.shape)} of {item.dtype}"
            _refuse(field, i, f"must have rows of {width} floating-point numbers, got {got}")
        if grid is not None:
            sides = [int(side) for side in grid.flatten().tolist()]
            merged = config.vision_config.spatial_merge_size**2
            if len(sides) != 3 or min(sides) < 1 or prod(sides) != len(item) * merged:
                _refuse(field, i, f"must have a row a token of its grid {sides}, got {len(item)}")


def _refuse(field: str, index: int, told: str) -> None:
    raise VLLMValidationError(f"{field} of item {index} {told}", parameter=field)


def check_count(full: int, grids: Sequence[Grid]) -> None:
    """Refuses a picture of which the processor has made another number of tokens than was counted.

    Its embeddings would not fill their places, which ends the engine: vLLM's own arithmetic rounds
    otherwise than the processor's for some sizes, and a request's options may leave out a step.

    Args:
        full: tokens by vLLM's count.
        grids: of what the processor has made.

    Raises:
        VLLMValidationError: they are not as many.
    """
    made = sum(grid.rows * grid.columns for grid in grids)
    if made != full:
        raise VLLMValidationError(
            f"image_url must be of another size: vLLM counts {full} visual tokens of this picture, "
            f"the checkpoint's processor has made {made}. Cut it or scale it by some pixels, and "
            "leave other processor options out.",
            parameter="image_url",
        )


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


def check_places(
    prompt: Sequence[int],
    updates: Mapping[str, Sequence[Sequence[Any]]],
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Refuses a prompt that does not have one placeholder for each picture (or video).

    With fewer a template has left pictures out or the prompt was cut. With more vLLM would put the
    pictures where text of the request's has the placeholder.

    Args:
        prompt: token ids.
        updates: by modality, one list an item, of vLLM's resolved updates.
        decode: the tokenizer's.

    Raises:
        VLLMValidationError: caused by a `PicturesLeftOut` where there are fewer.
    """
    for modality, of_items in updates.items():
        found = [update.target for of_item in of_items for update in of_item]
        if not all(isinstance(target, list) for target in found):
            continue  # a model that is not pruned, and marks no places
        targets = {tuple(target) for target in found}
        places = sum(_count(prompt, target, decode) for target in targets)
        if places > len(of_items):
            raise VLLMValidationError(
                f"messages must not have the {modality} placeholder in their text, got {places} "
                f"of them for {len(of_items)} {modality} items",
                parameter="messages",
            )
        if places < len(of_items):
            left_out = PicturesLeftOut(
                "messages",
                f"must have their pictures where the model's chat template takes them: the prompt "
                f"has {places} places for {len(of_items)} {modality} items",
                list(next(iter(targets))),
            )
            raise VLLMValidationError(str(left_out), parameter=left_out.field) from left_out


def _count(
    prompt: Sequence[int], target: tuple[int, ...], decode: Callable[[Sequence[int]], str]
) -> int:
    """How often a placeholder is in a prompt; one of several tokens, as vLLM, in its text."""
    if len(target) == 1:
        return prompt.count(target[0])
    return decode(prompt).count(decode(list(target)))


def not_at_hand(index: int, kind: str = "image") -> VLLMValidationError:
    """The refusal of an item that is named by its `uuid` alone and not there any more."""
    what = "video" if kind == "video" else "image"
    return VLLMValidationError(
        f"{what} {index} is named by its uuid alone, but the server does not have it (any more) "
        f"with this budget: send the {'picture' if what == 'image' else what} itself again",
        parameter="uuid",
    )
