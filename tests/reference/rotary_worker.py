"""The extension of workers that are processes of their own, where importing it is what counts."""

from hiprune_vllm.engine.explain import ExplainExtension
from tests.reference.rotary import turn_in_pytorch

turn_in_pytorch()


class Extension(ExplainExtension):
    """Of a worker."""
