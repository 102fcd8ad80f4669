"""Which tokens of an image stay and why: asked by the front end, answered by the worker."""

from typing import Any

import numpy as np
import torch
from vllm.distributed import get_pp_group
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from hiprune_vllm.engine.wire import BUDGET_FIELD
from hiprune_vllm.models.images import TracedPart
from hiprune_vllm.pruning.select import ROLES, token_kinds

NO_ROLE = "other"
"""Of tokens that stay without regard to attention: by `random`, by `stride`, or because all do."""


class ExplainExtension:
    """What a worker can do besides vLLM's own methods (`--worker-extension-cls`)."""

    device: torch.device
    get_model: Any

    def hiprune_explain(
        self, frames: list[bytes], layer: int, score: str
    ) -> list[dict[str, Any]] | None:
        """Explains one image.

        Args:
            frames: its processed inputs, as vLLM's own encoder wrote them.
            layer, score: object layer and kind of score to report.

        Returns:
            One a part, see `_told`; None from a worker without the vision tower.
        """
        if not get_pp_group().is_first_rank:
            return None
        item = MsgpackDecoder(MultiModalKwargsItem).decode(frames)
        model = self.get_model()
        items = [(model.family.modality, item)]
        ((_, _, inputs),) = group_and_batch_mm_kwargs(items, device=self.device)
        with torch.inference_mode():
            return [_told(part) for part in model.explain(layer, score, **inputs)]


def _told(part: TracedPart) -> dict[str, Any]:
    """A part as plain lists: tile, grid (rows, columns), kept, roles, scores."""
    count = len(part.object_scores)
    kept = part.kept.tolist()
    return {
        "tile": part.number,
        "grid": [count // part.columns, part.columns],
        "kept": kept,
        "roles": _roles(part, kept),
        "scores": {"object": part.object_scores.tolist(), "output": part.output_scores.tolist()},
    }


def _roles(part: TracedPart, kept: list[int]) -> list[str]:
    budget = part.budget
    if not budget.needs_attention:
        return [NO_ROLE] * len(kept)
    scores = part.object_scores[None]
    allowed = part.region and part.region.mask(len(scores[0]), part.columns, scores.device)
    kinds = token_kinds(
        scores,
        anchors=budget.anchors,
        columns=part.columns,
        buffer=budget.buffer,
        allowed=allowed,
    )[0].tolist()
    return [ROLES[kinds[index]] for index in kept]


async def explain(engine_client: Any, inputs: Any) -> list[dict[str, Any]]:
    """Asks the worker about the only image of a prompt.

    Args:
        engine_client: vLLM's.
        inputs: the processed prompt, with the image's data (not from a cache).

    Returns:
        One a part of the image, see `_told`.
    """
    ((item,),) = inputs["mm_kwargs"].values()
    (report,) = inputs["hiprune"]
    plan = report["plan"]
    frames = [bytes(frame) for frame in MsgpackEncoder().encode(item)]
    answers = await engine_client.collective_rpc(
        "hiprune_explain", args=(frames, plan.object_layer, plan.score)
    )
    return next(answer for answer in answers if answer is not None)


def views(info: Any, inputs: Any) -> list[tuple[int, int, int, np.ndarray]]:
    """The only image of a prompt as the encoder saw it.

    Args:
        info: the processor's processing info.
        inputs: as for `explain`.

    Returns:
        Tile, left, top and (rows, columns, 3) uint8 pixels of every part.
    """
    ((item,),) = inputs["mm_kwargs"].values()
    data = {name: tensor for name, tensor in item.get_data().items() if name != BUDGET_FIELD}
    images = info.get_hf_processor().image_processor
    family = info.pruning.family
    found = family.views(info.get_hf_config(), data, *family.colours(images))
    return [
        (view.number, view.left, view.top, (view.pixels * 255).round().to(torch.uint8).numpy())
        for view in found
    ]
