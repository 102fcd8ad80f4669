"""The demo model's world: pictures of coloured shapes and a number card, drawn from a seed.

A scene has one to four shapes of 22 to 30 pixels (about four patches each), all of different
shape and colour, and often a card with a digit, on a textured background. It is drawn at
336 x 336 pixels, the size that the demo model sees, so no scaling stands between the labels here
and the patches there.
"""

from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hiprune_server.demo.language import (
    COLOURS,
    SHAPES,
    Question,
    Seen,
    description,
    questions,
    strange,
)

PATCH = 14
SIDE = 24 * PATCH
"""Pixels on a side of a whole picture."""
HELD_OUT = 1_000_000_000
"""First seed of the pictures that no training has seen; training's seeds are below."""

MOST = 4
"""Shapes in a picture, as far as there is room for them."""
CARD = (36, 44)
"""Pixels: width and height of a card."""
_FINE = 4  # shapes are drawn this much larger and scaled down, for smooth edges
_RGB = {
    "red": (214, 40, 40),
    "orange": (244, 132, 24),
    "yellow": (246, 222, 52),
    "green": (36, 160, 64),
    "blue": (36, 84, 220),
    "purple": (140, 50, 180),
    "white": (248, 248, 248),
    "black": (16, 16, 16),
}


@dataclass(frozen=True)
class Thing:
    """Something in a picture.

    Attributes:
        name: one of SHAPES, or "card".
        look: colour of a shape, digit of a card.
        box: left, top, right, bottom in pixels, right and bottom excluded.
    """

    name: str
    look: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """x and y in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """A picture and everything that is in it.

    Attributes:
        seed: what it was drawn from.
        picture: RGB, `SIDE` pixels square where not asked for otherwise.
        things: shapes first, in the order of SHAPES, then the card.
        owners: (side, side) uint8, 1 + index into `things` where a thing covers the pixel, else 0.
    """

    seed: int
    picture: Image.Image
    things: tuple[Thing, ...]
    owners: np.ndarray

    def mask(self) -> np.ndarray:
        """(side, side) bool, True where something stands."""
        found: np.ndarray = self.owners > 0
        return found

    def questions(self) -> list[Question]:
        """The same questions every time; their wording and order come from the seed."""
        rng = np.random.default_rng([self.seed, 1])
        return questions(self.seen(), self.picture.width, rng)

    def more_questions(self) -> list[Question]:
        """A description, and a question from outside the world."""
        rng = np.random.default_rng([self.seed, 3])
        return [description(self.seen(), rng), strange(rng)]

    def seen(self) -> list[Seen]:
        """What can be asked about."""
        return [(thing.name, thing.look, thing.centre) for thing in self.things]


def scene(seed: int, *, patches: int = SIDE // PATCH) -> Scene:
    """Draws a scene.

    Args:
        seed: >= 0; the same seed gives the same scene.
        patches: on a side; fewer make a cut-out, for training.
    """
    rng = np.random.default_rng([seed, 0])
    side = patches * PATCH
    picture = Image.fromarray(_background(rng, side))
    owners = np.zeros((side, side), dtype=np.uint8)
    count = int(rng.integers(1, MOST + 1))
    shapes = sorted(rng.choice(len(SHAPES), count, replace=False).tolist())
    colours = rng.choice(len(COLOURS), count, replace=False).tolist()
    wanted = [(SHAPES[s], COLOURS[c]) for s, c in zip(shapes, colours, strict=True)]
    if rng.random() < 0.6:
        wanted.append(("card", str(rng.integers(10))))
    things: list[Thing] = []
    for name, look in sorted(wanted, key=lambda one: one[0] != "card"):  # the largest first
        size = CARD if name == "card" else (int(rng.integers(22, 31)),) * 2
        box = _free_place(rng, side, size, things)
        if box is None:
            continue
        tile, cover = _card(look, rng) if name == "card" else _shape(name, look, size[0], rng)
        picture.paste(tile, box[:2], cover)
        covered = np.asarray(cover) > 127
        things.append(Thing(name, look, box))
        owners[box[1] : box[3], box[0] : box[2]][covered] = len(things)
    order = sorted(range(len(things)), key=lambda i: (*SHAPES, "card").index(things[i].name))
    renumbered = np.zeros(len(things) + 1, dtype=np.uint8)
    for new, old in enumerate(order):
        renumbered[old + 1] = new + 1
    return Scene(seed, picture, tuple(things[i] for i in order), renumbered[owners])


def _free_place(
    rng: np.random.Generator, side: int, size: tuple[int, int], things: list[Thing]
) -> tuple[int, int, int, int] | None:
    """A box at least a patch away from everything else, None where no room was found."""
    for _ in range(100):
        x = int(rng.integers(2, side - size[0] - 1))
        y = int(rng.integers(2, side - size[1] - 1))
        box = (x, y, x + size[0], y + size[1])
        if all(
            box[0] >= other.box[2] + PATCH
            or other.box[0] >= box[2] + PATCH
            or box[1] >= other.box[3] + PATCH
            or other.box[1] >= box[3] + PATCH
            for other in things
        ):
            return box
    return None


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Muted clouds with noise, sometimes stripes and lines: nothing a shape could hide in."""
    coarse = rng.integers(70, 186, (int(rng.integers(2, 6)),) * 2 + (3,))
    grey = coarse.mean(2, keepdims=True)
    coarse = (grey + 0.45 * (coarse - grey)).astype(np.uint8)
    clouds = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        pen = ImageDraw.Draw(clouds)
        for _ in range(int(rng.integers(1, 5))):
            ends = [tuple(rng.integers(0, side, 2).tolist()) for _ in range(2)]
            shade = tuple(rng.integers(80, 176, 1).tolist() * 3)
            pen.line(ends, fill=shade, width=int(rng.integers(1, 4)))
    canvas: np.ndarray = np.asarray(clouds, dtype=np.float32)
    if rng.random() < 0.5:
        along = np.arange(side, dtype=np.float32)
        turn, period = rng.uniform(0, pi), rng.uniform(6, 40)
        phase = (cos(turn) * along[:, None] + sin(turn) * along[None]) * 2 * pi / period
        canvas = canvas + rng.uniform(3, 14) * np.sin(phase)[..., None]
    noise = rng.standard_normal((side, side, 1), dtype=np.float32)
    noisy: np.ndarray = np.clip(canvas + rng.uniform(2, 10) * noise, 0, 255)
    return noisy.astype(np.uint8)


