"""vLLM's model classes with pruning in front, each registered with its processor.

Imported by vLLM where it serves a checkpoint of one of them: here stands the gate for releases
whose hooks were not tested. A class is made when vLLM asks this module for it by its architecture,
so that no family is touched by what another one imports.
"""

from pkgutil import resolve_name
from typing import Any

import vllm
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import InputProcessingContext

from hiprune_vllm.engine import patches
from hiprune_vllm.engine.info import split_context
from hiprune_vllm.engine.model import PrunedModel
from hiprune_vllm.engine.positions import PrunedMRopeModel
from hiprune_vllm.engine.processing import PrunedProcessor
from hiprune_vllm.engine.proof import prove
from hiprune_vllm.engine.registration import CLASSES
from hiprune_vllm.engine.releases import check_version
from hiprune_vllm.engine.rotary import PrunedMRopeProcessor
from hiprune_vllm.models.base import FamilyAdapter

check_version(vllm.__version__)


def __getattr__(architecture: str) -> Any:
    """The class that serves an architecture of `CLASSES`."""
    if architecture not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {architecture!r}")
    module, adapter = CLASSES[architecture]
    module, _, name = module.partition(":")
    vllm_class = resolve_name(f"vllm.model_executor.models.{module}:{name or architecture}")
    family: FamilyAdapter = resolve_name(f"hiprune_vllm.models.{adapter}")()
    patches.where_a_class_is_asked_for(family)
    mixin = PrunedMRopeModel if family.mrope else PrunedModel
    # It goes by the name of vLLM's own: vLLM's proposer looks that up in a list to find out where
    # the configuration of a model with a text-only draft has its image token.
    made = type(
        vllm_class.__name__, (mixin, vllm_class), {"family": family, "__module__": __name__}
    )
    globals()[architecture] = _registered(made, vllm_class, family)
    return made


def _registered(made: Any, vllm_class: Any, family: FamilyAdapter) -> Any:
    """Registers `vllm_class`'s own processor factories, with pruning in front, for `made`."""
    stock = vllm_class._processor_factory

    def build_info(ctx: InputProcessingContext) -> Any:
        ctx, pruning = split_context(ctx, family)
        info = stock.info(ctx)
        info.pruning = pruning.within(pruning.family.pixels(info) if pruning.encoder else None)
        return info

    def build_processor(info: Any, dummy_inputs: Any) -> Any:
        # vLLM's factory picks a processor class by checkpoint; whichever it is gets the mixin.
        plain = type(stock.processor(info, dummy_inputs))
        name = f"HiPrune{plain.__name__}"
        if family.mrope:
            pruned = type(name, (PrunedMRopeProcessor, plain), {"vllm_class": vllm_class})
        else:
            pruned = type(name, (PrunedProcessor, plain), {})
        processor = pruned(info, dummy_inputs)
        prove(processor)
        return processor

    return MULTIMODAL_REGISTRY.register_processor(
        build_processor, info=build_info, dummy_inputs=stock.dummy_inputs
    )(made)
