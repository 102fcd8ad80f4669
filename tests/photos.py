"""Real photographs (scikit-image ships them) and how the tests send them."""

import base64
import io
from typing import Any

from PIL import Image
from skimage import data

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "hubble")


def photo(name: str) -> Image.Image:
    arrays = {
        "astronaut": data.astronaut,  # 512 x 512
        "chelsea": data.chelsea,  # 451 x 300
        "coffee": data.coffee,  # 600 x 400
        "rocket": data.rocket,  # 640 x 427
        "hubble": data.hubble_deep_field,  # 1000 x 872
    }
    return Image.fromarray(arrays[name]())


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
