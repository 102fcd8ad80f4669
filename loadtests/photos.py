"""Real photographs, which scikit-image ships."""

from typing import Any

from PIL import Image
from skimage import data

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "hubble")


def photo(name: str) -> Image.Image:
    """The photograph called `name`, RGB."""
    arrays: dict[str, Any] = {
        "astronaut": data.astronaut,  # 512 x 512
        "chelsea": data.chelsea,  # 451 x 300
        "coffee": data.coffee,  # 600 x 400
        "rocket": data.rocket,  # 640 x 427
        "hubble": data.hubble_deep_field,  # 1000 x 872
    }
    return Image.fromarray(arrays[name]())
