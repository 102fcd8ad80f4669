"""Which vLLM this plugin was tested with, and which engine options it cannot work with."""

from typing import Any, Final

from vllm.config import MultiModalConfig

from hiprune_vllm import tuning

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
    tuning.check()
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal.mm_encoder_tp_mode != "weights":
        raise ValueError(
            "hiprune-vllm sums scores over tensor-parallel ranks, so every rank has to encode "
            f"every image: --mm-encoder-tp-mode must be 'weights', got "
            f"{multimodal.mm_encoder_tp_mode!r}. Remove the flag."
        )
    speculative = vllm_config.speculative_config
    draft = speculative.draft_model_config if speculative is not None else None
    if draft is not None and draft.is_multimodal_model:
        raise ValueError(
            "hiprune-vllm cannot serve speculative decoding with a multimodal draft model, which "
            f"sees images one token ahead: got {draft.model!r}. Use a text-only draft or none."
        )
    if vllm_config.compilation_config.compile_mm_encoder:
        raise ValueError(
            "hiprune-vllm reads the queries and keys of two encoder layers, which a compiled "
            "encoder hides: compile_mm_encoder must be false. Remove it from --compilation-config."
        )


class _PositionsWithEmbeddings(MultiModalConfig):
    """A configuration that says "pruning is on" without the video pruning it is tied to."""

    def is_multimodal_pruning_enabled(self) -> bool:
        return True


def carry_positions_with_embeddings(vllm_config: Any) -> None:
    """Makes the model runner call `recompute_mrope_positions` for this engine's model.

    Symptom: kept tokens get the positions of their place in the shortened prompt.
    Cause: the runner asks `MultiModalConfig.is_multimodal_pruning_enabled`, which knows video
        pruning only.
    Change: this one configuration object answers yes.
    Remove when: vLLM asks the model instead.

    Raises:
        ValueError: vLLM's own video pruning is on; both would write the same positions.
    """
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal.video_pruning_rate:
        raise ValueError(
            "hiprune-vllm and vLLM's video pruning cannot both change positions: "
            f"--video-pruning-rate must be unset, got {multimodal.video_pruning_rate}"
        )
    multimodal.__class__ = _PositionsWithEmbeddings


def let_cpu_runner_ask() -> None:
    """Makes `CPUModelRunner.load_model` ask whether pruning is on; does nothing elsewhere.

    Symptom: on the CPU engine kept tokens get no 3-D positions and have the wrong width.
    Cause: it overrides `GPUModelRunner.load_model` without the lines that set the flag.
    Change: those lines run after it. Idempotent. To be called before a model is loaded: the
        runner imports the model's class when it is made, which is early enough.
    Remove when: the CPU runner sets the flag itself.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load_model = CPUModelRunner.load_model
    if getattr(load_model, "asks_for_pruning", False):
        return

    def load_and_ask(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        multimodal = self.model_config.multimodal_config
        self.is_multimodal_pruning_enabled = (
            multimodal is not None
            and multimodal.is_multimodal_pruning_enabled()
            and getattr(self.get_model(), "supports_multimodal_pruning", False)
        )

    load_and_ask.asks_for_pruning = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_and_ask
