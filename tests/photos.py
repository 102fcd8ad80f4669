"""Real photographs and how the tests send them."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from loadtests.photos import NAMES, photo

__all__ = ["NAMES", "data_url", "frames", "photo"]


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def frames() -> tuple[Any, dict[str, Any]]:
    """A video of 8 frames, and what vLLM wants to know of it."""
    clip = np.stack(
        [np.roll(np.asarray(photo("coffee").resize((112, 84))), i, 1) for i in range(8)]
    )
    return clip, {"fps": 2.0, "total_num_frames": 8, "frames_indices": list(range(8))}
