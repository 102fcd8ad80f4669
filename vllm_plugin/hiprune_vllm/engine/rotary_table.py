"""How many positions vLLM's tables of rotary embeddings know."""

from typing import Any, Final

TABLE_FACTOR: Final = 4
"""vLLM's table has this many times the rows that the text model was made for: videos need them."""


def rotary_rows(hf_config: Any) -> int:
    """Rows of vLLM's table of rotary embeddings: positions must stay below.

    Args:
        hf_config: of a checkpoint whose text model has M-RoPE.
    """
    text = hf_config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    if parameters.get("rope_type") == "yarn":
        trained = parameters["original_max_position_embeddings"]
        return int(trained * TABLE_FACTOR * parameters["factor"])
    return int(text.max_position_embeddings) * TABLE_FACTOR
