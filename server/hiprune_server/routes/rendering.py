"""Where every route's messages become a prompt: here a request's wishes meet the processor."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.exceptions import VLLMValidationError
from vllm.renderers.online_renderer import OnlineRenderer

from hiprune_server.hardening.grammars import Grammars, form_field
from hiprune_server.hardening.resending import AGAIN
from hiprune_server.hardening.shape import check_messages
from hiprune_server.hardening.stumbling import blamed_on_the_request, named, refused
from hiprune_server.hardening.templates import check_order, left_out
from hiprune_server.operations import metrics
from hiprune_server.routes.report import MEDIA, Report, media_tokens, report_of
from hiprune_server.wishes.messages import (
    ImageWish,
    Presets,
    Taken,
    Wishes,
    check_arrived,
    take_image_wishes,
)
from hiprune_vllm.facade import PictureReport, Pruning, reports
from hiprune_vllm.plan import FIELD, PicturesLeftOut, PlanError, Plans, PruningPlan

pictures_sent: ContextVar[Mapping[str, str] | None] = ContextVar("hiprune_pictures", default=None)
"""Marks and paths of the pictures in the request at hand, on routes that `wishes.tag` is for."""
_ANY_LENGTH = 2**31 - 1
"""Tokens of an answer whose form alone is looked at: no `min_tokens` is above it."""


class PrunedRenderer(OnlineRenderer):
    """vLLM's renderer with a request's plans handed to the multimodal processor.

    It accepts processor options from a request, but of those only the plans that were checked
    here; the client's own options meet vLLM's refusal as ever.
    """

    _pruning: Pruning
    _presets: Presets
    _grammars: Grammars
    _trust_request: bool

    @classmethod
    def around(
        cls, renderer: OnlineRenderer, pruning: Pruning, presets: Presets, grammars: Grammars
    ) -> "PrunedRenderer":
        """A pruned copy of vLLM's `renderer`, which itself stays as it is."""
        if type(renderer) is not OnlineRenderer:
            raise RuntimeError(
                f"version drift: expected OnlineRenderer, got {type(renderer).__name__}"
            )
        pruned = cls.__new__(cls)
        pruned.__dict__.update(renderer.__dict__)
        pruned._pruning = pruning
        pruned._presets = presets
        pruned._grammars = grammars
        pruned._trust_request = renderer.trust_request_mm_kwargs
        pruned.trust_request_mm_kwargs = True
        return pruned

    async def render_chat(self, request: Any, **kwargs: Any) -> Any:
        with blamed_on_the_request("messages"):
            rendered = await super().render_chat(request, **kwargs)
        await self._check_form(request)
        return rendered

    async def render_responses(self, request: Any, **kwargs: Any) -> Any:
        with blamed_on_the_request("input"):
            rendered = await super().render_responses(request, **kwargs)
        await self._check_form(request)
        return rendered

    async def _check_form(self, request: Any) -> None:
        """Refuses a costly grammar, which vLLM's parsers may have made by now, before a stream."""
        if not getattr(request, "use_beam_search", False):  # vLLM's takes no grammar
            params = request.to_sampling_params(_ANY_LENGTH, {})
            await self._grammars.check(params, form_field(request))

    async def preprocess_chat(
        self, request: Any, messages: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = request.mm_processor_kwargs
        validate_request_mm_kwargs(
            mm_processor_kwargs=given,
            media_io_kwargs=request.media_io_kwargs,
            trust_request_mm_kwargs=self._trust_request,
        )
        try:
            taken = take_image_wishes(messages, self._pruning, self._presets)
            check_arrived(pictures_sent.get() or {}, taken.arrived)
            wishes, options = self._wishes(request, given or {}, taken)
            plain = taken.plain
        except PlanError as error:
            raise refused(error) from error
        field = "input" if hasattr(request, "input") else "messages"
        check_messages(plain, field)
        check_order(plain, field)
        preprocess = super().preprocess_chat

        async def rendered(**changes: Any) -> Any:
            try:
                # The request itself and no copy: vLLM's parsers change it while it is rendered.
                request.mm_processor_kwargs = options or None
                with named(plain):
                    return await preprocess(request, plain, *args, **kwargs | changes)
            finally:
                request.mm_processor_kwargs = given

        async def again() -> Any:
            _, (inputs,) = await rendered(skip_mm_cache=True)
            return inputs

        try:
            result = await rendered()
        except VLLMValidationError as error:
            cause = error.__cause__
            if isinstance(cause, PicturesLeftOut):
                raise await left_out(self, request, plain, cause) from error
            if isinstance(cause, PlanError):  # known only once the pictures are
                metrics.count_rejected(cause)
            raise
        for inputs in result[1]:
            inputs[AGAIN] = again
        told = [report for inputs in result[1] for report in reports(inputs)]
        images = [
            {**_counted(report), "source": wishes.source(i)}
            for i, report in enumerate(one for one in told if one["kind"] == "image")
        ]
        videos = [
            {
                "kind": "video",
                **({} if report["frames"] is None else {"frames": report["frames"]}),
                **_counted(report),
                "source": wishes.source_of_video(i),
            }
            for i, report in enumerate(one for one in told if one["kind"] == "video")
        ]
        media = [media_tokens(inputs) for inputs in result[1]]
        report_of.set(
            Report(
                images if images or videos or wishes.asked else None,
                {name: sum(one[name] for one in media) for name in MEDIA},
                videos,
            )
        )
        return result

    def _wishes(
        self, request: Any, options: dict[str, Any], taken: Taken
    ) -> tuple[Wishes, dict[str, Any]]:
        """All that a request asks for, and the processor options that say so."""
        of_images, of_videos = taken.wishes, taken.of_videos
        top = FIELD in request.model_fields_set
        asked = top or any(wish.own is not None for wish in (*of_images, *of_videos))
        detailed = any(wish.detail is not None for wish in of_images)
        if asked and FIELD in options:
            raise PlanError(FIELD, "must be given once, got it in mm_processor_kwargs too")
        if not asked and not detailed:
            value = options.get(FIELD, {})
            whole = self._pruning.parse(value) if isinstance(value, dict) and value else None
            return Wishes(False, whole or PruningPlan(), of_images, of_videos), options
        if detailed and FIELD in options:
            raise PlanError(f"mm_processor_kwargs.{FIELD}", "must not meet an image's detail")
        whole = self._pruning.parse(getattr(request, FIELD)) if top else PruningPlan()
        plans = Plans(*([wish.over(whole) for wish in own] for own in (of_images, of_videos)))
        uniform = all(wish == ImageWish() for wish in (*of_images, *of_videos))
        wishes = Wishes(True, whole, of_images, of_videos)
        return wishes, {**options, FIELD: whole if uniform else plans}


def _counted(report: PictureReport) -> dict[str, str | int]:
    return {
        "tokens_full": report["tokens_full"],
        "tokens_kept": report["tokens_kept"],
        "method": report["method"],
    }
