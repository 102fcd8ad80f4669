"""Prometheus metrics of the budgets, on vLLM's own `/metrics`.

Labels come from closed sets, whatever a client sends.
"""

from bisect import bisect_left
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, Final

from prometheus_client import Counter, Histogram

from hiprune_vllm.plan import KNOBS, PlanError

BUCKETS: Final = (64, 128, 192, 320, 640, 1280)
"""Upper bounds, included, of the visual tokens that a request keeps."""
DETAIL: Final = "detail"
ROUTE: Final = "route"
BODY: Final = "body_size"
HELD: Final = "held_bodies"
SLOW: Final = "slow_body"
SHAPE: Final = "body_values"
KEY: Final = "key"
OVERLOAD: Final = "overload"
UNKNOWN: Final = "unknown_field"
OTHER: Final = "other"
REASONS: Final = (
    *KNOBS,
    DETAIL,
    ROUTE,
    BODY,
    HELD,
    SLOW,
    SHAPE,
    KEY,
    OVERLOAD,
    UNKNOWN,
    OTHER,
)

IMAGES: Final = Counter(
    "hiprune_images", "Pictures of chat requests, by what chose their tokens.", ["method", "source"]
)
VIDEOS: Final = Counter(
    "hiprune_videos",
    "Videos of chat requests with a budget for one, by what chose their tokens.",
    ["method", "source"],
)
FULL: Final = Counter(
    "hiprune_visual_tokens_full", "Visual tokens that pictures and such videos have.", ["kind"]
)
KEPT: Final = Counter(
    "hiprune_visual_tokens_kept", "Visual tokens that were kept of them.", ["kind"]
)
IMAGE, VIDEO = "image", "video"
for _counter in (FULL, KEPT):
    _counter.labels(IMAGE)  # there from the start
RATIO: Final = Histogram(
    "hiprune_kept_ratio",
    "Kept share of the visual tokens of a picture or video.",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.125, 0.2, 0.25, 0.34, 0.5, 0.75, 0.999, 1.0),
)
FIRST_TOKEN: Final = Histogram(
    "hiprune_time_to_first_token_seconds",
    "From a request's arrival to its first token, by the visual tokens that it kept.",
    ["kept_tokens"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
REJECTED: Final = Counter(
    "hiprune_rejected_requests", "Requests that were refused here, by what was wrong.", ["reason"]
)
for _reason in REASONS:
    REJECTED.labels(_reason)  # there from the start, so that a rate can be taken


def count_items(items: Sequence[Mapping[str, Any]]) -> None:
    """Counts what an answer reports about its pictures and videos."""
    for item in items:
        kind = item.get("kind", IMAGE)
        full, kept = item["tokens_full"], item["tokens_kept"]
        counter = VIDEOS if kind == VIDEO else IMAGES
        counter.labels(item["method"], item["source"]).inc()
        FULL.labels(kind).inc(full)
        KEPT.labels(kind).inc(kept)
        RATIO.observe(kept / full)


def count_rejected(error: PlanError) -> None:
    """Counts a refused `hiprune` object by what was wrong in it."""
    name = error.field.rsplit(".", 1)[-1]
    known = name in (*KNOBS, DETAIL)
    REJECTED.labels(name if known else UNKNOWN if error.unknown else OTHER).inc()


def bucket(kept: int) -> str:
    """The label of a request that kept so many visual tokens: "1-64", ..., "1281+"."""
    i = bisect_left(BUCKETS, kept)
    low = BUCKETS[i - 1] + 1 if i else 1
    return f"{low}-{BUCKETS[i]}" if i < len(BUCKETS) else f"{low}+"


async def timed(
    outputs: AsyncIterator[Any], images: Sequence[Mapping[str, Any]]
) -> AsyncGenerator[Any, None]:
    """The engine's outputs of a request as they come; notes the time to its first token."""
    waiting = bool(images)
    try:
        async for output in outputs:
            # An output of the engine's, or the Responses API's account of them.
            stats = getattr(output, "metrics", None) or getattr(output, "request_metrics", None)
            seconds = getattr(stats, "first_token_latency", 0.0)
            if waiting and seconds:
                waiting = False
                kept = sum(image["tokens_kept"] for image in images)
                FIRST_TOKEN.labels(bucket(kept)).observe(seconds)
            yield output
    finally:
        close = getattr(outputs, "aclose", None)
        if close is not None:
            await close()