def _shape(
    name: str, colour: str, size: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """A (size, size) colour tile and the mask to paste it through."""
    rgb = np.clip(np.array(_RGB[colour]) + rng.integers(-7, 8, 3), 0, 255)
    big = size * _FINE
    cover = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(cover)
    middle, reach = big / 2, big / 2 - 1
    if name in ("circle", "ring"):
        pen.ellipse((1, 1, big - 2, big - 2), fill=255)
        if name == "ring":
            hole = 0.5 * reach
            pen.ellipse((middle - hole, middle - hole, middle + hole, middle + hole), fill=0)
    else:
        points = [(middle + reach * x, middle + reach * y) for x, y in _outline(name)]
        pen.polygon(points, fill=255)
    cover = cover.rotate(float(rng.uniform(-9, 9)), Image.Resampling.BILINEAR)
    cover = cover.resize((size, size), Image.Resampling.LANCZOS)
    return Image.new("RGB", (size, size), tuple(int(v) for v in rgb)), cover


def _outline(name: str) -> list[tuple[float, float]]:
    """Corners in [-1, 1]."""
    if name == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if name == "triangle":
        return [(0, -0.95), (0.98, 0.85), (-0.98, 0.85)]
    if name == "diamond":
        return [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)]
    if name == "cross":
        arm = 0.3
        quarter = [(arm, -1), (arm, -arm), (1, -arm)]
        return [
            (x * cos(t) - y * sin(t), x * sin(t) + y * cos(t))
            for t in (0, pi / 2, pi, 3 * pi / 2)
            for x, y in quarter
        ]
    if name == "heart":
        turns = [2 * pi * i / 40 for i in range(40)]
        return [
            (
                sin(t) ** 3,
                -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16 - 0.1,
            )
            for t in turns
        ]
    spokes = [(1.0 if i % 2 == 0 else 0.42, pi * i / 5) for i in range(10)]  # star
    return [(r * sin(t), -r * cos(t)) for r, t in spokes]


def _card(digit: str, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A light card with a dark digit, and the mask to paste it through."""
    width, height = CARD[0] * _FINE, CARD[1] * _FINE
    paper = tuple(int(v) for v in rng.integers(222, 240, 3))
    tile = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(tile)
    pen.rectangle((0, 0, width - 1, height - 1), outline=(60, 60, 60), width=_FINE)
    pen.text(
        (width / 2, height / 2), digit, (30, 30, 40), _font(36 * _FINE), anchor="mm",
        stroke_width=_FINE // 2,
    )  # fmt: skip
    tile = tile.resize(CARD, Image.Resampling.LANCZOS)
    return tile, Image.new("L", CARD, 255)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if size not in _FONTS:
        _FONTS[size] = ImageFont.load_default(size)
    return _FONTS[size]


_FONTS: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}
