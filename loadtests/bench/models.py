"""vLLM's model of a checkpoint in this process: its modules without engine, cache or scheduler."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

from hiprune_vllm.engine.wire import BUDGET_FIELD, pack_item
from hiprune_vllm.pruning.budget import ImageBudget

_identities = itertools.count(1)


@contextmanager
def loaded(
    folder: Path, *, dtype: str, device: str, dummy: bool = True, text_layers: int | None = None
) -> Iterator[Any]:
    """The plugin's model class of a checkpoint.

    Args:
        folder: of the checkpoint.
        dtype: such as `float32`.
        device: `cpu` or `cuda`, what vLLM itself runs on here.
        dummy: random weights, spread so that attention differs from token to token.
        text_layers: of the language model, where its forward is of no interest.
    """
    options = EngineArgs(
        model=str(folder),
        dtype=dtype,
        load_format="dummy" if dummy else "auto",
        enforce_eager=True,
        hf_overrides=partial(_with_text_layers, text_layers),
        max_model_len=4096,
        disable_log_stats=True,
    )
    config = options.create_engine_config()
    with set_current_vllm_config(config), torch.inference_mode():
        if not torch.distributed.is_initialized():
            backend = "nccl" if device == "cuda" else "gloo"
            init_distributed_environment(1, 0, "tcp://127.0.0.1:29577", 0, backend)
            initialize_model_parallel(1, 1)
        model = get_model(vllm_config=config)
        if dummy:
            spread(model)
        yield model


def _with_text_layers(layers: int | None, config: Any) -> Any:
    text = getattr(config, "text_config", None)
    if layers is not None and text is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config


def spread(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of a scale at which attention is neither uniform nor on one token."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and ("vision" in name or "visual" in name):
            drawn = torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5
            weight.copy_(drawn)


def budget_rows(budgets: Sequence[ImageBudget]) -> torch.Tensor:
    """The model's `hiprune_budget` input, for pictures never seen before."""
    return torch.tensor([pack_item(budget, f"{next(_identities):015x}") for budget in budgets])


def embed(model: Any, budgets: Sequence[ImageBudget] | None, **inputs: Any) -> list[torch.Tensor]:
    """One forward of encoder, selection and projector; unpruned without budgets."""
    rows = {} if budgets is None else {BUDGET_FIELD: budget_rows(budgets)}
    return list(model.embed_multimodal(**inputs, **rows))
