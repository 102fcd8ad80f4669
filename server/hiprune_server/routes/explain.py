"""`POST /v1/hiprune/explain`: which tokens of a picture stay, and as what."""

import asyncio
import base64
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, Literal

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, Field
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from hiprune_server.hardening.stumbling import refused
from hiprune_server.operations.metrics import OVERLOAD, REJECTED
from hiprune_server.routes.report import report_of
from hiprune_server.wishes.details import DETAILS
from hiprune_vllm.facade import Engine, ExplainedPart, View, reports
from hiprune_vllm.plan import FIELD, PlanError

WAITING: Final = 8
"""Requests that may wait for the one that is explained; each holds its body meanwhile."""
COLOURS: Final = {
    "anchor": (255, 214, 10),
    "buffer": (235, 50, 50),
    "register": (20, 200, 220),
    "other": (255, 255, 255),
}
"""Of a kept token's frame, by its role; the paper's (Figure 1), white where no attention chose."""
DIMMED: Final = 0.3
"""Brightness of what is dropped."""


class PictureURL(BaseModel):
    """A picture as a chat request names it."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(description="A data URL, or another one where the server allows it.")
    detail: Literal[DETAILS] | None = Field(  # type: ignore[valid-type]
        None, description="A preset of the operator, or auto: none."
    )


class ExplainRequest(BaseModel):
    """One picture and a plan."""

    model_config = ConfigDict(extra="forbid")

    image_url: str | PictureURL
    hiprune: Any = Field(default=None, description="The plan, as in a chat request.")
    model: str | None = None
    overlay: bool = Field(False, description="Add the overlay to a JSON answer, as a data URL.")


class Explainer:
    """Asks the engine about one picture at a time, so that it goes on serving in between.

    Args:
        handler: the pruned chat handler, whose rules for pictures and plans hold here too.
        engine: that has the picture encoded.
    """

    def __init__(self, handler: Any, engine: Engine) -> None:
        self._handler = handler
        self._engine = engine
        self._one_at_a_time = asyncio.Semaphore(1)
        self._inside = 0

    async def explain(self, request: ExplainRequest) -> tuple[dict[str, Any], list[View]]:
        """The answer, and the picture as the encoder saw it.

        Raises:
            VLLMValidationError: the picture or the plan cannot be served.
            HTTPException: there is no such model, or too many wait (503).
        """
        if self._inside > WAITING:
            REJECTED.labels(OVERLOAD).inc()
            told = f"{WAITING} requests wait for an explanation, as many as may: ask again later"
            raise HTTPException(503, told)
        self._inside += 1
        try:
            async with self._one_at_a_time:  # before its picture is decoded
                return await self._explain(request)
        finally:
            self._inside -= 1

    async def _explain(self, request: ExplainRequest) -> tuple[dict[str, Any], list[View]]:
        try:
            self._engine.pruning.parse({})
        except PlanError as error:  # a model that cannot be pruned
            raise refused(error) from error
        given = request.image_url
        url = {"url": given} if isinstance(given, str) else given.model_dump(exclude_none=True)
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "."}]
        plan = {FIELD: request.hiprune} if FIELD in request.model_fields_set else {}
        chat = ChatCompletionRequest.model_validate(
            {"model": request.model, "messages": [{"role": "user", "content": parts}], **plan}
        )
        unknown = await self._handler._check_model(chat)
        if unknown is not None:
            raise HTTPException(unknown.error.code, unknown.error.message)
        rendered = await self._handler.online_renderer.render_chat(chat, skip_mm_cache=True)
        if isinstance(rendered, ErrorResponse):
            raise HTTPException(rendered.error.code, rendered.error.message)
        (inputs,) = rendered[1]
        report = report_of.get()
        (image,) = (report and report.images) or []
        explained = await self._engine.explain(inputs)
        roles = Counter(role for part in explained for role in part["roles"])
        counts = {role: roles[role] for role in COLOURS}
        plan = reports(inputs)[0]["plan"].to_dict()
        return (
            {**image, "plan": plan, "counts": counts, "parts": explained},
            await asyncio.to_thread(self._engine.views, inputs),
        )


@with_cancellation
async def explain(request: ExplainRequest, raw_request: Request) -> Response:
    """Which tokens of a picture a chat request with this plan would keep, and why."""
    explainer: Explainer = raw_request.app.state.hiprune_explainer
    answer, views = await explainer.explain(request)
    as_picture = _prefers_picture(raw_request.headers.get("accept", ""))
    if not (as_picture or request.overlay):
        return JSONResponse(answer)
    png = await asyncio.to_thread(overlay, views, answer["parts"])
    if as_picture:
        return Response(png, media_type="image/png")
    return JSONResponse(
        answer | {"overlay": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
    )


def _prefers_picture(accept: str) -> bool:
    kinds = [kind.partition(";")[0].strip() for kind in accept.split(",")]
    return "image/png" in kinds and "application/json" not in kinds


def overlay(views: Sequence[View], parts: Sequence[ExplainedPart]) -> bytes:
    """A PNG of the picture: kept tokens framed in the colour of their role, all else dimmed.

    Args:
        views: the picture as the encoder saw it.
        parts: what was kept of it, see the answer's `parts`.
    """
    width = max(left + pixels.shape[1] for _, left, _, pixels in views)
    height = max(top + pixels.shape[0] for _, _, top, pixels in views)
    canvas = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(canvas)
    of_tile = {part["tile"]: part for part in parts}
    for tile, left, top, pixels in views:
        picture = Image.fromarray(pixels)
        canvas.paste(picture.point(lambda value: round(value * DIMMED)), (left, top))
        part = of_tile.get(tile)
        if part is None:
            continue
        rows, columns = part["grid"]
        # A tower may leave a strip at the edge unseen: its patches are whole.
        side = min(pixels.shape[0] // rows, pixels.shape[1] // columns)
        for index, role in zip(part["kept"], part["roles"], strict=True):
            x, y = index % columns * side, index // columns * side
            canvas.paste(picture.crop((x, y, x + side, y + side)), (left + x, top + y))
            if role != "other":
                box = (left + x, top + y, left + x + side - 1, top + y + side - 1)
                pen.rectangle(box, outline=COLOURS[role], width=max(1, side // 12))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()
