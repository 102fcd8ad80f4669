"""What lmms-eval calls for a question of the local task; it is copied beside the task's data."""

import base64
import io
from typing import Any

from PIL import Image


def picture(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(doc["picture"]))).convert("RGB")]


def question(doc: dict[str, Any]) -> str:
    text: str = doc["question"]
    return text


def scored(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"exact_match": float(results[0].strip() == doc["answer"])}
