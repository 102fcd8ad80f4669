"""vLLM's model classes with pruning in front, each registered with its processor.

Imported by vLLM where it serves a checkpoint of one of them: here stands the gate for releases
whose hooks were not tested.
"""

from collections.abc import Callable
from typing import Any

import vllm
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import InputProcessingContext

from hiprune_vllm.engine.compat import named_as
from hiprune_vllm.engine.model import PrunedModel
from hiprune_vllm.engine.positions import PrunedMRopeModel
from hiprune_vllm.engine.processing import PrunedProcessor, split_context
from hiprune_vllm.engine.proof import prove
from hiprune_vllm.engine.releases import check_version
from hiprune_vllm.engine.rotary import PrunedMRopeProcessor
from hiprune_vllm.models.base import FamilyAdapter
from hiprune_vllm.models.llava import LlavaAdapter
from hiprune_vllm.models.llava_next import LlavaNextAdapter
from hiprune_vllm.models.qwen2_5_vl import Qwen25VLAdapter

check_version(vllm.__version__)


def _register(
    vllm_class: Any, family: FamilyAdapter, mixin: Any = PrunedProcessor, **attributes: Any
) -> Callable[[Any], Any]:
    """Class decorator: registers `vllm_class`'s own processor factories with pruning in front.

    Args:
        family: the adapter.
        mixin: what is in front of vLLM's processor, and its class attributes.
    """
    stock = vllm_class._processor_factory

    def build_info(ctx: InputProcessingContext) -> Any:
        ctx, pruning = split_context(ctx, family)
        info = stock.info(ctx)
        info.pruning = pruning
        return info

    def build_processor(info: Any, dummy_inputs: Any) -> Any:
        # vLLM's factory picks a processor class by checkpoint; whichever it is gets the mixin.
        plain = type(stock.processor(info, dummy_inputs))
        pruned = type(f"HiPrune{plain.__name__}", (mixin, plain), attributes)
        processor = pruned(info, dummy_inputs)
        prove(processor)
        return processor

    return MULTIMODAL_REGISTRY.register_processor(
        build_processor, info=build_info, dummy_inputs=stock.dummy_inputs
    )


@_register(LlavaForConditionalGeneration, LlavaAdapter())
class HiPruneLlava(PrunedModel, LlavaForConditionalGeneration):
    family = LlavaAdapter()


@_register(LlavaNextForConditionalGeneration, LlavaNextAdapter())
class HiPruneLlavaNext(PrunedModel, LlavaNextForConditionalGeneration):
    family = LlavaNextAdapter()


@_register(
    Qwen2_5_VLForConditionalGeneration,
    Qwen25VLAdapter(),
    PrunedMRopeProcessor,
    grids=staticmethod(Qwen2_5_VLForConditionalGeneration.iter_mm_grid_thw),
)
@named_as(Qwen2_5_VLForConditionalGeneration)
class HiPruneQwen25VL(PrunedMRopeModel, Qwen2_5_VLForConditionalGeneration):
    family = Qwen25VLAdapter()
