"""Architectures that cannot be pruned by what their tokens are, and why.

They are served unpruned, and a `hiprune` object is refused with the reason. Architectures that are
in neither list nobody has looked at closely enough.
"""

from collections.abc import Sequence
from typing import Final

_QUERIES = (
    "its visual tokens are learned queries that look at the picture or a window of it, so that "
    "none of them stands for a place whose attention could be ranked"
)
_POOLED = (
    "its visual tokens are pooled from patches by attention, over overlapping crops, so that none "
    "of them has a score of its own patches"
)
_READS_TEXT = "it reads whole pages of text, where every visual token counts"
_OTHER_TOWER = "its vision encoder is timm's, whose attention keeps queries and keys to itself"

_OF_TRANSFORMERS = (
    "with --model-impl transformers pictures go through that library's own model, whose "
    "placeholders hiprune does not cut; serve the checkpoint by vLLM's own model where it has one "
    "(--model-impl vllm)"
)
_WRITTEN_OUT = (
    "Mistral's own format writes all tokens of a picture into the prompt before anything could "
    "leave some out; serve Hugging Face's format (--config-format hf --load-format hf "
    "--tokenizer-mode hf)"
)

UNSERVED: Final = {
    "Blip2ForConditionalGeneration": _QUERIES,
    "Granite4VisionForConditionalGeneration": _QUERIES,
    "MiniCPMO": _QUERIES,
    "MiniCPMV": _QUERIES,
    "MolmoForCausalLM": _POOLED,
    "Molmo2ForConditionalGeneration": _POOLED,
    "PixtralForConditionalGeneration": _WRITTEN_OUT,
    "TransformersMultiModalForCausalLM": _OF_TRANSFORMERS,
    "TransformersMultiModalMoEForCausalLM": _OF_TRANSFORMERS,
    "TransformersMultiModalEmbeddingModel": _OF_TRANSFORMERS,
    "TransformersMultiModalForSequenceClassification": _OF_TRANSFORMERS,
    "DeepseekVLV2ForCausalLM": _OTHER_TOWER,
    "OpenVLAForActionPrediction": _OTHER_TOWER,
    "DeepseekOCRForCausalLM": _READS_TEXT,
    "DeepseekOCR2ForCausalLM": _READS_TEXT,
    "DotsOCRForCausalLM": _READS_TEXT,
    "GlmOcrForConditionalGeneration": _READS_TEXT,
    "LightOnOCRForConditionalGeneration": _READS_TEXT,
    "NemotronParseForConditionalGeneration": _READS_TEXT,
    "PaddleOCRVLForConditionalGeneration": _READS_TEXT,
    "QianfanOCRForConditionalGeneration": _READS_TEXT,
    "UnlimitedOCRForCausalLM": _READS_TEXT,
}
"""Architecture of a checkpoint -> what stands in the way."""


def why_unserved(architectures: Sequence[str]) -> str:
    """Why a model without an adapter is not pruned, for people."""
    name = ", ".join(architectures) or "this model"
    reasons = [UNSERVED[one] for one in architectures if one in UNSERVED]
    return f"hiprune does not support {name}" + "".join(f": {reason}" for reason in reasons[:1])
