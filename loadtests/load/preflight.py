"""What has to be true before a sweep starts: a server, its model, its budgets."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from loadtests import servers
from loadtests.load import asking, engine
from loadtests.load.cells import Asking, plan
from loadtests.load.credentials import VARIABLE
from loadtests.load.pictures import Source
from loadtests.load.records import OK, Record


@dataclass(frozen=True)
class Server:
    """What is known of the server.

    Attributes:
        url: without `/v1`.
        told: its `GET /v1/hiprune`.
        model: served name.
        longest: its context length in tokens, where it says so.
        cache: vLLM's `cache_config_info`.
        engine: whether it has vLLM's metrics.
        alone: seconds of one request alone, by budget.
        per_request: whether it reports the engine's times of each request.
    """

    url: str
    told: dict[str, Any]
    model: str
    longest: int | None
    cache: Mapping[str, str]
    engine: bool
    alone: Mapping[str, float]
    per_request: bool


def check(
    url: str,
    headers: dict[str, str],
    wanted: Asking,
    budgets: Sequence[str],
    source: Source,
    say: Callable[[str], None],
) -> Server:
    """Asks the server everything that would otherwise go wrong in the middle, once a budget.

    Args:
        wanted: `model` empty for whatever is served.

    Raises:
        RuntimeError: there is no such server, it has another model, knows no budgets or refuses
            one of them; the message says what to do.
    """
    served = models(url, headers)
    model = wanted.model or next(iter(served))
    if model not in served:
        raise RuntimeError(f"{url} serves {', '.join(served)}, not {model}: set MODEL")
    told = servers.about(url, headers)
    seen = engine.scrape(url, headers)
    alone = {}
    record = Record(0, 0.0)
    wanted = replace(wanted, model=model)
    client = asking.Client(url, headers, wanted.timeout_s)
    # Once for nothing: the first request of a server pays for what others do not.
    for number, budget in enumerate([budgets[0], *budgets], 1):
        say(f"one request alone at {budget}")
        identity = f"alone-{time.time_ns()}-{number}"
        picture = source.url(-number)
        wished = asking.body(wanted, plan(budget), picture, 0, identity=identity)
        record = Record(-number, time.monotonic())
        client.ask(wished, record)
        if record.outcome != OK:
            raise RuntimeError(f"budget {budget}: {record.outcome} {record.detail}".strip())
        alone[budget] = record.seconds
    return Server(
        url=url,
        told=told,
        model=model,
        longest=served[model],
        cache=seen.info if seen else {},
        engine=seen is not None and f"{engine.PHASES['prefill']}_count" in seen.values,
        alone=alone,
        per_request=record.prefill is not None,
    )


def models(url: str, headers: dict[str, str]) -> dict[str, int | None]:
    """Served name -> context length in tokens, where the server says so; one at least.

    Raises:
        RuntimeError: there is no such server, or it wants a key.
    """
    try:
        listed = httpx.get(f"{url}/v1/models", headers=headers, timeout=30)
    except httpx.InvalidURL as error:
        raise RuntimeError(f"{url} is no address of a server: {error}") from None
    except httpx.TransportError as error:
        raise RuntimeError(
            f"no server answers at {url} ({error}): start one (make serve) or set HOST and PORT"
        ) from None
    if listed.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise RuntimeError(f"{url} wants a key: put it into {VARIABLE}")
    if not listed.is_success:
        raise RuntimeError(
            f"{url} must be an OpenAI-compatible server, GET /v1/models says {listed.status_code}"
        )
    try:
        found = {one["id"]: one.get("max_model_len") for one in listed.json()["data"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RuntimeError(
            f"{url} must be an OpenAI-compatible server, its /v1/models is no list of models"
        ) from None
    if not found:
        raise RuntimeError(f"{url} serves no model")
    return found


def pictures_needed(server: Server, loads: Sequence[tuple[str, Any]], seconds: float) -> int:
    """How many pictures the busiest of (budget, load) may take in so many seconds.

    No request is faster than one alone, so users ask at most so often; a third on top, for what
    varies.
    """
    most = 16.0
    for budget, load in loads:
        rate = load.amount if load.kind == "open" else load.amount / server.alone[budget]
        most = max(most, rate * seconds * 1.3 + load.amount)
    return int(most)
