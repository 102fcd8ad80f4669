"""Pictures of what was kept, for the report, as the server draws them."""

import io
from collections.abc import Mapping, Sequence

import httpx
from PIL import Image

from loadtests.quality.asking import Answer, Picture
from loadtests.quality.cells import Cell
from loadtests.quality.results import Answers

EXAMPLES = 4  # of each: right and wrong
OVERLAY_TOKENS = (32, 16, 64, 8, 128, 192)  # the first budget that was evaluated is shown
_TIMEOUT_S = 120


def chosen(cells: Sequence[Cell], answers: Answers) -> tuple[Cell | None, list[Answer]]:
    """The cell whose answers are shown, and a few right and wrong ones, one a picture each."""
    mine = {c.budget: c for c in cells if c.method == "hiprune" and answers.has(c)}
    tokens = next((b for b in OVERLAY_TOKENS if b in mine), None)
    if tokens is None:
        return None, []
    found = []
    for right in (True, False):
        of_pictures: dict[int, Answer] = {}
        for answer in answers.of(mine[tokens]):
            if answer.right == right:
                of_pictures.setdefault(answer.picture, answer)
        found += list(of_pictures.values())[:EXAMPLES]
    return mine[tokens], found


def overlays(
    url: str,
    headers: Mapping[str, str] | None,
    cell: Cell,
    asked: Sequence[Picture],
) -> dict[int, Image.Image]:
    """Pictures by number with what a cell's plan keeps of them (`POST /v1/hiprune/explain`).

    Raises:
        RuntimeError: the server explains nothing.
    """
    drawn = {}
    with httpx.Client(headers={**(headers or {}), "Accept": "image/png"}) as client:
        for picture in asked:
            body = {"image_url": picture.url, "hiprune": cell.plan}
            answer = client.post(f"{url}/v1/hiprune/explain", json=body, timeout=_TIMEOUT_S)
            if answer.is_error:
                raise RuntimeError(
                    f"/v1/hiprune/explain must draw the report's examples, got {answer.status_code}"
                    f": {answer.text[:200]}"
                )
            drawn[picture.number] = Image.open(io.BytesIO(answer.content)).convert("RGB")
    return drawn
