"""Which vLLM this plugin was tested with, and which engine options it cannot work with."""

from typing import Any, Final

OLDEST: Final = (0, 32)
BELOW: Final = (0, 33)


def check_version(version: str) -> None:
    """Refuses a vLLM whose hooks were not tested.

    Raises:
        RuntimeError: `version` is outside [OLDEST, BELOW).
    """
    parts = version.split(".")
    try:
        minor = (int(parts[0]), int(parts[1]))
    except (IndexError, ValueError):
        minor = None
    if minor is None or not OLDEST <= minor < BELOW:
        wanted = f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, BELOW))}"
        raise RuntimeError(
            f"hiprune-vllm was tested with vllm {wanted}, found {version}. Install a tested "
            "release, or leave this plugin out by naming the others in VLLM_PLUGINS."
        )


def check_engine(vllm_config: Any) -> None:
    """Refuses engine options under which pruning would be wrong.

    Raises:
        ValueError: naming the option and what to do instead.
    """
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal.mm_encoder_tp_mode != "weights":
        raise ValueError(
            "hiprune-vllm sums scores over tensor-parallel ranks, so every rank has to encode "
            f"every image: --mm-encoder-tp-mode must be 'weights', got "
            f"{multimodal.mm_encoder_tp_mode!r}. Remove the flag."
        )
    if vllm_config.compilation_config.compile_mm_encoder:
        raise ValueError(
            "hiprune-vllm reads the queries and keys of two encoder layers, which a compiled "
            "encoder hides: compile_mm_encoder must be false. Remove it from --compilation-config."
        )
