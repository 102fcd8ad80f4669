"""Real photographs and how the tests send them."""

import base64
import io
from typing import Any

from PIL import Image

from loadtests.photos import NAMES, photo

__all__ = ["NAMES", "data_url", "photo"]


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
