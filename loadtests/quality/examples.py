"""Pictures of what was kept, for the report.

The server does not tell which tokens it kept, so they are computed here, by Hugging Face's eager
attention on the demo checkpoint and the plugin's own selection; `make fidelity` shows that the
engine keeps the same.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from hiprune_server.demo import CHECKPOINT
from hiprune_server.demo.world import HELD_OUT, PATCH, scene
from hiprune_vllm.pruning.budget import anchor_count
from hiprune_vllm.pruning.neighbours import buffer_mask
from hiprune_vllm.pruning.select import best_order, hiprune_indices

COLOURS = {"anchor": (255, 214, 10), "buffer": (235, 50, 50), "register": (20, 200, 220)}


@cache
def _tower() -> Any:
    from transformers import LlavaForConditionalGeneration  # noqa: PLC0415

    llava = LlavaForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, attn_implementation="eager"
    )
    return llava.model.vision_tower.eval()


def scores(picture: Image.Image) -> list[torch.Tensor]:
    """(1, N) attention received in each layer that runs, the first layer first (Eq. 2-3)."""
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1)
    with torch.no_grad():
        out = _tower()(pixels[None] / 127.5 - 1, output_attentions=True)
    return [layer.sum(2).mean(1)[:, 1:] for layer in out.attentions[:-1]]


def roles(picture: Image.Image, plan: dict[str, Any]) -> dict[str, list[int]]:
    """Indices of the tokens that a HiPrune plan keeps, by role."""
    found = scores(picture)
    anchors = anchor_count(plan["tokens"], plan["alpha"], plan["buffer"])
    at_object, at_output = found[plan["object_layer"] - 1], found[-1]
    side = round(at_output.shape[1] ** 0.5)
    kept = hiprune_indices(
        at_object, at_output,
        keep=plan["tokens"], anchors=anchors, columns=side, buffer=plan["buffer"],
    )[0].tolist()  # fmt: skip
    everything = torch.zeros_like(at_object, dtype=torch.int8)
    anchor = torch.zeros_like(at_object, dtype=torch.bool)
    anchor.scatter_(1, best_order(everything, at_object)[:, :anchors], True)
    buffers = buffer_mask(anchor, side, plan["buffer"])[0]
    by_role: dict[str, list[int]] = {"anchor": [], "buffer": [], "register": []}
    for index in kept:
        role = "anchor" if anchor[0, index] else "buffer" if buffers[index] else "register"
        by_role[role].append(index)
    return by_role


def overlay(number: int, plan: dict[str, Any]) -> Image.Image:
    """Held-out picture `number`: kept patches framed in their role's colour, others dimmed."""
    picture = scene(HELD_OUT + number).picture
    side = picture.width // PATCH
    dim = np.asarray(picture, dtype=np.float32) * 0.3 + 20
    canvas = Image.fromarray(dim.astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for role, indices in roles(picture, plan).items():
        for index in indices:
            x, y = index % side * PATCH, index // side * PATCH
            box = (x, y, x + PATCH, y + PATCH)
            canvas.paste(picture.crop(box), box)
            pen.rectangle((x, y, x + PATCH - 1, y + PATCH - 1), outline=COLOURS[role])
    return canvas
