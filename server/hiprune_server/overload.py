"""More than the engine can do soon is refused, rather than queued without end."""

import argparse
import math
from typing import Any, Final

from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logger import init_logger

from hiprune_server.metrics import OVERLOAD, REJECTED

logger = init_logger(f"vllm.{__name__}")  # as its own: else nobody sees it

REQUESTS: Final = 4
"""Requests in the engine, over those that run at a time: as many again wait up to three times."""
STEPS: Final = 64
"""Full prefill steps of prompt tokens that may wait."""
PROMPTS: Final = 4
"""Longest prompts that may wait at least."""


def bound_the_queue(engine_client: Any, args: argparse.Namespace | Any) -> None:
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
        scheduler.max_num_queued_reqs = math.ceil(REQUESTS * scheduler.max_num_seqs * share)
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
    check, most = engine_client.check_admission, scheduler.max_num_queued_reqs

    def counted(n: int = 1, *args: Any, **kwargs: Any) -> None:
        if n > max(most, 1):  # no waiting would help
            told = f"n must be at most {most}, as many answers as this server has room for, got {n}"
            raise VLLMValidationError(told, parameter="n")
        try:
            check(n, *args, **kwargs)
        except GracefulHTTPError:
            REJECTED.labels(OVERLOAD).inc()
            raise

    engine_client.check_admission = counted
