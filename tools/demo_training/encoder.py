"""First stage: the vision encoder, taught by labels of every patch.

The labels say what stands on a patch (kind, colour, digit), where its centre is (offset, part of
the picture), and the CLS token says what is in the whole picture. Nothing is asked of the
attention: that a middle layer looks at the objects comes by itself.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from hiprune_server.demo.language import COLOURS, SHAPES
from hiprune_server.demo.world import PATCH, SIDE, Scene, scene
from tools.demo_training.progress import SEED, Progress, prefetch

GRID = SIDE // PATCH
WIDTH = 128
VISION = CLIPVisionConfig(
    hidden_size=WIDTH,
    intermediate_size=512,
    num_attention_heads=4,
    num_hidden_layers=9,
    image_size=SIDE,
    patch_size=PATCH,
    hidden_act="gelu",
)
EXECUTED = 8
"""Blocks that run: LLaVA takes its features from hidden state -2."""
KINDS = ("nothing", *SHAPES, "card")
PATCH_LABELS = {"kind": len(KINDS), "colour": 8, "digit": 10, "row": 3, "column": 3}
"""What a linear layer reads off each patch's feature, and how many answers there are."""
_COVERED = 24  # pixels of 196 that make a patch belong to a thing


@dataclass(frozen=True)
class Phase:
    """A part of the training: `steps` batches of `batch` cut-outs of `patches` x `patches`.

    The learning rate goes from `first_rate` to `last_rate` in a straight line.
    """

    patches: int
    batch: int
    steps: int
    first_rate: float
    last_rate: float


PHASES = (
    Phase(8, 48, 1500, 1.5e-3, 7e-4),
    Phase(12, 48, 200, 8e-4, 5e-4),
    Phase(GRID, 20, 220, 6e-4, 2e-5),
)
# Small shapes are the hardest to tell apart: without more weight on them they are not learned in
# this time. That the background has to know the way to the nearest thing gives it a reason to
# attend to things, and a middle layer becomes the object layer.
_SHAPE_WEIGHT = 2.0
_NEAREST_WEIGHT = 0.25
_WARM_UP = 100  # steps


@dataclass(frozen=True)
class Batch:
    """Pictures and their labels; B pictures of P x P patches.

    Attributes:
        pixels: (B, 3, 14 P, 14 P) float32 in [-1, 1].
        places: (P * P,) int64, index of each patch in the whole picture's grid.
        patches: per label, (B, P * P) int64, -1 where there is nothing to say.
        offsets: (B, P * P, 2) float32, from the patch's centre to that of its own thing or, in the
            background, of the nearest one, in patches (x, y).
        whole: (B, 9 + 8 + 5) float32: which kinds, which colours, how many shapes (one-hot).
    """

    pixels: torch.Tensor
    places: torch.Tensor
    patches: dict[str, torch.Tensor]
    offsets: torch.Tensor
    whole: torch.Tensor


