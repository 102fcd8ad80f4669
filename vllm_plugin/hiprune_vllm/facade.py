"""All that a server may ask of the plugin, and the types of the answers.

The server knows this module, `plan` and `reading`, and no other of the plugin. vLLM's objects come
in here without types; what goes out has some. Standard library only, as `plan`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypedDict

from hiprune_vllm.models.unserved import why_unserved
from hiprune_vllm.plan import FIELD, NO_LIMITS, About, Encoder, Limits, PlanError, PruningPlan

if TYPE_CHECKING:
    import numpy as np

WORKER_EXTENSION: Final = "hiprune_vllm.engine.explain.ExplainExtension"
"""What a worker needs (`--worker-extension-cls`) where `Engine.explain` is to be answered."""


class Pruning(Protocol):
    """What an engine says about pruning, of its model and of the operator's settings."""

    @property
    def encoder(self) -> Encoder | None:
        """What the checkpoint's encoder allows; None where it cannot be pruned."""

    @property
    def unsupported(self) -> str:
        """Why it cannot, empty otherwise."""

    @property
    def about(self) -> About | None:
        """What somebody who chooses a budget should know of the family."""

    @property
    def default(self) -> PruningPlan:
        """The engine-wide plan."""

    @property
    def of_videos(self) -> PruningPlan:
        """The engine-wide plan of videos."""

    @property
    def videos(self) -> bool:
        """Whether videos can be pruned."""

    @property
    def limits(self) -> Limits:
        """What requests may ask for."""

    def parse(
        self, value: object, *, name: str = FIELD, for_one_image: bool = False
    ) -> PruningPlan:
        """Reads a request's `hiprune` object. Raises `PlanError`."""

    def check_of_video(self, plan: PruningPlan, name: str = FIELD) -> None:
        """Refuses a plan that is for a video alone and cannot be. Raises `PlanError`."""


class PictureReport(TypedDict):
    """What a rendered prompt says of one of its pictures, or of its pruned videos."""

    kind: str  # "image" or "video"
    frames: int | None  # of a video that was sent
    tokens_full: int
    tokens_kept: int
    method: str
    plan: PruningPlan  # with every knob


class ExplainedPart(TypedDict):
    """Which tokens of one part of a picture stay, and why."""

    tile: int
    grid: list[int]  # rows, columns
    kept: list[int]  # indices in the grid, row by row
    roles: list[str]  # of each kept one: a role of `pruning.select`, or "other"
    scores: dict[str, list[float]]  # "object" and "output": one a token of the grid


View = tuple[int, int, int, "np.ndarray[Any, Any]"]
"""Tile, left, top, (rows, columns, 3) uint8 pixels: one part as the encoder saw it."""


class NoPruning:
    """Stands in where nothing is pruned; `unsupported` says why."""

    encoder: Encoder | None = None
    about: About | None = None
    default = of_videos = PruningPlan()
    videos = False
    limits = NO_LIMITS

    def __init__(self, unsupported: str) -> None:
        self.unsupported = unsupported

    def parse(
        self, value: object, *, name: str = FIELD, for_one_image: bool = False
    ) -> PruningPlan:
        """Refuses every object with the reason. Raises `PlanError`."""
        raise PlanError(name, f"cannot be served: {self.unsupported}")

    def check_of_video(self, plan: PruningPlan, name: str = FIELD) -> None:
        """Nothing: no plan is read."""


class Engine:
    """vLLM's client of an engine, as far as the server needs it for pruning.

    Args:
        client: vLLM's.
        switched_off: why nothing is pruned although the model could be; empty: it is.
    """

    def __init__(self, client: Any, *, switched_off: str = "") -> None:
        self._client = client
        info = getattr(client.renderer.mm_processor, "info", None)
        found: Pruning | None = getattr(info, "pruning", None)
        self.pruning = found or NoPruning(switched_off or _why_not(client.model_config))

    async def explain(self, inputs: Mapping[str, Any]) -> list[ExplainedPart]:
        """Which tokens stay of the only picture of a rendered prompt, asked of the worker."""
        processor = self._client.renderer.mm_processor
        parts: list[ExplainedPart] = await processor.explain(self._client, inputs)
        return parts

    def views(self, inputs: Mapping[str, Any]) -> list[View]:
        """The only picture of a rendered prompt as the encoder saw it, part by part."""
        views: list[View] = self._client.renderer.mm_processor.views(inputs)
        return views


def _why_not(model_config: Any) -> str:
    # vLLM's class is another one than the checkpoint's where `--model-impl` says so.
    names = [model_config.architecture, *(model_config.hf_config.architectures or ())]
    return why_unserved(list(dict.fromkeys(names)))


def reports(inputs: Mapping[str, Any]) -> Sequence[PictureReport]:
    """What the processor has written into a rendered prompt: one a picture, then one a video."""
    found: Sequence[PictureReport] = inputs.get(FIELD, ())
    return found
