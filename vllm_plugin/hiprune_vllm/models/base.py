"""What a model family has to say about itself, and what every family needs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple

import PIL.Image
import torch

from hiprune_vllm.models.images import Part, Selection
from hiprune_vllm.plan import About, Encoder, TokenCount
from hiprune_vllm.pruning.record import Source, of_vllm
from hiprune_vllm.pruning.scores import default_object_layer
from hiprune_vllm.pruning.select import Region

Colour = tuple[float, float, float]
"""Red, green, blue."""


class UnsupportedCheckpoint(ValueError):
    """A checkpoint of a known family whose encoder cannot be pruned; the message says why.

    It is served unpruned, and a `hiprune` object is refused with the message.
    """


class TooShallow(RuntimeError):
    """An encoder without a layer to take anchors from: the engine does not start.

    No ValueError: vLLM takes one at this point for "has no images" and starts without them.
    """

    def __init__(self, object_layer: int, output_layer: int, depth: int) -> None:
        super().__init__(
            f"hiprune-vllm needs an object layer below the output layer, but this checkpoint's "
            f"encoder of depth {depth} has object layer {object_layer} and output layer "
            f"{output_layer}. Serve a checkpoint with more layers, or leave this plugin out by "
            "naming the others in VLLM_PLUGINS."
        )


def object_layer_of(depth: int, output_layer: int, *, merging: bool) -> int:
    """The default object layer of an encoder (`default_object_layer`), which has to be below it.

    Raises:
        TooShallow: it is not, or the encoder has not as many blocks.
    """
    layer = default_object_layer(depth, merging=merging)
    if not layer < output_layer <= depth:
        raise TooShallow(layer, output_layer, depth)
    return layer


class View(NamedTuple):
    """Pixels that the encoder saw as one part of an image.

    Attributes:
        number: of the part, as in `TracedPart`.
        left, top: where it belongs in a picture of the whole, pixels.
        pixels: (rows, columns, 3) float, in [0, 1] where the picture is.
    """

    number: int
    left: int
    top: int
    pixels: torch.Tensor


class Grid(NamedTuple):
    """One grid that attention sees: a picture, a tile, a frame.

    Attributes:
        rows, columns: tokens of the language model.
        region: where tokens may be kept (not in padding); None for everywhere.
        weight: what its share of a budget is in proportion to.
        tiles: grids of patches, all alike, that its tokens are interpolated from; each is a row of
            the batch. None for one whose tokens are patches of its own.
        time: of a slice of a video, how many positions it comes later than the first; None for
            what is no slice. Slices of a video are alike and share its budget evenly.
    """

    rows: int
    columns: int
    region: Region | None = None
    weight: int = 1
    tiles: "Sequence[Grid]" = ()
    time: int | None = None

    @property
    def inside(self) -> Region:
        return self.region or Region(0, self.rows, 0, self.columns)


class Tower(NamedTuple):
    """Where vLLM keeps a vision encoder, and how its hidden states lie.

    Attributes:
        blocks: those that run, in order; the last one is the output layer.
        attention: name of a block's encoder attention.
        qkv: name of a block's linear layer that makes Q, K and V together, or names of those that
            make one each; empty where the last block cannot be cut short at its attention, so that
            it runs whole.
        heads: H, attention heads of a block over all ranks.
        leading: tokens before those of a part (1 with a CLS token), which vLLM takes off again.
        packed: whether all parts stand in one row of the batch; else each is one.
        merge: patches a side of a token of the language model.
        raster: whether a part's patches stand row by row; else those of one token together.
        within_images: whether the last block attends from every token to all of its part.
        by_row: arguments of a block that have a row for each row of its hidden states.
        taps: modules that make more columns of tokens, from hidden states on the way to the last
            block; in the order that they are called in, behind the columns of the projector.
        joined: module that runs the blocks and returns the hidden states behind all of them in a
            list, where features of several are put side by side.
        source: where query and key of a block's attention come from: vLLM's own modules are called
            with them, for transformers' see `models.of_transformers`.
        one_by_one: whether images go through one at a time; else as one batch.
        replicated: whether each rank holds all heads, whatever `--mm-encoder-tp-mode` says.
    """

    blocks: Sequence[Any]
    attention: str
    qkv: str | tuple[str, ...]
    heads: int
    leading: int = 0
    packed: bool = False
    merge: int = 1
    raster: bool = True
    within_images: bool = True
    by_row: Sequence[str] = ()
    taps: Sequence[Any] = ()
    joined: Any = None
    source: Source = of_vllm
    one_by_one: bool = False
    replicated: bool = False


Shape = tuple[int, ...]
"""What an image's grids follow from, in a family's own terms: such as its size in pixels."""

SHAPE_FIELD: Final = "hiprune_shape"
"""Name of the per-image tensor, (n,) int64, that carries `FamilyAdapter.shapes` to the worker."""


class Batch(NamedTuple):
    """Images as a family's `forward` takes them.

    Attributes:
        pixels: one an image.
        shapes: one an image.
        places: (tokens,) int64, place of every token of the batch in the order that the blocks run
            in; None where that is the order of the tokens. See `FamilyAdapter.laid_out`.
        metadata: what else the tower is called with.
    """

    pixels: Sequence[torch.Tensor]
    shapes: Sequence[Shape]
    places: torch.Tensor | None = None
    metadata: Mapping[str, Any] = {}

    def some(self, images: Sequence[int]) -> "Batch":
        """These images of it (their numbers in it, in any order), to be laid out."""
        return Batch([self.pixels[i] for i in images], [self.shapes[i] for i in images])


class FamilyAdapter(ABC):
    """What is a model family's own. All methods are stateless.

    Attributes:
        about: for people, in `GET /v1/hiprune` and docs/families.md.
        mrope: whether tokens have 3-D rotary positions in the language model (M-RoPE), so that the
            kept ones bring theirs along (section 4).
        frames: of a video that a picture is to the checkpoint's processor, which counts the pixels
            of all of them; where sizes are free.
        videos: whether videos can be pruned, slice by slice.
        takes_embeddings: whether vLLM's model takes pictures that were encoded elsewhere.
        modality: what vLLM calls the items that have the pictures among them.
        misread: what of a prompt makes vLLM's processor lose the place of a picture; None where
            nothing does.
    """

    about: ClassVar[About]
    mrope: ClassVar[bool] = False
    frames: ClassVar[int] = 1
    videos: ClassVar[bool] = False
    takes_embeddings: ClassVar[bool] = True
    modality: ClassVar[str] = "image"
    misread: ClassVar[str | None] = None

    def of(self, hf_config: Any) -> "FamilyAdapter":
        """The adapter of a checkpoint: another one where families share a class of vLLM's."""
        return self

    @abstractmethod
    def encoder(self, hf_config: Any) -> Encoder:
        """Reads what the encoder allows from the checkpoint's configuration.

        Raises:
            UnsupportedCheckpoint: the encoder cannot be pruned.
            TooShallow: it has fewer layers than pruning needs.
        """

    def item(self, picture: PIL.Image.Image) -> Any:
        """A picture as the items that vLLM's processor takes."""
        return picture

    def pixels(self, info: Any) -> tuple[int, int] | None:
        """Least and most pixels that vLLM's processing `info` scales a picture to.

        None where its size is not free (`Encoder.free_sizes`).
        """
        return None

    def fitted(self, hf_config: Any, picture: PIL.Image.Image, tiles: int) -> PIL.Image.Image:
        """A picture scaled down so far that it is cut into at most `tiles` (`Encoder.tiles`)."""
        raise NotImplementedError

    @abstractmethod
    def tokens(
        self, info: Any, images: Any, index: int, options: Mapping[str, object]
    ) -> TokenCount:
        """Visual tokens of `images[index]`, by vLLM's own arithmetic in its processing `info`.

        `options` are the processor options of the request, which may change an image's size.
        """

    def video_tokens(self, info: Any, videos: Any, index: int) -> int:
        """Visual tokens that `videos[index]` is likely to have, by the checkpoint's processor.

        A guess: a request's options may change it, and what the processor makes of the video is
        what counts (`video_slices`).
        """
        raise NotImplementedError

    def video_slices(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor]
    ) -> list[tuple[int, int]]:
        """Slices of each video, and visual tokens of each, by what the processor has made."""
        raise NotImplementedError

    def placeholder(self, tokens: Sequence[int], is_embed: Sequence[bool], keep: int) -> list[int]:
        """What stands in the prompt for a pruned image; its embeddings come in prompt order.

        Here all that is no embedding (start, end, tags) stays, and the first `keep` places of
        embeddings. A family overrides it where such tokens go with their patches, as ends of rows
        that are not known before the image is encoded.

        Args:
            tokens: vLLM's own for the whole image.
            is_embed: whether each of them is the place of an embedding.
            keep: N', how many places there have to be.
        """
        if all(is_embed):
            return list(tokens[:keep])
        left = iter(range(keep))
        pairs = zip(tokens, is_embed, strict=True)
        return [token for token, embed in pairs if not embed or next(left, None) is not None]

    @abstractmethod
    def encoded_tokens(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> int:
        """Visual tokens that one image has by what the processor made of it.

        Counted from the inputs' shapes, to be held against `tokens` once at start-up.

        Args:
            hf_config: the checkpoint's configuration.
            inputs: the model's own multimodal inputs of one image, without a batch dimension.

        Raises:
            RuntimeError: the inputs do not fit together ("version drift").
        """

    def shapes(self, hf_config: Any, inputs: Mapping[str, torch.Tensor]) -> Sequence[Shape] | None:
        """Shapes of images by what the processor has made of them, for a family whose inputs have
        them on the device alone: they are sent along under `SHAPE_FIELD`, which `batch` finds.

        Raises:
            VLLMValidationError: a request's processor options have made what the tower cannot take.
        """
        return None

    @abstractmethod
    def grids(self, hf_config: Any, shape: Shape) -> list[Grid]:
        """The parts of an image, each pruned on its own, numbered from 0 in this order."""

    def width(self, hf_config: Any) -> int:
        """Of a visual token as the language model gets it."""
        width: int = hf_config.get_text_config().hidden_size
        return width

    @abstractmethod
    def tower(self, model: Any) -> Tower:
        """The vision encoder of a vLLM model."""

    @abstractmethod
    def batch(self, model: Any, **kwargs: object) -> Batch:
        """Images from the model's own multimodal inputs, as vLLM reads them."""

    def laid_out(self, model: Any, batch: Batch) -> Batch:
        """A batch with all that the tower wants to know of how its images lie in it."""
        return batch

    @abstractmethod
    def forward(self, model: Any, batch: Batch, parts: Sequence[Sequence[Part]]) -> torch.Tensor:
        """vLLM's tower and projector as they are.

        The tower's last block returns the patches of the kept tokens alone, token by token in the
        order of the parts, each token's row by row: (1, leading + patches, width), or, where it
        works on (patches of the batch, 1, width) or without the 1, (patches, 1, width) or without.

        Args:
            parts: of every image, those that keep something; others need not be encoded.

        Returns:
            (kept tokens of the batch, width of the language model).
        """

    def interpolated(self, model: Any, shape: Shape, patches: torch.Tensor) -> torch.Tensor:
        """Tokens of a grid from its `tiles`: their features, and their scores by the same call.

        Args:
            model: vLLM's.
            shape: of the image.
            patches: (tiles, patches, columns).

        Returns:
            (tokens, columns), row by row.
        """
        raise NotImplementedError

    def whole(self, model: Any, shape: Shape, tokens: torch.Tensor) -> torch.Tensor:
        """An unpruned image as vLLM returns it, from all (tokens, width) of its grids.

        Where tokens are interpolated these are the patches of the tiles.
        """
        return tokens

    def prompt_order(
        self, hf_config: Any, shape: Shape, selection: Selection
    ) -> torch.Tensor | None:
        """Order of an image's kept tokens in the prompt, which is that of the unpruned one.

        Returns:
            (kept,) int64, places in the concatenation of the parts; None where they are in order.
        """
        return None

    def colours(self, image_processor: Any) -> tuple[Colour, Colour]:
        """Mean and standard deviation that the checkpoint's processor normalises pixels by."""
        return tuple(image_processor.image_mean), tuple(image_processor.image_std)

    @abstractmethod
    def views(
        self, hf_config: Any, inputs: Mapping[str, torch.Tensor], mean: Colour, std: Colour
    ) -> list[View]:
        """The picture as the encoder saw it.

        Args:
            hf_config: the checkpoint's configuration.
            inputs: the model's own multimodal inputs of one image, without a batch dimension.
            mean, std: that its pixels were normalised by.
        """


def shown(pixels: torch.Tensor, mean: Colour, std: Colour) -> torch.Tensor:
    """(3, rows, columns) pixels as (rows, columns, 3) in [0, 1].

    They are normalised, or still bytes where vLLM's model does that itself.
    """
    picture = pixels.permute(1, 2, 0)
    if picture.dtype == torch.uint8:
        return picture / 255
    return (picture.float() * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1)