class Encoder(nn.Module):
    """The CLIP tower with the linear layers that its labels are read through."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(VISION)
        self.read = nn.ModuleDict(
            {name: nn.Linear(WIDTH, size) for name, size in PATCH_LABELS.items()}
        )
        self.offset = nn.Linear(WIDTH, 2)
        self.whole = nn.Linear(WIDTH, 9 + len(COLOURS) + 5)

    def forward(self, pixels: torch.Tensor, places: torch.Tensor) -> Any:
        """(B, 3, h, w) -> (B, 1 + patches, WIDTH): the features that LLaVA would take.

        A cut-out's patches have the position embeddings of their place in the whole picture.
        """
        vision = getattr(self.tower, "vision_model", self.tower)
        embeddings = vision.embeddings
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        positions = embeddings.position_embedding.weight
        cls = (embeddings.class_embedding + positions[0]).expand(len(pixels), 1, -1)
        hidden = torch.cat([cls, patches + positions[1 + places]], 1)
        hidden = vision.pre_layrnorm(hidden)
        for block in vision.encoder.layers[:EXECUTED]:
            out = block(hidden, None)
            hidden = out if isinstance(out, torch.Tensor) else out[0]
        return hidden

    def loss(self, batch: Batch) -> Any:
        features = self(batch.pixels, batch.places)
        patches, cls = features[:, 1:], features[:, 0]
        total = torch.zeros(())
        for name, layer in self.read.items():
            weight = None
            if name == "kind":
                weight = torch.ones(len(KINDS))
                weight[0] = 0.2
            total = (
                total
                + functional.cross_entropy(
                    layer(patches).flatten(0, 1),
                    batch.patches[name].flatten(),
                    weight=weight,
                    ignore_index=-1,
                ).nan_to_num()
            )  # a batch without a card has no digit
        shapes = (batch.patches["kind"] > 0) & (batch.patches["kind"] <= len(SHAPES))
        total = total + _SHAPE_WEIGHT * functional.cross_entropy(
            self.read["kind"](patches)[shapes], batch.patches["kind"][shapes]
        )
        on_thing = batch.patches["kind"] > 0
        miss = (self.offset(patches) - batch.offsets).abs()
        total = total + miss[on_thing].mean() + _NEAREST_WEIGHT * miss.mean()
        return total + 2 * functional.binary_cross_entropy_with_logits(self.whole(cls), batch.whole)


def draw_batch(phase: Phase, seeds: list[int], places_seed: int) -> Batch:
    """A batch of one cut-out a seed; all lie at the same place of the whole grid."""
    rng = np.random.default_rng([places_seed, 2])
    top, left = (int(rng.integers(0, GRID - phase.patches + 1)) for _ in range(2))
    rows, columns = torch.arange(top, top + phase.patches), torch.arange(phase.patches) + left
    scenes = [scene(seed, patches=phase.patches) for seed in seeds]
    labels = [label(one, top, left) for one in scenes]
    return Batch(
        pixels=torch.stack([pixels_of(one) for one in scenes]),
        places=(rows[:, None] * GRID + columns).flatten(),
        patches={name: torch.stack([one[0][name] for one in labels]) for name in PATCH_LABELS},
        offsets=torch.stack([one[1] for one in labels]),
        whole=torch.stack([one[2] for one in labels]),
    )


def pixels_of(one: Scene) -> torch.Tensor:
    """(3, side, side) float32 in [-1, 1], as the processor makes it."""
    array = np.asarray(one.picture, dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def label(
    one: Scene, top: int, left: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Labels of every patch, offsets, and labels of the whole; see `Batch`.

    Args:
        one: what was drawn.
        top, left: place of the cut-out in the whole picture's grid, in patches.
    """
    side = one.picture.width // PATCH
    owner = owner_of_patches(one)
    table = {name: np.full(len(one.things) + 1, -1) for name in PATCH_LABELS}
    table["kind"][0] = 0
    centres = np.zeros((len(one.things) + 1, 2), dtype=np.float32)
    whole = np.zeros(9 + len(COLOURS) + 5, dtype=np.float32)
    shapes = 0
    for i, thing in enumerate(one.things, 1):
        table["kind"][i] = KINDS.index(thing.name)
        whole[KINDS.index(thing.name) - 1] = 1
        x, y = thing.centre
        centres[i] = x, y
        table["row"][i] = int((y + top * PATCH) // (SIDE / 3))
        table["column"][i] = int((x + left * PATCH) // (SIDE / 3))
        if thing.name == "card":
            table["digit"][i] = int(thing.look)
        else:
            table["colour"][i] = COLOURS.index(thing.look)
            whole[9 + COLOURS.index(thing.look)] = 1
            shapes += 1
    whole[9 + len(COLOURS) + shapes] = 1
    middles = (np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1) + 0.5) * PATCH
    away = (centres[None, 1:] - middles.reshape(-1, 1, 2)) / PATCH
    near = np.where(owner > 0, owner - 1, np.linalg.norm(away, axis=-1).argmin(1))
    offsets = away[np.arange(len(owner)), near]
    labels = {name: torch.from_numpy(values[owner]) for name, values in table.items()}
    return labels, torch.from_numpy(offsets).float(), torch.from_numpy(whole)


def owner_of_patches(one: Scene) -> np.ndarray:
    """(patches,) int64: 1 + index of the thing that a patch belongs to, 0 for none."""
    side = one.picture.width // PATCH
    tiles: np.ndarray = one.owners.reshape(side, PATCH, side, PATCH)
    tiles = tiles.transpose(0, 2, 1, 3).reshape(side * side, PATCH * PATCH)
    counts = np.stack([(tiles == i).sum(1) for i in range(1, len(one.things) + 1)], 1)
    best: np.ndarray = counts.argmax(1) + 1
    return np.where(counts.max(1) >= _COVERED, best, 0)


def accuracy(encoder: Encoder, batch: Batch) -> dict[str, float]:
    """Share of patches on things that are read right, and of pictures that CLS reads right.

    "kind" is about shapes only.
    """
    with torch.no_grad():
        features = encoder(batch.pixels, batch.places)
        miss = (encoder.offset(features[:, 1:]) - batch.offsets).abs()
        found = {"offset": float(miss.mean())}
        for name, layer in encoder.read.items():
            labels = batch.patches[name]
            asked = labels >= 0
            if name == "kind":
                asked = (labels > 0) & (labels <= len(SHAPES))
            found[name] = float((layer(features[:, 1:]).argmax(-1) == labels)[asked].float().mean())
        whole = (encoder.whole(features[:, 0]) > 0) == (batch.whole > 0.5)
        found["whole"] = float(whole.all(1).float().mean())
    return found


def train(progress: Progress) -> Encoder:
    """Trains the encoder, or goes on where it was interrupted.

    Args:
        progress: shows it and keeps what has been reached.
    """
    torch.manual_seed(SEED)
    encoder = Encoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1.0, weight_decay=0.05)
    schedule = [(i, step) for i, phase in enumerate(PHASES) for step in range(phase.steps)]
    first = progress.resume("encoder", encoder, optimizer)
    work = [PHASES[i].batch * PHASES[i].patches ** 2 for i, _ in schedule]
    progress.start("encoder", work, first)
    for step, batch in enumerate(prefetch(_batch, range(first, len(schedule))), first):
        i, inside = schedule[step]
        phase = PHASES[i]
        rate = phase.first_rate + (phase.last_rate - phase.first_rate) * inside / phase.steps
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / _WARM_UP)
        loss = encoder.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        told = {"loss": loss.item()}
        if step % 50 == 49 or step + 1 == len(schedule):
            told |= accuracy(encoder, _batch(len(schedule) + step, i))
        progress.step(step, told, encoder, optimizer)
    return encoder.eval()


def _batch(step: int, phase: int | None = None) -> Batch:
    """The batch of a step: always the same one. `phase` where the step is past the last."""
    if phase is None:
        ends = np.cumsum([one.steps for one in PHASES])
        phase = int(np.searchsorted(ends, step, side="right"))
    size = PHASES[phase].batch
    return draw_batch(PHASES[phase], [step * 64 + k for k in range(size)], step)
