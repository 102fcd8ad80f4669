"""The engine's own view: vLLM's metrics at two moments, and what happened between them."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

RUNNING = ("vllm:num_requests_running", "vllm:num_requests_waiting")
PHASES = {
    "queue": "vllm:request_queue_time_seconds",
    "prefill": "vllm:request_prefill_time_seconds",
    "decode": "vllm:request_decode_time_seconds",
}
ENCODER = "hiprune_encoder_seconds"
CACHES = {"prefix": "vllm:prefix_cache", "pictures": "vllm:mm_cache"}


@dataclass(frozen=True)
class Histogram:
    """Observations between two scrapes.

    Attributes:
        count, total: how many, and their sum in seconds.
        buckets: upper bound -> observations at or below it.
    """

    count: float
    total: float
    buckets: Mapping[float, float]

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> tuple[float, float] | None:
        """The bounds of the bucket that holds the quantile; all that a histogram knows of it."""
        if not self.count:
            return None
        below = 0.0
        for bound in sorted(self.buckets):
            if self.buckets[bound] >= share * self.count:
                return below, bound
            below = bound
        return below, float("inf")


@dataclass(frozen=True)
class Scrape:
    """Samples of `/metrics`, added up over engines and processes.

    Attributes:
        values: sample name -> value.
        buckets: histogram -> upper bound -> observations at or below it.
        info: labels of vLLM's `cache_config_info`.
    """

    values: Mapping[str, float]
    buckets: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    info: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Scrape":
        """Reads Prometheus' text format."""
        values: dict[str, float] = defaultdict(float)
        buckets: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
        info: dict[str, str] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "vllm:cache_config_info":
                    info = dict(sample.labels)
                elif sample.name.endswith("_bucket"):
                    bound = float(sample.labels["le"])
                    buckets[sample.name.removesuffix("_bucket")][bound] += sample.value
                elif not sample.name.endswith("_created"):
                    values[sample.name] += sample.value
        return cls(dict(values), {name: dict(b) for name, b in buckets.items()}, info)

    @property
    def under_way(self) -> float:
        """Requests that the engine runs or holds back."""
        return sum(self.values.get(name, 0.0) for name in RUNNING)


def scrape(url: str, headers: Mapping[str, str], timeout_s: float = 30) -> Scrape | None:
    """`/metrics` as it is now, empty where there is none; None where the server does not answer."""
    try:
        answer = httpx.get(f"{url}/metrics", headers=dict(headers), timeout=timeout_s)
        return Scrape.parse(answer.text if answer.is_success else "")
    except (httpx.HTTPError, ValueError):
        return None


class Restarted(Exception):
    """A counter went down: the numbers before and after belong to two processes."""


@dataclass(frozen=True)
class Between:
    """What happened from one scrape to another.

    Raises:
        Restarted: the server was started anew between them.
    """

    before: Scrape
    after: Scrape

    def __post_init__(self) -> None:
        for name in (f"{PHASES['prefill']}_count", "vllm:prompt_tokens_total"):
            if self.counted(name) < 0:
                raise Restarted(f"{name} went down")

    def counted(self, name: str) -> float:
        return self.after.values.get(name, 0.0) - self.before.values.get(name, 0.0)

    def histogram(self, name: str) -> Histogram:
        before = self.before.buckets.get(name, {})
        after = self.after.buckets.get(name, {})
        return Histogram(
            self.counted(f"{name}_count"),
            self.counted(f"{name}_sum"),
            {bound: value - before.get(bound, 0.0) for bound, value in after.items()},
        )

    def hit_rate(self, cache: str) -> float | None:
        """Share of what was looked up that was there; None where nothing was looked up."""
        asked = self.counted(f"{CACHES[cache]}_queries_total")
        return self.counted(f"{CACHES[cache]}_hits_total") / asked if asked else None

    def encoder_seconds(self) -> float | None:
        """Seconds of the vision encoder; None where they are not measured."""
        if f"{ENCODER}_sum" not in self.after.values:
            return None
        return self.counted(f"{ENCODER}_sum")
