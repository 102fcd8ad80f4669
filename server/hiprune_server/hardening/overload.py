"""More than the engine can do soon is refused, rather than queued without end.

Symptom: under overload every request waits longer and longer, and all of them time out.
Cause: vLLM bounds its queue only where the operator says by how much.
Change: limits that follow from the model's and the engine's size, where none is given; what is
    refused is counted, and who was let in keeps the place (see `Admission`).
Remove when: vLLM bounds its queue by itself, and reserves what it has promised.
"""

import argparse
import math
from contextvars import ContextVar
from typing import Any, Final

from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logger import init_logger

from hiprune_server.operations.metrics import OVERLOAD, REJECTED

logger = init_logger(f"vllm.{__name__}")  # as its own: else nobody sees it

REQUESTS: Final = 4
"""Requests in the engine, over those that run at a time: as many again wait up to three times."""
FEWEST: Final = 32
"""Requests in the engine where few run at a time: a page's worth of questions is no overload."""
STEPS: Final = 64
"""Full prefill steps of prompt tokens that may wait."""
PROMPTS: Final = 4
"""Longest prompts that may wait at least."""


def bound_the_queue(engine_client: Any, args: argparse.Namespace) -> None:
    """Sets vLLM's limits of what waits where the operator gave none, and counts its refusals.

    vLLM has none by default. Its `--max-num-queued-reqs` counts requests that wait or run, of all
    API server processes; `--max-num-queued-tokens` prompt tokens that are not yet computed, of one
    process. What fits depends on the model and the device, which vLLM has made up its mind about by
    now; each process has its share.

    Args:
        engine_client: vLLM's, of this process.
        args: vLLM's, with the number of API server processes.
    """
    vllm = engine_client.vllm_config
    scheduler = vllm.scheduler_config
    share = vllm.parallel_config.data_parallel_size / max(1, args.api_server_count or 1)
    if scheduler.max_num_queued_reqs is None:
        requests = max(REQUESTS * scheduler.max_num_seqs, FEWEST)
        scheduler.max_num_queued_reqs = math.ceil(requests * share)
    if scheduler.max_num_queued_tokens is None:
        steps = STEPS * scheduler.max_num_batched_tokens
        least = PROMPTS * vllm.model_config.max_model_len
        scheduler.max_num_queued_tokens = math.ceil(max(steps, least) * share)
    logger.info(
        "This API server process refuses (503) what would be more than %d requests in the engine "
        "(--max-num-queued-reqs), and all while %d prompt tokens wait (--max-num-queued-tokens).",
        scheduler.max_num_queued_reqs,
        scheduler.max_num_queued_tokens,
    )
    engine_client.check_admission = Admission(engine_client).check


class Entry:
    """What a request has of the queue before it is in it: places for `n` answers."""

    def __init__(self) -> None:
        self.n = 0
        self.admission: Admission | None = None

    def leave(self, n: int | None = None) -> None:
        """Gives places back, all of them where no number is said."""
        n = self.n if n is None else n
        self.n -= n
        if self.admission is not None:
            self.admission.entering -= n


ENTRY: ContextVar[Entry | None] = ContextVar("hiprune_entry", default=None)
"""Of the request at hand."""


class Admission:
    """vLLM's check of its queue, which keeps a place for a request that it has let in.

    Symptom: of a burst of streams some end in the middle of an answer that has begun with 200.
    Cause: vLLM asks twice whether there is room, when a request comes and when it is handed to the
        engine; what comes in between finds the same room.
    Change: who was let in has its place, and is not asked again. What is refused is counted.
    Remove when: vLLM reserves what it has promised.

    Args:
        engine_client: vLLM's, with limits.
    """

    def __init__(self, engine_client: Any) -> None:
        self._check = engine_client.check_admission
        self._limits = engine_client.vllm_config.scheduler_config
        self.entering = 0

    def check(self, n: int = 1, request_id: str | None = None) -> None:
        """In place of vLLM's `check_admission`.

        Args:
            n: answers.
            request_id: of a request that is handed to the engine; None for one that comes.
        """
        entry, most = ENTRY.get(), self._limits.max_num_queued_reqs
        if request_id is not None and entry is not None and entry.n >= n:
            entry.leave(n)  # vLLM notes the request before anything else runs
            return
        if n > max(most, 1):  # no waiting would help
            told = f"n must be at most {most}, as many answers as this server has room for, got {n}"
            raise VLLMValidationError(told, parameter="n")
        try:
            self._check(n + self.entering, request_id)
        except GracefulHTTPError:
            REJECTED.labels(OVERLOAD).inc()
            raise
        if request_id is None and entry is not None:
            entry.n += n
            entry.admission = self
            self.entering += n
