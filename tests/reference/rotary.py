"""What an engine on a CPU needs for a text model like DeepSeek's without its latent attention.

vLLM's CPU kernel takes the rotary columns of a query for whole ones, and turns others; its own
implementation in PyTorch turns the right ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def turn_in_pytorch() -> None:
    """For all models that are made in this process from now on."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    of_cpu: Any = RotaryEmbedding
    of_cpu.forward_cpu = RotaryEmbedding.forward_native


@contextmanager
def turned_in_pytorch() -> Iterator[None]:
    turn_in_pytorch()
    yield
