"""Pictures to ask about: photographs cut and varied by seed, no two of them the same."""

import base64
import hashlib
import io
import json
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageEnhance

from loadtests import photos

PHOTOS: Final = "photos"
SIZES: Final = "640x480:2,480x640,448x448"
_QUALITY = 90
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_SIDES = range(16, 8193)

Sizes = Sequence[tuple[int, int, float]]
"""(width, height, weight) of each size."""


def sizes(text: str) -> Sizes:
    """`640x480:2,336x336` as a distribution; a weight that is not given is 1.

    Raises:
        ValueError: it is not that.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)(?::(\d+(?:\.\d+)?))?\s*", part)
        width, height, weight = match.groups() if match else (0, 0, 0)
        if int(width) not in _SIDES or int(height) not in _SIDES or float(weight or 1) <= 0:
            raise ValueError(
                f"sizes must look like 640x480:2,336x336 with sides of 16 to 8192, got {text!r}"
            )
        found.append((int(width), int(height), float(weight or 1)))
    return found


class Source:
    """An endless row of pictures, each made from its number.

    Args:
        origin: `photos`, or a folder of pictures.
        sizes: what they are scaled to.
        seed: another seed, other pictures.

    Raises:
        ValueError: the folder has no pictures; later, that one of them cannot be read.
    """

    def __init__(self, origin: str, sizes: Sizes, seed: int = 0) -> None:
        self._seed = seed
        self._sizes = [(width, height) for width, height, _ in sizes]
        weights = np.array([weight for *_, weight in sizes])
        self._weights = weights / weights.sum()
        if origin == PHOTOS:
            self._originals: list[Image.Image | Path] = [photos.photo(n) for n in photos.NAMES]
        else:
            folder = Path(origin)
            found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _ENDINGS)
            if not found:
                raise ValueError(
                    f"IMAGES must be {PHOTOS} or a folder with pictures "
                    f"({', '.join(_ENDINGS)}), got {origin!r}"
                )
            self._originals = list(found)

    def picture(self, number: int, attempt: int = 0) -> Image.Image:
        """The picture called `number`: a part of an original, perhaps mirrored, lit anew."""
        dice = np.random.default_rng([self._seed, number + 2**31, attempt])
        original = self._originals[int(dice.integers(len(self._originals)))]
        if isinstance(original, Path):
            try:
                with Image.open(original) as file:
                    original = file.convert("RGB")
            except OSError as error:
                raise ValueError(f"IMAGES has {original}, which cannot be read: {error}") from None
        width, height = self._sizes[int(dice.choice(len(self._sizes), p=self._weights))]
        # The largest part of the wanted shape, and of that between a half and all of each side.
        scale = min(original.width / width, original.height / height) * dice.uniform(0.5, 1.0)
        part = scale * width, scale * height
        left = dice.uniform(0, original.width - part[0])
        top = dice.uniform(0, original.height - part[1])
        image = original.resize(
            (width, height),
            Image.Resampling.BILINEAR,
            (left, top, left + part[0], top + part[1]),
        )
        if dice.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return ImageEnhance.Brightness(image).enhance(dice.uniform(0.8, 1.2))

    def url(self, number: int, attempt: int = 0) -> str:
        """The picture as a data URL (JPEG)."""
        buffer = io.BytesIO()
        self.picture(number, attempt).save(buffer, "JPEG", quality=_QUALITY)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

    def different(self) -> Iterator[str]:
        """Data URLs from number 0 on, no two of them the same."""
        seen: set[bytes] = set()
        number = 0
        while True:
            for attempt in range(100):
                url = self.url(number, attempt)
                digest = hashlib.sha256(url.encode()).digest()
                if digest not in seen:
                    break
            else:
                raise ValueError("the originals are too few or too small for different pictures")
            seen.add(digest)
            yield url
            number += 1


class Pool:
    """Pictures that were made before the load: making them must not slow down the load.

    A file of data URLs, a line each, mapped into memory by every worker.
    """

    def __init__(self, path: Path) -> None:
        self._ends = json.loads(_index(path).read_text())
        self._file = path.open("rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        begin = self._ends[number - 1] if number else 0
        return self._map[begin : self._ends[number] - 1].decode()

    @classmethod
    def fill(cls, path: Path, source: Source, count: int, tell: Callable[[int], None]) -> "Pool":
        """Writes `count` pictures of `source`; `tell` hears of each."""
        ends, end = [], 0
        with path.open("wb") as file:
            for number, url in zip(range(count), source.different(), strict=False):
                end += file.write(url.encode() + b"\n")
                ends.append(end)
                tell(number + 1)
        _index(path).write_text(json.dumps(ends))
        return cls(path)


def _index(path: Path) -> Path:
    return path.with_suffix(".index")
