"""Routes that answer with numbers (embeddings, pooling, classification): one budget a request."""

from typing import Any, Final

from hiprune_server.hardening.stumbling import refused
from hiprune_vllm.facade import Pruning
from hiprune_vllm.plan import FIELD, PlanError

HANDLERS: Final = ("serving_embedding", "serving_pooling", "serving_classification")
"""vLLM's, by their names in the server's state."""


def take_budgets(handler: Any, pruning: Pruning) -> None:
    """Makes one of vLLM's handlers hand a request's `hiprune` object to the processor.

    It stands at the top of a request and is for all its pictures.
    """
    prepare = handler._init_ctx

    async def prepare_with_budget(io_processor: Any, request: Any, raw_request: Any = None) -> Any:
        context = await prepare(io_processor, request, raw_request)
        given = request.model_extra or {}
        if FIELD in given:
            options = context.prompt_extras.get("mm_processor_kwargs") or {}
            try:
                if FIELD in options:
                    raise PlanError(FIELD, "must be given once, got it in mm_processor_kwargs too")
                plan = pruning.parse(given[FIELD])
            except PlanError as error:
                raise refused(error) from error
            context.prompt_extras["mm_processor_kwargs"] = {**options, FIELD: plan}
        return context

    handler._init_ctx = prepare_with_budget
